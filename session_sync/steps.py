"""How a life cycle that is written once is run by a thread and by a coroutine.

A life cycle is a generator that yields what may take long: waiting for a lock, calling a storage.
`run` does each step in the calling thread, `arun` without blocking the event loop. What never takes
long is not yielded at all.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, Literal, NoReturn, Protocol, TypeVar

from .locks import Hold, KeyLock, LockTable


class Step(Protocol):
    """Something that may take long, in two ways of waiting for it."""

    def run(self) -> Any: ...
    async def arun(self) -> Any: ...


Steps = Generator[Step, Any, None]
T = TypeVar("T")


def run(steps: Steps) -> None:
    """Do `steps` in this thread."""
    step = next(steps, None)  # which costs no exception at the end, and many take no step at all
    if step is not None:
        try:
            _run_on(steps, step)
        except StopIteration:
            return  # as suppress() would, which takes longer than some steps


def _run_on(steps: Steps, step: Step) -> NoReturn:
    while True:  # until StopIteration says that there are no more
        try:
            answer = step.run()
        except BaseException as error:
            step = steps.throw(error)
        else:
            step = steps.send(answer)


class _ThrownAwayError(BaseException):
    """The coroutine that did these steps will never go on: clean up, without awaiting."""


async def arun(steps: Steps) -> None:
    """Do `steps` as a coroutine."""
    step = next(steps, None)
    if step is not None:
        with suppress(StopIteration):
            while True:
                try:
                    answer = await step.arun()
                except GeneratorExit:  # thrown away with its loop: nobody awaits any more
                    # By another name, since Python lets no step follow a GeneratorExit.
                    with suppress(_ThrownAwayError):
                        _run_on(steps, steps.throw(_ThrownAwayError()))
                    raise
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)


class Take:
    """Wait for a key of a lock table; answers the Hold."""

    __slots__ = ("_key", "_locks", "_passes", "_timeout")

    def __init__(self, locks: LockTable, key: str, timeout: float | None, passes: bool) -> None:
        self._locks: Final = locks
        self._key: Final = key
        self._timeout: Final = timeout
        self._passes: Final = passes

    def run(self) -> Hold:
        return self._locks.acquire(self._key, self._timeout, self._passes)

    async def arun(self) -> Hold:
        return await self._locks.acquire_async(self._key, self._timeout, self._passes)


class TakeTurn:
    """Wait for a lock that stands alone; answers the Hold."""

    __slots__ = ("_lock", "_timeout")

    def __init__(self, lock: KeyLock, timeout: float | None) -> None:
        self._lock: Final = lock
        self._timeout: Final = timeout

    def run(self) -> Hold | None:
        return self._lock.acquire(self._timeout)

    async def arun(self) -> Hold | None:
        return await self._lock.acquire_async(self._timeout)


def call_store(function: Callable[..., T], *args: Any) -> T:
    """Call something of a storage."""
    try:
        return function(*args)
    except StopIteration as error:  # which would end a generator, and a future cannot hold it
        raise RuntimeError("the storage raised StopIteration") from error


class Call:
    """Call something that blocks; from a coroutine in a thread of `pool`.

    `at_once` does the same in the coroutine itself, if nothing has to be waited for, and says
    whether it did. For a second after it has taken long all the same, it is not asked.

    A cancelled coroutine waits for the call to end all the same: the lock must not be given on
    while a thread still writes, nor a result that has to be cleaned up come when nobody looks.
    """

    __slots__ = ("_args", "_at_once", "_function", "_pool")

    def __init__(
        self,
        pool: Pool,
        function: Callable[..., Any],
        *args: Any,
        at_once: Callable[..., bool] | None = None,
    ) -> None:
        self._pool: Final = pool
        self._function: Final = function
        self._args: Final = args
        self._at_once: Final = at_once

    def run(self) -> Any:
        return call_store(self._function, *self._args)

    async def arun(self) -> Any:
        pool = self._pool
        if self._at_once is not None and (begin := time.perf_counter()) >= pool.in_threads_until:
            done = call_store(self._at_once, *self._args)
            end = time.perf_counter()
            if end - begin > _LONG:
                pool.in_threads_until = end + _PAUSE
            if done:
                return None
        job = _Job(self.run)
        pool.submit(job)
        if pool.seconds < _MOMENT:
            job.wait_a_moment()
        answer = await job.answer()
        pool.seconds = job.seconds
        return answer


class _Job:
    """A call in another thread, and the coroutine that waits for it.

    As little as will do: what concurrent.futures and asyncio have for this takes twice as long. And
    to be woken by its event loop takes a coroutine longer than many a call takes. So where the last
    call was quick, it first waits for a moment in place: for 0.2 ms at most, in which the loop does
    stand still. Whether the loop has to be told is decided by who is first to write to `_end`.
    """

    __slots__ = (
        "_answer",
        "_call",
        "_end",
        "_error",
        "_gate",
        "_is_done",
        "_loop",
        "_waiter",
        "seconds",
    )

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Final = call
        self._loop: Final = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._end: Final[dict[str, Literal["before", "after"]]] = {}  # the coroutine fell asleep
        self._is_done = False  # as the coroutine knows; and for a thread:
        self._gate: Final = threading.Lock()
        self._gate.acquire()
        self.seconds = 0.0  # that the call took

    def run(self) -> None:
        """Make the call, in a thread of the pool."""
        begin = time.perf_counter()
        try:
            self._answer = self._call()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - begin
        end = self._end.setdefault("came", "before")
        self._gate.release()
        if end == "after":
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                self._loop.call_soon_threadsafe(self._done)

    def _done(self) -> None:
        self._is_done = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wait_a_moment(self) -> None:
        """Let the thread have the time that it takes to fall asleep and to be woken."""
        self._is_done = self._gate.acquire(timeout=_MOMENT)

    async def answer(self) -> Any:
        """What the call has returned, or raised. A coroutine that is cancelled waits all the
        same."""
        cancelled = None
        if not self._is_done:
            self._is_done = self._end.setdefault("came", "after") == "before"
        while not self._is_done:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError as error:
                cancelled = error
            except GeneratorExit:  # thrown away with its loop: nobody will await anything here
                self._gate.acquire()
                raise
        failed, self._error = cancelled or self._error, None
        if failed is None:
            return self._answer
        try:
            raise failed
        finally:
            del failed, cancelled  # which know this frame: no cycle stays


_MOMENT: Final = 0.0002  # seconds
_LONG: Final = 0.002  # seconds that a call in place should not take
_PAUSE: Final = 1.0  # seconds for which there is none after one that did


class Pool:
    """Threads for blocking calls, started when they are needed, and anew in a forked child.

    They do not keep the process from ending, since they may block for as long as somebody else
    likes. `finish`: what was begun is finished first.
    """

    def __init__(self, name: str, size: int, finish: bool) -> None:
        self._name: Final = f"session_sync-{name}"
        self._size: Final = size
        self._crews: Final[dict[int, _Crew]] = {}  # by process
        self.seconds = 0.0  # that the last call took
        self.in_threads_until = 0.0  # from time.perf_counter(): a call in place took long
        if finish:
            atexit.register(self._finish)

    def submit(self, job: _Job) -> None:
        """Run `job` in one of the threads."""
        pid = os.getpid()
        crew = self._crews.get(pid)
        if crew is None:  # one too many has no threads, and is nothing
            crew = self._crews.setdefault(pid, _Crew(self._name, self._size))
        crew.submit(job)

    def _finish(self) -> None:
        crew = self._crews.get(os.getpid())
        if crew is not None:
            crew.finish()


class _Crew:
    """The threads of one pool in one process."""

    def __init__(self, name: str, size: int) -> None:
        self._name: Final = name
        self._size: Final = size
        self._jobs: Final[SimpleQueue[_Job | None]] = SimpleQueue()
        self._idle: Final[deque[None]] = deque()  # as many as there are idle threads
        self._mutex: Final = threading.Lock()
        self._threads: Final[list[threading.Thread]] = []

    def submit(self, job: _Job) -> None:
        self._jobs.put(job)
        try:
            self._idle.pop()
        except IndexError:
            self._start_one()

    def finish(self) -> None:
        """Let the threads end when all jobs are done."""
        with self._mutex:
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _start_one(self) -> None:
        with self._mutex:
            number = len(self._threads)
            if number < self._size:
                name = f"{self._name}_{number}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # which may hold a session
            self._idle.append(None)


# Opening may wait for somebody else's closing, which must not queue behind it; and who waits for
# another process's handler holds up nobody who could open his own session at once.
openers: Final = Pool("open", 16, finish=False)
waiters: Final = Pool("wait", 64, finish=False)
closers: Final = Pool("close", 16, finish=True)
