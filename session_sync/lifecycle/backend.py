"""A storage with all its optional abilities filled in, and the locks that go with it.

The lock table belongs to the store: two managers that are given one storage object, or two objects
of one store, exclude each other, because both get the same table. This module knows storages and
records; it knows no session.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakValueDictionary

from ..errors import SessionDecodeError
from ..locks.table import StoreLocks, after_fork
from ..storages import forks
from ..storages.base import (
    AtomicStorage,
    Check,
    CheckingStorage,
    KVStorage,
    NonBlockingStorage,
    OpenRecord,
    Record,
    RecordStorage,
    SharedStorage,
    TtlStorage,
    record_of,
)

_METHODS: Final = ("get", "set", "delete", "has")


class Backend:
    """What a scope needs of a storage.

    One that may wait for a disk or a network (`blocking`) is opened for each session: `open` gives
    an OpenRecord, after waiting for other processes if it is `shared`. One that never waits needs
    no such object: `load`, `save` (a whole record), `delete` and `unload`. The calls of a `prompt`
    one can often be done without waiting (`open_nowait`, `close_nowait`).
    """

    def __init__(self, storage: KVStorage[Any]) -> None:
        self.storage: Final = storage
        self.locks: Final = _locks_of(getattr(storage, "store", None))
        self.shared: Final = isinstance(storage, SharedStorage)
        self.blocking: Final[bool] = self.shared or getattr(storage, "blocking", True)
        way = storage if isinstance(storage, RecordStorage) else _WholeMapping(storage)
        self.load: Final = way.load
        self.unload: Final[Callable[[str], None] | None] = getattr(way, "unload", None)
        self.save: Final = way.save
        self.delete: Final = way.delete
        self._open: Final = storage.open_record if isinstance(storage, SharedStorage) else None
        self.prompt: Final = isinstance(storage, NonBlockingStorage)
        self._open_nowait: Final = (
            storage.open_nowait if isinstance(storage, NonBlockingStorage) else None
        )
        self.check: Final[Check | None] = (
            storage.check_value if isinstance(storage, CheckingStorage) else None
        )
        self._save_all: Final = storage.save_all if isinstance(storage, AtomicStorage) else None

    def open(self, full_key: str, timeout: float) -> OpenRecord:
        """Open what is stored under `full_key`; raises SessionLockTimeoutError after `timeout`
        seconds."""
        return _Alone(self, full_key) if self._open is None else self._open(full_key, timeout)

    def open_nowait(self, full_key: str) -> OpenRecord | None:
        """The same, if that can be done without waiting; else None."""
        return None if self._open_nowait is None else self._open_nowait(full_key)

    def save_all(self, records: Mapping[str, Record], opened: Mapping[str, OpenRecord]) -> bool:
        """Save several records, all or none; False if the storage cannot, and nothing was done."""
        return self._save_all is not None and self._save_all(records, opened)

    def close_nowait(self, opened: OpenRecord, record: Record | None) -> bool:
        """Close a record, if that can be done without waiting."""
        close: Callable[[Record | None], bool] | None = getattr(opened, "close_nowait", None)
        return close is not None and close(record)


class _Alone:
    """A record of a storage that knows of no other processes."""

    def __init__(self, backend: Backend, full_key: str) -> None:
        self._backend: Final = backend
        self._full_key: Final = full_key
        try:
            self.record: Final = backend.load(full_key)
        except BaseException:
            self.close(None)
            raise

    def save(self, record: Record) -> None:
        if record:
            self._backend.save(self._full_key, record)
        else:
            self._backend.delete(self._full_key)

    def close(self, record: Record | None) -> None:
        try:
            if record is not None:
                self.save(record)
        finally:
            if self._backend.unload is not None:
                self._backend.unload(self._full_key)


class _WholeMapping:
    """A storage that knows only get, set and delete, and perhaps touch."""

    def __init__(self, storage: KVStorage[Any]) -> None:
        self._storage: Final = storage
        self._touch: Final = storage.touch if isinstance(storage, TtlStorage) else None
        self.delete: Final = storage.delete

    def load(self, full_key: str) -> Record | None:
        value = self._storage.get(full_key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise SessionDecodeError(
                f"what {type(self._storage).__name__} has under {full_key!r} is not a mapping of "
                f"fields but {type(value).__name__}; it was left as it is. If another program uses "
                f"this key, give the manager a prefix."
            )
        if self._touch is not None:
            self._touch(full_key)
        return record_of(value)

    def save(self, full_key: str, record: Record) -> None:
        self._storage.set(full_key, dict(record))


_tables: WeakValueDictionary[str, StoreLocks] = WeakValueDictionary()


def _locks_of(store: str | None) -> StoreLocks:
    """The table of all storage objects of this store in the process; a new one if the storage does
    not name its store."""
    if store is None:
        return StoreLocks()
    return _tables.get(store) or _tables.setdefault(store, StoreLocks())


forks.register(after_fork)

_backends: WeakValueDictionary[int, Backend] = WeakValueDictionary()


def backend_of(storage: KVStorage[Any]) -> Backend:
    """The one backend of this storage object.

    Raises TypeError if it is a class, lacks one of the four methods, or has it as a coroutine
    function.
    """
    if isinstance(storage, type):
        raise TypeError(
            f"{storage.__name__} is a class; a manager takes an object of it: "
            f"storage={storage.__name__}(...)"
        )
    for name in _METHODS:
        method = getattr(storage, name, None)
        if not callable(method):
            raise TypeError(
                f"{type(storage).__name__} is no storage: it has no method {name}(); a storage has "
                f"{', '.join(_METHODS)}"
            )
        if inspect.iscoroutinefunction(method):
            raise TypeError(
                f"{type(storage).__name__}.{name} is an `async def`: session_sync calls storages "
                f"from threads, so it needs a synchronous method (async handlers are served "
                f"all the same, and the event loop is not blocked)"
            )
    # A backend holds its storage, so the id of a storage that has one is not given away again.
    # setdefault: two managers made at the same time get the same backend.
    return _backends.get(id(storage)) or _backends.setdefault(id(storage), Backend(storage))
