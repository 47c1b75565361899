"""Declared fields: what is assigned or loaded is checked against the type."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import typing
from collections import abc
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple

import msgspec
import pytest
import typed_tools
from conftest import Counting
from typed_tools import (
    Address,
    AskAge,
    AskName,
    Cart,
    Item,
    Page,
    Pair,
    Profile,
    Shade,
    T,
    Tree,
    manager_of,
)

from session_sync import (
    Codec,
    MemoryStorage,
    SessionClosedError,
    SessionError,
    SessionManager,
    SessionTypeError,
)

SECRET = "s3cr3t"  # in a value: it may stand in no message
carts = pytest.fixture(typed_tools.make_carts)


class Theme(enum.Enum):
    LIGHT = "light"
    DARK = "dark"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.0


class Frozen(msgspec.Struct, frozen=True):
    name: str


@dataclass
class Keyed(Generic[T]):
    key: T


@dataclass
class Box(Keyed[int], Generic[T]):
    """Its T is another one than that of its base."""

    texts: list[T]


@dataclass
class IntBox(Box[str]):
    item: Item


class UserId(str):
    """A type of ids."""


class Size(enum.Enum):
    SMALL = (1, "s")
    LARGE = (2, "l")


class Guessing(enum.Enum):
    """An Enum that takes more than its values."""

    DARK = "dark"

    @classmethod
    def _missing_(cls, value: object) -> Guessing:
        return {"DARK": cls.DARK}[str(value)]


# -- what is assigned is checked

WRONG: list[tuple[Any, Any, str]] = [
    (int, SECRET, "value has to be int, not str"),
    (int, 1.5, "value has to be int, not float"),
    (int, None, "value has to be int, not NoneType"),
    (bool, 1, "value has to be bool, not int"),
    (str, b"x", "value has to be str, not bytes"),
    (bytes, "x", "value has to be bytes, not str"),
    (float, SECRET, "value has to be float, not str"),
    (datetime, "2026-01-01", "value has to be datetime, not str"),
    (datetime, date(2026, 1, 1), "value has to be datetime, not date"),
    (Decimal, 1.5, "value has to be Decimal, not float"),
    (int | None, SECRET, "value has to be int | None, not str"),
    (Literal["a", 1], SECRET, "value has to be Literal['a', 1], not another str"),
    (Literal["a", 1], True, "value has to be Literal['a', 1], not bool"),
    (Theme, "light", "value has to be Theme, not str"),
    (Literal[Theme.DARK], Theme.LIGHT, "value has to be Literal[Theme.DARK], not another Theme"),
    (list[int], (1, 2), "value has to be list[int], not tuple"),
    (list[int], [1, SECRET], "value[1] has to be int, not str"),
    (set[int], [1], "value has to be set[int], not list"),
    (set[int], {1, SECRET}, "value{...} has to be int, not str"),
    (tuple[int, str], (1,), "value has to be tuple[int, str], not a tuple of 1"),
    (tuple[int, str], (1, 2), "value[1] has to be str, not int"),
    (tuple[int, ...], (1, SECRET), "value[1] has to be int, not str"),
    (tuple[()], (1,), "value has to be tuple[()], not a tuple of 1"),
    (dict[str, int], {"a": SECRET}, "value.a has to be int, not str"),
    (dict[str, int], {5: 1}, "value.keys() has to be str, not int"),
    (dict[int, list[int]], {7: [SECRET]}, "value[7][0] has to be int, not str"),
    (Item, {"name": "tea"}, "value has to be Item, not dict"),
    (Item, Item("tea", SECRET), "value.price has to be int, not str"),  # type: ignore[arg-type]
    (Item, Item("tea", 1, [SECRET, 5]), "value.tags[1] has to be str, not int"),  # type: ignore[list-item]
    (list[Item], [Item("tea"), AskName()], "value[1] has to be Item, not AskName"),
    (Point, Point(1, SECRET), "value.y has to be float, not str"),  # type: ignore[arg-type]
    (Tree, Tree(1, [Tree(SECRET)]), "value.children[0].value has to be int, not str"),  # type: ignore[arg-type]
    (Pair, (1, "r"), "value has to be Pair, not tuple"),
    (Pair, Pair(SECRET), "value[0] has to be int, not str"),  # type: ignore[arg-type]
    (Address, {"zip": "1"}, "value.city has to be str, not nothing"),
    (Address, {"city": 5}, "value.city has to be str, not int"),
    (Profile, Profile(5), "value.name has to be str, not int"),  # type: ignore[arg-type]
    (AskName | AskAge, Item("tea"), "value has to be AskName | AskAge, not Item"),
    (AskName | AskAge, AskAge(5), "value.prompt has to be str, not int"),  # type: ignore[arg-type]
    (list[int] | list[str], [1, "x"], "value has to be list[int] | list[str], not list"),
    (Page[Item], Page([5], 1), "value.items[0] has to be Item, not int"),
    (Annotated[int, msgspec.Meta(ge=0)], -5, "value has to be int >= 0, not another int"),
    (
        Annotated[list[Item], msgspec.Meta(max_length=1)],
        [Item("a"), Item("b")],
        "value has to be array of length <= 1, not another list[Item]",
    ),
    (abc.Sequence[int], {1}, "value has to be list[int] | tuple[int, ...], not set"),
    (list[list[int]], [(1,)], "value[0] has to be list[int], not tuple"),
    (list[dict[str, int]], [[1]], "value[0] has to be dict[str, int], not list"),
    (list[UserId], [SECRET], "value[0] has to be UserId, not str"),
]


@pytest.mark.parametrize(("annotation", "value", "message"), WRONG)
def test_a_value_of_another_type_is_refused_and_changes_nothing(
    annotation: Any, value: Any, message: str
) -> None:
    storage = Counting()
    sessions = manager_of(annotation, storage)
    storage.set("user:1", {"before": 1})
    with sessions.session_scope("user:1") as session:
        for assign in (
            lambda: setattr(session, "value", value),
            lambda: session.__setitem__("value", value),
            lambda: session.update(before=2, value=value),
            lambda: session.setdefault("value", value),
        ):
            with pytest.raises(SessionTypeError) as caught:
                assign()
            assert str(caught.value) == f"session 'user:1': {message}; nothing was changed"
            assert isinstance(caught.value, TypeError)
            assert isinstance(caught.value, SessionError)
            assert session == {"before": 1}
    assert storage.writes == 1  # the one above


@pytest.mark.parametrize(("annotation", "value", "message"), WRONG)
def test_what_has_become_of_another_type_inside_is_not_written(
    annotation: Any, value: Any, message: str
) -> None:
    """The list was right when it was assigned, and the handler put something else into it."""
    sessions = manager_of(list[annotation])
    with sessions.session_scope("user:1") as session:
        session.value = []
        session.other = 1
    scope = sessions.session_scope("user:1")
    session = scope.__enter__()
    session.other = 2
    session.value.append(value)
    with pytest.raises(SessionTypeError) as caught:
        session.flush()
    path, _, types = message.partition(" has to be ")
    expected, _, found = types.rpartition(", not ")
    assert str(caught.value) == (
        f"session 'user:1': value[0]{path.removeprefix('value')} has become {found}, where "
        f"Declaring declares {expected}; nothing was written"
    )
    with pytest.raises(SessionTypeError, match="nothing was written"):
        scope.__exit__(None, None, None)
    assert sessions.storage.get("user:1") == {"value": [], "other": 1}


def test_whoever_mends_it_loses_nothing(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.counter = 5
        session.lines.append(5)  # type: ignore[arg-type]
        with pytest.raises(SessionTypeError, match=r"lines\[0\] has become int"):
            session.flush()
        session.lines[0] = Item("tea")
        session.flush()
        assert carts.storage.get("user:1") == {
            "counter": 5,
            "lines": [{"name": "tea", "price": 0, "tags": []}],
        }


def test_replacing_all_fields_is_all_or_nothing(carts: SessionManager[Cart]) -> None:
    from session_sync.session.session import replace_fields

    with carts.session_scope("user:1") as session:
        session.counter = 5
        with pytest.raises(SessionTypeError):
            replace_fields(session, {"theme": "dark", "counter": SECRET})
        assert session.counter == 5
        replace_fields(session, {"theme": "dark"})
        assert (session.counter, session.theme) == (0, "dark")
        replace_fields(session, None)
    assert not carts.storage.has("user:1")


RIGHT: list[tuple[Any, Any]] = [
    (int, True),
    (int, 2**80),
    (float, 5),
    (float, math.inf),
    (date, datetime(2026, 1, 2)),
    (object, {"a": (1, [2])}),
    (Any, [{1}, (2,)]),
    (None, None),
    (Literal["a", 1, None, Theme.DARK], Theme.DARK),
    (Literal["a", 1, None, Theme.DARK], 1),
    (Theme, Theme.DARK),
    (Shade, Shade.RED),
    (Level, Level.HIGH),
    (Rights, Rights.READ | Rights.WRITE),
    (Size, Size.LARGE),
    (list[int] | Any, [{1}, "x"]),
    (str | Shade, Shade.RED),
    (str | Shade, "red"),
    (Shade | str, "red"),
    (Level | int, Level.LOW),
    (Level | int, 1),
    (datetime | str, "2026-01-01"),
    (datetime | str, datetime(2026, 1, 1)),
    (list[int] | set[int] | tuple[int, ...] | None, {1, 2}),
    (list[int] | set[int] | tuple[int, ...] | None, (1, 2)),
    (list, [1, "x", None]),
    (dict, {1: "x"}),
    (tuple, (1, "x")),
    (set, {1, "x"}),
    (typing.List[int], [1]),  # noqa: UP006
    (typing.Optional[typing.Dict[str, int]], {"a": 1}),  # noqa: UP006, UP045
    (frozenset[tuple[int, str]], frozenset({(1, "a")})),
    (abc.Sequence[int], [1]),
    (abc.Sequence[int], (1,)),
    (abc.Mapping[str, abc.Set[int]], {"a": {1}, "b": frozenset({2})}),
    (dict[Theme, set[Pair]], {Theme.DARK: {Pair(1), Pair(2, "x")}}),
    (dict[Pair, Item], {Pair(1): Item("tea")}),
    (dict[int, dict[str, list[Item | None]]], {7: {"a": [Item("tea"), None]}}),
    (Item, Item("tea", 5, ["new"])),
    (Point | None, Point(1, 2.5)),
    (Tree, Tree(1, [Tree(2, [Tree(3)]), Tree(4)])),
    (AskName | AskAge, AskName("?")),
    (AskName | AskAge, AskAge("?")),
    (AskName | dict[str, Any], {"AskName": {"prompt": "x"}}),
    (AskName | dict[str, Any], AskName("y")),
    (list[AskName] | list[AskAge], [AskAge("?", "x")]),
    (list[AskName | AskAge | None], [AskAge(), None, AskName()]),
    (Pair, Pair(1)),
    (Pair | tuple[int, str], Pair(1, "x")),
    (Pair | tuple[int, str], (1, "x")),
    (Address, {"city": "Wien", "more": {1}}),
    (Address | None, {"city": "Wien", "zip": "1010"}),
    (Profile, Profile("alex", ["a"])),
    (Frozen, Frozen("alex")),
    (Page[Item], Page([Item("tea")], 1)),
    (Page[Page[int]], Page([Page([1], 1)], 1)),
    (typing.NewType("UserId", int), 5),
    (Annotated[int, "a note"], 5),
    (Annotated[int, msgspec.Meta(ge=0)] | None, 0),
    (Annotated[str, msgspec.Meta(pattern="^a")], "abc"),
    (Annotated[Item | None, msgspec.Meta(description="a note")], None),
    (Annotated[int, msgspec.Meta(ge=0)], True),
    (Annotated[int | None, msgspec.Meta(ge=0)], None),
    (Annotated[typing.Optional[str], msgspec.Meta(max_length=3)], "abc"),  # noqa: UP045
    (T, "anything"),
    (Literal["auto", Theme.DARK] | None, Theme.DARK),
    (Annotated[Theme | str, "a note"] | None, Theme.DARK),
    (abc.Collection[str] | AskName, AskName("x")),
    (abc.Collection[str] | AskName, ["a"]),
    (abc.Collection[str] | AskName, {"AskName": 1}),
    (AskName | abc.Collection[str], AskName("x")),
    (UserId | None, UserId("x")),
    (set[UserId], {UserId("x")}),
    (set[Theme], {Theme.DARK}),
    (set[tuple[Theme, int]], {(Theme.DARK, 1)}),
    (frozenset[Shade], frozenset({Shade.RED})),
    (dict[tuple[Shade, int], set[Level]], {(Shade.RED, 1): {Level.LOW}}),
    (Box[str], Box(1, ["a"])),
    (IntBox, IntBox(1, ["a"], Item("x"))),
]


@pytest.mark.parametrize(("annotation", "value"), RIGHT)
def test_what_was_declared_comes_back_as_declared(
    annotation: Any, value: Any, storage: Any
) -> None:
    sessions = manager_of(annotation, storage)
    with sessions.session_scope("user:1") as session:
        session.value = value
        assert session.value is value
    with sessions.session_scope("user:1") as session:
        assert session.value == value
        assert_same_types(session.value, value)


def assert_same_types(one: Any, other: Any) -> None:
    if isinstance(other, dict | list | set) and type(other) in (dict, list, set):
        assert isinstance(one, type(other))
    else:
        assert type(one) is type(other)
    if isinstance(other, dict):
        for key, item in other.items():
            (same,) = [k for k in one if k == key]
            assert_same_types(same, key)
            assert_same_types(one[key], item)
    elif isinstance(other, list | tuple):
        for left, right in zip(one, other, strict=True):
            assert_same_types(left, right)
    elif isinstance(other, set | frozenset):
        assert sorted(map(repr, one)) == sorted(map(repr, other))
    elif dataclasses.is_dataclass(other):
        for part in dataclasses.fields(other):
            assert_same_types(getattr(one, part.name), getattr(other, part.name))


@pytest.mark.parametrize(("annotation", "value"), RIGHT)
def test_a_read_alone_writes_nothing(annotation: Any, value: Any) -> None:
    storage = Counting()
    sessions = manager_of(annotation, storage)
    with sessions.session_scope("user:1") as session:
        session.value = value
    stored = MemoryStorage(strict=True)  # no leaf is the same object any more
    codec = Codec()
    fields = codec.decode(codec.encode(storage.get("user:1") or {}))
    storage.set("user:1", fields)
    storage.writes = 0
    with sessions.session_scope("user:1") as session:
        assert session.value == value
        assert copy.deepcopy(session)["value"] == value
        session.flush()
    assert storage.writes == 0
    stored.close()


def test_a_member_of_a_str_enum_is_stored_as_its_base_value_where_str_is_declared(
    storage: Any,
) -> None:
    sessions = manager_of(str, storage)
    with sessions.session_scope("user:1") as session:
        session.value = Shade.RED
        assert session.value is Shade.RED
    with sessions.session_scope("user:1") as session:
        assert type(session.value) is str
        assert session.value == "red"


def test_flushing_a_member_of_a_str_enum_again_writes_nothing() -> None:
    storage = Counting()
    with manager_of(str, storage).session_scope("user:1") as session:
        session.value = Shade.RED
        for _ in range(3):
            session.flush()
    assert storage.writes == 1


def test_an_enum_may_take_more_than_its_values() -> None:
    storage = Counting()
    storage.set("user:1", {"value": "DARK"})
    storage.writes = 0
    sessions = manager_of(Guessing, storage)
    with sessions.session_scope("user:1") as session:
        assert session.value is Guessing.DARK
    assert storage.writes == 0
    storage.set("user:1", {"value": SECRET})  # for which its _missing_ raises KeyError
    with sessions.session_scope("user:1") as session:
        for read in (lambda: session.value, lambda: session.get("value")):
            with pytest.raises(SessionTypeError, match="value is stored as a str that is none"):
                read()


def test_an_instance_of_a_subclass_is_refused_since_it_would_come_back_as_its_base() -> None:
    @dataclass
    class Special(Item):
        more: int = 0

    with (
        manager_of(Item).session_scope("user:1") as session,
        pytest.raises(SessionTypeError, match="value has to be Item, not Special"),
    ):
        session.value = Special("tea")


# -- what is loaded is checked


@pytest.mark.parametrize(
    ("annotation", "stored", "message"),
    [
        (int, SECRET, "value is stored as str, where Declaring declares int"),
        (Theme, SECRET, "value is stored as a str that is none of them"),
        (Literal["a"], SECRET, "value is stored as another str"),
        (list[int], [1, SECRET], r"value\[1\] is stored as str"),
        (list[list[int]], [(1,)], r"value\[0\] is stored as tuple"),
        (list[set[int]], [[1]], r"value\[0\] is stored as list"),
        (list[dict[str, int]], [[1]], r"value\[0\] is stored as list"),
        (list[UserId], [1], r"value\[0\] is stored as int"),
        (tuple[int, ...], [1], "value is stored as list"),
        (Item, [SECRET], "value is stored as list, where Declaring declares Item"),
        (Item, {"price": 5}, "value.name is stored as nothing"),
        (Item, {"name": 5}, "value.name is stored as int"),
        (Pair, (SECRET,), r"value\[0\] is stored as str"),
        (Pair, (1, "r", 5), "value is stored as a tuple of 3"),
        (Pair, (), r"value is stored as what it cannot be made from \(TypeError\)"),
        (AskName, {"AskName": {"prompt": "x"}}, "value is stored as a dict of other names"),
        (Address, {}, "value.city is stored as nothing"),
        (AskName | AskAge, {"AskAge": {"prompt": 5}}, "value.prompt is stored as int"),
        (Annotated[int, msgspec.Meta(ge=0)], -1, "value is stored as another int"),
    ],
)
def test_a_stored_value_of_another_type_is_refused_and_stays(
    annotation: Any, stored: Any, message: str
) -> None:
    sessions = manager_of(annotation)
    sessions.storage.set("user:1", {"value": stored, "counter": 1})
    with sessions.session_scope("user:1") as session:
        session.counter += 1  # the other fields are not affected
        for read in (lambda: session.value, lambda: session["value"], lambda: dict(session)):
            with pytest.raises(SessionTypeError, match=rf"session 'user:1': {message}") as caught:
                read()
            assert SECRET not in str(caught.value)
            assert "Declaring.migrations" in str(caught.value)
    assert sessions.storage.get("user:1") == {"value": stored, "counter": 2}
    with sessions.session_scope("user:1") as session:
        session.clear()  # whoever wants it gone
    assert not sessions.storage.has("user:1")


def test_what_a_constructor_raises_is_named_and_the_record_stays() -> None:
    @dataclass
    class Positive:
        number: int

        def __post_init__(self) -> None:
            if self.number < 0:
                raise ValueError("negative")

    sessions = manager_of(Positive)
    sessions.storage.set("user:1", {"value": {"number": -5}})
    with sessions.session_scope("user:1") as session:
        with pytest.raises(SessionTypeError, match=r"cannot be made from \(ValueError\)") as caught:
            session.value  # noqa: B018
        assert caught.value.__cause__ is None  # its own words may contain the value
    assert sessions.storage.get("user:1") == {"value": {"number": -5}}


def test_what_its_class_would_refuse_is_not_saved() -> None:
    """Else the session could never be read again."""

    @dataclass
    class Account:
        balance: int

        def __post_init__(self) -> None:
            if self.balance < 0:
                raise ValueError(f"{self.balance} is negative")

    sessions = manager_of(list[Account])
    with sessions.session_scope("user:1") as session:
        session.value = [Account(5)]
    scope = sessions.session_scope("user:1")
    scope.__enter__().value[0].balance -= 10
    with pytest.raises(
        SessionTypeError, match=r"value\[0\] has become what it cannot be made from"
    ):
        scope.__exit__(None, None, None)
    assert sessions.storage.get("user:1") == {"value": [{"balance": 5}]}


def test_a_named_tuple_whose_new_raises_is_named() -> None:
    class Base(NamedTuple):
        number: int

    class Positive(Base):
        def __new__(cls, number: int) -> Positive:
            if number < 0:
                raise ValueError(f"{number} is negative")
            return super().__new__(cls, number)

    sessions = manager_of(Positive)
    sessions.storage.set("user:1", {"value": (-5,)})
    with (
        sessions.session_scope("user:1") as session,
        pytest.raises(SessionTypeError, match=r"cannot be made from \(ValueError\)"),
    ):
        session.value  # noqa: B018


@dataclass
class Sorted:
    words: list[str]

    def __post_init__(self) -> None:
        self.words = sorted(self.words)


class SortedStruct(msgspec.Struct):
    words: list[str]

    def __post_init__(self) -> None:
        self.words = sorted(self.words)


class FrozenSorted(msgspec.Struct, frozen=True):
    words: list[str]

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "words", sorted(self.words))


@pytest.mark.parametrize("cls", [Sorted, SortedStruct, FrozenSorted])
def test_containers_that_the_class_makes_itself_are_closed_too(cls: Any) -> None:
    sessions = manager_of(cls)
    with sessions.session_scope("user:1") as session:
        session.value = cls(["b", "a"])
    with sessions.session_scope("user:1") as session:
        words = session.value.words
        words.append("c")
    with pytest.raises(SessionClosedError):
        words.append("d")
    with sessions.session_scope("user:1") as session:
        assert session.value.words == ["a", "b", "c"]


def test_a_class_that_cannot_be_made_again_is_refused_at_once() -> None:
    @dataclass
    class Taxed:
        price: int
        rate: dataclasses.InitVar[int]

    with pytest.raises(TypeError, match=r"a Taxed cannot be made again .*'rate'"):
        manager_of(Taxed)


def test_an_object_that_has_lost_an_attribute_is_not_written() -> None:
    sessions = manager_of(Item)
    with sessions.session_scope("user:1") as session:
        session.value = Item("tea", 5)
    with (
        pytest.raises(SessionTypeError, match="a Item of which an attribute was deleted"),
        sessions.session_scope("user:1") as session,
    ):
        del session.value.name
    assert sessions.storage.get("user:1") == {"value": {"name": "tea", "price": 5, "tags": []}}


def test_attributes_that_init_does_not_take_and_what_post_init_sets_up() -> None:
    @dataclass
    class Counted:
        words: list[str]
        count: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.count = len(self.words)
            self.index = dict(enumerate(self.words))

    sessions = manager_of(Counted, Counting())
    with sessions.session_scope("user:1") as session:
        session.value = Counted(["a", "b"])
        session.value.count = 7
    with sessions.session_scope("user:1") as session:
        assert (session.value.count, session.value.index) == (7, {0: "a", 1: "b"})
    assert sessions.storage.writes == 1  # type: ignore[attr-defined]


# -- classes that change while their instances are stored


def test_a_new_attribute_gets_its_default_and_an_old_one_stays_until_a_change() -> None:
    storage = Counting()
    stored = {"value": [{"name": "tea", "gone": 1}]}
    storage.set("user:1", stored)
    sessions = manager_of(list[Item], storage)
    storage.writes = 0
    with sessions.session_scope("user:1") as session:
        assert session.value == [Item("tea")]
    assert storage.writes == 0
    assert storage.get("user:1") == stored
    with sessions.session_scope("user:1") as session:
        session.value[0].price = 0  # what it is already: no change
    assert storage.writes == 0
    with sessions.session_scope("user:1") as session:
        session.value[0].price = 5
    assert storage.get("user:1") == {"value": [{"name": "tea", "price": 5, "tags": []}]}


def test_a_change_that_is_taken_back_after_a_flush_is_saved() -> None:
    """What was seen when the old form was loaded is no measure any more."""
    sessions = manager_of(list[Item])
    sessions.storage.set("user:1", {"value": [{"name": "tea"}]})
    with sessions.session_scope("user:1") as session:
        session.value[0].price = 5
        session.flush()
        session.value[0].price = 0
    with sessions.session_scope("user:1") as session:
        assert session.value == [Item("tea")]


def test_a_new_attribute_may_equal_one_that_is_gone() -> None:
    """Compared by position alone, the change would be lost."""

    @dataclass
    class Renamed:
        kept: int
        new: int = 0

    sessions = manager_of(Renamed)
    sessions.storage.set("user:1", {"value": {"kept": 5, "old": 1}})
    with sessions.session_scope("user:1") as session:
        assert session.value == Renamed(5, 0)
        session.value.new = 1
    assert sessions.storage.get("user:1") == {"value": {"kept": 5, "new": 1}}


def test_a_named_tuple_may_have_got_another_attribute() -> None:
    storage = Counting()
    storage.set("user:1", {"value": (5,)})
    storage.writes = 0
    with manager_of(Pair, storage).session_scope("user:1") as session:
        assert session.value == Pair(5, "r")
    assert storage.writes == 0


def test_a_class_may_become_one_of_several() -> None:
    storage = Counting()
    storage.set("user:1", {"value": {"prompt": "old"}})
    storage.writes = 0
    sessions = manager_of(AskName | AskAge, storage)
    with sessions.session_scope("user:1") as session:
        assert session.value == AskName("old")
    assert storage.writes == 0
    with sessions.session_scope("user:1") as session:
        session.value.prompt = "new"
    assert storage.get("user:1") == {"value": {"AskName": {"prompt": "new"}}}


def test_an_old_form_goes_to_the_class_that_knows_all_of_it() -> None:
    sessions = manager_of(AskName | AskAge)
    sessions.storage.set("user:1", {"value": {"prompt": "old", "name": "alex"}})
    with sessions.session_scope("user:1") as session:
        assert session.value == AskAge("old", "alex")


def test_classes_of_one_name_cannot_be_told_apart() -> None:
    other = dataclasses.make_dataclass("AskName", [("x", int)])
    with pytest.raises(TypeError, match="two of these classes have the same name"):
        manager_of(AskName | other)
