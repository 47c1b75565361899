"""Scopes that are lost or thrown away: given up once, and what others left to them is stored."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from end_tools import is_free
from interruptions import OutsideError, everywhere, raise_outside
from stores import OwnStorage
from waiting import SOON, until, until_async

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionClosedError,
    SessionLockTimeoutError,
    SessionManager,
    storage_from_url,
)
from session_sync.lifecycle import entry, flow, scope
from session_sync.lifecycle import threads as pools
from session_sync.lifecycle.members import Guard
from session_sync.locks import lock
from session_sync.storages.locked_record import LockedRecord

# Python only prints what interrupts a finaliser, and an interrupt may leave a coroutine unawaited.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <(function .*__del__|coroutine):"
    "pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)
KEY = "user:1"


@pytest.mark.parametrize("url", ["", "memory://", "sqlite:///{}/a.db", "disk:///{}/a", "redis"])
def test_what_a_handler_left_to_one_that_is_lost_is_stored(
    request: pytest.FixtureRequest, threads: Threads, tmp_path: Path, url: str
) -> None:
    """The collector finalises the scope together with all that only the scope has: its record, and
    the lock of that between processes."""

    def join() -> None:
        joined: Any = sessions.session_scope(KEY)
        joined.__enter__()
        cycle = [joined]
        cycle.append(cycle)  # type: ignore[arg-type]

    url = request.getfixturevalue("redis_url") if url == "redis" else url.format(tmp_path)
    storage: Any = storage_from_url(url) if url else OwnStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        session.a = 1
        threads.start(contextvars.copy_context().run, join)
        threads.join()
    del session
    gc.collect()
    until(lambda: is_free(sessions))
    assert sessions.storage.get(KEY) == {"a": 1}
    with sessions:
        pass


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
def test_a_scope_that_is_lost_is_given_up_though_its_finaliser_is_interrupted(
    tmp_path: Path, url: str
) -> None:
    """No caller of this process waits for the key; another process may."""
    storage = storage_from_url(url.format(tmp_path))
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    first = True
    for interruption in everywhere(raise_outside, scope):
        kept = [sessions.session_scope(KEY)]
        contextvars.Context().run(lambda kept=kept: kept[0].__enter__() and None)
        with interruption:
            kept.clear()
        if first:  # before the finaliser has begun: then it is left to whoever waits for the key
            first = False
            with sessions.session_scope(KEY):
                pass
        until(lambda: is_free(sessions))
    sessions.close()


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
@pytest.mark.parametrize("next_one", ["succeeds", "fails", "releases"])
@pytest.mark.parametrize("is_in_cycle", [False, True])
@pytest.mark.parametrize("owes", [False, True])
def test_what_is_lost_elsewhere_is_waited_for_by_the_thread_that_opened_it(
    threads: Threads, tmp_path: Path, url: str, next_one: str, is_in_cycle: bool, owes: bool
) -> None:
    """An interrupt came before the block was left, and what kept it alive was another thread's.
    The next block of this thread may still find it open, and then ends it."""

    def lose() -> None:
        kept.append(sessions.session_scope(KEY))
        kept[0].__enter__().lost = 1
        if owes:
            with sessions.session_scope(KEY) as session:
                session.owed = 1
        if is_in_cycle:
            kept.append(kept)
        opened.set()
        assert go_on.wait(SOON)
        with contextlib.suppress(LookupError), sessions.session_scope(KEY) as session:
            session.a = 1
            if next_one == "releases":
                session.release()
            if next_one == "fails":
                raise LookupError

    def go_on_elsewhere() -> None:
        go_on.set()
        until(lambda: sessions.locks.waiters(KEY) or lock._Section.busy or not loser.is_alive())

    sessions: SessionManager[Any] = SessionManager(storage=storage_from_url(url.format(tmp_path)))
    for interruption in everywhere(go_on_elsewhere, entry, scope, pools):
        sessions.storage.delete(KEY)
        kept: list[Any] = []
        opened, go_on = threading.Event(), threading.Event()
        loser = threads.start(lose)
        assert opened.wait(SOON)
        with interruption:
            if is_in_cycle:
                kept = []
                gc.collect()
            else:
                kept.clear()
        go_on.set()
        threads.join()
        until(lambda: is_free(sessions))
        stored = sessions.storage.get(KEY) or {}
        assert stored.get("a") == (None if next_one == "fails" else 1)
        if owes and next_one != "fails":  # which may undo all that is not stored yet
            assert stored.get("owed") == 1
    sessions.close()


def test_a_lost_session_is_given_up_though_it_was_interrupted_as_it_was_loaded() -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    for interruption in everywhere(raise_outside, scope):
        kept: list[Any] = [sessions.session_scope(KEY)]
        kept.append(contextvars.Context().run(kept[0].__enter__))
        with contextlib.suppress(OutsideError), interruption:
            kept[1].get("a")
        kept.clear()
        assert is_free(sessions)


class ThrownAway:
    """A coroutine that opens a session and will never go on: it stands inside of that, where it
    waits for the key, or for the store."""

    def __init__(self, storage: Any, stands: str) -> None:
        self.sessions: SessionManager[Any] = SessionManager(storage=storage)
        self._stands, self._inside = stands, False
        self._around = self.sessions.session_scope(KEY)
        if stands == "at the key":
            contextvars.Context().run(self._around.__enter__)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        task = loop.create_task(self._handle())
        loop.run_until_complete(until_async(self._stands_there))
        self._coroutine: Any = task.get_coro()
        loop.close()

    async def _handle(self) -> None:
        async with self.sessions.session_scope(KEY) as session:
            session.a = 1
            self._inside = True
            await asyncio.Event().wait()

    def _stands_there(self) -> bool:
        if self._stands == "inside":
            return self._inside
        locks = self.sessions.locks
        return bool(locks.waiters(KEY) if self._stands == "at the key" else locks.is_locked(KEY))

    def close(self) -> None:
        try:
            self._coroutine.close()
        except OutsideError:
            pass
        except RuntimeError as error:
            if not isinstance(error.__context__, OutsideError):
                raise

    def end(self) -> None:
        del self._coroutine
        if self._stands == "at the key":
            self._around.__exit__(None, None, None)


@pytest.mark.parametrize("storage_type", [OwnStorage, MemoryStorage])
@pytest.mark.parametrize("stands", ["inside", "at the key", "in the store"])
def test_a_coroutine_that_is_thrown_away_is_given_up_wherever_that_is_interrupted(
    storage_type: Callable[[], Any], stands: str
) -> None:
    """What cleans up after the interrupt may want to await something, and asyncio says that it
    cannot; then the finaliser of the scope does it."""

    class Slow(OwnStorage):
        def get(self, key: str) -> Any:
            if stands == "in the store":
                assert go_on.wait(SOON)
            return super().get(key)

    def interrupt() -> None:
        go_on.set()
        raise OutsideError

    for interruption in everywhere(interrupt, entry, scope, flow, pools):
        go_on = threading.Event()
        storage = Slow() if storage_type is OwnStorage else storage_type()
        thrown_away = ThrownAway(storage, stands)
        with interruption:
            thrown_away.close()
        go_on.set()
        thrown_away.end()
        until(lambda thrown_away=thrown_away: is_free(thrown_away.sessions))
        assert storage.get(KEY) is None
        until(lambda: not busy_errands())


def busy_errands() -> list[str]:
    """Where the threads are that close what others have left."""
    stacks = (traceback.extract_stack(frame) for frame in sys._current_frames().values())
    return [f"{stack[-1]}" for stack in stacks if any(at.name == "_end_unasked" for at in stack)]


def test_what_collects_a_lost_scope_never_waits_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread whose collection gives a key up, and that wants this key next: its record is just
    being closed elsewhere, which is worth waiting for."""
    url = f"sqlite:///{tmp_path}/a.db"
    sessions: SessionManager[Any] = SessionManager(storage=storage_from_url(url))
    close, here = LockedRecord.close, threading.current_thread()
    waits = False

    def close_late(record: Any, *args: Any) -> None:
        if threading.current_thread() is not here:
            until(lambda: not waits or sessions.locks.waiters(KEY))
        close(record, *args)

    monkeypatch.setattr(LockedRecord, "close", close_late)
    for interruption in everywhere(raise_outside, scope, pools):
        kept = [sessions.session_scope(KEY)]
        contextvars.Context().run(lambda kept=kept: kept[0].__enter__() and None)
        waits = True
        with interruption:
            kept.clear()
        with sessions.session_scope(KEY):
            waits = False
        until(lambda: is_free(sessions))
    sessions.close()


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
def test_what_a_handler_left_to_one_that_is_lost_is_stored_before_the_next_one_comes_in(
    threads: Threads, tmp_path: Path, url: str
) -> None:
    """Who comes just as the collector has found it."""

    def join() -> None:
        joined: Any = sessions.session_scope(KEY)
        joined.__enter__()
        cycle = [joined]
        cycle.append(cycle)  # type: ignore[arg-type]

    def work() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = session.a + 1

    def come_in() -> None:
        thread = threads.start(work)
        until(lambda: sessions.locks.waiters(KEY) or lock._Section.busy or not thread.is_alive())

    storage = storage_from_url(url.format(tmp_path))
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    for interruption in everywhere(come_in, entry, scope, lock):
        storage.delete(KEY)
        with sessions.session_scope(KEY) as session:
            session.a = 1
            contextvars.copy_context().run(join)
        del session
        with interruption:
            gc.collect()
        threads.join()
        until(lambda: is_free(sessions))
        if interruption.happened:
            assert storage.get(KEY) == {"a": 1, "b": 2}
    sessions.close()


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_what_others_have_changed_is_stored_though_the_last_one_waits_in_a_lost_loop(
    threads: Threads, storage_type: Callable[[], Any]
) -> None:
    """It has joined, and waits for its turn: nothing of its own is there to be dropped."""

    def join() -> None:
        with sessions.session_scope(KEY) as session:
            inside.set()
            assert go_on.wait(SOON)
            session.b = 2

    async def wait() -> None:
        async with sessions.session_scope(KEY):
            raise AssertionError("it is not its turn")

    def handle() -> tuple[Any, Any]:
        loop = asyncio.new_event_loop()
        with sessions.session_scope(KEY) as session:
            session.a = 1
            context = contextvars.copy_context()
            threads.start(lambda: context.run(join))
            assert inside.wait(SOON)
            waiting = loop.create_task(wait())
            loop.run_until_complete(until_async(lambda: session._lifecycle().queues))
        return loop, waiting

    inside, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    kept: Any = handle()
    go_on.set()
    threads.join()
    assert sessions.storage.get(KEY) is None
    del kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    until(lambda: is_free(sessions))
    assert sessions.storage.get(KEY) == {"a": 1, "b": 2}


