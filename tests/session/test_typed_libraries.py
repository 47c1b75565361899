"""Declared fields whose types are classes of other libraries: attrs, pydantic, msgspec."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Counting
from typed_tools import AskAge, AskName, manager_of

from session_sync import (
    Codec,
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionManager,
    SessionTypeError,
    SQLiteStorage,
)

SECRET = "s3cr3t"  # in a value: it may stand in no message


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
