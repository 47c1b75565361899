"""Keeps leases alive: rights that run out by themselves unless they are renewed in time.

One thread per process renews those of all storages. This module knows times; it knows no server.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Final, Protocol
from weakref import WeakSet


class Keeper(Protocol):
    """Whoever has given leases, and can renew them."""

    def renew(self, leases: Sequence[Any], /) -> Mapping[Any, bool]:
        """Renew all of `leases`: True for each that was, False for each that was lost before. Those
        of which nothing is known are left out, and tried again soon."""
        ...


class Lease:
    """A right for `seconds` from now on; renewed while `renewer()` keeps it."""

    __slots__ = ("__weakref__", "due", "end", "keeper", "seconds")

    def __init__(self, keeper: Keeper, seconds: float) -> None:
        self.keeper: Final = keeper
        self.seconds: Final = seconds
        self.renewed()

    def renewed(self) -> None:
        """It begins anew."""
        now = time.monotonic()
        self.due = now + self.seconds / 3
        self.end = now + self.seconds


class Renewer:
    """A thread that renews leases when a third of their time is over.

    It does not hold them: a lease that everybody else has forgotten runs out. One that could not be
    renewed is tried again and again until it is over; whether it was lost, the server alone knows,
    and says when somebody wants to save under it.
    """

    def __init__(self) -> None:
        self._leases: Final[WeakSet[Lease]] = WeakSet()
        self._changed: Final = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes = inf  # when the thread has something to do; from time.monotonic()

    def keep(self, lease: Lease) -> None:
        """Renew `lease` from now on."""
        with self._changed:
            self._leases.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="session_sync-renew", daemon=True
                )
                self._thread.start()
            elif lease.due < self._wakes:
                self._changed.notify()

    def drop(self, lease: Lease) -> None:
        """Renew `lease` no more."""
        with self._changed:
            self._leases.discard(lease)

    def _run(self) -> None:
        while True:
            self._renew_all(self._next())

    # What looks at the leases are functions that end before the thread sleeps, and hold none then.

    def _next(self) -> Mapping[Keeper, Sequence[Lease]]:
        with self._changed:
            while (left := self._seconds_left()) > 0:
                self._changed.wait(None if left == inf else left)
            return self._due()

    def _seconds_left(self) -> float:
        self._wakes = min((lease.due for lease in self._leases), default=inf)
        return self._wakes - time.monotonic()

    def _due(self) -> Mapping[Keeper, Sequence[Lease]]:
        """What is to be renewed now, or so soon that it may come along."""
        now = time.monotonic()
        due: defaultdict[Keeper, list[Lease]] = defaultdict(list)
        for lease in self._leases:
            if lease.due <= now + lease.seconds / 10:
                due[lease.keeper].append(lease)
        return due

    def _renew_all(self, due: Mapping[Keeper, Sequence[Lease]]) -> None:
        for keeper, leases in due.items():
            self._renew(keeper, leases)

    def _renew(self, keeper: Keeper, leases: Sequence[Lease]) -> None:
        try:
            answers = keeper.renew(leases)
        except Exception:  # of whatever kind: the others must not be lost with these
            answers = {}
        now = time.monotonic()
        for lease in leases:
            if answers.get(lease):
                lease.renewed()
            elif lease in answers or lease.end <= now:
                self.drop(lease)
            else:
                lease.due = now + lease.seconds / 10


_renewers: Final[dict[int, Renewer]] = {}  # by process: threads do not live on in a forked child


def renewer() -> Renewer:
    """The one of this process."""
    pid = os.getpid()
    return _renewers.get(pid) or _renewers.setdefault(pid, Renewer())
