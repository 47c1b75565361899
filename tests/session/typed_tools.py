"""What the tests of declared fields share: types of each kind, and a class that declares them."""

from __future__ import annotations

import dataclasses
import enum
import typing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import msgspec

from session_sync import Session, SessionManager, field


class Shade(str, enum.Enum):  # noqa: UP042 (as PTB's are)
    RED = "red"
    BLUE = "blue"


@dataclass
class Item:
    name: str
    price: int = 0
    tags: list[str] = dataclasses.field(default_factory=list)


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


T = TypeVar("T")


@dataclass
class Page(Generic[T]):
    items: list[T]
    total: int


class Cart(Session):
    lines: list[Item] = field(default_factory=list)
    counter: int = 0
    theme: Literal["light", "dark"] = "light"
    seen: datetime | None = None
    name: str


def make_carts(storage: Any) -> SessionManager[Cart]:
    return SessionManager(Cart, storage=storage)


def manager_of(annotation: Any, storage: Any = None, **options: Any) -> SessionManager[Any]:
    """Sessions with one declared field, `value`."""
    cls = type("Declaring", (Session,), {"__annotations__": {"value": annotation}})
    return SessionManager(cls, storage=storage, **options)
