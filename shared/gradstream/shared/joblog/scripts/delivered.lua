#!lua flags=allow-oom
-- Shorten the lives of delivered results, and count them as unread no more. Their models are in use.
-- KEYS  1 log
-- ARGV  1 prefix  2 delivered_ttl_s  3.. futures
-- Reply how many of the futures have an outcome

local num_done = 0
for i = 3, #ARGV do
  local key = P .. 'future:' .. ARGV[i]
  local f = redis.call('HMGET', key, 'done_ms', 'tenant', 'owner', 'ordered')
  if f[1] then
    num_done = num_done + 1
    redis.call('EXPIRE', key, ARGV[2], 'LT')
    count_read(f[2], ARGV[i])
    local model = P .. 'model:' .. (f[3] or '')
    if f[4] == '1' and redis.call('EXISTS', model) == 1 then redis.call('HSET', model, 'seen_ms', int(NOW)) end
  end
end
return num_done
