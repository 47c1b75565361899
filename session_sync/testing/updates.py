"""The updates that wait for the bot, and the two ways in which it gets them.

It knows nothing of what is in an update but its kind.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPException
from itertools import islice
from typing import Final, NamedTuple

from session_sync.testing.answers import BotAPIError, succeeded
from session_sync.testing.chats import JSON
from session_sync.testing.webhook import Webhook

LONGEST_POLL: Final = 50.0
# Telegram sends these only to a bot that names them in allowed_updates.
UNASKED: Final = frozenset({"chat_member", "message_reaction", "message_reaction_count"})
FIRST_RETRY, LONGEST_RETRY = 0.05, 1.0


class _Update(NamedTuple):
    number: int
    kind: str
    body: bytes


class Updates:
    """The queue of updates, behind `changed`, which is the lock of the whole server.

    An update stays in the queue until the bot has confirmed it: by asking for later ones, or by
    answering its webhook. Methods of the Bot API take the lock by themselves, since they may
    wait; `enqueue`, `close` and `len` expect it to be held. `on_answer` is called, without it,
    with every method call that a webhook answers with.
    """

    def __init__(
        self,
        changed: threading.Condition,
        *,
        longest_poll: float,
        on_answer: Callable[[JSON], None],
    ) -> None:
        self._changed: Final = changed
        self._longest_poll: Final = longest_poll
        self._on_answer: Final = on_answer
        self._waiting: deque[_Update] = deque()
        self._queued: dict[int, _Update] = {}  # all that ever were in it
        self._next_update = 1
        self._allowed: frozenset[str] | None = None  # None: all but UNASKED
        self._asked = False  # the bot has come for its updates, so that _allowed is its word
        self._poll = 0  # the number of the latest getUpdates
        self._webhook: Webhook | None = None
        self._webhook_threads: list[threading.Thread] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> list[threading.Thread]:
        """Let every poll and delivery end, and return the threads that are about to."""
        self._closed = True
        self._replace_webhook(None)
        return list(self._webhook_threads)

    def enqueue(self, kind: str, body: str) -> int:
        """Number an update, given as JSON, and queue it if the bot wants its kind."""
        number = self._next_update
        self._next_update += 1
        if not self._asked or self._wants(kind):
            whole = f'{{"update_id": {number}, {body[1:]}' if kind else f'{{"update_id": {number}}}'
            update = self._queued[number] = _Update(number, kind, whole.encode())
            self._waiting.append(update)
            self._changed.notify_all()
        return number

    def enqueue_again(self, number: int | None) -> int:
        """Queue an update once more, None: the last one; returns its number."""
        if number is None:
            number = max(self._queued, default=0)
        if number not in self._queued:
            raise LookupError(f"no update {number} was sent to the bot; {len(self._queued)} were")
        if self._webhook is None:
            raise RuntimeError(
                "no update comes again to a bot that polls: it has confirmed it by asking for the "
                "next one; set a webhook first"
            )
        self._waiting.append(self._queued[number])
        self._changed.notify_all()
        return number

    def _wants(self, kind: str) -> bool:
        return kind not in UNASKED if self._allowed is None else kind in self._allowed

    # --- getUpdates ---

    def get_updates(self, params: JSON) -> bytes:
        """Hand out what waits; wait for it up to `timeout` seconds."""
        limit = min(max(_number(params, "limit", 100), 1), 100)
        timeout = min(max(_number(params, "timeout", 0), 0), LONGEST_POLL, self._longest_poll)
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._webhook is not None:
                raise BotAPIError(
                    409,
                    "Conflict: can't use getUpdates method while webhook is active;"
                    " use deleteWebhook to delete the webhook first",
                )
            self._poll += 1
            this_poll = self._poll
            self._changed.notify_all()  # ends the one before, if it still waits
            self._allow(params)
            self._confirm(_number(params, "offset", 0))
            while not (self._waiting or self._closed):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
                self._check_still_the_one(this_poll)
            found = [update.body for update in islice(self._waiting, limit)]
        return b'{"ok":true,"result":[' + b",".join(found) + b"]}"

    def _check_still_the_one(self, this_poll: int) -> None:
        if self._webhook is not None:
            raise BotAPIError(409, "Conflict: terminated by setWebhook request")
        if self._poll != this_poll:
            raise BotAPIError(
                409,
                "Conflict: terminated by other getUpdates request;"
                " make sure that only one bot instance is running",
            )

    def _confirm(self, offset: int) -> None:
        """Forget every update before `offset`; a negative one counts from the end."""
        updates = self._waiting
        if offset < 0:
            offset = updates[offset].number if len(updates) >= -offset else 0
        confirmed = False
        while updates and updates[0].number < offset:
            updates.popleft()
            confirmed = True
        if confirmed:
            self._changed.notify_all()

    def _allow(self, params: JSON) -> None:
        """Take up allowed_updates. It does not touch what waits, except at the bot's first word:
        until then it was not known."""
        allowed = params.get("allowed_updates")
        if isinstance(allowed, list):
            self._allowed = frozenset(allowed) or None
        if not self._asked:
            self._asked = True
            self._waiting = deque(update for update in self._waiting if self._wants(update.kind))

    # --- the webhook ---

    def set_webhook(self, params: JSON) -> bytes:
        """Post updates to a url from now on."""
        url = params.get("url", "")
        if not url:
            return self.delete_webhook(params)
        try:
            webhook = Webhook(url, secret_token=params.get("secret_token"))
        except ValueError as error:
            raise BotAPIError(400, f"Bad Request: bad webhook: {error}") from None
        with self._changed:
            if self._closed:
                raise BotAPIError(500, "Internal Server Error: the server is closing")
            self._allow(params)
            self._drop_pending(params)
            self._replace_webhook(webhook)
            thread = threading.Thread(
                target=self._deliver, args=(webhook,), name="OfflineBotAPI webhook", daemon=True
            )
            self._webhook_threads.append(thread)
            thread.start()
        return succeeded(True, description="Webhook was set")

    def delete_webhook(self, params: JSON) -> bytes:
        """Back to getUpdates."""
        with self._changed:
            self._drop_pending(params)
            existed = self._webhook is not None
            self._replace_webhook(None)
        done = "was deleted" if existed else "is already deleted"
        return succeeded(True, description=f"Webhook {done}")

    def get_webhook_info(self, params: JSON) -> bytes:
        """How the webhook fares."""
        with self._changed:
            webhook = self._webhook
            info: JSON = {
                "url": "" if webhook is None else webhook.url,
                "has_custom_certificate": False,
                "pending_update_count": len(self._waiting),
            }
            if webhook is not None:
                info["max_connections"] = 1
                if webhook.last_error is not None:
                    info["last_error_date"], info["last_error_message"] = webhook.last_error
            if self._allowed is not None:
                info["allowed_updates"] = sorted(self._allowed)
        return succeeded(info)

    def _drop_pending(self, params: JSON) -> None:
        if params.get("drop_pending_updates"):
            self._waiting.clear()
            self._changed.notify_all()

    def _replace_webhook(self, webhook: Webhook | None) -> None:
        """The old one's thread ends by itself: it may be the one that a bot, called by it, is
        just now deleting it from, so it must be neither joined nor cut off here."""
        old, self._webhook = self._webhook, webhook
        if old is not None and self._closed:
            old.abort()
        self._changed.notify_all()

    def _deliver(self, webhook: Webhook) -> None:
        """Post updates one by one, in order, each until the bot takes it: at once, again at
        once, then after pauses that double."""
        pause = 0.0
        while (update := self._next_for(webhook, pause)) is not None:
            try:
                call = webhook.post(update.body)
            except (OSError, HTTPException) as error:
                webhook.last_error = (int(time.time()), str(error))
                pause = min(pause * 2, LONGEST_RETRY) if pause else FIRST_RETRY
                continue
            pause = 0.0
            self._on_answer(call)  # before the update counts as confirmed: tests wait for that
            with self._changed:
                # Even if this is not the webhook any more: a bot may delete it from inside of it.
                if self._waiting and self._waiting[0] is update:
                    self._waiting.popleft()
                    self._changed.notify_all()
        webhook.close()

    def _next_for(self, webhook: Webhook, pause: float) -> _Update | None:
        with self._changed:
            self._changed.wait_for(lambda: self._webhook is not webhook, pause)
            self._changed.wait_for(lambda: self._webhook is not webhook or self._waiting)
            return self._waiting[0] if self._webhook is webhook else None


def _number(params: JSON, name: str, default: int) -> int:
    value = params.get(name, default)
    return int(value) if isinstance(value, int | float) else default
