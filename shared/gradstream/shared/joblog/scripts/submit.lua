#!lua
-- Accept one job, or answer why not and change nothing.
-- KEYS  1 log
-- ARGV  1 prefix  2 owner  3 seq ('' takes the model's next one)  4 op  5 tenant  6 digest  7 bytes (as stored)  8 tokens  9 enc (raw|zstd)
--       10 payload ('' when a blob holds it)  11 blob key ('' when inline)  12 ordered (1|0)  13 max jobs of this owner
--       14 window  15 max bytes of the tenant  16 max bytes in all  17 seqs kept  18 makes a model (1|0)
--       19 max jobs of the tenant  20 max unread bytes of the tenant  21 key of this very call  22 key of the request that it may
--       repeat ('' when none)  23 how long both are remembered, s  24 how long ago the request arrived, ms
--       25 epoch and 26 newest log entry that the caller knows of  27.. record fields, name and value in turn
-- Reply {ok, status, duplicate 0|1, seq, epoch, newest log entry}   accepted, or known already
--       {behind}                               this Redis was put back in time, and is not filled again yet
--       {unknown} {closed}                     no such model or another tenant's; the model was unloaded
--       {conflict, payload, the digest of that one} | {conflict, refused|gap|exists|old}
--       {full, window|jobs|tenant_jobs|unread|tenant_bytes|bytes|share, used, limit, retry_ms}
--       {noblob}                               the blob expired between SET and this call; send both again

local owner, seq, op, tenant, digest = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local bytes, blob, ordered, makes_model = tonumber(ARGV[7]), ARGV[11], ARGV[12] == '1', ARGV[18] == '1'
local takes_next, once, again = seq == '', ARGV[21], ARGV[22]
local model_key, seqs_key = P .. 'model:' .. owner, P .. 'seqs:' .. owner
if takes_next then seq = int(next_free(owner)) end
local future = owner .. ':' .. seq
local future_key = P .. 'future:' .. future

local model = { false, false, false, false, false, false, false, false, false, false }
if ordered then
  model = redis.call('HMGET', model_key, 'tenant', 'state', lane_field('next_seq', seq), 'queued', 'held', 'tail', 'applied', 'made_at',
    'ended_at', 'turned_ms')
  if model[1] and model[1] ~= tenant then return { 'unknown' } end
end

-- True when the model failed or was lost, and no creation waits that makes it anew.
local function is_broken()
  local is_made = tonumber(model[7] or '-1') >= tonumber(model[8] or '-1')
  return is_made and (model[2] == 'failed' or model[2] == 'lost')
end

-- The refusal of a job that is to take the next seq, or nothing. A model that was unloaded, failed or was lost may be made again. What
-- counts is the end of the log: an unload that waits there ends the model for everything that comes behind it.
local function refused_next()
  if not model[1] then return not makes_model and { 'unknown' } or nil end
  local is_over = is_ended(model[6], model[2])
  if not makes_model then return is_over and { 'closed' } or nil end
  if not is_over and not is_broken() then return { 'conflict', 'exists' } end
end

-- The seq of the job that this request made when it came before, or nothing. A request that arrived after the client had asked for that
-- job, or after the model's life with that job had ended, is a new one; one that waited here meanwhile is not. polled.lua notes the former.
local function repeated()
  local stored = again ~= '' and redis.call('GET', again)
  if not stored then return nil end
  local accepted, polled_ms = string.match(stored, '^(%d+):?(%d*)$')
  local at, arrived_ms = tonumber(accepted), NOW - tonumber(ARGV[24])
  if polled_ms ~= '' and arrived_ms >= tonumber(polled_ms) then return nil end
  local is_past = at < tonumber(model[8] or '0') or (model[6] == 'gone' and at < tonumber(model[9] or '0'))
  if is_past and arrived_ms >= tonumber(model[10] or '0') then return nil end
  if makes_model and is_broken() then return nil end
  return accepted
end

-- True when the caller knows of what this Redis does not have, and no gang leads that took over since: the model's next seq may be that
-- of a job that only the log on disk knows.
local function is_behind()
  mend_stat()
  local epoch = redis.call('GET', P .. 'epoch') or '0'
  local newest = redis.call('HGET', P .. 'stat', 'log') or '0'
  if tonumber(epoch) >= tonumber(ARGV[25]) and tonumber(newest) >= tonumber(ARGV[26]) then return false end
  local card = tonumber(epoch) ~= tonumber(ARGV[25]) and redis.call('EXISTS', P .. 'lease') == 1 and redis.call('GET', P .. 'card')
  return not (card and int(cjson.decode(card).epoch) == epoch)
end

-- The answer to a job that was taken.
local function taken(status, is_duplicate, as_seq)
  local newest = redis.call('HGET', P .. 'stat', 'log') or '0'
  return { 'ok', status, is_duplicate, as_seq, redis.call('GET', P .. 'epoch') or '0', newest }
end

local is_held = false
if takes_next then
  if is_behind() then return { 'behind' } end
  local accepted = redis.call('GET', once) or repeated()
  if accepted then
    return taken(redis.call('HGET', P .. 'future:' .. owner .. ':' .. accepted, 'status') or 'done', 1, accepted)
  end
  local refusal = refused_next()
  if refusal then return refusal end
else
  local known = redis.call('HMGET', future_key, 'digest', 'status', 'tenant')
  if known[1] then
    if known[3] ~= tenant then return { 'unknown' } end
    if known[1] ~= digest then return { 'conflict', 'payload', known[1] } end
    return taken(known[2], 1, seq)
  end
end

if ordered and not takes_next then
  if not model[1] and not makes_model then return { 'unknown' } end
  local used = redis.call('HGET', seqs_key, seq)
  if used == digest then return taken('done', 1, seq) end
  if used == 'refused' or used == 'gap' then return { 'conflict', used } end
  if used then return { 'conflict', 'payload', used } end
  if makes_model then
    if model[1] then return { 'conflict', 'exists' } end
  else
    if model[2] == 'unloaded' then return { 'closed' } end
    local ahead = tonumber(seq) - next_in_lane(model[3], seq)
    if ahead < 0 then return { 'conflict', 'old' } end
    is_held = ahead > 0
    if ahead >= tonumber(ARGV[14]) then return { 'full', 'window', int(ahead), ARGV[14], '1000' } end
  end
end

-- Held jobs may fill three quarters of a budget only, so that the job they wait for always finds room.
local stat = redis.call('HMGET', P .. 'stat', 'queued_bytes', 'queued_jobs', 'ewma_ms')
local retry_ms = int((tonumber(stat[2]) or 0) * (tonumber(stat[3]) or 0))
local function is_over(used, added, limit)
  if is_held then limit = limit * 3 / 4 end
  return used + added > limit
end
local jobs
if ordered then
  jobs = (tonumber(model[4]) or 0) + (tonumber(model[5]) or 0)
else
  jobs = tonumber(redis.call('HGET', P .. 'owners', owner)) or 0
end
if is_over(jobs, 1, tonumber(ARGV[13])) then return { 'full', 'jobs', int(jobs), ARGV[13], retry_ms } end
local tenant_jobs = tonumber(redis.call('HGET', P .. 'tenant_jobs', tenant)) or 0
if is_over(tenant_jobs, 1, tonumber(ARGV[19])) then
  return { 'full', 'tenant_jobs', int(tenant_jobs), ARGV[19], retry_ms }
end
-- What gives something back is taken all the same, and so are saves: the server makes them before it unloads a model, and their results
-- are a name.
if op ~= 'unload_model' and op ~= 'delete_checkpoint' and op ~= 'save_weights' then
  local unread = unread_bytes(tenant)
  if unread > tonumber(ARGV[20]) then return { 'full', 'unread', int(unread), ARGV[20], retry_ms } end
end
local tenant_bytes = tonumber(redis.call('HGET', P .. 'tenants', tenant)) or 0
if is_over(tenant_bytes, bytes, tonumber(ARGV[15])) then
  return { 'full', 'tenant_bytes', int(tenant_bytes), ARGV[15], retry_ms }
end
local all_bytes = tonumber(stat[1]) or 0
if is_over(all_bytes, bytes, tonumber(ARGV[16])) then return { 'full', 'bytes', int(all_bytes), ARGV[16], retry_ms } end
-- Nobody may hold more than is still free: with N tenants that take what they can, each ends at one part of N + 1, and the free part
-- is there for the next one.
local free_bytes = tonumber(ARGV[16]) - all_bytes
if is_over(tenant_bytes, bytes, free_bytes) then
  return { 'full', 'share', int(tenant_bytes), int(free_bytes), retry_ms }
end
if blob ~= '' and redis.call('EXISTS', blob) == 0 then return { 'noblob' } end

-- Accepted: from here on nothing fails.
if blob ~= '' then redis.call('PERSIST', blob) end
redis.call('HINCRBY', P .. 'stat', 'queued_jobs', 1)
redis.call('HINCRBY', P .. 'stat', 'queued_bytes', ARGV[7])
redis.call('HINCRBY', P .. 'tenants', tenant, ARGV[7])
redis.call('HINCRBY', P .. 'tenant_jobs', tenant, 1)
redis.call('HSET', future_key, 'status', 'queued', 'op', op, 'owner', owner, 'seq', seq, 'tenant', tenant,
  'at_ms', int(NOW), 'digest', digest, 'bytes', ARGV[7], 'tokens', ARGV[8], 'enc', ARGV[9], 'ordered', ARGV[12])
if blob ~= '' then redis.call('HSET', future_key, 'blob', blob) end

if is_held then
  redis.call('HSET', seqs_key, seq, digest)
  redis.call('HSET', future_key, 'status', 'held', 'payload', ARGV[10])
  redis.call('ZADD', P .. 'held:' .. owner, NOW, seq)
  redis.call('ZADD', P .. 'gaps', 'NX', NOW, owner)
  redis.call('HINCRBY', model_key, 'held', 1)
  return taken('held', 0, seq)
end

local record = {}
for i = 27, #ARGV do record[i - 26] = ARGV[i] end
local entry = append(future, { op = op, owner = owner, seq = seq, tenant = tenant, digest = digest, bytes = ARGV[7],
  tokens = ARGV[8], at_ms = int(NOW), enc = ARGV[9], payload = ARGV[10], blob = blob,
  again = string.sub(again, #P + 1), record = #record > 0 and cmsgpack.pack(record) or '' })
redis.call('HSET', future_key, 'entry', entry)
if not ordered then
  redis.call('HINCRBY', P .. 'owners', owner, 1)
  return taken('queued', 0, seq)
end
redis.call('HSET', seqs_key, seq, digest)
if makes_model then
  redis.call('PERSIST', seqs_key)
  for i = 1, #record, 2 do redis.call('HSET', model_key, record[i], record[i + 1]) end
  if takes_next then redis.call('HSET', model_key, 'recorded_at', seq) end
  redis.call('HDEL', model_key, 'scanned')
  if not model[1] then redis.call('HSET', model_key, 'tenant', tenant) end
  -- A record that a scan of the checkpoints made has none of these.
  redis.call('HSETNX', model_key, 'applied', int(tonumber(seq) - 1))
  for _, field in ipairs({ 'queued', 'held' }) do redis.call('HSETNX', model_key, field, '0') end
  -- The state of one whose unload is still to come is that of the model in memory.
  if not model[1] or model[2] == 'unloaded' or model[2] == 'failed' or model[2] == 'lost' then
    redis.call('HSET', model_key, 'state', 'creating', 'epoch', '0')
    redis.call('HDEL', model_key, 'error')
  end
  redis.call('SADD', P .. 'models', owner)
  enlist('model', owner)
end
if takes_next or model[6] then note_end(owner, seq, op) end
if takes_next then
  redis.call('SET', once, seq, 'EX', ARGV[23])
  if again ~= '' then
    redis.call('SET', again, seq, 'EX', ARGV[23])
    redis.call('HSET', future_key, 'again', again)
  end
end
redis.call('HINCRBY', model_key, 'queued', 1)
drain(owner, tonumber(seq), tonumber(ARGV[17]))
return taken('queued', 0, seq)
