"""What a handler can do with its session and with the containers in it, and what is stored then."""

from __future__ import annotations

import bisect
import collections
import copy
import enum
import heapq
import itertools
import json
import pickle
import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import session_sync.session.containers
import session_sync.session.session
from session_sync import (
    Codec,
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionDecodeError,
    SessionEncodeError,
    SessionManager,
    ttl,
)
from session_sync.session.containers import SessionDict, SessionList, SessionSet

KEY = "user:1"
Sessions = SessionManager[Session]


class OwnStorage:
    """The four methods, as a user of the library would write them."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []

    def get(self, key: str) -> dict[str, Any] | None:
        self.calls.append("get")
        return self.kept.get(key)

    def set(self, key: str, value: dict[str, Any]) -> None:
        self.calls.append("set")
        self.kept[key] = value

    def delete(self, key: str) -> None:
        self.calls.append("delete")
        self.kept.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.kept


class PicklingStorage(OwnStorage):
    """Keeps bytes, so that nothing in it is shared with anybody."""

    def get(self, key: str) -> dict[str, Any] | None:
        found: Any = super().get(key)
        return None if found is None else pickle.loads(found)

    def set(self, key: str, value: dict[str, Any]) -> None:
        super().set(key, pickle.dumps(value))  # type: ignore[arg-type]


class FailingStorage(MemoryStorage):
    """Refuses to save for as long as it is told so."""

    failing = False

    def save(self, key: str, record: Any) -> None:
        if self.failing:
            raise OSError("disk full")
        super().save(key, record)


def disk(folder: Path, **options: Any) -> Any:
    pytest.importorskip("diskcache")
    from session_sync import DiskStorage

    return DiskStorage(folder, **options)


@pytest.fixture(params=["memory", "strict", "lru", "disk", "own", "pickling"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made = {
        "memory": MemoryStorage,
        "strict": lambda: MemoryStorage(strict=True),
        "lru": lambda: LruMemoryStorage(10),
        "disk": lambda: disk(tmp_path / "sessions"),
        "own": OwnStorage,
        "pickling": PicklingStorage,
    }[request.param]()
    yield made
    getattr(made, "close", lambda: None)()


@pytest.fixture
def sessions(storage: Any) -> Sessions:
    return SessionManager(storage=storage)


@pytest.fixture
def in_memory() -> Sessions:
    return SessionManager()


def fill(sessions: Sessions, fields: Mapping[str, Any] = (), /, **more: Any) -> None:  # type: ignore[assignment]
    """Store a session under KEY."""
    with sessions.session_scope(KEY) as session:
        session.update(fields, **more)


def stored(sessions: Sessions, key: str = KEY) -> dict[str, Any]:
    """What lies in the store, as plain types, whatever it is."""
    return sessions.storage.get(key) or {}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types, in the same order."""
    return bool(one == other) and repr(one) == repr(other)


def closed_session(sessions: Sessions, /, **fields: Any) -> Session:
    fill(sessions, fields)
    with sessions.session_scope(KEY) as session:
        for name in session:
            session[name]
    return session


# -- as a mapping and as an object


def test_brackets_and_attributes_are_the_same_field(sessions: Sessions) -> None:
    with sessions.session_scope(KEY) as session:
        session.counter = 1
        session["counter"] += 1
        session.counter += 1
        session["name"] = "alex"
        assert session.counter == session["counter"] == 3
        assert session.name == "alex"
        del session.name
        assert "name" not in session
        assert not hasattr(session, "name")
    assert stored(sessions) == {"counter": 3}


