"""Sessions as rows of a SQLite file: what the storages have in common that keep them so.

This module knows keys, bytes and lifetimes; it does not know what the table looks like.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Final, NamedTuple, NoReturn, TypeVar, TypeVarTuple

from session_sync.errors import SessionDecodeError
from session_sync.storages import files
from session_sync.storages.base import Record, StoredEntry
from session_sync.storages.codec import Codec
from session_sync.storages.connections import (
    Connections,
    in_transaction,
    is_inside_transaction,
    refuse_inside_transaction,
)
from session_sync.storages.durations import life_time
from session_sync.storages.filelocks import FileLocks
from session_sync.storages.locked_record import Found, LockedRecord
from session_sync.storages.ownership import look

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_PAUSE: Final = 1.0  # seconds between two sweeps
_log: Final = logging.getLogger("session_sync")


class Statements(NamedTuple):
    """The SQL of a table, and what it takes."""

    select: str  # a key, and the time now; see RowStorage._value
    upsert: str  # see RowStorage._row
    delete: str  # a key
    touch: str  # when the record expires, its key, and the time now
    sweep: str  # the time now


class RowStorage:
    """A storage that has a row for each session, and locks them in a file beside.

    A subclass has the statements, and says what is in a row.
    """

    blocking: Final = True
    _statements: ClassVar[Statements]
    _record_type: ClassVar[type[LockedRecord[Any]]] = LockedRecord

    # A subclass makes these when `ttl` has been looked at: the last ones make files.
    _file: files.StoreFile
    _connections: Connections
    _locks: FileLocks

    def __init__(self, ttl: float | timedelta | None, codec: Codec | None) -> None:
        self._ttl: Final = None if ttl is None else life_time(ttl)
        self._codec: Final = Codec() if codec is None else codec
        self._swept = 0.0

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
        refuse_inside_transaction(self._file.path)
        self._write(self._statements.delete, stored_key(key))

    def touch(self, key: str, /) -> None:
        """Start the lifetime of the record anew; no error if there is none."""
        # A signal handler that only reads loses nothing but a part of the lifetime, and would wait
        # for its own thread.
        if self._ttl is not None and not is_inside_transaction(self._file.path):
            now = time.time()
            self._write(self._statements.touch, now + self._ttl, stored_key(key), now)

    def keys(self) -> Iterator[str]:
        """Every stored key. Rows that nothing here has written, since their key is no text, are
        passed over, with a warning in the log."""
        for entry in self.entries():
            yield entry.key

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key with what is known of its record; none is read or touched. Rows are
        passed over as in `keys`.

        The size is that of the fields as JSON.
        """
        unknown = 0
        for entry in self._entries():
            if entry is None:
                unknown += 1
            else:
                yield entry
        warn_of_unknown_rows(unknown, self._file.path)

    def unknown_rows(self) -> int:
        """How many rows have a key that is no text, so that nothing here can have written them."""
        return sum(entry is None for entry in self._entries())

    def close(self) -> None:
        """Close all connections; the file alone is then the whole store, as far as nothing else
        uses it. The storage opens new ones when it is used again."""
        self._connections.finish()
        self._locks.close()
        self._file.forget()

    def load(self, key: str, /) -> Record | None:
        """The stored record, its lifetime started anew, or None."""
        return self._load(key)[0]

    def save(self, key: str, record: Record, /) -> int:
        """Store `record` whole, or raise and leave what was stored before; returns its bytes."""
        data = self._codec.encode(record, key)
        now = time.time()
        refuse_inside_transaction(self._file.path)
        self._write(self._statements.upsert, *self._row(key, data, now))
        if self._is_sweeping_due(now):
            self._swept = now
            self._write(self._statements.sweep, now)
        return len(data)

    def open_record(self, key: str, timeout: float, /) -> LockedRecord[Any]:
        """Open `key` when no other process has it open; raises SessionLockTimeoutError."""
        return self._record_type(self, key, self._locks.acquire(key, timeout), self._load)

    def open_unread(self, key: str, timeout: float, /) -> LockedRecord[Any]:
        """As `open_record`, whatever lies there: it can be removed, also if it cannot be read."""
        handle = self._locks.acquire(key, timeout)
        return self._record_type(self, key, handle, lambda _key: (None, None))

    def save_all(
        self, records: Mapping[str, Record], opened: Mapping[str, LockedRecord[Any]], /
    ) -> bool:
        """Store several records, in one transaction."""
        data = {key: self._codec.encode(record, key) for key, record in records.items() if record}
        now = time.time()
        for each in opened.values():
            each.begin_to_write()

        def write(cursor: sqlite3.Cursor) -> None:
            for key in records:
                if key in data:
                    cursor.execute(self._statements.upsert, self._row(key, data[key], now))
                else:
                    cursor.execute(self._statements.delete, (stored_key(key),))

        self._use(
            lambda cursor: in_transaction(cursor.connection, self._file.path, lambda: write(cursor))
        )
        for key, each in opened.items():
            each.has_written(len(data[key]) if key in data else None)
        return True

    # -- what a table decides

    def _row(self, key: str, data: bytes, now: float) -> tuple[object, ...]:
        """What `Statements.upsert` takes."""
        raise NotImplementedError

    def _value(self, row: Any, key: str) -> tuple[bytes, float | None]:
        """The fields in a row of `Statements.select`, and when they expire."""
        raise NotImplementedError

    def _entries(self) -> Iterator[StoredEntry | None]:
        """What is known of each row; None for one whose key is no text."""
        raise NotImplementedError

    def _use(self, act: Callable[[sqlite3.Cursor, *Ts], T], *args: *Ts) -> T:
        return self._connections.use(act, *args)

    # -- besides

    def _load(self, key: str) -> Found:
        found = self._find(key)
        if found is None:
            return None, None
        data, expires = found
        record = self._codec.decode_record(data, key)
        if self._has_aged(expires):
            self.touch(key)
        return record, len(data)

    def _find(self, key: str) -> tuple[bytes, float | None] | None:
        rows = self._read(self._statements.select, stored_key(key), time.time())
        return self._value(rows[0], key) if rows else None

    def _read(self, statement: str, *values: object) -> list[Any]:
        return self._connections.use(fetch_all, statement, values)

    def _write(self, statement: str, *values: object) -> None:
        self._use(sqlite3.Cursor.execute, statement, values)

    def _end_of(self, now: float) -> float | None:
        """When a record expires that is used now."""
        return None if self._ttl is None else now + self._ttl

    def _has_aged(self, expires: float | None) -> bool:
        """Whether reading starts the lifetime anew: a write for each would cost more than all the
        rest."""
        return self._ttl is not None and (expires or 0) < time.time() + 0.99 * self._ttl

    def _is_sweeping_due(self, now: float) -> bool:
        return not self._swept <= now <= self._swept + _PAUSE


