#!lua flags=no-writes
-- One page of the log behind an entry: the jobs that have no outcome yet, without their payloads.
-- KEYS  1 log
-- ARGV  1 prefix  2 entry id after which to read  3 entries looked at, at most
-- Reply {id of the last entry looked at, '' when there was none, then per open job 10 texts:
--        future, op, owner, seq, tenant, bytes, tokens, at_ms, starts, started_epoch ('' never)}

local last = ''
local reply = { last }
for _, entry in ipairs(redis.call('XRANGE', P .. 'log', '(' .. ARGV[2], '+', 'COUNT', ARGV[3])) do
  last = entry[1]
  local f = {}
  for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
  local state = redis.call('HMGET', P .. 'future:' .. f.future, 'status', 'starts', 'started_epoch')
  if state[1] == 'queued' then
    for _, text in ipairs({ f.future, f.op, f.owner, f.seq, f.tenant, f.bytes, f.tokens, f.at_ms, state[2] or '0', state[3] or '' }) do
      reply[#reply + 1] = text
    end
  end
end
reply[1] = last
return reply
