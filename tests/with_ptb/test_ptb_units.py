"""What belongs to a unit of python-telegram-bot's room, and what does not; see test_ptb."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from conftest import message, run_client
from interruptions import OutsideError, raises_in_flows
from test_ptb import (
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
from waiting import until_async

from session_sync import (
    DiskStorage,
    MemoryStorage,
    SessionDeadlockError,
    SessionManager,
    SQLiteStorage,
)
from session_sync.lifecycle.transaction import ScopeStack
from session_sync.ptb import SessionContext, install, session_filter
from session_sync.testing import OfflineBotAPI


@pytest.fixture(autouse=True)
def _no_deprecation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # else RetryAfter and its kin warn


@pytest.fixture
def in_memory() -> SessionManager[Any]:
    return SessionManager()


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


# -- odd applications, builders and contexts


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
