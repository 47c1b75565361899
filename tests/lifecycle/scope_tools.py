"""What the tests of scopes share: a store that counts, and one that is slow."""

from __future__ import annotations

import threading
from typing import Any

KEY = "user:1:chat:1"


class Counting:
    """A storage of four methods that counts its calls and the threads that they come from."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.threads: set[int] = set()

    def get(self, key: str) -> Any:
        self._called("get")
        return self.values.get(key)

    def set(self, key: str, value: dict[str, Any]) -> None:
        self._called("set")
        self.values[key] = value

    def delete(self, key: str) -> None:
        self._called("delete")
        self.values.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.values

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())


def slow_store() -> tuple[Counting, threading.Event, threading.Event]:
    """A storage whose first `set` waits, and the events of its beginning and going on."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def set(self, key: str, value: dict[str, Any]) -> None:
            if not begun.is_set():
                begun.set()
                assert go_on.wait(20)
            super().set(key, value)

    return Slow(), begun, go_on


class Failing(Counting):
    """A storage that fails in one of its methods while `broken` names it."""

    broken = ""

    def _called(self, name: str) -> None:
        if name == self.broken:
            raise OSError(f"{name} on fire")
        super()._called(name)
