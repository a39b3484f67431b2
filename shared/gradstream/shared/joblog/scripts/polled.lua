#!lua flags=allow-oom
-- Note that a client knows this future: the request that made it is not repeated any more, and one like it is a new one.
-- KEYS  1 log
-- ARGV  1 prefix  2 future
-- Reply 1 a repetition would have been recognised until now, 0 not

local key = P .. 'future:' .. ARGV[2]
local again = redis.call('HGET', key, 'again')
if not again then return 0 end
redis.call('DEL', again)
redis.call('HDEL', key, 'again')
return 1
