"""The command line, as a process: on every store, piped and on a terminal."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import cli_tools
import pytest
from cli_tools import COMMAND, Terminal, at_once, environment, on_one, on_terminal, on_two, piped
from conftest import Threads
from pages import DOCS, snippets
from values import Money, money_from, money_to

from session_sync import Codec, Session, SessionManager, storage_from_url, ttl

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")
from session_sync.admin.cli.app import app
from session_sync.admin.cli.errors import Code
from session_sync.admin.cli.jsonl import to_line

where = pytest.fixture(cli_tools.make_where)
url = pytest.fixture(params=cli_tools.STORES)(cli_tools.make_url)
storage = pytest.fixture(cli_tools.make_storage)
sessions = pytest.fixture(cli_tools.make_sessions)
sqlite = pytest.fixture(cli_tools.make_sqlite)


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


@on_one
def test_show_says_where_a_user_stands(url: str, storage: Any) -> None:
    storage.set("user:9", {"name": "Kim", "$at": {"conversation:form:": "AGE", "steps": [1]}})
    table, plain, values, as_json = at_once(
        lambda: on_terminal("show", "user:9", url=url),
        lambda: piped("show", "user:9", url=url),
        lambda: piped("show", "user:9", "--values", url=url),
        lambda: piped("show", "user:9", "--values", "--json", url=url),
    )
    assert "$at conversation:form:" in table.out
    assert plain.lines == ["name\tstr\t", "$at conversation:form:\tstr\t", "$at steps\tlist\t"]
    assert "AGE" not in plain.out
    assert values.lines[1:] == ["$at conversation:form:\tstr\t\t'AGE'", "$at steps\tlist\t\t[1]"]
    (shown,) = as_json.objects
    assert list(shown["fields"]) == ["name"]
    assert shown["stands_in"] == {
        "conversation:form:": {"type": "str", "value": "AGE"},
        "steps": {"type": "list", "value": [1]},
    }


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
    assert "use --yes" in nobody.err
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
