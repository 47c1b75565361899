"""Keeps leases alive: rights that run out by themselves unless they are renewed in time.

One thread per process renews those of all storages. This module knows times; it knows no server.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from ..background import start_thread

_PAUSE: Final = 0.1  # seconds for which the thread rests after something unforeseen
_LONGEST_SLEEP: Final = 3600.0  # seconds, since a wait cannot be as long as a lease
_log: Final = logging.getLogger("session_sync")


class Keeper(Protocol):
    """The giver of leases, which can renew them."""

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

    It does not hold them: a lease that is referred to nowhere else runs out. One that could not be
    renewed is tried again and again until it is over; whether it was lost, the server alone knows,
    and says when a save is tried under it.

    A signal handler or a finaliser may call `keep` and `drop` in a thread that is inside one of
    them, and in the renewing thread too. So there is no mutex here: each step is one operation of a
    dict or of a SimpleQueue, a call that comes in between two of them is as one of another thread,
    and neither of them waits. Nor does an exception between two of them leave a wrong note: of the
    thread nothing is noted but by itself, once it runs, and until then each `keep` starts one.
    """

    def __init__(self, name: str = "session_sync-renew") -> None:
        self._name: Final = name  # of the thread
        self._leases: Final[WeakValueDictionary[int, Lease]] = WeakValueDictionary()
        self._owner: Final[dict[str, int]] = {}  # the thread that renews, noted by itself
        self._wakes = inf  # when that has something to do; from time.monotonic()
        self._news: Final[SimpleQueue[None]] = SimpleQueue()  # something came in: look again
        self._has_failed = False  # to start a thread, as the log was told

    def keep(self, lease: Lease) -> None:
        """Renew `lease` from now on.

        Where no thread can be started, which is logged, it is not renewed until one can be: each
        call tries again.
        """
        self._leases[id(lease)] = lease
        if not self._owner:
            self._start()
        elif lease.due < self._wakes:  # looked at after it was added, see _seconds_left()
            self._news.put(None)

    def drop(self, lease: Lease) -> None:
        """Renew `lease` no more."""
        self._leases.pop(id(lease), None)

    def _start(self) -> None:
        if start_thread(self._run):
            self._has_failed = False
        elif not self._has_failed:
            self._has_failed = True
            _log.warning(
                "no thread can be started to renew leases: until one can be, a handler that runs "
                "for longer than a lease may lose its session"
            )

    def _run(self) -> None:
        me = threading.get_ident()
        if self._owner.setdefault("thread", me) != me:
            return  # two were started at once
        try:
            # By this threading knows the thread, and would after its end, too.
            threading.current_thread().name = self._name
            while True:
                try:
                    self._renew_all(self._next())
                except BaseException:  # as long as the process lives, so does this thread
                    time.sleep(_PAUSE)
        finally:  # an exception came into the handler of another one
            self._owner.clear()
            self._start()

    # What looks at the leases are functions that end before the thread sleeps, and hold none then.

    def _next(self) -> Mapping[Keeper, Sequence[Lease]]:
        while (left := self._seconds_left()) > 0:
            with suppress(Empty):
                self._news.get(timeout=min(left, _LONGEST_SLEEP))
        return self._due()

    def _seconds_left(self) -> float:
        # First: a lease that comes too late to be among these finds a reason to wake us.
        self._wakes = inf
        self._wakes = min((lease.due for lease in self._kept()), default=inf)
        return self._wakes - time.monotonic()

    def _kept(self) -> list[Lease]:
        # valuerefs() is one step, unlike values().
        return [lease for ref in self._leases.valuerefs() if (lease := ref()) is not None]

    def _due(self) -> Mapping[Keeper, Sequence[Lease]]:
        """What is to be renewed now, or so soon that it may come along."""
        now = time.monotonic()
        due: defaultdict[Keeper, list[Lease]] = defaultdict(list)
        for lease in self._kept():
            if lease.due <= now + lease.seconds / 10:
                due[lease.keeper].append(lease)
        return due

    def _renew_all(self, due: Mapping[Keeper, Sequence[Lease]]) -> None:
        for keeper, leases in due.items():
            self._renew(keeper, leases)

    def _renew(self, keeper: Keeper, leases: Sequence[Lease]) -> None:
        try:
            answers = keeper.renew(leases)
        except BaseException:  # of whatever kind: the others must not be lost with these
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
