"""Which session an update belongs to: `StorageKey`, and the functions that make one of an update.

This module knows keys; where an update of which kind has its user and its chat, only
`update_kinds`. It knows no session, storage or lock.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from .update_kinds import (
    MESSAGE_OBJECT,
    UPDATE,
    Reader,
    UpdateKind,
    found_in_json,
    found_in_object,
    in_json,
    in_object,
    kind_of,
)

__all__ = ["StorageKey", "by_chat", "by_topic", "by_user", "default_storage_key"]

# A chat's id has at most 52 significant bits (Bot API), a thread's far less; every store and every
# language reads 64.
_LOWEST: Final = -(2**63)
_HIGHEST: Final = 2**63 - 1

# `key` comes last and runs to the end of the string, whatever is in it; the colons and per cent
# signs of a business id are escaped, so that it ends where the next part begins.
_TEXT: Final = re.compile(
    r"(?:user:(?P<user>-?[0-9]{1,19}))?"
    r"(?::?chat:(?P<chat>-?[0-9]{1,19}))?"
    r"(?::?thread:(?P<thread>-?[0-9]{1,19}))?"
    r"(?::?business:(?P<business>[^:]*))?"
    r"(?::?key:(?P<key>.*))?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class StorageKey:
    """The name of one session: any of a user, a chat, a thread, a business connection and a free
    `key`, at least one of them.

    `str()` gives the string under which a storage keeps the session, `parse()` reads it back, and
    two different keys never have the same string.

    Args:
        user: id of the user.
        chat: id of the chat; a user's private chat with the bot has the user's id.
        thread: `message_thread_id` of a topic.
        business: id of the business connection that the chat belongs to.
        key: anything else that tells two sessions apart, for example the name of a wizard.

    Raises:
        TypeError: an id is no int, or `business` or `key` is no str.
        ValueError: no part is given, or an id does not fit in 64 bits.

    >>> str(StorageKey(user=7, chat=-100, key="cart"))
    'user:7:chat:-100:key:cart'
    >>> StorageKey.parse("user:7:chat:-100:key:cart")
    StorageKey(user=7, chat=-100, key='cart')
    """

    user: int | None
    chat: int | None
    thread: int | None
    business: str | None
    key: str | None

    # Written out because it runs for every update: the generated one and checks in `__post_init__`
    # take twice as long.
    def __init__(
        self,
        *,
        user: int | None = None,
        chat: int | None = None,
        thread: int | None = None,
        business: str | None = None,
        key: str | None = None,
    ) -> None:
        if user is None and chat is None and thread is None and business is None and key is None:
            raise ValueError(
                "a StorageKey needs at least one part, for example StorageKey(user=message.chat.id)"
            )
        if user is not None and (type(user) is not int or not _LOWEST <= user <= _HIGHEST):
            user = _checked_id("user", user)
        if chat is not None and (type(chat) is not int or not _LOWEST <= chat <= _HIGHEST):
            chat = _checked_id("chat", chat)
        if thread is not None and (type(thread) is not int or not _LOWEST <= thread <= _HIGHEST):
            thread = _checked_id("thread", thread)
        if business is not None and type(business) is not str:
            business = _checked_text("business", business)
        if key is not None and type(key) is not str:
            key = _checked_text("key", key)
        put = object.__setattr__
        put(self, "user", user)
        put(self, "chat", chat)
        put(self, "thread", thread)
        put(self, "business", business)
        put(self, "key", key)

    def __str__(self) -> str:
        text = "" if self.user is None else f":user:{self.user}"
        if self.chat is not None:
            text += f":chat:{self.chat}"
        if self.thread is not None:
            text += f":thread:{self.thread}"
        if self.business is not None:
            text += f":business:{_escape(self.business)}"
        if self.key is not None:
            text += f":key:{self.key}"
        return text[1:]

    def __repr__(self) -> str:
        attributes = ((name, getattr(self, name)) for name in self.__slots__)
        return f"StorageKey({', '.join(f'{n}={v!r}' for n, v in attributes if v is not None)})"

    @classmethod
    def parse(cls, text: str) -> StorageKey:
        """The key whose `str()` is `text`.

        Args:
            text: for example one of the keys that a storage lists.

        Raises:
            ValueError: no StorageKey has this string.

        >>> StorageKey.parse("chat:-100:thread:4").thread
        4
        >>> StorageKey.parse("user:007")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: 'user:007' is not the string of a StorageKey, ...
        """
        match = _TEXT.fullmatch(text)
        if match is not None and text:
            user, chat, thread, business, free = match.groups()
            try:
                key = cls(
                    user=None if user is None else int(user),
                    chat=None if chat is None else int(chat),
                    thread=None if thread is None else int(thread),
                    business=None if business is None else _unescape(business),
                    key=free,
                )
            except ValueError:
                pass
            else:
                # Prints the same: so no "-0", no leading zero or colon, no needless escape.
                if str(key) == text:
                    return key
        raise ValueError(
            f"{text!r} is not the string of a StorageKey, "
            "which reads user:<id>:chat:<id>:thread:<id>:business:<id>:key:<value>, parts left out"
        )


def _checked_id(name: str, value: object) -> int:
    """An enum as the int that it is (PTB has one of chat ids), since it would print its own way."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"StorageKey({name}=...) takes an int (message.from_user.id, message.chat.id, ...), "
            f"not {type(value).__name__}; what is not an id of Telegram goes into key="
        )
    if not _LOWEST <= value <= _HIGHEST:
        raise ValueError(f"StorageKey({name}=...) takes an id of Telegram: it fits in 64 bits")
    return int(value)


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(
            f"StorageKey({name}=...) takes a str, not {type(value).__name__}: use str(...)"
        )
    return str.__str__(value)


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace(":", "%3A")


