"""Lists, dicts and sets in a session: which changes are noticed, and how deep they may go."""

from __future__ import annotations

import bisect
import collections
import copy
import heapq
import json
import pickle
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import session_tools
from session_tools import (
    KEY,
    NESTED,
    WAYS,
    OwnStorage,
    Sessions,
    closed_session,
    fill,
    into,
    same,
    stored,
)

from session_sync import SessionEncodeError, SessionManager

storage = pytest.fixture(params=session_tools.STORES)(session_tools.make_storage)
sessions = pytest.fixture(session_tools.make_sessions)
in_memory = pytest.fixture(session_tools.make_in_memory)


# -- containers


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
