"""A storage as a user of the library would write it."""

from __future__ import annotations

from typing import Any


class OwnStorage:
    """The four methods and no more. It may block, for all that is known of it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.values
