"""What the tests of python-telegram-bot share: applications that run, and handlers that count."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from session_sync import DiskStorage, MemoryStorage, SessionKeyError, SessionManager
from session_sync.ptb import install
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")


KEY = "user:1:chat:1"

SOON = 20  # seconds until a test gives up waiting for what has to come

Build = Callable[[Any], Any]


def make_no_deprecation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # else RetryAfter and its kin warn


def builder(api: OfflineBotAPI) -> Any:
    return ext.Application.builder().token(api.token).base_url(api.base_url)


@contextlib.asynccontextmanager
async def running(
    api: OfflineBotAPI,
    sessions: SessionManager[Any],
    *handlers: Any,
    build: Build = lambda builder: builder,
) -> AsyncIterator[Any]:
    """An application that has been started; the handlers stand in groups 0, 1, 2, ..."""
    app = build(install(builder(api), sessions)).build()
    for group, handler in enumerate(handlers):
        app.add_handler(handler, group)
    async with app:
        await app.start()
        try:
            yield app
        finally:
            if app.running:
                await app.stop()
    while _failures:
        raise _failures.pop()
    assert len(sessions.locks) == 0


async def process(app: Any, *updates: dict[str, Any]) -> None:
    for update in updates:
        await app.process_update(telegram.Update.de_json(update, app.bot))


async def queue(app: Any, *updates: dict[str, Any]) -> None:
    """Through the update queue, as the updater does it; returns when all are processed."""
    for update in updates:
        await app.update_queue.put(telegram.Update.de_json(update, app.bot))
    await app.update_queue.join()


def on_text(callback: Any, **options: Any) -> Any:
    return ext.MessageHandler(ext.filters.TEXT, callback, **options)


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)


async def count(update: Any, context: Any) -> None:
    context.session.counter = context.session.get("counter", 0) + 1


async def slow_count(update: Any, context: Any) -> None:
    """Loses updates without a lock."""
    counter = context.session.get("counter", 0)
    await asyncio.sleep(0)
    context.session.counter = counter + 1
    context.session.setdefault("seen", []).append(update.effective_message.text)


class Gate:
    """A place in a handler that it reaches, and where it stays until it is opened."""

    def __init__(self) -> None:
        self._reached, self._opened = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self._reached.set()
        await self._opened.wait()

    async def reached(self) -> None:
        await asyncio.wait_for(self._reached.wait(), SOON)

    def open(self) -> None:
        self._opened.set()

    @property
    def is_reached(self) -> bool:
        return self._reached.is_set()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


#: The parameters of the fixture `sessions`.
STORES = ["memory", "disk"]


def make_sessions(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    storage = MemoryStorage() if request.param == "memory" else DiskStorage(tmp_path / "s")
    with SessionManager(storage=storage) as manager:
        yield manager


def make_in_memory() -> SessionManager[Any]:
    return SessionManager()


class OwnContext(ext.CallbackContext):
    """A bot's own context, the way PTB's example makes one."""

    __slots__ = ("greeting",)

    @classmethod
    def from_update(cls, update: object, application: Any) -> Any:
        context = super().from_update(update, application)
        context.greeting = "hello"
        return context


class OwnApplication(ext.Application):
    """A bot's own application."""

    __slots__ = ("seen",)

    def __init__(self, seen: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = seen

    async def process_update(self, update: object) -> None:
        self.seen.append("before")
        await super().process_update(update)
        self.seen.append("after")


def asks(errors: list[Any]) -> Any:
    async def handler(update: Any, context: Any) -> None:
        try:
            errors.append(context.session)
        except SessionKeyError as error:
            errors.append(error)

    return handler


_failures: list[BaseException] = []


async def fail(update: Any, context: Any) -> None:
    """PTB only logs what an error handler raises, so `running` raises it."""
    _failures.append(context.error)
