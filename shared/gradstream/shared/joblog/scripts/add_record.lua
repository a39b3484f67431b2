#!lua
-- Make a record unless it exists.
-- KEYS  1 log
-- ARGV  1 prefix  2 record key  3 mark of this very call (a retry of it finds its own mark)  4.. field and value in turn
-- Reply 1 made by this call, 0 it existed

if redis.call('EXISTS', ARGV[2]) == 1 then
  return redis.call('HGET', ARGV[2], 'made_by') == ARGV[3] and 1 or 0
end
redis.call('HSET', ARGV[2], 'made_by', ARGV[3])
for i = 4, #ARGV, 2 do redis.call('HSET', ARGV[2], ARGV[i], ARGV[i + 1]) end
return 1
