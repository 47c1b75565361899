"""What observers are told, and what the log says: keys and figures, and no values."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads, message
from waiting import until

from session_sync import (
    MemoryStorage,
    SessionDecodeError,
    SessionEncodeError,
    SessionEvent,
    SessionLockTimeoutError,
    SessionManager,
    SessionScope,
    SQLiteStorage,
)

SOON = 20  # seconds until a test gives up waiting for what has to come
A_WHILE = 0.01  # seconds for which somebody is made to wait


class Observers:
    """What was told, in order: (which observer, event)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, SessionEvent]] = []

    def on_open(self, event: SessionEvent) -> None:
        self.events.append(("open", event))

    def on_close(self, event: SessionEvent) -> None:
        self.events.append(("close", event))

    def on_wait(self, event: SessionEvent) -> None:
        self.events.append(("wait", event))

    def manager(self, storage: Any = None, **options: Any) -> SessionManager[Any]:
        return SessionManager(
            storage=storage,
            on_open=self.on_open,
            on_close=self.on_close,
            on_wait=self.on_wait,
            **options,
        )

    def take(self) -> list[tuple[str, SessionEvent]]:
        events, self.events = self.events, []
        return events

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def seen() -> Observers:
    return Observers()


def add(sessions: SessionManager[Any], key: str = "user:1") -> None:
    with sessions.session_scope(key) as session:
        session.counter = session.get("counter", 0) + 1


async def aadd(sessions: SessionManager[Any], key: str = "user:1") -> None:
    async with sessions.session_scope(key) as session:
        session.counter = session.get("counter", 0) + 1


# -- what is told


@pytest.mark.parametrize("how", ["with", "async with"])
def test_an_opening_and_a_closing(storage: Any, seen: Observers, how: str) -> None:
    sessions = seen.manager(storage, prefix="bot:")
    for found in (False, True):
        if how == "with":
            add(sessions)
        else:
            asyncio.run(aadd(sessions))
        (first, opened), (second, closed) = seen.take()
        assert (first, second) == ("open", "close")
        assert opened.key == closed.key == "user:1"
        assert (opened.loaded, opened.written) == (found, False)
        assert (closed.loaded, closed.written) == (found, True)
        assert 0 <= opened.waited == closed.waited < SOON
        assert 0 <= opened.open_seconds < SOON
        assert 0 < closed.open_seconds < SOON
        assert opened.error is closed.error is None


def test_the_size_is_that_of_what_is_stored(tmp_path: Path, seen: Observers) -> None:
    storage = SQLiteStorage(tmp_path / "sessions.db")
    sessions = seen.manager(storage)

    def stored() -> int:
        with sqlite3.connect(tmp_path / "sessions.db") as connection:
            ((size,),) = connection.execute("SELECT length(value) FROM sessions").fetchall()
        connection.close()
        return int(size)

    with sessions.session_scope("user:1") as session:
        session.name = "x" * 1000
    (_, opened), (_, closed) = seen.take()
    assert (opened.stored_bytes, closed.stored_bytes) == (None, stored())
    with sessions.session_scope("user:1") as session:
        session.name += "ü"
        session.flush()
    (_, opened), (_, closed) = seen.take()
    assert opened.stored_bytes == closed.stored_bytes - 2 > 1000  # type: ignore[operator]
    assert closed.stored_bytes == stored()
    with sessions.session_scope("user:1") as session:
        session.clear()
    (_, opened), (_, closed) = seen.take()
    assert (closed.written, closed.stored_bytes) == (True, None)
    storage.close()


@pytest.mark.parametrize("kind", ["sqlite", "disk", "redis"])
@pytest.mark.parametrize("how", ["with", "async with", "several"])
def test_every_way_of_reading_and_writing_knows_its_size(
    request: pytest.FixtureRequest, tmp_path: Path, seen: Observers, kind: str, how: str
) -> None:
    from session_sync import storage_from_url

    if kind == "redis":
        url = f"{request.getfixturevalue('redis_url')}?prefix={tmp_path.name}:"
    else:
        url = f"{kind}:///{tmp_path}/sessions"
    if kind == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    with seen.manager(storage_from_url(url)) as sessions:
        for _ in range(3):
            if how == "with":
                add(sessions)
            elif how == "async with":
                asyncio.run(aadd(sessions))
            else:
                with sessions.session_scopes("user:1", "user:2") as both:
                    for session in both:
                        session.counter = session.get("counter", 0) + 1
        told = seen.take()
    size = len('{"counter":1}')
    assert {event.stored_bytes for name, event in told if name == "open"} == {None, size}
    assert {event.stored_bytes for name, event in told if name == "close"} == {size}


