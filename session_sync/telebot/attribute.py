"""`message.session` and `message.chat_session`: how an update object leads to its sessions.

This module knows update objects and scopes; it does not know how a scope is opened, or when.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..errors import SessionKeyError
from ..lifecycle.backend import Backend
from ..lifecycle.bot import NAMES
from ..lifecycle.current import entries
from ..lifecycle.entry import SessionScope
from ..lifecycle.scope import Scope
from ..manager import no_key
from ..session.session import BaseSession, replace_fields
from .library import JsonDeserializable


class _Place(NamedTuple):
    """What is known of one of an update's scopes. The scope itself weakly: it knows the update, and
    with that it would keep itself."""

    scope: Callable[[], Scope[Any] | None]
    full_key: str
    backend: Backend

    def is_of(self, entry: SessionScope[Any]) -> bool:
        """Whether `entry` is for the same session."""
        return self.full_key == entry.full_key and self.backend is entry.options.backend


class Binding(weakref.ref[Any]):
    """An update object, and the scopes and sessions that it has, as long as the object is alive."""

    __slots__ = ("at", "places", "sessions")

    at: int
    places: Sequence[_Place | None]  # None where it has no key
    sessions: Sequence[BaseSession | None]

    @staticmethod
    def of(update: object) -> Binding | None:
        """The binding of `update`, if it is or was handled."""
        binding = bound.get(id(update))
        return binding if binding is not None and binding() is update else None

    def session_at(self, place: int) -> BaseSession:
        """The session; after its end, the one that was opened anew for the update around this code,
        or else the closed one."""
        update = self()
        if place >= len(self.sessions):
            raise AttributeError(
                f"this {type(update).__name__} has a session and no chat_session: "
                f"session_sync.telebot.install(bot, sessions, chat_session=...) gives it one"
            )
        its, session = self.places[place], self.sessions[place]
        if its is None or session is None:
            raise SessionKeyError(no_key(update))
        scope = its.scope()
        if scope is None or scope.closed:
            for entry in entries():
                if entry.update is update and its.is_of(entry) and not entry.target.closed:
                    session = entry.target.session()
                    break
        return session


#: Of each update object that is alive. Not an attribute of the object, because telebot prints those
#: in str(), and pickle and copy take them along.
bound: Final[dict[int, Binding]] = {}


def bind(
    update: object,
    scopes: Sequence[Scope[Any] | None],
    sessions: Sequence[BaseSession | None],
) -> None:
    """These are open for `update`."""
    binding = Binding(update, _unbind)
    binding.at, binding.sessions = id(update), sessions
    binding.places = [
        None if scope is None else _Place(scope.reference, scope.full_key, scope.options.backend)
        for scope in scopes
    ]
    bound[binding.at] = binding


def _unbind(binding: Binding) -> None:
    bound.pop(binding.at, None)


class _SessionAttribute:
    """`session` or `chat_session`, on everything that telebot makes of JSON."""

    def __init__(self, place: int) -> None:
        self._place: Final = place

    def __get__(self, update: Any, owner: type | None = None) -> Any:
        if update is None:
            return self
        binding = bound.get(id(update))
        if binding is None or binding() is not update:
            raise AttributeError(
                f"this {type(update).__name__} is not the update that is being handled, so no "
                f"session is open for it; the update itself has one (call.session, not "
                f"call.message.session), and sessions.session_scope(...) opens one anywhere"
            )
        return binding.session_at(self._place)

    def __set__(self, update: Any, fields: Mapping[str, Any] | None) -> None:
        replace_fields(self.__get__(update), fields)


def add_attributes() -> None:
    """Give both to all objects of telebot's; they answer for those that are bound."""
    for place, name in enumerate(NAMES):
        setattr(JsonDeserializable, name, _SessionAttribute(place))
