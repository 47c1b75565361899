"""Tokens, each of one opening: made, kept for the next caller, and read out of a lock.

A lock has "<token> <saves> <since>", and a token "<number><name>@<host>:<pid>" of its process. This
module knows these texts; it knows neither servers nor records.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import secrets
import sys
import time
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

HOST: Final = re.sub(r"[^\w.-]", "-", platform.node(), flags=re.ASCII)
_LIMIT: Final = 1000  # kept tokens, before the old ones are looked for
_OLD: Final = 60.0  # seconds
_NAME: Final = 16  # characters


class Tokens:
    """Those with which this process waits, by key: a caller that asks again keeps its place.

    A signal handler or a finaliser may call this in a thread that is inside: there is no mutex,
    each step is one operation of a dict.
    """

    def __init__(self) -> None:
        name = secrets.token_hex(_NAME // 2)
        _by_name[name.encode()] = self
        self._token: Final = f"%x{name}@{HOST}:{os.getpid()}".encode()
        self._numbers: Final = itertools.count()
        self._kept: Final[dict[str, tuple[bytes, float]]] = {}

    def pop(self, key: str) -> bytes:
        """A token that nothing else uses now: the one that was kept for `key`, or a new one."""
        kept = self._kept.pop(key, None)
        return self._token % next(self._numbers) if kept is None else kept[0]

    def keep(self, key: str, token: bytes) -> None:
        """The next caller that asks for `key` gets `token`."""
        now = time.monotonic()
        tokens = self._kept
        tokens[key] = token, now
        if len(tokens) > _LIMIT:
            for other in list(tokens):
                # Nothing comes in between the look and the removal: there is no call.
                if other in tokens and tokens[other][1] < now - _OLD:
                    del tokens[other]


def maker_of(held: bytes) -> Tokens | None:
    """Which Tokens of this process, or of one that it was forked from, have made the token in a
    lock."""
    return _by_name.get(held.partition(b"@")[0][-_NAME:])


_by_name: Final[WeakValueDictionary[bytes, Tokens]] = WeakValueDictionary()


class StoredLock(NamedTuple):
    """A session that a process has open: which process (None: what holds the lock was not written
    here), for how many seconds, and how many are left of its lease (None: it never ends)."""

    key: str
    host: str | None
    pid: int | None
    seconds: float | None
    left: float | None

    @classmethod
    def read(cls, key: str, held: bytes, left: int, now: int) -> StoredLock:
        """What lies under the name of a lock; times in milliseconds."""
        rest = left / 1000 if left >= 0 else None
        # As long as no process id or time is longer, so that none of them fails to be a number.
        found = re.fullmatch(rb"\w+@([\w.-]*):(\d{1,10}) \d{1,19} (\d{1,19})", held)
        if found is None:
            return cls(key, None, None, None, rest)
        host, pid, since = found.groups()
        return cls(key, host.decode(), int(pid), (now - int(since)) / 1000, rest)

    def is_left_over(self) -> bool:
        """Whether its process is certainly gone: it ran on this machine, and does no more."""
        if self.host != HOST or self.pid is None or sys.platform == "win32":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False