def test_one_that_only_reads_has_written_nothing(storage: Any, seen: Observers) -> None:
    sessions = seen.manager(storage)
    with sessions.session_scope("user:1") as session:
        session.get("counter")
    assert [event.written for _, event in seen.take()] == [False, False]


def test_a_lazy_session_is_opened_when_it_is_touched(seen: Observers) -> None:
    sessions = seen.manager(lazy=True)
    with sessions.session_scope("user:1") as session:
        pass
    assert seen.events == []
    with sessions.session_scope("user:1") as session:
        time.sleep(A_WHILE)
        assert seen.events == []
        session.counter = 1
        assert seen.kinds == ["open"]
    assert seen.kinds == ["open", "close"]
    assert all(event.waited < A_WHILE for _, event in seen.take())

    async def main() -> None:
        async with sessions.session_scope("user:1") as session:
            (await session).counter = 2

    asyncio.run(main())
    assert seen.kinds == ["open", "close"]


def test_who_joins_is_not_told_of(seen: Observers) -> None:
    sessions = seen.manager()
    with sessions.session_scope("user:1") as session:
        add(sessions)
        session.release()
        assert seen.kinds == ["open", "close"]
    assert seen.kinds == ["open", "close"]


def test_several_at_once_are_told_of_one_by_one(storage: Any, seen: Observers) -> None:
    sessions = seen.manager(storage)
    with sessions.session_scopes("user:2", "user:1", "user:3") as (two, one, _three):
        one.counter = two.counter = 1
    told = [(kind, event.key, event.written) for kind, event in seen.events]
    assert told[:3] == [("open", f"user:{n}", False) for n in (1, 2, 3)]
    assert sorted(told[3:]) == [("close", f"user:{n}", n < 3) for n in (1, 2, 3)]


def test_what_a_handler_raises_and_what_fails_in_saving(seen: Observers) -> None:
    sessions = seen.manager(MemoryStorage(strict=True))
    with pytest.raises(ZeroDivisionError), sessions.session_scope("user:1") as session:
        session.counter = 1
        raise ZeroDivisionError
    (_, closed) = seen.take()[-1]
    assert isinstance(closed.error, ZeroDivisionError)
    assert not closed.written
    with pytest.raises(SessionEncodeError), sessions.session_scope("user:1") as session:
        session.counter = object()
    (_, closed) = seen.take()[-1]
    assert isinstance(closed.error, SessionEncodeError)
    add(sessions)
    (_, closed) = seen.take()[-1]
    assert closed.error is None


@pytest.mark.parametrize("how", ["with", "async with"])
def test_what_fails_in_a_store(tmp_path: Path, seen: Observers, how: str) -> None:
    storage = SQLiteStorage(tmp_path / "sessions.db")
    sessions = seen.manager(storage)
    with sqlite3.connect(tmp_path / "sessions.db") as connection:
        connection.execute(
            "CREATE TRIGGER broken BEFORE INSERT ON sessions "
            "BEGIN SELECT RAISE(ABORT, 'broken'); END"
        )
    connection.close()
    with pytest.raises(sqlite3.IntegrityError):
        if how == "with":
            add(sessions)
        else:
            asyncio.run(aadd(sessions))
    (_, (_, closed)) = seen.take()
    assert isinstance(closed.error, sqlite3.IntegrityError)
    assert not closed.written
    storage.close()


@pytest.mark.parametrize("how", ["with", "async with", "lazy"])
def test_one_that_cannot_be_loaded_could_not_be_had(
    storage: Any, seen: Observers, how: str
) -> None:
    def initial(key: str) -> dict[str, Any]:
        raise ZeroDivisionError

    sessions = seen.manager(storage, initial=initial, lazy=how == "lazy")
    with pytest.raises(ZeroDivisionError):
        if how == "async with":
            asyncio.run(aadd(sessions))
        else:
            add(sessions)
    ((kind, event),) = seen.take()
    assert (kind, event.waited) == ("wait", 0)
    assert isinstance(event.error, ZeroDivisionError)


