#!lua flags=allow-oom
-- Shorten a delivered result's life, and count it as unread no more. Its model is in use.
-- KEYS  1 log
-- ARGV  1 prefix  2 future  3 delivered_ttl_s
-- Reply 1 the future has an outcome, 0 it has none, or there is no such future

local key = P .. 'future:' .. ARGV[2]
local f = redis.call('HMGET', key, 'done_ms', 'tenant', 'owner', 'ordered')
if not f[1] then return 0 end
redis.call('EXPIRE', key, ARGV[3], 'LT')
count_read(f[2], ARGV[2])
local model = P .. 'model:' .. (f[3] or '')
if f[4] == '1' and redis.call('EXISTS', model) == 1 then redis.call('HSET', model, 'seen_ms', int(NOW)) end
return 1
