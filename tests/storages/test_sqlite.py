"""SQLiteStorage: the file, what expires, and what somebody else has put there."""

from __future__ import annotations

import asyncio
import os
import pickle
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import (
    Codec,
    SessionDecodeError,
    SessionEncodeError,
    SessionLockTimeoutError,
    SessionManager,
    SQLiteStorage,
    StorageKey,
    storage_from_url,
)
from session_sync.lifecycle import threads as pools


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bot" / "sessions.db"


@pytest.fixture
def storage(path: Path) -> Iterator[SQLiteStorage]:
    made = SQLiteStorage(path)
    yield made
    made.close()


def sql(path: Path, statement: str, *values: object) -> list[Any]:
    """As another program does it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def test_a_row_is_readable_for_people(storage: SQLiteStorage, path: Path) -> None:
    storage.set("user:1", {"counter": 1, "name": "Åse"})
    ((key, value, expires),) = sql(path, "SELECT key, CAST(value AS TEXT), expires FROM sessions")
    assert (key, expires) == ("user:1", None)
    assert '"counter":1' in value
    assert "Åse" in value


def test_everything_is_private(storage: SQLiteStorage, path: Path) -> None:
    storage.set("user:1", {"counter": 1})
    with SessionManager(storage=storage).session_scope("user:1") as session:
        session.counter += 1
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(path.parent)}
    assert files.keys() >= {"sessions.db", "sessions.db-wal", "sessions.db-locks"}
    assert set(files.values()) == {0o600}


def test_what_expires_is_gone_and_later_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with closing(SQLiteStorage(path, ttl=60)) as storage:
        for number in range(5):
            storage.set(f"user:{number}", {"a": number})
        clock[0] += 50
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        with sessions.session_scope("user:0") as session:
            assert session.a == 0  # which starts its life anew
        storage.touch("user:1")
        assert storage.get("user:2") == {"a": 2}  # which does not
        clock[0] += 20
        assert list(storage.keys()) == ["user:0", "user:1"]
        assert [storage.has(f"user:{number}") for number in range(3)] == [True, True, False]
        assert storage.get("user:2") is None
        assert sql(path, "SELECT count(*) FROM sessions") == [(5,)]
        storage.set("user:9", {})
        assert sql(path, "SELECT key FROM sessions") == [("user:0",), ("user:1",), ("user:9",)]


def test_a_read_writes_only_when_a_hundredth_of_the_life_has_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with closing(SQLiteStorage(path, ttl=100)) as storage:
        storage.set("user:1", {"a": 1})
        for gone, expires in ((0.5, 1100.0), (1.5, 1101.5)):
            clock[0] = 1000.0 + gone
            storage.load("user:1")
            assert sql(path, "SELECT expires FROM sessions") == [(expires,)]


def test_the_sweep_stops_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a hundred rows at a time, at most once a second."""
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with closing(SQLiteStorage(path, ttl=60)) as storage:
        for number in range(250):
            storage.set(f"user:{number}", {"a": 1})
        clock[0] += 1000
        left = []
        for number in range(4):
            storage.set("me", {"a": number})
            storage.set("me", {"a": -number})
            left.append(sql(path, "SELECT count(*) FROM sessions")[0][0])
            clock[0] += 1.5
    assert left == [151, 51, 1, 1]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (pickle.dumps({"a": 1}), "user:1"),
        (b"\xff\x00garbage", "user:1"),
        (b"", "user:1"),
        (5, "of type int"),
        ("text that is none of ours", "user:1"),
    ],
)
def test_what_is_not_ours_is_refused_and_left(
    storage: SQLiteStorage, path: Path, value: object, cause: str
) -> None:
    sql(path, "INSERT INTO sessions VALUES ('user:1', ?, NULL)", value)
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with pytest.raises(SessionDecodeError, match=cause):
        storage.get("user:1")
    with pytest.raises(SessionDecodeError, match=cause), sessions.session_scope("user:1"):
        pass
    assert sql(path, "SELECT value FROM sessions") == [(value,)]
    assert len(sessions.locks) == 0
    with sessions.session_scope("user:2") as session:
        session.a = 1


def test_a_value_that_cannot_be_kept_is_refused_with_its_path(storage: SQLiteStorage) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with pytest.raises(SessionEncodeError, match=r"cart\.items\[1\]"):
        with sessions.session_scope("user:1") as session:
            session.cart = {"items": [1, object()]}
    assert storage.get("user:1") is None


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    sql(path, "CREATE TABLE sessions (a)")
    with pytest.raises(ValueError, match="is a database of another program"):
        SQLiteStorage(path)
    assert sql(path, "SELECT name FROM sqlite_master") == [("sessions",)]