def _unescape(text: str) -> str:
    return text.replace("%3A", ":").replace("%25", "%")


# What a message, or what stands for it in its kind, may say beyond its user and its chat.
_BUSINESS: Final = ("business_connection_id",)
_GUEST: Final = ("guest_query_id",)
_IS_TOPIC: Final = ("is_topic_message",)
_DRAFT: Final = ("draft_id",)
_THREAD: Final = ("message_thread_id",)
_DIRECT_TOPIC: Final = ("direct_messages_topic", "topic_id")

# Telegram's stand-ins for anonymous senders: linked channel, anonymous admin, channel.
_STAND_INS: Final = frozenset({777000, 1087968824, 136817688})


def default_storage_key(update: object) -> StorageKey | None:
    """The session of a user in a chat: what a manager uses unless it is told otherwise.

    The user is the one that acted: the presser of a button, not the bot whose message it is under.
    An update that has a user and no chat (an inline query, a checkout, a poll answer) takes the
    user's private chat; one that comes out of a private chat and names no user (deleted business
    messages, a stopped draft) takes the user whose chat it is: the ids are the same. What comes
    through a business connection adds the connection; the `business_connection` update itself does
    not, since it belongs to the owner's chat with the bot.

    For an anonymous sender, the user is the account that Telegram gives instead
    (`message.from_user`), as in telebot, PTB and aiogram: the anonymous admins of a group share one
    session in that group, and so do the channels that write in it. A channel's post has a chat and,
    mostly, no user.

    Args:
        update: an object that telebot hands to a handler, telebot's or PTB's `Update` or what is in
            it, or the JSON of one of these as a dict. The same update gives the same key in each.
            Also the context of one of PTB's jobs, which has the key of the job's user and chat.

    Returns:
        The key; None for an update with neither user nor chat (a poll), and for anything else.
        Never raises, but an OSError that reading the update raises (TimeoutError is one).

    >>> update = {"update_id": 1, "inline_query": {"id": "1", "from": {"id": 7}}}
    >>> str(default_storage_key(update))
    'user:7:chat:7'
    """
    return _key(update, _user_and_chat)


def default_key_text(update: object) -> str | None:
    """`str(default_storage_key(update))`, sooner where the update is an ordinary message."""
    try:
        message: Any = update if type(update) in message_types else _message_in(update)
        user, chat = message.from_user.id, message.chat.id
        if (
            type(user) is type(chat) is int
            and message.business_connection_id is None
            and 0 < user < 2**63
        ):
            digits = str(user)  # once: in a private chat the chat has the same id
            if chat == user:
                return f"user:{digits}:chat:{digits}"
            if -(2**63) <= chat < 2**63:
                return f"user:{digits}:chat:{chat}"
    except OSError:  # see _key
        raise
    except Exception:  # no message, or a channel's, which has no user; for what else, see _key
        pass
    key = default_storage_key(update)
    return None if key is None else str(key)


#: The classes of messages that have come so far.
message_types: Final[set[type[Any]]] = set()


def _message_in(update: Any) -> Any:
    """A message itself, or the one that an Update has; None where there is none."""
    kind = kind_of(type(update))  # type: ignore[arg-type] # mypy: a class has no hash
    if kind is UPDATE:
        update = update.message
        kind = kind_of(type(update))  # type: ignore[arg-type] # mypy: a class has no hash
    if kind is not MESSAGE_OBJECT:
        return None
    message_types.add(type(update))
    return update


def by_user(update: object) -> StorageKey | None:
    """One session per user, in whatever chat, business chats included.

    The accounts that stand in for anonymous admins and for channels belong to no user; with them
    the chat stays in the key, lest the anonymous admins of all groups share one session.

    Args:
        update: as in `default_storage_key`.

    Returns:
        The key, or None for an update without a user (a channel's post, a chat's reaction, a
        poll). Raises as `default_storage_key`.

    >>> message = {"message_id": 1, "date": 1, "chat": {"id": -100}, "from": {"id": 7}}
    >>> str(by_user(message))
    'user:7'
    """
    return _key(update, _user)


