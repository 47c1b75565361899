"""The command line where something is wrong: what it prints, its exit codes, and the doctor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cli_tools
import pytest
from cli_tools import COMMAND, READING, Done, at_once, environment, on_one, on_terminal, piped

from session_sync import Codec, storage_from_url

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")
from session_sync.admin.cli.app import app
from session_sync.admin.cli.jsonl import CODEC

where = pytest.fixture(cli_tools.make_where)
url = pytest.fixture(params=cli_tools.STORES)(cli_tools.make_url)
storage = pytest.fixture(cli_tools.make_storage)
sessions = pytest.fixture(cli_tools.make_sessions)
sqlite = pytest.fixture(cli_tools.make_sqlite)

SECRET = "s3cr3t/pa$$"


# -- what goes wrong


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
