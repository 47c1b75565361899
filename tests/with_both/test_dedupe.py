"""Updates that Telegram sends again: skipped by every kind of bot, and what is stored for that."""

from __future__ import annotations

import logging
from typing import Any

import dedupe_tools
import pytest
from bots import BOTS, Group
from conftest import Counting, callback_query, message, poll
from dedupe_tools import KEY, count, stored

from session_sync import (
    MemoryStorage,
    Session,
    SessionDecodeError,
    SessionManager,
    SessionVersionError,
    StrictSession,
    by_chat,
    copy_storage,
    ttl,
)

kind = pytest.fixture(params=BOTS)(dedupe_tools.make_kind)
sessions = pytest.fixture(dedupe_tools.make_sessions)


# -- which updates are skipped


def test_an_update_that_comes_again_is_handled_once(
    kind: str, sessions: SessionManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    first, second, press = message(), message(), callback_query()
    group = Group(kind, sessions=sessions)
    with caplog.at_level(logging.INFO, "session_sync"):
        group.play(count, first, first, second, first, press, press, second)
    assert group.errors == []
    numbers = [each["update_id"] for each in (first, second, press)]
    assert stored(sessions) == {"count": 3, "$updates": numbers}
    said = [record.getMessage() for record in caplog.records if record.name == "session_sync"]
    assert len(said) == 4
    assert said[0] == f"update {numbers[0]} has come again: {KEY!r} has had it"


def test_it_is_skipped_after_a_restart_too(kind: str, sessions: SessionManager[Any]) -> None:
    update = message()
    for _ in range(2):
        Group(kind, sessions=SessionManager(storage=sessions.storage, dedupe=1)).play(count, update)
    assert stored(sessions)["count"] == 1


def test_without_dedupe_it_is_handled_again_and_nothing_remembered(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager()
    update = message()
    Group(kind, sessions=sessions).play(count, update, update)
    assert stored(sessions) == {"count": 2}


def test_only_the_last_ones_are_remembered(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=2)
    updates = [message() for _ in range(3)]
    Group(kind, sessions=sessions).play(count, *updates, updates[2], updates[1], updates[0])
    assert stored(sessions)["count"] == 4
    assert stored(sessions)["$updates"] == [updates[2]["update_id"], updates[0]["update_id"]]


def test_each_session_remembers_its_own(kind: str, sessions: SessionManager[Any]) -> None:
    update, other = message(1), message(2)
    other["update_id"] = update["update_id"]  # two bots on one store, say
    Group(kind, sessions=sessions).play(count, update, other)
    assert stored(sessions) == stored(sessions, "user:2:chat:2")


def test_an_update_of_nobody_is_handled_each_time(kind: str, sessions: SessionManager[Any]) -> None:
    ran: list[Any] = []
    update = poll()
    Group(kind, sessions=sessions).play(ran.append, update, update)
    assert len(ran) == 2


@pytest.mark.parametrize("on_error", ["discard", "flush"])
def test_one_whose_handler_failed_is_handled_again_if_nothing_of_it_was_kept(
    kind: str, on_error: Any
) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5, on_error=on_error)
    update = message()
    outcomes = [ValueError("no"), None]

    def fail_once(at: Any) -> None:
        count(at)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    Group(kind, sessions=sessions).play(fail_once, update, update, update)
    assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}
    assert len(outcomes) == (0 if on_error == "discard" else 1)


def test_a_flush_remembers_nothing_yet(kind: str, sessions: SessionManager[Any]) -> None:
    update = message()
    seen: list[Any] = []

    def fail(at: Any) -> None:
        count(at)
        at.session.flush()
        seen.append(stored(sessions))
        raise ValueError("no")

    Group(kind, sessions=sessions).play(fail, update, update)
    assert seen == [{"count": 1}, {"count": 2}]
    assert stored(sessions) == {"count": 2}


def test_release_remembers(kind: str, sessions: SessionManager[Any]) -> None:
    update = message()
    seen: list[Any] = []

    def release(at: Any) -> None:
        count(at)
        at.session.release()
        seen.append(stored(sessions))

    Group(kind, sessions=sessions).play(release, update, update)
    assert seen == [{"count": 1, "$updates": [update["update_id"]]}]


def test_what_could_not_be_saved_is_not_remembered(kind: str) -> None:
    class Broken(MemoryStorage):
        fails = 1

        def save(self, key: str, record: Any) -> None:
            if self.fails:
                self.fails -= 1
                raise ConnectionError("no save")
            super().save(key, record)

    sessions: SessionManager[Any] = SessionManager(storage=Broken(), dedupe=5)
    update = message()
    group = Group(kind, sessions=sessions)
    group.play(count, update, update, update)
    assert [type(error) for error in group.errors] == [ConnectionError]
    assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}


def test_blocks_and_decorated_handlers_skip_nothing(sessions: SessionManager[Any]) -> None:
    @sessions.with_session
    def handle(update: Any, session: Any) -> None:
        session.count = session.get("count", 0) + 1

    update = message()
    handle(update)
    handle(update)
    with sessions.session_scope(update) as session:
        session.count += 1
    assert stored(sessions) == {"count": 3}


