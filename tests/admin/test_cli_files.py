"""The command line and the files of a store: who may read them, what is made, and backups."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import SessionManager, SQLiteStorage, storage_from_url

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")

from cli_tools import READING, Done, Terminal, at_once, environment, piped

from session_sync.admin.cli.app import app
from session_sync.admin.cli.files import new_file

AS_ANOTHER = [sys.executable, "-W", "error", str(Path(__file__).with_name("unprivileged.py"))]
KINDS = pytest.mark.parametrize("kind", ["sqlite", "disk"])


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users can get to, unlike pytest's."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    for each in [made, *made.rglob("*")]:
        if each.is_dir():
            each.chmod(0o700)
    shutil.rmtree(made)


def made(kind: str, folder: Path) -> tuple[str, Any]:
    """A store of one session in a folder of its own, and its URL."""
    if kind == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    (folder / "bot").mkdir()
    url = f"{kind}:///{folder / 'bot'}" + "/sessions.db" * (kind == "sqlite")
    storage: Any = storage_from_url(url)
    storage.set("user:7", {"counter": 1})
    return url, storage


def as_another(*arguments: str, url: str) -> Done:
    """Run a command as somebody who has no right to write, and may be another user."""
    done = subprocess.run(
        [*AS_ANOTHER, *arguments],
        capture_output=True,
        env=environment(url),
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def files_in(folder: Path) -> dict[str, bytes]:
    """What lies there, without the index of SQLite's log, in which readers are noted."""
    files = (each for each in folder.rglob("*") if each.is_file())
    return {str(each): b"" if each.name.endswith("-shm") else each.read_bytes() for each in files}


# -- rights


@KINDS
def test_a_store_that_may_not_be_seen_is_not_said_to_be_missing(kind: str, folder: Path) -> None:
    url, storage = made(kind, folder)
    storage.close()
    (folder / "bot").chmod(0o700 if os.geteuid() == 0 else 0o000)
    calls: list[Callable[[], Done]] = [
        lambda command=command: as_another(*command, url=url)  # type: ignore[misc]
        for command in (*READING, ("backup", str(folder / "copy.db")))
    ]
    for done in at_once(*calls):
        assert done.code == 4, done
        said, *rest = done.err.splitlines()
        assert f"permission denied: {folder / 'bot'} may not be looked into" in said
        assert "run this command as the user whose bot it is" in said
        assert not any(line.startswith("session-sync") for line in rest)  # coverage may complain


@KINDS
def test_a_file_that_may_not_be_read_is_named(kind: str, folder: Path) -> None:
    url, storage = made(kind, folder)
    storage.close()
    (folder / "bot").chmod(0o755)
    database = folder / "bot" / ("sessions.db" if kind == "sqlite" else "cache.db")
    database.chmod(0o600 if os.geteuid() == 0 else 0o000)
    done = as_another("ls", url=url)
    assert (done.code, done.out) == (4, "")
    assert f"permission denied: {database} may not be read" in done.err


@KINDS
@pytest.mark.parametrize("bot", ["runs", "has stopped"])
def test_who_only_looks_needs_no_right_to_write_and_makes_no_file(
    kind: str, bot: str, folder: Path
) -> None:
    url, storage = made(kind, folder)
    if bot == "has stopped":
        storage.close()
    for each in (folder / "bot").iterdir():
        each.chmod(0o444)
    (folder / "bot").chmod(0o555)
    before = files_in(folder)
    ls, show, export, stats, doctor, forget, rm = at_once(
        lambda: as_another("ls", url=url),
        lambda: as_another("show", "user:7", "--values", url=url),
        lambda: as_another("export", url=url),
        lambda: as_another("stats", url=url),
        lambda: as_another("doctor", url=url),
        lambda: as_another("forget", "--user", "7", "--dry-run", url=url),
        lambda: as_another("rm", "-y", "user:7", url=url),
    )
    assert (ls.code, ls.lines) == (0, ["user:7"])
    assert (show.code, show.lines) == (0, ["counter\tint\t\t1"])
    assert (export.code, export.lines) == (0, ['{"key":"user:7","fields":{"counter":1}}'])
    assert (stats.code, stats.lines[0]) == (0, "sessions\t1")
    assert "ok\tsessions\t1 can be read" in doctor.lines
    assert (forget.code, forget.lines) == (0, ["user:7"])
    assert (rm.code, rm.out) == (4, "")
    assert "permission denied" in rm.err
    assert "may not be changed" in rm.err
    assert files_in(folder) == before
    storage.close()


