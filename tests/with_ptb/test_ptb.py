"""python-telegram-bot, through real applications: what a handler sees, and what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from datetime import timedelta
from typing import Any

import ptb_tools
import pytest
from conftest import callback_query, message, poll
from ptb_tools import (
    KEY,
    SOON,
    Build,
    Gate,
    OwnApplication,
    OwnContext,
    asks,
    builder,
    count,
    on_text,
    process,
    queue,
    running,
    settle,
    slow_count,
    stored,
)

from session_sync import SessionKeyError, SessionManager, StorageKey
from session_sync.ptb import SessionContext, install
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")


_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
sessions = pytest.fixture(params=ptb_tools.STORES)(ptb_tools.make_sessions)
in_memory = pytest.fixture(ptb_tools.make_in_memory)

# Tasks have names since PTB 20.4.
HAS_NAMES = "name" in inspect.signature(ext.Application.create_task).parameters

NAMED = {"name": "named"} if HAS_NAMES else {}


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


class DerivedContext(SessionContext[Any]):
    greeting = "hello"


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
