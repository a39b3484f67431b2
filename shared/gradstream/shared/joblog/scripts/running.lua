#!lua flags=allow-oom
-- Say which jobs the gang runs now, for people who look. Nothing else reads it, and a lost one does no harm.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 batch number  4 op  5.. futures, all that run
-- Reply {ok} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
local futures = {}
for i = 5, #ARGV do futures[#futures + 1] = ARGV[i] end
redis.call('HSET', P .. 'running', 'epoch', ARGV[2], 'batch', ARGV[3], 'op', ARGV[4], 'futures', table.concat(futures, ' '),
  'since_ms', int(NOW))
return { 'ok' }
