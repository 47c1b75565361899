"""Sessions in a folder on disk, by diskcache: for threads and processes on one machine.

diskcache is a cache: by default it evicts, pickles, and unpickles whatever lies in its folder. Here
it keeps everything, and bytes only. This module knows records and their bytes; it knows no session.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from session_sync.errors import SessionDecodeError
from session_sync.storages import files
from session_sync.storages.base import OpenRecord, Record, StoredEntry
from session_sync.storages.codec import Codec
from session_sync.storages.connections import (
    Connections,
    in_transaction,
    is_inside_transaction,
    refuse_inside_transaction,
)
from session_sync.storages.durations import life_time
from session_sync.storages.filelocks import FileLocks
from session_sync.storages.locked_record import LockedRecord
from session_sync.storages.ownership import has_cache, look
from session_sync.storages.sqlite import key_of, warn_of_unknown_rows

try:
    import diskcache as _diskcache
except ImportError as error:
    raise ImportError("DiskStorage needs diskcache: pip install 'session-sync[disk]'") from error

diskcache: Any = _diskcache  # it has no types

T = TypeVar("T")

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
    "cull_limit": 10,  # for others who write there; ours are swept
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2**11,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**62,
    "disk_pickle_protocol": 0,
}
# As diskcache's own get and set do it, which take four statements more: our rows have no files, and
# nothing is counted but what its triggers count.
_SELECT: Final = """
    SELECT mode, filename, value, expire_time FROM Cache
    WHERE key = ? AND raw = 1 AND (expire_time IS NULL OR expire_time > ?)
"""
_UPSERT: Final = f"""
    INSERT INTO Cache
        (key, raw, store_time, expire_time, access_time, mode, value)
        VALUES (?, 1, ?, ?, ?, {diskcache.core.MODE_RAW}, ?)
    ON CONFLICT (key, raw) DO UPDATE SET
        store_time = excluded.store_time, expire_time = excluded.expire_time,
        access_time = excluded.access_time, access_count = 0, tag = NULL, size = 0,
        mode = excluded.mode, filename = NULL, value = excluded.value
"""
_DELETE: Final = "DELETE FROM Cache WHERE key = ? AND raw = 1"
_TOUCH: Final = """
    UPDATE Cache SET expire_time = ?
    WHERE key = ? AND raw = 1 AND (expire_time IS NULL OR expire_time > ?)
"""
_SWEEP: Final = """
    DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE expire_time < ? LIMIT 100)
"""
_ENTRIES: Final = """
    SELECT rowid, CAST(key AS BLOB), CASE WHEN raw = 1 THEN typeof(key) END,
        length(CAST(value AS BLOB)), store_time, expire_time
    FROM Cache
    WHERE rowid > ? AND (expire_time IS NULL OR expire_time > ?) ORDER BY rowid LIMIT 1000
