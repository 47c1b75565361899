"""One first-come-first-served queue per key, for threads, coroutines and tasks not yet begun.

This module knows keys and who waits for them; it knows nothing of sessions or storages.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import ClassVar, Final, Literal, Self, TypeAlias

from .errors import SessionDeadlockError, SessionLockTimeout

# What a waiter answers when the lock is offered to it.
_Answer = Literal["taken", "called", "absent", "gone"]

# What stands under a key while somebody has it or wants it: see LockTable.
_Table: TypeAlias = "dict[str, Hold | Turn | KeyLock]"

# In the order of insertion; anybody can leave it at no more cost than the first.
_Queue: TypeAlias = "dict[_Waiter, None]"


class Party:
    """A thread, or a task of an event loop, that holds or wants a lock.

    A task is one party and so is the thread of its loop: while that thread blocks, no task of the
    loop moves.
    """

    __slots__ = ("_task", "loop", "thread")

    def __init__(self, thread: threading.Thread, loop: asyncio.AbstractEventLoop | None) -> None:
        # The object: the number of a thread that has ended is soon that of another one.
        self.thread: Final = thread
        self.loop: Final = loop
        task = None if loop is None else asyncio.current_task(loop)
        # Weakly: a task that is thrown away inside a scope must be collected to free its key.
        self._task: Final = None if task is None else weakref.ref(task)

    @property
    def task(self) -> asyncio.Task[object] | None:
        """The task, while there is one."""
        return None if self._task is None else self._task()

    def is_stopped_with(self, other: Party, blocking: bool) -> bool:
        """Whether `other` cannot move while this party waits, blocking its thread or not."""
        if blocking or self.task is None:
            return self.thread is other.thread
        return self.task is other.task

    def __str__(self) -> str:
        if self.task is not None:
            return f"task {self.task.get_name()!r}"
        return f"thread {self.thread.name!r}"


def here() -> Party:
    """Who runs this."""
    # asyncio exports this one for callers who may stand outside any loop; get_running_loop()
    # would raise there, which costs more than everything else in an acquisition.
    loop = asyncio._get_running_loop()
    party = _this_thread.party
    return party if loop is None else Party(party.thread, loop)


class _ThisThread(threading.local):
    """What a thread without an event loop is called, made once for each thread."""

    def __init__(self) -> None:
        self.party: Final = Party(threading.current_thread(), None)


_this_thread: Final = _ThisThread()


class Hold:
    """The right to a key, from the moment it was given until `release()`.

    Most often nobody else asks for the key meanwhile; then there is no more to it than a Hold in
    the lock table. The first one who has to wait hangs a KeyLock on it.

    Why neither misses the other. Who wants to wait (`wanted`) and who lets go (`release`) both
    write to the same place by `setdefault`, one atomic step, so one of them is first and the other
    one finds what he wrote. An owner who finds a lock there hands the key on; one who is first
    takes himself out of the table with his next step, and whoever finds him gone looks into the
    table again until then.
    """

    __slots__ = ("_fate", "_table", "_wanted_since", "name", "parties")

    def __init__(self, name: str, party: Party, table: _Table) -> None:
        self.name: Final = name
        self.parties = [party]  # more than one where a scope was joined
        self._wanted_since: float | None = None  # None: by nobody
        self._table: Final = table
        self._fate: dict[Literal["lock"], KeyLock | None] = {}  # None: let go, and nobody waited

    @classmethod
    def of_lock(cls, lock: KeyLock, party: Party) -> Self:
        """The right to a key that others may wait for."""
        hold = cls(lock.name, party, {} if lock.table is None else lock.table)
        hold._fate["lock"] = lock
        hold._wanted_since = time.monotonic()
        return hold

    @property
    def holder(self) -> Hold | None:
        """Who has the key now: this one, or whom it was handed on to."""
        lock = self._fate.get("lock")
        return self if lock is None else lock.hold

    def begin_anew(self) -> None:
        """In a forked child: nobody of the parent's waits here."""
        self._fate = {}

    def wanted(self) -> KeyLock | None:
        """Where to wait for the key; None if it was let go, and is about to leave the table."""
        self._wanted_since = self._wanted_since or time.monotonic()
        lock = KeyLock(self.name, self._table)
        lock.hold = self
        return self._fate.setdefault("lock", lock)

    def release(self) -> None:
        """Give the key to whoever is next. To be called once."""
        table, name = self._table, self.name
        try:
            lock = self._fate.setdefault("lock", None)
            if lock is None:
                if table.get(name) is not self:
                    raise _released_twice(name)
                del table[name]
                return
        except KeyboardInterrupt:  # between the steps: who comes now would look for ever
            if self._fate.get("lock", self) is None and table.get(name) is self:
                del table[name]
            raise
        lock.give_back(self)

    def __str__(self) -> str:
        who = " and ".join(map(str, self.parties)) or "nobody any more"
        if self._wanted_since is None:
            return who
        return f"{who}, for {time.monotonic() - self._wanted_since:.1f} s or more"


