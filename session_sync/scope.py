"""One life cycle: lock, load, hand out, flush, unlock; for `with` and for `async with`.

What may take long is written once, as generators (see steps.py); what cannot is done at once, which
is the way of most updates of a session in memory. A scope knows a door to its storage and the
options of its manager; it knows nothing of updates or frameworks.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from .containers import freeze
from .door import Door
from .errors import (
    SessionAwaitError,
    SessionClosedError,
    SessionLockTimeout,
    SessionVersionError,
    is_control_flow,
)
from .expiry import Ttl
from .locks import Hold, KeyLock, Party, here
from .migrations import Migrations
from .repeats import has_only_updates
from .schema import Schema
from .session import BaseSession, Fields
from .steps import Call, Steps, Take, TakeTurn, arun, call_store, closers, openers, run, waiters
from .storages.base import OpenRecord, Record, record_of

S = TypeVar("S", bound=BaseSession)
_NO_FIELDS: Final = record_of({})
_SHORT_WAIT: Final = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Options(Generic[S]):
    """What all scopes of one manager have in common."""

    session_type: type[S]
    schema: Schema
    migrations: Migrations | None  # None: sessions of any version are left as they are
    migrate_eagerly: bool
    door: Door
    initial: Callable[[Any], Mapping[str, Any] | None] | None
    lazy: bool
    lock_timeout: float | None
    queue_timeout: float | None  # the part of it that is spent behind others of this process
    save_on_error: bool
    dedupe: int  # how many updates a session remembers
    #: Whether a session opens at once, unless somebody else has it.
    at_once: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at_once", not (self.migrate_eagerly or self.door.blocking))


class Scope(Generic[S]):
    """The time for which one key is locked and its session open.

    It is opened by one SessionScope and may be joined by others, which find it through a context
    variable; it closes when the last of them leaves. Whether it is still open is decided under a
    mutex, so nobody joins a scope that has begun to close, and only one closes it. Most scopes are
    never joined and need no mutex: the first who joins makes it, and who leaves alone writes None
    in its place, both by `setdefault`, one atomic step; so one of them is first, and the other one
    finds what he wrote.
    """

    __slots__ = (
        "_on_loop",
        "_once",
        "_opened",
        "_stored",
        "_written",
        "closed",
        "fields",
        "hold",
        "is_loaded",
        "key",
        "members",
        "name",
        "options",
        "parties",
        "session",
        "update",
    )

    parties: list[Party]  # who is in it, first the one that opened it
    _stored: bool
    _opened: OpenRecord | None  # in a store that blocks ...
    _written: Record | None  # ... and the last record that has reached it

    def __init__(self, options: Options[S], key: str, name: str, update: Any) -> None:
        self.options: Final = options
        self.key: Final = key
        self.name: Final = name
        self.update: Any = update  # until it closes
        self.hold: Hold | None = None  # before it has opened: given by who has taken the key
        self.session: S | None = None  # until it closes
        self.fields: Fields | None = None  # from loading on
        self.is_loaded = not options.lazy  # whether the session may be touched once it is there
        self.closed = False
        self.members = 0  # before it is entered, and after it has closed
        self._on_loop = False
        # What comes into being once, when it is first needed; by whoever needs it.
        self._once: Final[dict[str, Any]] = {}

    # -- the life cycle

    def opens_at_once(self) -> bool:
        """Lock and load, if nothing in that may take long; else False, and nothing was done."""
        options = self.options
        if not options.at_once:
            return False
        door, name = options.door, self.name
        hold = self.hold = self.hold or door.locks.try_acquire(name)
        if hold is None:
            return False
        try:
            self._hand_out(hold, door.load(name))
        except BaseException:
            self._unlock()
            raise
        return True

    def opens_here(self) -> bool:
        """Lock and load from a store that blocks, in this thread; False if somebody else has the
        key, for whom one would have to wait."""
        options = self.options
        door, name = options.door, self.name
        if not door.blocking or options.migrate_eagerly:
            return False
        hold = self.hold = self.hold or door.locks.try_acquire(name)
        if hold is None:
            return False
        self._opened = None
        try:
            opened = call_store(self._open_store, 0)
            self._hand_out(hold, opened.record)
        except BaseException as error:
            if self._opened is None and isinstance(error, SessionLockTimeout):
                return False  # another process has it; who waits for that keeps the hold
            self._abandon()
            raise
        return True

    def opening(self, passes: bool) -> Steps:
        """Lock and load. `passes`: see LockTable.acquire."""
        door, name = self.options.door, self.name
        hold: Hold = (
            self.hold
            or door.locks.try_acquire(name)
            or (yield Take(door.locks, name, self.options.queue_timeout, passes))
        )
        self.hold = hold
        try:
            if door.blocking:
                yield from self._opening_store(hold)
            else:
                self._hand_out(hold, door.load(name))
                if self.options.migrate_eagerly and self.fields is not None:
                    self._write_at_once(self.fields)
        except BaseException:
            self._unlock()
            raise

    def _opening_store(self, hold: Hold) -> Steps:
        self._opened = None
        try:
            try:
                yield Call(openers, self._open_store, 0, at_once=self._open_store_at_once)
            except SessionLockTimeout:
                yield from self._waiting_for_another_process()
            assert self._opened is not None
            self._hand_out(hold, self._opened.record)
            if self.options.migrate_eagerly:
                yield from self._writing(last=False)
        except BaseException:
            if self._opened is not None:
                yield Call(closers, self._opened.close, None)
            raise

    def _waiting_for_another_process(self) -> Steps:
        """In short waits, so that a coroutine which is cancelled meanwhile soon ends; and with
        threads of its own, since it may take as long as somebody's handler does."""
        timeout = self.options.lock_timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self._opened is None:
            left = deadline - time.monotonic()
            try:
                yield Call(waiters, self._open_store, max(0, min(left, _SHORT_WAIT)))
            except SessionLockTimeout as error:
                if left <= _SHORT_WAIT:
                    raise SessionLockTimeout(
                        f"the session {self.name!r} was not free within {timeout:g} s: {error}. "
                        f"Let that handler call session.release() before it goes on for long, or "
                        f"give the manager a longer lock_timeout."
                    ) from None

    def _open_store(self, timeout: float) -> OpenRecord:
        # Noted at once: nobody would be given an answer where a coroutine was cancelled meanwhile.
        opened = self._opened = self.options.door.open(self.name, timeout)
        return opened

    def _open_store_at_once(self, _timeout: float) -> bool:
        self._opened = self.options.door.open_at_once(self.name)
        return self._opened is not None

    def _hand_out(self, hold: Hold, record: Record | None) -> None:
        options = self.options
        migrations = options.migrations
        self._stored = record is not None
        if record is None:
            self.fields = self._missing(_NO_FIELDS)
        elif migrations is None or migrations.are_done(record):
            self.fields = Fields(self.key, record, options.schema)
        else:
            newest = migrations.newest(self.key, record, options.schema)
            self.fields = Fields(self.key, newest, options.schema)
            self.fields.save_as_it_is()
        if options.initial is not None and has_only_updates(self.fields.record):
            self.fields = self._missing(self.fields.record)
        if self.session is None:
            self.parties = hold.parties
            self.session = options.session_type(self)
        else:  # a lazy one; from here on, whoever waits for the key waits for all who are in it
            hold.parties = self.parties

    def _missing(self, record: Record) -> Fields:
        """The fields of a session that is not stored yet, and will not be until they change. All
        that `record` has is what the session remembers."""
        initial, schema = self.options.initial, self.options.schema
        given = initial(self.update) if initial is not None else None
        fields = Fields(self.key, record, schema)
        if not given:
            return fields
        for name, value in given.items():
            fields.set(name, _copy(value))
        fields = Fields(self.key, fields.take_changes(), schema)
        fields.begun = fields.record
        return fields

    def closes_at_once(self) -> bool:
        """Write and unlock, if nothing in that may take long; else False, and nothing was done."""
        if self.options.door.blocking:
            return False
        fields = self.fields
        assert fields is not None
        try:
            fields.close()  # first: a change that comes now would be lost
            self._write_at_once(fields)
        finally:
            self._release()
        return True

    def closes_here(self) -> bool:
        """Write to a store that blocks and unlock, in this thread; False if somebody has flushed,
        who may be doing so just now."""
        if self._once.setdefault("flushes", None) is not None:
            return False
        fields, opened = self.fields, self._opened
        assert fields is not None
        assert opened is not None
        kept = fields.kept
        try:
            fields.close()  # first: a change that comes now would be lost
            record = fields.take_changes()
        except BaseException:
            self._abandon()
            raise
        try:
            call_store(self._write, opened, None if record is kept else record, True)
        finally:
            self._release()
        return True

    def closing(self) -> Steps:
        """Write and unlock."""
        if not self.closes_at_once():
            turns = self._once.setdefault("flushes", None)
            try:
                if turns is None:  # nobody has flushed, and nobody will
                    yield from self._writing(last=True)
                else:
                    yield from self._writing_in_turn(turns, last=True)
            finally:
                self._unlock()

    def __del__(self) -> None:
        # Entered and never left (an interrupt came between, say): else the key would stay locked.
        if self.hold is not None:
            self._abandon()

    def _abandon(self) -> None:
        """Unlock, and write nothing."""
        opened = getattr(self, "_opened", None)
        try:
            if opened is not None:
                opened.close(None)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self.fields is not None:
            self.fields.close()
        if not self.is_loaded:  # a lazy one that failed to load, so whoever asks again loads again
            self.fields = None
        self._release()

    def _release(self) -> None:
        hold, door, self.hold = self.hold, self.options.door, None
        if hold is None:  # the garbage collector was here first, and clears in any order
            return
        if door.unload is None or door.blocking:
            hold.release()
            return
        try:
            door.unload(self.name)
        finally:
            hold.release()

    def flushing(self) -> Steps:
        """Write what has changed since the last flush."""
        if self.fields is None:
            return
        if self.options.door.blocking:
            turns = self._flushes()
            if turns is not None:
                yield from self._writing_in_turn(turns, last=False)
        elif self.fields.open:
            self._write_at_once(self.fields)

    def _flushes(self) -> KeyLock | None:
        """Where flushes take turns; None if the last one is on its way."""
        turns: KeyLock | None = self._once.setdefault("flushes", KeyLock(self.name))
        return turns

    def _write_at_once(self, fields: Fields) -> None:
        kept = fields.kept
        record = fields.take_changes()
        if record is kept:
            return
        try:
            self._put(record)
        except BaseException:
            fields.not_saved(kept)
            raise

    def _put(self, record: Record) -> None:
        if record:
            self.options.door.save(self.name, record)
            self._stored = True
        elif self._stored:
            self.options.door.delete(self.name)
            self._stored = False

    def _writing_in_turn(self, turns: KeyLock, last: bool) -> Steps:
        """A flush does not overtake one that is on its way, and none comes after the last."""
        cancelled = None
        turn = turns.try_acquire()
        while turn is None:
            try:
                turn = yield TakeTurn(turns, None)
            except asyncio.CancelledError as error:
                if not last:
                    raise
                cancelled = error  # the last one has to wait all the same
        try:
            yield from self._writing(last)
        finally:
            turn.release()
        if cancelled is not None:
            raise cancelled

    def _writing(self, last: bool) -> Steps:
        fields, opened = self.fields, self._opened
        assert fields is not None
        assert opened is not None
        kept = record = fields.kept
        try:
            if fields.open:  # else a flush comes after the last one
                if last:
                    fields.close()  # first: a change that comes now would be lost
                record = fields.take_changes()
        except BaseException:
            if last:
                yield Call(closers, opened.close, None)
            raise
        changed = record is not kept
        if not (changed or last):
            return
        self._written = None
        try:
            args = (opened, record if changed else None, last)
            yield Call(closers, self._write, *args, at_once=self._write_if_prompt)
        except BaseException:
            if changed and self._written is not record:  # else it was cancelled, and yet written
                fields.not_saved(kept)
            raise

    def _write(self, opened: OpenRecord, record: Record | None, last: bool) -> None:
        record = self._to_write(record)
        if last:
            opened.close(record)
        elif record is not None:
            opened.save(record)
        self._has_written(record)

    def _write_if_prompt(self, opened: OpenRecord, record: Record | None, last: bool) -> bool:
        record = self._to_write(record)
        done = last and self.options.door.close_at_once(opened, record)
        if done:
            self._has_written(record)
        return done

    def _to_write(self, record: Record | None) -> Record | None:
        """None if there is nothing to write, nor anything to remove."""
        return record if record or self._stored else None

    def _has_written(self, record: Record | None) -> None:
        if record is not None:
            self._stored = bool(record)
            self._written = record

    def _turns(self, what: str) -> KeyLock:
        """A lock of this scope alone."""
        turns: KeyLock = self._once.setdefault(what, KeyLock(self.name))
        return turns

    def keeps(self, error: BaseException) -> bool:
        """Whether what a handler has changed is saved although it raised `error`."""
        # GeneratorExit: a coroutine thrown away half-way, which may not await a flush any more.
        keep = self.options.save_on_error and not isinstance(error, GeneratorExit)
        return keep or is_control_flow(error)

    def discard(self, error: BaseException) -> None:
        """A handler failed: forget what changed since the last flush, if the options say so."""
        if self.fields is not None and not self.closed and not self.keeps(error):
            self.fields.roll_back()

    # -- who is in it

    def join(self) -> bool:
        """One more is to come in; False if the scope has closed."""
        mutex = self._mutex()
        if mutex is None:
            return False
        with mutex:
            if not self.closed:
                self.members += 1
            return not self.closed

    def arrive(self, party: Party) -> None:
        """`party` has joined and is here: whoever waits for the key waits for it, too."""
        self.parties.append(party)

    def leave(self, party: Party | None = None) -> bool:
        """One less, and the end of the scope if that was the last one: True if whoever leaves now
        has to close it."""
        mutex = self._once.setdefault("mutex", None)
        if mutex is None:  # nobody has ever joined it, or asked for a lazy session to be loaded
            self.members = 0
            self.closed = True
            self.session = self.update = None  # they know the scope: no cycle stays
            return self.is_loaded
        with mutex:
            self.members -= 1
            if not self.members:
                return self._end()
        if party is not None and party in self.parties:
            self.parties.remove(party)
        return False

    def end(self) -> bool:
        """The end of the scope, whoever is still in it; True as in `leave`."""
        mutex = self._mutex()
        if mutex is None:
            return False
        with mutex:
            return self._end()

    def _mutex(self) -> threading.Lock | None:
        """Under what it is decided who is in it; None if it has ended with nobody else in it."""
        mutex: threading.Lock | None = self._once.setdefault("mutex", threading.Lock())
        return mutex

    def _end(self) -> bool:
        if self.closed:
            return False
        self.closed = True
        loading = None if self.is_loaded else self._once.get("loading")
        if loading is None or loading.hold is None:  # else somebody is just loading
            self.session = self.update = None
        return self.is_loaded

    # -- a lazy session, loaded once, by whoever asks first

    def begin_lazily(self) -> None:
        """Hand out a session that is not loaded yet."""
        self.parties = [here()]
        self.session = self.options.session_type(self)

    def _loads_at_once(self) -> bool:
        """`loading`, if nothing in it may take long and nobody has begun it; else False, and
        nothing was done."""
        mutex, turns = self._mutex(), KeyLock(self.name)
        turn = turns.hold = Hold.of_lock(turns, here())  # taken before others see it
        if self._once.setdefault("loading", turns) is not turns:
            return False
        try:
            if mutex is None or self.closed or not self.opens_at_once():
                return False
            if self._has_ended_while_it_was_loaded(mutex):
                self.closes_at_once()
        finally:
            turn.release()
        return True

    def loading(self) -> Steps:
        """Lock and load a lazy session, once."""
        mutex, turns = self._mutex(), self._turns("loading")  # it does not end unnoticed any more
        turn = turns.try_acquire() or (yield TakeTurn(turns, self.options.queue_timeout))
        try:
            if self.is_loaded:
                return
            if self.closed or mutex is None:
                raise SessionClosedError(
                    f"the session {self.key!r} was closed before it was ever loaded"
                )
            if not self.opens_at_once():
                others = (entry.scope for entry in entries() if entry.scope is not self)
                inside = any(not scope.closed for scope in others)
                yield from self.opening(inside or in_handler.get())
            if self._has_ended_while_it_was_loaded(mutex):
                yield from self.closing()
        finally:
            turn.release()

    def _has_ended_while_it_was_loaded(self, mutex: threading.Lock) -> bool:
        """It is loaded now; True if a thread that does not know of this one has ended the scope."""
        with mutex:
            self.is_loaded = True
            if self.closed:
                self.session = self.update = None
            return self.closed

    # -- what the session asks (session.Lifecycle)

    def load(self) -> None:
        if self._on_event_loop():
            raise SessionAwaitError(
                f"the lazy session {self.key!r} was touched before it was loaded; in async code "
                f"write `session = await session` first (`await context.session` in PTB, `await "
                f"message.session` in telebot), so that the event loop goes on meanwhile"
            )
        if not self._loads_at_once():
            run(self.loading())

    async def aload(self) -> None:
        if not self._loads_at_once():
            await arun(self.loading())

    def flush(self) -> None:
        self._refuse_to_block("flush", "aflush")
        run(self.flushing())

    async def aflush(self) -> None:
        await arun(self.flushing())

    def release(self) -> None:
        self._refuse_to_block("release", "arelease")
        if self.end():
            run(self.closing())

    async def arelease(self) -> None:
        if self.end():
            await arun(self.closing())

    def _on_event_loop(self) -> bool:
        return self._on_loop and asyncio._get_running_loop() is not None

    def _refuse_to_block(self, name: str, instead: str) -> None:
        if self.options.door.blocking and self._on_event_loop():
            raise SessionAwaitError(
                f"session.{name}() would block the event loop while the storage writes "
                f"{self.key!r}; write `await session.{instead}()`"
            )


