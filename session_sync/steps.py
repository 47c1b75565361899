"""How a life cycle that is written once is run by a thread and by a coroutine.

A life cycle is a generator that yields what may take long: waiting for a lock, calling a storage.
`run` does each step in the calling thread, `arun` without blocking the event loop. What never takes
long is not yielded at all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, NoReturn, Protocol

from .locks import Hold, KeyLock, LockTable


class Step(Protocol):
    """Something that may take long, in two ways of waiting for it."""

    def run(self) -> Any: ...
    async def arun(self) -> Any: ...


Steps = Generator[Step, Any, None]


def run(steps: Steps) -> None:
    """Do `steps` in this thread."""
    step = next(steps, None)  # which costs no exception at the end, and many take no step at all
    if step is not None:
        with suppress(StopIteration):
            _run_on(steps, step)


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


class Call:
    """Call something that blocks; from a coroutine in a thread of `pool`.

    A cancelled coroutine waits for the call to end all the same: the lock must not be given on
    while a thread still writes, nor a result that has to be cleaned up come when nobody looks.
    """

    __slots__ = ("_args", "_function", "_pool")

    def __init__(self, pool: Pool, function: Callable[..., Any], *args: Any) -> None:
        self._pool: Final = pool
        self._function: Final = function
        self._args: Final = args

    def run(self) -> Any:
        try:
            return self._function(*self._args)
        except StopIteration as error:  # which would end a generator, and a future cannot hold it
            raise RuntimeError("the storage raised StopIteration") from error

    async def arun(self) -> Any:
        job = self._pool.executor().submit(self.run)
        future = asyncio.wrap_future(job)
        try:
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                while not future.done():
                    try:
                        await asyncio.wait([future])
                    except asyncio.CancelledError:
                        continue  # cancelled once more, while it waits
                if not future.cancelled():
                    future.exception()  # looked at, so that asyncio does not warn of it
                raise
        except GeneratorExit:  # thrown away with its loop: nobody will await anything here again
            concurrent.futures.wait([job])
            raise


class Pool:
    """Threads for blocking calls, started at first use and anew in a forked child.

    `daemon`: they may block for as long as somebody else likes, so the process does not wait for
    them when it ends.
    """

    def __init__(self, name: str, size: int, daemon: bool) -> None:
        self._name: Final = f"session_sync-{name}"
        self._size: Final = size
        self._kind: Final = DaemonExecutor if daemon else ThreadPoolExecutor
        self._made: Final[dict[int, Executor]] = {}  # by process

    def executor(self) -> Executor:
        pid = os.getpid()
        made = self._made.get(pid)
        if made is None:  # an executor starts no thread before it is used: one too many is nothing
            made = self._made.setdefault(pid, self._kind(self._size, self._name))
        return made


class DaemonExecutor(Executor):
    """As ThreadPoolExecutor, whose threads Python joins when it ends, whatever they wait for."""

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        self._size: Final = max_workers
        self._name: Final = thread_name_prefix
        self._jobs: Final[SimpleQueue[Callable[[], None]]] = SimpleQueue()
        self._idle: Final = threading.Semaphore(0)
        self._mutex: Final = threading.Lock()
        self._started = 0

    def submit(
        self, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        """Call `function` in a thread."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    answer = function(*args, **kwargs)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(answer)

        self._jobs.put(job)
        if not self._idle.acquire(blocking=False):
            self._start_one()
        return future

    def _start_one(self) -> None:
        with self._mutex:
            if self._started == self._size:
                return
            self._started += 1
            name = f"{self._name}_{self._started - 1}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()
            self._idle.release()


# Opening may wait for somebody else's closing, which must not queue behind it; and who waits for
# another process's handler holds up nobody who could open his own session at once.
openers: Final = Pool("open", 16, daemon=True)
waiters: Final = Pool("wait", 64, daemon=True)
closers: Final = Pool("close", 16, daemon=False)
