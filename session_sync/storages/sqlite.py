"""Sessions in one SQLite file, by the standard library: for threads and processes on one machine.

This module knows records and their bytes; it knows no session.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from threading import get_ident
from typing import Any, Final, Literal, TypeVar

from ..codec import Codec
from ..errors import SessionDeadlockError, SessionDecodeError, SessionLockTimeout
from ..expiry import life_time
from .background import for_each
from .base import OpenRecord, Record, StoredEntry
from .filelocks import FileLocks, LockedRecord

T = TypeVar("T")

_OURS: Final = 0x73657373  # "sess", in the file's header; 0 there: a file of nobody
_VERSION: Final = 1  # of the table
_TABLE: Final = """
    CREATE TABLE IF NOT EXISTS sessions (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, expires REAL
    ) WITHOUT ROWID
"""
_STATE: Final = """
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)
    FROM pragma_application_id, pragma_user_version
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
_TIMEOUT: Final = 60.0  # seconds that a write waits for those of other processes
_PAGE: Final = 4096  # bytes that SQLite writes at least
_PAGES: Final = 500  # written at once, until one write goes the other way and may wait
_LARGE: Final = 16 * _PAGE  # bytes of a record that is not written at once
_PAUSE: Final = 1.0  # seconds between two sweeps
_MOMENT: Final = 0.001  # seconds between two looks whether the process has forked
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
    since 1970. The file has mode 0600; folders are made with 0700. Beside it lie SQLite's own
    `-wal` and `-shm`, and `-locks`, which stays empty.

    Raises ValueError if `ttl` is not positive, `synchronous` none of the three, `path` no path of a
    file (`:memory:`), or the file is a database of something else; TypeError if `ttl` is no number;
    IsADirectoryError. Lets through what SQLite and the file system raise.

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
        self._waits_for_disk: Final = synchronous == "full"
        self._pages = 0  # written at once since the last write that was not
        self._connections: Final = _Connections(_private(path), synchronous)
        self._prompt: Final = _Connections(self._connections.path, synchronous, waits=False)
        self._locks: Final = FileLocks(f"{self._connections.path}-locks")
        if not self._connections.has_table():  # before a file of locks is made beside it
            handle = self._locks.acquire("$table", _TIMEOUT)  # four workers may begin at once
            try:
                self._connections.make_table()
            finally:
                handle.release()

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None.

        Raises `SessionDecodeError` if what lies there is not ours.
        """
        found = self._find(key)
        return None if found is None else self._codec.decode(_bytes(found[0], key), key)

    def set(self, key: str, value: Mapping[str, Any], /) -> None:
        """Store `value` under `key`, in one transaction.

        Raises `SessionEncodeError` if it holds something that the codec does not keep.
        """
        self.save(key, value)

    def delete(self, key: str, /) -> None:
        """Remove `key`; no error if there is none."""
        refuse_inside_transaction(self._connections.path)
        self._run(_DELETE, _stored(key))

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return bool(self._run(f"SELECT 1 FROM sessions WHERE {_LIVE}", _stored(key), time.time()))

    def touch(self, key: str, /) -> None:
        """Start the life time of the record anew; no error if there is none."""
        # A signal handler that only reads loses nothing but a part of the life time, and would wait
        # for its own thread.
        if self._ttl is not None and not is_inside_transaction(self._connections.path):
            now = time.time()
            expires = now + self._ttl
            self._run(f"UPDATE sessions SET expires = ? WHERE {_LIVE}", expires, _stored(key), now)

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
        return sum(_key_of(key, kind) is None for key, kind, *_ in self._all_rows())

    def _rows(self) -> Iterator[tuple[str, int, float | None]]:
        unknown = 0
        for stored, kind, size, left in self._all_rows():
            key = _key_of(stored, kind)
            if key is None:
                unknown += 1
            else:
                yield key, size, left
        if unknown:
            _log.warning(
                "%s: rows whose key is no text were passed over: %d; session_sync has not written "
                "them",
                self._connections.path,
                unknown,
            )

    def _all_rows(self) -> Iterator[tuple[bytes, bytes, int, float | None]]:
        rows = self._run(_ROWS, now := time.time())
        while rows:
            for key, kind, size, expires in rows:
                yield key, kind, size, None if expires is None else expires - now
            key, kind, *_ = rows[-1]
            rows = self._run(_MORE_ROWS, kind == _TEXT, key, key, now := time.time())

    def close(self) -> None:
        """Close all connections. The storage opens new ones when it is used again."""
        self._connections.close()
        self._prompt.close()
        self._locks.close()

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
        refuse_inside_transaction(self._connections.path)
        self._run(_UPSERT, _stored(key), data, expires)
        if self._is_sweeping_due(now):
            self._swept = now
            self._run(_SWEEP, now)
        return len(data)

    def open_record(self, key: str, timeout: float, /) -> _OpenRecord:
        """Open `key` when no other process has it open; raises SessionLockTimeout."""
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
        cursor = self._connections.take()

        def write() -> None:
            for key in records:
                if key in data:
                    cursor.execute(_UPSERT, (_stored(key), data[key], expires))
                else:
                    cursor.execute(_DELETE, (_stored(key),))

        try:
            in_transaction(cursor.connection, self._connections.path, write)
        except BaseException:  # a transaction may still be open
            self._connections.drop(cursor)
            raise
        self._connections.give_back(cursor)
        for key, each in opened.items():
            each.has_written(len(data[key]) if key in data else None)
        return True

    # -- without waiting

    def open_at_once(self, key: str, /) -> _OpenRecord | None:
        """As `open_record`, if nothing in that has to wait; else None."""
        try:
            return _OpenRecord(self, key, self._locks.acquire(key, 0), self._load_at_once)
        except (SessionLockTimeout, _WouldWaitError):
            return None

    def _load_at_once(self, key: str) -> Record | None:
        rows = self._run_at_once(_SELECT, _stored(key), time.time())
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
            self._run_at_once(_UPSERT, _stored(key), data, expires)
            return len(data)
        self._run_at_once(_DELETE, _stored(key))
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
        rows = self._run(_SELECT, _stored(key), time.time())
        return rows[0] if rows else None

    def _run(
        self, statement: str, *values: object, connections: _Connections | None = None
    ) -> list[Any]:
        connections = connections or self._connections
        while True:
            cursor = connections.take()
            try:
                rows = cursor.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                connections.give_back(cursor)
                if isinstance(error, sqlite3.ProgrammingError) and connections.is_shut(cursor):
                    continue  # none of our statements does harm twice
                raise
            except BaseException:  # from outside: the statement may be half done
                connections.drop(cursor)
                raise
            connections.give_back(cursor)
            return rows


class _WouldWaitError(Exception):
    """What was to be done at once would have to wait; nothing was done."""


class _OpenRecord(LockedRecord["SQLiteStorage"]):
    """An open record that can be closed without waiting, mostly."""

    __slots__ = ()

    def close_at_once(self, record: Record | None, /) -> bool:
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


def _stored(key: str) -> str | bytes:
    """How a key is stored: as text, or as bytes if it has halves of surrogate pairs in it."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return key.encode("utf-8", "surrogatepass")
    return key


