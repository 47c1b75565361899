"""Which callers wait for which locks, and whether one more wait would close a circle.

This module knows what waits and what it waits for; it does not know how locks change hands. All of
it is called under the mutex of the queues (see lock.py), so it sees every wait that has begun.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol
from weakref import WeakSet

from .callers import Caller


class Place(Protocol):
    """A place in the queue for a lock, of one that waits in the middle of its work or has not begun
    yet."""

    @property
    def callers(self) -> Sequence[Caller]:
        """Those that cannot move before it has the lock."""
        ...


class Wait(Protocol):
    """A caller that waits for a lock, in the middle of its work."""

    number: int  # under which Waits keeps it

    @property
    def caller(self) -> Caller:
        """The one that waits."""
        ...

    @property
    def blocking(self) -> bool:
        """Whether its thread is blocked meanwhile."""
        ...

    @property
    def name(self) -> str:
        """The key of the session that it waits for."""
        ...

    def holders(self) -> Sequence[Caller]:
        """Those that have the lock now."""
        ...

    @property
    def place(self) -> Place:
        """Its own place in the queue."""
        ...

    def queue(self) -> Iterable[Place] | None:
        """All that wait for the lock, in their order."""
        ...


class _Step(NamedTuple):
    """One wait on the way round a possible circle: what waits, and the wait that led here."""

    wait: Wait
    before: _Step | None


class Waits:
    """All waits of the process.

    A circle is closed only by a caller that begins to wait, for a caller that is given a lock does
    not wait. Callers that begin are looked at one at a time, under the mutex of the queues, so the
    last one sees the whole circle.

    There are two exceptions, of callers that are given a lock and cannot go on: a coroutine whose
    loop stands still, because the loop's thread waits; and a thread whose wait was interrupted by a
    signal handler that waits, too. While there is one of them, those that wait for a lock ahead of
    a caller count as its holders do: the circle that such a one will close is seen before.
    """

    def __init__(self) -> None:
        # A caller may have several: a signal handler waits while its thread does. Weakly: what a
        # loop that is thrown away has left here must not keep all that the waiting task knows.
        self._by_caller: Final[dict[int, WeakSet[Wait]]] = {}
        self._stuck: Final[WeakSet[Wait]] = WeakSet()  # that keep others in this from going on

    def add(self, wait: Wait) -> None:
        """Note a wait that begins."""
        wait.number = _number(wait.caller, wait.blocking)
        waits = self._by_caller.setdefault(wait.number, WeakSet())
        waits.add(wait)
        if len(waits) > 1 or (wait.blocking and wait.caller.loop is not None):
            self._stuck.add(wait)

    def remove(self, wait: Wait) -> None:
        """Forget a wait that has ended; no error if it is not there."""
        waits = self._by_caller.get(wait.number)
        if waits is not None:
            waits.discard(wait)
            if not waits:
                self._by_caller.pop(wait.number, None)
        self._stuck.discard(wait)

    def clear(self) -> None:
        """Forget all, in a forked child."""
        self._by_caller.clear()
        self._stuck.clear()

    def reason_against(self, wait: Wait) -> str:
        """Why `wait`, which now begins, could never end; empty if it can."""
        loop = wait.caller.loop if wait.blocking else None  # it would stand still meanwhile
        if loop is not None and any(
            caller.loop is loop for caller in (*wait.holders(), *_Ahead().of(wait))
        ):
            return (
                f"a blocking `with` for the session {wait.name!r} on the event loop's own thread "
                f"can never succeed: a coroutine of this loop holds it or waits for it ahead of "
                f"this one. Use `async with sessions.session_scope(...)`."
            )
        circle = self._circle(wait)
        return "" if circle is None else _describe(circle)

    def _circle(self, wait: Wait) -> _Step | None:
        """The last wait of a circle that `wait` closes, if it closes one."""
        with_queue = bool(self._stuck)  # else those ahead go on as soon as the holders do
        ahead = _Ahead()
        steps = [_Step(wait, None)]
        seen = {wait}
        for step in steps:  # which grows meanwhile
            callers = list(step.wait.holders())
            if with_queue:
                callers += ahead.of(step.wait)
            for caller in callers:
                if wait.caller.stops(caller, wait.blocking):
                    return step
                for other in self._of(caller):
                    if other not in seen:
                        seen.add(other)
                        steps.append(_Step(other, step))
        return None

    def _of(self, caller: Caller) -> Iterator[Wait]:
        """What keeps `caller` from moving: its own waits, and those that block its thread."""
        task = caller.task
        if task is not None:
            for wait in list(self._by_caller.get(id(task), ())):
                if wait.caller.task is task:
                    yield wait
        yield from list(self._by_caller.get(id(caller.thread), ()))


class _Ahead:
    """The callers that wait for the same locks as others, ahead of them.

    Each is given once: a search that has seen what is ahead of one wait need not see it again for
    the next one, and with a thousand of them that would take long.
    """

    def __init__(self) -> None:
        self._rest: Final[dict[Iterable[Place], list[Place]]] = {}  # by queue, the last one first
        self._given: Final[set[Place]] = set()

    def of(self, wait: Wait) -> list[Caller]:
        """Those ahead of `wait` that were not given yet."""
        queue = wait.queue()
        if queue is None or wait.place in self._given:
            return []
        rest = self._rest.get(queue)
        if rest is None:
            rest = self._rest[queue] = list(queue)[::-1]
        callers: list[Caller] = []
        while rest and rest[-1] is not wait.place:
            place = rest.pop()
            self._given.add(place)
            callers += place.callers
        return callers


def _number(caller: Caller, blocking: bool) -> int:
    task = None if blocking else caller.task
    return id(caller.thread if task is None else task)


def _describe(last: _Step) -> str:
    """The circle in words, each caller with what it holds and what it waits for."""
    waits: list[Wait] = []
    step: _Step | None = last
    while step is not None:
        waits.append(step.wait)
        step = step.before
    waits.reverse()
    if len(waits) == 1:
        return _describe_alone(last.wait)
    held = [waits[-1].name, *(wait.name for wait in waits[:-1])]
    names = [_this(waits[0])]
    names += [str(wait.caller) for wait in waits[1:]]
    parts = [
        f"{name} holds {key!r} and waits for {wait.name!r}"
        for name, key, wait in zip(names, held, waits, strict=True)
    ]
    return (
        f"deadlock: {'; '.join(parts)}. Open the sessions of several users in the same order "
        f"everywhere, or all at once with session_scopes(...)."
    )


def _describe_alone(wait: Wait) -> str:
    """The same where a caller waits for itself."""
    this, key = _this(wait), wait.name
    if any(wait.caller.stops(holder, wait.blocking) for holder in wait.holders()):
        return (
            f"deadlock: {this} holds {key!r} and waits for it. A block joins the one around it "
            f"only where both managers have the same storage object: give one object to all "
            f"managers of a store. What runs while a session is opened (`initial`, a migration) "
            f"cannot open it, too."
        )
    return (
        f"deadlock: {this} waits for {key!r} already, and what has interrupted it (a signal "
        f"handler, say) would wait behind it. Let the handler set a flag, and use the session "
        f"later."
    )


def _this(wait: Wait) -> str:
    return "this thread" if wait.blocking or wait.caller.task is None else "this task"


#: The waits of this process.
waits: Final = Waits()
