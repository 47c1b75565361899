"""Writes `tests/data/formats/N/`: sessions as this version of session_sync stores them.

Run once for each form of what is stored, by the code that first wrote it, and kept for ever:
`tests/storages/test_formats.py` reads them with the code of today.

    python tests/data/formats/write.py 2

1: the fields, and timers under `$ttl`.
2: declared fields as well, objects as dicts of their parts, and the version under `$version`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from session_sync import Codec, DiskStorage, Session, SessionManager, SQLiteStorage, field, ttl

HERE = Path(__file__).parent
LONG = 100_000 * 86_400  # seconds


class Form(NamedTuple):
    """How a form is read, what a handler then has, and the fields among it that have a timer."""

    sessions: Callable[[Any], SessionManager[Any]]
    contents: dict[str, dict[str, Any]]
    timed: dict[str, str]


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


class Color(Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Profile(msgspec.Struct):
    name: str


@dataclass
class Line:
    name: str
    price: int
    color: Color | str = "none"


@dataclass
class AskName:
    prompt: str


@dataclass
class AskAge:
    prompt: str


class Cart(Session):
    migrations = {2: lambda fields: None, 3: lambda fields: None}
    lines: list[Line] = field(default_factory=list)
    theme: Literal["light", "dark"] = "light"
    color: Color = Color.RED
    points: dict[Point, set[Point]] = field(default_factory=dict)
    step: AskName | AskAge | None = None
    profile: Profile | None = None


DECLARED: dict[str, dict[str, Any]] = {
    "user:1": {
        "lines": [Line("tea", 4), Line("milk", 2, Color.RED)],
        "theme": "dark",
        "color": Color.RED,
        "points": {Point(1): {Point(2, 0.5)}},
        "step": AskAge("?"),
        "profile": Profile("Alex"),
        "free": {"form": [1]},
    },
}

FORMATS = {
    "1": Form(lambda storage: SessionManager(storage=storage), PLAIN, {"user:3": "code"}),
    "2": Form(lambda storage: SessionManager(Cart, storage=storage), DECLARED, {"user:1": "theme"}),
}


def main(number: str) -> None:
    folder, form = HERE / number, FORMATS[number]
    folder.mkdir()
    disk, sqlite = DiskStorage(folder / "disk"), SQLiteStorage(folder / "sessions.db")
    for storage in (disk, sqlite):
        for key, fields in form.contents.items():
            with form.sessions(storage).session_scope(key) as session:
                session.update(fields)
                if key in form.timed:
                    session[form.timed[key]] = ttl(session[form.timed[key]], LONG)
    codec = Codec()  # what RedisStorage stores, and what an adapter does that has only text
    with (folder / "sessions.jsonl").open("wb") as lines:
        for key in form.contents:
            stored = sqlite.get(key)
            assert stored is not None
            lines.write(codec.encode({"key": key, "fields": stored}) + b"\n")
    for storage in (disk, sqlite):
        storage.close()
    for left in (*folder.glob("*-locks"), *folder.glob("disk/locks*")):
        left.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
