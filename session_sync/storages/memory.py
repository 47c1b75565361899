"""Sessions in this process's memory: as many as there are, or the most recently used ones.

This module knows records; it knows no other process.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Final, NoReturn
from weakref import WeakValueDictionary

from cachetools import LRUCache

from session_sync.errors import SessionEncodeError
from session_sync.storages import forks
from session_sync.storages.background import for_each
from session_sync.storages.base import Record, plain, record_of
from session_sync.storages.codec import Codec
from session_sync.storages.durations import life_time

Fields = dict[str, Any]


class MemoryStorage:
    """Sessions in a dict: gone when the process ends, and shared with no other process.

    Arguments:
        ttl: how many seconds (or a timedelta) a session lives after it was last read or written;
            None: as long as the process.
        strict: refuse with SessionEncodeError what a storage that serialises would refuse, so that
            it is found on the laptop. Otherwise objects that are no plain containers are kept by
            reference: of them alone, changes are not rolled back, and are seen by others at once;
            a UserWarning names the first one.
        codec: the hooks for own types, with `strict`.

    Raises ValueError if `ttl` is not positive.

    >>> storage = MemoryStorage(ttl=3600)
    >>> storage.set("user:1", {"counter": 1})
    >>> storage.get("user:1")
    {'counter': 1}
    """

    blocking: Final = False

    def __init__(
        self,
        ttl: float | timedelta | None = None,
        *,
        strict: bool = False,
        codec: Codec | None = None,
    ) -> None:
        self._ttl: Final = None if ttl is None else life_time(ttl)
        self._codec: Final = (codec or Codec()) if strict else None
        self._has_warned = False
        # With a ttl, each with the time when it expires: both change in one step.
        self._records: dict[str, Any] = {}  # a Record; with a ttl, a _Mortal
        # With a ttl: the keys, by when their lifetime began. All live equally long, so those that
        # expire first come first. It serves to find them; whether they have, their records say.
        self._ages: Final[OrderedDict[str, None]] = OrderedDict()
        self._mutex = threading.RLock()  # for what must not be changed by two threads at once
        _all[id(self)] = self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: another process would have sessions of its "
            f"own. Give the manager a storage that processes share: SQLiteStorage(path), say"
        )

    def get(self, key: str) -> Fields | None:
        """A copy of the fields, or None."""
        record = self._find(key)
        return None if record is None else _copy(record)

    def set(self, key: str, value: Mapping[str, Any]) -> None:
        """Store a copy of `value`."""
        self.save(key, record_of(_copy(value)))

    def delete(self, key: str) -> None:
        """Remove a session; no error if there is none."""
        self._records.pop(key, None)
        self._ages.pop(key, None)

    def has(self, key: str) -> bool:
        """Whether a session is stored."""
        return self._find(key) is not None

    def touch(self, key: str) -> None:
        """Start the lifetime of a session anew."""
        if self._ttl is not None:
            with self._mutex:
                records = self._records
                found = records.get(key)
                if isinstance(found, _Mortal) and not found.has_expired():
                    anew = _Mortal(found.record, time.monotonic() + self._ttl)
                    if key in records and records[key] is found:  # see _drop()
                        records[key] = anew
                    self._note_age(key)

    def check_value(self, value: Any, key: str, place: object, /) -> None:
        """With `strict`, raise SessionEncodeError if a storage that serialises would refuse `value`
        at this place of a session; otherwise warn, once."""
        if self._codec is not None:
            self._codec.check(value, key, place)
        elif not self._has_warned:
            try:
                _CODEC.check(value, key, place)
            except SessionEncodeError as refused:
                self._has_warned = True
                warnings.warn(
                    f"in a storage that serialises (SQLite, disk, Redis): {refused} In memory the "
                    f"object itself is kept, and changes inside it are not rolled back. "
                    f"{type(self).__name__}(strict=True) refuses it here, too.",
                    stacklevel=_level_of_the_caller(),
                )

    def keys(self) -> Iterable[str]:
        """Every stored key."""
        self._sweep()
        return list(self._records)

    def close(self) -> None:
        """Nothing to do: what is stored stays for as long as the storage object lives."""

    # -- for the scope alone

    def load(self, key: str) -> Record | None:
        """The stored record itself: it is never changed, so it need not be copied."""
        if self._ttl is None:
            record: Record | None = self._records.get(key)
            return record
        record = self._find(key)
        if record is not None:
            self.touch(key)
        return record

    def save(self, key: str, record: Record) -> None:
        """Store a record in one step."""
        if self._codec is not None:
            self._codec.encode(record, key)
        if self._ttl is None:
            self._records[key] = record
            return
        with self._mutex:
            self._records[key] = _Mortal(record, time.monotonic() + self._ttl)
            self._note_age(key)
            self._sweep()

    def save_all(self, records: Mapping[str, Record], _opened: Mapping[str, Any]) -> bool:
        """Store several records, all or none."""
        if self._codec is not None:
            for key, record in records.items():
                self._codec.encode(record, key)
        before = {key: self._records.get(key) for key in records}
        try:
            for key, record in records.items():
                if record:
                    self.save(key, record)
                else:
                    self.delete(key)
        except BaseException:  # from outside: put back what was there
            for key, was in before.items():
                if was is None:
                    self.delete(key)
                else:
                    with self._mutex:
                        self._records[key] = was
                        if self._ttl is not None:
                            self._note_age(key)
            raise
        return True

    def after_fork(self) -> None:
        """In a child: the thread that had the mutex may not be in this process."""
        self._mutex = threading.RLock()

    def _find(self, key: str) -> Record | None:
        found: Any = self._records.get(key)
        if isinstance(found, _Mortal):
            found = None if found.has_expired() else found.record
        record: Record | None = found
        return record

    def _note_age(self, key: str) -> None:
        self._ages.pop(key, None)
        self._ages[key] = None

    def _sweep(self) -> None:
        """Remove what has expired; the longest untouched come first, so this looks no further."""
        with self._mutex:
            while (key := self._eldest()) is not None:
                found = self._records.get(key)
                if isinstance(found, _Mortal) and not found.has_expired():
                    return
                if found is not None:
                    self._drop(key, found)
                if key not in self._records and key in self._ages:  # see _drop()
                    del self._ages[key]

    def _eldest(self) -> str | None:
        for key in self._ages:
            return key
        return None

    def _drop(self, key: str, found: object) -> None:
        """Remove `found`, if nothing else was stored under `key` meanwhile."""
        records = self._records
        # Nothing comes in between the look and the removal: there is no call, and it is on calls
        # that CPython lets a signal handler or a finaliser run, or another thread.
        if key in records and records[key] is found:
            del records[key]


_CODEC: Final = Codec()
_PACKAGE: Final = __name__.partition(".")[0]


def _level_of_the_caller() -> int:
    """How many calls above the function that asks the first one is that is not this library's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


