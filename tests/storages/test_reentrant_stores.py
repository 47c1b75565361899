"""Stores: an exception, or a call by a signal handler or a finaliser, comes into the middle of one.

None waits for its own thread, none loses what another one has stored, and no books are wrong.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cachetools
import pytest
from interruptions import OutsideError, everywhere, raise_outside

from session_sync import LruMemoryStorage, MemoryStorage, SessionDeadlockError, SQLiteStorage
from session_sync.storages import (
    background,
    connections,
    filelocks,
    locked_record,
    lockfile,
    memory,
    rows,
    sqlite,
)
from session_sync.storages.base import record_of

# What comes into a finaliser, Python writes on stderr and forgets.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Clock:
    """What memory.py takes for the module time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(memory, "time", clock)
    return clock


def fields(storage: MemoryStorage) -> dict[str, Any]:
    return {key: storage.get(key) for key in storage.keys()}


def use(storage: Any, key: str, **values: Any) -> None:
    """As a session does."""
    storage.load(key)
    if values:
        storage.save(key, record_of(values))
    if hasattr(storage, "unload"):
        storage.unload(key)


# -- memory


@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
def test_what_is_stored_in_the_middle_of_a_sweep_stays(
    make: Callable[..., MemoryStorage], clock: Clock
) -> None:
    """Though it has the key of what is swept, or comes in its place."""
    storage = make(ttl=10)

    def nested() -> None:
        use(storage, "old:0", a=2)
        use(storage, "alive")

    for interruption in everywhere(nested, memory):
        storage = make(ttl=10)
        for number in range(3):
            use(storage, f"old:{number}", a=1)
        clock.now += 9
        use(storage, "alive", a=1)
        clock.now += 2
        with interruption:
            storage.save("new", record_of({"a": 1}))
        expected = {"alive": {"a": 1}, "new": {"a": 1}}
        if interruption.happened:
            expected["old:0"] = {"a": 2}
        assert fields(storage) == expected
        clock.now += 20
        assert fields(storage) == {}
        assert storage._records == {}
        assert not storage._ages


@pytest.mark.parametrize("what", ["touch", "load", "get"])
@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
def test_what_is_stored_in_the_middle_of_a_read_stays(
    make: Callable[..., MemoryStorage], what: str, clock: Clock
) -> None:
    storage = make(ttl=10)
    storage.save("key", record_of({"a": 0}))
    count = 0

    def nested() -> None:
        nonlocal count
        count += 1
        storage.save("key", record_of({"a": count}))

    for interruption in everywhere(nested, memory):
        with interruption:
            getattr(storage, what)("key")
        assert storage.get("key") == {"a": count}


def test_an_exception_while_several_are_saved_leaves_all_as_they_were(clock: Clock) -> None:
    for ttl in (None, 10):
        for make in (MemoryStorage, LruMemoryStorage):
            storage = make(ttl=ttl)
            for interruption in everywhere(raise_outside, memory):
                before = {"one": {"a": 1}, "two": {"a": 1}}
                for key, values in before.items():
                    storage.set(key, values)
                storage.delete("three")
                records = {"one": record_of({"a": 2}), "two": record_of({})}
                records["three"] = record_of({"a": 2})
                failed = True
                with contextlib.suppress(OutsideError), interruption:
                    storage.save_all(records, {})
                    failed = False
                after = {"one": {"a": 2}, "three": {"a": 2}}
                assert fields(storage) == (before if failed else after)


@pytest.mark.parametrize("ttl", [None, 1000])
def test_an_exception_at_any_place_does_not_spoil_the_books(ttl: float | None) -> None:
    """cachetools counts what it has; a wrong count would refuse to store anything one day."""
    storage = LruMemoryStorage(3, ttl)
    storage.load("in use")
    storage.save("in use", record_of({"a": 1}))
    for interruption in everywhere(raise_outside, memory, cachetools):
        with contextlib.suppress(OutsideError), interruption:
            for number in range(5):
                use(storage, f"key:{number}", a=1)
            storage.delete("key:3")
        for number in range(5):
            storage.unload(f"key:{number}")  # as a scope does that has failed
    for number in range(10):
        use(storage, f"later:{number}", a=1)
    assert list(fields(storage)) == ["in use", "later:7", "later:8", "later:9"]


