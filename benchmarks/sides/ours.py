"""session_sync: derive the key from the message, lock, load, hand out, save, unlock."""

from __future__ import annotations

import copy
import os
from itertools import repeat
from typing import Any

from session_sync import (
    DiskStorage,
    MemoryStorage,
    RedisStorage,
    Session,
    SessionManager,
    SQLiteStorage,
)

from ..fields import message
from ..setting import Place
from ..timing import Work


def storage_of(place: Place, kind: str) -> Any:
    """A new storage: "memory", "SQLite", "disk" or "Redis"."""
    if kind == "memory":
        return MemoryStorage()
    storage: Any
    if kind == "SQLite":
        storage = SQLiteStorage(os.path.join(place.folder(), "sessions.db"))
    elif kind == "disk":
        storage = DiskStorage(place.folder())
    else:
        place.redis_client()  # empties the server at the end
        storage = RedisStorage(place.redis_url)
    place.callback(storage.close)
    return storage


def sessions_with(
    place: Place, kind: str, fields: dict[str, Any], update: Any, **options: Any
) -> SessionManager[Session]:
    """Sessions in a new storage, one of them, that of `update`, with `fields` in it."""
    sessions = SessionManager(Session, storage=storage_of(place, kind), **options)
    with sessions.session_scope(update) as session:
        session.update(copy.deepcopy(fields))
    return sessions


def adding(place: Place, kind: str, fields: dict[str, Any], **options: Any) -> Work:
    """Updates that read a counter and add 1."""
    update = message()
    sessions = sessions_with(place, kind, fields, update, **options)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with sessions.session_scope(update) as session:
                session["counter"] += 1

    return work


def adding_async(place: Place, kind: str, fields: dict[str, Any]) -> Work:
    """The same in coroutines, one after the other."""
    update = message()
    sessions = sessions_with(place, kind, fields, update)

    async def many(times: int) -> None:
        for _ in repeat(None, times):
            async with sessions.session_scope(update) as session:
                session["counter"] += 1

    return lambda times: place.loop.run_until_complete(many(times))


def reading(place: Place, kind: str, fields: dict[str, Any], **options: Any) -> Work:
    """Updates that read the counter."""
    update = message()
    sessions = sessions_with(place, kind, fields, update, **options)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with sessions.session_scope(update) as session:
                session["counter"]

    return work


def passing(place: Place, kind: str, fields: dict[str, Any], **options: Any) -> Work:
    """Updates that never touch their session."""
    update = message()
    sessions = sessions_with(place, kind, fields, update, **options)

    def handler(update: Any) -> None:
        pass

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with sessions.session_scope(update):
                handler(update)

    return work