@KINDS
def test_a_change_where_the_folder_may_not_be_written_names_the_folder(
    kind: str, folder: Path
) -> None:
    url, storage = made(kind, folder)
    storage.close()
    for each in (folder / "bot").iterdir():
        each.chmod(0o666)
    (folder / "bot").chmod(0o555)
    before = files_in(folder)
    done = as_another("set", "user:7", "counter", "2", url=url)
    assert done.code == 4
    assert f"permission denied: {folder / 'bot'} may not be written to" in done.err
    assert files_in(folder) == before


@KINDS
def test_looking_makes_nothing_and_repairs_nothing(kind: str, folder: Path) -> None:
    """Also as the owner."""
    url, storage = made(kind, folder)
    storage.close()
    (folder / "bot").chmod(0o750)
    before = files_in(folder)
    done = at_once(*(lambda command=command: piped(*command, url=url) for command in LOOKING))  # type: ignore[misc]
    assert [each.code for each in done] == [0, 0, 0, 0, 1 if kind == "disk" else 0]
    assert files_in(folder) == before
    assert stat.S_IMODE((folder / "bot").stat().st_mode) == 0o750


LOOKING = [("ls",), ("show", "user:7"), ("export",), ("stats",), ("doctor",)]


def test_a_bot_that_starts_and_stops_while_somebody_looks_is_seen(folder: Path) -> None:
    url, storage = made("sqlite", folder)
    storage.close()
    with Terminal("watch", "user:7", "--interval", "0.05", url=url) as terminal:
        terminal.read_until("new  counter")
        storage.set("user:7", {"counter": 2, "first": 1})
        terminal.read_until("new  first")
        storage.close()
        storage.set("user:7", {"counter": 2, "first": 1, "second": 2})
        storage.close()
        terminal.read_until("new  second")


def test_by_a_link_the_newest_is_seen_too(tmp_path: Path) -> None:
    with closing(SQLiteStorage(tmp_path / "bot" / "sessions.db")) as storage:
        storage.set("user:7", {"counter": 1})
        (tmp_path / "link.db").symlink_to(tmp_path / "bot" / "sessions.db")
        link = f"sqlite:///{tmp_path}/link.db"
        listed, backup = at_once(
            lambda: piped("ls", url=link),
            lambda: piped("backup", str(tmp_path / "backup.db"), url=link),
        )
    assert (listed.code, listed.lines, backup.code) == (0, ["user:7"], 0)
    with closing(SQLiteStorage(tmp_path / "backup.db")) as copy:
        assert copy.get("user:7") == {"counter": 1}


# -- files of others