@pytest.mark.parametrize("ttl", [None, 1000])
def test_a_nested_call_at_any_place_does_not_spoil_the_books(ttl: float | None) -> None:
    storage = LruMemoryStorage(3, ttl)
    storage.load("in use")
    storage.save("in use", record_of({"a": 1}))
    count = 0

    def nested() -> None:
        nonlocal count
        count += 1
        use(storage, "nested", a=count)
        storage.load("abandoned")
        storage.unload("abandoned")  # as a finaliser does

    for interruption in everywhere(nested, memory, cachetools):
        with interruption:
            for number in range(4):
                use(storage, f"key:{number}", a=1)
            storage.delete("key:3")
            if interruption.happened and storage.has("nested"):
                assert storage.get("nested") == {"a": count}
        use(storage, "last", a=1)
        assert storage.has("in use")
        assert len(fields(storage)) <= 4
    for number in range(10):
        use(storage, f"later:{number}", a=1)
    assert list(fields(storage)) == ["in use", "later:7", "later:8", "later:9"]


def test_the_least_recently_used_goes_and_what_came_in_between_does_not() -> None:
    """A nested call that uses the one that is about to go."""
    saved = 0

    def nested() -> None:
        nonlocal saved
        saved += 1
        use(storage, "first", a=saved)

    for interruption in everywhere(nested, memory, cachetools):
        storage = LruMemoryStorage(2)
        use(storage, "first", a=0)
        use(storage, "second", a=0)
        with interruption:
            use(storage, "third", a=0)
        if interruption.happened:
            assert storage.get("first") == {"a": saved}


# -- files


