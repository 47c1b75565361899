-- Write the record under the lock, and keep the lock for another lease.
--
-- KEYS and ARGV[1]: see common.lua.
-- ARGV[2]: the number of this save. One that is sent again, and arrives late, must not put what it
--          has over what came after it.
-- ARGV[3]: 'set' or 'delete'; ARGV[4]: the record.
-- The answer: 1, or 0 if the lock was lost; or why the server refuses.

local number, how, value = ARGV[2], ARGV[3], ARGV[4]
local held = redis.call('GET', lock)
if not is_ours(held) then return 0 end
local saves, since = string.match(held, ' (%d+) (%d+)$')
if tonumber(number) <= tonumber(saves) then return 1 end
local said = write(how, value)
if said ~= 'ok' then return redis.error_reply(said) end
redis.call('SET', lock, token .. ' ' .. number .. ' ' .. since, 'PX', lease)
return 1
