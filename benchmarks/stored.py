"""What one update costs when many sessions are stored, next to what it costs with few.

Random keys, one thread, each storage on disk or in a server of its own. The key of an update is
found by an index, so the cost should hardly depend on how many others there are.

    python -m benchmarks.stored
    python -m benchmarks.stored --redis-url redis://localhost:6379/15
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
from typing import Any

from session_sync import SessionManager, storage_from_url

from .overhead import SMALL
from .timing import Case, arguments, log, measure, print_machine, table


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=15)
    parser.add_argument("--few", type=int, default=100, help="sessions stored in the small store")
    parser.add_argument("--many", type=int, default=100_000, help="and in the large one")
    parser.add_argument("--updates", type=int, default=300, help="in one round")
    parser.add_argument("--redis-url", help="a database that is empty, and will be emptied")
    options = parser.parse_args()
    print_machine(options.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        kinds = ["sqlite", "disk", *(["redis"] if options.redis_url else [])]
        cases = []
        for kind, size in itertools.product(kinds, (options.few, options.many)):
            log(f"{kind}: storing {size:,} sessions")
            url = f"{kind}:///{folder}/{kind}{size}"
            if kind == "redis":
                url = f"{options.redis_url}?prefix={size}:"
            cases.append(_case(stack, kind, size, url, options.updates))
        timings = measure(cases, options.rounds)
        for kind in kinds:
            few, many = f"{kind} {options.few}", f"{kind} {options.many}"
            shown = (timings.of(few).show(1e6), timings.of(many).show(1e6))
            rows.append((kind, *shown, timings.ratio(many, to=few).show()))
    print("One update that adds 1, microseconds\n")
    print(table(("storage", f"{options.few:,} stored", f"{options.many:,} stored", "ratio"), rows))


def _case(stack: contextlib.ExitStack, kind: str, size: int, url: str, updates: int) -> Case:
    storage: Any = storage_from_url(url)
    stack.callback(storage.close)
    keys = [f"user:{number}:chat:{number}" for number in range(size)]
    for key in keys:
        storage.set(key, SMALL)
    if kind == "redis":
        stack.callback(lambda: [storage.delete(key) for key in keys])
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    chance = random.Random(1)

    def work(times: int) -> None:
        for key in chance.choices(keys, k=times):
            with sessions.session_scope(key) as session:
                session["counter"] += 1

    return Case(f"{kind} {size}", work, updates)


if __name__ == "__main__":
    main()