def test_so_is_one_that_is_damaged(tmp_path: Path, seen: Observers) -> None:
    storage = SQLiteStorage(tmp_path / "sessions.db")
    add(SessionManager(storage=storage))
    with sqlite3.connect(tmp_path / "sessions.db") as connection:
        connection.execute("UPDATE sessions SET value = x'00'")
    connection.close()
    with pytest.raises(SessionDecodeError):
        add(seen.manager(storage))
    ((kind, event),) = seen.take()
    assert kind == "wait"
    assert isinstance(event.error, SessionDecodeError)
    storage.close()


class Full(MemoryStorage):
    """One that takes no more once it is full."""

    is_full = False

    def save(self, key: str, record: Any) -> None:
        if self.is_full:
            raise OSError("no space left")
        super().save(key, record)


def test_what_a_migration_has_made_and_nobody_could_store_is_told(seen: Observers) -> None:
    storage = Full()
    add(SessionManager(storage=storage))
    storage.is_full = True
    sessions = seen.manager(storage, migrations={2: lambda fields: None}, migrate_eagerly=True)
    with pytest.raises(OSError, match="no space"):
        add(sessions)
    assert seen.kinds == ["open", "close"]
    closed = seen.events[-1][1]
    assert isinstance(closed.error, OSError)
    assert not closed.written


def test_an_empty_one_that_was_never_stored_is_not_written(storage: Any, seen: Observers) -> None:
    sessions = seen.manager(storage, initial=lambda key: {"counter": 1})
    with sessions.session_scope("user:1") as session:
        session.clear()
    with sessions.session_scopes("user:1", "user:2") as both:
        for session in both:
            session.clear()
    assert not any(event.written for _, event in seen.events)


class Big:
    """What a handler has in hand when it fails."""


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("released", [False, True])
def test_nothing_of_a_handler_that_failed_is_kept(
    seen: Observers, lazy: bool, released: bool
) -> None:
    sessions = seen.manager(lazy=lazy)

    def handler() -> weakref.ref[Big]:
        big = Big()
        reference = weakref.ref(big)
        with suppress(ZeroDivisionError):
            fail(big)
        return reference

    def fail(big: Big) -> None:
        with sessions.session_scope("user:1") as session:
            if released:
                session.release()
            raise ZeroDivisionError

    gc.disable()
    try:
        reference = handler()
        seen.take()
        assert reference() is None
    finally:
        gc.enable()


def test_a_frameworks_control_flow_is_no_error(seen: Observers) -> None:
    ext = pytest.importorskip("telegram.ext", reason="needs the extra 'ptb'")
    sessions = seen.manager()
    with pytest.raises(ext.ApplicationHandlerStop), sessions.session_scope("user:1") as session:
        session.counter = 1
        raise ext.ApplicationHandlerStop
    (_, closed) = seen.take()[-1]
    assert (closed.error, closed.written) == (None, True)


def test_one_that_is_thrown_away_has_closed(seen: Observers) -> None:
    sessions = seen.manager()
    scope = sessions.session_scope("user:1")
    # In a context of its own, which would otherwise know it.
    copy_context().run(scope.__enter__).counter = 1
    del scope
    gc.collect()
    until(lambda: len(seen.kinds) == 2)
    assert seen.kinds == ["open", "close"]
    assert not seen.events[-1][1].written


def test_no_observer_is_called_by_a_finaliser() -> None:
    """It may run in the middle of the observer itself, which may have a mutex."""
    callers: list[int] = []
    sessions: SessionManager[Any] = SessionManager(
        on_close=lambda event: callers.append(threading.get_ident())
    )
    scope = sessions.session_scope("user:1")
    copy_context().run(scope.__enter__)
    del scope
    gc.collect()
    until(lambda: callers)
    assert callers != [threading.get_ident()]


# -- waiting


@pytest.fixture
def holder(threads: Threads) -> Iterator[Any]:
    """Lets somebody hold a session of a manager until somebody else has waited for a while."""

    def hold(sessions: SessionManager[Any], key: str = "user:1") -> None:
        held = threading.Event()

        def run() -> None:
            with sessions.session_scope(key):
                held.set()
                give_up = time.monotonic() + SOON
                while not sessions.locks.waiters(key):
                    assert time.monotonic() < give_up, "nobody has waited"
                    time.sleep(0)
                time.sleep(A_WHILE)

        threads.start(run)
        assert held.wait(SOON)

    return hold  # type: ignore[return-value] # pytest takes a fixture without a yield, too