"""
_PAUSE: Final = 1.0  # seconds between two sweeps
_KNOWN_SETTINGS: Final = _SETTINGS.keys() | diskcache.core.METADATA.keys()
_PRAGMAS: Final = ("synchronous = NORMAL", "mmap_size = 0", "cache_size = 2048")


class DiskStorage:
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

    blocking: Final = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        ttl: float | timedelta | None = None,
        *,
        codec: Codec | None = None,
    ) -> None:
        self._ttl = None if ttl is None else life_time(ttl)
        self._codec = Codec() if codec is None else codec
        path = _private(directory)
        self.store: Final = f"disk:{path}"
        self._cache = _Cache(path, disk=_Disk, **_SETTINGS)
        self._locks = FileLocks(os.path.join(path, _LOCKS), self._cache.file.check)

    def __reduce__(self) -> tuple[Callable[[], DiskStorage], tuple[()]]:
        """By its options: another process opens the same folder."""
        return partial(type(self), self._cache.directory, self._ttl, codec=self._codec), ()

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None.

        Raises `SessionDecodeError` if what lies there is not ours.
        """
        found = self._find(key)
        return None if found is None else self._codec.decode(found[0], key)

    def check_value(self, value: Any, key: str, place: object, /) -> None:
        """Raise SessionEncodeError if `value` cannot be kept at this place of a session."""
        self._codec.check(value, key, place)

    def set(self, key: str, value: Mapping[str, Any], /) -> None:
        """Store `value` under `key`, in one transaction.

        Raises `SessionEncodeError` if it holds something that the codec does not keep.
        """
        self.save(key, value)

    def delete(self, key: str, /) -> None:
        """Remove `key`; no error if there is none."""
        self._cache.remove(key)

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return key in self._cache

    def touch(self, key: str, /) -> None:
        """Start the life time of the record anew; no error if there is none."""
        # As in SQLiteStorage.
        if self._ttl is not None and not is_inside_transaction(self._cache.directory):
            self._cache.start_life(key, self._ttl)

    def keys(self) -> Iterator[str]:
        """Every stored key, in the order in which they came in. Rows that nothing here has written,
        since their key is no text, are passed over, with a warning in the log."""
        for entry in self.entries():
            yield entry.key

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key with what is known of its record; none is read or touched. Rows are
        passed over as in `keys`.

        The size is that of the fields as JSON, and the age is since they were last written.
        """
        unknown = 0
        for entry in self._cache.entries():
            if entry is None:
                unknown += 1
            else:
                yield entry
        warn_of_unknown_rows(unknown, self._cache.directory)

    def close(self) -> None:
        """Close all connections. The storage opens new ones when it is used again."""
        self._cache.close()
        self._locks.close()
        self._cache.file.forget()

    def load(self, key: str, /) -> Record | None:
        """The stored record, its life time started anew, or None."""
        found = self._find(key)
        if found is None:
            return None
        data, expires = found
        record = self._codec.decode_record(data, key)
        # A write for each read would cost more than all the rest.
        if self._ttl is not None and (expires or 0) < time.time() + 0.99 * self._ttl:
            self.touch(key)
        return record

    def save(self, key: str, record: Record, /) -> int:
        """Store `record` whole, or raise and leave what was stored before; returns its bytes."""
        data = self._codec.encode(record, key)
        self._cache.write(key, data, self._ttl)
        return len(data)

    def open_record(self, key: str, timeout: float, /) -> LockedRecord[DiskStorage]:
        """Open `key` when no other process has it open; raises SessionLockTimeoutError."""
        return LockedRecord(self, key, self._locks.acquire(key, timeout))

    def open_unread(self, key: str, timeout: float, /) -> OpenRecord:
        """As `open_record`, whatever lies there: it can be removed, also if it cannot be read."""
        return LockedRecord(self, key, self._locks.acquire(key, timeout), lambda _key: None)

    def save_all(
        self, records: Mapping[str, Record], opened: Mapping[str, LockedRecord[DiskStorage]], /
    ) -> bool:
        """Store several records, in one transaction."""
        data = {key: self._codec.encode(record, key) for key, record in records.items() if record}
        for each in opened.values():
            each.begin_to_write()
        self._cache.write_all({key: data.get(key) for key in records}, self._ttl)
        for key, each in opened.items():
            each.has_written(len(data[key]) if key in data else None)
        return True

    def _find(self, key: str) -> tuple[bytes, float | None] | None:
        try:
            return self._cache.find(key)
        except (_ForeignError, sqlite3.OperationalError) as error:
            raise self._refusal(error, f"session {key!r}") from None

    def _refusal(self, error: Exception, what: str) -> Exception:
        """What to raise for `error`, which may be that `what` was not written here."""
        if isinstance(error, _ForeignError):
            cause = str(error)
        elif "decode to UTF-8" in str(error):  # these words contain the value
            cause = "is text that is not UTF-8"
        else:
            return error
        return SessionDecodeError(
            f"{what} cannot be read: it {cause}, which was not written here. It is left as it is."
        )


class _ForeignError(Exception):
    """A row that this library did not write: what it is."""


class _Disk(diskcache.Disk):  # type: ignore[misc] # it has no types
    """What goes into a row: a key as text and a value as bytes. No pickles and no files at all.

    The columns of a row may have been written by anybody: neither is a pickle loaded, nor is a file
    opened or removed whose name is found there.
    """

    def __init__(self, directory: str, **_settings: object) -> None:
        super().__init__(directory)

    def put(self, key: str) -> tuple[str | bytes, bool]:
        try:
            key.encode()
        except UnicodeEncodeError:
            return key.encode("utf-8", "surrogatepass"), True
        return key, True

    def get(self, key: object, raw: object) -> str:
        raise NotImplementedError  # the keys of rows are read by _Cache.entries() alone

    def store(
        self, value: bytes, _read: object, key: object = None
    ) -> tuple[int, int, None, bytes]:
        return 0, diskcache.core.MODE_RAW, None, value

    def fetch(self, mode: int, filename: object, value: object, _read: object) -> bytes:
        if mode == diskcache.core.MODE_PICKLE:
            raise _ForeignError("is a pickle")
        if mode != diskcache.core.MODE_RAW or filename is not None:
            raise _ForeignError("is in a file")
        if not isinstance(value, bytes):
            raise _ForeignError(f"is of type {type(value).__name__}")
        return value

    def remove(self, _file_path: object) -> None:
        """We write no files: the name in the row is somebody else's."""


class _Rows(list[Any]):
    """All rows of a statement, which has ended: no read stays open with it."""

    def fetchall(self) -> _Rows:  # as a cursor has it
        return self


