"""The way of one update through the package: as CONTRIBUTING.md tells it, and through few places.

What is counted are calls of the package's own functions while a telebot bot handles an update whose
handler adds 1 to a field, and how often a call leads from one entry at the top to another one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from pages import ROOT

import session_sync
from session_sync import SessionManager, SQLiteStorage

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")

from session_sync.telebot import install  # noqa: E402

PACKAGE = Path(session_sync.__file__).parent
STEP = re.compile(r"^\d+\. `([\w/]+\.py)` `([\w.]+)`", re.M)


class Step(NamedTuple):
    file: str
    function: str

    @property
    def place(self) -> str:
        """The entry at the top of the package."""
        return self.file.partition("/")[0]


def trace(storage: Any = None) -> list[Step]:
    """The calls in the package while an update is handled, by a bot that has handled others."""
    sessions = SessionManager(storage=storage)
    bot = telebot.TeleBot("1:token", threaded=False)
    install(bot, sessions)

    @bot.message_handler(func=lambda message: True)
    def count(message: Any) -> None:
        message.session.counter = message.session.get("counter", 0) + 1

    def update(number: int) -> Any:
        user = {"id": 7, "is_bot": False, "first_name": "Alex"}
        message = {"message_id": number, "date": 1, "chat": {"id": 7, "type": "private"}}
        data = {"update_id": number, "message": message | {"from": user, "text": "Hello"}}
        return telebot.types.Update.de_json(data)

    for number in range(1, 4):
        bot.process_new_updates([update(number)])
    traced, last = [], update(4)

    def note(frame: FrameType, event: str, _arg: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            function = frame.f_code.co_qualname
            traced.append(Step(path.relative_to(PACKAGE).as_posix(), function))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        bot.process_new_updates([last])
    finally:
        sys.setprofile(before)
    assert sessions.storage.get("user:7:chat:7") == {"counter": 4}
    return traced


def in_memory(_folder: Path) -> list[Step]:
    return trace()


def in_sqlite(folder: Path) -> list[Step]:
    storage = SQLiteStorage(folder / "sessions.db")
    try:
        return trace(storage)
    finally:
        storage.close()


def test_an_update_takes_the_way_that_the_page_shows() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = [Step(*found) for found in STEP.findall(text)]
    assert len(told) > 10
    traced = iter(trace())
    missing = [step for step in told if not any(step == each for each in traced)]
    assert not missing, f"not traced, or not in this order: {missing[0]}"


@pytest.mark.parametrize(
    ("run", "places", "changes", "calls"), [(in_memory, 5, 20, 56), (in_sqlite, 5, 22, 118)]
)
def test_an_update_passes_few_places(
    run: Callable[[Path], list[Step]], places: int, changes: int, calls: int, tmp_path: Path
) -> None:
    traced = run(tmp_path)
    assert len({step.place for step in traced}) <= places
    assert sum(a.place != b.place for a, b in pairwise(traced)) <= changes
    assert len(traced) <= calls
