"""What the tests of sessions in Redis share: servers, processes, a bad network."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis_servers import Server

from session_sync.storages.base import OpenRecord, record_of

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
from redis.backoff import ConstantBackoff  # noqa: E402
from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: E402
from redis.retry import Retry  # noqa: E402

from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

SOON = 20  # seconds until a test gives up waiting for what has to come


def make_shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


def make_server(shared_server: Server) -> Server:
    """A server with nothing in it, and its defaults."""
    with closing(shared_server.client()) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
    return shared_server


def make_own_server(tmp_path: Path) -> Iterator[Server]:
    """One that may be killed."""
    server = Server(tmp_path / "own")
    yield server
    server.stop()


def make_client(server: Server) -> Iterator[Any]:
    with closing(server.client()) as client:
        yield client


Make = Callable[..., RedisStorage]


def maker(server: Server) -> Iterator[Make]:
    made: list[RedisStorage] = []

    def make(where: Any = None, *args: Any, **options: Any) -> RedisStorage:
        made.append(RedisStorage(server.url if where is None else where, *args, **options))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def make_storage(make: Make) -> RedisStorage:
    return make()


def put(storage: RedisStorage, key: str, **fields: Any) -> None:
    storage.open_record(key, SOON).close(record_of(fields))


LIMITED = {"username": "limited", "password": "secret"}


def forbid(client: Any, command: str) -> None:
    """To the user LIMITED."""
    client.acl_setuser(
        "limited",
        enabled=True,
        reset=True,
        passwords=["+secret"],
        keys=["*"],
        commands=["+@all", f"-{command}"],
    )


def fields(opened: OpenRecord) -> dict[str, Any]:
    return dict(opened.record or {})


PRELUDE = """
import os, sys, threading, time
from session_sync import (
    SessionConflictError, SessionError, SessionLockTimeoutError, SessionManager, storage_from_url
)

def say(word):
    print(word, flush=True)

def heard():
    sys.stdin.readline()

sessions = SessionManager(storage=storage_from_url(sys.argv[1]), lock_timeout=60)
"""

HOLD = """
try:
    with sessions.session_scope("key") as session:
        session.by = "holder"
        session.flush()
        session.by = "nobody"
        say("holding")
        heard()
        session.by = "holder again"
except SessionError as error:
    say(f"{type(error).__name__}: {error}")
else:
    say("saved")
"""


class Program:
    """Another process, which listens and says something."""

    def __init__(self, source: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self) -> None:
        """Let it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        assert self._process.wait(SOON * 2) == 0

    def clean(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


Start = Callable[..., Program]


def make_start() -> Iterator[Start]:
    started: list[Program] = []

    def start(*arguments: object) -> Program:
        started.append(Program(*arguments))
        return started[-1]

    yield start
    for program in started:
        program.clean()


class Proxy:
    """A network before a server that can lose an answer and cut the connection."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._before_cut: Callable[[], object] | None = None
        self._fatal = self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_next_answer(self, before_cut: Callable[[], object] = lambda: None) -> None:
        """`before_cut` is called when the server has done what it was asked."""
        self._before_cut = before_cut

    def lose_each(self, number: int) -> None:
        """Of each connection that answer, and with it the connection."""
        self._fatal = number

    def client(self, retries: int = 3, **options: Any) -> Any:
        return redis.Redis(
            port=self.port,
            retry=Retry(ConstantBackoff(0.01), retries),
            retry_on_error=[RedisConnectionError],
            **options,
        )

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [near, far]
                threading.Thread(target=self._pass, args=(near, far), daemon=True).start()
                threading.Thread(target=self._pass_back, args=(far, near), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def _pass_back(self, far: socket.socket, near: socket.socket) -> None:
        answers = itertools.count(1)
        with suppress(OSError):
            while data := far.recv(65536):
                if self._loses(next(answers)):
                    self.lost += 1
                    break
                near.sendall(data)
            near.shutdown(socket.SHUT_RDWR)

    def _loses(self, number: int) -> bool:
        before_cut, self._before_cut = self._before_cut, None
        if before_cut is not None:
            before_cut()
        return before_cut is not None or number == self._fatal

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def make_proxy(server: Server) -> Iterator[Proxy]:
    with closing(Proxy(server.port)) as proxy:
        yield proxy


@contextmanager
def monitored(server: Server) -> Iterator[list[str]]:
    """What clients ask the server; what scripts do is not among it."""
    requests: list[str] = []
    with closing(server.client()) as client, client.monitor() as monitor:
        yield requests
        with closing(server.client()) as other:
            other.echo("end")
        for command in monitor.listen():
            if command["client_type"] != "lua":
                requests.append(command["command"].split()[0])
                if command["command"] == "ECHO end":
                    break
    # The one that has said so is new; and some have begun with a word about the library.
    requests[:] = [name for name in requests if name not in ("ECHO", "CLIENT", "HELLO")]
