"""Declared fields in the handlers of telebot and python-telegram-bot."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import message

from session_sync import (
    Session,
    SessionManager,
    SessionTypeError,
    SessionVersionError,
    StrictSession,
    field,
)

TOKEN = "123456:OFFLINE"


@dataclass
class Line:
    name: str
    price: int


class Cart(Session):
    lines: list[Line] = field(default_factory=list)
    counter: int = 0


class Strict(StrictSession):
    counter: int = 0


def telebot_with(sessions: SessionManager[Any], handler: Any) -> tuple[Any, list[Exception]]:
    telebot = pytest.importorskip("telebot", reason="needs pyTelegramBotAPI")
    import session_sync.telebot

    errors: list[Exception] = []

    class Handler(telebot.ExceptionHandler):  # type: ignore[misc, name-defined]
        def handle(self, exception: Exception) -> bool:
            errors.append(exception)
            return True

    bot = telebot.TeleBot(TOKEN, threaded=False, exception_handler=Handler())
    session_sync.telebot.install(bot, sessions)
    bot.message_handler(func=lambda _: True)(handler)
    return bot, errors


def say(bot: Any, text: str) -> None:
    import telebot

    bot.process_new_updates([telebot.types.Update.de_json(message(text=text))])


def test_telebot_handlers_have_what_was_declared() -> None:
    def handler(update: Any) -> None:
        session: Cart = update.session
        session.lines.append(Line(update.text, 1))
        session.lines[0].price += 1
        if update.text == "wrong":
            session.counter = "x"  # type: ignore[assignment]
        if update.text == "replace":
            update.session = {"counter": 5}
        if update.text == "replace wrongly":
            update.session = {"counter": 7, "lines": 5}

    sessions = SessionManager(Cart)
    bot, errors = telebot_with(sessions, handler)
    say(bot, "tea")
    say(bot, "wrong")
    assert isinstance(errors.pop(), SessionTypeError)
    say(bot, "milk")
    assert sessions.storage.get("user:1:chat:1") == {
        "lines": [{"name": "tea", "price": 3}, {"name": "milk", "price": 1}]
    }
    say(bot, "replace")
    assert sessions.storage.get("user:1:chat:1") == {"counter": 5}
    say(bot, "replace wrongly")
    assert isinstance(errors.pop(), SessionTypeError)
    assert sessions.storage.get("user:1:chat:1") == {"counter": 5}
    assert not errors


def test_what_a_telebot_handler_breaks_inside_a_list_is_not_saved() -> None:
    def handler(update: Any) -> None:
        update.session.counter += 1
        update.session.lines.append(update.text)

    sessions = SessionManager(Cart)
    bot, errors = telebot_with(sessions, handler)
    say(bot, "tea")
    (error,) = errors
    assert "lines[0] has become str, where Cart declares Line" in str(error)
    assert not sessions.storage.has("user:1:chat:1")


def test_decorated_telebot_handlers_have_what_was_declared() -> None:
    sessions = SessionManager(Strict)
    seen: list[int] = []

    @sessions.with_session
    def handler(update: Any, session: Strict) -> None:
        session.counter += 1
        seen.append(session.counter)

    bot, errors = telebot_with(SessionManager(), handler)
    say(bot, "one")
    say(bot, "two")
    assert (seen, errors) == ([1, 2], [])


def test_a_session_of_a_newer_version_fails_its_update_and_stays() -> None:
    sessions = SessionManager(Cart)
    sessions.storage.set("user:1:chat:1", {"$version": 2, "x": 1})
    bot, errors = telebot_with(sessions, lambda update: pytest.fail("it ran"))
    say(bot, "tea")
    assert isinstance(errors.pop(), SessionVersionError)
    assert sessions.storage.get("user:1:chat:1") == {"$version": 2, "x": 1}


@pytest.mark.parametrize("lazy", [False, True])
def test_ptb_handlers_have_what_was_declared(lazy: bool, api: Any) -> None:
    ext = pytest.importorskip("telegram.ext", reason="needs python-telegram-bot")
    from telegram import Update

    from session_sync.ptb import install

    sessions = SessionManager(Cart, lazy=lazy)
    errors: list[Any] = []

    async def handler(update: Any, context: Any) -> None:
        session: Cart = await context.session
        session.lines.append(Line(update.message.text, 1))
        session.lines[0].price += 1
        if update.message.text == "wrong":
            session.counter = "x"  # type: ignore[assignment]
        if update.message.text == "replace wrongly":
            context.session = {"counter": 7, "lines": 5}

    async def failed(update: Any, context: Any) -> None:
        errors.append(context.error)
        assert [line.name for line in context.session.lines] == ["tea"]  # rolled back

    async def talk() -> None:
        builder = ext.Application.builder().token(api.token).base_url(api.base_url)
        application = install(builder.updater(None).job_queue(None), sessions).build()
        application.add_handler(ext.MessageHandler(ext.filters.TEXT, handler))
        application.add_error_handler(failed)
        async with application:
            for text in ("tea", "wrong", "replace wrongly", "milk"):
                update = Update.de_json(message(text=text), application.bot)
                await application.process_update(update)

    asyncio.run(talk())
    assert [type(error) for error in errors] == [SessionTypeError, SessionTypeError]
    assert sessions.storage.get("user:1:chat:1") == {
        "lines": [{"name": "tea", "price": 3}, {"name": "milk", "price": 1}]
    }