def test_a_file_of_a_newer_version_is_refused(storage: SQLiteStorage, path: Path) -> None:
    storage.close()
    sql(path, "PRAGMA user_version = 2")
    with pytest.raises(ValueError, match="made by a newer session_sync"):
        SQLiteStorage(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        SQLiteStorage(path)
    assert path.read_text() == "dear diary, " * 100


@pytest.mark.parametrize("synchronous", ["full", "normal", "off"])
def test_synchronous_is_what_was_asked_for(path: Path, synchronous: Any) -> None:
    with closing(SQLiteStorage(path, synchronous=synchronous)) as storage:
        level = storage._read("PRAGMA synchronous")
        assert level == [({"off": 0, "normal": 1, "full": 2}[synchronous],)]
        assert storage._read("PRAGMA journal_mode") == [(b"wal",)]


def test_bad_options_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="'full', 'normal' or 'off', not 'fast'"):
        SQLiteStorage(path, synchronous="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ttl"):
        SQLiteStorage(path, ttl=0)


def test_keys_are_listed_page_by_page_while_others_write(storage: SQLiteStorage) -> None:
    names = {f"user:{number}" for number in range(2500)} | {"key:\udc80", "chat:-1"}
    for name in names:
        storage.set(name, {"a": 1})
    listed = []
    for name in storage.keys():
        listed.append(name)
        storage.delete(name)
    assert set(listed) == names
    assert len(listed) == len(names)
    assert list(storage.keys()) == []


def test_entries_tell_size_and_life_of_every_record(storage: SQLiteStorage, path: Path) -> None:
    names = {f"user:{number}" for number in range(2500)} | {"key:\udc80", "chat:-1"}
    for name in names:
        storage.set(name, {"a": "Å"})
    sql(path, "UPDATE sessions SET value = 'text' WHERE key = 'chat:-1'")
    sizes = {entry.key: entry.size for entry in storage.entries()}
    assert sizes.keys() == names
    assert sizes["user:1"] == len('{"a":"Å"}'.encode())
    assert sizes["chat:-1"] == 4
    assert {(entry.age, entry.left) for entry in storage.entries()} == {(None, None)}


def test_with_a_ttl_an_entry_is_as_old_as_it_was_left_alone(path: Path) -> None:
    with closing(SQLiteStorage(path, ttl=1000)) as storage:
        storage.set("old", {"a": 1})
        storage.set("gone", {"a": 1})
        sql(path, "UPDATE sessions SET expires = expires - 400 WHERE key = 'old'")
        sql(path, "UPDATE sessions SET expires = 1 WHERE key = 'gone'")
        for _ in range(2):  # it is not touched by this
            (entry,) = storage.entries()
            assert entry.key == "old"
            assert entry.age == pytest.approx(400, abs=60)
            assert entry.left == pytest.approx(600, abs=60)
    with closing(SQLiteStorage(path)) as storage:  # how long it was to live is not stored
        (entry,) = storage.entries()
        assert entry.age is None
        assert entry.left == pytest.approx(600, abs=60)


def test_what_cannot_be_read_can_be_opened_to_be_removed(
    storage: SQLiteStorage, path: Path
) -> None:
    storage.set("user:1", {"a": 1})
    sql(path, "UPDATE sessions SET value = 'nonsense'")
    with pytest.raises(SessionDecodeError):
        storage.open_record("user:1", 0)
    opened = storage.open_unread("user:1", 0)
    with closing(SQLiteStorage(path)) as other, pytest.raises(SessionLockTimeoutError):
        other.open_unread("user:1", 0)
    opened.close({})
    assert not storage.has("user:1")


def test_a_closed_storage_opens_again(storage: SQLiteStorage) -> None:
    storage.set("user:1", {"a": 1})
    storage.close()
    storage.close()
    assert storage.get("user:1") == {"a": 1}


def test_many_threads_need_as_many_connections_as_work_at_once(
    storage: SQLiteStorage, threads: Threads
) -> None:
    gate = threading.Barrier(8)

    def work(number: int) -> None:
        gate.wait(20)
        for n in range(50):
            storage.set(f"user:{number}:{n}", {"n": n})

    for number in range(8):
        threads.start(work, number)
    threads.join()
    assert sum(1 for _ in storage.keys()) == 400
    assert len(storage._connections._idle) <= 8


