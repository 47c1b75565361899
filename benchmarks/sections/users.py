"""Stores of 100, 10,000 and a million users: cost of an update, room per user, start-up time.

Every user has the small session, and each update is that of a user chosen at random. The bare store
of a row has the same number of users with the same bytes, so that what grows with the store itself
(a tree that is one level deeper, a cache that holds less) is not taken for ours. On disk both begin
as the same file, copied; in Redis both work on the same keys.

Stores are filled by the fastest way that gives the same bytes: in one transaction of the same
table, or in a pipeline. Room is what the process has grown by in memory (no figure where that is
too little to see), the size of the files on disk, and what the server says of its memory. Start-up
is opening the store, by a new object in this process, and reading one session; the file is in the
system's cache.

Choosing the user and making the key is part of both. telebot's and PTB's pickles write all users at
each update: that is measured up to 10,000 users, in few rounds; with more of them, only the start,
since one update would take many seconds.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import diskcache

from session_sync import (
    DiskStorage,
    MemoryStorage,
    RedisStorage,
    SessionManager,
    SQLiteStorage,
)
from session_sync.storages.disk import _SETTINGS as DISK_SETTINGS

from ..fields import SMALL, USER
from ..setting import Place, Setting
from ..sides import bare, ptb, telebot
from ..sides.bare import SELECT, UPSERT, Changing
from ..tables import Cell, Table, table
from ..timing import Work, log

_PICKLES_UP_TO = 10_000
_NO_FIGURE = ""
_SMALL_JSON = json.dumps(SMALL)


@dataclass(frozen=True)
class _Store:
    """One that is filled: updates of random users, bytes per user, seconds to open it and read; and
    the same updates in the bare store of the same size."""

    ours: Work
    room: Cell
    start: Cell
    bare: Work


def run(setting: Setting) -> list[Table]:
    """Each store with each number of users."""
    sizes = sorted({min(size, setting.largest) for size in (100, 10_000, setting.largest)})
    sizes = [100, 200] if setting.quick else sizes
    stores: dict[str, Callable[[Place, int], _Store]] = {
        "memory": _memory,
        "SQLite": _sqlite,
        "disk": _disk,
    }
    if setting.has_redis:
        stores["Redis"] = _redis
    rows = [row for kind, fill in stores.items() for row in _rows(setting, kind, fill, sizes)]
    return [
        table(
            "users",
            "One update that adds 1 by the number of users, random users",
            "Median (quartiles), in microseconds.",
            (
                "store, users",
                "session_sync",
                "bare store",
                "to the bare store",
                "bytes per user",
                "start-up, seconds",
            ),
            rows,
        ),
        _pickles(setting, sizes),
    ]


def _rows(
    setting: Setting, kind: str, fill: Callable[[Place, int], _Store], sizes: list[int]
) -> Iterator[list[Cell]]:
    """All sizes of one store take turns, so that they see the same machine."""
    with Place(setting) as place:
        stores = {}
        for size in sizes:
            log(f"  {kind}: {size:,} users")
            stores[size] = fill(place, size)
        works = {f"ours {size}": store.ours for size, store in stores.items()}
        works |= {f"bare {size}": store.bare for size, store in stores.items()}
        timings = setting.measure(works)
    for size, store in stores.items():
        yield [
            f"{kind}, {size:,}",
            timings.of(f"ours {size}") * 1e6,
            timings.of(f"bare {size}") * 1e6,
            timings.ratio(f"ours {size}", to=f"bare {size}"),
            store.room,
            store.start,
        ]


def _key(user: int) -> str:
    return f"user:{USER + user}:chat:{USER + user}"


def _own_fields() -> Any:
    """A small session that shares no text with those of other users."""
    return json.loads(_SMALL_JSON)


def _adding(storage: Any, size: int) -> Work:
    """Updates of random users."""
    sessions = SessionManager(storage=storage)
    chance = random.Random(1)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with sessions.session_scope(_key(chance.randrange(size))) as session:
                session["counter"] += 1

    return work


def _getting_and_setting(
    size: int, get: Callable[[str], object], put: Callable[[str, bytes], object]
) -> Work:
    """The same of a bare store."""
    chance, value = random.Random(2), Changing(SMALL)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            key = _key(chance.randrange(size))
            get(key)
            put(key, value.next())

    return work


# -- the stores


def _memory(place: Place, size: int) -> _Store:
    storage = MemoryStorage()
    before = _resident()
    for user in range(size):
        storage.set(_key(user), _own_fields())
    grown = _resident() - before
    lock, chance = threading.Lock(), random.Random(2)
    data = {_key(user): _own_fields() for user in range(size)}

    def plain(times: int) -> None:
        for _ in repeat(None, times):
            key = _key(chance.randrange(size))
            with lock:
                data[key]["counter"] += 1

    room = grown / size if size > 1_000 else _NO_FIGURE
    return _Store(_adding(storage, size), room, _NO_FIGURE, plain)


def _resident() -> int:
    """How much memory this process has, in bytes."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _sqlite(place: Place, size: int) -> _Store:
    path = Path(place.folder(), "sessions.db")
    storage = SQLiteStorage(path)
    storage.set(_key(0), SMALL)
    storage.close()
    filling = sqlite3.connect(path)
    with filling:
        ((value,),) = filling.execute("SELECT value FROM sessions").fetchall()
        filling.executemany(UPSERT, ((_key(user), value) for user in range(size)))
    filling.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    filling.close()
    other = Path(place.folder(), "sessions.db")
    shutil.copy(path, other)
    connection = bare.connection_to(place, str(other))
    return _Store(
        _adding(_closed_after(place, SQLiteStorage(path)), size),
        path.stat().st_size / size if size > 1_000 else _NO_FIGURE,
        _start(lambda: SQLiteStorage(path)),
        _getting_and_setting(
            size,
            lambda key: connection.execute(SELECT, (key,)).fetchall(),
            lambda key, value: connection.execute(UPSERT, (key, value)),
        ),
    )