class _Cache(diskcache.Cache):  # type: ignore[misc] # it has no types
    """diskcache's cache, with the connections of SQLiteStorage instead of one for each thread.

    What writes is our own, and one statement where that will do. A transaction of diskcache's that
    is interrupted as it begins stays open, and all later writes of its thread are lost with it.
    """

    def __init__(self, directory: str, **settings: object) -> None:
        self._swept = 0.0
        self.file: Final = files.StoreFile(os.path.join(directory, _FILE))
        self._connections: Final = Connections(self.file, *_PRAGMAS, timeout=_TIMEOUT)
        super().__init__(directory, timeout=_TIMEOUT, **settings)
        self._connections.use(lambda _cursor: None)  # diskcache has closed all

    @property
    def _sql(self) -> Callable[..., _Rows]:
        return self._read  # diskcache's own statements, too

    def _read(self, statement: str, values: Sequence[object] = ()) -> _Rows:
        return self._connections.use(lambda cursor: _Rows(cursor.execute(statement, values)))

    def find(self, key: str) -> tuple[bytes, float | None] | None:
        """What lies under `key`, and when it expires."""
        stored, _ = self._disk.put(key)
        rows = self._read(_SELECT, (stored, time.time()))
        if not rows:
            return None
        ((mode, filename, value, expires),) = rows
        return self._disk.fetch(mode, filename, value, False), expires

    def entries(self) -> Iterator[StoredEntry | None]:
        """What is known of each row; None for one whose key is no text."""
        after = 0
        while rows := self._read(_ENTRIES, (after, now := time.time())):
            for _, stored, kind, size, written, expires in rows:
                key = None if kind not in ("text", "blob") else key_of(stored, kind.encode())
                left = None if expires is None else expires - now
                age = max(0.0, now - (written or now))
                yield None if key is None else StoredEntry(key, size or 0, age, left)
            after = rows[-1][0]

    def write(self, key: str, value: bytes, ttl: float | None) -> None:
        """Store `value`, for `ttl` seconds, and now and then remove what has expired."""
        refuse_inside_transaction(self.directory)
        now = time.time()
        self._execute(_UPSERT, *self._row(key, value, now, ttl))
        if not self._swept <= now <= self._swept + _PAUSE:
            self._swept = now
            self._execute(_SWEEP, now)

    def write_all(self, values: Mapping[str, bytes | None], ttl: float | None) -> None:
        """Store several values, or remove what has None, in one transaction: our own, since that of
        diskcache stays open if it is interrupted as it begins, or fails as it ends."""
        now = time.time()

        def write(cursor: sqlite3.Cursor) -> None:
            for key, value in values.items():
                if value is None:
                    cursor.execute(_DELETE, (self._disk.put(key)[0],))
                else:
                    cursor.execute(_UPSERT, self._row(key, value, now, ttl))

        self._write(
            lambda cursor: in_transaction(cursor.connection, self.directory, lambda: write(cursor))
        )

    def _row(self, key: str, value: bytes, now: float, ttl: float | None) -> tuple[object, ...]:
        expires = None if ttl is None else now + ttl
        return self._disk.put(key)[0], now, expires, now, value

    def remove(self, key: str) -> None:
        """Delete what lies under `key`."""
        refuse_inside_transaction(self.directory)
        self._execute(_DELETE, self._disk.put(key)[0])

    def start_life(self, key: str, ttl: float) -> None:
        """Let what lies under `key` live for `ttl` seconds from now on."""
        now = time.time()
        self._execute(_TOUCH, now + ttl, self._disk.put(key)[0], now)

    def _execute(self, statement: str, *values: object) -> None:
        self._write(lambda cursor: cursor.execute(statement, values))

    def _write(self, write: Callable[[sqlite3.Cursor], object]) -> None:
        try:
            self._connections.use(write)
        except sqlite3.OperationalError as error:
            raise _as_timeout(error) from None

    def reset(self, key: str, *value: object, **options: object) -> Any:
        """Apply a setting. One that diskcache does not have would become an attribute of it."""
        return super().reset(key, *value, **options) if key in _KNOWN_SETTINGS else None

    def close(self) -> None:
        """Close the connections."""
        self._connections.finish()


def _as_timeout(error: sqlite3.OperationalError) -> Exception:
    """What diskcache raises, if `error` says that others have written for too long."""
    return diskcache.Timeout() if error.sqlite_errorcode == sqlite3.SQLITE_BUSY else error


def _private(directory: str | os.PathLike[str]) -> str:
    """The absolute path of `directory`, made and closed to everybody else."""
    # As diskcache would do, which could otherwise open another folder than the one made here.
    path = files.resolve(os.path.expandvars(os.path.expanduser(directory)))
    database = os.path.join(path, _FILE)
    names = (_LOCKS, f"{_FILE}-wal", f"{_FILE}-shm", f"{_FILE}-journal")
    beside = [os.path.join(path, name) for name in names]
    for each in beside:
        files.check_file(each)
    if files.check_file(database):  # what is another program's keeps its modes
        look(database, partial(has_cache, path=database))
    if not files.make_folder(path) and all(n.startswith(_OUR_FILES) for n in os.listdir(path)):
        files.close_folder(path)
    files.make_file(database)
    for each in beside:
        files.close_file(each)
    return path
