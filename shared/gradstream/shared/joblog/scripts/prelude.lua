-- Functions that several scripts share; the loader puts this text before each of them.
-- Every script gets P = ARGV[1], the key prefix `gs:{ENGINE}:`. All keys are derived from it, so they share one hash slot;
-- KEYS[1] is the log, which routes the call. Times are the server's (TIME), in milliseconds. Seqs and ids travel as text.

local P = ARGV[1]

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function int(n)
  return string.format('%.0f', n)
end

local NOW = now_ms()

-- A model's seqs come in lanes, blocks of 10^10 with an order of their own: lane 0 has 1, 2, ..., lane 3 has 30000000001, ...
local LANE_SEQS = 10000000000

local function lane_of(seq)
  return math.floor(tonumber(seq) / LANE_SEQS)
end

-- The model's field that holds a position (next_seq, applied) of the lane of seq.
local function lane_field(name, seq)
  local lane = lane_of(seq)
  return lane == 0 and name or name .. ':' .. int(lane)
end

-- The next seq of the lane of seq; stored is its field's value, false when the lane is new.
local function next_in_lane(stored, seq)
  return tonumber(stored) or lane_of(seq) * LANE_SEQS + 1
end

-- The seq that a model's next job gets when the server numbers them: 0 for the first, which makes the model. What is left of a model
-- whose record was removed is where it went on.
local function next_free(model)
  return tonumber(redis.call('HGET', P .. 'model:' .. model, 'next_seq') or redis.call('HGET', P .. 'next_seqs', model)) or 0
end

-- Note what a job at the end of the log means for a model whose jobs the server numbers: `tail` is gone behind an unload, whose seq is
-- `ended_at`, and live behind a creation, whose seq is `made_at`; `turned_ms` is when the newest of both came.
local function note_end(model, seq, op)
  local known = redis.call('HMGET', P .. 'model:' .. model, 'made_at', 'ended_at')
  if tonumber(seq) <= math.max(tonumber(known[1] or '-1'), tonumber(known[2] or '-1')) then return end
  if op == 'unload_model' then
    redis.call('HSET', P .. 'model:' .. model, 'tail', 'gone', 'ended_at', seq, 'turned_ms', int(NOW))
  elseif op == 'create_model' then
    redis.call('HSET', P .. 'model:' .. model, 'tail', 'live', 'made_at', seq, 'turned_ms', int(NOW))
  end
end

-- The unload of this seq has failed: the model lives on, unless it was made again behind it already.
local function unended(model, seq)
  local known = redis.call('HMGET', P .. 'model:' .. model, 'tail', 'ended_at')
  if known[1] == 'gone' and known[2] == seq then redis.call('HSET', P .. 'model:' .. model, 'tail', 'live') end
end

-- True when nothing more can run behind a model's last job.
local function is_ended(tail, state)
  return tail == 'gone' or (not tail and state == 'unloaded')
end

-- A seq as a person reads it, like seq_text in ids.py.
local function seq_text(seq)
  local lane = lane_of(seq)
  local seq_id = int(tonumber(seq) - lane * LANE_SEQS)
  return lane == 0 and seq_id or seq_id .. ' of lane ' .. int(lane)
end

-- Make `stat` anew from the streams when somebody deleted it: the last ids, which everything that is added must be above.
local function mend_stat()
  if redis.call('HEXISTS', P .. 'stat', 'log') == 1 then return end
  for _, name in ipairs({ 'log', 'notes', 'journal' }) do
    local info = redis.call('EXISTS', P .. name) == 1 and redis.call('XINFO', 'STREAM', P .. name) or {}
    for i = 1, #info, 2 do
      local id = info[i] == 'last-generated-id' and info[i + 1] or '0-0'
      if id ~= '0-0' then redis.call('HSET', P .. 'stat', name, name == 'journal' and id or string.match(id, '^%d+')) end
    end
  end
end

