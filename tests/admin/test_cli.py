"""The command line, as a process: on every store, piped and on a terminal."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import shlex
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from conftest import Threads
from hypothesis import given
from pages import DOCS, snippets
from values import KEPT, Money, money_from, money_to, same
from values import names as field_names
from values import sessions as sessions_of_values

from session_sync import Codec, Session, SessionManager, storage_from_url, ttl

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")

from session_sync.admin.cli.app import app
from session_sync.admin.cli.errors import Code
from session_sync.admin.cli.jsonl import CODEC, from_line, to_line

COMMAND = [sys.executable, "-W", "error", "-m", "session_sync"]
SECRET = "s3cr3t/pa$$"
#: Files that other libraries have written.
WRITTEN = Path(__file__).parents[1] / "data" / "importers"


class Done(NamedTuple):
    """How a process has ended, and what it has said."""

    code: int
    out: str
    err: str = ""

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.lines]


def environment(url: str | None = None) -> dict[str, str]:
    hidden = ("SESSION_SYNC_STORAGE", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    root = str(Path(__file__).parents[2])
    plain |= {
        "TERM": "xterm-256color",
        "PYTHONPATH": f"{root}{os.pathsep}{plain.get('PYTHONPATH', '')}",
    }
    return plain if url is None else {**plain, "SESSION_SYNC_STORAGE": url}


def piped(
    *arguments: str, url: str | None = None, typed: str | bytes = "", cwd: Path | None = None
) -> Done:
    """Run a command as a script does."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=typed.encode() if isinstance(typed, str) else typed,
        capture_output=True,
        env=environment(url),
        cwd=cwd,
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def at_once(*calls: Callable[[], Done]) -> list[Done]:
    """Several commands side by side, since they wait more than they compute."""
    with ThreadPoolExecutor(4) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


class Terminal:
    """A command on a terminal of 100 columns."""

    def __init__(self, *arguments: str, url: str | None = None) -> None:
        self.screen = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment(url), "COLUMNS": "100"},
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str) -> None:
        """Wait until `text` has come; fails after a while."""
        deadline = time.monotonic() + 30
        while text not in self.screen:
            assert self._read(deadline), f"ended, or hangs: {self.screen!r}"

    def end(self) -> Done:
        deadline = time.monotonic() + 30
        while self._read(deadline):
            pass
        return Done(self.process.wait(30), self.screen.replace("\r\n", "\n"))

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65_536)
        except OSError as error:  # how Linux says that nobody has the other end open
            if error.errno != errno.EIO:
                raise
            return False
        self.screen += data.decode()
        return bool(data)


def on_terminal(*arguments: str, url: str | None = None, typed: str = "") -> Done:
    """Run a command as an operator does."""
    with Terminal(*arguments, url=url) as terminal:
        terminal.type(typed)
        return terminal.end()


@pytest.fixture
def where(tmp_path: Path) -> Any:
    """The URL of a new store of a kind."""

    def url(kind: str, request: pytest.FixtureRequest) -> str:
        if kind == "redis":
            return f"{request.getfixturevalue('redis_url')}/0?prefix={uuid4().hex}:"
        if kind == "disk":
            pytest.importorskip("diskcache", reason="needs the extra 'disk'")
        return f"{kind}:///{tmp_path}/{uuid4().hex}"

    return url


@pytest.fixture(params=["sqlite", "disk", "redis"])
def url(request: pytest.FixtureRequest, where: Any) -> str:
    found: str = where(request.param, request)
    return found


#: For what has nothing to do with the kind of the store: one has to do, since a process takes time.
on_one = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
#: For the two kinds of locks: those of files, and those of Redis.
on_two = pytest.mark.parametrize("url", ["sqlite", "redis"], indirect=True)


@pytest.fixture
def storage(url: str) -> Iterator[Any]:
    some: Any = storage_from_url(url)
    yield some
    some.close()


@pytest.fixture
def sessions(storage: Any) -> SessionManager[Any]:
    """What a bot has: some sessions of two users."""
    manager: SessionManager[Any] = SessionManager(storage=storage)
    for key in ("user:7:chat:7", "user:7:chat:-100", "user:8:chat:-100"):
        with manager.session_scope(key) as session:
            session.counter = 1
            session.cart = {"items": [(1, "tea")]}
            session.code = ttl("1234", 900)
    return manager


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """A SQLite store with one session."""
    url = f"sqlite:///{tmp_path}/sessions.db"
    some: Any = storage_from_url(url)
    some.set("user:1", {"name": "Alex", "$ttl": {"name": [time.time() + 900, 900.0]}})
    some.close()
    return url


class Version2(Session):
    counter: int = 0
    migrations = {2: lambda fields: None}


# -- looking


@pytest.mark.usefixtures("sessions")
def test_ls_lists_keys_and_somebodys_keys(url: str) -> None:
    everything, of_both = at_once(
        lambda: piped("ls", url=url),
        lambda: piped("ls", "--user", "7", "--chat", "-100", "-s", url),
    )
    assert (everything.code, everything.err) == (0, "")
    assert sorted(everything.lines) == ["user:7:chat:-100", "user:7:chat:7", "user:8:chat:-100"]
    assert of_both.lines == ["user:7:chat:-100"]


