"""What the tests of AsyncTeleBot share: a bot, and updates for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("aiohttp", reason="needs aiohttp")
from conftest import run_client  # noqa: E402
from telebot import types  # noqa: E402
from telebot.async_telebot import AsyncTeleBot  # noqa: E402
from telebot.asyncio_handler_backends import BaseMiddleware  # noqa: E402

import session_sync.telebot  # noqa: E402
from session_sync import SessionManager  # noqa: E402

KEY = "user:1:chat:1"


class Exceptions:
    """An exception handler that keeps what it gets, and what the session was at that moment."""

    def __init__(self, sessions: SessionManager[Any] | None = None, answer: bool = True) -> None:
        self.got: list[Exception] = []
        self.sessions: list[Any] = []
        self._sessions = sessions
        self._answer = answer

    def handle(self, error: Exception) -> bool:
        self.got.append(error)
        if self._sessions is not None:
            with self._sessions.session_scope(KEY) as session:
                self.sessions.append(dict(session))
        return self._answer


class Middleware(BaseMiddleware):
    """Calls what it is given, before and after the handlers of messages."""

    def __init__(
        self,
        before: Callable[[Any, Any], Any] = lambda m, data: None,
        after: Callable[[Any, Any], Any] = lambda m, exception: None,
    ) -> None:
        self.update_types = ["message"]
        self._before = before
        self._after = after

    async def pre_process(self, m: Any, data: Any) -> Any:
        await asyncio.sleep(0)
        return self._before(m, data)

    async def post_process(self, m: Any, data: Any, exception: Any) -> None:
        await asyncio.sleep(0)
        self._after(m, exception)


def make_sessions() -> SessionManager[Any]:
    return SessionManager()


def make_bot(sessions: SessionManager[Any], **options: Any) -> Any:
    return session_sync.telebot.install(AsyncTeleBot("1:token", **options), sessions)


def run(main: Coroutine[Any, Any, None]) -> None:
    run_client(asyncio.wait_for(main, 60))


def updates(*raw: dict[str, Any]) -> list[Any]:
    return [types.Update.de_json(update) for update in raw]


def feed(bot: Any, *raw: dict[str, Any]) -> None:
    run(bot.process_new_updates(updates(*raw)))


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)


def locks(sessions: SessionManager[Any]) -> Any:
    return sessions.locks


async def count(update: Any) -> None:
    """A handler that loses updates if it is not alone with its session."""
    counter = update.session.get("counter", 0)
    await asyncio.sleep(0)
    update.session.counter = counter + 1


async def note(update: Any) -> None:
    """A handler that keeps the order in which updates were begun, and ended."""
    text = getattr(update, "text", None) or update.data
    trail = update.session.setdefault("trail", [])
    trail.append(text)
    for _ in range(int(text) % 3):
        await asyncio.sleep(0)
    trail.append(text)


def twice(texts: range) -> list[str]:
    return [str(number) for number in texts for _ in "12"]


def register_for_all(bot: Any, handler: Callable[..., Any]) -> None:
    bot.register_message_handler(handler, func=lambda m: True)
    bot.register_callback_query_handler(handler, func=lambda q: True)


def keyless_if_bad(update: Any) -> str:
    if "bad" in update.text:
        raise LookupError(update.text)
    return KEY
