"""A record that is open in one process at a time, in a storage that knows nothing of locks.

This module knows the lock of a key, and when the record is written; it does not know how either is
done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from session_sync.storages.base import Record
from session_sync.storages.filelocks import FileLockHandle


class _Store(Protocol):
    def save(self, key: str, record: Record, /) -> int | None: ...
    def delete(self, key: str, /) -> None: ...


Store = TypeVar("Store", bound=_Store)

#: What is stored, and how many bytes it takes; (None, None): nothing is.
Found: TypeAlias = tuple[Record | None, int | None]


class LockedRecord(Generic[Store]):
    """An OpenRecord (see base.py) of a storage that can save and delete; `handle` keeps other
    processes away meanwhile, from before `read` on."""

    __slots__ = ("_handle", "_is_closing", "_key", "_storage", "record", "size")

    record: Record | None
    size: int | None  # bytes

    def __init__(
        self,
        storage: Store,
        key: str,
        handle: FileLockHandle,
        read: Callable[[str], Found],
    ) -> None:
        try:
            self._storage: Final = storage
            self._key: Final = key
            self._handle: Final = handle
            self._is_closing = False  # the last record is stored
            self.record, self.size = read(key)
        except BaseException:
            handle.release()
            raise

    def begin_to_write(self) -> None:
        """Raises SessionConflictError if another process may have opened it; else none can before
        `has_written`."""
        self._handle.begin_to_write()

    def has_written(self, size: int | None) -> None:
        """So many bytes are stored."""
        self._handle.has_written()
        self.size = size

    def save(self, record: Record, /) -> None:
        """Store `record`, or remove what is stored if it is empty."""
        self._handle.begin_to_write()
        if record:
            self.has_written(self._storage.save(self._key, record))
        else:
            self._storage.delete(self._key)
            self.has_written(None)

    def close(self, record: Record | None, /) -> None:
        """Store `record` unless it is None, and let other processes in."""
        try:
            if record is not None and not self._is_closing:
                self.save(record)
            self._is_closing = True
        except Exception:
            self._handle.release()
            raise
        self._handle.release()  # not after an interrupt: it will be closed once more
