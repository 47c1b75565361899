"""What a handler can do with its session, as a mapping and an object, and what is stored then."""

from __future__ import annotations

import collections
import copy
import enum
import pickle
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import session_tools
from session_tools import (
    KEY,
    FailingStorage,
    OwnStorage,
    PicklingStorage,
    Sessions,
    disk,
    fill,
    same,
    stored,
)

from session_sync import Codec, MemoryStorage, Session, SessionEncodeError, SessionManager

storage = pytest.fixture(params=session_tools.STORES)(session_tools.make_storage)
sessions = pytest.fixture(session_tools.make_sessions)
in_memory = pytest.fixture(session_tools.make_in_memory)


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
        told = r"'user:1' has no field 'draft'.*get\('draft', default\)"
        with pytest.raises(AttributeError, match=told):
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
        with pytest.raises(AttributeError, match=rf"is reserved in .*; use session\['{name}'\]"):
            setattr(session, name, 2)
        with pytest.raises(AttributeError, match=rf"is reserved in .*; use session\['{name}'\]"):
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
