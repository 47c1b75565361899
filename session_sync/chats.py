"""When a group becomes a supergroup, its number changes: what both rooms do about it."""

from __future__ import annotations

from contextvars import copy_context
from typing import Any, Final, NamedTuple

from .manager import SessionManager
from .steps import Call, waiters
from .storages.base import ListableStorage


class Migration(NamedTuple):
    """The numbers of a group and of the supergroup that it has become."""

    old: int
    new: int


def migrates_chats(sessions: SessionManager[Any], wanted: bool | None) -> bool:
    """What `install` was told; told nothing, it does if the storage can list its keys.

    Raises TypeError if it was told to and the storage cannot.
    """
    possible = isinstance(sessions.storage, ListableStorage)
    if wanted and not possible:
        raise TypeError(
            f"migrate_chats=True: {type(sessions.storage).__name__} cannot list its keys, so the "
            f"sessions of a chat cannot be found. Give it a method keys() (see ListableStorage), "
            f"or install with migrate_chats=False."
        )
    return possible if wanted is None else wanted


def migration_in(message: Any) -> Migration | None:
    """What a message of telebot's or PTB's says of its chat's number; None of all that is none."""
    if getattr(message, "text", "") is not None:  # no message, or one that somebody has written
        return None
    new, old = (getattr(message, name, None) for name in _NUMBERS)  # never raises, while polling
    if new is not None:
        return Migration(message.chat.id, new)
    return None if old is None else Migration(old, message.chat.id)


_NUMBERS: Final = ("migrate_to_chat_id", "migrate_from_chat_id")


async def migrate_chat(sessions: SessionManager[Any], migration: Migration) -> None:
    """Move the sessions in a thread, which knows the scopes that are open around this one."""
    work = copy_context().run
    await Call(waiters, work, sessions.migrate_chat, *migration).arun()
