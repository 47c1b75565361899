"""How the scope of a key, or of an update, is made: for one manager, with its options.

This module knows keys and options; it knows no framework, and nothing of what a scope does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from logging import DEBUG
from typing import Any, Final, Generic, TypeVar

from ..session.keys import text_of
from ..session.session import BaseSession
from .bulk import scope_as_stored
from .current import entries
from .entry import SessionScope
from .observers import ObservedScope, Observers, logger
from .options import Options

S = TypeVar("S", bound=BaseSession)


class ScopeFactory(Generic[S]):
    """Makes the scopes of one manager, until that is closed."""

    def __init__(
        self,
        options: Options[S],
        prefix: str,
        get_storage_key: Callable[[Any], Any],
        observers: Observers,
    ) -> None:
        self.options: Final = options
        self.prefix: Final = prefix
        self.observers: Final = observers
        self.get_storage_key: Final = get_storage_key
        self._for_standing: Final = replace(options, initial=None, lazy=False)
        self._patient: Final = replace(options, queue_timeout=None)
        self._is_special = any(observers)  # each scope takes a further look
        self._is_closed = False

    def of_update(self, update: Any) -> SessionScope[S] | None:
        """The scope that goes around an update, or None if it has no key. It waits as long as it
        takes for others of this process, since a queue must not drop updates.

        Raises what `get_storage_key` raises, and TypeError for what is no key.
        """
        key = self.get_storage_key(update)
        if key.__class__ is not str:
            key = text_of(key)
            if key is None:
                return None
        return self.of_key(key, update, self._patient)

    def of_key(self, key: str, update: Any, options: Options[S] | None = None) -> SessionScope[S]:
        """The scope of a key; `initial` will be given `update`."""
        if options is None:
            options = self.options
        if self._is_special or logger.isEnabledFor(DEBUG):
            self.refuse_closed(f"session {key!r} cannot be opened")
            return ObservedScope(options, key, self.prefix + key, update, self.observers)
        return SessionScope(options, key, self.prefix + key, update)

    def of_standing(self, key: str) -> SessionScope[S]:
        """The scope of a key for a caller that looks only where the user stands, and not at the
        fields: `initial` is not called."""
        return self.of_key(key, key, self._for_standing)

    def open_here(self, key: str) -> S | None:
        """The session of a key, if it is open around this code; of a lazy manager, it may have to
        be loaded."""
        full_key, backend = self.prefix + key, self.options.backend
        for entry in entries():
            if entry.full_key == full_key and entry.options.backend is backend:
                scope = entry.target
                if not scope.closed:
                    session: S = scope.session()
                    return session
        return None

    def as_stored(self, key: str) -> SessionScope[S]:
        """The scope of a key for a caller that does not look at the fields, of whatever version
        they are."""
        self.refuse_closed(f"session {key!r} cannot be opened")
        return scope_as_stored(self.options, key, self.prefix + key)

    def close(self) -> None:
        """Make no more."""
        self._is_closed = self._is_special = True

    def refuse_closed(self, what: str) -> None:
        """Raise RuntimeError, whose message begins with `what`, if it was closed: the store would
        open again, and stay open."""
        if self._is_closed:
            raise RuntimeError(
                f"{what}: its SessionManager was closed, by close() or at the end of a `with`. "
                f"Close it when the bot has stopped, or make another one."
            )
