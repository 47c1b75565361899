"""A caller's claim to one key, from before it is made until after it was given up.

This module knows keys, callers and queues; it knows nothing of sessions or storages. It is longer
than others: the handles, what waits for them and the steps under one mutex are one argument.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from ..errors import SessionDeadlockError, SessionLockTimeoutError
from .callers import Caller, Ender, current_caller, names_of
from .deadlock import waits
from .queue import KeyQueue
from .watch import Patience, watch

R = TypeVar("R")


class Table(Protocol):
    """Where the locks of some keys are kept: see LockTable."""

    queues: dict[str, KeyQueue[LockHandle]]

    @property
    def held(self) -> dict[str, LockHandle]: ...
    def name_of(self, key: str, /) -> str: ...


class Inside(Protocol):
    """What the owner of a lock has locked within itself: see Scope."""

    def locks_to_end(self) -> Sequence[LockHandle]:
        """Those that are held now, and for which the owner may have to wait before it releases."""
        ...

    @property
    def is_just_ending(self) -> bool:
        """Whether one caller is about to end it, while the handle still names all that were in it:
        that one alone has it, and it is an Ender."""
        ...


#: The queues of a table in which nothing has ever waited.
NO_QUEUES: Final[dict[str, KeyQueue[LockHandle]]] = {}


def _nothing() -> None:
    return None


class LockHandle:
    """One caller's claim to one key: nothing yet, a place in the queue, or the lock itself.

    Which of these it is, the table alone knows: the lock belongs to the handle that the table has
    under `held`, and those that wait are in the key's queue. So there is nothing else that could
    disagree with it, and a caller that wakes up looks there.

    Why no lock is lost. An owner writes its handle down before it acquires it, and calls `release`
    at the end; whatever interrupts it (Ctrl-C, a signal handler that raises, a cancellation), its
    finaliser calls `release` again. `release` undoes whatever was done so far, a place in the queue
    as well as a lock, and may be called any number of times. If even the finaliser was interrupted,
    the watch finds that the owner has been gone for a while, and takes the handle out (not at once:
    a finaliser may be about to have others close what it was locked for).

    Why two callers never have one key. Unlocked and not waited for, it goes to the handle that
    enters `held` first, by `setdefault`: one atomic step. Only its owner takes that handle out
    again. With a queue, all happens under the mutex, in which the next handle takes the place of
    the old one. Under the mutex, too, handles are taken out that others than their owner may take
    out: what has waited (its event loop may be closed as it is given the lock), and what is being
    collected.

    Why no caller waits for a key that is unlocked. A caller that waits enters the queue, and then
    looks whether the key is held; a caller that releases takes its handle out, and then looks
    whether there is a queue. Whichever comes second sees the other, and gives the key to the first
    that can take it.
    """

    __slots__ = (
        "by_note",
        "callers",
        "inside",
        "keeps",
        "key",
        "owner",
        "since",
        "table",
        "waiter",
    )

    if TYPE_CHECKING:
        begun: bool
    else:
        begun = True  # of all but tickets, which have a field of this name

    def __init__(self, table: Table, key: str, caller: Caller) -> None:
        self.table: Final = table
        self.key: Final = key
        self.callers = [caller]  # more than one where a session was joined
        self.since = 0.0  # time.monotonic(), from which on it is held
        self.waiter: _Waiter | None = None  # from the first wait on, until it is released
        #: A weak reference to the owner, which tells `is_orphaned` whether that is gone.
        self.owner: Callable[[], object] | None = None
        #: What has locks for which the owner may have to wait before it can release this one;
        #: weak, since it knows this handle.
        self.inside: Callable[[], Inside | None] = _nothing
        #: What is not to be collected before the lock is released, though its owner is.
        self.keeps: object = None
        #: Whether it is taken out only as the notes are worked off: from a release on that was
        #: noted, and where its owner is being collected, so that others may take it for orphaned.
        self.by_note = False

    # -- the owner's side

    @property
    def is_held(self) -> bool:
        """Whether the lock belongs to this handle."""
        return self.table.held.get(self.key) is self

    def try_acquire(self) -> bool:
        """Take the lock if no other handle holds it or waits for it."""
        key, table = self.key, self.table
        if key not in table.queues and table.held.setdefault(key, self) is self:
            self.since = time.monotonic()
            return True
        return False

    def acquire(
        self, timeout: float | None, passes: bool = False, patience: Patience | None = None
    ) -> None:
        """Wait in this thread, at most `timeout` seconds (None: forever).

        `passes`: the caller runs inside a handler, and passes tasks that have not begun.
        `patience`: after what time a wait that goes on is reported, and what is called then.

        Raises SessionLockTimeoutError, and SessionDeadlockError where the wait could never end.
        """
        if self.try_acquire():
            return
        waiter = ThreadWaiter(self)
        try:
            if not self._enter(waiter, passes, patience):
                waiter.wait(timeout)
                self._check(timeout)
        except BaseException:
            self.release()
            raise

    async def acquire_async(
        self, timeout: float | None, passes: bool = False, patience: Patience | None = None
    ) -> None:
        """As `acquire`, for a coroutine: it waits without a thread."""
        if self.try_acquire():
            return
        # Here, and nowhere else: with it the task goes, and its place in the queue.
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = TaskWaiter(self, future)
        limit = asyncio.timeout(timeout)
        try:
            if not self._enter(waiter, passes, patience):
                try:
                    async with limit:
                        await future
                except TimeoutError:
                    if not limit.expired():  # it came from outside
                        raise
                self._check(timeout)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock to the next one, or leave the queue; whatever the claim was so far."""
        key, table = self.key, self.table
        if self.waiter is None and self.begun and key not in table.queues and not self.by_note:
            if table.held.get(key) is self:
                del table.held[key]
            if key not in table.queues:
                if _released or _granted:  # by an interrupted release, perhaps of this very lock
                    settle()
                return
        _note(self)
        settle()

    @property
    def is_orphaned(self) -> bool:
        """Whether its owner is gone, and will not release it."""
        owner = self.owner
        return owner is not None and owner() is None

    @property
    def name(self) -> str:
        """The key as messages name it."""
        return self.table.name_of(self.key)

    # -- waiting

    def _enter(
        self, waiter: ThreadWaiter | TaskWaiter, passes: bool, patience: Patience | None
    ) -> bool:
        """Enter the queue; True if the lock was to be had at once."""

        def enter() -> str:
            queue = queue_of(self.table, self.key)
            self.waiter = waiter
            queue.enter(self, passes)
            waits.add(waiter)
            hand_on(self.table, self.key)
            return "" if self.is_held else waits.reason_against(waiter)

        if reason := locked(enter):
            raise SessionDeadlockError(reason)
        if self.is_held:
            return True
        begin_watch(self.table, self.key, patience)
        return False

    def _check(self, timeout: float | None) -> None:
        """Raise SessionLockTimeoutError unless the lock was given to this handle."""
        if not self.is_held:
            raise SessionLockTimeoutError(
                f"the session {self.name!r} was not unlocked within {timeout:g} s: "
                f"{describe_holder(self.table, self.key)}. Let that handler call "
                f"session.release() before it goes on for long, or give the manager a longer "
                f"lock_timeout."
            )


