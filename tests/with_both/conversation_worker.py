"""One process of a bot with a conversation, for test_conversation_processes.py.

Usage: framework, URL of the store, URL of a Bot API, token. Reads updates as lines of JSON, handles
them side by side, and prints the ID of each that is handled.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from session_sync import SessionManager, storage_from_url

NEXT = {"A": "B", "B": "C", "C": "A"}  # the states of a user who writes message after message


def told(update_id: int) -> None:
    os.write(1, b"%d\n" % update_id)  # in one piece, whichever thread does it


def count(session: Any, state: str, text: str) -> None:
    """Note a message that came in `state`: the n-th message has to come in the n-th one."""
    number = session.get("counter", 0)
    session.counter = number + 1
    if state != "ABC"[number % 3]:
        session.wrong = [*session.get("wrong", []), (number, state)]
    if text == "die":  # in the middle of a step
        os.kill(os.getpid(), signal.SIGKILL)


async def run_ptb(sessions: SessionManager[Any], api: str, token: str) -> None:
    from telegram import Update
    from telegram.ext import Application, CommandHandler, MessageHandler, filters

    from session_sync.ptb import ConversationHandler, install

    def answer(state: str) -> Any:
        async def callback(update: Any, context: Any) -> object:
            text = update.effective_message.text
            count(context.session, state, text)
            if text == "end":
                context.session.finished = context.session.get("finished", 0) + 1
                return ConversationHandler.END
            return NEXT[state]

        return MessageHandler(filters.TEXT & ~filters.COMMAND, callback)

    async def start(_update: Any, context: Any) -> object:
        context.session.counter = 0
        return "A"

    builder = Application.builder().token(token).base_url(api).updater(None)
    application = install(builder, sessions).build()
    application.add_handler(
        ConversationHandler(
            [CommandHandler("start", start)],
            {state: [answer(state)] for state in NEXT},
            [],
            name="a",
        )
    )

    async def handle(line: bytes) -> None:
        update = Update.de_json(json.loads(line), application.bot)
        await application.process_update(update)
        told(update.update_id)

    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with application, asyncio.TaskGroup() as tasks:
        async for line in reader:
            tasks.create_task(handle(line))


def run_telebot(sessions: SessionManager[Any]) -> None:
    import telebot
    from telebot import custom_filters

    from session_sync.telebot import SessionStates, install

    bot = telebot.TeleBot("1:token", threaded=False, state_storage=SessionStates(sessions))
    bot.add_custom_filter(custom_filters.StateFilter(bot))
    install(bot, sessions)

    @bot.message_handler(commands=["start"])
    def start(message: Any) -> None:
        message.session.counter = 0
        bot.set_state(message.from_user.id, "A", message.chat.id)

    @bot.message_handler(state=list(NEXT))
    def answer(message: Any) -> None:
        user, chat = message.from_user.id, message.chat.id
        state = bot.get_state(user, chat)
        count(message.session, state, message.text)
        if message.text == "end":
            message.session.finished = message.session.get("finished", 0) + 1
            bot.delete_state(user, chat)
        else:
            bot.set_state(user, NEXT[state], chat)

    def handle(line: str) -> None:
        update = telebot.types.Update.de_json(json.loads(line))
        bot.process_new_updates([update])
        told(update.update_id)

    with ThreadPoolExecutor(8) as pool:
        for line in sys.stdin:
            pool.submit(handle, line)


def main(framework: str, url: str, api: str, token: str) -> None:
    with SessionManager(storage=storage_from_url(url), lock_timeout=60) as sessions:
        if framework == "ptb":
            asyncio.run(run_ptb(sessions, api, token))
        else:
            run_telebot(sessions)


if __name__ == "__main__":
    main(*sys.argv[1:])
