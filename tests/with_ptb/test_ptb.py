"""python-telegram-bot's room, through real applications: what a handler sees, and what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from conftest import callback_query, message, poll, run_client

from session_sync import (
    DiskStorage,
    MemoryStorage,
    SessionAwaitError,
    SessionDeadlockError,
    SessionKeyError,
    SessionManager,
    StorageKey,
)
from session_sync.locks.lock import LockHandle
from session_sync.ptb import SessionContext, install, session_filter
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")

KEY = "user:1:chat:1"
# Tasks have names since PTB 20.4.
HAS_NAMES = "name" in inspect.signature(ext.Application.create_task).parameters
NAMED = {"name": "named"} if HAS_NAMES else {}
SOON = 20  # seconds until a test gives up waiting for what has to come

Build = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _no_deprecation(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture(params=["memory", "disk"])
def sessions(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    storage = MemoryStorage() if request.param == "memory" else DiskStorage(tmp_path / "s")
    with SessionManager(storage=storage) as manager:
        yield manager


@pytest.fixture
def in_memory() -> SessionManager[Any]:
    return SessionManager()


# -- install


def test_every_kind_of_update_has_its_session(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        pressed = ext.CallbackQueryHandler(count)
        async with running(api, sessions, on_text(count), pressed) as app:
            await process(app, message(), callback_query(), message())

    asyncio.run(main())
    assert stored(sessions) == {"counter": 3}


class OwnContext(ext.CallbackContext):
    """A bot's own context, the way PTB's example makes one."""

    __slots__ = ("greeting",)

    @classmethod
    def from_update(cls, update: object, application: Any) -> Any:
        context = super().from_update(update, application)
        context.greeting = "hello"
        return context


class DerivedContext(SessionContext[Any]):
    greeting = "hello"


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


@pytest.mark.parametrize("installed", ["first", "last"])
@pytest.mark.parametrize("context_class", [OwnContext, DerivedContext])
def test_own_classes_are_kept_whenever_they_are_chosen(
    api: OfflineBotAPI, in_memory: SessionManager[Any], installed: str, context_class: Any
) -> None:
    seen: list[str] = []

    async def greet(update: Any, context: Any) -> None:
        assert isinstance(context, context_class)
        assert isinstance(context.application, OwnApplication)
        assert context.user_data == {}
        assert isinstance(context.bot_data, BotData)
        context.session.greeting = context.greeting

    class BotData(dict):
        pass

    def choose(builder: Any) -> Any:
        types = ext.ContextTypes(context=context_class, bot_data=BotData)
        return builder.context_types(types).application_class(OwnApplication, {"seen": seen})

    async def main() -> None:
        made = builder(api)
        made = choose(install(made, in_memory)) if installed == "first" else made
        made = install(choose(made), in_memory) if installed == "last" else made
        async with made.build() as app:
            app.add_handler(on_text(greet))
            await process(app, message())

    asyncio.run(main())
    assert stored(in_memory) == {"greeting": "hello"}
    assert seen == ["before", "after"]


def test_install_keeps_the_builder_and_what_is_chosen_in_it(api: OfflineBotAPI) -> None:
    plain = builder(api)
    same = install(plain, SessionManager())
    assert same is plain
    assert isinstance(same, ext.ApplicationBuilder)
    first, second = same.build(), same.build()  # the choices are the same the second time
    assert type(first).__mro__[1:] == type(second).__mro__[1:]
    assert issubclass(first.context_types.context, SessionContext)


def test_what_cannot_be_installed_is_refused(api: OfflineBotAPI) -> None:
    with pytest.raises(TypeError, match=r"takes an ApplicationBuilder .* not Application; call it"):
        install(builder(api).build(), SessionManager())
    installed = install(builder(api), SessionManager())
    with pytest.raises(RuntimeError, match="has sessions already"):
        install(installed, SessionManager())


def test_a_ptb_without_our_hooks_is_refused(
    api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ext.Application, "_Application__create_task_callback")
    with pytest.raises(RuntimeError, match="pip install --upgrade 'session-sync"):
        install(builder(api), SessionManager())


# -- context.session


def test_the_session_can_be_replaced_and_emptied(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    seen: list[Any] = []

    async def handle(update: Any, context: Any) -> None:
        seen.append(dict(context.session))
        match update.message.text:
            case "replace":
                context.session = {"a": 1}
            case "add":
                context.session |= {"b": 2}
            case "empty":
                context.session = None
            case "nonsense":
                with pytest.raises(TypeError, match=f"'{KEY}' .* not set to int"):
                    context.session = 5

    async def main() -> None:
        async with running(api, in_memory, on_text(handle)) as app:
            for text in ("replace", "add", "nonsense", "empty", "look"):
                await process(app, message(text=text))

    asyncio.run(main())
    assert seen == [{}, {"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2}, {}]
    assert stored(in_memory) is None


def asks(errors: list[Any]) -> Any:
    async def handler(update: Any, context: Any) -> None:
        try:
            errors.append(context.session)
        except SessionKeyError as error:
            errors.append(error)

    return handler


def test_an_update_without_a_key_is_handled_and_asking_says_why_there_is_none(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    errors: list[Any] = []

    async def main() -> None:
        handlers = [ext.PollHandler(asks(errors)), ext.StringCommandHandler("go", asks(errors))]
        async with running(api, in_memory, *handlers) as app:
            await process(app, poll())
            await app.process_update("/go")

    asyncio.run(main())
    assert [type(error) for error in errors] == [SessionKeyError] * 2
    assert "this Update belongs to no session" in str(errors[0])
    assert "this str belongs to no session" in str(errors[1])


def test_a_job_runs_outside_and_is_told_how_to_get_a_session(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    errors: list[Any] = []

    async def main() -> None:
        done, finished = Gate(), Gate()

        async def job(context: Any) -> None:
            await asks(errors)(None, context)
            # Made inside a handler that is still running: this waits for it, it does not join.
            async with in_memory.session_scope(StorageKey(user=1, chat=1)) as session:
                session.log = [*session.get("log", ()), "job"]
            finished.open()

        async def start(update: Any, context: Any) -> None:
            context.job_queue.run_once(job, 0)
            await done()
            context.session.log = ["handler"]

        async with running(api, in_memory, on_text(start)) as app:
            handling = asyncio.create_task(process(app, message()))
            await done.reached()
            while not errors:
                await asyncio.sleep(0.01)
            await settle()
            done.open()
            await handling
            await asyncio.wait_for(finished(), SOON)

    asyncio.run(main())
    assert [type(error) for error in errors] == [SessionKeyError]
    assert "@sessions.with_session" in str(errors[0])
    assert stored(in_memory) == {"log": ["handler", "job"]}


def test_what_a_conversations_time_out_calls_has_no_session_but_can_open_one(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    errors: list[Any] = []

    async def main() -> None:
        over = Gate()

        async def begin(update: Any, context: Any) -> int:
            context.session.log = ["begin"]
            return 1

        @in_memory.with_session
        async def timed_out(update: Any, context: Any, session: Any) -> None:
            await asks(errors)(update, context)
            session.log.append("timed out")
            over.open()

        conversation = ext.ConversationHandler(
            [on_text(begin)],
            {1: [], ext.ConversationHandler.TIMEOUT: [on_text(timed_out)]},
            [],
            conversation_timeout=timedelta(seconds=0.05),
        )
        async with running(api, in_memory, conversation) as app:
            await process(app, message())
            await asyncio.wait_for(over(), SOON)

    asyncio.run(main())
    assert [type(error) for error in errors] == [SessionKeyError]
    assert "has been handled and its session is closed" in str(errors[0])
    assert stored(in_memory) == {"log": ["begin", "timed out"]}


def test_a_released_session_can_still_be_read(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def handle(update: Any, context: Any) -> None:
        context.session.a = 1
        await context.session.arelease()
        assert context.session.a == 1
        async with in_memory.session_scope(update) as session:
            session.b = 2

    async def main() -> None:
        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())

    asyncio.run(main())
    assert stored(in_memory) == {"a": 1, "b": 2}


# -- one update is one unit


@pytest.mark.parametrize("by", ["handler", "defaults", "create_task", "conversation"])
def test_non_blocking_work_keeps_the_session_open(
    api: OfflineBotAPI, sessions: SessionManager[Any], by: str
) -> None:
    async def main() -> None:
        gate = Gate()

        async def work(update: Any, context: Any) -> None:
            if update.message.text == "slow":
                context.session.log = ["begun"]
                await gate()
                context.session.log.append("ended")
            else:
                context.session.log.append("next")

        async def start_task(update: Any, context: Any) -> None:
            context.application.create_task(work(update, context), update=update)

        def defaults(builder: Any) -> Any:
            return builder.defaults(ext.Defaults(block=False)) if by == "defaults" else builder

        handler = on_text(work, block=False)
        if by == "defaults":
            handler = on_text(work)
        elif by == "create_task":
            handler = on_text(start_task)
        elif by == "conversation":
            states = {1: [on_text(work, block=False)]}
            handler = ext.ConversationHandler([on_text(work, block=False)], states, [])
        async with running(api, sessions, handler, build=defaults) as app:
            await asyncio.wait_for(process(app, message(text="slow")), SOON)  # not held up
            await gate.reached()
            following = asyncio.create_task(process(app, message(text="next")))
            await settle()
            other = process(app, message(user=2, text="slow"))
            assert not following.done()
            gate.open()
            await asyncio.wait_for(asyncio.gather(following, other), SOON)

    asyncio.run(main())
    assert stored(sessions) == {"log": ["begun", "ended", "next"]}


def test_a_task_that_is_not_tied_to_the_update_runs_outside(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        gate = Gate()

        async def task(update: Any) -> None:
            async with in_memory.session_scope(update) as session:  # waits for the handler
                session.log.append("task")

        async def handle(update: Any, context: Any) -> None:
            context.application.create_task(task(update))
            other = telegram.Update.de_json(message(), context.bot)
            context.application.create_task(task(update), update=other)
            await gate()
            context.session.log = ["handler"]

        async with running(api, in_memory, on_text(handle)) as app:
            handling = asyncio.create_task(process(app, message()))
            await gate.reached()
            await settle()
            gate.open()
            await handling
        # stop() has waited for the tasks

    asyncio.run(main())
    assert stored(in_memory) == {"log": ["handler", "task", "task"]}


def test_a_task_of_asyncio_joins(api: OfflineBotAPI, in_memory: SessionManager[Any]) -> None:
    async def part(update: Any, name: str) -> None:
        async with in_memory.session_scope(update) as session:
            parts = session.get("parts", [])
            await asyncio.sleep(0)
            session.parts = [*parts, name]

    async def handle(update: Any, context: Any) -> None:
        await asyncio.gather(*(part(update, name) for name in "abc"))
        assert context.session.parts == ["a", "b", "c"]

    async def main() -> None:
        async with running(api, in_memory, on_text(handle)) as app:
            await process(app, message())

    asyncio.run(main())
    assert stored(in_memory) == {"parts": ["a", "b", "c"]}


# -- errors


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


# -- the ways in which updates come


def processor() -> Any:
    """Somebody's own update processor."""
    if not hasattr(ext, "BaseUpdateProcessor"):
        pytest.skip("PTB has update processors since 20.4")

    class Processor(ext.BaseUpdateProcessor):
        async def do_process_update(self, update: object, coroutine: Any) -> None:
            await coroutine

        async def initialize(self) -> None: ...

        async def shutdown(self) -> None: ...

    return Processor(8)