def test_a_session_does_what_a_dict_does(sessions: Sessions) -> None:
    with sessions.session_scope(KEY) as session:
        assert isinstance(session, MutableMapping)
        assert not session
        assert session.get("draft") is None
        assert session.get("draft", 7) == 7
        assert session.setdefault("tags", []) == []
        session.setdefault("tags", None).append("new")
        session.update({"a": 1}, b=2)
        session.update([("c", 3)])
        session.update((name, 4) for name in "d")
        session |= {"e": 5}
        session |= [("f", 6)]
        assert len(session) == 7
        assert session == {"tags": ["new"], "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}
        assert session != {"tags": ["new"]}
        assert session.pop("f") == 6
        assert session.pop("f", "gone") == "gone"
        with pytest.raises(KeyError):
            session.pop("f")
        assert session.popitem() == ("e", 5)
        assert list(session) == list(session.keys()) == ["tags", "a", "b", "c", "d"]
        assert list(reversed(session)) == ["d", "c", "b", "a", "tags"]
        assert list(session.values()) == [["new"], 1, 2, 3, 4]
        assert list(session.items())[1] == ("a", 1)
    assert stored(sessions) == {"tags": ["new"], "a": 1, "b": 2, "c": 3, "d": 4}


def test_a_none_is_a_field_like_any_other(in_memory: Sessions) -> None:
    with in_memory.session_scope(KEY) as session:
        session.update(a=1, b=None)
        assert session.popitem() == ("b", None)
        session.b = None
    with in_memory.session_scope(KEY) as session:
        assert session.popitem() == ("b", None)
        assert session.popitem() == ("a", 1)
    assert stored(in_memory) == {}


def test_what_is_not_there_raises_as_with_a_dict_or_an_object(in_memory: Sessions) -> None:
    with in_memory.session_scope(KEY) as session:
        with pytest.raises(KeyError, match="draft"):
            session["draft"]
        with pytest.raises(KeyError, match="draft"):
            del session["draft"]
        with pytest.raises(AttributeError, match=r"'user:1' has no field 'draft'.*get\('draft'\)"):
            _ = session.draft
        with pytest.raises(AttributeError, match="has no field 'draft'"):
            del session.draft
        with pytest.raises(KeyError, match="empty"):
            session.popitem()
        assert 7 not in session
        assert session.get(7) is None  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            [] in session  # noqa: B015


def test_the_union_with_a_session_is_a_plain_dict(in_memory: Sessions) -> None:
    with in_memory.session_scope(KEY) as session, in_memory.session_scope("other") as other:
        session.update(a=1, b=2)
        other.update(b=3)
        for union in (session | {"b": 3}, session | other):
            assert type(union) is dict
            assert union == {"a": 1, "b": 3}
        assert {"b": 3} | session == {"b": 2, "a": 1}
        plain = {"b": 3}
        plain |= session
        assert plain == {"b": 2, "a": 1}
        assert dict(**session) == {"a": 1, "b": 2}
        with pytest.raises(TypeError):
            session | 5  # type: ignore[operator]
        with pytest.raises(TypeError):
            5 | session  # type: ignore[operator]
        with pytest.raises(TypeError):
            session |= 5  # type: ignore[operator]


def test_sessions_with_the_same_fields_are_equal(in_memory: Sessions) -> None:
    with in_memory.session_scope(KEY) as session, in_memory.session_scope("other") as other:
        session.update(a=[1])
        assert session != other
        other.update(a=[1])
        assert session == other
        assert session != 5
        with pytest.raises(TypeError):
            hash(session)


def test_a_session_matches_patterns(in_memory: Sessions) -> None:
    fill(in_memory, {"step": "pay", "cart": {"items": ["tea"], "seen": {7}}})
    with in_memory.session_scope(KEY) as session:
        match session:
            case {"step": "pay", "cart": {"items": [first, *_], **rest}}:
                assert first == "tea"
                assert type(rest) is dict
            case _:
                pytest.fail("no match")
        match session:
            case Session(step="ask"):
                pytest.fail("a match")
            case Session(nothing=_):
                pytest.fail("a match")
            case Session(step="pay", cart=dict(cart)):
                assert cart["seen"] == {7}
            case _:
                pytest.fail("no match")


def test_copies_and_pickles_of_a_session_are_plain_dicts(sessions: Sessions) -> None:
    fill(sessions, a=1, tags=["x"])
    with sessions.session_scope(KEY) as session:
        for made in (
            session.copy(),
            copy.copy(session),
            copy.deepcopy(session),
            *(pickle.loads(pickle.dumps(session, protocol)) for protocol in range(6)),
        ):
            assert type(made) is dict
            assert made == {"a": 1, "tags": ["x"]}
        assert copy.copy(session)["tags"] is session["tags"]
        assert type(copy.deepcopy(session)["tags"]) is list


@pytest.mark.parametrize("name", ["items", "flush", "key", "copy", "release", "_private", "__x__"])
def test_a_name_that_a_method_has_is_reached_with_brackets(sessions: Sessions, name: str) -> None:
    with sessions.session_scope(KEY) as session:
        session[name] = 1
        with pytest.raises(AttributeError, match=rf"with brackets: session\['{name}'\]"):
            setattr(session, name, 2)
        with pytest.raises(AttributeError, match=rf"with brackets: session\['{name}'\]"):
            delattr(session, name)
        assert session[name] == 1
    assert stored(sessions) == {name: 1}


@pytest.mark.parametrize("name", ["$", "$ttl", "$version"])
def test_names_of_the_library_itself_are_refused(sessions: Sessions, name: str) -> None:
    with sessions.session_scope(KEY) as session:
        for assign in (session.__setitem__, session.__setattr__, session.setdefault):
            with pytest.raises(ValueError, match=r"'user:1'.*begins with '\$'"):
                assign(name, 1)
        assert name not in session
        assert session.get(name) is None
        assert not hasattr(session, name)
        with pytest.raises(KeyError):
            del session[name]
    assert stored(sessions) == {}


@pytest.mark.parametrize("name", [7, None, b"a", ("a",), 1.5, ["a"]])
def test_a_field_name_is_a_string(in_memory: Sessions, name: Any) -> None:
    with (
        in_memory.session_scope(KEY) as session,
        pytest.raises(TypeError, match=r"field name is a str, not .*session\['carts'\]\[user_id\]"),
    ):
        session[name] = 1


def test_a_member_of_a_str_enum_names_the_field_of_its_value(sessions: Sessions) -> None:
    class Name(enum.StrEnum):
        CART = "cart"

    with sessions.session_scope(KEY) as session:
        session[Name.CART] = 1
        assert session[Name.CART] == session.cart == 1
        assert [type(name) for name in session] == [str]
    assert same(stored(sessions), {"cart": 1})


def test_fields_keep_the_order_that_a_dict_would_have(sessions: Sessions) -> None:
    model: dict[str, int] = {}
    for _ in range(3):
        with sessions.session_scope(KEY) as session:
            for target in (session, model):
                target["a"] = target["b"] = target["c"] = 1
                del target["a"]
                target["b"] = 2
                target["d"] = 3
                target["a"] = 4
            assert list(session.items()) == list(model.items())
            session.flush()
            assert list(session.items()) == list(model.items())
            for target in (session, model):
                target["e"] = target.pop("b")
            assert list(session.items()) == list(model.items())
        assert list(stored(sessions).items()) == list(model.items())
        with sessions.session_scope(KEY) as session:
            assert list(session.items()) == list(model.items())


def test_a_session_may_change_while_it_is_iterated_over(sessions: Sessions) -> None:
    fill(sessions, a=1, b=2, c=3)
    with sessions.session_scope(KEY) as session:
        for name, value in session.items():
            session.pop("b", None)
            session[f"new {name}"] = value
    assert stored(sessions) == {"a": 1, "c": 3, "new a": 1, "new c": 3}


@pytest.mark.parametrize("empty", [Session.clear, lambda session: session.pop("a")])
def test_a_session_that_was_emptied_is_deleted(
    sessions: Sessions, empty: Callable[[Session], object]
) -> None:
    fill(sessions, a=1)
    assert sessions.storage.has(KEY)
    with sessions.session_scope(KEY) as session:
        empty(session)
        assert not session
        assert len(session) == 0
    assert not sessions.storage.has(KEY)


def test_a_repr_shows_names_and_no_values(sessions: Sessions) -> None:
    fill(sessions, password="secret")
    with sessions.session_scope(KEY) as session:
        session["card"] = {"number": "secret"}
        for shown in (repr(session), str(session), f"{session}"):
            assert shown == "<Session 'user:1': password, card>"
    assert "secret" not in repr(session)


def test_a_lazy_session_that_nobody_asked_says_so(in_memory: Sessions) -> None:
    lazy = SessionManager(storage=in_memory.storage, lazy=True)
    with lazy.session_scope(KEY) as session:
        assert repr(session) == "<Session 'user:1': not loaded>"
        assert session.key == KEY
        assert repr(session) == "<Session 'user:1': not loaded>"


@pytest.mark.parametrize(
    "touch",
    [
        lambda session: session.counter,
        lambda session: session["counter"],
        lambda session: session.__setitem__("counter", 1),
        lambda session: session.__delitem__("counter"),
        lambda session: "counter" in session,
        lambda session: iter(session),
        lambda session: reversed(session),
        lambda session: len(session),
        lambda session: session == {},
        lambda session: session.clear(),
        lambda session: session.copy(),
    ],
)
def test_whatever_touches_a_lazy_session_loads_it(
    in_memory: Sessions, touch: Callable[[Session], object]
) -> None:
    fill(in_memory, counter=1)
    lazy = SessionManager(storage=in_memory.storage, lazy=True)
    with lazy.session_scope(KEY) as session:
        touch(session)
        assert "not loaded" not in repr(session)


# -- containers


NESTED = {
    "cart": {"items": [{"name": "tea", "tags": {"hot"}}, (1, [2])], 7: None},
    "rows": [[1], [2, [3]]],
}


def test_changes_are_saved_to_any_depth(sessions: Sessions) -> None:
    fill(sessions, copy.deepcopy(NESTED))
    with sessions.session_scope(KEY) as session:
        session["cart"]["items"][0]["tags"].add("new")
        session.cart["items"][1][1].append(3)
        session.rows[1][1].append([4])
    with sessions.session_scope(KEY) as session:
        session.rows[1][1][1].append(5)
    assert stored(sessions) == {
        "cart": {"items": [{"name": "tea", "tags": {"hot", "new"}}, (1, [2, 3])], 7: None},
        "rows": [[1], [2, [3, [4, 5]]]],
    }


def test_what_was_only_read_is_not_saved() -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    values = {**copy.deepcopy(NESTED), "e": [{}, [], set(), ()], "f": float("nan"), "z": -0.0}
    fill(sessions, values)
    storage.calls.clear()
    with sessions.session_scope(KEY) as session:
        assert session.copy() == session
        sorted(session.rows)
        json.dumps(session.rows)
        copy.deepcopy(session.cart)
        session.cart["items"][0]["tags"] | {"x"}
    assert storage.calls == ["get"]


def test_what_was_changed_and_changed_back_to_the_same_objects_is_not_saved() -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, rows=[1, 2, 3])
    storage.calls.clear()
    with sessions.session_scope(KEY) as session:
        session.rows.append(4)
        session.rows.pop()
    assert storage.calls == ["get"]


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ([1], [True]),
        ([1], [1.0]),
        ([0.0], [-0.0]),
        ({1: "a"}, {True: "a"}),
        ({1: "a"}, {1.0: "a"}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1, "b": 1}, {"b": 1, "a": 1}),
        ({1}, {True}),
        ({1.0}, {1}),
        ((1, [2]), (1, [2.0])),
        ({"a": (1,)}, {"a": [1]}),
        ({"a": {1}}, {"a": frozenset({1})}),
        ([[]], [{}]),
        ([b"a"], ["a"]),
        ({"a": 1}, {"a": 1, "b": None}),
        ([None], []),
    ],
)
def test_what_is_equal_and_yet_another_value_is_saved(
    sessions: Sessions, was: Any, becomes: Any
) -> None:
    fill(sessions, it=was, inside=[was])
    with sessions.session_scope(KEY) as session:
        if isinstance(session.it, tuple):
            session.it[1][:] = becomes[1]
        else:
            session.it.clear()
            getattr(session.it, "update", None) or session.it.extend(becomes)
            if not isinstance(session.it, list):
                session.it.update(becomes)
        session.inside[0] = becomes
    with sessions.session_scope(KEY) as session:
        assert same(session.it, becomes)
        assert same(session.inside, [becomes])


def test_containers_are_dicts_lists_and_sets(sessions: Sessions) -> None:
    fill(sessions, d={"b": 1, "a": [1]}, l=[3, 1, 2], s={1, 2})
    with sessions.session_scope(KEY) as session:
        d, l, s = session.d, session.l, session.s  # noqa: E741
        assert isinstance(d, dict)
        assert isinstance(l, list)
        assert isinstance(s, set)
        assert json.dumps([d, l]) == '[{"b": 1, "a": [1]}, [3, 1, 2]]'
        assert (d, l, s) == ({"b": 1, "a": [1]}, [3, 1, 2], {1, 2})
        assert (repr(d), repr(l), repr(s)) == ("{'b': 1, 'a': [1]}", "[3, 1, 2]", "{1, 2}")
        assert sorted(l) == [1, 2, 3]
        assert sorted(d) == ["a", "b"]
        match [d, l]:
            case [{"a": [1]}, [3, *rest]]:
                assert rest == [1, 2]
            case _:
                pytest.fail("no match")
        assert {**d} == d
        assert [*l] == l


