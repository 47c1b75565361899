"""`chat_session` beside `session`: both rooms of telebot and the one of PTB, with real bots."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from bots import BOTS, SOON, Group, Work, ext, stop, telebot, telegram
from conftest import Counting, Threads, callback_query, message, poll
from telebot.handler_backends import BaseMiddleware

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

USER, CHAT = "user:1:chat:-100", "chat:-100"


class Bag(Session):
    count: int = 0


class ChatBag(Session):
    total: int = 0


@pytest.fixture(params=BOTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["one store", "two stores"])
def managers(request: pytest.FixtureRequest) -> tuple[SessionManager[Bag], SessionManager[ChatBag]]:
    sessions = SessionManager(Bag)
    storage = sessions.storage if request.param == "one store" else MemoryStorage()
    return sessions, SessionManager(ChatBag, storage=storage, get_storage_key=by_chat)


def locks(*managers: SessionManager[Any]) -> list[int]:
    return [len(manager.locks) for manager in managers]


# -- what a handler has


def test_each_update_has_the_session_of_its_user_and_that_of_its_chat(
    kind: str, managers: tuple[SessionManager[Bag], SessionManager[ChatBag]]
) -> None:
    sessions, chats = managers

    def count(at: Any) -> None:
        assert (type(at.session), type(at.chat_session)) == (Bag, ChatBag)
        at.session.count += 1
        at.chat_session.total += 1

    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(count, message(1, chat=-100), message(2, chat=-100), message(1))
    assert group.errors == []
    assert sessions.storage.get(USER) == {"count": 1}
    assert sessions.storage.get("user:2:chat:-100") == {"count": 1}
    assert chats.storage.get(CHAT) == {"total": 2}
    assert chats.storage.get("chat:1") == {"total": 1}
    assert locks(*managers) == [0, 0]


def test_both_can_be_replaced_and_emptied(
    kind: str, managers: tuple[SessionManager[Bag], SessionManager[ChatBag]]
) -> None:
    sessions, chats = managers
    todo: list[Work] = []

    def replace(at: Any) -> None:
        at.chat_session = {"total": 5, "topic": "tea"}
        at.session |= {"count": 2}

    def empty(at: Any) -> None:
        at.chat_session = None

    def wrong(at: Any) -> None:
        with pytest.raises(TypeError, match="mapping of fields"):
            at.chat_session = 5

    todo = [replace, wrong]
    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(lambda at: todo.pop(0)(at), message(1, chat=-100), message(1, chat=-100))
    assert chats.storage.get(CHAT) == {"total": 5, "topic": "tea"}
    Group(kind, sessions=sessions, chat_session=chats).play(empty, message(1, chat=-100))
    assert chats.storage.get(CHAT) is None
    assert sessions.storage.get(USER) == {"count": 2}
    assert group.errors == []


@pytest.mark.parametrize("missing", ["session", "chat_session"])
def test_an_update_without_a_key_for_one_of_them_has_the_other(kind: str, missing: str) -> None:
    present = "chat_session" if missing == "session" else "session"
    with_key: SessionManager[Any] = SessionManager()
    without: SessionManager[Any] = SessionManager(get_storage_key=lambda update: None)

    def ask(at: Any) -> None:
        setattr(at, present, {"seen": True})
        with pytest.raises(SessionKeyError, match="belongs to no session"):
            getattr(at, missing)

    names = {present: with_key, missing: without}
    group = Group(kind, sessions=names["session"], chat_session=names["chat_session"])
    group.play(ask, message())
    assert group.errors == []
    assert with_key.storage.get("user:1:chat:1") == {"seen": True}


def test_an_update_of_nobody_is_handled(kind: str) -> None:
    ran: list[bool] = []

    def ask(at: Any) -> None:
        for name in ("session", "chat_session"):
            with pytest.raises(SessionKeyError):
                getattr(at, name)
        ran.append(True)

    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    group = Group(kind, sessions=SessionManager(), chat_session=chats)
    group.play(ask, poll())
    assert (ran, group.errors) == ([True], [])


def test_who_has_installed_none_is_told_how(kind: str) -> None:
    ran: list[bool] = []

    def ask(at: Any) -> None:
        with pytest.raises(AttributeError, match=r"install\(.*chat_session=\.\.\.\) gives it one"):
            _ = at.chat_session
        assert not hasattr(at, "chat_session")
        ran.append(True)

    group = Group(kind, sessions=SessionManager())
    group.play(ask, message())
    assert (ran, group.errors) == ([True], [])


def test_a_session_that_was_opened_anew_is_found_under_its_own_name(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager()
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)

    def reopen(at: Any) -> None:
        update = message(1, chat=-100)
        at.chat_session.first = True
        at.chat_session.release()
        at.session.mine = True
        with chats.session_scope(by_chat(update)) as chat:
            chat.second = True
            assert "mine" in at.session
            assert "second" not in at.session

    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(reopen, message(1, chat=-100))
    assert group.errors == []
    assert chats.storage.get(CHAT) == {"first": True, "second": True}
    assert sessions.storage.get(USER) == {"mine": True}


def test_a_telebot_message_finds_a_released_session_that_was_opened_anew_for_it() -> None:
    sessions: SessionManager[Any] = SessionManager()
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)

    def reopen(m: Any) -> None:
        m.chat_session.release()
        with chats.session_scope(m) as chat:
            assert m.chat_session is chat
            assert m.session is not chat
            m.session.release()
            with sessions.session_scope(m) as session:
                assert (m.session, m.chat_session) == (session, chat)
                m.session.inner = m.chat_session.inner = True

    group = Group("TeleBot", sessions=sessions, chat_session=chats)
    group.play(reopen, message(1, chat=-100))
    assert group.errors == []
    assert sessions.storage.get(USER) == chats.storage.get(CHAT) == {"inner": True}


def test_what_hangs_on_a_telebot_message_shows_in_neither_str_nor_pickle() -> None:
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    kept: list[Any] = []

    def keep(at: Any) -> None:
        at.chat_session.secret = "tea"
        kept.append(at)

    group = Group("TeleBot", sessions=SessionManager(), chat_session=chats)
    update = callback_query(1)
    plain = telebot.types.Update.de_json(update).callback_query
    group.play(keep, update)
    assert set(vars(kept[0])) == set(vars(plain))
    assert b"secret" not in pickle.dumps(kept[0].message.chat)
    with pytest.raises(AttributeError, match="not the update that is being handled"):
        _ = kept[0].message.chat_session


# -- keys and their order


class Noting(MemoryStorage):
    """Notes which keys are opened, in which order, in a list that stores may share."""

    def __init__(self, opened: list[str]) -> None:
        super().__init__()
        self._opened = opened

    def load(self, key: str) -> Any:
        self._opened.append(key)
        return super().load(key)


@pytest.mark.parametrize(
    ("prefixes", "order"),
    [(("a:", "b:"), ["a:" + USER, "b:" + CHAT]), (("b:", "a:"), ["a:" + CHAT, "b:" + USER])],
)
def test_in_one_store_keys_are_taken_in_the_order_of_their_full_names(
    kind: str, prefixes: tuple[str, str], order: list[str]
) -> None:
    opened: list[str] = []
    storage = Noting(opened)
    sessions: SessionManager[Any] = SessionManager(storage=storage, prefix=prefixes[0])
    chats: SessionManager[Any] = SessionManager(
        storage=storage, prefix=prefixes[1], get_storage_key=by_chat
    )
    Group(kind, sessions=sessions, chat_session=chats).play(lambda at: None, message(1, chat=-100))
    assert opened == order


def test_of_two_stores_the_session_comes_first(kind: str) -> None:
    opened: list[str] = []
    sessions: SessionManager[Any] = SessionManager(storage=Noting(opened))
    chats: SessionManager[Any] = SessionManager(storage=Noting(opened), get_storage_key=by_chat)
    Group(kind, sessions=sessions, chat_session=chats).play(lambda at: None, message(1, chat=-100))
    assert opened == [USER, CHAT]


def test_bots_that_name_the_managers_the_other_way_round_never_wait_in_a_circle(
    kind: str, threads: Threads
) -> None:
    storage = Yielding()
    users: SessionManager[Any] = SessionManager(storage=storage)
    chats: SessionManager[Any] = SessionManager(storage=storage, get_storage_key=by_chat)

    def count(at: Any) -> None:
        for session in (at.session, at.chat_session):
            session.count = session.get("count", 0) + 1

    one = Group(kind, sessions=users, chat_session=chats)
    two = Group(kind, sessions=chats, chat_session=users)
    for group in (one, two):
        threads.start(group.play, count, *(message(1, chat=-100) for _ in range(50)))
    threads.join(60)
    assert one.errors == two.errors == []
    assert storage.get(USER) == storage.get(CHAT) == {"count": 100}


class Yielding(MemoryStorage):
    """Lets others go on while it is asked."""

    blocking = True

    def load(self, key: str) -> Any:
        threading.Event().wait(0.0005)
        return super().load(key)


def test_one_key_in_one_store_is_one_session(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager()
    others: SessionManager[Any] = SessionManager(storage=sessions.storage)

    def both(at: Any) -> None:
        at.session.count = 1
        at.chat_session.count += 1

    before = set(session_sync.telebot.attribute.bound)
    group = Group(kind, sessions=sessions, chat_session=others)
    group.play(both, message(), message())
    assert group.errors == []
    assert sessions.storage.get("user:1:chat:1") == {"count": 2}
    gc.collect()
    assert set(session_sync.telebot.attribute.bound) <= before


@pytest.mark.parametrize("lazy", [(True, False), (False, True)])
def test_one_session_may_be_lazy_under_one_of_its_names(kind: str, lazy: tuple[bool, bool]) -> None:
    """It is opened for the other one, which may have a place in the queue already."""
    sessions: SessionManager[Any] = SessionManager(lazy=lazy[0], lock_timeout=5)
    others: SessionManager[Any] = SessionManager(
        storage=sessions.storage, lazy=lazy[1], lock_timeout=5
    )

    def both(at: Any) -> Awaitable[None] | None:
        if isinstance(at, ext.CallbackContext) or kind == "AsyncTeleBot":
            return both_async(at)
        at.session.count = 1
        at.chat_session.count += 1
        return None

    async def both_async(at: Any) -> None:
        (await at.session if lazy[0] else at.session).count = 1
        (await at.chat_session if lazy[1] else at.chat_session).count += 1

    group = Group(kind, sessions=sessions, chat_session=others)
    group.play(both, message(), message())
    assert group.errors == []
    assert sessions.storage.get("user:1:chat:1") == {"count": 2}


def test_one_session_cannot_be_of_two_types(kind: str) -> None:
    sessions = SessionManager(Bag)
    others = SessionManager(ChatBag, storage=sessions.storage)
    group = Group(kind, sessions=sessions, chat_session=others)
    group.play(lambda at: pytest.fail("ran"), message())
    (error,) = group.errors
    assert isinstance(error, TypeError)
    assert "cannot be a Bag and a ChatBag: give one of them a prefix" in str(error)
    assert locks(sessions) == [0]


def test_one_manager_twice_is_refused() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with pytest.raises(ValueError, match="both would be one session"):
        session_sync.telebot.install(telebot.TeleBot("1:t"), sessions, chat_session=sessions)
    builder = ext.Application.builder().token("1:token")
    with pytest.raises(ValueError, match="both would be one session"):
        session_sync.ptb.install(builder, sessions, chat_session=sessions)


# -- errors


def test_a_handler_that_raises_rolls_both_back_each_as_its_manager_says(
    kind: str, managers: tuple[SessionManager[Bag], SessionManager[ChatBag]]
) -> None:
    sessions, discards = managers
    flushes = SessionManager(
        ChatBag, storage=discards.storage, get_storage_key=by_chat, on_error="flush"
    )

    def fail(at: Any) -> None:
        at.session.count = 1
        at.chat_session.total = 1
        raise ValueError("no")

    for chats, kept in ((discards, None), (flushes, {"total": 1})):
        group = Group(kind, sessions=sessions, chat_session=chats)
        group.play(fail, message(1, chat=-100))
        assert [type(error) for error in group.errors] == [ValueError]
        assert sessions.storage.get(USER) is None
        assert chats.storage.get(CHAT) == kept


class Broken(MemoryStorage):
    """Fails where it is told to; in an event loop's thread, or in another one."""

    def __init__(self, fails: str, blocking: bool) -> None:
        super().__init__()
        self._fails = fails
        self.blocking = blocking

    def load(self, key: str) -> Any:
        if self._fails == "load":
            raise ConnectionError(f"no load of {key}")
        return super().load(key)

    def save(self, key: str, record: Any) -> None:
        if self._fails == "save":
            raise ConnectionError(f"no save of {key}")
        super().save(key, record)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("broken", ["session", "chat_session"])
