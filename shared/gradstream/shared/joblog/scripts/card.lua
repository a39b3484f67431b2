#!lua flags=allow-oom
-- Replace the engine's card.
-- KEYS  1 log
-- ARGV  1 prefix  2 epoch  3 card (JSON)
-- Reply {ok} | {fenced, current epoch}

local epoch = redis.call('GET', P .. 'epoch')
if epoch ~= ARGV[2] then return { 'fenced', epoch or '0' } end
redis.call('SET', P .. 'card', ARGV[3])
return { 'ok' }
