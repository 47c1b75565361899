"""Sessions in this process's memory: as many as there are, or the most recently used ones."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Final

from cachetools import LRUCache

from session_sync.codec import Codec
from session_sync.containers import freeze
from session_sync.expiry import life_time
from session_sync.storages.base import Record, record_of

Fields = dict[str, Any]


class MemoryStorage:
    """Sessions in a dict: gone when the process ends, and shared with no other process.

    Arguments:
        ttl: how many seconds (or a timedelta) a session lives after it was last read or written;
            None: as long as the process.
        strict: refuse with SessionEncodeError what a storage that serialises would refuse, so that
            it is found on the laptop. Otherwise objects that are no plain containers are kept by
            reference: of them alone, changes are not rolled back, and are seen by others at once.
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
        self._records: dict[str, Record] = {}
        # With a ttl: when each record expires. All live equally long, so the oldest comes first.
        self._expiry: Final[OrderedDict[str, float]] = OrderedDict()
        self._mutex: Final = threading.RLock()  # for what must change together with the records

    def get(self, key: str) -> Fields | None:
        """A copy of the fields, or None."""
        record = self._find(key)
        return None if record is None else _copy(record)

    def set(self, key: str, value: Mapping[str, Any]) -> None:
        """Store a copy of `value`."""
        self.save(key, record_of(_copy(value)))

    def delete(self, key: str) -> None:
        """Remove a session; no error if there is none."""
        with self._mutex:
            self._drop(key)

    def has(self, key: str) -> bool:
        """Whether a session is stored."""
        return self._find(key) is not None

    def touch(self, key: str) -> None:
        """Start the life time of a session anew."""
        if self._ttl is not None:
            with self._mutex:
                if key in self._records:
                    self._start_life(key, self._ttl)

    def keys(self) -> Iterable[str]:
        """Every stored key."""
        self._sweep()
        return list(self._records)

    def close(self) -> None:
        """Nothing to do: what is stored stays for as long as the storage object lives."""

    # -- the scope's own door

    def load(self, key: str) -> Record | None:
        """The stored record itself: nobody changes it, so it need not be copied."""
        if self._ttl is None:
            return self._records.get(key)
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
            self._records[key] = record
            self._start_life(key, self._ttl)
            self._sweep()

    def save_all(self, records: Mapping[str, Record], _opened: Mapping[str, Any]) -> bool:
        """Store several records, all or none."""
        if self._codec is not None:
            for key, record in records.items():
                self._codec.encode(record, key)
        for key, record in records.items():
            if record:
                self.save(key, record)
            else:
                self.delete(key)
        return True

    def _find(self, key: str) -> Record | None:
        if self._ttl is not None and self._expiry.get(key, 0) <= time.monotonic():
            return None
        return self._records.get(key)

    def _start_life(self, key: str, ttl: float) -> None:
        self._expiry[key] = time.monotonic() + ttl
        self._expiry.move_to_end(key)

    def _sweep(self) -> None:
        """Remove what has expired; the longest untouched come first, so this looks no further."""
        now = time.monotonic()
        with self._mutex:
            while self._expiry and next(iter(self._expiry.values())) <= now:
                self._drop(next(iter(self._expiry)))

    def _drop(self, key: str) -> None:
        self._records.pop(key, None)
        self._expiry.pop(key, None)


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
        # A session in use stands in _in_use and not in _idle, so that it cannot be chosen to go.
        self._idle: Final = _Idle(maxsize, self._drop)
        self._in_use: Final[set[str]] = set()

    def get(self, key: str) -> Fields | None:
        """A copy of the fields, or None."""
        with self._mutex:
            self._idle.get(key)  # a read is a use
        return super().get(key)

    def touch(self, key: str) -> None:
        """Start the life time of a session anew."""
        with self._mutex:
            self._idle.get(key)
        super().touch(key)

    def load(self, key: str) -> Record | None:
        """The stored record; it stays until `unload`, however many others come."""
        with self._mutex:
            self._in_use.add(key)
            self._idle.pop(key, None)
        return super().load(key)

    def save(self, key: str, record: Record) -> None:
        """Store a record in one step."""
        super().save(key, record)
        with self._mutex:
            if key not in self._in_use:
                self._idle[key] = True

    def unload(self, key: str) -> None:
        """The session is no longer in use: it is the most recently used one now."""
        with self._mutex:
            self._in_use.discard(key)
            if key in self._records:
                self._idle[key] = True

    def _drop(self, key: str) -> None:
        super()._drop(key)
        self._idle.pop(key, None)


class _Idle(LRUCache[str, bool]):
    """The keys that nobody uses just now, in the order of their last use."""

    def __init__(self, maxsize: int, forget: Callable[[str], None]) -> None:
        super().__init__(maxsize)
        self._forget: Final = forget

    def popitem(self) -> tuple[str, bool]:  # what LRUCache calls to make room
        key, value = super().popitem()
        self._forget(key)
        return key, value


def _copy(fields: Mapping[str, Any]) -> Fields:
    """The fields with containers that nobody else has."""
    return {name: freeze(value) for name, value in fields.items()}
