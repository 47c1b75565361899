"""telebot, as its users have it, and a message for both sides to take the user from."""

from __future__ import annotations

from typing import Any

import telebot
from telebot.storage import StateStorageBase

USER = 700_000_001
_TOKEN = "123456789:benchmark"  # belongs to nobody; nothing here goes to the network


def message(user: int = USER) -> telebot.types.Message:
    """A private message, made by telebot of the JSON that the Bot API sends."""
    return telebot.types.Message.de_json(
        {
            "message_id": 1,
            "date": 1_700_000_000,
            "from": {"id": user, "is_bot": False, "first_name": "Alex", "language_code": "en"},
            "chat": {"id": user, "type": "private", "first_name": "Alex"},
            "text": "hi",
        }
    )


def telebot_with(storage: StateStorageBase, fields: dict[str, Any]) -> telebot.TeleBot:
    """A bot whose user has a state (without one, telebot keeps no data) and `fields` in it."""
    bot = telebot.TeleBot(_TOKEN, state_storage=storage, threaded=False)
    bot.set_state(USER, "started", USER)
    bot.add_data(USER, USER, **fields)
    return bot
