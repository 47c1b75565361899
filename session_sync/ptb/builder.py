"""A builder that adds the sessions when it builds, to whatever was chosen until then.

This module knows PTB's builders, and how a bot's own classes get ours as one more base; it does not
know what those do.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..lifecycle.bot import NAMES, BotSessions
from .application import Integration, SessionApplication
from .attribute import Hooks, NoChatSession, SessionContext
from .library import ContextTypes


def add_sessions(builder: Any, sessions: BotSessions) -> None:
    """Have `builder` build an application with sessions."""
    # Not by application_class() and context_types(), which may be called once more afterwards.
    kind = type(builder)
    bases = (_SessionBuilder, kind)
    builder.__class__ = _named_as(kind, bases, __slots__=(), bot_sessions=sessions)


def has_sessions(builder: object) -> bool:
    """Whether it does so already."""
    return isinstance(builder, _SessionBuilder)


class _SessionBuilder:
    """What comes before a builder's own class."""

    __slots__ = ()

    bot_sessions: BotSessions
    _application_class: Any
    _context_types: Any

    def build(self) -> Any:
        chosen = self._application_class, self._context_types
        types = _chosen(self._context_types)
        self._application_class = _application_class_of(_chosen(self._application_class))
        self._context_types = ContextTypes(
            context=_context_class_of(types.context, self.bot_sessions.names),
            bot_data=types.bot_data,
            chat_data=types.chat_data,
            user_data=types.user_data,
        )
        try:
            # `super()` is the builder's own class, which is known only when it is mixed in.
            application: Any = super().build()  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._application_class, self._context_types = chosen
        has_hooks = issubclass(application.context_types.context, Hooks)
        if not (isinstance(application, SessionApplication) and has_hooks):
            raise RuntimeError(
                f"{type(self).__name__}.build() has chosen an application class or context types "
                f"by itself, without sessions; choose them before"
            )
        application._session_sync = Integration(application, self.bot_sessions)
        return application


def _chosen(value: Any) -> Any:
    """What a builder holds under a default value of PTB's (which has no public class) or as is."""
    return value.value if type(value).__name__ == "DefaultValue" else value


def _application_class_of(chosen: type[Any]) -> type[Any]:
    """`chosen`, which may do what it likes with an update before it is handled, and then comes by
    here."""
    is_ours = issubclass(SessionApplication, chosen)
    bases = (SessionApplication,) if is_ours else (chosen, SessionApplication)
    return _named_as(chosen, bases)


def _context_class_of(chosen: type[Any], names: tuple[str, ...]) -> type[Any]:
    """`chosen` with sessions of these names."""
    bases: tuple[type[Any], ...] = (Hooks, chosen)
    inside: dict[str, Any] = {}
    if not issubclass(chosen, SessionContext):
        for name in names:
            if hasattr(chosen, name):
                raise TypeError(
                    f"{chosen.__name__} has a `{name}` of its own, which context.{name} would "
                    f"hide; give it another name"
                )
        bases = (Hooks, SessionContext, chosen)
    if issubclass(SessionContext, chosen):
        bases = (Hooks, SessionContext)
    for name in NAMES[len(names) :]:
        own = inspect.getattr_static(chosen, name, vars(SessionContext)[name])
        inside[name] = NoChatSession() if own is vars(SessionContext)[name] else own
    return _named_as(chosen, bases, **inside)


def _named_as(chosen: type[Any], bases: tuple[type[Any], ...], **inside: Any) -> type[Any]:
    """A class that is `chosen` where it is printed."""
    names = {"__module__": chosen.__module__, "__qualname__": chosen.__qualname__}
    return type(chosen.__name__, bases, {**names, **inside})
