"""Nothing is written, or rolled back, when that does harm: over what the next one has stored."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside, raises_in_flows
from stores import OwnStorage
from waiting import SOON, until, until_async

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionDeadlockError,
    SessionManager,
    SQLiteStorage,
    storage_from_url,
)
from session_sync.lifecycle import backend, entry, scope, transaction
from session_sync.lifecycle import threads as pools
from session_sync.locks import lock
from session_sync.session import session as session_module
from session_sync.storages import (
    connections,
    disk,
    filelocks,
    locked_record,
    lockfile,
    memory,
    sqlite,
)
from session_sync.storages.base import record_of

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
    stores = (sqlite, connections, filelocks, lockfile, locked_record)
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


# -- what fails


@pytest.mark.parametrize("blocking", [True, False])
def test_a_handler_that_fails_while_a_flush_is_on_its_way_that_fails_stores_nothing(
    threads: Threads, blocking: bool
) -> None:
    def flush() -> None:
        with pytest.raises(OSError, match="busy"):
            session.flush()

    def let_go() -> None:
        until(lambda: session._lifecycle().queues)  # the end waits for the flush
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


@pytest.mark.parametrize("name", ["memory", "lru", "sqlite", "disk"])
@raises_in_flows
def test_what_has_joined_does_not_undo_half_of_several_sessions(
    tmp_path: Path, name: str, threads: Threads
) -> None:
    """A thread goes on in one of them after the block around both was interrupted as it wrote them:
    and nothing knows how far that had come."""

    def join(sessions: SessionManager[Any]) -> None:
        with sessions.session_scope("user:1") as session:
            inside.set()
            assert left.wait(SOON)
            with contextlib.suppress(SessionClosedError):
                session.joined = True

    storages: dict[str, tuple[Callable[[], Any], list[Any]]] = {
        "memory": (MemoryStorage, [memory]),
        "lru": (LruMemoryStorage, [memory]),
        "sqlite": (lambda: SQLiteStorage(tmp_path / "sessions.db"), [sqlite, connections]),
        "disk": (
            lambda: storage_from_url(f"disk:///{tmp_path}/sessions"),
            [connections, disk],
        ),
    }
    make, modules = storages[name]
    storage, before = make(), None
    for number, interruption in enumerate(everywhere(raise_outside, transaction, *modules)):
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        inside, left = threading.Event(), threading.Event()
        scopes = sessions.session_scopes("user:1", "user:2")
        one, two = scopes.__enter__()
        one.number = two.number = number
        del one, two
        threads.start(contextvars.copy_context().run, join, sessions)
        assert inside.wait(SOON)
        with contextlib.suppress(OutsideError), interruption:
            scopes.__exit__(None, None, None)
        del scopes
        left.set()
        threads.join()
        until(lambda sessions=sessions: is_free(sessions))
        numbers = [(storage.get(key) or {}).get("number") for key in ("user:1", "user:2")]
        assert numbers in ([number, number], [before, before])
        before = numbers[0]
    storage.close()


def test_none_of_several_sessions_goes_on_after_a_write_whose_answer_was_lost(
    threads: Threads,
) -> None:
    """Though the server is down, so that not even the first one can be closed properly."""

    class Opened:
        size = None

        def __init__(self, storage: OwnStorage, key: str) -> None:
            self._storage, self._key = storage, key
            value = storage.get(key)
            self.record = None if value is None else record_of(value)

        def save(self, record: Any) -> None:
            self._storage.set(self._key, dict(record))

        def close(self, record: Any) -> None:
            if storage.is_down:
                raise ConnectionError("the server is down")
            if record is not None:
                self.save(record)

    class Server(OwnStorage):
        is_down = False

        def open_record(self, key: str, timeout: float) -> Opened:
            return Opened(self, key)

        def save_all(self, records: Any, opened: Any) -> bool:
            for key, record in records.items():
                self.set(key, dict(record))
            self.is_down = True
            raise ConnectionError("the answer was lost")

    def join() -> None:
        with contextlib.suppress(SessionClosedError), sessions.session_scope("user:2") as session:
            inside.set()
            assert left.wait(SOON)
            session.joined = True
            session.flush()

    storage = Server()
    storage.values = {"user:1": {"coins": 10}, "user:2": {"coins": 10}}
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    inside, left = threading.Event(), threading.Event()
    with pytest.raises(ConnectionError, match="lost"):
        with sessions.session_scopes("user:1", "user:2") as (one, two):
            one.coins -= 3
            two.coins += 3
            threads.start(contextvars.copy_context().run, join)
            assert inside.wait(SOON)
    storage.is_down = False
    left.set()
    threads.join()
    assert is_free(sessions)
    assert storage.values == {"user:1": {"coins": 7}, "user:2": {"coins": 13}}


def test_a_lazy_session_is_not_changed_before_it_is_loaded(threads: Threads) -> None:
    """By a thread that comes while another one loads it, and then fails to."""

    class Person(Session):
        migrations: ClassVar[Any] = {2: lambda fields: fields}
        migrate_eagerly: ClassVar[bool] = True

    def load() -> None:
        with contextlib.suppress(OSError):
            session.get("a")

    def change() -> None:
        assert storage.begun.wait(SOON)
        session.b = 2

    storage = Slow(error=OSError("the disk is full"))
    storage.values = {KEY: {"a": 1}}
    sessions: SessionManager[Any] = SessionManager(Person, storage=storage, lazy=True)
    with sessions.session_scope(KEY) as session:
        threads.start(load)
        threads.start(change)
        until(lambda: session._lifecycle().queues or session._lifecycle().tracker.loaded)
        storage.go_on.set()
        threads.join()
    assert storage.values[KEY]["b"] == 2


def test_no_two_threads_close_one_record(threads: Threads) -> None:
    """One closes it for a coroutine that is thrown away meanwhile, and one has waited to flush."""

    class Opened:
        record = size = None

        def __init__(self, key: str) -> None:
            self._key = key

        def save(self, record: Any) -> None: ...
        def close(self, record: Any) -> None:
            closed.append(self._key)
            assert go_on.wait(SOON)

    class Server(OwnStorage):
        def open_record(self, key: str, timeout: float) -> Opened:
            return Opened(key)

        def save_all(self, records: Any, opened: Any) -> bool:
            raise ConnectionError("the answer was lost")

    async def handle() -> None:
        async with sessions.session_scopes("user:1", "user:2") as (one, two):
            one.a = two.a = 1
            threads.start(contextvars.copy_context().run, join)
            await until_async(inside.is_set)

    def join() -> None:
        with sessions.session_scope("user:1") as session:
            scopes.append(session._lifecycle())
            inside.set()
            until(lambda: closed)
            with contextlib.suppress(SessionClosedError):
                session.flush()

    closed: list[str] = []
    scopes: list[Any] = []
    inside, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Server())
    loop = asyncio.new_event_loop()
    kept: list[Any] = [loop, loop.create_task(handle())]
    loop.run_until_complete(until_async(lambda: closed and scopes[0].queues))
    del loop
    throw_away(kept)
    until(lambda: not scopes[0].queues.get("write") or len(closed) > 1)
    go_on.set()
    threads.join()
    until(lambda: is_free(sessions))
    assert sorted(closed) == ["user:1", "user:2"]


@pytest.mark.parametrize("ends", [True, False])
def test_a_list_is_stored_whole_while_another_thread_sorts_it(threads: Threads, ends: bool) -> None:
    """list.sort() shows an empty one meanwhile."""

    def key(number: int) -> int:
        sorting.set()
        assert go_on.wait(SOON)
        return number

    def sort() -> None:
        with contextlib.suppress(SessionClosedError):
            numbers.sort(key=key)

    sorting, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager()
    with sessions.session_scope(KEY) as session:
        session.numbers = [3, 1, 2]
    with sessions.session_scope(KEY) as session:
        numbers = session.numbers
        threads.start(sort)
        assert sorting.wait(SOON)
        session.other = 1
        if not ends:
            session.flush()
            assert sessions.storage.get(KEY)["numbers"] == [3, 1, 2]
            go_on.set()
            threads.join()
    assert sessions.storage.get(KEY)["numbers"] == ([3, 1, 2] if ends else [1, 2, 3])
    go_on.set()


# -- handlers that fail while others flush or release


@raises_in_flows
def test_a_session_that_is_released_while_its_handler_fails_stays_closed() -> None:
    """Wherever a helper thread comes with the release."""

    def release() -> None:
        helper = threading.Thread(target=session.release, daemon=True)
        helper.start()
        helper.join(0.02)  # in vain, where the handler has the write lock
        helpers.append(helper)

    helpers: list[threading.Thread] = []
    for interruption in everywhere(release, scope):
        sessions: SessionManager[Any] = SessionManager()
        block = sessions.session_scope(KEY)
        session = block.__enter__()
        session.a = 1
        with interruption:
            block.__exit__(ValueError, ValueError(), None)
        for helper in helpers:
            helper.join(SOON)
        with pytest.raises(SessionClosedError):
            session.late = 2
        assert is_free(sessions)
        assert sessions.storage.get(KEY) in (None, {"a": 1})


@raises_in_flows
def test_nothing_of_two_handlers_that_fail_at_once_is_stored() -> None:
    """Wherever the one is as the other one comes to fail."""

    def fail() -> None:
        with contextlib.suppress(SessionClosedError):
            session.bad = 1
        helper = threading.Thread(target=block.discard, args=(ValueError(),), daemon=True)
        helper.start()
        helper.join(SOON)

    for interruption in everywhere(fail, scope):
        sessions: SessionManager[Any] = SessionManager()
        block = sessions.session_scope(KEY)
        session = block.__enter__()
        session.a = 1
        with interruption:
            block.discard(ValueError())
        block.__exit__(None, None, None)
        assert sessions.storage.get(KEY) is None


def test_what_a_failed_handler_has_changed_is_not_stored_by_a_later_flush(
    threads: Threads,
) -> None:
    """A flush of a helper was on its way as the handler failed, and failed as well."""

    def join() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = 1
            with pytest.raises(OSError, match="full"):
                session.flush()
            session.flush()

    storage = Slow(error=OSError("the disk is full"))
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with contextlib.suppress(Interrupt), sessions.session_scope(KEY) as session:
        threads.start(contextvars.copy_context().run, join)
        assert storage.begun.wait(SOON)
        session.paid = True
        raise Interrupt
    storage.go_on.set()
    threads.join()
    until(lambda: is_free(sessions))
    assert "paid" not in storage.values.get(KEY, {})


def test_a_handler_that_fails_while_several_are_written_does_not_undo_what_comes_later(
    threads: Threads,
) -> None:
    """It finds the write lock taken, so what has that one rolls back, and at once: not at the end,
    when others have gone on."""

    def join(inside: threading.Event, go_on: threading.Event, name: str) -> None:
        with sessions.session_scope(KEY) as session:
            inside.set()
            assert go_on.wait(SOON)
            session[name] = 1

    def fail() -> None:
        with contextlib.suppress(LookupError), sessions.session_scope(KEY) as session:
            failing_inside.set()
            assert storage.begun.wait(SOON)
            session.bad = 1
            raise LookupError
        failed.set()

    def have_it_fail() -> None:
        with sessions.session_scope(KEY):
            threads.start(contextvars.copy_context().run, fail)
            assert failing_inside.wait(SOON)

    def let_go() -> None:
        assert failed.wait(SOON)
        storage.go_on.set()

    storage = Slow()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    failing_inside, failed, inside, left = (threading.Event() for _ in range(4))
    with sessions.session_scopes(KEY, "user:2") as (one, two):
        one.a = two.a = 1
        threads.start(contextvars.copy_context().run, have_it_fail).join(SOON)
        threads.start(contextvars.copy_context().run, join, inside, left, "later")
        assert inside.wait(SOON)
        threads.start(let_go)
    left.set()
    threads.join()
    until(lambda: is_free(sessions))
    assert storage.values == {KEY: {"a": 1, "later": 1}, "user:2": {"a": 1}}


def test_a_block_that_joins_while_a_thread_releases_does_not_wait_for_itself(
    threads: Threads,
) -> None:
    """It is inside of a session that has ended by then; the next block waits for the release."""

    def release() -> None:
        threads.start(session.release)
        assert storage.begun.wait(SOON)
        threads.start(let_go)

    def let_go() -> None:
        until(lambda: sessions.locks.waiters(KEY) or ended.is_set())
        storage.go_on.set()

    for interruption in everywhere(release, entry):
        storage, ended = Slow(), threading.Event()
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        with sessions.session_scope(KEY) as session:
            session.a = 1
            with interruption:
                inner = sessions.session_scope(KEY)
                inner.__enter__()
            if not interruption.happened:
                release()
            with sessions.session_scope(KEY) as third:
                third.b = 1
            inner.__exit__(None, None, None)
        ended.set()
        threads.join()
        assert storage.values == {KEY: {"a": 1, "b": 1}}
        assert is_free(sessions)


def test_a_change_in_a_session_that_was_given_up_is_not_forgotten_without_a_word() -> None:
    """The threads that give it up are all busy; a helper flushes, and changes it once more."""

    async def handle() -> None:
        async with block as session:
            session.a = 1
            sessions_of_others.append(session)
            await asyncio.Event().wait()

    sessions: SessionManager[Any] = SessionManager(storage=OwnStorage())
    sessions_of_others: list[Any] = []
    block = sessions.session_scope(KEY)
    gate = threading.Event()
    for _ in range(16):
        pools.errands.run_soon(lambda: gate.wait(SOON) and None)
    loop = asyncio.new_event_loop()
    kept: list[Any] = [loop, loop.create_task(handle())]
    loop.run_until_complete(until_async(lambda: sessions_of_others))
    del loop
    throw_away(kept)
    session = sessions_of_others[0]
    session.flush()  # of nothing: it knows of no loss any more
    session.b = 2
    gate.set()
    until(lambda: is_free(sessions))
    with pytest.raises(SessionClosedError, match="not saved"):
        session.flush()


def test_a_circle_through_a_lazy_session_of_two_threads_is_noticed(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them could not have its key at once, and the other one is the first to wait for it."""
    lazy: SessionManager[Any] = SessionManager(lazy=True, lock_timeout=2)
    eager: SessionManager[Any] = SessionManager(storage=lazy.storage, lock_timeout=2)
    load_now = scope.Scope.load_now
    held, tried, touched, waited = (threading.Event() for _ in range(4))

    def stopped(self: Any, may_block: bool) -> bool:
        done = load_now(self, may_block)
        if threading.current_thread().name == "first":
            tried.set()
            assert waited.wait(SOON)
        return done

    def hold() -> None:
        with eager.session_scope("k1"):
            held.set()
            until(lambda: lazy.locks.waiters("k1"))
            waited.set()
            with pytest.raises(SessionDeadlockError), eager.session_scope("k2"):
                pass

    def first() -> None:
        with lazy.session_scope("k1") as session:
            threads.start(second, session)
            assert touched.wait(SOON)
            session.get("a")

    def second(session: Any) -> None:
        with eager.session_scope("k2"):
            touched.set()
            assert tried.wait(SOON)
            session.get("a")

    monkeypatch.setattr(scope.Scope, "load_now", stopped)
    threads.start(hold)
    assert held.wait(SOON)
    threads.start(first, name="first").join(SOON)
    threads.join()