def _key_of(stored: bytes, kind: bytes) -> str | None:
    """The key that is stored so; None if none is."""
    try:
        key = stored.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return key if isinstance(_stored(key), str) == (kind == _TEXT) else None


def _bytes(value: object, key: str) -> bytes:
    if isinstance(value, bytes):
        return value
    raise SessionDecodeError(
        f"session {key!r} cannot be read: it is of type {type(value).__name__}, which was not "
        f"written here. It is left as it is."
    )


def has_table(cursor: sqlite3.Cursor, path: str) -> bool:
    """Whether the file has the table of sessions; False: it is new.

    Raises ValueError if it is another program's, or a newer session_sync's.
    """
    # One statement, which sees one moment: others may just be making the table.
    ((ours, version, tables),) = cursor.execute(_STATE).fetchall()
    if ours != _OURS and tables:
        raise ValueError(
            f"{path} is a database of another program; give SQLiteStorage a file of its own"
        )
    if version > _VERSION:
        raise ValueError(
            f"{path} was made by a newer session_sync (its tables have version {version}, known "
            f"here is {_VERSION}); upgrade this one"
        )
    return bool(ours == _OURS and version == _VERSION)


class Connection(sqlite3.Connection):
    """A connection that closes itself when it is forgotten; else Python 3.13 complains that nobody
    has closed it. `owner` is the thread that used it last; it `is_shut` by that one's fork."""

    owner = 0
    is_shut = False

    def __del__(self) -> None:
        self.is_shut = True  # its owner may be collected, too, and yet have something to write
        with suppress(sqlite3.Error):
            self.close()