class Ticket(LockHandle):
    """The place in the queue of a task that has not begun, and waits without a thread.

    When the key is unlocked for it, the lock is given to the ticket, and its task is called: put
    into a thread pool, say. From then on callers queue behind it. But until the task begins and
    redeems the ticket, a running handler may still pass it and take the lock; the ticket then
    stays the first one of those that have not begun, and its task is called again later.
    """

    __slots__ = ("begun",)

    def __init__(self, table: Table, key: str) -> None:
        self.begun = False  # until it is redeemed
        super().__init__(table, key, current_caller())
        self.callers = []

    def withdraw(self) -> None:
        """Leave the queue, unless the ticket was redeemed: then its task owns it. Another thread
        may redeem it just now, so this is looked at under the mutex."""
        _released.append((self, False))
        settle()


# -- the waiters: each kind has its own way to be woken


class _Waiter(Protocol):
    """How a handle that waits is told that it has the lock."""

    def is_gone(self) -> bool:
        """Whether it never will go on."""
        ...

    def can_take(self) -> bool:
        """Whether it could go on just now."""
        ...

    def wake(self) -> bool:
        """Tell it, perhaps once more; False if it is gone forever."""
        ...


class _BegunWaiter:
    """One that waits in the middle of its work, so that others may wait for it."""

    __slots__ = ("__weakref__", "caller", "handle", "number")

    blocking: bool

    def __init__(self, handle: LockHandle) -> None:
        self.number = 0  # see Waits
        self.handle: Final = handle
        self.caller: Final = handle.callers[0]

    @property
    def name(self) -> str:
        """The key of the session that it waits for."""
        return self.handle.name

    def holders(self) -> Sequence[Caller]:
        """Those that have the lock now."""
        holder = self.handle.table.held.get(self.handle.key)
        if holder is None or holder is self.handle or holder.is_orphaned:
            return []
        scope = holder.inside()
        if scope is None:
            return holder.callers
        callers = list(holder.callers)
        if scope.is_just_ending:
            callers = [caller for caller in callers if isinstance(caller, Ender)]
        for each in scope.locks_to_end():
            callers += each.callers
        return callers

    @property
    def place(self) -> LockHandle:
        """Its own place in the queue."""
        return self.handle

    def queue(self) -> KeyQueue[LockHandle] | None:
        """All that wait for the lock, in their order."""
        return self.handle.table.queues.get(self.handle.key)


