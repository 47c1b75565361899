"""What is known of one field of an open session, where that is more than its value.

This module knows values and deadlines; it knows no record.
"""

from __future__ import annotations

from typing import Any, Final

from .containers import MISSING
from .ttl import Deadline


class FieldState:
    """What is in `ChangeTracker.loaded` for a field of which more is to be known than its value.

    `value` is what the handler has of it, and `dumped` what that would be stored as if it had not
    been touched, where the record has something else: a field of an old form, or a default, which
    is not stored at all until it is changed (`is_generated`: or anything else is, since a factory
    made it). `deadline` is when the field disappears. `is_deleted`: it was deleted, or its time is
    up; a default that was read since then is in `defaults`, of which the first one counts,
    whichever thread has brought it. `ready` is what a handler gets without a further look, if it is
    known. `is_opaque`: there is an object in it whose changes would not be noticed, so that it is
    always saved, or (False) never for that reason; None: if one is found in it later.

    What changes of this changes once and for good, so that no thread can undo what another one has
    done: `is_deleted` becomes true, `ready` the default, and `dumped` MISSING when the record has
    got the value."""

    __slots__ = (
        "deadline",
        "defaults",
        "dumped",
        "is_default",
        "is_deleted",
        "is_generated",
        "is_opaque",
        "ready",
        "value",
    )

    def __init__(
        self,
        value: Any = MISSING,
        dumped: Any = MISSING,
        deadline: Deadline | None = None,
        is_opaque: bool | None = None,
    ) -> None:
        self.value: Final = value
        self.ready = value if deadline is None else MISSING
        self.dumped = dumped
        self.deadline: Final = deadline
        self.is_deleted = value is MISSING
        self.is_opaque: Final = is_opaque
        self.is_default = self.is_generated = False
        self.defaults: list[FieldState] = []

    def give_default(self, default: FieldState) -> Any:
        """What a handler gets of a field that is gone: `default`, if it is the first one."""
        self.defaults.append(default)
        self.ready = self.defaults[0].value
        return self.ready

    def current(self) -> FieldState | None:
        """What the handler has of the field: this, or a default, or nothing."""
        if not self.is_deleted:
            return self
        return self.defaults[0] if self.defaults else None


def is_absent(current: FieldState | None) -> bool:
    """Whether a field of which the handler has this is not stored, nor will be as it is."""
    return current is None or (current.is_default and current.dumped is not MISSING)
