"""What the tests of several sessions at once share."""

from __future__ import annotations

import threading
from typing import Any

from session_sync import SessionManager

SOON = 20  # seconds until a test gives up waiting for what has to come


class Plain:
    """An adapter with the four methods, which fails for the key `broken`."""

    broken = ""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.kept.get(key)

    def set(self, key: str, value: Any) -> None:
        if key == self.broken:
            raise OSError("the disk is full")
        self.kept[key] = value

    def delete(self, key: str) -> None:
        self.kept.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.kept


async def _add_to_both(
    sessions: SessionManager[Any], *keys: str, seen: list[Any] | None = None
) -> None:
    async with sessions.session_scopes(*keys) as both:
        for session in both:
            session.coins = session.get("coins", 0) + 1
        if seen is not None:
            seen.extend(both)


class Slow(Plain):
    """An adapter that waits in the middle of writing two."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def save_all(self, records: Any, _opened: Any) -> bool:
        self.begun.set()
        assert self.may_end.wait(SOON)
        self.put(records)
        return True

    def put(self, records: Any) -> None:
        self.kept.update({key: dict(record) for key, record in records.items()})
