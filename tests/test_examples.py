"""The examples, each run as a newcomer runs it: as a process of its own, offline."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_client

from session_sync import SessionManager, StorageKey
from session_sync.testing import OfflineBotAPI

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


def test_the_counter_goes_on_in_another_library(tmp_path: Path) -> None:
    pytest.importorskip("telebot")
    pytest.importorskip("telegram.ext")
    bots = ["ptb_counter_bot.py", "ptb_counter_bot.py", "counter_bot.py", "ptb_counter_bot.py"]
    for number, bot in enumerate(bots):
        lines = run(tmp_path, bot, "--offline")
        assert lines[0] == "Alex: Hello!"
        assert answers(lines) == counted(*range(3 * number + 1, 3 * number + 4))
    assert [path.name for path in tmp_path.iterdir()] == ["sessions"]


@pytest.mark.parametrize(
    ("library", "example"), [("telebot", "form_bot.py"), ("telegram.ext", "ptb_form_bot.py")]
)
def test_the_form_is_filled_in_step_by_step(tmp_path: Path, library: str, example: str) -> None:
    pytest.importorskip(library)
    lines = run(tmp_path, example, "--offline")
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


@pytest.fixture
def ptb_form(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the form, to have other chats with its bot."""
    pytest.importorskip("telegram.ext")
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module("ptb_form_bot")
    for name in ("ptb_form_bot", "offline"):
        sys.modules.pop(name, None)


def test_a_draft_that_was_left_alone_is_begun_anew(ptb_form: Any, capsys: Any) -> None:
    sessions = SessionManager()

    def chat() -> Iterator[str]:
        for answered in ((), ("Alex",)):
            yield from ("/start", *answered)
            with sessions.session_scope(StorageKey(user=1, chat=1)) as session:
                del session.draft  # as its ttl would do
            yield "Sorry, I was away"

    ptb_form.play_ptb(lambda builder: ptb_form.make_application(builder, sessions), chat())
    name, age, late = "What is your name?", "How old are you?", "That took too long. /start again."
    assert answers(capsys.readouterr().out.splitlines()) == [name, late, name, age, late]


def test_the_form_can_be_filled_in_at_one_go(ptb_form: Any) -> None:
    """All at once, with `concurrent_updates`: the ConversationHandler sees one after the other."""
    from telegram.ext import Application

    async def main(api: OfflineBotAPI) -> list[str]:
        builder = Application.builder().token(api.token).base_url(api.base_url)
        application = ptb_form.make_application(builder, SessionManager())
        alex = api.user(1, first_name="Alex")
        for text in ("/start", "Alex", "33", "/me"):
            alex.send(text)
        async with application:
            await application.start()
            await application.updater.start_polling()
            try:
                return [(await alex.areply()).text for _ in range(4)]
            finally:
                await application.updater.stop()
                await application.stop()

    with OfflineBotAPI(longest_poll=0.1) as api:
        said = run_client(main(api))
    name, age = "What is your name?", "How old are you?"
    assert said == [name, age, "Done. Nice to meet you, Alex!", "Alex, 33"]


@pytest.mark.parametrize(
    ("library", "example"),
    [
        ("telebot", "counter_bot.py"),
        ("telebot", "form_bot.py"),
        ("telegram.ext", "ptb_counter_bot.py"),
        ("telegram.ext", "ptb_form_bot.py"),
    ],
)
def test_a_bot_without_a_token_says_what_to_do(tmp_path: Path, library: str, example: str) -> None:
    pytest.importorskip(library)
    with pytest.raises(AssertionError, match="Set TOKEN to the token of your bot, or try --off"):
        run(tmp_path, example)
