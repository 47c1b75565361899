"""`install` for python-telegram-bot: what is refused, and how a builder comes to add sessions.

This module knows builders; it does not know how an update is handled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..lifecycle.bot import BotSessions
from ..manager import SessionManager
from ..session.session import BaseSession
from .attribute import SessionContext
from .builder import add_sessions, has_sessions
from .library import ApplicationBuilder, Bot, is_known

if TYPE_CHECKING:
    from .attribute import C
    from .library import JobQueue

S = TypeVar("S", bound=BaseSession)
BT = TypeVar("BT", bound=Bot)
UD = TypeVar("UD")
CD = TypeVar("CD")
BD = TypeVar("BD")
JQ = TypeVar("JQ", bound="JobQueue[Any] | None")
OwnContext = TypeVar("OwnContext", bound="SessionContext[Any, Any]")


# A context class based on SessionContext stays what it is to a type checker; of any other, that
# its bot gets the session as well is known only at run time.
@overload
def install(
    builder: ApplicationBuilder[BT, OwnContext, UD, CD, BD, JQ],
    sessions: SessionManager[Any],
    *,
    chat_session: SessionManager[Any] | None = None,
    migrate_chats: bool | None = None,
) -> ApplicationBuilder[BT, OwnContext, UD, CD, BD, JQ]: ...
@overload
def install(
    builder: ApplicationBuilder[BT, Any, UD, CD, BD, Any],
    sessions: SessionManager[S],
    *,
    chat_session: None = None,
    migrate_chats: bool | None = None,
) -> ApplicationBuilder[BT, SessionContext[S], UD, CD, BD, JobQueue[SessionContext[S]]]: ...
@overload
def install(
    builder: ApplicationBuilder[BT, Any, UD, CD, BD, Any],
    sessions: SessionManager[S],
    *,
    chat_session: SessionManager[C],
    migrate_chats: bool | None = None,
) -> ApplicationBuilder[BT, SessionContext[S, C], UD, CD, BD, JobQueue[SessionContext[S, C]]]: ...
def install(
    builder: Any,
    sessions: SessionManager[Any],
    *,
    chat_session: SessionManager[Any] | None = None,
    migrate_chats: bool | None = None,
) -> Any:
    """Give every update of the application that `builder` builds its session: `context.session`.

    One update is one unit: its session is opened before its handlers and closed after the last of
    them, the non-blocking ones included, and the tasks of `application.create_task(..., update)`.
    The updates of one user are handled one after the other in the order in which they came, those
    of different users side by side as far as `concurrent_updates` lets them; one that waits for
    its session occupies no thread, and none of those slots. When a handler raises, what its unit
    changed since the last flush is discarded (see `on_error`), and then PTB's error handlers run;
    ApplicationHandlerStop is no error. An update without a key is handled too; asking for its
    session raises SessionKeyError.

    With `chat_session`, a unit has a second session, `context.chat_session`, under the same rules
    and of a manager of its own; what is saved of one does not depend on whether the other can be.

    Arguments:
        builder: a builder of PTB 20 or newer, before or after its other choices: a bot's own
            context class and application class are kept, and get the session as well.
        sessions: where the sessions come from.
        chat_session: where those of `context.chat_session` come from; most often a manager with
            `get_storage_key=by_chat`, on the same storage or another one.
        migrate_chats: when a group becomes a supergroup, move its sessions to its new number
            (`sessions.migrate_chat`), before the service message is handled that says so. What
            fails in that goes to the error handlers, and the message is handled all the same. It
            reads all keys of the store; by default it is done if the storage can list them.

    Returns the builder. Raises TypeError if `builder` is no ApplicationBuilder, or if a storage
    cannot list its keys and `migrate_chats` is True; ValueError if `chat_session` is `sessions`;
    RuntimeError if a manager was closed, if the builder has sessions already, or if this version of
    PTB lacks what is needed here.

    >>> import session_sync.ptb
    >>> from session_sync import SessionManager
    >>> from telegram.ext import Application
    >>> sessions = SessionManager()
    >>> builder = session_sync.ptb.install(Application.builder().token("1:token"), sessions)
    >>> application = builder.build()
    >>> issubclass(application.context_types.context, session_sync.ptb.SessionContext)
    True
    """
    _refuse(builder)
    add_sessions(builder, BotSessions(sessions, chat_session, migrate_chats))
    return builder


def _refuse(builder: object) -> None:
    """Raise for a builder that has sessions, or that cannot have any."""
    if not isinstance(builder, ApplicationBuilder):
        raise TypeError(
            f"install() takes an ApplicationBuilder (Application.builder().token(...)), not "
            f"{type(builder).__name__}; call it before .build()"
        )
    if has_sessions(builder):
        raise RuntimeError("this builder has sessions already: install() was called before")
    if not is_known():
        raise RuntimeError(
            "this version of python-telegram-bot starts its tasks in a way that is not known here: "
            "pip install --upgrade 'session-sync[ptb]'"
        )