@on_one
@pytest.mark.usefixtures("sessions")
def test_ls_in_its_forms(url: str) -> None:
    of_user, some, as_json, table, by_prefix = at_once(
        lambda: piped("ls", "--user", "7", url=url),
        lambda: piped("ls", "--limit", "1", url=url),
        lambda: piped("ls", "--chat", "-100", "--json", url=url),
        lambda: on_terminal("ls", url=url),
        lambda: piped("ls", "--prefix", "user:7:", url=url),
    )
    assert of_user.lines == ["user:7:chat:-100", "user:7:chat:7"]
    assert len(some.lines) == 1
    assert as_json.objects == [{"key": "user:7:chat:-100"}, {"key": "user:8:chat:-100"}]
    assert table.code == 0
    for word in ("thread", "user:8:chat:-100", "───"):
        assert word in table.out
    assert by_prefix.lines == ["chat:-100", "chat:7"]


@on_one
def test_a_key_is_never_taken_for_commands_of_a_terminal(url: str, storage: Any) -> None:
    storage.set("\x1b[2J\tA\n[red]:smile:", {"[b]\x07": "\x1b[2J"})
    plain, as_json, table, shown = at_once(
        lambda: piped("ls", url=url),
        lambda: piped("ls", "--json", url=url),
        lambda: on_terminal("ls", url=url),
        lambda: on_terminal("show", "\x1b[2J\tA\n[red]:smile:", "--values", url=url),
    )
    assert plain.out == "\\x1b[2J\\tA\\n[red]:smile:\n"
    assert as_json.objects == [{"key": "\x1b[2J\tA\n[red]:smile:"}]
    assert "\\x1b[2J\\tA\\n[red]:smile:" in table.out
    assert "[b]\\x07" in shown.out
    for done in (table, shown):
        assert "\x1b[2J" not in done.out


@pytest.mark.usefixtures("sessions")
def test_show_hides_values_unless_they_are_asked_for(url: str) -> None:
    plain, with_values = at_once(
        lambda: piped("show", "user:7:chat:7", url=url),
        lambda: piped("show", "user:7:chat:7", "--values", "--json", url=url),
    )
    assert plain.code == 0
    assert plain.lines[:2] == ["counter\tint\t", "cart\tdict\t"]
    assert "1234" not in plain.out
    (shown,) = with_values.objects
    assert shown["fields"]["cart"]["value"] == {"items": [{"$tuple": [1, "tea"]}]}
    assert 0 < shown["fields"]["code"]["expires_in"] <= 900


@on_one
@pytest.mark.usefixtures("sessions")
def test_show_in_its_forms(url: str, storage: Any) -> None:
    storage.set("user:9", {"gone": "x", "a": 1, "$ttl": {"gone": [1.0, 1.0]}, "$version": 3})
    table, as_json, values, missing, old = at_once(
        lambda: on_terminal("show", "user:7:chat:7", url=url),
        lambda: piped("show", "user:7:chat:7", "--json", url=url),
        lambda: piped("show", "user:7:chat:7", "--values", url=url),
        lambda: piped("show", "user:70", url=url),
        lambda: piped("show", "user:9", "--json", url=url),
    )
    for done in (table, as_json):
        assert done.code == 0
        assert "1234" not in done.out
        assert "tea" not in done.out
        assert "counter" in done.out
    assert "───" in table.out
    assert "15 min" in table.out
    name, kind, left, value = values.lines[2].split("\t")
    assert (name, kind, value) == ("code", "str", "'1234'")
    assert 0 < float(left) <= 900
    assert (missing.code, missing.out) == (1, "")
    assert missing.err == "session-sync: no session is stored under 'user:70'\n"
    assert old.objects == [
        {"key": "user:9", "version": 3, "fields": {"a": {"type": "int", "expires_in": None}}}
    ]


@pytest.mark.usefixtures("sessions")
def test_stats_count_and_measure(url: str, storage: Any) -> None:
    storage.set("large", {"a": "x" * 5000})
    before = list(storage.entries())
    (found,) = piped("stats", "--json", "--limit", "1", url=url).objects
    assert found["sessions"] == 4
    assert found["total"] == sum(entry.size for entry in before) > 5000
    assert [each["key"] for each in found["largest"]] == ["large"]
    assert sum(each["sessions"] for each in found["histogram"]) == 4
    assert len(found["oldest"]) == (0 if url.startswith("sqlite") else 1)


@on_one
@pytest.mark.usefixtures("sessions")
def test_stats_in_its_forms(url: str) -> None:
    plain, table = at_once(
        lambda: piped("stats", url=url),
        lambda: on_terminal("stats", url=url),
    )
    lines = [line.split("\t") for line in plain.lines]
    assert lines[0] == ["sessions", "3"]
    assert sum(int(line[2]) for line in lines if line[0] == "histogram") == 3
    assert "█" in table.out
    assert "Largest" in table.out


def test_the_oldest_is_the_one_that_was_left_alone_for_the_longest(url: str) -> None:
    some: Any = storage_from_url(f"{url}{'&' if '?' in url else '?'}ttl=1000")
    for key in ("old", "new"):
        some.set(key, {"a": 1})
    if url.startswith("sqlite"):
        with sqlite3.connect(url[len("sqlite:///") :]) as file:
            file.execute("UPDATE sessions SET expires = expires - 500 WHERE key = 'old'")
        file.close()
    elif url.startswith("disk"):
        with sqlite3.connect(url[len("disk:///") :] + "/cache.db") as file:
            file.execute("UPDATE Cache SET store_time = store_time - 500 WHERE key = 'old'")
        file.close()
    else:
        import redis

        with redis.Redis.from_url(url.partition("?")[0]) as client:
            # What nobody has used for ages, as a restart of the server would bring it in.
            name = f"{url.partition('prefix=')[2]}{{old}}"
            data: Any = client.dump(name)
            client.restore(name, 1_000_000, data, replace=True, idletime=500)
    (found,) = piped("stats", "--json", "--limit", "1", url=url).objects
    assert [each["key"] for each in found["oldest"]] == ["old"]
    some.close()


