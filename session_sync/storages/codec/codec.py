"""Codec: the fields of a session as bytes, and back, with the type and value of each.

This module knows how a record is split into fields, and the words for what cannot be kept or read.
How a value is written is `pack.py`'s and `unpack.py`'s; it knows no session and no storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw

from session_sync.errors import SessionDecodeError, SessionEncodeError
from session_sync.storages.base import Record
from session_sync.storages.codec.kinds import LEAVES, TOO_DEEP, session_named
from session_sync.storages.codec.malformed import MALFORMED, MalformedError
from session_sync.storages.codec.pack import EncodeHook, Packer, RefusedError, to_json
from session_sync.storages.codec.record import EncodedRecord
from session_sync.storages.codec.strings import FIELD_ESCAPE, unescaped_name
from session_sync.storages.codec.unpack import DecodeHook, Unpacker
from session_sync.storages.places import path, short, step

_split_json = msgspec.json.Decoder(dict[str, Raw]).decode
_fields_from_json = msgspec.json.Decoder(dict[str, Any]).decode
_from_json = msgspec.json.Decoder().decode

_SMALL: Final = 500  # bytes; measured with fields of 10 to 20 bytes


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
        self._packer = Packer(encode)
        self._careful_packer = Packer(encode, careful=True)
        self._unpacker = Unpacker(decode)

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
                return to_json(self._packed(fields, self._packer))
            except UnicodeEncodeError:
                # Somewhere is a string that UTF-8 cannot hold: look at each.
                return to_json(self._packed(fields, self._careful_packer))
        except RefusedError as refused:
            raise SessionEncodeError(
                f"{session_named(key)} cannot be stored: {_at(refused)}"
            ) from refused.__cause__
        except RecursionError:
            raise SessionEncodeError(f"{session_named(key)} cannot be stored: {TOO_DEEP}") from None

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
        except RefusedError as refused:
            refused.path.append(str(place))
            raise SessionEncodeError(
                f"{session_named(key)} cannot keep this value: {_at(refused)}"
            ) from refused.__cause__
        except RecursionError:
            raise SessionEncodeError(f"{session_named(key)} cannot be stored: {TOO_DEEP}") from None

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
        if not _may_have_tags(data):
            return _plain_fields(data, key)
        raws = self._split(data, key)
        return {name: self.decode_field(name, raw, key) for name, raw in raws.items()}

    def decode_record(self, data: bytes, key: str) -> Record:
        """The same fields as a record that decodes each at its first access, and only then; or
        where they are small and flat, which JSON decodes sooner than it finds where each begins.

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
        if len(data) <= _SMALL and _is_flat(data):
            return _plain_fields(data, key)
        return EncodedRecord(self._split(data, key), {}, self, key, {})

    def decode_field(self, name: str, raw: Raw, key: str | None) -> Any:
        """One field out of its JSON text; `name` and `key` are for the message of an error."""
        try:
            value = _from_json(raw)
            if type(value) in LEAVES or not _may_have_tags(bytes(raw)):
                return value
            return self._unpacker.unpack(value)
        except (MalformedError, *MALFORMED) as error:
            raise undecodable(error, key, name) from error.__cause__

    def _split(self, data: bytes, key: str | None) -> dict[str, Raw]:
        try:
            raws = _split_json(data)
            # To look at each of a thousand names would take as long as all the rest.
            if FIELD_ESCAPE in "".join(raws):
                raws = {unescaped_name(name): raw for name, raw in raws.items()}
        except (MalformedError, *MALFORMED) as error:
            raise undecodable(error, key) from None
        return raws

    def _packed(self, fields: Mapping[str, Any], packer: Packer) -> Mapping[str, Any]:
        if fields.__class__ is dict and packer.is_json(fields):
            return fields  # as of a record that was decoded at once
        packed: dict[str, Any] = {}
        changed = fields
        if isinstance(fields, EncodedRecord) and fields.codec is self:
            packed, changed = packer.names(fields.base), fields.patch
        for name, value in changed.items():
            try:
                packed[packer.name(name)] = packer.pack(value, 1)
            except RefusedError as refused:
                refused.path.append(step(name))
                raise
        if len(packed) != len(fields):
            raise RefusedError("two fields have the same name")
        return packed


def _plain_fields(data: bytes, key: str | None) -> dict[str, Any]:
    """The fields in what has no tags."""
    try:
        return _fields_from_json(data)
    except MALFORMED as error:
        raise undecodable(error, key) from None


def _at(refused: RefusedError) -> str:
    return f"{path(refused.path)} {refused.reason}".lstrip()


def _is_flat(data: bytes) -> bool:
    """Whether there are neither tags nor containers in it, to be sure. A container would have to be
    walked over when it is written, where its text could have been kept."""
    has_containers = data.rfind(b"{") != 0 or b"[" in data
    return not has_containers and b"$" not in data and b"\\" not in data


def _may_have_tags(data: bytes) -> bool:
    return b'"$' in data or b"\\u0024" in data


def undecodable(error: Exception, key: str | None, field: str | None = None) -> SessionDecodeError:
    """Words for whatever was raised: its own may contain a part of the value."""
    if isinstance(error, MalformedError):
        cause = str(error)
    elif isinstance(error, msgspec.DecodeError):
        cause = f"is not what was written here: {error}"
    else:
        cause = f"is not what was written here ({type(error).__name__})"
    subject = "the record" if field is None else f"field {short(field)}"
    return SessionDecodeError(
        f"{session_named(key)} cannot be read: {subject} {cause}. The record is left as it is."
    )
