"""Sessions in a folder on disk, by diskcache: for threads and processes on one machine.

diskcache is a cache: by default it evicts, pickles, and unpickles whatever lies in its folder. Here
it keeps everything, and bytes only. This module knows records and their bytes; it knows no session.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, TypeVar

from session_sync.codec import Codec
from session_sync.errors import SessionDecodeError
from session_sync.expiry import life_time
from session_sync.storages.background import for_each
from session_sync.storages.base import OpenRecord, Record, StoredEntry
from session_sync.storages.filelocks import FileLocks, LockedRecord
from session_sync.storages.sqlite import (
    Connection,
    in_transaction,
    is_inside_transaction,
    make_file,
    refuse_inside_transaction,
)

try:
    import diskcache as _diskcache
except ImportError as error:
    raise ImportError("DiskStorage needs diskcache: pip install 'session-sync[disk]'") from error

diskcache: Any = _diskcache  # it has no types

T = TypeVar("T")

_FILE: Final[str] = diskcache.core.DBNAME
_TIMEOUT: Final = 60.0  # seconds that a write waits for those of other processes

# Of a folder with anything else in it, the mode is its owner's affair: it may be /tmp.
_OUR_FILES: Final = (_FILE, "locks")

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
    SELECT rowid, key, raw, length(CAST(value AS BLOB)), store_time, expire_time FROM Cache
    WHERE rowid > ? AND (expire_time IS NULL OR expire_time > ?) ORDER BY rowid LIMIT 1000
"""
_PAUSE: Final = 1.0  # seconds between two sweeps
_KNOWN_SETTINGS: Final = _SETTINGS.keys() | diskcache.core.METADATA.keys()
_CONNECTION_PRAGMAS: Final = ("synchronous = NORMAL", "mmap_size = 0", "cache_size = 2048")


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
    folder that existed and has something else in it keeps its mode.

    Raises ValueError if `ttl` is not positive, `diskcache.Timeout` if other processes write for
    more than 60 seconds on end, and lets through what SQLite and the file system raise. Do not fork
    while other threads are using it; a child of `os.fork()` opens connections of its own.

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
        self._cache = _Cache(path, disk=_Disk, **_SETTINGS)
        self._locks = FileLocks(os.path.join(path, "locks"))

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None.

        Raises `SessionDecodeError` if what lies there is not ours.
        """
        found = self._find(key)
        return None if found is None else self._codec.decode(found[0], key)

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
        """Every stored key, in the order in which they came in.

        Raises `SessionDecodeError` at a key that is not ours.
        """
        try:
            for key in self._cache:
                if key in self._cache:  # and has not expired
                    yield key
        except (_ForeignError, sqlite3.OperationalError) as error:
            raise self._refusal(error, f"a key in {self._cache.directory!r}") from None

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key with what is known of its record; none is read or touched.

        The size is that of the fields as JSON, and the age is since they were last written. Raises
        as `keys` does.
        """
        try:
            yield from self._cache.entries()
        except (_ForeignError, sqlite3.OperationalError) as error:
            raise self._refusal(error, f"a key in {self._cache.directory!r}") from None

    def close(self) -> None:
        """Close every thread's connection. The storage opens new ones when it is used again."""
        self._cache.close()
        self._locks.close()

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
        """Open `key` when no other process has it open; raises SessionLockTimeout."""
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
        if not raw:
            raise _ForeignError("is a pickle")
        if isinstance(key, str):
            return key
        if not isinstance(key, bytes):
            raise _ForeignError(f"is of type {type(key).__name__}")
        with suppress(UnicodeDecodeError):
            text = key.decode("utf-8", "surrogatepass")
            if self.put(text)[0] == key:
                return text
        raise _ForeignError("is of type bytes")

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
    """diskcache's cache, with the connections looked after: one for each thread, as before.

    What writes is our own, and one statement where that will do. A transaction of diskcache's that
    is interrupted as it begins stays open, and all later writes of its thread are lost with it.
    """

    def __init__(self, directory: str, **settings: object) -> None:
        self._era = 0
        self._swept = 0.0
        self._connections: weakref.WeakValueDictionary[int, Connection] = (
            weakref.WeakValueDictionary()
        )
        #: Those that no thread uses just now. Whichever takes one out may use it, or close it.
        self._free: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()
        super().__init__(directory, timeout=_TIMEOUT, **settings)
        _ = self._con  # what is wrong with the file is found now
        _caches[id(self)] = self

    @property
    def _con(self) -> Connection:
        local = self._local
        era = (os.getpid(), self._era)
        con: Connection | None = getattr(local, "con", None)
        if con is None or local.era != era:
            self._close_own()
            con = self._connect()
            local.con, local.era = con, era
        return con

    def _connect(self) -> Connection:
        # Not bound to its thread: close() runs in another one.
        con = sqlite3.connect(
            os.path.join(self.directory, _FILE),
            timeout=_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
        for pragma in _CONNECTION_PRAGMAS:
            con.execute(f"PRAGMA {pragma}")
        con.owner = threading.get_ident()
        self._connections[id(con)] = con
        self._free[id(con)] = con
        return con

    def _close_own(self) -> None:
        self._local.era = None  # first: a closed one must not be taken for an open one
        super().close()

    @property
    def _sql(self) -> Callable[..., _Rows]:
        return self._read  # diskcache's own statements, too

    def _read(self, statement: str, values: Sequence[object] = ()) -> _Rows:
        return self._use(lambda con: _Rows(con.execute(statement, values)))

    def _use(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Do `act` with this thread's connection.

        It has that alone. What comes in between, a signal handler or a finaliser, connects anew: it
        must not be undone with a transaction beneath it, nor see only what was there when a read
        beneath it began. Nor is one used again that was interrupted by an exception from outside.
        """
        local = self._local
        while True:
            con, local.con = self._con, None
            era, is_usable = local.era, False
            if self._free.pop(id(con), None) is con:
                break
            con.close()  # as close() is about to do
        try:
            result = act(con)
            is_usable = True
        except sqlite3.Error:  # SQLite has reset what it was about to do
            is_usable = not con.in_transaction
            raise
        finally:
            if is_usable and local.con is None and local.era == era:
                local.con = con
                self._free[id(con)] = con
            else:
                con.close()
        return result

    def find(self, key: str) -> tuple[bytes, float | None] | None:
        """What lies under `key`, and when it expires."""
        stored, _ = self._disk.put(key)
        rows = self._read(_SELECT, (stored, time.time()))
        if not rows:
            return None
        ((mode, filename, value, expires),) = rows
        return self._disk.fetch(mode, filename, value, False), expires

    def entries(self) -> Iterator[StoredEntry]:
        """What is known of each row."""
        after = 0
        while rows := self._read(_ENTRIES, (after, now := time.time())):
            for _, stored, raw, size, written, expires in rows:
                left = None if expires is None else expires - now
                age = max(0.0, now - written)
                yield StoredEntry(self._disk.get(stored, raw), size or 0, age, left)
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

        def write(con: sqlite3.Connection) -> None:
            for key, value in values.items():
                if value is None:
                    con.execute(_DELETE, (self._disk.put(key)[0],))
                else:
                    con.execute(_UPSERT, self._row(key, value, now, ttl))

        self._write(lambda con: in_transaction(con, self.directory, lambda: write(con)))

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
        self._write(lambda con: con.execute(statement, values))

    def _write(self, write: Callable[[sqlite3.Connection], object]) -> None:
        try:
            self._use(write)
        except sqlite3.OperationalError as error:
            raise _as_timeout(error) from None

    def reset(self, key: str, *value: object, **options: object) -> Any:
        """Apply a setting. One that diskcache does not have would become an attribute of it."""
        return super().reset(key, *value, **options) if key in _KNOWN_SETTINGS else None

    def close(self) -> None:
        """Close the connections, those in use as soon as their threads come for the next ones:
        CPython crashes where one is closed in the middle of a statement."""
        self._era += 1
        for ref in self._free.valuerefs():
            if (con := ref()) is not None and self._free.pop(id(con), None) is con:
                con.close()

    def before_fork(self) -> None:
        """Leave no connection to a child: SQLite would take the parent's locks for its own.

        diskcache closes what the child has inherited, but only in the thread that forked. Those of
        the others are then connected in name only, and lose what they write as soon as the parent
        closes the file.
        """
        me = threading.get_ident()
        for ref in self._connections.valuerefs():
            if (con := ref()) is not None and con.owner == me:
                con.close()  # also one that a transaction beneath this call has for itself
        self._close_own()

    def after_fork(self) -> None:
        """The same, if C code has forked; and whoever was writing is not in this process."""
        self._close_own()
        self._txn_id = None


def _as_timeout(error: sqlite3.OperationalError) -> Exception:
    """What diskcache raises, if `error` says that others have written for too long."""
    return diskcache.Timeout() if error.sqlite_errorcode == sqlite3.SQLITE_BUSY else error


_caches: Final[weakref.WeakValueDictionary[int, _Cache]] = weakref.WeakValueDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: for_each(_caches, _Cache.before_fork),
        after_in_child=lambda: for_each(_caches, _Cache.after_fork),
    )


def _private(directory: str | os.PathLike[str]) -> str:
    """The absolute path of `directory`, made and closed to everybody else."""
    # As diskcache would do, which could otherwise open another folder than the one made here. And
    # absolute: each thread connects when it first needs to, maybe after a chdir().
    path = os.path.expandvars(os.path.abspath(os.path.expanduser(os.fspath(directory))))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if stat.S_IMODE(os.stat(path).st_mode) & 0o077 and _is_ours(path):
            _tighten(path, 0o700)
    else:
        os.chmod(path, 0o700)
    _make_file(os.path.join(path, _FILE))
    return path


def _is_ours(path: str) -> bool:
    return all(name.startswith(_OUR_FILES) for name in os.listdir(path))


def _make_file(path: str) -> None:
    """Make the database, or close it to others: SQLite gives its mode to the files that come along.

    An existing one is never opened here, see make_file().
    """
    make_file(path)
    for name in (path, f"{path}-wal", f"{path}-shm", f"{path}-journal"):
        with suppress(FileNotFoundError):
            _tighten(name, 0o600)


def _tighten(path: str, mode: int) -> None:
    # Somebody else's: his decision.
    with suppress(PermissionError):
        os.chmod(path, mode)
