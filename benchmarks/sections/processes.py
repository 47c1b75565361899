"""Updates per second of 1, 2 and 4 processes on one store, on different keys and on one; and what
is kept.

The number of updates is the same for any number of processes, which share them out. Each is an
interpreter of its own, which opens the store and begins when all are ready. telebot's store and the
bare ones have no lock between processes: on one key they are fast, and lose updates. On a machine
with two cores four processes cannot be twice as fast as two.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from session_sync import SQLiteStorage

from ..fields import COUNTER
from ..setting import Place, Setting
from ..tables import Cell, Table, table
from ..timing import Rounds, Spread, in_turns, share_of
from ..worker import side_of

_ROOT = Path(__file__).parents[2]
_PROCESSES = (1, 2, 4)
_SIDES = ("session_sync, SQLite", "bare sqlite3")
_REDIS_SIDES = ("session_sync, Redis", "telebot, Redis", "bare Redis")


def run(setting: Setting) -> list[Table]:
    """Every side with every number of processes."""
    updates = setting.scaled(2_000, quick=8)
    processes = (2,) if setting.quick else _PROCESSES
    sides = (*_SIDES, *(_REDIS_SIDES if setting.has_redis else ()))
    cases = [
        (side, keys, number)
        for side in sides
        for keys in ("different keys", "one key")
        for number in processes
    ]
    speed: dict[str, list[float]] = {str(case): [] for case in cases}
    kept: dict[str, list[float]] = {str(case): [] for case in cases}
    with _workers(processes[-1]) as workers:
        for case in in_turns(cases, setting.fewer(3)):
            side, keys, number = case
            with Place(setting) as place:
                seconds, count = _measured(
                    place, side, workers[:number], keys == "one key", updates
                )
            speed[str(case)].append(updates / seconds)
            kept[str(case)].append(100 * count / updates)
    rounds = Rounds(speed)

    def row(side: str, keys: str, number: int) -> list[Cell]:
        this, first = str((side, keys, number)), str((side, keys, processes[0]))
        return [
            f"{side}, {keys}, {number}",
            rounds.of(this),
            "" if this == first else rounds.ratio(this, to=first),
            Spread.of(kept[this]),
        ]

    return [
        table(
            "processes",
            "Updates per second by number of processes",
            f"Median (quartiles) of {setting.fewer(3)} rounds, for {updates:,} updates, which the "
            f"processes share out.",
            ("side, keys, processes", "updates per second", "to 1 process", "kept, %"),
            (row(*case) for case in cases),
        )
    ]


def _measured(
    place: Place, side: str, workers: list[Any], one_key: bool, updates: int
) -> tuple[float, int]:
    """Seconds from the first process's first update to the last one's last, and how many updates
    were kept."""
    store = _store(place, side)
    users = 1 if one_key else len(workers)
    counters = side_of(side, store, place)
    for user in range(users):
        counters.begin(user)
    seconds = _run_together(
        workers,
        [
            {
                "side": side,
                "store": store,
                "user": number % users,
                "updates": share_of(updates, len(workers), number),
            }
            for number in range(len(workers))
        ],
    )
    return seconds, sum(counters.count(user) - COUNTER for user in range(users))


def _store(place: Place, side: str) -> str:
    """Where a new store is: a file or a URL."""
    if side in _REDIS_SIDES:
        place.redis_client()  # empties the server at the end
        return place.redis_url
    path = os.path.join(place.folder(), "sessions.db")
    SQLiteStorage(path).close()
    return path


@contextlib.contextmanager
def _workers(number: int) -> Iterator[list[Any]]:
    """So many processes, which wait for tasks until the end."""
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.worker"]
        pipe = subprocess.PIPE
        yield [
            stack.enter_context(
                subprocess.Popen(command, cwd=_ROOT, stdin=pipe, stdout=pipe, text=True)
            )
            for _ in range(number)
        ]


def _run_together(workers: list[Any], tasks: list[dict[str, Any]]) -> float:
    """Let all begin when all are ready; they say when they began and ended, by one clock."""
    for worker, task in zip(workers, tasks, strict=True):
        _tell(worker, json.dumps(task))
    for worker in workers:
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError("a worker failed; its traceback is above")
    for worker in workers:
        _tell(worker, "go")
    times = [tuple(map(float, worker.stdout.readline().split())) for worker in workers]
    return max(end for _, end in times) - min(begin for begin, _ in times)


def _tell(worker: Any, line: str) -> None:
    worker.stdin.write(f"{line}\n")
    worker.stdin.flush()