class ThreadWaiter(_BegunWaiter):
    """A blocked thread: always there to take what it is given."""

    __slots__ = ("_gate",)

    blocking = True

    def __init__(self, handle: LockHandle) -> None:
        super().__init__(handle)
        self._gate: Final = threading.Lock()
        self._gate.acquire()

    def is_gone(self) -> bool:
        return False

    def can_take(self) -> bool:
        return True

    def wake(self) -> bool:
        if self._gate.locked():
            self._gate.release()
        return True

    def wait(self, timeout: float | None) -> None:
        """Until the thread is woken, or `timeout` seconds are over."""
        self._gate.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))


class TaskWaiter(_BegunWaiter):
    """A suspended coroutine: takes the lock only while its event loop runs.

    A loop that stands still may go on later (`run_until_complete` called again), so its waiter
    keeps its place, is passed over, and is looked at again once the loop moves. One that stops
    after its waiter was given the lock keeps it, as if it had stopped a moment later, inside the
    session; and as there, the key is unlocked when the task is collected.

    It keeps neither the task nor the loop alive: when they are thrown away, its place in the queue
    goes with them.
    """

    __slots__ = ("_asked", "_future", "_loop")

    blocking = False

    def __init__(self, handle: LockHandle, future: asyncio.Future[None]) -> None:
        super().__init__(handle)
        self._future: Final = weakref.ref(future)
        self._loop: Final = weakref.ref(future.get_loop())
        self._asked = False  # to look again, once its loop goes on

    def is_gone(self) -> bool:
        loop, future = self._loop(), self._future()
        return loop is None or future is None or future.done() or loop.is_closed()

    def can_take(self) -> bool:
        loop = self._loop()
        if loop is None:
            return False
        if loop is asyncio._get_running_loop() or loop.is_running():
            return True
        if not self._asked:
            try:
                loop.call_soon_threadsafe(self._look)
            except RuntimeError:  # it was closed meanwhile
                return False
            self._asked = True
        return False

    def wake(self) -> bool:
        loop, future = self._loop(), self._future()
        if loop is None or future is None:
            # It was told before, by a step that was interrupted then, and has gone on; or it was
            # thrown away, and then it releases what it has been given.
            return True
        if loop is asyncio._get_running_loop():
            _set_done(future)
            return True
        try:
            loop.call_soon_threadsafe(_set_done, future)
        except RuntimeError:  # the loop was closed: this coroutine will never run again
            return False
        return True

    def _look(self) -> None:
        """In the loop, which goes on."""
        try:
            locked(self._look_again)
        except BaseException:  # a signal handler's, of which asyncio tells only the log
            loop = self._loop()
            if loop is not None:
                loop.call_soon_threadsafe(self._look)
            raise

    def _look_again(self) -> None:
        self._asked = False  # under the mutex, as it becomes true
        hand_on(self.handle.table, self.handle.key)


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class TicketWaiter:
    """A task that has not begun: `call` has it begin, sooner or later."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Final = call

    def is_gone(self) -> bool:
        return False

    def can_take(self) -> bool:
        return True

    def wake(self) -> bool:
        self._call()
        return True


# -- how locks change hands, where callers wait. All of it runs under one mutex of the process, held
#    for a few lines and never while anything waits.
#
#    A finaliser or a signal handler may run between any two of those lines, in the very thread that
#    has the mutex. So the mutex is reentrant, and the sections know whether they are busy. What is
#    released is noted first; if a section is busy, of this thread or another one, that section
#    works the note off when its own step is complete, so a release never waits, and finalisers and
#    signal handlers may do it. To wait for a lock in the middle of a step of one's own thread is
#    impossible, and refused at once. All steps can be repeated: what an exception from outside
#    leaves half-done is completed by the next one, the finaliser of the interrupted owner if there
#    is no other.
#
#    Callers are woken at the very end, when all that they could look at is written.

_mutex = threading.RLock()
# Handles to take out of the tables; False: unless they were redeemed.
_released: Final[deque[tuple[LockHandle, bool]]] = deque()
_granted: Final[deque[LockHandle]] = deque()  # handles that have a lock, and are to be told


class _Section:
    """Whether the mutex's owner is in the middle of a step."""

    busy = False


def locked(step: Callable[..., R], *args: object) -> R:
    """Do `step` under the mutex, and all that follows from it.

    Raises SessionDeadlockError in a signal handler or finaliser that has interrupted a step of its
    own thread.
    """
    try:
        with _mutex:
            if _Section.busy:
                raise SessionDeadlockError(
                    "a signal handler (or a finaliser) that has interrupted its own thread while "
                    "that passes a session's lock on cannot wait for a session: that thread would "
                    "have to go on first. Let the handler set a flag, and use the session later."
                )
            _Section.busy = True
            try:
                _work_off()
                result = step(*args)
                _work_off()
            finally:
                _Section.busy = False
    finally:
        if _released or _granted:
            settle()
    return result


