"""The Lua scripts that a Redis server runs, each as one step, and how they are asked for.

Their texts are in scripts/*.lua. This module knows texts and requests; it knows no connection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final, Protocol

from .connections import packed

#: Seconds for which a waiter blocks at most; then it shows that it is still there.
LONGEST_BLOCK: Final = 1.0
_OFFER: Final = 500  # milliseconds in which a waiter has to take the session that is kept for it
_GRACE: Final = 0.5  # seconds between two calls in which a waiter keeps its place
_REMEMBERED: Final = 10.0  # seconds, or a lease if it is longer: how a close has ended
_KEYS: Final = 5  # of each script; see common.lua


def _text(name: str) -> str:
    return files("session_sync.storages.redis").joinpath(f"scripts/{name}.lua").read_text("utf-8")


_COMMON: Final = _text("common")
_OPEN: Final = _text("open")
_SAVE: Final = _text("save")
_CLOSE: Final = _text("close")
#: These are sent whole.
SAVE_ALL: Final = _text("save_all")
RENEW: Final = _text("renew")


class Opening(Protocol):
    """What a script is told of an opening of a session: `packed` are its names and its token as
    they are sent."""

    @property
    def key(self) -> str: ...
    @property
    def token(self) -> bytes: ...
    @property
    def names(self) -> Sequence[bytes]: ...
    @property
    def packed(self) -> bytes: ...


class Scripts:
    """Those of one storage, whose options, the same for every call, are part of their texts."""

    def __init__(self, lease: int, ttl: int) -> None:
        """Both in milliseconds."""
        options = {
            "lease": lease,
            "ttl": ttl,
            "offered": min(_OFFER, lease),
            "kept": milliseconds(2 * (LONGEST_BLOCK + _GRACE)),
            "remembered": max(lease, milliseconds(_REMEMBERED)),
        }
        names, numbers = ", ".join(options), ", ".join(f"'{number}'" for number in options.values())
        before = f"local {names} = {numbers}\n{_COMMON}"
        self.open: Final = Script(before + _OPEN)
        self.save: Final = Script(before + _SAVE)
        self.close: Final = Script(before + _CLOSE)


class Script:
    """A script that is called by its digest, or by its text where the server does not know it."""

    def __init__(self, text: str) -> None:
        self._text: Final = text
        self._digest: Final = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._by_digest: Final = packed(b"EVALSHA", self._digest.encode(), b"%d" % _KEYS)
        self._by_text: Final = packed(b"EVAL", text.encode(), b"%d" % _KEYS)

    def request(self, opening: Opening, *values: bytes, by_text: bool = False) -> bytes:
        """What is sent to ask for it; `values` are the ARGV after the token."""
        how = self._by_text if by_text else self._by_digest
        size = b"*%d\r\n" % (4 + _KEYS + len(values))
        return size + how + opening.packed + packed(*values)

    def command(self, opening: Opening, *values: bytes, by_text: bool = False) -> list[Any]:
        """The same as redis-py is told it: a command and its arguments."""
        how = ("EVAL", self._text) if by_text else ("EVALSHA", self._digest)
        return [*how, _KEYS, *opening.names, opening.token, *values]


def place_for(seconds: float) -> bytes:
    """For how many milliseconds a waiter that waits for `seconds` keeps its place in the queue."""
    return b"%d" % milliseconds(seconds + _GRACE)


def milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
