"""A bot of each framework behind one face, for tests that hold for all of them."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest

from session_sync.testing import OfflineBotAPI

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("aiohttp", reason="needs aiohttp")
telegram = pytest.importorskip("telegram", reason="needs the extra 'ptb'")
ext = pytest.importorskip("telegram.ext")

from telebot.async_telebot import AsyncTeleBot  # noqa: E402

import session_sync.ptb  # noqa: E402
import session_sync.telebot  # noqa: E402

BOTS = ["TeleBot", "TeleBot in threads", "AsyncTeleBot", "ptb"]
SOON = 20  # seconds until a test gives up waiting for what has to come

# What a handler does with what has the sessions: a message, or a context.
Work = Callable[[Any], Any]


class Group:
    """A bot of some framework; what it does with each message, and what came of it."""

    def __init__(self, name: str, **installed: Any) -> None:
        self.name = name
        self.installed = installed
        self.errors: list[Exception] = []

    def play(self, work: Work, *updates: dict[str, Any]) -> None:
        """Handle the updates one after the other, and stop."""
        if self.name == "ptb":
            asyncio.run(asyncio.wait_for(self._ptb(work, *updates), 60))
        elif self.name == "AsyncTeleBot":
            asyncio.run(asyncio.wait_for(self._async_telebot(work, *updates), 60))
        else:
            self._telebot(work, *updates)

    def handle(self, error: Exception) -> bool:  # as telebot calls it
        self.errors.append(error)
        return True

    def _telebot(self, work: Work, *updates: dict[str, Any]) -> None:
        threaded = self.name == "TeleBot in threads"
        bot = telebot.TeleBot("1:token", threaded=threaded, exception_handler=self)
        session_sync.telebot.install(bot, **self.installed)
        handled = threading.Semaphore(0)
        register(bot, lambda m: work(m))
        if threaded:  # a worker that has put down its last task is done with it
            put = bot.worker_pool.put

            def put_counted(task: Any, *args: Any, **kwargs: Any) -> None:
                def run() -> None:
                    try:
                        task(*args, **kwargs)
                    finally:
                        handled.release()

                put(run)

            bot.worker_pool.put = put_counted
        for update in updates:
            bot.process_new_updates([telebot.types.Update.de_json(update)])
            if threaded:
                assert handled.acquire(timeout=SOON)
        stop(bot)

    async def _async_telebot(self, work: Work, *updates: dict[str, Any]) -> None:
        bot = AsyncTeleBot("1:token", exception_handler=self)
        session_sync.telebot.install(bot, **self.installed)

        async def handle(m: Any) -> None:
            answer = work(m)
            if inspect.isawaitable(answer):
                await answer

        register(bot, handle)
        for update in updates:
            await bot.process_new_updates([telebot.types.Update.de_json(update)])

    async def _ptb(self, work: Work, *updates: dict[str, Any]) -> None:
        async def handle(update: Any, context: Any) -> None:
            answer = work(context)
            if inspect.isawaitable(answer):
                await answer

        async def failed(update: Any, context: Any) -> None:
            self.errors.append(context.error)

        with OfflineBotAPI() as api:
            builder = ext.Application.builder().token(api.token).base_url(api.base_url)
            app = session_sync.ptb.install(builder, **self.installed).build()
            app.add_handler(ext.TypeHandler(telegram.Update, handle))
            app.add_error_handler(failed)
            async with app:
                for update in updates:
                    await app.process_update(telegram.Update.de_json(update, app.bot))


def stop(bot: Any) -> None:
    """As stop_bot(), but its workers need not wake by themselves, as they do twice a second."""
    stopping = threading.Thread(target=bot.stop_bot)
    stopping.start()
    while stopping.is_alive():
        if bot.threaded:
            bot.worker_pool.tasks.put((str, (), {}))
        stopping.join(0.01)


def register(bot: Any, handle: Any) -> None:
    kinds = ["text", "migrate_to_chat_id"]
    bot.register_message_handler(handle, func=lambda m: True, content_types=kinds)
    bot.register_callback_query_handler(handle, func=lambda q: True)
    bot.register_poll_handler(handle, func=lambda p: True)
