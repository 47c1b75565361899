"""What a store cannot keep is refused in the line that assigns it, however deep it lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, time, timedelta, tzinfo
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from session_sync import (
    Codec,
    DiskStorage,
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionEncodeError,
    SessionManager,
    SQLiteStorage,
    ttl,
)

KEY = "user:1"


class Kind(Enum):
    BUS = "Bus"


class OwnZone(tzinfo):
    def utcoffset(self, _moment: datetime | None) -> timedelta:
        return timedelta(hours=1)


@pytest.fixture(params=["strict", "sqlite", "disk", "redis"])
def sessions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SessionManager[Session]]:
    storage: Any
    if request.param == "strict":
        storage = MemoryStorage(strict=True)
    elif request.param == "sqlite":
        storage = SQLiteStorage(tmp_path / "s.db")
    elif request.param == "disk":
        storage = DiskStorage(tmp_path / "s")
    else:
        pytest.importorskip("redis", reason="needs the extra 'redis'")
        from session_sync import RedisStorage

        storage = RedisStorage(request.getfixturevalue("redis_url"), prefix=f"{tmp_path}:")
    with SessionManager(storage=storage) as some:
        yield some


def refused(sessions: SessionManager[Any], change: Callable[[Any], object], place: str) -> None:
    """`change` raises in its own line and changes nothing; what else the handler does is saved."""
    before = {"l": [1], "d": {"x": 1}, "s": {1}, "deep": {"l": [{"d": {}}]}}
    sessions.storage.set(KEY, before)
    with sessions.session_scope(KEY) as session:
        session.n = 1
        with pytest.raises(SessionEncodeError) as caught:
            change(session)
        session.m = 2
        assert session == {**before, "n": 1, "m": 2}
    assert sessions.storage.get(KEY) == {**before, "n": 1, "m": 2}
    assert f"session {KEY!r} cannot keep this value: {place} is of type Kind" in str(caught.value)
    assert "declare the type of the field" in str(caught.value)
    assert "Bus" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda s: setattr(s, "kind", Kind.BUS), "kind"),
        (lambda s: s.__setitem__("the kind", Kind.BUS), "['the kind']"),
        (lambda s: s.update(kind=Kind.BUS), "kind"),
        (lambda s: s.setdefault("kind", Kind.BUS), "kind"),
        (lambda s: s.__ior__({"kind": Kind.BUS}), "kind"),
        (lambda s: setattr(s, "kind", ttl(Kind.BUS, 60)), "kind"),
        (lambda s: setattr(s, "rides", [{"by": (1, Kind.BUS)}]), "rides[0].by[1]"),
        (lambda s: setattr(s, "kinds", {Kind.BUS}), "kinds{...}"),
        (lambda s: setattr(s, "names", {Kind.BUS: 1}), "names.keys()[0]"),
    ],
)
def test_a_field(
    sessions: SessionManager[Any], change: Callable[[Any], object], place: str
) -> None:
    refused(sessions, change, place)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda s: s.l.append(Kind.BUS), "l[...]"),
        (lambda s: s.l.insert(0, Kind.BUS), "l[...]"),
        (lambda s: s.l.extend([Kind.BUS]), "l[...]"),
        (lambda s: s.l.__iadd__([Kind.BUS]), "l[...]"),
        (lambda s: s.l.__setitem__(0, Kind.BUS), "l[...]"),
        (lambda s: s.l.__setitem__(slice(0, 1), [Kind.BUS]), "l[...]"),
        (lambda s: s.d.__setitem__("x", Kind.BUS), "d[...]"),
        (lambda s: s.d.__setitem__(Kind.BUS, 1), "d[...]"),
        (lambda s: s.d.setdefault("y", Kind.BUS), "d[...]"),
        (lambda s: s.d.setdefault(Kind.BUS, 1), "d[...]"),
        (lambda s: s.d.update(y=Kind.BUS), "d[...]"),
        (lambda s: s.d.update({"y": Kind.BUS}), "d[...]"),
        (lambda s: s.d.update({Kind.BUS: 1}), "d[...]"),
        (lambda s: s.d.update([("y", Kind.BUS)]), "d[...]"),
        (lambda s: s.d.__ior__({"y": Kind.BUS}), "d[...]"),
        (lambda s: s.s.add(Kind.BUS), "s[...]"),
        (lambda s: s.s.update([Kind.BUS]), "s[...]"),
        (lambda s: s.s.__ior__({Kind.BUS}), "s[...]"),
        (lambda s: s.s.__ixor__({Kind.BUS}), "s[...]"),
        (lambda s: s.s.symmetric_difference_update([Kind.BUS]), "s[...]"),
        (lambda s: s.deep["l"][0]["d"].update(a={"b": [Kind.BUS]}), "deep.l[0].d[...].b[0]"),
    ],
)
def test_inside_a_container(
    sessions: SessionManager[Any], change: Callable[[Any], object], place: str
) -> None:
    refused(sessions, change, place)


@pytest.mark.parametrize("value", [datetime(2026, 1, 1, tzinfo=OwnZone()), time(tzinfo=OwnZone())])
def test_a_zone_of_another_library(sessions: SessionManager[Any], value: object) -> None:
    sessions.storage.set(KEY, {"l": []})
    with sessions.session_scope(KEY) as session:
        for change in (
            lambda: setattr(session, "at", value),
            lambda: session["l"].append(value),
            lambda: session["l"].extend([value]),
        ):
            with pytest.raises(SessionEncodeError, match=r"with a tzinfo of type .*OwnZone"):
                change()
        assert session == {"l": []}


def test_what_comes_into_a_container_of_the_handlers_own_is_refused_when_it_is_saved(
    sessions: SessionManager[Any],
) -> None:
    with sessions.session_scope(KEY) as session:
        mine: list[Any] = [1]
        session.mine = mine
        mine.append(Kind.BUS)
        with pytest.raises(SessionEncodeError, match=r"mine\[1\] is of type Kind"):
            session.flush()
        mine.pop()
    assert sessions.storage.get(KEY) == {"mine": [1]}


def test_what_is_declared_goes_in(sessions: SessionManager[Any]) -> None:
    class Trip(Session):
        kind: Kind | None = None
        kinds: list[Kind] = []
        found: set[Kind] = set()
        prices: dict[Kind, int] = {}
        free: list[Any] = []

    trips = SessionManager(Trip, storage=sessions.storage)
    with trips.session_scope(KEY) as trip:
        trip.kind = Kind.BUS
        trip.kinds.append(Kind.BUS)
        trip.found.add(Kind.BUS)
        trip.prices[Kind.BUS] = 1
        with pytest.raises(SessionEncodeError, match=r"free\[\.\.\.\] is of type Kind"):
            trip.free.append(Kind.BUS)
        with pytest.raises(SessionEncodeError, match=r"others\[0\] is of type Kind"):
            trip.others = trip.kinds
    with trips.session_scope(KEY) as trip:
        assert trip.kind is Kind.BUS
        assert (trip.kinds, trip.found, trip.prices) == ([Kind.BUS], {Kind.BUS}, {Kind.BUS: 1})


def test_what_a_codec_brings_in_goes_in(tmp_path: Path) -> None:
    def encode(value: object) -> Any:
        if isinstance(value, Fraction):
            return "fraction", value.as_integer_ratio()
        return NotImplemented

    codec = Codec(encode, lambda _name, pair: Fraction(*pair))
    storage = SQLiteStorage(tmp_path / "s.db", codec=codec)
    storage.set(KEY, {"shares": []})
    with SessionManager(storage=storage) as sessions:
        with sessions.session_scope(KEY) as session:
            session.share = Fraction(1, 3)
            session.shares.append(Fraction(1, 2))
            with pytest.raises(SessionEncodeError, match="kind is of type Kind"):
                session.kind = Kind.BUS
        assert storage.get(KEY) == {"shares": [Fraction(1, 2)], "share": Fraction(1, 3)}


@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
def test_memory_keeps_the_object_and_warns_once_of_the_line(make: Callable[[], Any]) -> None:
    storage = make()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        session.fine = [1]
        with pytest.warns(UserWarning, match=r"serialises.*kind is of type Kind") as caught:
            session.kind = Kind.BUS
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            session.other = Kind.BUS
            session["fine"].append(Kind.BUS)
    assert storage.get(KEY) == {"fine": [1, Kind.BUS], "kind": Kind.BUS, "other": Kind.BUS}


def test_the_warning_names_the_line_that_puts_it_into_a_container() -> None:
    sessions: SessionManager[Any] = SessionManager()
    sessions.storage.set(KEY, {"kinds": []})
    with sessions.session_scope(KEY) as session:
        with pytest.warns(UserWarning, match=r"kinds\[\.\.\.\] is of type Kind") as caught:
            session["kinds"].append(Kind.BUS)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda s: s["pair"][0].append(Kind.BUS), "pair[0][...]"),
        (lambda s: s.pop("l").append(Kind.BUS), "[...]"),
    ],
)
def test_the_place_of_a_container_in_a_tuple_and_of_one_that_was_taken_out(
    change: Callable[[Any], object], place: str
) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=MemoryStorage(strict=True))
    sessions.storage.set(KEY, {"pair": ([1], 2), "l": [1], "same": [[]]})
    with sessions.session_scope(KEY) as session:
        session["same"].append(session["same"][0])  # which is met twice
        with pytest.raises(SessionEncodeError) as caught:
            change(session)
    assert f"cannot keep this value: {place} is of type Kind" in str(caught.value)