def test_a_fork_waits_for_a_statement_and_statements_wait_for_a_fork(
    storage: SQLiteStorage, threads: Threads
) -> None:
    connections = storage._connections
    storage.set("user:1", {"a": 1})
    in_use = connections.take()
    storage.set("user:2", {"a": 2})  # with a second connection, which is idle then
    events = []

    def fork() -> None:
        connections.shut()
        try:
            events.append("forked")
            assert not connections._made
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                in_use.execute("SELECT 1")
            forked.set()
            go_on.wait(20)
            assert not connections._made
        finally:
            connections.open_again()

    forked, go_on = threading.Event(), threading.Event()
    forking = threads.start(fork)
    while forking.is_alive() and not connections._is_forking():
        time.sleep(0.001)
    events.append(in_use.execute("SELECT 1").fetchone())
    connections.give_back(in_use)
    assert forked.wait(20)
    threads.start(lambda: events.append(storage.get("user:1")))
    go_on.set()
    threads.join()
    assert events == [(1,), "forked", {"a": 1}]
    assert connections.take().execute("SELECT 1").fetchone() == (1,)


def test_many_may_begin_at_once(tmp_path: Path, threads: Threads) -> None:
    gate = threading.Barrier(8)

    def begin() -> None:
        for number in range(20):
            gate.wait(20)
            with closing(SQLiteStorage(tmp_path / f"{number}.db")) as storage:
                storage.set("user:1", {"a": 1})

    for _ in range(8):
        threads.start(begin)
    threads.join()


# -- by URL


def test_rows_of_no_key_are_passed_over_and_reported(
    path: Path, storage: SQLiteStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program's, or a tool's: bytes that are no text, as they are and as a text, and the
    bytes of a key that is stored as a text."""
    keys = ["", "a", "user:1", "я", "\ud800"]
    for key in keys:
        storage.set(key, {"a": 1})
    insert = "INSERT INTO sessions VALUES ({}, x'7b7d', NULL)"
    for row in ("x'ff'", "CAST(x'62ff' AS TEXT)", "CAST(x'ff' AS TEXT)", "x'61'"):
        sql(path, insert.format(row))
    for listed in (storage.keys, lambda: (entry.key for entry in storage.entries())):
        assert sorted(listed()) == sorted(keys)
        assert "rows whose key is no text were passed over: 4" in caplog.text
        caplog.clear()
    assert storage.unknown_rows() == 4


def test_more_keys_than_are_read_at_once_are_listed_once_each(
    path: Path, storage: SQLiteStorage
) -> None:
    sql(
        path,
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 2999) "
        "INSERT INTO sessions SELECT 'k' || i, x'7b7d', NULL FROM n",
    )
    sql(path, "UPDATE sessions SET key = CAST(x'6bff' AS TEXT) WHERE key = 'k1899'")
    assert sorted(storage.keys()) == sorted(f"k{i}" for i in range(3000) if i != 1899)


def test_a_url_names_a_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = storage_from_url("sqlite:///a%20b.db?ttl=60&synchronous=full")
    absolute = storage_from_url(f"sqlite:///{tmp_path}/a b.db")
    key = str(StorageKey(user=1))
    relative.set(key, {"a": 1})
    assert absolute.get(key) == {"a": 1}
    assert (tmp_path / "a b.db").exists()
    disk = storage_from_url("disk:///folder")
    disk.set(key, {"a": 2})
    assert (tmp_path / "folder").is_dir()
    memory = storage_from_url("memory://")
    assert memory.get(key) is None
    for made in (relative, absolute, disk):
        made.close()  # type: ignore[attr-defined]


def test_a_url_takes_a_codec(tmp_path: Path) -> None:
    def encode(value: Any) -> Any:
        return (
            ("complex", [value.real, value.imag]) if isinstance(value, complex) else NotImplemented
        )

    codec = Codec(encode, lambda _name, value: complex(*value))
    for url in (f"sqlite:///{tmp_path}/c.db", f"disk:///{tmp_path}/c", "memory://"):
        storage: Any = storage_from_url(url, codec=codec)
        storage.set("user:1", {"number": 1 + 2j})
        assert storage.get("user:1") == {"number": 1 + 2j}
        storage.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "needs a path: sqlite:///sessions"),
        ("sqlite://host/file", "needs a path"),
        ("disk:///", "needs a path"),
        ("sqlite:///a.db?tll=5", "no option 'tll'; it has synchronous, ttl"),
        ("sqlite:///a.db?ttl=soon", "ttl takes a number, not 'soon'"),
        ("mongodb://u:secret@h", "no storage is called 'mongodb'"),
        ("sessions.db", "'sessions.db' is no URL of a storage"),
    ],
)
def test_a_bad_url_says_what_is_wrong_and_no_password(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        storage_from_url(url)
    assert "secret" not in str(caught.value)


# -- in place of a coroutine


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pools whose threads were asked."""
    asked: list[str] = []
    submit = pools.ThreadPool.submit

    def watched(pool: Any, job: Any) -> None:
        asked.append(pool._name.removeprefix("session_sync-"))
        submit(pool, job)

    monkeypatch.setattr(pools.ThreadPool, "submit", watched)
    for pool in (pools.openers, pools.closers):
        monkeypatch.setattr(pool, "seconds", 0.0)
        monkeypatch.setattr(pool, "in_threads_until", 0.0)
    for moment in ("_MOMENT", "_LONG"):  # what is slow on this machine is not meant
        monkeypatch.setattr(pools, moment, 10.0)
    return asked


def count(sessions: SessionManager[Any], times: int = 1, **fields: Any) -> None:
    async def main() -> None:
        for _ in range(times):
            async with sessions.session_scope("user:1") as session:
                session.counter = session.get("counter", 0) + 1
                session.update(fields)

    asyncio.run(main())


def test_a_coroutine_needs_no_thread_for_what_waits_for_nothing(
    path: Path, handed_over: list[str]
) -> None:
    with SessionManager(storage=SQLiteStorage(path)) as sessions:
        count(sessions, 3)
        assert handed_over == []
        assert sessions.storage.get("user:1") == {"counter": 3}

        async def clear() -> None:
            async with sessions.session_scope("user:1") as session:
                session.clear()

        asyncio.run(clear())
        assert handed_over == []
        assert not sessions.storage.has("user:1")


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        ({"synchronous": "full"}, {}, ["close"]),
        ({}, {"text": "x" * 100_000}, ["close"]),
        ({"ttl": 3600}, {}, ["close"]),  # which looks for what has expired, too
    ],
)
def test_what_may_wait_for_the_disk_is_done_in_a_thread(
    path: Path, handed_over: list[str], options: Any, fields: Any, expected: list[str]
) -> None:
    with SessionManager(storage=SQLiteStorage(path, **options)) as sessions:
        count(sessions, **fields)
        assert handed_over == expected
        assert sessions.storage.get("user:1") == {"counter": 1, **fields}