@pytest.mark.parametrize("mode", ["delete", "wal", "killed"])
def test_no_command_touches_another_programs_file(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(f"PRAGMA journal_mode = {'wal' if mode == 'killed' else mode}")
        other.execute("CREATE TABLE theirs (a)")
    if mode == "killed":
        Path(f"{path}-wal").write_bytes(b"what is left of its log")
    before = files_in(tmp_path)
    url = f"sqlite:///{path}"
    calls: list[Callable[[], Done]] = [
        lambda command=command: piped(*command, url=url)  # type: ignore[misc]
        for command in (*READING, ("backup", str(tmp_path / "copy.db")))
    ]
    for done in at_once(*calls):
        assert done.code == 2, done
        assert f"{path} is a database of another program" in done.err
    with pytest.raises(ValueError, match="is a database of another program"):
        SQLiteStorage(path)
    assert files_in(tmp_path) == before


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_bytes(b"this is no database" * 100)
    (tmp_path / "empty.db").touch()
    before = files_in(tmp_path)
    wrong, empty = at_once(
        lambda: piped("ls", url=f"sqlite:///{path}"),
        lambda: piped("ls", url=f"sqlite:///{tmp_path}/empty.db"),
    )
    assert (wrong.code, empty.code) == (4, 4)
    assert f"{path} cannot be read: file is not a database" in wrong.err
    assert "the file is empty" in empty.err
    assert files_in(tmp_path) == before


@KINDS
def test_rows_whose_key_is_no_text_stop_nothing_and_are_reported(kind: str, folder: Path) -> None:
    url, storage = made(kind, folder)
    storage.close()
    bad = b"\xff\xfe\x1b]0;x\x07"
    database = folder / "bot" / ("sessions.db" if kind == "sqlite" else "cache.db")
    with closing(sqlite3.connect(database)) as file:
        for key in (bad, "CAST"):
            value = "CAST(? AS TEXT)" if key == "CAST" else "?"
            if kind == "sqlite":
                statement = f"INSERT INTO sessions VALUES ({value}, x'7b7d', NULL)"
            else:
                statement = (
                    f"INSERT INTO Cache (key, raw, store_time, access_time, mode, value) "
                    f"VALUES ({value}, 1, 1, 1, 1, x'7b7d')"
                )
            file.execute(statement, (bad,))
        if kind == "disk":  # a key that would be unpickled
            file.execute(
                "INSERT INTO Cache (key, raw, store_time, access_time, mode, value) "
                "VALUES (x'80054b012e', 0, 1, 1, 1, x'7b7d')"
            )
        file.commit()
    ls, export, stats, doctor = at_once(
        lambda: piped("ls", url=url),
        lambda: piped("export", url=url),
        lambda: piped("stats", url=url),
        lambda: piped("doctor", url=url),
    )
    number = 2 if kind == "sqlite" else 3
    assert (ls.code, ls.lines) == (0, ["user:7"])
    assert (export.code, len(export.lines)) == (0, 1)
    assert (stats.code, stats.lines[0]) == (0, "sessions\t1")
    assert doctor.code == 1
    assert f"keys that no session has, which session_sync has not written: {number}" in doctor.out
    assert "ok\tsessions\t1 can be read" in doctor.lines
    for done in (ls, export, stats, doctor):
        assert "\x1b" not in done.out + done.err


# -- the doctor


@KINDS
def test_the_doctor_lists_the_sessions_that_are_open(kind: str, folder: Path) -> None:
    url, storage = made(kind, folder)
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    storage.set("user:8", {"counter": 1})
    with sessions.session_scope("user:8"):
        opened, of_prefix = at_once(
            lambda: piped("doctor", url=url),
            lambda: piped("doctor", "--prefix", "user:", url=url),
        )
    assert "ok\tlocks\t1 stored sessions are open now: user:8" in opened.lines
    assert "ok\tlocks\t1 stored sessions are open now: 8" in of_prefix.lines
    assert "ok\tlocks\t0 stored sessions are open now" in piped("doctor", url=url).lines
    storage.close()
    locks = folder / "bot" / ("sessions.db-locks" if kind == "sqlite" else "locks")
    locks.unlink()
    assert "locks" not in piped("doctor", url=url).out


@KINDS
@pytest.mark.parametrize("to", ["a file", "nothing"])
def test_the_doctor_reports_links_among_the_files_of_a_store(
    kind: str, to: str, folder: Path
) -> None:
    url, storage = made(kind, folder)
    storage.close()
    if to == "a file":
        (folder / "victim").touch(0o644)
    locks = folder / "bot" / ("sessions.db-locks" if kind == "sqlite" else "locks")
    locks.unlink(missing_ok=True)
    before = piped("doctor", url=url)
    (folder / "bot" / "other").symlink_to(folder / "victim")
    noted = piped("doctor", url=url)
    locks.symlink_to(folder / "victim")
    wrong = piped("doctor", url=url)
    note = f"note\tlinks\t{folder / 'bot' / 'other'} is a link, which the store does not use"
    assert (before.code, noted.code, wrong.code) == (0, 0, 1)
    assert "links" not in before.out
    assert (note in noted.lines) == (kind == "disk")  # a SQLite store has no folder of its own
    assert (
        f"wrong\tlinks\t{locks} is a link in the place of a file of the store; remove it"
        in wrong.lines
    )
    for done in (before, noted, wrong):
        assert "ok\tpermissions\tonly the owner may read the files" in done.lines
        assert "ok\tsessions\t1 can be read" in done.lines


@KINDS
def test_the_doctor_looks_at_the_files_to_which_a_link_leads(kind: str, folder: Path) -> None:
    _url, storage = made(kind, folder)
    name = "sessions.db" if kind == "sqlite" else "cache.db"
    (folder / "bot" / f"{name}-wal").chmod(0o644)
    link = folder / "link"
    link.symlink_to(folder / "bot" / name if kind == "sqlite" else folder / "bot")
    done = piped("doctor", url=f"{kind}:///{link}")
    storage.close()
    assert done.code == 1
    assert f"{name}-wal: mode 0644; chmod 600" in done.out
    assert "links" not in done.out


@KINDS
def test_a_file_that_disappears_while_the_doctor_looks_is_passed_over(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite removes its log when the last bot ends."""
    url, storage = made(kind, folder)
    lstat, logs = os.lstat, list((folder / "bot").glob("*-wal"))
    assert len(logs) == 1

    def lstat_later(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("-wal"):
            storage.close()
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", lstat_later)
    with pytest.raises(SystemExit) as end:
        app(["doctor", "-s", url], prog_name="session-sync")
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (0, "")
    assert "only the owner may read the files" in said.out
    assert not logs[0].exists()


# -- backups


def test_a_backup_is_one_private_file_of_one_moment_while_a_bot_writes(
    tmp_path: Path, threads: Threads
) -> None:
    url = f"sqlite:///{tmp_path}/bot/sessions.db"
    target = tmp_path / "backup.db"
    target.write_bytes(b"an older one")
    target.chmod(0o644)
    storage: Any = storage_from_url(url)
    for number in range(200):
        storage.set(f"user:{number}", {"text": "x" * 10_000})
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    done = threading.Event()
    written = threading.Event()

    def write() -> None:
        while not done.is_set():
            with sessions.session_scopes("a", "b") as (a, b):
                a.n = b.n = a.get("n", 0) + 1
            written.set()

    # What the bot writes stays in the log for as long as somebody reads what was there before.
    reader = sqlite3.connect(tmp_path / "bot" / "sessions.db", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM sessions").fetchall() == [(200,)]
    threads.start(write)
    assert written.wait(30)
    saved = storage.get("a")["n"]
    old_mask = os.umask(0)
    try:
        backup = piped("backup", str(target), url=url)
    finally:
        os.umask(old_mask)
        done.set()
    threads.join()
    reader.close()
    assert (backup.code, backup.out) == (0, "")
    assert f"written to {target}" in backup.err
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["backup.db"]
    # As another machine gets it: the file alone.
    (tmp_path / "new").mkdir()
    shutil.copy(target, tmp_path / "new" / "sessions.db")
    with closing(SQLiteStorage(tmp_path / "new" / "sessions.db")) as copy:
        assert sum(1 for _ in copy.keys()) == 202
        a, b = copy.get("a"), copy.get("b")
        assert a == b
        assert a is not None
        assert saved <= a["n"] <= storage.get("a")["n"]
    storage.close()


def test_a_backup_of_a_store_whose_bot_was_killed_has_everything(tmp_path: Path) -> None:
    path, target = tmp_path / "bot" / "sessions.db", tmp_path / "backup.db"
    program = f"""
import os, signal
from session_sync import SQLiteStorage
storage = SQLiteStorage({str(path)!r})
for number in range(50):
    storage.set(f"user:{{number}}", {{"n": number}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=False)
    assert piped("backup", str(target), url=f"sqlite:///{path}").code == 0
    with closing(SQLiteStorage(target)) as copy:
        assert sum(1 for _ in copy.keys()) == 50


def test_a_bot_that_has_itself_backed_up_by_another_process_loses_nothing(tmp_path: Path) -> None:
    """Unlike one that copies its file: closing that drops SQLite's locks."""
    path = tmp_path / "sessions.db"
    program = f"""
import os, subprocess, sys
from session_sync import SessionManager, SQLiteStorage
def count():
    for _ in range(5):
        with sessions.session_scope("user:1") as session:
            session.n = session.get("n", 0) + 1
sessions = SessionManager(storage=SQLiteStorage({str(path)!r}))
count()
command = [sys.executable, "-m", "session_sync", "-s", "sqlite:///{path}"]
subprocess.run([*command, "backup", {str(tmp_path / "backup.db")!r}], check=True)
subprocess.run([*command, "rm", "-y", "user:2"])
count()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True, timeout=60)
    for file, expected in ((path, 10), (tmp_path / "backup.db", 5)):
        with closing(SQLiteStorage(file)) as storage:
            assert storage.get("user:1") == {"n": expected}


def test_a_backup_takes_the_place_of_no_store(tmp_path: Path) -> None:
    url, other = f"sqlite:///{tmp_path}/sessions.db", tmp_path / "other.db"
    storages: list[Any] = [storage_from_url(url), SQLiteStorage(other)]
    for storage in storages:
        storage.set("user:1", {"n": 1})
    (tmp_path / "link.db").symlink_to(tmp_path / "sessions.db")
    itself, by_link, in_use, folder = at_once(
        lambda: piped("backup", str(tmp_path / "sessions.db"), url=url),
        lambda: piped("backup", str(tmp_path / "link.db"), url=url),
        lambda: piped("backup", str(other), url=url),
        lambda: piped("backup", str(tmp_path), url=url),
    )
    assert [each.code for each in (itself, by_link, in_use, folder)] == [2, 2, 1, 2]
    assert "is the store itself" in itself.err
    assert "is the store itself" in by_link.err
    assert "other.db-wal is beside it" in in_use.err
    assert "give the name of the file" in folder.err
    for storage in storages:
        assert storage.get("user:1") == {"n": 1}
        storage.close()


@pytest.mark.parametrize("to", ["a file", "nothing", "another folder"])
def test_a_planted_link_is_not_written_through(to: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sessions.db"
    with closing(SQLiteStorage(tmp_path / "sessions.db")) as storage:
        storage.set("user:1", {"n": 1})
    victim = tmp_path / "home" / "victim"
    victim.parent.mkdir()
    if to == "a file":
        victim.write_text("something of root's")
    link = tmp_path / "shared" / "copy"
    link.parent.mkdir()
    link.symlink_to(victim.parent if to == "another folder" else "../home/victim")
    before = files_in(tmp_path)
    backup, export = at_once(
        lambda: piped("backup", str(link), url=url), lambda: piped("export", str(link), url=url)
    )
    assert backup.code == 2
    assert f"{link} is a link, to " in backup.err
    assert "Give the name of the file itself" in backup.err
    if to == "another folder":
        assert export.code == 4
        assert "Is a directory" in export.err
    else:
        assert (export.code, export.err) == (2, backup.err)
    assert link.is_symlink()
    assert files_in(tmp_path) == before


def test_a_link_that_is_planted_meanwhile_is_replaced(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "copy"
    victim.write_text("something of root's")
    with new_file(str(target)) as unfinished:
        target.symlink_to(victim)
        Path(unfinished).write_text("the copy")
    assert not target.is_symlink()
    assert target.read_text() == "the copy"
    assert victim.read_text() == "something of root's"


def test_a_folder_on_the_way_may_be_a_link_and_an_export_may_go_to_a_pipe(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sessions.db"
    with closing(SQLiteStorage(tmp_path / "sessions.db")) as storage:
        storage.set("user:1", {"n": 1})
    (tmp_path / "disk").mkdir()
    (tmp_path / "backups").symlink_to("disk")
    backup, export, stdout = at_once(
        lambda: piped("backup", f"{tmp_path}/backups/copy.db", url=url),
        lambda: piped("export", "copy.jsonl", url=url, cwd=tmp_path / "backups"),
        lambda: piped("export", "/dev/stdout", url=url),
    )
    assert [each.code for each in (backup, export, stdout)] == [0, 0, 0]
    assert sorted(each.name for each in (tmp_path / "disk").iterdir()) == ["copy.db", "copy.jsonl"]
    assert stdout.lines == ['{"key":"user:1","fields":{"n":1}}']


def test_a_backup_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    path, target = tmp_path / "sessions.db", tmp_path / "backup.db"
    with closing(SQLiteStorage(path)) as storage:
        for number in range(50):
            storage.set(f"user:{number}", {"text": "x" * 10_000})
    target.write_text("the older one")
    before = sorted(each.name for each in tmp_path.iterdir())
    with open(path, "r+b") as file:
        file.truncate(20_000)
    done = piped("backup", str(target), url=f"sqlite:///{path}")
    assert done.code == 4, done
    assert target.read_text() == "the older one"
    assert sorted(each.name for each in tmp_path.iterdir()) == before


def test_a_backup_of_another_store_says_how_to_make_one(tmp_path: Path) -> None:
    pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    storage: Any = storage_from_url(f"disk:///{tmp_path}/bot")
    storage.close()
    target = str(tmp_path / "backup.db")
    disk, redis, memory = at_once(
        lambda: piped("backup", target, url=f"disk:///{tmp_path}/bot"),
        lambda: piped("backup", target, url="redis://:s3cr3t@localhost:1"),
        lambda: piped("backup", target, url="memory://"),
    )
    assert [each.code for each in (disk, redis, memory)] == [2, 2, 2]
    assert "session-sync copy URL sqlite:///backup.db" in disk.err
    assert "BGSAVE" in redis.err
    assert "session-sync export" in redis.err
    assert "s3cr3t" not in redis.err
    assert not Path(target).exists()
