#!lua
-- Set fields of a record, making it if needed.
-- KEYS  1 log
-- ARGV  1 prefix  2 kind  3 id  4 1 when only an existing record is changed  5.. field and value in turn
-- Reply 1 set, 0 there is no such record

local key = P .. ARGV[2] .. ':' .. ARGV[3]
if ARGV[4] == '1' and redis.call('EXISTS', key) == 0 then return 0 end
for i = 5, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
enlist(ARGV[2], ARGV[3])
return 1
