"""Locks by key between the processes of one machine, all of them in one file that stays empty.

The kernel keeps them, so they fall with their owner, however it dies. This module knows keys and
records; it does not know how they are stored.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from ..errors import SessionConflictError, SessionLockTimeout
from .base import Record

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

# struct flock, on Linux alone: how, from where, start, length, owner.
_FLOCK: Final = struct.Struct("hhqqi4x")
_HAS_OFD: Final = hasattr(fcntl, "F_OFD_SETLKW")


class FileLocks:
    """What keeps a key open in one process at a time.

    Each key has two bytes in the file, at a place that its hash says (of 2**61, so two keys never
    meet): a gate and the key itself. Who wants the key locks the gate, then the key (both at once
    if both are free), and opens the gate again. So at most one stands between gate and key, and it
    gets the key as soon as it is free: nobody who comes later, nor the old owner who comes back at
    once, can be faster. At the gate they race, one for each time that the key is handed on. With
    the key's byte alone, eight processes that held it for 10 ms had from 33 to 52 turns in three
    seconds; with the gate, from 37 to 39.

    The locks are open file description locks: they belong to this object, not to a thread, and not
    to a process, as POSIX's other ones do, which would fall when somebody closes the same file.
    They cannot be waited for with a time-out, so a thread waits, and whoever has asked waits for
    the thread. When he gives up, the thread stays where it is: it keeps the place for the next one
    in this process who asks for the key, or lets the lock go when it gets it and nobody has asked
    again. The description is closed in a forked child, which would otherwise keep the parent's
    locks, and a lock that was taken before the fork is worth nothing there (`Grip.check`).

    Where Python offers no such locks (macOS, Windows), other processes are not kept out, and a
    RuntimeWarning says so.
    """

    def __init__(self, path: str) -> None:
        self._path: Final = path
        self._mutex = threading.Lock()
        self._file: int | None = None
        self._waits: dict[str, _Wait] = {}
        self.era = 0  # ends with close() and with a fork; what was locked before is lost then
        _all[id(self)] = self
        if not _HAS_OFD:
            warnings.warn(
                f"{path}: on this system sessions are not locked between processes; let one "
                f"process alone use this store, or take RedisStorage",
                RuntimeWarning,
                stacklevel=3,
            )

    def acquire(self, key: str, timeout: float) -> Grip:
        """Take `key`, waiting at most `timeout` seconds (0: not at all).

        Within one object the same key must not be asked for twice at the same time. Raises
        SessionLockTimeout.
        """
        if not _HAS_OFD:
            return Grip(self, key, None, self.era)
        place = _place_of(key)
        with self._mutex:
            if self._file is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
            wait = self._waits.get(key)
            if wait is None:
                if _try(self._file, place):
                    return Grip(self, key, place, self.era)
                if not timeout:
                    raise SessionLockTimeout("another process has it")
                wait = self._waits[key] = _Wait(self, key, place, self._file)
            wait.wanted = True
        try:
            wait.done.wait(timeout)
        finally:  # an interrupt may come, too
            with self._mutex:
                wait.wanted = False
                done = wait.done.is_set()
                if done:
                    self._waits.pop(key, None)
        if not done:
            raise SessionLockTimeout("another process has it")
        if wait.error is not None:
            raise wait.error
        return Grip(self, key, place, wait.era)

    def given(self, wait: _Wait) -> None:
        """A waiting thread has its key: whoever wants it takes it now, or else it goes."""
        with self._mutex:
            wait.done.set()
            if not wait.wanted:
                self._waits.pop(wait.key, None)
                if wait.error is None and wait.era == self.era:
                    self.release(wait.place)

    def release(self, place: _Place) -> None:
        """Let the key at `place` go."""
        if self._file is not None:
            _set(self._file, place.leave)

    def close(self) -> None:
        """Let all go."""
        with self._mutex:
            if self._file is not None:
                # All bytes: a thread that waits has the same description open once more.
                _set(self._file, _flock(fcntl.F_UNLCK, 0, 0))
            self._leave()

    def after_fork(self) -> None:
        """In a child: nothing of the parent's is ours, nor does any other thread live on."""
        self._mutex = threading.Lock()
        for wait in self._waits.values():
            os.close(wait.file)
        self._leave()  # which unlocks nothing: the parent has the same description

    def _leave(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._waits = {}
        self.era += 1


class Grip:
    """A key that this process has."""

    __slots__ = ("_era", "_key", "_locks", "_place")

    def __init__(self, locks: FileLocks, key: str, place: _Place | None, era: int) -> None:
        self._locks: Final = locks
        self._key: Final = key
        self._place = place  # None: where nobody is kept out, and once it was let go
        self._era: Final = era

    def check(self) -> None:
        """Raises SessionConflictError if the key is not ours any more."""
        if self._locks.era != self._era:
            raise SessionConflictError(
                f"session {self._key!r} was opened before its storage was closed, or before this "
                f"process was forked: another process may have it now, so nothing was written. "
                f"Open it again."
            )

    def release(self) -> None:
        """Let the key go; once, since it may soon be somebody else's of this process."""
        place, self._place = self._place, None
        if place is not None and self._locks.era == self._era:
            self._locks.release(place)


class _Store(Protocol):
    def load(self, key: str, /) -> Record | None: ...
    def save(self, key: str, record: Record, /) -> int | None: ...
    def delete(self, key: str, /) -> None: ...


Store = TypeVar("Store", bound=_Store)


class LockedRecord(Generic[Store]):
    """An OpenRecord (see base.py) of a storage that can load, save and delete; `grip` keeps other
    processes away meanwhile."""

    __slots__ = ("_grip", "_key", "_storage", "record", "size")

    def __init__(
        self,
        storage: Store,
        key: str,
        grip: Grip,
        load: Callable[[str], Record | None] | None = None,
    ) -> None:
        self._storage: Final = storage
        self._key: Final = key
        self._grip: Final = grip
        self.size: int | None = None  # bytes that were written last
        try:
            self.record: Final = storage.load(key) if load is None else load(key)
        except BaseException:
            grip.release()
            raise

    def check(self) -> None:
        """Raises SessionConflictError if another process may have opened it."""
        self._grip.check()

    def save(self, record: Record, /) -> None:
        """Store `record`, or remove what is stored if it is empty."""
        self.check()
        if record:
            self.size = self._storage.save(self._key, record)
        else:
            self.size = None
            self._storage.delete(self._key)

    def close(self, record: Record | None, /) -> None:
        """Store `record` unless it is None, and let other processes in."""
        try:
            if record is not None:
                self.save(record)
        finally:
            self._grip.release()


class _Wait:
    """A thread that waits for one key, for whoever in this process wants it."""

    def __init__(self, locks: FileLocks, key: str, place: _Place, file: int) -> None:
        self._locks: Final = locks
        # Of its own: the number of a closed file is soon that of another one.
        self.file: Final = os.dup(file)
        self.key: Final = key
        self.place: Final = place
        self.era: Final = locks.era
        self.wanted = True
        self.done: Final = threading.Event()
        self.error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name=f"wait for {key}").start()

    def _run(self) -> None:
        try:
            _wait_for(self.file, self.place.gate)
            try:
                _wait_for(self.file, self.place.gate + 1)
            finally:
                _set(self.file, self.place.open)
        except BaseException as error:
            self.error = error
        self._locks.given(self)
        os.close(self.file)