@pytest.mark.parametrize(
    "make",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda it, n=n: pickle.loads(pickle.dumps(it, n)) for n in range(6)),
        lambda it: pickle.loads(pickle._dumps(it)),  # type: ignore[attr-defined] # without C
        lambda it: it.copy(),
        lambda it: it[:] if isinstance(it, list) else it | type(it)(),
        lambda it: it + it[:0] if isinstance(it, list) else type(it)() | it,
        lambda it: it * 1 if isinstance(it, list) else it | it,
        lambda it: it | set() if isinstance(it, set) else it.copy(),
        lambda it: it.union() if isinstance(it, set) else it.copy(),
        lambda it: it ^ set() if isinstance(it, set) else it.copy(),
        lambda it: it - set() if isinstance(it, set) else it.copy(),
        lambda it: it & it if isinstance(it, set) else it.copy(),
    ],
)
@pytest.mark.parametrize("value", [{"a": 1, "b": 2}, [1, 2], {1, 2}, {}, [], set()])
def test_what_is_made_of_a_container_is_plain(
    in_memory: Sessions, make: Callable[[Any], Any], value: Any
) -> None:
    fill(in_memory, it=value)
    with in_memory.session_scope(KEY) as session:
        made = make(session.it)
        assert type(made) is type(value)
        assert made == value
        made.clear()
        assert session.it == value


