"""`concurrent_updates` of python-telegram-bot: it limits the handlers that run, and an update that
waits for its user's session occupies none of its slots."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import callback_query, message, poll
from ptb_tools import (
    KEY,
    SOON,
    Gate,
    builder,
    count,
    ext,
    on_text,
    queue,
    running,
    settle,
    stored,
    telegram,
)
from stores import OwnStorage
from waiting import until_async

from session_sync import MemoryStorage, SessionManager, SQLiteStorage, StorageKey, by_chat
from session_sync.lifecycle.current import in_handler
from session_sync.ptb import install
from session_sync.testing import OfflineBotAPI

HAS_PROCESSORS = hasattr(ext, "BaseUpdateProcessor")  # since PTB 20.4
needs_processors = pytest.mark.skipif(not HAS_PROCESSORS, reason="PTB has them since 20.4")


@pytest.fixture(autouse=True)
def _no_deprecation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # else RetryAfter and its kin warn


@pytest.fixture(params=["memory", "sqlite"])
def sessions(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    storage = MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "s.db")
    with SessionManager(storage=storage) as manager:
        yield manager


@pytest.fixture
def in_memory() -> SessionManager[Any]:
    return SessionManager()


def slots(number: Any) -> Callable[[Any], Any]:
    return lambda made: made.concurrent_updates(number)


async def put(app: Any, *updates: dict[str, Any]) -> None:
    """As the updater does it; returns before they are handled."""
    for update in updates:
        await app.update_queue.put(telegram.Update.de_json(update, app.bot))


def key(user: int) -> str:
    return str(StorageKey(user=user, chat=user))


class Running:
    """How many handlers run, and how many have run at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