class _Place(NamedTuple):
    """Where the two bytes of a key are, and what the kernel is asked about them."""

    gate: int
    take: bytes  # both bytes
    open: bytes  # the gate
    leave: bytes  # the key


@lru_cache(maxsize=1024)  # of users who write one message after the other
def _place_of(key: str) -> _Place:
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    gate = (int.from_bytes(digest) >> 3) << 1
    return _Place(
        gate,
        take=_flock(fcntl.F_WRLCK, gate, 2),
        open=_flock(fcntl.F_UNLCK, gate),
        leave=_flock(fcntl.F_UNLCK, gate + 1),
    )


def _flock(how: int, at: int, length: int = 1) -> bytes:
    """To lock or unlock `length` bytes (0: all that follow)."""
    return _FLOCK.pack(how, 0, at, length, 0)


def _try(file: int, place: _Place) -> bool:
    """Take the key at `place`, if that is possible at once."""
    try:
        _set(file, place.take)  # both or none
    except (BlockingIOError, PermissionError):  # which of the two, POSIX leaves open
        return False
    _set(file, place.open)
    return True


def _set(file: int, request: bytes) -> None:
    """Lock or unlock, without waiting."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)


def _wait_for(file: int, at: int) -> None:
    """Lock one byte, when it is free."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, at))


_all: Final[weakref.WeakValueDictionary[int, FileLocks]] = weakref.WeakValueDictionary()


def _after_fork() -> None:
    for reference in _all.valuerefs():
        if (locks := reference()) is not None:
            locks.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
