"""Updates per second of 1, 8 and 64 threads, on different keys and on one; and what is kept.

The number of updates is the same for any number of threads, which share them out. On CPython with
its GIL no more than one thread runs at a time, so "to 1 thread" is at most 1. telebot's
`retrieve_data` takes no lock: whoever reads while somebody else is about to write, loses that. A
dict behind one lock is the floor.

The last table is the same on one key, with a handler that lets the others run between reading and
writing, as any handler does that talks to the network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..fields import COUNTER, SMALL, USER, message
from ..setting import Place, Setting
from ..sides import ours, telebot
from ..tables import Cell, Table, table
from ..timing import Rounds, Spread, in_threads, in_turns, share_of

THREADS = (1, 8, 64)
KEYS = ("different keys", "one key")

# Adds 1 to the counter of a user, with something done between reading and writing.
Add = Callable[[int, Callable[[], object]], None]
# A store whose users have a counter: how to add 1 to one, and how to read one.
Store = tuple[Add, Callable[[int], int]]
Open = Callable[[Place, int], Store]


def run(setting: Setting) -> list[Table]:
    """Speed and loss, in memory and on SQLite; then loss alone, in every store."""
    return [
        _speed(setting, "threads_memory", "in memory", setting.scaled(32_000, quick=128), _MEMORY),
        _speed(setting, "threads_sqlite", "on disk", setting.scaled(3_200, quick=128), _DISK),
        *_lost(setting),
    ]


def _speed(setting: Setting, name: str, where: str, updates: int, stores: dict[str, Open]) -> Table:
    cases = [(side, keys, threads) for side in stores for keys in KEYS for threads in THREADS]
    speed: dict[str, list[float]] = {str(case): [] for case in cases}
    kept: dict[str, list[float]] = {str(case): [] for case in cases}
    number_of_rounds = setting.fewer(3)
    for case in in_turns(cases, number_of_rounds):
        side, keys, threads = case
        users = 1 if keys == "one key" else threads
        seconds, count = _hammer(setting, stores[side], threads, users, updates, _nothing)
        speed[str(case)].append(updates / seconds)
        kept[str(case)].append(count / updates)
    rounds = Rounds(speed)

    def row(side: str, keys: str, threads: int) -> list[Cell]:
        this, one = str((side, keys, threads)), str((side, keys, 1))
        to_one: Cell = "" if threads == 1 else rounds.ratio(this, to=one)
        share = Spread.of(kept[this]) * 100
        return [f"{side}, {keys}, {threads}", rounds.of(this), to_one, share]

    return table(
        name,
        f"Updates per second by number of threads, {where}",
        f"Median (quartiles) of {number_of_rounds} rounds, for {updates:,} updates, which the "
        f"threads share out.",
        ("side, keys, threads", "updates per second", "to 1 thread", "kept, %"),
        (row(*case) for case in cases),
    )


def _lost(setting: Setting) -> Iterator[Table]:
    threads, updates = 8, setting.scaled(1_600, quick=16)
    stores = {**_MEMORY, **_DISK, **_PICKLE, **(_REDIS if setting.has_redis else {})}
    kept: dict[str, list[float]] = {name: [] for name in stores}
    speed: dict[str, list[float]] = {name: [] for name in stores}
    rounds = setting.fewer(5)
    for name in in_turns(stores, rounds):
        seconds, count = _hammer(setting, stores[name], threads, 1, updates, _let_others_run)
        kept[name].append(count)
        speed[name].append(updates / seconds)
    title = f"What is kept of {updates:,} additions to one counter by {threads} threads"
    head = ("", f"kept of {updates:,}", "updates per second")
    yield table(
        "threads_lost",
        title,
        f"Median (quartiles) of {rounds} rounds; lost ones are counted among the updates per "
        f"second. With one lock for all users, each user waits for all users' handlers.",
        head,
        ((name, Spread.of(kept[name]), Spread.of(speed[name])) for name in stores),
    )
    yield table(
        "threads_short",
        title,
        f"Medians of {rounds} rounds. telebot is fast here because its handlers do not wait for "
        f"each other; that is how changes get lost.",
        head,
        (
            (name, round(Spread.of(kept[name]).median), round(Spread.of(speed[name]).median))
            for name in stores
            if not name.startswith("with lock")
        ),
    )


def _hammer(
    setting: Setting,
    open_store: Open,
    threads: int,
    users: int,
    updates: int,
    between: Callable[[], object],
) -> tuple[float, int]:
    """Seconds for `updates` updates by `threads` threads, and how many were kept."""
    with Place(setting) as place:
        add, counter = open_store(place, users)

        def run(number: int) -> None:
            for _ in range(share_of(updates, threads, number)):
                add(number % users, between)

        seconds = in_threads(threads, run)
        return seconds, sum(counter(user) - COUNTER for user in range(users))


def _nothing() -> None:
    pass


def _let_others_run() -> None:
    time.sleep(0)


# -- the stores


def _ours(place: Place, kind: str, users: int) -> Store:
    updates = [message(USER + number) for number in range(users)]
    sessions = ours.sessions_with(place, kind, SMALL, updates[0], lock_timeout=None)
    for update in updates:
        with sessions.session_scope(update) as session:
            session.update(SMALL)

    def add(user: int, between: Callable[[], object]) -> None:
        with sessions.session_scope(updates[user]) as session:
            counter = session["counter"]
            between()
            session["counter"] = counter + 1

    def counter(user: int) -> int:
        with sessions.session_scope(updates[user]) as session:
            return int(session["counter"])

    return add, counter


def _telebot(place: Place, kind: str, users: int) -> Store:
    bot = telebot.bot_with(telebot.storage_of(place, kind), SMALL)
    for number in range(users):
        telebot.add_user(bot, SMALL, USER + number)

    def add(user: int, between: Callable[[], object]) -> None:
        with bot.retrieve_data(USER + user, USER + user) as data:
            counter = data["counter"]
            between()
            data["counter"] = counter + 1

    def counter(user: int) -> int:
        with bot.retrieve_data(USER + user, USER + user) as data:
            return int(data["counter"])

    return add, counter


def _dict(_place: Place, users: int) -> Store:
    lock = threading.Lock()
    data: dict[int, dict[str, Any]] = {user: dict(SMALL) for user in range(users)}

    def add(user: int, between: Callable[[], object]) -> None:
        with lock:
            counter = data[user]["counter"]
            between()
            data[user]["counter"] = counter + 1

    return add, lambda user: int(data[user]["counter"])


_MEMORY: dict[str, Open] = {
    "session_sync, memory": lambda place, users: _ours(place, "memory", users),
    "telebot retrieve_data, memory": lambda place, users: _telebot(place, "memory", users),
    "with lock: dict": _dict,
}
_DISK: dict[str, Open] = {
    "session_sync, SQLite": lambda place, users: _ours(place, "SQLite", users),
    "session_sync, disk": lambda place, users: _ours(place, "disk", users),
}
_PICKLE: dict[str, Open] = {
    "telebot retrieve_data, pickle": lambda place, users: _telebot(place, "pickle", users),
}
_REDIS: dict[str, Open] = {
    "session_sync, Redis": lambda place, users: _ours(place, "Redis", users),
    "telebot retrieve_data, Redis": lambda place, users: _telebot(place, "Redis", users),
}
