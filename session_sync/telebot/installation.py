"""`install` for telebot: what is refused, and what is put in its place on a bot.

This module knows the two kinds of bots; it does not know how an update is handled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from ..lifecycle.bot import BotSessions
from ..manager import SessionManager
from .asynchronous import AsyncIntegration
from .attribute import add_attributes
from .library import TeleBot, is_async_bot, is_known
from .states import refuse_other_states
from .sync import Integration

if TYPE_CHECKING:  # it needs aiohttp, which a program without an AsyncTeleBot may not have
    from telebot.async_telebot import AsyncTeleBot

Bot = TypeVar("Bot", bound="TeleBot | AsyncTeleBot")


def install(
    bot: Bot,
    sessions: SessionManager[Any],
    *,
    chat_session: SessionManager[Any] | None = None,
    migrate_chats: bool | None = None,
) -> Bot:
    """Give every update of `bot` its session: `message.session`, `call.session`, ...

    It is there in handlers of every kind, in their filters, in class middlewares, and in next-step
    and reply callbacks, which are looked up when their message is handled. The updates of one user
    are handled one after the other in the order in which they came, those of different users side
    by side; an update that waits for its turn occupies no worker. A handler that raises leaves the
    session as it was (see `on_error`), and the bot's exception handler gets the exception as
    always. `message.session = {...}` replaces all fields, `= None` empties the session. An update
    without a key is handled too; asking for its session raises SessionKeyError.

    All of this holds for an AsyncTeleBot as well; of a lazy manager, its handlers first say
    `session = await message.session`. An exception that comes from outside of its handlers (from a
    class middleware, `get_storage_key`, the storage) goes to the bot's exception handler too, and
    leaves `process_new_updates` if that one does not answer True.

    With `chat_session`, an update has a second session, `message.chat_session`, under the same
    rules and of a manager of its own. It is handled when both are free for it; what is saved of
    one does not depend on whether the other can be.

    Arguments:
        bot: a TeleBot or an AsyncTeleBot.
        sessions: where the sessions come from.
        chat_session: where those of `message.chat_session` come from; most often a manager with
            `get_storage_key=by_chat`, on the same storage or another one.
        migrate_chats: when a group becomes a supergroup, move its sessions to its new number
            (`sessions.migrate_chat`), before the service message is handled that says so. What
            fails in that goes where goes what a handler raises, and the message is handled all the
            same. It reads all keys of the store; by default it is done if the storage can list
            them.

    Returns the bot. Raises TypeError if `bot` is neither a TeleBot nor an AsyncTeleBot, if it has
    the `SessionStates` of the other one, or if a storage cannot list its keys and `migrate_chats`
    is True; ValueError if `chat_session` is `sessions`, or if the bot's states and its sessions
    have two storage objects of one store; RuntimeError if a manager was closed, if the bot has
    sessions already, or if this version of telebot lacks what is needed here.

    >>> import telebot
    >>> from session_sync import SessionManager
    >>> import session_sync.telebot
    >>> bot = telebot.TeleBot("1:token", threaded=False)
    >>> bot = session_sync.telebot.install(bot, SessionManager())
    >>> @bot.message_handler(func=lambda message: True)
    ... def count(message):
    ...     message.session.counter = message.session.get("counter", 0) + 1
    ...     print(message.session.counter)
    >>> alex = {"id": 1, "is_bot": False, "first_name": "Alex"}
    >>> chat = {"id": 1, "type": "private"}
    >>> message = {"message_id": 1, "date": 1, "from": alex, "chat": chat, "text": "hi"}
    >>> update = telebot.types.Update.de_json({"update_id": 1, "message": message})
    >>> bot.process_new_updates([update, update])
    1
    2
    """
    integration = _integration_for(bot)
    _refuse(bot, integration)
    bot_sessions = BotSessions(sessions, chat_session, migrate_chats)
    refuse_other_states(bot, bot_sessions.managers, integration is AsyncIntegration)
    add_attributes()
    integration(bot, bot_sessions)
    return bot


def _integration_for(bot: object) -> type[Integration | AsyncIntegration]:
    if isinstance(bot, TeleBot):
        return Integration
    if is_async_bot(bot):
        return AsyncIntegration
    raise TypeError(f"install() takes a TeleBot or an AsyncTeleBot, not {type(bot).__name__}")


def _refuse(bot: Any, integration: type[Integration | AsyncIntegration]) -> None:
    """Raise for a bot that has sessions, or that cannot have any."""
    if isinstance(getattr(bot.process_new_updates, "__self__", None), integration):
        raise RuntimeError("this bot has sessions already: install() was called before")
    if not is_known(bot, integration.task, integration.replaces):
        raise RuntimeError(
            "this version of pyTelegramBotAPI has no one task for all of an update (middlewares, "
            "filters, handlers) that a session could be open for: "
            "pip install --upgrade 'session-sync[telebot]'"
        )
