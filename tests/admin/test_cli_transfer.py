"""The command line that moves sessions: by lines, from store to store, out of other libraries."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import cli_tools
import pytest
from cli_tools import at_once, on_one, on_terminal, on_two, piped
from hypothesis import given
from values import KEPT, Money, money_from, money_to, same
from values import names as field_names
from values import sessions as sessions_of_values

from session_sync import Codec, storage_from_url

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")
from session_sync.admin.cli.jsonl import from_line, to_line

where = pytest.fixture(cli_tools.make_where)
url = pytest.fixture(params=cli_tools.STORES)(cli_tools.make_url)
storage = pytest.fixture(cli_tools.make_storage)
sessions = pytest.fixture(cli_tools.make_sessions)
sqlite = pytest.fixture(cli_tools.make_sqlite)

#: Files that other libraries have written.
WRITTEN = Path(__file__).parents[1] / "data" / "importers"


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
    fields = {"counter": 1, "$updates": [7, 8], "$at": {"conversation:form:": ("AGE", 1)}}
    storage.set("user:1", fields)
    exported = piped("export", url=url)
    assert piped("doctor", url=url).code == 0
    assert piped("rm", "user:1", "-y", url=url).code == 0
    assert piped("import", url=url, typed=exported.out).code == 0
    assert storage.get("user:1") == fields
    for name in ("$updates", "$at"):
        storage.set("user:1", {"counter": 1, name: "nonsense"})
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
