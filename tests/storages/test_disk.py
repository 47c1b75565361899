"""What is special about the storage on disk: nothing evicted, nothing unpickled, nothing lost."""

from __future__ import annotations

import gc
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import disk_tools
import diskcache
import pytest
from disk_tools import in_thread, row, sql

from session_sync import SessionManager
from session_sync.errors import SessionDecodeError, SessionEncodeError, SessionLockTimeoutError
from session_sync.storages import disk
from session_sync.storages.base import (
    ListableStorage,
    RecordStorage,
    TtlStorage,
    patched,
    record_of,
)
from session_sync.storages.codec import Codec
from session_sync.storages.disk import DiskStorage

folder = pytest.fixture(disk_tools.make_folder)
storage = pytest.fixture(disk_tools.make_storage)

HERE = Path(__file__).parent


class Clock:
    """Says how late it is, for all who ask."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.now)
    return clock


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


class TestRecords:
    def test_satisfy_the_protocols(self, storage: DiskStorage) -> None:
        assert isinstance(storage, TtlStorage)
        assert isinstance(storage, ListableStorage)
        assert isinstance(storage, RecordStorage)
        assert storage.blocking

    def test_come_back_with_their_types(self, storage: DiskStorage, folder: Path) -> None:
        fields = {"a": (1, {2}), "b": {5: b"x"}, "$version": 3}
        storage.set("user:1", fields)
        with closing(DiskStorage(folder)) as other:
            assert other.get("user:1") == fields
            assert other.load("user:1") == fields
            assert other.get("user:2") is None
            assert other.load("user:2") is None

    def test_are_saved_from_records(self, storage: DiskStorage) -> None:
        storage.save("user:1", record_of({"a": (1,), "b": 2}))
        record = storage.load("user:1")
        assert record is not None
        storage.save("user:1", patched(record, {"b": {3}}))
        assert storage.get("user:1") == {"a": (1,), "b": {3}}

    def test_are_text_that_an_operator_can_read(self, storage: DiskStorage, folder: Path) -> None:
        storage.set("user:1", {"name": "alex", "tags": {"a"}})
        [(key, text)] = sql(folder, "SELECT key, CAST(value AS TEXT) FROM Cache")
        assert (key, text) == ("user:1", '{"name":"alex","tags":{"$set":["a"]}}')

    def test_take_own_types_by_a_codec(self, folder: Path) -> None:
        codec = Codec(lambda value: ("path", str(value)), lambda _name, value: Path(value))
        with closing(DiskStorage(folder, codec=codec)) as storage:
            storage.set("user:1", {"home": Path("/home")})
            assert storage.get("user:1") == {"home": Path("/home")}

    def test_that_cannot_be_encoded_leave_the_old_one(self, storage: DiskStorage) -> None:
        storage.set("user:1", {"a": 1})
        for write in (storage.set, storage.save):
            with pytest.raises(SessionEncodeError, match=r"'user:1'.* b is of type object"):
                write("user:1", record_of({"b": object()}))
        assert storage.get("user:1") == {"a": 1}

    @pytest.mark.parametrize(
        "key", ["", "a b", "ключ", "\x00", "a\x00b", "\ud800", "'; --", "k" * 9999]
    )
    def test_have_any_text_as_their_key(self, storage: DiskStorage, key: str) -> None:
        storage.set(key, {"a": 1})
        storage.set(key, {"a": 2})
        assert storage.has(key)
        assert storage.get(key) == {"a": 2}
        assert list(storage.keys()) == [key]
        storage.delete(key)
        assert not storage.has(key)

    def test_may_be_large_and_stay_in_one_row(self, storage: DiskStorage, folder: Path) -> None:
        storage.set("user:1", {"a": "x" * 5_000_000})
        assert storage.get("user:1") == {"a": "x" * 5_000_000}
        assert {path.name for path in folder.iterdir()} <= {
            "cache.db",
            "cache.db-wal",
            "cache.db-shm",
        }


class TestTheFolder:
    def test_is_one_that_diskcache_reads_and_counts(self, folder: Path, clock: Clock) -> None:
        with closing(DiskStorage(folder, ttl=10)) as storage:
            for n in range(3):
                storage.set(f"old:{n}", {"n": n})
            clock.now += 11
            for n in [*range(5), *range(5)]:
                storage.set(f"user:{n}", {"n": n})
            storage.delete("user:0")
        with closing(DiskStorage(folder)) as storage:
            storage.set("user:1", {"n": 1})  # which does not expire any more
        clock.now += 5
        with diskcache.Cache(str(folder)) as cache:
            assert len(cache) == 4
            assert cache.check() == []
            assert cache.get("user:1", expire_time=True) == (b'{"n":1}', None)
            assert cache.get("user:2", expire_time=True) == (b'{"n":2}', clock.now + 5)

    def test_may_have_been_written_by_diskcache(self, folder: Path) -> None:
        with diskcache.Cache(str(folder), disk_min_file_size=1) as cache:
            cache.set("user:1", b'{"n":1}', expire=100, tag="a")
            assert cache.volume() > 0
        with closing(DiskStorage(folder)) as storage:
            storage.set("user:1", {"n": 2})
        with diskcache.Cache(str(folder)) as cache:
            assert cache.get("user:1", expire_time=True, tag=True) == (b'{"n":2}', None, None)
            assert sql(folder, "SELECT value FROM Settings WHERE key = 'size'") == [(0,)]


class TestNothingIsEvicted:
    def test_whatever_the_settings_in_the_folder_say(self, folder: Path) -> None:
        with diskcache.Cache(
            str(folder), size_limit=1000, eviction_policy="least-recently-used", statistics=1
        ):
            pass
        with closing(DiskStorage(folder)) as storage:
            for n in range(1500):
                storage.set(f"user:{n}", {"n": n, "text": "x" * 200})
        with closing(DiskStorage(folder)) as storage:
            assert len(list(storage.keys())) == 1500
            assert all(storage.get(f"user:{n}")["n"] == n for n in range(1500))  # type: ignore[index]
        settings = dict(sql(folder, "SELECT key, value FROM Settings"))
        assert settings["eviction_policy"] == "none"
        assert settings["size_limit"] > 2**60

    def test_when_settings_are_planted_later(self, storage: DiskStorage, folder: Path) -> None:
        storage.set("user:0", {"n": 0})
        sql(folder, "UPDATE Settings SET value = 10 WHERE key = 'size_limit'")
        sql(folder, "UPDATE Settings SET value = 0 WHERE key = 'sqlite_synchronous'")
        sql(folder, "UPDATE Settings SET value = 'delete' WHERE key = 'sqlite_journal_mode'")
        results: list[Any] = []

        def look() -> None:
            results.extend(storage._cache._sql("PRAGMA synchronous").fetchall()[0])
            results.extend(storage._cache._sql("PRAGMA journal_mode").fetchall()[0])

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert results == [1, "wal"]
        for n in range(100):
            storage.set(f"user:{n}", {"n": n})
        assert len(list(storage.keys())) == 100

    def test_but_what_has_expired_is_swept(self, folder: Path, clock: Clock) -> None:
        with closing(DiskStorage(folder, ttl=10)) as storage:
            for n in range(50):
                storage.set(f"old:{n}", {"n": n})
            clock.now += 11
            for n in range(5):
                storage.set(f"new:{n}", {"n": n})
            assert len(list(storage.keys())) == 5
        assert sql(folder, "SELECT COUNT(*) FROM Cache") == [(5,)]

    def test_also_by_a_storage_without_a_ttl(self, folder: Path, clock: Clock) -> None:
        with closing(DiskStorage(folder, ttl=10)) as storage:
            storage.set("old", {"n": 1})
        clock.now += 11
        with closing(DiskStorage(folder)) as storage:
            storage.set("new", {"n": 1})
        assert sql(folder, "SELECT COUNT(*) FROM Cache") == [(1,)]


class TestLifeTime:
    @pytest.mark.parametrize("ttl", [10, 10.0, timedelta(seconds=10)])
    def test_ends_a_record(self, folder: Path, clock: Clock, ttl: Any) -> None:
        with closing(DiskStorage(folder, ttl)) as storage:
            storage.set("user:1", {"a": 1})
            clock.now += 9.9
            assert storage.get("user:1") == {"a": 1}
            clock.now += 0.2
            assert storage.get("user:1") is None
            assert storage.load("user:1") is None
            assert not storage.has("user:1")
            assert list(storage.keys()) == []
            storage.touch("user:1")
            storage.delete("user:1")
            assert not storage.has("user:1")

    @pytest.mark.parametrize("again", ["touch", "load"])
    def test_starts_anew(self, folder: Path, clock: Clock, again: str) -> None:
        with closing(DiskStorage(folder, 10)) as storage:
            storage.set("user:1", {"a": 1})
            for _ in range(5):
                clock.now += 9
                getattr(storage, again)("user:1")
            assert storage.get("user:1") == {"a": 1}
            clock.now += 10
            assert not storage.has("user:1")

    def test_is_not_written_for_each_read(self, folder: Path, clock: Clock) -> None:
        with closing(DiskStorage(folder, 100)) as storage:
            storage.set("user:1", {"a": 1})
            for gone, expires in ((0.5, 100), (1, 101.5)):
                clock.now += gone
                storage.load("user:1")
                ends = sql(folder, "SELECT expire_time FROM Cache")
                assert ends == [(1_700_000_000.0 + expires,)]

    def test_none_means_for_ever_and_no_write_on_a_read(
        self, storage: DiskStorage, folder: Path, clock: Clock
    ) -> None:
        storage.set("user:1", {"a": 1})
        with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # a write would have to wait
            clock.now += 1e9
            storage.touch("user:1")
            assert storage.load("user:1") == {"a": 1}
            assert list(storage.keys()) == ["user:1"]

    def test_does_not_start_anew_for_a_record_that_does_not_decode(
        self, folder: Path, clock: Clock
    ) -> None:
        with closing(DiskStorage(folder, 10)) as storage:
            storage.set("user:1", {})
            sql(folder, "UPDATE Cache SET value = X'00'")
            before = row(folder, "user:1")
            clock.now += 1
            with pytest.raises(SessionDecodeError):
                storage.load("user:1")
            assert row(folder, "user:1") == before

    @pytest.mark.parametrize("ttl", [0, -1, float("nan"), timedelta(0), timedelta(-1)])
    def test_has_to_be_positive(self, folder: Path, ttl: Any) -> None:
        with pytest.raises(ValueError, match="ttl must be a positive number of seconds"):
            DiskStorage(folder, ttl)
        assert not folder.exists()


class TestThreads:
    def test_that_have_ended_leave_no_connection(self, storage: DiskStorage) -> None:
        for n in range(50):
            in_thread(lambda n=n: storage.set(f"user:{n}", {"n": n}))
            # The last reference goes when the thread itself is gone.
            gc.collect()
        assert len(storage._connections._made) <= 2
        assert len(list(storage.keys())) == 50

    def test_that_go_on_are_cut_off_by_close_and_may_come_back(self, folder: Path) -> None:
        storage = DiskStorage(folder)
        ready, closed = threading.Barrier(5), threading.Barrier(5)
        seen: list[Any] = []

        def work(n: int) -> None:
            storage.set(f"user:{n}", {"n": n})
            ready.wait()
            closed.wait()
            seen.append(storage.get(f"user:{n}"))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        ready.wait()
        storage.close()
        # The last one to close a database takes its log along.
        assert [path.name for path in folder.iterdir()] == ["cache.db"]
        storage.close()
        closed.wait()
        for thread in threads:
            thread.join()
        assert sorted(fields["n"] for fields in seen) == [0, 1, 2, 3]
        storage.close()

    def test_may_outlive_the_storage(self, folder: Path) -> None:
        storage = DiskStorage(folder)
        ready, done = threading.Event(), threading.Event()
        box = [storage]

        def work() -> None:
            box.pop().set("user:1", {"n": 1})
            ready.set()
            done.wait()

        thread = threading.Thread(target=work)
        thread.start()
        ready.wait()
        del storage
        gc.collect()  # a ResourceWarning would fail this test
        done.set()
        thread.join()

    def test_write_at_the_same_time(self, storage: DiskStorage) -> None:
        start = threading.Barrier(8)

        def work(n: int) -> None:
            start.wait()
            for i in range(40):
                storage.set(f"user:{n}", {"i": i})
                assert storage.get(f"user:{n}") == {"i": i}

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [storage.get(f"user:{n}") for n in range(8)] == [{"i": 39}] * 8

    def test_may_make_the_storage_at_the_same_time(self, folder: Path) -> None:
        start = threading.Barrier(4)

        def work(n: int) -> None:
            start.wait()
            with closing(DiskStorage(folder)) as storage:
                storage.set(f"user:{n}", {"n": n})

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with closing(DiskStorage(folder)) as storage:
            assert len(list(storage.keys())) == 4

    def test_a_write_that_waits_too_long_is_an_error(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
    ) -> None:
        monkeypatch.setattr(disk, "_TIMEOUT", 0.05)
        with closing(DiskStorage(folder, ttl=10)) as storage:
            storage.set("user:1", {"a": 1})
            clock.now += 1
            with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                for write in (
                    lambda: storage.set("user:1", {"a": 2}),
                    lambda: storage.save("user:1", record_of({"a": 2})),
                    lambda: storage.delete("user:1"),
                    lambda: storage.touch("user:1"),
                    lambda: storage.load("user:1"),
                ):
                    with pytest.raises(diskcache.Timeout):
                        write()
                assert storage.get("user:1") == {"a": 1}
            storage.set("user:1", {"a": 3})
            assert storage.get("user:1") == {"a": 3}


class TestProcesses:
    def test_share_a_folder(self, folder: Path) -> None:
        threads = [
            threading.Thread(target=run, args=("disk_counter.py", folder, name, 200))
            for name in ("one", "two")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with closing(DiskStorage(folder)) as storage:
            assert len(list(storage.keys())) == 400
            assert storage.get("two:199") == {"n": 199, "set": {"two"}}

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_may_fork(self, folder: Path) -> None:
        assert run("disk_forked.py", folder) == "fine\n"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_killed_at_any_moment_have_lost_nothing(self, folder: Path) -> None:
        assert int(run("disk_killed_writer.py", folder, 60, 1)) >= 30


class TestEntries:
    def test_tell_size_age_and_life(self, folder: Path, clock: Clock) -> None:
        with closing(DiskStorage(folder, ttl=1000)) as storage:
            for number in range(1500):
                storage.set(f"user:{number}", {"a": "Å"})
            clock.now += 300
            storage.set("user:\udc80", {"a": 1})
            storage.load("user:1")
            entries = {entry.key: entry for entry in storage.entries()}
            assert len(entries) == 1501
            assert entries["user:0"] == ("user:0", len('{"a":"Å"}'.encode()), 300, 700)
            # It was read, which starts its life anew; what it says is when it was written.
            assert entries["user:1"][2:] == (300, 1000)
            assert entries["user:\udc80"][1:] == (7, 0, 1000)
            clock.now += 701
            assert {entry.key for entry in storage.entries()} == {"user:1", "user:\udc80"}

    def test_pass_over_a_key_that_is_none(self, storage: DiskStorage, folder: Path) -> None:
        storage.set("user:1", {"a": 1})
        with closing(diskcache.Cache(str(folder))) as cache:
            cache[("a", 1)] = 1
        assert [entry.key for entry in storage.entries()] == ["user:1"]
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        assert sessions.forget(user=1) == 1
        assert list(storage.keys()) == []


def test_what_cannot_be_read_can_be_opened_to_be_removed(
    storage: DiskStorage, folder: Path
) -> None:
    with closing(diskcache.Cache(str(folder))) as cache:
        cache["user:1"] = ["a", "pickle"]
    with pytest.raises(SessionDecodeError):
        storage.open_record("user:1", 0)
    opened = storage.open_unread("user:1", 0)
    with closing(DiskStorage(folder)) as other, pytest.raises(SessionLockTimeoutError):
        other.open_unread("user:1", 0)
    opened.close(record_of({}))
    assert not storage.has("user:1")


def test_without_diskcache_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['diskcache'] = None\nimport session_sync.storages.disk"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: DiskStorage needs diskcache: pip install 'session-sync[disk]'"
