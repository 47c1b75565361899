"""`session_filter`: a filter of PTB's that looks at the session.

This module knows PTB's filters and how an update leads to its session; it knows no application.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ..errors import SessionAwaitError, SessionKeyError
from .attribute import Binding
from .library import Update, UpdateFilter


def session_filter(check: Callable[[Any], object], name: str | None = None) -> UpdateFilter:
    """A filter that asks the session of the update; it combines with PTB's own (`&`, `|`, `~`).

    Arguments:
        check: called with the session, answers whether the filter lets the update through.
        name: what the filter is called where PTB prints it.

    It needs `install`, and a manager that is not lazy, since a filter cannot await. Raises
    SessionKeyError for an update that has no session; that, and what `check` raises, goes to the
    error handlers.

    >>> from telegram.ext import filters
    >>> asks_name = filters.TEXT & session_filter(lambda session: session.get("step") == "name")
    """
    return _SessionFilter(check, name)


class _SessionFilter(UpdateFilter):
    def __init__(self, check: Callable[[Any], object], name: str | None) -> None:
        super().__init__(name=name or f"session_filter({check!r})")
        self._check: Final = check

    def filter(self, update: Update) -> bool:
        binding = Binding.of(update)
        if binding is None:
            raise SessionKeyError(
                "session_filter was asked where no session is open: without "
                "session_sync.ptb.install(), or in the TIMEOUT state of a conversation"
            )
        scope = None if binding.update_scope is None else binding.update_scope.scopes[0]
        if scope is not None and scope.options.lazy:
            raise SessionAwaitError(
                "session_filter was given a lazy session, which a filter cannot await; make the "
                "manager without lazy=True"
            )
        return bool(self._check(binding.session_at(0)))
