"""Which scopes are open around the code that runs: context variables.

This module knows the entries of scopes (see entry.py) only as objects that are open or not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .entry import SessionScope

#: True inside a handler that an integration runs, whether it has a session or not: such code never
#: queues behind updates that have not begun, since they may need its thread.
in_handler: Final[ContextVar[bool]] = ContextVar("session_sync_in_handler", default=False)


class Around(weakref.ref["SessionScope[Any]"]):
    """An entry that code runs inside, and the one around it.

    It does not keep the entry alive: only the `with` statement does, so that an entry whose end
    was interrupted is collected, which unlocks its key, and no later code takes it for open.
    """

    __slots__ = ("outer",)

    outer: Around | None

    @property
    def is_open(self) -> bool:
        """Whether the entry's session is open."""
        entry = self()
        return entry is not None and not entry.target.closed


# The innermost entry of this thread or task, and of those started inside it.
current: Final[ContextVar[Around | None]] = ContextVar("session_sync_scope", default=None)


def step_outside() -> None:
    """From here on this task runs inside no scope, whatever has made it."""
    current.set(None)


def open_around() -> Around | None:
    """The innermost entry around this code whose scope is open. The ended ones between the open
    ones are dropped, so that tasks which start one another leave no chain behind."""
    innermost = _skip_ended(current.get())
    around = innermost
    while around is not None:
        around.outer = _skip_ended(around.outer)
        around = around.outer
    return innermost


def _skip_ended(around: Around | None) -> Around | None:
    while around is not None and not around.is_open:
        around = around.outer
    return around


def entries() -> Iterator[SessionScope[Any]]:
    """The entries that this code runs inside, innermost first; some may have been left already."""
    around = current.get()
    while around is not None:
        entry = around()
        if entry is not None:
            yield entry
        around = around.outer
