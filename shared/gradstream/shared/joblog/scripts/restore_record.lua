#!lua flags=allow-oom
-- Put a record back that a lost Redis had, unless there is a whole one: a job that was put back before may have left a few fields.
-- A model that was made again has the record of its last creation.
-- A session counts as heard of now: nobody could tell while Redis was away whether its client lives.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 kind  4 id  5 seq of the job that made the model, '' for other records
--       6.. field and value in turn
-- Reply {ok, 1 put back | 0 was there} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local key = P .. ARGV[3] .. ':' .. ARGV[4]
if ARGV[3] == 'model' and ARGV[5] ~= '' then
  local fields = {}
  for i = 6, #ARGV do fields[i - 5] = ARGV[i] end
  return { 'ok', describe_model(ARGV[4], ARGV[5], fields) and 1 or 0 }
end
if redis.call('HEXISTS', key, 'created_ms') == 1 then return { 'ok', 0 } end
for i = 6, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
if ARGV[3] == 'session' then redis.call('HSET', key, 'heartbeat_ms', int(NOW)) end
enlist(ARGV[3], ARGV[4])
return { 'ok', 1 }
