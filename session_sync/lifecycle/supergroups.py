"""When a group becomes a supergroup, its ID changes: what both integrations do about it.

This module knows managers and the two fields of a service message; it knows no framework.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import Any, Final, NamedTuple

from ..storages.base import ListableStorage
from .threads import CallBlocking, waiters
from .update import Managers, raise_all


class Migration(NamedTuple):
    """The IDs of a group and of the supergroup that it has become."""

    old: int
    new: int


def moving_of(managers: Managers, wanted: bool | None) -> Managers:
    """Those of a bot's managers that move their sessions, as `install` was told; told nothing, they
    are those whose storage can list its keys.

    Raises TypeError if it was told to and a storage cannot.
    """
    if wanted is False:
        return ()
    places: set[tuple[int, str]] = set()
    moving = []
    for sessions in managers:
        place = id(sessions.storage), sessions.prefix  # what moves the sessions of one moves both's
        if isinstance(sessions.storage, ListableStorage):
            if place not in places:
                moving.append(sessions)
            places.add(place)
        elif wanted:
            raise TypeError(
                f"migrate_chats=True: {type(sessions.storage).__name__} cannot list its keys, so "
                f"the sessions of a chat cannot be found. Give it a method keys() (see "
                f"ListableStorage), or install with migrate_chats=False."
            )
    return tuple(moving)


def migration_in(message: Any) -> Migration | None:
    """The change of its chat's ID that a message of telebot's or PTB's reports; None if it reports
    none, or is no message."""
    new, old = (getattr(message, name, None) for name in _NUMBERS)  # never raises, while polling
    if new is not None:
        return Migration(message.chat.id, new)
    return None if old is None else Migration(old, message.chat.id)


_NUMBERS: Final = ("migrate_to_chat_id", "migrate_from_chat_id")


def migrate_chat(managers: Managers, migration: Migration) -> None:
    """Move the sessions of all managers; what fails in one does not keep the other from it."""
    failures: list[BaseException] = []
    for sessions in managers:
        try:
            sessions.migrate_chat(*migration)
        except Exception as error:
            failures.append(error)
    raise_all(failures, "the sessions of two managers were not all moved")


async def amigrate_chat(managers: Managers, migration: Migration) -> None:
    """The same in a thread, which knows the scopes that are open around this one."""
    await CallBlocking(waiters, copy_context().run, migrate_chat, managers, migration).arun()