class _Waiter:
    """A place in a queue. Its fields change only under the mutex of the lock it waits for."""

    __slots__ = ("hold", "place")

    def __init__(self) -> None:
        self.hold: Hold | None = None
        self.place: _Queue | None = None  # the queue it stands in

    def offer(self) -> _Answer:
        """Take the free lock, that is, set `hold`; or say why not."""
        raise NotImplementedError  # each kind of waiter has its own way


class _Begun(_Waiter):
    """One that waits in the middle of its work, so that others may wait for it."""

    __slots__ = ("lock", "party")

    blocking: ClassVar[bool]

    def __init__(self, lock: KeyLock, party: Party) -> None:
        super().__init__()
        self.lock: Final = lock
        self.party: Final = party


class _ThreadWaiter(_Begun):
    """A blocked thread: always there to take what it is offered."""

    __slots__ = ("_gate",)

    blocking = True

    def __init__(self, lock: KeyLock, party: Party) -> None:
        super().__init__(lock, party)
        self._gate: Final = threading.Lock()
        self._gate.acquire()

    def offer(self) -> _Answer:
        # In this order: once the gate is open the thread runs, and looks at its hold.
        self.hold = Hold.of_lock(self.lock, self.party)
        self._gate.release()
        return "taken"

    def wait(self, timeout: float | None) -> bool:
        return self._gate.acquire(
            timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        )


class _TaskWaiter(_Begun):
    """A suspended coroutine: takes the lock only while its event loop runs.

    A loop that stands still may go on later (`run_until_complete` called again), so its waiter
    keeps its place, is passed over, and looks for itself once the loop moves. One that stops after
    its waiter was given the lock keeps it, as if it had stopped a moment later, inside the scope;
    and as there, the key is free again when the task is collected.
    """

    __slots__ = ("_asked", "_loop", "future")

    blocking = False

    def __init__(self, lock: KeyLock, party: Party) -> None:
        super().__init__(lock, party)
        assert party.loop is not None
        self._loop: Final = party.loop
        self._asked = False  # to look for itself, once its loop goes on
        self.future: Final[asyncio.Future[None]] = party.loop.create_future()

    def offer(self) -> _Answer:
        answer = self._offer()
        if answer != "absent":
            self._waits_no_more()
        return answer

    def _offer(self) -> _Answer:
        loop = self._loop
        if loop is asyncio._get_running_loop():
            self.hold = Hold.of_lock(self.lock, self.party)
            self._wake()
            return "taken"
        if self._asked and not loop.is_closed():
            return "absent"
        running = loop.is_running()
        # Both before the call, which the loop may answer at once.
        self._asked = not running
        self.hold = Hold.of_lock(self.lock, self.party) if running else None
        try:
            loop.call_soon_threadsafe(self._wake if running else self._look)
        except RuntimeError:  # the loop was closed: this coroutine will never run again
            self.hold = None
            return "gone"
        return "taken" if running else "absent"

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def _look(self) -> None:
        self._asked = False
        if self.lock._claim(self, self.party):
            self._waits_no_more()
            self._wake()

    def _waits_no_more(self) -> None:
        """It has the lock, or never will. If its loop ends now, nothing must keep its task alive,
        which frees the key when it is collected."""
        _waiting_tasks.pop(self.party.task, None)


