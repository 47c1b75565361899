"""The floor under each store: the same reads and writes of the same bytes, and nothing else.

There is no key to derive, no lock of a session's own, nothing is decoded or encoded. What is
written differs each time, as a counter does: to write the same bytes again is cheaper for SQLite.
"""

from __future__ import annotations

import copy
import os
import sqlite3
import threading
from itertools import repeat
from typing import Any

import diskcache

from session_sync import Codec, SQLiteStorage
from session_sync.storages.disk import _SETTINGS as DISK_SETTINGS

from ..fields import COUNTER, USER
from ..setting import Place
from ..timing import Work

KEY = f"user:{USER}:chat:{USER}"

SELECT = "SELECT value FROM sessions WHERE key = ?"
UPSERT = """
    INSERT INTO sessions (key, value) VALUES (?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value
"""


class Changing:
    """The bytes of a record with another counter each time, all of one length."""

    def __init__(self, fields: dict[str, Any]) -> None:
        whole = Codec().encode({**fields, "counter": COUNTER})
        self._head, _, self._tail = whole.partition(b"%d" % COUNTER)
        self._number = COUNTER

    def next(self) -> bytes:
        self._number += 1
        return b"%b%d%b" % (self._head, self._number, self._tail)


def memory(fields: dict[str, Any]) -> Work:
    """A dict of dicts behind one lock."""
    data, lock = {KEY: copy.deepcopy(fields)}, threading.Lock()

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with lock:
                data[KEY]["counter"] += 1

    return work


def diskcache_in(place: Place, folder: str) -> Any:
    """diskcache with the settings of our own storage on disk: nothing is evicted."""
    return place.enter_context(diskcache.Cache(folder, **DISK_SETTINGS))


def disk(place: Place, fields: dict[str, Any]) -> Work:
    """diskcache: get and set."""
    cache, value = diskcache_in(place, place.folder()), Changing(fields)
    cache.set(KEY, value.next())

    def work(times: int) -> None:
        for _ in repeat(None, times):
            cache.get(KEY)
            cache.set(KEY, value.next())

    return work


def connection_to(place: Place, path: str) -> sqlite3.Connection:
    """A connection to a file that our own storage has made: the same table, with a WAL; and with
    the same `synchronous`."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    place.callback(connection.close)
    connection.execute("PRAGMA synchronous = normal")
    return connection


def sqlite(place: Place, fields: dict[str, Any]) -> Work:
    """sqlite3: select and upsert, each a transaction of its own."""
    path = os.path.join(place.folder(), "sessions.db")
    SQLiteStorage(path).close()
    connection, value = connection_to(place, path), Changing(fields)
    connection.execute(UPSERT, (KEY, value.next()))

    def work(times: int) -> None:
        for _ in repeat(None, times):
            connection.execute(SELECT, (KEY,)).fetchall()
            connection.execute(UPSERT, (KEY, value.next()))

    return work


def redis(place: Place, fields: dict[str, Any]) -> Work:
    """redis-py: GET and SET, two round trips."""
    client, value = place.redis_client(), Changing(fields)
    client.set(f"bare:{KEY}", value.next())

    def work(times: int) -> None:
        for _ in repeat(None, times):
            client.get(f"bare:{KEY}")
            client.set(f"bare:{KEY}", value.next())

    return work
