"""python-telegram-bot: the decorator, filters, lazy sessions, and threads of a handler."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import ptb_tools
import pytest
from conftest import message
from ptb_tools import KEY, SOON, Gate, asks, builder, count, fail, on_text, process, running, stored

from session_sync import (
    MemoryStorage,
    SessionAwaitError,
    SessionDeadlockError,
    SessionKeyError,
    SessionManager,
)
from session_sync.ptb import install, session_filter
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")


_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
sessions = pytest.fixture(params=ptb_tools.STORES)(ptb_tools.make_sessions)
in_memory = pytest.fixture(ptb_tools.make_in_memory)


def test_with_session_on_handlers_methods_and_jobs(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    class Bot:
        @in_memory.with_session
        async def handle(self, update: Any, context: Any, session: Any) -> None:
            session.log = [*session.get("log", ()), "method"]

    @in_memory.with_session
    async def plain(update: Any, context: Any, session: Any) -> None:
        session.log.append("function")

    async def main() -> None:
        done = Gate()

        @in_memory.with_session
        async def job(context: Any, session: Any) -> None:
            session.log = [*session.get("log", ()), f"job {context.job.data}"]
            if context.job.data == "group":
                done.open()

        async with builder(api).build() as app:  # without install
            app.add_handler(on_text(Bot().handle))
            app.add_handler(on_text(plain), 1)
            await app.start()
            await process(app, message())
            app.job_queue.run_once(job, 0, data="private", chat_id=1)
            app.job_queue.run_once(job, 0, data="both", chat_id=1, user_id=1)
            app.job_queue.run_once(job, 0.01, data="group", chat_id=-5, user_id=1)
            await asyncio.wait_for(done(), SOON)
            await app.stop()

    asyncio.run(main())
    log = stored(in_memory)["log"]
    assert log[:2] == ["method", "function"]
    assert set(log[2:]) == {"job private", "job both"}
    assert stored(in_memory, "user:1:chat:-5") == {"log": ["job group"]}


def test_a_job_of_nobody_has_no_key(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    errors: list[Any] = []

    async def main() -> None:
        failed = Gate()

        @in_memory.with_session
        async def job(context: Any, session: Any) -> None: ...

        async def on_error(update: Any, context: Any) -> None:
            errors.append(context.error)
            await asks(errors)(update, context)
            failed.open()

        async with running(api, in_memory) as app:
            app.add_error_handler(on_error)
            app.job_queue.run_once(job, 0)
            await asyncio.wait_for(failed(), SOON)

    asyncio.run(main())
    assert [type(error) for error in errors] == [SessionKeyError, SessionKeyError]


def test_the_decorator_under_install_joins(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    @in_memory.with_session
    async def handle(update: Any, context: Any, session: Any) -> None:
        assert session is context.session
        session.a = 1

    async def main() -> None:
        async with running(api, in_memory, on_text(handle)) as app:
            app.add_error_handler(fail)
            await process(app, message())

    asyncio.run(main())
    assert stored(in_memory) == {"a": 1}


def test_filters_can_ask(api: OfflineBotAPI, sessions: SessionManager[Any]) -> None:
    asks_name = session_filter(lambda session: session.get("step") == "name", name="asks_name")
    assert "asks_name" in repr(ext.filters.TEXT & asks_name)

    async def start(update: Any, context: Any) -> None:
        context.session.step = "name"

    async def name(update: Any, context: Any) -> None:
        context.session.step = "done"
        context.session.name = update.message.text

    async def main() -> None:
        async with running(api, sessions) as app:
            app.add_handler(ext.MessageHandler(ext.filters.TEXT & asks_name, name))
            app.add_handler(ext.MessageHandler(ext.filters.TEXT & ~asks_name, start))
            await process(app, message(text="hi"), message(text="Alex"))

    asyncio.run(main())
    assert stored(sessions) == {"step": "done", "name": "Alex"}


def test_a_filter_that_raises_counts_as_its_handler(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    errors: list[Any] = []

    def broken(session: Any) -> bool:
        session.half = True
        raise ValueError("oops")

    async def on_error(update: Any, context: Any) -> None:
        errors.append(context.error)

    async def main() -> None:
        handler = ext.MessageHandler(session_filter(broken), count)
        async with running(api, in_memory, handler, on_text(count)) as app:
            app.add_error_handler(on_error)
            await process(app, message())

    asyncio.run(main())
    assert [type(error) for error in errors] == [ValueError]
    assert stored(in_memory) == {"counter": 1}


@pytest.mark.parametrize("why", ["lazy", "not installed"])
def test_a_filter_that_cannot_ask_says_why(api: OfflineBotAPI, why: str) -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    errors: list[Any] = []

    async def on_error(update: Any, context: Any) -> None:
        errors.append(context.error)

    async def main() -> None:
        made = builder(api)
        async with (install(made, sessions) if why == "lazy" else made).build() as app:
            app.add_handler(ext.MessageHandler(session_filter(bool), count))
            app.add_error_handler(on_error)
            await process(app, message())

    asyncio.run(main())
    expected = SessionAwaitError if why == "lazy" else SessionKeyError
    assert [type(error) for error in errors] == [expected]
    assert ("lazy=True" if why == "lazy" else "install()") in str(errors[0])


@pytest.mark.parametrize(
    ("handler", "expected"),
    [("nothing", []), ("reads", ["load"]), ("writes", ["load", "save"]), ("touches", ["error"])],
)
def test_a_lazy_session_is_awaited(api: OfflineBotAPI, handler: str, expected: list[str]) -> None:
    calls: list[str] = []

    class Counting(MemoryStorage):
        def load(self, key: str) -> Any:
            calls.append("load")
            return super().load(key)

        def save(self, key: str, record: Any) -> None:
            calls.append("save")
            super().save(key, record)

    sessions: SessionManager[Any] = SessionManager(storage=Counting(), lazy=True)

    async def handle(update: Any, context: Any) -> None:
        if handler == "nothing":
            assert len(sessions.locks) == 0
        elif handler == "touches":
            with pytest.raises(SessionAwaitError, match=r"`await context\.session` in PTB"):
                context.session.get("a")
            calls.append("error")
        else:
            session = await context.session
            assert session is context.session
            session.get("a")
            if handler == "writes":
                session.a = 1
                session.b = 2

    async def main() -> None:
        async with running(api, sessions, on_text(handle), on_text(handle)) as app:
            app.add_error_handler(fail)
            await process(app, message())

    asyncio.run(main())
    assert calls == (expected * 2 if expected == ["error"] else expected)


def test_synchronous_code_in_a_thread_joins_the_handlers_session(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    def work(update: Any) -> None:
        with sessions.session_scope(update) as session:
            session.thread = threading.current_thread().name

    async def handle(update: Any, context: Any) -> None:
        context.session.handler = threading.current_thread().name
        await asyncio.to_thread(work, update)
        assert context.session.thread != context.session.handler

    async def main() -> None:
        async with running(api, sessions, on_text(handle)) as app:
            app.add_error_handler(fail)
            await process(app, message())

    asyncio.run(main())
    assert stored(sessions).keys() == {"handler", "thread"}


def test_a_blocking_with_on_the_loop_works_where_it_can_and_else_raises(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            with in_memory.session_scope("user:2:chat:2") as other:
                other.a = 1
            with in_memory.session_scope(update) as joined:
                assert joined is context.session
            await gate()

        async with running(api, in_memory, on_text(handle)) as app:
            app.add_error_handler(fail)
            handling = asyncio.create_task(process(app, message()))
            await gate.reached()
            with (
                pytest.raises(SessionDeadlockError, match="Use `async with"),
                in_memory.session_scope(KEY),
            ):
                pass
            gate.open()
            await handling

    asyncio.run(main())
    assert stored(in_memory, "user:2:chat:2") == {"a": 1}
