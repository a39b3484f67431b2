#!lua flags=allow-oom
-- Note that a client knows this future: the request that made it is not repeated any more, and one like it is a new one.
-- KEYS  1 log
-- ARGV  1 prefix  2 future  3 tenant
-- Reply 1 a repetition would have been recognised until now, 0 not

local key = P .. 'future:' .. ARGV[2]
local f = redis.call('HMGET', key, 'again', 'tenant')
if not f[1] or f[2] ~= ARGV[3] then return 0 end
redis.call('DEL', f[1])
redis.call('HDEL', key, 'again')
return 1