def test_reading_that_starts_a_life_time_anew_is_done_in_a_thread(
    path: Path, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SessionManager(storage=SQLiteStorage(path, ttl=3600)) as sessions:
        sessions.storage.set("user:1", {"counter": 1})
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 1800)
        count(sessions)
        assert handed_over[0] == "open"
        monkeypatch.setattr(time, "time", lambda: now + 4000)
        assert sessions.storage.get("user:1") == {"counter": 2}


def test_now_and_then_a_write_goes_the_way_that_may_wait_for_a_checkpoint(
    path: Path, handed_over: list[str]
) -> None:
    with SessionManager(storage=SQLiteStorage(path)) as sessions:
        count(sessions, 2_200)
        assert len(handed_over) == 4
        assert sessions.storage.get("user:1") == {"counter": 2_200}
    # SQLite's own bound is 1,000 pages; what came in between is on top.
    assert not os.path.exists(f"{path}-wal") or os.path.getsize(f"{path}-wal") < 2_000 * 4_096


def test_an_event_loop_goes_on_while_another_program_writes(
    path: Path, handed_over: list[str]
) -> None:
    with SessionManager(storage=SQLiteStorage(path)) as sessions:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        async def handler() -> None:
            async with sessions.session_scope("user:1") as session:
                session.a = 1

        async def main() -> None:
            task = asyncio.create_task(handler())
            while not handed_over:
                await asyncio.sleep(0)
            assert not task.done()
            other.execute("COMMIT")
            await task

        pools._MOMENT = 0.0002  # undone by the fixture
        asyncio.run(main())
        other.close()
        assert handed_over == ["close"]
        assert sessions.storage.get("user:1") == {"a": 1}


def test_a_coroutine_asks_a_thread_after_a_call_that_was_slow(
    path: Path, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SessionManager(storage=SQLiteStorage(path)) as sessions:
        monkeypatch.setattr(pools, "_LONG", 0.0)  # as if this disk were slow
        count(sessions)
        assert handed_over == []
        count(sessions)
        assert handed_over == ["open", "close"]
        monkeypatch.setattr(pools, "_LONG", 10.0)
        for pool in (pools.openers, pools.closers):  # a second later
            monkeypatch.setattr(pool, "in_threads_until", 0.0)
        count(sessions)
        assert handed_over == ["open", "close"]


def test_a_record_that_cannot_be_encoded_frees_its_key_in_place(
    path: Path, handed_over: list[str]
) -> None:
    with SessionManager(storage=SQLiteStorage(path)) as sessions:
        with pytest.raises(SessionEncodeError):
            count(sessions, odd=object())
        assert handed_over == []
        another = SQLiteStorage(path)
        another.open_record("user:1", 0).close(None)  # no lock is left in the file
        another.close()
        count(sessions)
