#!lua flags=allow-oom
-- Fail every job that was held too long, and those of its lane held for the same gaps. The missing seqs become used.
-- KEYS  1 log
-- ARGV  1 prefix  2 hold_ms  3 unread_ttl_s  4 keep_blob_s  5 notes kept  6 seqs kept
-- Reply number of jobs failed; at most 64 models a call

local deadline = NOW - tonumber(ARGV[2])
local num_failed = 0
local woken = {}

-- Fail what a lane holds from next_seq to last.
local function fail_lane(model, next_seq, last)
  local held_key, seqs_key = P .. 'held:' .. model, P .. 'seqs:' .. model
  local missing = {}
  for n = next_seq, last do
    local seq = int(n)
    if redis.call('ZREM', held_key, seq) == 1 then
      local future = model .. ':' .. seq
      local names = table.concat(missing, ', ', 1, math.min(#missing, 8))
      if #missing > 8 then names = names .. ' and ' .. (#missing - 8) .. ' more' end
      local message = 'job seq ' .. seq_text(seq) .. ' was held for more than ' .. math.floor(tonumber(ARGV[2]) / 1000)
        .. ' s because seq ' .. names .. ' never came; seq_ids of a model must be sent without a gap'
      finish(future, 'failed', failure('sequence_gap', 'server', message), '', 'held', ARGV[3], ARGV[4])
      woken[#woken + 1] = future
      num_failed = num_failed + 1
    elseif redis.call('HSETNX', seqs_key, seq, 'gap') == 1 then
      missing[#missing + 1] = seq_text(seq)
    end
    redis.call('HDEL', seqs_key, int(n - tonumber(ARGV[6])))
  end
  drain(model, math.max(next_seq, last + 1), tonumber(ARGV[6]))
end

local function fail_model(model)
  local fields, last = {}, {}
  for _, seq in ipairs(redis.call('ZRANGEBYSCORE', P .. 'held:' .. model, '-inf', deadline)) do
    local field = lane_field('next_seq', seq)
    if not last[field] then fields[#fields + 1] = field end
    last[field] = math.max(last[field] or 0, tonumber(seq))
  end
  for _, field in ipairs(fields) do
    fail_lane(model, next_in_lane(redis.call('HGET', P .. 'model:' .. model, field), last[field]), last[field])
  end
  update_gap(model)
end

for _, model in ipairs(redis.call('ZRANGEBYSCORE', P .. 'gaps', '-inf', deadline, 'LIMIT', 0, 64)) do
  fail_model(model)
end
if num_failed > 0 then notify(table.concat(woken, ' '), ARGV[5]) end
return num_failed