def in_transaction(connection: sqlite3.Connection, path: str, work: Callable[[], object]) -> None:
    """All that `work` does is done, or nothing is.

    No context manager, which an interrupt could leave open with the traceback that keeps it.
    """
    refuse_inside_transaction(path)
    thread = threading.get_ident()
    around = _writing.get(thread, _NONE)
    try:  # around the beginning, too: an interrupt may come as soon as it has begun
        _writing[thread] = around | {path}
        connection.execute("BEGIN IMMEDIATE")
        work()
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()  # which does nothing if SQLite has done it
        raise
    finally:
        if around:
            _writing[thread] = around
        else:
            _writing.pop(thread, None)


def is_inside_transaction(path: str) -> bool:
    """Whether this thread is in the middle of a transaction of that file."""
    return bool(_writing) and path in _writing.get(threading.get_ident(), _NONE)


def refuse_inside_transaction(path: str) -> None:
    """Raise SessionDeadlockError in a signal handler (or a finaliser) that wants to write to a file
    where the thread that it has interrupted is in the middle of a transaction: SQLite would wait
    for the end of that until it gives up."""
    if is_inside_transaction(path):
        raise SessionDeadlockError(
            f"a signal handler that has interrupted its own thread while that writes several "
            f"sessions to {path} cannot write there: that thread would have to go on first. Let "
            f"the handler set a flag, and use the session later."
        )


_NONE: Final[frozenset[str]] = frozenset()
# By thread, the files where it is in a transaction: more than one in a signal handler.
_writing: Final[dict[int, frozenset[str]]] = {}


class _Connections:
    """Connections to one file, each used by one thread at a time, through the one cursor it has.

    SQLite keeps its locks by process, so no connection may be open while the process forks: the
    child would take the parent's locks for its own. Before a fork no more are made, and those in
    use are waited for, which takes as long as one statement; not those of the thread that forks (in
    a signal handler, say), which are closed beneath it, and its statement is done once more.

    Who takes an idle one, or gives it back, passes no gate: that would cost as much as half a
    statement. Whoever makes one notes that first and then looks whether somebody forks, who looks
    the other way round, so one of the two sees the other. There is no mutex that a signal handler
    or a finaliser could wait for. What an exception cuts loose (a connection, one that is just
    being made, a fork) is known by weak references or for a limited time, so nobody waits for it
    for ever; and a connection goes back only if its statement has ended.
    """

    def __init__(self, path: str, synchronous: str, waits: bool = True) -> None:
        self.path: Final = path
        self._synchronous: Final = synchronous
        self._waits: Final = waits  # for other processes, and for the disk at a checkpoint
        self._idle: Final[deque[sqlite3.Cursor]] = deque()
        self._made: Final[weakref.WeakValueDictionary[int, Connection | _Making]] = (
            weakref.WeakValueDictionary()
        )
        self._forks: Final[dict[int, float]] = {}  # by thread: until when they are waited for
        _all[id(self)] = self

    def take(self) -> sqlite3.Cursor:
        """The cursor of a connection, for one statement, after which it has to be given back or
        dropped."""
        while True:
            try:
                cursor = self._idle.pop()
            except IndexError:
                return self._connect().cursor()
            connection: Any = cursor.connection
            connection.owner = get_ident()  # and then look: see shut()
            if not connection.is_shut:
                return cursor
            self.drop(cursor)

    def give_back(self, cursor: sqlite3.Cursor) -> None:
        """Let others use it."""
        self._idle.append(cursor)

    def is_shut(self, cursor: sqlite3.Cursor) -> bool:
        """Whether a fork in this thread has closed it; it is then not handed out any more."""
        return bool(getattr(cursor.connection, "is_shut", False))

    def drop(self, cursor: sqlite3.Cursor) -> None:
        """Close it: something came in between."""
        connection = cursor.connection
        connection.close()  # first: a fork waits for those that are known
        self._made.pop(id(connection), None)

    def has_table(self) -> bool:
        """As the function `has_table`, of this file."""
        return self._once(lambda cursor: has_table(cursor, self.path))

    def make_table(self) -> None:
        """Make the table, if the file is new; raises ValueError if it is somebody else's."""
        self._once(self._make_table)

    def _once(self, work: Callable[[sqlite3.Cursor], T]) -> T:
        cursor = self.take()
        try:
            result = work(cursor)
        except BaseException:
            self.drop(cursor)
            raise
        self.give_back(cursor)
        return result

    def _make_table(self, cursor: sqlite3.Cursor) -> None:
        if has_table(cursor, self.path):
            return
        cursor.execute("PRAGMA journal_mode = wal")

        def make() -> None:
            for statement in (_TABLE, _INDEX):
                cursor.execute(statement)
            cursor.execute(f"PRAGMA application_id = {_OURS}")
            cursor.execute(f"PRAGMA user_version = {_VERSION}")

        in_transaction(cursor.connection, self.path, make)

    def close(self) -> None:
        """Close those that are not in use."""
        while True:
            try:
                cursor = self._idle.pop()
            except IndexError:
                return
            self.drop(cursor)

    def _connect(self) -> Connection:
        making = _Making()
        self._made[id(making)] = making
        while self._is_forking():
            self._made.pop(id(making), None)
            time.sleep(_MOMENT)
            self._made[id(making)] = making
        connection = sqlite3.connect(
            self.path,
            timeout=_TIMEOUT if self._waits else 0,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time has it
            factory=Connection,
        )
        connection.owner = making.owner
        self._made[id(connection)] = connection
        # What is no text would be named in the error of who reads it as text, with its value.
        connection.text_factory = bytes
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        if not self._waits:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
        return connection

    # -- around a fork

    def _is_forking(self) -> bool:
        now = time.monotonic()
        return any(end > now for end in list(self._forks.values()))

    def shut(self) -> None:
        """Close all connections, those in use as soon as they are not."""
        me = get_ident()
        end = time.monotonic() + 2 * _TIMEOUT
        self._forks[me] = end
        while True:
            self.close()
            for made in self._in_use():
                if made.owner == me:  # beneath this call, or cut loose
                    made.is_shut = True
                    if made.owner == me:  # else another thread has just taken it, and may use it
                        made.close()
                        self._made.pop(id(made), None)
            if not self._made or time.monotonic() > end:
                return
            time.sleep(_MOMENT)

    def _in_use(self) -> list[Connection | _Making]:
        return [made for ref in self._made.valuerefs() if (made := ref()) is not None]

    def open_again(self) -> None:
        """Go on, in the parent."""
        self._forks.pop(get_ident(), None)

    def begin_anew(self) -> None:
        """Go on, in the child: whoever forks or connects is not in this process."""
        self._forks.clear()
        self._made.clear()


