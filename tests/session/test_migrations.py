"""Versions of stored sessions: how an older one becomes the newest, and that none is eaten."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Counting

from session_sync import (
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionDecodeError,
    SessionEncodeError,
    SessionError,
    SessionLockTimeoutError,
    SessionManager,
    SessionMigrationError,
    SessionTypeError,
    SessionVersionError,
    StrictSession,
    copy_storage,
    field,
    ttl,
)

SECRET = "s3cr3t"  # in a value: it may stand in no message


def split_name(fields: dict[str, Any]) -> None:
    fields["first"], _, fields["last"] = fields.pop("name").partition(" ")


def count_lines(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "lines": [{"text": text} for text in fields.get("lines", [])]}


@dataclass
class Line:
    text: str


class Person(Session):
    migrations = {2: split_name, 3: count_lines}
    first: str = ""
    last: str = ""
    lines: list[Line] = field(default_factory=list)


OLD = {"name": "Alex Doe", "lines": ["a"]}
NEW = {"first": "Alex", "last": "Doe", "lines": [{"text": "a"}], "$version": 3}


@pytest.fixture
def storage(storage: Any) -> Any:
    """Each kind, with an old session."""
    storage.set("user:1", OLD)
    return storage


@pytest.fixture
def people(storage: Any) -> SessionManager[Person]:
    return SessionManager(Person, storage=storage)


# -- when it is loaded


def test_an_old_session_is_loaded_as_a_new_one(people: SessionManager[Person]) -> None:
    with people.session_scope("user:1") as session:
        assert (session.first, session.last, session.lines) == ("Alex", "Doe", [Line("a")])
        assert "name" not in session
        assert list(session) == ["first", "last", "lines"]  # the version is no field


def test_it_is_stored_with_the_next_flush_whatever_the_handler_does(
    people: SessionManager[Person],
) -> None:
    with people.session_scope("user:1"):
        assert people.storage.get("user:1") == OLD
    assert people.storage.get("user:1") == NEW


def test_a_flush_stores_it(people: SessionManager[Person]) -> None:
    with people.session_scope("user:1") as session:
        session.flush()
        assert people.storage.get("user:1") == NEW


def test_it_is_stored_together_with_what_the_handler_changed(
    people: SessionManager[Person],
) -> None:
    with people.session_scope("user:1") as session:
        session.last = "Roe"
        session.lines[0].text = "b"
        del session.first
    assert people.storage.get("user:1") == {"last": "Roe", "lines": [{"text": "b"}], "$version": 3}


def test_what_a_factory_made_is_stored_with_a_migrated_session(storage: Any) -> None:
    made = iter("ab")

    class Coupon(Session):
        migrations = {2: split_name}
        code: str = field(default_factory=lambda: next(made))

    coupons = SessionManager(Coupon, storage=storage)
    for _ in range(2):
        with coupons.session_scope("user:1") as session:
            assert session.code == "a"


def test_it_is_stored_once() -> None:
    storage = Counting()
    storage.set("user:1", OLD)
    storage.writes = 0
    people = SessionManager(Person, storage=storage)
    for _ in range(3):
        with people.session_scope("user:1") as session:
            assert session.first == "Alex"
    assert storage.writes == 1


def test_eagerly_it_is_stored_before_the_handler_runs(storage: Any) -> None:
    class Eager(Person):
        migrate_eagerly = True

    for number, people in enumerate(
        (
            SessionManager(Eager, storage=storage),
            SessionManager(Person, storage=storage, migrate_eagerly=True),
        )
    ):
        storage.set(f"user:{number}", OLD)
        with people.session_scope(f"user:{number}") as session:
            assert storage.get(f"user:{number}") == NEW
            session.last = "Roe"
        assert storage.get(f"user:{number}") == {**NEW, "last": "Roe"}


def test_async_code_and_lazy_sessions_migrate_too(storage: Any) -> None:
    async def handle(people: SessionManager[Person], key: str) -> None:
        async with people.session_scope(key) as session:
            session = await session
            assert session.first == "Alex"
            assert storage.get(key) == (NEW if people.scopes.options.migrate_eagerly else OLD)

    number = 0
    for lazy in (False, True):
        for eagerly in (False, True):
            number += 1
            storage.set(f"user:{number}", OLD)
            people = SessionManager(Person, storage=storage, lazy=lazy, migrate_eagerly=eagerly)
            asyncio.run(handle(people, f"user:{number}"))
            assert storage.get(f"user:{number}") == NEW


def test_a_lazy_session_that_nobody_touches_stays_old(storage: Any) -> None:
    with SessionManager(Person, storage=storage, lazy=True).session_scope("user:1"):
        pass
    assert storage.get("user:1") == OLD


def test_a_handler_that_raises_leaves_the_stored_session_old(
    people: SessionManager[Person],
) -> None:
    with pytest.raises(ZeroDivisionError), people.session_scope("user:1") as session:
        session.last = "Roe"
        raise ZeroDivisionError
    assert people.storage.get("user:1") == OLD
    with people.session_scope("user:1") as session:
        assert session.last == "Doe"


def test_on_error_flush_stores_it(storage: Any) -> None:
    people = SessionManager(Person, storage=storage, on_error="flush")
    with pytest.raises(ZeroDivisionError), people.session_scope("user:1"):
        raise ZeroDivisionError
    assert storage.get("user:1") == NEW


def test_what_an_error_handler_changes_after_a_roll_back_is_stored_in_the_new_form() -> None:
    storage = MemoryStorage()
    storage.set("user:1", OLD)
    people = SessionManager(Person, storage=storage)
    with people.session_scope("user:1") as outer:
        with pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError
        scope = outer._lifecycle()
        scope.discard(ZeroDivisionError())  # type: ignore[attr-defined]
        assert outer.first == "Alex"
        outer.failed = True
    assert storage.get("user:1") == {**NEW, "failed": True}


def test_a_migrated_session_whose_saving_fails_is_still_to_be_saved(
    monkeypatch: pytest.MonkeyPatch, storage: Any
) -> None:
    people = SessionManager(Person, storage=storage)
    with people.session_scope("user:1") as session:
        session.other = other = []
        other.append(object())  # which nobody looks at before the flush
        if isinstance(storage, MemoryStorage):
            monkeypatch.setattr(people.scopes.options.backend, "save", _full)
        with pytest.raises((SessionEncodeError, OSError)):
            session.flush()
        monkeypatch.undo()
        assert storage.get("user:1") == OLD
        del session.other
    assert storage.get("user:1") == NEW


def _full(*_: Any) -> None:
    raise OSError("disk full")


# -- new sessions, and those without a version


def test_a_new_session_is_stored_with_the_newest_version(people: SessionManager[Person]) -> None:
    with people.session_scope("user:2") as session:
        session.first = "Bo"
    assert people.storage.get("user:2") == {"first": "Bo", "$version": 3}
    with people.session_scope("user:2") as session:
        assert session.first == "Bo"


def test_initial_fields_are_those_of_the_newest_version(storage: Any) -> None:
    people = SessionManager(Person, storage=storage, initial=lambda _: {"first": "New"})
    with people.session_scope("user:2") as session:
        assert session.first == "New"
    assert not storage.has("user:2")
    with people.session_scope("user:2") as session:
        session.last = "One"
    assert storage.get("user:2") == {"first": "New", "last": "One", "$version": 3}


def test_an_emptied_session_is_deleted_and_its_version_with_it(
    people: SessionManager[Person],
) -> None:
    with people.session_scope("user:1") as session:
        session.clear()
        session.flush()
        assert not people.storage.has("user:1")
        session.first = "Again"
    assert people.storage.get("user:1") == {"first": "Again", "$version": 3}
    with people.session_scope("user:1") as session:
        del session.first
    assert not people.storage.has("user:1")


def test_a_migration_may_empty_a_session(storage: Any) -> None:
    people = SessionManager(storage=storage, migrations={2: lambda fields: {}})
    with people.session_scope("user:1") as session:
        assert session == {}
    assert not storage.has("user:1")


def test_without_migrations_no_version_is_stored(storage: Any) -> None:
    with SessionManager(storage=storage).session_scope("user:1") as session:
        session.more = 1
    assert storage.get("user:1") == {**OLD, "more": 1}


@pytest.mark.parametrize("version", ["3", 0, -1, 3.0, True, None, [3]])
def test_a_version_that_nobody_wrote_here_is_refused(version: Any) -> None:
    storage = MemoryStorage()
    stored = {"first": "x", "$version": version}
    storage.set("user:1", stored)
    for sessions in (SessionManager(Person, storage=storage), SessionManager(storage=storage)):
        with (
            pytest.raises(SessionDecodeError, match=r"'user:1' cannot be read: .*\$version"),
            sessions.session_scope("user:1"),
        ):
            pass
    assert storage.get("user:1") == stored


# -- the steps


def test_the_steps_run_in_order_from_the_version_that_is_stored(storage: Any) -> None:
    done: list[int] = []

    def steps(*numbers: int) -> Any:
        def step(number: int) -> Any:
            return lambda fields: done.append(number)

        return {number: step(number) for number in numbers}

    def opened(*numbers: int) -> list[int]:
        done.clear()
        with SessionManager(storage=storage, migrations=steps(*numbers)).session_scope("user:1"):
            pass
        return list(done)

    assert opened(4, 2, 3) == [2, 3, 4]
    assert opened(2, 3, 4) == []
    assert opened(2, 3, 4, 5, 6) == [5, 6]
    assert storage.get("user:1") == {**OLD, "$version": 6}


def test_a_step_gets_plain_fields_that_are_its_own(storage: Any) -> None:
    storage.set("user:1", {"a": {"b": [{1}, (2, [3])]}})
    seen: list[Any] = []

    def spoil(fields: dict[str, Any]) -> None:
        seen.append(type(fields["a"]["b"]))
        fields["a"]["b"].clear()
        raise ZeroDivisionError

    people = SessionManager(storage=storage, migrations={2: spoil})
    with pytest.raises(SessionMigrationError), people.session_scope("user:1"):
        pass
    assert seen == [list]
    assert storage.get("user:1") == {"a": {"b": [{1}, (2, [3])]}}


def test_what_a_step_returns_is_not_shared(storage: Any) -> None:
    shared = {"list": [1]}
    people = SessionManager(storage=storage, migrations={2: lambda fields: shared})
    with people.session_scope("user:1") as session:
        session["list"].append(2)
    assert shared == {"list": [1]}


def test_timers_stay_with_fields_that_stay(monkeypatch: pytest.MonkeyPatch, storage: Any) -> None:
    now = [1000.0]
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now[0])
    with SessionManager(storage=storage).session_scope("user:1") as session:
        session.clear()
        session.update(
            gone=ttl(1, 5), renamed=ttl(2, 50), kept=ttl(3, 50), early=ttl(4, 5), plain=5
        )
    seen: list[Any] = []

    def rename(fields: dict[str, Any]) -> None:
        seen.append(dict(fields))
        fields["new"] = fields.pop("renamed")

    now[0] += 10
    people = SessionManager(storage=storage, migrations={2: rename})
    with people.session_scope("user:1") as session:
        assert session == {"kept": 3, "plain": 5, "new": 2}
    assert seen == [{"renamed": 2, "kept": 3, "plain": 5}]
    stored = storage.get("user:1")
    assert stored.pop("$ttl") == {"kept": [1050.0, 50.0]}
    assert stored == {"kept": 3, "plain": 5, "new": 2, "$version": 2}
    now[0] += 50
    with people.session_scope("user:1") as session:
        assert session == {"plain": 5, "new": 2}


def test_a_step_may_set_a_field_whose_time_was_up(
    monkeypatch: pytest.MonkeyPatch, storage: Any
) -> None:
    now = [1000.0]
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now[0])
    with SessionManager(storage=storage).session_scope("user:1") as session:
        session.status = ttl("trial", 5)
    now[0] += 10

    def begin(fields: dict[str, Any]) -> None:
        fields.setdefault("status", "free")

    with SessionManager(storage=storage, migrations={2: begin}).session_scope("user:1") as session:
        assert session.status == "free"
    assert storage.get("user:1") == {**OLD, "status": "free", "$version": 2}


def test_a_session_of_which_all_time_is_up_is_not_migrated_but_gone(
    monkeypatch: pytest.MonkeyPatch, storage: Any
) -> None:
    now = [1000.0]
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now[0])
    with SessionManager(storage=storage).session_scope("user:2") as session:
        session.code = ttl("1234", 5)
    now[0] += 10
    never = {2: lambda fields: pytest.fail("it ran")}
    with SessionManager(storage=storage, migrations=never).session_scope("user:2") as session:
        assert session == {}
    assert not storage.has("user:2")


def test_the_last_timer_goes_with_its_field(storage: Any) -> None:
    with SessionManager(storage=storage).session_scope("user:1") as session:
        session.code = ttl("1234", 300)

    def drop(fields: dict[str, Any]) -> None:
        del fields["code"]

    with SessionManager(storage=storage, migrations={2: drop}).session_scope("user:1"):
        pass
    assert storage.get("user:1") == {**OLD, "$version": 2}


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (lambda fields: 1 / 0, ZeroDivisionError),
        (lambda fields: fields[SECRET], KeyError),
        (lambda fields: 5, TypeError),
        (lambda fields: {5: 1}, TypeError),
        (lambda fields: {"$x": 1}, ValueError),
        (lambda fields: {"x": ttl(1, 5)}, TypeError),
        (lambda fields: fields.update(x=fields), RecursionError),
    ],
)
def test_a_step_that_fails_leaves_the_stored_session_and_is_named(
    step: Any, cause: type[Exception], storage: Any
) -> None:
    step.__qualname__ = "break_it"
    people = SessionManager(
        storage=storage, migrations={2: split_name, 3: step, 4: lambda fields: pytest.fail("ran")}
    )
    for _ in range(2):  # the key is free again
        with pytest.raises(SessionMigrationError) as caught, people.session_scope("user:1"):
            pass
        message = str(caught.value)
        assert "session 'user:1': the migration to version 3 (break_it) failed" in message
        assert cause.__name__ in message
        assert SECRET not in message
        assert isinstance(caught.value.__cause__, cause)
        assert storage.get("user:1") == OLD


def test_a_result_of_another_type_than_declared_is_refused(storage: Any) -> None:
    def wrong(fields: dict[str, Any]) -> None:
        fields["lines"] = [{"text": 5}]

    class Wrong(StrictSession):
        migrations = {2: wrong}
        lines: list[Line] = field(default_factory=list)

    with (
        pytest.raises(
            SessionTypeError,
            match=r"'user:1': after the migration to version 2, lines\[0\].text is int, where",
        ),
        SessionManager(Wrong, storage=storage).session_scope("user:1"),
    ):
        pass
    assert storage.get("user:1") == OLD


# -- what cannot be


@pytest.mark.parametrize(
    ("migrations", "error", "message"),
    [
        ({1: split_name}, ValueError, "has the number 1: a session without a version counts as"),
        ({0: split_name, 2: split_name}, ValueError, "has the number 0"),
        ({"2": split_name}, TypeError, "a version is an int, not str"),
        ({True: split_name}, TypeError, "a version is an int, not bool"),
        ({2: None}, TypeError, r"\[2\] must be a plain function"),
        ({2: asyncio.sleep}, TypeError, r"\[2\] must be a plain function"),
        ([split_name], TypeError, "must be a mapping, .* not list"),
    ],
)
def test_migrations_that_cannot_be_are_refused_at_once(
    migrations: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"Bad\.migrations.*{message}"):
        type("Bad", (Session,), {"migrations": migrations})
    with pytest.raises(error, match=rf"migrations.*{message}"):
        SessionManager(migrations=migrations)


def test_migrations_are_given_in_one_place() -> None:
    with pytest.raises(TypeError, match="Person has migrations already"):
        SessionManager(Person, migrations={2: split_name})


def test_an_eager_save_that_fails_leaves_a_lazy_session_unloaded(
    monkeypatch: pytest.MonkeyPatch, storage: Any
) -> None:
    people = SessionManager(Person, storage=storage, lazy=True, migrate_eagerly=True)
    door = people.scopes.options.backend
    with people.session_scope("user:1") as session:
        with monkeypatch.context() as broken:
            broken.setattr(door, "save", _full)
            broken.setattr(storage, "save", _full)
            with pytest.raises(OSError, match="disk full"):
                session.first  # noqa: B018
        assert len(door.locks) == 0
        assert session.first == "Alex"  # loaded again, under its lock
        assert len(door.locks) == 1
    assert storage.get("user:1") == NEW
    storage.set("user:1", OLD)
    with monkeypatch.context() as broken:
        broken.setattr(door, "save", _full)
        broken.setattr(storage, "save", _full)
        with pytest.raises(OSError, match="disk full"), people.session_scope("user:1") as session:
            session.first  # noqa: B018
    for late in (lambda: session.first, lambda: setattr(session, "first", "x")):
        with pytest.raises(SessionClosedError):
            late()
    assert storage.get("user:1") == OLD


def test_a_manager_of_another_version_does_not_join(storage: Any) -> None:
    plain, people = SessionManager(storage=storage), SessionManager(Person, storage=storage)
    with plain.session_scope("user:1"):
        with (
            pytest.raises(
                SessionVersionError, match=r"version 1, and .* \(Person\) knows version 3"
            ),
            people.session_scope("user:1"),
        ):
            pytest.fail("it was joined")
    assert storage.get("user:1") == OLD
    with people.session_scope("user:1") as outer, people.session_scope("user:1") as inner:
        assert inner is outer
        assert copy_storage(storage, MemoryStorage()) == 1  # which does not look at versions


# -- newer than the program


def test_a_newer_session_is_refused_and_untouched(storage: Any) -> None:
    storage.set("user:1", {**NEW, "$version": 4})
    for older in (
        SessionManager(Person, storage=storage),
        SessionManager(Person, storage=storage, on_error="flush", migrate_eagerly=True),
        SessionManager(storage=storage),  # a program from before there were versions
        SessionManager(storage=storage, initial=lambda _: {"x": 1}),
    ):
        with (
            pytest.raises(
                SessionVersionError, match=r"'user:1' .*version 4.* known here is \d"
            ) as e,
            older.session_scope("user:1"),
        ):
            pytest.fail("it was opened")
        assert isinstance(e.value, RuntimeError)
        assert isinstance(e.value, SessionError)
        with pytest.raises(ExceptionGroup) as group:
            older.migrate_all()
        assert isinstance(group.value.exceptions[0], SessionVersionError)
    assert storage.get("user:1") == {**NEW, "$version": 4}


def test_copying_takes_sessions_of_any_version_as_they_are(storage: Any) -> None:
    storage.set("user:2", {**NEW, "$version": 99})
    target = MemoryStorage()
    assert copy_storage(storage, target) == 2
    assert target.get("user:1") == OLD
    assert target.get("user:2") == {**NEW, "$version": 99}


# -- all of them


def test_migrate_all_brings_every_session_up_to_date(people: SessionManager[Person]) -> None:
    for number in range(2, 6):
        people.storage.set(f"user:{number}", OLD)
    seen: list[str] = []
    assert people.migrate_all(seen.append) == 5
    assert sorted(seen) == [f"user:{number}" for number in range(1, 6)]
    assert [people.storage.get(f"user:{number}") for number in range(1, 6)] == [NEW] * 5
    assert people.migrate_all() == 0


def test_migrate_all_can_be_interrupted_and_goes_on(people: SessionManager[Person]) -> None:
    for number in range(2, 6):
        people.storage.set(f"user:{number}", OLD)
    seen: list[str] = []

    def stop(key: str) -> None:
        seen.append(key)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        people.migrate_all(stop)
    assert [people.storage.get(key) for key in seen] == [NEW] * 2
    assert people.migrate_all() == 3


def test_migrate_all_reads_once_what_is_up_to_date() -> None:
    storage = Counting()
    for number in range(3):
        storage.set(f"user:{number}", NEW)
    storage.writes = 0
    assert SessionManager(Person, storage=storage).migrate_all() == 0
    assert (storage.reads, storage.writes) == (3, 0)


def test_migrate_all_leaves_what_fails_and_says_so(people: SessionManager[Person]) -> None:
    people.storage.set("user:2", {"first": "no name", "lines": [], "name": 5})
    people.storage.set("user:3", {"$version": 9, "x": 1})
    people.storage.set("user:4", OLD)
    seen: list[str] = []
    with pytest.raises(ExceptionGroup, match="2 sessions were not migrated, 2 were") as caught:
        people.migrate_all(seen.append)
    assert {type(error) for error in caught.value.exceptions} == {
        SessionMigrationError,
        SessionVersionError,
    }
    assert sorted(seen) == ["user:1", "user:4"]
    assert people.storage.get("user:2") == {"first": "no name", "lines": [], "name": 5}
    assert people.storage.get("user:4") == NEW


def test_migrate_all_makes_no_session_anew_that_is_gone_meanwhile(storage: Any) -> None:
    storage.set("user:2", OLD)
    people = SessionManager(
        Person, storage=storage, initial=lambda update: pytest.fail("nobody has asked for it")
    )
    seen: list[str] = []

    def forget(key: str) -> None:
        seen.append(key)
        for other in {"user:1", "user:2"} - set(seen):
            storage.delete(other)

    assert people.migrate_all(forget) == 1
    assert [key for key in ("user:1", "user:2") if storage.has(key)] == seen[:1]


def test_migrate_all_leaves_what_is_open_around_it(people: SessionManager[Person]) -> None:
    people.storage.set("user:2", OLD)
    with people.session_scope("user:1"):
        with pytest.raises(ExceptionGroup) as caught:
            people.migrate_all()
        assert "'user:1' is open around migrate_all()" in str(caught.value.exceptions[0])
    assert people.storage.get("user:2") == NEW


class Viewed(MemoryStorage):
    """Its keys are a view, which does not outlive a change."""

    def keys(self) -> Any:
        return self._records.keys()


def test_migrate_all_may_delete_while_it_lists() -> None:
    storage = Viewed()
    for number in range(5):
        storage.set(f"user:{number}", OLD)
    assert SessionManager(storage=storage, migrations={2: lambda fields: {}}).migrate_all() == 5
    assert list(storage.keys()) == []


def test_what_failed_before_an_interruption_is_not_forgotten(
    people: SessionManager[Person],
) -> None:
    people.storage.set("user:0", {"name": 5})
    people.storage.set("user:2", OLD)

    def stop(key: str) -> None:
        if key == "user:2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        people.migrate_all(stop)
    keys = list(people.storage.keys())
    if keys.index("user:0") < keys.index("user:2"):
        (note,) = caught.value.__notes__
        assert "SessionMigrationError: session 'user:0'" in note


def test_many_failures_do_not_keep_their_sessions_in_memory() -> None:
    storage = MemoryStorage()
    for number in range(20):
        storage.set(f"user:{number}", {"name": 5})
    with pytest.raises(ExceptionGroup) as caught:
        SessionManager(Person, storage=storage).migrate_all()
    kept = [error for error in caught.value.exceptions if error.__traceback__ is not None]
    assert len(caught.value.exceptions) == 20
    assert len(kept) == 5


def test_migrate_all_keeps_to_its_prefix() -> None:
    storage = MemoryStorage()
    for key in ("a:user:1", "b:user:1", "user:1"):
        storage.set(key, OLD)
    seen: list[str] = []
    assert SessionManager(Person, storage=storage, prefix="a:").migrate_all(seen.append) == 1
    assert seen == ["user:1"]
    assert storage.get("a:user:1") == NEW
    assert storage.get("b:user:1") == storage.get("user:1") == OLD


@pytest.mark.parametrize("option", ["lazy", "migrate_eagerly"])
def test_migrate_all_works_for_every_manager(storage: Any, option: str) -> None:
    options: dict[str, Any] = {option: True}
    assert SessionManager(Person, storage=storage, **options).migrate_all() == 1
    assert storage.get("user:1") == NEW


def test_migrate_all_needs_a_storage_that_lists_its_keys() -> None:
    class Four:
        def get(self, key: str) -> Any: ...
        def set(self, key: str, value: Any) -> None: ...
        def delete(self, key: str) -> None: ...
        def has(self, key: str) -> bool:
            return False

    with pytest.raises(TypeError, match="Four cannot list its keys"):
        SessionManager(Person, storage=Four()).migrate_all()


def test_migrate_all_waits_for_a_handler_and_loses_nothing_of_it(threads: Any) -> None:
    storage = MemoryStorage()
    storage.set("user:1", OLD)
    people = SessionManager(Person, storage=storage)
    opened, go_on = threading.Event(), threading.Event()

    def handler() -> None:
        with people.session_scope("user:1") as session:
            opened.set()
            go_on.wait(10)
            session.last = "Roe"

    threads.start(handler)
    assert opened.wait(10)
    migrated: list[int] = []
    waiting = threads.start(lambda: migrated.append(people.migrate_all()))
    assert waiting.is_alive()
    go_on.set()
    threads.join()
    assert migrated == [0]  # the handler had done it
    assert storage.get("user:1") == {**NEW, "last": "Roe"}


def test_migrate_all_goes_on_past_a_session_that_somebody_keeps(threads: Any) -> None:
    storage = MemoryStorage()
    for number in (1, 2):
        storage.set(f"user:{number}", OLD)
    people = SessionManager(Person, storage=storage, lock_timeout=0.05)
    opened, go_on = threading.Event(), threading.Event()

    def handler() -> None:
        with people.session_scope("user:1"):
            opened.set()
            go_on.wait(10)

    threads.start(handler)
    assert opened.wait(10)
    with pytest.raises(ExceptionGroup) as caught:
        people.migrate_all()
    go_on.set()
    assert isinstance(caught.value.exceptions[0], SessionLockTimeoutError)
    assert storage.get("user:2") == NEW


def test_bots_may_run_meanwhile_and_no_update_is_lost(storage: Any, threads: Any) -> None:
    people = SessionManager(Person, storage=storage)
    keys = [f"user:{number}" for number in range(20)]
    for key in keys:
        storage.set(key, OLD)

    def bot() -> None:
        for _ in range(5):
            for key in keys:
                with people.session_scope(key) as session:
                    session.count = session.get("count", 0) + 1

    migrated: list[int] = []
    for _ in range(3):
        threads.start(bot)
    threads.start(lambda: migrated.append(people.migrate_all()))
    threads.join()
    for key in keys:
        assert storage.get(key) == {**NEW, "count": 15}


PROGRAM = """
    import sys
    from session_sync import Session, SessionManager, storage_from_url
    def twice(fields):
        fields["count"] = fields["count"] * 2  # done twice, it would show
    class Counted(Session):
        migrations = {2: twice}
        count: int = 0
    sessions = SessionManager(Counted, storage=storage_from_url(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "all":
        sessions.migrate_all()
    else:
        for number in range(30):
            with sessions.session_scope(f"user:{number}") as session:
                session.count += 1
"""


@pytest.mark.parametrize("scheme", ["sqlite", "disk", "redis"])
def test_several_processes_migrate_each_session_once(
    scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from session_sync import storage_from_url

    url = f"{scheme}:///{tmp_path}/{scheme}"
    if scheme == "redis":
        url = request.getfixturevalue("redis_url") + "?prefix=migrated:"
    storage: Any = storage_from_url(url)
    for number in range(30):
        storage.set(f"user:{number}", {"count": 100})
    kinds = ["all", "all", "bot", "bot"]
    program = textwrap.dedent(PROGRAM)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, url, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in kinds
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.communicate("go\n", timeout=60)
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for number in range(30):
        assert storage.get(f"user:{number}") == {"count": 202, "$version": 2}
    storage.close()
