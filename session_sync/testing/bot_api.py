"""A Bot API server for tests and demos: the queue of updates, and what fills and reads it.

It knows neither telebot nor python-telegram-bot: whatever speaks HTTP to Telegram can use it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final, Self, TypeVar

from session_sync.testing import methods
from session_sync.testing.answers import BotAPIError, failed, succeeded
from session_sync.testing.chats import JSON, Chats
from session_sync.testing.updates import LONGEST_POLL, Updates
from session_sync.testing.users import OfflineChat, OfflineUser
from session_sync.testing.wire import HttpServer, Request

T = TypeVar("T")
_logger = logging.getLogger(__name__)

_DESCRIPTIONS: Final = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden: bot was blocked by the user",
    404: "Not Found",
    409: "Conflict",
    429: "Too Many Requests",
    502: "Bad Gateway",
}


@dataclass(frozen=True)
class Call:
    """One call of a method by the bot: its name, its decoded parameters, and the description of
    the error it was answered with, if any.

    >>> Call("sendMessage", {"chat_id": 1, "text": "Hello"})
    Call(method='sendMessage', params={'chat_id': 1, 'text': 'Hello'}, error=None)
    """

    method: str
    params: JSON
    error: str | None = None


class OfflineBotAPI:
    """A local HTTP server that a bot takes for Telegram.

    `token` is the one bot that it knows. `longest_poll` bounds how long a getUpdates waits, in
    seconds, whatever the bot asks for: a small one lets a bot's own `stop` return soon.

    A test is a person: it sends text, presses buttons and reads replies. Give telebot
    `apihelper.API_URL = api.telebot_url`, and python-telegram-bot `.base_url(api.base_url)`.

    >>> from urllib.request import urlopen
    >>> with OfflineBotAPI() as api:
    ...     alex = api.user(1, first_name="Alex")
    ...     _ = alex.send("/start")
    ...     bot = f"{api.base_url}{api.token}"  # from here on, a very small bot
    ...     update = json.load(urlopen(f"{bot}/getUpdates"))["result"][0]
    ...     sent = urlopen(f"{bot}/sendMessage?chat_id={update['message']['chat']['id']}&text=Hi")
    ...     edit = urlopen(f"{bot}/editMessageText?chat_id=1&message_id=2&text=Bye")
    ...     sent.close(), edit.close()
    ...     reply = alex.reply()
    ...     reply.text, reply.edit().text
    (None, None)
    ('Hi', 'Bye')

    **Threads.** Everything may be called from any thread. There is one lock, with one condition
    on it (`_changed`), over all state: updates, chats, calls. So what a method does, and that it
    was called, become visible together, and each waiter is woken by every change and looks for
    what it waits for. JSON is encoded and sockets are read and written outside of the lock. What it
    guards is never changed once it has been handed out, only replaced.
    """

    def __init__(
        self,
        token: str = "123456:OFFLINE",
        *,
        username: str = "offline_bot",
        longest_poll: float = LONGEST_POLL,
    ) -> None:
        bot_id, separator, secret = token.partition(":")
        if not (bot_id.isdecimal() and separator and secret):
            raise ValueError("a token is a number, a colon and a secret, like '123456:SECRET'")
        self.token: Final = token
        self.me: Final[JSON] = {
            "id": int(bot_id),
            "is_bot": True,
            "first_name": "Offline Bot",
            "username": username,
            "can_join_groups": True,
            "can_read_all_group_messages": False,
            "supports_inline_queries": True,
            "can_connect_to_business": True,
            "has_main_web_app": False,
        }
        self._changed = threading.Condition(threading.Lock())
        self._chats = Chats(self.me)
        self._updates = Updates(
            self._changed, longest_poll=longest_poll, on_answer=self._carry_out_answer
        )
        self._callback_ids = count(1)
        self._calls: list[Call] = []
        self._taken: set[int] = set()
        self._planned: defaultdict[str, deque[Any]] = defaultdict(deque)
        self._closed = False
        self._prefix = f"/bot{token}/"
        self._special: Final[dict[str, Callable[[JSON], bytes]]] = {
            "getUpdates": self._updates.get_updates,
            "setWebhook": self._updates.set_webhook,
            "deleteWebhook": self._updates.delete_webhook,
            "getWebhookInfo": self._updates.get_webhook_info,
        }
        self._server = HttpServer(self._handle)

    # --- where it is ---

    @property
    def url(self) -> str:
        """Its address, with the port that it was given."""
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def base_url(self) -> str:
        """What python-telegram-bot calls `base_url`: the address up to the token."""
        return f"{self.url}/bot"

    @property
    def telebot_url(self) -> str:
        """What telebot calls `apihelper.API_URL`: a format of token and method."""
        return f"{self.url}/bot{{0}}/{{1}}"

    def close(self) -> None:
        """End every long poll and the webhook, then all threads and connections. Idempotent."""
        with self._changed:
            self._closed = True
            threads = self._updates.close()
            self._changed.notify_all()
        for thread in threads:
            thread.join()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- people and what they send ---

    def user(self, user_id: int, *, first_name: str = "", **fields: Any) -> OfflineUser:
        """A person who talks with the bot; `fields` are any of the Bot API's for a User.

        >>> with OfflineBotAPI() as api:
        ...     api.user(7, first_name="Alex", language_code="en").raw["language_code"]
        'en'
        """
        name = first_name or f"User {user_id}"
        user = OfflineUser(self, {"id": user_id, "is_bot": False, "first_name": name, **fields})
        self._add_chat(user.chat.raw)
        return user

    def group(self, chat_id: int, *, title: str = "", **fields: Any) -> OfflineChat:
        """A supergroup, unless `fields` (the Bot API's for a Chat) say otherwise.

        >>> with OfflineBotAPI() as api:
        ...     api.group(-1001, title="Friends", is_forum=True).raw["type"]
        'supergroup'
        """
        name = title or f"Group {chat_id}"
        chat = OfflineChat({"id": chat_id, "type": "supergroup", "title": name, **fields})
        self._add_chat(chat.raw)
        return chat

    def _add_chat(self, chat: JSON) -> None:
        with self._changed:
            self._chats.add_chat(chat)

    def push(self, update: JSON) -> int:
        """Queue any update, as the Bot API's JSON, and return its `update_id`.

        The number is given here, each one greater by one; an `update_id` in `update` is ignored.
        Like at Telegram, an update that the bot did not ask for in allowed_updates is dropped,
        once the bot has come for updates; what was pushed before waits for its first word.

        >>> with OfflineBotAPI() as api:
        ...     api.push({"poll": {"id": "1"}}), api.push({"poll": {"id": "2"}}), api.pending
        (1, 2, 2)
        """
        body = json.dumps({name: value for name, value in update.items() if name != "update_id"})
        learned = json.loads(body)  # our own copy: the caller may change theirs
        with self._changed:
            self._chats.learn(learned)
            return self._updates.enqueue(next(iter(learned), ""), body)

    def redeliver(self, update_id: int | None = None) -> int:
        """Send an update once more to the bot's webhook, as Telegram does when it was answered too
        late; the last one by default. Returns its `update_id`.

        Raises LookupError if no such update was sent, and RuntimeError if the bot has no webhook:
        a bot that polls gets nothing twice.
        """
        with self._changed:
            return self._updates.enqueue_again(update_id)

    def _push_message(self, kind: str, chat_id: int, message: JSON) -> JSON:
        """Queue a new message in a chat, numbered; `OfflineUser.send` calls it."""
        with self._changed:
            chat = self._chats.chat(chat_id)
            numbered = {"message_id": self._chats.next_message_id(chat_id), "chat": chat, **message}
        self.push({kind: numbered})
        return numbered

    def _push_press(self, user: JSON, message: JSON, data: str) -> str:
        """Queue a callback query and return its id; `OfflineUser.press` calls it."""
        with self._changed:
            now = self._chats.message(message["chat"]["id"], message["message_id"])
            query_id = str(next(self._callback_ids))
        chat_instance = f"chat {message['chat']['id']}"
        query = {"id": query_id, "from": user, "message": now or message, "data": data}
        self.push({"callback_query": {**query, "chat_instance": chat_instance}})
        return query_id

    @property
    def pending(self) -> int:
        """How many updates the bot has not confirmed yet (see `confirmed`)."""
        with self._changed:
            return len(self._updates)

    def confirmed(self, timeout: float = 5.0) -> None:
        """Wait until the bot has confirmed every update: asked for the next one, or answered its
        webhook. A handler may still be at work on it then; TimeoutError after `timeout` seconds.

        >>> with OfflineBotAPI() as api:
        ...     api.confirmed()  # there are none
        """
        self._wait(lambda: True if not self._updates else None, timeout, "not all confirmed")

    async def aconfirmed(self, timeout: float = 5.0) -> None:
        """`confirmed` for coroutines."""
        await asyncio.to_thread(self.confirmed, timeout)

    # --- what the bot did ---

    @property
    def calls(self) -> list[Call]:
        """Every call of a method so far, in order; a copy.

        >>> from urllib.request import urlopen
        >>> with OfflineBotAPI() as api:
        ...     urlopen(f"{api.base_url}{api.token}/getMe").close()
        ...     api.calls
        [Call(method='getMe', params={}, error=None)]
        """
        with self._changed:
            return list(self._calls)

    def calls_of(self, method: str) -> list[Call]:
        """The calls of one method so far, in order; its name in any case, as at Telegram.

        >>> with OfflineBotAPI() as api:
        ...     api.calls_of("sendMessage")
        []
        """
        lowered = method.lower()
        return [call for call in self.calls if call.method.lower() == lowered]

    def call(self, method: str, timeout: float = 5.0, **params: Any) -> Call:
        """The first call of a method with these parameters (among others) that no `call`
        has returned yet. Waits up to `timeout` seconds for it, then TimeoutError.

        >>> from urllib.request import urlopen
        >>> with OfflineBotAPI() as api:
        ...     urlopen(f"{api.base_url}{api.token}/sendMessage?chat_id=1&text=Hi").close()
        ...     api.call("sendMessage", chat_id=1).params["text"]
        'Hi'
        """
        lowered = method.lower()
        looked_at = 0

        def find() -> Call | None:
            nonlocal looked_at
            for index in range(looked_at, len(self._calls)):
                call = self._calls[index]
                if call.method.lower() != lowered or index in self._taken:
                    continue
                if all(call.params.get(name) == value for name, value in params.items()):
                    self._taken.add(index)
                    return call
            looked_at = len(self._calls)
            return None

        wanted = ", ".join(f"{name}={value!r}" for name, value in params.items())
        return self._wait(find, timeout, f"no call of {method}({wanted})")

    async def acall(self, method: str, timeout: float = 5.0, **params: Any) -> Call:
        """`call` for coroutines."""
        return await asyncio.to_thread(self.call, method, timeout, **params)

    def _wait_sent(
        self, place: tuple[int, int | None, str | None], start: int, timeout: float
    ) -> tuple[int, JSON]:
        """The bot's next message from `start` on in a chat; `OfflineUser.reply` calls it."""
        chat_id, thread, business = place
        following = start

        def find() -> tuple[int, JSON] | None:
            nonlocal following
            messages = self._chats.sent[chat_id, business]
            for index in range(following, len(messages)):
                if thread is None or messages[index].get("message_thread_id") == thread:
                    return index, messages[index]
            following = len(messages)
            return None

        where = "" if thread is None else f", topic {thread}"
        return self._wait(find, timeout, f"no reply in chat {chat_id}{where}")

    def _wait_version(self, chat_id: int, message_id: int, version: int, timeout: float) -> JSON:
        """A message after so many edits; `Reply.edit` calls it."""
        versions = self._chats.versions

        def find() -> JSON | None:
            known = versions.get((chat_id, message_id), ())
            return known[version] if len(known) > version else None

        return self._wait(find, timeout, f"no edit of message {message_id} in chat {chat_id}")

    def _wait(self, find: Callable[[], T | None], timeout: float, missing: str) -> T:
        """What `find` finds, looked for under the lock and again after every change."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while (found := find()) is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._closed:
                    raise TimeoutError(self._explain(missing, timeout))
                self._changed.wait(remaining)
            return found

    def _explain(self, missing: str, timeout: float) -> str:
        calls = [call for call in self._calls if call.method != "getUpdates"]
        seen = "; ".join(_short(call) for call in calls[-5:]) or "nothing"
        after = "the server was closed" if self._closed else f"{timeout:g} s have passed"
        return (
            f"{missing}, and {after}; the bot last called: {seen};"
            f" updates that it has not confirmed: {len(self._updates)}{_hint()}"
        )

    # --- what it shall answer ---

    def fail_next(
        self,
        method: str,
        error_code: int = 500,
        description: str | None = None,
        *,
        retry_after: int | None = None,
    ) -> None:
        """Answer the next call of a method with an error; called again, the one after it too.

        `retry_after` is in seconds, and goes with code 429. Raises ValueError if the Bot API has
        no such method.

        >>> with OfflineBotAPI() as api:
        ...     api.fail_next("sendMessage", 429, retry_after=3)
        """
        if method.lower() not in methods.METHODS:
            raise ValueError(f"the Bot API has no method {method!r}")
        if description is None:
            description = _DESCRIPTIONS.get(error_code, "Internal Server Error")
            if retry_after is not None:
                description += f": retry after {retry_after}"
        parameters = {} if retry_after is None else {"retry_after": retry_after}
        self._plan(method, BotAPIError(error_code, description, **parameters))

    def answer_next(self, method: str, result: Any) -> None:
        """Answer the next call of a method, known or not, with `result` and do nothing else.

        >>> from urllib.request import urlopen
        >>> with OfflineBotAPI() as api:
        ...     api.answer_next("getMyStarBalance", {"amount": 5})
        ...     with urlopen(f"{api.base_url}{api.token}/getMyStarBalance") as answer:
        ...         json.load(answer)
        {'ok': True, 'result': {'amount': 5}}
        """
        self._plan(method, json.loads(json.dumps(result)))

    def _plan(self, method: str, outcome: Any) -> None:
        with self._changed:
            self._planned[method.lower()].append(outcome)

    # --- requests ---

    def _handle(self, request: Request) -> tuple[int, bytes]:
        try:
            if not request.path.startswith(self._prefix):
                if request.path.startswith("/bot"):
                    raise BotAPIError(401, "Unauthorized")
                raise BotAPIError(404, "Not Found")
            try:
                params = methods.decode(request.parameters())
            except ValueError as error:
                raise BotAPIError(400, f"Bad Request: can't parse the request: {error}") from None
            return 200, self._answer(request.path[len(self._prefix) :], params)
        except BotAPIError as error:
            return error.code, failed(error)

    def _answer(self, name: str, params: JSON) -> bytes:
        """Carry a method out, and record the call together with its effect."""
        method = methods.METHODS.get(name.lower(), name)
        result: Any = None
        special = None
        with self._changed:
            index = len(self._calls)
            self._calls.append(Call(method, params))
            self._changed.notify_all()
            if method not in self._special or self._planned.get(name.lower()):
                result = self._carry_out(method, params, index)
            else:
                special = self._special[method]
        return succeeded(result) if special is None else self._serve(special, params, index)

    def _carry_out(self, method: str, params: JSON, index: int) -> Any:
        planned = self._planned.get(method.lower())
        try:
            if planned:
                return _outcome(planned)
            return methods.answer(method, self._chats, params)
        except BotAPIError as error:
            self._calls[index] = replace(self._calls[index], error=error.description)
            raise

    def _serve(self, special: Callable[[JSON], bytes], params: JSON, index: int) -> bytes:
        """A method that is about the updates takes the lock by itself: it may wait."""
        try:
            return special(params)
        except BotAPIError as error:
            with self._changed:
                self._calls[index] = replace(self._calls[index], error=error.description)
            raise

    def _carry_out_answer(self, call: JSON) -> None:
        params = methods.decode(call)
        method = params.pop("method", None)
        if method is not None:
            try:
                self._answer(method, params)
            except BotAPIError:
                pass  # it is recorded, and no request waits for an answer
            except Exception:
                _logger.exception("OfflineBotAPI could not carry out %s", method)


def _outcome(planned: deque[Any]) -> Any:
    outcome = planned.popleft()
    if isinstance(outcome, BotAPIError):
        raise outcome
    return outcome


def _short(call: Call) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in call.params.items())
    shortened = text if len(text) <= 120 else f"{text[:117]}..."
    failure = "" if call.error is None else f" -> {call.error}"
    return f"{call.method}({shortened}){failure}"


def _hint() -> str:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return ""
    return "; this wait blocked its event loop: in a coroutine, await the `await_...` twin"