def test_what_is_made_of_a_container_is_plain_to_any_depth(in_memory: Sessions) -> None:
    def types(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [types(item) for item in value.values()]
        return type(value), [types(item) for item in value] if isinstance(value, list) else None

    fill(in_memory, NESTED)
    with in_memory.session_scope(KEY) as session:
        for made in (copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
            assert types(made) == types(NESTED)
        assert type(session.cart.fromkeys("ab")) is dict


def test_cycles_and_shared_parts_survive_a_deepcopy(in_memory: Sessions) -> None:
    fill(in_memory, d={}, l=[])
    with in_memory.session_scope(KEY) as session:
        session.d["self"] = session.d
        made = copy.deepcopy(session.d)
        assert made["self"] is made
        del session.d["self"]
        shared = copy.deepcopy([session.l, session.l])
        assert shared[0] is shared[1]


@pytest.mark.parametrize(
    ("was", "change"),
    [
        ([3, 1, 2], lambda it: it.sort()),
        ([3, 1, 2], lambda it: it.sort(key=lambda n: -n, reverse=True)),
        ([3, 1, 2], lambda it: it.reverse()),
        ([3, 1, 2], lambda it: it.__setitem__(slice(1, 2), [7, 8])),
        ([3, 1, 2], lambda it: it.__setitem__(slice(None, None, 2), (n for n in (7, 8)))),
        ([3, 1, 2], lambda it: it.__delitem__(slice(1, None))),
        ([3, 1, 2], lambda it: it.__imul__(2)),
        ([3, 1, 2], lambda it: it.extend(it)),
        ([3, 1, 2], lambda it: it.__iadd__(it)),
        ([3, 1, 2], lambda it: it.__setitem__(slice(1, 1), it)),
        ([3, 1, 2], lambda it: it.extend(reversed(list(it)))),
        ([3, 1, 2], lambda it: it.extend({"k": "v"})),
        ([3, 1, 2], lambda it: it.extend("text")),
        ([3, 1, 2], lambda it: it.insert(-1, 9)),
        ([3, 1, 2], heapq.heapify),
        ([1, 2, 3], lambda it: heapq.heappush(it, 0)),
        ([1, 2, 3], heapq.heappop),
        ([1, 2, 3], lambda it: bisect.insort(it, 2)),
        ([1, 2, 3], lambda it: random.Random(1).shuffle(it)),
        ([1, 2, 3], lambda it: list.append(it, 4)),
        ({"a": 1}, lambda it: it.setdefault("b", [])),
        ({"a": 1}, lambda it: it.setdefault("b", []).append(1)),
        ({"a": 1, "b": 2}, lambda it: it.popitem()),
        ({"a": 1}, lambda it: it.__ior__([("b", 2)])),
        ({"a": 1}, lambda it: it.update(iter([["b", 2], "cd"]), self=3, other=4)),
        ({"a": 1}, lambda it: it.update(it)),
        ({"a": 1}, lambda it: it.update(collections.UserDict(b=2))),
        ({"a": 1, "b": 2}, lambda it: it.__setitem__("a", it.pop("a"))),
        ({"a": 1}, lambda it: dict.__setitem__(it, "b", 2)),
        ({1, 2}, lambda it: it.__ixor__({2, 3})),
        ({1, 2}, lambda it: it.update([3], {4: 5})),
        ({1, 2}, lambda it: it.intersection_update([2])),
        ({1}, lambda it: it.pop()),
        ({1, 2}, lambda it: set.add(it, 3)),
    ],
)
def test_whatever_changes_a_container_is_saved(
    sessions: Sessions, was: Any, change: Callable[[Any], object]
) -> None:
    expected = copy.deepcopy(was)
    change(expected)
    fill(sessions, top=was, nested={"deep": [copy.deepcopy(was)]}, pair=(copy.deepcopy(was), 1))
    with sessions.session_scope(KEY) as session:
        for place in (session.top, session.nested["deep"][0], session.pair[0]):
            change(place)
            assert place == expected
    assert stored(sessions) == {
        "top": expected,
        "nested": {"deep": [expected]},
        "pair": (expected, 1),
    }


def test_in_place_operators_on_a_field_are_saved(sessions: Sessions) -> None:
    fill(sessions, l=[1], d={"a": 1}, s={1}, t=(1,), inner={"l": [1]})
    with sessions.session_scope(KEY) as session:
        session.l += [2]
        session["l"] *= 2
        session.d |= {"b": 2}
        session.s -= {1}
        session.s |= {3}
        session.t += (2,)
        session.inner["l"] += [2]
    assert stored(sessions) == {
        "l": [1, 2, 1, 2],
        "d": {"a": 1, "b": 2},
        "s": {3},
        "t": (1, 2),
        "inner": {"l": [1, 2]},
    }


def test_an_exception_from_what_goes_in_leaves_what_a_list_has(in_memory: Sessions) -> None:
    def two_and_no_more() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError

    fill(in_memory, it=[])
    plain: list[int] = []
    with in_memory.session_scope(KEY) as session:
        for target in (session.it, plain):
            with pytest.raises(LookupError):
                target.extend(two_and_no_more())
        assert session.it == plain == [1, 2]


def test_a_row_of_sqlite_goes_into_a_list_by_its_values(in_memory: Sessions) -> None:
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row  # has keys(), and is no mapping
    row = connection.execute("select 5 as price").fetchone()
    connection.close()
    fill(in_memory, it=[], d={})
    with in_memory.session_scope(KEY) as session:
        session.it.extend(row)
        session.it[:0] = row
        session.it += row
        session.d.update(row)
    assert stored(in_memory) == {"it": [5, 5, 5], "d": {"price": 5}}


@pytest.mark.parametrize("times", [1, 2])
def test_the_same_object_in_two_places_is_saved_in_both(sessions: Sessions, times: int) -> None:
    fill(sessions, a=[0], keep={})
    with sessions.session_scope(KEY) as session:
        session["b"] = session["a"]
        session.keep["a"] = session["a"]
        mine: list[int] = []
        session["c"] = session["d"] = mine
        session.keep["c"] = [mine]
        for _ in range(times):
            session["a"].append(1)
            mine.append(2)
            session.flush()
        assert session["a"] is session["b"] is session.keep["a"]
        assert session["c"] is session["d"] is session.keep["c"][0] is mine
    one, two = [0] + [1] * times, [2] * times
    assert stored(sessions) == {
        "a": one,
        "keep": {"a": one, "c": [two]},
        "b": one,
        "c": two,
        "d": two,
    }


@pytest.mark.parametrize("flush", [False, True])
def test_an_object_that_was_assigned_stays_that_object(sessions: Sessions, flush: bool) -> None:
    items: list[int] = []
    inner: dict[str, Any] = {"tags": set()}
    in_a_tuple: list[int] = []
    fill(sessions, d={})
    with sessions.session_scope(KEY) as session:
        session["items"] = items
        session["outer"] = {"inner": [inner]}
        session["pair"] = (in_a_tuple, 1)
        session["d"]["items"] = items
        assert session["items"] is items
        assert session["d"]["items"] is items
        if flush:
            session.flush()
        items.append(1)
        inner["tags"].add(2)
        in_a_tuple.append(3)
        if flush:
            session.flush()
        inner["new"] = 4
        assert session["items"] is items
    items.append(99)
    inner["tags"].add(99)
    in_a_tuple.append(99)
    assert stored(sessions) == {
        "d": {"items": [1]},
        "items": [1],
        "outer": {"inner": [{"tags": {2}, "new": 4}]},
        "pair": ([3], 1),
    }


def test_a_container_that_was_taken_out_does_not_come_back(sessions: Sessions) -> None:
    fill(sessions, a=[1], d={"x": [1]})
    with sessions.session_scope(KEY) as session:
        a = session.pop("a")
        x = session.d.pop("x")
        a.append(2)
        x.append(2)
        session["moved"] = a
    assert stored(sessions) == {"d": {}, "moved": [1, 2]}


# -- containers of other sessions


def into(session: Session, way: str, foreign: Any) -> Callable[[], Any]:
    """Put `foreign` into the session, and return how it is found there."""
    d, l = session.d, session.l  # noqa: E741
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "[]": (lambda: session.__setitem__("x", foreign), lambda: session.x),
        "attribute": (lambda: setattr(session, "x", foreign), lambda: session.x),
        "ttl": (lambda: session.__setitem__("x", ttl(foreign, 60)), lambda: session.x),
        "setdefault": (lambda: session.setdefault("x", foreign), lambda: session.x),
        "update": (lambda: session.update(x=foreign), lambda: session.x),
        "|=": (lambda: session.__ior__({"x": foreign}), lambda: session.x),
        "in a list": (lambda: session.__setitem__("x", [[foreign]]), lambda: session.x[0][0]),
        "in a dict": (lambda: session.__setitem__("x", {"y": foreign}), lambda: session.x["y"]),
        "in a tuple": (lambda: session.__setitem__("x", (foreign, 1)), lambda: session.x[0]),
        "in all three": (lambda: l.append([{"y": (foreign,)}]), lambda: l[-1][0]["y"][0]),
        "d[]": (lambda: d.__setitem__("x", foreign), lambda: d["x"]),
        "d.setdefault": (lambda: d.setdefault("x", foreign), lambda: d["x"]),
        "d.update(dict)": (lambda: d.update({"x": foreign}), lambda: d["x"]),
        "d.update(pairs)": (lambda: d.update([["x", foreign]]), lambda: d["x"]),
        "d.update(iterators)": (lambda: d.update([iter(("x", foreign))]), lambda: d["x"]),
        "d.update(keyword)": (lambda: d.update(x=foreign), lambda: d["x"]),
        "d.update(mapping)": (
            lambda: d.update(collections.UserDict(x=foreign)),
            lambda: d["x"],
        ),
        "d.update(items)": (lambda: d.update({"x": foreign}.items()), lambda: d["x"]),
        "d |=": (lambda: d.__ior__({"x": foreign}), lambda: d["x"]),
        "append": (lambda: l.append(foreign), lambda: l[-1]),
        "insert": (lambda: l.insert(0, foreign), lambda: l[0]),
        "l[0]": (lambda: l.__setitem__(0, foreign), lambda: l[0]),
        "extend(list)": (lambda: l.extend([foreign]), lambda: l[-1]),
        "extend(tuple)": (lambda: l.extend((foreign,)), lambda: l[-1]),
        "extend(generator)": (lambda: l.extend(f for f in [foreign]), lambda: l[-1]),
        "extend(values)": (lambda: l.extend({"x": foreign}.values()), lambda: l[-1]),
        "+=": (lambda: l.__iadd__([foreign]), lambda: l[-1]),
        "+= generator": (lambda: l.__iadd__(f for f in [foreign]), lambda: l[-1]),
        "slice": (lambda: l.__setitem__(slice(0, 1), [foreign]), lambda: l[0]),
        "slice of a generator": (
            lambda: l.__setitem__(slice(0, 1), (f for f in [foreign])),
            lambda: l[0],
        ),
    }
    put, find = ways[way]
    put()
    return find


WAYS = [
    *("[]", "attribute", "ttl", "setdefault", "update", "|=", "in a list", "in a dict"),
    *("in a tuple", "in all three", "d[]", "d.setdefault", "d.update(dict)", "d.update(pairs)"),
    *("d.update(iterators)", "d.update(keyword)", "d.update(mapping)", "d.update(items)", "d |="),
    *("append", "insert", "l[0]", "extend(list)", "extend(tuple)", "extend(generator)"),
    *("extend(values)", "+=", "+= generator", "slice", "slice of a generator"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("value", [{"a": [1]}, [[1]], {1}])
def test_a_container_of_another_session_goes_in_as_a_copy(
    in_memory: Sessions, way: str, closed: bool, value: Any
) -> None:
    with in_memory.session_scope("other") as other:
        other.it = value
    scope = in_memory.session_scope("other")
    other = scope.__enter__()
    foreign = other.it
    if closed:
        scope.__exit__(None, None, None)
    fill(in_memory, d={}, l=[0])
    with in_memory.session_scope(KEY) as session:
        find = into(session, way, foreign)
        inside = find()
        assert inside == foreign
        assert inside is not foreign
        assert find() is inside
        if isinstance(value, set):
            inside.add(2)
        else:
            inside["a" if isinstance(value, dict) else 0].append(2)
        assert inside != foreign
        assert foreign == value
        if not closed:
            foreign.clear()
            assert inside
    if not closed:
        scope.__exit__(None, None, None)
    with in_memory.session_scope(KEY) as session:
        assert session in (
            {"d": session.d, "l": session.l},
            {"d": session.d, "l": session.l, "x": session.get("x")},
        )
        assert "2" in repr([session.d, session.l, session.get("x")])
    assert stored(in_memory, "other") == ({"it": value} if closed else {"it": type(value)()})


@pytest.mark.parametrize("way", ["d.update(dict)", "extend(list)", "+=", "slice", "d |=", "update"])
def test_what_is_only_copied_from_is_not_changed(in_memory: Sessions, way: str) -> None:
    fill(in_memory, d={}, l=[0])
    with in_memory.session_scope("other") as other, in_memory.session_scope(KEY) as session:
        other.it = [1]
        other.flush()
        foreign = closed_session(SessionManager(), it=[1]).it
        givens: list[Any] = [{"x": foreign}, [foreign], [["x", foreign]], [foreign]]
        session.d.update(givens[0])
        session.l.extend(givens[1])
        session.d.update(givens[2])
        session.l[0:0] = givens[3]
        session.update(givens[0])
        for given, kept in zip(givens, ["x", 0, 0, 0], strict=True):
            item = given[kept]
            assert (item[1] if isinstance(item, list) and item[0] == "x" else item) is foreign


def test_sessions_do_not_share_what_went_from_one_into_the_other(sessions: Sessions) -> None:
    with sessions.session_scope("one") as one:
        one["cart"] = {"items": ["tea"]}
    with sessions.session_scope("one") as one, sessions.session_scope("two") as two:
        two["cart"] = one["cart"]
        two["cart"]["items"].append("milk")
        one["cart"]["items"].append("salt")
    assert stored(sessions, "one") == {"cart": {"items": ["tea", "salt"]}}
    assert stored(sessions, "two") == {"cart": {"items": ["tea", "milk"]}}


def test_a_whole_session_can_be_poured_into_another_one(sessions: Sessions) -> None:
    with sessions.session_scope("one") as one:
        one.update(a=[1], b={"c": [2]})
    with sessions.session_scope("one") as one, sessions.session_scope("two") as two:
        two.update(one)
        two |= one
        two["d"] = {**one}
        two["a"].append(9)
        two["d"]["b"]["c"].append(9)
    assert stored(sessions, "one") == {"a": [1], "b": {"c": [2]}}
    assert stored(sessions, "two") == {
        "a": [1, 9],
        "b": {"c": [2]},
        "d": {"a": [1], "b": {"c": [2, 9]}},
    }


def test_a_container_that_some_code_made_of_its_type_is_a_plain_one(sessions: Sessions) -> None:
    """dataclasses.asdict, for one, calls `type(value)(...)`."""
    fill(sessions, d={"a": 1}, l=[1], s={1})
    with sessions.session_scope(KEY) as session:
        for name in "dls":
            made = type(session[name])(session[name])
            session[f"new {name}"] = made
            assert session[f"new {name}"] is made
            made.clear()
        many = type(session.l)([[]])
        session["many"] = [many]
        many[0].append(session.l)
        session.l.append(2)
    assert stored(sessions) == {
        "d": {"a": 1},
        "l": [1, 2],
        "s": {1},
        "new d": {},
        "new l": [],
        "new s": set(),
        "many": [[[[1, 2]]]],
    }


# -- isolation from the store


def test_what_initial_returned_is_never_changed(storage: Any) -> None:
    default = {"cart": {"items": []}, "tags": {"new"}, "pair": ([],)}
    sessions = SessionManager(storage=storage, initial=lambda update: default)
    for user in ("user:1", "user:2"):
        with sessions.session_scope(user) as session:
            session.cart["items"].append(user)
            session.tags.add(user)
            session.pair[0].append(user)
            session["more"] = 1
    assert default == {"cart": {"items": []}, "tags": {"new"}, "pair": ([],)}
    assert stored(sessions, "user:2") == {
        "cart": {"items": ["user:2"]},
        "tags": {"new", "user:2"},
        "pair": (["user:2"],),
        "more": 1,
    }


def test_an_initial_session_is_stored_when_something_changes(storage: Any) -> None:
    sessions = SessionManager(storage=storage, initial=lambda update: {"a": [], "b": 1})
    with sessions.session_scope(KEY) as session:
        assert session == {"a": [], "b": 1}
    assert not storage.has(KEY)
    with sessions.session_scope(KEY) as session:
        session.a.append(1)
    assert stored(sessions) == {"a": [1], "b": 1}
    with sessions.session_scope("other") as session:
        session.clear()
    assert not storage.has("other")


def test_what_a_storage_returned_is_never_changed() -> None:
    storage = OwnStorage()
    storage.kept[KEY] = {"cart": {"items": [1], "seen": {1}}, "pair": ([1],), "gone": 1}
    found = storage.kept[KEY]
    before = copy.deepcopy(found)
    sessions = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        session.cart["items"].append(2)
        session.cart["seen"].add(2)
        session.pair[0].append(2)
        session["new"] = 1
        del session["gone"]
    assert found == before
    assert storage.kept[KEY] == {
        "cart": {"items": [1, 2], "seen": {1, 2}},
        "pair": ([1, 2],),
        "new": 1,
    }


def reachable(value: Any) -> Iterator[int]:
    """The ids of all containers in a value that can be changed."""
    if isinstance(value, dict | list | set):
        yield id(value)
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from reachable(item)


def test_nobody_can_reach_a_container_that_is_stored() -> None:
    storage = MemoryStorage()
    sessions = SessionManager(storage=storage)
    mine = {"a": [{}, []], "s": {1}, "t": ([], ({},)), "empty": [[], {}, set()]}
    fill(sessions, mine)
    with sessions.session_scope(KEY) as session:
        handed_out = session.copy()
        session.flush()
        session["a"].append([])
        session.flush()
    record = storage.load(KEY)
    assert record is not None
    kept = set(reachable(tuple(record.values())))
    for seen in (mine, handed_out, session.copy(), storage.get(KEY)):
        assert kept.isdisjoint(reachable(seen))
    given = {"x": [[]]}
    storage.set("other", given)
    record = storage.load("other")
    assert record is not None
    assert set(reachable(tuple(record.values()))).isdisjoint(reachable(given))


def test_in_the_store_all_containers_are_plain() -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, NESTED)
    with sessions.session_scope(KEY) as session:
        session["cart"]["more"] = session["rows"]
        session["rows"].append(session["cart"]["items"][0])

    def check(value: Any) -> None:
        assert type(value) in (dict, list, set, tuple, str, int, type(None))
        if isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)

    check(storage.kept[KEY])


# -- objects of other types


class Order:
    """An object that compares by identity, as most do."""

    def __init__(self, *items: str) -> None:
        self.items = list(items)


class Pair(NamedTuple):
    left: list[int]
    right: int


def orders(sessions: Sessions) -> list[Any]:
    with sessions.session_scope(KEY) as session:
        return [session.order.items, session.nested[0]["order"].items]


def order_codec() -> Codec:
    def encode(value: Any) -> tuple[str, object]:
        return ("order", value.items) if isinstance(value, Order) else NotImplemented

    return Codec(encode, lambda name, items: Order(*items))


@pytest.fixture(params=["memory", "own", "pickling", "strict", "disk"])
def of_orders(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sessions]:
    """A manager whose store keeps objects of the class Order."""
    storage: Any = {
        "memory": MemoryStorage,
        "own": OwnStorage,
        "pickling": PicklingStorage,
        "strict": lambda: MemoryStorage(strict=True, codec=order_codec()),
        "disk": lambda: disk(tmp_path, codec=order_codec()),
    }[request.param]()
    with SessionManager(storage=storage) as sessions:
        yield sessions


def test_a_change_inside_an_object_is_saved(of_orders: Sessions) -> None:
    order = Order("tea")
    with of_orders.session_scope(KEY) as session:
        session.order = order
        session.nested = [{"order": Order("tea")}]
        assert session.order is order
    with of_orders.session_scope(KEY) as session:
        session.order.items.append("milk")
        session.nested[0]["order"].items.append("salt")
        session.flush()
        session.order.items.append("jam")
    assert orders(of_orders) == [["tea", "milk", "jam"], ["tea", "salt"]]


def test_a_change_inside_an_object_after_a_flush_is_saved(of_orders: Sessions) -> None:
    with of_orders.session_scope(KEY) as session:
        order = session.order = Order()
        nested = Order()
        plain: list[Any] = []
        session.nested = plain
        session.flush()
        plain.append({"order": nested})
        session.flush()
        order.items.append("tea")
        nested.items.append("milk")
    assert orders(of_orders) == [["tea"], ["milk"]]


def test_a_look_at_an_object_that_a_failed_handler_changed_does_not_save_it(tmp_path: Path) -> None:
    for storage in (PicklingStorage(), disk(tmp_path, codec=order_codec())):
        with SessionManager(storage=storage) as sessions:
            fill(sessions, order=Order("tea"), nested=[{"order": Order()}])
            for look in (True, False):
                with sessions.session_scope(KEY) as session:
                    session.order.items.append("milk")
                    Session._opened(session).roll_back()
                    assert not look or session.order
                assert orders(sessions) == [["tea"], []]
            with sessions.session_scope(KEY) as session:
                session.order.items.append("milk")
                Session._opened(session).roll_back()
                session.order = Order("jam")
                session.flush()
                session.order.items.append("salt")
            assert orders(sessions) == [["jam", "salt"], []]


def test_an_object_that_was_replaced_costs_nothing_any_more() -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, it=Order(), other=[Order()])
    with sessions.session_scope(KEY) as session:
        session.it = session.it.items
        del session.other
        session.flush()
        storage.calls.clear()
        session.flush()
    assert storage.calls == []


