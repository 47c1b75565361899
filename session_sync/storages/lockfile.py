"""The file in which keys are locked: which bytes are whose, and what the kernel is asked for.

This module knows one open file and its bytes; it does not know how a key is waited for, nor which
handle has it here.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from io import FileIO
from os.path import samestat
from typing import Final, NamedTuple

from session_sync.storages.files import open_file, refuse_foreign

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

# struct flock, on Linux alone: how, from where, start, length, owner.
_FLOCK: Final = struct.Struct("hhqqi4x")
HAS_OFD: Final = hasattr(fcntl, "F_OFD_SETLKW")

_TEXT: Final = (
    b"Processes that use the sessions beside this file lock them here (session_sync). "
    b"Do not remove it while one of them runs.\n"
)


class LockFile(FileIO):
    """The file, opened once. It is closed when nothing refers to it any more, so that its number
    is not another file's while a handle could still unlock something by it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "r+", opener=open_file)
        self.number: Final = self.fileno()  # which takes fcntl as long to ask for as to lock
        found = os.fstat(self.number)
        refuse_foreign(path, found)
        if found.st_mode & 0o777 != 0o600:  # whatever the umask
            os.fchmod(self.number, 0o600)
        if not found.st_size:
            with suppress(OSError):  # a full disk
                self.write(_TEXT)  # so that an operator does not take it for a leftover
        self._path: Final = path
        self._found: Final = found
        #: By the place of their two bytes, the handles that alone may lock and unlock them.
        self.claims: Final[dict[int, object]] = {}
        #: The same for those of them under which something is being written.
        self.writing: Final[dict[int, object]] = {}

    def __del__(self) -> None:
        self.close()  # FileIO's own way to do it complains

    def is_in_place(self) -> bool:
        """Whether another process that opens the path gets the same file."""
        try:
            return samestat(os.lstat(self._path), self._found)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False

    def set(self, request: bytes) -> None:
        """Lock or unlock, without waiting."""
        fcntl.fcntl(self.number, fcntl.F_OFD_SETLK, request)

    def unlock(self, gate: int) -> None:
        """Let both bytes of a key go."""
        self.set(_flock(fcntl.F_UNLCK, gate, 2))

    def try_to(self, request: bytes) -> bool:
        """Lock, if that is possible at once."""
        try:
            self.set(request)
        except (BlockingIOError, PermissionError):  # which of the two, POSIX leaves open
            return False
        return True

    def wait_for(self, at: int) -> None:
        """Lock one byte, when it is free."""
        fcntl.fcntl(self.number, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, at))


def held_keys(path: str, keys: Iterable[str]) -> Iterator[str]:
    """Those of `keys` that some process has open, according to the file of locks at `path`; none
    where the system has no such locks. Nothing is locked or changed. Raises OSError."""
    if not HAS_OFD:
        return
    with open(path, "rb", buffering=0) as file:
        for key in keys:
            asked = _flock(fcntl.F_WRLCK, range_of(key).gate + 1)
            (how, *_) = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
            if how != fcntl.F_UNLCK:
                yield key


class ByteRange(NamedTuple):
    """Where the two bytes of a key are, and what the kernel is asked about them."""

    gate: int
    take: bytes  # both bytes
    take_gate: bytes
    open: bytes  # the gate
    leave: bytes  # both


@lru_cache(maxsize=1024)  # of users who write one message after the other
def range_of(key: str) -> ByteRange:
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    gate = (int.from_bytes(digest) >> 3) << 1
    return ByteRange(
        gate,
        take=_flock(fcntl.F_WRLCK, gate, 2),
        take_gate=_flock(fcntl.F_WRLCK, gate),
        open=_flock(fcntl.F_UNLCK, gate),
        leave=_flock(fcntl.F_UNLCK, gate, 2),
    )


def _flock(how: int, at: int, length: int = 1) -> bytes:
    """To lock or unlock `length` bytes (0: all that follow)."""
    return _FLOCK.pack(how, 0, at, length, 0)