# -- what a session is to who looks at it


def test_the_numbers_are_no_fields(kind: str, sessions: SessionManager[Any]) -> None:
    seen: list[Any] = []

    def look(at: Any) -> None:
        session = at.session
        seen.append((len(session), list(session), session == {}, "$updates" in session))
        assert session.get("$updates") is None
        with pytest.raises(ValueError, match="kept for what the library itself stores"):
            session["$updates"] = 1

    group = Group(kind, sessions=sessions)
    group.play(look, message(), message())
    assert group.errors == []
    assert seen == [(0, [], True, False)] * 2


def test_each_update_writes_once_and_a_repeat_only_reads(kind: str) -> None:
    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage, dedupe=5)
    update = message()
    Group(kind, sessions=sessions).play(lambda at: at.session.get("count"), update)
    assert (storage.reads, storage.writes) == (1, 1)
    Group(kind, sessions=sessions).play(lambda at: at.session.get("count"), update)
    assert (storage.reads, storage.writes) == (2, 1)


def test_an_emptied_session_keeps_what_it_remembers(
    kind: str, sessions: SessionManager[Any]
) -> None:
    fill, empty = message(), message()
    todo = [count, lambda at: setattr(at, "session", None)]
    group = Group(kind, sessions=sessions)
    group.play(lambda at: todo.pop(0)(at), fill, empty, empty, fill)
    assert group.errors == []
    assert stored(sessions) == {"$updates": [fill["update_id"], empty["update_id"]]}
    with sessions.session_scope(KEY) as session:  # also where nobody asks
        session.count = 1
    with sessions.session_scope(KEY) as session:
        session.clear()
    assert stored(sessions) == {"$updates": [fill["update_id"], empty["update_id"]]}


def test_a_session_without_fields_begins_anew(kind: str) -> None:
    made: list[Any] = []

    def initial(update: Any) -> dict[str, Any]:
        made.append(update)
        return {"language": "en"}

    sessions: SessionManager[Any] = SessionManager(dedupe=5, initial=initial)
    seen: list[Any] = []
    updates = [message(), message(), message()]

    def read(at: Any) -> None:
        seen.append((at.session.language, at.session))

    Group(kind, sessions=sessions).play(read, *updates[:2])
    assert stored(sessions) == {"$updates": [each["update_id"] for each in updates[:2]]}
    assert [session.language for _, session in seen] == ["en", "en"]
    Group(kind, sessions=sessions).play(count, updates[2])
    assert stored(sessions) == {
        "language": "en",
        "count": 1,
        "$updates": [each["update_id"] for each in updates],
    }
    assert len(made) == 3


