"""What all sections share: how long to measure, a Redis server of our own, what had to be left out.

No section finds anything that happens to run or lie on this machine: what it needs is made for it
and removed at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import redis
import redis.backoff
import redis.retry

from .timing import Rounds, Work, log, measure


class MissingError(Exception):
    """There is no Redis, and SESSION_SYNC_REQUIRE_SERVICES=1 asks for it."""


@dataclass(frozen=True)
class Setting:
    """How to measure. `slice` is how many seconds each case takes in each round; `largest` is how
    many users there are in the largest store; `skipped` collects what was left out, and why."""

    rounds: int
    quick: bool = False
    largest: int = 1_000_000
    redis_url: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def slice(self) -> float:
        return 0.0 if self.quick else 0.02

    def scaled(self, number: int, quick: int) -> int:
        """How much to do: `number`, or `quick` if it is only to be seen that it works."""
        return quick if self.quick else number

    def fewer(self, divisor: int) -> int:
        """How many rounds there are of what takes long."""
        return 1 if self.quick else min(self.rounds, max(3, self.rounds // divisor))

    def measure(
        self, works: dict[str, Work], rounds: int | None = None, times: float = 1
    ) -> Rounds:
        """Seconds for doing each of `works` once; each round takes `times` as long as usual."""
        return measure(works, rounds or self.rounds, self.slice * times)

    @property
    def has_redis(self) -> bool:
        return self.redis_url is not None

    @property
    def has_aiogram(self) -> bool:
        if importlib.util.find_spec("aiogram") is not None:
            return True
        self.skip("aiogram", "it is not installed; the extra 'bench' has it")
        return False

    def skip(self, what: str, reason: str) -> None:
        """Leave `what` out, and say so once."""
        if what not in self.skipped:
            log(f"left out: {what}, since {reason}")
            self.skipped[what] = reason


class Place(contextlib.ExitStack):
    """Where the stores of one table are: folders, an event loop and databases that end with it."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._setting = setting
        self._loop: asyncio.AbstractEventLoop | None = None

    def folder(self) -> str:
        """A new folder."""
        return self.enter_context(tempfile.TemporaryDirectory())

    @property
    def redis_url(self) -> str:
        assert self._setting.redis_url is not None, "the caller has asked has_redis"
        return self._setting.redis_url

    def redis_client(self) -> redis.Redis:
        """A client of the server, which is emptied at the end."""
        client = redis.Redis.from_url(self.redis_url)
        self.callback(client.close)
        self.callback(client.flushall)
        return client

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """One event loop, not running."""
        if self._loop is None:
            self._loop = loop = asyncio.new_event_loop()
            self.callback(loop.close)
            self.callback(lambda: loop.run_until_complete(loop.shutdown_default_executor()))
        return self._loop


@contextlib.contextmanager
def redis_server(program: str) -> Iterator[str | None]:
    """A Redis of our own on a free port of this machine, which keeps nothing: its URL.

    None if `program` is not there; MissingError if SESSION_SYNC_REQUIRE_SERVICES=1 asks for it.
    """
    found = shutil.which(program)
    if found is None:
        if os.environ.get("SESSION_SYNC_REQUIRE_SERVICES") == "1":
            raise MissingError(f"{program} was not found")
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"redis://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        keeps_nothing = ["--save", "", "--appendonly", "no"]
        command = [found, *options, *keeps_nothing]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                # It refuses connections until it listens: try again for some seconds.
                retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
                with redis.Redis.from_url(url, retry=retry) as client:
                    client.ping()
                yield url
            finally:
                server.terminate()