def test_what_cannot_be_saved_of_one_does_not_keep_the_other_from_it(
    kind: str, broken: str, blocking: bool
) -> None:
    whole = "chat_session" if broken == "session" else "session"
    good: SessionManager[Any] = SessionManager()
    bad: SessionManager[Any] = SessionManager(storage=Broken("save", blocking))

    def write(at: Any) -> None:
        at.session.count = at.chat_session.count = 1

    names = {whole: good, broken: bad}
    group = Group(kind, sessions=names["session"], chat_session=names["chat_session"])
    group.play(write, message(), message())
    assert [type(error) for error in group.errors] == [ConnectionError, ConnectionError]
    assert good.storage.get("user:1:chat:1") == {"count": 1}
    assert locks(good, bad) == [0, 0]


@pytest.mark.parametrize("blocking", [False, True])
def test_no_error_is_lost_where_neither_can_be_saved(kind: str, blocking: bool) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Broken("save", blocking))
    chats: SessionManager[Any] = SessionManager(
        storage=Broken("save", blocking), get_storage_key=by_chat
    )

    def write(at: Any) -> None:
        at.session.count = at.chat_session.count = 1

    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(write, message(1, chat=-100))
    errors: list[Any] = group.errors
    if kind != "ptb":  # where the error handlers are called for each
        (both,) = errors
        assert isinstance(both, ExceptionGroup)
        errors = list(both.exceptions)
    assert {str(error) for error in errors} == {f"no save of {USER}", f"no save of {CHAT}"}
    assert locks(sessions, chats) == [0, 0]


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("broken", ["session", "chat_session"])
def test_what_cannot_be_loaded_keeps_the_handler_from_running_and_no_key_locked(
    kind: str, broken: str, blocking: bool
) -> None:
    whole = "chat_session" if broken == "session" else "session"
    good: SessionManager[Any] = SessionManager()
    bad: SessionManager[Any] = SessionManager(storage=Broken("load", blocking))
    names = {whole: good, broken: bad}
    group = Group(kind, sessions=names["session"], chat_session=names["chat_session"])
    group.play(lambda at: pytest.fail("ran"), message(), message())
    assert [type(error) for error in group.errors] == [ConnectionError, ConnectionError]
    assert locks(good, bad) == [0, 0]


