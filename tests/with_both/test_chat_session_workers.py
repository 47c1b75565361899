"""`chat_session` beside `session`, and what runs handlers: telebot's workers, PTB's tasks."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import chat_session_tools
import pytest
from bots import SOON, Work, ext, stop, telebot, telegram
from chat_session_tools import CHAT, USER, MyChatSession, MySession, locks
from conftest import message

import session_sync.ptb
import session_sync.telebot
from session_sync import (
    DiskStorage,
    MemoryStorage,
    Session,
    SessionKeyError,
    SessionManager,
    SQLiteStorage,
    StorageKey,
    by_chat,
    by_user,
)
from session_sync.ptb import SessionContext
from session_sync.testing import OfflineBotAPI

managers = pytest.fixture(params=chat_session_tools.STORES)(chat_session_tools.make_managers)


# -- a telebot's workers


class Pool:
    """A TeleBot of two workers, and what it has handled."""

    def __init__(self, sessions: SessionManager[Any], chats: SessionManager[Any]) -> None:
        self.bot = telebot.TeleBot("1:token", num_threads=2, exception_handler=self)
        self.log: list[str] = []
        self.errors: list[Exception] = []
        self._handled = threading.Semaphore(0)
        session_sync.telebot.install(self.bot, sessions, chat_session=chats)

    def handle(self, error: Exception) -> bool:
        self.errors.append(error)
        self._handled.release()
        return True

    def on_message(self, work: Work = lambda m: None) -> None:
        def run(m: Any) -> None:
            work(m)
            self.log.append(m.text)
            self._handled.release()

        self.bot.register_message_handler(run, func=lambda m: True)

    def feed(self, *updates: dict[str, Any]) -> None:
        self.bot.process_new_updates([telebot.types.Update.de_json(each) for each in updates])

    def wait(self, number: int = 1) -> None:
        """Until so many more have been handled."""
        for _ in range(number):
            assert self._handled.acquire(timeout=SOON)


@pytest.fixture
def pool(managers: tuple[SessionManager[Any], SessionManager[Any]]) -> Any:
    some = Pool(*managers)
    yield some
    stop(some.bot)
    assert some.errors == []
    assert locks(*managers) == [0, 0]


def test_a_group_that_waits_for_its_session_holds_up_nobody(
    pool: Pool, managers: tuple[SessionManager[Any], SessionManager[Any]]
) -> None:
    pool.on_message()
    with managers[1].session_scope(CHAT):  # a cron job, say
        pool.feed(*(message(user, chat=-100) for user in range(1, 31)))
        pool.feed(message(99, "somebody else"))
        pool.wait()
        assert pool.log == ["somebody else"]
    pool.wait(30)


def test_a_flood_in_a_group_leaves_another_user_to_wait_for_two_updates(
    pool: Pool,
) -> None:
    in_group, go_on = threading.Event(), threading.Event()

    def work(m: Any) -> None:
        if m.text == "group":
            in_group.set()
            assert go_on.wait(SOON)

    pool.on_message(work)
    pool.feed(*(message(user, "group", chat=-100) for user in range(1, 31)))
    assert in_group.wait(SOON)
    pool.feed(message(99, "somebody else"))
    pool.wait()
    assert pool.log == ["somebody else"]
    go_on.set()
    pool.wait(30)


def test_a_handler_may_open_the_session_of_somebody_whose_update_waits_for_the_chat(
    pool: Pool, managers: tuple[SessionManager[Any], SessionManager[Any]]
) -> None:
    """It waits and holds nothing, so nobody waits for it in a circle."""
    sessions, _ = managers
    queued = threading.Event()

    def give(m: Any) -> None:
        if m.text == "give":
            assert queued.wait(SOON)
            with sessions.session_scope(StorageKey(user=2, chat=-100)) as other:
                other.coins = 5
        else:
            m.session.coins += 1

    pool.on_message(give)
    pool.feed(message(1, "give", chat=-100))
    pool.feed(message(2, "take", chat=-100))
    queued.set()
    pool.wait(2)
    assert sessions.storage.get("user:2:chat:-100") == {"coins": 6}


@pytest.mark.parametrize("stores", [1, 2])
def test_a_users_updates_keep_their_order_though_one_of_them_waits_for_a_chat(
    stores: int,
) -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=by_user)
    storage = sessions.storage if stores == 1 else MemoryStorage()
    chats: SessionManager[Any] = SessionManager(storage=storage, get_storage_key=by_chat)
    pool = Pool(sessions, chats)
    pool.on_message()
    with chats.session_scope(CHAT):
        pool.feed(message(1, "first", chat=-100))
        pool.feed(message(1, "second", chat=-200))
        pool.feed(message(99, "somebody else"))
        pool.wait()
        assert pool.log == ["somebody else"]
    pool.wait(2)
    assert pool.log == ["somebody else", "first", "second"]
    stop(pool.bot)


def test_a_stopped_bot_leaves_no_update_in_the_way(
    managers: tuple[SessionManager[Any], SessionManager[Any]],
) -> None:
    sessions, chats = managers
    pool = Pool(sessions, chats)
    pool.on_message()
    with chats.session_scope(CHAT), sessions.session_scope("user:2:chat:-100"):
        pool.feed(*(message(user, chat=-100) for user in (1, 2, 3)))
        stop(pool.bot)
    assert pool.log == []
    assert locks(sessions, chats) == [0, 0]
    with sessions.session_scope(USER), chats.session_scope(CHAT):
        pass


def test_an_update_leaves_nothing_for_the_garbage_collector(pool: Pool) -> None:
    came, gone = threading.Semaphore(0), threading.Semaphore(0)

    def handle(m: Any) -> None:
        weakref.finalize(m, gone.release)
        came.release()

    pool.on_message(handle)
    gc.disable()
    try:
        pool.feed(*(message(user, chat=-100) for user in (1, 2, 1)))
        for _ in range(3):
            assert came.acquire(timeout=SOON)
        barrier = threading.Barrier(3)  # a worker forgets its last task when it gets another one
        for _ in range(2):
            pool.bot.worker_pool.put(barrier.wait)
        barrier.wait(SOON)
        for _ in range(3):
            assert gone.acquire(timeout=SOON)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind_of_store", [SQLiteStorage, DiskStorage])
def test_nothing_is_lost_in_files(kind_of_store: Any, tmp_path: Any) -> None:
    storage = kind_of_store(tmp_path / "s")
    with SessionManager(storage=storage) as sessions:
        chats: SessionManager[Any] = SessionManager(storage=storage, get_storage_key=by_chat)
        pool = Pool(sessions, chats)

        def count(m: Any) -> None:
            for session in (m.session, m.chat_session):
                session.count = session.get("count", 0) + 1

        pool.on_message(count)
        updates = [message(user, chat=-100) for user in (1, 2, 3, 4)] * 10
        pool.feed(*updates)
        pool.wait(len(updates))
        stop(pool.bot)
        assert pool.errors == []
        assert storage.get(CHAT) == {"count": 40}
        assert storage.get("user:4:chat:-100") == {"count": 10}


# -- PTB's tasks, error handlers and contexts


def ptb(work: Callable[[Any], Awaitable[None]], **installed: Any) -> None:
    """Run `work` with an application."""

    async def main() -> None:
        with OfflineBotAPI() as api:
            builder = ext.Application.builder().token(api.token).base_url(api.base_url)
            app = session_sync.ptb.install(builder, **installed).build()
            async with app:
                await app.start()
                try:
                    await work(app)
                finally:
                    await app.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


def update_for(app: Any, raw: dict[str, Any]) -> Any:
    return telegram.Update.de_json(raw, app.bot)


def test_non_blocking_work_keeps_both_open_in_ptb(
    managers: tuple[SessionManager[Any], SessionManager[Any]],
) -> None:
    sessions, chats = managers

    async def main(app: Any) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(update: Any, context: Any) -> None:
            begun.set()
            await go_on.wait()
            context.session.count = context.chat_session.total = 1

        async def task(context: Any) -> None:
            await go_on.wait()
            context.chat_session.task = True

        async def make_task(update: Any, context: Any) -> None:
            app.create_task(task(context), update=update)

        app.add_handler(ext.TypeHandler(telegram.Update, slow, block=False))
        app.add_handler(ext.TypeHandler(telegram.Update, make_task), 1)
        await app.process_update(update_for(app, message(1, chat=-100)))
        await begun.wait()
        assert sessions.locks.is_locked(USER)
        assert chats.locks.is_locked(CHAT)
        go_on.set()
        async with chats.session_scope(CHAT) as chat:
            assert chat == {"total": 1, "task": True}

    ptb(main, sessions=sessions, chat_session=chats)
    assert sessions.storage.get(USER) == {"count": 1}
    assert locks(sessions, chats) == [0, 0]


def test_a_task_of_ptb_that_is_cancelled_before_its_first_step_frees_both(
    managers: tuple[SessionManager[Any], SessionManager[Any]],
) -> None:
    sessions, chats = managers

    async def main(app: Any) -> None:
        async def nothing() -> None: ...

        work = nothing()

        async def make_task(update: Any, context: Any) -> None:
            context.session.count = context.chat_session.total = 1
            app.create_task(work, update=update).cancel()

        app.add_handler(ext.TypeHandler(telegram.Update, make_task))
        await app.process_update(update_for(app, message(1, chat=-100)))
        work.close()  # which nobody awaits now

    ptb(main, sessions=sessions, chat_session=chats)
    assert sessions.storage.get(USER) == {"count": 1}
    assert chats.storage.get(CHAT) == {"total": 1}
    assert locks(sessions, chats) == [0, 0]


def test_ptbs_error_handlers_see_both_rolled_back_and_may_write(
    managers: tuple[SessionManager[Any], SessionManager[Any]],
) -> None:
    sessions, chats = managers
    seen: list[Any] = []

    async def main(app: Any) -> None:
        async def fail(update: Any, context: Any) -> None:
            context.session.count = context.chat_session.total = 1
            raise ValueError("no")

        async def failed(update: Any, context: Any) -> None:
            seen.append((context.session.count, context.chat_session.total))
            context.chat_session.errors = 1

        app.add_handler(ext.TypeHandler(telegram.Update, fail))
        app.add_error_handler(failed)
        await app.process_update(update_for(app, message(1, chat=-100)))

    ptb(main, sessions=sessions, chat_session=chats)
    assert seen == [(0, 0)]
    assert sessions.storage.get(USER) is None
    assert chats.storage.get(CHAT) == {"errors": 1}


def test_a_handler_of_ptb_that_is_cancelled_discards_both(
    managers: tuple[SessionManager[Any], SessionManager[Any]],
) -> None:
    sessions, chats = managers

    async def main(app: Any) -> None:
        begun = asyncio.Event()

        async def hang(update: Any, context: Any) -> None:
            context.session.count = context.chat_session.total = 1
            begun.set()
            await asyncio.Event().wait()

        app.add_handler(ext.TypeHandler(telegram.Update, hang))
        task = asyncio.create_task(app.process_update(update_for(app, message(1, chat=-100))))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    ptb(main, sessions=sessions, chat_session=chats)
    assert sessions.storage.get(USER) is chats.storage.get(CHAT) is None
    assert locks(sessions, chats) == [0, 0]


def test_a_job_of_ptb_has_neither() -> None:
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)

    async def main(app: Any) -> None:
        context = app.context_types.context(app)
        for name in ("session", "chat_session"):
            with pytest.raises(SessionKeyError, match="no session is open in this context"):
                getattr(context, name)
            with pytest.raises(AttributeError, match="give your own attribute another name"):
                setattr(context, name, object())

    ptb(main, sessions=SessionManager(), chat_session=chats)


def test_a_context_of_ones_own_with_a_chat_session_is_refused_only_beside_another() -> None:
    class Database(ext.CallbackContext):
        chat_session = "my own"

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Attribute(ext.CallbackContext):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.chat_session = "my own"

    def builder(context: Any) -> Any:
        types = ext.ContextTypes(context=context)
        return ext.Application.builder().token("1:token").context_types(types)

    sessions: SessionManager[Any] = SessionManager()
    for context in (Database, Attribute):
        app = session_sync.ptb.install(builder(context), sessions).build()
        assert app.context_types.context(app).chat_session == "my own"
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    with pytest.raises(TypeError, match="Database has a `chat_session` of its own"):
        session_sync.ptb.install(builder(Database), sessions, chat_session=chats).build()


def test_the_second_type_of_a_context_can_be_left_out() -> None:
    class Own(SessionContext[MySession]):
        pass

    class Both(SessionContext[MySession, MyChatSession]):
        pass

    assert SessionContext[MySession].__args__ == (MySession, Session)
    assert SessionContext[MySession, MyChatSession].__args__ == (MySession, MyChatSession)
    with pytest.raises(TypeError):
        SessionContext[MySession, MyChatSession, MySession]
    for context in (Own, Both):
        types = ext.ContextTypes(context=context)
        builder = ext.Application.builder().token("1:token").context_types(types)
        app = session_sync.ptb.install(builder, SessionManager(MySession)).build()
        assert issubclass(app.context_types.context, context)
