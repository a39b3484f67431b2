#!lua flags=allow-oom
-- Name the newest snapshot, by the holder of the epoch only.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3.. field and value in turn
-- Reply {ok} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
redis.call('HSET', P .. 'snapshot', 'epoch', epoch, 'at_ms', int(NOW))
for i = 3, #ARGV, 2 do redis.call('HSET', P .. 'snapshot', ARGV[i], ARGV[i + 1]) end
return { 'ok' }
