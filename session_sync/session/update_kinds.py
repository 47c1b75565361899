"""The kinds of updates, and where each keeps its user, its chat and its message.

Knows the words of the Bot API and the names of the classes that telebot and python-telegram-bot
make of them; imports neither of the two, and knows nothing of keys, sessions, storages or locks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias


class UpdateKind(NamedTuple):
    """Where one kind of update keeps its user's and its chat's id, in the words of the Bot API."""

    type: str  # its class, in the Bot API, in telebot and in PTB
    marks: tuple[str, ...]  # the required fields that tell its JSON from that of all others
    user: tuple[str, ...] = ("from", "id")
    chat: tuple[str, ...] = ("chat", "id")
    message: tuple[str, ...] = ()  # what knows the thread and the business connection


_MESSAGE: Final = UpdateKind("Message", ("message_id", "date", "chat"))
_MEMBER: Final = UpdateKind("ChatMemberUpdated", ("old_chat_member", "new_chat_member"))

# The frequent ones come first. `business_connection` is news about a connection, not something that
# came through it: it belongs to the owner's chat with the bot, where the bot is set up.
_KINDS: Final = {
    "message": _MESSAGE,
    "callback_query": UpdateKind(
        "CallbackQuery", ("chat_instance",), chat=("message", "chat", "id"), message=("message",)
    ),
    "edited_message": _MESSAGE,
    "channel_post": _MESSAGE,
    "edited_channel_post": _MESSAGE,
    "inline_query": UpdateKind("InlineQuery", ("query", "offset")),
    "chosen_inline_result": UpdateKind("ChosenInlineResult", ("result_id", "query")),
    "my_chat_member": _MEMBER,
    "chat_member": _MEMBER,
    "chat_join_request": UpdateKind("ChatJoinRequest", ("user_chat_id", "chat")),
    "message_reaction": UpdateKind(
        "MessageReactionUpdated", ("old_reaction", "new_reaction"), user=("user", "id")
    ),
    "message_reaction_count": UpdateKind(
        "MessageReactionCountUpdated", ("message_id", "reactions")
    ),
    "shipping_query": UpdateKind("ShippingQuery", ("invoice_payload", "shipping_address")),
    "pre_checkout_query": UpdateKind("PreCheckoutQuery", ("id", "invoice_payload", "total_amount")),
    "purchased_paid_media": UpdateKind("PaidMediaPurchased", ("paid_media_payload",)),
    "poll": UpdateKind("Poll", ("question", "options")),
    "poll_answer": UpdateKind(
        "PollAnswer", ("poll_id", "option_ids"), user=("user", "id"), chat=("voter_chat", "id")
    ),
    "business_connection": UpdateKind(
        "BusinessConnection", ("user_chat_id", "is_enabled"), user=("user", "id")
    ),
    "business_message": _MESSAGE,
    "edited_business_message": _MESSAGE,
    "deleted_business_messages": UpdateKind(
        "BusinessMessagesDeleted", ("business_connection_id", "message_ids")
    ),
    "guest_message": _MESSAGE,
    "chat_boost": UpdateKind(
        "ChatBoostUpdated", ("boost",), user=("boost", "source", "user", "id")
    ),
    "removed_chat_boost": UpdateKind(
        "ChatBoostRemoved", ("boost_id", "remove_date"), user=("source", "user", "id")
    ),
    "managed_bot": UpdateKind("ManagedBotUpdated", ("user", "bot"), user=("user", "id")),
    "subscription": UpdateKind(
        "BotSubscriptionUpdated", ("user", "invoice_payload", "state"), user=("user", "id")
    ),
    "stopped_message_generation": UpdateKind("MessageGenerationStopped", ("chat", "draft_id")),
}
# In an object of either library, `from` is `from_user`.
_OBJECT_KINDS: Final = {
    name: kind._replace(user=("from_user", "id")) if kind.user == ("from", "id") else kind
    for name, kind in _KINDS.items()
}
UPDATE: Final = UpdateKind("Update", ("update_id",))
# What PTB gives to a job's callback instead of an update: the job knows its user and its chat.
_JOB: Final = UpdateKind("CallbackContext", (), user=("job", "user_id"), chat=("job", "chat_id"))
_OBJECT_TYPES: Final = {kind.type: kind for kind in (UPDATE, _JOB, *_OBJECT_KINDS.values())}
MESSAGE_OBJECT: Final = _OBJECT_TYPES["Message"]
_LIBRARIES: Final = ("telebot.", "telegram.")
# The marks of a message are fields of a reaction as well: it comes last.
_MARKS: Final = [
    (frozenset(kind.marks), kind)
    for kind in sorted(set(_KINDS.values()), key=lambda kind: (kind is _MESSAGE, kind.type))
]

# How to follow a path of fields: `in_json` or `in_object`.
Reader: TypeAlias = Callable[[Any, tuple[str, ...]], Any]


def found_in_json(update: dict[Any, Any]) -> tuple[UpdateKind, object] | None:
    """What kind `update` is, or the one that is inside it."""
    if "update_id" in update:
        inside = ((kind, update.get(name)) for name, kind in _KINDS.items())
        return next((found for found in inside if found[1] is not None), None)
    fields = update.keys()
    return next(((kind, update) for marks, kind in _MARKS if marks <= fields), None)


def found_in_object(update: object) -> tuple[UpdateKind, object] | None:
    kind = kind_of(type(update))  # type: ignore[arg-type] # mypy: a class has no hash
    if kind is UPDATE:
        return _inside(update)
    return None if kind is None else (kind, update)


@lru_cache(maxsize=256)
def kind_of(cls: type) -> UpdateKind | None:
    for base in cls.__mro__:
        kind = _OBJECT_TYPES.get(base.__name__)
        if kind is not None and base.__module__.startswith(_LIBRARIES):
            return kind
    return None


def _inside(update: object) -> tuple[UpdateKind, object] | None:
    for name, kind in _OBJECT_KINDS.items():
        payload = getattr(update, name, None)
        if payload is not None:
            return kind, payload
    # PTB keeps the kinds that are newer than itself as JSON.
    newer = getattr(update, "api_kwargs", {})
    return found_in_json({"update_id": None, **newer})


def in_json(thing: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if thing is None:
            return None
        thing = thing.get(name)
    return thing


def in_object(thing: object, path: tuple[str, ...]) -> Any:
    for name in path:
        thing = getattr(thing, name, None)
    return thing
