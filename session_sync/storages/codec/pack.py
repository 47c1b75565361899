"""The way in: values as what JSON has. What it has not is an object with one name that begins with
`$`: `{"$tuple": [1, 2]}`.

This module knows values, and why one is refused; it knows no record and no key.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from math import isfinite
from types import NoneType
from typing import Any, Final, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from session_sync.storages.codec.kinds import (
    ALWAYS_PLAIN,
    DECIMALS,
    MAX_DEPTH,
    NUMBERS,
    TOO_DEEP,
    base_value,
    refusal,
)
from session_sync.storages.codec.strings import FIELD_ESCAPE, SURROGATE, escaped
from session_sync.storages.codec.zones import name_of
from session_sync.storages.places import step

EncodeHook: TypeAlias = Callable[[Any], tuple[str, object]]

_MIN_INT: Final = -(2**63)
_MAX_INT: Final = 2**63 - 1
_NAMES: Final = frozenset((str,))

to_json = msgspec.json.Encoder().encode


class RefusedError(Exception):
    """A value that cannot be kept, and why. Each level that it passes adds its step to the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []


class Packer:
    """Makes values of what JSON has. Containers that it has all of are used as they are."""

    def __init__(self, hook: EncodeHook | None, *, careful: bool = False) -> None:
        self._hook = hook
        self._careful = careful
        self._plain = ALWAYS_PLAIN - {str} if careful else ALWAYS_PLAIN
        self._leaves = self._plain | NUMBERS

    def is_json(self, fields: Mapping[str, Any]) -> bool:
        """Whether JSON has all of these names and values, so that there is nothing to pack."""
        return (
            not self._careful
            and {*map(type, fields)} <= _NAMES
            and FIELD_ESCAPE not in "".join(fields)
            and self._all_plain(fields.values())
        )

    def name(self, name: object) -> str:
        """The name of a field, as the name in a JSON object."""
        if type(name) is not str:
            if not isinstance(name, str):
                raise RefusedError("is no name for a field: it has to be a str")
            name = str.__str__(name)
        if name.startswith(FIELD_ESCAPE):
            raise RefusedError(f"is no name for a field: {FIELD_ESCAPE} is reserved")
        if self._careful and SURROGATE.search(name):
            return FIELD_ESCAPE + escaped(name)
        return name

    def names(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A copy of `fields`, which were stored: nothing but surrogates makes their names odd."""
        if not self._careful:
            return fields.copy()
        return {
            FIELD_ESCAPE + escaped(name) if SURROGATE.search(name) else name: value
            for name, value in fields.items()
        }

    def pack(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in self._plain:
            return value
        pack = _PACK.get(kind)
        return self._foreign(value, depth) if pack is None else pack(self, value, depth)

    def _all_plain(self, values: Collection[Any]) -> bool:
        kinds = set(map(type, values))
        if kinds <= self._plain:
            return True
        if not kinds <= self._leaves:
            return False
        for value in values:
            # True for nan too.
            if type(value) in NUMBERS and not _MIN_INT <= value <= _MAX_INT:
                return False
        return True

    def _each(self, values: Iterable[Any], depth: int, where: str = "") -> list[Any]:
        if depth >= MAX_DEPTH:
            raise RefusedError(TOO_DEEP)
        plain = self._plain
        packed: list[Any] = []
        try:
            for value in values:
                item = value if type(value) in plain else self.pack(value, depth + 1)
                packed.append(item)
        except RefusedError as refused:
            refused.path.append(where or f"[{len(packed)}]")
            raise
        return packed

    def _str(self, value: str, _depth: int) -> Any:
        return {"$str": escaped(value)} if SURROGATE.search(value) else value

    def _int(self, value: int, _depth: int) -> Any:
        # In hex: Python takes no more than 4,300 decimal digits.
        return value if _MIN_INT <= value <= _MAX_INT else {"$int": format(value, "x")}

    def _float(self, value: float, _depth: int) -> Any:
        return value if isfinite(value) else {"$float": repr(value)}

    def _bytes(self, value: bytes, _depth: int) -> Any:
        return {"$bytes": b64encode(value).decode()}

    def _list(self, value: list[Any], depth: int) -> Any:
        return value if self._all_plain(value) else self._each(value, depth)

    def _tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        return {"$tuple": value if self._all_plain(value) else self._each(value, depth)}

    def _set(self, value: set[Any], depth: int) -> Any:
        return {"$set": self._sorted(value, depth)}

    def _frozenset(self, value: frozenset[Any], depth: int) -> Any:
        return {"$frozenset": self._sorted(value, depth)}

    def _sorted(self, values: Collection[Any], depth: int) -> list[Any]:
        kinds = set(map(type, values))
        if kinds == {str} or kinds == {int}:
            return self._each(sorted(values), depth, "{...}")
        self._distinct(values, kinds, "elements")
        return sorted(self._each(values, depth, "{...}"), key=to_json)

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        named = self._are_names(value)
        if named and self._all_plain(value.values()):
            return value
        if depth >= MAX_DEPTH:
            raise RefusedError(TOO_DEEP)
        plain = self._plain
        packed: list[Any] = []
        key: object = None
        try:
            for key, item in value.items():  # noqa: B007 - the path needs the last one
                packed.append(item if type(item) in plain else self.pack(item, depth + 1))
        except RefusedError as refused:
            refused.path.append(step(key))
            raise
        if named:
            return dict(zip(value, packed, strict=True))
        self._distinct(value, set(map(type, value)), "keys")
        try:
            keys = self._each(value, depth)
        except RefusedError as refused:
            refused.path.append(".keys()")
            raise
        return {"$dict": list(zip(keys, packed, strict=True))}

    def _are_names(self, keys: Collection[Any]) -> bool:
        """Whether `keys` can be the names of a JSON object."""
        if not keys:
            return True
        if set(map(type, keys)) != {str}:
            return False
        together = "".join(keys)
        if "$" in together and any(key.startswith("$") for key in keys):
            return False
        return not (self._careful and SURROGATE.search(together))

    def _distinct(self, values: Collection[Any], kinds: set[type], what: str) -> None:
        """Refuse two values that become the same one: an odd subclass of str, and a str."""
        if not kinds <= _PACK.keys() and len(set(map(base_value, values))) != len(values):
            raise RefusedError(f"has {what} of a subclass that are equal once stored")

    def _datetime(self, value: datetime, depth: int) -> Any:
        return self._with_zone("$datetime", value, depth)

    def _time(self, value: time, depth: int) -> Any:
        return self._with_zone("$time", value, depth)

    def _with_zone(self, tag: str, value: datetime | time, depth: int) -> Any:
        """ISO text, then the zone's name and the fold where they are needed."""
        zone = value.tzinfo
        name = None
        if isinstance(zone, ZoneInfo) and zone.key is not None:
            name = zone.key
            text = value.replace(tzinfo=None).isoformat()
        elif zone is None or type(zone) is timezone:
            text = value.isoformat()
            name = name_of(zone)
        else:
            kind = f"{type(zone).__module__}.{type(zone).__qualname__}"
            what = f"{type(value).__name__} with a tzinfo of type {kind} (kept is zoneinfo's)"
            return self._foreign(value, depth, what)
        if value.fold:
            return {tag: [text, self.pack(name, depth), 1]}
        return {tag: text if name is None else [text, self.pack(name, depth)]}

    def _date(self, value: date, _depth: int) -> Any:
        return {"$date": value.isoformat()}

    def _timedelta(self, value: timedelta, _depth: int) -> Any:
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}

    def _decimal(self, value: Decimal, _depth: int) -> Any:
        return {"$decimal": DECIMALS.to_sci_string(value)}

    def _uuid(self, value: UUID, _depth: int) -> Any:
        return {"$uuid": str(value)}

    def _foreign(self, value: Any, depth: int, what: str = "") -> Any:
        """A type that is not on the list: the hook's, or a subclass, or refused."""
        hooked = self._hooked(value)
        if hooked is not NotImplemented:
            return {"$type": self._each(hooked, depth, f"<{type(value).__name__}>")}
        base = base_value(value)
        if base is value:
            raise RefusedError(refusal(value, what))
        return self.pack(base, depth)

    def _hooked(self, value: Any) -> Any:
        if self._hook is None:
            return NotImplemented
        try:
            hooked: Any = self._hook(value)
        except NotImplementedError:
            return NotImplemented
        except OSError:
            raise
        except Exception as error:
            raise RefusedError(
                f"is of type {type(value).__name__}, for which `encode` raised "
                f"{type(error).__name__}"
            ) from error
        if hooked is NotImplemented:
            return hooked
        if type(hooked) is not tuple or len(hooked) != 2 or not isinstance(hooked[0], str):
            raise RefusedError(
                f"is of type {type(value).__name__}, for which `encode` has to return a tuple of "
                f"a name and a value, not {type(hooked).__name__}"
            )
        return hooked


_PACK: Final[dict[type, Callable[[Packer, Any, int], Any]]] = {
    NoneType: lambda _packer, value, _depth: value,
    bool: lambda _packer, value, _depth: value,
    str: Packer._str,
    int: Packer._int,
    float: Packer._float,
    bytes: Packer._bytes,
    list: Packer._list,
    tuple: Packer._tuple,
    dict: Packer._dict,
    set: Packer._set,
    frozenset: Packer._frozenset,
    datetime: Packer._datetime,
    date: Packer._date,
    time: Packer._time,
    timedelta: Packer._timedelta,
    Decimal: Packer._decimal,
    UUID: Packer._uuid,
}
