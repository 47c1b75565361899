"""One of several processes that add 1 to counters in one store; `sections/processes.py` starts it.

For each task, a line of JSON, it opens the store and says "ready"; told to go by another line, it
works, and says when it began and ended.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import redis
from telebot.storage import StateRedisStorage

from session_sync import RedisStorage, SessionManager, SQLiteStorage

from .fields import SMALL, USER
from .setting import Place, Setting
from .sides import bare, telebot


class Side(NamedTuple):
    """What a process does with a store, given the number of a user."""

    begin: Callable[[int], object]
    add: Callable[[int], object]
    count: Callable[[int], int]


def side_of(side: str, store: str, place: Place) -> Side:
    """One of the sides, with the store in a file or at a URL."""
    opened: dict[str, Callable[[str, Place], Side]] = {
        "session_sync, SQLite": lambda store, place: _ours(SQLiteStorage(store), place),
        "session_sync, Redis": lambda store, place: _ours(RedisStorage(store), place),
        "bare sqlite3": _sqlite,
        "bare Redis": _redis,
        "telebot, Redis": _telebot,
    }
    return opened[side](store, place)


def _key(user: int) -> str:
    return f"user:{USER + user}:chat:{USER + user}"


def _ours(storage: Any, place: Place) -> Side:
    place.callback(storage.close)
    sessions = SessionManager(storage=storage, lock_timeout=None)

    def add(user: int) -> None:
        with sessions.session_scope(_key(user)) as session:
            session["counter"] += 1

    return Side(
        lambda user: storage.set(_key(user), SMALL),
        add,
        lambda user: int(storage.get(_key(user))["counter"]),
    )


def _bytes(get: Callable[[str], Any], put: Callable[[str, bytes], object]) -> Side:
    """A bare store of JSON: it has to decode, or there would be no counter that could be lost."""

    def add(user: int) -> None:
        fields = msgspec.json.decode(get(_key(user)))
        fields["counter"] += 1
        put(_key(user), msgspec.json.encode(fields))

    return Side(
        lambda user: put(_key(user), msgspec.json.encode(SMALL)),
        add,
        lambda user: int(msgspec.json.decode(get(_key(user)))["counter"]),
    )


def _sqlite(store: str, place: Place) -> Side:
    connection = bare.connection_to(place, store)
    return _bytes(
        lambda key: connection.execute(bare.SELECT, (key,)).fetchall()[0][0],
        lambda key, value: connection.execute(bare.UPSERT, (key, value)),
    )


def _redis(store: str, place: Place) -> Side:
    client = redis.Redis.from_url(store)
    place.callback(client.close)
    return _bytes(client.get, client.set)


def _telebot(store: str, place: Place) -> Side:
    storage = StateRedisStorage(redis_url=store)
    place.callback(storage.redis.close)
    bot = telebot.bot_with(storage, SMALL, USER - 1)

    def add(user: int) -> None:
        with bot.retrieve_data(USER + user, USER + user) as data:
            data["counter"] += 1

    def count(user: int) -> int:
        with bot.retrieve_data(USER + user, USER + user) as data:
            return int(data["counter"])

    return Side(lambda user: telebot.add_user(bot, SMALL, USER + user), add, count)


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        task = json.loads(line)
        with Place(Setting(1)) as place:
            add = side_of(task["side"], task["store"], place).add
            print("ready", flush=True)
            sys.stdin.readline()
            begin = time.monotonic()
            for _ in range(task["updates"]):
                add(task["user"])
            end = time.monotonic()
        print(begin, end, flush=True)


if __name__ == "__main__":
    main()
