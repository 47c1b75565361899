-- Write the record under the lock, and hand the session on: the latter also if the server has no
-- memory for what is to be written.
--
-- KEYS and ARGV[1]: see common.lua.
-- ARGV[2]: 'set', 'delete' or 'keep' (what is stored); ARGV[3]: the record.
-- The answer: 1, or 0 if the lock was lost; or why the server refuses. The same, if it comes again.

local how, value = ARGV[2], ARGV[3]
if not is_ours(redis.call('GET', lock)) then
  local said = redis.call('GET', closed)
  if not said then return 0 end
  if said ~= 'ok' then return redis.error_reply(said) end
  return 1
end
local said = write(how, value)
redis.call('DEL', lock) -- once a script has written, a full memory does not stop it any more
redis.call('SET', closed, said, 'PX', remembered)
local first = first_waiter()
if first then offer(first, now_in_ms()) end
if said ~= 'ok' then return redis.error_reply(said) end
return 1