@pytest.fixture(params=["sqlite", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    made = []

    def make() -> Any:
        if request.param == "sqlite":
            made.append(SQLiteStorage(tmp_path / "s.db", ttl=1000))
        else:
            pytest.importorskip("diskcache", reason="needs the extra 'disk'")
            from session_sync import DiskStorage

            made.append(DiskStorage(tmp_path / "sessions", ttl=1000))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def here(storage: Any) -> tuple[Any, ...]:
    if isinstance(storage, SQLiteStorage):
        return (sqlite, rows, connections, filelocks, lockfile, locked_record)
    import diskcache

    from session_sync.storages import disk

    return (disk, rows, connections, filelocks, lockfile, locked_record, diskcache.core)


def update(storage: Any) -> None:
    opened = storage.open_record("key", 0)
    opened.save(record_of({"a": 2}))
    opened.close(record_of({"a": 3}))
    storage.touch("key")
    storage.delete("gone")


def short_waits(monkeypatch: pytest.MonkeyPatch, storage: Any) -> None:
    """For the writes of others; of a storage that has not connected yet."""
    for module in here(storage):
        if hasattr(module, "_TIMEOUT"):
            monkeypatch.setattr(module, "_TIMEOUT", 0.05)


def test_an_exception_at_any_place_leaves_the_file_to_others(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_waits(monkeypatch, make())
    storage, other = make(), make()
    for interruption in everywhere(raise_outside, *here(storage)):
        other.set("key", {"a": 1})
        error = None
        try:
            with interruption:
                update(storage)
        except OutsideError as outside:
            error = outside  # what its frames have stays: an unfinished read, say
        assert other.get("key") in ({"a": 1}, {"a": 2}, {"a": 3})
        other.set("key", {"a": 4})
        assert storage.get("key") == {"a": 4}
        del error
        storage.set("key", {"a": 5})
        assert other.get("key") == {"a": 5}
        other.open_record("key", 0).close(None)


def test_an_exception_while_several_are_saved_leaves_no_transaction_open(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_waits(monkeypatch, make())
    storage, other = make(), make()
    for interruption in everywhere(raise_outside, *here(storage)):
        other.set("one", {"a": 1})
        other.set("two", {"a": 1})
        with contextlib.suppress(OutsideError), interruption:
            storage.save_all({"one": record_of({"a": 2}), "two": record_of({"a": 2})}, {})
        assert (other.get("one"), other.get("two")) in (
            ({"a": 1}, {"a": 1}),
            ({"a": 2}, {"a": 2}),
        )
        storage.set("two", {"a": 3})
        assert other.get("two") == {"a": 3}


def test_what_a_nested_call_has_stored_is_not_undone(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither with a transaction beneath it, nor otherwise; it may fail, as long as it says so."""
    short_waits(monkeypatch, make())
    storage, other = make(), make()
    stored = count = 0

    def nested() -> None:
        nonlocal stored, count
        count += 1
        with contextlib.suppress(Exception):  # the file is locked by the one beneath
            storage.set("nested", {"a": count})
            stored = count
        raise OutsideError

    storage.set("nested", {"a": 0})
    for interruption in everywhere(nested, *here(storage)):
        with contextlib.suppress(OutsideError), interruption:
            storage.save_all({"one": record_of({"a": 2}), "two": record_of({"a": 2})}, {})
        assert other.get("nested") == {"a": stored}
    assert 0 < stored <= count


def test_a_nested_deletion_does_not_wait_for_its_own_thread(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_waits(monkeypatch, make())
    storage = make()

    def nested() -> None:
        with contextlib.suppress(SessionDeadlockError):
            storage.delete("nested")

    for interruption in everywhere(nested, *here(storage)):
        with interruption:
            storage.save_all({"one": record_of({"a": 2}), "two": record_of({"a": 2})}, {})


def test_a_nested_session_that_is_only_read_does_not_wait_for_its_own_thread(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its life time has to be started anew."""
    short_waits(monkeypatch, make())
    storage = make()
    storage.set("nested", {"a": 1})

    def nested() -> None:
        assert storage.get("nested") == {"a": 1}
        storage.touch("nested")

    for interruption in everywhere(nested, *here(storage)):
        with interruption:
            storage.save_all({"one": record_of({"a": 2}), "two": record_of({"a": 2})}, {})


def test_a_nested_session_at_any_place(make: Callable[[], Any]) -> None:
    storage, other = make(), make()
    count = 0

    def nested() -> None:
        nonlocal count
        count += 1
        other.set("theirs", {"a": count})  # in between: what is just being read is older
        assert storage.get("theirs") == {"a": count}
        opened = storage.open_record("nested", 0)
        opened.close(record_of({"a": count}))
        other.set("theirs", {"a": -count})
        storage.save_all({"one": record_of({"a": count}), "two": record_of({"a": count})}, {})

    for interruption in everywhere(nested, *here(storage)):
        with interruption:
            update(storage)
        assert other.get("key") == {"a": 3}
    for key in ("nested", "one", "two"):
        assert other.get(key) == {"a": count}


def test_a_nested_fork_at_any_place_waits_for_nobody(make: Callable[[], Any]) -> None:
    """Not for the connection that its own thread is using, above all."""
    storage, other = make(), make()

    def nested() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    for interruption in everywhere(nested, *here(storage)):
        with contextlib.suppress(sqlite3.ProgrammingError), interruption:
            storage.set("key", {"a": 1})
            assert storage.get("key") == {"a": 1}
        storage.set("key", {"a": 2})
        assert other.get("key") == {"a": 2}


def test_a_statement_that_a_nested_fork_has_cut_off_is_done_again(tmp_path: Path) -> None:
    storage = SQLiteStorage(tmp_path / "s.db")

    def nested() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    for interruption in everywhere(nested, sqlite, rows, connections):
        storage.get("key")  # which has a connection
        with interruption:
            storage.set("key", {"a": 1})
            assert storage.get("key") == {"a": 1}
    storage.close()


def test_a_fork_hook_that_is_interrupted_shuts_out_nobody(tmp_path: Path) -> None:
    storages = [SQLiteStorage(tmp_path / f"{number}.db") for number in range(2)]
    for interruption in everywhere(raise_outside, connections, background):
        with contextlib.suppress(OutsideError), interruption:
            background.for_each(connections._all, connections.Connections.shut)
        background.for_each(connections._all, connections.Connections.open_again)
        for storage in storages:
            storage.set("key", {"a": 1})
    for storage in storages:
        storage.close()
