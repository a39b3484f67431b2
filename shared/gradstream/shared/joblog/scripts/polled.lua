#!lua flags=allow-oom
-- Note that a client knows this future since now: the request that made it is not repeated any more, and one like it that arrives later is
-- a new one. A repetition that waits for room was sent before, and is still recognised.
-- KEYS  1 log
-- ARGV  1 prefix  2 future  3 tenant
-- Reply 1 a repetition would have been recognised until now, 0 not

local key = P .. 'future:' .. ARGV[2]
local f = redis.call('HMGET', key, 'again', 'tenant', 'seq')
if not f[1] or f[2] ~= ARGV[3] then return 0 end
redis.call('HDEL', key, 'again')
-- A later job of the same request may stand there by now.
if redis.call('GET', f[1]) ~= f[3] then return 0 end
redis.call('SET', f[1], f[3] .. ':' .. int(NOW), 'KEEPTTL')
return 1
