"""One life cycle: lock, load, hand out, flush, unlock; for `with` and for `async with`.

The steps are written once, as generators (see steps.py). A scope knows a door to its storage and
the options of its manager; it knows nothing of updates or frameworks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from .door import Door
from .errors import SessionAwaitError, SessionClosedError
from .locks import Hold, KeyLock, Party, here
from .session import Fields, Session, open_fields
from .steps import Call, Steps, Take, TakeTurn, arun, closers, openers, run
from .storages.base import Record

S = TypeVar("S", bound=Session)
_NO_FIELDS: Final = Record({})


@dataclass(frozen=True, slots=True)
class Options(Generic[S]):
    """What all scopes of one manager have in common."""

    session_type: type[S]
    door: Door
    initial: Callable[[Any], Mapping[str, Any] | None] | None
    lazy: bool
    lock_timeout: float | None
    save_on_error: bool


class Scope(Generic[S]):
    """The time for which one key is locked and its session open.

    It is opened by one SessionScope and may be joined by others, which find it through a context
    variable; it closes when the last of them leaves. Whether it is still open is decided under its
    mutex, so nobody joins a scope that has begun to close.
    """

    __slots__ = (
        "_loading",
        "_members",
        "_mutex",
        "_on_loop",
        "_stored",
        "closed",
        "fields",
        "hold",
        "key",
        "name",
        "options",
        "parties",
        "passes",
        "session",
        "timeout",
        "update",
    )

    def __init__(self, entry: SessionScope[S], passes: bool, on_loop: bool) -> None:
        self.options: Final = entry.options
        self.key: Final = entry.key
        self.name: Final = entry.name
        self.update: Any = entry.update  # until it closes
        self.timeout: Final = entry.timeout
        self.hold: Hold | None = entry.hold
        self.parties: list[Party] = []  # who is in it, first the one that opened it
        self.passes: Final = passes
        self.session: S | None = None  # until it closes
        self.fields: Fields | None = None
        self.closed = False
        self._stored = False
        self._members = 1
        self._mutex: Final = threading.Lock()
        self._on_loop: Final = on_loop
        self._loading: KeyLock | None = None
        if entry.options.lazy:
            self._loading = KeyLock(entry.name)
            self.parties.append(here())
            self.session = entry.options.session_type(self)

    # -- the life cycle

    def opening(self) -> Steps[None]:
        """Lock and load."""
        door = self.options.door
        hold = self.hold or door.locks.try_acquire(self.name)
        if hold is None:
            hold = yield Take(door.locks, self.name, self.timeout, self.passes)
        try:
            if door.blocking:
                record = yield Call(openers, door.load, self.name)
            else:
                record = door.load(self.name)
            self._stored = record is not None
            fields = self._missing() if record is None else Fields(self.key, record)
            if self.session is None:
                self.session = self.options.session_type(self, fields)
            else:
                open_fields(self.session, fields)
        except BaseException:
            if door.unload is not None:
                door.unload(self.name)
            hold.release()
            raise
        self.hold = hold
        self.fields = fields
        # From here on, whoever waits for the key waits for all who are in the scope.
        hold.parties = self.parties = self.parties or hold.parties

    def _missing(self) -> Fields:
        """The fields of a session that is not stored yet, and will not be until they change."""
        initial = self.options.initial
        given = initial(self.update) if initial is not None else None
        if not given:
            return Fields(self.key, _NO_FIELDS)
        fields = Fields(self.key, _NO_FIELDS)
        for name, value in given.items():
            fields.set(name, value)
        return Fields(self.key, fields.pending())

    def loading(self) -> Steps[None]:
        """Open a lazy scope, once, whoever asks first."""
        assert self._loading is not None
        turn = yield TakeTurn(self._loading, self.timeout)
        try:
            if self.closed:
                raise SessionClosedError(
                    f"the session {self.key!r} was closed before it was ever loaded"
                )
            if self.fields is None:
                yield from self.opening()
            if self.closed:  # meanwhile, by a thread that does not know of this one
                yield from self.closing(None)
        finally:
            turn.release()

    def flushing(self) -> Steps[None]:
        """Write what has changed since the last flush."""
        fields = self.fields
        if fields is None or not fields.owner.open:
            return
        record, stored = fields.pending(), fields.record
        if record is stored:
            return
        fields.saved(record)
        try:
            door = self.options.door
            if not record and not self._stored:
                return
            if door.blocking:
                yield Call(closers, door.save, self.name, record)
            else:
                door.save(self.name, record)
            self._stored = bool(record)
        except BaseException:
            fields.not_saved(stored)
            raise

    def closing(self, error: BaseException | None) -> Steps[None]:
        """Write, or roll back after an error, and unlock; after `leave` or `end` allowed it."""
        with self._mutex:
            hold, self.hold = self.hold, None
        self.session = self.update = None  # session and scope know each other: no cycle stays
        if self.fields is None or hold is None:
            return  # lazy, and nobody asked
        try:
            if error is not None:
                self.roll_back(error)
            yield from self.flushing()
        finally:
            self.fields.owner.open = False
            door = self.options.door
            if door.unload is not None:
                door.unload(self.name)
            hold.release()

    def roll_back(self, error: BaseException) -> None:
        """A handler failed: forget what changed since the last flush, if the options say so."""
        # GeneratorExit: a coroutine thrown away half-way, which may not await a flush any more.
        keep = self.options.save_on_error and not isinstance(error, GeneratorExit)
        if self.fields is not None and not keep:
            self.fields.roll_back()

    # -- who is in it

    def join(self) -> bool:
        """One more is in; False if the scope has closed."""
        with self._mutex:
            if not self.closed:
                self._members += 1
            return not self.closed

    def leave(self) -> bool:
        """One less; True if that was the last one, who has to close."""
        with self._mutex:
            self._members -= 1
            return self._members == 0 and self._end()

    def end(self) -> bool:
        """Everybody out; True for the one who has to close."""
        with self._mutex:
            return self._end()

    def _end(self) -> bool:
        was_open = not self.closed
        self.closed = True
        return was_open

    # -- what the session asks (session.Lifecycle)

    def load(self) -> None:
        if self._on_event_loop():
            raise SessionAwaitError(
                f"the lazy session {self.key!r} was touched before it was loaded; in async code "
                f"write `session = await session` first (in PTB: `session = await "
                f"context.session`), so that the event loop goes on meanwhile"
            )
        run(self.loading())

    async def aload(self) -> None:
        await arun(self.loading())

    def flush(self) -> None:
        self._refuse_to_block("flush", "aflush")
        run(self.flushing())

    async def aflush(self) -> None:
        await arun(self.flushing())

    def release(self) -> None:
        self._refuse_to_block("release", "arelease")
        if self.end():
            run(self.closing(None))

    async def arelease(self) -> None:
        if self.end():
            await arun(self.closing(None))

    def _on_event_loop(self) -> bool:
        return self._on_loop and asyncio._get_running_loop() is not None

    def _refuse_to_block(self, name: str, instead: str) -> None:
        if self.options.door.blocking and self._on_event_loop():
            raise SessionAwaitError(
                f"session.{name}() would block the event loop while the storage writes "
                f"{self.key!r}; write `await session.{instead}()`"
            )


# The innermost entry of this thread or task, and of those started inside it.
_current: ContextVar[SessionScope[Any] | None] = ContextVar("session_sync_scope", default=None)

#: True inside a handler that a framework's room runs, whether it has a session or not: such code
#: never queues behind updates that have not begun, since they may need its thread.
in_handler: ContextVar[bool] = ContextVar("session_sync_in_handler", default=False)


def _open_around() -> SessionScope[Any] | None:
    """The innermost entry around this code whose scope is open. The ended ones between the open
    ones are dropped, so that tasks which start one another leave no chain behind."""
    around = _skip_ended(_current.get())
    entry = around
    while entry is not None:
        entry.outer = _skip_ended(entry.outer)
        entry = entry.outer
    return around


def _skip_ended(entry: SessionScope[Any] | None) -> SessionScope[Any] | None:
    while entry is not None and entry._has_ended():
        entry = entry.outer
    return entry


def entries() -> Iterator[SessionScope[Any]]:
    """The entries that this code runs inside, innermost first; some may have been left already."""
    entry = _current.get()
    while entry is not None:
        yield entry
        entry = entry.outer


class SessionScope(Generic[S]):
    """One `with` or `async with` around a session, made by `SessionManager.session_scope`.

    Inside another one for the same key it joins that one's scope and gives the same session.
    Entries that join at the same time under the same outer entry (`gather`, several threads) take
    turns. The outer entry itself does not: it waits for them, or knows what it does.
    """

    __slots__ = (
        "_inside",
        "_joined",
        "_scope",
        "_turn",
        "_turns",
        "hold",
        "key",
        "name",
        "options",
        "outer",
        "timeout",
        "update",
    )

    def __init__(self, options: Options[S], key: str, name: str, update: Any) -> None:
        self.options: Final = options
        self.key: Final = key
        self.name: Final = name
        self.update: Final = update
        self.timeout = options.lock_timeout
        self.hold: Hold | None = None  # given by who has taken the key already
        self.outer: SessionScope[Any] | None = None
        self._scope: Scope[S] | None = None  # also after leaving it: a task begun inside may join
        self._inside = False
        self._joined: SessionScope[S] | None = None
        self._turns: KeyLock | None = None  # of the entries that join under this one
        self._turn: Hold | None = None

    def __enter__(self) -> S:
        run(self._entering(on_loop=False))
        return self._entered()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run(self._leaving(error))

    async def __aenter__(self) -> S:
        await arun(self._entering(on_loop=True))
        return self._entered()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await arun(self._leaving(error))

    @property
    def session(self) -> S | None:
        """The session, from entering until the scope closes."""
        return None if self._scope is None else self._scope.session

    def roll_back(self, error: BaseException) -> None:
        """A handler failed with `error`, and the entry goes on: see Scope.roll_back."""
        if self._scope is not None and not self._scope.closed:
            self._scope.roll_back(error)

    # -- entering and leaving

    def _entering(self, on_loop: bool) -> Steps[None]:
        if self._inside:
            raise RuntimeError(
                f"this scope of {self.key!r} is entered already; call session_scope() again for "
                f"each `with`"
            )
        outer = _open_around()
        scope = None
        if outer is not None:
            scope = yield from self._joining(outer)
        if scope is None:
            scope = Scope(self, outer is not None or in_handler.get(), on_loop)
            if not self.options.lazy:
                yield from scope.opening()
        self.outer = outer
        self.hold = None
        self._scope = scope
        self._inside = True
        _current.set(self)

    def _entered(self) -> S:
        assert self._scope is not None
        assert self._scope.session is not None
        return self._scope.session

    def _joining(self, outer: SessionScope[Any]) -> Steps[Scope[S] | None]:
        """The scope of the same key that is open around here, now joined; or None."""
        entry: SessionScope[Any] | None = outer
        while entry is not None and not entry._is_for(self):
            entry = entry.outer
        if entry is None:
            return None
        scope: Scope[S] | None = entry._scope
        if scope is None or not scope.join():
            return None
        try:
            turn = yield TakeTurn(entry._turns_of_joiners(scope), self.timeout)
        except BaseException:
            if scope.leave():  # the others are done, and nothing of theirs failed
                yield from scope.closing(None)
            raise
        if scope.closed:  # released by whoever had the turn before
            turn.release()
            return None
        scope.parties.append(turn.parties[0])
        self._joined, self._turn = entry, turn
        return scope

    def _leaving(self, error: BaseException | None) -> Steps[None]:
        scope = self._scope
        assert scope is not None
        if _current.get() is self:
            _current.set(self.outer)
        self._inside = False
        if self._turn is not None:
            yield from self._leaving_joined(scope, self._turn, error)
            return
        if error is not None and not scope.closed:
            scope.roll_back(error)
        if scope.leave():
            yield from scope.closing(error)
        else:
            del scope.parties[0]

    def _leaving_joined(
        self, scope: Scope[S], turn: Hold, error: BaseException | None
    ) -> Steps[None]:
        joined = self._joined
        self._joined = self._turn = None
        if joined is not None and joined._inside:
            error = None  # goes on to the entry around this one, which will see to it
        scope.parties.remove(turn.parties[0])
        try:
            if error is not None and not scope.closed:
                scope.roll_back(error)
            if scope.leave():
                yield from scope.closing(error)
        finally:
            turn.release()

    def _is_for(self, other: SessionScope[Any]) -> bool:
        scope = self._scope
        return (
            scope is not None
            and not scope.closed
            and self.name == other.name
            and self.options.door is other.options.door
        )

    def _has_ended(self) -> bool:
        return self._scope is None or self._scope.closed

    def _turns_of_joiners(self, scope: Scope[Any]) -> KeyLock:
        with scope._mutex:
            if self._turns is None:
                self._turns = KeyLock(self.name)
            return self._turns
