-- Write several records, each under its own lock: all or none. Nothing is put before this file.
--
-- KEYS: of each session the record and the lock.
-- ARGV: the lease and the ttl, as in common.lua; then of each session its token, the number of the
--       save, 'set' or 'delete', and the record.
-- The answer: 0, or the place of the first session whose lock was lost. Only the first write can
-- fail (see close.lua).

local lease, ttl = ARGV[1], ARGV[2]
local since = {}
for i = 1, #KEYS / 2 do
  local token, number = ARGV[4 * i - 1], ARGV[4 * i]
  local held = redis.call('GET', KEYS[2 * i])
  if not held or string.sub(held, 1, #token + 1) ~= token .. ' ' then return i end
  local saves
  saves, since[i] = string.match(held, ' (%d+) (%d+)$')
  if tonumber(number) <= tonumber(saves) then return 0 end -- sent again
end
for i = 1, #KEYS / 2 do
  local how, value = ARGV[4 * i + 1], ARGV[4 * i + 2]
  if how == 'delete' then
    redis.call('DEL', KEYS[2 * i - 1])
  elseif ttl == '0' then
    redis.call('SET', KEYS[2 * i - 1], value)
  else
    redis.call('SET', KEYS[2 * i - 1], value, 'PX', ttl)
  end
end
for i = 1, #KEYS / 2 do
  local held = ARGV[4 * i - 1] .. ' ' .. ARGV[4 * i] .. ' ' .. since[i]
  redis.call('SET', KEYS[2 * i], held, 'PX', lease)
end
return 0
