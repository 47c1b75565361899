-- Put before open.lua, save.lua and close.lua: what these share.
--
-- Before this file come the options of the storage: strings of digits, in milliseconds:
--   lease       for how long a lock lives that nothing renews
--   ttl         for how long a record lives that is left alone; '0': forever
--   offered     for how long a free session is kept for the waiter that is next
--   kept        for how long the queue is remembered after the last waiter came
--   remembered  for how long it is remembered how a close has ended
--
-- KEYS, which lie in one hash slot:
--   data            the record
--   lock            "<token> <saves> <since>": which opening has it; how often that has saved; since
--                   when (milliseconds since 1970)
--   queue           the tokens that wait, by the time (microseconds) at which they came
--   seen            the tokens that wait, and until when each keeps its place without coming back
--   closed          of this token; how its close ended ("ok" or an error), in case that it is sent
--                   again
-- and a name that is not among KEYS, since the token of the next waiter is not known beforehand:
--   data:wake:<token>   a list with something to pop for that waiter, as soon as the session is kept
--                       for it
-- ARGV[1] is the token: one of this opening alone. All but the record expires in any case.

local data, lock, queue, seen, closed = unpack(KEYS)
local token = ARGV[1]

local function is_ours(held)
  return held and string.sub(held, 1, #token + 1) == token .. ' '
end

-- A number of 13 digits, and Lua writes as many as 14.
local function now_in_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The token that has waited longest, of those that still come back.
local function first_waiter()
  while true do
    local first = redis.call('ZRANGE', queue, 0, 0)[1]
    if not first then return nil end
    if tonumber(redis.call('HGET', seen, first) or 0) > now_in_ms() then return first end
    redis.call('ZREM', queue, first)
    redis.call('HDEL', seen, first)
  end
end

-- Keep the free session for `first` until that waiter comes, and wake it.
local function offer(first, now)
  local held, wake = first .. ' 0 ' .. now, data .. ':wake:' .. first
  redis.call('SET', lock, held, 'PX', offered)
  redis.call('RPUSH', wake, '1')
  redis.call('PEXPIRE', wake, offered)
  return held
end

-- Do what a save or a close asks for ('set', 'delete' or 'keep'): "ok", or why the server refuses.
local function write(how, value)
  local answer = 'ok'
  if how == 'set' and ttl == '0' then
    answer = redis.pcall('SET', data, value)
  elseif how == 'set' then
    answer = redis.pcall('SET', data, value, 'PX', ttl)
  elseif how == 'delete' then
    answer = redis.pcall('DEL', data)
  end
  if type(answer) ~= 'table' or not answer.err then return 'ok' end
  -- Redis 6 tells the name of the script first.
  return string.match(answer.err, 'OOM .*') or answer.err
end