def test_watch_prints_what_changes_until_it_is_interrupted(
    url: str, sessions: SessionManager[Any], storage: Any
) -> None:
    with Terminal("watch", "user:7:chat:7", "--interval", "0.05", url=url) as terminal:
        terminal.read_until("code")
        with sessions.session_scope("user:7:chat:7") as session:  # it keeps no lock
            session.counter = 416_243_719  # no time of day
            del session.code
            session.fresh = True
        for word in ("changed  counter  int", "gone  code", "new  fresh  bool"):
            terminal.read_until(word)
        storage.delete("user:7:chat:7")
        terminal.read_until("gone  counter")
        terminal.process.send_signal(signal.SIGINT)
        done = terminal.end()
    assert done.code == 130
    assert "Traceback" not in done.out
    assert "416" not in done.out


def test_watch_on_a_pipe_with_values(sqlite: str) -> None:
    call = [*COMMAND, "watch", "user:1", "--values", "--json", "--interval", "0.05"]
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(sqlite)
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert (first["what"], first["field"], first["value"]) == ("new", "name", "Alex")


# -- changing


def test_set_leaves_the_rest_as_it_was(url: str) -> None:
    some: Any = storage_from_url(url, codec=Codec(money_to, money_from))
    manager: SessionManager[Any] = SessionManager(Version2, storage=some)
    with manager.session_scope("user:1") as session:
        session.price = Money(5)
        session.code = ttl("1", 900)
    for arguments in (
        ("seen", '{"$set":[{"$tuple":[1,2]}]}'),
        ("soon", "1", "--ttl", "60"),
        ("code", "--delete"),
    ):
        done = piped("set", "user:1", *arguments, url=url)
        assert (done.code, done.out, done.err) == (0, "", "")
    stored = some.get("user:1")
    assert stored.pop("$ttl").keys() == {"soon"}
    assert stored.pop("price").cents == 5
    assert stored == {"seen": {(1, 2)}, "soon": 1, "$version": 2}
    some.close()


@on_one
@pytest.mark.usefixtures("sessions")
def test_set_takes_values_in_many_forms(url: str, storage: Any) -> None:
    for arguments, typed in (
        (("n", "-5"), ""),
        (("text", "--text", "-"), "over a pipe\n"),
        (("note", "--text", "tea"), ""),
        (("json", "-"), "[1, 2.5, null]\n"),
        (("code", '"2"', "--ttl", "0"), ""),
    ):
        assert piped("set", "user:7:chat:7", *arguments, url=url, typed=typed).code == 0
    stored = storage.get("user:7:chat:7")
    assert "$ttl" not in stored
    assert {name: stored[name] for name in ("n", "text", "note", "json", "code")} == {
        "n": -5,
        "text": "over a pipe",
        "note": "tea",
        "json": [1, 2.5, None],
        "code": "2",
    }


def test_set_warns_if_the_session_would_lose_its_life_time(url: str) -> None:
    with_ttl = f"{url}{'&' if '?' in url else '?'}ttl=1000"
    some: Any = storage_from_url(with_ttl)
    some.set("user:1", {"a": 1})
    right = piped("set", "user:1", "b", "2", url=with_ttl)
    (entry,) = some.entries()
    assert (right.code, right.err) == (0, "")
    assert 900 < entry.left <= 1000
    wrong = piped("set", "user:1", "b", "3", url=url)
    assert wrong.code == 0
    assert "the same ?ttl= as the bot's" in wrong.err
    some.close()


def test_set_refuses_what_it_cannot_do(sqlite: str) -> None:
    no_json, no_name, no_field, no_session, nothing, both, made = at_once(
        lambda: piped("set", "user:1", "name", "pri{vate", url=sqlite),
        lambda: piped("set", "user:1", "$version", "2", url=sqlite),
        lambda: piped("set", "user:1", "other", "--delete", url=sqlite),
        lambda: piped("set", "user:2", "name", "1", url=sqlite),
        lambda: piped("set", "user:1", "name", url=sqlite),
        lambda: piped("set", "user:1", "name", "1", "--delete", url=sqlite),
        lambda: piped("set", "user:3", "name", "1", "--create", url=sqlite),
    )
    assert [d.code for d in (no_json, no_name, no_field, no_session)] == [2, 2, 1, 1]
    assert (nothing.code, both.code, made.code) == (2, 2, 0)
    assert "pri{vate" not in no_json.err
    assert "--text" in no_json.err
    assert "--create" in no_session.err
    assert sorted(piped("ls", url=sqlite).lines) == ["user:1", "user:3"]


@on_two
def test_changes_take_the_lock(url: str, sessions: SessionManager[Any], storage: Any) -> None:
    lines = to_line("user:7:chat:7", {"counter": 5})
    with sessions.session_scope("user:7:chat:7") as session:
        denied = at_once(
            lambda: piped("set", "user:7:chat:7", "new", "1", "--lock-timeout", "0.1", url=url),
            lambda: piped("rm", "user:7:chat:7", "-y", "--lock-timeout", "0.1", url=url),
            lambda: piped("forget", "--user", "7", "-y", "--lock-timeout", "0.1", url=url),
            lambda: piped("import", "--lock-timeout", "0.1", url=url, typed=lines),
        )
        session.counter = 2
    assert [done.code for done in denied] == [3, 3, 3, 3]
    for done in denied:
        assert "user:7:chat:7" in done.err
        assert "Traceback" not in done.err
    fields = storage.get("user:7:chat:7")
    assert fields.keys() - {"$ttl"} == {"counter", "cart", "code"}
    assert fields["counter"] == 2


