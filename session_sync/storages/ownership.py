"""Whose a SQLite file is: found out before anything of it is changed.

A path may be mistyped, and the file be another program's, which other users read.

This module knows the marks that programs leave in SQLite's files; it changes nothing.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from .connections import Connections
from .files import StoreFile

T = TypeVar("T")

OURS: Final = 0x73657373  # "sess", in the file's header; 0 there: no program has marked it
VERSION: Final = 1  # of the table
_STATE: Final = """
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)
    FROM pragma_application_id, pragma_user_version
"""
_TABLES: Final = """
    SELECT count(CASE WHEN name IN ('Cache', 'Settings') THEN 1 END),
        count(CASE WHEN tbl_name NOT IN ('Cache', 'Settings') THEN 1 END)
    FROM sqlite_master
"""
_TRIES: Final = 100  # at a file that others change all the time
_PAUSE: Final = 0.05  # seconds between two tries: longer than a file system's clock stands still


def look(path: str, act: Callable[[sqlite3.Cursor], T]) -> T:
    """What `act` makes of a cursor that only reads: nothing of the file is changed, and nothing is
    made beside it.

    While a program has it open, the newest is in the log, which SQLite then reads too. If there is
    none, SQLite is told that nothing changes, and takes no lock. If something does change, it reads
    half of it: `act` has failed only if it does so twice in a file that has not changed meanwhile.

    Beside a journal, half of it may be there for good: its writer was killed. So SQLite is let do
    what it does for every reader: it waits for a writer that lives, and undoes what a killed one
    has begun.
    """
    failed = None
    for _ in range(_TRIES - 1):
        before = _state(path)
        try:
            return _look_once(path, act, before)
        except (sqlite3.Error, ValueError):
            if failed == before == _state(path):
                raise
        failed = before
        time.sleep(_PAUSE)
    return _look_once(path, act, _state(path))


def _look_once(path: str, act: Callable[[sqlite3.Cursor], T], state: _State) -> T:
    mode = "ro" if state.has_log else "rw" if state.has_journal else "ro&immutable=1"
    connections = Connections(StoreFile(path), mode=mode, text=bytes)
    try:
        return connections.use(act)
    finally:
        connections.close()


class _State(NamedTuple):
    """What is different when a program has changed a file."""

    has_log: bool
    has_journal: bool
    size: int
    written: int  # when, in nanoseconds


def _state(path: str) -> _State:
    found = os.stat(path)
    # Without an index of the log, SQLite would make one; and it removes the log of an empty file.
    has_log = bool(found.st_size) and all(os.path.exists(path + end) for end in ("-wal", "-shm"))
    return _State(has_log, os.path.exists(f"{path}-journal"), found.st_size, found.st_mtime_ns)


def has_table(cursor: sqlite3.Cursor, path: str) -> bool:
    """Whether the file has the table of SQLiteStorage; False: it is new.

    Raises ValueError if it is another program's, or a newer session_sync's.
    """
    # One statement, which sees one moment: others may just be making the table.
    ((ours, version, tables),) = cursor.execute(_STATE).fetchall()
    if ours != OURS and tables:
        raise ValueError(
            f"{path} is a database of another program; give SQLiteStorage a file of its own"
        )
    if version > VERSION:
        raise ValueError(
            f"{path} was made by a newer session_sync (its tables have version {version}, known "
            f"here is {VERSION}); upgrade this one"
        )
    return bool(ours == OURS and version == VERSION)


def has_cache(cursor: sqlite3.Cursor, path: str) -> bool:
    """Whether the file has both tables of diskcache; False: it is new, and another process may have
    made one of them. Raises ValueError if it is another program's."""
    ((known, others),) = cursor.execute(_TABLES).fetchall()
    if others and known < 2:
        raise ValueError(
            f"{path} is a database of another program; give DiskStorage a folder of its own"
        )
    return bool(known == 2)
