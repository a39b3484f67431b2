#!lua flags=allow-oom
-- Say which models a new gang holds; every other one that was ready is lost, with the reason that the gang gives.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 reason for those that are not named  4 number of models it holds  then those
--       then model and reason in turn, for those it could not recover
-- Reply {ok, number of models it need not hold, those: they are unloaded or gone, every lost model on record, new and old ...}
--       | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local num_held = tonumber(ARGV[4])
local is_held, reasons, needless = {}, {}, {}
for i = 5, 4 + num_held do
  local model = ARGV[i]
  local state = redis.call('HGET', P .. 'model:' .. model, 'state')
  if state == 'ready' then
    redis.call('HSET', P .. 'model:' .. model, 'epoch', epoch)
    is_held[model] = true
  else
    needless[#needless + 1] = model
  end
end
for i = 5 + num_held, #ARGV, 2 do reasons[ARGV[i]] = ARGV[i + 1] end

local reply = { 'ok', #needless }
for _, model in ipairs(needless) do reply[#reply + 1] = model end
for _, model in ipairs(redis.call('SMEMBERS', P .. 'models')) do
  local key = P .. 'model:' .. model
  local state = redis.call('HGET', key, 'state')
  if state == 'ready' and not is_held[model] then
    redis.call('HSET', key, 'state', 'lost', 'error', reasons[model] or ARGV[3])
    state = 'lost'
  end
  if state == 'lost' then reply[#reply + 1] = model end
end
return reply
