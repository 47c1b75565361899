"""Odd applications, builders and contexts of python-telegram-bot."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import time
from typing import Any

import ptb_tools
import pytest
from conftest import message, run_client
from interruptions import OutsideError, raises_in_flows
from ptb_tools import (
    KEY,
    SOON,
    Gate,
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
from waiting import until_async

from session_sync import DiskStorage, MemoryStorage, SessionManager, SQLiteStorage
from session_sync.lifecycle.transaction import ScopeStack
from session_sync.ptb import SessionContext, install, session_filter
from session_sync.testing import OfflineBotAPI

_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
in_memory = pytest.fixture(ptb_tools.make_in_memory)


def test_a_task_that_cannot_be_made_keeps_nothing_open(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        async def handle(update: Any, context: Any) -> None:
            await count(update, context)
            coroutine = settle()

            def from_a_thread() -> None:
                with pytest.raises(RuntimeError, match="no running event loop"):
                    context.application.create_task(coroutine, update=update)

            await asyncio.to_thread(from_a_thread)
            coroutine.close()

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            await asyncio.wait_for(process(app, message()), SOON)

    asyncio.run(main())
    assert stored(in_memory) == {"counter": 2}


def test_stop_waits_for_tasks_that_are_made_while_it_stops(
    api: OfflineBotAPI, in_memory: SessionManager[Any], recwarn: Any
) -> None:
    async def main() -> None:
        gate, task_gate = Gate(), Gate()

        async def work(context: Any) -> None:
            await task_gate()
            context.session.task = True

        async def handle(update: Any, context: Any) -> None:
            await gate()
            context.session.paid = True
            with pytest.warns(telegram.warnings.PTBUserWarning):
                context.application.create_task(work(context), update=update)

        def build(made: Any) -> Any:
            return made.concurrent_updates(8).job_queue(None)  # which sleeps when it stops

        async with running(api, in_memory, on_text(handle), build=build) as app:
            await app.update_queue.put(telegram.Update.de_json(message(), app.bot))
            await gate.reached()
            stopping = asyncio.create_task(app.stop())
            await settle()
            gate.open()
            await task_gate.reached()
            await settle()
            assert not stopping.done()
            task_gate.open()
            await asyncio.wait_for(stopping, SOON)
            assert stored(in_memory) == {"paid": True, "task": True}

    asyncio.run(main())


class RoomyBuilder(ext.ApplicationBuilder):
    """Without slots."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 1


class StubbornBuilder(ext.ApplicationBuilder):
    __slots__ = ()

    def build(self) -> Any:
        self.application_class(ext.Application)
        return super().build()


class JsonApplication(ext.Application):
    """Takes raw JSON."""

    async def process_update(self, update: Any) -> None:
        await super().process_update(telegram.Update.de_json(update, self.bot))


