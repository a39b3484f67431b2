#!lua
-- Set a record's field, unless somebody changed it since the caller read it.
-- KEYS  1 log
-- ARGV  1 prefix  2 kind  3 id  4 field  5 its value as the caller read it, '' where it has none  6 its new value
-- Reply 1 it has the new value, which a repeated call finds there, 0 it has another one, or there is no such record

local key = P .. ARGV[2] .. ':' .. ARGV[3]
if redis.call('EXISTS', key) == 0 then return 0 end
local value = redis.call('HGET', key, ARGV[4]) or ''
if value ~= ARGV[5] and value ~= ARGV[6] then return 0 end
redis.call('HSET', key, ARGV[4], ARGV[6])
return 1
