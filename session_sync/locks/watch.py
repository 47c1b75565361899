"""Tells when callers wait for a key for longer than they should: its holder may hang.

One thread of the process looks at all tables, when the time of the next report has come. This
module knows times and queues; it does not know where reports go.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from .callers import names_of

_LOOK: Final = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class WaitReport:
    """A key that is waited for, and has been for too long.

    Arguments:
        key: the key, as the table has it.
        waiters: how many callers and updates wait for it.
        waited: how many seconds the first of them has waited.
        holder: the thread or task that holds it, in words; None: a task that has not begun.
        held: for how many seconds.
    """

    key: str
    waiters: int
    waited: float
    holder: str | None
    held: float


class Patience(Protocol):
    """How long may be waited for a key, and what happens then."""

    @property
    def seconds(self) -> float:
        """After what time the first report is made; the next ones come ever more rarely."""
        ...

    def run_out(self, report: WaitReport, /) -> None:
        """Callers still wait."""
        ...


class _Queue(Protocol):
    """What is looked at of a queue."""

    patience: Patience | None
    due: float

    @property
    def since(self) -> float: ...
    def __iter__(self) -> Iterator[Any]: ...


class Watch:
    """A thread that makes reports. It begins with the first wait, and sleeps where nothing waits.

    Each queue has its own time for the next report, and the thread sleeps until the first of them,
    for a second at most: then it looks for holders whose owner has been gone since the last look,
    with a finaliser that was interrupted itself, so that nothing has unlocked the key. A wait that
    begins wakes the thread only if it is asleep for longer than that (`_wakes`).
    """

    def __init__(self) -> None:
        # No WeakSet: other threads add tables while this one looks.
        self._tables: Final[list[weakref.ref[Any]]] = []
        self._begun: Final[SimpleQueue[None]] = SimpleQueue()
        self._wakes = inf
        self._owner: Final[dict[str, int]] = {}  # the thread that looks, noted by itself
        self._orphans: dict[Any, float] = {}  # handles without an owner: when each was seen first

    def add(self, table: Any) -> None:
        """Look at the queues of `table`, while there is one."""
        self._tables.append(weakref.ref(table, self._tables.remove))

    def begin(self, queue: _Queue, patience: Patience) -> None:
        """A wait in `queue` begins; the first one sets the patience of all of them."""
        if queue.patience is not None:
            return
        queue.due = queue.since + patience.seconds
        queue.patience = patience
        if not self._owner:
            self._start()
        if min(queue.due, queue.since + _LOOK) < self._wakes:
            self._begun.put(None)

    def _start(self) -> None:
        with suppress(RuntimeError):  # no thread can be started now: the next wait tries again
            threading.Thread(target=self._run, name="session_sync-watch", daemon=True).start()

    def _run(self) -> None:
        me = threading.get_ident()
        if self._owner.setdefault("thread", me) != me:
            return  # two were started at once
        try:
            while True:
                self._wakes = inf  # whatever begins from here on wakes this thread again
                wakes = self._wakes = self._report_all()
                timeout = None if wakes == inf else max(0.0, wakes - time.monotonic())
                with suppress(Empty):
                    self._begun.get(timeout=timeout)
        finally:  # a report has failed: the next wait starts another thread
            self._owner.clear()

    def _report_all(self) -> float:
        """Report what is due; returns when the next one is."""
        now = time.monotonic()
        wakes = inf
        orphans: dict[Any, float] = {}
        for reference in list(self._tables):
            table = reference()
            if table is None:
                continue
            for key, queue in list(table.queues.items()):
                holder = table.held.get(key)
                if holder is None:  # what was to give it to the next one was interrupted
                    table.recover(key)
                elif holder.is_orphaned:
                    since = orphans[holder] = self._orphans.get(holder, now)
                    if now - since >= _LOOK:
                        table.recover(key)
                elif queue.due <= now:
                    _report(table, key, queue, now)
                wakes = min(wakes, queue.due, now + _LOOK)
        self._orphans = orphans
        return wakes

    def after_fork(self) -> None:
        """In a forked child the thread does not live on."""
        self._wakes = inf
        self._orphans = {}
        self._owner.clear()


def _report(table: Any, key: str, queue: _Queue, now: float) -> None:
    """Report on a queue whose lock has not changed hands for too long, and again when twice as much
    time has passed."""
    patience = queue.patience
    assert patience is not None  # since it is due
    holder = table.held.get(key)
    since = queue.since if holder is None else max(queue.since, holder.since)
    if now < since + patience.seconds:
        queue.due = since + patience.seconds
        return
    queue.due = now + (now - since)
    begun = holder if holder is not None and holder.begun else None
    waiting = [handle for handle in queue if handle is not holder]
    patience.run_out(
        WaitReport(
            key=key,
            waiters=len(waiting),
            waited=now - queue.since,
            holder=None if begun is None else names_of(begun.callers),
            held=0.0 if begun is None else now - begun.since,
        )
    )


#: The one of this process.
watch: Final = Watch()
