"""What Telegram remembers: chats, the messages in them, and the bot's settings.

Not thread-safe: `OfflineBotAPI` calls it under its lock. A message that has been handed out is
never changed, an edit makes a new one; so it can be encoded after the lock is free again.

This module knows chats and messages; it knows no bot and no connection.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, Final

from session_sync.testing.answers import BotAPIError

JSON = dict[str, Any]
KEPT_MESSAGES: Final = 10_000
# What a copy or a forward leaves behind.
SERVICE_FIELDS: Final = frozenset(
    (
        "message_id",
        "from",
        "sender_chat",
        "chat",
        "date",
        "edit_date",
        "message_thread_id",
        "is_topic_message",
        "business_connection_id",
        "reply_to_message",
        "reply_markup",
    )
)


class Chats:
    """Every chat that has been seen; one that has not been seen comes to be when it is named."""

    def __init__(self, me: JSON) -> None:
        self.me: Final = me
        self.settings: Final[JSON] = {}
        self._chats: dict[int | str, JSON] = {}
        self._last_ids: defaultdict[int, int] = defaultdict(int)
        self._messages: dict[tuple[int, int], JSON] = {}
        self._deleted: set[tuple[int, int]] = set()
        # What people see: the bot's messages of a chat (apart for each business connection) in
        # order, and all versions of each.
        self.sent: Final[defaultdict[tuple[int, str | None], list[JSON]]] = defaultdict(list)
        self.versions: Final[defaultdict[tuple[int, int], list[JSON]]] = defaultdict(list)

    def add_chat(self, chat: JSON) -> None:
        """Remember a chat, or what has changed about it."""
        self._chats[chat["id"]] = {**self._chats.get(chat["id"], {}), **chat}

    def chat(self, chat_id: Any) -> JSON:
        """The chat that a bot names by its number or its @name; raises BotAPIError."""
        if chat_id is None or chat_id == "":
            raise BotAPIError(400, "Bad Request: chat_id is empty")
        chat = self._chats.get(chat_id)
        if chat is None:
            chat = self._unseen(chat_id)
            self._chats[chat_id] = self._chats[chat["id"]] = chat
        return chat

    def _unseen(self, chat_id: Any) -> JSON:
        if isinstance(chat_id, int):
            if chat_id > 0:
                return {"id": chat_id, "type": "private", "first_name": f"User {chat_id}"}
            kind = "supergroup" if chat_id < -1_000_000_000_000 else "group"
            return {"id": chat_id, "type": kind, "title": f"Group {chat_id}"}
        if isinstance(chat_id, str) and chat_id.startswith("@"):
            number = -1_009_000_000_000 - len(self._chats)
            name = chat_id[1:]
            return {"id": number, "type": "channel", "title": name, "username": name}
        raise BotAPIError(400, "Bad Request: chat not found")

    def learn(self, update: JSON) -> None:
        """Remember the chat and the message that an update brings."""
        for value in update.values():
            if isinstance(value, dict):
                message = value.get("message", value)
                if isinstance(message, dict) and isinstance(message.get("chat"), dict):
                    self._learn_message(message)

    def _learn_message(self, message: JSON) -> None:
        chat_id = message["chat"].get("id")
        if not isinstance(chat_id, int):
            return
        if chat_id not in self._chats:
            self._chats[chat_id] = message["chat"]
        message_id = message.get("message_id")
        if isinstance(message_id, int):
            self._last_ids[chat_id] = max(message_id, self._last_ids[chat_id])
            self._keep(chat_id, message_id, message)

    def _keep(self, chat_id: int, message_id: int, message: JSON) -> None:
        messages = self._messages
        messages[chat_id, message_id] = message
        if len(messages) > KEPT_MESSAGES:
            del messages[next(iter(messages))]

    def next_message_id(self, chat_id: int) -> int:
        """The number of the next message of a chat."""
        self._last_ids[chat_id] += 1
        return self._last_ids[chat_id]

    def message(self, chat_id: Any, message_id: Any) -> JSON | None:
        """A message as it is now, if it is still remembered."""
        return self._messages.get((self.chat(chat_id)["id"], message_id))

    def post(self, chat: JSON, content: JSON, params: JSON, markup: JSON | None) -> JSON:
        """Let the bot send a message. A keyboard that is not inline shows to people only."""
        chat_id: int = chat["id"]
        message: JSON = {"message_id": self.next_message_id(chat_id)}
        message["sender_chat" if chat["type"] == "channel" else "from"] = (
            chat if chat["type"] == "channel" else self.me
        )
        message |= {"chat": chat, "date": int(time.time()), **content}
        if "message_thread_id" in params:
            message |= {"message_thread_id": params["message_thread_id"], "is_topic_message": True}
        business = params.get("business_connection_id")
        if business is not None:
            message["business_connection_id"] = business
        replied = self._messages.get((chat_id, _replied_id(params)))
        if replied is not None:
            message["reply_to_message"] = replied
        if markup is not None and "inline_keyboard" in markup:
            message["reply_markup"] = markup
        self._keep(chat_id, message["message_id"], message)
        seen = message if markup is None else {**message, "reply_markup": markup}
        self.sent[chat_id, business].append(seen)
        self.versions[chat_id, message["message_id"]].append(seen)
        return message

    def edit(self, chat_id: Any, message_id: Any, change: JSON, markup: JSON | None) -> JSON:
        """Put a change over a message; without `markup` its keyboard goes."""
        old = self.message(chat_id, message_id)
        if old is None:
            raise BotAPIError(400, "Bad Request: message to edit not found")
        new = {**old, **change}
        new.pop("reply_markup", None)
        if markup is not None:
            new["reply_markup"] = markup
        if new == old:
            raise BotAPIError(
                400,
                "Bad Request: message is not modified: specified new message content and reply"
                " markup are exactly the same as a current content and reply markup of the message",
            )
        new["edit_date"] = int(time.time())
        key = (old["chat"]["id"], message_id)
        self._messages[key] = new
        self.versions[key].append(new)
        return new

    def delete(self, chat_id: Any, message_id: Any) -> None:
        """Remove a message; raises BotAPIError if there never was one or it has been removed."""
        key = (self.chat(chat_id)["id"], message_id)
        existed = isinstance(message_id, int) and 0 < message_id <= self._last_ids[key[0]]
        if not existed or key in self._deleted:
            raise BotAPIError(400, "Bad Request: message to delete not found")
        self._deleted.add(key)
        self._messages.pop(key, None)


def _replied_id(params: JSON) -> Any:
    reply = params.get("reply_parameters")
    if isinstance(reply, dict):
        return reply.get("message_id")
    return params.get("reply_to_message_id")
