"""The managers that `install` was given for the updates of one bot, in both integrations.

This module knows managers and updates; it knows no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .supergroups import Migration, amigrate_chat, migrate_chat, migration_in, moving_of
from .update import Delivery, Managers, UpdateScope

if TYPE_CHECKING:
    from ..manager import SessionManager

#: The attributes that sessions are had by, in the order of the managers.
NAMES: Final = ("session", "chat_session")


class BotSessions:
    """The managers of one bot, `session` first, and what is done with them for every update.

    Raises as `managers_of` and `moving_of` do.
    """

    def __init__(
        self,
        sessions: SessionManager[Any],
        chat_session: SessionManager[Any] | None,
        migrate_chats: bool | None,
    ) -> None:
        self.managers: Final = managers_of(sessions, chat_session)
        #: The attributes that the bot has its sessions by.
        self.names: Final = NAMES[: len(self.managers)]
        #: Whether any of them remembers updates.
        self.dedupes: Final = any(manager.dedupe for manager in self.managers)
        self._moving: Final = moving_of(self.managers, migrate_chats)
        self.migrates: Final = bool(self._moving)

    def scope_of(self, update: Any, delivery: Delivery | None) -> UpdateScope:
        """The scopes of an update; raises what `get_storage_key` raises, and TypeError."""
        return UpdateScope(self.managers, update, delivery)

    def migration_in(self, message: Any) -> Migration | None:
        """The change of its chat's ID that a message reports, if sessions are moved for that."""
        return migration_in(message) if self.migrates else None

    def migrate(self, migration: Migration) -> None:
        """Move the sessions of a chat. To be done before the scopes of the update that reports it
        are opened, since they are among them."""
        migrate_chat(self._moving, migration)

    async def amigrate(self, migration: Migration) -> None:
        """The same in a coroutine."""
        await amigrate_chat(self._moving, migration)


def managers_of(
    sessions: SessionManager[Any], chat_session: SessionManager[Any] | None
) -> Managers:
    """Raises TypeError if one is no SessionManager, ValueError if both are the same, and
    RuntimeError if one was closed."""
    for name, manager in zip(NAMES, (sessions, chat_session), strict=True):
        if not hasattr(manager, "scopes") and (manager is not None or name == NAMES[0]):
            raise TypeError(
                f"install() takes a SessionManager for {name}, not a {type(manager).__name__}; "
                f"of a storage, SessionManager(storage=...) makes one"
            )
    if chat_session is sessions:
        raise ValueError(
            "chat_session is the manager that session has as well, so both would be one session; "
            "give it one of its own, SessionManager(..., get_storage_key=by_chat), which may share "
            "the storage"
        )
    managers = (sessions,) if chat_session is None else (sessions, chat_session)
    for manager in managers:
        manager.scopes.refuse_closed("install() cannot give the bot sessions")
    return managers
