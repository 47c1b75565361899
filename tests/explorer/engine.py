"""Runs the actors of a scene, one of them with a trap, in a schedule that can be repeated.

The actors start one after the other, each goes as far as it can before the next one starts, and
all meet the following rules until the last has finished:

1. A trap may stop its actor at some line of the core. Nothing of that actor moves meanwhile.
2. While anybody moves, nothing is decided.
3. Then an actor that has paused (`Run.pause`) goes on, the one that paused first.
4. If there is none, the stopped actor goes on.

Whether a thread moves is seen from outside, by looking at its innermost frame and at what the
system says of it. On a busy machine a look may take a thread that only has to wait for a processor
for one that is blocked: then this schedule is not quite the one that it was meant to be, and the
model holds all the same.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

SETTLED = 3  # looks in a row that see no change
SETTLING = 0.05  # seconds after which a thread that still moves is no longer waited for
PATIENCE = 4.0  # seconds in which nothing moves, and nobody can be let go: a hang
LIMIT = 12.0  # seconds for one run, however much moves


class HangError(Exception):
    """Somebody waits who should not."""


@dataclass(eq=False)
class Actor:
    """One thread of a scene."""

    name: str
    work: Callable[[], None]
    thread: threading.Thread | None = None
    finished: bool = False


@dataclass(eq=False)
class _Paused:
    until: Callable[[], bool]
    go_on: Callable[[], object]
    thread: int  # 0: a coroutine


@dataclass(eq=False)
class Run:
    """One run of a scene."""

    actors: list[Actor] = field(default_factory=list)
    stopped_at: str = ""  # the line at which an actor stands now
    last_stop: str = ""
    #: Held while frames are looked at, which keeps alive what they know.
    looking: threading.Lock = field(default_factory=threading.Lock)
    _stopped: tuple[int, threading.Lock] | None = None
    _paused: list[_Paused] = field(default_factory=list)

    # -- called by actors

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Wait until nobody moves and `until()` is true, which is asked in the engine's thread."""
        gate = threading.Lock()
        gate.acquire()
        self._paused.append(_Paused(until, gate.release, threading.get_ident()))
        gate.acquire()

    def pause_task(self, go_on: Callable[[], object], until: Callable[[], bool]) -> None:
        """The same for a coroutine: `go_on` will be called."""
        self._paused.append(_Paused(until, go_on, 0))

    def stop(self, where: str) -> None:
        """Stand still; by a trap."""
        gate = threading.Lock()
        gate.acquire()
        self.stopped_at = self.last_stop = where
        self._stopped = threading.get_ident(), gate
        gate.acquire()

    # -- the engine

    def go(self) -> None:
        """Start the actors and let them go on until all have finished; raises HangError."""
        for actor in self.actors:
            actor.thread = threading.Thread(
                target=self._act, args=(actor,), name=actor.name, daemon=True
            )
            actor.thread.start()
            self._settle()
        end, last_seen, last_change = time.monotonic() + LIMIT, None, time.monotonic()
        collected = False
        while not all(actor.finished for actor in self.actors):
            self._settle()
            if self._let_one_go():
                last_change = time.monotonic()
                continue
            seen, now = self._look(set()), time.monotonic()
            if seen is None or seen != last_seen:
                last_seen, last_change = seen, now
            if now - last_change > PATIENCE / 4 and not collected:
                # Another thread's last look at what was thrown away may have come in between.
                collected = True
                threading.Thread(target=gc.collect, daemon=True, name="collector").start()
            if now > end or now - last_change > PATIENCE:
                raise HangError(self._who_hangs())
            if now - last_change > 0.05:
                time.sleep(0.005)
        for actor in self.actors:
            assert actor.thread is not None
            actor.thread.join(LIMIT)

    def _act(self, actor: Actor) -> None:
        try:
            actor.work()
        finally:
            actor.finished = True

    def _let_one_go(self) -> bool:
        for paused in self._paused:
            if paused.until():
                self._paused.remove(paused)
                paused.go_on()
                return True
        if self._stopped is not None:
            _, gate = self._stopped
            self._stopped, self.stopped_at = None, ""
            gate.release()
            return True
        return False

    def _settle(self) -> None:
        """Let the threads go as far as they can."""
        end = time.monotonic() + SETTLING
        last: object = None
        same = 0
        while same < SETTLED and time.monotonic() < end:
            known = {paused.thread for paused in self._paused}
            if self._stopped is not None:
                known.add(self._stopped[0])
            seen = self._look(known)
            if seen == []:
                return
            same = same + 1 if seen is not None and seen == last else 0
            last = seen
            time.sleep(0.0001)

    def _look(self, known: set[int]) -> list[object] | None:
        """Where all other threads stand, but for the `known` ones; None if one of them moves."""
        if not self.looking.acquire(blocking=False):
            return None  # it collects, and a finaliser may wait for one that stands still
        try:
            return _threads(known)
        finally:
            self.looking.release()

    def _who_hangs(self) -> str:
        stuck = [actor.name for actor in self.actors if not actor.finished]
        return f"{', '.join(stuck)} did not end\n{stacks()}"


def _threads(known: set[int]) -> list[object] | None:
    """Where all other threads stand, but for the `known` ones; None if one of them moves."""
    me = threading.get_ident()
    frames = sys._current_frames()
    seen: list[object] = []
    for thread in threading.enumerate():
        ident = thread.ident
        if ident is None or ident == me or ident in known:
            continue
        frame = frames.get(ident)
        if frame is None or _is_running(thread.native_id):
            return None
        seen.append((ident, id(frame), frame.f_lasti))
    return seen


def _is_running(native_id: int | None) -> bool:
    """Whether a thread has a processor or wants one; False where the system does not say."""
    try:
        with open(f"/proc/self/task/{native_id}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split(None, 1)[0] == b"R"
    except OSError:
        return False


def stacks() -> str:
    """Where the other threads are."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines.append(f"  thread {names.get(ident, ident)}:")
            entries = traceback.extract_stack(frame)[-9:]
            lines += [f"    {place(e.filename, e.lineno, e.name)}: {e.line}" for e in entries]
    return "\n".join(lines)


def place(filename: str, line: int | None, function: str) -> str:
    """A line of code, as it is shown to people."""
    return f"{'/'.join(filename.split('/')[-2:])}:{line} {function}"


def describe(error: BaseException) -> str:
    """An exception and where it came from, without the exception itself, which knows scopes."""
    trace = traceback.extract_tb(error.__traceback__)[-5:]
    way = "".join(f"\n    {place(e.filename, e.lineno, e.name)}: {e.line}" for e in trace)
    return f"{type(error).__name__}: {error}{way}"
