#!lua flags=allow-oom
-- Count that this epoch runs these jobs, once per epoch and job. A job that has an outcome stays as it is.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3.. futures
-- Reply {ok, future ...} those that were cancelled, and need not run | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local reply = { 'ok' }
for i = 3, #ARGV do
  local key = P .. 'future:' .. ARGV[i]
  local f = redis.call('HMGET', key, 'status', 'started_epoch', 'cancelled')
  if f[1] == 'queued' and f[2] ~= epoch then
    redis.call('HINCRBY', key, 'starts', 1)
    redis.call('HSET', key, 'started_epoch', epoch)
  elseif f[3] then
    reply[#reply + 1] = ARGV[i]
  end
end
return reply
