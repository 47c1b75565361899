"""How the states of a conversation are stored.

This module knows values; it does not know where they are kept.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from enum import Enum
from typing import Final

from .library import ConversationHandler

#: What a state may be, besides tuples of these, and members of an Enum.
ATOMS: Final = (str, int, bool, float, bytes)

_ENUM: Final = "enum"
_SPECIAL: Final = (ConversationHandler.TIMEOUT, ConversationHandler.WAITING)


class StoredStates:
    """The states of the conversation `name`. Members of an Enum are stored by their names; all
    others, and those that are added later, as they are.

    Raises TypeError if one cannot be stored, and ValueError if two would be stored alike.
    """

    def __init__(self, name: str, states: Iterable[object]) -> None:
        self._name: Final = name
        self._by_stored: Final[dict[object, object]] = {}
        #: 1 may be a member of an Enum, and is stored as that.
        self._by_equal: Final = {state: state for state in states}
        for state in self._by_equal:
            if state in _SPECIAL:
                continue
            stored = self._stored(state)
            if stored in self._by_stored:
                raise ValueError(
                    f"ConversationHandler {name!r}: the states {self._by_stored[stored]!r} and "
                    f"{state!r} would be stored alike; give them two names"
                )
            self._by_stored[stored] = state

    def stored(self, state: object) -> object:
        """How a state is stored; raises TypeError if it cannot be."""
        return self._stored(self._by_equal[state] if is_in(state, self._by_equal) else state)

    def state(self, stored: object) -> object:
        """The state that is stored so."""
        return self._by_stored[stored] if is_in(stored, self._by_stored) else stored

    def _stored(self, state: object) -> object:
        if isinstance(state, Enum):
            return (_ENUM, type(state).__qualname__, state.name)
        if isinstance(state, tuple):
            return tuple(map(self._stored, state))
        if type(state) not in ATOMS:
            raise TypeError(
                f"ConversationHandler {self._name!r}: a state is of type {type(state).__name__}, "
                f"which cannot be stored; take str, int, bool, float, bytes, tuples of these, or "
                f"members of an Enum"
            )
        return state


def is_in(state: object, states: Container[object]) -> bool:
    """Whether a state is one of these; what has no hash is none."""
    try:
        return state in states
    except TypeError:
        return False