class Turn(_Waiter):
    """The place in the queue of a task that has not begun and waits without a thread.

    When the key is free for it, `call` is called (it must neither block nor raise: it puts the
    task into a pool, say), and whoever then runs the task asks `claim()`. Until that moment the
    task holds nothing.

    Most often the key is free at once and nobody else asks for it before the task begins; then
    there is no more to it than a Turn in the lock table, called as soon as it stands there. The
    first one who wants the key (`wanted`) makes a KeyLock with the Turn at the head of its queue.
    He and who claims write to the same place by `setdefault`, one atomic step, so one of them is
    first and the other one finds what he wrote. Whoever finds a Turn that was claimed asks the Hold
    that it became, which then takes its place in the table.
    """

    __slots__ = ("_call", "_fate", "_name", "_table", "called")

    def __init__(self, name: str, call: Callable[[Turn], None], table: _Table) -> None:
        super().__init__()
        self.called = True  # told to come, and has not yet come
        self._name: Final = name
        self._call: Callable[[Turn], None] | None = call
        self._table: Final = table
        # In whose queue it stands, or what it became without one; nothing: it is alone.
        self._fate: Final[dict[Literal["lock"], KeyLock | Hold]] = {}

    @property
    def holder(self) -> Hold | None:
        """Who has the key now: nobody, or whom the turn has become, or whom it was handed on to."""
        lock = self._fate.get("lock")
        return lock.hold if isinstance(lock, KeyLock) else lock

    def wanted(self) -> KeyLock | None:
        """Where to wait for the key; None if it was let go, and is about to leave the table."""
        lock = KeyLock(self._name, self._table)
        with lock._mutex:  # so that who finds the lock finds the turn in its queue
            first = self._fate.setdefault("lock", lock)
            if first is lock:
                lock._enter(self, lock._turns)
        return first.wanted() if isinstance(first, Hold) else first

    def belong_to(self, lock: KeyLock) -> None:
        """Stand in the queue of `lock`, and never alone; before it is in that queue."""
        self.called = False
        self._fate["lock"] = lock

    def offer(self) -> _Answer:
        if not self.called and self._call is not None:
            self.called = True
            self._call(self)
        return "called"

    def claim(self) -> Hold | None:
        """The key, or None if somebody passed: then `call` will be called again."""
        hold = self._become_hold()
        lock = self._fate["lock"]
        if hold is None and isinstance(lock, KeyLock):
            hold = lock._claim(self, here())
        if hold is not None:
            self._call = None  # which may lead back to this turn: no cycle stays
        return hold

    def put_back(self, hold: Hold, call: Callable[[Turn], None]) -> None:
        """As if it had never been claimed: first among those that have not begun, and `call` is
        called when the key is free again, perhaps at once."""
        lock = hold.wanted()
        assert lock is not None  # it has not been let go
        self._call = call
        lock.put_first(self)

    def withdraw(self) -> None:
        """Leave the queue; no error if the turn has been taken or left already."""
        hold = self._become_hold()
        lock = self._fate["lock"]
        if hold is not None:
            hold.release()
        elif isinstance(lock, KeyLock):
            lock._take_out(self)

    def _become_hold(self) -> Hold | None:
        """The key, if nobody else has asked for it and it was not taken before."""
        hold = Hold(self._name, here(), self._table)
        if self._fate.setdefault("lock", hold) is not hold:
            return None
        self._table[self._name] = hold
        return hold


def _released_twice(name: str) -> RuntimeError:
    return RuntimeError(f"the session {name!r} was released twice")


