"""Updates per second of 1, 8 and 64 threads in memory, on different keys and on one.

The number of updates is the same for any number of threads, which share them out. On CPython with
its GIL no more than one thread runs at a time, so 1.0 is as good as it gets; different keys should
stay above 0.8.

    python -m benchmarks.threads
"""

from __future__ import annotations

from typing import Any

from session_sync import SessionManager

from .peers import USER, message
from .timing import Spread, arguments, in_threads, print_machine, table

THREADS = (1, 8, 64)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=15)
    parser.add_argument("--updates", type=int, default=64_000, help="of all threads together")
    options = parser.parse_args()
    print_machine(options.rounds)
    kinds = [(threads, keys) for keys in ("different keys", "one key") for threads in THREADS]
    speed: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
    kept: dict[tuple[int, str], int] = dict.fromkeys(kinds, 0)
    _run(THREADS[-1], THREADS[-1], options.updates // 10)  # to warm up
    for number in range(options.rounds):
        first = number % len(kinds)
        for threads, keys in (*kinds[first:], *kinds[:first]):
            seconds, count = _run(threads, threads if keys != "one key" else 1, options.updates)
            speed[threads, keys].append(options.updates / seconds)
            kept[threads, keys] += count
    total = options.updates * options.rounds
    print(
        table(
            ("", "threads", "updates a second", "to 1 thread", "kept"),
            (
                (
                    keys,
                    f"{threads}",
                    Spread.of(speed[threads, keys]).show(digits=0),
                    Spread.of(
                        many / one
                        for many, one in zip(speed[threads, keys], speed[1, keys], strict=True)
                    ).show(),
                    f"{kept[threads, keys]:,} of {total:,}",
                )
                for threads, keys in kinds
            ),
        )
    )


def _run(threads: int, keys: int, updates: int) -> tuple[float, int]:
    """Seconds for `updates` updates, from the first thread's start to the last one's end, and how
    many were kept."""
    sessions: SessionManager[Any] = SessionManager(lock_timeout=None)
    messages = [message(USER + number) for number in range(keys)]
    for update in messages:
        with sessions.session_scope(update) as session:
            session["counter"] = 0

    def run(number: int) -> None:
        update = messages[number % keys]
        for _ in range(updates // threads + (number < updates % threads)):
            with sessions.session_scope(update) as session:
                session["counter"] += 1

    seconds = in_threads(threads, run)
    kept = 0
    for update in messages:
        with sessions.session_scope(update) as session:
            kept += session["counter"]
    return seconds, kept


if __name__ == "__main__":
    main()
