"""Versions of stored sessions: how an older one becomes the newest, and that none is eaten."""

from __future__ import annotations

import asyncio
from typing import Any

import migration_tools
import pytest
from conftest import Counting
from migration_tools import NEW, OLD, Line, Person, split_name

from session_sync import (
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionDecodeError,
    SessionEncodeError,
    SessionError,
    SessionManager,
    SessionMigrationError,
    SessionTypeError,
    SessionVersionError,
    StrictSession,
    copy_storage,
    field,
    ttl,
)

storage = pytest.fixture(migration_tools.make_storage)
people = pytest.fixture(migration_tools.make_people)

SECRET = "s3cr3t"  # in a value: it may stand in no message


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
    backend = people.scopes.options.backend
    with people.session_scope("user:1") as session:
        with monkeypatch.context() as broken:
            broken.setattr(backend, "save", _full)
            broken.setattr(storage, "save", _full)
            with pytest.raises(OSError, match="disk full"):
                session.first  # noqa: B018
        assert len(backend.locks) == 0
        assert session.first == "Alex"  # loaded again, under its lock
        assert len(backend.locks) == 1
    assert storage.get("user:1") == NEW
    storage.set("user:1", OLD)
    with monkeypatch.context() as broken:
        broken.setattr(backend, "save", _full)
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
