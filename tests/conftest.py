"""What many tests need: a local Bot API, threads that report their errors, JSON updates.

The folders follow the packages of session_sync. Each one is on the import path while its tests run:
a file's name is unique among all tests, and no folder is named as a library that is imported. An
empty `tests/telebot/` would be found where telebot is not installed, hence `with_telebot/`. It is
also why no folder has a conftest.py of its own: `from conftest import ...` means this one.
"""

from __future__ import annotations

import _thread
import asyncio
import gc
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from waiting import until

from session_sync import LruMemoryStorage, MemoryStorage, SessionManager, storage_from_url
from session_sync.testing import OfflineBotAPI

# Programs that a test starts in a process of its own, and what only type checkers read.
collect_ignore_glob = [
    "data/*",
    "storages/disk_*.py",
    "storages/shared_worker.py",
    "torture/[!t]*",
    "torture/torture.py",
    "typing/*",
]

T = TypeVar("T")

if threading.gettrace() is not None:  # coverage, which sees those threads that `threading` starts
    _start = _thread.start_new_thread

    def _start_traced(work: Callable[..., object], args: tuple[Any, ...] = (), /) -> int:
        def traced() -> None:
            sys.settrace(threading.gettrace())
            work(*args)

        return _start(traced, ())

    _thread.start_new_thread = _start_traced  # type: ignore[assignment]
_ids = itertools.count(1)


def _missing_is_failure(report: Any) -> Any:
    """With SESSION_SYNC_REQUIRE_SERVICES=1, what a test needs and does not find is a failure."""
    required = os.environ.get("SESSION_SYNC_REQUIRE_SERVICES") == "1"
    if required and report.skipped and "needs" in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _missing_is_failure((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _missing_is_failure((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Generator[None, Any, Any]:
    """What lives until the end anyway, no garbage collection in a test has to look through."""
    gc.collect()
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


def message(user: int = 1, text: str = "hi", chat: int | None = None, **fields: Any) -> dict:
    """The Bot API JSON of an update with a message."""
    number = next(_ids)
    chat = user if chat is None else chat
    return {
        "update_id": number,
        "message": {
            "message_id": number,
            "date": 1,
            "from": {"id": user, "is_bot": False, "first_name": "Alex"},
            "chat": {"id": chat, "type": "private" if chat == user else "supergroup", "title": "x"},
            "text": text,
            **fields,
        },
    }


def callback_query(user: int = 1, data: str = "pressed") -> dict:
    """The Bot API JSON of an update with a button press under a message of the bot."""
    number = next(_ids)
    return {
        "update_id": number,
        "callback_query": {
            "id": str(number),
            "from": {"id": user, "is_bot": False, "first_name": "Alex"},
            "chat_instance": "1",
            "data": data,
            "message": {
                "message_id": number,
                "date": 1,
                "from": {"id": 999, "is_bot": True, "first_name": "Bot"},
                "chat": {"id": user, "type": "private"},
                "text": "press",
            },
        },
    }


def poll() -> dict:
    """The Bot API JSON of an update that belongs to nobody."""
    return {
        "update_id": next(_ids),
        "poll": {
            "id": "1",
            "question": "?",
            "options": [],
            "total_voter_count": 0,
            "is_closed": False,
            "is_anonymous": True,
            "type": "regular",
            "allows_multiple_answers": False,
            "allows_revoting": False,
            "members_only": False,
        },
    }


@pytest.fixture(autouse=True)
def tracer_is_given_back() -> Iterator[None]:
    """It may be coverage's, and CPython takes it away where one of a test's own has raised."""
    before = sys.gettrace()
    yield
    assert sys.gettrace() is before


_loops: weakref.WeakSet[asyncio.BaseEventLoop] = weakref.WeakSet()
_init_loop = asyncio.BaseEventLoop.__init__


def _init_noted_loop(loop: asyncio.BaseEventLoop) -> None:
    _init_loop(loop)
    _loops.add(loop)


asyncio.BaseEventLoop.__init__ = _init_noted_loop  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def loops_end_with_their_test() -> Iterator[None]:
    """A test may throw a loop away, and end while a thread still knows it. Collected later, it
    would warn in the midst of another test that it was never closed."""
    yield
    if all(loop.is_closed() for loop in _loops):
        return
    until(lambda: collect() or all(loop.is_closed() for loop in _loops))


def collect() -> None:
    """Collect what is left, without a word about loops and sockets that nobody has closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture
def collector() -> Iterator[None]:
    """It comes only when it is called."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    collect()


class Threads:
    """Threads whose errors fail the test, and which are joined at its end."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, target: Callable[..., object], *args: Any, name: str = "") -> threading.Thread:
        def run() -> None:
            try:
                target(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=run, name=name or None, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self, timeout: float = 30) -> None:
        for thread in self._threads:
            thread.join(timeout)
            assert not thread.is_alive(), f"{thread.name} hangs"
        self._threads.clear()
        if self._errors:
            raise self._errors[0]


def add_by_two(threads: Threads, one: SessionManager[Any], other: SessionManager[Any]) -> None:
    """By eight threads, half of them through each manager: no addition to a counter is lost."""

    def count(sessions: SessionManager[Any]) -> None:
        for _ in range(25):
            with sessions.session_scope("key") as session:
                session.n = session.get("n", 0) + 1

    for _ in range(4):
        threads.start(count, one)
        threads.start(count, other)
    threads.join()
    assert len(one.locks) == len(other.locks) == 0
    assert one.storage.get("key") == {"n": 200}


def run_client(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run() for what a bot library's own HTTP client does. One that is stopped just as it
    connects leaves the socket to the garbage collector, whose warning would be blamed on whatever
    test runs then."""
    try:
        return asyncio.run(main)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def stop_telebot(bot: Any) -> None:
    """`bot.stop_bot()`, without the half second for which a worker looks out for its next task."""
    bot.stop_polling()
    workers = bot.worker_pool.workers if bot.threaded else ()
    for worker in workers:
        worker.stop()
    for _ in workers:
        bot.worker_pool.put(lambda: None)
    bot.stop_bot()


class Counting(MemoryStorage):
    """How often the scope has read and written."""

    reads = writes = 0

    def load(self, key: str) -> Any:
        self.reads += 1
        return super().load(key)

    def save(self, key: str, record: Any) -> None:
        self.writes += 1
        super().save(key, record)

    def delete(self, key: str) -> None:
        self.writes += 1
        super().delete(key)


@pytest.fixture(params=["memory", "lru", "strict", "sqlite", "disk"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """An empty storage of each kind that needs no server."""
    if request.param == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    urls = {
        "sqlite": f"sqlite:///{tmp_path}/sessions.db",
        "disk": f"disk:///{tmp_path}/sessions",
    }
    if request.param in urls:
        some: Any = storage_from_url(urls[request.param])
    elif request.param == "lru":
        some = LruMemoryStorage()
    else:
        some = MemoryStorage(strict=request.param == "strict")
    yield some
    some.close()


@pytest.fixture
def threads() -> Iterator[Threads]:
    some = Threads()
    yield some
    some.join()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own."""
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as server:
        for _ in range(400):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)  # until it listens
        yield f"redis://127.0.0.1:{port}"
        server.terminate()


@pytest.fixture
def api() -> Iterator[OfflineBotAPI]:
    with OfflineBotAPI(longest_poll=0.05) as server:
        yield server
