"""What a handler raises, and PTB tells the error handlers; what those raise, it swallows, so that
their scope would not see it.

This module knows handlers and the scopes around them; it does not know how they are called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Final

from .attribute import Binding


def roll_back(update: object, error: Exception) -> None:
    """Roll the sessions of `update` back before anything sees what its handler raised."""
    binding = Binding.of(update)
    if binding is not None:
        binding.discard(error)


class RollsBack:
    """An error handler that discards what it has done when it raises; to PTB it is the same one."""

    def __init__(self, callback: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.callback: Final = callback
        functools.update_wrapper(self, callback, updated=())

    async def __call__(self, update: object, context: Any) -> Any:
        try:
            return await self.callback(update, context)
        except Exception as error:
            roll_back(update, error)
            raise

    def __eq__(self, other: object) -> bool:
        callback = other.callback if isinstance(other, RollsBack) else other
        return bool(self.callback == callback)

    def __hash__(self) -> int:
        return hash(self.callback)