async def start_polling(app: Any) -> None:
    await app.updater.start_polling()


async def start_webhook(app: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/hook"
    await app.updater.start_webhook("127.0.0.1", port, "hook", webhook_url=url)


async def arrive(app: Any, way: str, updates: list[dict[str, Any]]) -> None:
    """Feed what the updater does not fetch by itself."""
    if way == "queue":
        await queue(app, *updates)
    elif way == "process_update":
        await asyncio.gather(*(process(app, update) for update in updates))


async def no_updater(app: Any) -> None: ...


@pytest.mark.parametrize("concurrent", [False, True, "processor"])
@pytest.mark.parametrize("way", ["polling", "webhook", "queue", "process_update"])
def test_it_works_however_updates_come(
    api: OfflineBotAPI, in_memory: SessionManager[Any], way: str, concurrent: Any
) -> None:
    begin = {"polling": start_polling, "webhook": start_webhook}
    begin |= {"queue": no_updater, "process_update": no_updater}

    async def answer(update: Any, context: Any) -> None:
        await slow_count(update, context)
        await update.message.reply_text(str(context.session.counter))

    def build(builder: Any) -> Any:
        wanted = processor() if concurrent == "processor" else concurrent
        return builder.concurrent_updates(wanted) if concurrent else builder

    async def main() -> None:
        async with running(api, in_memory, on_text(answer), build=build) as app:
            alex = api.user(1)
            await begin[way](app)
            sent = [alex.send(str(number)) for number in range(5)]
            await arrive(app, way, [{"update_id": n, "message": sent[n]} for n in range(5)])
            replies = [(await alex.areply()).text for _ in sent]
            assert sorted(replies) == ["1", "2", "3", "4", "5"]
            if app.updater.running:
                await app.updater.stop()

    run_client(main())
    assert stored(in_memory) == {"counter": 5, "seen": ["0", "1", "2", "3", "4"]}


def test_every_handler_class_of_ptb_gives_a_session(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """Each that is fed with updates of a user; the others are tested above (polls, strings)."""
    user = {"id": 1, "is_bot": False, "first_name": "Alex"}
    chat = {"id": 1, "type": "private"}
    member = {"status": "member", "user": user}
    answered = {"poll_id": "1", "user": user, "option_ids": [0], "option_persistent_ids": ["a"]}
    group = {"id": -100, "type": "supergroup", "title": "x"}
    changed = {
        "chat": chat,
        "from": user,
        "date": 1,
        "old_chat_member": member,
        "new_chat_member": {"status": "left", "user": user},
    }
    handlers: dict[str, tuple[Any, dict[str, Any]]] = {
        "MessageHandler": (on_text(count), message()),
        "CommandHandler": (
            ext.CommandHandler("go", count),
            message(text="/go", entities=[{"type": "bot_command", "offset": 0, "length": 3}]),
        ),
        "PrefixHandler": (ext.PrefixHandler("!", "go", count), message(text="!go")),
        "TypeHandler": (ext.TypeHandler(telegram.Update, count), message()),
        "CallbackQueryHandler": (ext.CallbackQueryHandler(count), callback_query()),
        "InlineQueryHandler": (
            ext.InlineQueryHandler(count),
            {"inline_query": {"id": "1", "from": user, "query": "", "offset": ""}},
        ),
        "ChosenInlineResultHandler": (
            ext.ChosenInlineResultHandler(count),
            {"chosen_inline_result": {"result_id": "1", "from": user, "query": ""}},
        ),
        "PollAnswerHandler": (
            ext.PollAnswerHandler(count),
            {"poll_answer": answered},
        ),
        "PreCheckoutQueryHandler": (
            ext.PreCheckoutQueryHandler(count),
            {
                "pre_checkout_query": {
                    "id": "1",
                    "from": user,
                    "currency": "EUR",
                    "total_amount": 1,
                    "invoice_payload": "x",
                }
            },
        ),
        "ShippingQueryHandler": (
            ext.ShippingQueryHandler(count),
            {
                "shipping_query": {
                    "id": "1",
                    "from": user,
                    "invoice_payload": "x",
                    "shipping_address": {
                        "country_code": "DE",
                        "state": "",
                        "city": "x",
                        "street_line1": "",
                        "street_line2": "",
                        "post_code": "1",
                    },
                }
            },
        ),
        "ChatMemberHandler": (
            ext.ChatMemberHandler(count, ext.ChatMemberHandler.ANY_CHAT_MEMBER),
            {"chat_member": changed},
        ),
        "ChatJoinRequestHandler": (
            ext.ChatJoinRequestHandler(count),
            {"chat_join_request": {"chat": group, "from": user, "user_chat_id": 1, "date": 1}},
        ),
    }
    if hasattr(ext, "MessageReactionHandler"):  # PTB 20.8
        reaction = {"chat": chat, "message_id": 1, "date": 1, "user": user}
        handlers["MessageReactionHandler"] = (
            ext.MessageReactionHandler(count),
            {"message_reaction": {**reaction, "old_reaction": [], "new_reaction": []}},
        )
        source = {"source": "premium", "user": user}
        boost = {"boost_id": "1", "add_date": 1, "expiration_date": 2, "source": source}
        handlers["ChatBoostHandler"] = (
            ext.ChatBoostHandler(count),
            {"chat_boost": {"chat": chat, "boost": boost}},
        )
    if hasattr(ext, "BusinessConnectionHandler"):  # PTB 21.1
        connection = {"id": "b", "user": user, "user_chat_id": 1, "date": 1, "is_enabled": True}
        connection["can_reply"] = True
        handlers["BusinessConnectionHandler"] = (
            ext.BusinessConnectionHandler(count),
            {"business_connection": connection},
        )
        deleted = {"business_connection_id": "b", "chat": chat, "message_ids": [1]}
        handlers["BusinessMessagesDeletedHandler"] = (
            ext.BusinessMessagesDeletedHandler(count),
            {"deleted_business_messages": deleted},
        )
    if hasattr(ext, "PaidMediaPurchasedHandler"):  # PTB 21.6
        handlers["PaidMediaPurchasedHandler"] = (
            ext.PaidMediaPurchasedHandler(count),
            {"purchased_paid_media": {"from": user, "paid_media_payload": "x"}},
        )
    if hasattr(ext, "ManagedBotUpdatedHandler"):
        made = {"id": 5, "is_bot": True, "first_name": "Bot", "username": "made_bot"}
        handlers["ManagedBotUpdatedHandler"] = (
            ext.ManagedBotUpdatedHandler(count),
            {"managed_bot": {"user": user, "bot": made}},
        )
    elsewhere = {"BaseHandler", "ConversationHandler", "PollHandler", "StringCommandHandler"}
    elsewhere |= {"StringRegexHandler"}
    known = {name for name in vars(ext) if name.endswith("Handler")}
    assert known - elsewhere - handlers.keys() == set()

    async def main() -> None:
        for name, (handler, update) in handlers.items():
            async with running(api, in_memory, handler) as app:
                app.add_error_handler(fail)
                before = total(in_memory)
                await process(app, {"update_id": 1, **update})
                assert total(in_memory) == before + 1, name

    asyncio.run(main())


_failures: list[BaseException] = []


async def fail(update: Any, context: Any) -> None:
    """PTB only logs what an error handler raises, so `running` raises it."""
    _failures.append(context.error)


def total(sessions: SessionManager[Any]) -> int:
    values = [stored(sessions, key) for key in sessions.storage.keys()]  # type: ignore[attr-defined]
    return sum(value["counter"] for value in values)


@pytest.mark.parametrize("per_message", [False, True])
def test_conversations_entry_points_states_fallbacks_and_nested_ones(
    api: OfflineBotAPI, in_memory: SessionManager[Any], per_message: bool
) -> None:
    def log(name: str, state: Any) -> Any:
        async def handler(update: Any, context: Any) -> Any:
            context.session.log = [*context.session.get("log", ()), name]
            return state

        return handler

    def on(data: str, callback: Any) -> Any:
        if per_message:
            return ext.CallbackQueryHandler(callback, pattern=f"^{data}$")
        return ext.MessageHandler(ext.filters.Regex(f"^{data}$"), callback)

    end = ext.ConversationHandler.END
    inner = ext.ConversationHandler(
        [on("inner", log("inner", 1))],
        {1: [on("done", log("done", end))]},
        [],
        map_to_parent={end: 2},
        per_message=per_message,
    )
    # PTB warns of a conversation inside one with per_message.
    nested = [on("inner", log("inner", 1)), on("done", log("done", 2))] if per_message else [inner]
    outer = ext.ConversationHandler(
        [on("begin", log("begin", 1))],
        {1: nested, 2: [on("state", log("state", 2))]},
        [on("cancel", log("cancel", end))],
        per_message=per_message,
    )
    words = ["begin", "inner", "done", "state", "cancel"]

    def update(word: str) -> dict[str, Any]:
        if not per_message:
            return message(text=word)
        pressed = callback_query(data=word)
        pressed["callback_query"]["message"]["message_id"] = 1
        return pressed

    async def main() -> None:
        async with running(api, in_memory, outer) as app:
            await process(app, *map(update, words))

    asyncio.run(main())
    assert stored(in_memory) == {"log": words}


# -- concurrency


def test_nothing_is_lost_and_the_order_kept_with_concurrent_updates(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    """1,000 updates, 10 users; with the lock taken out this loses (see the next test)."""

    async def main() -> None:
        build = lambda builder: builder.concurrent_updates(1000)  # noqa: E731
        async with running(api, sessions, on_text(slow_count), build=build) as app:
            texts = [str(number) for number in range(100)]
            await queue(app, *(message(user, text) for text in texts for user in range(1, 11)))

    asyncio.run(main())
    for user in range(1, 11):
        expected = {"counter": 100, "seen": [str(number) for number in range(100)]}
        assert stored(sessions, f"user:{user}:chat:{user}") == expected


def test_the_same_without_the_lock_loses(
    api: OfflineBotAPI, in_memory: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LockHandle, "try_acquire", lambda handle: True)

    async def main() -> None:
        async with running(api, in_memory, on_text(slow_count)) as app:
            await asyncio.gather(*(process(app, message()) for _ in range(100)))

    asyncio.run(main())
    assert stored(in_memory)["counter"] < 100


def test_a_flood_of_one_user_holds_up_nobody_and_takes_no_threads(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    """2,000 queued updates of one user; `concurrent_updates` is far less."""

    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            if update.message.text == "0":
                await gate()
            await slow_count(update, context)

        build = lambda builder: builder.concurrent_updates(8)  # noqa: E731
        async with running(api, sessions, on_text(handle), build=build) as app:
            before = threading.active_count()
            flood = [message(1, str(number)) for number in range(2000)]
            flooding = asyncio.create_task(queue(app, *flood))
            await gate.reached()
            await asyncio.wait_for(process(app, message(2, "a"), message(3, "b")), SOON)
            await app.update_queue.put(telegram.Update.de_json(message(4, "c"), app.bot))
            while stored(sessions, "user:4:chat:4") is None:
                await asyncio.sleep(0.01)
            # Its pools have 16 threads each; 1,999 updates wait.
            assert threading.active_count() - before <= 32
            assert stored(sessions) is None
            gate.open()
            await asyncio.wait_for(flooding, 60)

    asyncio.run(main())
    seen = stored(sessions)["seen"]
    assert seen == [str(number) for number in range(2000)]
    assert stored(sessions, "user:4:chat:4")["seen"] == ["c"]


def test_a_store_that_hangs_delays_its_own_key_only(api: OfflineBotAPI) -> None:
    class Hanging(MemoryStorage):
        blocking = True  # type: ignore[misc]

        def __init__(self) -> None:
            super().__init__()
            self.hangs = threading.Event()
            self.goes_on = threading.Event()

        def load(self, key: str) -> Any:
            if key == KEY:
                self.hangs.set()
                assert self.goes_on.wait(SOON)
            return super().load(key)

    storage = Hanging()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    lags: list[float] = []

    async def probe() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - before)

    async def main() -> None:
        build = lambda builder: builder.concurrent_updates(100)  # noqa: E731
        async with running(api, sessions, on_text(slow_count), build=build) as app:
            probing = asyncio.create_task(probe())
            await settle()
            hanging = asyncio.create_task(process(app, message(1)))
            assert await asyncio.to_thread(storage.hangs.wait, SOON)
            for user in range(2, 50):
                await asyncio.wait_for(process(app, message(user)), SOON)
            assert not hanging.done()
            probing.cancel()
            storage.goes_on.set()
            await hanging

    asyncio.run(main())
    assert stored(sessions)["counter"] == 1
    # A loop that stands still while the store hangs would not have come so far; the worst half of
    # them may be the machine's.
    assert sorted(lags)[len(lags) // 2] < 0.05


# -- other doors


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


# -- the end


@pytest.mark.parametrize("block", [True, False])
def test_stop_lets_running_updates_end_and_saves_them(
    api: OfflineBotAPI, sessions: SessionManager[Any], block: bool
) -> None:
    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            await gate()
            await slow_count(update, context)

        build = lambda builder: builder.concurrent_updates(8)  # noqa: E731
        async with running(api, sessions, on_text(handle, block=block), build=build) as app:
            for number in range(3):
                update = telegram.Update.de_json(message(text=str(number)), app.bot)
                await app.update_queue.put(update)
            await gate.reached()
            await settle()
            stopping = asyncio.create_task(app.stop())
            await settle()
            assert not stopping.done()
            gate.open()
            await asyncio.wait_for(stopping, SOON)
            expected = {"counter": 3, "seen": ["0", "1", "2"]}
            if block:
                assert stored(sessions) == expected
        assert len(sessions.locks) == 0

    asyncio.run(main())


def test_a_task_that_never_began_is_saved_before_stop_returns(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        tasks: list[Any] = []

        async def never() -> None: ...

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


# -- what PTB does for a bot that does not ask for sessions


class Story:
    """What a bot that does not ask for its session goes through, and what it logs."""

    def __init__(self, api: OfflineBotAPI, path: Any, build: Build) -> None:
        self.log: list[Any] = []
        made = builder(api).persistence(ext.PicklePersistence(path, update_interval=1000))
        self._app = app = build(made).build()
        fails, stops = self.says("b", KeyError()), self.says("c", ext.ApplicationHandlerStop())
        app.add_handler(on_text(self.says("first")))
        app.add_handler(on_text(self.says("shadowed")))
        app.add_handler(ext.MessageHandler(ext.filters.Regex("raise"), fails), 1)
        app.add_handler(ext.MessageHandler(ext.filters.Regex("stop"), stops), 1)
        app.add_handler(ext.MessageHandler(ext.filters.Regex("task"), self.tasks), 1)
        app.add_handler(on_text(self.says("last")), 2)
        app.add_error_handler(self.on_error)

    def says(self, name: str, then: Exception | None = None) -> Any:
        async def handler(update: Any, context: Any) -> None:
            self.log.append((name, update.message.text, dict(context.user_data)))
            context.user_data["last"] = name
            if then is not None:
                raise then

        return handler

    async def on_error(self, update: Any, context: Any) -> None:
        where = None if update is None else update.message.text
        self.log.append(("error", where, repr(context.error), context.job is not None))
        if where == "raise and stop":
            raise ext.ApplicationHandlerStop

    async def tasks(self, update: Any, context: Any) -> None:
        create_task = context.application.create_task
        self.log.append(await create_task(self.task()))
        self.log.append(await create_task(self.task(), update=update))
        with contextlib.suppress(LookupError):
            await create_task(self.task(LookupError("task")), update, **NAMED)

    async def task(self, then: Exception | None = None) -> int:
        self.log.append("task")
        if then is not None:
            raise then
        return 5

    async def job(self, context: Any) -> None:
        self.log.append(("job", context.user_data, context.chat_data))
        raise ValueError("job")

    async def tell(self) -> list[Any]:
        app = self._app
        async with app:
            await app.start()
            for text in ("a", "raise", "stop", "task", "raise and stop"):
                await queue(app, message(text=text))
                await settle()
            await app.job_queue.run_once(self.job, 1000, user_id=1, chat_id=1).run(app)
            await app.stop()
        self.log.append(app.running)
        return self.log


@pytest.mark.parametrize("concurrent", [False, True])
def test_ptb_behaves_as_without_install(
    api: OfflineBotAPI, concurrent: bool, caplog: Any, tmp_path: Any
) -> None:
    caplog.set_level(logging.INFO, "telegram.ext")

    def story(name: str, build: Build) -> list[Any]:
        caplog.clear()
        told = Story(api, tmp_path / name, lambda b: build(b.concurrent_updates(concurrent)))
        return [*asyncio.run(told.tell()), [record.getMessage() for record in caplog.records]]

    plain = story("plain", lambda builder: builder)
    assert story("installed", lambda builder: install(builder, SessionManager())) == plain
    assert ("error", "raise", "KeyError()", False) in plain
    assert ("error", None, "ValueError('job')", True) in plain
