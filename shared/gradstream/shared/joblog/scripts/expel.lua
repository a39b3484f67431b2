#!lua flags=allow-oom
-- Fail open jobs that took the seqs of jobs in the log on disk, when a Redis that was put back in time gave those out once more.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 unread_ttl_s  4 keep_blob_s  5 notes kept
--       then of each logged job: future, digest, the digest that earlier versions gave it, 1 when it has run
-- Reply {ok, futures that are not those of the logged jobs ...} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local MESSAGE = 'this job was lost while the queue was recovering: another one had its seq; send it again'
local reply, woken = { 'ok' }, {}

local function expel(future, digest, has_run, f)
  local owner, seq = f[4], f[5]
  if f[1] == 'held' then
    redis.call('ZREM', P .. 'held:' .. owner, seq)
    update_gap(owner)
  end
  finish(future, 'failed', failure('server_error', 'server', MESSAGE), '', f[1], ARGV[3], ARGV[4])
  woken[#woken + 1] = future
  if f[3] ~= '1' then return end
  redis.call('HSET', P .. 'seqs:' .. owner, seq, digest)
  local model, field = P .. 'model:' .. owner, lane_field('applied', seq)
  if has_run and tonumber(seq) > (tonumber(redis.call('HGET', model, field)) or -1) then
    redis.call('HSET', model, field, seq)
  end
  -- An unload that does not run ends nothing.
  if f[6] == 'unload_model' then unended(owner, seq) end
end

for i = 6, #ARGV, 4 do
  local future, digest = ARGV[i], ARGV[i + 1]
  local f = redis.call('HMGET', P .. 'future:' .. future, 'status', 'digest', 'ordered', 'owner', 'seq', 'op')
  if f[1] and f[2] ~= digest and f[2] ~= ARGV[i + 2] then
    if f[1] == 'queued' or f[1] == 'held' then expel(future, digest, ARGV[i + 3] == '1', f) end
    reply[#reply + 1] = future
  end
end
if #woken > 0 then notify(table.concat(woken, ' '), ARGV[5]) end
return reply
