"""Makes values of what a pickle describes: of those that a session can keep, and of no others.

Which names stand for such a value is written in one table, and beside each what is made of its
arguments. That is checked by types first, and done with public constructors that only compute.

This module knows descriptions of values and what the codec keeps; it knows no library and no store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, Final, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

from session_sync.errors import SessionDecodeError, SessionEncodeError
from session_sync.session.metadata import checked_name
from session_sync.storages.codec import Codec
from session_sync.storages.codec.kinds import MAX_DEPTH
from session_sync.storages.places import path, short, step

from .pickles import Budget, Global, Thing

#: The text of a key with the fields of its session, or with the error that says why not.
Imported: TypeAlias = tuple[str, dict[str, Any] | SessionDecodeError]

#: What a framework means by a Thing: a value, or the Thing itself, which then stays unknown.
Meaning: TypeAlias = Callable[["Reader", Thing], Any]

# A list that is a hundred times in another one, that again in a third, ... is small in a pickle and
# has no end once it is written out.
_LARGEST: Final = 16 * 1024 * 1024  # bytes of one session, about
_PAIR: Final = 64  # bytes that it is taken to be worth to look at one ...
_SESSION: Final = 256  # ... and to make one

_TOO_DEEP: Final = f"contains itself, or lies more than {MAX_DEPTH} levels deep"
_NO_SIZE: Final = frozenset((type(None), bool, float))
_DICTS: Final = ("builtins.dict", "collections.OrderedDict", "collections.defaultdict")


class RefusedError(Exception):
    """Why a record cannot be taken over. Each level that it passes adds its step to the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason: Final = reason
        self.path: Final[list[str]] = []


def imported(key: str, make: Callable[[], dict[Any, Any]]) -> Iterator[Imported]:
    """The session that `make` answers the fields of, or the error that says why there is none.

    Nothing at all, if it has no fields: such a session is not stored.
    """
    try:
        fields = make()
        for name in fields:
            checked_name(key, name)
        Codec().encode(fields, key)  # raises at what no storage can keep
    except RefusedError as refused:
        yield key, unusable(key, f"{path(refused.path) or 'it'} {refused.reason}")
    except RecursionError:
        yield key, unusable(key, _TOO_DEEP)
    except (SessionEncodeError, TypeError, ValueError) as error:
        yield key, SessionDecodeError(str(error))  # which names the key, and no value
    else:
        if fields:
            yield key, fields


def unusable(key: str, reason: str) -> SessionDecodeError:
    """The error for a session that is left out."""
    return SessionDecodeError(f"session {key!r} cannot be taken over: {reason}")


def unnamed(name: str, reason: str) -> Imported:
    """The error for a record that is of no session; `name` is how its bot finds it."""
    return name, SessionDecodeError(f"what lies under {name} cannot be taken over: {reason}")


def an_id(key: object) -> int:
    """A key of what should be a dict by ids; raises TypeError."""
    if type(key) is not int:
        raise TypeError
    return key


def named(key: object) -> str:
    """A key of anything, as far as it may be shown."""
    return short(key) if type(key) is str else step(key)[1:-1]


def unknown(_reader: Reader, thing: Thing) -> Any:
    """The meaning of a Thing without a framework: none."""
    return thing


