"""Fields that disappear by themselves: `ttl()`, and when the time of one is over.

This module knows times; it knows no record.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Final, TypeAlias

from ..storages.durations import seconds_of

#: When a field disappears, in Unix time, and how many seconds after its last assignment that is.
#: It is never changed: an assignment makes a new one.
Deadline: TypeAlias = list[float]


def deadline_in(seconds: float) -> Deadline:
    """The deadline of a field that is assigned now."""
    return [time.time() + seconds, seconds]


def is_over(deadline: Deadline | None) -> bool:
    """Whether the time of a field is up; None: it has no timer."""
    return deadline is not None and deadline[0] <= time.time()


class Ttl:
    """A value with a lifetime, on its way into a session. Made by `ttl()`."""

    __slots__ = ("seconds", "value")
    # So that it gets into no set and is no dict's key: Python's way to say so, though to type
    # checkers __hash__ is a method.
    __hash__ = None  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]

    def __init__(self, value: Any, seconds: float) -> None:
        self.value: Final = value
        self.seconds: Final = seconds


def ttl(value: Any, seconds: float | timedelta = 30.0) -> Any:
    """`value`, to be assigned to a field of a session that disappears `seconds` later.

    The time counts from the last assignment of the field: a plain assignment restarts it, a change
    inside the value does not. `ttl(value, 0)` removes the timer and keeps the value. Timers are
    stored with the session, so they run on while the bot is down.

    Raises ValueError if `seconds` is negative, and TypeError where the result is used as anything
    but the value of a field.

    >>> from session_sync import SessionManager, ttl
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1") as session:
    ...     session["code"] = ttl("1234", 300)  # gone in five minutes
    ...     session["code"]
    '1234'
    """
    if isinstance(value, Ttl):
        raise TypeError("ttl(ttl(...)): a field has one timer")
    return Ttl(value, seconds_of(seconds, "ttl"))
