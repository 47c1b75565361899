"""Whose session an update belongs to: `StorageKey`, and the functions that read one off an update.

Knows the words of the Bot API and the names of the classes that telebot and python-telegram-bot
make of them; imports neither of the two, and knows nothing of sessions, storages or locks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias, cast

__all__ = ["StorageKey", "by_chat", "by_topic", "by_user", "default_storage_key"]

# A chat's id has at most 52 significant bits (Bot API), a thread's far less; every store and every
# language reads 64.
_LOWEST: Final = -(2**63)
_HIGHEST: Final = 2**63 - 1

# `key` comes last and runs to the end of the text, whatever is in it; the colons and per cent signs
# of a business id are escaped, so that it ends where the next part begins.
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

    `str()` gives the text under which a storage keeps the session, `parse()` reads it back, and two
    different keys never have the same text.

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
            ValueError: no StorageKey has this text.

        >>> StorageKey.parse("chat:-100:thread:4").thread
        4
        >>> StorageKey.parse("user:007")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: 'user:007' is not the text of a StorageKey, ...
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
                # Prints the same text: so no "-0", no leading zero or colon, no needless escape.
                if str(key) == text:
                    return key
        raise ValueError(
            f"{text!r} is not the text of a StorageKey, "
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


class _Kind(NamedTuple):
    """Where one kind of update keeps its user's and its chat's id, in the words of the Bot API."""

    type: str  # its class, in the Bot API, in telebot and in PTB
    marks: tuple[str, ...]  # the required fields that tell its JSON from that of all others
    user: tuple[str, ...] = ("from", "id")
    chat: tuple[str, ...] = ("chat", "id")
    message: tuple[str, ...] = ()  # what knows the thread and the business connection


_MESSAGE: Final = _Kind("Message", ("message_id", "date", "chat"))
_MEMBER: Final = _Kind("ChatMemberUpdated", ("old_chat_member", "new_chat_member"))

# The frequent ones come first. `business_connection` is news about a connection, not something that
# came through it: it belongs to the owner's chat with the bot, where he sets the bot up.
_KINDS: Final = {
    "message": _MESSAGE,
    "callback_query": _Kind(
        "CallbackQuery", ("chat_instance",), chat=("message", "chat", "id"), message=("message",)
    ),
    "edited_message": _MESSAGE,
    "channel_post": _MESSAGE,
    "edited_channel_post": _MESSAGE,
    "inline_query": _Kind("InlineQuery", ("query", "offset")),
    "chosen_inline_result": _Kind("ChosenInlineResult", ("result_id", "query")),
    "my_chat_member": _MEMBER,
    "chat_member": _MEMBER,
    "chat_join_request": _Kind("ChatJoinRequest", ("user_chat_id", "chat")),
    "message_reaction": _Kind(
        "MessageReactionUpdated", ("old_reaction", "new_reaction"), user=("user", "id")
    ),
    "message_reaction_count": _Kind("MessageReactionCountUpdated", ("message_id", "reactions")),
    "shipping_query": _Kind("ShippingQuery", ("invoice_payload", "shipping_address")),
    "pre_checkout_query": _Kind("PreCheckoutQuery", ("id", "invoice_payload", "total_amount")),
    "purchased_paid_media": _Kind("PaidMediaPurchased", ("paid_media_payload",)),
    "poll": _Kind("Poll", ("question", "options")),
    "poll_answer": _Kind(
        "PollAnswer", ("poll_id", "option_ids"), user=("user", "id"), chat=("voter_chat", "id")
    ),
    "business_connection": _Kind(
        "BusinessConnection", ("user_chat_id", "is_enabled"), user=("user", "id")
    ),
    "business_message": _MESSAGE,
    "edited_business_message": _MESSAGE,
    "deleted_business_messages": _Kind(
        "BusinessMessagesDeleted", ("business_connection_id", "message_ids")
    ),
    "guest_message": _MESSAGE,
    "chat_boost": _Kind("ChatBoostUpdated", ("boost",), user=("boost", "source", "user", "id")),
    "removed_chat_boost": _Kind(
        "ChatBoostRemoved", ("boost_id", "remove_date"), user=("source", "user", "id")
    ),
    "managed_bot": _Kind("ManagedBotUpdated", ("user", "bot"), user=("user", "id")),
    "subscription": _Kind(
        "BotSubscriptionUpdated", ("user", "invoice_payload", "state"), user=("user", "id")
    ),
    "stopped_message_generation": _Kind("MessageGenerationStopped", ("chat", "draft_id")),
}
# In an object of either library, `from` is `from_user`.
_OBJECT_KINDS: Final = {
    name: kind._replace(user=("from_user", "id")) if kind.user == ("from", "id") else kind
    for name, kind in _KINDS.items()
}
_UPDATE: Final = _Kind("Update", ("update_id",))
# What PTB gives to a job's callback instead of an update: the job knows whom it is for.
_JOB: Final = _Kind("CallbackContext", (), user=("job", "user_id"), chat=("job", "chat_id"))
_OBJECT_TYPES: Final = {kind.type: kind for kind in (_UPDATE, _JOB, *_OBJECT_KINDS.values())}
_MESSAGE_OBJECT: Final = _OBJECT_TYPES["Message"]
_LIBRARIES: Final = ("telebot.", "telegram.")
# The marks of a message are fields of a reaction as well: it comes last.
_MARKS: Final = [
    (frozenset(kind.marks), kind)
    for kind in sorted(set(_KINDS.values()), key=lambda kind: (kind is _MESSAGE, kind.type))
]

# What a message, or what stands for it in its kind, may say beyond its user and its chat.
_BUSINESS: Final = ("business_connection_id",)
_GUEST: Final = ("guest_query_id",)
_IS_TOPIC: Final = ("is_topic_message",)
_DRAFT: Final = ("draft_id",)
_THREAD: Final = ("message_thread_id",)
_DIRECT_TOPIC: Final = ("direct_messages_topic", "topic_id")

# Telegram's stand-ins for who does not show himself: linked channel, anonymous admin, channel.
_STAND_INS: Final = frozenset({777000, 1087968824, 136817688})


def default_storage_key(update: object) -> StorageKey | None:
    """The session of a user in a chat: what a manager uses unless it is told otherwise.

    The user is who acted: the presser of a button, not the bot whose message it is under. An update
    that has a user and no chat (an inline query, a checkout, a poll answer) takes the user's
    private chat; one that comes out of a private chat and names no user (deleted business messages,
    a stopped draft) takes the user whose chat it is: the ids are the same. What comes through a
    business connection adds the connection; the `business_connection` update itself does not, since
    it belongs to the owner's chat with the bot.

    Who does not show himself is the user that Telegram puts in his place (`message.from_user`), as
    in telebot, PTB and aiogram: the anonymous admins of a group share one session in that group,
    and so do the channels that write in it. A channel's post has a chat and, mostly, no user.

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
    """The text of `default_storage_key(update)`, sooner where the update is an ordinary message."""
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
    kind = _kind_of(type(update))  # type: ignore[arg-type] # mypy: a class has no hash
    if kind is _UPDATE:
        update = update.message
        kind = _kind_of(type(update))  # type: ignore[arg-type] # mypy: a class has no hash
    if kind is not _MESSAGE_OBJECT:
        return None
    message_types.add(type(update))
    return update


