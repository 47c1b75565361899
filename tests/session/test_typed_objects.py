"""Declared objects: a change inside one is noticed and stored."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import typed_tools
from conftest import Counting
from typed_tools import Address, AskAge, AskName, Cart, Item, Page, Pair, Profile, Tree, manager_of

from session_sync import (
    Session,
    SessionClosedError,
    SessionEncodeError,
    SessionManager,
    SessionTypeError,
    field,
)

carts = pytest.fixture(typed_tools.make_carts)


def test_changes_inside_declared_objects_are_saved(storage: Any) -> None:
    class Deep(Session):
        lines: list[Item] = field(default_factory=list)
        tree: Tree = field(default_factory=lambda: Tree(0))
        profile: Profile | None = None
        step: AskName | AskAge | None = None
        pairs: dict[str, tuple[Item, ...]] = field(default_factory=dict)
        address: Address | None = None
        page: Page[Item] | None = None

    sessions = SessionManager(Deep, storage=storage)
    with sessions.session_scope("user:1") as session:
        session.lines = [Item("tea"), Item("milk")]
        session.tree = Tree(1, [Tree(2)])
        session.profile = Profile("alex")
        session.step = AskAge()
        session.pairs = {"a": (Item("x"), Item("y"))}
        session.address = {"city": "Wien"}
        session.page = Page([Item("z")], 1)
    with sessions.session_scope("user:1") as session:
        session.lines[1].price = 5
        session.lines[1].tags.append("new")
        session.tree.children[0].children.append(Tree(3))
        assert session.profile is not None
        session.profile.tags.append("x")
        assert isinstance(session.step, AskAge)
        session.step.name = "alex"
        session.pairs["a"][1].price = 6
        assert session.address is not None
        session.address["zip"] = "1010"
        assert session.page is not None
        session.page.items[0].price = 7
    with sessions.session_scope("user:1") as session:
        assert session.lines == [Item("tea"), Item("milk", 5, ["new"])]
        assert session.tree == Tree(1, [Tree(2, [Tree(3)])])
        assert session.profile == Profile("alex", ["x"])
        assert session.step == AskAge(name="alex")
        assert session.pairs == {"a": (Item("x"), Item("y", 6))}
        assert session.address == {"city": "Wien", "zip": "1010"}
        assert session.page == Page([Item("z", 7)], 1)


def test_an_object_that_was_assigned_stays_that_object(carts: SessionManager[Cart]) -> None:
    lines = [Item("tea")]
    with carts.session_scope("user:1") as session:
        session.lines = lines
        lines[0].price = 1
        session.flush()
        lines[0].price = 2
        lines.append(Item("milk"))
        assert session.lines is lines
    with carts.session_scope("user:1") as session:
        assert session.lines == [Item("tea", 2), Item("milk")]
        lines[0].price = 99
    with carts.session_scope("user:1") as session:
        assert session.lines[0].price == 2


def test_a_handler_that_raises_leaves_declared_objects_as_they_were(
    carts: SessionManager[Cart],
) -> None:
    with carts.session_scope("user:1") as session:
        session.lines = [Item("tea", 1)]
    with pytest.raises(ZeroDivisionError), carts.session_scope("user:1") as session:
        session.lines[0].price = 2
        session.flush()
        session.lines[0].price = 3
        session.lines[0].tags.append("x")
        raise ZeroDivisionError
    with carts.session_scope("user:1") as session:
        assert session.lines == [Item("tea", 2)]


def test_containers_inside_objects_are_closed_with_their_session(
    carts: SessionManager[Cart],
) -> None:
    with carts.session_scope("user:1") as session:
        session.lines = [Item("tea", 1, ["a"])]
    with carts.session_scope("user:1") as session:
        lines, tags = session.lines, session.lines[0].tags
    assert tags == ["a"]
    for change in (lambda: tags.append("b"), lambda: lines.append(Item("milk"))):
        with pytest.raises(SessionClosedError):
            change()


def test_what_comes_out_of_another_session_goes_in_as_a_copy(storage: Any) -> None:
    class Many(Session):
        lines: list[Item] = field(default_factory=list)
        sets: dict[str, set[int]] = field(default_factory=dict)
        address: Address | None = None
        pairs: tuple[Item, ...] = ()

    sessions = SessionManager(Many, storage=storage)
    with sessions.session_scope("user:1") as one:
        one.lines = [Item("tea", 1, ["a"])]
        one.sets = {"x": {1}}
        one.address = {"city": "Wien"}
        one.pairs = (Item("x", 1, ["b"]),)
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:2") as two:
        two.lines = one.lines
        two.sets = one.sets
        two.address = one.address
        two.pairs = one.pairs
        with suppress(SessionEncodeError):  # not in a store that serialises
            two.more = [one.lines[0]]
        for there, here in ((two.lines, one.lines), (two.pairs, one.pairs)):
            there[0].tags.append("two")
            assert "two" not in here[0].tags
        two.sets["x"].add(2)
        assert two.address is not None
        two.address["zip"] = "2"
        two.pop("more", None)
        assert one.sets == {"x": {1}}
        assert one.address == {"city": "Wien"}
    with sessions.session_scope("user:2") as two:
        assert two.lines == [Item("tea", 1, ["a", "two"])]
        assert two.sets == {"x": {1, 2}}
    with sessions.session_scope("user:1") as one:
        assert one == {
            "lines": [Item("tea", 1, ["a"])],
            "sets": {"x": {1}},
            "address": {"city": "Wien"},
            "pairs": (Item("x", 1, ["b"]),),
        }


def test_what_lies_in_a_handlers_own_container_goes_in_as_a_copy_too(storage: Any) -> None:
    class Many(Session):
        lines: list[Item] = field(default_factory=list)
        named: dict[str, list[Item]] = field(default_factory=dict)
        numbers: set[int] = field(default_factory=set)
        address: Address | None = None
        addresses: dict[str, Address] = field(default_factory=dict)

    sessions = SessionManager(Many, storage=storage)
    with sessions.session_scope("user:1") as one:
        one.lines = [Item("tea", 1, ["a"])]
        one.numbers = {1}
        one.address = {"city": "Wien"}
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:2") as two:
        two.lines = own = [one.lines[0]]
        two.named = {"x": [one.lines[0]], "y": one.lines}
        two.numbers = one.numbers
        assert one.address is not None
        two.addresses = {"x": one.address}
        assert two.lines is own
        for item in (two.lines[0], two.named["x"][0], two.named["y"][0]):
            item.tags.append("two")
        two.numbers.add(2)
        two.addresses["x"]["city"] = "Graz"
        assert one.lines == [Item("tea", 1, ["a"])]
        assert one.numbers == {1}
        assert one.address == {"city": "Wien"}
    with sessions.session_scope("user:2") as two:
        changed = [Item("tea", 1, ["a", "two"])]
        assert (two.lines, two.named) == (changed, {"x": changed, "y": changed})
        assert (two.numbers, two.addresses) == ({1, 2}, {"x": {"city": "Graz"}})


def test_keys_that_change_places_or_names_are_saved(storage: Any) -> None:
    sessions = manager_of(dict[str, int], storage)
    with sessions.session_scope("user:1") as session:
        session.value = {"a": 1, "b": 1}
    for change in (
        lambda value: value.update(c=value.pop("b")),
        lambda value: value.update(a=value.pop("a")),
    ):
        with sessions.session_scope("user:1") as session:
            change(session.value)
            expected = list(session.value.items())
        with sessions.session_scope("user:1") as session:
            assert list(session.value.items()) == expected


class Odd(str):
    """Equal to nothing but itself, until it is stored as the str that it is."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@pytest.mark.parametrize(
    ("annotation", "value", "what"),
    [
        (set[str], {Odd("a"), Odd("a")}, "elements"),
        (frozenset[str], frozenset({Odd("a"), Odd("a")}), "elements"),
        (dict[str, int], {Odd("a"): 1, Odd("a"): 2}, "keys"),
    ],
)
def test_what_would_become_one_in_the_store_is_refused(
    annotation: Any, value: Any, what: str
) -> None:
    with manager_of(annotation).session_scope("user:1") as session:
        with pytest.raises(SessionTypeError, match=f"{what} that are equal once stored"):
            session.value = value
            session.flush()
        session.clear()


