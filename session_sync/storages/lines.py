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
from redis.cluster import RedisCluster
from redis.connection import ConnectionPool
from redis.exceptions import ResponseError

_MOMENT: Final = 0.0005  # seconds in which a server that is near answers
_PAUSE: Final = 0.05  # seconds for which nobody waits in place, after one who did in vain
_SMALL: Final = 16_384  # bytes, which every connection takes without waiting


class _Line(list[Any]):
    """A connection that is in use, until it is taken out.

    If whoever used it was interrupted, it is closed. (redis-py closes one that is lost as well, but
    only when the garbage is collected.)
    """

    __slots__ = ()

    def __del__(self) -> None:
        while self:
            self.pop().disconnect()


class Lines:
    """Connections of the same kind as those of a client, and used past it.

    What redis-py does around a request (its pool, its metrics, its way to pack it) takes longer
    than the server takes for the answer. A request is sent again as often as the client's options
    say, as redis-py does it; and once more on a new connection if one that was kept has failed,
    since the server may have closed it long ago. A connection is kept after an answer only: what
    was interrupted might be answered to somebody else.
    """

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool: Final = pool
        self._idle: Final[deque[Any]] = deque()
        self._in_vain = 0.0  # until when nobody waits in place; from time.monotonic()

    @classmethod
    def of(cls, client: redis.Redis | RedisCluster) -> Lines | None:
        """None for a client that does more than redis-py's own for one server with a plain pool."""
        if type(client) is not redis.Redis or type(client.connection_pool) is not ConnectionPool:
            return None
        return cls(client.connection_pool)

    def ask(self, request: bytes) -> Any:
        """The answer to one request."""
        line = self._kept()
        if line:
            try:
                return self._ask(line, request)
            except redis.ConnectionError:
                pass
        new = _Line([self._pool.connection_class(**self._pool.connection_kwargs)])
        return self._ask(new, request)

    def send(self, request: bytes) -> Asked | None:
        """Send one request, if nothing has to be waited for; else None, and nothing was done."""
        if len(request) > _SMALL or time.monotonic() < self._in_vain:
            return None
        line = self._kept()
        if not line:
            return None
        on: object = getattr(line[0], "_sock", None)  # redis-py has no public name for it
        # TLS has a buffer that nobody can look into; a health check waits for an answer.
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
        return Asked(self, line, on, request)

    def answer(self, line: _Line) -> Any:
        """The answer to what was asked on `line`."""
        return self._keeping(line, line[0].read_response)

    def was_in_vain(self) -> None:
        """Somebody has waited in place: the server is busy, or not as near as that."""
        self._in_vain = time.monotonic() + _PAUSE

    def close(self) -> None:
        """Close the connections that nobody uses now."""
        while line := self._kept():
            line.pop().disconnect()

    def _kept(self) -> _Line:
        """A connection that was kept; empty if there is none."""
        line = _Line()
        with suppress(IndexError):
            line.append(self._idle.pop())
        return line

    def _ask(self, line: _Line, request: bytes) -> Any:
        connection = line[0]

        def attempt() -> Any:
            connection.send_packed_command([request])  # which connects, if need be
            return connection.read_response()

        def insist() -> Any:
            return connection.retry.call_with_retry(attempt, lambda _: connection.disconnect())

        return self._keeping(line, insist)

    def _keeping(self, line: _Line, answer_of: Callable[[], Any]) -> Any:
        """What `answer_of` gets on `line`, which is kept if that is an answer."""
        try:
            answer = answer_of()
        except ResponseError:
            self._idle.append(line.pop())
            raise
        except BaseException:
            line.pop().disconnect()
            raise
        self._idle.append(line.pop())
        return answer


class Asked:
    """A request that is on its way; one that may be sent twice."""

    __slots__ = ("_line", "_lines", "_request", "_socket")

    def __init__(self, lines: Lines, line: _Line, on: socket.socket, request: bytes) -> None:
        self._lines: Final = lines
        self._line: Final = line
        self._socket: Final = on
        self._request: Final = request

    def has_come(self) -> bool:
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
        """The answer, however long it takes."""
        try:
            return self._lines.answer(self._line)
        except (redis.ConnectionError, redis.TimeoutError):
            return self._lines.ask(self._request)


def _is_checked(line: Any) -> bool:
    return bool(getattr(line, "health_check_interval", True))


def _is_whole(answer: bytes) -> bool:
    """Whether these are all the bytes of an answer; of a list nobody cares to know."""
    head, end, rest = answer.partition(b"\r\n")
    if head[:1] == b"$" and head != b"$-1":
        return len(rest) == int(head[1:]) + 2
    return bool(end) and head[:1] != b"*"