def _disk(place: Place, size: int) -> _Store:
    folder = Path(place.folder(), "sessions")
    storage = DiskStorage(folder)
    storage.close()
    value = Changing(SMALL).next()
    with diskcache.Cache(str(folder), **DISK_SETTINGS) as filling, filling.transact():
        for user in range(size):
            filling.set(_key(user), value)
    other = Path(place.folder(), "sessions")
    shutil.copytree(folder, other)
    cache = bare.diskcache_in(place, str(other))
    written = sum(file.stat().st_size for file in folder.iterdir())
    return _Store(
        _adding(_closed_after(place, DiskStorage(folder)), size),
        written / size if size > 1_000 else _NO_FIGURE,
        _start(lambda: DiskStorage(folder)),
        _getting_and_setting(size, cache.get, cache.set),
    )


def _redis(place: Place, size: int) -> _Store:
    """All sizes are in one server: what an update costs there does not depend on the others."""
    client = place.redis_client()
    prefix = f"{size}:"
    storage = _closed_after(place, RedisStorage(place.redis_url, prefix=prefix))
    storage.set(_key(0), SMALL)
    name = f"{prefix}{{{_key(0)}}}".encode()  # as the storage's docs say
    value = client.get(name)
    assert isinstance(value, bytes)
    before = _used(client)
    for begin in range(0, size, 10_000):
        with client.pipeline(transaction=False) as filling:
            for user in range(begin, min(size, begin + 10_000)):
                filling.set(f"{prefix}{{{_key(user)}}}", value)
            filling.execute()
    grown = _used(client) - before
    return _Store(
        _adding(storage, size),
        grown / size if size > 1_000 else _NO_FIGURE,
        _start(lambda: RedisStorage(place.redis_url, prefix=prefix)),
        _getting_and_setting(
            size,
            lambda key: client.get(f"{prefix}{{{key}}}"),
            lambda key, value: client.set(f"{prefix}{{{key}}}", value),
        ),
    )


def _used(client: Any) -> int:
    return int(client.info("memory")["used_memory"])


