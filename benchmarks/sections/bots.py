"""End to end: whole bots of telebot and PTB on a local Bot API, with sessions and without.

The real clients poll for updates that wait for them, 50 users in turn, from `OfflineBotAPI` in a
process of its own. One handler counts its user's messages and answers with `send_message`, as bots
do; another only counts, which is the worst that can happen to us. Without sessions the handlers
count in a plain dict, which nobody locks and nothing saves.

telebot has its two threads; PTB handles one update at a time, and then up to 32. (With more than
there are users, PTB alone would have more requests open than with sessions, which let a user's
updates wait for each other; and httpx slows down with their number, so that sessions would make
such a bot several times as fast.) A run begins when the first updates have been handled, so that
connections are there, and ends with the last one. The cost is what is missing of the updates per
second without sessions, within each round. The server takes its share of the machine: on one with
few cores it is part of what limits both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import telebot
from telebot import apihelper
from telegram.ext import Application, MessageHandler, filters

import session_sync.ptb
import session_sync.telebot
from session_sync import SessionManager

from ..fields import TOKEN
from ..setting import Place, Setting
from ..sides import ours
from ..tables import Cell, Table, table
from ..timing import Rounds, Spread, in_turns

_ROOT = Path(__file__).parents[2]
_PATIENCE = 120.0  # seconds for one run

ANSWERS, COUNTS = "answers", "only counts"
CLIENTS = ("telebot", "PTB", "PTB, concurrent_updates(32)")


class Server:
    """The Bot API in another process."""

    def __init__(self, process: Any) -> None:
        self._process = process
        where = json.loads(process.stdout.readline())
        self.base_url: str = where["base_url"]
        self.telebot_url: str = where["telebot_url"]

    def queue(self, updates: int) -> None:
        """Let so many updates wait for the next bot, and no others."""
        forget_all = f"{self.base_url}{TOKEN}/getUpdates?offset=1000000000&timeout=0"
        urllib.request.urlopen(forget_all).close()
        self._process.stdin.write(f"{updates}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "queued\n"


class Progress:
    """Counts handled updates; knows when the last of them is done, and how long all but the first
    ones took."""

    def __init__(self, first: int, all_: int) -> None:
        self._first, self._all = first, all_
        self._number = itertools.count(1)
        self._begin = self._end = 0.0
        self.done = threading.Event()

    def one_more(self) -> None:
        number = next(self._number)
        if number == self._first:
            self._begin = time.perf_counter()
        if number == self._all:
            self._end = time.perf_counter()
            self.done.set()

    def wait(self) -> None:
        if not self.done.wait(_PATIENCE):
            raise TimeoutError("the bot has not handled all updates")

    @property
    def speed(self) -> float:
        """Updates per second."""
        return (self._all - self._first) / (self._end - self._begin)


def run(setting: Setting) -> list[Table]:
    """Each client with each handler and each store."""
    stores = ["no sessions", "memory", "SQLite", *(["Redis"] if setting.has_redis else [])]
    clients = ("telebot", "PTB") if setting.quick else CLIENTS
    handlers = (ANSWERS,) if setting.quick else (ANSWERS, COUNTS)
    cases = list(itertools.product(clients, handlers, stores))
    speed: dict[str, list[float]] = {str(case): [] for case in cases}
    kept: dict[str, list[float]] = {str(case): [] for case in cases}
    with _server() as server:
        for case in in_turns(cases, setting.fewer(3)):
            client, handler, store = case
            updates = setting.scaled(1_000 if handler == ANSWERS else 4_000, quick=10)
            bot = _BOTS[client]
            one_speed, one_kept = _measured(setting, server, bot, handler, store, updates)
            speed[str(case)].append(one_speed)
            kept[str(case)].append(one_kept)
    rounds = Rounds(speed)

    def row(client: str, handler: str, store: str) -> list[Cell]:
        this, plain = str((client, handler, store)), str((client, handler, stores[0]))
        cost: Cell = ""
        if this != plain:
            cost = rounds.share_over(plain, than=this, of=plain) * 100
        return [f"{client}, {handler}, {store}", rounds.of(this), cost, Spread.of(kept[this])]

    return [
        table(
            "bots",
            "Updates per second of a whole bot",
            f"Median (quartiles) of {setting.fewer(3)} rounds; the cost is taken within each.",
            ("client, handler, sessions", "updates per second", "cost, %", "kept, %"),
            (row(*case) for case in cases),
        )
    ]


@contextlib.contextmanager
def _server() -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.bot_server"]
    with subprocess.Popen(
        command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process)


# How a bot counts, given the sessions or None: it returns all that was counted.
Bot = Callable[[Server, Progress, bool, SessionManager[Any] | None], int]


def _measured(
    setting: Setting, server: Server, bot: Bot, handler: str, store: str, updates: int
) -> tuple[float, float]:
    """Updates per second, and the share of them that was counted."""
    first = max(1, updates // 10)
    progress = Progress(first, first + updates)
    server.queue(first + updates)
    with Place(setting) as place:
        sessions = None
        if store != "no sessions":
            sessions = SessionManager(storage=ours.storage_of(place, store))
        counted = bot(server, progress, handler == ANSWERS, sessions)
        if sessions is not None:
            counted = _counted(sessions.storage)
    return progress.speed, 100 * counted / (first + updates)


def _counted(storage: Any) -> int:
    return sum(storage.get(key)["counter"] for key in storage.keys())  # noqa: SIM118 (a storage is no dict)


def _telebot(
    server: Server, progress: Progress, answers: bool, sessions: SessionManager[Any] | None
) -> int:
    apihelper.API_URL = server.telebot_url
    bot = telebot.TeleBot(TOKEN)
    counters: defaultdict[int, int] = defaultdict(int)

    def plain(message: Any) -> None:
        counters[message.from_user.id] += 1
        if answers:
            bot.send_message(message.chat.id, "Counted.")
        progress.one_more()

    def with_session(message: Any) -> None:
        message.session["counter"] = message.session.get("counter", 0) + 1
        if answers:
            bot.send_message(message.chat.id, "Counted.")
        progress.one_more()

    bot.register_message_handler(plain if sessions is None else with_session)
    if sessions is not None:
        session_sync.telebot.install(bot, sessions)
    polling = threading.Thread(target=bot.infinity_polling)
    polling.start()
    try:
        progress.wait()
    finally:
        bot.stop_bot()
        polling.join()
    return sum(counters.values())


def _ptb(concurrent: bool) -> Bot:
    def bot(
        server: Server, progress: Progress, answers: bool, sessions: SessionManager[Any] | None
    ) -> int:
        return asyncio.run(_run_ptb(server, progress, answers, sessions, concurrent))

    return bot


async def _run_ptb(
    server: Server,
    progress: Progress,
    answers: bool,
    sessions: SessionManager[Any] | None,
    concurrent: bool,
) -> int:
    counters: defaultdict[int, int] = defaultdict(int)

    async def plain(update: Any, context: Any) -> None:
        counters[update.effective_user.id] += 1
        if answers:
            await context.bot.send_message(update.effective_chat.id, "Counted.")
        progress.one_more()

    async def with_session(update: Any, context: Any) -> None:
        context.session["counter"] = context.session.get("counter", 0) + 1
        if answers:
            await context.bot.send_message(update.effective_chat.id, "Counted.")
        progress.one_more()

    builder: Any = Application.builder().token(TOKEN).base_url(server.base_url)
    if concurrent:
        builder = builder.concurrent_updates(32)
    if sessions is not None:
        builder = session_sync.ptb.install(builder, sessions)
    application = builder.build()
    handler = plain if sessions is None else with_session
    application.add_handler(MessageHandler(filters.ALL, handler))
    async with application:
        await application.start()
        await application.updater.start_polling()
        try:
            await asyncio.to_thread(progress.wait)
        finally:
            await application.updater.stop()
            await application.stop()
    return sum(counters.values())


_BOTS: dict[str, Bot] = {
    "telebot": _telebot,
    "PTB": _ptb(concurrent=False),
    "PTB, concurrent_updates(32)": _ptb(concurrent=True),
}
