"""Runs a bot's own program against a Bot API on this machine: `python -m session_sync.testing`.

A line that is typed is a message of a user called Alex, and what the bot answers is printed. The
program stays as it is, with whatever token. This is the one place in `testing` that knows telebot
and python-telegram-bot: it tells them where Telegram is.
"""

from __future__ import annotations

import argparse
import inspect
import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from session_sync.testing.bot_api import OfflineBotAPI

_PATIENCE: Final = 10.0  # seconds in which an answer is expected before the next line is sent
_GRACE: Final = 0.5  # seconds for what a handler does after its last answer: it is saved, above all


def main() -> None:
    """Run the program that the command line names, and let Alex talk to it."""
    parser = argparse.ArgumentParser(
        prog="python -m session_sync.testing",
        description="Run a bot on this machine, without Telegram: what you type is said to it by a "
        "user called Alex, and its answers are printed. Ctrl-D ends the chat and the bot.",
    )
    parser.add_argument("program", help="the bot, as in: python program.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what it is given")
    options = parser.parse_args()

    with OfflineBotAPI(longest_poll=0.2) as api:
        _redirect(api)
        chat = _Chat(api)
        os.environ.setdefault("TOKEN", api.token)
        sys.argv = [options.program, *options.arguments]
        sys.path[0] = str(Path(options.program).resolve().parent)
        with suppress(KeyboardInterrupt):  # which is how a bot is stopped
            try:
                runpy.run_path(options.program, run_name="__main__")
            finally:
                chat.leave_program_alone()
        api.close()
        chat.end()


def _redirect(api: OfflineBotAPI) -> None:
    """Let each library that is installed take `api` for Telegram, and any token for its bot's."""
    if find_spec("telebot"):
        from telebot import apihelper

        apihelper.API_URL = f"{api.base_url}{api.token}/{{1}}"
        if find_spec("aiohttp"):
            from telebot import asyncio_helper

            asyncio_helper.API_URL = apihelper.API_URL
    if find_spec("telegram"):
        from telegram import Bot

        original = Bot.__init__
        signature = inspect.signature(original)

        def redirected(self: Bot, *args: Any, **kwargs: Any) -> None:
            call = signature.bind(self, *args, **kwargs)
            call.arguments |= {"token": api.token, "base_url": api.base_url}
            original(*call.args, **call.kwargs)

        setattr(Bot, "__init__", redirected)  # noqa: B010 (for type checkers)


class _Chat:
    """Alex, who says what comes from the terminal or a pipe."""

    def __init__(self, api: OfflineBotAPI) -> None:
        self._api: Final = api
        self._answered: Final = threading.Event()
        self._mutex: Final = threading.Lock()
        self._runs = True
        self._reads: Final = threading.Thread(target=self._read, daemon=True)
        self._reads.start()
        threading.Thread(target=self._write, daemon=True).start()

    def leave_program_alone(self) -> None:
        """It has ended: what comes now is not to be interrupted."""
        with self._mutex:
            self._runs = False

    def end(self) -> None:
        """Print what has not been printed yet; the server has been closed."""
        self._reads.join()

    def _read(self) -> None:
        alex = self._api.user(1, first_name="Alex")
        with suppress(TimeoutError):  # the server was closed
            while True:
                reply = alex.reply(threading.TIMEOUT_MAX)
                print(" bot:", reply.text, flush=True)
                self._answered.set()

    def _write(self) -> None:
        alex = self._api.user(1, first_name="Alex")
        try:
            self._api.call("getUpdates", threading.TIMEOUT_MAX)
        except TimeoutError:  # the server was closed: this was no bot that polls
            return
        # Not sys.stdin: Python locks it when it ends, and this thread may be reading then.
        with open(0, closefd=False, encoding=sys.stdin.encoding) as lines:
            for line in lines:
                text = line.rstrip("\n")
                if not lines.isatty():
                    print("Alex:", text, flush=True)
                self._answered.clear()
                alex.send(text)
                if not self._answered.wait(_PATIENCE):
                    print(f"(no answer within {_PATIENCE:g} s)", file=sys.stderr, flush=True)
        time.sleep(_GRACE)
        with self._mutex:
            if self._runs:
                _interrupt()


def _interrupt() -> None:
    """Press Ctrl-C: every bot knows how to end by that."""
    if hasattr(signal, "pthread_kill"):
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)  # which wakes it, if it waits
    else:
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
