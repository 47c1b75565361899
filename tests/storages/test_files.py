"""The files of a store: whose they are, who may read them, and which of them a path names."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Threads, add_by_two
from waiting import until

from session_sync import (
    DiskStorage,
    SessionConflictError,
    SessionDeadlockError,
    SessionLockTimeoutError,
    SessionManager,
    SQLiteStorage,
)
from session_sync.storages import filelocks
from session_sync.storages.base import record_of
from session_sync.storages.ownership import look

pytestmark = pytest.mark.skipif(
    not filelocks.HAS_OFD, reason="this system has no locks between processes"
)
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away"
)
STRANGER = 12345


class Kind(NamedTuple):
    """A storage in files."""

    make: Callable[[Path], Any]  # given a folder that is its own
    data: str
    locks: str


KINDS = {
    "sqlite": Kind(lambda folder: SQLiteStorage(folder / "s.db"), "s.db", "s.db-locks"),
    "disk": Kind(DiskStorage, "cache.db", "locks"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=[0o000, 0o022, 0o777])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def is_free(storage: Any, key: str = "key") -> bool:
    try:
        storage.open_record(key, 0).close(None)
    except SessionLockTimeoutError:
        return False
    return True


# -- one store, many names


def test_two_links_to_one_store_lock_each_other_out(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("folder")
    with (
        closing(kind.make(tmp_path / "folder")) as one,
        closing(kind.make(tmp_path / "link")) as other,
    ):
        opened = one.open_record("key", 0)
        assert not is_free(other)
        opened.close(record_of({"a": 1}))
        assert is_free(other)
        assert other.get("key") == {"a": 1}


def test_a_block_inside_a_handler_of_a_second_object_is_refused_at_once(
    kind: Kind, tmp_path: Path
) -> None:
    """It would wait for the handler that it is in."""
    (tmp_path / "link").symlink_to("folder")
    with (
        SessionManager(storage=kind.make(tmp_path / "folder")) as one,
        SessionManager(storage=kind.make(tmp_path / "link")) as other,
    ):

        async def nested() -> None:
            async with one.session_scope("key"), other.session_scope("key"):
                raise AssertionError("both have it")

        with one.session_scope("key") as session:
            session.a = 1
            with (
                pytest.raises(
                    SessionDeadlockError,
                    match=r"thread holds 'key' and waits for it\. .* give one object",
                ),
                other.session_scope("key"),
            ):
                raise AssertionError("both have it")
            with other.session_scope("another") as session:
                session.a = 2
        with pytest.raises(SessionDeadlockError, match="task holds 'key' and waits for it"):
            asyncio.run(nested())
        assert one.storage.get("key") == {"a": 1}
        assert one.storage.get("another") == {"a": 2}


def test_updates_through_two_objects_lose_nothing(
    kind: Kind, tmp_path: Path, threads: Threads
) -> None:
    with (
        SessionManager(storage=kind.make(tmp_path)) as one,
        SessionManager(storage=kind.make(tmp_path)) as other,
    ):
        add_by_two(threads, one, other)


def test_a_link_to_the_file_itself_names_the_same_store(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "s.db").symlink_to(tmp_path / "shared" / "sessions.db")
    with (
        closing(SQLiteStorage(tmp_path / "release" / "s.db")) as linked,  # it is not there yet
        closing(SQLiteStorage(tmp_path / "shared" / "sessions.db")) as named,
    ):
        opened = linked.open_record("key", 0)
        assert not is_free(named)
        opened.close(record_of({"a": 1}))
        assert named.get("key") == {"a": 1}
        assert set(modes(tmp_path / "shared").values()) == {0o600}
        assert list(modes(tmp_path / "release")) == ["s.db"]


def test_a_folder_that_is_moved_is_the_same_store(kind: Kind, tmp_path: Path) -> None:
    with closing(kind.make(tmp_path / "old")) as before:
        opened = before.open_record("key", 0)
        (tmp_path / "old").rename(tmp_path / "new")
        with closing(kind.make(tmp_path / "new")) as after:
            assert not is_free(after)
            with pytest.raises(SessionConflictError, match="'key'"):
                opened.save(record_of({"a": 1}))
            opened.close(None)
            assert is_free(after)
            with pytest.raises(OSError, match="was moved, removed or replaced") as raised:
                before.open_record("key", 0)
            assert raised.value.errno == errno.ESTALE


def test_a_second_hard_link_is_refused(kind: Kind, tmp_path: Path) -> None:
    kind.make(tmp_path).close()
    os.link(tmp_path / kind.data, tmp_path.parent / f"{tmp_path.name}.copy")
    with pytest.raises(ValueError, match=rf"{kind.data} has 2 names \(hard links\)"):
        kind.make(tmp_path)


def test_what_a_killed_maker_has_left_is_removed(kind: Kind, tmp_path: Path) -> None:
    """It gives a file its name by a link, and was killed before it removed the first name."""
    kind.make(tmp_path).close()
    os.link(tmp_path / kind.data, tmp_path / f"{kind.data}-new-0123456789abcdef")
    kind.make(tmp_path).close()
    assert kind.data in modes(tmp_path)
    assert not list(tmp_path.glob("*-new-*"))


# -- the file of the locks goes away


def test_a_removed_file_of_locks_is_noticed_at_the_next_lock(kind: Kind, tmp_path: Path) -> None:
    with closing(kind.make(tmp_path)) as one:
        one.open_record("key", 0).close(None)
        (tmp_path / kind.locks).unlink()
        with closing(kind.make(tmp_path)) as other:
            opened = other.open_record("key", 0)
            assert not is_free(one)
            opened.close(record_of({"n": 1}))
            assert is_free(one)


def test_a_file_of_locks_that_is_removed_meanwhile_makes_no_two_owners(
    kind: Kind, tmp_path: Path
) -> None:
    with closing(kind.make(tmp_path)) as one:
        stale = one.open_record("key", 0)
        (tmp_path / kind.locks).unlink()
        with closing(kind.make(tmp_path)) as other:
            other.open_record("key", 0).close(record_of({"n": 1}))
            with pytest.raises(SessionConflictError, match="file of its lock was removed"):
                stale.close(record_of({"n": 5}))
            assert one.get("key") == {"n": 1}
            opened = one.open_record("key", 0)
            assert not is_free(other)
            opened.close(None)


def test_what_waits_in_a_removed_file_of_locks_goes_on_in_the_new_one(
    kind: Kind, tmp_path: Path, threads: Any
) -> None:
    with closing(kind.make(tmp_path)) as one, closing(kind.make(tmp_path)) as other:
        opened = one.open_record("key", 0)
        opened.save(record_of({"n": 1}))
        with pytest.raises(SessionLockTimeoutError):
            other.open_record("key", 0.01)  # a thread goes on waiting
        (tmp_path / kind.locks).unlink()
        third = kind.make(tmp_path)
        theirs = third.open_record("key", 0)
        found: list[Any] = []
        thread = threads.start(lambda: found.append(other.open_record("key", 20.0)))
        opened.close(None)
        theirs.close(record_of({"n": 2}))
        thread.join(20)
        assert found[0].record == {"n": 2}
        assert not is_free(third)
        found[0].close(record_of({"n": 3}))
        assert is_free(third)
        third.close()


def test_a_replaced_folder_is_noticed_and_nothing_is_written(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with closing(kind.make(folder)) as one:
        one.set("key", {"n": 1})
        opened = one.open_record("key", 0)
        folder.rename(tmp_path / "old")
        with closing(kind.make(folder)) as other:
            other.set("key", {"n": 2})
            with pytest.raises(SessionConflictError):
                opened.save(record_of({"n": 3}))
            opened.close(None)
            with pytest.raises(OSError, match="Put it back, or start this process anew"):
                one.open_record("key", 0)
            assert other.get("key") == {"n": 2}
            one.close()  # what is opened next is what is there
            assert one.get("key") == {"n": 2}


def test_a_copy_in_the_place_of_the_file_is_noticed(kind: Kind, tmp_path: Path) -> None:
    """Though its locks are the same: a backup that is put back under a running bot."""
    with closing(kind.make(tmp_path)) as storage:
        storage.set("key", {"n": 1})
        shutil.copy(tmp_path / kind.data, tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / kind.data)

        def looks() -> bool:
            try:
                storage.get("key")
            except OSError as error:
                return error.errno == errno.ESTALE
            return False

        until(looks)


def test_the_file_of_the_locks_says_what_it_is(kind: Kind, tmp_path: Path) -> None:
    with closing(kind.make(tmp_path)) as storage:
        storage.open_record("key", 0).close(None)
        text = (tmp_path / kind.locks).read_text()
        assert "session_sync" in text
        assert "Do not remove it" in text
        (tmp_path / kind.locks).write_text("")  # an old one
    with closing(kind.make(tmp_path)) as storage:
        storage.open_record("key", 0).close(None)
        assert (tmp_path / kind.locks).read_text() == text


# -- private files


@pytest.mark.usefixtures("_umask")
def test_all_folders_that_are_made_are_private(kind: Kind, tmp_path: Path) -> None:
    with closing(kind.make(tmp_path / "a" / "b" / "c")) as storage:
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        with sessions.session_scope("key") as session:
            session.a = 1
        for folder in ("a", "a/b", "a/b/c"):
            assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
        assert set(modes(tmp_path / "a" / "b" / "c").values()) == {0o600}
        assert kind.locks in modes(tmp_path / "a" / "b" / "c")


def test_existing_files_that_are_open_to_others_are_closed(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / kind.data).touch()
    (tmp_path / kind.locks).touch()
    for path in tmp_path.iterdir():
        path.chmod(0o666)
    with closing(kind.make(tmp_path)) as storage:
        storage.open_record("key", 0).close(record_of({"secret": 1}))
        assert set(modes(tmp_path).values()) == {0o600}


@needs_root
@pytest.mark.parametrize("which", ["data", "locks"])
def test_a_file_of_another_user_is_refused(kind: Kind, which: str, tmp_path: Path) -> None:
    planted = tmp_path / getattr(kind, which)
    planted.touch()
    planted.chmod(0o666)
    os.chown(planted, STRANGER, STRANGER)
    with pytest.raises(PermissionError, match=rf"{planted.name} belongs to another user .*12345"):
        kind.make(tmp_path)
    found = planted.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_size, found.st_uid) == (0o666, 0, STRANGER)


@pytest.mark.parametrize("to", ["a file", "nothing"])
@pytest.mark.parametrize("which", ["locks", "data-journal", "data-wal", "data-shm"])
def test_no_planted_link_is_followed(kind: Kind, which: str, to: str, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    folder.mkdir()
    if to == "a file":
        victim.touch()
        victim.chmod(0o644)
    name = kind.locks if which == "locks" else kind.data + which.removeprefix("data")
    (folder / name).symlink_to(victim)
    with pytest.raises(PermissionError, match=f"{name} is a link"):
        kind.make(folder)
    assert victim.exists() == (to == "a file")
    if victim.exists():
        assert stat.S_IMODE(victim.stat().st_mode) == 0o644
        assert victim.read_bytes() == b""


def test_a_link_in_the_place_of_the_locks_is_not_followed_later(kind: Kind, tmp_path: Path) -> None:
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    with closing(kind.make(folder)) as storage:
        storage.open_record("key", 0).close(None)
        (folder / kind.locks).unlink()
        (folder / kind.locks).symlink_to(victim)
        with pytest.raises(PermissionError, match=f"{kind.locks} is a link"):
            storage.open_record("key", 0)
        assert not victim.exists()


@needs_root
def test_a_folder_of_another_user_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.chown(tmp_path, STRANGER, STRANGER)
    with closing(DiskStorage(tmp_path)) as storage:
        storage.set("key", {"a": 1})
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
        assert set(modes(tmp_path).values()) == {0o600}


# -- files of other programs


class Other:
    """Another program, with a database that others may read."""

    def __init__(self, path: Path, journal: str) -> None:
        path.parent.chmod(0o755)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute(f"PRAGMA journal_mode = {journal}")
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._connection.execute("CREATE TABLE Settings (theirs)")
        self._connection.execute("CREATE TABLE theirs (a)")
        for each in path.parent.iterdir():
            each.chmod(0o644)

    def close(self) -> None:
        self._connection.close()


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The modes of a folder and its files, and what is in them, but for the index of a log."""
    found = {".": (folder.stat().st_mode, b"")}
    for each in folder.iterdir():
        data = b"" if each.name.endswith("-shm") else each.read_bytes()
        found[each.name] = each.stat().st_mode, data
    return found