def test_a_loop_that_was_thrown_away_is_collected_though_a_thread_is_on_its_way() -> None:
    """Else the task in it would keep its key for as long as the store takes."""

    class Slow(OwnStorage):
        def set(self, key: str, value: Any) -> None:
            begun.set()
            assert go_on.wait(SOON)

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await session.aflush()

    begun, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Slow())
    loop = asyncio.new_event_loop()
    task = loop.create_task(handle())
    loop.run_until_complete(until_async(begun.is_set))
    loop.run_until_complete(asyncio.sleep(0))  # it waits by now
    known = weakref.ref(task)
    del task, loop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    try:
        assert known() is None
    finally:
        go_on.set()
    until(lambda: is_free(sessions))


@pytest.mark.parametrize("lock", ["write", "load"])
def test_a_scope_that_is_lost_with_a_lock_of_its_own_is_collected(lock: str) -> None:
    """The table of the keys must not know it by way of that lock."""

    def enter() -> None:
        scope: Any = sessions.session_scope(KEY)
        scope.__enter__().get("a")
        guard = Guard(scope, lock)
        assert guard.handle.try_acquire()
        scope.members[guard] = None  # a cycle: both are lost at once
        del guard

    sessions: SessionManager[Any] = SessionManager(lazy=True)
    contextvars.Context().run(enter)
    gc.collect()
    until(lambda: is_free(sessions))