def test_class_middlewares_see_both_rolled_back() -> None:
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    sessions: SessionManager[Any] = SessionManager()
    bot = telebot.TeleBot("1:token", threaded=False, use_class_middlewares=True)
    session_sync.telebot.install(bot, sessions, chat_session=chats)
    seen: list[Any] = []

    class Middleware(BaseMiddleware):
        update_types = ["message"]

        def pre_process(self, m: Any, data: Any) -> None:
            m.chat_session.before = True
            m.chat_session.flush()

        def post_process(self, m: Any, data: Any, exception: Any) -> None:
            seen.append((dict(m.session), dict(m.chat_session), type(exception)))

    bot.setup_middleware(Middleware())

    @bot.message_handler(func=lambda m: m.chat_session.before)
    def fail(m: Any) -> None:
        m.session.lost = m.chat_session.lost = True
        raise ValueError("no")

    bot.process_new_updates([telebot.types.Update.de_json(message(1, chat=-100))])
    assert seen == [({}, {"before": True}, ValueError)]
    assert sessions.storage.get(USER) is None
    assert chats.storage.get(CHAT) == {"before": True}


# -- lazy ones


@pytest.mark.parametrize("lazy", [(True, False), (False, True), (True, True)])
def test_a_lazy_one_is_opened_when_it_is_asked_for(kind: str, lazy: tuple[bool, bool]) -> None:
    stores = Counting(), Counting()
    sessions: SessionManager[Any] = SessionManager(storage=stores[0], lazy=lazy[0])
    chats: SessionManager[Any] = SessionManager(
        storage=stores[1], lazy=lazy[1], get_storage_key=by_chat
    )
    todo: list[Any] = []

    def nothing(at: Any) -> None: ...

    def ask(at: Any) -> Awaitable[None] | None:
        if isinstance(at, ext.CallbackContext) or kind == "AsyncTeleBot":
            return ask_async(at)
        at.chat_session.count = at.session.count = 1
        return None

    async def ask_async(at: Any) -> None:
        chat = await at.chat_session
        session = await at.session
        chat.count = session.count = 1

    todo = [nothing, ask]
    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(lambda at: todo.pop(0)(at), message(1, chat=-100), message(1, chat=-100))
    assert group.errors == []
    assert [store.reads for store in stores] == [1 if each else 2 for each in lazy]
    assert [store.writes for store in stores] == [1, 1]
    assert locks(sessions, chats) == [0, 0]


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