def test_what_post_init_changes_at_each_load_is_no_change_of_the_handlers() -> None:
    @dataclass
    class Loaded:
        times: int

        def __post_init__(self) -> None:
            self.times += 1

    storage = Counting()
    storage.set("user:1", {"value": {"times": 1}})
    storage.writes = 0
    sessions = manager_of(Loaded, storage)
    for _ in range(2):
        with sessions.session_scope("user:1") as session:
            assert session.value.times == 2
    assert storage.writes == 0


class Money5(int):
    def __new__(cls, amount: int, currency: str) -> Money5:
        return super().__new__(cls, amount)


class Tag(str):
    def __new__(cls, text: str) -> Tag:
        return super().__new__(cls, "#" + text)


class Summed(Pair):
    def __new__(cls, left: int, right: str = "r") -> Summed:
        return super().__new__(cls, left + 1, right)


@pytest.mark.parametrize("value", [Money5(5, "eur"), Tag("x"), Summed(1)])
def test_what_its_class_would_make_again_as_something_else_is_refused(value: Any) -> None:
    with manager_of(type(value)).session_scope("user:1") as session:
        with pytest.raises(SessionTypeError, match=r"come back as something else|cannot be made"):
            session.value = value
        assert "value" not in session


@pytest.mark.parametrize(("cls", "stored"), [(Tag, "x"), (Summed, (1, "r"))])
def test_what_is_stored_and_made_as_something_else_is_refused(cls: Any, stored: Any) -> None:
    storage = Counting()
    storage.set("user:1", {"value": stored})
    storage.writes = 0
    with (
        manager_of(cls, storage).session_scope("user:1") as session,
        pytest.raises(SessionTypeError, match="come back as something else"),
    ):
        session.value  # noqa: B018
    assert storage.writes == 0


