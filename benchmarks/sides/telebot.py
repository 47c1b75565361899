"""telebot's states: `with bot.retrieve_data(user, chat) as data`, which takes no lock.

Its storage in memory copies the data on the way out. That in a pickle reads and writes the file of
all users each time, and that in Redis asks for the data, then writes them in a transaction.
"""

from __future__ import annotations

import copy
import os
from itertools import repeat
from typing import Any

import telebot
from telebot.storage import StateMemoryStorage, StatePickleStorage, StateRedisStorage

from ..fields import TOKEN, USER, message
from ..setting import Place
from ..timing import Work


def storage_of(place: Place, kind: str) -> Any:
    """A new storage: "memory", "pickle" or "Redis"."""
    if kind == "memory":
        return StateMemoryStorage()
    if kind == "pickle":
        return StatePickleStorage(os.path.join(place.folder(), "states.pkl"))
    place.redis_client()  # empties the server at the end
    storage = StateRedisStorage(redis_url=place.redis_url)
    place.callback(storage.redis.close)
    return storage


def bot_with(storage: Any, fields: dict[str, Any], user: int = USER) -> Any:
    """A bot whose user has a state (without one, telebot keeps no data) and `fields` in it."""
    bot = telebot.TeleBot(TOKEN, state_storage=storage, threaded=False)
    add_user(bot, fields, user)
    return bot


def add_user(bot: Any, fields: dict[str, Any], user: int) -> None:
    """Give another user a state and data."""
    bot.set_state(user, "started", user)
    bot.current_states.save(user, user, copy.deepcopy(fields), bot_id=bot.bot_id)


def adding(place: Place, kind: str, fields: dict[str, Any]) -> Work:
    """Updates that read a counter and add 1."""
    bot = bot_with(storage_of(place, kind), fields)
    update = message()

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with bot.retrieve_data(update.from_user.id, update.chat.id) as data:
                data["counter"] += 1

    return work