class _Mortal:
    """A record, and until when it lives; from time.monotonic()."""

    __slots__ = ("end", "record")

    def __init__(self, record: Record, end: float) -> None:
        self.record: Final = record
        self.end: Final = end

    def has_expired(self) -> bool:
        return self.end <= time.monotonic()


class LruMemoryStorage(MemoryStorage):
    """Sessions in memory, of which the least recently used goes when there are more than `maxsize`.

    A session in use is never the one that goes, so there may be more for as long as more are in
    use. Arguments and errors are those of MemoryStorage; `maxsize` is a number of sessions, and
    ValueError is raised if it is less than 1.

    >>> storage = LruMemoryStorage(maxsize=2)
    >>> for key in ("user:1", "user:2", "user:3"):
    ...     storage.set(key, {"counter": 1})
    >>> storage.has("user:1"), storage.has("user:3")
    (False, True)
    """

    def __init__(
        self,
        maxsize: int = 10_000,
        ttl: float | timedelta | None = None,
        *,
        strict: bool = False,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(ttl, strict=strict, codec=codec)
        if maxsize < 1:
            raise ValueError(f"maxsize must be 1 or more, not {maxsize!r}")
        self._maxsize: Final = maxsize
        self._in_use: Final[set[str]] = set()
        self._idle: _Idle | None = None  # None: it has to be made, of all that is not in use
        self._news: Final[deque[str]] = deque()  # keys that have been used or unused since
        self._is_noting = False

    def get(self, key: str) -> Fields | None:
        """A copy of the fields, or None."""
        self._note(key)  # a read is a use
        return super().get(key)

    def delete(self, key: str) -> None:
        """Remove a session; no error if there is none."""
        super().delete(key)
        self._note(key)

    def touch(self, key: str) -> None:
        """Start the lifetime of a session anew."""
        super().touch(key)
        self._note(key)

    def load(self, key: str) -> Record | None:
        """The stored record; it stays until `unload`, however many others come."""
        self._in_use.add(key)
        record = super().load(key)
        self._note(key)
        return record

    def save(self, key: str, record: Record) -> None:
        """Store a record in one step."""
        super().save(key, record)
        self._note(key)

    def unload(self, key: str) -> None:
        """The session is no longer in use: it is the most recently used one now."""
        self._in_use.discard(key)
        self._note(key)

    def after_fork(self) -> None:
        """In a child: the order of use may be half noted."""
        super().after_fork()
        self._idle = None
        self._is_noting = False

    def _drop(self, key: str, found: object) -> None:
        super()._drop(key, found)
        self._news.append(key)

    # What is stored and what is in use has changed in one step each. The order of use follows: a
    # call that comes into the middle of that leaves it to the one beneath, and after an exception
    # it is made anew, since cachetools' own books may be wrong then.

    def _note(self, key: str) -> None:
        """`key` has been used, or is not any more."""
        self._news.append(key)
        with self._mutex:
            if self._is_noting:
                return
            self._is_noting = True
            try:
                self._note_all()
            except BaseException:
                self._idle = None
                raise
            finally:
                self._is_noting = False

    def _note_all(self) -> None:
        idle = self._idle
        if idle is None:
            idle = _Idle(self._maxsize, self._evict)
            self._news.extendleft(reversed(list(self._records)))
            self._idle = idle
        while self._news:
            key = self._news.popleft()
            if key in self._records and key not in self._in_use:
                idle[key] = True  # the last one to go
            else:
                idle.pop(key, None)

    def _evict(self, key: str) -> None:
        """Forget the session that was used least recently."""
        records = self._records
        # Nothing comes in between, see _drop(); and what is news was used in between.
        if key in records and key not in self._in_use and key not in self._news:
            del records[key]
        if key not in records and key in self._ages:
            del self._ages[key]


class _Idle(LRUCache[str, bool]):
    """The keys that are not in use just now, in the order of their last use."""

    def __init__(self, maxsize: int, forget: Callable[[str], None]) -> None:
        super().__init__(maxsize)
        self._forget: Final = forget

    def popitem(self) -> tuple[str, bool]:  # what LRUCache calls when it is full
        key, value = super().popitem()
        self._forget(key)
        return key, value


def _copy(fields: Mapping[str, Any]) -> Fields:
    """The fields with containers that no other value has."""
    return {name: plain(value) for name, value in fields.items()}


_all: Final[WeakValueDictionary[int, MemoryStorage]] = WeakValueDictionary()

forks.register(lambda: for_each(_all, MemoryStorage.after_fork))
