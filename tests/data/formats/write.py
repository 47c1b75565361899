"""Writes `tests/data/formats/N/`: sessions as this version of session_sync stores them.

Run once for each form of what is stored, by the code that first wrote it, and kept for ever:
`tests/test_formats.py` reads them with the code of today.

    python tests/data/formats/write.py 1

1: the fields, and timers under `$ttl`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from session_sync import Codec, DiskStorage, SessionManager, SQLiteStorage, ttl

HERE = Path(__file__).parent
LONG = 100_000 * 86_400  # seconds

#: What lies there, as a handler puts it in.
PLAIN: dict[str, dict[str, Any]] = {
    "user:1:chat:1": {
        "counter": 3,
        "name": "Alex \U0001f511 \ud800",
        "cart": {"items": ["tea", {"milk": 2}], "total": Decimal("7.50")},
        "seen": {7: "a", -1001234567890: "b"},
        "tags": {"new", "paid"},
        "pair": (1, ("x", None)),
        "frozen": frozenset({1, 2}),
    },
    "user:2:chat:-100:thread:5": {
        "big": 2**80,
        "half": 0.5,
        "endless": [float("inf"), float("-inf")],
        "raw": b"\x00\xff",
        "when": datetime(2026, 1, 2, 3, 4, 5, 6),
        "there": datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Vienna")),
        "then": datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        "day": date(2026, 1, 2),
        "hour": time(3, 4, tzinfo=UTC),
        "for": timedelta(days=-1, microseconds=5),
        "id": UUID(int=5),
    },
    "user:3": {"code": "1234", "draft": {"step": "name"}},
}
TIMED = {"user:3": {"code": ttl("1234", LONG)}}  # over the plain ones


def fill(sessions: SessionManager[Any], contents: Mapping[str, Mapping[str, Any]]) -> None:
    for key, fields in contents.items():
        with sessions.session_scope(key) as session:
            session.update(fields)
            session.update(TIMED.get(key, {}))


def main(number: str) -> None:
    folder = HERE / number
    folder.mkdir()
    disk, sqlite = DiskStorage(folder / "disk"), SQLiteStorage(folder / "sessions.db")
    for storage in (disk, sqlite):
        sessions = SessionManager(storage=storage)
        fill(sessions, PLAIN)
    codec = Codec()  # what RedisStorage stores, and what an adapter does that has only text
    with (folder / "sessions.jsonl").open("wb") as lines:
        for key in PLAIN:
            fields = sqlite.get(key)
            assert fields is not None
            lines.write(codec.encode({"key": key, "fields": fields}) + b"\n")
    for storage in (disk, sqlite):
        storage.close()
    for left in (*folder.glob("*-locks"), *folder.glob("disk/locks*")):
        left.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