@pytest.mark.parametrize("how", ["with", "async with", "lazy"])
def test_waiting_is_told_when_it_is_over(
    storage: Any, seen: Observers, holder: Any, how: str
) -> None:
    sessions = seen.manager(storage, lazy=how == "lazy")
    holder(SessionManager(storage=storage))
    if how == "async with":
        asyncio.run(aadd(sessions))
    else:
        add(sessions)
    assert seen.kinds == ["wait", "open", "close"]
    for _, event in seen.events:
        assert A_WHILE <= event.waited < SOON
    assert seen.events[1][1].open_seconds < SOON
    assert seen.events[0][1].error is None


def test_before_it_is_entered_nobody_waits(seen: Observers) -> None:
    scope = seen.manager().session_scope("user:1")
    time.sleep(A_WHILE)
    with scope:
        pass
    assert seen.kinds == ["open", "close"]
    assert [event.waited for _, event in seen.events] == [0, 0]


def test_each_of_several_has_waited_for_itself(seen: Observers, holder: Any) -> None:
    sessions = seen.manager()
    holder(SessionManager(storage=sessions.storage), "user:1")
    with sessions.session_scopes("user:2", "user:1"):
        pass
    told = [(kind, event.key) for kind, event in seen.events[:3]]
    assert told == [("wait", "user:1"), ("open", "user:1"), ("open", "user:2")]
    assert seen.events[1][1].waited >= A_WHILE
    assert seen.events[2][1].waited == 0


def test_who_asks_for_a_lazy_session_while_it_is_waited_for_changes_no_figure(
    seen: Observers,
) -> None:
    sessions = seen.manager(lazy=True)

    async def main() -> None:
        async with SessionManager(storage=sessions.storage).session_scope("user:1") as other:

            async def ask(session: Any) -> None:
                await session

            async def ask_twice() -> None:
                async with sessions.session_scope("user:1") as session:
                    first = asyncio.create_task(ask(session))
                    await asyncio.sleep(A_WHILE)
                    second = asyncio.create_task(ask(session))
                    await asyncio.sleep(0)
                    await other.arelease()
                    await asyncio.gather(first, second)

            # In a context of its own, in which nothing is open.
            await asyncio.create_task(ask_twice(), context=empty)

    empty = copy_context()
    asyncio.run(main())
    assert seen.kinds == ["wait", "open", "close"]
    assert seen.events[1][1].waited >= A_WHILE * 0.9