-- Append a job to the log; f holds its plain fields by name, again and record where it has them: the name by which a repetition of its
-- request is found, and the fields of the model's record that it makes, name and value in turn, as msgpack. Returns the entry id. Ids are 1-0, 2-0, ... without a gap.
local function append(future, f)
  mend_stat()
  local id = int(redis.call('HINCRBY', P .. 'stat', 'log', 1)) .. '-0'
  local rest = { 'payload', f.payload }
  if f.blob and f.blob ~= '' then rest = { 'blob', f.blob } end
  for _, name in ipairs({ 'again', 'record' }) do
    if f[name] and f[name] ~= '' then
      rest[#rest + 1] = name
      rest[#rest + 1] = f[name]
    end
  end
  redis.call('XADD', P .. 'log', id, 'v', '1', 'future', future, 'op', f.op, 'owner', f.owner, 'seq', f.seq,
    'tenant', f.tenant, 'digest', f.digest, 'bytes', f.bytes, 'tokens', f.tokens, 'at_ms', f.at_ms, 'enc', f.enc,
    unpack(rest))
  return id
end

-- Wake everybody who waits for one of the futures (a space-separated list). Note ids are 1-0, 2-0, ... without a gap.
local function notify(futures, keep)
  mend_stat()
  local id = int(redis.call('HINCRBY', P .. 'stat', 'notes', 1)) .. '-0'
  redis.call('XADD', P .. 'notes', 'MAXLEN', '~', keep, id, 'futures', futures)
end

-- Put the model's entry in `gaps` in step with its held jobs: its score is when the longest held one arrived.
local function update_gap(model)
  local oldest = redis.call('ZRANGE', P .. 'held:' .. model, 0, 0, 'WITHSCORES')
  if oldest[1] then
    redis.call('ZADD', P .. 'gaps', oldest[2], model)
  else
    redis.call('ZREM', P .. 'gaps', model)
  end
end

-- Move held jobs of one lane to the log from next_seq on, stepping over used-up seqs, until a seq is missing.
local function drain(model, next_seq, keep_seqs)
  local moved = 0
  while true do
    local seq = int(next_seq)
    if redis.call('HEXISTS', P .. 'seqs:' .. model, seq) == 0 then break end
    if redis.call('ZREM', P .. 'held:' .. model, seq) == 1 then
      local future = model .. ':' .. seq
      local key = P .. 'future:' .. future
      local v = redis.call('HMGET', key, 'op', 'tenant', 'digest', 'bytes', 'tokens', 'at_ms', 'enc', 'payload', 'blob')
      local entry = append(future, { op = v[1], owner = model, seq = seq, tenant = v[2], digest = v[3], bytes = v[4],
        tokens = v[5], at_ms = v[6], enc = v[7], payload = v[8], blob = v[9] })
      redis.call('HSET', key, 'status', 'queued', 'entry', entry)
      redis.call('HDEL', key, 'payload')
      moved = moved + 1
    end
    redis.call('HDEL', P .. 'seqs:' .. model, int(next_seq - keep_seqs))
    next_seq = next_seq + 1
  end
  local key = P .. 'model:' .. model
  redis.call('HSET', key, lane_field('next_seq', next_seq), int(next_seq), 'used_ms', int(NOW))
  if moved > 0 then
    redis.call('HINCRBY', key, 'held', -moved)
    redis.call('HINCRBY', key, 'queued', moved)
    update_gap(model)
  end
end

-- Tell the stream of a sampling client that one of its samples is done. A client's samples are a block of 10^9 seqs, so the block's
-- number is the seq without its last nine digits; as text, for it may be more than a double holds.
local function list_done(owner, seq, future, status, outcome, ttl_s)
  if not string.find(owner, ':sample:', 1, true) or string.sub(owner, 1, 7) == 'direct:' then return end
  local block = string.sub(seq, 1, -10)
  local key = P .. 'done:' .. owner .. ':' .. (block == '' and '0' or block)
  redis.call('XADD', key, 'MAXLEN', '~', 16384, '*', 'future', future, 'status', status, 'bytes', #outcome)
  redis.call('EXPIRE', key, ttl_s)
end

-- Results that were not delivered yet, by tenant: `unread_until:<tenant>` has their futures by the time at which they expire,
-- `unread_sizes:<tenant>` their bytes, and `unread` the sums. What expired is taken off when the sum is asked for.
local FUTURE_BYTES = 512

local function count_read(tenant, future)
  local sizes = P .. 'unread_sizes:' .. tenant
  local size = redis.call('HGET', sizes, future)
  if not size then return end
  redis.call('HDEL', sizes, future)
  redis.call('ZREM', P .. 'unread_until:' .. tenant, future)
  if redis.call('HINCRBY', P .. 'unread', tenant, '-' .. size) <= 0 then redis.call('HDEL', P .. 'unread', tenant) end
end

local function count_unread(tenant, future, outcome, ttl_s)
  local size = int(#outcome + FUTURE_BYTES)
  redis.call('HSET', P .. 'unread_sizes:' .. tenant, future, size)
  redis.call('ZADD', P .. 'unread_until:' .. tenant, NOW + 1000 * tonumber(ttl_s), future)
  redis.call('HINCRBY', P .. 'unread', tenant, size)
end

local function unread_bytes(tenant)
  -- A bounded number at a time: what is left is taken off by the next call.
  for _, future in ipairs(redis.call('ZRANGEBYSCORE', P .. 'unread_until:' .. tenant, '-inf', NOW, 'LIMIT', 0, 1000)) do
    count_read(tenant, future)
  end
  return tonumber(redis.call('HGET', P .. 'unread', tenant)) or 0
end

-- Give an open job its outcome and its budgets back. counter is the model's field that counted it: queued or held.
-- An outcome that was given back to a lost Redis, and may have been read long ago, counts for no tenant; the caller says how long it lives.
local function finish(future, status, outcome, digest, counter, ttl_s, keep_blob_s, is_given_back)
  local key = P .. 'future:' .. future
  local f = redis.call('HMGET', key, 'owner', 'tenant', 'bytes', 'blob', 'ordered', 'seq')
  redis.call('HSET', key, 'status', status, 'outcome', outcome, 'outcome_digest', digest, 'done_ms', int(NOW))
  redis.call('HDEL', key, 'payload')
  redis.call('EXPIRE', key, ttl_s)
  if not is_given_back then count_unread(f[2], future, outcome, ttl_s) end
  if f[4] then redis.call('EXPIRE', f[4], keep_blob_s) end
  redis.call('HINCRBY', P .. 'stat', 'queued_jobs', -1)
  redis.call('HINCRBY', P .. 'stat', 'queued_bytes', '-' .. f[3])
  if redis.call('HINCRBY', P .. 'tenants', f[2], '-' .. f[3]) <= 0 then redis.call('HDEL', P .. 'tenants', f[2]) end
  if redis.call('HINCRBY', P .. 'tenant_jobs', f[2], -1) <= 0 then redis.call('HDEL', P .. 'tenant_jobs', f[2]) end
  if f[5] == '1' then
    local model = P .. 'model:' .. f[1]
    if redis.call('EXISTS', model) == 1 then
      redis.call('HINCRBY', model, counter, -1)
      if not is_given_back then redis.call('HSET', model, 'done_ms', int(NOW)) end
    end
  else
    if redis.call('HINCRBY', P .. 'owners', f[1], -1) <= 0 then redis.call('HDEL', P .. 'owners', f[1]) end
    list_done(f[1], f[6], future, status, outcome, ttl_s)
  end
end

-- A record is listed under its tenant and under its parent, by the time it was made.
local PARENT = { model = 'session', sampler = 'session', checkpoint = 'model', export = 'queue' }

local function lists_of(kind, id)
  local r = redis.call('HMGET', P .. kind .. ':' .. id, 'tenant', 'created_ms', PARENT[kind] or 'session')
  local keys = {}
  if r[1] then keys[#keys + 1] = P .. 'list:' .. kind .. ':of:' .. r[1] end
  if r[3] and PARENT[kind] then keys[#keys + 1] = P .. 'list:' .. kind .. ':in:' .. r[3] end
  return keys, r[2]
end

-- Put a record into its lists; one without a time is no member of any.
local function enlist(kind, id)
  local keys, created_ms = lists_of(kind, id)
  if not created_ms then return end
  for _, key in ipairs(keys) do redis.call('ZADD', key, created_ms, id) end
end

-- Set the fields that a model's record was made with by the job of this seq, unless those of that job or of a later one stand there;
-- true when they were set. `recorded_at` is whose they are. A record without it is that of its last creation, of its only one where a
-- client numbers the jobs, of none when a scan of the checkpoints made it or when it has no time.
local function describe_model(model, seq, fields)
  local key = P .. 'model:' .. model
  local r = redis.call('HMGET', key, 'recorded_at', 'created_ms', 'scanned', 'made_at')
  local described = tonumber(r[1] or (r[2] and not r[3] and (r[4] or '0')) or '-1')
  if tonumber(seq) <= described then return false end
  for i = 1, #fields, 2 do redis.call('HSET', key, fields[i], fields[i + 1]) end
  redis.call('HSET', key, 'recorded_at', seq)
  redis.call('HDEL', key, 'scanned', 'error')
  enlist('model', model)
  return true
end

-- Delete a record with its places in the lists.
local function remove_record(kind, id)
  for _, key in ipairs((lists_of(kind, id))) do redis.call('ZREM', key, id) end
  redis.call('DEL', P .. kind .. ':' .. id)
end

local function failure(code, category, message)
  return cmsgpack.pack({ type = 'failed', code = code, category = category, message = message })
end
