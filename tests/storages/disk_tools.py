"""What the tests of the storage on disk share: a folder, and its rows as SQL sees them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from session_sync.storages.disk import DiskStorage


def make_folder(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


def make_storage(folder: Path) -> Iterator[DiskStorage]:
    with closing(DiskStorage(folder)) as storage:
        yield storage


def sql(folder: Path, statement: str, *arguments: Any) -> list[Any]:
    """What anybody can do to the file."""
    with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as con:
        return con.execute(statement, arguments).fetchall()


def row(folder: Path, key: Any) -> list[Any]:
    return sql(folder, "SELECT * FROM Cache WHERE key = ?", key)


def in_thread(act: Callable[[], Any]) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    thread.join()
    return results[0]