def test_a_thread_that_has_made_its_call_keeps_no_scope_alive() -> None:
    """Else the key of a scope that was never left stayed locked until that thread got on."""

    class Hurried(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *args: Any, **options: Any) -> Any:
            handle = super().call_soon_threadsafe(*args, **options)
            assert go_on.wait(SOON)  # whoever called this is overtaken
            return handle

    class Slow(OwnStorage):
        def get(self, key: str) -> Any:
            assert suspended.wait(SOON)
            return super().get(key)

    async def enter() -> None:
        asyncio.get_running_loop().call_soon(suspended.set)
        await sessions.session_scope(KEY).__aenter__()

    go_on, suspended = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Slow(), lock_timeout=SOON)
    loop = Hurried()
    try:
        loop.run_until_complete(enter())
        gc.collect()
        with sessions.session_scope(KEY) as session:
            session.a = 1
    finally:
        go_on.set()
        loop.close()
    assert sessions.storage.get(KEY) == {"a": 1}


def test_a_key_that_a_finaliser_gives_up_belongs_to_nobody_until_the_store_has_closed_it() -> None:
    """The threads that close are all busy, and the scope itself is gone."""

    def enter() -> None:
        scope: Any = sessions.session_scope(KEY)
        scope.__enter__().cycle = [lambda: scope]  # so that all weak references die first

    gate = threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=LruMemoryStorage(), lock_timeout=0.05)
    try:
        for _ in range(16):
            pools.errands.run_soon(lambda: gate.wait(SOON) and None)
        contextvars.Context().run(enter)
        gc.collect()
        with pytest.raises(SessionLockTimeoutError), sessions.session_scope(KEY):
            pass
    finally:
        gate.set()
    until(lambda: is_free(sessions))


