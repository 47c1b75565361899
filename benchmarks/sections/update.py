"""One update: derive the key, open the session, read a counter, add 1, close; and lesser ones.

Every row does that work once per update, one after the other, with nobody else about. Ours is
given telebot's message and derives the key from it; telebot and aiogram are given the ids. All
stores hold one user. Rows that are coroutines (aiogram, PTB, and ours next to them) run in one
event loop.

"to its floor" is how many times as long as the bare store a row takes: `with lock: dict[...]` in
memory; sqlite3 with a select and an upsert on disk, but diskcache's get and set for our
DiskStorage; GET and SET in Redis. "ours to it" is our time (in the same store; `async with` next to
coroutines) divided by the row's: below 1, ours is faster.

Durability on disk is the same for all: an update ends when the system has what it wrote, so that it
outlives the process. Nobody waits for the disk itself (for SQLite that is `synchronous=NORMAL` with
a WAL). The two pickles are written over in place, so a process that dies meanwhile loses them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from ..fields import FLAT, LARGE, SESSIONS, SMALL, TITLES
from ..setting import Place, Setting
from ..sides import bare, ours, ptb, telebot
from ..tables import Cell, Table, table
from ..timing import Rounds, Work

_HEAD = ("", "microseconds", "to its floor", "ours to it")
_OURS, _OURS_ASYNC = "session_sync", "session_sync, async with"
_FLOOR = "with lock: dict"
_SQLITE, _DISK = "session_sync, SQLite", "session_sync, DiskStorage"
_BARE_SQLITE, _BARE_DISK = "bare sqlite3", "bare diskcache"
_BARE_REDIS = "bare GET and SET"


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    work: Work
    ours: str
    floor: str


def run(setting: Setting) -> list[Table]:
    """One update in each class of stores with each of the sessions; then other updates."""
    tables = [
        _measured(setting, f"update_{of}_{size}", f"{where}, {TITLES[size]}", make(size))
        for of, where, make in _classes(setting)
        for size in SESSIONS
    ]
    return [*tables, _cost(setting), _kinds(setting), _untouched(setting)]


def _measured(
    setting: Setting, name: str, title: str, rows: Callable[[Place], Iterable[_Row]]
) -> Table:
    with Place(setting) as place:
        every = list(rows(place))
        # On disk for longer: so that each row has its share of SQLite's checkpoints in each round.
        times = 5 if name.startswith("update_disk") else 1
        timings = setting.measure({row.name: row.work for row in every}, times=times)
    return table(
        name,
        f"One update that adds 1, {title}",
        "Median (quartiles); every ratio is taken within each round.",
        _HEAD,
        ([row.name, *_figures(timings, row)] for row in every),
    )


def _figures(timings: Rounds, row: _Row) -> Iterable[Cell]:
    yield timings.of(row.name) * 1e6
    yield "" if row.name == row.floor else timings.ratio(row.name, to=row.floor)
    yield "" if row.name == row.ours else timings.ratio(row.ours, to=row.name)


_Make = Callable[[str], Callable[[Place], Iterable[_Row]]]


def _classes(setting: Setting) -> Iterable[tuple[str, str, _Make]]:
    yield "memory", "in memory", lambda size: lambda place: _memory(setting, place, size)
    yield "disk", "on disk", lambda size: lambda place: _disk(place, size)
    if setting.has_redis:
        yield "redis", "in Redis", lambda size: lambda place: _redis(setting, place, size)


def _memory(setting: Setting, place: Place, size: str) -> Iterable[_Row]:
    fields = SESSIONS[size]
    yield _Row(_OURS, ours.adding(place, "memory", fields), _OURS, _FLOOR)
    work = telebot.adding(place, "memory", fields)
    yield _Row("telebot retrieve_data, StateMemoryStorage", work, _OURS, _FLOOR)
    yield _Row(_OURS_ASYNC, ours.adding_async(place, "memory", fields), _OURS_ASYNC, _FLOOR)
    if setting.has_aiogram:
        from ..sides import aiogram

        work = aiogram.adding(place, "memory", fields)
        yield _Row("aiogram MemoryStorage, SimpleEventIsolation", work, _OURS_ASYNC, _FLOOR)
    work = ptb.adding(place, "dict", fields)
    yield _Row("PTB user_data, DictPersistence", work, _OURS_ASYNC, _FLOOR)
    yield _Row(_FLOOR, bare.memory(fields), _OURS, _FLOOR)


def _disk(place: Place, size: str) -> Iterable[_Row]:
    fields = SESSIONS[size]
    yield _Row(_SQLITE, ours.adding(place, "SQLite", fields), _SQLITE, _BARE_SQLITE)
    yield _Row(_DISK, ours.adding(place, "disk", fields), _SQLITE, _BARE_DISK)
    work = telebot.adding(place, "pickle", fields)
    yield _Row("telebot retrieve_data, StatePickleStorage", work, _SQLITE, _BARE_SQLITE)
    name = f"{_SQLITE}, async with"
    yield _Row(name, ours.adding_async(place, "SQLite", fields), name, _BARE_SQLITE)
    work = ptb.adding(place, "pickle", fields)
    yield _Row("PTB user_data, PicklePersistence", work, name, _BARE_SQLITE)
    yield _Row(_BARE_SQLITE, bare.sqlite(place, fields), _SQLITE, _BARE_SQLITE)
    yield _Row(_BARE_DISK, bare.disk(place, fields), _DISK, _BARE_DISK)


def _redis(setting: Setting, place: Place, size: str) -> Iterable[_Row]:
    fields = SESSIONS[size]
    yield _Row(_OURS, ours.adding(place, "Redis", fields), _OURS, _BARE_REDIS)
    work = telebot.adding(place, "Redis", fields)
    yield _Row("telebot retrieve_data, StateRedisStorage", work, _OURS, _BARE_REDIS)
    yield _Row(_OURS_ASYNC, ours.adding_async(place, "Redis", fields), _OURS_ASYNC, _BARE_REDIS)
    if setting.has_aiogram:
        from ..sides import aiogram

        work = aiogram.adding(place, "Redis", fields)
        yield _Row("aiogram RedisStorage, RedisEventIsolation", work, _OURS_ASYNC, _BARE_REDIS)
    yield _Row(_BARE_REDIS, bare.redis(place, fields), _OURS, _BARE_REDIS)


# -- next to telebot alone, in short


def _cost(setting: Setting) -> Table:
    """Ours and telebot's in memory with each session, and ours of 1,000 fields to ours of 5."""
    of = {
        "5: a counter, a step, a user, a cart, a list": SMALL,
        "5, none of them nested": FLAT,
        "1,000, nested": LARGE,
    }
    with Place(setting) as place:
        works = {}
        for name, fields in of.items():
            works[f"ours {name}"] = ours.adding(place, "memory", fields)
            works[f"telebot {name}"] = telebot.adding(place, "memory", fields)
        timings = setting.measure(works)
    first = next(iter(of))
    return table(
        "update_cost",
        "One update in memory that adds 1, in microseconds",
        "Medians. telebot's `retrieve_data` copies all of a session, and takes no lock.",
        ("fields of the session", "session_sync", "telebot `retrieve_data`", "to 5 fields"),
        (
            (
                name,
                timings.of(f"ours {name}").median * 1e6,
                timings.of(f"telebot {name}").median * 1e6,
                timings.ratio(f"ours {name}", to=f"ours {first}").median,
            )
            for name in of
        ),
    )