class SavingTogether:
    """The end of a block around several sessions of one store: what has changed in them is written
    before any of them is closed, all of it or, where the store can, nothing.

    Those that were joined are left to the scopes that they belong to, and those that were released
    to whoever has done that. The turns are those of the flushes: none is on its way meanwhile. What
    fails leaves all of them as they were before.
    """

    def __init__(self, scopes: Iterable[SessionScope[Any]]) -> None:
        self._fields: Final[dict[Scope[Any], Fields]] = {}
        for scope in scopes:
            if scope.joined is None and not scope.closed and scope.fields is not None:
                self._fields[scope] = scope.fields
        self._kept: Final[dict[Scope[Any], Record]] = {}
        self._records: Final[dict[Scope[Any], Record]] = {}
        self._written: Final[set[Scope[Any]]] = set()

    def steps(self) -> Steps:
        """Write."""
        if len(self._fields) < 2:
            return  # to close one is to write it
        turns: list[Hold] = []
        try:
            for scope in self._fields:
                flushes = scope._flushes()
                if flushes is not None:  # else it is released just now
                    turns.append((yield TakeTurn(flushes, None)))
            yield from self._writing()
        except BaseException:
            self._take_back()
            raise
        finally:
            for turn in turns:
                turn.release()

    def _writing(self) -> Steps:
        self._kept.update((s, fields.kept) for s, fields in self._fields.items() if fields.open)
        for scope, kept in self._kept.items():
            record = self._fields[scope].take_changes()
            if record is not kept and scope._to_write(record) is not None:
                self._records[scope] = record
        if not self._records:
            return
        door = next(iter(self._records)).options.door
        if door.blocking:
            yield Call(closers, self._write, door)
        else:
            self._write(door)

    def _write(self, door: Door) -> None:
        records = {scope.name: record for scope, record in self._records.items()}
        opened = {}
        for scope in self._records:
            if door.blocking and scope._opened is not None:
                opened[scope.name] = scope._opened
        if door.save_all(records, opened):
            for scope, record in self._records.items():
                scope._has_written(record)
            self._written.update(self._records)
            return
        for scope, record in self._records.items():
            try:
                if scope.name in opened:
                    scope._write(opened[scope.name], record, last=False)
                else:
                    scope._put(record)
            except BaseException as error:
                if self._written:
                    keys = ", ".join(repr(scope.key) for scope in self._written)
                    error.add_note(f"already written, by a store that takes one at a time: {keys}")
                raise
            self._written.add(scope)

    def _take_back(self) -> None:
        for scope, kept in self._kept.items():
            if scope not in self._written:  # else it was cancelled, and yet written
                self._fields[scope].not_saved(kept)
        for scope, fields in self._fields.items():
            if not scope.closed:
                fields.roll_back()


