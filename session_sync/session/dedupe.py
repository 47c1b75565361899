"""Updates that come twice: Telegram sends one again when a webhook answers too late.

A session remembers the numbers of the last ones that it has had; they are stored with it, under
`$updates`. This module knows records; it knows no session, no scope and no storage.
"""

from __future__ import annotations

from typing import Any, Final

from ..errors import SessionDecodeError
from ..storages.base import Record, record_of
from .declarations import is_field

#: The stored name of the numbers (`update_id`) of the last updates, the newest last.
UPDATES: Final = "$updates"


def updates_in(record: Record, key: str) -> list[int]:
    """The numbers that a session remembers."""
    numbers: Any = record.get(UPDATES, [])
    if numbers.__class__ is not list or any(number.__class__ is not int for number in numbers):
        raise SessionDecodeError(
            f"session {key!r} cannot be read: what is stored under {UPDATES!r} are no numbers of "
            f"updates that were written here. The record is left as it is."
        )
    return numbers


def has_only_updates(record: Record) -> bool:
    """Whether a session has no fields, and is stored for what it remembers alone."""
    return UPDATES in record and not any(map(is_field, record))


def without_fields(record: Record) -> Record:
    """What is left of a session when its fields have gone: nothing, or what it remembers."""
    return record_of({UPDATES: record[UPDATES]} if UPDATES in record else {})
