#!lua
-- Make a record unless it exists.
-- KEYS  1 log
-- ARGV  1 prefix  2 kind  3 id  4 mark of this very call (a retry of it finds its own mark)  5.. field and value in turn
-- Reply 1 made by this call, 0 it existed

local key = P .. ARGV[2] .. ':' .. ARGV[3]
if redis.call('EXISTS', key) == 1 then
  return redis.call('HGET', key, 'made_by') == ARGV[4] and 1 or 0
end
redis.call('HSET', key, 'made_by', ARGV[4])
for i = 5, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
enlist(ARGV[2], ARGV[3])
return 1
