"""Turns the fields of a session into bytes and back, and keeps the type and value of each.

The bytes are JSON, so that an operator can read what `redis-cli GET` or the sqlite shell prints.
What JSON has not is an object with one name that begins with `$`: `{"$tuple": [1, 2]}`. This module
knows values and records; it knows no session and no storage.
"""

from __future__ import annotations

import re
from base64 import b64encode
from binascii import a2b_base64
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Context, Decimal
from math import isfinite
from types import NoneType
from typing import Any, Final, TypeAlias, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Raw

from session_sync.errors import SessionDecodeError, SessionEncodeError
from session_sync.storages.base import PatchedRecord, Record
from session_sync.storages.places import path, short, step

T = TypeVar("T")
C = TypeVar("C", bound=Collection[Any])
EncodeHook: TypeAlias = Callable[[Any], tuple[str, object]]
DecodeHook: TypeAlias = Callable[[str, Any], object]

# What is written can be read again from any place in a program: some four frames to a level stay
# far below Python's limit of 1,000.
MAX_DEPTH: Final = 128

_KEPT: Final = (
    "None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, datetime, date, time, "
    "timedelta, Decimal and UUID"
)
_TOO_DEEP: Final = f"contains itself, or lies more than {MAX_DEPTH} levels deep"
_MIN_INT: Final = -(2**63)
_MAX_INT: Final = 2**63 - 1
_ALWAYS_PLAIN: Final = frozenset((NoneType, bool, str))
_NUMBERS: Final = frozenset((int, float))
_LEAVES: Final = _ALWAYS_PLAIN | _NUMBERS
_FIELD_ESCAPE: Final = "$str:"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_ESCAPED: Final = re.compile(r"\\(?:\\|u(d[89a-f][0-9a-f]{2}))")
_OFFSET: Final = re.compile(r"([+-])(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{6}))?)?\Z", re.ASCII)
# A context of our own: the caller's may write a small `e`.
_DECIMALS: Final = Context(capitals=1)

# What the parsers and constructors used here raise about a value. No more than that: the rest comes
# from a signal handler, say, and has to come out as it is.
_MALFORMED: Final = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    msgspec.MsgspecError,
)

_to_json = msgspec.json.Encoder().encode
_split_json = msgspec.json.Decoder(dict[str, Raw]).decode
_fields_from_json = msgspec.json.Decoder(dict[str, Any]).decode
_from_json = msgspec.json.Decoder().decode