@on_two
def test_set_waits_for_a_handler_and_neither_loses_what_the_other_wrote(
    url: str, sessions: SessionManager[Any], storage: Any, threads: Threads
) -> None:
    opened, done = threading.Event(), threading.Event()

    def handler() -> None:
        with sessions.session_scope("user:7:chat:7") as session:
            opened.set()
            assert not done.wait(1)  # it cannot end while this goes on
            session.counter += 1

    threads.start(handler)
    assert opened.wait(10)
    assert piped("set", "user:7:chat:7", "counter", "10", url=url).code == 0
    done.set()
    threads.join()
    assert storage.get("user:7:chat:7")["counter"] == 10  # after the handler, and not under it


@pytest.mark.usefixtures("sessions")
def test_rm_deletes(url: str, storage: Any) -> None:
    done = on_terminal("rm", "user:7:chat:7", "user:8:chat:-100", url=url, typed="y\n")
    assert done.code == 0
    assert "deleted user:8:chat:-100" in done.out
    assert list(storage.keys()) == ["user:7:chat:-100"]
    some = piped("rm", "-y", "user:1", "user:7:chat:-100", url=url)
    assert (some.code, some.out) == (1, "deleted user:7:chat:-100\n")
    assert some.err == "session-sync: no session is stored under 'user:1'\n"


@on_one
@pytest.mark.usefixtures("sessions")
def test_rm_asks_where_somebody_can_answer(url: str, storage: Any) -> None:
    nobody, refused, ended = at_once(
        lambda: piped("rm", "user:7:chat:7", url=url, typed="y\n"),
        lambda: on_terminal("rm", "user:7:chat:7", url=url, typed="n\n"),
        lambda: on_terminal("rm", "user:7:chat:7", url=url, typed="\x04"),
    )
    assert (nobody.code, nobody.out) == (2, "")
    assert "say --yes" in nobody.err
    assert (refused.code, ended.code) == (1, 130)
    assert "Delete 1 session (user:7:chat:7)? [y/N]" in refused.out
    assert "nothing was deleted" in refused.out
    assert storage.has("user:7:chat:7")


def spoil(url: str, storage: Any, key: str, value: bytes = b"{nonsense") -> None:
    """Put something under a key that this library has not written."""
    storage.set(key, {"a": 1})
    if url.startswith("redis"):
        storage._client.set(storage._names.of(key), value)
        return
    path = url.partition(":///")[2]
    path, table = (path, "sessions") if url.startswith("sqlite") else (f"{path}/cache.db", "Cache")
    with sqlite3.connect(path) as file:
        file.execute(f"UPDATE {table} SET value = ? WHERE key = ?", (value, key))
    file.close()


@pytest.mark.usefixtures("sessions")
def test_what_cannot_be_read_is_named_and_can_be_deleted(url: str, storage: Any) -> None:
    spoil(url, storage, "user:7:chat:5")
    exported, forgotten, doctor = at_once(
        lambda: piped("export", url=url),
        lambda: piped("forget", "--user", "7", "-y", url=url),
        lambda: piped("doctor", "--json", url=url),
    )
    for done in (exported, forgotten):
        assert done.code == 1
        assert "session 'user:7:chat:5' cannot be read" in done.err
        assert "nonsense" not in done.err + done.out
    assert "rm KEY" in forgotten.err
    assert doctor.code == 1
    assert any("user:7:chat:5" in line["text"] for line in doctor.objects), doctor.objects
    # Not while somebody else is at it.
    opened = storage.open_unread("user:7:chat:5", 1.0)
    held = piped("rm", "-y", "user:7:chat:5", "--lock-timeout", "0.1", url=url)
    opened.close(None)
    assert held.code == 3
    assert "user:7:chat:5" in held.err
    assert storage.has("user:7:chat:5")
    assert piped("rm", "-y", "user:7:chat:5", url=url).code == 0
    assert not storage.has("user:7:chat:5")


def read_by_all(url: str) -> tuple[Any, Any, Any]:
    """What `ls`, `export` and `doctor` say of a store in which only the doctor finds anything."""
    listed, exported, doctor = at_once(
        lambda: piped("ls", url=url),
        lambda: piped("export", url=url),
        lambda: piped("doctor", url=url),
    )
    assert (listed.code, exported.code, doctor.code) == (0, 0, 1)
    return listed, exported, doctor


def test_a_row_of_no_key_stops_no_command_and_is_found_by_the_doctor(sqlite: str) -> None:
    storage: Any = storage_from_url(sqlite)
    storage.set("user:1", {"a": 1})
    storage.close()
    with closing(sqlite3.connect(sqlite.partition(":///")[2])) as file:
        file.execute("INSERT INTO sessions VALUES (x'ff', x'7b7d', NULL)")
        file.commit()
    listed, exported, doctor = read_by_all(sqlite)
    assert "user:1" in listed.out
    assert "user:1" in exported.out
    assert "keys that no session has, which session_sync has not written: 1" in doctor.out


def test_a_name_of_no_key_in_redis_stops_no_command_and_is_found_by_the_doctor(
    request: pytest.FixtureRequest, where: Any
) -> None:
    url = where("redis", request)
    some: Any = storage_from_url(url)
    some.set("user:1", {"a": 1})
    some._client.set(some._names.prefix + b"{\xff\x1b]0;x\x07}", "{}")
    some.close()
    listed, exported, doctor = read_by_all(url)
    assert listed.lines == ["user:1"]
    assert len(exported.lines) == 1
    assert "keys that no session has, which session_sync has not written: 1" in doctor.out
    for done in (listed, exported, doctor):
        assert "names that no key has were passed over: 1" in done.err
        assert "\x1b" not in done.out + done.err


