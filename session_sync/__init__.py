"""Sessions for Telegram bots: loaded before the handler, locked while it runs, saved after it.

    >>> from session_sync import SessionManager
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1") as session:
    ...     session.counter = session.get("counter", 0) + 1
    ...     session.counter
    1

What a framework needs is in `session_sync.telebot`; importing `session_sync` imports no framework.
"""

from typing import TYPE_CHECKING

from .codec import Codec
from .errors import (
    SessionAwaitError,
    SessionClosedError,
    SessionConflictError,
    SessionDeadlockError,
    SessionDecodeError,
    SessionEncodeError,
    SessionError,
    SessionKeyError,
    SessionLockTimeout,
)
from .expiry import ttl
from .keys import StorageKey, by_chat, by_topic, by_user, default_storage_key
from .manager import SessionManager
from .scope import SessionScope
from .session import Session
from .storages.base import KVStorage, ListableStorage, TtlStorage
from .storages.memory import LruMemoryStorage, MemoryStorage

if TYPE_CHECKING:
    from .storages.disk import DiskStorage

__version__ = "0.1.0"

__all__ = [
    "Codec",
    "DiskStorage",
    "KVStorage",
    "ListableStorage",
    "LruMemoryStorage",
    "MemoryStorage",
    "Session",
    "SessionAwaitError",
    "SessionClosedError",
    "SessionConflictError",
    "SessionDeadlockError",
    "SessionDecodeError",
    "SessionEncodeError",
    "SessionError",
    "SessionKeyError",
    "SessionLockTimeout",
    "SessionManager",
    "SessionScope",
    "StorageKey",
    "TtlStorage",
    "by_chat",
    "by_topic",
    "by_user",
    "default_storage_key",
    "ttl",
]


def __getattr__(name: str) -> object:
    """`DiskStorage` is imported when it is asked for, because it needs an extra."""
    if name == "DiskStorage":
        from .storages.disk import DiskStorage

        return DiskStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
