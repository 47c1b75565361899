"""The values of sessions as JSON, with nothing lost: the lines of an export, and what is typed in.

What JSON has not is written as the codec does it, `{"$tuple": [1, 2]}`. Types of a bot's own, which
a Codec with hooks has written, are kept as they are found, since the hooks are the bot's.

This module knows values and lines; it knows no store.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ...errors import SessionDecodeError
from ...session.metadata import check_metadata
from ...storages.codec import Codec


@dataclass(frozen=True)
class Own:
    """A value of a type that only the bot knows: the name that it has, and what is stored."""

    name: str
    value: Any = field(compare=False)
    text: bytes  # of `value`: it may have no hash, and yet be an element of a set


def _to_own(name: str, value: Any) -> Own:
    return Own(name, value, CODEC.encode({"": value}))


def _from_own(value: Any) -> Any:
    return (value.name, value.value) if isinstance(value, Own) else NotImplemented


#: Reads and writes whatever any codec has written.
CODEC: Final = Codec(_from_own, _to_own)


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    key: msgspec.Raw
    fields: msgspec.Raw


_read_line = msgspec.json.Decoder(_Line).decode


def to_line(key: str, fields: dict[str, Any]) -> bytes:
    r"""One line of an export.

    >>> to_line("user:1", {"seen": {7}})
    b'{"key":"user:1","fields":{"seen":{"$set":[7]}}}\n'
    """
    # The key as a value, since it may be a string that UTF-8 cannot hold.
    return b'%b,"fields":%b}\n' % (CODEC.encode({"key": key})[:-1], CODEC.encode(fields, key))


def from_line(line: bytes) -> tuple[str, dict[str, Any]]:
    """The key and the fields of a line; raises SessionDecodeError.

    >>> from_line(b'{"key":"user:1","fields":{"seen":{"$set":[7]}}}')
    ('user:1', {'seen': {7}})
    """
    try:
        parts = _read_line(line)
    except msgspec.DecodeError as error:
        raise SessionDecodeError(f"it is no line of an export: {error}") from None
    key = CODEC.decode_field("key", parts.key, None)
    if not isinstance(key, str):
        raise SessionDecodeError("it is no line of an export: the key is no string")
    fields = CODEC.decode(bytes(parts.fields), key)
    check_metadata(fields, key)
    return key, fields


def value_of(text: str) -> Any:
    """A value that was typed in as JSON; raises SessionDecodeError.

    >>> value_of('{"$set":[1]}'), value_of("1.5")
    ({1}, 1.5)
    """
    try:
        value = msgspec.json.decode(text.encode("utf-8", "surrogatepass"), type=msgspec.Raw)
    except msgspec.DecodeError as error:
        raise SessionDecodeError(f"it is no JSON ({error})") from None
    return CODEC.decode(b'{"value":%b}' % bytes(value))["value"]


def jsonable(value: Any) -> Any:
    """A value as what `json` can write, tagged.

    >>> jsonable((1, b"?"))
    {'$tuple': [1, {'$bytes': 'Pw=='}]}
    """
    return json.loads(CODEC.encode({"value": value}))["value"]


def type_name(value: Any) -> str:
    """What kind of value it is."""
    return value.name if isinstance(value, Own) else type(value).__name__