def settle() -> None:
    """Do what was noted: release, give locks to the next waiters, wake them. If a section is busy,
    of this thread or another one, that does it: it looks for such notes when it is not busy any
    more."""
    try:
        _settle()
    except BaseException:  # an interrupt; others have left it to this thread to go on
        _settle()
        raise


def wait_for_notes() -> None:
    """Until what others have released is released; not for those of a step beneath this."""
    with suppress(SessionDeadlockError):
        locked(_nothing)


def _settle() -> None:
    while (_released or _granted) and not _Section.busy:
        with _mutex:
            if _Section.busy:
                return
            _Section.busy = True
            try:
                _work_off()
            finally:
                _Section.busy = False


def _work_off() -> None:
    while _released or _granted:
        while _released:
            handle, even_redeemed = _released[0]
            if even_redeemed or not handle.begun:
                _take_out(handle)
                hand_on(handle.table, handle.key)
            _released.popleft()
        while _granted:
            handle = _granted[0]
            waiter = handle.waiter
            if waiter is not None and handle.is_held and not waiter.wake():
                _note(handle)
            _granted.popleft()


def _note(handle: LockHandle) -> None:
    """Release it soon: whatever comes now, that is not forgotten."""
    handle.by_note = True
    _released.append((handle, True))


def _take_out(handle: LockHandle) -> None:
    key, table, waiter = handle.key, handle.table, handle.waiter
    if isinstance(waiter, _BegunWaiter):
        waits.remove(waiter)
    queue = table.queues.get(key)
    if queue is not None:
        queue.leave(handle)
    if table.held.get(key) is handle:
        del table.held[key]
    handle.waiter = None  # which knows this handle: no cycle stays


def begin_watch(table: Table, key: str, patience: Patience | None) -> None:
    """A wait for `key` has begun."""
    queue = table.queues.get(key)
    if queue is not None and patience is not None:
        watch.begin(queue, patience)


def queue_of(table: Table, key: str) -> KeyQueue[LockHandle]:
    """The queue of a key, which begins with the ticket that has the lock, if one has it."""
    queue = table.queues.get(key)
    if queue is None:
        if table.queues is NO_QUEUES:
            table.queues = {}
        queue = table.queues[key] = KeyQueue()
        holder = table.held.get(key)
        if holder is not None and not holder.begun:
            queue.enter_first(holder)
    return queue


def hand_on(table: Table, key: str) -> None:
    """Give a key that is unlocked, or that has only a ticket, to the first that can take it."""
    queue = table.queues.get(key)
    if queue is None:
        return
    holder = table.held.get(key)
    if holder is None or not holder.begun:
        holder = _give(table, key, queue, holder)
    if holder is not None and holder in queue:  # just now, or in a step that was interrupted
        _granted.append(holder)
        if holder.begun:
            if isinstance(holder.waiter, _BegunWaiter):
                waits.remove(holder.waiter)
            queue.leave(holder)
    if not queue:
        table.queues.pop(key, None)


def recover(table: Table, key: str) -> None:
    """Give a key to the next one that nothing holds, or whose holder was lost."""
    holder = table.held.get(key)
    if holder is not None and holder.is_orphaned:
        _take_out(holder)
    hand_on(table, key)


def _give(
    table: Table, key: str, queue: KeyQueue[LockHandle], holder: LockHandle | None
) -> LockHandle | None:
    """The handle that has the key now; `holder` had it, a ticket, or none."""
    for handle in queue.front:  # not a copy, which would take as long as the queue is
        waiter = handle.waiter
        if waiter is None or waiter.is_gone():
            _note(handle)
        elif waiter.can_take():
            break
    else:
        if holder is not None or not queue.back:
            return holder
        handle = next(iter(queue.back))
    handle.since = time.monotonic()
    if holder is None:
        return table.held.setdefault(key, handle)  # unless another one was faster
    table.held[key] = handle
    return handle


def describe_holder(table: Table, key: str) -> str:
    """The holder of a key and since when, in words."""
    holder = table.held.get(key)
    if holder is None:
        return "no caller holds it, and those that wait for it belong to event loops that stopped"
    if not holder.begun:
        return "it is kept for a task that waits for a worker thread"
    return f"{names_of(holder.callers)} has held it for {time.monotonic() - holder.since:.1f} s"


def forget_others() -> None:
    """In a forked child no other thread lives on, none that waits and none that has the mutex."""
    global _mutex
    _mutex = threading.RLock()
    _Section.busy = False
    _released.clear()
    _granted.clear()
    waits.clear()
