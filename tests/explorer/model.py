"""What the actors of a scene do, what is noted of it, and what must be true in the end.

A `World` is made for each run. Its handlers count: the number in the session is that of the
handlers which have ended without an error, whatever the schedule was.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import inside
from engine import Actor, Run, describe, stacks
from traps import AtSuspension, Trap

from session_sync import SessionDeadlockError, SessionLockTimeoutError, SessionManager

SOON = 5.0  # seconds in which a key must be free, once everything has ended
LOCK_TIMEOUT = 20.0  # seconds: longer than the engine's patience, so that a wait for it is a hang


class World:
    """A manager, the actors around it, and what is known of both."""

    def __init__(self, storage: Any, victim: str, options: dict[str, Any]) -> None:
        self.sessions: SessionManager[Any] = SessionManager(
            storage=storage, **{"lock_timeout": LOCK_TIMEOUT, **options}
        )
        self.run = Run()
        self.trap = Trap()
        self.victim = victim
        self.loops: dict[str, tuple[str, ...]] = {}  # the coroutines of actors with an event loop
        self.allowed: tuple[type[BaseException], ...] = ()
        self.shared: dict[str, Any] = {}  # what actors give to each other
        self.ended: Counter[str] = Counter()  # handlers of a key that ended without an error
        self.perhaps: Counter[str] = Counter()  # those that failed, and may have been saved
        self.joined: Counter[str] = Counter()  # those that ended inside another one's scope ...
        self.failed: set[str] = set()  # ... and are undone with it: keys of which one failed
        self.keys: set[str] = set()
        self.open: list[Any] = []  # the victim's sessions, for signal handlers
        self.is_exclusive = True  # else a session is released while its handler goes on
        self.problems: list[str] = []
        self.outcomes: dict[str, str] = {}  # of actors that raised something
        self.checks: list[Callable[[], None]] = []
        self._inside: dict[str, list[_Visit]] = {}
        self._taken: set[tuple[str, str]] = set()
        self._mutex = threading.Lock()

    # -- the actors

    def thread(self, name: str, work: Callable[[], object]) -> None:
        """An actor: a thread that does `work`."""
        self.run.actors.append(Actor(name, lambda: self._in_thread(name, work)))

    def loop(self, name: str, **coroutines: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """An actor: a thread with an event loop, and a task for each of the coroutines."""
        self.loops[name] = tuple(coroutines)
        self.run.actors.append(Actor(name, lambda: self._in_loop(name, coroutines)))

    def adopt(self, name: str) -> None:
        """The thread that calls this is an actor from here on, until it ends."""
        if name == self.victim:
            self.trap.install()

    def _in_thread(self, name: str, work: Callable[[], object]) -> None:
        try:
            with self._trapped(name):
                work()
        except BaseException as error:
            self._note(name, error)
        self._afterwards(name)

    def _in_loop(
        self, name: str, coroutines: dict[str, Callable[[], Coroutine[Any, Any, Any]]]
    ) -> None:
        loop = asyncio.new_event_loop()
        try:
            with self._trapped(name):
                try:
                    loop.run_until_complete(self._tasks(coroutines))
                finally:
                    if not self._ends_early():
                        self._finish(loop)
                    elif self._ends_early() == "closed":
                        loop.close()
        except BaseException as error:
            if not self._ends_early():
                self._note(name, error)
        known = weakref.ref(loop)
        del loop
        if self._ends_early():
            self.shared.clear()  # which knows the tasks
            self._forget_visits()
            self._collect(known)
        self._afterwards(name)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        """As asyncio.run() does it."""
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()

    async def _tasks(self, coroutines: dict[str, Callable[[], Coroutine[Any, Any, Any]]]) -> None:
        tasks = []
        for name, function in coroutines.items():
            coroutine = function()
            is_victim = name == self.victim
            if is_victim:
                coroutine = self.trap.wrap(coroutine)
            task = asyncio.get_running_loop().create_task(coroutine, name=name)
            self.shared[f"task {name}"] = task.cancel  # knows the task: dropped in the end
            tasks.append(task)
            if is_victim and isinstance(self.trap, AtSuspension):
                self.trap.before_first_step(task)
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for name in coroutines:
                self.shared.pop(f"task {name}", None)
        for name, result in zip(coroutines, results, strict=True):
            if isinstance(result, BaseException):
                self._note(name, result)

    def _ends_early(self) -> str:
        return self.trap.loop_ends if isinstance(self.trap, AtSuspension) else ""

    @contextmanager
    def _trapped(self, name: str) -> Iterator[None]:
        if name == self.victim:
            if self.trap.warm:  # what a thread does once, the main thread has done long ago
                with self.sessions.session_scope("warm"):
                    pass
            self.trap.install()
        try:
            yield
        finally:
            if name == self.victim:
                self.trap.remove()

    def _note(self, name: str, error: BaseException) -> None:
        self.outcomes[name] = describe(error)
        expected = self.allowed
        if self.trap.hit:  # the others on the victim's loop are cancelled when it ends
            expected = (*expected, *self.trap.raises, asyncio.CancelledError)
        if not isinstance(error, expected):
            self.problems.append(f"{name} raised {describe(error)}")

    def _afterwards(self, name: str) -> None:
        """What was interrupted leaves this thread as if nothing had been."""
        is_victim = self.victim in (name, *self.loops.get(name, ()))
        if is_victim and self.was_interrupted():
            self.shared.clear()  # nobody keeps a session that nobody will leave
        with self.run.looking:
            gc.collect()
        if is_victim and self.was_interrupted():
            for key in sorted(self.keys):
                self._save_later(key)

    def _forget_visits(self) -> None:
        """Of the tasks that this thread has thrown away, with their loop or after it was closed: a
        collection may close their scopes first, and then end the handlers in them."""
        me = threading.get_ident()
        with self._mutex:
            for visits in self._inside.values():
                visits[:] = [visit for visit in visits if visit.thread != me]

    def _collect(self, loop: weakref.ref[asyncio.AbstractEventLoop]) -> None:
        """What was thrown away, although a thread may just have had a look at it."""
        end = time.monotonic() + SOON
        while loop() is not None and time.monotonic() < end:
            with self.run.looking:
                gc.collect()
            time.sleep(0)

    def _save_later(self, key: str) -> None:
        try:
            with self.sessions.session_scope(key) as session:
                session.later = "saved"
        except self.allowed:
            pass
        except Exception as error:
            self.problems.append(f"a later block of the victim raised {describe(error)}")
        else:
            self.checks.append(lambda: self.equal("what a later block saved", self._later(key)))

    def _later(self, key: str) -> tuple[object, object]:
        return self.stored(key).get("later"), "saved"

    # -- what they do

    def add(
        self,
        key: str,
        body: Callable[[Any], object] | None = None,
        owner: str = "",
        group: str = "",
        joins: bool = False,
    ) -> None:
        """A handler. `owner` is who has the key, if it joins a scope; `group` is for those who may
        not be in it at the same time."""
        attempt = _Attempt(self, key, joins)
        with attempt, self.sessions.session_scope(key) as session:
            attempt.has_begun = True
            session.get("n")  # a lazy one is locked from here on
            with _Visit(self, group or key, owner or threading.current_thread().name):
                self._note_open(session)
                _count(session)
                if body is not None:
                    body(session)

    async def aadd(
        self,
        key: str,
        body: Callable[[Any], Awaitable[object]] | None = None,
        owner: str = "",
        group: str = "",
        joins: bool = False,
    ) -> None:
        """The same as a coroutine."""
        attempt = _Attempt(self, key, joins)
        with attempt:
            async with self.sessions.session_scope(key) as session:
                attempt.has_begun = True
                session = await session  # a lazy one is locked from here on
                task = asyncio.current_task()
                with _Visit(self, group or key, owner or (task.get_name() if task else "")):
                    self._note_open(session)
                    _count(session)
                    if body is not None:
                        await body(session)

    def _note_open(self, session: Any) -> None:
        if self.trap.warm and threading.current_thread().name == self.victim:
            self.open.append(session)

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Wait until nobody else moves, and `until()` is true."""
        self.run.pause(until)

    async def apause(self, until: Callable[[], bool] = lambda: True) -> None:
        """The same in a coroutine."""
        loop = weakref.ref(asyncio.get_running_loop())  # which may be thrown away meanwhile
        future = asyncio.get_running_loop().create_future()
        known = weakref.ref(future)
        self.run.pause_task(lambda: _resolve(loop(), known()), until)
        await future

    def give(self, what: str, value: object, *takers: str) -> None:
        """Give something to other actors, and wait for them: until they have it and went as far as
        they could or, if this actor is the one with the trap, until it has struck."""
        self.shared[what] = value
        me = threading.current_thread().name
        self.pause(
            lambda: (
                me == self.victim
                or self.was_interrupted()
                or all(self._has_taken(what, t) for t in takers)
            )
        )

    def take(self, what: str, giver: str) -> Any:
        """What another actor gives; None if it has ended without."""
        self.pause(
            lambda: (
                self.has_finished(giver)
                or (what in self.shared and (self.is_stopped() or giver != self.victim))
            )
        )
        self._taken.add((what, threading.current_thread().name))
        return self.shared.get(what)

    def was_interrupted(self) -> bool:
        """Whether an exception from outside has come to the victim."""
        return bool(self.trap.hit and self.trap.raises)

    def _has_taken(self, what: str, taker: str) -> bool:
        return (what, taker) in self._taken or self.has_finished(taker)

    def has_finished(self, name: str) -> bool:
        """Whether an actor is done."""
        return any(actor.finished for actor in self.run.actors if actor.name == name)

    def is_stopped(self) -> bool:
        """Whether a trap has stopped an actor."""
        return bool(self.run.stopped_at)

    def is_past(self, name: str) -> bool:
        """Whether an actor has done its part: it has ended, or the trap has struck."""
        return self.is_stopped() or self.was_interrupted() or self.has_finished(name)

    def stored(self, key: str) -> dict[str, Any]:
        """What is stored, past the locks."""
        return self.sessions.storage.get(key) or {}

    # -- what must be true

    def equal(self, what: str, pair: tuple[object, object]) -> None:
        """Note a problem if both are not equal."""
        if pair[0] != pair[1]:
            self.problems.append(f"{what}: {pair[0]!r}, expected {pair[1]!r}")

    def check(self) -> list[str]:
        """What is wrong when all actors have ended."""
        gc.collect()
        for key in sorted(self.keys):
            self._check_count(key)
        for check in self.checks:
            check()
        for key in sorted(self.keys):
            self._check_free(key)
        end = time.monotonic() + SOON
        while (left := inside.locks_left(self.sessions)) and time.monotonic() < end:
            time.sleep(0.01)
        if left:
            self.problems.append(f"the lock table still has {left} of its keys")
        return self.problems

    def _check_count(self, key: str) -> None:
        stored, least, perhaps = self.stored(key), self.ended[key], self.perhaps[key]
        if key in self.failed:
            perhaps += self.joined[key]
        else:
            least += self.joined[key]
        n = stored.get("n", 0)
        if not least <= n <= least + perhaps:
            extra = f" (and {perhaps} that failed, or joined one that did)" if perhaps else ""
            self.problems.append(f"{key}: {least} handlers{extra} ended, {stored} is stored")
        if stored.get("twin", 0) != n:
            self.problems.append(f"{key}: half of a handler is stored: {stored}")

    def _check_free(self, key: str) -> None:
        outcome: list[str] = []
        # What a thread has still to close may take a moment.
        patient: SessionManager[Any] = SessionManager(
            storage=self.sessions.storage, lock_timeout=SOON
        )

        def probe() -> None:
            try:
                with patient.session_scope(key) as session:
                    session.get("n")
                outcome.append("")
            except Exception as error:
                outcome.append(describe(error))

        thread = threading.Thread(target=probe, daemon=True, name="probe")
        begin = time.monotonic()
        thread.start()
        thread.join(SOON + 5)
        if not outcome:
            self.problems.append(f"{key} is locked for ever\n{stacks()}")
        elif outcome[0]:
            took = time.monotonic() - begin
            self.problems.append(f"{key} cannot be had, after {took:.1f} s: {outcome[0]}")


