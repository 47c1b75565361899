"""`context.session` and `context.chat_session`: how a context leads to the sessions of its update.

This module knows contexts and scopes; it does not know how a scope is opened, or when.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from ..errors import SessionKeyError
from ..lifecycle.bot import NAMES
from ..lifecycle.current import in_handler, step_outside
from ..lifecycle.update import UpdateScope
from ..manager import no_key
from ..session.session import BaseSession, Session, replace_fields
from .library import CallbackContext, ExtBot

S = TypeVar("S", bound=BaseSession)
if TYPE_CHECKING:  # SessionContext[MySession] is a SessionContext[MySession, Session]
    from typing_extensions import TypeVar as TypeVarWithDefault

    C = TypeVarWithDefault("C", bound=BaseSession, default=Session)
else:
    C = TypeVar("C", bound=BaseSession)
_Data = dict[Any, Any]


class Binding:
    """An update, and the scopes and sessions that it has, as long as anything handles it."""

    #: The one that this task belongs to.
    current: Final[ContextVar[Binding | None]] = ContextVar("session_sync_binding", default=None)

    def __init__(self, update: object, update_scope: UpdateScope) -> None:
        self.update: Final = update
        # Weak: contexts outlive the update, in a task that was begun inside it, say. What keeps the
        # scopes is what handles the update, and the tasks that are tied to it.
        self._update_scope: Final = weakref.ref(update_scope)

    @classmethod
    def of(cls, update: object) -> Binding | None:
        """The binding of `update`, if this task belongs to it."""
        binding = cls.current.get()
        return binding if binding is not None and binding.update is update else None

    @property
    def update_scope(self) -> UpdateScope | None:
        """Its scopes, while there are any."""
        return self._update_scope()

    @property
    def is_open(self) -> bool:
        """Whether one of its sessions is open."""
        update_scope = self.update_scope
        entries = () if update_scope is None else update_scope.in_order
        return any(not entry.target.closed for entry in entries)

    def session_at(self, place: int) -> BaseSession:
        """The session, also after it was released."""
        update_scope, session = self.update_scope, None
        if update_scope is not None:
            scope = update_scope.scopes[place]
            if scope is None:
                raise SessionKeyError(no_key(self.update))
            if scope.target.has_members:
                session = update_scope.sessions[place]
        if session is None:
            raise SessionKeyError(
                "the update of this context has been handled and its session is closed (what a "
                "conversation's time-out calls is given the old context); open it again with "
                "`async with sessions.session_scope(update) as session:`"
            )
        return session

    def discard(self, error: BaseException) -> None:
        """A handler failed with `error`."""
        update_scope = self.update_scope
        if update_scope is not None:
            update_scope.discard(error)


class SessionContext(CallbackContext[ExtBot[None], _Data, _Data, _Data], Generic[S, C]):
    """The context of a bot with sessions: PTB's own, and `session` and `chat_session`.

    For annotations, `context: SessionContext[MySession]` or `SessionContext[MySession,
    MyChatSession]`, and as the base of a context class of one's own. Under `install`, a context
    class that is not based on it gets it as one more base; it must have no `session` of its own
    then, and no `chat_session` if that is installed.

    >>> from session_sync import Session
    >>> from telegram import Update
    >>> async def count(update: Update, context: SessionContext[Session]) -> None:
    ...     context.session.counter = context.session.get("counter", 0) + 1
    """

    _binding: Binding | None = None

    if not TYPE_CHECKING:  # the default of C, which Python knows from 3.13 on

        def __class_getitem__(cls, types: Any) -> Any:
            given = types if isinstance(types, tuple) else (types,)
            missing = len(getattr(cls, "__parameters__", ())) - len(given)
            return super().__class_getitem__(given + (Session,) * missing)

    @property
    def session(self) -> S:
        """The session of the update that is being handled; of a lazy manager, to be awaited.

        Assigning a mapping replaces all fields, None empties the session.

        Raises SessionKeyError where there is none: for an update without a key, in a job, and in
        what a conversation's time-out calls, since that gets the context of an update long gone.
        """
        return cast(S, self._session_at(0))

    @session.setter
    def session(self, fields: Mapping[str, Any] | None) -> None:
        self._replace(0, fields)

    @property
    def chat_session(self) -> C:
        """The session that the manager given to `install` as `chat_session` has for the update:
        as a rule its chat's. All else is as with `session`.

        Raises AttributeError if none was given.
        """
        return cast(C, self._session_at(1))

    @chat_session.setter
    def chat_session(self, fields: Mapping[str, Any] | None) -> None:
        self._replace(1, fields)

    def _session_at(self, place: int) -> BaseSession:
        if self._binding is None:
            raise SessionKeyError(_no_binding(self))
        return self._binding.session_at(place)

    def _replace(self, place: int, fields: Mapping[str, Any] | None) -> None:
        if self._binding is None and fields is not None and not isinstance(fields, Mapping):
            name = NAMES[place]
            raise AttributeError(
                f"context.{name} is a session of session_sync's; give your own attribute another "
                f"name"
            )
        replace_fields(self._session_at(place), fields)


class NoChatSession:
    """`context.chat_session` of a bot that has none; an attribute of its own of that name wins."""

    def __get__(self, context: Any, owner: type) -> Any:
        if context is None:
            return self
        raise AttributeError(
            "this bot has a session and no chat_session: session_sync.ptb.install(builder, "
            "sessions, chat_session=...) gives it one"
        )


class Hooks(CallbackContext[Any, Any, Any, Any]):
    """What every context class of an application with sessions begins with, so that it is called
    whatever a bot's own class does."""

    __slots__ = ()

    _binding: Binding | None

    @classmethod
    def from_update(cls, update: object, application: Any) -> Any:
        """PTB makes a context for an update, or for an error in it."""
        context = super().from_update(update, application)
        context._binding = Binding.of(update)
        return context

    @classmethod
    def from_job(cls, job: Any, application: Any) -> Any:
        """PTB makes a context for a job, in the job's own task."""
        # It has copied its context variables from a handler, if one has made it.
        step_outside_units()
        in_handler.set(False)
        return super().from_job(job, application)


def step_outside_units() -> None:
    """From here on this task belongs to no unit, and to no other scope."""
    Binding.current.set(None)
    step_outside()


def _no_binding(context: CallbackContext[Any, Any, Any, Any]) -> str:
    if context.job is not None:
        return (
            "a job runs outside of every session; decorate its callback with "
            "@sessions.with_session (run_once(..., user_id=..., chat_id=...) says whose), or open "
            "one: `async with sessions.session_scope(StorageKey(user=..., chat=...)) as session:`"
        )
    return (
        "no session is open in this context: it was not made for an update that is being handled; "
        "`async with sessions.session_scope(update) as session:` opens one anywhere"
    )
