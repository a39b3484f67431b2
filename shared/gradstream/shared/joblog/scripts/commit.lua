#!lua flags=allow-oom
-- Make one batch visible: outcomes, journal entry, records, positions, cursor and notes, by the holder of the epoch only.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 batch number  4 cursor  5 plan (msgpack)  6 ops, space-separated  7 unread_ttl_s
--       8 keep_blob_s  9 log entries kept behind the cursor  10 journal entries kept  11 notes kept  12 number of outcomes
--       13 epoch of the batch, which is an earlier one when a take-over commits what a dead gang had only logged
--       14 batch and 15 entry up to which a snapshot covers everything; nothing after them is trimmed
--       16 the batch before it, or empty: not checked  17 1 when a take-over makes up for the batch  18 when it ended, in ms
--       19 delivered_ttl_s
--       then per outcome: future, status (done|failed), outcome (msgpack), digest
--       then per record: kind, id, number of fields (-1 removes the record), field and value in turn
-- Reply {ok, futures without a record, futures that had another outcome} | {same} | {fenced, current epoch}
--       | {order, last batch}   this batch's number is not above the last one's, and it is not the same batch
--       | {lost, last batch}    the journal does not end with the batch before it: Redis has lost its tail

local epoch, number, cursor = ARGV[2], ARGV[3], ARGV[4]
local num_outcomes = tonumber(ARGV[12])
local FIRST = 20
local is_past = ARGV[17] == '1'
local current = redis.call('GET', P .. 'epoch')
if current ~= epoch then return { 'fenced', current or '0' } end

local futures, statuses, digests = {}, {}, {}
for i = 1, num_outcomes do
  local at = FIRST + (i - 1) * 4
  futures[i], statuses[i], digests[i] = ARGV[at], ARGV[at + 1], ARGV[at + 3]
end
local batch = ARGV[13] .. '-' .. number
mend_stat()
local last = redis.call('HGET', P .. 'stat', 'journal')
if last then
  local last_epoch, last_number = string.match(last, '^(%d+)-(%d+)$')
  local ahead = tonumber(ARGV[13]) - tonumber(last_epoch)
  if ahead < 0 or (ahead == 0 and tonumber(number) <= tonumber(last_number)) then
    local entry = redis.call('XRANGE', P .. 'journal', batch, batch)[1]
    if entry and entry[2][6] == table.concat(futures, ' ') then return { 'same' } end
    return { 'order', last }
  end
end
if ARGV[16] ~= '' and last ~= ARGV[16] then return { 'lost', last or 'none' } end

