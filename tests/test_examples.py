"""The examples, each run as a newcomer runs it: as a process of its own, offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(directory: Path, example: str, *options: str) -> list[str]:
    """The lines that an example prints when it is run in `directory`."""
    # The session_sync beside the examples, whichever is installed; and no token of the tester's.
    inherited = {name: value for name, value in os.environ.items() if name != "TOKEN"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / example), *options],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def answers(lines: list[str]) -> list[str]:
    """What the bot said in a chat."""
    return [line.removeprefix(" bot: ") for line in lines if line.startswith(" bot: ")]


def counted(*numbers: int) -> list[str]:
    return [f"That was message {number}." for number in numbers]


def test_the_counter_goes_on_after_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("telebot")
    first = run(tmp_path, "counter_bot.py", "--offline")
    assert first[0] == "Alex: Hello!"
    assert answers(first) == counted(1, 2, 3)
    assert answers(run(tmp_path, "counter_bot.py", "--offline")) == counted(4, 5, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["sessions"]


def test_the_counter_is_kept_where_it_is_told(tmp_path: Path) -> None:
    pytest.importorskip("telebot")
    elsewhere = str(tmp_path / "else" / "where")
    here = tmp_path / "here"
    here.mkdir()
    for numbers in (1, 2, 3), (4, 5, 6):
        lines = run(here, "counter_bot.py", "--offline", "--directory", elsewhere)
        assert answers(lines) == counted(*numbers)
    assert list(here.iterdir()) == []


def test_the_form_is_filled_in_step_by_step(tmp_path: Path) -> None:
    pytest.importorskip("telebot")
    lines = run(tmp_path, "form_bot.py", "--offline")
    assert list(zip(lines[::2], answers(lines), strict=True)) == [
        ("Alex: /start", "What is your name?"),
        ("Alex: Alex", "How old are you?"),
        ("Alex: /cancel", "Cancelled."),
        ("Alex: Hm", "Say /start to fill in the form, /cancel to leave it, /me to see it."),
        ("Alex: /start", "What is your name?"),
        ("Alex: Alex", "How old are you?"),
        ("Alex: old enough", "A number, please."),
        ("Alex: 33", "Done. Nice to meet you, Alex!"),
        ("Alex: /me", "Alex, 33"),
    ]


def test_the_job_gives_each_coupon_once(tmp_path: Path) -> None:
    assert run(tmp_path, "cron_job.py") == [
        "first night: 2 coupons",
        "  user 2",
        "  user 3",
        "second night: 0 coupons",
        "stored for user 2: $ttl, coupon, visits",
    ]


@pytest.mark.parametrize("example", ["counter_bot.py", "form_bot.py"])
def test_a_bot_without_a_token_says_what_to_do(tmp_path: Path, example: str) -> None:
    pytest.importorskip("telebot")
    with pytest.raises(AssertionError, match="Set TOKEN to the token of your bot, or try --off"):
        run(tmp_path, example)
