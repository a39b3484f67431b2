#!lua
-- Count a record's field up by one.
-- KEYS  1 log
-- ARGV  1 prefix  2 kind  3 id  4 field
-- Reply the new count, 0 when there is no such record

local key = P .. ARGV[2] .. ':' .. ARGV[3]
if redis.call('EXISTS', key) == 0 then return 0 end
return redis.call('HINCRBY', key, ARGV[4], 1)
