"""How a life cycle that is written once is run by a thread and by a coroutine.

A flow is a generator that yields what may take long: waiting for a lock, calling a storage.
`run_flow` does each step in the calling thread, `arun_flow` without blocking the event loop. What
never takes long is not yielded at all. This module knows steps; it does not know what they are for.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import Final, Protocol

from ..locks.lock import LockHandle
from ..locks.watch import Patience


class Step(Protocol):
    """Something that may take long, in two ways of waiting for it."""

    def run(self) -> object: ...
    async def arun(self) -> object: ...


#: It cleans up without yielding: where it was thrown away, nothing awaits its steps any more.
Flow = Generator[Step, None, None]


def run_flow(flow: Flow) -> None:
    """Do the steps of `flow` in this thread."""
    try:
        step = next(flow, None)
        while step is not None:
            try:
                step.run()
            except BaseException as error:
                step = _throw(flow, error)
            else:
                step = next(flow, None)
    except BaseException:
        # An interrupt may have come when it had just given a step; else it has ended by itself.
        flow.close()
        raise


async def arun_flow(flow: Flow) -> None:
    """Do the steps of `flow` as a coroutine."""
    try:
        step = next(flow, None)
        while step is not None:
            try:
                await step.arun()
            except GeneratorExit:  # this coroutine was thrown away, and will never go on
                raise
            except BaseException as error:
                step = _throw(flow, error)
            else:
                step = next(flow, None)
    except BaseException:
        flow.close()  # as above
        raise


def _throw(flow: Flow, error: BaseException) -> Step | None:
    try:
        return flow.throw(error)
    except StopIteration:
        return None
    finally:
        del error  # which knows this frame: no cycle stays, and no session with it


class AcquireLock:
    """Wait for a lock; the arguments are those of LockHandle.acquire."""

    __slots__ = ("_handle", "_passes", "_patience", "_timeout")

    def __init__(
        self,
        handle: LockHandle,
        timeout: float | None,
        passes: bool = False,
        patience: Patience | None = None,
    ) -> None:
        self._handle: Final = handle
        self._timeout: Final = timeout
        self._passes: Final = passes
        self._patience: Final = patience

    def run(self) -> None:
        self._handle.acquire(self._timeout, self._passes, self._patience)

    async def arun(self) -> None:
        await self._handle.acquire_async(self._timeout, self._passes, self._patience)


class AcquireLockInsisting:
    """Wait for a lock for as long as it takes, also in a coroutine that is cancelled meanwhile;
    `cancelled` then has the cancellation, to be raised afterwards.

    A handle that has been released is not used again. So each attempt has a new one, which `renew`
    makes, and gives to its owner.
    """

    __slots__ = ("_renew", "cancelled")

    def __init__(self, renew: Callable[[], LockHandle]) -> None:
        self._renew: Final = renew
        self.cancelled: asyncio.CancelledError | None = None

    def run(self) -> None:
        self._renew().acquire(None)

    async def arun(self) -> None:
        self.cancelled = await insist(lambda: self._renew().acquire_async(None))


async def insist(wait: Callable[[], Awaitable[None]]) -> asyncio.CancelledError | None:
    """Await what `wait` returns until that has ended, in a task that may be cancelled meanwhile;
    returns the last cancellation, if there was one."""
    try:
        await wait()
    except asyncio.CancelledError as error:
        cancelled = error
    else:
        return None
    # anyio (which Starlette and FastAPI run on) cancels a task anew in each iteration of the event
    # loop, as long as it goes on; but not inside of such a scope.
    anyio = sys.modules.get("anyio")
    shield = None if anyio is None else anyio.CancelScope(shield=True)
    if shield is not None:
        shield.__enter__()  # by hand: a task that was thrown away cannot leave it
    while True:
        try:
            await wait()
        except asyncio.CancelledError as error:
            cancelled = error
        else:
            break
    if shield is not None:
        shield.__exit__(None, None, None)
    return cancelled