@pytest.mark.parametrize("journal", ["delete", "persist", "wal"])
@pytest.mark.parametrize("other", ["runs", "has ended"])
def test_another_programs_database_is_refused_as_it_is(
    kind: Kind, journal: str, other: str, tmp_path: Path
) -> None:
    with closing(Other(tmp_path / kind.data, journal)) as program:
        if other == "has ended":
            program.close()
        elif journal == "wal":  # all that it has is in the log
            assert (tmp_path / kind.data).stat().st_size == 4096
        before = everything(tmp_path)
        with pytest.raises(ValueError, match=f"{kind.data} is a database of another program"):
            kind.make(tmp_path)
        assert everything(tmp_path) == before


def test_nothing_is_made_beside_the_log_of_a_program_that_was_killed(
    kind: Kind, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    with closing(sqlite3.connect(tmp_path / "theirs" / kind.data, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = wal")
        other.execute("CREATE TABLE theirs (a)")
        other.execute("PRAGMA wal_checkpoint").fetchall()
        other.execute("INSERT INTO theirs VALUES (1)")
        for end in ("", "-wal"):  # as a copy of them has it
            shutil.copy(tmp_path / "theirs" / f"{kind.data}{end}", tmp_path)
    (tmp_path / "theirs" / kind.data).unlink()
    (tmp_path / "theirs").rmdir()
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="is a database of another program"):
        kind.make(tmp_path)
    assert everything(tmp_path) == before


def test_what_is_no_database_keeps_its_mode(kind: Kind, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / kind.data).write_text("<html>" * 1000)
    (tmp_path / kind.data).chmod(0o644)
    before = everything(tmp_path)
    with pytest.raises(sqlite3.DatabaseError, match="file is not a database"):
        kind.make(tmp_path)
    assert everything(tmp_path) == before


def test_a_planted_link_is_refused_before_a_database_is_opened(kind: Kind, tmp_path: Path) -> None:
    Other(tmp_path / kind.data, "delete").close()
    (tmp_path / kind.locks).symlink_to(tmp_path / "victim")
    with pytest.raises(PermissionError, match=f"{kind.locks} is a link"):
        kind.make(tmp_path)


@pytest.mark.parametrize("index", [True, False], ids=["with its index", "without its index"])
def test_a_store_whose_bot_was_killed_is_closed_to_others_and_has_everything(
    kind: Kind, index: bool, tmp_path: Path
) -> None:
    made = "DiskStorage(path)" if kind.data == "cache.db" else "SQLiteStorage(path / 's.db')"
    program = f"""
import os, pathlib, signal
from session_sync import DiskStorage, SQLiteStorage
path = pathlib.Path({str(tmp_path)!r})
storage = {made}
storage.set("key", {{"a": 1}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    if not index:
        (tmp_path / f"{kind.data}-shm").unlink()
    for each in tmp_path.iterdir():
        each.chmod(0o644)
    with closing(kind.make(tmp_path)) as storage:
        assert storage.get("key") == {"a": 1}
        assert set(modes(tmp_path).values()) == {0o600}


def test_a_file_whose_maker_was_killed_while_it_wrote_its_first_pages_is_used(
    kind: Kind, tmp_path: Path
) -> None:
    kind.make(tmp_path).close()
    os.truncate(tmp_path / kind.data, 4096)  # of its pages, the first one is there
    journal = (0xD9D505F920A163D7).to_bytes(8, "big")
    for number in (0, 1, 0, 512, 4096):  # before, it had 0 pages
        journal += number.to_bytes(4, "big")
    (tmp_path / f"{kind.data}-journal").write_bytes(journal.ljust(512, b"\0"))
    with closing(kind.make(tmp_path)) as storage:
        storage.set("key", {"a": 1})
        assert storage.get("key") == {"a": 1}


def test_a_folder_whose_maker_was_killed_between_two_tables_is_used(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as maker:
        maker.execute("CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value)")
    with closing(DiskStorage(tmp_path)) as storage:
        storage.set("key", {"a": 1})
        assert storage.get("key") == {"a": 1}


@pytest.mark.parametrize("error", [sqlite3.DatabaseError, ValueError])
def test_a_look_at_a_file_that_is_just_written_is_taken_again(
    error: type[Exception], tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    path.touch()
    looks: list[str] = []

    def act(cursor: sqlite3.Cursor) -> int:
        looks.append("look")
        if len(looks) == 1:
            with closing(sqlite3.connect(path)) as other:
                other.execute("CREATE TABLE theirs (a)")
            raise error("half of it was read")
        return int(cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

    def fail_twice(_cursor: sqlite3.Cursor) -> int:
        """As what is read while the file is written, in less time than its clock tells apart."""
        looks.append("look")
        if len(looks) < 4:
            with open(path, "ab") as file:
                file.write(bytes(4096))
        if len(looks) < 5:
            raise error("half of it was read")
        return 1

    def fail_while_it_is_written_again(_cursor: sqlite3.Cursor) -> int:
        """The second time, after it had rested."""
        looks.append("look")
        if len(looks) == 2:
            with open(path, "ab") as file:
                file.write(bytes(4096))
        if len(looks) < 3:
            raise error("half of it was read")
        return 1

    def fail(_cursor: sqlite3.Cursor) -> None:
        looks.append("look")
        raise error("it is no database")

    assert (look(os.fspath(path), act), len(looks)) == (1, 2)
    assert (look(os.fspath(path), fail_twice), len(looks)) == (1, 5)
    looks.clear()
    assert (look(os.fspath(path), fail_while_it_is_written_again), len(looks)) == (1, 3)
    looks.clear()
    with pytest.raises(error, match="it is no database"):
        look(os.fspath(path), fail)
    assert len(looks) == 2  # it has not changed between


def test_a_file_that_is_written_all_the_time_is_not_looked_at_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.db"
    path.touch()
    monkeypatch.setattr("session_sync.storages.ownership._TRIES", 5)
    looks: list[str] = []

    def fail(_cursor: sqlite3.Cursor) -> None:
        looks.append("look")
        with open(path, "ab") as file:
            file.write(bytes(4096))
        raise sqlite3.DatabaseError("again")

    with pytest.raises(sqlite3.DatabaseError, match="again"):
        look(os.fspath(path), fail)
    assert len(looks) == 5


# -- where the system lacks something


def test_a_file_system_without_links_gets_a_private_file(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_paths: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with closing(kind.make(tmp_path / "folder")) as storage:
        storage.set("key", {"a": 1})
        assert modes(tmp_path / "folder")[kind.data] == 0o600
        assert not [name for name in os.listdir(tmp_path / "folder") if "-new-" in name]
    with closing(kind.make(tmp_path / "folder")) as storage:
        assert storage.get("key") == {"a": 1}


@pytest.mark.parametrize("lacks", ["O_PATH", "/proc"])
@pytest.mark.usefixtures("_umask")
def test_files_are_private_without(
    lacks: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chmod = os.chmod

    def chmod_without_proc(path: Any, mode: int, **options: Any) -> None:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        chmod(path, mode, **options)

    if lacks == "O_PATH":
        monkeypatch.delattr(os, "O_PATH")
    else:
        monkeypatch.setattr(os, "chmod", chmod_without_proc)
    with closing(kind.make(tmp_path / "folder")) as storage:
        storage.set("key", {"a": 1})
        assert set(modes(tmp_path / "folder").values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def test_a_folder_that_is_a_file_is_named(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises((FileExistsError, NotADirectoryError), match="file"):
        kind.make(tmp_path / "file" / "folder")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_another_process_makes_meanwhile_is_used(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def make_twice(path: Any, *args: Any, **named: Any) -> None:
        mkdir(path, *args, **named)
        mkdir(path, *args, **named)

    monkeypatch.setattr(os, "mkdir", make_twice)
    with closing(kind.make(tmp_path / "folder")) as storage:
        monkeypatch.undo()
        storage.set("key", {"a": 1})
        assert storage.get("key") == {"a": 1}
