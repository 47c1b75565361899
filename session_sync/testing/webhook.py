"""A bot's webhook, seen from Telegram's side: posts updates to it and reads what it answers.

This module knows requests to the bot; it knows no method of the Bot API.
"""

from __future__ import annotations

import http.client
import socket
import threading
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

from session_sync.testing.wire import parse_body

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
# A webhook may not answer with these: the answer would have nowhere to go.
NOT_IN_AN_ANSWER: Final = frozenset({"setwebhook", "deletewebhook", "close", "logout"})


class Webhook:
    """One url that updates go to, over one kept connection, used by its delivery thread alone;
    `abort` may come from any thread."""

    def __init__(self, url: str, *, secret_token: str | None, timeout: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname not in LOOPBACK:
            raise ValueError(f"an offline server posts to http:// on this machine, not to {url}")
        self.url: Final = url
        self.thread: threading.Thread | None = None
        self.last_error: tuple[int, str] | None = None
        self._target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        self._headers = {"Content-Type": "application/json", "Connection": "keep-alive"}
        if secret_token:
            self._headers["X-Telegram-Bot-Api-Secret-Token"] = secret_token
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        self._aborted = False

    def post(self, update: bytes) -> dict[str, Any]:
        """Deliver one update and return the method call in the answer, {} if there is none.

        Raises OSError or HTTPException, with a description, if the bot did not take it.
        """
        try:
            if self._connection.sock is None:
                self._connection.connect()
            if self._aborted:  # looked at after connecting: abort() saw no socket to shut down
                raise ConnectionAbortedError("the webhook was deleted")
            self._connection.request("POST", self._target, update, self._headers)
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        if not 200 <= response.status <= 299:
            raise http.client.HTTPException(
                f"Wrong response from the webhook: {response.status} {response.reason}"
            )
        return _call_in(response.getheader("Content-Type", ""), body)

    def abort(self) -> None:
        """Wake the delivery thread if it waits for an answer."""
        self._aborted = True
        sock = self._connection.sock
        if sock is not None:
            with suppress(OSError):  # it may have ended by itself
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection up, at the end of the delivery thread."""
        self._connection.close()


def _call_in(content_type: str, body: bytes) -> dict[str, Any]:
    try:
        call = parse_body(content_type.encode(), body) if body else {}
    except ValueError:
        return {}
    method = call.get("method")
    if not isinstance(method, str):
        return {}
    lowered = method.lower()
    return {} if lowered in NOT_IN_AN_ANSWER or lowered.startswith("get") else call
