"""PTB's ConversationHandler with its states in the session.

A conversation is where the session of its user says that the user stands. So it is locked, written
and undone with the session, any process sees it, and a restart keeps it. What is looked up before a
handler is called is looked up inside the update's scope, which PTB's synchronous `check_update` can
do: the session is open by then.

This module knows PTB's handlers; it does not know how a session is opened for an update.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from warnings import warn

from ..errors import SessionClosedError, SessionKeyError
from ..manager import SessionManager, no_key
from ..session.session import BaseSession
from ..session.standing import standing_of, stands_at
from .attribute import Binding
from .conversation_home import Home, find_home
from .conversation_states import ATOMS, StoredStates, is_in
from .library import (
    DEFAULT_TRUE,
    ApplicationHandlerStop,
    BaseHandler,
    CallbackContext,
    Update,
)
from .library import ConversationHandler as OwnConversationHandler

if TYPE_CHECKING:
    from .library import Application

CCT = TypeVar("CCT", bound=CallbackContext[Any, Any, Any, Any])

_log: Final = logging.getLogger("session_sync")


class _Checked(NamedTuple):
    """What check_update has found: the state, where it is kept, and the handler that fits."""

    state: object
    name: str
    handler: BaseHandler[Any, Any, Any]
    result: object


class ConversationHandler(OwnConversationHandler[CCT]):
    """`telegram.ext.ConversationHandler` with its states in the session: the same arguments, and a
    `name`.

    Every process sees where a user stands, and a restart keeps it, without a persistence and with
    `concurrent_updates`. A handler that raises, also one of a later group, leaves the state as it
    was, with the session. To empty a session (`context.session = None`) leaves the state;
    `sessions.forget` deletes both.

    A handler with `block=False` sets its state when it returns: its user's next update waits for
    that, so `WAITING` is never reached. One that has released the session sets its state all the
    same, unless the user stands elsewhere by then, which is logged. A stored state that the program
    does not have any more is left by a fallback or an entry point.

    A conversation is kept in `context.session`, or in `context.chat_session` where that is the one
    that all of its updates share: one with `per_user=False` needs a manager with
    `get_storage_key=by_chat`, one with `per_chat=False` a manager with `by_user`.

    Arguments:
        name: under this name the conversation is stored; no other one of the program may have it.
        states: the keys are of type str, int, bool, float or bytes, tuples of these, or members of
            an Enum, which are stored by their names.
        persistent: always False; every conversation is kept.
        conversation_timeout: not available yet.

    All others are as PTB's.

    Raises ValueError without a name, with `persistent=True`, or if two states are stored alike;
    TypeError for a state that cannot be stored, and for a handler in it that is a conversation of
    telegram.ext's own; NotImplementedError with a `conversation_timeout`. `add_handler` raises
    ValueError if another conversation has the name, or no session fits, or its manager is lazy.

    >>> from session_sync import Session
    >>> from session_sync.ptb import ConversationHandler, SessionContext
    >>> from telegram import Update
    >>> from telegram.ext import CommandHandler, MessageHandler, filters
    >>> NAME = "NAME"
    >>> async def start(update: Update, context: SessionContext[Session]) -> str:
    ...     return NAME
    >>> async def take(update: Update, context: SessionContext[Session]) -> int:
    ...     context.session.name = update.effective_message.text
    ...     return ConversationHandler.END
    >>> form = ConversationHandler(
    ...     entry_points=[CommandHandler("start", start)],
    ...     states={NAME: [MessageHandler(filters.TEXT, take)]},
    ...     fallbacks=[],
    ...     name="form",
    ... )
    """

    def __init__(
        self,
        entry_points: list[BaseHandler[Update, CCT, object]],
        states: dict[object, list[BaseHandler[Update, CCT, object]]],
        fallbacks: list[BaseHandler[Update, CCT, object]],
        allow_reentry: bool = False,
        per_chat: bool = True,
        per_user: bool = True,
        per_message: bool = False,
        conversation_timeout: float | timedelta | None = None,
        name: str | None = None,
        persistent: bool = False,
        map_to_parent: dict[object, object] | None = None,
        block: Any = DEFAULT_TRUE,
    ) -> None:
        if not name:
            raise ValueError(
                "a ConversationHandler of session_sync's needs a name, under which its states are "
                "stored: ConversationHandler(..., name='form')"
            )
        if persistent:
            raise ValueError(
                f"ConversationHandler {name!r}: its states are in the session, so there is nothing "
                f"for a persistence to keep; leave persistent=True away"
            )
        if conversation_timeout is not None:
            # PTB's own is a job of one process: after a restart nobody would end what is stored.
            raise NotImplementedError(
                f"ConversationHandler {name!r}: conversation_timeout is not available yet; give "
                f"the fields of the form a lifetime by session_sync.ttl(), or take "
                f"telegram.ext.ConversationHandler"
            )
        super().__init__(
            entry_points,
            states,
            fallbacks,
            allow_reentry=allow_reentry,
            per_chat=per_chat,
            per_user=per_user,
            per_message=per_message,
            name=name,
            map_to_parent=map_to_parent,
            block=block,
        )
        self._prefix: Final = f"conversation:{name.replace('%', '%25').replace(':', '%3A')}:"
        self._own_block: Final = block
        self._home: Home | None = None
        self._stored_states: Final = StoredStates(name, states)
        inside = [handler for handlers in states.values() for handler in handlers]
        for handler in (*entry_points, *fallbacks, *inside):
            is_ours = isinstance(handler, ConversationHandler)
            if isinstance(handler, OwnConversationHandler) and not is_ours:
                raise TypeError(
                    f"ConversationHandler {name!r} has a ConversationHandler of telegram.ext in "
                    f"it, whose states would be in another place; import that one from "
                    f"session_sync.ptb, too"
                )

    # -- when it is added to an application

    def bind(self, managers: Sequence[SessionManager[Any]], named: dict[str, object]) -> None:
        """Find the session for this conversation and those in it; `named` are those of the
        application, by their names.

        Raises ValueError if there is none, if a name is another one's, or if this was bound to
        other managers.
        """
        homes = {each: find_home(each, managers) for each in self._with_children()}
        for each, home in homes.items():
            if named.get(str(each.name), each) is not each:
                raise ValueError(
                    f"two ConversationHandlers have the name {each.name!r}, so each would take the "
                    f"states of the other one for its own; give them two names"
                )
            if each._home not in (None, home):
                raise ValueError(
                    f"ConversationHandler {each.name!r} was added to another application, with "
                    f"other sessions; make one for each"
                )
        for each, home in homes.items():
            named[str(each.name)] = each
            each._home = home

    def unbind(self, named: dict[str, object]) -> None:
        """Give up the names of this conversation and those in it."""
        for each in self._with_children():
            if named.get(str(each.name)) is each:
                del named[str(each.name)]

    def _with_children(self) -> Iterable[ConversationHandler[Any]]:
        yield self
        inside = [handler for handlers in self.states.values() for handler in handlers]
        for handler in (*self.entry_points, *self.fallbacks, *inside):
            if isinstance(handler, ConversationHandler):
                yield from handler._with_children()

    # -- from outside of its handlers

    def state(self, session: BaseSession, **ids: int | str) -> object:
        """The state in which the user of `session` is; None: not in this conversation.

        Arguments:
            session: the one that keeps the conversation, open.
            ids: what its key does not say: `chat`, `user` or `message`.

        Raises ValueError for other ones, and RuntimeError if this was not added to an application.
        """
        return self._stored_states.state(stands_at(session, self._name_for(ids)))

    def move(self, session: BaseSession, state: object, **ids: int | str) -> None:
        """Set the state in which the user of `session` is, or END. The arguments and errors are as
        with `state`; TypeError for a state that cannot be stored.

        >>> from session_sync import SessionManager
        >>> from session_sync.ptb import ConversationHandler, install
        >>> from telegram.ext import Application
        >>> form = ConversationHandler([], {"AGE": []}, [], name="form")
        >>> sessions = SessionManager()
        >>> application = install(Application.builder().token("1:token"), sessions).build()
        >>> application.add_handler(form)
        >>> with sessions.session_scope("user:7:chat:7") as session:
        ...     form.move(session, "AGE")
        ...     form.state(session)
        'AGE'
        """
        self._put(standing_of(session), self._name_for(ids), state)

    def _name_for(self, ids: Mapping[str, int | str]) -> str:
        wanted = self._bound().rest
        if set(ids) != set(wanted):
            raise ValueError(
                f"ConversationHandler {self.name!r} needs {', '.join(wanted) or 'no IDs'} besides "
                f"the session, not {', '.join(ids) or 'nothing'}"
            )
        return self._prefix + ":".join(str(ids[what]) for what in wanted)

    # -- for PTB

    def check_update(self, update: object) -> Any:
        """See BaseHandler.check_update."""
        if not isinstance(update, Update) or not self._may_be_mine(update):
            return None
        name = self._name_in(update)
        try:
            stored = stands_at(self._session_of(update), name)
        except SessionKeyError:
            if _first(self.entry_points, update) is None:  # it may be for another handler
                return None
            raise
        is_there, state = stored is not None, self._stored_states.state(stored)
        if not is_there or self.allow_reentry:
            found = _first(self.entry_points, update)
            if found is not None or not is_there:
                return None if found is None else _Checked(state, name, *found)
        is_known = is_in(state, self.states)
        own = self.states[state] if is_known else ()
        found = _first(own, update) or _first(self.fallbacks, update)
        if found is None and not is_known:  # of an older program, say: not stuck for ever
            found = _first(self.entry_points, update)
        return None if found is None else _Checked(state, name, *found)

    async def handle_update(
        self,
        update: Update,
        application: Application[Any, CCT, Any, Any, Any, Any],
        check_result: Any,
        context: CCT,
    ) -> object | None:
        """See BaseHandler.handle_update."""
        found: _Checked = check_result
        handling = found.handler.handle_update(update, application, found.result, context)
        if not self._blocks(found.handler, application):
            later = self._handle_later(application, update, found, handling)
            application.create_task(later, update=update)
            return None
        stops = False
        try:
            state: object = await handling
        except ApplicationHandlerStop as stop:
            state, stops = stop.state, True
        outside = self.map_to_parent or {}
        is_over = is_in(state, outside)
        await self._set(application, update, found, self.END if is_over else state)
        for_parent = outside[state] if is_over else None
        if stops:
            raise ApplicationHandlerStop(for_parent)
        return for_parent

    def _may_be_mine(self, update: Update) -> bool:
        if update.channel_post or update.edited_channel_post:
            return False
        query = update.callback_query
        return (
            (not self.per_chat or update.effective_chat is not None)
            and (not self.per_user or update.effective_user is not None)
            and (not self.per_message or query is not None)
            and not (query and self.per_chat and not query.message)
        )

    def _blocks(self, handler: BaseHandler[Any, Any, Any], application: Any) -> bool:
        """The setting of the handler, of this one, or of the bot's defaults."""
        for block in (handler.block, self._own_block):
            if block is not DEFAULT_TRUE:
                return bool(block)
        defaults = getattr(application.bot, "defaults", None)
        return True if defaults is None else bool(defaults.block)

    async def _handle_later(
        self, application: Any, update: Update, found: _Checked, handling: Any
    ) -> None:
        """What a handler with `block=False` does in a task of its own."""
        await self._set(application, update, found, await handling)

    # -- where it is kept

    def _bound(self) -> Home:
        if self._home is None:
            raise RuntimeError(
                f"ConversationHandler {self.name!r} was added to an application without sessions, "
                f"or to another conversation after that was added; build the application with "
                f"session_sync.ptb.install(Application.builder()..., sessions)"
            )
        return self._home

    def _session_of(self, update: Update) -> BaseSession:
        home, binding = self._bound(), Binding.of(update)
        if binding is None:
            raise SessionKeyError(no_key(update))
        return binding.session_at(home.place)

    def _name_in(self, update: Update) -> str:
        """The name under which an update's conversation is kept: what the key does not say."""
        wanted = self._bound().rest
        if not wanted:
            return self._prefix
        chat: Any = update.effective_chat
        user: Any = update.effective_user
        query: Any = update.callback_query
        found = {
            "chat": lambda: chat.id,
            "user": lambda: user.id,
            "message": lambda: query.inline_message_id or query.message.message_id,
        }
        return self._prefix + ":".join(str(found[what]()) for what in wanted)

    async def _set(self, application: Any, update: Update, found: _Checked, state: object) -> None:
        """Set the state that a handler has returned."""
        if state is None:
            return
        if state != self.END and not is_in(state, self.states):
            named = repr(state) if type(state) in ATOMS else f"of type {type(state).__name__}"
            warn(
                f"a handler returned a state that is unknown to the ConversationHandler "
                f"{self.name}: {named}",
                stacklevel=3,
            )
        session = self._session_of(update)
        try:
            self._put(standing_of(session), found.name, state)
        except SessionClosedError:  # the handler has released it
            setting = self._set_after_release(session.key, found, state)
            binding = Binding.of(update)
            if binding is not None and binding.is_open:
                # Not here: an update that has this session may wait for the one that is open here.
                application.create_task(setting)  # which belongs to no update
            else:
                await setting

    async def _set_after_release(self, key: str, found: _Checked, state: object) -> None:
        async with self._bound().manager.scopes.of_standing(key) as session:
            at = standing_of(session)
            if self._stored_states.state(at.get(found.name)) == found.state:
                self._put(at, found.name, state)
            else:
                _log.error(
                    "session %r: a handler of ConversationHandler %r has released it and then "
                    "returned a state; the user stands elsewhere by now, so that was dropped",
                    key,
                    self.name,
                )

    def _put(self, at: dict[str, Any], name: str, state: object) -> None:
        if state == self.END:
            at.pop(name, None)
        else:
            at[name] = self._stored_states.stored(state)


def _first(
    handlers: Iterable[BaseHandler[Any, Any, Any]], update: Update
) -> tuple[BaseHandler[Any, Any, Any], object] | None:
    """The first handler that is for an update, and what its check has found."""
    for handler in handlers:
        result = handler.check_update(update)
        if result is not None and result is not False:
            return handler, result
    return None
