"""The record that a storage has read, whose fields are decoded one by one, when they are asked for.

This module knows which field is whose text; it does not know how a text is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from msgspec import Raw

from session_sync.errors import SessionEncodeError
from session_sync.storages.base import PatchedRecord
from session_sync.storages.codec.kinds import refusal, session_named
from session_sync.storages.places import path, step

if TYPE_CHECKING:
    from session_sync.storages.codec.codec import Codec


class EncodedRecord(PatchedRecord):
    """A record whose fields are the JSON text of each, until they are read.

    The texts are parts of the one buffer that the storage read, not copies: it is kept for as long
    as the record, which is the time of one scope. What was decoded is remembered aside, so that a
    field that was not changed is written as it was found; two threads that decode the same field at
    the same time both get the object of the first.

    Whatever is not in `patch` is the text of its field, so that to encode the record is to look at
    `patch` alone.
    """

    __slots__ = ("_decoded", "_key", "codec")

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
        patch = {**self.patch, **self._checked(changes)}
        return EncodedRecord(self.base, patch, self.codec, self._key, self._decoded)

    def only(self, names: Iterable[str], changes: Mapping[str, Any]) -> EncodedRecord:
        """The fields called `names`, in that order, with `changes` put over them."""
        changes = self._checked(changes)
        stored = super().__getitem__
        base = {name: changes[name] if name in changes else stored(name) for name in names}
        patch = {name: value for name, value in base.items() if type(value) is not Raw}
        return EncodedRecord(base, patch, self.codec, self._key, self._decoded)

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
                    f"{session_named(self._key)} cannot be stored: {where} {refusal(value)}"
                )
        return changes