def test_what_is_no_string_in_redis_can_be_deleted(
    request: pytest.FixtureRequest, where: Any
) -> None:
    url = where("redis", request)
    some: Any = storage_from_url(url)
    some._client.lpush(some._names.of("user:1"), "x")
    doctor, removed = piped("doctor", url=url), piped("rm", "-y", "user:1", url=url)
    assert (doctor.code, removed.code) == (1, 0)
    assert not some.has("user:1")
    some.close()


@pytest.mark.usefixtures("sessions")
def test_forget_deletes_every_session_of_a_person(url: str, storage: Any) -> None:
    done = piped("forget", "--user", "7", "--yes", "--json", url=url)
    assert (done.code, done.objects) == (0, [{"deleted": 2}])
    assert list(storage.keys()) == ["user:8:chat:-100"]


@on_one
@pytest.mark.usefixtures("sessions")
def test_forget_asks_before(url: str, storage: Any) -> None:
    dry, unsaid, nobody, no_answer = at_once(
        lambda: piped("forget", "--user", "7", "--dry-run", url=url),
        lambda: piped("forget", url=url, typed="y\n"),
        lambda: piped("forget", "--user", "12345", url=url),
        lambda: piped("forget", "--user", "7", url=url, typed="y\n"),
    )
    assert (dry.code, dry.lines) == (0, ["user:7:chat:-100", "user:7:chat:7"])
    assert (unsaid.code, no_answer.code) == (2, 2)
    assert (nobody.code, nobody.out) == (0, "0 sessions deleted\n")
    assert len(list(storage.keys())) == 3
    one = on_terminal("forget", "--user", "7", "--chat", "-100", url=url, typed="y\n")
    assert one.code == 0
    assert "user:7:chat:-100" in one.out
    assert list(storage.keys()) == ["user:7:chat:7", "user:8:chat:-100"]


# -- moving


@given(sessions_of_values, field_names)
def test_a_line_of_an_export_gives_back_key_and_fields(fields: dict[str, Any], key: str) -> None:
    fields = {name: value for name, value in fields.items() if not name.startswith("$")}
    line = to_line(key, fields)
    assert line.count(b"\n") == 1
    again, read = from_line(line)
    assert again == key
    assert same(read, fields)


def test_an_export_goes_through_every_store_and_comes_back(
    request: pytest.FixtureRequest, where: Any, tmp_path: Path
) -> None:
    """Also with types that only the bot knows."""
    codec = Codec(money_to, money_from)
    first: str = where("sqlite", request)
    store: Any = storage_from_url(first, codec=codec)
    deadline = time.time() + 900
    for number, value in enumerate(KEPT):
        timer = {"value": [deadline, 900.0]}
        store.set(f"user:{number}", {"value": value, "$ttl": timer, "$version": 3})
    store.set("\ud800 odd\n", {"\ud800": {Money(1): {Money(2)}}, "x": [Money(3)]})
    expected = {key: store.get(key) for key in store.keys()}
    exported = piped("export", url=first)
    assert exported.code == 0
    for kind in ("disk", "redis", "sqlite"):
        url = where(kind, request)
        imported = piped("import", url=url, typed=exported.out)
        assert (imported.code, imported.out) == (0, f"{len(expected)} sessions imported\n")
        exported = piped("export", url=url)
    back: Any = storage_from_url(url, codec=codec)
    assert set(back.keys()) == expected.keys()
    for key, fields in expected.items():
        assert same(back.get(key), fields) or key.startswith("\ud800")
    odd = back.get("\ud800 odd\n")
    assert [money.cents for money in odd["x"]] == [3]
    assert [money.cents for money in odd["\ud800"]] == [1]
    for each in (store, back):
        each.close()


def test_jq_can_read_an_export(sqlite: str) -> None:
    line = piped("export", url=sqlite).out
    assert json.loads(line)["fields"]["name"] == "Alex"


def test_an_exported_file_is_private_and_whole(sqlite: str, tmp_path: Path) -> None:
    file, other = tmp_path / "backup.jsonl", tmp_path / "other.jsonl"
    file.write_text("older")
    file.chmod(0o644)
    done = piped("export", str(file), url=sqlite)
    assert (done.code, done.out) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["key"] == "user:1"
    nowhere = piped("export", str(other), url=f"sqlite:///{tmp_path}/no.db")
    assert nowhere.code == 4
    assert not other.exists()
    into_a_pipe = piped("export", "/dev/stdout", url=sqlite)
    assert json.loads(into_a_pipe.out)["key"] == "user:1"
    assert sorted(path.name for path in tmp_path.iterdir() if "session-sync" in path.name) == []


def test_what_a_session_remembers_is_its_own(url: str, storage: Any) -> None:
    fields = {"counter": 1, "$updates": [7, 8]}
    storage.set("user:1", fields)
    exported = piped("export", url=url)
    assert piped("doctor", url=url).code == 0
    assert piped("rm", "user:1", "-y", url=url).code == 0
    assert piped("import", url=url, typed=exported.out).code == 0
    assert storage.get("user:1") == fields
    storage.set("user:1", {"counter": 1, "$updates": "nonsense"})
    assert piped("doctor", url=url).code == 1