def by_user(update: object) -> StorageKey | None:
    """One session per user, in whatever chat he is, business chats included.

    The accounts that stand in for anonymous admins and for channels are nobody's own; with them the
    chat stays in the key, lest the anonymous admins of all groups share one session.

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
    """One session per chat, shared by all who write in it; a business chat is a chat of its own.

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
    """One session per topic, shared by all who write in it; elsewhere one per chat, as `by_chat`.

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


# How to follow a path of fields: `_in_json` or `_in_object`.
_Reader: TypeAlias = Callable[[Any, tuple[str, ...]], Any]
# What a public function makes of the user, the chat and the message of an update.
_Shape: TypeAlias = Callable[[int | None, int, _Reader, object], StorageKey | None]


def _user_and_chat(user: int | None, chat: int, at: _Reader, message: object) -> StorageKey:
    return StorageKey(user=user, chat=chat, business=at(message, _BUSINESS))


def _user(user: int | None, chat: int, at: _Reader, message: object) -> StorageKey | None:
    if user is None:
        return None
    return StorageKey(user=user, chat=chat if user in _STAND_INS else None)


def _chat(user: int | None, chat: int, at: _Reader, message: object) -> StorageKey:
    caller = _caller(user, chat, at, message)
    return StorageKey(user=caller, chat=chat, business=at(message, _BUSINESS))


def _topic(user: int | None, chat: int, at: _Reader, message: object) -> StorageKey:
    caller, thread = _caller(user, chat, at, message), _thread(at, message)
    return StorageKey(user=caller, chat=chat, thread=thread, business=at(message, _BUSINESS))


def _caller(user: int | None, chat: int, at: _Reader, message: object) -> int | None:
    """The user, if this is a private chat into which he called the bot as a guest."""
    return user if chat > 0 and at(message, _GUEST) is not None else None


def _thread(at: _Reader, message: object) -> int | None:
    if type(message).__name__ == "InaccessibleMessage":  # telebot's would log a warning
        return None
    # A draft that was stopped has no such flag: it can be in no other thread than a topic.
    if at(message, _IS_TOPIC) or at(message, _DRAFT) is not None:
        return cast("int | None", at(message, _THREAD))
    return cast("int | None", at(message, _DIRECT_TOPIC))


def _key(update: object, field_type: _Shape) -> StorageKey | None:
    # What is no id is refused by StorageKey, and an object may raise at any attribute (a half-made
    # one, a subclass with properties). Here it would cost telebot its whole batch of updates.
    try:
        found = _found_in_json(update) if isinstance(update, dict) else _found_in_object(update)
        return None if found is None else _read(*found, field_type)
    except OSError:  # of a signal handler whose time is up: without a key, the update is lost
        raise
    except Exception:
        return None


def _found_in_json(update: dict[Any, Any]) -> tuple[_Kind, object] | None:
    """What kind `update` is, or the one that is inside it."""
    if "update_id" in update:
        inside = ((kind, update.get(name)) for name, kind in _KINDS.items())
        return next((found for found in inside if found[1] is not None), None)
    fields = update.keys()
    return next(((kind, update) for marks, kind in _MARKS if marks <= fields), None)


def _found_in_object(update: object) -> tuple[_Kind, object] | None:
    kind = _kind_of(type(update))  # type: ignore[arg-type] # mypy: a class has no hash
    if kind is _UPDATE:
        return _inside(update)
    return None if kind is None else (kind, update)


@lru_cache(maxsize=256)
def _kind_of(cls: type) -> _Kind | None:
    for base in cls.__mro__:
        kind = _OBJECT_TYPES.get(base.__name__)
        if kind is not None and base.__module__.startswith(_LIBRARIES):
            return kind
    return None


def _inside(update: object) -> tuple[_Kind, object] | None:
    for name, kind in _OBJECT_KINDS.items():
        payload = getattr(update, name, None)
        if payload is not None:
            return kind, payload
    # PTB keeps the kinds that are newer than itself as JSON.
    newer = getattr(update, "api_kwargs", {})
    return _found_in_json({"update_id": None, **newer})


def _read(kind: _Kind, payload: object, field_type: _Shape) -> StorageKey | None:
    at = _in_json if isinstance(payload, dict) else _in_object
    user = at(payload, kind.user)
    chat = at(payload, kind.chat)
    # A private chat has its user's id, so that each can stand in for the other; a group has a
    # negative one.
    if chat is None:
        chat = user
    elif user is None and chat > 0:
        user = chat
    return None if chat is None else field_type(user, chat, at, at(payload, kind.message))


def _in_json(thing: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if thing is None:
            return None
        thing = thing.get(name)
    return thing


def _in_object(thing: object, path: tuple[str, ...]) -> Any:
    for name in path:
        thing = getattr(thing, name, None)
    return thing