class KeyLock:
    """A lock that is handed on in the order in which it was asked for.

    Why it is correct. Whatever a lock consists of (`hold`, the queues, `retired`) is written under
    its own mutex only, held for a few lines and never while waiting. A lock changes hands inside
    `release`, in one step: `hold` is the old owner before and the next one after, so there is no
    moment in which a newcomer could slip in, and a waiter that wakes up owns the lock already. A
    waiter that gives up (time-out, cancellation, interrupt) looks under the mutex whether it is
    still queued: if it was chosen meanwhile, it hands the lock on as any owner does, else it takes
    itself out of the queue; so no hand-over is lost and none happens twice. If the lock is free
    although somebody queues, then nobody in the queue can run just now: either a `Turn` was called
    and is on its way, or all belong to event loops that stand still; the former keeps newcomers
    behind it, the latter do not, and both come back by themselves (`_claim`).

    A `Turn` has not begun, so it may be passed by those who have: a waiter with `passes` runs
    inside a handler, and if it queued behind a task that needs a worker while it occupies the last
    worker, neither would ever move. Hence two queues, of which the second begins with a `Turn` and
    has everybody who may not pass it; it is looked at when the first has nobody who could run.

    An event loop cannot run while its thread blocks, and two parties that wait for each other wait
    for ever: `_deadlock_of` looks for both before anybody sleeps. A circle can be closed only
    by somebody who begins to wait (who is handed a lock does not wait), and beginners are checked
    one at a time (`_waits_mutex`), so the last one always sees the whole circle.

    Nothing here counts on a GIL, beyond single operations of dict and list being atomic: the
    table's `setdefault` and `pop` (LockTable), `list(...)` in the deadlock check.
    """

    __slots__ = ("_mutex", "_queue", "_turns", "hold", "name", "retired", "table")

    def __init__(self, name: str, table: _Table | None = None) -> None:
        self.name: Final = name
        self.hold: Hold | None = None
        self.retired = False  # out of the table: ask the table again
        self.table: Final = table  # that it belongs to, if it does
        self._mutex: Final = threading.Lock()
        self._queue: Final[_Queue] = {}
        self._turns: Final[_Queue] = {}  # from the first Turn on

    # -- taking it: each answers None if the lock was retired meanwhile

    def try_acquire(self) -> Hold | None:
        """Take the lock if nobody holds it or waits for it."""
        with self._mutex:
            if self.retired or self.hold is not None or self._queue or self._turns:
                return None
            self.hold = Hold.of_lock(self, here())
            return self.hold

    def acquire(self, timeout: float | None, passes: bool = False) -> Hold | None:
        """Wait in this thread, at most `timeout` seconds (None: for ever)."""
        waiter = _ThreadWaiter(self, here())
        try:
            if not self._join(waiter, passes) or waiter.wait(timeout):
                return waiter.hold
            return self._too_late(waiter, timeout)
        except BaseException:
            self._give_up(waiter)
            raise
        finally:
            _blocked_threads.pop(waiter.party.thread, None)

    async def acquire_async(self, timeout: float | None, passes: bool = False) -> Hold | None:
        """Wait as a coroutine, at most `timeout` seconds (None: for ever); holds no thread."""
        waiter = _TaskWaiter(self, here())
        try:
            if not self._join(waiter, passes):
                return waiter.hold
            try:
                async with asyncio.timeout(timeout):
                    await waiter.future
            except TimeoutError:
                return self._too_late(waiter, timeout)
            return waiter.hold
        except BaseException:
            self._give_up(waiter)
            raise
        finally:
            _waiting_tasks.pop(waiter.party.task, None)

    def queue_turn(self, turn: Turn) -> bool:
        """Queue a task that has not begun; it may be called before this returns."""
        with self._mutex:
            if self.retired:
                return False
            turn.belong_to(self)
            self._enter(turn, self._turns)
            if self.hold is None:
                self._hand_on()
        return True

    def put_first(self, turn: Turn) -> None:
        """Give the lock back for a turn that waits again, ahead of those that have not begun."""
        with self._mutex:
            others = list(self._turns)
            self._turns.clear()
            turn.belong_to(self)
            self._enter(turn, self._turns)
            for other in others:
                self._enter(other, self._turns)
            self._hand_on()

    def give_back(self, hold: Hold) -> None:
        """Give the lock to whoever is next."""
        with self._mutex:
            if self.hold is not hold:
                raise _released_twice(self.name)
            self._hand_on()

    # -- inside; from here on under the mutex, if there is no `with` to be seen

    def _join(self, waiter: _Begun, passes: bool) -> bool:
        """Take the lock, or stand in the queue and answer True."""
        with self._mutex:
            if self.retired:
                return False
            first_queue = passes or not self._turns
            if self.hold is None and first_queue:
                waiter.hold = self.hold = Hold.of_lock(self, waiter.party)
                return False
            with _waits_mutex:
                self._enter(waiter, self._queue if first_queue else self._turns)
                if reason := self._deadlock_of(waiter):
                    self._exit(waiter)
                    raise SessionDeadlockError(reason)
                if isinstance(waiter, _ThreadWaiter):
                    _blocked_threads[waiter.party.thread] = waiter
                else:
                    _waiting_tasks[waiter.party.task] = waiter
            return True

    def _too_late(self, waiter: _Waiter, timeout: float | None) -> Hold | None:
        holder = self.hold
        if not self._leave(waiter):
            return waiter.hold  # chosen in the very moment
        raise SessionLockTimeout(
            f"the session {self.name!r} was not free within {timeout:g} s: it is held by "
            f"{holder or 'nobody, but by a task that waits for a worker'}. Let that handler call "
            f"session.release() before it goes on for long, or give the manager a longer "
            f"lock_timeout."
        )

    def _give_up(self, waiter: _Waiter) -> None:
        if not self._leave(waiter) and waiter.hold is not None:
            waiter.hold.release()  # chosen in the very moment

    def _leave(self, waiter: _Waiter) -> bool:
        """Out of the queue. False if the waiter is not in it (any more)."""
        # First without the mutex: the coroutine of a closed loop is thrown away by the garbage
        # collector, which may come while this very thread has the mutex.
        if waiter.place is None:
            return False
        return self._take_out(waiter)

    def _take_out(self, waiter: _Waiter) -> bool:
        """The same, with the mutex."""
        with self._mutex:
            if waiter.place is None:
                return False
            self._exit(waiter)
            if self.hold is None:  # it was called, and others may have queued behind it
                self._hand_on()
            return True

    def _claim(self, waiter: _Waiter, party: Party) -> Hold | None:
        """The lock for a waiter that comes by itself, or None: then it keeps its place."""
        with self._mutex:
            expected = waiter.place is self._queue
            if isinstance(waiter, Turn):
                expected = waiter.called and waiter.place is not None
                waiter.called = False
            if self.hold is not None or not expected:
                return None
            waiter.hold = self.hold = Hold.of_lock(self, party)
            self._exit(waiter)
            return waiter.hold

    def _hand_on(self) -> None:
        """Give the lock to the first who can take it, or retire it if nobody is left."""
        hold = None
        if self._queue:
            gone = []
            for waiter in self._queue:
                answer = waiter.offer()
                if answer != "absent":
                    gone.append(waiter)
                if answer == "taken":
                    hold = waiter.hold
                    break
            self.hold = hold
            for waiter in gone:
                self._exit(waiter)
        else:
            self.hold = None
        if hold is None:
            if self._turns:
                next(iter(self._turns)).offer()
            elif not self._queue:
                self._retire()

    def _retire(self) -> None:
        if self.table is not None:
            self.retired = True
            self.table.pop(self.name, None)

    def _enter(self, waiter: _Waiter, queue: _Queue) -> None:
        queue[waiter] = None
        waiter.place = queue

    def _exit(self, waiter: _Waiter) -> None:
        place = waiter.place
        assert place is not None
        waiter.place = None
        del place[waiter]
        if place is self._turns:
            # What stood behind the first Turn may stand behind none now.
            while self._turns and isinstance(first := next(iter(self._turns)), _Begun):
                self._enter(first, self._queue)
                del self._turns[first]

    def _deadlock_of(self, waiter: _Begun) -> str:
        """Why the wait that now begins could never end, if it could not; under `_waits_mutex`."""
        loop = waiter.party.loop if waiter.blocking else None  # that would stand still meanwhile
        if loop is not None and any(
            other.loop is loop for other in self._ahead_of(waiter, with_queue=True)
        ):
            return (
                f"a blocking `with` for the session {self.name!r} on the event loop's own thread "
                f"can never succeed: a coroutine of this loop holds it or waits for it ahead of "
                f"this one. Use `async with sessions.session_scope(...)`."
            )
        # Who waits is in nobody's way, since it will get the lock and go on: unless it is a
        # coroutine of a loop that stands still.
        with_queue = loop is not None or any(
            other.party.loop is not None for other in list(_blocked_threads.values())
        )
        waiters: list[_Begun] = [waiter]
        seen: set[_Begun] = {waiter}
        for one in waiters:  # which grows meanwhile
            for party in one.lock._ahead_of(one, with_queue):
                if waiter.party.is_stopped_with(party, waiter.blocking):
                    return (
                        f"waiting for the session {self.name!r} would never end: it is held by "
                        f"{self.hold}, who waits for a session that is held here. Open the "
                        f"sessions of several users in the same order everywhere."
                    )
                for other in (_waiting_tasks.get(party.task), _blocked_threads.get(party.thread)):
                    if other is not None and other not in seen:
                        seen.add(other)
                        waiters.append(other)
        return ""

    def _ahead_of(self, waiter: _Begun, with_queue: bool) -> list[Party]:
        """Who has to move before `waiter` can have this lock. Called without the mutex, too."""
        ahead: list[Party] = []
        if with_queue:
            turns = list(self._turns)  # first: who leaves one for the other is in both for a moment
            for other in [*self._queue, *turns]:
                if other is waiter:
                    break
                if isinstance(other, _Begun):
                    ahead.append(other.party)
        hold = self.hold  # last: who is given the lock has it before he leaves the queue
        if hold is not None:
            ahead += hold.parties
        return [] if waiter.place is None else ahead  # it has just left the queue


