"""Connections to a SQLite file: which thread uses which, around forks and in signal handlers.

This module knows SQL's transactions; it does not know what is in the file.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import get_ident
from typing import Any, Final, TypeVar, TypeVarTuple

from ..errors import SessionDeadlockError
from . import forks
from .background import at_exit, for_each
from .files import StoreFile

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TIMEOUT: Final = 60.0  # seconds that a write waits for those of other processes
_MOMENT: Final = 0.001  # seconds between two looks whether the process has forked
_PAUSE: Final = 1.0  # seconds between two looks whether the file is still the same


class Connection(sqlite3.Connection):
    """A connection that closes itself when it is forgotten; else Python 3.13 complains that it
    was not closed. `owner` is the thread that used it last; it `is_shut` by that one's fork."""

    owner = 0
    is_shut = False

    def __del__(self) -> None:
        self.is_shut = True  # its owner may be collected, too, and yet have something to write
        with suppress(sqlite3.Error):
            self.close()

    def leave(self) -> None:
        """Close it in a child, and leave the file and its log to the parent."""
        if sys.version_info >= (3, 12):
            self.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
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


class Connections:
    """Connections to one file, each used by one thread at a time, through the one cursor it has.

    SQLite keeps its locks by process, so no connection may be open while the process forks: the
    child would take the parent's locks for its own. Before a fork no more are made, and those in
    use are waited for, which takes as long as one statement; not those of the thread that forks (in
    a signal handler, say), which are closed beneath it, and its statement is done once more.

    A thread that takes an idle one, or gives it back, looks for no fork: that would cost as much as
    half a statement. A thread that makes one notes that first and then looks whether another thread
    forks; a thread that forks notes that first and then looks for those being made. So one of the
    two sees the other. There is no mutex that a signal handler or a finaliser could wait for. What
    an exception cuts loose (a connection, one that is just being made, a fork) is known by weak
    references or for a limited time, so no thread waits for it forever; and a connection goes back
    only if its statement has ended.
    """

    def __init__(
        self,
        file: StoreFile,
        *pragmas: str,
        timeout: float = TIMEOUT,  # 0: it waits neither for others nor, at a checkpoint, the disk
        text: type[str] | type[bytes] = str,
        mode: str = "rw",  # the file is made elsewhere, and private
    ) -> None:
        self._file: Final = file
        self._uri: Final = f"{Path(file.path).as_uri()}?mode={mode}"
        self._pragmas: Final = pragmas if timeout else (*pragmas, "wal_autocheckpoint = 0")
        self._timeout: Final = timeout
        self._text: Final = text
        self._looked = 0.0
        self._idle: Final[deque[sqlite3.Cursor]] = deque()
        self.give_back: Final = self._idle.append  # a cursor, for others to use
        self._made: Final[weakref.WeakValueDictionary[int, Connection | _Making]] = (
            weakref.WeakValueDictionary()
        )
        self._forks: Final[dict[int, float]] = {}  # by thread: until when they are waited for
        _all[id(self)] = self

    def use(self, act: Callable[[sqlite3.Cursor, *Ts], T], *args: *Ts) -> T:
        """Do `act` with a cursor that it has alone, and `args`; once more if a fork has cut that
        off, which must do no harm."""
        while True:
            cursor = self.take()
            try:
                result = act(cursor, *args)
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.ProgrammingError) and self.is_shut(cursor):
                    continue
                if cursor.connection.in_transaction:
                    self.drop(cursor)
                else:
                    self.give_back(cursor)
                raise
            except BaseException:  # from outside: the statement may be half done
                self.drop(cursor)
                raise
            self.give_back(cursor)
            return result

    def take(self) -> sqlite3.Cursor:
        """The cursor of a connection, for one statement, after which it has to be given back or
        dropped."""
        forks.check()
        if _torn and self._file.path in _torn:
            raise RuntimeError(
                f"{self._file.path} cannot be used in this process: C code has forked it while "
                f"another thread was using that file. Make the storage after the fork (uWSGI: "
                f"lazy-apps = true)."
            )
        now = time.monotonic()
        if now > self._looked + _PAUSE:
            self._file.check()
            self._looked = now
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

    def is_shut(self, cursor: sqlite3.Cursor) -> bool:
        """Whether a fork in this thread has closed it; it is then not handed out any more."""
        return bool(getattr(cursor.connection, "is_shut", False))

    def drop(self, cursor: sqlite3.Cursor) -> None:
        """Close it: something came in between."""
        connection = cursor.connection
        connection.close()  # first: a fork waits for those that are known
        self._made.pop(id(connection), None)

    def close(self) -> None:
        """Close those that are not in use."""
        while True:
            try:
                cursor = self._idle.pop()
            except IndexError:
                return
            self.drop(cursor)

    def finish(self) -> None:
        """As `close`; and what is in SQLite's log is in the file afterwards, so that the file alone
        is the whole store, as far as no other process reads an older state or goes on writing.

        The last connection to be closed does that by itself. But a thread may have another one.
        """
        forks.check()
        try:
            cursor = self._idle.pop()
        except IndexError:
            return
        connection: Any = cursor.connection
        connection.owner = get_ident()  # as in take()
        try:
            with suppress(sqlite3.Error):  # all is in the log, if not in the file
                cursor.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            self.drop(cursor)
        self.close()

    def _connect(self) -> Connection:
        making = _Making()
        self._made[id(making)] = making
        while self._is_forking():
            self._made.pop(id(making), None)
            time.sleep(_MOMENT)
            self._made[id(making)] = making
        self._file.check()
        connection = sqlite3.connect(
            self._uri,
            uri=True,
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time has it
            factory=Connection,
        )
        connection.owner = making.owner
        self._made[id(connection)] = connection
        connection.text_factory = self._text
        for pragma in self._pragmas:
            connection.execute(f"PRAGMA {pragma}")
        self._file.check()  # it may have been replaced meanwhile
        return connection

    # -- around a fork

    def _is_forking(self) -> bool:
        now = time.monotonic()
        return any(end > now for end in list(self._forks.values()))

    def shut(self) -> None:
        """Close all connections, those in use as soon as they are not."""
        me = get_ident()
        end = time.monotonic() + 2 * TIMEOUT
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
        """Go on, in the child: no other thread that forks or connects is in this process.

        All connections are closed by now, unless C code has forked, which waits for none of them.
        """
        me = get_ident()
        idle = {id(cursor.connection) for cursor in self._idle}
        made = self._in_use()
        if any(id(one) not in idle and one.owner != me for one in made):
            _torn.add(self._file.path)  # that thread is not here, and will not end its statement
        else:
            for one in made:
                one.is_shut = True
                one.leave()
        self._idle.clear()
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

    leave = close


_all: Final[weakref.WeakValueDictionary[int, Connections]] = weakref.WeakValueDictionary()
_torn: Final[set[str]] = set()  # the files that a fork has made unusable for this process

forks.register(
    lambda: for_each(_all, Connections.begin_anew),
    before=lambda: for_each(_all, Connections.shut),
    in_parent=lambda: for_each(_all, Connections.open_again),
)
at_exit(lambda: for_each(_all, Connections.finish))
