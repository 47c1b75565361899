"""What the tests of late and of failed writes share."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

from stores import OwnStorage
from waiting import SOON

from session_sync import SessionManager


class Slow(OwnStorage):
    """Its first write takes until it is let go; or fails then."""

    def __init__(self, blocking: bool = True, error: Exception | None = None) -> None:
        super().__init__()
        self.blocking, self.error = blocking, error
        self.begun, self.go_on, self.ended = (threading.Event() for _ in range(3))

    def set(self, key: str, value: Any) -> None:
        if self.begun.is_set():
            super().set(key, value)
            return
        self.begun.set()
        assert self.go_on.wait(SOON)
        try:
            if self.error is not None:
                raise self.error
            super().set(key, value)
        finally:
            self.ended.set()


class Interrupt(BaseException):
    """As Ctrl-C."""


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def throw_away(kept: list[Any]) -> None:
    kept.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