# -- what else an update may do


def _kinds(setting: Setting) -> Table:
    stores = ["memory", "SQLite", "disk", *(["Redis"] if setting.has_redis else [])]
    kinds: dict[str, Callable[[Place, str], Work]] = {
        "adds 1": lambda place, kind: ours.adding(place, kind, SMALL),
        "adds 1, lazy": lambda place, kind: ours.adding(place, kind, SMALL, lazy=True),
        "reads": lambda place, kind: ours.reading(place, kind, SMALL),
        "reads, lazy": lambda place, kind: ours.reading(place, kind, SMALL, lazy=True),
        "never touches it": lambda place, kind: ours.passing(place, kind, SMALL),
        "never touches it, lazy": lambda place, kind: ours.passing(place, kind, SMALL, lazy=True),
    }
    figures = []
    for store in stores:
        with Place(setting) as place:
            figures.append(
                setting.measure({name: make(place, store) for name, make in kinds.items()})
            )
    return table(
        "update_kinds",
        "One update of a small session in session_sync, in microseconds",
        "Median (quartiles). An update that is not lazy loads the session in any case.",
        ("an update that", *stores),
        ((name, *(timings.of(name) * 1e6 for timings in figures)) for name in kinds),
    )


def _untouched(setting: Setting) -> Table:
    bare_call = "the handler alone"
    with Place(setting) as place:
        works = {
            bare_call: _calling,
            "never touches its session, lazy": ours.passing(place, "memory", SMALL, lazy=True),
            "never touches its session, eager": ours.passing(place, "memory", SMALL),
            "reads its session, eager": ours.reading(place, "memory", SMALL),
        }
        timings = setting.measure(works)
    return table(
        "update_untouched",
        "What a session in memory adds to a handler that does nothing with it, in microseconds",
        "Median (quartiles); the difference is taken within each round.",
        ("a handler that", "microseconds", "over the handler alone"),
        (
            (
                name,
                timings.of(name) * 1e6,
                "" if name == bare_call else timings.over(name, than=bare_call) * 1e6,
            )
            for name in works
        ),
    )


def _calling(times: int) -> None:
    def handler(update: object) -> None:
        pass

    for _ in range(times):
        handler(None)
