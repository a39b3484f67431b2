#!lua flags=allow-oom
-- Remove a record with its places in the lists. A model's goes only when it takes no more jobs and none is open.
-- KEYS  1 log
-- ARGV  1 prefix  2 kind  3 id  4 created_ms that the record must have, '' for any
-- Reply 1 removed by this call, 0 there is no such record, or it is another one by now, or a model that is still in use

local kind, id = ARGV[2], ARGV[3]
local key = P .. kind .. ':' .. id
local record = redis.call('HMGET', key, 'created_ms', 'state', 'queued', 'held', 'tail', 'next_seq')
if redis.call('EXISTS', key) == 0 then return 0 end
if ARGV[4] ~= '' and record[1] ~= ARGV[4] then return 0 end
if kind == 'model' then
  local is_over = record[2] == 'unloaded' or record[2] == 'failed' or record[2] == 'lost'
  if not is_over or tonumber(record[3] or 0) + tonumber(record[4] or 0) > 0 then return 0 end
  -- A model of this name that is made later goes on behind it: the log on disk may still know its futures.
  if record[5] then redis.call('HSET', P .. 'next_seqs', id, record[6]) end
  redis.call('DEL', P .. 'seqs:' .. id)
  redis.call('SREM', P .. 'models', id)
end
remove_record(kind, id)
return 1
