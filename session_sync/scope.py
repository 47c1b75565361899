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

from .containers import freeze
from .door import Door
from .errors import SessionAwaitError, SessionClosedError
from .expiry import Ttl
from .locks import Hold, KeyLock, Party, here
from .session import Fields, Session, open_fields
from .steps import Call, Steps, Take, TakeTurn, arun, closers, openers, run
from .storages.base import Record, record_of

S = TypeVar("S", bound=Session)
_NO_FIELDS: Final = record_of({})


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
    mutex, so nobody joins a scope that has begun to close, and only one closes it.
    """

    __slots__ = (
        "_flushes",
        "_loaded",
        "_loading",
        "_members",
        "_mutex",
        "_on_loop",
        "_stored",
        "_update",
        "_written",
        "closed",
        "fields",
        "key",
        "life",
        "name",
        "options",
        "parties",
        "session",
        "timeout",
    )

    life: Steps  # made when it begins, since it knows its scope, and done when it ends: no cycle

    def __init__(self, entry: SessionScope[S], on_loop: bool) -> None:
        self.options: Final = entry.options
        self.key: Final = entry.key
        self.name: Final = entry.name
        self.timeout: Final = entry.timeout
        self._update: Any = entry.update  # until it closes
        self.session: S | None = None  # from loading until it closes
        self.fields: Fields | None = None
        self.parties: list[Party] = []  # who is in it, first the one that opened it
        self.closed = False
        self._stored = False
        self._written: Record | None = None  # the last record that reached the store
        self._members = 1
        self._mutex: Final = threading.Lock()
        self._on_loop: Final = on_loop
        self._loading: KeyLock | None = None  # only a lazy scope has one
        self._loaded = True
        # Of a storage that blocks: flushes must not overtake each other.
        self._flushes: KeyLock | None = None
        if entry.options.lazy:
            self._loading = KeyLock(entry.name)
            self._loaded = False
            self.parties.append(here())
            self.session = entry.options.session_type(self)

    # -- the life cycle

    def living(self, hold: Hold | None, passes: bool) -> Steps:
        """Lock, load, hand out; stop, for as long as the session is open; then write and unlock."""
        door, name = self.options.door, self.name
        held: Hold = (
            hold
            or door.locks.try_acquire(name)
            or (yield Take(door.locks, name, self.timeout, passes))
        )
        try:
            record = (yield Call(openers, door.load, name)) if door.blocking else door.load(name)
            self._hand_out(record, held)
            yield None
            yield from self.flushing(last=True)
        finally:
            if self.fields is not None:
                self.fields.close()
            try:
                if door.unload is not None:
                    door.unload(name)
            finally:
                held.release()

    def _hand_out(self, record: Record | None, hold: Hold) -> None:
        self._stored = record is not None
        fields = self._missing() if record is None else Fields(self.key, record)
        if self.session is None:
            self.session = self.options.session_type(self, fields)
        else:
            open_fields(self.session, fields)
        self.fields = fields
        # From here on, whoever waits for the key waits for all who are in the scope.
        hold.parties = self.parties = self.parties or hold.parties

    def _missing(self) -> Fields:
        """The fields of a session that is not stored yet, and will not be until they change."""
        initial = self.options.initial
        given = initial(self._update) if initial is not None else None
        if not given:
            return Fields(self.key, _NO_FIELDS)
        fields = Fields(self.key, _NO_FIELDS)
        for name, value in given.items():
            fields.set(name, _copy(value))
        return Fields(self.key, fields.pending())

    def flushing(self, last: bool = False) -> Steps:
        """Write what has changed since the last flush; `last`: before the key is given on."""
        return self._writing_in_turn(last) if self.options.door.blocking else self._writing()

    def _writing_in_turn(self, last: bool) -> Steps:
        """A flush does not overtake one that is on its way, and none comes after the last."""
        turns, cancelled = self._turns_of_flushes(), None
        turn = turns.try_acquire()
        while turn is None:
            try:
                turn = yield TakeTurn(turns, None)
            except asyncio.CancelledError as error:
                if not last:
                    raise
                cancelled = error  # the last one has to wait all the same
        try:
            yield from self._writing()
        finally:
            if last and self.fields is not None:
                self.fields.close()
            turn.release()
        if cancelled is not None:
            raise cancelled

    def _writing(self) -> Steps:
        fields = self.fields
        if fields is None or not fields.open:
            return
        record, stored = fields.pending(), fields.record
        if record is stored:
            return
        fields.saved(record)
        try:
            if self.options.door.blocking:
                yield Call(closers, self._write, record)
            else:
                self._write(record)
        except BaseException:
            if self._written is not record:  # else it was cancelled, and yet has written
                fields.not_saved(stored)
            raise

    def _write(self, record: Record) -> None:
        door = self.options.door
        if record:
            door.save(self.name, record)
        elif self._stored:
            door.delete(self.name)
        self._stored = bool(record)
        self._written = record

    def _turns_of_flushes(self) -> KeyLock:
        with self._mutex:
            self._flushes = self._flushes or KeyLock(self.name)
            return self._flushes

    def roll_back(self, error: BaseException) -> None:
        """A handler failed: forget what changed since the last flush, if the options say so."""
        # GeneratorExit: a coroutine thrown away half-way, which may not await a flush any more.
        keep = self.options.save_on_error and not isinstance(error, GeneratorExit)
        if self.fields is not None and not self.closed and not keep:
            self.fields.roll_back()

    # -- who is in it: each answers True for the one who now has to run `life` to its end

    def leave(self) -> bool:
        """One less, and the end of the scope if that was the last one."""
        with self._mutex:
            self._members -= 1
            return not self._members and self._end()

    def end(self) -> bool:
        """The end of the scope, whoever is still in it."""
        with self._mutex:
            return self._end()

    def _end(self) -> bool:
        if self.closed:
            return False
        self.closed = True
        if self._loading is None or self._loading.hold is None:  # else somebody is just loading
            self._forget()
        return self._loaded

    def _forget(self) -> None:
        """Session and scope know each other: no cycle stays."""
        self.session = self._update = None

    def join(self) -> bool:
        """One more is in; False if the scope has closed."""
        with self._mutex:
            if not self.closed:
                self._members += 1
            return not self.closed

    # -- loading a lazy session, once, whoever asks first

    def load(self) -> None:
        """Lock and load, for whoever touches the session."""
        if self._on_event_loop():
            raise SessionAwaitError(
                f"the lazy session {self.key!r} was touched before it was loaded; in async code "
                f"write `session = await session` first (in PTB: `session = await "
                f"context.session`), so that the event loop goes on meanwhile"
            )
        self.load_now()

    def load_now(self) -> None:
        """Lock and load in this thread."""
        assert self._loading is not None
        turn = self._loading.acquire(self.timeout)
        assert turn is not None
        try:
            if self._begins_to_live():
                run(self.life)
            if self._was_ended_meanwhile():
                run(self.life)
        finally:
            turn.release()

    async def aload(self) -> None:
        """Lock and load as a coroutine."""
        assert self._loading is not None
        turn = await self._loading.acquire_async(self.timeout)
        assert turn is not None
        try:
            if self._begins_to_live():
                await arun(self.life)
            if self._was_ended_meanwhile():
                await arun(self.life)
        finally:
            turn.release()

    @property
    def is_loaded(self) -> bool:
        """Whether the session may be touched."""
        return self._loaded

    def _begins_to_live(self) -> bool:
        if self._loaded:
            return False
        if self.closed:
            raise SessionClosedError(
                f"the session {self.key!r} was closed before it was ever loaded"
            )
        self.life = self.living(None, in_handler.get() or _open_around() is not None)
        return True

    def _was_ended_meanwhile(self) -> bool:
        """By a thread that does not know of this one; then this one has to close."""
        with self._mutex:
            ended = self.closed and not self._loaded
            self._loaded = True
            if ended:
                self._forget()
            return ended

    # -- what else the session asks (session.Lifecycle)

    def flush(self) -> None:
        self._refuse_to_block("flush", "aflush")
        run(self.flushing())

    async def aflush(self) -> None:
        await arun(self.flushing())

    def release(self) -> None:
        self._refuse_to_block("release", "arelease")
        if self.end():
            run(self.life)

    async def arelease(self) -> None:
        if self.end():
            await arun(self.life)

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


def _copy(value: Any) -> Any:
    """A value that shares no container with what `initial` returned."""
    return Ttl(freeze(value.value), value.seconds) if isinstance(value, Ttl) else freeze(value)


def _nothing() -> Steps:
    """No step at all."""
    yield from ()


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
        "_party",
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

    _party: Party  # who is inside

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
        around = self._begins()
        try:
            if around is not None:
                run(self._joining(around))
            if self._scope is None:
                run(self._opening(around, on_loop=False))
            elif not self.options.lazy and not self._scope.is_loaded:  # of a lazy manager
                self._scope.load_now()
            return self._is_inside(around)
        except BaseException:
            self._inside = False
            if self._turn is not None:  # joined already
                self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        scope = self._scope
        assert scope is not None
        try:
            if self._leaves(scope, error):
                run(scope.life)
        finally:
            if self._turn is not None:
                self._gives_turn_on()

    async def __aenter__(self) -> S:
        around = self._begins()
        try:
            if around is not None:
                await arun(self._joining(around))
            if self._scope is None:
                await arun(self._opening(around, on_loop=True))
            elif not self.options.lazy and not self._scope.is_loaded:  # of a lazy manager
                await self._scope.aload()
            return self._is_inside(around)
        except BaseException:
            self._inside = False
            if self._turn is not None:  # joined already
                await self.__aexit__(None, None, None)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        scope = self._scope
        assert scope is not None
        try:
            if self._leaves(scope, error):
                await arun(scope.life)
        finally:
            if self._turn is not None:
                self._gives_turn_on()

    @property
    def session(self) -> S | None:
        """The session, from entering until the scope closes."""
        return None if self._scope is None else self._scope.session

    def roll_back(self, error: BaseException) -> None:
        """A handler failed with `error`, and the entry goes on: see Scope.roll_back."""
        if self._scope is not None:
            self._scope.roll_back(error)

    # -- entering and leaving

    def _begins(self) -> SessionScope[Any] | None:
        """The innermost open entry around this one."""
        if self._inside:
            raise RuntimeError(
                f"this scope of {self.key!r} is entered already; call session_scope() again for "
                f"each `with`"
            )
        self._inside = True
        self._scope = None
        return _open_around() if _current.get() is not None else None

    def _opening(self, around: SessionScope[Any] | None, on_loop: bool) -> Steps:
        """A new scope, and how it begins."""
        scope = Scope(self, on_loop)
        hold, self.hold = self.hold, None
        self._scope = scope
        if self.options.lazy:
            return _nothing()
        scope.life = scope.living(hold, around is not None or in_handler.get())
        return scope.life

    def _joining(self, around: SessionScope[Any]) -> Steps:
        """Join the scope of the same key that is open around here, if there is one."""
        entry: SessionScope[Any] | None = around
        while entry is not None and not entry._is_for(self):
            entry = entry.outer
        scope: Scope[S] | None = None if entry is None else entry._scope
        if entry is None or scope is None or not scope.join():
            return
        try:
            turn = yield TakeTurn(entry._turns_of_joiners(scope), self.timeout)
        except BaseException:
            if scope.leave():  # the others are done, and nothing of theirs failed
                yield from scope.life
            raise
        if scope.closed:  # released by whoever had the turn before
            turn.release()
            return
        self._party = turn.parties[0]
        scope.parties.append(self._party)
        self._joined, self._turn = entry, turn
        self._scope = scope

    def _is_inside(self, around: SessionScope[Any] | None) -> S:
        scope = self._scope
        assert scope is not None
        assert scope.session is not None
        if self._turn is None:
            self._party = scope.parties[0]
        self.outer = around
        _current.set(self)
        return scope.session

    def _leaves(self, scope: Scope[S], error: BaseException | None) -> bool:
        """Out of the scope; True if this one has to close it."""
        if _current.get() is self:
            _current.set(self.outer)
        self._inside = False
        joined = self._joined
        if error is not None and (joined is None or not joined._inside):
            scope.roll_back(error)  # else it goes on to the entry around this one
        if scope._members > 1 and self._party in scope.parties:
            scope.parties.remove(self._party)
        return scope.leave()

    def _gives_turn_on(self) -> None:
        turn, self._turn, self._joined = self._turn, None, None
        assert turn is not None
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
