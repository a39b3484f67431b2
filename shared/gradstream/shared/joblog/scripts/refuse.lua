#!lua flags=allow-oom
-- Use up a seq whose request was refused. A seq that is used already stays as it is.
-- KEYS  1 log
-- ARGV  1 prefix  2 model  3 seq  4 tenant  5 window  6 seqs kept
-- Reply {ok} | {unknown} | {full, window, ahead, limit, retry_ms}

local model, seq = ARGV[2], ARGV[3]
local record = redis.call('HMGET', P .. 'model:' .. model, 'tenant', lane_field('next_seq', seq))
if record[1] ~= ARGV[4] then return { 'unknown' } end
local next_seq = next_in_lane(record[2], seq)
local ahead = tonumber(seq) - next_seq
if ahead < 0 then return { 'ok' } end
if ahead >= tonumber(ARGV[5]) then return { 'full', 'window', int(ahead), ARGV[5], '1000' } end
redis.call('HSETNX', P .. 'seqs:' .. model, seq, 'refused')
if ahead == 0 then drain(model, next_seq, tonumber(ARGV[6])) end
return { 'ok' }
