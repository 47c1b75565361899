"""Units of python-telegram-bot: what belongs to one and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import ptb_tools
import pytest
from conftest import message
from ptb_tools import (
    KEY,
    SOON,
    Gate,
    OwnContext,
    builder,
    count,
    ext,
    on_text,
    process,
    running,
    settle,
    stored,
    telegram,
)

from session_sync import MemoryStorage, SessionDeadlockError, SessionManager
from session_sync.ptb import install
from session_sync.testing import OfflineBotAPI

_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
in_memory = pytest.fixture(ptb_tools.make_in_memory)


def test_job_with_the_update_of_its_handler_is_outside(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        log, over, seen = [], Gate(), []

        async def work(update: Any) -> None:
            log.append("task begun")
            async with in_memory.session_scope(update) as session:
                log.append(session.get("log"))
            over.open()

        async def job(context: Any) -> None:
            context.application.create_task(work(context.job.data), update=context.job.data)

        async def handle(update: Any, context: Any) -> None:
            context.job_queue.run_once(job, 0.01, data=update)
            while not log:
                await asyncio.sleep(0.01)
            await settle()
            seen.append(list(log))
            context.session.log = "handler"

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            await asyncio.wait_for(over(), SOON)
        assert seen == [["task begun"]]
        assert log == ["task begun", "handler"]

    asyncio.run(main())


def test_updates_wait_longer_than_lock_timeout(api: OfflineBotAPI) -> None:
    sessions = SessionManager(lock_timeout=0.05)

    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            await gate()
            await count(update, context)

        async with running(api, sessions, on_text(handle)) as app:
            both = [asyncio.create_task(process(app, message())) for _ in range(2)]
            await gate.reached()
            await asyncio.sleep(0.2)
            gate.open()
            await asyncio.gather(*both)

    asyncio.run(main())
    assert stored(sessions) == {"counter": 2}


@pytest.mark.parametrize("inner_fails", [False, True])
def test_after_a_nested_update_the_outer_ones_unit_goes_on(
    api: OfflineBotAPI, in_memory: SessionManager[Any], inner_fails: bool
) -> None:
    async def main() -> None:
        async def work(context: Any) -> None:
            await asyncio.sleep(0.01)
            context.session.task = True

        async def handle(update: Any, context: Any) -> None:
            if update.message.text == "inner":
                if inner_fails:
                    raise asyncio.CancelledError
                return
            inner = telegram.Update.de_json(message(user=2, text="inner"), context.bot)
            with contextlib.suppress(asyncio.CancelledError):
                await context.application.process_update(inner)
            context.session.outer = True
            if update.message.text == "raise":
                raise ValueError
            context.application.create_task(work(context), update=update)

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message(text="raise"))
            assert stored(in_memory) is None
            await process(app, message(text="task"))

    asyncio.run(main())
    assert stored(in_memory) == {"outer": True, "task": True}


def test_an_error_of_nothing_or_of_another_update_discards_nothing(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        async def handle(update: Any, context: Any) -> None:
            context.session.kept = True
            other = telegram.Update.de_json(message(user=2), context.bot)
            await context.application.process_error(None, ValueError())
            await context.application.process_error(other, ValueError())

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())

    asyncio.run(main())
    assert stored(in_memory) == {"kept": True}


def test_a_blocking_with_on_the_loop_is_refused_while_a_task_of_the_unit_runs(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    sessions = SessionManager(lock_timeout=1)

    async def main() -> None:
        gate = Gate()

        async def work(context: Any) -> None:
            await gate()

        async def handle(update: Any, context: Any) -> None:
            context.application.create_task(work(context), update=update)

        async with running(api, sessions, on_text(handle)) as app:
            # from a task that ends, so that only the member is left
            await asyncio.create_task(process(app, message()))
            await gate.reached()
            with pytest.raises(SessionDeadlockError), sessions.session_scope(KEY):
                pass
            gate.open()

    asyncio.run(main())


def test_a_task_of_the_unit_is_seen_in_a_circle(api: OfflineBotAPI) -> None:
    sessions = SessionManager(lock_timeout=None)

    async def main() -> None:
        held = Gate()

        async def work() -> None:
            await held()
            async with sessions.session_scope("user:2:chat:2"):
                pass

        async def handle(update: Any, context: Any) -> None:
            context.application.create_task(work(), update=update)

        async def other() -> None:
            async with sessions.session_scope("user:2:chat:2"):
                held.open()
                await settle()
                async with sessions.session_scope(KEY):
                    pass

        async with running(api, sessions, on_text(handle)) as app:
            await asyncio.create_task(process(app, message()))
            await held.reached()
            with pytest.raises(SessionDeadlockError):
                await asyncio.wait_for(other(), 3)

    asyncio.run(main())


def test_tasks_inherit(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    """An untied task that ties one of its own to the update: outside."""

    async def main() -> None:
        log = []

        async def inner(update: Any) -> None:
            log.append("begun")
            async with in_memory.session_scope(update) as session:
                log.append(session.get("handler"))

        async def untied(update: Any, context: Any) -> None:
            context.application.create_task(inner(update), update=update)

        async def handle(update: Any, context: Any) -> None:
            context.application.create_task(untied(update, context))
            while not log:
                await asyncio.sleep(0)
            await settle()
            assert log == ["begun"]
            context.session.handler = True

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            await settle()
        assert log == ["begun", True]

    asyncio.run(main())


def test_the_builder_keeps_its_choices(api: OfflineBotAPI) -> None:
    made = install(builder(api), SessionManager())
    made.build()
    made.token("2:other").context_types(ext.ContextTypes())
    before = made._application_class, made._context_types
    made.build()
    assert (made._application_class, made._context_types) == before


def test_user_and_chat_data_types(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    class UserData(dict): ...

    class ChatData(dict): ...

    seen = []

    async def handle(update: Any, context: Any) -> None:
        seen.append((type(context.user_data), type(context.chat_data)))

    types = ext.ContextTypes(user_data=UserData, chat_data=ChatData)

    async def main() -> None:
        async with running(
            api, in_memory, on_text(handle), build=lambda b: b.context_types(types)
        ) as app:
            await process(app, message())

    asyncio.run(main())
    assert seen == [(UserData, ChatData)]


def test_equal_is_not_the_same_update(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    async def main() -> None:
        log = []

        async def work(update: Any) -> None:
            log.append("begun")
            async with in_memory.session_scope(update):
                log.append("in")

        async def handle(update: Any, context: Any) -> None:
            twin = telegram.Update(update.update_id, message=update.message)
            assert twin == update
            context.application.create_task(work(twin), update=twin)
            await settle()
            log.append("handler ends")

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
        assert log == ["begun", "handler ends", "in"]

    asyncio.run(main())


def test_a_task_that_has_ended_leaves_once(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        gate = Gate()

        async def quick() -> None: ...
        async def slow(context: Any) -> None:
            await gate()
            context.session.slow = True

        async def handle(update: Any, context: Any) -> None:
            context.application.create_task(slow(context), update=update)
            context.application.create_task(quick(), update=update)

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            await gate.reached()
            await settle()
            gate.open()
            await settle()

    asyncio.run(main())
    assert stored(in_memory) == {"slow": True}


def test_stop_waits_for_a_slow_close(api: OfflineBotAPI) -> None:
    slow = threading.Event()

    class Slow(MemoryStorage):
        blocking = True  # type: ignore[misc]

        def save(self, key: str, record: Any) -> None:
            slow.wait(0.2)
            super().save(key, record)

    sessions = SessionManager(storage=Slow())

    async def main() -> None:
        async def never() -> None: ...

        tasks = []

        async def handle(update: Any, context: Any) -> None:
            await count(update, context)
            coroutine = never()
            tasks.append(context.application.create_task(coroutine, update=update))
            coroutine.close()

        async with running(api, sessions, on_text(handle)) as app:
            await process(app, message())
            tasks[0].cancel()
            await app.stop()
            assert stored(sessions) == {"counter": 1}

    asyncio.run(main())


def test_class_names(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    app = install(
        builder(api).context_types(ext.ContextTypes(context=OwnContext)), in_memory
    ).build()
    assert app.context_types.context.__module__ == OwnContext.__module__
