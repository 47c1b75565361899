"""python-telegram-bot: what fails in a handler or in the store, and what is stored then."""

from __future__ import annotations

import asyncio
from typing import Any

import ptb_tools
import pytest
from conftest import message
from ptb_tools import (
    KEY,
    SOON,
    Gate,
    asks,
    builder,
    count,
    on_text,
    process,
    queue,
    running,
    settle,
    stored,
)

from session_sync import MemoryStorage, SessionManager
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")


_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
sessions = pytest.fixture(params=ptb_tools.STORES)(ptb_tools.make_sessions)
in_memory = pytest.fixture(ptb_tools.make_in_memory)


class Broken(MemoryStorage):
    """Fails where it is told to."""

    fails = ""

    def load(self, key: str) -> Any:
        if self.fails == "load":
            raise ConnectionError("no load")
        return super().load(key)

    def save(self, key: str, record: Any) -> None:
        if self.fails == "save":
            raise ConnectionError("no save")
        super().save(key, record)


@pytest.mark.parametrize("block", [True, False])
def test_a_handler_that_raises_is_rolled_back_before_the_error_handlers(
    api: OfflineBotAPI, sessions: SessionManager[Any], block: bool
) -> None:
    seen: list[Any] = []

    async def sibling(update: Any, context: Any) -> None:
        context.session.sibling = True
        if update.message.text == "flush":
            await context.session.aflush()

    async def fails(update: Any, context: Any) -> None:
        context.session.half = True
        raise ValueError("oops")

    async def on_error(update: Any, context: Any) -> None:
        seen.append((type(context.error), dict(context.session)))
        context.session.errors = context.session.get("errors", 0) + 1

    async def later(update: Any, context: Any) -> None:
        if block:
            seen.append(dict(context.session))

    async def main() -> None:
        handlers = on_text(sibling), on_text(fails, block=block), on_text(later)
        async with running(api, sessions, *handlers) as app:
            app.add_error_handler(on_error)
            await process(app, message())
            await process(app, message(text="flush"))

    asyncio.run(main())
    assert stored(sessions) == {"errors": 2, "sibling": True}
    first, second = (ValueError, {}), (ValueError, {"errors": 1, "sibling": True})
    laters = [{"errors": 1}, {"errors": 2, "sibling": True}]
    assert seen == ([first, laters[0], second, laters[1]] if block else [first, second])


def test_application_handler_stop_saves(api: OfflineBotAPI, sessions: SessionManager[Any]) -> None:
    seen: list[str] = []

    async def stops(update: Any, context: Any) -> None:
        context.session.stopped = True
        raise ext.ApplicationHandlerStop

    async def never(update: Any, context: Any) -> None:
        seen.append("never")

    async def main() -> None:
        async with running(api, sessions, on_text(stops), on_text(never)) as app:
            await process(app, message())

    asyncio.run(main())
    assert stored(sessions) == {"stopped": True}
    assert seen == []


def test_application_handler_stop_saves_in_a_decorated_handler(api: OfflineBotAPI) -> None:
    sessions: SessionManager[Any] = SessionManager()

    @sessions.with_session
    async def stops(update: Any, context: Any, session: Any) -> None:
        session.stopped = True
        raise ext.ApplicationHandlerStop

    async def main() -> None:
        async with builder(api).build() as app:
            app.add_handler(on_text(stops))
            await process(app, message())

    asyncio.run(main())
    assert stored(sessions) == {"stopped": True}


@pytest.mark.parametrize("block", [True, False])
def test_an_error_handler_that_raises_is_rolled_back_as_well(
    api: OfflineBotAPI, in_memory: SessionManager[Any], block: bool, caplog: Any
) -> None:
    async def fails(update: Any, context: Any) -> None:
        raise ValueError("oops")

    async def on_error(update: Any, context: Any) -> None:
        context.session.half = True
        raise KeyError("again")

    async def later(update: Any, context: Any) -> None:
        context.session.later = True

    async def main() -> None:
        async with running(api, in_memory, on_text(fails), on_text(later)) as app:
            app.add_error_handler(on_error, block=block)
            app.add_error_handler(on_error, block=block)  # PTB takes it once
            assert len(app.error_handlers) == 1
            assert on_error in app.error_handlers
            assert [handler.__name__ for handler in app.error_handlers] == ["on_error"]
            await process(app, message())
            await settle()
            app.remove_error_handler(on_error)
            assert not app.error_handlers

    asyncio.run(main())
    assert (stored(in_memory) or {}).get("half") is None
    assert "uncaught error was raised while handling the error" in caplog.text


