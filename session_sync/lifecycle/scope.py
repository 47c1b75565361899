"""One life cycle: lock, load, hand out, flush, unlock; for `with` and for `async with`.

A scope knows a backend and the options of its manager; it knows nothing of updates or frameworks,
and nothing of what is open around it.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, Final

from ..errors import (
    SessionAwaitError,
    SessionClosedError,
    SessionLockTimeoutError,
)
from ..locks.callers import Caller, current_caller
from ..locks.lock import LockHandle
from ..session.changes import ChangeTracker
from ..session.containers import dump
from ..session.metadata import has_only_metadata
from ..session.ttl import Ttl
from ..storages import forks
from ..storages.base import HeldHereError, OpenRecord, Record, record_of
from .ending import Ending
from .flow import AcquireLock, Flow, arun_flow, run_flow
from .members import LOAD, OPEN, TO_CLOSE, Guard, S
from .threads import CallBlocking, call_store, openers, waiters

_NO_FIELDS: Final = record_of({})
_WAY_OUT: Final = (
    " Let that handler call session.release() before it goes on for long, or give the manager a "
    "longer lock_timeout."
)
_SHORT_WAIT: Final = 1.0  # seconds
_SHORTER_WAIT: Final = 0.05  # seconds, where others want the same thread


class Scope(Ending[S]):
    """The time for which one key is locked and its session open.

    It is opened by one SessionScope and may be joined by others; it ends when the last of them
    leaves, or at a `release()`. Which members it has is in `Members`, how it writes in `Writing`,
    how it ends, whatever interrupts it, in `Ending`; each has the argument for its part.
    """

    __slots__ = ()

    # -- opening

    def open_now(self, may_block: bool) -> bool:
        """Lock and load without a flow; False if that is not possible, and nothing was loaded.

        | store        | `may_block` (a thread)           | not (a coroutine)        |
        |--------------|----------------------------------|--------------------------|
        | in memory    | done here, unless the key is held                           |
        | that blocks  | done here, unless the key is     | False: the flow calls it |
        |              | held, here or elsewhere          | in a thread              |
        """
        options = self.options
        backend = options.backend
        if not options.opens_now or (backend.blocking and not may_block):
            return False
        try:
            handle = given = self.handle
            if handle is None:  # else it has the key of a ticket, or has waited for the key
                handle = self.handle = LockHandle(backend.locks, self.full_key, current_caller())
            handle.owner = self.reference
            if not (handle.try_acquire() or handle.is_held):
                self.handle = given  # the next one to try may be another caller
                return False
            if not backend.blocking:
                self._hand_out(backend.load(self.full_key))
            elif not self._open_store_now():
                return False
        except BaseException:
            self._close_unsaved()
            raise
        return True

    def new_handle(self) -> LockHandle:
        """A claim to the key of this scope, of a caller that may have to wait.

        First, what a fork by C code has left in the lock table is dropped. (`open_now` does not do
        that: in memory, an update would take 5 % longer.)
        """
        forks.check()
        handle = LockHandle(self.options.backend.locks, self.full_key, current_caller())
        handle.owner = self.reference
        return handle

    def _open_store_now(self) -> bool:
        try:
            call_store(self._open_store, 0)
        except SessionLockTimeoutError:
            if self.opened is not None:  # it was not the store that raised this
                raise
            return False  # another process has it; what waits for that keeps the handle
        assert self.opened is not None
        self._hand_out(self.opened.record)
        return True

    def opening(self, passes: bool) -> Flow:
        """Lock and load. `passes`: see LockHandle.acquire."""
        options = self.options
        try:
            handle = self.handle = self.handle or self.new_handle()
            handle.owner = self.reference
            if not (handle.try_acquire() or handle.is_held):
                yield AcquireLock(handle, options.queue_timeout, passes, options.patience)
            if options.backend.blocking:
                yield from self._opening_store()
            else:
                self._hand_out(options.backend.load(self.full_key))
            if options.migrate_eagerly:
                yield from self._writing(last=False)
        except BaseException as error:
            yield from self._giving_up(error)
            raise

    def _opening_store(self) -> Flow:
        call = self.call = CallBlocking(
            openers, self._open_store, 0, nowait=self._open_store_nowait
        )
        try:
            yield call
        except SessionLockTimeoutError:
            if self.opened is not None:
                raise
            yield from self._waiting_for_another_process()
        self.call = None
        assert self.opened is not None
        self._hand_out(self.opened.record)

    def _waiting_for_another_process(self) -> Flow:
        """In short waits, so that a coroutine which is cancelled meanwhile soon ends; and with
        threads of their own, since it may take as long as another process's handler does."""
        timeout = self.options.lock_timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self.opened is None:
            left = deadline - time.monotonic()
            short = _SHORTER_WAIT if waiters.is_crowded else _SHORT_WAIT
            wait = max(0.0, min(left, short))
            limit = None if timeout is None else max(0.0, left)
            call = self.call = CallBlocking(waiters, self._open_store, wait, deadline=limit)
            try:
                yield call
            except SessionLockTimeoutError as error:
                if self.opened is not None or time.monotonic() >= deadline:
                    raise SessionLockTimeoutError(
                        f"the session {self.full_key!r} was not unlocked within {timeout:g} s: "
                        f"{error}.{'' if isinstance(error, HeldHereError) else _WAY_OUT}"
                    ) from None

    def _open_store(self, timeout: float) -> None:
        # Noted at once: nothing takes a result where a coroutine was thrown away meanwhile.
        self.opened = self.options.backend.open(self.full_key, timeout)
        self._keep_open(self.opened)

    def _open_store_nowait(self, _timeout: float) -> bool:
        self.opened = self.options.backend.open_nowait(self.full_key)
        self._keep_open(self.opened)
        return self.opened is not None

    def _keep_open(self, opened: OpenRecord | None) -> None:
        """The collector would finalise the record together with this scope, which still has to
        close it; the handle is in the table, so what that keeps is not collected."""
        if self.handle is not None:
            self.handle.keeps = opened

    def _hand_out(self, record: Record | None) -> None:
        options = self.options
        migrations = options.migrations
        self._stored = record is not None
        if record is None:
            self.tracker = self._missing(_NO_FIELDS)
        elif migrations is None or migrations.are_done(record):
            self.tracker = ChangeTracker(self.key, record, options.schema, options.backend.check)
        else:
            newest = migrations.newest(self.key, record, options.schema)
            self.tracker = ChangeTracker(self.key, newest, options.schema, options.backend.check)
            self.tracker.save_as_it_is()
        if options.initial is not None and has_only_metadata(self.tracker.flushed):
            self.tracker = self._missing(self.tracker.flushed)
        handle = self.handle
        assert handle is not None
        handle.inside = self.reference
        if options.lazy:  # from here on, whatever waits for the key waits for all callers in it
            handle.callers = self.callers
        else:
            self.callers = handle.callers
            self.opener = handle.callers[0]
            self.handed_out = options.session_type(self.reference, self.key, self.tracker)

    def session(self) -> S:
        """The session: one object, which knows this scope weakly; of a lazy scope, it is there
        before its fields are."""
        session = self.handed_out
        if session is None:
            tracker = self.tracker if self.is_loaded else None
            session = self.handed_out = self.options.session_type(self.reference, self.key, tracker)
        return session

    def _missing(self, record: Record) -> ChangeTracker:
        """The fields of a session that is not stored yet, and will not be until they change. All
        that `record` has is what the session remembers."""
        initial, schema = self.options.initial, self.options.schema
        check = self.options.backend.check
        given = initial(self.update) if initial is not None else None
        tracker = ChangeTracker(self.key, record, schema, check)
        if not given:
            return tracker
        for name, value in given.items():
            tracker.set(name, _copy(value))
        tracker = ChangeTracker(self.key, tracker.take_changes(), schema, check)
        tracker.initial_record = tracker.flushed
        return tracker

    # -- a lazy session, loaded once, by what uses it first

    def begin_lazily(self) -> None:
        """Begin with a session that is not loaded yet."""
        self.callers = [current_caller()]
        self.opener = self.callers[0]

    def load_now(self, may_block: bool) -> bool:
        """`loading` without a flow; False if that is not possible, and nothing was done."""
        load = Guard(self, LOAD)
        try:
            try:
                return load.handle.try_acquire() and self._load_now(may_block)
            finally:
                load.release()
        except BaseException:
            load.release()  # once more: see Guard.around
            raise

    def _load_now(self, may_block: bool) -> bool:
        if self.closed or self.is_loaded:  # others may have loaded it meanwhile
            return False
        if not self.open_now(may_block):
            return False
        if self._has_ended_while_it_was_loaded() and not self.close_now(may_block):
            self.members[TO_CLOSE] = None
            return False
        return True

    def loading(self, may_block: bool) -> Flow:
        """Lock and load a lazy session, once."""
        load = Guard(self, LOAD)
        yield from load.around(self._loading(may_block, load.handle))

    def _loading(self, may_block: bool, load: LockHandle) -> Flow:
        if not load.try_acquire():
            yield AcquireLock(load, self.options.queue_timeout)
        if self.is_loaded:
            if self.closed and self._takes(TO_CLOSE):
                yield from self.closing(may_block)
            return
        if self.closed:
            raise SessionClosedError(
                f"the session {self.key!r} was closed before it was ever loaded"
            )
        if not self.open_now(may_block):
            yield from self.opening(self.is_inside())
        if self._has_ended_while_it_was_loaded():
            yield from self.closing(may_block)

    def _has_ended_while_it_was_loaded(self) -> bool:
        """It is loaded now; True if a thread that does not know of this one has ended the scope,
        and left its closing to this one."""
        self.is_loaded = True
        if not self.closed:
            return False
        self.update = None
        return self._takes(TO_CLOSE)

    # -- what the session calls (session.Lifecycle)

    def load(self) -> None:
        if self._on_event_loop():
            raise SessionAwaitError(
                f"the lazy session {self.key!r} was touched before it was loaded; in async code "
                f"write `session = await session` first (`await context.session` in PTB, `await "
                f"message.session` in telebot), so that the event loop goes on meanwhile"
            )
        if not self.load_now(may_block=True):
            run_flow(self.loading(may_block=True))

    async def aload(self) -> None:
        if not self.load_now(may_block=False):
            await arun_flow(self.loading(may_block=False))

    def is_inside(self) -> bool:
        """Whether this code runs inside a handler or another scope."""
        return False

    def flush(self) -> None:
        self._refuse_to_block("flush", "aflush")
        run_flow(self.flushing())

    async def aflush(self) -> None:
        await arun_flow(self.flushing())

    def release(self) -> None:
        self._refuse_to_block("release", "arelease")
        caller = current_caller().ending()
        try:
            if self.end(caller):
                run_flow(self.closing(may_block=True))
        except BaseException:
            self._release_interrupted(caller)
            raise

    async def arelease(self) -> None:
        caller = current_caller().ending()
        try:
            if self.end(caller):
                await arun_flow(self.closing(may_block=False))
        except BaseException:
            self._release_interrupted(caller)
            raise

    def _release_interrupted(self, caller: Caller) -> None:
        """Perhaps before anything was written, and in a thread that is not the handler's: what that
        has changed is not to be lost for it."""
        if OPEN in self.members:
            self._is_to_end = False
            self.depart(caller)
        else:
            self.close_soon()

    def _on_event_loop(self) -> bool:
        return self._on_loop and asyncio._get_running_loop() is not None

    def _refuse_to_block(self, name: str, instead: str) -> None:
        if self.options.backend.blocking and self._on_event_loop():
            raise SessionAwaitError(
                f"session.{name}() would block the event loop while the storage writes "
                f"{self.key!r}; write `await session.{instead}()`"
            )


def _copy(value: Any) -> Any:
    """A value that shares no container with what `initial` returned."""
    return Ttl(dump(value.value), value.seconds) if isinstance(value, Ttl) else dump(value)
