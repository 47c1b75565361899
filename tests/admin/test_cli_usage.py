"""How the command line is called, and what it prints where a terminal looks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from session_sync import storage_from_url

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")

from cli_tools import COMMAND, at_once, environment, on_terminal, piped

from session_sync.admin.cli.app import app

#: What a terminal obeys, or shows in another order, in the eight-bit and in Unicode's forms, too.
OBEYED = "\x1b]0;x\x07\x1b[2J\x9b31m\x7f\u202e\u2066\r\x00\x08"


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/sessions.db"
    storage: Any = storage_from_url(url)
    storage.set("user:7:chat:7", {"counter": 1})
    storage.set("user:7:chat:-100", {"cart": [1]})
    storage.set("user:8:chat:-100", {"counter": 2})
    storage.close()
    return url


# -- options


def test_the_store_may_be_named_before_the_command_or_after_it(url: str, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    before, both, over, prefixed, nowhere = at_once(
        lambda: piped("-s", url, "ls"),
        lambda: piped("--storage", other, "ls", "-s", url),
        lambda: piped("-s", url, "ls", url=other),
        lambda: piped("-s", url, "--prefix", "user:7:", "ls"),
        lambda: piped("ls"),
    )
    for done in (before, both, over):
        assert (done.code, len(done.lines), done.err) == (0, 3, "")
    assert prefixed.lines == ["chat:-100", "chat:7"]
    assert nowhere.code == 2
    assert "--storage URL (-s), or SESSION_SYNC_STORAGE" in nowhere.err


def test_a_lock_timeout_before_the_command_counts(url: str) -> None:
    storage: Any = storage_from_url(url)
    opened = storage.open_record("user:7:chat:7", 1.0)
    done = piped("--lock-timeout", "0.1", "-s", url, "set", "user:7:chat:7", "counter", "5")
    opened.close(None)
    storage.close()
    assert done.code == 3


def test_a_store_before_copy_is_refused_and_not_ignored(url: str, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/copy.db"
    refused, by_environment = at_once(
        lambda: piped("-s", url, "copy", url, target),
        lambda: piped("copy", url, f"{target}2", url=url),
    )
    assert refused.code == 2
    assert "copy takes no --storage" in refused.err
    assert by_environment.code == 0


def test_a_password_before_the_command_comes_out_nowhere(url: str) -> None:
    wrong = "redis://bot:s3cr3t@127.0.0.1:1"
    for done in at_once(
        lambda: piped("-s", wrong, "ls"),
        lambda: piped("-s", wrong, "list"),
        lambda: piped("-s", wrong, "copy", url, url),
        lambda: piped("-s", wrong, "ls", wrong),
    ):
        assert done.code in (2, 4)
        assert "s3cr3t" not in done.out + done.err


def test_no_line_of_the_help_is_cut_short() -> None:
    helped = piped("--help")
    assert helped.code == 0
    assert "..." not in helped.out.partition("Commands:")[2]
    assert len(app.commands) == sum(line.startswith("  ") for line in _commands(helped.out))


def _commands(text: str) -> list[str]:
    return text.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    words = {"COMP_WORDS": "session-sync do", "COMP_CWORD": "1" if shell != "fish" else "do"}
    for how, expected in ((f"{shell}_source", "_SESSION_SYNC_COMPLETE"), (shell, "doctor")):
        instruction = how if how.endswith("source") else f"{shell}_complete"
        done = subprocess.run(
            COMMAND,
            env={**environment(), **words, "_SESSION_SYNC_COMPLETE": instruction},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if how.endswith("source") and "Bash version" in done.stderr:
            pytest.skip("an old bash")
        assert expected in done.stdout, done


# -- show


def test_show_shows_all_sessions_of_a_user(url: str) -> None:
    plain, as_json, both, nobody, nothing, twice = at_once(
        lambda: piped("show", "--user", "7", "--values", url=url),
        lambda: piped("show", "--user", "7", "--json", "--values", url=url),
        lambda: piped("show", "--user", "7", "--chat", "-100", url=url),
        lambda: piped("show", "--user", "9", url=url),
        lambda: piped("show", url=url),
        lambda: piped("show", "user:7:chat:7", "--user", "7", url=url),
    )
    assert plain.lines == [
        "user:7:chat:-100\tcart\tlist\t\t[1]",
        "user:7:chat:7\tcounter\tint\t\t1",
    ]
    assert [each["key"] for each in as_json.objects] == ["user:7:chat:-100", "user:7:chat:7"]
    assert as_json.objects[1]["fields"]["counter"]["value"] == 1
    assert both.lines == ["user:7:chat:-100\tcart\tlist\t"]
    assert (nobody.code, nobody.out) == (1, "")
    assert (nothing.code, twice.code) == (2, 2)
    assert "a KEY, or --user ID" in nothing.err
    table = on_terminal("show", "--user", "7", url=url)
    assert "user:7:chat:-100" in table.out
    assert "user:7:chat:7" in table.out


def test_show_goes_on_after_a_session_that_cannot_be_read(url: str) -> None:
    storage: Any = storage_from_url(url)
    storage.set("user:7:chat:1", {"a": 1, "$ttl": "never"})
    storage.close()
    done = piped("show", "--user", "7", url=url)
    assert done.code == 1
    assert len(done.lines) == 2
    assert "session 'user:7:chat:1' cannot be read" in done.err


# -- a terminal


def test_an_export_on_a_terminal_says_nothing_to_it(url: str) -> None:
    storage: Any = storage_from_url(url)
    key = f"user:1:key:{OBEYED}"
    fields = {f"name{OBEYED}": f"value{OBEYED}\U000e0001é"}
    storage.set(key, fields)
    storage.close()
    shown = on_terminal("export", "--user", "1", url=url)
    assert shown.code == 0
    line, *_ = shown.out.splitlines()
    assert line.isprintable()
    assert "é" in line
    assert json.loads(line) == {"key": key, "fields": fields}
    exported = piped("export", "--user", "1", url=url)
    assert exported.objects == [{"key": key, "fields": fields}]
    target = f"{url}.copy"
    assert piped("import", url=target, typed=line).code == 0
    copy: Any = storage_from_url(target)
    assert copy.get(key) == fields
    copy.close()


def test_brackets_in_a_password_are_refused_in_a_sentence() -> None:
    done = piped("ls", "-s", "redis://:s3[cr3t@localhost")
    assert done.code == 2
    assert "%5B" in done.err
    assert "cr3t" not in done.err


def test_what_a_command_says_beside_its_output_says_nothing_to_a_terminal(url: str) -> None:
    for done in at_once(
        lambda: on_terminal("ls", "-s", f"sqlite:///no\x1b[2J\u202e{url[-9:]}"),
        lambda: on_terminal("backup", "no\x1b[2J\u202e", "-s", "redis://localhost\u202e\x1b[2J"),
    ):
        assert done.code in (2, 4)
        assert "\x1b[2J" not in done.out
        assert "\u202e" not in done.out
