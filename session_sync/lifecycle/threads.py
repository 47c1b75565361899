"""Blocking calls of coroutines, in threads.

This module knows calls and the threads that make them; it knows no session.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from ..errors import SessionLockTimeoutError
from .flow import insist

logger: Final = logging.getLogger("session_sync")
T = TypeVar("T")

_MOMENT: Final = 0.0002  # seconds
_LONG: Final = 0.002  # seconds that a call in place should not take
_PAUSE: Final = 1.0  # seconds for which there is none after one that did
_VERY_LONG: Final = 1e6  # seconds
_LAST_WAIT: Final = 120.0  # seconds for which the end of the process waits: SQLite may for 60
# CPython's messages.
_NO_THREAD: Final = "can't start new thread", "can't create new thread at interpreter shutdown"


def call_store(function: Callable[..., T], *args: Any) -> T:
    """Call something of a storage."""
    try:
        return function(*args)
    except StopIteration as error:  # which would end a flow without a trace
        raise RuntimeError("the storage raised StopIteration") from error


class NoThreadError(RuntimeError):
    """No thread can be started: the system, or a container, has a limit."""


class CallBlocking:
    """Call something that blocks; from a coroutine in a thread of `pool`.

    `nowait` does the same in the coroutine itself, if nothing has to be waited for, and returns
    whether it did. For a second after it has taken long all the same, it is not called.

    `deadline` is for a call that may be in the pool's queue for long: if it has not begun when
    so many seconds are over, it is withdrawn, and SessionLockTimeoutError is raised.

    A coroutine that is cancelled waits for the call to end all the same: the lock must not be
    passed on while a thread still writes, nor a result that has to be cleaned up come when nothing
    waits for it any more. One that was thrown away cannot wait; `join` is for what cleans up then.
    """

    __slots__ = ("_args", "_call", "_deadline", "_function", "_nowait", "_pool")

    def __init__(
        self,
        pool: ThreadPool,
        function: Callable[..., Any],
        *args: Any,
        nowait: Callable[..., bool] | None = None,
        deadline: float | None = None,
    ) -> None:
        self._pool: Final = pool
        self._function: Final = function
        self._args: Final = args
        self._nowait: Final = nowait
        self._deadline: Final = deadline
        self._call: _ThreadedCall | None = None

    def run(self) -> None:
        call_store(self._function, *self._args)

    async def arun(self) -> None:
        pool = self._pool
        if self._nowait is not None and (begin := time.perf_counter()) >= pool.in_threads_until:
            done = call_store(self._nowait, *self._args)
            end = time.perf_counter()
            if end - begin > _LONG:
                pool.in_threads_until = end + _PAUSE
            if done:
                return
        call = self._call = _ThreadedCall(self.run)
        try:
            try:
                pool.submit(call)
            except NoThreadError:
                if not pool.insists:
                    raise
                call.run()
            if pool.seconds < _MOMENT:
                call.wait_a_moment()
            await call.end(self._deadline)
        except GeneratorExit:  # thrown away, by a finaliser, which must not wait
            raise
        except BaseException:  # it was interrupted, perhaps while the call is on its way
            call.withdraw()
            raise
        pool.seconds = call.seconds

    @property
    def is_on_its_way(self) -> bool:
        """Whether a thread may be doing it, or may yet."""
        return self._call is not None and not self._call.has_ended

    def join(self) -> None:
        """Wait, in a thread, until the call has ended, or prevent it from beginning."""
        if self._call is not None:
            self._call.withdraw()


def _nothing() -> None:
    return None


class _ThreadedCall:
    """A call in another thread, and the coroutine that waits for it.

    As little as will do: what concurrent.futures and asyncio have for this takes twice as long. And
    to be woken by its event loop takes a coroutine longer than many a call takes. So where the last
    call was quick, it first waits for a moment in place: for 0.2 ms at most, in which the loop does
    stand still.

    Why the coroutine is always woken. It writes down its future and then looks whether the call has
    ended; the thread notes that it has ended and then looks for a future. Whichever comes second
    sees the other. Whether a call begins or is withdrawn is decided by what comes first in `_fate`:
    one atomic step, and one that can be repeated after an interrupt.
    """

    __slots__ = (
        "_error",
        "_fate",
        "_function",
        "_future",
        "_gate",
        "_loop",
        "has_ended",
        "seconds",
    )

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        # Weakly: when the loop is thrown away, the coroutine goes with it, and not only when a
        # thread that is on its way has ended.
        self._loop: Final = weakref.ref(asyncio.get_running_loop())
        self._future: Callable[[], asyncio.Future[None] | None] = _nothing
        self._error: BaseException | None = None
        self.has_ended = False
        self._fate: Final[dict[None, str]] = {}  # "begun" or "withdrawn"
        self._gate: Final = threading.Lock()  # open when the call has ended
        self._gate.acquire()
        self.seconds = 0.0  # that the call took

    def run(self) -> None:
        """Make the call, in a thread of the pool."""
        if self._fate.setdefault(None, "begun") != "begun":
            return
        begin = time.perf_counter()
        try:
            self._function()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - begin
        self._function = _nothing  # which knows a scope: this thread has nothing to do with it now
        self.has_ended = True
        self._gate.release()
        loop = self._loop()
        if self._future is not _nothing and loop is not None:
            with suppress(RuntimeError):  # the loop was closed meanwhile: nothing waits
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        future = self._future()
        if future is not None and not future.done():
            future.set_result(None)

    def withdraw(self) -> None:
        """Prevent the call; if it has begun, wait until it has ended."""
        # An interrupt in `wait_a_moment` leaves the gate closed, but only after the call has ended.
        if self._fate.setdefault(None, "withdrawn") == "begun" and not self.has_ended:
            with self._gate:
                pass

    def wait_a_moment(self) -> None:
        """Let the thread have the time that it takes to fall asleep and to be woken."""
        if self._gate.acquire(timeout=_MOMENT):
            self._gate.release()

    async def end(self, deadline: float | None) -> None:
        """Wait until the call has ended; raises what it has raised. A coroutine that is cancelled
        waits all the same."""
        cancelled = None
        if not self.has_ended:
            loop = asyncio.get_running_loop()
            timer = None if deadline is None else loop.call_later(deadline, self._give_up)
            try:
                cancelled = await insist(self._wait)
            finally:
                if timer is not None:
                    timer.cancel()
        failed, self._error = cancelled or self._error, None
        if failed is None:
            return
        try:
            raise failed
        finally:
            del failed, cancelled  # which know this frame: no cycle stays

    async def _wait(self) -> None:
        if not self.has_ended:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._future = weakref.ref(future)
            keeper = loop.call_later(_VERY_LONG, future.cancelled)  # a task that nothing else keeps
            try:
                if not self.has_ended:
                    await future
            finally:
                keeper.cancel()

    def _give_up(self) -> None:
        if self._fate.setdefault(None, "withdrawn") == "withdrawn":
            self._error = SessionLockTimeoutError(
                "another process has it, and other sessions that wait for other processes were "
                "ahead of this one"
            )
            self.has_ended = True
            self._gate.release()
            self._wake()


class _Runnable(Protocol):
    def run(self) -> None: ...


class _Errand:
    """A call for whose end nothing waits. If it fails, only the log can be told."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Final = function

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:  # its message may have anything in it
            logger.error("a session that was left open could not be closed: %s", type(error))