def test_updates_that_wait_for_their_user_occupy_no_slot(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        gates = {1: Gate(), 2: Gate()}
        seen: dict[int, list[str]] = {}

        async def handle(update: Any, context: Any) -> None:
            user = update.effective_user.id
            seen.setdefault(user, []).append(update.message.text)
            context.session.counter = context.session.get("counter", 0) + 1
            if user in gates:
                await gates[user]()

        async with running(api, sessions, on_text(handle), build=slots(3)) as app:
            texts = [str(number) for number in range(100)]
            await put(app, *(message(user, text) for text in texts for user in (1, 2)))
            for gate in gates.values():
                await gate.reached()
            await put(app, *(message(3, text) for text in texts))
            await until_async(lambda: len(seen.get(3, [])) == 100)
            before = [seen[1][:], seen[2][:]]
            for gate in gates.values():
                gate.open()
            await asyncio.wait_for(app.update_queue.join(), SOON)
            assert before == [["0"], ["0"]]
            assert seen == {1: texts, 2: texts, 3: texts}
        for user in (1, 2, 3):
            assert stored(sessions, key(user)) == {"counter": 100}

    asyncio.run(main())


@pytest.mark.parametrize("limit", [2, 5])
def test_never_more_handlers_run_than_the_builder_was_told(
    api: OfflineBotAPI, sessions: SessionManager[Any], limit: int
) -> None:
    async def main() -> None:
        running_now, full = Running(), asyncio.Event()

        async def handle(update: Any, context: Any) -> None:
            with running_now:
                if running_now.now == limit:
                    full.set()
                await full.wait()
                await settle()
                await count(update, context)

        async with running(api, sessions, on_text(handle), build=slots(limit)) as app:
            assert app.concurrent_updates == limit
            users = range(1, 11)
            await asyncio.wait_for(
                queue(app, *(message(user) for _ in range(5) for user in users)), SOON
            )
        assert running_now.most == limit
        assert [stored(sessions, key(user)) for user in users] == [{"counter": 5}] * 10

    asyncio.run(main())


def test_an_update_that_waits_for_a_job_or_a_thread_occupies_no_slot(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """And it is handled when another thread unlocks the key."""

    async def main() -> None:
        has_it, go_on = threading.Event(), threading.Event()

        def job() -> None:
            with in_memory.session_scope(key(1)) as session:
                has_it.set()
                assert go_on.wait(SOON)
                session.job = True

        thread = threading.Thread(target=job)
        thread.start()
        try:
            assert await asyncio.to_thread(has_it.wait, SOON)
            async with running(api, in_memory, on_text(count), build=slots(2)) as app:
                await put(app, *(message(1) for _ in range(5)))
                await put(app, message(2))
                await until_async(lambda: stored(in_memory, key(2)))
                assert in_memory.locks.waiters(key(1)) == 5
                go_on.set()
                await asyncio.wait_for(app.update_queue.join(), SOON)
        finally:
            go_on.set()
            thread.join()
        assert stored(in_memory) == {"job": True, "counter": 5}

    asyncio.run(main())


# -- what has a slot never waits for what has none


def opens(sessions: SessionManager[Any], gate: Gate) -> Any:
    """A handler that opens the session of user 9 as soon as the gate is open."""

    async def handle(update: Any, context: Any) -> None:
        await gate()
        async with sessions.session_scope(key(9)) as session:
            session.seen = session.get("seen", 0) + 1

    return handle


def opens_when_released(sessions: SessionManager[Any], gate: Gate) -> Any:
    handle = opens(sessions, gate)

    async def release_first(update: Any, context: Any) -> None:
        await context.session.arelease()
        await handle(update, context)

    return release_first


def opens_in_a_thread(sessions: SessionManager[Any], gate: Gate) -> Any:
    async def handle(update: Any, context: Any) -> None:
        await gate()

        def work() -> None:
            with sessions.session_scope(key(9)) as session:
                session.seen = session.get("seen", 0) + 1

        await asyncio.to_thread(work)

    return handle


@pytest.mark.parametrize(
    ("opening", "updates"),
    [
        (opens, "messages"),
        (opens, "polls"),  # which have no session
        (opens_when_released, "messages"),
        (opens_in_a_thread, "polls"),
    ],
)
def test_a_handler_opens_a_session_whose_update_waits_for_a_slot(
    api: OfflineBotAPI, opening: Any, updates: str
) -> None:
    """All slots are taken by such handlers, so that update waits until one of them has ended."""
    sessions = SessionManager(lock_timeout=SOON)

    async def main() -> None:
        gate, log = Gate(), []

        async def log_it(update: Any, context: Any) -> None:
            log.append(context.session.get("seen", 0))

        handle = opening(sessions, gate)
        handlers = [
            ext.MessageHandler(ext.filters.Regex("open"), handle),
            ext.PollHandler(handle),
            ext.MessageHandler(ext.filters.Regex("hi"), log_it),
        ]
        async with running(api, sessions, *handlers, build=slots(2)) as app:
            made = [message(1, "open"), message(2, "open")]
            await put(app, *(made if updates == "messages" else [poll(), poll()]))
            await gate.reached()
            await put(app, message(9))
            await settle()
            is_kept, before = sessions.locks.is_locked(key(9)), log[:]
            gate.open()
            await asyncio.wait_for(app.update_queue.join(), SOON / 2)
        assert is_kept
        assert before == []
        # It came when the first of them had ended.
        assert log in ([1], [2])
        assert stored(sessions, key(9)) == {"seen": 2}

    asyncio.run(main())


def test_an_update_that_was_passed_is_handled_next(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """A handler takes the session of an update that waits for a slot, and has it still when there
    is a slot."""

    async def main() -> None:
        first, has_it = Gate(), Gate()

        async def handle(update: Any, context: Any) -> None:
            text = update.message.text
            if text == "wait":
                await first()
            elif text == "take":
                await first()
                async with in_memory.session_scope(key(9)) as session:
                    session.log = [text]
                    await has_it()
            else:
                context.session.log.append(text)

        async with running(api, in_memory, on_text(handle), build=slots(2)) as app:
            await put(app, message(1, "take"), message(2, "wait"))
            await first.reached()
            await put(app, message(9, "a"), message(9, "b"))
            await settle()
            first.open()
            await has_it.reached()
            await settle()
            has_it.open()
            await asyncio.wait_for(app.update_queue.join(), SOON)
        assert stored(in_memory, key(9)) == {"log": ["take", "a", "b"]}

    asyncio.run(main())


def test_a_job_that_a_handler_has_made_waits_like_any_other(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """It has no slot, so it passes no update that waits for one."""

    async def main() -> None:
        inside: list[bool] = []

        async def job(context: Any) -> None:
            inside.append(in_handler.get())

        async def handle(update: Any, context: Any) -> None:
            inside.append(in_handler.get())
            context.job_queue.run_once(job, 0)

        async with running(api, in_memory, on_text(handle), build=slots(2)) as app:
            await put(app, message())
            await until_async(lambda: len(inside) == 2)
        assert inside == [True, False]

    asyncio.run(main())


# -- what a bot has chosen is kept


if HAS_PROCESSORS:

    class OwnProcessor(ext.BaseUpdateProcessor):
        """Notes what it is given, and how much of that at a time."""

        def __init__(self, max_concurrent_updates: int) -> None:
            super().__init__(max_concurrent_updates)
            self.log: list[str] = []
            self.running = Running()
            self.tasks: list[Any] = []  # kept, with all that they have

        async def do_process_update(self, update: Any, coroutine: Any) -> None:
            self.tasks.append(asyncio.current_task())
            with self.running:
                await asyncio.sleep(0)
                if update.effective_message.text == "drop":
                    coroutine.close()
                    return
                self.log.append(update.effective_message.text)
                await coroutine

        async def initialize(self) -> None:
            self.log.append("initialize")

        async def shutdown(self) -> None:
            self.log.append("shutdown")

    class InTasks(ext.SimpleUpdateProcessor):
        """Handles every update in a task that it does not wait for."""

        def __init__(self, max_concurrent_updates: int) -> None:
            super().__init__(max_concurrent_updates)
            self.tasks: list[asyncio.Task[None]] = []

        async def do_process_update(self, update: Any, coroutine: Any) -> None:
            self.tasks.append(asyncio.ensure_future(coroutine))


@needs_processors
def test_an_update_processor_of_the_bots_own_is_kept(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        own = OwnProcessor(2)
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            await count(update, context)
            if update.message.text == "wait":
                await gate()

        async with running(api, sessions, on_text(handle), build=slots(own)) as app:
            assert app.update_processor is own
            await put(app, *(message(1, text) for text in ("wait", "drop", "a", "b")))
            await gate.reached()
            await put(app, message(2, "c"))
            await until_async(lambda: stored(sessions, key(2)))
            gate.open()
            await asyncio.wait_for(app.update_queue.join(), SOON)
        assert own.log == ["initialize", "wait", "c", "a", "b", "shutdown"]
        assert own.running.most == 2
        assert stored(sessions) == {"counter": 3}

    asyncio.run(main())


@needs_processors
def test_a_processor_that_does_not_wait_for_the_handlers(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    async def main() -> None:
        own = InTasks(2)
        async with running(api, sessions, on_text(count), build=slots(own)) as app:
            await queue(app, *(message(user) for _ in range(10) for user in (1, 2)))
            await asyncio.wait_for(asyncio.gather(*own.tasks), SOON)
        assert stored(sessions, key(1)) == stored(sessions, key(2)) == {"counter": 10}

    asyncio.run(main())


class JsonApplication(ext.Application):
    """Takes raw JSON."""

    async def process_update(self, update: Any) -> None:
        await super().process_update(telegram.Update.de_json(update, self.bot))


SESSIONS: dict[str, SessionManager[Any]] = {}


class OpeningApplication(ext.Application):
    """Opens the session of each update itself, around what is done with it."""

    async def process_update(self, update: Any) -> None:
        async with SESSIONS["sessions"].session_scope(update) as session:
            session.around = session.get("around", 0) + 1
            await super().process_update(update)


@pytest.mark.parametrize("chosen", [JsonApplication, OpeningApplication])
def test_an_application_of_the_bots_own_does_what_it_likes_with_an_update(
    api: OfflineBotAPI, sessions: SessionManager[Any], chosen: Any
) -> None:
    async def main() -> None:
        SESSIONS["sessions"] = sessions
        gate, log = Gate(), []

        async def handle(update: Any, context: Any) -> None:
            log.append(update.message.text)
            await count(update, context)
            if update.message.text == "0":
                await gate()

        def build(made: Any) -> Any:
            return made.concurrent_updates(3).application_class(chosen)

        texts = [str(number) for number in range(10)]

        def as_taken(update: dict[str, Any], app: Any) -> Any:
            is_json = chosen is JsonApplication
            return update if is_json else telegram.Update.de_json(update, app.bot)

        async with running(api, sessions, on_text(handle), build=build) as app:
            for update in (message(1, text) for text in texts):
                await app.update_queue.put(as_taken(update, app))
            await gate.reached()
            await app.update_queue.put(as_taken(message(2, "other"), app))
            await until_async(lambda: stored(sessions, key(2)))
            gate.open()
            await asyncio.wait_for(app.update_queue.join(), SOON)
        assert log == ["0", "other", *texts[1:]]
        assert stored(sessions)["counter"] == 10

    asyncio.run(main())


def test_two_sessions_and_repeated_updates(api: OfflineBotAPI) -> None:
    sessions = SessionManager(dedupe=20)
    chats = SessionManager(storage=sessions.storage, get_storage_key=by_chat)

    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            await count(update, context)
            context.chat_session.votes = context.chat_session.get("votes", 0) + 1
            if update.message.text == "wait":
                await gate()

        app = install(builder(api).concurrent_updates(2), sessions, chat_session=chats).build()
        app.add_handler(on_text(handle))
        async with app:
            await app.start()
            updates = [message(user, "wait", chat=-5) for user in (1, 2, 3, 1)]
            await put(app, *updates, *updates)
            await gate.reached()
            await put(app, message(4, "other", chat=-6))
            await until_async(lambda: stored(chats, "chat:-6"))
            gate.open()
            await app.stop()
        assert len(sessions.locks) == len(chats.locks) == 0

    asyncio.run(main())
    assert stored(chats, "chat:-5")["votes"] == 4
    assert stored(sessions, "user:1:chat:-5")["counter"] == 2


def test_what_fails_before_the_handlers_goes_to_the_error_handlers(api: OfflineBotAPI) -> None:
    def key_of(update: Any) -> str:
        raise ZeroDivisionError("no key")

    sessions = SessionManager(get_storage_key=key_of)

    async def main() -> None:
        errors: list[Exception] = []

        async def failed(update: Any, context: Any) -> None:
            errors.append(context.error)

        async with running(api, sessions, on_text(count), build=slots(2)) as app:
            app.add_error_handler(failed)
            await asyncio.wait_for(queue(app, message(), message(), callback_query()), SOON)
        assert [str(error) for error in errors] == ["no key"] * 3

    asyncio.run(main())


def test_an_update_whose_session_cannot_be_opened_keeps_no_other_key(api: OfflineBotAPI) -> None:
    """Also while its error, and all that knows, is being handled."""

    class Failing(OwnStorage):
        def get(self, key: str) -> Any:
            raise OSError("the disk is broken")

    sessions = SessionManager(storage=Failing())
    chats = SessionManager(get_storage_key=by_chat, lock_timeout=SOON)

    async def main() -> None:
        async def failed(update: Any, context: Any) -> None:
            async with chats.session_scope("chat:-5") as session:
                session.error = str(context.error)

        app = install(builder(api).concurrent_updates(2), sessions, chat_session=chats).build()
        app.add_handler(on_text(count))
        app.add_error_handler(failed)
        async with app:
            await app.start()
            await put(app, message(chat=-5))
            await until_async(lambda: stored(chats, "chat:-5"))
            await app.stop()

    asyncio.run(main())
    assert stored(chats, "chat:-5") == {"error": "the disk is broken"}


def test_a_group_that_has_become_a_supergroup_is_moved_first(api: OfflineBotAPI) -> None:
    sessions = SessionManager()
    sessions.storage.set("user:1:chat:-5", {"counter": 1})

    async def main() -> None:
        async with running(
            api, sessions, ext.MessageHandler(ext.filters.ALL, count), build=slots(2)
        ) as app:
            moved = message(1, chat=-1005, migrate_from_chat_id=-5)
            del moved["message"]["text"]
            await asyncio.wait_for(queue(app, moved), SOON)

    asyncio.run(main())
    assert stored(sessions, "user:1:chat:-1005") == {"counter": 2}


# -- updates that never come to a slot


def test_a_waiting_update_that_is_cancelled_disturbs_nobody(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            context.session.setdefault("seen", []).append(update.message.text)
            await gate()

        async with running(api, in_memory, on_text(handle), build=slots(2)) as app:
            before = asyncio.all_tasks()
            await put(app, message(1, "a"))
            await gate.reached()
            first = asyncio.all_tasks()
            await put(app, message(1, "b"))
            await settle()
            (second,) = asyncio.all_tasks() - first
            assert first - before
            await put(app, message(1, "c"))
            await settle()
            second.cancel()
            await asyncio.wait({second}, timeout=SOON)
            gate.open()
            await asyncio.wait_for(app.update_queue.join(), SOON)  # "b" is counted as done
        assert stored(in_memory) == {"seen": ["a", "c"]}

    asyncio.run(main())


def waiting_updates(api: OfflineBotAPI, sessions: SessionManager[Any]) -> Any:
    """An event loop in which two updates wait for user 1, and what they wait for."""
    loop = asyncio.new_event_loop()
    holder = sessions.session_scope(KEY)
    holder.__enter__()
    app = install(builder(api).concurrent_updates(2).job_queue(None).updater(None), sessions)
    app = app.build()
    app.add_handler(on_text(count))

    async def begin() -> None:
        await app.initialize()
        await app.start()
        await put(app, message(1), message(1))
        await until_async(lambda: sessions.locks.waiters(KEY) == 2)

    loop.run_until_complete(begin())
    return loop, app, holder


def opened_elsewhere(sessions: SessionManager[Any]) -> None:
    """Another thread gets the session at once."""
    with sessions.session_scope(KEY) as session:
        session.elsewhere = True


def in_thread(work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure


def test_updates_of_a_loop_that_stands_still_let_others_pass_and_are_handled_when_it_goes_on(
    api: OfflineBotAPI,
) -> None:
    sessions = SessionManager(lock_timeout=SOON)
    loop, app, holder = waiting_updates(api, sessions)
    holder.__exit__(None, None, None)
    in_thread(lambda: opened_elsewhere(sessions))
    assert stored(sessions) == {"elsewhere": True}

    async def end() -> None:
        await asyncio.wait_for(app.update_queue.join(), SOON)
        await app.stop()
        await app.shutdown()

    loop.run_until_complete(end())
    loop.close()
    assert stored(sessions) == {"elsewhere": True, "counter": 2}
    assert len(sessions.locks) == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings(  # PTB's own task is thrown away, too
    "ignore:Exception ignored in. <coroutine object Application._update_fetcher"
    ":pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("way", ["closed", "collected"])
def test_updates_that_are_thrown_away_with_their_loop_keep_no_key(
    api: OfflineBotAPI, way: str, caplog: Any
) -> None:
    sessions = SessionManager(lock_timeout=SOON)
    *alive, holder = waiting_updates(api, sessions)
    alive[0].close()
    if way == "collected":
        alive.clear()
        gc.collect()
        assert sessions.locks.waiters(KEY) == 0
    holder.__exit__(None, None, None)
    in_thread(lambda: opened_elsewhere(sessions))
    assert stored(sessions) == {"elsewhere": True}
    assert len(sessions.locks) == 0
    alive.clear()  # with which PTB's own task is thrown away, too
    gc.collect()