-- First, since it is the one write that can fail (an id that is not above the stream's last).
redis.call('XADD', P .. 'journal', batch, 'batch', number, 'epoch', ARGV[13],
  'futures', table.concat(futures, ' '), 'ops', ARGV[6], 'statuses', table.concat(statuses, ' '),
  'digests', table.concat(digests, ' '), 'at_ms', int(NOW), 'plan', ARGV[5])
redis.call('HSET', P .. 'stat', 'journal', batch)
if redis.call('XLEN', P .. 'journal') > tonumber(ARGV[10]) then
  redis.call('XTRIM', P .. 'journal', 'MINID', '~', ARGV[14])
end

-- What was given back lives for the rest of its time, and long enough for who is waiting for it.
local given_back_ttl_s = math.max(tonumber(ARGV[19]), tonumber(ARGV[7]) - math.floor((NOW - tonumber(ARGV[18])) / 1000))
local num_missing, num_other, num_new = 0, 0, 0
local started = NOW
for i = 1, num_outcomes do
  local f = redis.call('HMGET', P .. 'future:' .. futures[i], 'status', 'owner', 'seq', 'ordered', 'at_ms', 'outcome_digest',
    'cancelled', 'given_back', 'op')
  if not f[1] then
    num_missing = num_missing + 1
  elseif f[1] == 'queued' then
    finish(futures[i], statuses[i], ARGV[FIRST + (i - 1) * 4 + 2], digests[i], 'queued',
      f[8] and given_back_ttl_s or ARGV[7], ARGV[8], f[8])
    local model = P .. 'model:' .. f[2]
    if f[9] == 'unload_model' and statuses[i] == 'failed' then unended(f[2], f[3]) end
    local applied = f[4] == '1' and redis.call('HGET', model, 'applied')
    if applied then
      local field = lane_field('applied', f[3])
      if tonumber(f[3]) > (tonumber(redis.call('HGET', model, field)) or -1) then redis.call('HSET', model, field, f[3]) end
    end
    started = math.min(started, tonumber(f[5]))
    num_new = num_new + 1
  elseif f[6] ~= digests[i] and not f[7] then
    num_other = num_other + 1
  end
end

local function remove_model(model)
  local woken = {}
  for _, seq in ipairs(redis.call('ZRANGE', P .. 'held:' .. model, 0, -1)) do
    local future = model .. ':' .. seq
    local message = 'model ' .. model .. ' was removed while job seq ' .. seq_text(seq) .. ' was held for an earlier one'
    finish(future, 'failed', failure('unknown_model', 'user', message), '', 'held', ARGV[7], ARGV[8])
    woken[#woken + 1] = future
  end
  if #woken > 0 then notify(table.concat(woken, ' '), ARGV[11]) end
  remove_record('model', model)
  redis.call('DEL', P .. 'held:' .. model)
  redis.call('EXPIRE', P .. 'seqs:' .. model, ARGV[7])
  redis.call('ZREM', P .. 'gaps', model)
  redis.call('SREM', P .. 'models', model)
end

local at = FIRST + num_outcomes * 4
while at <= #ARGV do
  local kind, id, num_fields = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  at = at + 3
  if num_fields < 0 then
    if kind == 'model' then remove_model(id) else remove_record(kind, id) end
  else
    for i = 1, num_fields do
      redis.call('HSET', P .. kind .. ':' .. id, ARGV[at], ARGV[at + 1])
      at = at + 2
    end
    if kind == 'model' then redis.call('HSET', P .. 'model:' .. id, 'epoch', epoch) end
    enlist(kind, id)
  end
end

if num_other > 0 then redis.call('HINCRBY', P .. 'stat', 'other_outcomes', num_other) end

-- Service time of one job: since the later of this batch's first arrival and the commit before it.
if num_new > 0 then
  local stat = redis.call('HMGET', P .. 'stat', 'done_ms', 'ewma_ms')
  local each_ms = (NOW - math.max(started, tonumber(stat[1]) or 0)) / num_new
  local ewma_ms = tonumber(stat[2])
  redis.call('HSET', P .. 'stat', 'done_ms', int(NOW), 'ewma_ms', string.format('%.3f', ewma_ms and 0.8 * ewma_ms + 0.2 * each_ms or each_ms))
end

-- Ids at or before the cursor are never read. A Redis that was refilled counts on behind it, and what it had accepted meanwhile under
-- such an id goes to the end.
local function make_room(before, position)
  if position > tonumber(redis.call('HGET', P .. 'stat', 'log') or '0') then
    redis.call('HSET', P .. 'stat', 'log', int(position))
  end
  if not is_past then return end
  for _, entry in ipairs(redis.call('XRANGE', P .. 'log', '(' .. before, cursor)) do
    local f = {}
    for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
    local key = P .. 'future:' .. f.future
    local stored = redis.call('HMGET', key, 'status', 'entry')
    if stored[1] == 'queued' and stored[2] == entry[1] then
      redis.call('XDEL', P .. 'log', entry[1])
      redis.call('HSET', key, 'entry', append(f.future, f))
    end
  end
end

local before = redis.call('GET', P .. 'cursor') or '0-0'
local position = tonumber(string.match(cursor, '^(%d+)-'))
if position > tonumber((string.match(before, '^(%d+)-'))) then
  make_room(before, position)
  redis.call('SET', P .. 'cursor', cursor)
  redis.pcall('XGROUP', 'SETID', P .. 'log', 'worker', cursor, 'ENTRIESREAD', int(position))
  local oldest = math.min(position - tonumber(ARGV[9]), tonumber(string.match(ARGV[15], '^(%d+)-')))
  if oldest > 0 then redis.call('XTRIM', P .. 'log', 'MINID', '~', int(oldest) .. '-0') end
end
if num_outcomes > 0 then notify(table.concat(futures, ' '), ARGV[11]) end
return { 'ok', num_missing, num_other }
