"""Declared fields: what a class of sessions says, and what a handler then has."""

from __future__ import annotations

import copy
import dataclasses
import enum
import pickle
import sys
import textwrap
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, ClassVar, Final, Generic

import pytest
import typed_tools
from typed_tools import Cart, Item, Shade, T

from session_sync import (
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionEncodeError,
    SessionManager,
    SessionTypeError,
    StrictSession,
    field,
    ttl,
)

carts = pytest.fixture(typed_tools.make_carts)

SECRET = "s3cr3t"  # in a value: it may stand in no message


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
        with pytest.raises(AttributeError, match="'rate' is reserved in Shop; use session"):
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
        with pytest.raises(AttributeError, match="'flush' is reserved in Profiled"):
            session.flush = 5  # type: ignore[assignment, method-assign]
    assert not hasattr(session, "__dict__") or not session.__dict__


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