@pytest.mark.parametrize("value", [frozenset({1}), range(3), enum.Enum("E", "A")["A"], Order])
def test_reading_an_object_that_cannot_change_saves_nothing(value: Any) -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, it=value if value is not Order else 1, nested=[value] if value != Order else [])
    storage.calls.clear()
    with sessions.session_scope(KEY) as session:
        assert session.it in (value, 1)
        assert session.nested in ([value], [])
    assert storage.calls == ["get"]


def test_a_change_inside_a_named_tuple_is_saved() -> None:
    sessions = SessionManager(storage=PicklingStorage())
    fill(sessions, it=Pair([], 1))
    with sessions.session_scope(KEY) as session:
        session.it.left.append(7)
    with sessions.session_scope(KEY) as session:
        assert session.it == Pair([7], 1)


def test_subclasses_of_containers_are_kept_as_they_are_in_memory(in_memory: Sessions) -> None:
    counter = collections.Counter("aab")
    fill(in_memory, it=counter, nested=[collections.OrderedDict(a=[1])])
    with in_memory.session_scope(KEY) as session:
        assert type(session.it) is collections.Counter
        assert type(session.nested[0]) is collections.OrderedDict
        session.it.update("b")
    assert stored(in_memory)["it"] == {"a": 2, "b": 2}


def test_a_strict_store_refuses_what_it_cannot_keep_and_names_it(tmp_path: Path) -> None:
    for storage in (MemoryStorage(strict=True), disk(tmp_path)):
        with SessionManager(storage=storage) as sessions:
            fill(sessions, cart={"items": [1, 2]})
            with (
                pytest.raises(SessionEncodeError, match=r"'user:1'.*cart\.items\[\.\.\.\] is"),
                sessions.session_scope(KEY) as session,
            ):
                session.cart["items"].append(bytearray(b"x"))
            assert stored(sessions) == {"cart": {"items": [1, 2]}}


# -- too deep


