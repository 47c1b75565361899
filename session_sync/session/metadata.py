"""What is stored of a session beside its fields, under names that begin with `$`.

All of it is here, so one more is added in one place: `METADATA`. This module knows records; it
knows no session and no scope.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from typing import Any, Final, NamedTuple, cast

from ..errors import SessionDecodeError
from ..storages.base import Record, only, record_of
from .ttl import Deadline

#: The version of a session; one without is of version 1, so that a bot can begin without any.
VERSION: Final = "$version"

#: The timers of fields: `{field: [expires_at, seconds]}`, in Unix time.
TIMERS: Final = "$ttl"

#: The IDs (`update_id`) of the last updates that a session has had, the newest last.
UPDATES: Final = "$updates"


#: Where the user stands in conversations: see `standing.py`.
AT: Final = "$at"


class _Metadata(NamedTuple):
    """`read` returns what is stored (or what is the same as nothing), given the record and the
    session's key; it raises SessionDecodeError for what was not written here. `outlives`: it is
    stored, too, when all fields have gone. `merge` makes one of what an older and a newer session
    have."""

    name: str
    read: Callable[[Record, str], Any]
    outlives: bool = False
    merge: Callable[[Any, Any], Any] | None = None


def is_field(name: object) -> bool:
    """Whether a stored name is a field's."""
    return isinstance(name, str) and not name.startswith("$")


def checked_name(key: str, name: object) -> str:
    """`name` as that of a field of the session `key`; raises TypeError and ValueError."""
    if not isinstance(name, str):
        raise TypeError(
            f"session {key!r}: a field name is a str, not {type(name).__name__}; ids may be the "
            f"keys of a dict in a field: session['carts'][user_id]"
        )
    if name.startswith("$"):
        raise ValueError(
            f"session {key!r}: the field name {name!r} begins with '$', which is kept for what the "
            f"library itself stores; choose another name"
        )
    return str.__str__(name)  # of a member of a StrEnum, say


def version_of(record: Record, key: str) -> int:
    """The version of the program that has stored a session."""
    version = record.get(VERSION, 1)
    if version.__class__ is not int or version < 1:
        raise _unknown(key, VERSION, "no version")
    return int(version)


def updates_of(record: Record, key: str) -> list[int]:
    """The IDs of the updates that a session remembers."""
    numbers: Any = record.get(UPDATES, [])
    if numbers.__class__ is not list or any(number.__class__ is not int for number in numbers):
        raise _unknown(key, UPDATES, "no list of updates")
    return list(numbers)


def standing_in(record: Record, key: str) -> Mapping[str, Any]:
    """Where a user stands according to a record; empty: nowhere."""
    standing: Any = record.get(AT, {})
    if standing.__class__ is not dict or any(name.__class__ is not str for name in standing):
        raise _unknown(key, AT, "no place in a conversation")
    return cast(Mapping[str, Any], standing)


class Timers:
    """The timers of one stored session: when which field disappears."""

    __slots__ = ("_deadlines",)

    def __init__(self, record: Record, key: str) -> None:
        try:
            self._deadlines = {
                name: (float(at), float(seconds))
                for name, (at, seconds) in record.get(TIMERS, {}).items()
            }
        except (AttributeError, TypeError, ValueError):
            raise _unknown(key, TIMERS, "no timers") from None

    def __bool__(self) -> bool:
        return bool(self._deadlines)

    def all_expired(self) -> list[str]:
        """The names of the fields that have expired."""
        now = time.time()
        return [name for name, (at, _) in self._deadlines.items() if at <= now]

    def drop(self, name: str) -> None:
        """A field went away."""
        self._deadlines.pop(name, None)

    def keep(self, names: Container[str]) -> None:
        """All other fields went away."""
        for name in list(self._deadlines):
            if name not in names:
                self.drop(name)

    def to_store(self) -> dict[str, Deadline]:
        """What is stored under TIMERS."""
        return {name: list(deadline) for name, deadline in self._deadlines.items()}


def _unknown(key: str, name: str, what: str) -> SessionDecodeError:
    return SessionDecodeError(
        f"session {key!r} cannot be read: what is stored under {name!r} is {what} that was written "
        f"here. The record is left as it is."
    )


METADATA: Final = {
    each.name: each
    for each in (
        _Metadata(VERSION, version_of),
        _Metadata(TIMERS, Timers),  # which go with their fields
        _Metadata(UPDATES, updates_of, outlives=True, merge=lambda older, newer: older + newer),
        _Metadata(AT, standing_in, outlives=True),
    )
}


def check_metadata(record: Record, key: str) -> None:
    """Raise SessionDecodeError if a record has something hidden that was not written here."""
    for name in record:
        if name in METADATA:
            METADATA[name].read(record, key)
        elif not is_field(name):
            raise SessionDecodeError(f"session {key!r} has {name!r}, which is no name of a field")


def metadata_of(record: Record) -> dict[str, Any]:
    """All that is hidden in a record."""
    return {name: value for name, value in record.items() if not is_field(name)}


def with_timers(hidden: dict[str, Any], timers: Mapping[str, Deadline]) -> dict[str, Any]:
    """The metadata with these timers instead of others."""
    rest = {name: value for name, value in hidden.items() if name != TIMERS}
    return {**rest, TIMERS: timers} if timers else rest


def merged(older: Record, newer: Record, older_key: str, newer_key: str) -> dict[str, Any]:
    """The metadata of two sessions that become one; without timers, which go with their fields.

    What both have is the newer one's, but for what has a way to be merged.
    """
    hidden = {**metadata_of(older), **metadata_of(newer)}
    hidden.pop(TIMERS, None)
    for name, each in METADATA.items():
        if each.merge is not None and name in hidden:
            hidden[name] = each.merge(each.read(older, older_key), each.read(newer, newer_key))
    return hidden


def outlives_fields(record: Record) -> bool:
    """Whether something of a record is stored also without fields."""
    return any(name in METADATA and METADATA[name].outlives for name in record)


def without_fields(record: Record) -> Record:
    """What is left of a session when its fields have gone: nothing, or what outlives them."""
    return record_of(
        {n: value for n, value in record.items() if n in METADATA and METADATA[n].outlives}
    )


def without(record: Record, hidden: str) -> Record:
    """A record without one of its hidden names; and without all, if nothing is left that is stored
    for its own sake."""
    rest = only(record, [name for name in record if name != hidden], {})
    return rest if any(map(is_field, rest)) else without_fields(rest)


def has_only_metadata(record: Record) -> bool:
    """Whether a session has no fields, and is stored for what outlives them."""
    return outlives_fields(record) and not any(map(is_field, record))
