"""Where a user stands: the part of a session that is no field.

A conversation, telebot's states and its next steps keep there what the frameworks keep in the
memory of one process. It is in the record of the session, so it has its lock, is read and written
together with the fields, and undone with them when a handler fails.

This module knows sessions; it does not know what stands in a place.
"""

from __future__ import annotations

from typing import Any

from .session import BaseSession


def standing_of(session: BaseSession) -> dict[str, Any]:
    """Where the user of `session` stands: for each conversation that the user is in, its name and
    what it has to know. What is changed in it, at any depth, is saved as a change of a field is; an
    empty one is not stored.

    Raises SessionDecodeError if what is stored there was not written by session_sync.

    >>> from session_sync import SessionManager
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1") as session:
    ...     standing_of(session)["conversation:form"] = "AGE"
    >>> with sessions.session_scope("user:1") as session:
    ...     dict(session), standing_of(session)
    ({}, {'conversation:form': 'AGE'})
    """
    return session._opened().standing()


def stands_at(session: BaseSession, name: str) -> Any:
    """What `standing_of(session)` has under `name`, to be read only; None: nothing. To look costs
    less than to have all of it, and most users stand nowhere.

    Raises SessionDecodeError as `standing_of` does.

    >>> from session_sync import SessionManager
    >>> with SessionManager().session_scope("user:1") as session:
    ...     print(stands_at(session, "conversation:form"))
    None
    """
    return session._opened().stands_at(name)
