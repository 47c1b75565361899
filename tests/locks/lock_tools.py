"""What the tests of the locks share. Its generators become fixtures where they are needed."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import interruptions
from conftest import Threads
from waiting import SOON, until_async

import session_sync.locks
from session_sync import SessionManager
from session_sync.locks import lock
from session_sync.locks.deadlock import waits
from session_sync.locks.lock import LockHandle
from session_sync.locks.table import LockTable

#: Where the code under test is.
FOLDER = str(Path(session_sync.locks.__file__).parent)


def take(
    table: LockTable, key: str = "k", timeout: float | None = SOON, passes: bool = False
) -> LockHandle:
    """A handle that has the key."""
    handle = table.handle(key)
    handle.acquire(timeout, passes)
    return handle


async def take_async(
    table: LockTable, key: str = "k", timeout: float | None = SOON, passes: bool = False
) -> LockHandle:
    """The same in a coroutine."""
    handle = table.handle(key)
    await handle.acquire_async(timeout, passes)
    return handle


def take_unowned(table: LockTable, key: str = "k") -> LockHandle:
    """A handle that has the key, as if a caller had it that is no thread of this process."""
    handle = take(table, key)
    handle.callers.clear()
    return handle


def queued(table: LockTable, key: str = "k") -> int:
    """How many wait for a key."""
    queue = table.queues.get(key)
    return 0 if queue is None else sum(not handle.is_held for handle in list(queue))


def is_unlocked(table: LockTable, key: str = "k") -> bool:
    """Whether a newcomer would have the key at once."""
    handle = table.handle(key)
    taken = handle.try_acquire()
    if taken:
        handle.release()
    return taken


def take_elsewhere(
    table: LockTable, threads: Threads, key: str = "k", name: str = ""
) -> Callable[[], None]:
    """The key held by another thread; returns what makes that thread release it."""
    has_it, give_back = threading.Event(), threading.Event()

    def work() -> None:
        handle = take(table, key)
        has_it.set()
        give_back.wait(SOON)
        handle.release()

    thread = threads.start(work, name=name)
    assert has_it.wait(SOON)

    def release() -> None:
        give_back.set()
        thread.join(SOON)

    return release


def table_of(sessions: SessionManager[Any]) -> LockTable:
    """The locks of a manager's store."""
    return sessions.scopes.options.backend.locks


# -- fixtures


def make_table() -> LockTable:
    return LockTable()


def make_sessions() -> SessionManager[Any]:
    return SessionManager()


def check_that_nothing_is_left(table: LockTable) -> Iterator[None]:
    """After a test: no lock in the table, no caller noted as waiting, nothing left to do."""
    yield
    assert_nothing_is_left(table)


def assert_nothing_is_left(table: LockTable) -> None:
    assert len(table) == 0
    assert not waits._by_caller
    assert not waits._stuck
    assert not lock._released
    assert not lock._granted
    assert not lock._Section.busy


def make_hasty() -> Iterator[None]:
    """Threads that are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        self.loop.close()


def make_loops() -> Iterator[Callable[[], Loop]]:
    """A maker of loops, which are closed at the end."""
    made: list[Loop] = []

    def make() -> Loop:
        made.append(Loop())
        return made[-1]

    yield make
    for loop in made:
        loop.close()


class StandingLoop:
    """An event loop of this thread, which runs only when told to."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda *_: None)  # of tasks destroyed while they wait

    def wait_for(self, table: LockTable, timeout: float | None = None) -> asyncio.Task[LockHandle]:
        """A coroutine that waits for the key `k`, on a loop that then stops."""
        task = self.loop.create_task(take_async(table, "k", timeout))
        before = queued(table)
        self.loop.run_until_complete(until_async(lambda: queued(table) == before + 1))
        return task

    def go_on(self, task: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(task, SOON))


def make_standing() -> Iterator[StandingLoop]:
    """A loop that stands still."""
    made = StandingLoop()
    yield made
    if not made.loop.is_closed():
        made.loop.run_until_complete(asyncio.sleep(0))
        made.loop.close()


# -- what comes from outside, in the middle of the code under test


class Interrupted(Exception):  # noqa: N818 # it is no error
    """What a signal handler raises."""


class Interruption(interruptions.Interruption):
    """A signal whose handler raises, at one of the places where CPython looks for signals while
    code of the locks runs in this thread.

    `after` is how many of these places it lets go by. Afterwards `happened` says whether it came.
    """

    def __init__(self, after: int) -> None:
        super().__init__(after + 1, _interrupt, _FILES)


def _interrupt() -> None:
    raise Interrupted


_FILES = frozenset(map(str, Path(FOLDER).glob("*.py")))


class Guest:
    """A finaliser or a signal handler that runs in front of one line of the locks in this thread.

    `after` is how many lines it lets go by; and where the thread is about to wait, it comes at the
    latest. Afterwards `came` says whether it came, and `waits` whether it came only then.
    """

    def __init__(self, after: int, work: Callable[[], object]) -> None:
        self._left = after
        self._work = work
        self._tracer: Any = None
        self.came = self.waits = False

    def __enter__(self) -> Guest:
        self._tracer = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._tracer)

    def _call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER) or self.came:
            return None
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line" and not self.came:
            self._left -= 1
            self.waits = frame.f_code.co_qualname == "ThreadWaiter.wait"
            if self._left < 0 or self.waits:
                self.came = True
                self._work()
        return self._step
