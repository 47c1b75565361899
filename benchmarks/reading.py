"""What it costs to read the dicts, lists and sets that a session hands out, next to plain ones.

The promise: iteration at a plain one's speed, a subscript of a dict at most 2.5 times one, of a
list at most 4 times (the interpreter's price for a subclass: it has no fast path for those).

    python -m benchmarks.reading
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from typing import Any

from session_sync import SessionManager

from .timing import Case, arguments, measure, print_machine, table

_ITEMS = 1_000
_IN_A_ROW = 50  # a subscript takes less than the loop around it
VALUES = {
    "dict": {f"field{n}": n for n in range(_ITEMS)},
    "list": [f"item {n}" for n in range(_ITEMS)],
    "set": {f"item {n}" for n in range(_ITEMS)},
    "nested": {f"field{n}": {"id": n, "items": [n, str(n)]} for n in range(_ITEMS // 10)},
}
# What is done, with which value, how often in a row, and what the contract allows.
DONE = (
    ("iterate over a dict", "dict", "for _ in value: pass", 1, 1.1),
    ("iterate over items()", "dict", "for _, _ in value.items(): pass", 1, 1.1),
    ("iterate over a list", "list", "for _ in value: pass", 1, 1.1),
    ("iterate over a set", "set", "for _ in value: pass", 1, 1.1),
    ("dict[key]", "dict", "value['field500']", _IN_A_ROW, 2.5),
    ("list[index]", "list", "value[500]", _IN_A_ROW, 4.0),
    ("dict.get(key)", "dict", "value.get('field500')", _IN_A_ROW, None),
    ("key in dict", "dict", "'field500' in value", _IN_A_ROW, None),
    ("item in set", "set", "'item 500' in value", _IN_A_ROW, None),
    ("item in list", "list", "'item 500' in value", 1, None),
    ("list[100:200]", "list", "value[100:200]", _IN_A_ROW, None),
    ("len(list)", "list", "len(value)", _IN_A_ROW, None),
    ("dict == dict", "dict", "value == plain", 1, None),
    ("sorted(set)", "set", "sorted(value)", 1, None),
    ("json.dumps, a flat dict", "dict", "dumps(value)", 1, None),
    ("json.dumps, nested", "nested", "dumps(value)", 1, None),
)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=51)
    parser.add_argument("--times", type=int, default=1_000, help="fast statements, in one round")
    options = parser.parse_args()
    print_machine(options.rounds)
    sessions: SessionManager[Any] = SessionManager()
    with sessions:
        with sessions.session_scope("user:1") as session:
            session.update(VALUES)
        with sessions.session_scope("user:1") as session:
            _compare(dict(session), options.times, options.rounds)


def _compare(ours: dict[str, Any], times: int, rounds: int) -> None:
    rows = []
    for name, which, statement, in_a_row, bound in DONE:
        count = times if in_a_row > 1 else max(1, times // 20)
        timings = measure(
            [
                Case("ours", _doing(statement, in_a_row, which, ours[which]), count),
                Case("plain", _doing(statement, in_a_row, which, VALUES[which]), count),
            ],
            rounds,
        )
        rows.append(
            (
                name,
                timings.of("ours").show(1e9 / in_a_row, digits=0),
                timings.of("plain").show(1e9 / in_a_row, digits=0),
                timings.ratio("ours", to="plain").show(),
                "" if bound is None else f"{bound:g}",
            )
        )
    print(table(("", "session_sync, ns", "plain, ns", "ratio", "at most"), rows))


def _doing(statement: str, in_a_row: int, which: str, value: Any) -> Callable[[int], float]:
    names = {"value": value, "plain": VALUES[which], "dumps": json.dumps}
    return timeit.Timer("\n".join([statement] * in_a_row), globals=names).timeit


if __name__ == "__main__":
    main()
