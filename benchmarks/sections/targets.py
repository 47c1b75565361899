"""What this library is to reach, and what was measured: made of the tables of the same run.

A target is a row of a table, a column, and what the median there may be at most (or at least). One
whose row was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ..tables import Cell, Table, shown, table
from ..timing import Spread


@dataclass(frozen=True)
class Target:
    """The figure `column` of the row `row` in the table `name`, and its bound."""

    says: str
    name: str
    row: str
    column: str
    most: float | None = None
    least: float | None = None

    def is_met(self, median: float) -> bool:
        if self.most is not None:
            return median <= self.most
        return self.least is None or median >= self.least

    @property
    def bound(self) -> str:
        if self.most is not None:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}"


_TO_IT: Final = "ours to it"
_FLOOR: Final = "to its floor"
TARGETS: Final = (
    Target(
        "memory, small session, to telebot `retrieve_data`",
        "update_memory_small",
        "telebot retrieve_data, StateMemoryStorage",
        _TO_IT,
        most=0.6,
    ),
    Target(
        "memory, small session, `async with`, to aiogram with isolation",
        "update_memory_small",
        "aiogram MemoryStorage, SimpleEventIsolation",
        _TO_IT,
        most=1.0,
    ),
    Target(
        "memory, 1,000 fields, to telebot `retrieve_data`",
        "update_memory_large",
        "telebot retrieve_data, StateMemoryStorage",
        _TO_IT,
        most=0.01,
    ),
    Target(
        "memory, 1,000 fields, to our own small session",
        "update_cost",
        "1,000, nested",
        "to 5 fields",
        most=2.0,
    ),
    Target(
        "disk, small session, to bare diskcache",
        "update_disk_small",
        "session_sync, DiskStorage",
        _FLOOR,
        most=1.3,
    ),
    Target(
        "SQLite, small session, to bare sqlite3",
        "update_disk_small",
        "session_sync, SQLite",
        _FLOOR,
        most=2.0,
    ),
    Target(
        "SQLite, small session, to our DiskStorage",
        "update_disk_small",
        "session_sync, DiskStorage",
        _TO_IT,
        most=0.6,
    ),
    Target(
        "Redis, small session, to bare GET and SET",
        "update_redis_small",
        "session_sync",
        _FLOOR,
        most=1.15,
    ),
    Target(
        "Redis, small session, `async with`, to aiogram with isolation",
        "update_redis_small",
        "aiogram RedisStorage, RedisEventIsolation",
        _TO_IT,
        most=0.55,
    ),
    *(
        Target(
            f"codec alone, {record}, one field touched, to a full decode and encode",
            "partial",
            f"codec alone, {record}",
            "to full",
            most=1.0,
        )
        for record in ("1,000 fields", "100 KB of text")
    ),
    *(
        Target(
            f"{store}, {record}, over the bare store, to a full decode and encode",
            "partial",
            f"{store}, {record}",
            "to full",
            most=1.0,
        )
        for store in ("SQLite", "disk", "Redis")
        for record in ("1,000 fields", "100 KB of text")
    ),
    Target(
        "never touches its session, lazy: microseconds over the handler alone",
        "update_untouched",
        "never touches its session, lazy",
        "over the handler alone",
        most=1.0,
    ),
    *(
        Target(
            f"{client}, {handler}: % of the updates per second, {store}",
            "bots",
            f"{client}, {handler}, {store}",
            "cost, %",
            most=most,
        )
        for client in ("telebot", "PTB", "PTB, concurrent_updates(32)")
        for handler in ("answers", "only counts")
        for store, most in (("memory", 5), ("SQLite", 15))
    ),
    Target(
        "memory, 64 threads on different keys, to 1 thread",
        "threads_memory",
        "session_sync, memory, different keys, 64",
        "to 1 thread",
        least=0.8,
    ),
)


def of(tables: Iterable[Table]) -> Table:
    """Every target of which there is a figure in `tables`."""
    named = {table.name: table for table in tables}
    return table(
        "targets",
        "Targets",
        "Measured is the median (quartiles); the median has to keep within the bound.",
        ("target", "bound", "measured", "met"),
        [*_bounded(named), *_crowded(named)],
    )


def _bounded(tables: Mapping[str, Table]) -> Iterator[tuple[Cell, ...]]:
    for target in TARGETS:
        found = tables.get(target.name)
        figure = None if found is None else found.at(target.row, target.column)
        if figure is not None:
            met = "yes" if target.is_met(figure.median) else "no"
            yield target.says, target.bound, figure, met


def _crowded(tables: Mapping[str, Table]) -> Iterator[tuple[Cell, ...]]:
    """With the most users, the ratio to the bare store is no worse than with the fewest: its median
    is within what was measured there."""
    if (users := tables.get("users")) is None:
        return
    column = "to the bare store"
    for store in ("SQLite", "disk", "Redis"):
        names = [str(row[0]) for row in users.rows if str(row[0]).startswith(f"{store}, ")]
        if len(names) < 2:
            continue
        few, many = users.at(names[0], column), users.at(names[-1], column)
        if few is not None and many is not None:
            yield _crowd(names, few, many)


def _crowd(names: list[str], few: Spread, many: Spread) -> tuple[Cell, ...]:
    store, _, size = names[-1].partition(", ")
    says = f"{store}, {size} users, to the bare store, as with {names[0].partition(', ')[2]}"
    met = "yes" if many.median <= few.high else "no"
    return says, f"at most {shown(few.high)}", many, met
