"""What it costs to read the dicts, lists and sets that a session hands out, next to plain ones.

The promise: iteration at a plain one's speed, a subscript of a dict at most 2.5 times one, of a
list at most 4 times (the interpreter's price for a subclass: it has no fast path for those). Fast
statements are timed fifty in a row, since one takes less than the loop around it.
"""

from __future__ import annotations

import json
import timeit
from typing import Any

from session_sync import SessionManager

from ..setting import Setting
from ..tables import Cell, Table, table
from ..timing import Work

_ITEMS = 1_000
_IN_A_ROW = 50
VALUES: dict[str, Any] = {
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


def run(setting: Setting) -> list[Table]:
    """Each statement on a container of a session and on a plain one."""
    sessions = SessionManager()
    with sessions.session_scope("user:1") as session:
        session.update(VALUES)
    with sessions.session_scope("user:1") as session:
        ours = dict(session)
        rows = [_row(setting, ours, *done) for done in DONE]
    return [
        table(
            "reading",
            "Reading the containers of a session, in nanoseconds",
            "Median (quartiles).",
            ("", "session_sync", "plain", "ratio", "at most"),
            rows,
        )
    ]


def _row(
    setting: Setting,
    ours: dict[str, Any],
    name: str,
    which: str,
    statement: str,
    in_a_row: int,
    bound: float | None,
) -> tuple[Cell, ...]:
    timings = setting.measure(
        {
            "ours": _doing(statement, in_a_row, which, ours[which]),
            "plain": _doing(statement, in_a_row, which, VALUES[which]),
        }
    )
    return (
        name,
        timings.of("ours") * (1e9 / in_a_row),
        timings.of("plain") * (1e9 / in_a_row),
        timings.ratio("ours", to="plain"),
        "" if bound is None else bound,
    )


def _doing(statement: str, in_a_row: int, which: str, value: Any) -> Work:
    names = {"value": value, "plain": VALUES[which], "dumps": json.dumps}
    return timeit.Timer("\n".join([statement] * in_a_row), globals=names).timeit