def test_containers_that_a_default_has_made_are_closed_too() -> None:
    class Row(NamedTuple):
        name: str
        tags: list[str] = []  # one for all rows, but not for those of a session

    sessions = manager_of(Item | Row)
    sessions.storage.set("user:1", {"value": {"name": "tea"}})  # from before there were tags
    sessions.storage.set("user:2", {"value": ("tea",)})
    for key in ("user:1", "user:2"):
        with sessions.session_scope(key) as session:
            tags = session.value.tags
            tags.append("x")
        with pytest.raises(SessionClosedError):
            tags.append("y")
        with sessions.session_scope(key) as session:
            assert session.value.tags == ["x"]
    assert Row("milk").tags == []


def test_the_same_object_in_two_fields_is_saved_in_both() -> None:
    class Two(Session):
        first: Item | None = None
        second: list[Item] = field(default_factory=list)

    sessions = SessionManager(Two)
    with sessions.session_scope("user:1") as session:
        session.first = item = Item("tea")
        session.second.append(item)
        session.flush()
        item.price = 5
    with sessions.session_scope("user:1") as session:
        assert session.first == session.second[0] == Item("tea", 5)


def test_a_value_that_contains_itself_is_refused() -> None:
    tree = Tree(1)
    tree.children.append(tree)
    with manager_of(Tree).session_scope("user:1") as session:
        with pytest.raises(SessionEncodeError, match="the value of 'value' contains itself"):
            session.value = tree
        session.value = Tree(1)
        session.value.children.append(session.value)
        with pytest.raises(SessionEncodeError, match="the value of 'value' contains itself"):
            session.flush()
        session.value.children.clear()


def test_threads_that_change_declared_objects_lose_nothing(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.lines = [Item("tea", 0)]

    def work() -> None:
        for _ in range(25):
            with carts.session_scope("user:1") as session:
                session.lines[0].price += 1
                session.counter += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with carts.session_scope("user:1") as session:
        assert (session.lines[0].price, session.counter) == (100, 100)
