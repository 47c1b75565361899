"""A session shares nothing with its store, nor with what is left of it after its scope."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import session_tools
from session_tools import KEY, NESTED, OwnStorage, Sessions, closed_session, fill, stored

import session_sync.session.containers
import session_sync.session.session
from session_sync import MemoryStorage, Session, SessionClosedError, SessionManager, ttl
from session_sync.session.containers import SessionDict, SessionList, SessionSet

storage = pytest.fixture(params=session_tools.STORES)(session_tools.make_storage)
sessions = pytest.fixture(session_tools.make_sessions)
in_memory = pytest.fixture(session_tools.make_in_memory)


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
