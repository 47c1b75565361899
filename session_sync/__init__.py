"""Sessions for Telegram bots: loaded before the handler, locked while it runs, saved after it.

    >>> from session_sync import SessionManager
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1") as session:
    ...     session.counter = session.get("counter", 0) + 1
    ...     session.counter
    1

What a framework needs is in `session_sync.telebot`; importing `session_sync` imports no framework.
"""

import importlib
from dataclasses import field
from typing import TYPE_CHECKING

from .errors import (
    SessionAwaitError,
    SessionClosedError,
    SessionConflictError,
    SessionDeadlockError,
    SessionDecodeError,
    SessionEncodeError,
    SessionError,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionMigrationError,
    SessionTypeError,
    SessionVersionError,
)
from .lifecycle.copying import copy_storage
from .lifecycle.entry import SessionScope
from .lifecycle.observers import SessionEvent
from .lifecycle.transaction import SessionScopes
from .manager import SessionManager
from .session.keys import StorageKey, by_chat, by_topic, by_user, default_storage_key
from .session.session import Session, StrictSession
from .session.ttl import ttl
from .storages.base import KVStorage, ListableStorage, TtlStorage
from .storages.codec import Codec
from .storages.memory import LruMemoryStorage, MemoryStorage
from .storages.urls import storage_from_url

if TYPE_CHECKING:
    from .storages.disk import DiskStorage
    from .storages.redis.storage import RedisStorage
    from .storages.sqlite import SQLiteStorage

__version__ = "0.1.0"

__all__ = [
    "Codec",
    "DiskStorage",
    "KVStorage",
    "ListableStorage",
    "LruMemoryStorage",
    "MemoryStorage",
    "RedisStorage",
    "SQLiteStorage",
    "Session",
    "SessionAwaitError",
    "SessionClosedError",
    "SessionConflictError",
    "SessionDeadlockError",
    "SessionDecodeError",
    "SessionEncodeError",
    "SessionError",
    "SessionEvent",
    "SessionKeyError",
    "SessionLockTimeoutError",
    "SessionManager",
    "SessionMigrationError",
    "SessionScope",
    "SessionScopes",
    "SessionTypeError",
    "SessionVersionError",
    "StorageKey",
    "StrictSession",
    "TtlStorage",
    "by_chat",
    "by_topic",
    "by_user",
    "copy_storage",
    "default_storage_key",
    "field",
    "storage_from_url",
    "ttl",
]


# Imported at the first use, because they import what not every program has or needs.
_STORAGES = {
    "DiskStorage": ".storages.disk",
    "RedisStorage": ".storages.redis",
    "SQLiteStorage": ".storages.sqlite",
}


def __getattr__(name: str) -> object:
    if name in _STORAGES:
        return getattr(importlib.import_module(_STORAGES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