def test_import_names_the_lines_that_it_cannot_read_and_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/sessions.db"
    lines = (
        b'{"key":"user:1","fields":{"a":1}}\n'
        b"\n"
        b"{private nonsense\n"
        b'{"key":1,"fields":{}}\n'
        b'{"key":"user:2","fields":{"a":{"$nonsense":1}}}\n'
        b'{"key":"user:3","fields":{"a":1,"$ttl":"never"}}\n'
        b'{"key":"user:4","fields":{"a":1,"$version":0}}\n'
        b'{"key":"user:5","fields":{"a":1,"$other":0}}\n'
        b'{"key":"user:6","fields":{"a":1}}'
    )
    tried = piped("import", "--dry-run", url=url, typed=lines)
    assert (tried.code, tried.out) == (1, "2 sessions can be imported, 6 failed\n")
    assert not (tmp_path / "new").exists()
    file = tmp_path / "lines"
    file.write_bytes(lines)
    done = piped("import", str(file), url=url)
    assert (done.code, done.out) == (1, "2 sessions imported, 6 failed\n")
    for number in (3, 4, 5, 6, 7, 8):
        assert f"line {number}: " in done.err
    assert "private" not in done.err
    assert piped("ls", url=url).lines == ["user:1", "user:6"]


@on_two
@pytest.mark.usefixtures("sessions")
def test_import_replaces_or_skips_what_is_there(url: str, storage: Any) -> None:
    lines = to_line("user:7:chat:7", {"new": 1}) + to_line("user:9", {"new": 1})
    skipped = piped("import", "--skip-existing", url=url, typed=lines)
    assert (skipped.code, skipped.out) == (0, "1 sessions imported, 1 were there already\n")
    assert storage.get("user:7:chat:7")["counter"] == 1
    replaced = piped("import", "--prefix", "user:7:", url=url, typed=to_line("chat:7", {"new": 1}))
    assert replaced.code == 0
    assert storage.get("user:7:chat:7") == {"new": 1}


@pytest.mark.parametrize("version", ["4.7.1", "4.23.0"])
def test_import_from_telebots_pickle(url: str, storage: Any, version: str) -> None:
    source = str(WRITTEN / f"telebot-{version}.pkl")
    done = piped("import", "--from", "telebot-pickle", source, url=url)
    assert (done.code, done.lines) == (0, ["3 sessions imported"])
    assert storage.get("user:1:chat:1") == {"name": "Alex", "step": "Form:age"}
    assert storage.get("user:2:chat:-100") == {"cart": {7: [1]}, "step": "name"}


def test_import_from_ptbs_pickle(url: str, storage: Any) -> None:
    source = str(WRITTEN / "ptb-20.0.pickle")
    done = piped("import", "--from", "ptb-pickle", source, url=url)
    assert (done.code, done.lines) == (1, ["3 sessions imported, 1 failed"])
    assert "session 'user:2' cannot be taken over: who is of class telegram._user.User" in done.err
    assert storage.get("chat:-100") == {"votes": {1, 2}}
    assert not storage.has("user:2")


def test_import_from_telebots_redis(tmp_path: Path, redis_url: str) -> None:
    telebot = pytest.importorskip("telebot.storage", reason="needs the extra 'telebot'")
    prefix, server = uuid4().hex, urlsplit(redis_url)
    states = telebot.StateRedisStorage(server.hostname, server.port, prefix=prefix)
    states.set_state(1, 1, "name")
    states.set_data(1, 1, "age", 30)
    url = f"sqlite:///{tmp_path}/sessions.db"
    source = f"{redis_url}?prefix={prefix}"
    dry = piped("import", "--from", "telebot-redis", source, "--dry-run", url=url)
    assert (dry.code, dry.lines) == (0, ["1 sessions can be imported"])
    assert piped("import", "--from", "telebot-redis", source, url=url).code == 0
    (shown,) = piped("show", "user:1:chat:1", "--values", "--json", url=url).objects
    values = {name: field["value"] for name, field in shown["fields"].items()}
    assert values == {"step": "name", "age": 30}


def test_import_of_what_is_no_such_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sessions.db"
    (tmp_path / "states.pkl").write_bytes(b"no pickle")
    for kind in ("telebot-pickle", "ptb-pickle"):
        done = piped("import", "--from", kind, "states.pkl", url=url, cwd=tmp_path)
        assert done.code == 1
        assert "states.pkl cannot be read" in done.err
        assert "Traceback" not in done.err


