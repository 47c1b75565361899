"""aiogram's FSM: its own middleware, which locks the key and gets the state; then the handler gets
the data, changes it and sets it.

The middleware is given the ids of the user and the chat, which in a bot another one derives. In
Redis, JSON is made by msgspec, which aiogram's options `json_loads` and `json_dumps` allow: it is
several times as fast as the json of the standard library, their default.
"""

from __future__ import annotations

import copy
from itertools import repeat
from typing import Any

import msgspec
import redis.asyncio
from aiogram import Bot
from aiogram.dispatcher.middlewares.user_context import EVENT_CONTEXT_KEY, EventContext
from aiogram.fsm.middleware import FSMContextMiddleware
from aiogram.fsm.storage.base import StorageKey
from aiogram.fsm.storage.memory import MemoryStorage, SimpleEventIsolation
from aiogram.fsm.storage.redis import RedisEventIsolation, RedisStorage
from aiogram.types import Chat, TelegramObject, User

from ..fields import TOKEN, USER
from ..setting import Place
from ..timing import Work


def adding(place: Place, kind: str, fields: dict[str, Any]) -> Work:
    """Updates that read a counter and add 1, in "memory" or "Redis"."""
    bot = Bot(TOKEN)
    middleware = _middleware(place, kind)
    key = StorageKey(bot_id=bot.id, chat_id=USER, user_id=USER)
    run = place.loop.run_until_complete
    run(middleware.storage.set_data(key, copy.deepcopy(fields)))
    place.callback(lambda: run(middleware.close()))
    event = TelegramObject()
    whose = EventContext(
        chat=Chat(id=USER, type="private"),
        user=User(id=USER, is_bot=False, first_name="Alex"),
    )

    async def handler(event: TelegramObject, data: dict[str, Any]) -> None:
        state = data["state"]
        found = await state.get_data()
        found["counter"] += 1
        await state.set_data(found)

    async def many(times: int) -> None:
        for _ in repeat(None, times):
            await middleware(handler, event, {"bot": bot, EVENT_CONTEXT_KEY: whose})

    return lambda times: run(many(times))


def _middleware(place: Place, kind: str) -> FSMContextMiddleware:
    if kind == "memory":
        return FSMContextMiddleware(MemoryStorage(), SimpleEventIsolation())
    place.redis_client()  # empties the server at the end
    client = redis.asyncio.Redis.from_url(place.redis_url)
    storage = RedisStorage(client, json_loads=msgspec.json.decode, json_dumps=_dumps)
    return FSMContextMiddleware(storage, RedisEventIsolation(client))


def _dumps(value: object) -> str:
    return msgspec.json.encode(value).decode()
