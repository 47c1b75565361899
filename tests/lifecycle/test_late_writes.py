"""Nothing is written, or rolled back, when that does harm: over what the next one has stored."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside, raises_in_flows
from stores import OwnStorage
from waiting import SOON, until, until_async
from write_tools import Interrupt, Slow, is_free, throw_away

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionDeadlockError,
    SessionManager,
    SQLiteStorage,
)
from session_sync.lifecycle import backend, entry, scope
from session_sync.lifecycle import threads as pools
from session_sync.locks import lock
from session_sync.session import session as session_module
from session_sync.storages import (
    connections,
    filelocks,
    locked_record,
    lockfile,
    rows,
    sqlite,
)

KEY = "user:1"

# Python only prints what interrupts a finaliser, and an interrupt may leave a coroutine unawaited.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <(function .*__del__|coroutine):"
    "pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def interrupt() -> None:
    raise Interrupt


def store_in_turn(sessions: SessionManager[Any], storage: Slow, threads: Threads) -> None:
    """What the next handler stores stays, however late the slow write is let go."""

    def handle() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = 2

    threads.start(handle)
    until(lambda: sessions.locks.waiters(KEY) or "b" in (storage.get(KEY) or {}))
    storage.go_on.set()
    assert storage.ended.wait(SOON)
    threads.join()
    until(lambda: is_free(sessions))
    assert storage.values[KEY].get("b") == 2


# -- what is thrown away


def test_a_flush_that_was_thrown_away_is_not_late(threads: Threads) -> None:
    """A handler runs `aflush()` in a loop of its own, and drops that."""
    storage = Slow()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    def handle() -> None:
        with sessions.session_scope(KEY) as session:
            session.a = 1
            loop = asyncio.new_event_loop()
            kept: list[Any] = [loop, loop.create_task(session.aflush())]
            loop.run_until_complete(until_async(storage.begun.is_set))
            loop.run_until_complete(asyncio.sleep(0))
            del loop
            throw_away(kept)
            session.a = 2
            left.set()

    left = threading.Event()
    threads.start(handle)
    assert left.wait(SOON)
    store_in_turn(sessions, storage, threads)
    assert storage.values == {KEY: {"a": 2, "b": 2}}


@pytest.mark.parametrize("blocking", [True, False])
def test_a_block_that_joins_one_that_was_never_left_is_stored(
    threads: Threads, blocking: bool
) -> None:
    """As after an interrupt that came before the first line of `__exit__`. A flush in another
    thread keeps that one alive, so nothing tells it from one that goes on."""

    def handle() -> None:
        never_left = sessions.session_scope(KEY)
        session = never_left.__enter__()
        session.a = 1
        threads.start(session.flush)
        assert storage.begun.wait(SOON)
        del never_left, session
        with sessions.session_scope(KEY) as session:
            session.b = 2

    storage = Slow(blocking)
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    contextvars.copy_context().run(handle)
    storage.go_on.set()
    threads.join()
    until(lambda: is_free(sessions))
    assert storage.values == {KEY: {"a": 1, "b": 2}}


def test_several_sessions_that_were_never_left_are_not_stored_one_without_the_other() -> None:
    """Though a block has joined one of them, which may have been a later one."""

    def handle() -> None:
        scopes = sessions.session_scopes("user:1", "user:2")
        for session in scopes.__enter__():
            session.a = 1
        with sessions.session_scope("user:1") as session:
            session.b = 2

    storage = OwnStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    contextvars.copy_context().run(handle)
    until(lambda: is_free(sessions))
    assert storage.values == {}


def test_what_another_thread_has_done_inside_of_a_block_that_was_never_left_is_not_stored(
    threads: Threads,
) -> None:
    """It counts as what the block has done, which may have been half done."""

    def join() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = 2

    def handle() -> None:
        never_left = sessions.session_scope(KEY)
        never_left.__enter__().a = 1
        threads.start(contextvars.copy_context().run, join)
        threads.join()

    storage = OwnStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    contextvars.copy_context().run(handle)
    until(lambda: is_free(sessions))
    assert storage.values == {}


def test_what_a_task_has_done_that_is_thrown_away_in_an_inner_block_is_not_stored(
    collector: None,
) -> None:
    """The collector finalises them in the order in which they were made, with the loop gone."""

    async def handle(outer: Any, inner: Any) -> None:
        async with outer as session:
            session.a = 1
            async with inner:
                inside.set()
                await asyncio.Event().wait()

    inside = threading.Event()
    storage = OwnStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    kept: list[Any] = [sessions.session_scope(KEY), sessions.session_scope(KEY)]
    loop = asyncio.new_event_loop()
    kept += [loop, loop.create_task(handle(kept[1], kept[0]))]
    loop.run_until_complete(until_async(inside.is_set))
    del loop
    throw_away(kept)
    until(lambda: is_free(sessions))
    assert storage.values == {}


@pytest.mark.parametrize("blocking", [True, False])
def test_a_task_that_is_thrown_away_frees_no_key_while_a_thread_of_its_flushes(
    threads: Threads, blocking: bool
) -> None:
    storage = Slow(blocking)
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            flush = session.flush
            threading.Thread(target=flush, daemon=True).start()
            del flush
            await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    kept: list[Any] = [loop, loop.create_task(handle())]
    loop.run_until_complete(until_async(storage.begun.is_set))
    del loop
    throw_away(kept)
    store_in_turn(sessions, storage, threads)


def test_what_closes_lost_sessions_does_not_wait_for_itself() -> None:
    """Closing one waits for the flush that is on its way, and that needs a thread, too."""

    async def handle(number: int) -> None:
        scope = sessions.session_scope(f"user:{number}")
        async with scope as session:
            session.a = 1
            kept.append((scope, session))
            await asyncio.Event().wait()

    async def flush() -> None:
        for _, session in kept:
            session.a = 2
        flushes = asyncio.gather(*(session.aflush() for _, session in kept))
        await asyncio.sleep(0)  # each of them has the scope now, and no thread yet
        gate.set()
        await flushes

    sessions: SessionManager[Any] = SessionManager(storage=OwnStorage())
    gate = threading.Event()
    kept: list[Any] = []
    for pool in (pools.closers, pools.errands):
        for _ in range(16):
            pool.run_soon(lambda: gate.wait(SOON) and None)
    loop = asyncio.new_event_loop()
    thrown_away = [loop, *(loop.create_task(handle(number)) for number in range(16))]
    loop.run_until_complete(until_async(lambda: len(kept) == 16))
    del loop
    throw_away(thrown_away)
    asyncio.run(asyncio.wait_for(flush(), SOON))
    until(lambda: is_free(sessions))


def test_several_sessions_that_are_thrown_away_as_they_are_left_are_closed_by_threads() -> None:
    """A finaliser may run in the very thread whose call it would have to wait for."""

    class Opened:
        record = size = None

        def save(self, record: Any) -> None: ...
        def close(self, record: Any) -> None:
            closing.append(threading.get_ident())
            assert go_on.wait(SOON)

    class Shared(OwnStorage):
        def open_record(self, key: str, timeout: float) -> Opened:
            return Opened()

    async def handle() -> None:
        async with sessions.session_scopes("user:1", "user:2", "user:3"):
            pass

    closing: list[int] = []
    go_on = threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Shared())
    loop = asyncio.new_event_loop()
    kept: list[Any] = [loop, loop.create_task(handle())]
    loop.run_until_complete(until_async(lambda: closing))
    del loop
    throw_away(kept)
    go_on.set()
    until(lambda: is_free(sessions))
    assert threading.get_ident() not in closing


# -- what is interrupted


@pytest.mark.parametrize("storage_type", [MemoryStorage, LruMemoryStorage])
@raises_in_flows
def test_a_session_whose_key_is_given_on_is_not_written_again(
    threads: Threads, storage_type: Callable[[], Any]
) -> None:
    """An interrupt in the middle of the release, and the threads that close are all busy. With what
    `dedupe` remembers, there is always something to be written."""

    def handle() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = 2

    for interruption in everywhere(raise_outside, scope, entry, lock):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type(), dedupe=3)
        gate = threading.Event()
        for _ in range(16):
            pools.errands.run_soon(lambda gate=gate: gate.wait(SOON) and None)
        left = sessions.session_scope(KEY)
        left.__enter__().a = 1
        left.tracker.remember(7, 3)  # as for an update
        threads.start(handle)
        until(lambda sessions=sessions: sessions.locks.waiters(KEY) == 1)
        with contextlib.suppress(OutsideError), interruption:
            left.__exit__(None, None, None)
        del left
        gate.set()
        threads.join()
        until(lambda sessions=sessions: is_free(sessions))
        assert sessions.storage.get(KEY)["b"] == 2


@pytest.mark.parametrize(
    ("storage_type", "modules"),
    [
        (OwnStorage, (scope, backend)),
        (MemoryStorage, (scope,)),
    ],
)
@raises_in_flows
def test_a_session_that_is_cleared_after_an_interrupted_flush_is_removed(
    storage_type: Callable[[], Any], modules: Any
) -> None:
    for interruption in everywhere(raise_outside, *modules):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type())
        with sessions.session_scope(KEY) as session:
            session.a = 1
            with contextlib.suppress(OutsideError), interruption:
                session.flush()
            session.clear()
        assert not sessions.storage.get(KEY)


@raises_in_flows
def test_what_an_interrupt_stops_in_a_store_that_is_shared_is_stored(tmp_path: Path) -> None:
    storage = SQLiteStorage(str(tmp_path / "sessions.db"))
    stores = (sqlite, rows, connections, filelocks, lockfile, locked_record)
    places = everywhere(interrupt, scope, entry, *stores)
    for number, interruption in enumerate(places):
        key = f"user:{number}"
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        left = sessions.session_scope(key)
        left.__enter__().a = 1
        with contextlib.suppress(Interrupt), interruption:
            left.__exit__(None, None, None)
        del left
        until(lambda sessions=sessions: is_free(sessions))
        # The first place is before the first line of `__exit__`: as in the handler.
        assert storage.get(key) == ({"a": 1} if number else None)


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
@raises_in_flows
def test_a_lazy_session_is_stored_and_freed_though_its_end_is_interrupted(
    storage_type: Callable[[], Any],
) -> None:
    for number, interruption in enumerate(everywhere(raise_outside, scope, entry)):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type(), lazy=True)
        left = sessions.session_scope(KEY)
        left.__enter__().a = 1
        with contextlib.suppress(OutsideError), interruption:
            left.__exit__(None, None, None)
        if number:  # as above
            until(lambda sessions=sessions: is_free(sessions))
            assert sessions.storage.get(KEY) == {"a": 1}


@raises_in_flows
def test_whoever_loads_a_lazy_session_closes_it_if_its_release_was_interrupted(
    threads: Threads,
) -> None:
    def hold() -> None:
        with eager.session_scope(KEY):
            held.set()
            assert go_on.wait(SOON)

    def release(interruption: contextlib.AbstractContextManager[Any]) -> None:
        with contextlib.suppress(OutsideError), interruption:
            session.release()

    held, go_on = threading.Event(), threading.Event()
    for interruption in everywhere(raise_outside, scope, entry):
        sessions: SessionManager[Any] = SessionManager(lazy=True)
        eager: SessionManager[Any] = SessionManager(storage=sessions.storage)
        held.clear()
        go_on.clear()
        threads.start(hold)
        assert held.wait(SOON)
        with sessions.session_scope(KEY) as session:
            threads.start(lambda session=session: session.get("a"))
            until(lambda sessions=sessions: sessions.locks.waiters(KEY) == 1)
            releasing = threading.Thread(target=release, args=(interruption,))
            releasing.start()
            releasing.join(SOON)
            go_on.set()
            threads.join()
        until(lambda sessions=sessions: is_free(sessions))


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
@raises_in_flows
def test_one_interrupt_ends_all_the_same_if_no_thread_can_be_started(
    storage_type: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise pools.NoThreadError("can't start new thread")

    monkeypatch.setattr(pools.ThreadPool, "submit", refuse)
    for number, interruption in enumerate(everywhere(raise_outside, scope, entry)):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type())
        left = sessions.session_scope(KEY)
        left.__enter__().a = 1
        with contextlib.suppress(OutsideError), interruption:
            left.__exit__(None, None, None)
        del left
        assert is_free(sessions)
        assert sessions.storage.get(KEY) == ({"a": 1} if number else None)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_sessions_are_opened_again_after_threads_could_not_be_started(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What could not be started does not count among the threads of the pool."""

    async def main() -> None:
        for _ in range(3):
            with monkeypatch.context() as patch, pytest.raises(RuntimeError):
                patch.setattr(_thread, "start_new_thread", fail)
                async with sessions.session_scope(KEY):
                    pass
        async with sessions.session_scope(KEY) as session:
            session.a = 1

    def fail(*_args: Any) -> None:
        raise error

    monkeypatch.setattr(scope, "openers", pools.ThreadPool("test", 2, insists=False))
    sessions: SessionManager[Any] = SessionManager(storage=OwnStorage())
    asyncio.run(asyncio.wait_for(main(), SOON))
    assert sessions.storage.get(KEY) == {"a": 1}


