"""The promise, at length: whoever adds 1 to a user's counter, and however many do, none is lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads, message

from session_sync import MemoryStorage, SessionManager
from session_sync.locks.lock import LockHandle

WORKERS = 8
TIMES = int(os.environ.get("SESSION_SYNC_TIMES", "500"))  # by each worker

Sessions = SessionManager[Any]


@pytest.fixture(params=["memory", "disk"])
def sessions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sessions]:
    storage: Any = MemoryStorage()
    if request.param == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
        from session_sync import DiskStorage

        storage = DiskStorage(tmp_path / "sessions")
    with SessionManager(storage=storage, lock_timeout=None) as manager:
        yield manager


@pytest.fixture(params=[1, 100], ids=["one key", "100 keys"])
def keys(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def add(session: Any) -> None:
    """Add 1, and let others run between reading and writing."""
    value = session.get("n", 0)
    time.sleep(0.000_01)
    session["n"] = value + 1


def by_threads(sessions: Sessions, keys: int, times: int) -> None:
    threads = Threads()

    def work(number: int) -> None:
        for count in range(times):
            user = (number + count) % keys + 1
            with sessions.session_scope(f"user:{user}:chat:{user}") as session:
                add(session)

    for number in range(WORKERS):
        threads.start(work, number)
    threads.join(120)


def by_coroutines_and_threads(sessions: Sessions, keys: int, times: int) -> None:
    async def work(number: int) -> None:
        for count in range(times // 2):
            user = (number + count) % keys + 1
            async with sessions.session_scope(f"user:{user}:chat:{user}") as session:
                value = session.get("n", 0)
                await asyncio.sleep(0)
                session["n"] = value + 1

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(WORKERS)))

    threads = Threads()
    threads.start(lambda: asyncio.run(main()))
    by_threads(sessions, keys, times // 2)
    threads.join(120)


def by_telebot(sessions: Sessions, keys: int, times: int) -> None:
    telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    import session_sync.telebot

    bot = telebot.TeleBot("1:token", threaded=True, num_threads=WORKERS)
    session_sync.telebot.install(bot, sessions)
    handled, done = itertools.count(1), threading.Event()

    @bot.message_handler(func=lambda m: True)
    def handle(m: Any) -> None:
        add(m.session)
        if next(handled) == WORKERS * times:
            done.set()

    for number in range(WORKERS * times):
        update = telebot.types.Update.de_json(message(number % keys + 1))
        bot.process_new_updates([update])
    assert done.wait(120)
    bot.stop_bot()  # waits for the workers, and so for the last one's flush


WAYS = [by_threads, by_coroutines_and_threads, by_telebot]


def kept(sessions: Sessions, keys: int) -> int:
    users = range(1, keys + 1)
    return sum((sessions.storage.get(f"user:{n}:chat:{n}") or {"n": 0})["n"] for n in users)


@pytest.mark.parametrize("way", WAYS)
def test_every_update_is_kept(
    sessions: Sessions, keys: int, way: Callable[[Sessions, int, int], None]
) -> None:
    way(sessions, keys, TIMES)
    assert kept(sessions, keys) == WORKERS * TIMES
    assert len(sessions.locks) == 0


@pytest.mark.parametrize("way", WAYS)
def test_without_the_lock_the_same_work_loses_updates(
    way: Callable[[Sessions, int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, numbers = LockHandle.__init__, itertools.count()

    def alone(handle: LockHandle, table: Any, key: str, caller: Any) -> None:
        make(handle, table, f"{key} {next(numbers)}", caller)

    monkeypatch.setattr(LockHandle, "__init__", alone)
    sessions: Sessions = SessionManager()
    way(sessions, 1, 200)
    assert kept(sessions, 1) < WORKERS * 200
