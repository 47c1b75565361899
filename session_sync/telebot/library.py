"""What is needed of pyTelegramBotAPI, its private methods included, and whether it is there.

The only module here that imports the library. It knows no session.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any, Final

try:
    from telebot import TeleBot
    from telebot.asyncio_storage import StateStorageBase as AsyncStateStorageBase
    from telebot.storage import StateStorageBase
    from telebot.types import JsonDeserializable, Message
except ImportError as error:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError(
        "session_sync.telebot needs pyTelegramBotAPI: pip install 'session-sync[telebot]'"
    ) from error

__all__ = [
    "AsyncStateStorageBase",
    "JsonDeserializable",
    "Message",
    "StateStorageBase",
    "TeleBot",
    "is_async_bot",
    "is_known",
]

# What runs all of an update: middlewares, filters, handlers.
TASK: Final = "_run_middlewares_and_handler"
ASYNC_TASK: Final = "_run_middlewares_and_handlers"
_TASK_PARAMETERS: Final = ["message", "handlers", "middlewares", "update_type"]
#: What a TeleBot does with a batch of messages in the thread that fetches them.
LOOK_UPS: Final = (
    "_notify_next_handlers",
    "_notify_reply_handlers",
    "_TeleBot__notify_update",
    "_notify_command_handlers",
)


def is_async_bot(bot: object) -> bool:
    """Whether `bot` is an AsyncTeleBot, whose module needs aiohttp. A program that has such a bot
    has imported it."""
    module = sys.modules.get("telebot.async_telebot")
    return module is not None and isinstance(bot, module.AsyncTeleBot)


def is_known(bot: Any, task: str, others: Sequence[str]) -> bool:
    """Whether this version of telebot has what something else is put in the place of."""
    if not all(hasattr(bot, name) for name in (task, *others)):
        return False
    return list(inspect.signature(getattr(bot, task)).parameters)[:4] == _TASK_PARAMETERS