def _closed_after(place: Place, storage: Any) -> Any:
    place.callback(storage.close)
    return storage


def _start(open_storage: Callable[[], Any]) -> float:
    """Seconds for opening a store and reading one session."""
    begin = time.perf_counter()
    storage = open_storage()
    assert storage.get(_key(0))["step"] == "menu"
    took = time.perf_counter() - begin
    storage.close()
    return took


# -- pickles


@dataclass(frozen=True)
class _Pickle:
    """One that is filled: what makes updates of random users, bytes per user, seconds to open it
    and read."""

    adding: Callable[[], Work]
    room: float
    start: float


def _pickles(setting: Setting, sizes: list[int]) -> Table:
    """telebot's and PTB's, next to each other."""
    rows = [row for size in sizes for row in _pickle_rows(setting, size)]
    return table(
        "users_pickles",
        "The same in pickles of all users",
        "Median (quartiles), in microseconds, of 5 rounds at most; the start is measured once.",
        ("store, users", "one update", "bytes per user", "start-up, seconds"),
        rows,
    )


def _pickle_rows(setting: Setting, size: int) -> Iterator[list[Cell]]:
    log(f"  pickles: {size:,} users")
    with Place(setting) as place:
        pickles = {
            "telebot, StatePickleStorage": _telebot(place, size),
            "PTB, PicklePersistence": _ptb(place, size),
        }
        timings = None
        if size <= _PICKLES_UP_TO:
            works = {name: one.adding() for name, one in pickles.items()}
            timings = setting.measure(works, rounds=min(setting.rounds, 5))
    for name, one in pickles.items():
        update: Cell = "" if timings is None else timings.of(name) * 1e6
        yield [f"{name}, {size:,}", update, one.room, one.start]


def _telebot(place: Place, size: int) -> _Pickle:
    storage = telebot.storage_of(place, "pickle")
    bot = telebot.bot_with(storage, SMALL)
    path = Path(storage.file_path)
    ((key, one),) = pickle.loads(path.read_bytes()).items()
    with path.open("wb") as file:
        everybody = {
            key.replace(str(USER), str(USER + user)): {**one, "data": _own_fields()}
            for user in range(size)
        }
        pickle.dump(everybody, file)
    del everybody

    def read() -> object:
        return type(storage)(str(path)).get_data(USER, USER, bot_id=bot.bot_id)["step"]

    def adding() -> Work:
        chance = random.Random(1)

        def work(times: int) -> None:
            for _ in repeat(None, times):
                user = USER + chance.randrange(size)
                with bot.retrieve_data(user, user) as data:
                    data["counter"] += 1

        return work

    return _Pickle(adding, path.stat().st_size / size, _reading(read))


def _ptb(place: Place, size: int) -> _Pickle:
    path = os.path.join(place.folder(), "data")
    with open(f"{path}_user_data", "wb") as file:
        pickle.dump({USER + user: _own_fields() for user in range(size)}, file, protocol=5)
    run = place.loop.run_until_complete

    bot = ptb.application_with(ptb.pickle_in(path)).bot

    def load() -> tuple[ptb.AnyPersistence, dict[int, Any]]:
        persistence = ptb.pickle_in(path)
        persistence.set_bot(bot)
        return persistence, run(persistence.get_user_data())

    def adding() -> Work:
        persistence, everybody = load()
        application = ptb.application_with(persistence)
        for user, fields in everybody.items():
            application.user_data[user].update(fields)
        chance = random.Random(1)

        async def many(times: int) -> None:
            for _ in repeat(None, times):
                user = USER + chance.randrange(size)
                application.user_data[user]["counter"] += 1
                application.mark_data_for_update_persistence(user_ids=user)
                await application.update_persistence()

        return lambda times: run(many(times))

    room = os.path.getsize(f"{path}_user_data") / size
    return _Pickle(adding, room, _reading(lambda: load()[1][USER]["step"]))


def _reading(read: Callable[[], object]) -> float:
    """Seconds for opening a store and reading, in one call."""
    begin = time.perf_counter()
    assert read() == "menu"
    return time.perf_counter() - begin
