"""A task that has not begun, and waits without a thread for several keys at once.

This module knows lock tables; it knows nothing of sessions, storages or pools.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from .locks import Hold, LockTable, Turn


class Turns:
    """The places of one task in the queues of all its keys.

    When all keys are free for it, `call` is called (as by a Turn: it must neither block nor raise),
    and whoever then runs the task asks `claim()`. Until then the task holds none of them, though
    those who have not begun either wait behind it.

    Why nobody waits in a circle. Tasks enter all of their queues in one step (`_queueing`), so of
    two tasks the same one is ahead in every queue that both stand in: the one that came first of
    all waits for nobody but those who hold a key. Who holds a key has begun, and passes all that
    have not (`passes`), so he does not wait for a task either.

    Why no call is missed. A turn is called again as soon as its key is free after somebody passed;
    the calls are counted from the last `claim` on. One that fails puts back what it took, and those
    turns are called anew; those that it did not come to count as called, as they still are.
    """

    def __init__(
        self, places: Sequence[tuple[LockTable, str]], call: Callable[[Turns], None]
    ) -> None:
        self._call: Callable[[Turns], None] | None = call
        self._mutex: Final = threading.Lock()
        self._awaited = len(places) + 1  # calls; one of them at the end of this method
        self._withdrawn = False
        with _queueing:
            self._turns: Final = [locks.queue_turn(name, self._note) for locks, name in places]
        self._note()

    def claim(self) -> list[Hold] | None:
        """All the keys, or None if somebody passed: then `call` will be called again."""
        with self._mutex:
            self._awaited = len(self._turns)
        holds: list[Hold] = []
        for turn in self._turns:
            hold = turn.claim()
            if hold is None:
                self._give_back(holds)
                return None
            holds.append(hold)
        self._call = None  # which may lead back to these turns: no cycle stays
        return holds

    def _give_back(self, holds: list[Hold]) -> None:
        for turn, hold in zip(self._turns, holds, strict=False):
            turn.put_back(hold, self._note)
        for turn in self._turns[len(holds) + 1 :]:  # which nobody has asked
            self._note(turn)
        if self._withdrawn:
            self.withdraw()  # once more: it did not find what was claimed meanwhile

    def withdraw(self) -> None:
        """Leave all queues; no error if the keys have been claimed already."""
        self._withdrawn = True
        for turn in self._turns:
            turn.withdraw()

    def _note(self, _turn: Turn | None = None) -> None:
        """One more key is free for this task."""
        with self._mutex:
            self._awaited -= 1
            if self._awaited:
                return
        if self._call is not None:
            self._call(self)


_queueing = threading.Lock()


def _after_fork() -> None:
    """The thread that has it does not live on in the child."""
    global _queueing
    _queueing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