class Codec:
    """Encodes the fields of a session as JSON text, and decodes them with their types.

    Kept are None, bool, int of any size, float with nan and inf, str, bytes, list, tuple, dict
    (with keys of any of these types), set, frozenset, datetime, date, time, timedelta, Decimal and
    UUID. A subclass of str, int, float, datetime, date, time or timedelta (freezegun's, pendulum's)
    is kept as its base value. Time zones are those of `datetime.timezone` and of zoneinfo. Any
    other value is refused: a namedtuple or a bytearray would come back as something else. The same
    fields give the same bytes.

    `encode(value)` brings in other types: it returns a name and a value that can be kept, or
    `NotImplemented` (or raises `NotImplementedError`) for a value that is not its own.
    `decode(name, value)` makes the object again. What these raise is wrapped in the errors of
    this class, except an OSError, which goes through as it is: a file or a server was not reached,
    or a time-out was set by a signal handler (TimeoutError is one).

    >>> from fractions import Fraction
    >>> def encode(value):
    ...     if isinstance(value, Fraction):
    ...         return "fraction", value.as_integer_ratio()
    ...     return NotImplemented
    >>> def decode(name, value):
    ...     return {"fraction": Fraction}[name](*value)
    >>> codec = Codec(encode, decode)
    >>> codec.encode({"tags": {"a"}, "share": Fraction(1, 3)})
    b'{"tags":{"$set":["a"]},"share":{"$type":["fraction",{"$tuple":[1,3]}]}}'
    >>> codec.decode(_)
    {'tags': {'a'}, 'share': Fraction(1, 3)}
    """

    def __init__(self, encode: EncodeHook | None = None, decode: DecodeHook | None = None) -> None:
        self._packer = _Packer(encode)
        self._careful_packer = _Packer(encode, careful=True)
        self._unpacker = _Unpacker(decode)

    def encode(self, fields: Mapping[str, Any], key: str | None = None) -> bytes:
        """`fields` as bytes; `key` is the session's key, for the message of an error.

        Fields of a record that came from this codec and were not changed since are written as they
        were found. Raises `SessionEncodeError` with the path to the first value that cannot be
        kept.

        >>> Codec().encode({"counter": 1, "seen": {7: b"?"}})
        b'{"counter":1,"seen":{"$dict":[[7,{"$bytes":"Pw=="}]]}}'
        >>> Codec().encode({"cart": {"items": [1, 2, object()]}}, "user:1")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        session_sync.errors.SessionEncodeError: session 'user:1' cannot be stored: cart.items[2] is
        of type object. Kept are None, bool, ... and UUID: declare the type of the field in a
        subclass of Session, convert the value, or pass codec=Codec(encode, decode) to the storage.
        """
        try:
            try:
                return _to_json(self._packed(fields, self._packer))
            except UnicodeEncodeError:
                # Somewhere is a string that UTF-8 cannot hold: look at each.
                return _to_json(self._packed(fields, self._careful_packer))
        except _RefusedError as refused:
            raise SessionEncodeError(
                f"{_session(key)} cannot be stored: {_at(refused)}"
            ) from refused.__cause__
        except RecursionError:
            raise SessionEncodeError(f"{_session(key)} cannot be stored: {_TOO_DEEP}") from None

    def check(self, value: Any, key: str, place: object) -> None:
        """Raise SessionEncodeError, as `encode` does, if `value` could not be kept; `key` and
        `place` (in words, by `str()`: where in the session the value is) are for the message.

        >>> Codec().check({"items": [object()]}, "user:1", "cart")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        session_sync.errors.SessionEncodeError: session 'user:1' cannot keep this value:
        cart.items[0] is of type object. Kept are ...
        """
        try:
            self._packer.pack(value, 1)
        except _RefusedError as refused:
            refused.path.append(str(place))
            raise SessionEncodeError(
                f"{_session(key)} cannot keep this value: {_at(refused)}"
            ) from refused.__cause__
        except RecursionError:
            raise SessionEncodeError(f"{_session(key)} cannot be stored: {_TOO_DEEP}") from None

    def decode(self, data: bytes, key: str | None = None) -> dict[str, Any]:
        """The fields that `encode` made `data` of; `key` is for the message of an error.

        Raises `SessionDecodeError`, whatever is wrong with `data`.

        >>> Codec().decode(b'{"point":{"$tuple":[1,2]}}')
        {'point': (1, 2)}
        >>> Codec().decode(b'{"point":{"$triple":[1,2,3]}}', "user:1")
        Traceback (most recent call last):
        session_sync.errors.SessionDecodeError: session 'user:1' cannot be read: field 'point' has
        the unknown tag '$triple' (written by a newer version?). The record is left as it is.
        """
        if _may_have_tags(data):
            raws = self._split(data, key)
            return {name: self.decode_field(name, raw, key) for name, raw in raws.items()}
        try:
            return _fields_from_json(data)
        except _MALFORMED as error:
            raise _undecodable(error, key) from None

    def decode_record(self, data: bytes, key: str) -> Record:
        """The same fields as a record that decodes each at its first access, and only then.

        Raises `SessionDecodeError` if `data` is not an object in JSON; a field that does not decode
        raises it when it is accessed.

        >>> record = Codec().decode_record(b'{"a":{"$tuple":[1]},"b":{"$nonsense":0}}', "user:1")
        >>> record["a"]
        (1,)
        >>> Codec().encode(record.patched({"a": 2}))
        Traceback (most recent call last):
        session_sync.errors.SessionDecodeError: session 'user:1' cannot be read: field 'b' has the
        unknown tag '$nonsense' (written by a newer version?). The record is left as it is.
        """
        record = EncodedRecord(self._split(data, key), {}, self, key, {})
        record.size = len(data)
        return record

    def decode_field(self, name: str, raw: Raw, key: str | None) -> Any:
        """One field out of its JSON text; `name` and `key` are for the message of an error."""
        try:
            value = _from_json(raw)
            if type(value) in _LEAVES or not _may_have_tags(bytes(raw)):
                return value
            return self._unpacker.unpack(value)
        except (_MalformedError, *_MALFORMED) as error:
            raise _undecodable(error, key, name) from error.__cause__

    def _split(self, data: bytes, key: str | None) -> dict[str, Raw]:
        try:
            raws = _split_json(data)
            # To look at each of a thousand names would take as long as all the rest.
            if _FIELD_ESCAPE in "".join(raws):
                raws = {_unescaped_name(name): raw for name, raw in raws.items()}
        except (_MalformedError, *_MALFORMED) as error:
            raise _undecodable(error, key) from None
        return raws

    def _packed(self, fields: Mapping[str, Any], packer: _Packer) -> dict[str, Any]:
        packed: dict[str, Any] = {}
        changed = fields
        if isinstance(fields, EncodedRecord) and fields.codec is self:
            packed, changed = packer.names(fields.base), fields.patch
        for name, value in changed.items():
            try:
                packed[packer.name(name)] = packer.pack(value, 1)
            except _RefusedError as refused:
                refused.path.append(step(name))
                raise
        if len(packed) != len(fields):
            raise _RefusedError("two fields have the same name")
        return packed


