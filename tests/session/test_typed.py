"""Declared fields: what a class of sessions says, and what a handler then has."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import pickle
import sys
import textwrap
import threading
import typing
from collections import abc
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, TypedDict, TypeVar

import msgspec
import pytest
from conftest import Counting

from session_sync import (
    Codec,
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionEncodeError,
    SessionError,
    SessionManager,
    SessionTypeError,
    SQLiteStorage,
    StrictSession,
    field,
    ttl,
)

SECRET = "s3cr3t"  # in a value: it may stand in no message


class Theme(enum.Enum):
    LIGHT = "light"
    DARK = "dark"


class Shade(str, enum.Enum):  # noqa: UP042 (as PTB's are)
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass
class Item:
    name: str
    price: int = 0
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.0


@dataclass
class Tree:
    value: int
    children: list[Tree] = dataclasses.field(default_factory=list)


@dataclass
class AskName:
    prompt: str = "Name?"


@dataclass
class AskAge:
    prompt: str = "Age?"
    name: str = ""


class Pair(NamedTuple):
    left: int
    right: str = "r"


class Address(TypedDict):
    city: str
    zip: typing.NotRequired[str]


class Profile(msgspec.Struct):
    name: str
    tags: list[str] = []


class Frozen(msgspec.Struct, frozen=True):
    name: str


T = TypeVar("T")


@dataclass
class Page(Generic[T]):
    items: list[T]
    total: int


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


class Cart(Session):
    lines: list[Item] = field(default_factory=list)
    counter: int = 0
    theme: Literal["light", "dark"] = "light"
    seen: datetime | None = None
    name: str


@pytest.fixture
def carts(storage: Any) -> SessionManager[Cart]:
    return SessionManager(Cart, storage=storage)


def manager_of(annotation: Any, storage: Any = None, **options: Any) -> SessionManager[Any]:
    """Sessions with one declared field, `value`."""
    cls = type("Declaring", (Session,), {"__annotations__": {"value": annotation}})
    return SessionManager(cls, storage=storage, **options)


# -- fields and defaults


def test_declared_fields_are_there_with_their_defaults(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        assert (session.counter, session.theme, session.seen) == (0, "light", None)
        assert session["lines"] == []
        assert session.get("counter", 5) == 0
        assert session.setdefault("counter", 5) == 0
        assert "counter" in session
        assert list(session) == ["lines", "counter", "theme", "seen"]
        assert session == {"lines": [], "counter": 0, "theme": "light", "seen": None}
        assert len(session) == 4


def test_a_session_of_defaults_alone_is_not_stored(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        assert session.lines == []
        assert dict(session)
    assert not carts.storage.has("user:1")


def test_only_what_was_changed_is_stored(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.counter += 1
        assert session.lines == []
    assert carts.storage.get("user:1") == {"counter": 1}


def test_a_default_that_is_assigned_is_stored(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.counter = 0
    assert carts.storage.get("user:1") == {"counter": 0}


def test_a_change_inside_a_default_is_stored(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.lines.append(Item("tea", 4))
    assert carts.storage.get("user:1") == {"lines": [{"name": "tea", "price": 4, "tags": []}]}
    with carts.session_scope("user:1") as session:
        assert session.lines == [Item("tea", 4)]


def test_mutable_defaults_are_never_shared(storage: Any) -> None:
    shared: list[Any] = [[1]]
    made = Item("made")

    class Sharing(Session):
        plain: list[list[int]] = shared
        item: Item = made
        same: Item = field(default=made)
        again: Item = field(default_factory=lambda: made)

    sessions = SessionManager(Sharing, storage=storage)
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:2") as two:
        one.plain[0].append(2)
        for item in (one.item, one.same, one.again):
            item.tags.append("x")
            item.price += 1
        assert two.plain == [[1]]
        assert two.item == two.same == two.again == Item("made")
    assert shared == [[1]]
    assert made == Item("made")
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:3") as three:
        assert one.plain == [[1, 2]]
        assert one.item == one.same == one.again == Item("made", 1, ["x"])
        assert three.item == Item("made")


def test_what_a_factory_made_is_stored_with_whatever_changes_next() -> None:
    made = iter("abcdef")

    class Coupon(Session):
        code: str = field(default_factory=lambda: next(made))
        counter: int = 0

    sessions = SessionManager(Coupon)
    with sessions.session_scope("user:1") as session:
        assert session.code == session.code == "a"
    with sessions.session_scope("user:1") as session:
        assert session.code == "b"  # nothing was written, so nothing was kept
        session.counter += 1
    assert sessions.storage.get("user:1") == {"counter": 1, "code": "b"}
    with sessions.session_scope("user:1") as session:
        assert session.code == "b"
    sessions.storage.set("user:2", {"draft": 1, "other": 2})
    with sessions.session_scope("user:2") as session:
        assert session.code == "c"
        del session.draft
    assert sessions.storage.get("user:2") == {"other": 2, "code": "c"}
    with sessions.session_scope("user:2") as session:
        session.clear()
        assert session.code == "d"  # it is there only because the class declares it
    assert not sessions.storage.has("user:2")


def test_what_a_factory_made_can_be_deleted(storage: Any) -> None:
    class Coupon(Session):
        code: str = field(default_factory=lambda: "made")
        parts: list[int] = field(default_factory=lambda: [1])
        counter: int = 0

    sessions = SessionManager(Coupon, storage=storage)
    with sessions.session_scope("user:1") as session:
        assert (session.code, session.parts) == ("made", [1])
        del session.code
        del session.parts
        session.counter = 1
    assert storage.get("user:1") == {"counter": 1}
    with sessions.session_scope("user:1") as session:
        assert (session.code, session.parts) == ("made", [1])
        session.counter = 2
        session.flush()
        session.counter = 3
    assert storage.get("user:1") == {"counter": 3, "code": "made", "parts": [1]}


def test_a_factory_that_nobody_asks_is_not_called() -> None:
    class Asking(Session):
        code: str = field(default_factory=lambda: pytest.fail("called"))
        counter: int = 0

    with SessionManager(Asking).session_scope("user:1") as session:
        session.counter += 1
        assert "code" in session
        assert "code" in repr(session)


@pytest.mark.parametrize("error", [KeyError, AttributeError])
def test_a_factory_that_raises_is_not_taken_for_a_field_that_is_missing(
    error: type[Exception],
) -> None:
    def make() -> str:
        raise error("x")

    class Failing(Session):
        code: str = field(default_factory=make)

    with SessionManager(Failing).session_scope("user:1") as session:
        for read in (lambda: session.code, lambda: session["code"], lambda: session.get("code")):
            with pytest.raises(
                RuntimeError, match=f"default_factory of 'code' raised {error.__name__}"
            ):
                read()


def test_a_factory_that_makes_another_type_is_refused() -> None:
    class Wrong(Session):
        code: str = field(default_factory=lambda: 5)  # type: ignore[assignment]

    with (
        SessionManager(Wrong).session_scope("user:1") as session,
        pytest.raises(SessionTypeError, match=r"code has become int, where Wrong declares str"),
    ):
        session.code  # noqa: B018


def test_deleting_a_field_brings_its_default_back(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.update(counter=5, lines=[Item("tea")], theme="dark", other=1)
    with carts.session_scope("user:1") as session:
        del session.counter
        assert session.pop("lines") == [Item("tea")]
        assert (session.counter, session.lines) == (0, [])
        session.lines.append(Item("milk"))
        del session["counter"]  # a default again: nothing happens
    assert carts.storage.get("user:1") == {
        "theme": "dark",
        "other": 1,
        "lines": [{"name": "milk", "price": 0, "tags": []}],
    }


def test_clearing_leaves_the_defaults_and_deletes_the_session(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.update(counter=5, other=1)
    with carts.session_scope("user:1") as session:
        session.lines.append(Item("tea"))
        session.clear()
        assert session == {"lines": [], "counter": 0, "theme": "light", "seen": None}
    assert not carts.storage.has("user:1")


def test_popitem_takes_what_is_more_than_a_default() -> None:
    with SessionManager(Cart).session_scope("user:1") as session:
        session.counter = 5
        session.other = 1
        session.lines.append(Item("tea"))
        assert session.popitem() == ("other", 1)
        assert session.popitem() == ("counter", 5)
        assert session.popitem() == ("lines", [Item("tea")])
        with pytest.raises(KeyError, match="is empty"):
            session.popitem()


def test_a_field_without_a_default_is_missed_when_it_is_read(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        assert "name" not in session
        assert session.get("name") is None
        with pytest.raises(AttributeError, match=r"'user:1' has no field 'name'"):
            session.name  # noqa: B018
        with pytest.raises(KeyError):
            session["name"]
        with pytest.raises(AttributeError, match="has no field 'name'"):
            del session.name
        session.name = "Alex"
        assert session.name == "Alex"


def test_an_expired_field_is_its_default_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now[0])
    sessions = SessionManager(Cart)
    with sessions.session_scope("user:1") as session:
        session.theme = ttl("dark", 10)
        session.lines = ttl([Item("tea")], timedelta(seconds=10))
        with pytest.raises(SessionTypeError, match="theme has to be Literal"):
            session.theme = ttl(SECRET, 10)
        with pytest.raises(SessionTypeError, match=r"lines\[0\] has to be Item, not Ttl"):
            session.lines = [ttl(Item("tea"), 10)]
    now[0] += 11
    with sessions.session_scope("user:1") as session:
        assert (session.theme, session.lines) == ("light", [])


def test_initial_goes_before_defaults_and_is_checked() -> None:
    shared = [Item("tea")]
    sessions = SessionManager(Cart, initial=lambda update: {"lines": shared, "counter": 3})
    with sessions.session_scope("user:1") as session:
        assert (session.counter, session.theme) == (3, "light")
        session.lines[0].price = 9
    assert shared == [Item("tea")]
    wrong = SessionManager(Cart, initial=lambda update: {"counter": SECRET})
    with pytest.raises(SessionTypeError, match="counter has to be int, not str"):
        wrong.session_scope("user:1").__enter__()


def test_subclasses_inherit_fields_and_give_them_other_defaults() -> None:
    class Base(Session):
        counter: int = 1
        name: str = "base"
        tags: list[str]

    class Mixed(Session):
        extra: float = 0.5

    class Derived(Base, Mixed):
        counter = 7
        name: str
        own: bool = True

    with SessionManager(Derived).session_scope("user:1") as session:
        assert (session.counter, session.extra, session.own) == (7, 0.5, True)
        assert session["counter"] == 7
        session.counter = 8
        assert session.counter == 8
        assert session.name == "base"  # an annotation alone changes no default
        with pytest.raises(SessionTypeError, match="counter has to be int"):
            session.counter = SECRET
        with pytest.raises(SessionTypeError, match="tags has to be"):
            session.tags = 5
    with SessionManager(Base).session_scope("user:1") as session:
        assert (session.counter, session.name) == (1, "base")


def test_class_variables_constants_and_private_names_are_no_fields() -> None:
    class Shop(Session):
        rate: ClassVar[int] = 4
        quoted: ClassVar[int] = 5
        limit: Final = 6
        _cache: int = 7
        label = "shop"  # no annotation: an attribute of the class

    with SessionManager(Shop).session_scope("user:1") as session:
        assert list(session) == []
        assert (session.rate, session.quoted, session.limit, session.label) == (4, 5, 6, "shop")
        assert session._cache == 7
        with pytest.raises(AttributeError, match="'rate' is a name of Shop itself"):
            session.rate = 5
        session["rate"] = "a field all the same"
    assert Shop.rate == 4


@pytest.mark.parametrize("name", ["items", "flush", "key", "migrations", "get"])
def test_a_field_that_bears_the_name_of_a_method_is_refused_with_the_class(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Bad\.{name}: a field cannot be called '{name}'"):
        type("Bad", (Session,), {"__annotations__": {name: int}})


def test_a_field_that_bears_the_name_of_an_own_method_is_refused() -> None:
    class Base(Session):
        def total(self) -> int:
            return 5

    with pytest.raises(TypeError, match=r"Bad\.total"):
        type("Bad", (Base,), {"__annotations__": {"total": int}})


@pytest.mark.parametrize(
    ("annotation", "default", "message"),
    [
        (int, None, "its default does not have the declared type: value has to be int, not Non"),
        (int, "5", "value has to be int, not str"),
        (list[int], [1, "x"], r"value\[1\] has to be int, not str"),
        (int, dataclasses.field(default=1, repr=False), r"field\(repr=...\) means nothing"),
        (5, 5, "is no type whose values can be told from others"),
        (enum.Enum("Odd", {"A": object()}), None, "Odd has a value that no store keeps"),
        (set[list[int]], None, "is stored as something that has no hash"),
        (set[tuple[Item, int]], None, "is stored as something that has no hash"),
        (set[str | Shade], None, "is stored as something that has no hash"),
        (dict[Item, int], None, "is stored as something that has no hash"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_with_the_class(
    annotation: Any, default: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=rf"(?s)Bad\.value: .*{message}"):
        type("Bad", (Session,), {"__annotations__": {"value": annotation}, "value": default})


def test_a_class_that_a_decorator_has_changed_is_refused() -> None:
    @dataclass
    class Decorated(Session):
        counter: int = 0

    with pytest.raises(TypeError, match=r"Decorated has the fields.* leave @dataclass away"):
        SessionManager(Decorated)


def test_defaults_and_types_follow_the_order_of_the_bases() -> None:
    class Base(Session):
        language: str = "en"

    class German(Base):
        language: str = "de"

    class Shop(Base):
        total: int = 0

    class GermanShop(Shop, German):
        pass

    with SessionManager(GermanShop).session_scope("user:1") as session:
        assert (session.language, session.total) == ("de", 0)


def test_a_class_of_sessions_may_be_generic() -> None:
    class Rows(Session, Generic[T]):
        row: T | None = None

    class ItemRows(Rows[Item]):
        pass

    with SessionManager(ItemRows).session_scope("user:1") as session:
        session.row = Item("tea")
        with pytest.raises(SessionTypeError, match=r"row has to be Item | None, not int"):
            session.row = 5  # type: ignore[assignment]


def test_what_hides_a_field_is_refused_with_the_class() -> None:
    class Base(Session):
        name: Any = None

    class Named:
        def name(self) -> str:
            return "x"

    with pytest.raises(TypeError, match=r"Bad.name: one of its bases has a field 'name'"):
        type("Bad", (Named, Base), {})
    for hiding in (property(lambda self: 5), lambda self: 5, staticmethod(len)):
        with pytest.raises(TypeError, match=r"Bad.name: a field and something else"):
            type("Bad", (Base,), {"name": hiding})


def test_annotations_in_quotes_may_name_what_is_only_there_for_type_checkers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("quoted")
    monkeypatch.setitem(sys.modules, "quoted", module)  # where dataclasses look for names
    code = """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import TYPE_CHECKING, ClassVar, Final
        import typing as t
        from session_sync import Session
        if TYPE_CHECKING:
            from nowhere import Bot
        class Cart(Session):
            bot: ClassVar[Bot] = 5
            other: t.ClassVar[Bot]
            limit: Final[Bot] = 6
            date: str = "a default of the name of a type"
            when: date = "x"
            line: Line | None = None
            @dataclass
            class Line:
                name: str
        date = str
    """
    exec(textwrap.dedent(code), module.__dict__)
    assert list(module.Cart._declared) == ["date", "when", "line"]
    assert (module.Cart.bot, module.Cart.limit) == (5, 6)
    with SessionManager(module.Cart).session_scope("user:1") as session:
        session.line = module.Cart.Line("tea")
        assert session.when == "x"


@pytest.mark.parametrize("name", ["Item", "shop.Item"])
def test_types_may_be_defined_after_the_class(name: str) -> None:
    module = ModuleType("later")
    code = f"""
        from __future__ import annotations
        from types import SimpleNamespace
        from session_sync import Session, SessionManager
        shop = SimpleNamespace()  # a module, say, that is just being imported
        class Cart(Session):
            item: {name} | None = None
            counter: int = 0
        early = None
        try:
            SessionManager(Cart)
        except TypeError as error:
            early = error
    """
    exec(textwrap.dedent(code), module.__dict__)
    module.Item = module.shop.Item = Item
    assert "'Item'" in str(module.early)
    assert "before the SessionManager is made" in str(module.early)
    with SessionManager(module.Cart).session_scope("user:1") as session:
        session.item = Item("tea")
        with pytest.raises(SessionTypeError):
            session.item = 5


def test_types_may_be_local_to_a_function() -> None:
    @dataclass
    class Local:
        number: int

    class Holding(Session):
        local: Local | None = None

    sessions = SessionManager(Holding)
    with sessions.session_scope("user:1") as session:
        session.local = Local(5)
    with sessions.session_scope("user:1") as session:
        assert session.local == Local(5)


def test_the_class_has_its_fields_too() -> None:
    assert isinstance(Cart.__dict__["counter"], property)
    assert not hasattr(Session, "counter")


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


# -- a change inside a declared object


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


# -- undeclared names


def test_undeclared_names_stay_free_form(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.anything = {"a": [1]}
        session["anything"]["a"].append(2)
        session.counter = 1
    with carts.session_scope("user:1") as session:
        assert session.anything == {"a": [1, 2]}
        assert list(session) == ["lines", "counter", "theme", "seen", "anything"]
        session.anything = 5


def test_a_declared_class_in_an_undeclared_field_is_what_it_was() -> None:
    strict = SessionManager(Cart, storage=MemoryStorage(strict=True))
    with (
        strict.session_scope("user:1") as session,
        pytest.raises(SessionEncodeError, match="other is of type Item"),
    ):
        session.other = Item("tea")


def test_fields_that_the_class_no_longer_declares_stay_in_the_store(storage: Any) -> None:
    storage.set("user:1", {"old": {"x": (1, 2)}, "counter": 1})

    class Strict(StrictSession):
        counter: int = 0

    for cls in (Cart, Strict):
        with SessionManager(cls, storage=storage).session_scope("user:1") as session:
            session.counter += 1
    assert storage.get("user:1") == {"old": {"x": (1, 2)}, "counter": 3}


# -- StrictSession


class Profiled(StrictSession):
    counter: int = 0
    name: str


def test_a_strict_session_has_its_declared_fields_alone(storage: Any) -> None:
    storage.set("user:1", {"old": 1, "counter": 2})
    sessions = SessionManager(Profiled, storage=storage)
    with sessions.session_scope("user:1") as session:
        assert list(session) == ["counter"]
        assert len(session) == 1
        assert "old" not in session
        assert session == {"counter": 2}
        for wrong in (
            lambda: session.countre,  # type: ignore[attr-defined]
            lambda: setattr(session, "countre", 1),
            lambda: delattr(session, "countre"),
        ):
            with pytest.raises(AttributeError, match="countre"):
                wrong()
        for wrong in (
            lambda: session["old"],
            lambda: session.__setitem__("countre", 1),
            lambda: session.update(counter=5, countre=1),
            lambda: session.__delitem__("old"),
        ):
            with pytest.raises(KeyError, match=r"countre|old"):
                wrong()
        assert session.counter == 2
        session.counter = 3
        session.name = "Alex"
        del session.name
    assert storage.get("user:1") == {"old": 1, "counter": 3}
    with sessions.session_scope("user:1") as session:
        session.clear()  # also what cannot be seen: who clears wants it gone
    assert not storage.has("user:1")


def test_errors_of_a_strict_session_say_what_there_is() -> None:
    with SessionManager(Profiled).session_scope("user:1") as session:
        with pytest.raises(AttributeError, match="Profiled declares counter, name"):
            session.countre = 1  # type: ignore[attr-defined]
        with pytest.raises(KeyError, match="Profiled declares counter, name"):
            session["countre"] = 1
        with pytest.raises(AttributeError, match="is a name of Profiled itself"):
            session.flush = 5  # type: ignore[assignment, method-assign]
    assert not hasattr(session, "__dict__") or not session.__dict__


# -- classes of other libraries


def test_attrs_classes(storage: Any) -> None:
    attrs = pytest.importorskip("attrs", reason="needs attrs")

    @attrs.define
    class Rated:
        name: str
        _stars: list[int] = attrs.Factory(list)
        best: int = attrs.field(init=False, default=0)

    sessions = manager_of(list[Rated], storage)
    with sessions.session_scope("user:1") as session:
        session.value = [Rated("tea", [1])]
    with sessions.session_scope("user:1") as session:
        session.value[0]._stars.append(5)
        session.value[0].best = 5
        with pytest.raises(SessionTypeError, match=r"value\[0\].name has to be str, not int"):
            session.value = [Rated(5)]
    with sessions.session_scope("user:1") as session:
        assert session.value[0]._stars == [1, 5]
        assert session.value[0].best == 5
        stars = session.value[0]._stars
    with pytest.raises(SessionClosedError):
        stars.append(1)


def test_what_a_validator_of_attrs_would_refuse_is_not_saved() -> None:
    attrs = pytest.importorskip("attrs", reason="needs attrs")

    @attrs.define(on_setattr=[])
    class Rated:
        stars: int = attrs.field(validator=attrs.validators.le(5))

    sessions = manager_of(Rated)
    with sessions.session_scope("user:1") as session:
        session.value = Rated(5)
    with (
        pytest.raises(SessionTypeError, match=r"cannot be made from \(ValueError\)"),
        sessions.session_scope("user:1") as session,
    ):
        session.value.stars = 6
    assert sessions.storage.get("user:1") == {"value": {"stars": 5}}


@pytest.fixture(scope="module")
def models() -> ModuleType:
    pytest.importorskip("pydantic", reason="needs pydantic")
    module = ModuleType("models")
    code = """
        import collections, dataclasses, enum, pathlib
        import pydantic.dataclasses
        from datetime import datetime
        from decimal import Decimal
        from typing import Any
        from pydantic import BaseModel, ConfigDict, Field, RootModel, SecretStr
        from pydantic import AnyUrl, field_serializer, field_validator
        class Size(enum.Enum):
            SMALL = "s"
        class Inner(BaseModel):
            n: int = 1
        class User(BaseModel):
            model_config = ConfigDict(serialize_by_alias=True)
            name: str = Field(alias="userName", default="?")
            tags: list[str] = []
            when: datetime | None = None
            total: Decimal = Decimal("1.50")
            raw: bytes = b"\\xff"
            counts: dict[int, set[int]] = {}
            inner: Inner = Inner()
            size: Size = Size.SMALL
            folder: pathlib.Path = pathlib.Path("x")
            anything: Any = None
        class Strict(BaseModel):
            model_config = ConfigDict(strict=True, frozen=True)
            when: datetime
        class Names(RootModel[list[str]]):
            pass
        class Hidden(BaseModel):
            secret: SecretStr
        class Animal(BaseModel):
            name: str
        class Dog(Animal):
            bark: str
        class Zoo(BaseModel):
            pets: list[Animal]
        class Left(BaseModel):
            out: str = Field(exclude=True, default="")
        class Shouting(BaseModel):
            price: int
            @field_serializer("price")
            def rounded(self, price: int) -> int:
                return price + 1
        class Open(BaseModel):
            model_config = ConfigDict(extra="allow")
        class Defaulted(BaseModel):
            volume: float = 0
            size: Size = "s"
            tags: list[str] = Field(default=())
            url: AnyUrl = "https://example.org/"
        class Picky(BaseModel):
            code: str = ""
            @field_validator("code")
            @classmethod
            def known(cls, code: str) -> str:
                return {"": ""}[code]
        class Sulking(BaseModel):
            code: str = ""
            @field_serializer("code")
            def shown(self, code: str) -> str:
                raise LookupError(code)
        @dataclasses.dataclass
        class Line:
            words: list[str]
            price: Decimal = Decimal("1.0")
        class Order(BaseModel):
            lines: list[Line] = []
        @pydantic.dataclasses.dataclass
        class Rating:
            stars: pydantic.PositiveInt
        class Queue(BaseModel):
            jobs: collections.deque[Any] = collections.deque()
    """
    sys.modules["models"] = module  # where pydantic looks for names
    exec(textwrap.dedent(code), module.__dict__)
    return module


def test_pydantic_models(models: Any, storage: Any) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, 6)
    user = models.User(
        userName="alex", tags=["a"], when=when, counts={7: {1}}, anything={"deep": [1, (2,)]}
    )
    values = [
        (models.User, user),
        (models.User | None, user),
        (list[models.User | models.Inner], [user, models.Inner(n=5)]),
        (models.Strict, models.Strict(when=when)),
        (dict[str, models.Names], {"a": models.Names(["x"])}),
    ]
    for number, (annotation, value) in enumerate(values):
        sessions = manager_of(annotation, storage)
        with sessions.session_scope(f"user:{number}") as session:
            session.value = value
        with sessions.session_scope(f"user:{number}") as session:
            assert session.value == value
    assert storage.get("user:0")["value"]["name"] == "alex"
    assert storage.get("user:0")["value"]["when"] == when


def test_changes_inside_pydantic_models_are_saved(models: Any) -> None:
    storage = Counting()
    sessions = manager_of(models.User, storage)
    with sessions.session_scope("user:1") as session:
        session.value = models.User(anything={"deep": [1]})
    for _ in range(2):
        with sessions.session_scope("user:1") as session:
            assert session.value.inner.n == 1
    assert storage.writes == 1
    with sessions.session_scope("user:1") as session:
        session.value.inner.n = 5
        session.value.tags.append("x")
        session.value.anything["deep"].append(2)
        tags = session.value.tags
    with pytest.raises(SessionClosedError):
        tags.append("y")
    with sessions.session_scope("user:1") as session:
        assert session.value == models.User(
            tags=["x"], inner=models.Inner(n=5), anything={"deep": [1, 2]}
        )
        with pytest.raises(SessionTypeError, match="value has to be User, not Inner"):
            session.value = models.Inner()
        session.value.tags = SECRET
        with pytest.raises(SessionTypeError, match=r"what pydantic does not take") as caught:
            session.flush()
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None
        session.value.tags = []


def test_what_pydantic_fills_in_is_no_change_of_the_handlers(models: Any) -> None:
    storage = Counting()
    stored = {"value": {"tags": ["x"], "total": "2.5", "gone": 1}}
    storage.set("user:1", stored)
    storage.writes = 0
    with manager_of(models.User, storage).session_scope("user:1") as session:
        assert session.value == models.User(tags=["x"], total="2.5")
    assert storage.writes == 0
    assert storage.get("user:1") == stored


def test_a_pydantic_value_that_would_not_come_back_is_refused(models: Any) -> None:
    with (
        manager_of(models.Hidden).session_scope("user:1") as session,
        pytest.raises(SessionTypeError, match="something that a store keeps, not SecretStr"),
    ):
        session.value = models.Hidden(secret=SECRET)
    for value in (
        models.Sulking(code=SECRET),
        models.Zoo(pets=[models.Dog(name="rex", bark="loud")]),  # would come back as an Animal
        models.Left(out="x"),
        models.Shouting(price=5),
    ):
        with (
            manager_of(type(value)).session_scope("user:1") as session,
            pytest.raises(
                SessionTypeError, match=r"come back as something else|does not take|made|take apart"
            ),
        ):
            session.value = value


def test_dataclasses_in_a_model_are_the_sessions_too(models: Any) -> None:
    sessions = manager_of(models.Order, Counting())
    with sessions.session_scope("user:1") as session:
        session.value = models.Order(lines=[models.Line(["tea"])])
    with sessions.session_scope("user:1") as session:
        session.value.lines[0].words.append("milk")
        words = session.value.lines[0].words
    with pytest.raises(SessionClosedError):
        words.append("lost")
    with sessions.session_scope("user:1") as session:
        assert session.value.lines == [models.Line(["tea", "milk"])]
        session.value.lines[0].price = Decimal("1.00")
    assert str(sessions.storage.get("user:1")["value"]["lines"][0]["price"]) == "1.00"
    with sessions.session_scope("user:1") as session:
        session.value.lines[0].price = Decimal("1.00")  # another object of the same value
    assert sessions.storage.writes == 3  # type: ignore[attr-defined]


def test_what_a_dataclass_of_pydantics_would_refuse_is_not_saved(models: Any) -> None:
    sessions = manager_of(models.Rating)
    with sessions.session_scope("user:1") as session:
        session.value = models.Rating(5)
    with (
        pytest.raises(SessionTypeError, match=r"cannot be made from \(ValidationError\)"),
        sessions.session_scope("user:1") as session,
    ):
        session.value.stars = -1
    assert sessions.storage.get("user:1") == {"value": {"stars": 5}}


def test_what_pydantic_converts_only_when_it_is_loaded_is_taken(models: Any) -> None:
    class Defaulting(Session):
        value: models.Defaulted = models.Defaulted()  # type: ignore[name-defined]

    sessions = SessionManager(Defaulting)
    with sessions.session_scope("user:1") as session:
        assert session.value.volume == 0
        session.value.volume = 1
    with sessions.session_scope("user:1") as session:
        assert (session.value.volume, session.value.size) == (1.0, models.Size.SMALL)
        assert type(session.value.volume) is float


def test_what_a_validator_raises_is_not_taken_for_a_field_that_is_missing(models: Any) -> None:
    sessions = manager_of(models.Picky)
    sessions.storage.set("user:1", {"value": {"code": SECRET}})
    with sessions.session_scope("user:1") as session:
        for read in (lambda: session.value, lambda: session.get("value")):
            with pytest.raises(SessionTypeError, match=r"made from \(KeyError\)") as caught:
                read()
            assert SECRET not in str(caught.value)
            assert caught.value.__cause__ is None


def test_models_share_nothing_with_the_store_or_a_default(models: Any) -> None:
    class Loose(Session):
        value: models.Open = models.Open(notes=[])  # type: ignore[name-defined]

    sessions = SessionManager(Loose)
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:2") as two:
        one.value.notes.append(1)
        assert two.value.notes == []
    with pytest.raises(ZeroDivisionError), sessions.session_scope("user:1") as one:
        one.value.notes.append(2)
        notes = one.value.notes
        raise ZeroDivisionError
    with pytest.raises(SessionClosedError):
        notes.append(3)
    assert sessions.storage.get("user:1") == {"value": {"notes": [1]}}
    queues = manager_of(models.Queue)
    with queues.session_scope("user:3") as session:
        session.value = models.Queue(jobs=[[1]])
    with pytest.raises(ZeroDivisionError), queues.session_scope("user:3") as session:
        session.value.jobs[0].append(2)
        raise ZeroDivisionError
    assert queues.storage.get("user:3") == {"value": {"jobs": [[1]]}}


def test_a_model_of_another_session_goes_in_as_a_copy(models: Any) -> None:
    sessions = manager_of(models.User)
    with sessions.session_scope("user:1") as one:
        one.value = models.User(tags=["a"])
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:2") as two:
        two.value = one.value
        two.value.tags.append("two")
    assert sessions.storage.get("user:1")["value"]["tags"] == ["a"]
    assert sessions.storage.get("user:2")["value"]["tags"] == ["a", "two"]


def test_a_stored_model_that_pydantic_refuses_names_the_place(models: Any) -> None:
    sessions = manager_of(models.User)
    sessions.storage.set("user:1", {"value": {"inner": {"n": SECRET}}})
    with (
        sessions.session_scope("user:1") as session,
        pytest.raises(
            SessionTypeError, match=r"value.inner.n is stored as what pydantic"
        ) as caught,
    ):
        session.value  # noqa: B018
    assert SECRET not in str(caught.value)


class Money:
    """A class that says nothing of its parts."""

    def __init__(self, cents: int) -> None:
        self.cents = cents


def test_an_own_class_is_checked_and_kept_as_its_storage_keeps_it(tmp_path: Path) -> None:
    def encode(value: Any) -> Any:
        return ("money", value.cents) if isinstance(value, Money) else NotImplemented

    codec = Codec(encode, lambda name, value: Money(value))
    for storage in (MemoryStorage(), SQLiteStorage(tmp_path / "sessions.db", codec=codec)):
        sessions = manager_of(dict[str, Money], storage)
        with sessions.session_scope("user:1") as session:
            session.value = {"a": Money(5)}
            with pytest.raises(SessionTypeError, match=r"value.a has to be Money, not int"):
                session.value = {"a": 5}
        with sessions.session_scope("user:1") as session:
            session.value["a"].cents += 1
        with sessions.session_scope("user:1") as session:
            assert session.value["a"].cents == 6
        storage.close()


@dataclass
class Wallet:
    money: Money
    name: str = ""


def test_a_change_in_an_own_class_inside_a_declared_one_is_saved(tmp_path: Path) -> None:
    def encode(value: Any) -> Any:
        return ("money", value.cents) if isinstance(value, Money) else NotImplemented

    codec = Codec(encode, lambda name, value: Money(value))
    for storage in (MemoryStorage(), SQLiteStorage(tmp_path / "sessions.db", codec=codec)):
        sessions = manager_of(Wallet, storage)
        with sessions.session_scope("user:1") as session:
            session.value = Wallet(Money(5))
        with sessions.session_scope("user:1") as session:
            session.value = wallet = session.value
            session.flush()
            wallet.money.cents = 99
        with sessions.session_scope("user:1") as session:
            assert session.value.money.cents == 99
        storage.close()


def test_a_default_of_an_own_class_is_never_shared() -> None:
    shared = Money(5)

    class Paying(Session):
        money: Money = shared
        nested: list[Any] = [shared]

    sessions = SessionManager(Paying)
    with sessions.session_scope("user:1") as one, sessions.session_scope("user:2") as two:
        one.money.cents += 1
        one.nested[0].cents += 1
        assert (two.money.cents, two.nested[0].cents, shared.cents) == (5, 5, 5)
    with sessions.session_scope("user:1") as one:
        assert (one.money.cents, one.nested[0].cents) == (6, 6)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type` came with Python 3.12")
def test_type_aliases_also_those_that_lead_back_to_themselves(storage: Any) -> None:
    names: dict[str, Any]
    exec(
        "type Json = dict[str, Json] | list[Json] | str | int | None\n"
        "type Both[T] = tuple[T, list[T]]\n"
        "type Nested[T] = T | list[Nested[T]]\n"
        "type A = AskName | B\n"
        "type B = AskAge | list[A]\n"
        "type Anything = Any\n",
        names := {"AskName": AskName, "AskAge": AskAge, "Any": Any},
    )
    with manager_of(int | names["Anything"], storage).session_scope("user:2") as session:
        session.value = [{"free": "form"}]
    for annotation, right, wrong in (
        (names["Json"], {"a": [1, {"b": None}]}, {"a": [1.5]}),
        (names["Both"][int], (1, [2]), (1, ["x"])),
        (names["Nested"][int], [1, [2, [3]]], [1, ["x"]]),
        (names["A"], [AskAge("x", "y"), AskName("z"), [AskAge()]], [5]),
        (names["B"], [AskAge("x", "y"), AskName("z"), [AskAge()]], [5]),
    ):
        sessions = manager_of(annotation, storage)
        with sessions.session_scope("user:1") as session:
            session.value = right
            with pytest.raises(SessionTypeError):
                session.value = wrong
        with sessions.session_scope("user:1") as session:
            assert session.value == right


# -- as any other session


def test_a_typed_session_copies_and_pickles_as_a_plain_dict(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.lines.append(Item("tea"))
        plain = {"lines": [Item("tea")], "counter": 0, "theme": "light", "seen": None}
        assert copy.deepcopy(session) == plain
        assert pickle.loads(pickle.dumps(session)) == plain
        assert type(pickle.loads(pickle.dumps(session))) is dict


def test_a_closed_typed_session_can_be_read_and_not_changed(carts: SessionManager[Cart]) -> None:
    with carts.session_scope("user:1") as session:
        session.counter = 1
    assert session.counter == 1
    assert session.lines == []
    for change in (
        lambda: setattr(session, "counter", 2),
        lambda: session.lines.append(Item("tea")),
        lambda: session.clear(),
        lambda: session.update(counter=5),
    ):
        with pytest.raises(SessionClosedError):
            change()


def test_a_lazy_typed_session_is_loaded_by_its_attribute() -> None:
    sessions = SessionManager(Cart, lazy=True)
    with sessions.session_scope("user:1") as session:
        session.counter += 1
    with sessions.session_scope("user:1") as session:
        assert session.counter == 1