class ThreadPool:
    """Threads for blocking calls, started when they are needed, and anew in a forked child.

    They do not keep the process from ending, since they may block for as long as another process
    likes. A pool that `insists` makes all calls: those that are on their way when the process ends,
    and in place, where no thread can be started.
    """

    def __init__(self, name: str, size: int, insists: bool) -> None:
        self._name: Final = f"session_sync-{name}"
        self._size: Final = size
        self._workers: Final[dict[int, _Workers]] = {}  # by process
        self.seconds = 0.0  # that the last call took
        self.in_threads_until = 0.0  # from time.perf_counter(): a call in place took long
        self.insists: Final = insists
        if insists:
            atexit.register(self._finish)

    def submit(self, call: _Runnable) -> None:
        """Have one of the threads run `call`.

        Raises NoThreadError if there is no thread and none can be started; then it is not run.
        """
        self._of_process().submit(call)

    def run_soon(self, function: Callable[[], None]) -> None:
        """Call `function` in one of the threads, or here if there can be none."""
        try:
            self.submit(_Errand(function))
        except NoThreadError:
            _Errand(function).run()

    @property
    def is_crowded(self) -> bool:
        """Whether calls wait for a thread."""
        return self._of_process().is_crowded

    def _of_process(self) -> _Workers:
        pid = os.getpid()
        workers = self._workers.get(pid)
        if workers is None:  # one too many has no threads, and is nothing
            workers = self._workers.setdefault(pid, _Workers(self._name, self._size))
        return workers

    def _finish(self) -> None:
        workers = self._workers.get(os.getpid())
        if workers is not None:
            workers.finish()