def by_chat(update: object) -> StorageKey | None:
    """One session per chat, shared by all its users; a business chat is a chat of its own.

    A private chat in which the bot is only a guest has the id of another chat of the bot's (one of
    the two people's own); there the user who called the bot stays in the key.

    Args:
        update: as in `default_storage_key`. Without a chat, the user's private chat.

    Returns:
        The key, or None for an update with neither user nor chat. Raises as `default_storage_key`.

    >>> message = {"message_id": 1, "date": 1, "chat": {"id": -100}, "from": {"id": 7}}
    >>> str(by_chat(message))
    'chat:-100'
    """
    return _key(update, _chat)


def by_topic(update: object) -> StorageKey | None:
    """One session per topic, shared by all its users; elsewhere one per chat, as `by_chat`.

    A topic is one of a forum, of a private chat with topics, or of a channel's direct messages.
    Replies in an ordinary group form a thread but no topic. The general topic of a forum, and all
    updates that do not say in which topic they happened (reactions, members, a button under a
    message that has become inaccessible), have the session of the chat.

    Args:
        update: as in `default_storage_key`.

    Returns:
        The key, or None for an update with neither user nor chat. Raises as `default_storage_key`.

    >>> message = {"message_id": 1, "date": 1, "chat": {"id": -100}, "from": {"id": 7}}
    >>> str(by_topic(message | {"is_topic_message": True, "message_thread_id": 4}))
    'chat:-100:thread:4'
    """
    return _key(update, _topic)


#: Those that give the same key for the same user, chat, topic and business connection, whatever
#: else a message says.
OWN_KEY_FUNCTIONS: Final[frozenset[Callable[[Any], Any]]] = frozenset(
    (default_storage_key, default_key_text, by_user, by_chat, by_topic)
)

# What a public function makes of the user, the chat and the message of an update.
_MakeKey: TypeAlias = Callable[[int | None, int, Reader, object], StorageKey | None]


def _user_and_chat(user: int | None, chat: int, at: Reader, message: object) -> StorageKey:
    return StorageKey(user=user, chat=chat, business=at(message, _BUSINESS))


def _user(user: int | None, chat: int, at: Reader, message: object) -> StorageKey | None:
    if user is None:
        return None
    return StorageKey(user=user, chat=chat if user in _STAND_INS else None)


def _chat(user: int | None, chat: int, at: Reader, message: object) -> StorageKey:
    caller = _caller(user, chat, at, message)
    return StorageKey(user=caller, chat=chat, business=at(message, _BUSINESS))


def _topic(user: int | None, chat: int, at: Reader, message: object) -> StorageKey:
    caller, thread = _caller(user, chat, at, message), _thread(at, message)
    return StorageKey(user=caller, chat=chat, thread=thread, business=at(message, _BUSINESS))


def _caller(user: int | None, chat: int, at: Reader, message: object) -> int | None:
    """The user, if this is a private chat into which the bot was called as a guest."""
    return user if chat > 0 and at(message, _GUEST) is not None else None


def _thread(at: Reader, message: object) -> int | None:
    if type(message).__name__ == "InaccessibleMessage":  # telebot's would log a warning
        return None
    # A draft that was stopped has no such flag: it can be in no other thread than a topic.
    if at(message, _IS_TOPIC) or at(message, _DRAFT) is not None:
        return cast("int | None", at(message, _THREAD))
    return cast("int | None", at(message, _DIRECT_TOPIC))


def _key(update: object, make_key: _MakeKey) -> StorageKey | None:
    # What is no id is refused by StorageKey, and an object may raise at any attribute (a half-made
    # one, a subclass with properties). Here it would cost telebot its whole batch of updates.
    try:
        found = found_in_json(update) if isinstance(update, dict) else found_in_object(update)
        return None if found is None else _read(*found, make_key)
    except OSError:  # of a signal handler whose time is up: without a key, the update is lost
        raise
    except Exception:
        return None


def _read(kind: UpdateKind, payload: object, make_key: _MakeKey) -> StorageKey | None:
    at = in_json if isinstance(payload, dict) else in_object
    user = at(payload, kind.user)
    chat = at(payload, kind.chat)
    # A private chat has its user's id, so that each can stand in for the other; a group has a
    # negative one.
    if chat is None:
        chat = user
    elif user is None and chat > 0:
        user = chat
    return None if chat is None else make_key(user, chat, at, at(payload, kind.message))


def message_json(
    user: int, chat: int, thread: int | None = None, business: str | None = None
) -> dict[str, Any]:
    """An empty message of that user in that chat, as Telegram would send it: for what a key
    function makes of it."""
    message: dict[str, Any] = {
        "message_id": 0,
        "date": 0,
        "chat": {"id": chat, "type": "private" if chat > 0 else "supergroup"},
        "from": {"id": user, "is_bot": False, "first_name": ""},
        "text": "",
    }
    if thread is not None:
        message |= {"is_topic_message": True, "message_thread_id": thread}
    if business is not None:
        message["business_connection_id"] = business
    return message


def text_of(key: Any) -> str | None:
    """The key that get_storage_key has returned, as a string."""
    if key is None or isinstance(key, str):
        return key
    if isinstance(key, StorageKey):
        return str(key)
    raise TypeError(
        f"get_storage_key must return a str, a StorageKey or None, not {type(key).__name__}"
    )