def fetch_all(cursor: sqlite3.Cursor, statement: str, values: Sequence[object]) -> list[Any]:
    """All rows of a statement."""
    return cursor.execute(statement, values).fetchall()


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
    """The key that is stored so, as a value of which SQLite's type is `kind`; None if none is."""
    try:
        key = stored.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return key if isinstance(stored_key(key), str) == (kind == b"text") else None


def refuse_row(key: str, cause: str) -> NoReturn:
    """Raise SessionDecodeError: what lies under `key` was not written here; `cause` is a part of a
    sentence."""
    raise SessionDecodeError(
        f"session {key!r} cannot be read: it {cause}, which was not written here. It is left as it "
        f"is."
    ) from None


def make_private(
    path: str,
    locks: str,
    check: Callable[[sqlite3.Cursor, str], object],
    make_folder: Callable[[str], object] = files.make_folder,
) -> None:
    """Make the files of a store, closed to other users: the database and, as far as they are
    there, its locks and SQLite's own.

    Raises what `check` raises about a database that another program may have made; nothing is
    changed then.
    """
    # SQLite gives new ones the mode of the file.
    beside = [locks, *(path + end for end in ("-wal", "-shm", "-journal"))]
    for each in beside:
        files.check_file(each)
    if files.check_file(path):  # what is another program's keeps its modes
        look(path, lambda cursor: check(cursor, path))
    make_folder(os.path.dirname(path))
    files.make_file(path)
    for each in beside:
        files.close_file(each)
