"""`chat_session` beside `session`: both integrations of telebot and the one of PTB, with real
bots."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Awaitable
from typing import Any

import chat_session_tools
import pytest
from bots import BOTS, Group, Work, ext, telebot
from chat_session_tools import CHAT, USER, MyChatSession, MySession, locks
from conftest import Counting, Threads, callback_query, message, poll
from telebot.handler_backends import BaseMiddleware

import session_sync.ptb
import session_sync.telebot
from session_sync import MemoryStorage, SessionKeyError, SessionManager, by_chat

managers = pytest.fixture(params=chat_session_tools.STORES)(chat_session_tools.make_managers)


@pytest.fixture(params=BOTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- what a handler has


def test_each_update_has_the_session_of_its_user_and_that_of_its_chat(
    kind: str, managers: tuple[SessionManager[MySession], SessionManager[MyChatSession]]
) -> None:
    sessions, chats = managers

    def count(at: Any) -> None:
        assert (type(at.session), type(at.chat_session)) == (MySession, MyChatSession)
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
    kind: str, managers: tuple[SessionManager[MySession], SessionManager[MyChatSession]]
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
    sessions = SessionManager(MySession)
    others = SessionManager(MyChatSession, storage=sessions.storage)
    group = Group(kind, sessions=sessions, chat_session=others)
    group.play(lambda at: pytest.fail("ran"), message())
    (error,) = group.errors
    assert isinstance(error, TypeError)
    assert "cannot be a MySession and a MyChatSession: give one of them a prefix" in str(error)
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
    kind: str, managers: tuple[SessionManager[MySession], SessionManager[MyChatSession]]
) -> None:
    sessions, discards = managers
    flushes = SessionManager(
        MyChatSession, storage=discards.storage, get_storage_key=by_chat, on_error="flush"
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
