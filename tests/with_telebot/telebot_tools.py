"""What the tests of TeleBot share: a bot, and updates for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
from conftest import stop_telebot  # noqa: E402
from telebot import types  # noqa: E402
from telebot.handler_backends import State, StatesGroup  # noqa: E402
from telebot.storage import StateMemoryStorage  # noqa: E402

import session_sync.telebot  # noqa: E402
from session_sync import DiskStorage, MemoryStorage, SessionManager, SQLiteStorage  # noqa: E402

KEY = "user:1:chat:1"

# What a newer telebot says besides to its own storages of states, which tell bots apart.
OF_BOT = {"bot_id": 1} if "bot_id" in signature(StateMemoryStorage.get_data).parameters else {}


class Form(StatesGroup):  # type: ignore[misc] # telebot has no types
    name = State()
    age = State()


class FailedError(Exception):
    """What a handler raises."""


class Exceptions:
    """An exception handler that keeps what it gets, and what was stored at that moment."""

    def __init__(self, sessions: SessionManager[Any] | None = None) -> None:
        self.got: list[Exception] = []
        self.stored: list[Any] = []
        self._sessions = sessions
        self._arrived = threading.Semaphore(0)

    def handle(self, error: Exception) -> bool:
        self.got.append(error)
        if self._sessions is not None:
            with self._sessions.session_scope(KEY) as session:
                self.stored.append(dict(session))
        self._arrived.release()
        return True

    def wait(self) -> None:
        assert self._arrived.acquire(timeout=10)


class Bots:
    """Makes bots, and stops them when the test is over."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def __call__(self, sessions: SessionManager[Any] | None, **options: Any) -> Any:
        bot = telebot.TeleBot("1:token", **{"threaded": False, **options})
        self._made.append(bot)
        if sessions is not None:
            session_sync.telebot.install(bot, sessions)
        return bot

    def stop(self) -> None:
        for bot in self._made:
            stop_telebot(bot)


def bot_maker() -> Iterator[Bots]:
    bots = Bots()
    yield bots
    bots.stop()


def make_threaded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_sessions() -> SessionManager[Any]:
    return SessionManager()


STORES = ("memory", "sqlite", "disk", "redis")


def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A storage of the kind that `request.param` names."""
    if request.param == "redis":
        from session_sync import RedisStorage

        url = request.getfixturevalue("redis_url")
        made: Any = RedisStorage(url, prefix=f"{request.node.name}:")
    elif request.param == "disk":
        made = DiskStorage(tmp_path / "d")
    else:
        made = MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "s.db")
    yield made
    if request.param != "memory":
        made.close()


def feed(bot: Any, *updates: dict[str, Any]) -> None:
    bot.process_new_updates([types.Update.de_json(update) for update in updates])


def drain(sessions: SessionManager[Any], *keys: str) -> None:
    """Wait until every update of the keys has been handled: they are served in order."""
    for key in keys or (KEY,):
        while sessions.locks.is_locked(key):
            with sessions.session_scope(key):
                pass


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)