# -- a group becomes a supergroup


def migration(old: int, new: int) -> dict[str, Any]:
    update = message(1, chat=old, migrate_to_chat_id=new)
    del update["message"]["text"]
    return update


def test_the_sessions_of_both_follow_their_group(
    kind: str, managers: tuple[SessionManager[Any], SessionManager[Any]]
) -> None:
    sessions, chats = managers
    sessions.storage.set(USER, {"count": 1})
    chats.storage.set(CHAT, {"total": 1})
    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(lambda at: None, message(1), migration(-100, -1001))
    assert group.errors == []
    assert list(chats.find(chat=-100)) == list(sessions.find(chat=-100)) == []
    assert sessions.storage.get("user:1:chat:-1001") == {"count": 1}
    assert chats.storage.get("chat:-1001") == {"total": 1}


def test_keys_are_read_once_where_both_have_one_store() -> None:
    listed: list[None] = []

    class Listing(MemoryStorage):
        def keys(self) -> Any:
            listed.append(None)
            return super().keys()

    sessions: SessionManager[Any] = SessionManager(storage=Listing())
    chats: SessionManager[Any] = SessionManager(storage=sessions.storage, get_storage_key=by_chat)
    Group("TeleBot", sessions=sessions, chat_session=chats).play(
        lambda at: None, migration(-100, -1001)
    )
    assert len(listed) == 1


