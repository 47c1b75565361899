"""What the tests of races between scopes share."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from scope_tools import Counting

from session_sync import SessionManager

SOON = 5  # seconds until a test that waits for something in vain gives up


class Quick(Counting):
    """As Counting, called at once and in the thread of whoever asks, like a store in memory."""

    blocking = False


class Hesitant(Counting):
    """A storage whose first `get` waits."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def get(self, key: str) -> Any:
        if not self.begun.is_set():
            self.begun.set()
            assert self.go_on.wait(20)
        return super().get(key)


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def is_soon_free(sessions: SessionManager[Any]) -> bool:
    """What a finaliser unlocks that blocks, a thread unlocks."""
    give_up = time.monotonic() + SOON
    while not is_free(sessions) and time.monotonic() < give_up:
        time.sleep(0)
    return is_free(sessions)


async def let_others_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