def test_builders_of_any_shape(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    made = RoomyBuilder().token(api.token).base_url(api.base_url)
    assert issubclass(install(made, in_memory).build().context_types.context, SessionContext)
    with pytest.raises(RuntimeError, match=r"StubbornBuilder\.build\(\) has chosen"):
        install(StubbornBuilder().token(api.token), in_memory).build()


def test_an_application_may_convert_its_updates(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        made = install(builder(api).application_class(JsonApplication), in_memory)
        async with made.build() as app:
            app.add_handler(on_text(count))
            await app.process_update(message())

    asyncio.run(main())
    assert stored(in_memory) == {"counter": 1}


class AloofContext(SessionContext[Any]):
    """Asks nobody."""

    @classmethod
    def from_update(cls, update: object, application: Any) -> Any:
        return cls(application)

    @classmethod
    def from_job(cls, job: Any, application: Any) -> Any:
        context = cls(application)
        context.job = job
        return context


def test_a_context_class_that_does_not_call_super(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        begun, over = Gate(), Gate()

        async def job(context: Any) -> None:
            begun.open()
            async with in_memory.session_scope(KEY) as session:
                session.log.append("job")
            over.open()

        async def handle(update: Any, context: Any) -> None:
            context.job_queue.run_once(job, 0.01)
            await begun()
            await settle()
            context.session.log = ["handler"]

        def build(made: Any) -> Any:
            return made.context_types(ext.ContextTypes(context=AloofContext))

        async with running(api, in_memory, on_text(handle), build=build) as app:
            await process(app, message())
            await asyncio.wait_for(over(), SOON)

    asyncio.run(main())
    assert stored(in_memory) == {"log": ["handler", "job"]}


def test_a_context_with_a_session_of_its_own_is_refused(api: OfflineBotAPI) -> None:
    class Database(ext.CallbackContext):
        session = None

    made = builder(api).context_types(ext.ContextTypes(context=Database))
    with pytest.raises(TypeError, match="Database has a `session` of its own"):
        install(made, SessionManager()).build()
    context = install(builder(api), SessionManager()).build().context_types.context(None)
    with pytest.raises(AttributeError, match="give your own attribute another name"):
        context.session = object()


def test_an_application_started_in_a_handler_does_not_join_it(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        second = install(builder(api), in_memory).build()
        second.add_handler(on_text(count))
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            await second.initialize()
            await second.start()
            await second.update_queue.put(telegram.Update.de_json(message(), second.bot))
            await settle()
            assert "counter" not in context.session
            gate.open()

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            await asyncio.wait_for(gate(), SOON)
            await second.update_queue.join()
            await second.stop()
            await second.shutdown()

    asyncio.run(main())
    assert stored(in_memory) == {"counter": 1}


def test_an_application_that_is_not_initialised_opens_nothing(api: OfflineBotAPI) -> None:
    class Untouched(MemoryStorage):
        def load(self, key: str) -> Any:
            raise AssertionError("too early")

    app = install(builder(api), SessionManager(storage=Untouched())).build()
    with pytest.raises(RuntimeError, match="was not initialized"):
        asyncio.run(app.process_update(telegram.Update.de_json(message(), app.bot)))


def test_a_store_that_fails_after_a_cancellation_does_not_replace_it(api: OfflineBotAPI) -> None:
    class Failing(MemoryStorage):
        blocking = True  # type: ignore[misc]

        def save(self, key: str, record: Any) -> None:
            raise ConnectionError("no save")

    sessions: SessionManager[Any] = SessionManager(storage=Failing(), on_error="flush")
    errors: list[Any] = []

    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            context.session.a = 1
            await gate()

        async def on_error(update: Any, context: Any) -> None:
            errors.append(type(context.error))

        async with running(api, sessions, on_text(handle)) as app:
            app.add_error_handler(on_error)
            handling = asyncio.create_task(process(app, message()))
            await gate.reached()
            handling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await handling

    asyncio.run(main())
    assert errors == [ConnectionError]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_task_that_is_thrown_away_with_its_loop_frees_the_key(
    api: OfflineBotAPI, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[str] = []
    hook = lambda complaint: complaints.append(str(complaint.exc_value))  # noqa: E731
    monkeypatch.setattr("sys.unraisablehook", hook)
    with SessionManager(storage=DiskStorage(tmp_path)) as sessions:
        loop = asyncio.new_event_loop()

        async def main() -> None:
            gate = Gate()

            async def work() -> None:
                await gate()

            async def handle(update: Any, context: Any) -> None:
                context.application.create_task(work(), update=update)

            app = install(builder(api), sessions).build()
            await app.initialize()
            await app.start()
            app.add_handler(on_text(handle))
            await process(app, message())
            await gate.reached()
            app.updater = None

        loop.run_until_complete(main())
        loop.close()
        gc.collect()
        give_up = time.monotonic() + 20
        while len(sessions.locks):  # a thread does it, where a finaliser would have to wait
            assert time.monotonic() < give_up
            time.sleep(0)
        assert "coroutine ignored GeneratorExit" not in complaints


def test_a_filter_in_a_conversations_time_out_says_so(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        errors: list[str] = []
        failed = Gate()

        async def on_error(update: Any, context: Any) -> None:
            errors.append(str(context.error))
            failed.open()

        async def begin(update: Any, context: Any) -> int:
            return 1

        asks = ext.MessageHandler(session_filter(bool), begin)
        states = {1: [], ext.ConversationHandler.TIMEOUT: [asks]}
        conversation = ext.ConversationHandler(
            [on_text(begin)], states, [], conversation_timeout=0.05
        )
        async with running(api, in_memory, conversation) as app:
            app.add_error_handler(on_error)
            await process(app, message())
            await asyncio.wait_for(failed(), SOON)
        assert "in the TIMEOUT state of a conversation" in errors[0]

    asyncio.run(main())


def test_ctrl_c_in_run_polling_lets_the_running_update_end(
    api: OfflineBotAPI, tmp_path: Any
) -> None:
    program = f"""if True:
        import asyncio, threading
        from telegram.ext import Application, MessageHandler, filters
        from session_sync import SessionManager, SQLiteStorage
        from session_sync.ptb import install

        sessions = SessionManager(storage=SQLiteStorage({str(tmp_path / "sessions.db")!r}))
        builder = Application.builder().token({api.token!r}).base_url({api.base_url!r})
        app = install(builder.concurrent_updates(8), sessions).build()

        async def handle(update, context):
            context.session.begun = True
            print("in the handler", flush=True)
            while app.running:
                await asyncio.sleep(0.01)
            context.session.ended = True

        app.add_handler(MessageHandler(filters.ALL, handle))
        app.run_polling()
        print(len(sessions.locks))
        names = {{thread.name[:18] for thread in threading.enumerate() if not thread.daemon}}
        print(sorted(names))
    """
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        api.user(1).send("hi")
        assert process.stdout.readline() == "in the handler\n"
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
        assert process.wait(SOON) == 0
    assert rest == ["0", "['MainThread']"]
    with SessionManager(storage=SQLiteStorage(tmp_path / "sessions.db")) as sessions:
        assert stored(sessions) == {"begun": True, "ended": True}


@raises_in_flows
def test_a_task_that_outlives_its_update_keeps_no_scope_that_was_cut_off_before_its_end(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """It has the context of the update. (Raised by a signal handler, say.)"""
    before = sys.gettrace()

    def interrupt(frame: Any, event: str, _arg: Any) -> None:
        if event == "call" and frame.f_code is ScopeStack.aleave.__code__:
            sys.settrace(before)
            raise OutsideError

    async def main() -> None:
        tasks = []

        async def handle(update: Any, context: Any) -> None:
            tasks.append(asyncio.create_task(asyncio.sleep(SOON)))
            context.session.n = 1
            sys.settrace(interrupt)

        async with running(api, in_memory, on_text(handle)) as app:
            with contextlib.suppress(OutsideError):
                await process(app, message())
            gc.collect()
            assert len(in_memory.locks) == 0
            tasks[0].cancel()
            await asyncio.wait(tasks)

    try:
        run_client(main())
    finally:
        sys.settrace(before)  # CPython takes away a tracer that has raised


def test_what_a_task_of_an_update_has_begun_keeps_no_scope(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """It has the context of that task, and may go on for ever."""

    async def main() -> None:
        tasks, scopes = [], []

        async def work() -> None:
            tasks.append(asyncio.create_task(asyncio.sleep(SOON)))

        async def handle(update: Any, context: Any) -> None:
            scopes.append(context.session._lifecycle)
            context.application.create_task(work(), update=update)

        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            await until_async(lambda: tasks and len(in_memory.locks) == 0)
            await until_async(lambda: gc.collect() >= 0 and scopes[0]() is None)
            assert not tasks[0].done()
            tasks[0].cancel()
            await asyncio.wait(tasks)

    run_client(main())


@pytest.mark.parametrize("name", ["_leave", "_close", "aclose_all", "arun_flow"])
@raises_in_flows
def test_an_interrupt_as_the_last_task_of_an_update_ends_loses_nothing(
    api: OfflineBotAPI, in_memory: SessionManager[Any], name: str
) -> None:
    before = sys.gettrace()

    def interrupt(frame: Any, event: str, _arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == name and "session_sync" in code.co_filename:
            sys.settrace(before)
            raise OutsideError

    async def main() -> None:
        go_on = asyncio.Event()

        async def work() -> None:
            await go_on.wait()
            sys.settrace(interrupt)

        async def handle(update: Any, context: Any) -> None:
            context.session.n = 1
            tasks.append(context.application.create_task(work(), update=update))

        tasks: list[Any] = []
        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())
            go_on.set()
            await asyncio.wait(tasks)
            await until_async(lambda: len(in_memory.locks) == 0)
        assert stored(in_memory) == {"n": 1}

    try:
        run_client(main())
    finally:
        sys.settrace(before)  # CPython takes away a tracer that has raised
