"""Connections to a Redis server on which scripts are asked for, with little around each request.

This module knows requests and answers as they go over a connection; it knows no scripts.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import redis
from redis.connection import ConnectionPool
from redis.exceptions import AuthenticationError, ReadOnlyError, ResponseError
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from .clients import TIMEOUT, Client, is_from_replica, no_retries

_MOMENT: Final = 0.0005  # seconds in which a server that is near answers
_PAUSE: Final = 0.05  # seconds for which no caller waits in place, after one that did in vain
_SMALL: Final = 16_384  # bytes, which every connection takes without waiting
_FAILURES: Final = (redis.ConnectionError, redis.TimeoutError, ReadOnlyError)


class _Line(list[Any]):
    """A connection that is in use, until it is taken out.

    If its user was interrupted, it is closed. (redis-py closes one that is lost as well, but
    only when the garbage is collected.)
    """

    __slots__ = ()

    def __del__(self) -> None:
        while self:
            self.pop().disconnect()


class ScriptConnections:
    """Connections of the same kind as those of a client, and used past it.

    What redis-py does around a request (its pool, its metrics, its way to pack it) takes longer
    than the server takes for the answer. A request is sent again as often as the client's options
    say, and each time over a new connection, which finds the server wherever that is by now; and
    once more if a connection that was kept has failed, since a firewall or the server may have
    dropped it long ago. Those that were kept with it are as old, and are closed. A server that
    refuses to write, because it is a replica since a failover, counts as a failure, too.

    A connection is kept after an answer only: what was interrupted might be answered to another
    caller. None waits forever for its server.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool: Final = pool
        self._idle: Final[deque[Any]] = deque()
        self._in_vain = 0.0  # until when no caller waits in place; from time.monotonic()
        self._retry: Final[Retry] = self._make().retry
        self._retry.update_supported_errors([ReadOnlyError])

    @classmethod
    def of(cls, client: Client) -> ScriptConnections | None:
        """None for a client that does more than redis-py's own for one server with a plain pool, or
        for one that Sentinel names."""
        if type(client) is not redis.Redis:
            return None
        pool = client.connection_pool
        return cls(pool) if type(pool) in (ConnectionPool, SentinelConnectionPool) else None

    def ask(self, request: bytes, deadline: float) -> Any:
        """The answer to one request; after `deadline` (of time.monotonic()), it is not sent again,
        but over a new connection if one that was kept has failed."""
        line = self._kept()
        if line:
            try:
                return self._keeping(line, lambda: _exchange(line[0], request))
            except _FAILURES:
                pass

        def give_up_in_vain(error: Exception) -> None:
            if (
                not isinstance(error, redis.RedisError)  # a time-out of a signal handler, say
                or isinstance(error, AuthenticationError)
                or time.monotonic() >= deadline
            ):
                raise error

        return self._retry.call_with_retry(lambda: self._ask_anew(request), give_up_in_vain)

    def send(self, request: bytes) -> PendingReply | None:
        """Send one request, if nothing has to be waited for; else None, and nothing was done."""
        if len(request) > _SMALL or time.monotonic() < self._in_vain:
            return None
        line = self._kept()
        if not line:
            return None
        on: object = getattr(line[0], "_sock", None)  # redis-py has no public name for it
        # TLS has a buffer that cannot be looked into; a health check waits for an answer.
        if (
            not isinstance(on, socket.socket)
            or isinstance(on, ssl.SSLSocket)
            or _is_checked(line[0])
        ):
            self._idle.append(line.pop())
            return None
        try:
            line[0].send_packed_command([request])
        except redis.RedisError:
            return None  # which redis-py has disconnected
        return PendingReply(self, line, on, request)

    def answer(self, line: _Line) -> Any:
        """The answer to what was asked on `line`."""
        return self._keeping(line, line[0].read_response)

    def was_in_vain(self) -> None:
        """A caller has waited in place for nothing: the server is busy, or not as near as that."""
        self._in_vain = time.monotonic() + _PAUSE

    def close(self) -> None:
        """Close the connections that are not in use now."""
        while line := self._kept():
            line.pop().disconnect()

    def _kept(self) -> _Line:
        """A connection that was kept; empty if there is none."""
        line = _Line()
        with suppress(IndexError):
            line.append(self._idle.pop())
        return line

    def _make(self) -> Any:
        """A connection as the client's own."""
        options = dict(self._pool.connection_kwargs)
        if options.get("socket_timeout") is None:
            options["socket_timeout"] = TIMEOUT
        return self._pool.connection_class(**options)

    def _ask_anew(self, request: bytes) -> Any:
        line = _Line([self._make()])

        def exchange() -> Any:
            line[0].retry = no_retries()  # within: we try again, from the beginning
            line[0].connect()  # send_packed_command() alone would ask no sentinel
            return _exchange(line[0], request)

        return self._keeping(line, exchange)

    def _keeping(self, line: _Line, answer_of: Callable[[], Any]) -> Any:
        """What `answer_of` gets on `line`, which is kept if that is an answer."""
        try:
            answer = answer_of()
        except BaseException as error:
            if isinstance(error, ResponseError) and not is_from_replica(error):
                self._idle.append(line.pop())
                raise
            line.pop().disconnect()
            if isinstance(error, redis.RedisError):
                self.close()
            if is_from_replica(error):
                raise ReadOnlyError(str(error)) from None
            raise
        self._idle.append(line.pop())
        return answer


class PendingReply:
    """A request that is on its way; one that may be sent twice."""

    __slots__ = ("_line", "_lines", "_request", "_socket")

    def __init__(
        self, lines: ScriptConnections, line: _Line, on: socket.socket, request: bytes
    ) -> None:
        self._lines: Final = lines
        self._line: Final = line
        self._socket: Final = on
        self._request: Final = request

    def is_ready(self) -> bool:
        """Whether all of the answer is there, after a moment's wait at most."""
        try:
            came = bool(select.select([self._socket], [], [], _MOMENT)[0])
            came = came and _is_whole(self._socket.recv(_SMALL, socket.MSG_PEEK))
        except TimeoutError:  # a signal handler's: neither call runs out of time
            raise
        except (OSError, ValueError):  # it has failed; or its number is too high for select()
            came = False
        if not came:
            self._lines.was_in_vain()
        return came

    def answer(self) -> Any:
        """The answer that has come."""
        return self._lines.answer(self._line)

    def insist(self, deadline: float) -> Any:
        """The answer, however long it takes; as `ScriptConnections.ask`, if this way there is
        none."""
        try:
            return self.answer()
        except _FAILURES:
            return self._lines.ask(self._request, deadline)


def request_of(*parts: bytes) -> bytes:
    """A command and its arguments, as the server reads them."""
    return b"*%d\r\n" % len(parts) + packed(*parts)


def packed(*parts: bytes) -> bytes:
    """Some of the parts of a request."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


def _exchange(connection: Any, request: bytes) -> Any:
    connection.send_packed_command([request])
    return connection.read_response()


def _is_checked(line: Any) -> bool:
    return bool(getattr(line, "health_check_interval", True))


def _is_whole(answer: bytes) -> bool:
    """Whether these are all the bytes of an answer; of a list no caller needs to know."""
    head, end, rest = answer.partition(b"\r\n")
    if head[:1] == b"$" and head != b"$-1":
        return len(rest) == int(head[1:]) + 2
    return bool(end) and head[:1] != b"*"
