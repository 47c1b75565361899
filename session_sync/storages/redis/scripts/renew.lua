-- Let the lock live for another lease. Nothing is put before this file.
--
-- KEYS[1]: the lock. ARGV[1]: the token; ARGV[2]: the lease in milliseconds.
-- The answer: 1, or 0 if the lock was lost.

local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, #ARGV[1] + 1) == ARGV[1] .. ' ' then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0
