"""Which session keeps a conversation, and under which names: found out once, from what its key
function makes of a few messages.

This module knows key functions, and what a conversation looks at; it knows no states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..manager import SessionManager
from ..session.keys import OWN_KEY_FUNCTIONS, message_json
from .library import ConversationHandler, Update


class Home(NamedTuple):
    """Which of an update's sessions keeps a conversation, and what its key does not say: `chat`,
    `user` and `message`, as far as the conversation looks at them."""

    place: int
    manager: SessionManager[Any]
    rest: tuple[str, ...]


def find_home(
    conversation: ConversationHandler[Any], managers: Sequence[SessionManager[Any]]
) -> Home:
    """The first session that all updates of one conversation have.

    Raises ValueError if there is none, or if it is lazy.
    """
    per_chat, per_user = conversation.per_chat, conversation.per_user
    for place, manager in enumerate(managers):
        key, of_other_user, of_other_chat, of_topic = _keys(conversation, manager)
        says_user, says_chat = key != of_other_user, key != of_other_chat
        is_shared = (per_user or not says_user) and (per_chat or not says_chat)
        if not is_shared or (key != of_topic and not per_user):
            continue
        if manager.scopes.options.lazy:
            raise ValueError(
                f"ConversationHandler {conversation.name!r}: the session that would keep its "
                f"states is lazy, and PTB looks at the state of every update; make its "
                f"SessionManager without lazy=True"
            )
        # A key function of the program's own may tell some users apart, and not others.
        is_own = manager.scopes.get_storage_key in OWN_KEY_FUNCTIONS
        needed = {
            "chat": per_chat and not (says_chat and is_own),
            "user": per_user and not (says_user and is_own),
            "message": conversation.per_message,
        }
        return Home(place, manager, tuple(what for what in needed if needed[what]))
    wanted = "by_user" if per_user else "by_chat"
    way_out = (
        f"give install() a chat_session=SessionManager(get_storage_key={wanted})"
        if per_user or per_chat
        else "let it be per_chat, too"
    )
    raise ValueError(
        f"ConversationHandler {conversation.name!r} with per_chat={per_chat} and "
        f"per_user={per_user} has updates with different sessions, so none of these can keep its "
        f"state; {way_out}"
    )


def _keys(conversation: ConversationHandler[Any], manager: SessionManager[Any]) -> list[Any]:
    """The keys of `_messages`."""
    try:
        return [manager.scopes.get_storage_key(message) for message in _messages()]
    except OSError:  # no word on the key: a signal handler's TimeoutError, say
        raise
    except Exception as error:
        raise ValueError(
            f"ConversationHandler {conversation.name!r}: get_storage_key raised "
            f"{type(error).__name__} for a message of a user in a group that was made up to see "
            f"what its keys say; let it return None for what it does not know"
        ) from error


def _messages() -> Iterator[object]:
    """One, and others of another user, in another chat, and in a topic."""
    bot: Any = None  # it does nothing
    for user, chat, thread in ((1, -1, None), (2, -1, None), (1, -2, None), (1, -1, 4)):
        message = message_json(user, chat, thread)
        yield Update.de_json({"update_id": 1, "message": message}, bot)
