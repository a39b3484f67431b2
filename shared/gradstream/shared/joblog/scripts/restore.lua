#!lua flags=allow-oom
-- Put one job back that a lost Redis had accepted and the log on disk knows. A job that is there stays as it is.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 owner  4 seq  5 op  6 tenant  7 digest  8 bytes (as stored)  9 tokens  10 enc  11 payload
--       12 blob key  13 ordered (1|0)  14 at_ms  15 number of its entry in the lost log  16 1 when it is open and must be read again
--       17 when its batch ended, in ms (executed jobs)  18 unread_ttl_s: of a job that ended longer ago only its place is put back
--       19 seqs kept  20 name by which a repetition of its request is found ('' when none)  21 how long that is remembered, s
--       22.. fields of the model's record that the job makes, name and value in turn
-- Reply {ok, 1 put back | 0 was there} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local owner, seq, op, tenant, digest = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local blob, ordered, is_open, keep_seqs = ARGV[12], ARGV[13] == '1', ARGV[16] == '1', tonumber(ARGV[19])
local future = owner .. ':' .. seq
local key, model_key = P .. 'future:' .. future, P .. 'model:' .. owner

-- Ids that were given out before are not given out again, or a reader would step over what carries them.
local last = math.max(tonumber(redis.call('HGET', P .. 'stat', 'log') or '0'), tonumber(ARGV[15]))
redis.call('HSET', P .. 'stat', 'log', int(last))
if tonumber(redis.call('HGET', P .. 'stat', 'notes') or '0') < NOW then redis.call('HSET', P .. 'stat', 'notes', int(NOW)) end

-- The model goes on behind this job; jobs that it held for it, or for one before it that is not known any more, go to the log.
local function advance()
  local next_seq = math.max(next_in_lane(redis.call('HGET', model_key, lane_field('next_seq', seq)), seq), tonumber(seq) + 1)
  for _, held in ipairs(redis.call('ZRANGE', P .. 'held:' .. owner, 0, -1)) do
    if lane_of(held) == lane_of(seq) and tonumber(held) < next_seq then drain(owner, tonumber(held), keep_seqs) end
  end
  drain(owner, next_seq, keep_seqs)
end

if ordered then
  if not string.find(owner, ':train:', 1, true) then note_end(owner, seq, op) end
  redis.call('HSETNX', model_key, 'tenant', tenant)
  redis.call('HSETNX', model_key, 'state', 'creating')
  for _, field in ipairs({ 'epoch', 'queued', 'held' }) do redis.call('HSETNX', model_key, field, '0') end
  redis.call('HSETNX', model_key, 'applied', '-1')
  redis.call('HSETNX', P .. 'seqs:' .. owner, seq, digest)
  redis.call('HDEL', P .. 'seqs:' .. owner, int(tonumber(seq) - keep_seqs))
  redis.call('SADD', P .. 'models', owner)
  if ARGV[22] then
    local fields = {}
    for i = 22, #ARGV do fields[i - 21] = ARGV[i] end
    describe_model(owner, seq, fields)
  end
end

local is_there = redis.call('EXISTS', key) == 1
local is_expired = not is_open and NOW - tonumber(ARGV[17]) >= 1000 * tonumber(ARGV[18])
if is_there or is_expired then
  if ordered then
    advance()
    local field = lane_field('applied', seq)
    if not is_there and tonumber(seq) > (tonumber(redis.call('HGET', model_key, field)) or -1) then
      redis.call('HSET', model_key, field, seq)
    end
  end
  return { 'ok', is_there and 0 or 1 }
end

redis.call('HINCRBY', P .. 'stat', 'queued_jobs', 1)
redis.call('HINCRBY', P .. 'stat', 'queued_bytes', ARGV[8])
redis.call('HINCRBY', P .. 'tenants', tenant, ARGV[8])
redis.call('HINCRBY', P .. 'tenant_jobs', tenant, 1)
if ordered then
  redis.call('HINCRBY', model_key, 'queued', 1)
else
  redis.call('HINCRBY', P .. 'owners', owner, 1)
end
redis.call('HSET', key, 'status', 'queued', 'op', op, 'owner', owner, 'seq', seq, 'tenant', tenant, 'at_ms', ARGV[14],
  'digest', digest, 'bytes', ARGV[8], 'tokens', ARGV[9], 'enc', ARGV[10], 'ordered', ARGV[13])
if blob ~= '' then redis.call('HSET', key, 'blob', blob) end
if is_open then
  local entry = append(future, { op = op, owner = owner, seq = seq, tenant = tenant, digest = digest, bytes = ARGV[8],
    tokens = ARGV[9], at_ms = ARGV[14], enc = ARGV[10], payload = ARGV[11], blob = blob, again = ARGV[20],
    record = ARGV[22] and cmsgpack.pack({ unpack(ARGV, 22) }) or '' })
  redis.call('HSET', key, 'entry', entry)
else
  redis.call('HSET', key, 'given_back', '1')
end
-- Whether its client had asked for it is not known any more: the same request is taken for a repetition as long as it would have been.
local left_s = math.ceil((tonumber(ARGV[14]) - NOW) / 1000) + tonumber(ARGV[21])
if ARGV[20] ~= '' and left_s > 0 then
  redis.call('SET', P .. ARGV[20], seq, 'EX', int(left_s))
  redis.call('HSET', key, 'again', P .. ARGV[20])
end
if ordered then advance() end
return { 'ok', 1 }
