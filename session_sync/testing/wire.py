"""HTTP as far as a Bot API server needs it: connections, and the four ways to pass parameters.

It knows nothing of Telegram. It stands on bare sockets because `http.server` spends more time on
one request's headers than everything else here together, and its loop stops only when it next
looks up (half a second).
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from io import BufferedReader
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

MAX_LINE: Final = 65_536
MAX_BODY: Final = 64 * 1024 * 1024

_logger = logging.getLogger(__name__)
_NAME = re.compile(rb';\s*name="?([^";]*)')
_FILENAME = re.compile(rb';\s*filename\*?="?([^";]*)')
_BOUNDARY = re.compile(rb'boundary="?([^";,]+)')


class Upload(NamedTuple):
    """A file that a bot uploaded: what it was called, and how many bytes it had.

    >>> Upload("cat.jpg", 1024).filename
    'cat.jpg'
    """

    filename: str
    size: int


class Request(NamedTuple):
    """One HTTP request, read to its end."""

    path: str
    query: str
    content_type: bytes
    body: bytes
    keep_alive: bool

    def parameters(self) -> dict[str, Any]:
        """What was passed, by whichever of the four ways; raises ValueError if unreadable."""
        parameters: dict[str, Any] = {}
        if self.query:
            parameters.update(parse_qsl(self.query, keep_blank_values=True))
        if self.body:
            parameters.update(parse_body(self.content_type, self.body))
        return parameters


def parse_body(content_type: bytes, body: bytes) -> dict[str, Any]:
    """The fields of a JSON, multipart or urlencoded body; raises ValueError if unreadable."""
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == b"application/json":
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("the body is not a JSON object")
        return {name: value for name, value in fields.items() if value is not None}
    if kind == b"multipart/form-data":
        return dict(_multipart(content_type, body))
    return dict(parse_qsl(body.decode(), keep_blank_values=True))


def _multipart(content_type: bytes, body: bytes) -> Iterator[tuple[str, str | Upload]]:
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        raise ValueError("multipart without a boundary")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary[1])
    for part in parts[1:]:
        if part.startswith(b"--"):  # the closing delimiter
            return
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if name is None:
            raise ValueError("a part without a name")
        filename = _FILENAME.search(head)
        yield (
            name[1].decode(),
            content.decode() if filename is None else Upload(filename[1].decode(), len(content)),
        )
    raise ValueError("multipart without an end")


def _read_headers(stream: BufferedReader) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    while (line := stream.readline(MAX_LINE)) not in (b"\r\n", b"\n"):
        if not line.endswith(b"\n"):
            raise ValueError("a header line without an end")
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    return headers


def _read_exactly(stream: BufferedReader, size: int) -> bytes:
    if not 0 <= size <= MAX_BODY:
        raise ValueError(f"a body of {size} bytes")
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("the body ended early")
    return data


def _read_chunks(stream: BufferedReader) -> bytes:
    body = bytearray()
    while size := int(stream.readline(MAX_LINE).partition(b";")[0], 16):
        if len(body) + size > MAX_BODY:
            raise ValueError("the body is too long")
        body += _read_exactly(stream, size)
        stream.readline(MAX_LINE)
    _read_headers(stream)
    return bytes(body)


def _read_body(stream: BufferedReader, headers: dict[bytes, bytes], sock: socket.socket) -> bytes:
    if headers.get(b"expect", b"").lower() == b"100-continue":
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        return _read_chunks(stream)
    return _read_exactly(stream, int(headers.get(b"content-length", b"0")))


def read_request(stream: BufferedReader, sock: socket.socket) -> Request | None:
    """The next request on a connection, None at its end; raises ValueError if it is not one."""
    line = stream.readline(MAX_LINE)
    if not line.strip():
        return None
    verb, target, version = line.split()
    if verb not in (b"GET", b"POST"):
        raise ValueError("only GET and POST are understood")
    headers = _read_headers(stream)
    body = _read_body(stream, headers, sock)
    path, _, query = target.decode("ascii").partition("?")
    connection = headers.get(b"connection", b"").lower()
    keep_alive = connection != b"close" if version == b"HTTP/1.1" else connection == b"keep-alive"
    return Request(unquote(path), query, headers.get(b"content-type", b""), body, keep_alive)


_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}


def _response(status: int, body: bytes, *, keep_alive: bool) -> bytes:
    return (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
    ).encode() + body


class HttpServer:
    """Serves `handle(request) -> (status, JSON body)` on a free loopback port, a thread for each
    connection, until `close`.

    Its lock guards the table of connections only. A connection is entered there before its thread
    starts, and is left there until that has ended, so that `close` joins every one.
    """

    def __init__(self, handle: Callable[[Request], tuple[int, bytes]]) -> None:
        self._handle = handle
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: Final[int] = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(
            target=self._accept, name=f"OfflineBotAPI:{self.port}", daemon=True
        )
        self._acceptor.start()

    def close(self) -> None:
        """End every connection once its request has been answered, and join all threads."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        # Closing a listener does not wake an accept() on every system; a connection does.
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._acceptor.join()
        self._listener.close()
        for how, patience in ((socket.SHUT_RD, 1.0), (socket.SHUT_RDWR, None)):
            with self._lock:
                connections = dict(self._connections)
            for sock in connections.values():
                _shutdown(sock, how)
            for thread in connections:
                thread.join(patience)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            thread = threading.Thread(
                target=self._serve, args=(sock,), name=f"OfflineBotAPI:{self.port}", daemon=True
            )
            with self._lock:
                if self._closing:
                    sock.close()
                    return
                for ended in [other for other in self._connections if not other.is_alive()]:
                    del self._connections[ended]
                self._connections[thread] = sock
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as stream:
            try:
                # Else an answer may wait 40 ms for the client's delayed acknowledgement.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._serve_one(stream, sock):
                    pass
            except OSError:
                pass  # the client has gone: there is nothing to answer

    def _serve_one(self, stream: BufferedReader, sock: socket.socket) -> bool:
        try:
            request = read_request(stream, sock)
        except ValueError as error:
            sock.sendall(_response(400, _failure(400, f"Bad Request: {error}"), keep_alive=False))
            return False
        if request is None:
            return False
        try:
            status, body = self._handle(request)
        except Exception as error:
            _logger.exception("OfflineBotAPI could not answer %s", request.path)
            status, body = 500, _failure(500, f"Internal Server Error: {error!r}")
        keep_alive = request.keep_alive and not self._closing
        sock.sendall(_response(status, body, keep_alive=keep_alive))
        return keep_alive


def _failure(code: int, description: str) -> bytes:
    return json.dumps({"ok": False, "error_code": code, "description": description}).encode()


def _shutdown(sock: socket.socket, how: int) -> None:
    with suppress(OSError):  # it may have ended by itself
        sock.shutdown(how)