# The innermost entry of this thread or task, and of those started inside it.
_current: ContextVar[SessionScope[Any] | None] = ContextVar("session_sync_scope", default=None)

#: True inside a handler that a framework's room runs, whether it has a session or not: such code
#: never queues behind updates that have not begun, since they may need its thread.
in_handler: ContextVar[bool] = ContextVar("session_sync_in_handler", default=False)


def step_outside() -> None:
    """From here on this task runs inside no scope, whoever has made it."""
    _current.set(None)


def _copy(value: Any) -> Any:
    """A value that shares no container with what `initial` returned."""
    return Ttl(freeze(value.value), value.seconds) if isinstance(value, Ttl) else freeze(value)


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
    while entry is not None and entry.scope.closed:
        entry = entry.outer
    return entry


def entries() -> Iterator[SessionScope[Any]]:
    """The entries that this code runs inside, innermost first; some may have been left already."""
    entry = _current.get()
    while entry is not None:
        yield entry
        entry = entry.outer


class SessionScope(Scope[S]):
    """One `with` or `async with` around a session, made by `SessionManager.session_scope`.

    Inside another one for the same key it joins that one's scope and gives the same session; else
    it is a scope itself. Entries that join at the same time under the same outer entry (`gather`,
    several threads) take turns. The outer entry itself does not: it waits for them, or knows what
    it does.
    """

    __slots__ = ("_inside", "_party", "_turn", "_under", "joined", "outer")

    outer: SessionScope[Any] | None
    joined: Scope[S] | None  # also after leaving it: a task begun inside may join
    _inside: bool
    _under: SessionScope[Any]  # where it has joined: the entry that found the scope open ...
    _party: Party  # ... who has joined ...
    _turn: Hold  # ... and when

    def __enter__(self) -> S:
        if not self._begins():
            around = self.outer
            if around is not None or not (self.opens_at_once() or self.opens_here()):
                run(self._entering(around))
        session = self.session
        assert session is not None
        _current.set(self)
        return session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._leaves(error):
                scope = self.scope
                if not (scope.closes_at_once() or scope.closes_here()):
                    run(scope.closing())
        finally:
            if self.joined is not None:
                self._turn.release()

    async def __aenter__(self) -> S:
        self._on_loop = True
        if not self._begins():
            around = self.outer
            if around is not None or not self.opens_at_once():
                await arun(self._entering(around))
        session = self.session
        assert session is not None
        _current.set(self)
        return session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._leaves(error) and not self.scope.closes_at_once():
                if isinstance(error, GeneratorExit):  # thrown away with its loop: may not await
                    run(self.scope.closing())
                else:
                    await arun(self.scope.closing())
        finally:
            if self.joined is not None:
                self._turn.release()

    @property
    def scope(self) -> Scope[S]:
        """The one that was joined, or this one."""
        return self.joined or self

    # -- entering and leaving

    def _begins(self) -> bool:
        """Look around for open entries; True if the session is there already, as a lazy one is
        that has nothing around it."""
        if self.members or self.closed:
            raise RuntimeError(
                f"this scope of {self.key!r} was entered before; call session_scope() again for "
                f"each `with`"
            )
        self.members = 1
        self._inside = True
        self.joined = None
        self.outer = None if _current.get() is None else _open_around()
        if self.outer is not None or not self.options.lazy:
            return False
        self.begin_lazily()
        return True

    def _entering(self, around: SessionScope[Any] | None) -> Steps:
        """Join a scope that is open around here, or open this one."""
        return (
            self.opening(in_handler.get()) if around is None else self._joining_or_opening(around)
        )

    def _joining_or_opening(self, around: SessionScope[Any]) -> Steps:
        yield from self._joining(around)
        joined = self.joined
        if joined is not None and not self.options.lazy and not joined.is_loaded:  # of a lazy one
            try:
                yield from joined.loading()
            except BaseException:
                try:
                    if self._leaves(None):
                        yield from joined.closing()
                finally:
                    self._turn.release()
                raise
            if joined.closed:  # released while it was loaded here
                self._turn.release()
                self.joined = self.session = joined = None
        if joined is None:
            if self.options.lazy:
                self.begin_lazily()
            else:
                yield from self.opening(passes=True)

    def _joining(self, around: SessionScope[Any]) -> Steps:
        """Join the scope of the same key that is open around here, if there is one."""
        entry: SessionScope[Any] | None = around
        while entry is not None and (entry.scope.closed or not entry.is_same(self)):
            entry = entry.outer
        if entry is None:
            return
        scope: Scope[S] = entry.scope
        self._check_version(scope.options)
        if not scope.join():
            return
        try:
            turn = yield TakeTurn(entry._turns("joiners"), self.options.queue_timeout)
        except BaseException:
            if scope.leave():  # the others are done, and nothing of theirs failed
                yield from scope.closing()
            raise
        self.session = scope.session
        if self.session is None:  # released by whoever had the turn before
            turn.release()
            return
        self.joined, self._under, self._turn = scope, entry, turn
        self._party = turn.parties[0]
        scope.arrive(self._party)

    def _leaves(self, error: BaseException | None) -> bool:
        """Out of the scope; True if this one has to close it."""
        if _current.get() is self:
            _current.set(self.outer)
        self._inside = False
        scope = self.joined
        if scope is None:
            if error is not None:
                self.discard(error)
            return self.leave(self.parties[0])
        self.session = None
        if error is not None and not self._under._inside:
            scope.discard(error)  # else it goes on to the entry around this one
        return scope.leave(self._party)

    def is_same(self, other: Scope[Any]) -> bool:
        """Whether both are for one session."""
        return self.name == other.name and self.options.door is other.options.door

    def _check_version(self, around: Options[Any]) -> None:
        """Refuse to join a session of another version: what is written here would be taken for
        something older or newer than it is."""
        here = self.options
        versions = here.schema.version, around.schema.version
        if versions[0] != versions[1] and None not in (here.migrations, around.migrations):
            raise SessionVersionError(
                f"session {self.key!r} is open around this code as one of version {versions[1]}, "
                f"and this manager ({here.schema.name}) knows version {versions[0]}; give both "
                f"managers the same class or the same migrations"
            )