class _Workers:
    """The threads of one pool in one process.

    A finaliser may submit a call, in the middle of `submit` or of anything else. So there is no
    mutex, and threads are started without `threading.Thread`, whose `start` has one, and waits for
    the new thread. There are about `size` of them: of two that start at once, one may be too many.

    Why no call is forgotten when the process ends: the first call of a thread is in `_starting`
    until that has begun, and is made by whichever takes it out of its list first, the thread or
    `finish`. A thread notes that it is alive before it takes it.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name: Final = name
        self._calls: Final[SimpleQueue[_Runnable | None]] = SimpleQueue()
        self._size: Final = size
        self._numbers: Final = itertools.count(1)
        self._starting: Final[dict[object, list[_Runnable]]] = {}  # first calls of threads
        self._alive: Final[dict[object, None]] = {}  # threads that have begun ...
        self._idle: Final[dict[object, None]] = {}  # ... and those of them that wait for a call
        self._ended: Final[SimpleQueue[object]] = SimpleQueue()

    @property
    def is_crowded(self) -> bool:
        return not self._calls.empty()

    def submit(self, call: _Runnable) -> None:
        try:
            self._idle.popitem()
        except KeyError:
            if self._starts(call):
                return
        self._calls.put(call)

    def finish(self) -> None:
        """Let the threads end when all calls are made; but one may wait for a lock that is released
        only by code which the end of the process has stopped."""
        deadline = time.monotonic() + _LAST_WAIT
        for first in list(self._starting.values()):
            with suppress(IndexError):  # the thread was faster
                first.pop().run()
        while self._alive:  # some may begin meanwhile, and others have ended before
            for _ in list(self._alive):
                self._calls.put(None)
            try:
                self._ended.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                logger.error("the process ends, and sessions that were left open are not closed")
                return
        with suppress(Empty):  # what no thread has come to
            while True:
                call = self._calls.get_nowait()
                if call is not None:
                    call.run()

    def _starts(self, call: _Runnable) -> bool:
        """Start a thread that makes this call first, if there may be one more and it can be had;
        or raise NoThreadError if there is none at all."""
        if len(self._alive) + len(self._starting) >= self._size:
            return False
        thread, first = object(), [call]
        self._starting[thread] = first
        try:
            _thread.start_new_thread(self._work, (thread, first))
        except (RuntimeError, MemoryError) as error:
            # Looked at without a call, behind which an interrupt could come.
            if error.__class__ is RuntimeError and (error.args or ("",))[0] not in _NO_THREAD:
                raise  # it was raised by a signal handler
            self._starting.pop(thread, None)
            if not self._alive and not self._starting:
                raise NoThreadError(str(error)) from None
            return False
        return True

    def _work(self, thread: object, first: list[_Runnable]) -> None:
        try:
            self._alive[thread] = None
            threading.current_thread().name = f"{self._name}_{next(self._numbers)}"
            call: _Runnable | None = None
            with suppress(IndexError):  # the process was about to end
                call = first.pop()
            self._starting.pop(thread, None)
            while call is not None:
                call.run()
                call = None  # which may hold a session
                self._idle[thread] = None
                call = self._calls.get()
                self._idle.pop(thread, None)
        finally:
            self._idle.pop(thread, None)
            self._starting.pop(thread, None)
            self._alive.pop(thread, None)
            self._ended.put(thread)


# Opening may wait for another caller's closing, which must not queue behind it; and what waits for
# another process's handler does not hold up sessions that could be opened at once.
openers: Final = ThreadPool("open", 16, insists=False)
waiters: Final = ThreadPool("wait", 64, insists=False)
closers: Final = ThreadPool("close", 16, insists=True)
# What nothing waits for may itself wait for a flush, whose call must not queue behind it.
errands: Final = ThreadPool("errand", 16, insists=True)