@raises_in_flows
def test_whoever_was_interrupted_as_it_left_may_join_again() -> None:
    for interruption in everywhere(raise_outside, entry):
        sessions: SessionManager[Any] = SessionManager(lock_timeout=SOON)
        with sessions.session_scope(KEY):
            joined = sessions.session_scope(KEY)
            joined.__enter__()
            try:
                with interruption:
                    joined.__exit__(None, None, None)
            except OutsideError:
                del joined
                with sessions.session_scope(KEY) as session:
                    session.a = 1


@raises_in_flows
@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_a_handler_that_fails_is_rolled_back_though_that_is_interrupted(
    storage_type: Callable[[], Any],
) -> None:
    """And its own thread does not lock the session: not even while it has the exception in hand."""
    for number, interruption in enumerate(everywhere(raise_outside, scope, entry, session_module)):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type(), lock_timeout=SOON)
        left = sessions.session_scope(KEY)
        left.__enter__().update(a=1, items=[1])
        try:
            with interruption:
                left.__exit__(LookupError, LookupError(), None)
        except OutsideError:
            if number:  # else it was never left, and this joins it
                with sessions.session_scope(KEY) as session:
                    assert session == {}
        del left
        until(lambda sessions=sessions: is_free(sessions))
        assert sessions.storage.get(KEY) is None


