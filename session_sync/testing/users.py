"""The users in a test: they write to the bot, press its buttons and read what it answers.

This module knows what a user sees; it knows no HTTP.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from session_sync.testing.bot_api import OfflineBotAPI

JSON = dict[str, Any]
_COMMAND = re.compile(r"(?<!\S)/\w{1,64}(?:@\w{3,})?")


@dataclass(frozen=True)
class OfflineChat:
    """A chat: `raw` is the Bot API's own object, and goes into every message of the chat.

    >>> OfflineChat({"id": -100, "type": "group", "title": "Friends"}).id
    -100
    """

    raw: JSON

    @property
    def id(self) -> int:
        """The chat's number; negative for a group."""
        return int(self.raw["id"])


@dataclass(frozen=True)
class Button:
    """One button of a keyboard. `data` is None unless pressing it makes a callback query.

    >>> Button("Yes", "vote:yes", {"text": "Yes", "callback_data": "vote:yes"}).data
    'vote:yes'
    """

    text: str
    data: str | None
    raw: JSON = field(repr=False)


@dataclass(frozen=True)
class Reply:
    """A message of the bot as people saw it at one moment; a later edit is another `Reply`.

    `raw` is the Bot API's Message, with the keyboard whether inline or not. `version` counts the
    edits that came before.
    """

    api: OfflineBotAPI = field(repr=False)
    raw: JSON
    version: int = 0

    @property
    def text(self) -> str:
        """The text, or else the caption; empty if there is neither."""
        return str(self.raw.get("text", self.raw.get("caption", "")))

    @property
    def message_id(self) -> int:
        """The message's number in its chat."""
        return int(self.raw["message_id"])

    @property
    def chat_id(self) -> int:
        """The number of the chat that it was sent to."""
        return int(self.raw["chat"]["id"])

    @property
    def buttons(self) -> list[Button]:
        """The buttons of its keyboard, row after row.

        >>> markup = {"inline_keyboard": [[{"text": "Yes", "callback_data": "y"}]]}
        >>> Reply(None, {"reply_markup": markup}).buttons  # api.user(1).reply() makes it
        [Button(text='Yes', data='y')]
        """
        return list(_buttons(self.raw.get("reply_markup", {})))

    def button(self, name: str) -> Button:
        """The button with this data, or else with this text; LookupError says which there are."""
        buttons = self.buttons
        for button in buttons:
            if button.data == name:
                return button
        for button in buttons:
            if button.text == name:
                return button
        raise LookupError(f"no button {name!r}; the message {self.text!r} has {buttons}")

    def edit(self, timeout: float = 5.0) -> Reply:
        """The message after the next edit that this `Reply` does not show yet.

        Waits up to `timeout` seconds, then TimeoutError. See `OfflineBotAPI` for an example.
        """
        following = self.version + 1
        raw = self.api._wait_version(self.chat_id, self.message_id, following, timeout)
        return Reply(self.api, raw, following)

    async def aedit(self, timeout: float = 5.0) -> Reply:
        """`edit` for coroutines."""
        return await asyncio.to_thread(self.edit, timeout)


def _buttons(markup: JSON) -> Iterator[Button]:
    for row in markup.get("inline_keyboard") or markup.get("keyboard") or ():
        for button in row:
            raw = button if isinstance(button, dict) else {"text": button}
            yield Button(raw["text"], raw.get("callback_data"), raw)


@dataclass(frozen=True)
class Press:
    """A button that a user has pressed. `id` is the callback query's."""

    api: OfflineBotAPI = field(repr=False)
    id: str

    def answer(self, timeout: float = 5.0) -> JSON:
        """The parameters of the bot's answerCallbackQuery (`text`, `show_alert`, ...).

        Waits up to `timeout` seconds for it, then TimeoutError.
        """
        call = self.api.call("answerCallbackQuery", timeout, callback_query_id=self.id)
        return call.params

    async def aanswer(self, timeout: float = 5.0) -> JSON:
        """`answer` for coroutines."""
        return await asyncio.to_thread(self.answer, timeout)


