"""Nothing is written, or rolled back, when that does harm: over what the next one has stored."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside, raises_in_flows
from stores import OwnStorage
from waiting import SOON, until, until_async

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionDeadlockError,
    SessionManager,
    SQLiteStorage,
)
from session_sync import session as session_module
from session_sync.lifecycle import backend, entry, scope
from session_sync.lifecycle import threads as pools
from session_sync.locks import lock
from session_sync.storages import filelocks, sqlite

KEY = "user:1"

# Python only prints what interrupts a finaliser, and an interrupt may leave a coroutine unawaited.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <(function .*__del__|coroutine):"
    "pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


class Slow(OwnStorage):
    """Its first write takes until it is let go; or fails then."""

    def __init__(self, blocking: bool = True, error: Exception | None = None) -> None:
        super().__init__()
        self.blocking, self.error = blocking, error
        self.begun, self.go_on, self.ended = (threading.Event() for _ in range(3))

    def set(self, key: str, value: Any) -> None:
        if self.begun.is_set():
            super().set(key, value)
            return
        self.begun.set()
        assert self.go_on.wait(SOON)
        try:
            if self.error is not None:
                raise self.error
            super().set(key, value)
        finally:
            self.ended.set()


class Interrupt(BaseException):
    """As Ctrl-C."""


def interrupt() -> None:
    raise Interrupt


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def throw_away(kept: list[Any]) -> None:
    kept.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


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
            pools.closers.run_soon(lambda gate=gate: gate.wait(SOON) and None)
        left = sessions.session_scope(KEY)
        left.__enter__().a = 1
        left.fields.remember(7, 3)  # as for an update
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
    places = everywhere(interrupt, scope, entry, sqlite, filelocks)
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


# -- what fails


@pytest.mark.parametrize("blocking", [True, False])
def test_a_handler_that_fails_while_a_flush_is_on_its_way_that_fails_stores_nothing(
    threads: Threads, blocking: bool
) -> None:
    def flush() -> None:
        with pytest.raises(OSError, match="busy"):
            session.flush()

    def let_go() -> None:
        until(lambda: session._lifecycle.queues)  # the end waits for the flush
        storage.go_on.set()

    storage = Slow(blocking, OSError("busy"))
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with pytest.raises(LookupError), sessions.session_scope(KEY) as session:
        session.a = 1
        threads.start(flush)
        assert storage.begun.wait(SOON)
        threads.start(let_go)
        raise LookupError
    threads.join()
    assert storage.values == {}
