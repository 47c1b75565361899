"""Every program on a page, copied into an empty folder, does what the page says, word for word.

The quick starts and the recipes print a program, the command that runs it, and the chat that one
then has with it. The command is run as it stands there, as a process; the lines of Alex's are typed
in, and what is printed has to be the chat of the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pages
import pytest
from pages import (
    DOCS,
    PAGES,
    ROOT,
    Run,
    follow,
    programs_of,
    snippets,
    steps,
    title,
    typed_in,
)

from session_sync import SessionManager, SQLiteStorage

WITH_PROGRAMS = [page for page in PAGES if programs_of(page)]
QUICK_STARTS = sorted((DOCS / "quickstart").glob("*.md"))


def run(folder: Path, command: str, typed: str) -> str:
    return pages.run(folder, command, typed, ROOT)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[None]]]:
    """Every page, several at a time: a program waits for longer than it computes."""
    for library in ("telebot", "telegram.ext"):
        pytest.importorskip(library, reason="needs the extras 'telebot' and 'ptb'")
    folders = {page: tmp_path_factory.mktemp(page.stem) for page in WITH_PROGRAMS}
    with ThreadPoolExecutor(4) as pool:
        yield {page: pool.submit(follow, page, folder, ROOT) for page, folder in folders.items()}


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=title)
def test_who_follows_a_page_sees_what_it_says(
    page: Path, followed: dict[Path, Future[None]]
) -> None:
    followed[page].result()


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=title)
def test_every_program_is_run(page: Path) -> None:
    commands = [step.command for step in steps(page) if isinstance(step, Run)]
    for program in programs_of(page):
        assert any(str(program.file) in command.split() for command in commands), program.file


@pytest.mark.parametrize("page", QUICK_STARTS, ids=title)
def test_a_quick_start_is_run_twice_and_goes_on_where_it_ended(page: Path) -> None:
    runs = [step for step in steps(page) if isinstance(step, Run)]
    for first, again in zip(runs[::2], runs[1::2], strict=True):
        assert first.command == again.command
        assert first.printed != again.printed
    assert runs


@pytest.mark.parametrize("page", QUICK_STARTS, ids=title)
def test_a_command_with_a_token_names_a_program_of_the_page(page: Path) -> None:
    files = {program.file for program in programs_of(page)}
    for snippet in snippets(page):
        for name in re.findall(r"^TOKEN=\S+ python (\S+)$", snippet.code, re.M):
            assert name in files


# -- the end of a program


def test_stop_bot_waits_for_a_handler_that_is_running(tmp_path: Path) -> None:
    """The handler begins its work when the program has left `infinity_polling`."""
    pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    program = """if True:
        import threading, telebot, session_sync.telebot
        from session_sync import SessionManager, SQLiteStorage

        bot = telebot.TeleBot("77:mine")
        sessions = SessionManager(storage=SQLiteStorage("sessions.db"))
        session_sync.telebot.install(bot, sessions)
        left = threading.Event()

        @bot.message_handler(func=lambda message: True)
        def count(message):
            bot.reply_to(message, "Counting.")
            left.wait()
            for number in range(300):
                message.session.counter = number
                message.session.flush()
            message.session.done = True

        bot.infinity_polling()
        left.set()
        bot.stop_bot()
    """
    (tmp_path / "bot.py").write_text(program)
    chat = "Alex: hi\n bot: Counting.\n"
    assert run(tmp_path, "python -m session_sync.testing bot.py", typed_in(chat)) == chat
    with SessionManager(storage=SQLiteStorage(tmp_path / "sessions.db")) as sessions:
        assert sessions.storage.get("user:1:chat:1") == {"counter": 299, "done": True}


# -- the runner


def test_a_program_gets_its_arguments_and_its_folder(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("name = 'other'\n")
    (tmp_path / "program.py").write_text("import other, sys\nprint(other.name, sys.argv)\n")
    printed = run(tmp_path, "python -m session_sync.testing program.py --fast 1", "")
    assert printed == "other ['program.py', '--fast', '1']\n"


def test_a_program_that_fails_fails_here_too(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("raise SystemExit(3)\n")
    run(tmp_path, "python -m session_sync.testing program.py || test $? = 3", "")


@pytest.mark.parametrize(
    "make",
    ["telebot.TeleBot('77:mine').get_me()", "asyncio.run(me(telegram.Bot(token='77:mine')))"],
)
def test_any_token_will_do(tmp_path: Path, make: str) -> None:
    pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    pytest.importorskip("telegram", reason="needs the extra 'ptb'")
    program = f"""if True:
        import asyncio, telebot, telegram
        async def me(bot):
            async with bot:
                return await bot.get_me()
        print({make}.username)
    """
    (tmp_path / "program.py").write_text(program)
    command = "python -m session_sync.testing program.py"
    assert run(tmp_path, command, "") == "offline_bot\n"
