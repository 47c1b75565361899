"""Whose sessions: found, forgotten, and moved with their chat, on every kind of storage."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionDeadlockError,
    SessionDecodeError,
    SessionLockTimeoutError,
    SessionManager,
    SessionMigrationError,
    SessionVersionError,
    StorageKey,
    field,
    storage_from_url,
    ttl,
)

OLD, NEW = -100, -1001234
SOON = 20  # seconds until a test gives up waiting for what has to come


@pytest.fixture(params=["memory", "lru", "strict", "sqlite", "disk", "redis"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """An empty storage of each kind."""
    kind = request.param
    if kind == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    if kind == "redis":
        server = request.getfixturevalue("redis_url")
        some: Any = storage_from_url(f"{server}?prefix={tmp_path.name}:")
    elif kind in ("sqlite", "disk"):
        some = storage_from_url(f"{kind}:///{tmp_path}/sessions")
    elif kind == "lru":
        some = LruMemoryStorage()
    else:
        some = MemoryStorage(strict=kind == "strict")
    yield some
    some.close()


@pytest.fixture
def sessions(storage: Any) -> SessionManager[Any]:
    return SessionManager(storage=storage, lock_timeout=SOON)


def put(sessions: SessionManager[Any], *keys: str) -> None:
    for key in keys:
        with sessions.session_scope(key) as session:
            session.whose = key


def found(sessions: SessionManager[Any], **of: Any) -> list[str]:
    return sorted(sessions.find(**of))


class Four:
    """The four methods alone."""

    def get(self, key: str) -> Any: ...
    def set(self, key: str, value: Any) -> None: ...
    def delete(self, key: str) -> None: ...
    def has(self, key: str) -> bool:
        return False


class Handler:
    """One that has a session open until it is told to end, and then writes to it."""

    def __init__(self, threads: Threads, sessions: SessionManager[Any], key: str) -> None:
        self._sessions, self._key = sessions, key
        self._opened, self._end = threading.Event(), threading.Event()
        threads.start(self._run)
        assert self._opened.wait(SOON)

    def _run(self) -> None:
        with self._sessions.session_scope(self._key) as session:
            self._opened.set()
            assert self._end.wait(SOON)
            session.late = True

    def end(self) -> None:
        self._end.set()


def somebody_waits_for(sessions: SessionManager[Any], key: str) -> None:
    """Return when somebody has queued for a key that is held."""
    give_up = time.monotonic() + SOON
    while not sessions.locks.waiters(key):
        assert time.monotonic() < give_up, f"nobody has waited for {key}"
        time.sleep(0)


# -- find


def test_sessions_are_found_by_user_by_chat_and_by_both(sessions: SessionManager[Any]) -> None:
    put(
        sessions,
        "user:1:chat:1",
        "user:1:chat:-100",
        "user:1:chat:-100:thread:4",
        "user:1:chat:5:business:c%3A1",
        "user:1:key:wizard",
        "user:2:chat:-100",
        "user:11:chat:-1001",
        "chat:-100",
    )
    assert found(sessions, user=1) == [
        "user:1:chat:-100",
        "user:1:chat:-100:thread:4",
        "user:1:chat:1",
        "user:1:chat:5:business:c%3A1",
        "user:1:key:wizard",
    ]
    assert found(sessions, chat=-100) == [
        "chat:-100",
        "user:1:chat:-100",
        "user:1:chat:-100:thread:4",
        "user:2:chat:-100",
    ]
    assert found(sessions, user=2, chat=-100) == ["user:2:chat:-100"]
    assert len(found(sessions)) == 8
    assert found(sessions, user=100) == []


def test_a_private_chat_without_a_user_is_its_users(sessions: SessionManager[Any]) -> None:
    put(sessions, "chat:1", "chat:1:thread:4", "chat:-1", "thread:1", "user:2:chat:1")
    assert found(sessions, user=1) == ["chat:1", "chat:1:thread:4"]
    assert found(sessions, user=-1) == ["chat:-1"]


def test_a_key_that_is_no_storage_key_belongs_to_nobody(sessions: SessionManager[Any]) -> None:
    texts = ("user:01", "user:1 ", "bot 1", "users:1", "chat:1:user:1", "1", "key:user:1")
    put(sessions, *texts, "user:1")
    assert found(sessions, user=1) == ["user:1"]
    assert len(found(sessions)) == 8
    assert sessions.forget(user=1) == 1
    assert found(sessions) == sorted(texts)


def test_a_manager_finds_what_has_its_prefix_and_says_it_without(storage: Any) -> None:
    here = SessionManager(storage=storage, prefix="a:")
    other = SessionManager(storage=storage, prefix="a:b:")
    put(here, "user:1", "user:1:chat:-100")
    put(other, "user:1")
    put(SessionManager(storage=storage), "user:1")
    assert found(here, user=1) == ["user:1", "user:1:chat:-100"]
    assert here.migrate_chat(OLD, NEW) == 1
    assert here.forget(user=1) == 2
    assert sorted(storage.keys()) == ["a:b:user:1", "user:1"]


def test_numbers_that_are_no_ids_are_refused_and_not_just_not_found() -> None:
    sessions = SessionManager()
    for wrong in ("7", True, 7.0):
        for call in (sessions.find, sessions.forget):
            with pytest.raises(TypeError, match="takes an int"):
                call(user=wrong)  # type: ignore[operator]
            with pytest.raises(TypeError, match="takes an int"):
                call(chat=wrong)  # type: ignore[operator]
        with pytest.raises(TypeError, match="takes an int"):
            sessions.migrate_chat(OLD, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a user, a chat or both"):
        sessions.forget()
    with pytest.raises(ValueError, match="has another ID"):
        sessions.migrate_chat(OLD, OLD)


def test_a_storage_that_cannot_list_is_refused_at_once() -> None:
    sessions = SessionManager(storage=Four())
    for call in (
        lambda: sessions.find(user=1),
        lambda: sessions.forget(user=1),
        lambda: sessions.migrate_chat(OLD, NEW),
    ):
        with pytest.raises(TypeError, match=r"Four cannot list its keys.*ListableStorage"):
            call()


def test_what_is_there_all_the_time_is_found_while_others_write(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    steady = [f"user:1:chat:{number}" for number in range(60)]
    put(sessions, *steady)
    done = threading.Event()

    def bustle(who: int) -> None:
        number = 0
        while not done.is_set():
            put(sessions, f"user:2:chat:{who}{number % 50}", steady[number % 60])
            sessions.storage.delete(f"user:2:chat:{who}{number % 50}")
            number += 1

    for who in (1, 2):
        threads.start(bustle, who)
    try:
        for _ in range(5):
            assert set(sessions.find(user=1)) == set(steady)
            assert len(list(sessions.find(user=1))) == len(steady)
    finally:
        done.set()
        threads.join()


def test_to_list_the_keys_is_no_use_of_a_session() -> None:
    storage = LruMemoryStorage(maxsize=2)
    sessions = SessionManager(storage=storage)
    put(sessions, "user:1", "user:2")
    assert found(sessions) == ["user:1", "user:2"]
    put(sessions, "user:3")
    assert found(sessions) == ["user:2", "user:3"]


# -- forget


def test_all_of_a_person_is_deleted_and_nothing_of_others(sessions: SessionManager[Any]) -> None:
    put(sessions, "user:1:chat:1", "user:1:chat:-100", "user:2:chat:-100", "chat:-100")
    assert sessions.forget(user=1) == 2
    assert found(sessions) == ["chat:-100", "user:2:chat:-100"]
    assert sessions.forget(user=1) == 0
    assert sessions.forget(user=2, chat=5) == 0
    assert sessions.forget(chat=-100) == 2
    assert found(sessions) == []
    assert len(sessions.locks) == 0


def test_what_a_running_handler_saves_is_deleted_too(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    put(sessions, "user:1:chat:1", "user:1:chat:2")
    handler = Handler(threads, sessions, "user:1:chat:1")
    forgotten: list[int] = []
    threads.start(lambda: forgotten.append(sessions.forget(user=1)))
    somebody_waits_for(sessions, "user:1:chat:1")
    handler.end()
    threads.join()
    assert forgotten == [2]
    assert found(sessions) == []


def test_a_handler_that_comes_afterwards_begins_a_new_session(storage: Any) -> None:
    sessions = SessionManager(storage=storage, initial=lambda _: {"language": "en"})
    put(sessions, "user:1")
    assert sessions.forget(user=1) == 1
    assert not storage.has("user:1")
    with sessions.session_scope("user:1") as session:
        assert session == {"language": "en"}


def test_a_session_that_is_open_around_the_call_stays_and_the_error_says_what_to_do(
    sessions: SessionManager[Any],
) -> None:
    put(sessions, "user:1:chat:1", "user:1:chat:2")
    with sessions.session_scope("user:1:chat:1") as session:
        with pytest.raises(ExceptionGroup, match="1 sessions were not deleted, 1 were") as caught:
            sessions.forget(user=1)
        (error,) = caught.value.exceptions
        assert isinstance(error, SessionDeadlockError)
        assert "'user:1:chat:1' is open around forget()" in str(error)
        assert "session.release()" in str(error)
        session.more = 1
    assert sessions.storage.get("user:1:chat:1") == {"whose": "user:1:chat:1", "more": 1}
    with sessions.session_scope("user:1:chat:1") as session:
        session.release()
        assert sessions.forget(user=1) == 1
    assert found(sessions) == []


def test_async_code_forgets_in_a_thread(sessions: SessionManager[Any]) -> None:
    async def main() -> None:
        async with sessions.session_scope("user:1") as session:
            session.counter = 1
            await session.aflush()
            with pytest.raises(ExceptionGroup, match="1 sessions were not deleted"):
                await asyncio.to_thread(sessions.forget, user=1)
            await session.arelease()
            assert await asyncio.to_thread(sessions.forget, user=1) == 1
        assert found(sessions) == []

    asyncio.run(main())


def test_sessions_of_every_kind_and_version_are_deleted(storage: Any) -> None:
    class MySession(Session):
        migrations = {2: lambda fields: pytest.fail("nobody looks at what goes")}
        lines: list[str] = field(default_factory=list)

    storage.set("user:1:chat:1", {"lines": ["a"], "$version": 9})
    storage.set("user:1:chat:2", {"lines": 5})
    storage.set("user:1:chat:3", {"code": 1, "$ttl": {"code": [1.0, 1.0]}})
    for lazy in (False, True):
        sessions = SessionManager(MySession, storage=storage, lazy=lazy, migrate_eagerly=True)
        assert sessions.forget(user=1) == (0 if lazy else 3)
    assert list(storage.keys()) == []


def test_what_cannot_be_deleted_is_named_and_the_others_go() -> None:
    sessions = SessionManager(storage=MemoryStorage(), lock_timeout=0)
    put(sessions, "user:1:chat:1", "user:1:chat:2")
    sessions.storage.set("user:1:chat:3", {"x": 1, "$ttl": "no timers"})
    threads = Threads()
    handler = Handler(threads, sessions, "user:1:chat:1")
    with pytest.raises(ExceptionGroup, match="2 sessions were not deleted, 1 were") as caught:
        sessions.forget(user=1)
    kinds = {type(error) for error in caught.value.exceptions}
    assert kinds == {SessionLockTimeoutError, SessionDecodeError}
    handler.end()
    threads.join()
    assert found(sessions) == ["user:1:chat:1", "user:1:chat:3"]


# -- migrate_chat


def test_what_a_newer_program_has_hidden_in_a_session_outlives_a_merge() -> None:
    sessions = SessionManager(storage=MemoryStorage())
    sessions.storage.set("user:7:chat:-100", {"a": 1, "$later": "old", "$only": 1})
    sessions.storage.set("user:7:chat:-1001234", {"b": 2, "$later": "new"})
    assert sessions.migrate_chat(-100, -1001234) == 1
    stored = sessions.storage.get("user:7:chat:-1001234")
    assert stored == {"a": 1, "b": 2, "$later": "new", "$only": 1}


def test_all_sessions_of_a_chat_move_and_no_others(sessions: SessionManager[Any]) -> None:
    put(
        sessions,
        "chat:-100",
        "chat:-100:thread:4",
        "user:1:chat:-100",
        "user:1:chat:-100:thread:4:business:c%3A1:key:a:b",
        "user:1:chat:-1001",
        "user:-100:chat:1",
        "key:chat:-100",
    )
    assert sessions.migrate_chat(OLD, NEW) == 4
    assert found(sessions, chat=OLD) == []
    assert found(sessions) == sorted(
        [
            "chat:-1001234",
            "chat:-1001234:thread:4",
            "user:1:chat:-1001234",
            "user:1:chat:-1001234:thread:4:business:c%3A1:key:a:b",
            "user:1:chat:-1001",
            "user:-100:chat:1",
            "key:chat:-100",
        ]
    )
    with sessions.session_scope(StorageKey(user=1, chat=NEW)) as session:
        assert session == {"whose": "user:1:chat:-100"}
    assert sessions.migrate_chat(OLD, NEW) == 0
    assert len(sessions.locks) == 0


def test_a_session_moves_as_it_is_stored_whatever_its_version(storage: Any) -> None:
    record = {"lines": 5, "code": "1234", "$version": 9, "$ttl": {"code": [4e9, 300.0]}}
    storage.set("chat:-100", record)

    class MySession(Session):
        migrations = {2: lambda fields: pytest.fail("there is nothing to put together")}
        lines: list[str] = field(default_factory=list)

    sessions = SessionManager(MySession, storage=storage, initial=lambda _: pytest.fail("nor here"))
    assert sessions.migrate_chat(OLD, NEW) == 1
    assert storage.get("chat:-1001234") == record
    assert not storage.has("chat:-100")


def test_where_both_exist_the_new_ones_fields_are_put_over_the_old_ones(
    sessions: SessionManager[Any],
) -> None:
    with sessions.session_scope("chat:-100") as session:
        session.update(language="de", step="name", cart=["tea"], coupon=ttl("A", 300))
    with sessions.session_scope("chat:-1001234") as session:
        session.update(step="address", code=ttl("1234", 600), coupon="B")
    code = sessions.storage.get("chat:-1001234")["$ttl"]["code"]
    assert sessions.migrate_chat(OLD, NEW) == 1
    assert sessions.storage.get("chat:-1001234") == {
        "language": "de",
        "step": "address",
        "cart": ["tea"],
        "coupon": "B",
        "code": "1234",
        "$ttl": {"code": code},
    }
    assert not sessions.storage.has("chat:-100")


def test_timers_go_along_and_what_has_expired_does_not(
    sessions: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now[0])
    with sessions.session_scope("chat:-100") as session:
        session.update(a=ttl("old", 100), b=ttl("old", 100), c=ttl("old", 5), d=ttl("old", 100))
    with sessions.session_scope("chat:-1001234") as session:
        session.update(b=ttl("new", 50), c=ttl("new", 50), d=ttl("new", 5))
    now[0] += 10
    assert sessions.migrate_chat(OLD, NEW) == 1
    assert sessions.storage.get("chat:-1001234") == {
        "a": "old",
        "b": "new",
        "c": "new",
        "d": "old",
        "$ttl": {
            "a": [1100.0, 100.0],
            "b": [1050.0, 50.0],
            "c": [1050.0, 50.0],
            "d": [1100.0, 100.0],
        },
    }


def test_two_sessions_of_which_all_time_is_up_leave_none(
    sessions: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now[0])
    put_for_a_moment = {"code": ttl("1234", 5)}
    for key in ("chat:-100", "chat:-1001234"):
        with sessions.session_scope(key) as session:
            session.update(put_for_a_moment)
    now[0] += 10
    sessions.migrate_chat(OLD, NEW)
    assert list(sessions.storage.keys()) == []


def test_what_a_session_begins_with_does_not_win_over_the_old_one(storage: Any) -> None:
    sessions = SessionManager(
        storage=storage,
        initial=lambda _: {"language": "en", "cart": [], "trial": ttl(True, 300), "level": 1},
    )
    with sessions.session_scope("chat:-100") as session:
        session.update(language="de", cart=["tea"], trial=False)
        del session.level
    with sessions.session_scope("chat:-1001234") as session:
        session.cart.append("milk")  # so all of them are stored
    assert sessions.migrate_chat(OLD, NEW) == 1
    stored = storage.get("chat:-1001234")
    stored.pop("$ttl", None)
    assert stored == {"language": "de", "cart": ["milk"], "trial": False, "level": 1}


def test_where_initial_takes_no_key_both_stay_and_the_error_says_so(storage: Any) -> None:
    sessions = SessionManager(storage=storage, initial=lambda update: {"name": update.name})
    storage.set("chat:-100", {"name": "Alex"})
    storage.set("chat:-1001234", {"name": "s3cr3t"})
    storage.set("user:1:chat:-100", {"name": "Bo"})
    with pytest.raises(ExceptionGroup, match="1 sessions were not moved, 1 were") as caught:
        sessions.migrate_chat(OLD, NEW)
    (error,) = caught.value.exceptions
    assert isinstance(error, SessionMigrationError)
    assert "'chat:-1001234'" in str(error)
    assert "`initial` failed (AttributeError) for a key" in str(error)
    assert "s3cr3t" not in str(error)
    assert storage.get("chat:-100") == {"name": "Alex"}
    assert storage.get("chat:-1001234") == {"name": "s3cr3t"}


def split_name(fields: dict[str, Any]) -> None:
    if "name" in fields:
        fields["first"], _, fields["last"] = fields.pop("name").partition(" ")


class Person(Session):
    migrations = {2: split_name}
    first: str = ""
    last: str = ""


@pytest.mark.parametrize("older", ["old", "new", "both"])
def test_two_sessions_are_put_together_in_the_current_version(storage: Any, older: str) -> None:
    first: dict[str, Any] = {"first": "Alex", "last": "Doe", "$version": 2}
    second: dict[str, Any] = {"first": "Bo", "last": "Roe", "$version": 2}
    storage.set("chat:-100", {**(first if older == "new" else {"name": "Alex Doe"}), "a": 1})
    storage.set("chat:-1001234", {**(second if older == "old" else {"name": "Bo Roe"}), "b": 2})
    assert SessionManager(Person, storage=storage).migrate_chat(OLD, NEW) == 1
    assert storage.get("chat:-1001234") == {**second, "a": 1, "b": 2}


def test_what_a_newer_program_has_stored_is_not_put_together(storage: Any) -> None:
    storage.set("chat:-100", {"a": 1, "$version": 3})
    storage.set("chat:-1001234", {"b": 2, "$version": 2})
    with pytest.raises(ExceptionGroup) as caught:
        SessionManager(Person, storage=storage).migrate_chat(OLD, NEW)
    assert isinstance(caught.value.exceptions[0], SessionVersionError)
    assert storage.get("chat:-100") == {"a": 1, "$version": 3}
    assert storage.get("chat:-1001234") == {"b": 2, "$version": 2}


class Crash(BaseException):
    """The process ends here."""


class OneByOne:
    """An adapter that takes one session at a time, and fails with `error` in `set` or `delete`."""

    set_error: BaseException | None = None
    delete_error: BaseException | None = None

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.kept.get(key)

    def set(self, key: str, value: Any) -> None:
        if self.set_error is not None:
            raise self.set_error
        self.kept[key] = value

    def delete(self, key: str) -> None:
        if self.delete_error is not None:
            raise self.delete_error
        self.kept.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.kept

    def keys(self) -> list[str]:
        return list(self.kept)


def test_a_crash_between_the_two_steps_loses_nothing_and_calling_again_finishes() -> None:
    storage = OneByOne()
    sessions = SessionManager(storage=storage)
    put(sessions, "chat:-100")
    storage.delete_error = Crash()
    with pytest.raises(Crash):
        sessions.migrate_chat(OLD, NEW)
    storage.delete_error = None
    assert storage.get("chat:-100") == storage.get("chat:-1001234") == {"whose": "chat:-100"}
    with sessions.session_scope("chat:-1001234") as session:
        session.more = 1
    assert sessions.migrate_chat(OLD, NEW) == 1
    assert storage.kept == {"chat:-1001234": {"whose": "chat:-100", "more": 1}}


def test_a_move_whose_writing_fails_leaves_the_old_session() -> None:
    storage = OneByOne()
    sessions = SessionManager(storage=storage, on_error="flush")
    put(sessions, "chat:-100")
    storage.set_error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        sessions.migrate_chat(OLD, NEW)
    storage.set_error = None
    assert list(storage.keys()) == ["chat:-100"]
    assert sessions.migrate_chat(OLD, NEW) == 1
    assert list(storage.keys()) == ["chat:-1001234"]


@pytest.mark.parametrize("busy", ["chat:-100", "chat:-1001234"])
def test_a_move_waits_for_the_handlers_of_both_chats(
    sessions: SessionManager[Any], threads: Threads, busy: str
) -> None:
    put(sessions, "chat:-100", "chat:-1001234")
    handler = Handler(threads, sessions, busy)
    moved: list[int] = []
    threads.start(lambda: moved.append(sessions.migrate_chat(OLD, NEW)))
    somebody_waits_for(sessions, busy)
    handler.end()
    threads.join()
    assert moved == [1]
    assert sessions.storage.get("chat:-1001234") == {"whose": "chat:-1001234", "late": True}
    assert not sessions.storage.has("chat:-100")


@pytest.mark.parametrize("around", ["chat:-100", "chat:-1001234"])
def test_a_session_that_is_open_around_the_move_stays(
    sessions: SessionManager[Any], around: str
) -> None:
    put(sessions, "chat:-100", "user:1:chat:-100")
    with sessions.session_scope(around) as session:
        session.more = 1
        with pytest.raises(ExceptionGroup, match="1 sessions were not moved, 1 were") as caught:
            sessions.migrate_chat(OLD, NEW)
        assert f"{around!r} is open around migrate_chat()" in str(caught.value.exceptions[0])
    assert sessions.storage.has("chat:-100")
    assert sessions.storage.has("user:1:chat:-1001234")
    assert sessions.migrate_chat(OLD, NEW) == 1
    assert sessions.storage.get("chat:-1001234")["more"] == 1


def test_moves_in_both_directions_and_handlers_never_stop_each_other(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    """Each takes both keys at once, so one who took them the other way round would deadlock."""
    put(sessions, "chat:-100", "user:1:chat:-1001234")
    adds, moves = 40, 15

    def add(key: str) -> None:
        for number in range(adds):
            with sessions.session_scope(key) as session:
                session[f"{key} {number}"] = number

    def move(old: int, new: int) -> None:
        for _ in range(moves):
            sessions.migrate_chat(old, new)

    for key in ("chat:-100", "chat:-1001234"):
        threads.start(add, key)
    threads.start(move, OLD, NEW)
    threads.start(move, NEW, OLD)
    threads.join(60)
    sessions.migrate_chat(OLD, NEW)
    (stored,) = (sessions.storage.get(key) for key in found(sessions) if key.startswith("chat"))
    assert len(stored) == 1 + 2 * adds
    assert len(sessions.locks) == 0
