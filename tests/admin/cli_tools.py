"""What the tests of the command line share: to run it as a process, piped and on a terminal."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from session_sync import SessionManager, storage_from_url, ttl

pytest.importorskip("click", reason="needs the extra 'cli'")
pytest.importorskip("rich", reason="needs the extra 'cli'")


COMMAND = [sys.executable, "-W", "error", "-m", "session_sync"]


class Done(NamedTuple):
    """How a process has ended, and what it has said."""

    code: int
    out: str
    err: str = ""

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.lines]


def environment(url: str | None = None) -> dict[str, str]:
    hidden = ("SESSION_SYNC_STORAGE", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    root = str(Path(__file__).parents[2])
    plain |= {
        "TERM": "xterm-256color",
        "PYTHONPATH": f"{root}{os.pathsep}{plain.get('PYTHONPATH', '')}",
    }
    return plain if url is None else {**plain, "SESSION_SYNC_STORAGE": url}


def piped(
    *arguments: str, url: str | None = None, typed: str | bytes = "", cwd: Path | None = None
) -> Done:
    """Run a command as a script does."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=typed.encode() if isinstance(typed, str) else typed,
        capture_output=True,
        env=environment(url),
        cwd=cwd,
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def at_once(*calls: Callable[[], Done]) -> list[Done]:
    """Several commands side by side, since they wait more than they compute."""
    with ThreadPoolExecutor(4) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


class Terminal:
    """A command on a terminal of 100 columns."""

    def __init__(self, *arguments: str, url: str | None = None) -> None:
        self.screen = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment(url), "COLUMNS": "100"},
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str) -> None:
        """Wait until `text` has come; fails after a while."""
        deadline = time.monotonic() + 30
        while text not in self.screen:
            assert self._read(deadline), f"ended, or hangs: {self.screen!r}"

    def end(self) -> Done:
        deadline = time.monotonic() + 30
        while self._read(deadline):
            pass
        return Done(self.process.wait(30), self.screen.replace("\r\n", "\n"))

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65_536)
        except OSError as error:  # how Linux says that nobody has the other end open
            if error.errno != errno.EIO:
                raise
            return False
        self.screen += data.decode()
        return bool(data)


def on_terminal(*arguments: str, url: str | None = None, typed: str = "") -> Done:
    """Run a command as an operator does."""
    with Terminal(*arguments, url=url) as terminal:
        terminal.type(typed)
        return terminal.end()


def make_where(tmp_path: Path) -> Any:
    """The URL of a new store of a kind."""

    def url(kind: str, request: pytest.FixtureRequest) -> str:
        if kind == "redis":
            return f"{request.getfixturevalue('redis_url')}/0?prefix={uuid4().hex}:"
        if kind == "disk":
            pytest.importorskip("diskcache", reason="needs the extra 'disk'")
        return f"{kind}:///{tmp_path}/{uuid4().hex}"

    return url


#: The parameters of the fixture `url`.
STORES = ["sqlite", "disk", "redis"]


def make_url(request: pytest.FixtureRequest, where: Any) -> str:
    found: str = where(request.param, request)
    return found


#: For what has nothing to do with the kind of the store: one has to do, since a process takes time.
on_one = pytest.mark.parametrize("url", ["sqlite"], indirect=True)

#: For the two kinds of locks: those of files, and those of Redis.
on_two = pytest.mark.parametrize("url", ["sqlite", "redis"], indirect=True)


def make_storage(url: str) -> Iterator[Any]:
    some: Any = storage_from_url(url)
    yield some
    some.close()


def make_sessions(storage: Any) -> SessionManager[Any]:
    """What a bot has: some sessions of two users."""
    manager: SessionManager[Any] = SessionManager(storage=storage)
    for key in ("user:7:chat:7", "user:7:chat:-100", "user:8:chat:-100"):
        with manager.session_scope(key) as session:
            session.counter = 1
            session.cart = {"items": [(1, "tea")]}
            session.code = ttl("1234", 900)
    return manager


def make_sqlite(tmp_path: Path) -> str:
    """A SQLite store with one session."""
    url = f"sqlite:///{tmp_path}/sessions.db"
    some: Any = storage_from_url(url)
    some.set("user:1", {"name": "Alex", "$ttl": {"name": [time.time() + 900, 900.0]}})
    some.close()
    return url


READING = [
    ("ls",),
    ("show", "k"),
    ("set", "k", "f", "1", "--create"),
    ("rm", "k", "-y"),
    ("export",),
    ("stats",),
    ("forget", "--user", "1", "-y"),
    ("watch", "k"),
    ("doctor",),
]
