#!lua flags=allow-oom
-- Mark models that were ready in an earlier epoch as lost.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch
-- Reply {ok, model ...} every lost model on record, new and old | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local reply = { 'ok' }
for _, model in ipairs(redis.call('SMEMBERS', P .. 'models')) do
  local record = redis.call('HMGET', P .. 'model:' .. model, 'state', 'epoch')
  if record[1] == 'ready' and record[2] ~= epoch then
    redis.call('HSET', P .. 'model:' .. model, 'state', 'lost')
    record[1] = 'lost'
  end
  if record[1] == 'lost' then reply[#reply + 1] = model end
end
return reply
