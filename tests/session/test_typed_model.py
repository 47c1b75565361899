"""Whatever a class declares, on whatever store: what is put in comes back as it was.

Classes are built from random types, with random values of them.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import os
import types
import typing
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import pytest
from stores import OwnStorage

from session_sync import (
    DiskStorage,
    LruMemoryStorage,
    MemoryStorage,
    RedisStorage,
    Session,
    SessionManager,
    SQLiteStorage,
)

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies

_numbers = itertools.count()
EXAMPLES = int(os.environ.get("SESSION_SYNC_TYPES", "25"))


class Kind(NamedTuple):
    """A type and its values; `hashable` if they may be elements of a set, `free` if it has `Any` in
    it."""

    annotation: Any
    values: Any
    hashable: bool = True
    free: bool = False


ATOMS = [
    Kind(None, st.none()),
    Kind(bool, st.booleans()),
    Kind(int, st.integers()),
    Kind(float, st.floats(allow_nan=False)),
    Kind(str, st.text(max_size=5)),
    Kind(bytes, st.binary(max_size=5)),
    Kind(datetime, st.datetimes()),
    Kind(date, st.dates()),
    Kind(time, st.times()),
    Kind(timedelta, st.timedeltas()),
    Kind(Decimal, st.decimals(allow_nan=False)),
    Kind(UUID, st.uuids()),
    Kind(Literal["a", "b", 3], st.sampled_from(["a", "b", 3])),
]
FREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        | st.tuples(inner)
    ),
    max_leaves=4,
)


def enums(draw: Any) -> Kind:
    values = draw(
        st.lists(st.text(max_size=3) | st.integers(), min_size=1, max_size=3, unique=True)
    )
    cls: Any = enum.Enum(f"Enum{next(_numbers)}", {f"M{n}": v for n, v in enumerate(values)})
    return Kind(cls, st.sampled_from(list(cls)))


def parts(draw: Any, inner: Any) -> dict[str, Kind]:
    found = draw(st.lists(inner, min_size=1, max_size=3))
    return {f"part{number}": kind for number, kind in enumerate(found)}


def built(cls: Any, inside: dict[str, Kind], hashable: bool = False) -> Kind:
    values = st.builds(cls, **{name: kind.values for name, kind in inside.items()})
    return Kind(cls, values, hashable, any(kind.free for kind in inside.values()))


def dataclass_of(draw: Any, inner: Any) -> Kind:
    inside = parts(draw, inner)
    cls = dataclasses.make_dataclass(
        f"Data{next(_numbers)}",
        [(name, kind.annotation) for name, kind in inside.items()],
        frozen=draw(st.booleans()),
        slots=draw(st.booleans()),
    )
    return built(cls, inside)


def struct_of(draw: Any, inner: Any) -> Kind:
    inside = parts(draw, inner)
    names = [(name, Any) for name in inside]
    cls: Any = msgspec.defstruct(f"Struct{next(_numbers)}", names, frozen=draw(st.booleans()))
    # msgspec itself would refuse some of these types.
    cls.__annotations__.update({name: kind.annotation for name, kind in inside.items()})
    return built(cls, inside)


def named_tuple_of(draw: Any, inner: Any) -> Kind:
    inside = parts(draw, inner)
    cls: Any = NamedTuple(
        f"Named{next(_numbers)}",
        [(name, kind.annotation) for name, kind in inside.items()],  # type: ignore[misc]
    )
    return built(cls, inside, all(kind.hashable for kind in inside.values()))


def typed_dict_of(draw: Any, inner: Any) -> Kind:
    inside = parts(draw, inner)
    hints = {name: kind.annotation for name, kind in inside.items()}
    cls: Any = typing.TypedDict(f"Typed{next(_numbers)}", hints)  # type: ignore[misc]
    values = st.fixed_dictionaries({name: kind.values for name, kind in inside.items()})
    return Kind(cls, values, False, any(kind.free for kind in inside.values()))


def container_of(draw: Any, inner: Any) -> Kind:
    kind, hashable = draw(inner), draw(inner.filter(lambda kind: kind.hashable))
    few = {"max_size": 3}
    found: Kind = draw(
        st.sampled_from(
            [
                Kind(list[kind.annotation], st.lists(kind.values, **few), False),
                Kind(
                    tuple[kind.annotation, ...],
                    st.lists(kind.values, **few).map(tuple),
                    kind.hashable,
                ),
                Kind(
                    tuple[kind.annotation, hashable.annotation],
                    st.tuples(kind.values, hashable.values),
                    kind.hashable,
                ),
                Kind(
                    dict[hashable.annotation, kind.annotation],
                    st.dictionaries(hashable.values, kind.values, **few),
                    False,
                ),
                Kind(set[hashable.annotation], st.sets(hashable.values, **few), False),
                Kind(frozenset[hashable.annotation], st.frozensets(hashable.values, **few)),
            ]
        )
    )
    return found._replace(free=kind.free or hashable.free)


def union_of(draw: Any, inner: Any) -> Kind:
    declared = inner.filter(lambda kind: not kind.free)  # `Any` would take what others should
    kinds = draw(st.lists(declared, min_size=2, max_size=3))
    annotation = typing.Union[tuple(kind.annotation for kind in kinds)]  # noqa: UP007 (built)
    return Kind(annotation, st.one_of(*(kind.values for kind in kinds)), False)


@st.composite
def larger(draw: Any, inner: Any) -> Kind:
    makers: list[Callable[[Any, Any], Kind]] = [
        container_of,
        dataclass_of,
        struct_of,
        named_tuple_of,
        typed_dict_of,
        union_of,
    ]
    return draw(st.sampled_from(makers))(draw, inner)


@st.composite
def small(draw: Any) -> Kind:
    if draw(st.integers(0, 9)) == 0:
        return Kind(Any, FREE, False, True)
    return enums(draw) if draw(st.integers(0, 4)) == 0 else draw(st.sampled_from(ATOMS))


KINDS = st.recursive(small(), larger, max_leaves=6)


@pytest.fixture(
    params=["memory", "strict", "lru", "adapter", "sqlite", "disk", "redis"], scope="module"
)
def store(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("stores")
    make: dict[str, Callable[[], Any]] = {
        "memory": MemoryStorage,
        "strict": lambda: MemoryStorage(strict=True),
        "lru": LruMemoryStorage,
        "adapter": OwnStorage,
        "sqlite": lambda: SQLiteStorage(folder / "sessions.db", synchronous="off"),
        "disk": lambda: DiskStorage(folder / "disk"),
        "redis": lambda: RedisStorage(request.getfixturevalue("redis_url"), prefix="typed:"),
    }
    some = make[request.param]()
    yield some
    if hasattr(some, "close"):
        some.close()


@hypothesis.settings(max_examples=EXAMPLES, deadline=None)
@hypothesis.given(data=st.data())
def test_what_is_stored_comes_back_as_it_was(store: Any, data: Any) -> None:
    kinds = data.draw(st.dictionaries(st.sampled_from("abc"), KINDS, min_size=1))
    names = {"__annotations__": {name: kind.annotation for name, kind in kinds.items()}}
    try:
        cls = types.new_class("Random", (Session,), {}, lambda space: space.update(names))
    except TypeError as error:  # a set of something that has no hash once it is stored
        hypothesis.assume("has no hash" not in str(error))
        raise
    sessions = SessionManager(cls, storage=store)
    key = f"user:{next(_numbers)}"
    for _ in range(2):
        values = {name: data.draw(kind.values) for name, kind in kinds.items()}
        with sessions.session_scope(key) as session:
            session.update(values)
            session.update(values)  # over itself
        written = store.get(key)
        for _ in range(2):
            with sessions.session_scope(key) as session:
                for name, value in values.items():
                    assert_alike(session[name], value)
                tracker = session._lifecycle().tracker
                assert tracker.take_changes() is tracker.committed  # a read writes nothing
        assert store.get(key) == written


def assert_alike(one: Any, other: Any) -> None:
    """The same value of the same type, at every place."""
    plain = next((cls for cls in (dict, list, set) if isinstance(other, cls)), None)
    assert isinstance(one, plain) if plain is not None else type(one) is type(other)
    if isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_alike(one[key], other[key])
    elif isinstance(other, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right)
    elif dataclasses.is_dataclass(other):
        for field in dataclasses.fields(other):
            assert_alike(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(other, msgspec.Struct):
        for name in other.__struct_fields__:
            assert_alike(getattr(one, name), getattr(other, name))
    else:
        assert one == other
