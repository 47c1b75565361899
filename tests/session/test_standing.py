"""Where a user stands: kept with the fields, and none of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from session_tools import PicklingStorage

from session_sync import (
    Codec,
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionDecodeError,
    SessionEncodeError,
    SessionManager,
    SQLiteStorage,
    StrictSession,
    copy_storage,
    ttl,
)
from session_sync.session.standing import standing_of, stands_at

KEY = "user:1:chat:1"
FORM = "conversation:form:"


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield MemoryStorage()
        return
    with closing(SQLiteStorage(tmp_path / "s.db")) as made:
        yield made


@pytest.fixture
def sessions(storage: Any) -> SessionManager[Session]:
    return SessionManager(storage=storage)


def stand(sessions: SessionManager[Any], key: str = KEY, **at: Any) -> None:
    with sessions.session_scope(key) as session:
        standing_of(session).update(at)


def standing(sessions: SessionManager[Any], key: str = KEY) -> dict[str, Any]:
    with sessions.session_scope(key) as session:
        return dict(standing_of(session))


class FailedError(Exception):
    pass


# -- kept, and no field


def test_it_is_kept_with_all_that_is_changed_in_it(sessions: SessionManager[Session]) -> None:
    with sessions.session_scope(KEY) as session:
        standing_of(session)[FORM] = "NAME"
        standing_of(session)["states"] = {"data": {"seen": [1]}}
    with sessions.session_scope(KEY) as session:
        standing_of(session)["states"]["data"]["seen"].append((2, {3}))
        session.name = "Alex"
    with sessions.session_scope(KEY) as session:
        assert standing_of(session) == {
            FORM: "NAME",
            "states": {"data": {"seen": [1, (2, {3})]}},
        }
        assert session == {"name": "Alex"}


def test_it_is_no_field(sessions: SessionManager[Session]) -> None:
    stand(sessions, form="AGE")
    with sessions.session_scope(KEY) as session:
        assert session == {}
        assert (len(session), list(session), "$at" in session) == (0, [], False)
        assert "AGE" not in repr(session)
        with pytest.raises(KeyError):
            session["$at"]
        with pytest.raises(ValueError, match="begins with"):
            session["$at"] = {}
        assert not dict(session)


def test_a_strict_session_does_not_see_it(storage: Any) -> None:
    class Person(StrictSession):
        name: str = ""

    people = SessionManager(Person, storage=storage)
    stand(people, form="AGE")
    with people.session_scope(KEY) as session:
        assert dict(session) == {"name": ""}
        session.name = "Alex"
    assert standing(people) == {"form": "AGE"}


def test_to_look_at_it_writes_nothing(storage: Any) -> None:
    events: list[Any] = []
    sessions: SessionManager[Session] = SessionManager(storage=storage, on_close=events.append)
    assert standing(sessions) == {}
    assert not storage.has(KEY)
    stand(sessions, form=[1])
    with sessions.session_scope(KEY) as session:
        assert standing_of(session)["form"] == [1]
    assert [event.written for event in events] == [False, True, False]


# -- how long it is stored


def test_without_fields_it_is_stored_until_the_user_stands_nowhere(
    sessions: SessionManager[Session],
) -> None:
    stand(sessions, form="AGE")
    assert sessions.storage.has(KEY)
    with sessions.session_scope(KEY) as session:
        standing_of(session).clear()
    assert not sessions.storage.has(KEY)


@pytest.mark.parametrize("empty", ["clear", "assign None", "delete"])
def test_to_empty_a_session_leaves_the_user_where_it_is(
    empty: str, sessions: SessionManager[Session]
) -> None:
    with sessions.session_scope(KEY) as session:
        session.update(name="Alex", age=ttl(5, 60))
        standing_of(session)[FORM] = "AGE"
    with sessions.session_scope(KEY) as session:
        if empty == "delete":
            del session["name"], session["age"]
        else:
            session.clear()
    with sessions.session_scope(KEY) as session:
        assert (dict(session), standing_of(session)) == ({}, {FORM: "AGE"})


def test_to_forget_a_user_deletes_both(sessions: SessionManager[Session]) -> None:
    stand(sessions, form="AGE")
    assert sessions.forget(user=1) == 1
    assert not sessions.storage.has(KEY)


def test_both_may_go_at_the_same_time(sessions: SessionManager[Session]) -> None:
    with sessions.session_scope(KEY) as session:
        session.name = "Alex"
        standing_of(session)[FORM] = "AGE"
    with sessions.session_scope(KEY) as session:
        session.clear()
        standing_of(session).clear()
    assert not sessions.storage.has(KEY)


def test_a_session_that_has_it_alone_counts_as_new(storage: Any) -> None:
    sessions: SessionManager[Any] = SessionManager(
        storage=storage, initial=lambda _update: {"lang": "en"}
    )
    stand(sessions, form="AGE")
    with sessions.session_scope(KEY) as session:
        assert session == {"lang": "en"}
        session.clear()
    with sessions.session_scope(KEY) as session:
        assert session == {"lang": "en"}
        assert standing_of(session) == {"form": "AGE"}


def test_what_a_session_begins_with_is_not_stored_for_it(storage: Any) -> None:
    sessions: SessionManager[Any] = SessionManager(
        storage=storage, initial=lambda _update: {"lang": "en"}
    )
    with sessions.session_scope(KEY) as session:
        standing_of(session)["form"] = "AGE"
        session.flush()
        assert session == {"lang": "en"}
        standing_of(session)["form"] = "CITY"
        assert session == {"lang": "en"}
    with sessions.session_scope("user:2") as session:
        standing_of(session)["form"] = "AGE"
    assert storage.get("user:2") == {"$at": {"form": "AGE"}}


# -- together with the fields


def test_a_handler_that_fails_undoes_it(sessions: SessionManager[Session]) -> None:
    stand(sessions, form="AGE", data={"a": [1]})

    def fail() -> None:
        with sessions.session_scope(KEY) as session:
            standing_of(session)["form"] = "CITY"
            session.flush()
            standing_of(session)["form"] = "END"
            standing_of(session)["data"]["a"].append(2)
            raise FailedError

    with pytest.raises(FailedError):
        fail()
    assert standing(sessions) == {"form": "CITY", "data": {"a": [1]}}


def test_what_was_handed_out_cannot_be_changed_after_the_end(
    sessions: SessionManager[Session],
) -> None:
    stand(sessions, data={"a": 1})
    with sessions.session_scope(KEY) as session:
        at = standing_of(session)
    with pytest.raises(SessionClosedError):
        at["form"] = "AGE"
    with pytest.raises(SessionClosedError):
        at["data"]["a"] = 2
    with pytest.raises(SessionClosedError):
        standing_of(session)["form"] = "AGE"
    assert standing(sessions) == {"data": {"a": 1}}


def test_after_a_release_it_can_be_read_as_the_fields_can(
    sessions: SessionManager[Session],
) -> None:
    with sessions.session_scope(KEY) as session:
        standing_of(session)["form"] = "AGE"
        session.release()
        assert standing_of(session)["form"] == "AGE"
        assert standing(sessions) == {"form": "AGE"}


def test_a_lazy_session_is_loaded_for_it(storage: Any) -> None:
    lazy: SessionManager[Session] = SessionManager(storage=storage, lazy=True)
    stand(lazy, form="AGE")
    assert standing(lazy) == {"form": "AGE"}


def test_what_no_store_keeps_is_refused_where_it_is_assigned(tmp_path: Path) -> None:
    with closing(SQLiteStorage(tmp_path / "s.db")) as storage:
        sessions: SessionManager[Session] = SessionManager(storage=storage)
        stand(sessions, states={"data": {}})
        with sessions.session_scope(KEY) as session:
            with pytest.raises(
                SessionEncodeError, match=r"\[.\$at.\].states.data\[...\] is of type"
            ):
                standing_of(session)["states"]["data"]["x"] = object()
        assert standing(sessions) == {"states": {"data": {}}}


class Box:
    """Something whose changes are not noticed."""

    def __init__(self, content: int) -> None:
        self.content = content


def test_an_object_in_it_that_was_changed_is_saved(tmp_path: Path) -> None:
    codec = Codec(
        lambda value: ("box", value.content) if isinstance(value, Box) else NotImplemented,
        lambda _name, value: Box(value),
    )
    with closing(SQLiteStorage(tmp_path / "s.db", codec=codec)) as storage:
        sessions: SessionManager[Session] = SessionManager(storage=storage)
        stand(sessions, data={"box": Box(1)})
        with sessions.session_scope(KEY) as session:
            standing_of(session)["data"]["box"].content = 2
        assert standing(sessions)["data"]["box"].content == 2
        with sessions.session_scope("user:2") as session:
            standing_of(session)["box"] = Box(3)
            session.flush()
            standing_of(session)["box"].content = 4
        assert standing(sessions, "user:2")["box"].content == 4


def test_an_object_in_it_that_a_failed_handler_has_changed_is_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        with sessions.session_scope(KEY) as session:
            standing_of(session)["box"].content = 2
            raise FailedError

    codec = Codec(
        lambda value: ("box", value.content) if isinstance(value, Box) else NotImplemented,
        lambda _name, value: Box(value),
    )
    with closing(SQLiteStorage(tmp_path / "s.db", codec=codec)) as storage:
        sessions: SessionManager[Session] = SessionManager(storage=storage)
        stand(sessions, box=Box(1))
        with pytest.raises(FailedError):
            fail()
        assert standing(sessions)["box"].content == 1


def test_an_object_that_was_changed_before_a_roll_back_is_not_saved_for_that() -> None:
    sessions: SessionManager[Session] = SessionManager(storage=PicklingStorage())
    stand(sessions, box=Box(1))
    with sessions.session_scope(KEY) as session:
        standing_of(session)["box"].content = 2
        Session._opened(session).roll_back()
        assert standing_of(session)["box"].content == 2  # the store has given this very object
    assert standing(sessions)["box"].content == 1


def test_a_change_of_another_thread_is_part_of_a_flush_or_of_the_next_one(
    sessions: SessionManager[Session],
) -> None:
    def count() -> None:
        for number in range(300):
            at[f"step {number}"] = number

    with sessions.session_scope(KEY) as session:
        at = standing_of(session)
        thread = threading.Thread(target=count)
        thread.start()
        while thread.is_alive():
            session.flush()
        thread.join()
    assert standing(sessions) == {f"step {number}": number for number in range(300)}


def test_two_threads_that_ask_at_once_get_the_same(sessions: SessionManager[Session]) -> None:
    stand(sessions, form="AGE")
    for _ in range(50):
        with sessions.session_scope(KEY) as session:
            together = threading.Barrier(4)
            found: list[Any] = []

            def ask(session: Any = session, together: Any = together, found: Any = found) -> None:
                together.wait()
                found.append(standing_of(session))

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len({id(each) for each in found}) == 1


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.just(Fraction(1, 2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["set", "pop", "name", "flush"]), values),
        max_size=8,
    ),
    st.booleans(),
)
def test_it_is_what_a_dict_would_be(changes: list[tuple[str, str, Any]], fails: bool) -> None:
    sessions: SessionManager[Session] = SessionManager()
    stand(sessions, a=1)
    model: dict[str, Any] = {"a": 1}
    fields: dict[str, Any] = {}
    kept = dict(model), dict(fields)

    def handle() -> None:
        nonlocal kept
        with sessions.session_scope(KEY) as session:
            for name, what, value in changes:
                if what == "set":
                    standing_of(session)[name] = model[name] = value
                elif what == "pop":
                    assert standing_of(session).pop(name, None) == model.pop(name, None)
                elif what == "name":
                    session[name] = fields[name] = value
                else:
                    session.flush()
                    kept = dict(model), dict(fields)
            if fails:
                raise FailedError
            kept = model, fields

    if fails:
        with pytest.raises(FailedError):
            handle()
    else:
        handle()
    with sessions.session_scope(KEY) as session:
        assert (dict(standing_of(session)), dict(session)) == kept


# -- beside the rest of the record


def test_an_older_session_takes_it_along(storage: Any) -> None:
    class Person(Session):
        migrations = {2: lambda fields: fields.update(first=fields.pop("name", ""))}

    stand(SessionManager(storage=storage), form="AGE")
    people = SessionManager(Person, storage=storage)
    assert standing(people) == {"form": "AGE"}
    with people.session_scope(KEY) as session:
        standing_of(session)["form"] = "CITY"
    assert storage.get(KEY)["$version"] == 2
    with people.session_scope(KEY) as session:
        standing_of(session).clear()
        session.clear()
    assert not storage.has(KEY)


def test_it_goes_into_another_store(sessions: SessionManager[Session]) -> None:
    stand(sessions, form=("AGE", 1))
    goal = MemoryStorage()
    copy_storage(sessions.storage, goal)
    assert standing(SessionManager(storage=goal)) == {"form": ("AGE", 1)}


@pytest.mark.parametrize(
    ("older", "newer", "kept"),
    [
        ({"form": "AGE"}, {}, {"form": "AGE"}),
        ({"form": "AGE", "states": 1}, {"form": "CITY"}, {"form": "CITY"}),
        ({}, {"form": "CITY"}, {"form": "CITY"}),
    ],
)
def test_of_two_sessions_that_become_one_the_newer_one_says_where_the_user_stands(
    older: dict[str, Any],
    newer: dict[str, Any],
    kept: dict[str, Any],
    sessions: SessionManager[Session],
) -> None:
    for chat, at in ((-5, older), (-1005, newer)):
        with sessions.session_scope(f"user:1:chat:{chat}") as session:
            session.counter = 1
            standing_of(session).update(at)
    sessions.migrate_chat(-5, -1005)
    assert standing(sessions, "user:1:chat:-1005") == kept


def test_to_look_at_one_name_reads_what_is_there(sessions: SessionManager[Session]) -> None:
    stand(sessions, form="AGE")
    with sessions.session_scope(KEY) as session:
        assert (stands_at(session, "form"), stands_at(session, "other")) == ("AGE", None)
        standing_of(session)["form"] = "CITY"
        assert stands_at(session, "form") == "CITY"
    sessions.storage.set(KEY, {"$at": "AGE"})
    with sessions.session_scope(KEY) as session:
        with pytest.raises(SessionDecodeError, match=r"user:1.*\$at"):
            stands_at(session, "form")


@pytest.mark.parametrize("nonsense", ["AGE", ["AGE"], {1: "AGE"}])
def test_what_was_not_written_here_is_left_as_it_is(nonsense: Any, storage: Any) -> None:
    stored = {"name": "Alex", "$at": nonsense}
    storage.set(KEY, stored)
    sessions: SessionManager[Session] = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        assert session == {"name": "Alex"}
        with pytest.raises(SessionDecodeError, match=r"user:1.*\$at.*left as it is") as raised:
            standing_of(session)
        assert "AGE" not in str(raised.value)
        session.name = "Kim"
    assert storage.get(KEY) == {**stored, "name": "Kim"}
