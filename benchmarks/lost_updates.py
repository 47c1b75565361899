"""How many of 1,600 additions to one user's counter survive 8 threads.

Each addition reads the counter, lets the other threads run (as any handler does that talks to the
network) and writes it. The first column of numbers is what is left of 1,600; the second says how
many additions were handled in a second, lost ones included.

    python -m benchmarks.lost_updates [--redis-url redis://localhost:6379]
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from telebot.storage import StateMemoryStorage, StatePickleStorage, StateRedisStorage

import session_sync
from session_sync import MemoryStorage, SessionManager

from .peers import USER, message, telebot_with
from .timing import Spread, arguments, in_threads, log, print_machine, table

# Adds 1, letting others run for so many seconds between the read and the write.
Add = Callable[[float], None]
# One fresh store: how to add 1 to its counter, and how to read that.
Store = tuple[Add, Callable[[], int]]
Open = Callable[[], contextlib.AbstractContextManager[Store]]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=7)
    parser.add_argument("--updates", type=int, default=1_600)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--work", type=float, default=0.0, help="seconds between read and write")
    parser.add_argument(
        "--redis-url", help="a server to try as well, for example redis://localhost"
    )
    options = parser.parse_args()
    print_machine(options.rounds)
    stores = {**_stores(), **_redis_stores(options.redis_url)}
    kept: dict[str, list[int]] = {name: [] for name in stores}
    speed: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(options.rounds):
        for name, open_store in stores.items():
            with open_store() as (add, counter):
                seconds = _hammer(add, options.threads, options.updates, options.work)
                kept[name].append(counter())
            speed[name].append(options.updates / seconds)
    print(
        table(
            ("", f"kept of {options.updates:,}", "updates a second"),
            (
                (name, Spread.of(kept[name]).show(digits=0), Spread.of(speed[name]).show(digits=0))
                for name in stores
            ),
        )
    )


def _hammer(add: Add, threads: int, updates: int, work: float) -> float:
    """Seconds for `updates` additions by `threads` threads."""

    def run(number: int) -> None:
        for _ in range(updates // threads + (number < updates % threads)):
            add(work)

    return in_threads(threads, run)


def _stores() -> dict[str, Open]:
    return {
        "telebot retrieve_data, memory": _telebot_memory,
        "telebot retrieve_data, pickle": _telebot_pickle,
        "session_sync, memory": _our_memory,
        "session_sync, disk": _our_disk,
    }


def _redis_stores(url: str | None) -> dict[str, Open]:
    if url is None:
        log("redis: skipped, no --redis-url was given")
        return {}
    import redis

    server = redis.Redis.from_url(url, socket_connect_timeout=1)
    try:
        server.ping()
    except redis.RedisError as error:
        log(f"redis: skipped, {url} does not answer: {error}")
        return {}
    stores: dict[str, Open] = {"telebot retrieve_data, redis": lambda: _telebot_redis(url, server)}
    return stores


def _telebot_in(storage: Any) -> Iterator[Store]:
    bot = telebot_with(storage, {"counter": 0})

    def add(work: float) -> None:
        with bot.retrieve_data(USER, USER) as data:
            counter = data["counter"]
            time.sleep(work)
            data["counter"] = counter + 1

    def counter() -> int:
        with bot.retrieve_data(USER, USER) as data:
            return int(data["counter"])

    yield add, counter


@contextlib.contextmanager
def _telebot_memory() -> Iterator[Store]:
    yield from _telebot_in(StateMemoryStorage())


@contextlib.contextmanager
def _telebot_pickle() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as directory:
        yield from _telebot_in(StatePickleStorage(os.path.join(directory, "states.pkl")))


@contextlib.contextmanager
def _telebot_redis(url: str, server: Any) -> Iterator[Store]:
    prefix = _prefix()
    try:
        yield from _telebot_in(StateRedisStorage(redis_url=url, prefix=prefix))
    finally:
        _remove(server, prefix)


def _ours_in(storage: Any, prefix: str = "") -> Iterator[Store]:
    sessions: SessionManager[Any] = SessionManager(
        storage=storage, prefix=prefix, lock_timeout=None
    )
    update = message()
    with sessions.session_scope(update) as session:
        session.counter = 0

    def add(work: float) -> None:
        with sessions.session_scope(update) as session:
            counter = session.counter
            time.sleep(work)
            session.counter = counter + 1

    def counter() -> int:
        with sessions.session_scope(update) as session:
            return int(session.counter)

    with sessions:
        yield add, counter


@contextlib.contextmanager
def _our_memory() -> Iterator[Store]:
    yield from _ours_in(MemoryStorage())


@contextlib.contextmanager
def _our_disk() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as directory:
        yield from _ours_in(session_sync.DiskStorage(directory))


def _prefix() -> str:
    """So that no key of anybody's is touched, whatever else is on the server."""
    return f"benchmark-{uuid.uuid4()}"


def _remove(server: Any, prefix: str) -> None:
    for key in server.scan_iter(f"*{prefix}*"):
        server.delete(key)


if __name__ == "__main__":
    main()
