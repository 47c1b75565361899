"""The way back: values out of what JSON has.

Nothing is taken that `pack.py` would not have written.
This module knows values; it knows no record and no key.
"""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Final, TypeAlias
from uuid import UUID

from session_sync.storages.codec.kinds import DECIMALS, LEAVES
from session_sync.storages.codec.malformed import MalformedError, complete, expect, same
from session_sync.storages.codec.strings import unescaped
from session_sync.storages.codec.zones import zone_of
from session_sync.storages.places import short

DecodeHook: TypeAlias = Callable[[str, Any], object]


class Unpacker:
    """The way back. It takes nothing that `Packer` would not have written.

    Whatever a constructor raises about a malformed value goes up to `Codec`, which words it.
    """

    def __init__(self, hook: DecodeHook | None) -> None:
        self._hook = hook

    def unpack(self, value: Any) -> Any:
        kind = type(value)
        if kind is list:
            return [item if type(item) in LEAVES else self.unpack(item) for item in value]
        if kind is not dict:
            return value
        if "$" not in "".join(value) or not any(name.startswith("$") for name in value):
            return {
                name: item if type(item) in LEAVES else self.unpack(item)
                for name, item in value.items()
            }
        if len(value) != 1:
            raise MalformedError("mixes a tag with other names")
        ((tag, body),) = value.items()
        unpack = _UNPACK.get(tag)
        if unpack is None:
            raise MalformedError(f"has the unknown tag {short(tag)} (written by a newer version?)")
        return unpack(self, body)

    def _str(self, body: Any) -> str:
        return unescaped(body)

    def _int(self, body: Any) -> int:
        value = int(body, 16)
        return same(value, format(value, "x"), body)

    def _float(self, body: Any) -> float:
        if body not in ("nan", "inf", "-inf"):
            raise MalformedError("has a malformed float")
        # A new object each time: a set may hold more than one nan.
        return float(body)

    def _bytes(self, body: Any) -> bytes:
        return a2b_base64(expect(str, body), strict_mode=True)

    def _list(self, body: Any) -> list[Any]:
        value: list[Any] = self.unpack(expect(list, body))
        return value

    def _tuple(self, body: Any) -> tuple[Any, ...]:
        return tuple(self._list(body))

    def _set(self, body: Any) -> set[Any]:
        return complete(set(self._list(body)), body)

    def _frozenset(self, body: Any) -> frozenset[Any]:
        return complete(frozenset(self._list(body)), body)

    def _dict(self, body: Any) -> dict[Any, Any]:
        pairs = [expect(list, pair) for pair in expect(list, body)]
        return complete({self.unpack(key): self.unpack(item) for key, item in pairs}, body)

    def _datetime(self, body: Any) -> datetime:
        text, zone, fold = self._with_zone(body)
        value = datetime.fromisoformat(text)
        return same(value, value.isoformat(), text).replace(tzinfo=zone, fold=fold)

    def _time(self, body: Any) -> time:
        text, zone, fold = self._with_zone(body)
        value = time.fromisoformat(text)
        return same(value, value.isoformat(), text).replace(tzinfo=zone, fold=fold)

    def _with_zone(self, body: Any) -> tuple[str, tzinfo | None, int]:
        parts = body if type(body) is list else [body]
        text = expect(str, parts[0])
        name = self.unpack(parts[1]) if len(parts) > 1 else None
        fold = parts[2] if len(parts) > 2 else 0
        if len(parts) > 3 or type(fold) is not int:
            raise MalformedError("has a malformed time")
        text, zone = zone_of(text, name)
        return text, zone, fold

    def _date(self, body: Any) -> date:
        value = date.fromisoformat(body)
        return same(value, value.isoformat(), body)

    def _timedelta(self, body: Any) -> timedelta:
        days, seconds, microseconds = (expect(int, part) for part in body)
        value = timedelta(days, seconds, microseconds)
        return same(value, [value.days, value.seconds, value.microseconds], body)

    def _decimal(self, body: Any) -> Decimal:
        value = Decimal(expect(str, body))
        return same(value, DECIMALS.to_sci_string(value), body)

    def _uuid(self, body: Any) -> UUID:
        value = UUID(body)
        return same(value, str(value), body)

    def _type(self, body: Any) -> object:
        name, value = expect(list, body)
        name, value = expect(str, self.unpack(name)), self.unpack(value)
        if self._hook is None:
            raise MalformedError("needs a Codec with a `decode` function")
        try:
            return self._hook(name, value)
        except OSError:
            raise
        except Exception as error:
            raise MalformedError(f"made `decode` raise {type(error).__name__}") from error


_UNPACK: Final[dict[str, Callable[[Unpacker, Any], Any]]] = {
    "$str": Unpacker._str,
    "$int": Unpacker._int,
    "$float": Unpacker._float,
    "$bytes": Unpacker._bytes,
    "$tuple": Unpacker._tuple,
    "$set": Unpacker._set,
    "$frozenset": Unpacker._frozenset,
    "$dict": Unpacker._dict,
    "$datetime": Unpacker._datetime,
    "$date": Unpacker._date,
    "$time": Unpacker._time,
    "$timedelta": Unpacker._timedelta,
    "$decimal": Unpacker._decimal,
    "$uuid": Unpacker._uuid,
    "$type": Unpacker._type,
}
