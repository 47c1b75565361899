"""Sessions in one SQLite file, by the standard library: for threads and processes on one machine.

This module knows records and their bytes; it knows no session.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal

from session_sync.errors import SessionLockTimeoutError
from session_sync.storages import files
from session_sync.storages.base import Record, StoredEntry
from session_sync.storages.codec import Codec
from session_sync.storages.connections import TIMEOUT, Connections, in_transaction
from session_sync.storages.filelocks import FileLocks
from session_sync.storages.locked_record import Found, LockedRecord
from session_sync.storages.ownership import OURS, VERSION, has_table
from session_sync.storages.rows import (
    RowStorage,
    Statements,
    fetch_all,
    key_of,
    make_private,
    refuse_row,
    stored_key,
)

_TABLE: Final = """
    CREATE TABLE IF NOT EXISTS sessions (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, expires REAL
    ) WITHOUT ROWID
"""
_INDEX: Final = """
    CREATE INDEX IF NOT EXISTS expiry ON sessions (expires) WHERE expires IS NOT NULL
"""
_LIVE: Final = "key = ? AND (expires IS NULL OR expires > ?)"
_STATEMENTS: Final = Statements(
    select=f"SELECT value, expires FROM sessions WHERE {_LIVE}",
    upsert="""
        INSERT INTO sessions VALUES (?, ?, ?)
        ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires = excluded.expires
    """,
    delete="DELETE FROM sessions WHERE key = ?",
    touch=f"UPDATE sessions SET expires = ? WHERE {_LIVE}",
    sweep="""
        DELETE FROM sessions WHERE key IN (SELECT key FROM sessions WHERE expires <= ? LIMIT 100)
    """,
)
_ROWS: Final = """
    SELECT key, typeof(key), length(CAST(value AS BLOB)), expires FROM sessions
    WHERE (expires IS NULL OR expires > ?) ORDER BY key LIMIT 1000
"""
_MORE_ROWS: Final = _ROWS.replace(
    "WHERE", "WHERE key > CASE WHEN ? THEN CAST(? AS TEXT) ELSE ? END AND"
)
_PAGE: Final = 4096  # bytes that SQLite writes at least
_PAGES: Final = 500  # written at once, until one write goes the other way and may wait
_LARGE: Final = 16 * _PAGE  # bytes of a record that is not written at once


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


class SQLiteStorage(RowStorage):
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

    _statements = _STATEMENTS
    _record_type = _OpenRecord

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
        super().__init__(ttl, codec)
        self._synchronous: Final[Literal["full", "normal", "off"]] = synchronous
        self._waits_for_disk: Final = synchronous == "full"
        self._pages = 0  # written at once since the last write that was not
        self._path: Final = _private(path)
        self.store: Final = f"sqlite:{self._path}"
        self._file = files.StoreFile(self._path)
        pragma = f"synchronous = {synchronous}"
        # To read as text what is none would raise an error with its value in the message.
        self._connections = Connections(self._file, pragma, text=bytes)
        self._prompt: Final = Connections(self._file, pragma, text=bytes, timeout=0)
        self._locks = FileLocks(f"{self._path}-locks", self._file.check)
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

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return bool(
            self._read(f"SELECT 1 FROM sessions WHERE {_LIVE}", stored_key(key), time.time())
        )

    def _row(self, key: str, data: bytes, now: float) -> tuple[object, ...]:
        return stored_key(key), data, self._end_of(now)

    def _value(self, row: Any, key: str) -> tuple[bytes, float | None]:
        value, expires = row
        if not isinstance(value, bytes):
            refuse_row(key, f"is of type {type(value).__name__}")
        return value, expires

    def _entries(self) -> Iterator[StoredEntry | None]:
        """Every row, in the order of their keys.

        Only with a `ttl`, the one with which they were stored, is it known how old they are: since
        when they were left alone.
        """
        rows = self._read(_ROWS, now := time.time())
        while rows:
            for stored, kind, size, expires in rows:
                key = key_of(stored, kind)
                left = None if expires is None else expires - now
                age = None if left is None or self._ttl is None else max(0.0, self._ttl - left)
                yield None if key is None else StoredEntry(key, size, age, left)
            stored, kind, *_ = rows[-1]
            rows = self._read(_MORE_ROWS, kind == b"text", stored, stored, now := time.time())

    def close(self) -> None:
        """Close all connections; the file alone is then the whole store, as far as nothing else
        uses it. The storage opens new ones when it is used again."""
        self._prompt.finish()
        super().close()

    # -- without waiting

    def open_nowait(self, key: str, /) -> _OpenRecord | None:
        """As `open_record`, if nothing in that has to wait; else None."""
        try:
            return _OpenRecord(self, key, self._locks.acquire(key, 0), self._load_at_once)
        except (SessionLockTimeoutError, _WouldWaitError):
            return None

    def _load_at_once(self, key: str) -> Found:
        rows = self._run_at_once(_STATEMENTS.select, stored_key(key), time.time())
        if not rows:
            return None, None
        data, expires = self._value(rows[0], key)
        if self._has_aged(expires):
            raise _WouldWaitError
        return self._codec.decode_record(data, key), len(data)

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
            self._run_at_once(_STATEMENTS.upsert, *self._row(key, data, now))
            return len(data)
        self._run_at_once(_STATEMENTS.delete, stored_key(key))
        return None

    def _run_at_once(self, statement: str, *values: object) -> list[Any]:
        try:
            return self._prompt.use(fetch_all, statement, values)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # which has several kinds
                raise
            raise _WouldWaitError from None

    # -- besides

    def _is_sweeping_due(self, now: float) -> bool:
        return self._ttl is not None and super()._is_sweeping_due(now)

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


def _private(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file that is closed to other users; made, with its folders."""
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
    make_private(real, f"{real}-locks", has_table)
    return real