# Who waits; by thread where the whole thread blocks.
_blocked_threads: dict[threading.Thread, _Begun] = {}
_waiting_tasks: dict[asyncio.Task[object] | None, _Begun] = {}
_waits_mutex = threading.Lock()


class LockTable:
    """The locks of one store, by key. A lock exists only while somebody holds it or waits for it.

    Under a key stands who came first: a Hold or a Turn, from which the KeyLock hangs as soon as
    others want the key; or a KeyLock, if he had to be ready to wait.

    Why a key never has two locks that matter: what stands in the table enters it by `setdefault`,
    one atomic step. A Hold leaves it as it says itself; a Turn gives its place to the Hold that it
    becomes; a KeyLock leaves under its own mutex, marked `retired` in the same breath, and whoever
    found it before sees the mark and asks the table again. There is no mutex around the table: with
    one, 64 threads on 64 keys would wait for each other.
    """

    __slots__ = ("__weakref__", "_locks")

    def __init__(self) -> None:
        self._locks: Final[_Table] = {}
        _tables.add(self)

    def __len__(self) -> int:
        return len(self._locks)

    def try_acquire(self, key: str) -> Hold | None:
        """The key if nobody holds it or waits for it, at once."""
        locks = self._locks
        hold = Hold(key, here(), locks)
        return hold if locks.setdefault(key, hold) is hold else None

    def acquire(self, key: str, timeout: float | None, passes: bool = False) -> Hold:
        """Wait for `key` in this thread, at most `timeout` seconds (None: for ever).

        `passes`: the caller runs inside a handler and need not queue behind tasks not yet begun.

        Raises SessionLockTimeout, and SessionDeadlockError where the wait could never end.
        """
        while True:
            hold = self._lock(key).acquire(timeout, passes)
            if hold is not None:
                return hold

    async def acquire_async(self, key: str, timeout: float | None, passes: bool = False) -> Hold:
        """As `acquire`, for a coroutine: it waits without a thread."""
        while True:
            hold = await self._lock(key).acquire_async(timeout, passes)
            if hold is not None:
                return hold

    def queue_turn(self, key: str, call: Callable[[Turn], None]) -> Turn:
        """Queue a task that has not begun: see Turn. `call` may be called before this returns."""
        turn = Turn(key, call, self._locks)
        if self._locks.setdefault(key, turn) is turn:
            call(turn)
        else:
            while not self._lock(key).queue_turn(turn):
                pass  # until there is a lock that has not left the table
        return turn

    def _lock(self, key: str) -> KeyLock:
        while True:
            first = self._locks.setdefault(key, KeyLock(key, self._locks))
            lock = first if isinstance(first, KeyLock) else first.wanted()
            if lock is not None:
                return lock
            time.sleep(0)  # so that the one who lets go can take his next step

    def _keep_own(self) -> None:
        """In a forked child: keep what the thread that has forked holds, as if new."""
        thread = threading.current_thread()
        for key, first in list(self._locks.items()):
            del self._locks[key]
            hold = first.hold if isinstance(first, KeyLock) else first.holder
            if hold is not None and any(party.thread is thread for party in hold.parties):
                hold.begin_anew()
                self._locks[key] = hold


_tables: Final[weakref.WeakSet[LockTable]] = weakref.WeakSet()


def _after_fork() -> None:
    """No other thread lives on in the child: none gives back what it held or waited for."""
    global _waits_mutex
    _waits_mutex = threading.Lock()
    _blocked_threads.clear()
    _waiting_tasks.clear()
    for table in _tables:
        table._keep_own()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