class Four:
    """A storage that cannot list its keys."""

    def __init__(self) -> None:
        inside = MemoryStorage()
        self.get, self.set, self.delete, self.has = (
            inside.get,
            inside.set,
            inside.delete,
            inside.has,
        )


@pytest.mark.parametrize("unlisted", ["session", "chat_session"])
def test_only_storages_that_list_their_keys_move_sessions(kind: str, unlisted: str) -> None:
    listed = "chat_session" if unlisted == "session" else "session"
    names: dict[str, SessionManager[Any]] = {
        listed: SessionManager(),
        unlisted: SessionManager(storage=Four()),
    }
    for manager in names.values():
        manager.storage.set(USER, {"count": 1})
    installed = {"sessions": names["session"], "chat_session": names["chat_session"]}
    group = Group(kind, **installed)
    group.play(lambda at: None, migration(-100, -1001))
    assert group.errors == []
    assert names[listed].storage.get("user:1:chat:-1001") == {"count": 1}
    assert names[unlisted].storage.get(USER) == {"count": 1}
    with pytest.raises(TypeError, match="Four cannot list its keys"):
        Group(kind, migrate_chats=True, **installed).play(lambda at: None)


def test_what_fails_for_one_does_not_keep_the_sessions_of_the_other_behind(kind: str) -> None:
    class Unlisted(MemoryStorage):
        def keys(self) -> Any:
            raise ConnectionError("no keys")

    sessions: SessionManager[Any] = SessionManager(storage=Unlisted())
    chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
    chats.storage.set(CHAT, {"total": 1})
    ran: list[bool] = []
    group = Group(kind, sessions=sessions, chat_session=chats)
    later = [message(9)] if kind == "TeleBot in threads" else []  # else it stops too soon
    group.play(lambda at: ran.append(True), migration(-100, -1001), *later)
    assert [type(error) for error in group.errors] == [ConnectionError]
    assert chats.storage.get("chat:-1001") == {"total": 1}
    assert ran


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
    class Own(SessionContext[Bag]):
        pass

    class Both(SessionContext[Bag, ChatBag]):
        pass

    assert SessionContext[Bag].__args__ == (Bag, Session)
    assert SessionContext[Bag, ChatBag].__args__ == (Bag, ChatBag)
    with pytest.raises(TypeError):
        SessionContext[Bag, ChatBag, Bag]
    for context in (Own, Both):
        types = ext.ContextTypes(context=context)
        builder = ext.Application.builder().token("1:token").context_types(types)
        app = session_sync.ptb.install(builder, SessionManager(Bag)).build()
        assert issubclass(app.context_types.context, context)