class OfflineUser:
    """A person who talks with the bot; `OfflineBotAPI.user` makes one.

    `chat` is the private chat with the bot; everything goes there unless told otherwise by
    `chat` (an `OfflineChat` or a number), `thread` (a forum topic's number) or `business` (the
    connection through which a customer writes to the bot's owner). One user's methods are for
    one thread at a time; different users may be in different threads.
    """

    def __init__(self, api: OfflineBotAPI, raw: JSON) -> None:
        self.api: Final = api
        self.raw: Final = raw
        self.id: Final[int] = raw["id"]
        names = ("first_name", "last_name", "username")
        about: JSON = {name: raw[name] for name in names if name in raw}
        self.chat: Final = OfflineChat({"id": self.id, "type": "private", **about})
        self._seen: dict[tuple[int, int | None, str | None], int] = {}

    def __repr__(self) -> str:
        return f"<OfflineUser {self.id} {self.raw['first_name']!r}>"

    def send(
        self,
        text: str | None = None,
        *,
        chat: OfflineChat | int | None = None,
        thread: int | None = None,
        business: str | None = None,
        **fields: Any,
    ) -> JSON:
        """Write to the bot, and return the Message that it will get.

        `fields` are any of the Bot API's for a Message (`photo=[...]`, `reply_to_message=...`).

        >>> from session_sync.testing import OfflineBotAPI
        >>> with OfflineBotAPI() as api:
        ...     message = api.user(1, first_name="Alex").send("/start now")
        >>> message["text"], message["entities"]
        ('/start now', [{'type': 'bot_command', 'offset': 0, 'length': 6}])
        """
        message: JSON = {"from": self.raw, "date": int(time.time())}
        if text is not None:
            message |= _with_commands(text)
        if thread is not None:
            message |= {"message_thread_id": thread, "is_topic_message": True}
        if business is not None:
            message["business_connection_id"] = business
        kind = "message" if business is None else "business_message"
        return self.api._push_message(kind, self._chat_id(chat), {**message, **fields})

    def edit(self, message: JSON, text: str) -> JSON:
        """Change a message that `send` returned, and return it as it is now.

        >>> from session_sync.testing import OfflineBotAPI
        >>> with OfflineBotAPI() as api:
        ...     alex = api.user(1)
        ...     alex.edit(alex.send("Helo"), "Hello")["text"]
        'Hello'
        """
        changed = {name: value for name, value in message.items() if name != "entities"}
        changed |= {**_with_commands(text), "edit_date": int(time.time())}
        business = "business_connection_id" in message
        self.api.push({"edited_business_message" if business else "edited_message": changed})
        return changed

    def press(self, reply: Reply, button: str) -> Press:
        """Press an inline button, by its data or its text.

        LookupError if the message has no such button, ValueError if pressing it makes no callback
        query: a link, or a key of a reply keyboard (`send` its text instead).

        >>> from session_sync.testing import OfflineBotAPI, Reply
        >>> with OfflineBotAPI() as api:
        ...     keyboard = {"inline_keyboard": [[{"text": "Yes", "callback_data": "y"}]]}
        ...     alex = api.user(1)
        ...     question = Reply(api, alex.send("Sure?", reply_markup=keyboard))
        ...     alex.press(question, "Yes").id
        '1'
        """
        pressed = reply.button(button)
        if pressed.data is None:
            raise ValueError(
                f"{pressed} makes no callback query; send() its text, if that is meant"
            )
        return Press(self.api, self.api._push_press(self.raw, reply.raw, pressed.data))

    def upgrade(self, group: OfflineChat, chat_id: int) -> OfflineChat:
        """Make a group a supergroup, which has the number `chat_id` from then on, and return it.

        The bot gets the service messages of both chats, the old one's first; a test of another
        order sends them by `send(chat=..., migrate_to_chat_id=...)`.

        >>> from session_sync.testing import OfflineBotAPI
        >>> with OfflineBotAPI() as api:
        ...     friends = api.group(-100, title="Friends", type="group")
        ...     api.user(1).upgrade(friends, -1001234).raw
        {'id': -1001234, 'type': 'supergroup', 'title': 'Friends'}
        """
        chat = self.api.group(chat_id, title=group.raw["title"])
        self.send(chat=group, migrate_to_chat_id=chat_id)
        self.send(chat=chat, migrate_from_chat_id=group.id)
        return chat

    def reply(
        self,
        timeout: float = 5.0,
        *,
        chat: OfflineChat | int | None = None,
        thread: int | None = None,
        business: str | None = None,
    ) -> Reply:
        """The next message of the bot in a chat (and topic) that this user has not read yet.

        Waits up to `timeout` seconds, then TimeoutError, which says what the bot did instead.
        See `OfflineBotAPI` for an example.
        """
        place = (self._chat_id(chat), thread, business)
        start = self._seen.get(place, 0)
        index, raw = self.api._wait_sent(place, start, timeout)
        self._seen[place] = index + 1
        return Reply(self.api, raw)

    async def areply(
        self,
        timeout: float = 5.0,
        *,
        chat: OfflineChat | int | None = None,
        thread: int | None = None,
        business: str | None = None,
    ) -> Reply:
        """`reply` for coroutines."""
        return await asyncio.to_thread(
            self.reply, timeout, chat=chat, thread=thread, business=business
        )

    def _chat_id(self, chat: OfflineChat | int | None) -> int:
        if chat is None:
            return self.id
        return chat if isinstance(chat, int) else chat.id


def _with_commands(text: str) -> JSON:
    """A text with its commands marked, as Telegram marks them: counted in UTF-16 units."""
    entities = [
        {
            "type": "bot_command",
            "offset": _utf16_length(text[: match.start()]),
            "length": _utf16_length(match[0]),
        }
        for match in _COMMAND.finditer(text)
    ]
    return {"text": text, "entities": entities} if entities else {"text": text}


def _utf16_length(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2