def test_a_key_that_one_caller_finds_lost_while_the_collector_gives_it_up_has_one_owner(
    threads: Threads,
) -> None:
    """The caller takes the key from the scope that is being collected; to give it up then is not to
    take it from the caller."""

    def enter() -> None:
        scope: Any = sessions.session_scope(KEY)
        scope.__enter__().cycle = [lambda: scope]  # so that all weak references die first

    def work() -> None:
        with sessions.session_scope(KEY):
            inside.set()
            assert leave.wait(SOON)

    def come_in() -> None:
        threads.start(work)
        until(lambda: inside.is_set() or sessions.locks.waiters(KEY) or lock._Section.busy)

    for interruption in everywhere(come_in, lock):
        sessions: SessionManager[Any] = SessionManager()
        inside, leave = threading.Event(), threading.Event()
        contextvars.Context().run(enter)
        with interruption:
            gc.collect()
        if interruption.happened:
            assert inside.wait(SOON)
            assert sessions.locks.is_locked(KEY)
        leave.set()
        threads.join()
        until(lambda sessions=sessions: is_free(sessions))


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_a_block_does_not_join_one_that_was_never_left(storage_type: Callable[[], Any]) -> None:
    """As after an interrupt that came before the first line of `__exit__`. What gives that scope up
    keeps it alive for a moment."""

    def handle() -> None:
        never_left = sessions.session_scope(KEY)
        never_left.__enter__().a = 1
        del never_left
        with sessions.session_scope(KEY) as session:
            session.b = 2

    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    contextvars.copy_context().run(handle)
    assert sessions.storage.get(KEY) == {"b": 2}


def test_a_flush_after_a_block_that_was_never_left_says_that_nothing_was_saved() -> None:
    sessions: SessionManager[Any] = SessionManager()
    never_left = sessions.session_scope(KEY)
    session = contextvars.Context().run(never_left.__enter__)
    session.a = 1
    del never_left
    until(lambda: is_free(sessions))
    with pytest.raises(SessionClosedError, match="not saved"):
        session.flush()
