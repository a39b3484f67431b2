#!lua flags=allow-oom
-- Take back this epoch's mark on jobs that it leaves undone on a clean stop. A job that it did not mark stays as it is.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3.. futures
-- Reply {ok} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
for i = 3, #ARGV do
  local key = P .. 'future:' .. ARGV[i]
  local f = redis.call('HMGET', key, 'status', 'started_epoch')
  if f[1] == 'queued' and f[2] == epoch then
    redis.call('HINCRBY', key, 'starts', -1)
    redis.call('HDEL', key, 'started_epoch')
  end
end
return { 'ok' }
