"""What a million different keys leave behind in the lock table: nothing.

The handlers do not write, so that the storage stays empty and what is left would be the locks'. The
keys are opened by one thread, then again by one thread while tracemalloc counts, then by 8 threads
that go through the same keys together and so wait for each other.

    python -m benchmarks.lock_table
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from typing import Any

from session_sync import MemoryStorage, SessionManager
from session_sync.door import door_of

from .timing import arguments, in_threads, print_machine, table

_TOGETHER = 8


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--keys", type=int, default=1_000_000)
    options = parser.parse_args()
    print_machine(options.rounds)
    keys, few = options.keys, max(1, options.keys // 10)
    storage = MemoryStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=None)
    locks = door_of(storage).locks
    rows = []
    for _ in range(options.rounds):
        seconds = _timed(sessions, keys)
        rows.append(("one thread", f"{keys:,}", f"{seconds:.2f}", f"{len(locks)}", "", ""))

        gc.collect()
        tracemalloc.start()
        _open(sessions, few)  # what is made once, at first use
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        seconds = _timed(sessions, keys)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rows.append(
            (
                "one thread, traced",
                f"{keys:,}",
                f"{seconds:.2f}",
                f"{len(locks)}",
                f"{before:,} -> {after:,} bytes",
                f"{peak - before:,} bytes",
            )
        )

        seconds = _together(sessions, few)
        name = f"{_TOGETHER} threads on the same keys"
        rows.append((name, f"{few:,}", f"{seconds:.2f}", f"{len(locks)}", "", ""))
    head = ("", "keys", "seconds", "locks left", "memory before and after", "peak above that")
    print(table(head, rows))


def _open(sessions: SessionManager[Any], keys: int) -> None:
    for number in range(keys):
        with sessions.session_scope(f"user:{number}"):
            pass


def _timed(sessions: SessionManager[Any], keys: int) -> float:
    begin = time.perf_counter()
    _open(sessions, keys)
    return time.perf_counter() - begin


def _together(sessions: SessionManager[Any], keys: int) -> float:
    return in_threads(_TOGETHER, lambda _: _open(sessions, keys // _TOGETHER))


if __name__ == "__main__":
    main()