def test_what_began_and_was_flushed_is_stored(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager(
        dedupe=5, initial=lambda update: {"language": "en"}
    )

    def flush(at: Any) -> None:
        count(at)
        at.session.flush()

    update = message()
    Group(kind, sessions=sessions).play(flush, update)
    assert stored(sessions) == {"language": "en", "count": 1, "$updates": [update["update_id"]]}


def test_an_error_handler_that_only_reads_stores_nothing_that_began(
    sessions: SessionManager[Any],
) -> None:
    began: SessionManager[Any] = SessionManager(
        storage=sessions.storage, initial=lambda update: {"language": "en"}, dedupe=5
    )

    def fail(at: Any) -> None:
        count(at)
        raise ValueError("no")

    Group("ptb", sessions=began).play(fail, message())
    assert stored(sessions) is None


def test_declared_fields_and_strict_sessions_see_nothing_of_it(kind: str) -> None:
    class Cart(StrictSession):
        total: int = 0

    sessions = SessionManager(Cart, dedupe=5)

    def add(at: Any) -> None:
        at.session.total += 1
        assert list(at.session) == ["total"]

    first, second = message(), message()
    group = Group(kind, sessions=sessions)
    group.play(add, first, second, first)
    assert group.errors == []
    assert stored(sessions) == {
        "total": 2,
        "$updates": [first["update_id"], second["update_id"]],
    }


def test_a_field_that_expires_takes_nothing_else_along(
    kind: str, sessions: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = message(), message()
    todo: list[Any] = [
        lambda at: setattr(at.session, "code", ttl("1234", 60)),
        lambda at: at.session.get("code"),
    ]
    now = __import__("time").time()
    group = Group(kind, sessions=sessions)
    group.play(lambda at: todo.pop(0)(at), first)
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now + 120)
    group.play(lambda at: todo.pop(0)(at), second, first)
    assert group.errors == []
    assert stored(sessions) == {"$updates": [first["update_id"], second["update_id"]]}


def test_a_damaged_record_is_reported_and_left_alone(
    kind: str, sessions: SessionManager[Any]
) -> None:
    sessions.storage.set(KEY, {"count": 1, "$updates": {"a": 1}})
    group = Group(kind, sessions=sessions)
    group.play(lambda at: pytest.fail("ran"), message())
    (error,) = group.errors
    assert isinstance(error, SessionDecodeError)
    assert KEY in str(error)
    assert stored(sessions) == {"count": 1, "$updates": {"a": 1}}
    assert len(sessions.locks) == 0


# -- versions


class Old(Session):
    pass


class New(Session):
    migrations = {2: lambda fields: fields.update(migrated=True)}


def test_what_a_session_remembers_goes_through_migrations(kind: str) -> None:
    storage = MemoryStorage()
    first, second = message(), message()
    Group(kind, sessions=SessionManager(Old, storage=storage, dedupe=5)).play(count, first)
    sessions = SessionManager(New, storage=storage, dedupe=5)
    Group(kind, sessions=sessions).play(count, second, first)
    assert stored(sessions) == {
        "count": 2,
        "migrated": True,
        "$updates": [first["update_id"], second["update_id"]],
        "$version": 2,
    }


def test_a_session_without_fields_needs_no_step_and_is_migrated_once() -> None:
    storage = MemoryStorage()
    storage.set(KEY, {"$updates": [1]})
    sessions = SessionManager(New, storage=storage, dedupe=5)
    assert (sessions.migrate_all(), sessions.migrate_all()) == (1, 0)
    assert stored(sessions) == {"$updates": [1], "$version": 2}
    begun = SessionManager(New, storage=storage, dedupe=5, initial=lambda update: {"a": 1})
    with begun.session_scope(KEY) as session:
        assert session == {"a": 1}
    assert stored(sessions) == {"$updates": [1], "$version": 2}


def test_a_newer_version_is_refused_as_ever(kind: str) -> None:
    storage = MemoryStorage()
    update = message()
    new = SessionManager(New, storage=storage, dedupe=5)
    Group(kind, sessions=new).play(lambda at: None, update)
    group = Group(kind, sessions=SessionManager(Old, storage=storage, dedupe=5))
    group.play(count, message())
    assert [type(error) for error in group.errors] == [SessionVersionError]
    assert stored(new) == {"$updates": [update["update_id"]], "$version": 2}


# -- all sessions of somebody


def test_find_forget_and_copy_take_it_for_a_session(sessions: SessionManager[Any]) -> None:
    Group("TeleBot", sessions=sessions).play(lambda at: None, message())
    assert list(sessions.find(user=1)) == [KEY]
    copy: SessionManager[Any] = SessionManager(dedupe=5)
    assert copy_storage(sessions.storage, copy.storage) == 1
    assert stored(copy) == stored(sessions)
    assert sessions.forget(user=1) == 1
    assert stored(sessions) is None


def test_two_sessions_that_become_one_remember_what_both_have_had() -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5)
    sessions.storage.set("user:1:chat:-100", {"count": 1, "$updates": [1, 2]})
    sessions.storage.set("user:1:chat:-1001", {"$updates": [3]})
    sessions.storage.set("user:2:chat:-100", {"$updates": [4]})
    sessions.storage.set("user:2:chat:-1001", {"$updates": [5]})
    assert sessions.migrate_chat(-100, -1001) == 2
    assert stored(sessions, "user:1:chat:-1001") == {"count": 1, "$updates": [1, 2, 3]}
    assert stored(sessions, "user:2:chat:-1001") == {"$updates": [4, 5]}
    assert stored(sessions, "user:1:chat:-100") is None


# -- two sessions


@pytest.mark.parametrize(
    "remembers", [("session",), ("chat_session",), ("session", "chat_session")]
)
def test_an_update_is_skipped_if_either_session_has_had_it(
    kind: str, remembers: tuple[str, ...]
) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5 * ("session" in remembers))
    chats: SessionManager[Any] = SessionManager(
        storage=sessions.storage, get_storage_key=by_chat, dedupe=5 * ("chat_session" in remembers)
    )

    def both(at: Any) -> None:
        count(at)
        at.chat_session.count = at.chat_session.get("count", 0) + 1

    update, later = message(1, chat=-100), message(2, chat=-100)
    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(both, update, update, later)
    assert group.errors == []
    chat = stored(chats, "chat:-100")
    assert stored(sessions, "user:1:chat:-100")["count"] == 1
    assert chat["count"] == 2
    numbers = [update["update_id"], later["update_id"]]
    assert chat.get("$updates") == (numbers if "chat_session" in remembers else None)
    # The process died between the two saves.
    sessions.storage.set("user:1:chat:-100", {"count": 0})
    group.play(both, update)
    assert stored(chats, "chat:-100")["count"] == (3 if remembers == ("session",) else 2)


def test_one_session_under_both_names_remembers_once(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5)
    others: SessionManager[Any] = SessionManager(storage=sessions.storage, dedupe=5)
    update = message()
    Group(kind, sessions=sessions, chat_session=others).play(count, update, update)
    assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}


# -- the option


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"dedupe": -1}, ValueError, "0 or more updates, not -1"),
        ({"dedupe": 2.0}, TypeError, "not float"),
        ({"dedupe": True}, TypeError, "not bool"),
        ({"dedupe": "5"}, TypeError, "not str"),
        ({"dedupe": 5, "lazy": True}, ValueError, "exclude each other"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        SessionManager(**options)
    SessionManager(dedupe=0, lazy=True)