@pytest.mark.usefixtures("sessions")
def test_copy_carries_everything_over(url: str, storage: Any, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/copy.db"
    done = piped("copy", url, target)
    assert (done.code, done.out, done.err) == (0, "copied 3 sessions\n", "")
    there: Any = storage_from_url(target)
    assert {key: there.get(key) for key in there.keys()} == {
        key: storage.get(key) for key in storage.keys()
    }
    there.close()


@on_one
@pytest.mark.usefixtures("sessions")
def test_copy_shows_how_far_it_is(url: str, tmp_path: Path) -> None:
    terminal, same_store = at_once(
        lambda: on_terminal("copy", url, f"sqlite:///{tmp_path}/copy.db"),
        lambda: piped("copy", url, url),
    )
    assert terminal.code == 0
    assert "copied 3 sessions" in terminal.out
    assert "3/3" in terminal.out
    assert same_store.code == 2


# -- what goes wrong


READING = [
    ("ls",),
    ("show", "k"),
    ("set", "k", "f", "1", "--create"),
    ("rm", "k", "-y"),
    ("export",),
    ("stats",),
    ("forget", "--user", "1", "-y"),
    ("watch", "k"),
    ("doctor",),
]


@pytest.mark.parametrize("kind", ["sqlite", "disk"])
def test_a_mistyped_path_makes_no_store(kind: str, tmp_path: Path) -> None:
    url = f"{kind}:///{tmp_path}/mistyped"
    (tmp_path / "other").mkdir()
    calls: list[Callable[[], Done]] = [
        lambda command=command: piped(*command, url=url)  # type: ignore[misc]
        for command in READING[: None if kind == "sqlite" else 4]
    ]
    calls.append(lambda: piped("copy", url, f"{kind}:///{tmp_path}/target"))
    for done in at_once(*calls):
        assert done.code == 4
        assert done.err.count("\n") == 1
        assert done.err.startswith(f"session-sync: there is no store at {kind}:///")
    assert piped("ls", url=f"disk:///{tmp_path}/other").code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert not any((tmp_path / "other").iterdir())


def test_a_password_never_comes_out(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    good = f"redis://:{SECRET.replace('/', '%2F')}@127.0.0.1:1/0"
    calls: list[Callable[[], Done]] = [
        lambda: piped("ls", url=good),
        lambda: piped("ls", url=f"redis://bot:{SECRET}@127.0.0.1:1"),
        lambda: piped("ls", url=f"redis://bot:{SECRET}@127.0.0.1:port"),
        lambda: piped("ls", url=f"redis://127.0.0.1:1?password={SECRET}"),
        lambda: piped("ls", url=f"{good}?lease=never"),
        lambda: piped("ls", url=f"rediz://bot:{SECRET}@127.0.0.1"),
        lambda: piped("copy", good, f"sqlite:///{tmp_path}/new.db"),
        lambda: piped(good, "ls"),
        lambda: piped("ls", good, url=good),
        lambda: piped("doctor", url=good),
        lambda: on_terminal("doctor", url=good),
        lambda: on_terminal("stats", url=good),
    ]
    for number, done in enumerate(at_once(*calls)):
        assert done.code == (4 if number in (0, 3, 6, 9, 10, 11) else 2), done
        for part in (SECRET, "s3cr3t", "pa$$"):
            assert part not in done.out + done.err, done
        assert "Traceback" not in done.err


@pytest.mark.parametrize("rest", ["#s3cret@h", "#s3cret", "/s3cret@h", "?s3cret@h", "@1/s3cret@h"])
def test_no_part_of_a_password_with_special_characters_comes_out(rest: str) -> None:
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    url = f"redis://:6399{rest}"
    for done in at_once(
        lambda: piped("ls", url=url),
        lambda: piped("-s", url, "doctor"),
        lambda: piped("copy", url, "sqlite:///never.db"),
        lambda: piped("import", "--from", "telebot-redis", url, "--dry-run", url="memory://"),
    ):
        assert done.code in (1, 2), done
        assert "6399" not in done.out + done.err, done
        assert "s3cret" not in done.out + done.err, done
        assert "Traceback" not in done.err


def test_a_server_that_does_not_let_us_in(tmp_path: Path, redis_url: str) -> None:
    import redis

    with redis.Redis.from_url(redis_url) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+right"], commands=["+get"])
    address = redis_url.partition("//")[2]
    wrong = piped("ls", url=f"redis://reader:wr0ng@{address}")
    forbidden = piped("ls", url=f"redis://reader:right@{address}")
    assert (wrong.code, forbidden.code) == (4, 4)
    assert "wr0ng" not in wrong.err
    assert "right" not in forbidden.err


def test_usage(sqlite: str, tmp_path: Path) -> None:
    (tmp_path / "other.db").write_bytes(b"this is not a database" * 100)
    no_store, unknown, memory, other, helped, version = at_once(
        lambda: piped("ls"),
        lambda: piped("list", url=sqlite),
        lambda: piped("ls", url="memory://"),
        lambda: piped("ls", url=f"sqlite:///{tmp_path}/other.db"),
        lambda: piped("--help"),
        lambda: piped("--version"),
    )
    assert [done.code for done in (no_store, unknown, memory, other)] == [2, 2, 2, 4]
    assert "SESSION_SYNC_STORAGE" in no_store.err
    assert "memory of one process" in memory.err
    assert "Traceback" not in other.err
    assert (helped.code, version.code) == (0, 0)
    for command in app.commands:
        assert f"\n  {command} " in helped.out


def test_without_the_extra_one_line_says_what_to_install() -> None:
    for missing in ("click", "rich"):
        program = f"""
import sys
sys.modules[{missing!r}] = None
from session_sync.admin.cli import main
main()
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        assert done.returncode == 2
        assert done.stderr == "session-sync needs click and rich: pip install 'session-sync[cli]'\n"


def test_the_library_itself_needs_neither_click_nor_rich() -> None:
    program = """
import importlib, pathlib, sys, session_sync
root = pathlib.Path(session_sync.__file__).parent
for each in root.rglob("*.py"):
    name = ".".join(("session_sync", *each.relative_to(root).with_suffix("").parts))
    if not name.startswith("session_sync.admin.cli") and not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ImportError:  # an extra
            pass
print([name for name in sys.modules if name.startswith("session_sync.admin.cli")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout == "[]\n"


def test_head_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sessions.db"
    some: Any = storage_from_url(url)
    for number in range(1000):
        some.set(f"{number:04}" + "x" * 200, {"a": 1})
    some.close()
    with subprocess.Popen(
        [*COMMAND, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(url)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"0000x")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


# -- the doctor


@pytest.mark.usefixtures("sessions")
def test_the_doctor_finds_nothing_wrong_with_a_sound_store(url: str) -> None:
    done = piped("doctor", "--json", url=url)
    assert done.code == 0, done
    found = {(line["state"], line["about"]) for line in done.objects}
    assert ("ok", "sessions") in found
    assert ("ok", "locks") in found
    assert {state for state, _ in found} == {"ok", "note"}


@on_one
@pytest.mark.usefixtures("sessions")
def test_the_doctor_in_its_forms(url: str) -> None:
    plain, table = at_once(
        lambda: piped("doctor", url=url),
        lambda: on_terminal("doctor", url=url),
    )
    assert (plain.code, table.code) == (0, 0)
    assert plain.lines[0].count("\t") == 2
    assert "3 can be read" in table.out
    assert "───" in table.out


@pytest.mark.parametrize("kind", ["sqlite", "disk"])
def test_the_doctor_sees_who_may_read_the_files(
    kind: str, request: pytest.FixtureRequest, where: Any
) -> None:
    url = where(kind, request)
    some: Any = storage_from_url(url)
    some.set("user:1", {"a": 1})
    some.close()
    path = url.partition(":///")[2]
    file = path if kind == "sqlite" else f"{path}/cache.db"
    os.chmod(file, 0o644)
    done = piped("doctor", "--json", url=url)
    assert done.code == 1
    (wrong,) = [line for line in done.objects if line["state"] == "wrong"]
    assert (wrong["about"], "0644" in wrong["text"], file in wrong["text"]) == (
        "permissions",
        True,
        True,
    )


def test_the_doctor_sees_a_damaged_file(sqlite: str) -> None:
    path = sqlite.partition(":///")[2]
    with open(path, "r+b") as file:
        file.truncate(4096)
    done = piped("doctor", "--json", url=sqlite)
    assert done.code in (1, 4)
    assert any(line["about"] == "file" and line["state"] == "wrong" for line in done.objects)


def test_the_doctor_counts_versions(sqlite: str) -> None:
    some: Any = storage_from_url(sqlite)
    some.set("user:2", {"a": 1, "$version": 3})
    some.set("user:3", {"a": 1, "$ttl": "never"})
    some.close()
    done = piped("doctor", "--json", url=sqlite)
    texts = [line["text"] for line in done.objects if line["about"] == "sessions"]
    assert done.code == 1
    assert any("user:3" in text for text in texts)
    assert "sessions by schema version: v1: 1, v3: 1" in texts


def test_the_doctor_names_a_few_of_many_that_cannot_be_read(sqlite: str) -> None:
    some: Any = storage_from_url(sqlite)
    for number in range(40):
        some.set(f"user:{number}", {"a": 1, "$ttl": "never"})
    some.close()
    done = piped("doctor", "--json", url=sqlite)
    wrong = [line["text"] for line in done.objects if line["state"] == "wrong"]
    assert done.code == 1
    assert wrong[-1] == "40 cannot be read in all"
    assert 1 < len(wrong) < 40


def test_the_doctor_sees_locks_of_the_dead_and_a_server_that_evicts(
    request: pytest.FixtureRequest, where: Any
) -> None:
    url = where("redis", request)
    program = f"""
import os, signal
from session_sync import storage_from_url
storage = storage_from_url({url!r})
storage.set("user:1", {{"a": 1}})
opened = storage.open_record("user:1", 1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    some: Any = storage_from_url(url)
    opened = some.open_record("user:2", 1.0)
    some._client.set(some._names.of("user:3") + b":lock", "mine")
    some._client.set(some._names.of("user:4") + b":lock", "mine", px=60_000)
    some._client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        done = piped("doctor", "--json", url=url)
    finally:
        some._client.config_set("maxmemory-policy", "noeviction")
    opened.close(None)
    some.close()
    assert done.code == 1
    wrong = {line["text"] for line in done.objects if line["state"] == "wrong"}
    assert len(wrong) == 4
    assert any("had user:1 open, is gone; free in" in text for text in wrong)
    assert any("user:3 never ends" in text for text in wrong)
    assert any("lock of user:4 was not written here" in text for text in wrong)
    assert any("maxmemory-policy is allkeys-lru" in text for text in wrong)
    assert not any("user:2" in line["text"] for line in done.objects)


def test_own_types_are_equal_if_they_would_be_stored_the_same() -> None:
    def hook(value: Any) -> Any:
        return ("fraction", [1, 3]) if isinstance(value, Fraction) else NotImplemented

    data = Codec(hook, lambda name, value: None).encode({"a": {Fraction(1, 3)}})
    read = CODEC.decode(data)
    assert CODEC.encode(read) == data
    assert read == CODEC.decode(data)


# -- the page about it


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of each call of `session-sync` in the shell commands of a page."""
    lines = "\n".join(one.code for one in snippets(page) if one.kind == "sh").splitlines()
    calls = [re.split(r"[|>]|\d>|<", line.partition("session-sync ")[2])[0] for line in lines]
    return [shlex.split(call) for call in calls if call]


def test_the_commands_of_the_pages_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSION_SYNC_STORAGE", "sqlite:///sessions.db")
    shown = [each for page in DOCS.rglob("*.md") for each in commands_of(page)]
    assert {arguments[0] for arguments in shown} == set(app.commands)
    for name, *arguments in shown:
        app.commands[name].make_context(name, arguments)  # which raises what is wrong


def test_the_page_names_every_exit_code_and_command() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for code in Code:
        assert f"| {code} |" in text
    for name in app.commands:
        assert f"`{name}" in text


def test_the_pictures_can_be_made_again(tmp_path: Path) -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    subprocess.run(
        [sys.executable, DOCS / "screens.py", "--into", tmp_path],
        env=environment(),
        check=True,
        timeout=60,
    )
    made = {path.name for path in tmp_path.iterdir()}
    assert made == set(re.findall(r"pictures/(cli_\w+\.svg)", page))
    for name in made:
        assert (DOCS / "pictures" / name).exists()
        assert "://" not in (tmp_path / name).read_text("utf-8").replace("http://www.w3.org", "")