class Reader:
    """Makes values of what the pickle in a file of `size` bytes describes.

    A value that the file has once is made in each place that refers to it. So a session of more
    than 16 MB is refused, and ExhaustedError is raised if all of them come to far more than the
    file has, or if a part of it is walked through too often.
    """

    def __init__(self, size: int) -> None:
        self._budget: Final = Budget(size)
        self._left = _LARGEST  # of the session that is being made
        self._meaning: Meaning = unknown

    def pairs_of(self, value: Any) -> Iterator[tuple[Any, Any]]:
        """The keys and values of what should be a dict, as the pickle describes them."""
        if type(value) is not Thing or value.name not in _DICTS:
            raise RefusedError(f"{_is_of_class(value)}, and not a dict")
        if value.state is not None:
            raise RefusedError(f"is a {value.name} that has attributes, which no storage can keep")
        self._budget.spend(_PAIR * len(value.content))
        for pair in value.content:
            if type(pair) is not tuple or len(pair) != 2:
                raise RefusedError("is a damaged dict")
            yield pair

    def by_name(self, value: Any) -> dict[str, Any]:
        """What should be a dict, as the pickle describes its values; keys that are no str left
        out."""
        # No other key is hashed: one of nested tuples could fill the stack.
        return {key: item for key, item in self.pairs_of(value) if type(key) is str}

    def fields(self, value: Any, meaning: Meaning = unknown) -> dict[Any, Any]:
        """The fields in what should be a dict of them; raises RefusedError."""
        self._begin(meaning)
        return self.dict(value, 0)

    def field(self, name: str, value: Any, meaning: Meaning = unknown) -> Any:
        """The value of one field called `name`; raises RefusedError."""
        self._begin(meaning)
        try:
            return self.make(value, 1)
        except RefusedError as refused:
            refused.path.append(step(name))
            raise

    def _begin(self, meaning: Meaning) -> None:
        self._budget.spend(_SESSION)
        self._left, self._meaning = _LARGEST, meaning

    def make(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _NO_SIZE:
            self._count(8)
        elif kind is str or kind is bytes:
            self._count(8 + len(value))
        elif kind is int:
            self._count(8 + value.bit_length() // 8)
        elif depth > MAX_DEPTH:
            raise RefusedError(_TOO_DEEP)
        elif kind is list:
            return self.each(value, depth)
        elif kind is tuple:
            return tuple(self.each(value, depth))
        else:
            return self._object(value, depth)
        return value

    def each(self, values: Iterable[Any], depth: int, where: str = "") -> list[Any]:
        self._count(8)
        made: list[Any] = []
        try:
            for value in values:
                made.append(self.make(value, depth + 1))  # noqa: PERF401 - the path needs the index
        except RefusedError as refused:
            refused.path.append(where or f"[{len(made)}]")
            raise
        return made

    def dict(self, value: Any, depth: int) -> dict[Any, Any]:
        self._count(8)
        made: dict[Any, Any] = {}
        for raw_key, raw in self.pairs_of(value):
            try:
                key = self.make(raw_key, depth + 1)
                made[key] = None
            except RefusedError as refused:
                refused.path.append(".keys()")
                raise
            except TypeError:
                raise RefusedError("has a key that is no key of a dict") from None
            try:
                made[key] = self.make(raw, depth + 1)
            except RefusedError as refused:
                refused.path.append(step(key))
                raise
        return made

    def _object(self, value: Any, depth: int) -> Any:
        if type(value) is Thing:
            if value.name in _DICTS:
                return self.dict(value, depth)
            meant = self._meaning(self, value)
            if meant is not value:
                return self.make(meant, depth + 1)
            make = _MAKERS.get(value.name)
            if make is not None and (value.state is None or make is _uuid):
                try:
                    return make(self, value, depth)
                except _UNFIT:
                    pass
        raise RefusedError(f"{_is_of_class(value)}, which no storage can keep")

    def _count(self, size: int) -> None:
        self._budget.spend(size)
        self._left -= size
        if self._left < 0:
            raise RefusedError(f"has more than {_LARGEST // 2**20} MB when it is written out")


# What a constructor raises at arguments that it was not made for.
_UNFIT: Final = (TypeError, ValueError, LookupError, ArithmeticError, OSError)


def _is_of_class(value: Any) -> str:
    if type(value) is Global:
        return f"is the class or function {_shown(value.name)}"
    name = value.name if type(value) is Thing else type(value).__name__
    return f"is of class {_shown(name)}"


def _shown(name: str) -> str:
    """The name, as the file may have anything in its place."""
    if len(name) > 100:
        return short(name)
    name = name.removeprefix("builtins.")
    return name if all(map(str.isidentifier, name.split("."))) else short(name)


# -- what the names stand for


def _require(fit: bool) -> None:
    if not fit:
        raise TypeError


def _args(reader: Reader, thing: Thing, *kinds: type) -> tuple[Any, ...]:
    """The arguments of `thing`, which have to be of these types, and are paid for."""
    _require(len(thing.args) == len(kinds) and tuple(map(type, thing.args)) == kinds)
    for arg in thing.args:
        if type(arg) is not list:  # whose members are made one by one
            reader.make(arg, 0)
    return thing.args


def _members(reader: Reader, thing: Thing, depth: int) -> list[Any]:
    """Of a set: what was put into it, or the list that it would have been made of."""
    values = thing.content
    if thing.args:
        (values,) = _args(reader, thing, list)
    return reader.each(values, depth, "{...}")


def _set(reader: Reader, thing: Thing, depth: int) -> set[Any]:
    return set(_members(reader, thing, depth))


def _frozenset(reader: Reader, thing: Thing, depth: int) -> frozenset[Any]:
    return frozenset(_members(reader, thing, depth))


def _no_bytes(reader: Reader, thing: Thing, _depth: int) -> bytes:
    _args(reader, thing)
    return b""


def _bytes(reader: Reader, thing: Thing, _depth: int) -> bytes:
    """How protocols 0 to 2, which have no bytes, write them."""
    text, encoding = _args(reader, thing, str, str)
    _require(encoding == "latin1")
    made: str = text
    return made.encode("latin-1")


def _packed(reader: Reader, thing: Thing, depth: int, size: int) -> tuple[bytes, tzinfo | None]:
    """The bytes that a date or time would be made of, and its time zone."""
    packed, *zone = (reader.make(arg, depth + 1) for arg in thing.args)
    _require(type(packed) is bytes and len(packed) == size and len(zone) <= 1)
    _require(not zone or isinstance(zone[0], tzinfo))
    return packed, zone[0] if zone else None


def _datetime(reader: Reader, thing: Thing, depth: int) -> datetime:
    packed, zone = _packed(reader, thing, depth, 10)
    month, day, hour, minute, second = packed[2:7]
    return datetime(
        int.from_bytes(packed[:2]),
        month & 127,
        day,
        hour,
        minute,
        second,
        int.from_bytes(packed[7:]),
        zone,
        fold=month >> 7,
    )


def _date(reader: Reader, thing: Thing, depth: int) -> date:
    packed, zone = _packed(reader, thing, depth, 4)
    _require(zone is None)
    return date(int.from_bytes(packed[:2]), packed[2], packed[3])


def _time(reader: Reader, thing: Thing, depth: int) -> time:
    packed, zone = _packed(reader, thing, depth, 6)
    hour, minute, second = packed[:3]
    return time(hour & 127, minute, second, int.from_bytes(packed[3:]), zone, fold=hour >> 7)


def _timedelta(reader: Reader, thing: Thing, _depth: int) -> timedelta:
    return timedelta(*_args(reader, thing, int, int, int))


def _timezone(reader: Reader, thing: Thing, depth: int) -> timezone:
    offset, *name = (reader.make(arg, depth + 1) for arg in thing.args)
    _require(type(offset) is timedelta and all(type(each) is str for each in name))
    return timezone(offset, *name)


def _zone_info(reader: Reader, thing: Thing, depth: int) -> ZoneInfo:
    name, _from_cache = thing.args
    name = reader.make(name, depth)
    _require(type(name) is str and _ZONE.fullmatch(name) is not None)
    return ZoneInfo(name)  # reads the file of that name in the system's folder of zones, or raises


# No dots: where the system has no zones, such a name would be one of a module.
_ZONE: Final = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")


def _decimal(reader: Reader, thing: Thing, _depth: int) -> Decimal:
    return Decimal(*_args(reader, thing, str))


def _uuid(reader: Reader, thing: Thing, _depth: int) -> UUID:
    _args(reader, thing)
    _require(type(thing.state) is Thing)
    number = reader.by_name(thing.state)["int"]
    _require(type(number) is int)
    return UUID(int=number)


_MAKERS: Final[dict[str, Callable[[Reader, Thing, int], Any]]] = {
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.bytes": _no_bytes,
    "_codecs.encode": _bytes,
    "datetime.datetime": _datetime,
    "datetime.date": _date,
    "datetime.time": _time,
    "datetime.timedelta": _timedelta,
    "datetime.timezone": _timezone,
    "zoneinfo.ZoneInfo._unpickle": _zone_info,
    "decimal.Decimal": _decimal,
    "uuid.UUID": _uuid,
}
