"""The sessions in a SQLite file, SQLiteStorage's or diskcache's, only read.

A storage makes the files that it lacks, and closes them to other users. A command that only looks
must not do that: it may be run by another user, and the file may be another program's.

This module knows tables and rows; it takes no lock, and writes nothing.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from ...errors import SessionDecodeError
from ...storages.base import StoredEntry
from ...storages.codec import Codec
from ...storages.ownership import has_cache, has_table, look
from ...storages.rows import key_of, stored_key, warn_of_unknown_rows
from .errors import Code, Failure

T = TypeVar("T")

_TIMEOUT: Final = 60.0  # seconds that a statement waits for others
# What each kind of file has as rows: the key, the fields as JSON, until when, and since when. A row
# that is not `ours` has a key that no storage here writes.
_SQLITE: Final = """
    SELECT key, value, expires, NULL AS stored, 1 AS ours FROM sessions
"""
_DISKCACHE: Final = """
    SELECT key, CASE WHEN mode = 1 AND filename IS NULL THEN value END AS value,
        expire_time AS expires, store_time AS stored,
        raw = 1 AND typeof(key) IN ('text', 'blob') AS ours
    FROM Cache
"""
_LIVE: Final = "(expires IS NULL OR expires > :now)"
_GET: Final = f"SELECT value FROM ({{rows}}) WHERE key = :key AND ours AND {_LIVE}"
_FIRST: Final = f"""
    SELECT key, typeof(key), length(CAST(value AS BLOB)), stored, expires FROM ({{rows}})
    WHERE ours AND {_LIVE} ORDER BY key LIMIT 1000
"""
_NEXT: Final = _FIRST.replace(
    "WHERE", "WHERE key > CASE WHEN :is_text THEN CAST(:last AS TEXT) ELSE :last END AND"
)
_FOREIGN: Final = f"SELECT count(*) FROM ({{rows}}) WHERE NOT ours AND {_LIVE}"
_NOTHING: Final[Mapping[str, object]] = {}


class Database:
    """A SQLite file, opened to be read.

    While a program has it open, the newest is in the log beside it, which SQLite then reads too. If
    there is none, it is told that nothing changes: else it would make one, perhaps of a user whose
    files the bot cannot open.
    """

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._file: Final = os.path.realpath(path)  # where a link leads, SQLite has its log
        self._connection: sqlite3.Connection | None = None
        self._opened_as: object = None

    def use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` makes of a connection; it is called again if a program has begun to use the
        file meanwhile. Raises Failure for an error of SQLite."""
        while True:
            connection = self._connected()
            try:
                result = work(connection)
            except sqlite3.Error as error:
                if self._opened_as == self._state():
                    raise Failure(
                        f"{self.path} cannot be read: {error}", Code.UNREACHABLE
                    ) from error
                continue
            if self._opened_as == self._state():
                return result

    def run(self, statement: str, values: Mapping[str, object] = _NOTHING) -> list[Any]:
        """All rows of a statement."""
        return self.use(lambda connection: connection.execute(statement, values).fetchall())

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _state(self) -> object:
        """None while a program has it open; else what would be different after a change."""
        if any(os.path.exists(self._file + end) for end in ("-wal", "-journal")):
            return None
        found = os.stat(self._file)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _connected(self) -> sqlite3.Connection:
        state = self._state()
        if self._connection is None or state != self._opened_as:
            self.close()
            how = "mode=ro" if state is None else "mode=ro&immutable=1"
            uri = f"{Path(self._file).as_uri()}?{how}"
            try:
                self._connection = sqlite3.connect(uri, uri=True, timeout=_TIMEOUT)
            except sqlite3.Error as error:
                raise Failure(f"{self.path} cannot be opened: {error}", Code.UNREACHABLE) from error
            self._connection.text_factory = bytes
            self._opened_as = state
        return self._connection


def refuse_another_programs(path: str, is_disk: bool) -> None:
    """Raise ValueError if the file is another program's database, beside which nothing may be made:
    not even the index of a log that is left there, which SQLite makes as it reads that."""
    has = has_cache if is_disk else has_table
    with suppress(sqlite3.Error):  # the read that follows raises what is wrong
        look(os.path.realpath(path), lambda cursor: has(cursor, path))


class _Row(NamedTuple):
    key: bytes
    kind: bytes
    size: int | None
    stored: float | None
    expires: float | None


class FileReader:
    """What a command that only looks needs of a storage, of the file `database`.

    Nothing is made beside it, nothing locked, and no right to write is needed. `ttl` is the bot's,
    by which the age of a session is known.

    Raises Failure, and lets through what SQLite raises.
    """

    def __init__(self, database: str, codec: Codec, ttl: float | None, is_disk: bool) -> None:
        self._database: Final = Database(database)
        self._codec: Final = codec
        self._ttl: Final = ttl
        self._rows: Final = _DISKCACHE if is_disk else _SQLITE
        try:
            if not self._is_store(is_disk):
                raise Failure(
                    f"there is no store in {database}: the file is empty", Code.UNREACHABLE
                )
        except BaseException:
            self.close()
            raise

    def _is_store(self, is_disk: bool) -> bool:
        path = self._database.path
        refuse_another_programs(path, is_disk)
        has = has_cache if is_disk else has_table
        return self._database.use(lambda connection: has(connection.cursor(), path))

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None. Raises SessionDecodeError."""
        found = self._run(_GET, key=stored_key(key))
        if not found:
            return None
        ((data,),) = found
        if not isinstance(data, bytes):
            raise SessionDecodeError(
                f"session {key!r} cannot be read: what is there was not written by session_sync. "
                f"It is left as it is."
            )
        return self._codec.decode(data, key)

    def keys(self) -> Iterator[str]:
        """Every stored key. Rows whose key is no string are passed over, with a warning."""
        for key, _row in self._known():
            yield key

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key with what is known of its record, as the storages tell it."""
        for key, row in self._known():
            now = time.time()
            left = None if row.expires is None else row.expires - now
            age = None if row.stored is None else max(0.0, now - row.stored)
            if age is None and left is not None and self._ttl is not None:
                age = max(0.0, self._ttl - left)
            yield StoredEntry(key, row.size or 0, age, left)

    def unknown_rows(self) -> int:
        """How many rows have a key that is no string, which nothing here can have written."""
        return self._foreign() + sum(key_of(row.key, row.kind) is None for row in self._all())

    def _foreign(self) -> int:
        ((number,),) = self._run(_FOREIGN)
        return int(number)

    def _known(self) -> Iterator[tuple[str, _Row]]:
        unknown = self._foreign()
        for row in self._all():
            key = key_of(row.key, row.kind)
            if key is None:
                unknown += 1
            else:
                yield key, row
        warn_of_unknown_rows(unknown, self._database.path)

    def _all(self) -> Iterator[_Row]:
        rows = self._run(_FIRST)
        while rows:
            yield from map(_Row._make, rows)
            key, kind, *_ = rows[-1]
            rows = self._run(_NEXT, last=key, is_text=kind == b"text")

    def _run(self, statement: str, **values: object) -> list[Any]:
        text = statement.format(rows=self._rows)
        given = {"now": time.time(), **values}
        return self._database.run(text, given)

    def close(self) -> None:
        """Close the file."""
        self._database.close()
