"""Sessions in one SQLite file, by the standard library: for threads and processes on one machine.

This module knows records and their bytes; it knows no session.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal

from ..errors import SessionDecodeError, SessionLockTimeoutError
from . import files
from .base import OpenRecord, Record, StoredEntry
from .codec import Codec
from .connections import (
    TIMEOUT,
    Connections,
    in_transaction,
    is_inside_transaction,
    refuse_inside_transaction,
)
from .durations import life_time
from .filelocks import FileLocks
from .locked_record import LockedRecord
from .ownership import OURS, VERSION, has_table, look

_TABLE: Final = """
    CREATE TABLE IF NOT EXISTS sessions (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, expires REAL
    ) WITHOUT ROWID
"""
_INDEX: Final = """
    CREATE INDEX IF NOT EXISTS expiry ON sessions (expires) WHERE expires IS NOT NULL
"""
_LIVE: Final = "key = ? AND (expires IS NULL OR expires > ?)"
_SELECT: Final = f"SELECT value, expires FROM sessions WHERE {_LIVE}"
_UPSERT: Final = """
    INSERT INTO sessions VALUES (?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires = excluded.expires
"""
_SWEEP: Final = """
    DELETE FROM sessions WHERE key IN (SELECT key FROM sessions WHERE expires <= ? LIMIT 100)
"""
_ROWS: Final = """
    SELECT key, typeof(key), length(CAST(value AS BLOB)), expires FROM sessions
    WHERE (expires IS NULL OR expires > ?) ORDER BY key LIMIT 1000
"""
_MORE_ROWS: Final = _ROWS.replace(
    "WHERE", "WHERE key > CASE WHEN ? THEN CAST(? AS TEXT) ELSE ? END AND"
)
_TEXT: Final = b"text"
_DELETE: Final = "DELETE FROM sessions WHERE key = ?"
_PAGE: Final = 4096  # bytes that SQLite writes at least
_PAGES: Final = 500  # written at once, until one write goes the other way and may wait
_LARGE: Final = 16 * _PAGE  # bytes of a record that is not written at once
_PAUSE: Final = 1.0  # seconds between two sweeps
_log: Final = logging.getLogger("session_sync")


class SQLiteStorage:
    """Sessions in the file `path`, one row for each: what to take on one machine.

    Any number of threads and processes on one machine may use the same file, each session open in
    one of them at a time; no file on a network share. Records that were left alone for `ttl`
    seconds (a number or a `timedelta`; None: never) disappear: a read (to the hundredth of `ttl`)
    and a write start the time anew. `codec` brings in types of your own.

    A write that has returned outlives the process, also one killed at any moment. What a power cut
    or a crash of the system can take is a choice, `synchronous`: with "full" nothing; with "normal"
    the last writes, but never a part of one, nor what was there before; with "off" the same where
    the system lives on, else perhaps the file. "full" waits for the disk at every write.

    A coroutine opens and closes a session in place where that waits for nothing: no other process
    is in the way, the record is not large, and no checkpoint is due, in which SQLite waits for the
    disk; all else, and what comes in the second after a slow call, is done in another thread.

    The table `sessions` has a key, the fields as JSON, and when the record expires, in seconds
    since 1970. The file has mode 0600, and folders are made with 0700, whatever the umask. Beside
    it lie SQLite's own `-wal` and `-shm`, and `-locks`, which holds the locks between processes. A
    symbolic link to the file names the same store. If the file is moved or replaced, processes that
    use it raise OSError (ESTALE).

    Raises ValueError if `ttl` is not positive, `synchronous` none of the three, `path` no path of a
    file (`:memory:`), or the file is a database of something else or has a second name (a hard
    link); TypeError if `ttl` is no number; PermissionError if a file belongs to another user, or a
    link is in its place; IsADirectoryError. Lets through what SQLite and the file system raise.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     storage = SQLiteStorage(f"{directory}/sessions.db", ttl=86_400)
    ...     storage.set("user:1", {"counter": 1, "seen": {7}})
    ...     storage.get("user:1"), list(storage.keys())
    ...     storage.close()
    ({'counter': 1, 'seen': {7}}, ['user:1'])
    """

    blocking: Final = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        ttl: float | timedelta | None = None,
        *,
        synchronous: Literal["full", "normal", "off"] = "normal",
        codec: Codec | None = None,
    ) -> None:
        if synchronous not in ("full", "normal", "off"):
            raise ValueError(f"synchronous must be 'full', 'normal' or 'off', not {synchronous!r}")
        self._ttl: Final = None if ttl is None else life_time(ttl)
        self._codec: Final = Codec() if codec is None else codec
        self._swept = 0.0
        self._synchronous: Final[Literal["full", "normal", "off"]] = synchronous
        self._waits_for_disk: Final = synchronous == "full"
        self._pages = 0  # written at once since the last write that was not
        self._path: Final = _private(path)
        self.store: Final = f"sqlite:{self._path}"
        self._file: Final = files.StoreFile(self._path)
        pragma = f"synchronous = {synchronous}"
        # What is no text would be named in the error of who reads it as text, with its value.
        self._connections: Final = Connections(self._file, pragma, text=bytes)
        self._prompt: Final = Connections(self._file, pragma, text=bytes, timeout=0)
        self._locks: Final = FileLocks(f"{self._path}-locks", self._file.check)
        if not self._connections.use(self._has_table):  # before a file of locks is made beside it
            handle = self._locks.acquire("$table", TIMEOUT)  # four workers may begin at once
            try:
                self._connections.use(self._make_table)
            finally:
                handle.release()

    def __reduce__(self) -> tuple[Callable[[], SQLiteStorage], tuple[()]]:
        """By its options: another process opens the same file."""
        make = partial(
            type(self),
            self._path,
            self._ttl,
            synchronous=self._synchronous,
            codec=self._codec,
        )
        return make, ()

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None.

        Raises `SessionDecodeError` if what lies there is not ours.
        """
        found = self._find(key)
        return None if found is None else self._codec.decode(_bytes(found[0], key), key)

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
        refuse_inside_transaction(self._path)
        self._run(_DELETE, stored_key(key))

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return bool(
            self._run(f"SELECT 1 FROM sessions WHERE {_LIVE}", stored_key(key), time.time())
        )

    def touch(self, key: str, /) -> None:
        """Start the life time of the record anew; no error if there is none."""
        # A signal handler that only reads loses nothing but a part of the life time, and would wait
        # for its own thread.
        if self._ttl is not None and not is_inside_transaction(self._path):
            now = time.time()
            expires = now + self._ttl
            self._run(
                f"UPDATE sessions SET expires = ? WHERE {_LIVE}", expires, stored_key(key), now
            )

    def keys(self) -> Iterator[str]:
        """Every stored key, in their order. Rows that nothing here has written, since their key is
        no text, are passed over, with a warning in the log."""
        for key, _size, _left in self._rows():
            yield key

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key, in their order, with what is known of its record; none is read or
        touched. Rows are passed over as in `keys`.

        The size is that of the fields as JSON. Only with a `ttl`, the one with which they were
        stored, is it known how old they are: since when they were left alone.
        """
        for key, size, left in self._rows():
            age = None if left is None or self._ttl is None else max(0.0, self._ttl - left)
            yield StoredEntry(key, size, age, left)

    def unknown_rows(self) -> int:
        """How many rows have a key that is no text, so that nothing here can have written them."""
        return sum(key_of(key, kind) is None for key, kind, *_ in self._all_rows())

    def _rows(self) -> Iterator[tuple[str, int, float | None]]:
        unknown = 0
        for stored, kind, size, left in self._all_rows():
            key = key_of(stored, kind)
            if key is None:
                unknown += 1
            else:
                yield key, size, left
        warn_of_unknown_rows(unknown, self._path)

    def _all_rows(self) -> Iterator[tuple[bytes, bytes, int, float | None]]:
        rows = self._run(_ROWS, now := time.time())
        while rows:
            for key, kind, size, expires in rows:
                yield key, kind, size, None if expires is None else expires - now
            key, kind, *_ = rows[-1]
            rows = self._run(_MORE_ROWS, kind == _TEXT, key, key, now := time.time())

    def close(self) -> None:
        """Close all connections; the file alone is then the whole store, as far as nobody else
        uses it. The storage opens new ones when it is used again."""
        self._prompt.finish()
        self._connections.finish()
        self._locks.close()
        self._file.forget()

    def load(self, key: str, /) -> Record | None:
        """The stored record, its life time started anew, or None."""
        found = self._find(key)
        if found is None:
            return None
        data, expires = found
        record = self._codec.decode_record(_bytes(data, key), key)
        if self._has_aged(expires):
            self.touch(key)
        return record

    def save(self, key: str, record: Record, /) -> int:
        """Store `record` whole, or raise and leave what was stored before; returns its bytes."""
        data = self._codec.encode(record, key)
        now = time.time()
        expires = None if self._ttl is None else now + self._ttl
        refuse_inside_transaction(self._path)
        self._run(_UPSERT, stored_key(key), data, expires)
        if self._is_sweeping_due(now):
            self._swept = now
            self._run(_SWEEP, now)
        return len(data)

    def open_record(self, key: str, timeout: float, /) -> _OpenRecord:
        """Open `key` when no other process has it open; raises SessionLockTimeoutError."""
        return _OpenRecord(self, key, self._locks.acquire(key, timeout))

    def open_unread(self, key: str, timeout: float, /) -> OpenRecord:
        """As `open_record`, whatever lies there: it can be removed, also if it cannot be read."""
        return _OpenRecord(self, key, self._locks.acquire(key, timeout), lambda _key: None)

    def save_all(self, records: Mapping[str, Record], opened: Mapping[str, _OpenRecord], /) -> bool:
        """Store several records, in one transaction."""
        data = {key: self._codec.encode(record, key) for key, record in records.items() if record}
        expires = None if self._ttl is None else time.time() + self._ttl
        for each in opened.values():
            each.begin_to_write()

        def write(cursor: sqlite3.Cursor) -> None:
            for key in records:
                if key in data:
                    cursor.execute(_UPSERT, (stored_key(key), data[key], expires))
                else:
                    cursor.execute(_DELETE, (stored_key(key),))

        self._connections.use(
            lambda cursor: in_transaction(cursor.connection, self._path, lambda: write(cursor))
        )
        for key, each in opened.items():
            each.has_written(len(data[key]) if key in data else None)
        return True

    # -- without waiting

    def open_nowait(self, key: str, /) -> _OpenRecord | None:
        """As `open_record`, if nothing in that has to wait; else None."""
        try:
            return _OpenRecord(self, key, self._locks.acquire(key, 0), self._load_at_once)
        except (SessionLockTimeoutError, _WouldWaitError):
            return None

    def _load_at_once(self, key: str) -> Record | None:
        rows = self._run_at_once(_SELECT, stored_key(key), time.time())
        if not rows:
            return None
        ((data, expires),) = rows
        if self._has_aged(expires):
            raise _WouldWaitError
        return self._codec.decode_record(_bytes(data, key), key)

    def save_at_once(self, key: str, record: Record, /) -> int | None:
        """As `save`, or `delete` for an empty record; raises _WouldWaitError."""
        now = time.time()
        if self._waits_for_disk or self._is_sweeping_due(now):
            raise _WouldWaitError
        data = self._codec.encode(record, key) if record else b""
        self._pages += 1 + len(data) // _PAGE
        if self._pages > _PAGES or len(data) > _LARGE:
            self._pages = 0
            raise _WouldWaitError
        if record:
            expires = None if self._ttl is None else now + self._ttl
            self._run_at_once(_UPSERT, stored_key(key), data, expires)
            return len(data)
        self._run_at_once(_DELETE, stored_key(key))
        return None

    def _run_at_once(self, statement: str, *values: object) -> list[Any]:
        try:
            return self._run(statement, *values, connections=self._prompt)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # which has several kinds
                raise
            raise _WouldWaitError from None

    # -- besides

    def _has_aged(self, expires: float | None) -> bool:
        """Whether reading starts the life time anew: a write for each would cost more than all the
        rest."""
        return self._ttl is not None and (expires or 0) < time.time() + 0.99 * self._ttl

    def _is_sweeping_due(self, now: float) -> bool:
        return self._ttl is not None and not self._swept <= now <= self._swept + _PAUSE

    def _find(self, key: str) -> tuple[object, float | None] | None:
        rows = self._run(_SELECT, stored_key(key), time.time())
        return rows[0] if rows else None

    def _run(
        self, statement: str, *values: object, connections: Connections | None = None
    ) -> list[Any]:
        return (connections or self._connections).use(
            lambda cursor: cursor.execute(statement, values).fetchall()
        )

    def _has_table(self, cursor: sqlite3.Cursor) -> bool:
        return has_table(cursor, self._path)

    def _make_table(self, cursor: sqlite3.Cursor) -> None:
        if has_table(cursor, self._path):
            return
        cursor.execute("PRAGMA journal_mode = wal")

        def make() -> None:
            for statement in (_TABLE, _INDEX):
                cursor.execute(statement)
            cursor.execute(f"PRAGMA application_id = {OURS}")
            cursor.execute(f"PRAGMA user_version = {VERSION}")

        in_transaction(cursor.connection, self._path, make)


class _WouldWaitError(Exception):
    """What was to be done at once would have to wait; nothing was done."""


class _OpenRecord(LockedRecord["SQLiteStorage"]):
    """An open record that can be closed without waiting, mostly."""

    __slots__ = ()

    def close_nowait(self, record: Record | None, /) -> bool:
        """As `close`, if nothing in that has to wait; else False."""
        try:
            if record is not None:
                self.begin_to_write()
                self.has_written(self._storage.save_at_once(self._key, record))
            self._is_closing = True
        except _WouldWaitError:
            return False
        except Exception:
            self._handle.release()
            raise
        self._handle.release()  # not after an interrupt: it will be closed once more
        return True


def warn_of_unknown_rows(number: int, path: str) -> None:
    """Log that so many rows were passed over, if there were any."""
    if number:
        _log.warning(
            "%s: rows whose key is no text were passed over: %d; session_sync has not written them",
            path,
            number,
        )


def stored_key(key: str) -> str | bytes:
    """How a key is stored: as text, or as bytes if it has halves of surrogate pairs in it."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return key.encode("utf-8", "surrogatepass")
    return key


def key_of(stored: bytes, kind: bytes) -> str | None:
    """The key that is stored so; None if none is."""
    try:
        key = stored.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return key if isinstance(stored_key(key), str) == (kind == _TEXT) else None


def _bytes(value: object, key: str) -> bytes:
    if isinstance(value, bytes):
        return value
    raise SessionDecodeError(
        f"session {key!r} cannot be read: it is of type {type(value).__name__}, which was not "
        f"written here. It is left as it is."
    )


def _private(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file that is closed to everybody else; made, with its folders."""
    name = os.fspath(path)
    if name == "" or name == ":memory:" or name.startswith("file:"):
        raise ValueError(
            f"SQLiteStorage takes the path of a file, not {name!r}; what is to be kept in memory "
            f"alone is for MemoryStorage()"
        )
    real = files.resolve(path)
    if os.path.isdir(real):
        raise IsADirectoryError(
            f"{real} is a folder; SQLiteStorage takes the path of a file in it, say "
            f"{os.path.join(real, 'sessions.db')}"
        )
    # SQLite gives new ones the mode of the file.
    beside = [real + end for end in ("-locks", "-wal", "-shm", "-journal")]
    for each in beside:
        files.check_file(each)
    if files.check_file(real):  # what is another program's keeps its modes
        look(real, partial(has_table, path=real))
    files.make_folder(os.path.dirname(real))
    files.make_file(real)
    for each in beside:
        files.close_file(each)
    return real
