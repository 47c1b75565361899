"""Writes a file of this folder again, with the version of the library that is its name.

pip install --target old --no-deps pyTelegramBotAPI==4.7.1
PYTHONPATH=old python tests/data/importers/write_importers.py telebot telebot-4.7.1.pkl
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def telebot(name: str) -> None:
    from telebot import TeleBot
    from telebot.storage import StatePickleStorage

    try:
        from telebot.states import State, StatesGroup
    except ImportError:
        from telebot.handler_backends import State, StatesGroup

    class Form(StatesGroup):
        age = State()

    bot: Any = TeleBot("123456:a", state_storage=StatePickleStorage(str(FOLDER / name)))
    Form.__module__, Form.__qualname__ = "__main__", "Form"
    globals()["Form"] = Form
    bot.set_state(1, Form.age, 1)
    bot.add_data(1, 1, name="Alex")
    bot.set_state(2, "name", -100)
    bot.add_data(2, -100, cart={7: [1]})
    bot.set_state(3, 5, -100)


def ptb(name: str) -> None:
    from telegram import User
    from telegram.constants import ChatType
    from telegram.ext import PicklePersistence

    persistence: Any = PicklePersistence(FOLDER / name)
    persistence.bot = object()

    async def write() -> None:
        since = datetime(2023, 1, 2, 3, 4, 5, tzinfo=UTC)
        await persistence.update_user_data(1, {"kind": ChatType.PRIVATE, "since": since})
        await persistence.update_user_data(2, {"who": User(2, "Alex", False)})
        await persistence.update_chat_data(-100, {"votes": {1, 2}})
        await persistence.update_bot_data({"runs": 3})
        await persistence.update_conversation("order", (1, 1), 2)
        await persistence.flush()

    asyncio.run(write())


if __name__ == "__main__":
    {"telebot": telebot, "ptb": ptb}[sys.argv[1]](sys.argv[2])
