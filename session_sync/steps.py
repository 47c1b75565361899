"""How a life cycle that is written once is run by a thread and by a coroutine.

A life cycle is a generator that yields what may take long: waiting for a lock, calling a storage.
`run` does each step in the calling thread, `arun` without blocking the event loop. What never takes
long is not yielded at all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, Protocol

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
            while True:
                try:
                    answer = step.run()
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)


async def arun(steps: Steps) -> None:
    """Do `steps` as a coroutine."""
    step = next(steps, None)
    if step is not None:
        with suppress(StopIteration):
            while True:
                try:
                    answer = await step.arun()
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
        return self._function(*self._args)

    async def arun(self) -> Any:
        job = self._pool.executor().submit(self._function, *self._args)
        future = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(future)
        except GeneratorExit:  # thrown away with its loop: nobody will await anything here again
            concurrent.futures.wait([job])
            raise
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError:
                    continue  # cancelled once more, while it waits
            if not future.cancelled():
                future.exception()  # looked at, so that asyncio does not warn of it
            raise


class Pool:
    """Threads for blocking calls, started at first use and anew in a forked child."""

    def __init__(self, name: str, size: int) -> None:
        self._name: Final = name
        self._size: Final = size
        self._made: Final[dict[int, ThreadPoolExecutor]] = {}  # by process

    def executor(self) -> ThreadPoolExecutor:
        pid = os.getpid()
        made = self._made.get(pid)
        if made is None:  # an executor starts no thread before it is used: one too many is nothing
            fresh = ThreadPoolExecutor(self._size, thread_name_prefix=f"session_sync-{self._name}")
            made = self._made.setdefault(pid, fresh)
        return made


# Two, because opening may wait for somebody else's closing, which must not queue behind it.
openers: Final = Pool("open", 16)
closers: Final = Pool("close", 16)
