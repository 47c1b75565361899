"""Sessions in a folder on disk, by diskcache: for threads and processes on one machine.

diskcache makes the file: its tables and indices, its triggers that count what is in it, and its
settings, so that its own tools read a folder of ours. What had to be overridden, and why: it is a
cache, so its defaults evict, and a folder's settings win over the program's (`_SETTINGS` gives all
of them). `Disk` pickles, unpickles whatever lies in a row, and opens and removes the file that is
named there (`_Disk` keeps bytes, and refuses the rest). `Cache` has one connection for each thread
for as long as that lives, which a fork would tear, and its transaction stays open if it is
interrupted as it begins, with which all later writes of its thread are lost; so `_Cache` is given
connections of ours. And its `get` and `set` take four statements more than ours, for files and
counters that our rows do not have, so reads and writes are those of `RowStorage`.

This module knows records and their bytes; it knows no session.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, NoReturn, TypeVar, TypeVarTuple

from session_sync.storages import files
from session_sync.storages.base import StoredEntry
from session_sync.storages.codec import Codec
from session_sync.storages.connections import Connections
from session_sync.storages.filelocks import FileLocks
from session_sync.storages.ownership import has_cache
from session_sync.storages.rows import (
    RowStorage,
    Statements,
    key_of,
    make_private,
    refuse_row,
    stored_key,
)

try:
    import diskcache as _diskcache
except ImportError as error:
    raise ImportError("DiskStorage needs diskcache: pip install 'session-sync[disk]'") from error

diskcache: Any = _diskcache  # it has no types

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_FILE: Final[str] = diskcache.core.DBNAME
_TIMEOUT: Final = 60.0  # seconds that a write waits for those of other processes

# Of a folder with anything else in it, the mode is its owner's affair: it may be /tmp.
_LOCKS: Final = "locks"
_OUR_FILES: Final = (_FILE, _LOCKS)

# All of them, since what lies in the folder wins over diskcache's defaults.
_SETTINGS: Final = {
    **diskcache.DEFAULT_SETTINGS,
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "none",
    "size_limit": 2**62,
    "cull_limit": 10,  # for other programs that write there; ours are swept
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2**11,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**62,
    "disk_pickle_protocol": 0,
}
_LIVE: Final = "key = ? AND raw = 1 AND (expire_time IS NULL OR expire_time > ?)"
_STATEMENTS: Final = Statements(
    select=f"SELECT mode, filename, value, expire_time FROM Cache WHERE {_LIVE}",
    upsert=f"""
        INSERT INTO Cache
            (key, raw, store_time, expire_time, access_time, mode, value)
            VALUES (?, 1, ?, ?, ?, {diskcache.core.MODE_RAW}, ?)
        ON CONFLICT (key, raw) DO UPDATE SET
            store_time = excluded.store_time, expire_time = excluded.expire_time,
            access_time = excluded.access_time, access_count = 0, tag = NULL, size = 0,
            mode = excluded.mode, filename = NULL, value = excluded.value
    """,
    delete="DELETE FROM Cache WHERE key = ? AND raw = 1",
    touch=f"UPDATE Cache SET expire_time = ? WHERE {_LIVE}",
    sweep="""
        DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE expire_time < ? LIMIT 100)
    """,
)
_ENTRIES: Final = """
    SELECT rowid, CAST(key AS BLOB), CASE WHEN raw = 1 THEN typeof(key) END,
        length(CAST(value AS BLOB)), store_time, expire_time
    FROM Cache
    WHERE rowid > ? AND (expire_time IS NULL OR expire_time > ?) ORDER BY rowid LIMIT 1000