def nest(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def a_list_with_itself() -> list[Any]:
    value: list[Any] = []
    value.append([value])
    return value


def a_tuple_with_itself() -> tuple[Any, ...]:
    value: list[Any] = []
    value.append((value,))
    return (value,)


@pytest.mark.parametrize(
    "value",
    [nest(5000), a_list_with_itself(), a_tuple_with_itself()],
    ids=["deep", "list", "tuple"],
)
def test_a_value_that_has_no_end_is_refused_by_name(sessions: Sessions, value: Any) -> None:
    fill(sessions, fine=1)
    message = r"'user:1'.*'bad' contains itself, or is nested too deeply; nothing was written"
    with (
        pytest.raises(SessionEncodeError, match=message),
        sessions.session_scope(KEY) as session,
    ):
        session["fine"] = 2
        session["bad"] = value
    assert stored(sessions) == {"fine": 1}


def test_containers_that_end_in_themselves_are_refused_by_name(sessions: Sessions) -> None:
    fill(sessions, d={}, l=[])
    message = r"'user:1'.*'[dl]' contains itself, or is nested too deeply; nothing was written"
    with sessions.session_scope(KEY) as session:
        session["ok"] = 1
        session.d["l"] = session.l
        session.l.append(session.d)
        with pytest.raises(SessionEncodeError, match=message):
            session.flush()
        assert stored(sessions) == {"d": {}, "l": []}
        session.l.clear()
        session.flush()
    assert stored(sessions) == {"d": {"l": []}, "l": [], "ok": 1}


def test_a_list_that_has_got_itself_inside_can_be_mended_before_it_is_saved(
    in_memory: Sessions,
) -> None:
    with in_memory.session_scope(KEY) as session:
        session["rows"] = session["pair"] = rows = []
        rows.append([rows])
        rows[0] = 1
    assert stored(in_memory) == {"rows": [1], "pair": [1]}


def test_a_value_without_end_is_refused_inside_a_container_too(in_memory: Sessions) -> None:
    fill(in_memory, l=[])
    with in_memory.session_scope(KEY) as session:
        for put in (session.l.append, lambda it: session.l.extend([it])):
            with pytest.raises(SessionEncodeError, match=r"'user:1'.*containers .*too deeply"):
                put(nest(5000))
        assert session.l == []


def test_a_closed_container_with_itself_inside_is_refused(in_memory: Sessions) -> None:
    fill(in_memory, l=[])
    with suppress(SessionEncodeError), in_memory.session_scope(KEY) as session:
        loop = session.l
        loop.append(loop)
    with (
        in_memory.session_scope("other") as other,
        pytest.raises(SessionEncodeError, match=r"'other'.*'x' contains itself"),
    ):
        other["x"] = loop


# -- after the scope


DICT_CHANGES: dict[str, Callable[[Any], object]] = {
    "__setitem__": lambda d: d.__setitem__("a", 1),
    "__delitem__": lambda d: d.__delitem__("a"),
    "__ior__": lambda d: d.__ior__({}),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("a"),
    "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("b", 1),
    "update": lambda d: d.update(b=1),
}
LIST_CHANGES: dict[str, Callable[[Any], object]] = {
    "__setitem__": lambda it: it.__setitem__(0, 1),
    "__delitem__": lambda it: it.__delitem__(0),
    "__iadd__": lambda it: it.__iadd__([1]),
    "__imul__": lambda it: it.__imul__(2),
    "append": lambda it: it.append(1),
    "clear": lambda it: it.clear(),
    "extend": lambda it: it.extend([1]),
    "insert": lambda it: it.insert(0, 1),
    "pop": lambda it: it.pop(),
    "remove": lambda it: it.remove(1),
    "reverse": lambda it: it.reverse(),
    "sort": lambda it: it.sort(),
}
SET_CHANGES: dict[str, Callable[[Any], object]] = {
    "__iand__": lambda s: s.__iand__({1}),
    "__ior__": lambda s: s.__ior__({2}),
    "__isub__": lambda s: s.__isub__({1}),
    "__ixor__": lambda s: s.__ixor__({1}),
    "add": lambda s: s.add(2),
    "clear": lambda s: s.clear(),
    "difference_update": lambda s: s.difference_update([1]),
    "discard": lambda s: s.discard(1),
    "intersection_update": lambda s: s.intersection_update([]),
    "pop": lambda s: s.pop(),
    "remove": lambda s: s.remove(1),
    "symmetric_difference_update": lambda s: s.symmetric_difference_update([1]),
    "update": lambda s: s.update([2]),
}
READS = set(dir(tuple)) | set(dir(frozenset)) | {"__init__", "__reversed__", "__class_getitem__"}
READS |= {"get", "items", "keys", "values", "fromkeys", "index", "count", "copy", "__ror__"}
CHANGES = [
    *((name, {"a": 1}, change) for name, change in DICT_CHANGES.items()),
    *((name, [1], change) for name, change in LIST_CHANGES.items()),
    *((name, {1}, change) for name, change in SET_CHANGES.items()),
]


def test_every_method_that_changes_a_container_is_known_here() -> None:
    for cls, changes in ((dict, DICT_CHANGES), (list, LIST_CHANGES), (set, SET_CHANGES)):
        assert set(dir(cls)) - READS == set(changes)


@pytest.mark.parametrize(
    ("name", "value", "change"), CHANGES, ids=[f"{type(v).__name__}.{n}" for n, v, _ in CHANGES]
)
@pytest.mark.parametrize("end", ["closed", "released", "rolled back", "failed"])
def test_a_closed_container_is_read_but_not_changed(
    in_memory: Sessions, name: str, value: Any, change: Callable[[Any], object], end: str
) -> None:
    fill(in_memory, it=value, nested=[{"it": value}], pair=(value,))
    with suppress(LookupError), in_memory.session_scope(KEY) as session:
        places = [session.it, session.nested[0]["it"], session.pair[0]]
        if end == "released":
            session.release()
        if end == "failed":
            raise LookupError
        if end == "rolled back":
            Session._opened(session).roll_back()
        else:
            change(copy.copy(places[0]))  # of an open session, it works
        if end in ("released", "rolled back"):
            for place in places:
                with pytest.raises(SessionClosedError):
                    change(place)
    for place in [*places, session.it, session.nested[0]["it"], session.pair[0]]:
        with pytest.raises(SessionClosedError, match=r"'user:1' is closed.*session_scope"):
            change(place)
        assert place == value
        assert type(place) is not type(value)
    assert stored(in_memory) == {"it": value, "nested": [{"it": value}], "pair": (value,)}


@pytest.mark.parametrize(
    "change",
    [
        lambda session: session.__setitem__("a", 1),
        lambda session: session.__delitem__("a"),
        lambda session: setattr(session, "a", 1),
        lambda session: delattr(session, "a"),
        lambda session: session.update(a=1),
        lambda session: session.__ior__({"a": 1}),
        lambda session: session.setdefault("new", 1),
        lambda session: session.pop("a"),
        lambda session: session.popitem(),
        lambda session: session.clear(),
    ],
)
def test_a_closed_session_is_read_but_not_changed(
    sessions: Sessions, change: Callable[[Session], object]
) -> None:
    fill(sessions, a=0, b=[])
    with sessions.session_scope(KEY) as session:
        pass
    with pytest.raises(SessionClosedError, match=r"'user:1' is closed.*session_scope"):
        change(session)
    assert session == {"a": 0, "b": []}
    assert session.a == 0
    with pytest.raises(SessionClosedError):
        session.b.append(1)


def test_a_closed_session_shows_its_own_state(sessions: Sessions) -> None:
    fill(sessions, counter=1, untouched=[1], gone=1)
    with sessions.session_scope(KEY) as session:
        session.counter = 2
        del session.gone
        session.new = [1]
    with sessions.session_scope(KEY) as later:
        later.clear()
        later.untouched = [9]
        later.counter = 9
    assert session == {"counter": 2, "untouched": [1], "new": [1]}
    assert session.untouched == [1]


def test_a_change_past_the_methods_of_a_closed_container_is_not_saved(in_memory: Sessions) -> None:
    """C code asks nobody, so it cannot be refused; the store is out of its reach all the same."""
    session = closed_session(in_memory, heap=[1])
    heapq.heappush(session.heap, 0)
    assert stored(in_memory) == {"heap": [1]}
    with in_memory.session_scope(KEY) as later:
        assert later.heap == [1]


def test_a_failed_handler_leaves_what_was_stored(sessions: Sessions) -> None:
    fill(sessions, a=[1], b={"c": [1]}, gone=1)
    mine: list[int] = []
    with pytest.raises(LookupError), sessions.session_scope(KEY) as session:
        session.a.append(2)
        session.b["c"].append(2)
        session.new = mine
        del session.gone
        raise LookupError
    assert stored(sessions) == {"a": [1], "b": {"c": [1]}, "gone": 1}
    assert session == {"a": [1], "b": {"c": [1]}, "gone": 1}
    mine.append(1)


def test_a_failed_handler_keeps_what_it_had_flushed(sessions: Sessions) -> None:
    fill(sessions, a=[1])
    mine: list[int] = []
    with pytest.raises(LookupError), sessions.session_scope(KEY) as session:
        session.a.append(2)
        session.mine = mine
        session.flush()
        session.a.append(3)
        mine.append(3)
        del session.mine
        raise LookupError
    assert stored(sessions) == {"a": [1, 2], "mine": []}
    assert session == {"a": [1, 2], "mine": []}


# -- flush


def test_a_flush_without_a_change_writes_nothing() -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        session.flush()
        assert storage.calls == ["get"]
        session.a = [1]
        session.flush()
        session.flush()
        assert storage.calls == ["get", "set"]
        session.a.append(2)
        session.flush()
        session.flush()
    assert storage.calls == ["get", "set", "set"]
    assert storage.kept[KEY] == {"a": [1, 2]}


def test_a_flush_that_fails_loses_nothing() -> None:
    storage = FailingStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, a=1, b=[1], c={"d": 1}, untouched=[1])
    mine: list[int] = []
    with sessions.session_scope(KEY) as session:
        b = session.b
        b.append(2)
        del session.a
        session.mine = mine
        session.c["d"] = 2
        session.a = 5
        expected = copy.deepcopy(session)
        storage.failing = True
        for _ in range(2):
            with pytest.raises(OSError, match="disk full"):
                session.flush()
            assert list(session.items()) == list(expected.items())
        assert session.b is b
        assert session.mine is mine
        mine.append(1)
        b.append(3)
        del session.c
        storage.failing = False
        session.flush()
        expected = {"b": [1, 2, 3], "untouched": [1], "mine": [1], "a": 5}
        assert list(stored(sessions).items()) == list(expected.items())
        mine.append(2)
    assert stored(sessions)["mine"] == [1, 2]