def _count(session: Any) -> None:
    session.n = session.get("n", 0) + 1
    session.twin = session.n


def _resolve(loop: asyncio.AbstractEventLoop | None, future: asyncio.Future[None] | None) -> None:
    if loop is not None and future is not None and not loop.is_closed():
        loop.call_soon_threadsafe(lambda: future.done() or future.set_result(None))


class _Attempt:
    """One handler, as it is counted from outside."""

    def __init__(self, world: World, key: str, joins: bool) -> None:
        self._world, self._key, self._joins = world, key, joins
        self.has_begun = False

    def __enter__(self) -> None:
        with self._world._mutex:
            self._world.keys.add(self._key)
            self._world.perhaps[self._key] += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        world, key = self._world, self._key
        with world._mutex:
            if kind is None:
                (world.joined if self._joins else world.ended)[key] += 1
            elif not self._joins:
                world.failed.add(key)
            # A signal handler may have flushed what a handler had done before it failed.
            is_nothing = not (self.has_begun and world.trap.warm)
            refused = (SessionDeadlockError, SessionLockTimeoutError)
            if kind is None or (issubclass(kind, refused) and is_nothing):
                world.perhaps[key] -= 1


class _Visit:
    """The time that a handler is inside a session."""

    def __init__(self, world: World, group: str, owner: str) -> None:
        self._world, self._group, self.owner = world, group, owner
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        world = self._world
        with world._mutex:
            inside = world._inside.setdefault(self._group, [])
            inside.append(self)
            owners = [visit.owner for visit in inside]
            if world.is_exclusive and len(set(owners)) > 1:
                world.problems.append(f"{' and '.join(owners)} are in {self._group} together")

    def __exit__(self, *_: object) -> None:
        with self._world._mutex, suppress(ValueError):  # it was forgotten
            self._world._inside[self._group].remove(self)