@pytest.mark.parametrize("how", ["with", "async with"])
def test_giving_up_is_told_too(storage: Any, seen: Observers, how: str) -> None:
    sessions = seen.manager(storage, lock_timeout=A_WHILE)
    other = SessionManager(storage=storage)

    def wait() -> None:
        if how == "with":
            add(sessions)
        else:
            asyncio.run(aadd(sessions))

    errors: list[Exception] = []

    def run() -> None:
        try:
            wait()
        except SessionLockTimeoutError as error:
            errors.append(error)

    with other.session_scope("user:1"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(SOON)
    ((kind, event),) = seen.take()
    assert kind == "wait"
    assert [event.error] == errors
    assert event.waited >= A_WHILE * 0.9


@pytest.mark.parametrize("is_soon", [True, False])
def test_so_is_waiting_for_another_process(
    tmp_path: Path, seen: Observers, threads: Threads, is_soon: bool
) -> None:
    ours, theirs = (SQLiteStorage(tmp_path / "sessions.db") for _ in range(2))
    sessions = seen.manager(ours, lock_timeout=SOON if is_soon else A_WHILE)
    opened = theirs.open_record("user:1", 0)
    if is_soon:
        threading.Timer(10 * A_WHILE, opened.close, [None]).start()
        add(sessions)
        assert seen.kinds == ["wait", "open", "close"]
        assert all(event.waited > A_WHILE for _, event in seen.events)
    else:
        with pytest.raises(SessionLockTimeoutError):
            add(sessions)
        opened.close(None)
        assert seen.kinds == ["wait"]
        assert isinstance(seen.events[0][1].error, SessionLockTimeoutError)
    ours.close()
    theirs.close()


def test_a_telebots_queue_counts_as_waiting(seen: Observers) -> None:
    telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    import session_sync.telebot

    bot = telebot.TeleBot("1:token", num_threads=2)
    session_sync.telebot.install(bot, seen.manager())
    queued, done = threading.Event(), threading.Semaphore(0)

    @bot.message_handler(func=lambda message: True)
    def count(message: Any) -> None:
        assert queued.wait(SOON)
        time.sleep(A_WHILE)
        done.release()

    for _ in range(2):
        bot.process_new_updates([telebot.types.Update.de_json(message())])
    queued.set()
    for _ in range(2):
        assert done.acquire(timeout=SOON)
    bot.stop_bot()
    # The first one may have waited as well: for a worker, on a busy machine.
    assert seen.kinds[-5:] == ["open", "close", "wait", "open", "close"]
    assert seen.kinds[:-5] in ([], ["wait"])
    assert all(event.waited >= A_WHILE for _, event in seen.events[-3:])


def test_a_ptb_application_is_told_of_each_update(seen: Observers) -> None:
    ext = pytest.importorskip("telegram.ext", reason="needs the extra 'ptb'")
    from telegram import Update

    import session_sync.ptb

    builder = ext.Application.builder().token("1:token")
    application = session_sync.ptb.install(builder, seen.manager()).build()

    async def main() -> None:
        application._initialized = True  # there is no server to ask who the bot is
        update = Update.de_json(message(), application.bot)
        await application.process_update(update)

    asyncio.run(main())
    assert seen.kinds == ["open", "close"]


# -- what it costs, and what it cannot do


def test_without_observers_there_is_none_of_it() -> None:
    assert type(SessionManager().session_scope("user:1")) is SessionScope
    assert type(SessionManager().scopes.of_key("user:1", None)) is SessionScope
    for sessions in (SessionManager(), SessionManager(lazy=True)):
        (scope,) = sessions.session_scopes("user:1")._scopes
        assert type(scope) is SessionScope


@pytest.mark.parametrize("which", ["on_open", "on_close", "on_wait"])
def test_an_observer_that_fails_loses_nothing(
    which: str, holder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: SessionEvent) -> None:
        raise ZeroDivisionError

    options: dict[str, Any] = {which: fail}
    sessions = SessionManager(**options)
    holder(SessionManager(storage=sessions.storage))
    add(sessions)
    assert sessions.storage.get("user:1") == {"counter": 1}
    add(sessions)
    assert sessions.storage.get("user:1") == {"counter": 2}
    assert "an observer failed for the session 'user:1'" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_of_an_observer_that_fails_the_log_has_no_value(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: SessionEvent) -> None:
        try:
            raise KeyError
        except KeyError as error:
            raise LookupError("nothing there") from error

    sessions = SessionManager(on_close=fail)
    with pytest.raises(ValueError, match="hunter2"), sessions.session_scope("user:1"):
        raise ValueError("hunter2")
    assert "nothing there" in caplog.text
    assert "hunter2" not in caplog.text


def test_an_observer_is_no_coroutine_function() -> None:
    async def observe(event: SessionEvent) -> None: ...

    with pytest.raises(TypeError, match="on_close is an `async def`"):
        SessionManager(on_close=observe)


# -- the log


def test_the_log_has_keys_and_figures_and_no_values(
    storage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = SessionManager(storage=storage)
    with caplog.at_level(logging.DEBUG, "session_sync"):
        with sessions.session_scope("user:1") as session:
            session.password = "hunter2"
        with sessions.session_scope("user:1") as session:
            pass
        with pytest.raises(ValueError, match="hunter2"), sessions.session_scope("user:1"):
            raise ValueError("hunter2")
    opened, closed, _, unchanged, _, failed = (record.getMessage() for record in caplog.records)
    assert opened.startswith("opened 'user:1': waited 0.0")
    assert closed.startswith("closed 'user:1': waited 0.0")
    assert closed.endswith(" s, written")
    assert unchanged.endswith(" s, unchanged")
    assert failed.endswith(" s, ValueError was raised")
    assert "hunter2" not in caplog.text
    assert {record.name for record in caplog.records} == {"session_sync"}


def test_the_log_says_who_could_not_have_it(caplog: pytest.LogCaptureFixture) -> None:
    sessions = SessionManager(lock_timeout=A_WHILE)
    opened = threading.Event()

    def wait() -> None:
        with pytest.raises(SessionLockTimeoutError):
            add(sessions)
        opened.set()

    with caplog.at_level(logging.DEBUG, "session_sync"), sessions.session_scope("user:1"):
        threading.Thread(target=wait).start()
        assert opened.wait(SOON)
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if m.startswith("not opened 'user:1': waited 0.")]


def test_the_log_may_be_turned_on_while_the_bot_runs(caplog: pytest.LogCaptureFixture) -> None:
    sessions = SessionManager()
    add(sessions)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "session_sync"):
        add(sessions)
    assert len(caplog.records) == 2