class EncodedRecord(PatchedRecord):
    """A record whose fields are the JSON text of each, until somebody asks for them.

    The texts are parts of the one buffer that the storage read, not copies: it is kept for as long
    as the record, which is the time of one scope. What was decoded is remembered aside, so that a
    field that nobody changed is written as it was found; two threads that decode the same field at
    the same time both get the object of the first.

    Whatever is not in `patch` is the text of its field, so that to encode the record is to look at
    `patch` alone.
    """

    __slots__ = ("_decoded", "_key", "codec", "size")

    size: int  # bytes; only of one that was just read

    def __init__(
        self,
        base: dict[str, Any],
        patch: dict[str, Any],
        codec: Codec,
        key: str,
        decoded: dict[str, Any],
    ) -> None:
        self.base = base  # without super().__init__(), which every update would pay for
        self.patch = patch
        self.codec: Final = codec
        self._key = key
        self._decoded = decoded

    def patched(self, changes: Mapping[str, Any]) -> EncodedRecord:
        """This record with `changes` put over it; the other fields stay encoded."""
        return self._successor(self.base, {**self.patch, **self._checked(changes)})

    def only(self, names: Iterable[str], changes: Mapping[str, Any]) -> EncodedRecord:
        """The fields called `names`, in that order, with `changes` put over them."""
        changes = self._checked(changes)
        stored = super().__getitem__
        base = {name: changes[name] if name in changes else stored(name) for name in names}
        patch = {name: value for name, value in base.items() if type(value) is not Raw}
        return self._successor(base, patch)

    def reread(self) -> EncodedRecord:
        """This record as it was stored: what was decoded is decoded again."""
        return EncodedRecord(self.base, self.patch, self.codec, self._key, {})

    def __getitem__(self, name: str) -> Any:
        if name in self.patch:
            return self.patch[name]
        raw = self.base[name]  # first: what was decoded may have gone from this record
        if name in self._decoded:
            return self._decoded[name]
        value = self.codec.decode_field(name, raw, self._key)
        return self._decoded.setdefault(name, value)

    def _checked(self, changes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Refuse a `Raw` from outside: it would be written without a look at it."""
        for name, value in changes.items():
            if type(value) is Raw:
                where = path([step(name)])
                raise SessionEncodeError(
                    f"{_session(self._key)} cannot be stored: {where} {_refusal(value)}"
                )
        return changes

    def _successor(self, base: dict[str, Any], patch: dict[str, Any]) -> EncodedRecord:
        return EncodedRecord(base, patch, self.codec, self._key, self._decoded)


class _RefusedError(Exception):
    """A value that cannot be kept, and why. Each level that it passes adds its step to the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []


class _MalformedError(Exception):
    """What is wrong with a stored value, in words that do not contain it."""


class _Packer:
    """Makes values of what JSON has. Containers that it has all of are used as they are."""

    def __init__(self, hook: EncodeHook | None, *, careful: bool = False) -> None:
        self._hook = hook
        self._careful = careful
        self._plain = _ALWAYS_PLAIN - {str} if careful else _ALWAYS_PLAIN
        self._leaves = self._plain | _NUMBERS

    def name(self, name: object) -> str:
        """The name of a field, as the name in a JSON object."""
        if type(name) is not str:
            if not isinstance(name, str):
                raise _RefusedError("is no name for a field: it has to be a str")
            name = str.__str__(name)
        if name.startswith(_FIELD_ESCAPE):
            raise _RefusedError(f"is no name for a field: {_FIELD_ESCAPE} is reserved")
        if self._careful and _SURROGATE.search(name):
            return _FIELD_ESCAPE + _escaped(name)
        return name

    def names(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A copy of `fields`, which were stored: nothing but surrogates makes their names odd."""
        if not self._careful:
            return fields.copy()
        return {
            _FIELD_ESCAPE + _escaped(name) if _SURROGATE.search(name) else name: value
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
            if type(value) in _NUMBERS and not _MIN_INT <= value <= _MAX_INT:
                return False
        return True

    def _each(self, values: Iterable[Any], depth: int, where: str = "") -> list[Any]:
        if depth >= MAX_DEPTH:
            raise _RefusedError(_TOO_DEEP)
        plain = self._plain
        packed: list[Any] = []
        try:
            for value in values:
                item = value if type(value) in plain else self.pack(value, depth + 1)
                packed.append(item)
        except _RefusedError as refused:
            refused.path.append(where or f"[{len(packed)}]")
            raise
        return packed

    def _str(self, value: str, _depth: int) -> Any:
        return {"$str": _escaped(value)} if _SURROGATE.search(value) else value

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
        return sorted(self._each(values, depth, "{...}"), key=_to_json)

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        named = self._are_names(value)
        if named and self._all_plain(value.values()):
            return value
        if depth >= MAX_DEPTH:
            raise _RefusedError(_TOO_DEEP)
        plain = self._plain
        packed: list[Any] = []
        key: object = None
        try:
            for key, item in value.items():  # noqa: B007 - the path needs the last one
                packed.append(item if type(item) in plain else self.pack(item, depth + 1))
        except _RefusedError as refused:
            refused.path.append(step(key))
            raise
        if named:
            return dict(zip(value, packed, strict=True))
        self._distinct(value, set(map(type, value)), "keys")
        try:
            keys = self._each(value, depth)
        except _RefusedError as refused:
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
        return not (self._careful and _SURROGATE.search(together))

    def _distinct(self, values: Collection[Any], kinds: set[type], what: str) -> None:
        """Refuse two values that become the same one: an odd subclass of str, and a str."""
        if not kinds <= _PACK.keys() and len(set(map(base_value, values))) != len(values):
            raise _RefusedError(f"has {what} of a subclass that are equal once stored")

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
            name = _own_name(zone)
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
        return {"$decimal": _DECIMALS.to_sci_string(value)}

    def _uuid(self, value: UUID, _depth: int) -> Any:
        return {"$uuid": str(value)}

    def _foreign(self, value: Any, depth: int, what: str = "") -> Any:
        """A type that is not on the list: the hook's, or a subclass, or refused."""
        hooked = self._hooked(value)
        if hooked is not NotImplemented:
            return {"$type": self._each(hooked, depth, f"<{type(value).__name__}>")}
        base = base_value(value)
        if base is value:
            raise _RefusedError(_refusal(value, what))
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
            raise _RefusedError(
                f"is of type {type(value).__name__}, for which `encode` raised "
                f"{type(error).__name__}"
            ) from error
        if hooked is NotImplemented:
            return hooked
        if type(hooked) is not tuple or len(hooked) != 2 or not isinstance(hooked[0], str):
            raise _RefusedError(
                f"is of type {type(value).__name__}, for which `encode` has to return a tuple of "
                f"a name and a value, not {type(hooked).__name__}"
            )
        return hooked


_PACK: Final[dict[type, Callable[[_Packer, Any, int], Any]]] = {
    NoneType: lambda _packer, value, _depth: value,
    bool: lambda _packer, value, _depth: value,
    str: _Packer._str,
    int: _Packer._int,
    float: _Packer._float,
    bytes: _Packer._bytes,
    list: _Packer._list,
    tuple: _Packer._tuple,
    dict: _Packer._dict,
    set: _Packer._set,
    frozenset: _Packer._frozenset,
    datetime: _Packer._datetime,
    date: _Packer._date,
    time: _Packer._time,
    timedelta: _Packer._timedelta,
    Decimal: _Packer._decimal,
    UUID: _Packer._uuid,
}


class _Unpacker:
    """The way back. It takes nothing that `_Packer` would not have written.

    Whatever a constructor raises about a malformed value goes up to `Codec`, which words it.
    """

    def __init__(self, hook: DecodeHook | None) -> None:
        self._hook = hook

    def unpack(self, value: Any) -> Any:
        kind = type(value)
        if kind is list:
            return [item if type(item) in _LEAVES else self.unpack(item) for item in value]
        if kind is not dict:
            return value
        if "$" not in "".join(value) or not any(name.startswith("$") for name in value):
            return {
                name: item if type(item) in _LEAVES else self.unpack(item)
                for name, item in value.items()
            }
        if len(value) != 1:
            raise _MalformedError("mixes a tag with other names")
        ((tag, body),) = value.items()
        unpack = _UNPACK.get(tag)
        if unpack is None:
            raise _MalformedError(f"has the unknown tag {short(tag)} (written by a newer version?)")
        return unpack(self, body)

    def _str(self, body: Any) -> str:
        return _unescaped(body)

    def _int(self, body: Any) -> int:
        value = int(body, 16)
        return _same(value, format(value, "x"), body)

    def _float(self, body: Any) -> float:
        if body not in ("nan", "inf", "-inf"):
            raise _MalformedError("has a malformed float")
        # A new object each time: a set may hold more than one nan.
        return float(body)

    def _bytes(self, body: Any) -> bytes:
        return a2b_base64(_expect(str, body), strict_mode=True)

    def _list(self, body: Any) -> list[Any]:
        value: list[Any] = self.unpack(_expect(list, body))
        return value

    def _tuple(self, body: Any) -> tuple[Any, ...]:
        return tuple(self._list(body))

    def _set(self, body: Any) -> set[Any]:
        return _complete(set(self._list(body)), body)

    def _frozenset(self, body: Any) -> frozenset[Any]:
        return _complete(frozenset(self._list(body)), body)

    def _dict(self, body: Any) -> dict[Any, Any]:
        pairs = [_expect(list, pair) for pair in _expect(list, body)]
        return _complete({self.unpack(key): self.unpack(item) for key, item in pairs}, body)

    def _datetime(self, body: Any) -> datetime:
        text, zone, fold = self._with_zone(body)
        value = datetime.fromisoformat(text)
        return _same(value, value.isoformat(), text).replace(tzinfo=zone, fold=fold)

    def _time(self, body: Any) -> time:
        text, zone, fold = self._with_zone(body)
        value = time.fromisoformat(text)
        return _same(value, value.isoformat(), text).replace(tzinfo=zone, fold=fold)

    def _with_zone(self, body: Any) -> tuple[str, tzinfo | None, int]:
        parts = body if type(body) is list else [body]
        text = _expect(str, parts[0])
        name = self.unpack(parts[1]) if len(parts) > 1 else None
        fold = parts[2] if len(parts) > 2 else 0
        if len(parts) > 3 or type(fold) is not int:
            raise _MalformedError("has a malformed time")
        offset = _OFFSET.search(text)
        if offset is None:
            return text, None if name is None else _zone(_expect(str, name)), fold
        sign, *digits = offset.groups(default="0")
        hours, minutes, seconds, microseconds = map(int, digits)
        delta = timedelta(0, seconds, microseconds, 0, minutes, hours)
        delta = -delta if sign == "-" else delta
        zone = timezone(delta) if name is None else timezone(delta, _expect(str, name))
        return text[: offset.start()], zone, fold

    def _date(self, body: Any) -> date:
        value = date.fromisoformat(body)
        return _same(value, value.isoformat(), body)

    def _timedelta(self, body: Any) -> timedelta:
        days, seconds, microseconds = (_expect(int, part) for part in body)
        value = timedelta(days, seconds, microseconds)
        return _same(value, [value.days, value.seconds, value.microseconds], body)

    def _decimal(self, body: Any) -> Decimal:
        value = Decimal(_expect(str, body))
        return _same(value, _DECIMALS.to_sci_string(value), body)

    def _uuid(self, body: Any) -> UUID:
        value = UUID(body)
        return _same(value, str(value), body)

    def _type(self, body: Any) -> object:
        name, value = _expect(list, body)
        name, value = _expect(str, self.unpack(name)), self.unpack(value)
        if self._hook is None:
            raise _MalformedError("needs a Codec with a `decode` function")
        try:
            return self._hook(name, value)
        except OSError:
            raise
        except Exception as error:
            raise _MalformedError(f"made `decode` raise {type(error).__name__}") from error


_UNPACK: Final[dict[str, Callable[[_Unpacker, Any], Any]]] = {
    "$str": _Unpacker._str,
    "$int": _Unpacker._int,
    "$float": _Unpacker._float,
    "$bytes": _Unpacker._bytes,
    "$tuple": _Unpacker._tuple,
    "$set": _Unpacker._set,
    "$frozenset": _Unpacker._frozenset,
    "$dict": _Unpacker._dict,
    "$datetime": _Unpacker._datetime,
    "$date": _Unpacker._date,
    "$time": _Unpacker._time,
    "$timedelta": _Unpacker._timedelta,
    "$decimal": _Unpacker._decimal,
    "$uuid": _Unpacker._uuid,
    "$type": _Unpacker._type,
}


def _at(refused: _RefusedError) -> str:
    return f"{path(refused.path)} {refused.reason}".lstrip()


def _may_have_tags(data: bytes) -> bool:
    return b'"$' in data or b"\\u0024" in data


def _session(key: str | None) -> str:
    return "the session" if key is None else f"session {key!r}"


def _refusal(value: object, what: str = "") -> str:
    return (
        f"is of type {what or type(value).__name__}. Kept are {_KEPT}: "
        "declare the type of the field in a subclass of Session, convert the value, or pass "
        "codec=Codec(encode, decode) to the storage."
    )


def base_value(value: Any) -> Any:
    """`value`, or what it is without its subclass if that is one of str, int, float, datetime,
    date, time or timedelta."""
    if type(value) in _LEAVES or type(value) in _MOMENTS:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    for base in type(value).__mro__:
        if base in _MOMENTS:
            # As the base has them: a subclass may mean something else by these names.
            parts = {name: getattr(base, name).__get__(value) for name in _MOMENTS[base]}
            return base(**parts)
    return value


_DATE: Final = ("year", "month", "day")
_TIME: Final = ("hour", "minute", "second", "microsecond", "tzinfo", "fold")
# Taken from here, since freezegun puts its own classes into the names of modules.
_MOMENTS: Final[dict[type, tuple[str, ...]]] = {
    datetime: _DATE + _TIME,
    date: _DATE,
    time: _TIME,
    timedelta: ("days", "seconds", "microseconds"),
}


def _own_name(zone: timezone | None) -> str | None:
    """The name that somebody gave to a fixed offset."""
    if zone is None:
        return None
    name = zone.tzname(None)
    return None if name == timezone(zone.utcoffset(None)).tzname(None) else name


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except TimeoutError:  # a signal handler's
        raise
    except (*_MALFORMED, ImportError, OSError):  # it may be the name of a folder, say
        raise _MalformedError(
            f"has the time zone {short(name)}, unknown here (is the package tzdata installed?)"
        ) from None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()


def _unescaped(body: Any) -> str:
    text = _ESCAPED.sub(
        lambda found: chr(int(found[1], 16)) if found[1] else "\\", _expect(str, body)
    )
    return _same(text, _escaped(text) if _SURROGATE.search(text) else None, body)


def _unescaped_name(name: str) -> str:
    return _unescaped(name.removeprefix(_FIELD_ESCAPE)) if name.startswith(_FIELD_ESCAPE) else name


def _expect(kind: type[T], body: Any) -> T:
    if type(body) is not kind:
        raise _MalformedError(f"has a tag around something that is no {kind.__name__}")
    return body


def _same(value: T, written: object, body: object) -> T:
    """`value`, if it would be written as it was found: many constructors take more than that."""
    if written != body:
        raise _MalformedError(f"has a malformed {type(value).__name__}")
    return value


def _complete(values: C, body: list[Any]) -> C:
    if len(values) != len(body):
        raise _MalformedError(f"has a {type(values).__name__} with something in it twice")
    return values


def _undecodable(error: Exception, key: str | None, field: str | None = None) -> SessionDecodeError:
    """Words for whatever was raised: its own may contain a part of the value."""
    if isinstance(error, _MalformedError):
        cause = str(error)
    elif isinstance(error, msgspec.DecodeError):
        cause = f"is not what was written here: {error}"
    else:
        cause = f"is not what was written here ({type(error).__name__})"
    subject = "the record" if field is None else f"field {short(field)}"
    return SessionDecodeError(
        f"{_session(key)} cannot be read: {subject} {cause}. The record is left as it is."
    )