class _Making:
    """A connection that is being made, by the thread `owner`."""

    __slots__ = ("__weakref__", "is_shut", "owner")

    def __init__(self) -> None:
        self.owner: Final = get_ident()
        self.is_shut = False

    def close(self) -> None:
        """Nothing is open yet."""


_all: Final[weakref.WeakValueDictionary[int, _Connections]] = weakref.WeakValueDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: for_each(_all, _Connections.shut),
        after_in_parent=lambda: for_each(_all, _Connections.open_again),
        after_in_child=lambda: for_each(_all, _Connections.begin_anew),
    )


def _private(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file that is closed to everybody else; made, with its folders."""
    name = os.fspath(path)
    if name == "" or name == ":memory:" or name.startswith("file:"):
        raise ValueError(
            f"SQLiteStorage takes the path of a file, not {name!r}; what is to be kept in memory "
            f"alone is for MemoryStorage()"
        )
    absolute = os.path.abspath(os.path.expanduser(os.fspath(path)))
    folder = os.path.dirname(absolute)
    if not os.path.isdir(folder):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.isdir(absolute):
        raise IsADirectoryError(
            f"{absolute} is a folder; SQLiteStorage takes the path of a file in it, say "
            f"{os.path.join(absolute, 'sessions.db')}"
        )
    make_file(absolute)
    return absolute


def make_file(path: str) -> None:
    """Make an empty file that is closed to everybody else, if there is none.

    It has its name only when it is closed again: to close a file drops all locks on it that this
    process has through SQLite, and another thread, or a nested call, may open it at once.
    """
    if os.path.lexists(path):
        return
    new = f"{path}-new-{secrets.token_hex(8)}"
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    try:
        os.close(os.open(new, flags, 0o600))
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError as error:
        if isinstance(error, TimeoutError) or not os.path.lexists(new):
            raise
        with suppress(FileExistsError):  # a file system without links
            os.close(os.open(path, flags, 0o600))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new)
