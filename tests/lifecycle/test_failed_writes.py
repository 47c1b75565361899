"""What is written, and what a flush says, when a handler or the store fails while others wait."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside, raises_in_flows
from stores import OwnStorage
from waiting import SOON, until, until_async
from write_tools import Interrupt, Slow, is_free, throw_away

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
from session_sync.lifecycle import entry, scope, transaction
from session_sync.lifecycle import threads as pools
from session_sync.storages import connections, disk, memory, rows, sqlite
from session_sync.storages.base import record_of

# Python only prints what interrupts a finaliser, and an interrupt may leave a coroutine unawaited.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <(function .*__del__|coroutine):"
    "pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)
KEY = "user:1"


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
        "sqlite": (lambda: SQLiteStorage(tmp_path / "sessions.db"), [sqlite, rows, connections]),
        "disk": (
            lambda: storage_from_url(f"disk:///{tmp_path}/sessions"),
            [connections, rows, disk],
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