def test_after_a_failed_flush_a_failed_handler_leaves_what_was_stored() -> None:
    storage = FailingStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, a=[1])
    with pytest.raises(OSError, match="disk full"), sessions.session_scope(KEY) as session:
        session.a.append(2)
        storage.failing = True
        try:
            session.flush()
        finally:
            storage.failing = False
    assert stored(sessions) == {"a": [1]}
    assert session == {"a": [1]}


def test_a_refused_value_can_be_taken_out_again(tmp_path: Path) -> None:
    with SessionManager(storage=disk(tmp_path)) as sessions:
        fill(sessions, a=1)
        with sessions.session_scope(KEY) as session:
            session.a = 2
            session.bad = bad = []
            bad.append(object())
            with pytest.raises(SessionEncodeError, match=r"'user:1'.*bad\[0\]"):
                session.flush()
            assert session.a == 2
            del session.bad
        assert stored(sessions) == {"a": 2}


# -- ttl


class Clock:
    """The time that timers see."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.step = 0.0

    def time(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("session_sync.session.ttl.time", SimpleNamespace(time=clock.time))
    return clock


def test_a_field_disappears_when_its_time_is_up(sessions: Sessions, clock: Clock) -> None:
    with sessions.session_scope(KEY) as session:
        session["code"] = ttl("1234", 300)
        session.short = ttl([1], timedelta(seconds=10))
        session.default = ttl(1)
        session["stays"] = 1
        assert session == {"code": "1234", "short": [1], "default": 1, "stays": 1}
    clock.now += 10
    with sessions.session_scope(KEY) as session:
        assert session == {"code": "1234", "default": 1, "stays": 1}
    clock.now += 19.9
    with sessions.session_scope(KEY) as session:
        assert "default" in session
    clock.now += 0.2
    with sessions.session_scope(KEY) as session:
        assert session == {"code": "1234", "stays": 1}
        assert session.code == "1234"
        clock.now += 300  # while the handler runs
        assert "code" not in session
        assert session.get("code") is None
        assert not hasattr(session, "code")
        assert list(session) == ["stays"]
        assert len(session) == 1
    assert stored(sessions) == {"stays": 1}


@pytest.mark.parametrize(
    "look",
    [
        lambda session: session.get("code") is None,
        lambda session: not hasattr(session, "code"),
        lambda session: "code" not in session,
        lambda session: list(session) == [],
        lambda session: list(reversed(session)) == [],
        lambda session: len(session) == 0,
        lambda session: not session,
        lambda session: session == {},
        lambda session: session.copy() == {},
        lambda session: list(session.items()) == [],
        lambda session: session.pop("code", None) is None,
        lambda session: session.setdefault("code", 5) == 5,
        lambda session: repr(session) == "<Session 'user:1': >",
    ],
)
@pytest.mark.parametrize("touched", [False, True])
def test_nothing_shows_a_field_whose_time_is_up(
    in_memory: Sessions, clock: Clock, look: Callable[[Session], bool], touched: bool
) -> None:
    fill(in_memory, code=ttl([1], 10))
    with in_memory.session_scope(KEY) as session:
        if touched:
            session.code.append(2)
        clock.now += 11
        assert look(session)


def test_a_session_whose_fields_have_all_run_out_is_deleted(
    sessions: Sessions, clock: Clock
) -> None:
    fill(sessions, code=ttl(1, 10))
    clock.now += 11
    with sessions.session_scope(KEY) as session:
        assert not session
    assert not sessions.storage.has(KEY)


def test_a_plain_assignment_restarts_the_timer(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl([1], 10), other=ttl(1, 10))
    clock.now += 6
    with sessions.session_scope(KEY) as session:
        session.code = [2]
    clock.now += 6
    with sessions.session_scope(KEY) as session:
        assert session == {"code": [2]}
        session.update(code=[3])
    clock.now += 9.9
    with sessions.session_scope(KEY) as session:
        assert session == {"code": [3]}
    clock.now += 0.1
    with sessions.session_scope(KEY) as session:
        assert session == {}


def test_a_change_inside_the_value_does_not_restart_the_timer(
    sessions: Sessions, clock: Clock
) -> None:
    fill(sessions, code=ttl({"tries": []}, 10))
    clock.now += 6
    with sessions.session_scope(KEY) as session:
        session.code["tries"].append(1)
        session.code.setdefault("new", 1)
        session.setdefault("code", 1)
    assert stored(sessions)["code"] == {"tries": [1], "new": 1}
    clock.now += 4
    with sessions.session_scope(KEY) as session:
        assert session == {}


def test_a_zero_removes_the_timer(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10), other=ttl(1, 10))
    with sessions.session_scope(KEY) as session:
        session.code = ttl(session.code, 0)
        session.new = ttl(2, timedelta(0))
    clock.now += 60
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "new": 2}
        session.code = 5
    clock.now += 10_000
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 5, "new": 2}
    assert stored(sessions) == {"code": 5, "new": 2}


def test_a_field_keeps_no_timer_that_was_removed(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10), other=1)
    fill(sessions, code=ttl(1, 0))
    assert stored(sessions) == {"code": 1, "other": 1}
    clock.now += 11
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "other": 1}


def test_a_new_ttl_replaces_the_old_one(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10))
    fill(sessions, code=ttl(1, 100))
    clock.now += 99
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1}
    clock.now += 1
    with sessions.session_scope(KEY) as session:
        assert session == {}


@pytest.mark.parametrize("end", ["deleted", "run out", "run out and seen"])
def test_a_field_that_went_away_has_no_timer_when_it_comes_back(
    sessions: Sessions, clock: Clock, end: str
) -> None:
    fill(sessions, code=ttl(1, 10), z=1)
    with sessions.session_scope(KEY) as session:
        if end == "deleted":
            del session.code
        else:
            clock.now += 11
        if end == "run out and seen":
            assert "code" not in session
        session.code = 2
        assert list(session) == ["z", "code"]
    assert stored(sessions) == {"z": 1, "code": 2}
    clock.now += 1_000
    with sessions.session_scope(KEY) as session:
        assert list(session.items()) == [("z", 1), ("code", 2)]


def test_timers_are_stored_with_the_session(storage: Any, clock: Clock) -> None:
    fill(SessionManager(storage=storage), code=ttl(1, 10))
    assert storage.get(KEY) == {"code": 1, "$ttl": {"code": [clock.now + 10, 10.0]}}
    clock.now += 9
    with SessionManager(storage=storage).session_scope(KEY) as session:  # after a restart, say
        assert session == {"code": 1}
        assert "$ttl" not in session
        session.other = 1
    assert list(session) == ["code", "other"]
    clock.now += 1
    with SessionManager(storage=storage).session_scope(KEY) as session:
        assert session == {"other": 1}


def test_timers_belong_to_one_session(sessions: Sessions, clock: Clock) -> None:
    with sessions.session_scope("one") as one, sessions.session_scope("two") as two:
        one.code = ttl(1, 10)
        two.code = 1
    clock.now += 5
    with sessions.session_scope("two") as two:
        two.code = 2
    clock.now += 6
    with sessions.session_scope("one") as one, sessions.session_scope("two") as two:
        assert one == {}
        assert two == {"code": 2}


def test_timers_go_with_what_was_rolled_back(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10), plain=1)
    with pytest.raises(LookupError), sessions.session_scope(KEY) as session:
        session.code = ttl(2, 100)
        session.plain = ttl(1, 1)
        raise LookupError
    clock.now += 9
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "plain": 1}
    clock.now += 1
    with sessions.session_scope(KEY) as session:
        assert session == {"plain": 1}


def test_timers_survive_a_flush_that_fails(clock: Clock) -> None:
    storage = FailingStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, old=ttl(1, 10))
    with sessions.session_scope(KEY) as session:
        session.new = ttl(1, 20)
        storage.failing = True
        with pytest.raises(OSError, match="disk full"):
            session.flush()
        storage.failing = False
        clock.now += 10
    assert stored(sessions) == {"new": 1, "$ttl": {"new": [clock.now + 10, 20.0]}}


def test_a_time_that_runs_out_while_the_session_is_stored_leaves_nothing(clock: Clock) -> None:
    sessions = SessionManager()
    fill(sessions, code=ttl(1, 10))
    with sessions.session_scope(KEY) as session:
        session.other = 1
        session.code = 2
        clock.now += 9.99
        clock.step = 0.004
        session.flush()
        clock.step = 0
    found = stored(sessions)
    assert ("code" in found) == ("code" in found.get("$ttl", {}))


def test_a_time_that_runs_out_while_fields_are_listed_raises_nothing(clock: Clock) -> None:
    sessions = SessionManager()
    fill(sessions, {f"f{i}": ttl(i, 10 + i) for i in range(20)})
    clock.now += 9
    clock.step = 0.01
    with sessions.session_scope(KEY) as session:
        while session:
            for name in session:
                assert name in session or clock.now >= 1_000_010
            assert repr(session)


def test_initial_fields_may_have_timers(storage: Any, clock: Clock) -> None:
    sessions = SessionManager(storage=storage, initial=lambda update: {"code": ttl(1, 10), "x": 1})
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "x": 1}
        session.x = 2
    clock.now += 10
    with sessions.session_scope(KEY) as session:
        assert session == {"x": 2}


@pytest.mark.parametrize(
    "seconds", [-1, -0.001, float("nan"), float("inf"), -float("inf"), timedelta(seconds=-1)]
)
def test_a_life_time_is_a_number_of_seconds_from_zero_up(seconds: Any) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        ttl(1, seconds)


@pytest.mark.parametrize("seconds", [None, [], {}, object()])
def test_a_life_time_is_a_number(seconds: Any) -> None:
    with pytest.raises(TypeError):
        ttl(1, seconds)


def test_a_ttl_in_a_ttl_is_refused() -> None:
    with pytest.raises(TypeError, match="one timer"):
        ttl(ttl(1, 10), 20)


@pytest.mark.parametrize(
    "way", [way for way in WAYS if way.startswith(("d", "l", "in", "app", "ext", "+", "sl"))]
)
def test_a_ttl_inside_a_value_is_refused(in_memory: Sessions, way: str) -> None:
    fill(in_memory, d={}, l=[0])
    with in_memory.session_scope(KEY) as session:
        with pytest.raises(TypeError, match=r"'user:1'.*session\[name\] = ttl"):
            into(session, way, ttl(1, 10))
        assert session == {"d": {}, "l": [0]}
    assert stored(in_memory) == {"d": {}, "l": [0]}


@pytest.mark.parametrize(
    "put",
    [
        lambda session: session.__setitem__("x", {ttl(1): 1}),
        lambda session: session.__setitem__("x", {ttl(1)}),
        lambda session: session.__setitem__("x", frozenset([ttl(1)])),
        lambda session: session.s.add(ttl(1)),
        lambda session: session.s.update([ttl(1)]),
        lambda session: session.__setitem__(ttl("x"), 1),
        lambda session: session.__setitem__("x", ttl([ttl(1)])),
    ],
)
def test_a_ttl_as_a_key_or_in_a_set_is_refused(
    in_memory: Sessions, put: Callable[[Session], object]
) -> None:
    fill(in_memory, s={1})
    with in_memory.session_scope(KEY) as session, pytest.raises(TypeError):
        put(session)
    assert stored(in_memory) == {"s": {1}}


def test_a_ttl_that_came_into_a_plain_list_later_is_refused_at_the_flush(
    in_memory: Sessions,
) -> None:
    mine: list[Any] = []
    with in_memory.session_scope(KEY) as session:
        session.mine = mine
        mine.append(ttl(1))
        with pytest.raises(TypeError, match=r"'user:1'.*session\[name\] = ttl"):
            session.flush()
        mine.clear()
    assert stored(in_memory) == {"mine": []}


@pytest.mark.parametrize("timers", [5, "text", [1], {"a": 5}, {"a": [1]}, {"a": ["x", "y"]}])
def test_timers_that_are_none_raise_and_stay(timers: Any) -> None:
    storage = OwnStorage()
    storage.kept[KEY] = {"a": 1, "$ttl": timers}
    sessions = SessionManager(storage=storage, lock_timeout=1)
    for _ in range(2):
        with (
            pytest.raises(SessionDecodeError, match="'user:1' cannot be read"),
            sessions.session_scope(KEY),
        ):
            pass
    assert storage.kept[KEY] == {"a": 1, "$ttl": timers}


# -- what it costs


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that thaw or freeze a field."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("load", "dump"):
            plain = getattr(session_sync.session.types.base.AnyType, name)

            def counting(*args: Any, name: str = name, plain: Any = plain) -> Any:
                calls.append(name)
                return plain(*args)

            patch.setattr(session_sync.session.types.base.AnyType, name, counting)
        yield calls


@pytest.mark.parametrize(
    ("use", "cost"),
    [
        (lambda session: None, []),
        (lambda session: list(session), []),
        (lambda session: "f7" in session and "no" not in session, []),
        (lambda session: session.f7["a"], ["load", "dump"]),
        (lambda session: session.f7["a"].append(1), ["load", "dump"]),
        (lambda session: setattr(session, "f7", {}), ["dump", "dump"]),  # the first to check it
        (lambda session: setattr(session, "f7", 1), []),
        (lambda session: session.__delitem__("f7"), []),
        (lambda session: setattr(session, "f7", ttl(1)), []),
        (lambda session: session.clear(), []),
    ],
)
def test_a_handler_pays_for_the_fields_that_it_touches(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[Session], object], cost: list[str]
) -> None:
    sessions = SessionManager()
    fill(sessions, {f"f{i}": {"a": [i]} for i in range(1000)})
    with counted(monkeypatch) as calls, sessions.session_scope(KEY) as session:
        use(session)
    assert calls == cost


def test_in_memory_the_fields_that_nobody_touched_are_not_copied() -> None:
    storage = MemoryStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, {f"f{i}": {"a": [i]} for i in range(1000)})
    fill(sessions, code=ttl(1, 60))
    before = storage.load(KEY)
    for change in ({"f7": 1}, {"code": 2}, {"new": ttl(1, 60)}):
        fill(sessions, change)
        after = storage.load(KEY)
        assert before is not None
        assert after is not None
        assert after.base is before.base
        assert after["f8"] is before["f8"]


def test_an_unchanged_part_of_a_changed_field_is_not_copied() -> None:
    storage = MemoryStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, rows=[{"a": [i]} for i in range(10)])
    before = storage.load(KEY)
    with sessions.session_scope(KEY) as session:
        session.rows[7]["a"].append(1)
    after = storage.load(KEY)
    assert before is not None
    assert after is not None
    for old, new, i in zip(before["rows"], after["rows"], itertools.count(), strict=False):
        assert (old is new) == (i != 7)


def test_no_method_that_only_reads_a_container_is_ours() -> None:
    ours = {"__reduce_ex__", "__module__", "__doc__", "__dict__", "__weakref__", "_owner"}
    ours |= {"_is_declared"}
    ours |= {"__annotations__", "__orig_bases__"}
    ours |= {"fromkeys", "__repr__", "__firstlineno__", "__static_attributes__"}
    for cls, changes in (
        (SessionDict, DICT_CHANGES),
        (SessionList, LIST_CHANGES),
        (SessionSet, SET_CHANGES),
    ):
        assert set(vars(cls)) - ours == set(changes)
    assert "__repr__" not in {*vars(SessionDict), *vars(SessionList)}


def test_what_a_class_does_when_a_field_is_assigned_it_does_in_every_way() -> None:
    class Checked(Session):
        def __setitem__(self, name: str, value: Any) -> None:
            if value == "bad":
                raise ValueError(name)
            super().__setitem__(name, value)

    with SessionManager(Checked).session_scope(KEY) as session:
        for assign in (
            lambda: session.__setitem__("a", "bad"),
            lambda: setattr(session, "a", "bad"),
            lambda: session.setdefault("a", "bad"),
            lambda: session.update(a="bad"),
            lambda: session.__ior__({"a": "bad"}),
            lambda: session_sync.session.session.replace_fields(session, {"a": "bad"}),
        ):
            with pytest.raises(ValueError, match="a"):
                assign()
        assert session == {}
