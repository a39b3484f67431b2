#!lua flags=allow-oom
-- Fail a sample that nobody waits for any more, unless it has started. Its log entry stays and is stepped over.
-- KEYS  1 log
-- ARGV  1 prefix  2 future  3 tenant  4 unread_ttl_s  5 keep_blob_s  6 notes kept
-- Reply 1 cancelled by this call, 0 unknown, another tenant's, running, or over

local future = ARGV[2]
local key = P .. 'future:' .. future
local f = redis.call('HMGET', key, 'tenant', 'status', 'op', 'started_epoch')
if f[1] ~= ARGV[3] or f[2] ~= 'queued' or f[3] ~= 'sample' then return 0 end
if f[4] and f[4] == redis.call('GET', P .. 'epoch') then return 0 end
local outcome = failure('cancelled', 'user', 'the client cancelled this sample before it had started')
finish(future, 'failed', outcome, '', 'queued', ARGV[4], ARGV[5])
redis.call('HSET', key, 'cancelled', '1')
notify(future, ARGV[6])
return 1
