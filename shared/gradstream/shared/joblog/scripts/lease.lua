#!lua flags=allow-oom
-- Take, prolong or give back the right to work. The fence is the epoch; the lease's expiry only lets another owner in.
-- KEYS  1 log
-- ARGV  1 prefix  2 acquire|renew|release|clear  3 owner  4 ttl_ms  5 epoch (renew, release), or one that the new epoch must be above
--       (acquire: the log on disk may know of epochs that a lost Redis does not)
--       6 card (renew; empty before there is one), put back when somebody deleted it
-- clear takes an owner's lease away whatever its epoch, when the owner knows that its gang is no more.
-- Reply acquire: {ok, epoch} | {taken, owner, ms left}
--       renew, release: {ok} | {fenced, current epoch}

local verb, owner, ttl_ms = ARGV[2], ARGV[3], ARGV[4]
local lease = P .. 'lease'
if verb == 'acquire' then
  mend_stat()
  local holder = redis.call('GET', lease)
  if holder and holder ~= owner then return { 'taken', holder, redis.call('PTTL', lease) } end
  local before = math.max(tonumber(redis.call('GET', P .. 'epoch') or '0'), tonumber(ARGV[5]))
  local epoch = before + 1
  redis.call('SET', P .. 'epoch', int(epoch))
  redis.call('SET', lease, owner, 'PX', ttl_ms)
  -- A group that only shows the worker's position in XINFO GROUPS; nothing is delivered through it.
  redis.pcall('XGROUP', 'CREATE', P .. 'log', 'worker', '0', 'MKSTREAM')
  return { 'ok', epoch }
end
if verb == 'clear' then
  if redis.call('GET', lease) == owner then redis.call('DEL', lease) end
  return { 'ok' }
end
local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[5] then return { 'fenced', epoch or '0' } end
if verb == 'renew' then
  redis.call('SET', lease, owner, 'PX', ttl_ms)
  if ARGV[6] ~= '' then redis.call('SET', P .. 'card', ARGV[6], 'NX') end
else
  redis.call('DEL', lease)
end
return { 'ok' }