"""
_KNOWN_SETTINGS: Final = _SETTINGS.keys() | diskcache.core.METADATA.keys()
_PRAGMAS: Final = ("synchronous = NORMAL", "mmap_size = 0", "cache_size = 2048")


class DiskStorage(RowStorage):
    """Sessions in the folder `directory`, one row of a SQLite file for each.

    Any number of threads and processes on one machine may use the same folder. Records that were
    left alone for `ttl` seconds (a number or a `timedelta`; None: never) disappear: a read (to the
    hundredth of `ttl`) and a write start the time anew. `codec` brings in types of your own.

    Nothing is evicted, however much is stored. No pickle is written, none is read: a row that is
    not ours raises `SessionDecodeError` with its key, and stays. A write that has returned outlives
    the process, also one killed at any moment. A power cut or a crash of the system may take the
    last writes with it, but never a part of one, and never what was there before (SQLite's WAL with
    `synchronous=NORMAL`). Files have mode 0600 and the folder 0700, whatever the umask; only a
    folder that existed and has something else in it, or belongs to another user, keeps its mode. A
    symbolic link to the folder names the same store. If the folder is moved or replaced, processes
    that use it raise OSError (ESTALE).

    Raises ValueError if `ttl` is not positive, or the file is a database of something else than
    diskcache or has a second name (a hard link); PermissionError if a file belongs to another user,
    or a link is in its place; `diskcache.Timeout` if other processes write for more than 60 seconds
    on end; and lets through what SQLite and the file system raise.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     storage = DiskStorage(directory, ttl=86_400)
    ...     storage.set("user:1", {"counter": 1, "seen": {7}})
    ...     storage.get("user:1"), list(storage.keys())
    ...     storage.close()
    ({'counter': 1, 'seen': {7}}, ['user:1'])
    """

    _statements = _STATEMENTS

    def __init__(
        self,
        directory: str | os.PathLike[str],
        ttl: float | timedelta | None = None,
        *,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(ttl, codec)
        path = _private(directory)
        self.store: Final = f"disk:{path}"
        self._file = files.StoreFile(os.path.join(path, _FILE))
        self._connections = Connections(self._file, *_PRAGMAS, timeout=_TIMEOUT)
        self._cache: Final = _Cache(path, self._connections)
        self._locks = FileLocks(os.path.join(path, _LOCKS), self._file.check)

    def __reduce__(self) -> tuple[Callable[[], DiskStorage], tuple[()]]:
        """By its options: another process opens the same folder."""
        return partial(type(self), self._cache.directory, self._ttl, codec=self._codec), ()

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return key in self._cache

    def _row(self, key: str, data: bytes, now: float) -> tuple[object, ...]:
        return stored_key(key), now, self._end_of(now), now, data

    def _value(self, row: Any, key: str) -> tuple[bytes, float | None]:
        mode, filename, value, expires = row
        if mode == diskcache.core.MODE_PICKLE:
            refuse_row(key, "is a pickle")
        if mode != diskcache.core.MODE_RAW or filename is not None:
            refuse_row(key, "is in a file")
        if not isinstance(value, bytes):
            refuse_row(key, f"is of type {type(value).__name__}")
        return value, expires

    def _entries(self) -> Iterator[StoredEntry | None]:
        """Every row, in the order in which they came in; the age is since it was last written."""
        after = 0
        while rows := self._read(_ENTRIES, after, now := time.time()):
            for _, stored, kind, size, written, expires in rows:
                key = None if kind not in ("text", "blob") else key_of(stored, kind.encode())
                left = None if expires is None else expires - now
                age = max(0.0, now - (written or now))
                yield None if key is None else StoredEntry(key, size or 0, age, left)
            after = rows[-1][0]

    def _find(self, key: str) -> tuple[bytes, float | None] | None:
        try:
            return super()._find(key)
        except sqlite3.OperationalError as error:
            if "decode to UTF-8" not in str(error):  # these words contain the value
                raise
            refuse_row(key, "is text that is not UTF-8")

    def _use(self, act: Callable[[sqlite3.Cursor, *Ts], T], *args: *Ts) -> T:
        try:
            return super()._use(act, *args)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            raise diskcache.Timeout from None  # what diskcache raises


class _Disk(diskcache.Disk):  # type: ignore[misc] # it has no types
    """What goes into a row: a key as text and a value as bytes. No pickles and no files at all.

    The columns of a row may have been written by any program: neither is a pickle loaded, nor is a
    file opened or removed whose name is found there.
    """

    def __init__(self, directory: str, **_settings: object) -> None:
        super().__init__(directory)

    def put(self, key: str) -> tuple[str | bytes, bool]:
        return stored_key(key), True

    def get(self, key: object, raw: object) -> NoReturn:
        raise NotImplementedError  # what is in a row is read by DiskStorage alone

    def store(self, value: object, _read: object, key: object = None) -> NoReturn:
        raise NotImplementedError

    def fetch(self, mode: object, filename: object, value: object, _read: object) -> NoReturn:
        raise NotImplementedError

    def remove(self, _file_path: object) -> None:
        """We write no files: the name in the row is another program's."""


class _Rows(list[Any]):
    """All rows of a statement, which has ended: no read stays open with it."""

    def fetchall(self) -> _Rows:  # as a cursor has it
        return self


class _Cache(diskcache.Cache):  # type: ignore[misc] # it has no types
    """diskcache's cache, with the connections of SQLiteStorage instead of one for each thread."""

    def __init__(self, directory: str, connections: Connections) -> None:
        self._connections: Final = connections
        super().__init__(directory, timeout=_TIMEOUT, disk=_Disk, **_SETTINGS)
        connections.use(lambda _cursor: None)  # diskcache has closed all

    @property
    def _sql(self) -> Callable[..., _Rows]:
        return self._read  # diskcache's own statements, too

    def _read(self, statement: str, values: Sequence[object] = ()) -> _Rows:
        return self._connections.use(lambda cursor: _Rows(cursor.execute(statement, values)))

    def reset(self, key: str, *value: object, **options: object) -> Any:
        """Apply a setting. One that diskcache does not have would become an attribute of it."""
        return super().reset(key, *value, **options) if key in _KNOWN_SETTINGS else None

    def close(self) -> None:
        """Close the connections."""
        self._connections.finish()


def _private(directory: str | os.PathLike[str]) -> str:
    """The absolute path of `directory`, made and closed to other users."""
    # As diskcache would do, which could otherwise open another folder than the one made here.
    path = files.resolve(os.path.expandvars(os.path.expanduser(directory)))
    database = os.path.join(path, _FILE)
    make_private(database, os.path.join(path, _LOCKS), has_cache, _make_folder)
    return path


def _make_folder(path: str) -> None:
    if not files.make_folder(path) and all(n.startswith(_OUR_FILES) for n in os.listdir(path)):
        files.close_folder(path)
