-- Take the lock and get the record, in one step; or stand in the queue and say what has the lock.
--
-- KEYS and ARGV[1]: see common.lua.
-- ARGV[2]: for how many milliseconds this token keeps its place in the queue without coming back.
-- The answer: the record, or nil; or {milliseconds until the lock ends, its text, the time now}.

local place = ARGV[2]
local now = now_in_ms()
local held, first = nil, nil
if redis.call('EXISTS', lock, queue, closed) > 0 then -- else it is free, and nothing waits
  if redis.call('EXISTS', closed) == 1 then -- sent again, and overtaken: no one waits for it
    return redis.error_reply('ERR this opening of a session is over')
  end
  held = redis.call('GET', lock)
  if not held then
    first = first_waiter()
    if first and first ~= token then held = offer(first, now) end
  end
  if held and not is_ours(held) then
    local time = redis.call('TIME')
    redis.call('ZADD', queue, 'NX', string.format('%.0f', time[1] * 1000000 + time[2]), token)
    redis.call('HSET', seen, token, now + place)
    redis.call('PEXPIRE', queue, kept)
    redis.call('PEXPIRE', seen, kept)
    return {redis.call('PTTL', lock), held, now}
  end
end
local value = redis.call('GET', data) -- which fails if it is no string, before anything is written
if held then
  redis.call('PEXPIRE', lock, lease) -- it was kept for us, or this is sent again
else
  redis.call('SET', lock, token .. ' 0 ' .. now, 'PX', lease)
end
if held or first then
  redis.call('ZREM', queue, token)
  redis.call('HDEL', seen, token)
end
if value and ttl ~= '0' then redis.call('PEXPIRE', data, ttl) end
return value