# -- what a signal handler does


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
@raises_in_flows
def test_what_a_signal_handler_raises_of_ours_is_not_taken_for_the_store_s(
    storage_type: Callable[[], Any],
) -> None:
    """It wants the session that is just being saved, and does not catch the error."""

    def use() -> None:
        with sessions.session_scope(KEY):
            pass

    for interruption in everywhere(use, scope, entry):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type())
        left = sessions.session_scope(KEY)
        left.__enter__().a = 1
        with contextlib.suppress(SessionDeadlockError), interruption:
            left.__exit__(None, None, None)
        until(lambda sessions=sessions: is_free(sessions))
        assert sessions.storage.get(KEY) == {"a": 1}


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_a_signal_handler_may_release_what_its_thread_flushes(
    storage_type: Callable[[], Any],
) -> None:
    """At once, or after the flush; and the flush is not disturbed."""

    def release() -> None:
        with contextlib.suppress(SessionDeadlockError):
            session.release()

    for interruption in everywhere(release, scope):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type())
        with sessions.session_scope(KEY) as session:
            session.a = 1
            with interruption:
                session.flush()
        until(lambda sessions=sessions: is_free(sessions))
        assert sessions.storage.get(KEY) == {"a": 1}


def test_a_signal_handler_that_wants_what_its_thread_flushes_is_refused_at_once(
    threads: Threads,
) -> None:
    """It is another thread's session; and the end of that one's block is not refused instead."""

    def use() -> None:
        go_on.set()
        with contextlib.suppress(SessionDeadlockError), sessions.session_scope(KEY):
            pass

    def handle() -> None:
        with sessions.session_scope(KEY) as session:
            session.a = 1
            given.append(session)
            assert go_on.wait(SOON)

    for interruption in everywhere(use, scope):
        sessions: SessionManager[Any] = SessionManager()
        go_on = threading.Event()
        given: list[Any] = []
        threads.start(handle)
        until(lambda given=given: given)
        with interruption:
            given[0].flush()
        go_on.set()
        threads.join()
        assert sessions.storage.get(KEY) == {"a": 1}
