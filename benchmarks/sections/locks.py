"""What a million different keys leave behind in the lock table: nothing.

The handlers do not write, so that the storage stays empty and what is left would be the locks'. The
keys are opened by one thread, then again by one thread while tracemalloc counts, then by 8 threads
that go through the same keys together and so wait for each other.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from typing import Any

from session_sync import MemoryStorage, SessionManager
from session_sync.lifecycle.backend import backend_of

from ..setting import Setting
from ..tables import Cell, Table, table
from ..timing import in_threads

_TOGETHER = 8


def run(setting: Setting) -> list[Table]:
    """Once each: what is left does not depend on the machine."""
    keys = setting.scaled(1_000_000, quick=100)
    few = max(1, keys // 10)
    storage = MemoryStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=None)
    locks = backend_of(storage).locks
    rows: list[tuple[Cell, ...]] = []
    seconds = _timed(sessions, keys)
    rows.append(("one thread", keys, seconds, len(locks), "", ""))
    gc.collect()
    tracemalloc.start()
    _open(sessions, few)  # what is made once, at first use
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    seconds = _timed(sessions, few)
    gc.collect()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows.append(
        ("one thread, traced", few, seconds, len(locks), after - before, peak - before),
    )
    seconds = in_threads(_TOGETHER, lambda _: _open(sessions, few // _TOGETHER))
    rows.append((f"{_TOGETHER} threads on the same keys", few, seconds, len(locks), "", ""))
    return [
        table(
            "locks",
            "What different keys leave behind in the lock table",
            "Measured once.",
            ("", "keys", "seconds", "locks left", "bytes left", "bytes at the peak"),
            rows,
        )
    ]


def _open(sessions: SessionManager[Any], keys: int) -> None:
    for number in range(keys):
        with sessions.session_scope(f"user:{number}"):
            pass


def _timed(sessions: SessionManager[Any], keys: int) -> float:
    begin = time.perf_counter()
    _open(sessions, keys)
    return time.perf_counter() - begin
