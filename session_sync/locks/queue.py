"""The queue of the callers and tickets that wait for one key.

This module knows the order in which they come; it does not know what they wait for.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from math import inf
from typing import Final, Generic, Protocol, TypeVar

from .watch import Patience


class Waiting(Protocol):
    """Something that may be in a queue."""

    @property
    def begun(self) -> bool:
        """False for a ticket that was not redeemed yet: its task has not begun."""
        ...


W = TypeVar("W", bound=Waiting)


class KeyQueue(Generic[W]):
    """Those that wait for one key, in the order in which they came.

    A ticket stands for a task that has not begun, and may need the very worker thread that a
    running handler occupies. So a running handler passes it: what it waits with is entered with
    `passes`. Hence two queues. `front` has those that come next; `back` begins with a ticket and
    has all waiters that may not pass it.

    Both are ordered dicts, since any waiter can leave them at no more cost than the first one; the
    first one of a plain dict is found by walking over all that have left.
    """

    __slots__ = ("back", "due", "front", "patience")

    def __init__(self) -> None:
        self.front: Final[OrderedDict[W, float]] = OrderedDict()  # with the time when each came
        self.back: Final[OrderedDict[W, float]] = OrderedDict()
        self.patience: Patience | None = None  # what is called when this takes too long ...
        self.due = inf  # ... and when; see watch.py

    def __len__(self) -> int:
        return len(self.front) + len(self.back)

    def __iter__(self) -> Iterator[W]:
        return iter((*self.front, *self.back))

    def __contains__(self, waiting: W) -> bool:
        return waiting in self.front or waiting in self.back

    @property
    def since(self) -> float:
        """When the first of those that still wait has come; `inf` if none waits."""
        return min((*self.front.values(), *self.back.values()), default=inf)

    def enter(self, waiting: W, passes: bool) -> None:
        """Wait, behind all that came before, but for the tickets if it `passes`."""
        in_front = waiting.begun and (passes or not self.back)
        (self.front if in_front else self.back).setdefault(waiting, time.monotonic())

    def enter_first(self, ticket: W) -> None:
        """Put a ticket ahead of all others that wait behind tickets."""
        self.back[ticket] = time.monotonic()
        self.back.move_to_end(ticket, last=False)

    def leave(self, waiting: W) -> None:
        """Wait no more; no error if it does not wait."""
        self.front.pop(waiting, None)
        self.back.pop(waiting, None)
        # What waited behind the first ticket may wait behind none now.
        while self.back and (first := next(iter(self.back))).begun:
            self.front[first] = self.back[first]
            self.back.pop(first, None)