def test_flush_on_error_saves(api: OfflineBotAPI) -> None:
    sessions: SessionManager[Any] = SessionManager(on_error="flush")

    async def fails(update: Any, context: Any) -> None:
        context.session.half = True
        raise ValueError("oops")

    async def main() -> None:
        async with running(api, sessions, on_text(fails)) as app:
            app.add_error_handler(asks([]))
            await process(app, message())

    asyncio.run(main())
    assert stored(sessions) == {"half": True}


@pytest.mark.parametrize("what", ["process_update", "task"])
def test_a_cancelled_handler_is_discarded_and_its_key_free(
    api: OfflineBotAPI, sessions: SessionManager[Any], what: str
) -> None:
    async def main() -> None:
        gate = Gate()
        tasks: list[Any] = []

        async def work(context: Any) -> None:
            context.session.half = True
            await gate()

        async def handle(update: Any, context: Any) -> None:
            if update.message.text == "next":
                await count(update, context)
            elif what == "task":
                tasks.append(context.application.create_task(work(context), update=update))
            else:
                await work(context)

        async with running(api, sessions, on_text(handle)) as app:
            handling = asyncio.create_task(process(app, message()))
            await gate.reached()
            (tasks[0] if tasks else handling).cancel()
            await asyncio.wait({tasks[0] if tasks else handling})
            await handling if tasks else None
            await asyncio.wait_for(process(app, message(text="next")), SOON)

    asyncio.run(main())
    assert stored(sessions) == {"counter": 1}


def test_a_task_cancelled_before_its_first_step_frees_the_key(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        async def never() -> None:
            raise AssertionError("it was cancelled before")

        async def handle(update: Any, context: Any) -> None:
            await count(update, context)
            coroutine = never()
            context.application.create_task(coroutine, update=update).cancel()
            coroutine.close()

        async with running(api, sessions, on_text(handle)) as app:
            await process(app, message())
            await asyncio.wait_for(process(app, message()), SOON)

    asyncio.run(main())
    assert stored(sessions) == {"counter": 2}


@pytest.mark.parametrize("fails", ["load", "save"])
@pytest.mark.parametrize("block", [True, False])
def test_an_error_of_the_store_goes_to_the_error_handlers(
    api: OfflineBotAPI, fails: str, block: bool
) -> None:
    storage = Broken()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    storage.set(KEY, {"counter": 1})
    handled: list[Any] = []

    async def handle(update: Any, context: Any) -> None:
        handled.append(update.message.text)
        await count(update, context)

    async def on_error(update: Any, context: Any) -> None:
        handled.append(type(context.error))
        await asks(handled)(update, context)

    async def main() -> None:
        async with running(api, sessions, on_text(handle, block=block)) as app:
            app.add_error_handler(on_error)
            storage.fails = fails
            await process(app, message(text="one"))
            await settle()
            storage.fails = ""
            await process(app, message(text="two"))

    asyncio.run(main())
    expected = ["one"] if fails == "save" else []
    assert handled[: len(expected) + 1] == [*expected, ConnectionError]
    assert handled[-1] == "two"
    assert stored(sessions) == {"counter": 2}


def test_what_get_storage_key_raises_goes_to_the_error_handlers(api: OfflineBotAPI) -> None:
    def get_storage_key(update: Any) -> str:
        raise LookupError("who is this?")

    sessions: SessionManager[Any] = SessionManager(get_storage_key=get_storage_key)
    errors: list[Any] = []

    async def on_error(update: Any, context: Any) -> None:
        errors.append(str(context.error))

    async def main() -> None:
        async with running(api, sessions, on_text(count)) as app:
            app.add_error_handler(on_error)
            await queue(app, message())

    asyncio.run(main())
    assert errors == ["who is this?"]
