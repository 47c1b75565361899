"""A short chat with a bot, played on this machine and printed: no token and no network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from session_sync.testing import OfflineBotAPI

if TYPE_CHECKING:  # an example needs one of the two libraries, not both
    import telebot
    from telegram.ext import Application, ApplicationBuilder

TOKEN = "123456:OFFLINE"


def play(bot: telebot.TeleBot, chat: Iterable[str]) -> None:
    """Let Alex say the lines of `chat` to a bot of telebot's."""
    from telebot import apihelper

    with OfflineBotAPI(TOKEN, longest_poll=0.1) as api:
        apihelper.API_URL = api.telebot_url
        polling = threading.Thread(target=bot.infinity_polling)
        polling.start()
        try:
            talk(api, chat)
        finally:
            bot.stop_bot()
            polling.join()


def play_ptb(
    make_application: Callable[
        [ApplicationBuilder[Any, Any, Any, Any, Any, Any]],
        Application[Any, Any, Any, Any, Any, Any],
    ],
    chat: Iterable[str],
) -> None:
    """Let Alex say the lines of `chat` to a bot of python-telegram-bot's."""
    from telegram.ext import Application

    async def run(api: OfflineBotAPI) -> None:
        application = make_application(Application.builder().token(TOKEN).base_url(api.base_url))
        assert application.updater is not None
        async with application:
            await application.start()
            await application.updater.start_polling()
            try:
                await asyncio.to_thread(talk, api, chat)
            finally:
                await application.updater.stop()
                await application.stop()

    with OfflineBotAPI(TOKEN, longest_poll=0.1) as api:
        asyncio.run(run(api))


def talk(api: OfflineBotAPI, chat: Iterable[str]) -> None:
    """Say one line after the other, and wait for each answer."""
    alex = api.user(1, first_name="Alex")
    for text in chat:
        print("Alex:", text)
        alex.send(text)
        print(" bot:", alex.reply().text)
