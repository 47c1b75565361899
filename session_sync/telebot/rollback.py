"""What a handler raises, and telebot swallows, so that its scope would not see it: a TeleBot with
class middlewares does, an AsyncTeleBot always.

This module knows handlers and the scopes around them; it does not know how they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ..lifecycle.current import entries


def roll_back(update: object, error: Exception) -> None:
    """Roll the sessions of `update` back before anything sees what its handler raised."""
    for entry in entries():
        if entry.update is update:
            entry.target.discard(error)


def rolling_back(
    handlers: Iterable[Mapping[str, Any]], wrap: type[RollsBack]
) -> Iterator[dict[str, Any]]:
    for handler in handlers:
        yield {**handler, "function": wrap(handler["function"])}


class RollsBack:
    """A handler's function; telebot looks at its signature, which `__wrapped__` leads to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__: Final = function

    def __call__(self, update: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(update, *args, **kwargs)
        except Exception as error:
            roll_back(update, error)
            raise


class AsyncRollsBack(RollsBack):
    """The same for a coroutine function."""

    async def __call__(self, update: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await self.__wrapped__(update, *args, **kwargs)
        except Exception as error:
            roll_back(update, error)
            raise
