"""One life cycle: lock, load, hand out, flush, unlock; for `with` and for `async with`.

A scope knows a backend and the options of its manager; it knows nothing of updates or frameworks,
and nothing of what is open around it.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from ..errors import (
    SessionAwaitError,
    SessionClosedError,
    SessionEncodeError,
    SessionLockTimeoutError,
    SessionTypeError,
    is_control_flow,
)
from ..locks.callers import Caller, Ender, current_caller
from ..locks.lock import NO_QUEUES, LockHandle, wait_for_notes
from ..locks.queue import KeyQueue
from ..session.changes import ChangeTracker
from ..session.containers import dump
from ..session.metadata import has_only_metadata
from ..session.session import BaseSession
from ..session.ttl import Ttl
from ..storages import forks
from ..storages.base import HeldHereError, OpenRecord, Record, record_of
from .flow import AcquireLock, AcquireLockInsisting, Flow, arun_flow, run_flow
from .options import Options
from .threads import CallBlocking, call_store, closers, errands, openers, waiters

S = TypeVar("S", bound=BaseSession)
# What the changes themselves can be to blame for, before a store has seen them.
_OWN_FAULTS: Final = (SessionEncodeError, SessionTypeError)
_NO_FIELDS: Final = record_of({})
_NOT_LEFT: Final = "its block was not left"  # see Fields.lost
_WAY_OUT: Final = (
    " Let that handler call session.release() before it goes on for long, or give the manager a "
    "longer lock_timeout."
)
_SHORT_WAIT: Final = 1.0  # seconds
_SHORTER_WAIT: Final = 0.05  # seconds, where others want the same thread

# The locks of a scope alone: which of those that have joined under one entry runs, what writes,
# what loads it if it is lazy, what closes it unsaved.
JOIN: Final = "join"
_WRITE: Final = "write"
_LOAD: Final = "load"
_GIVE_UP: Final = "give up"

# What is in `members`: this while the scope is open, and a token of each member, first this one.
OPEN: Final = object()
FIRST: Final = object()
_DESERTED: Final = {OPEN: None}
# And this in a lazy one that has ended: whoever takes it out closes it, if it is loaded by then.
_TO_CLOSE: Final = object()


class Scope(Generic[S]):
    """The time for which one key is locked and its session open.

    It is opened by one SessionScope and may be joined by others; it ends when the last of them
    leaves, or at a `release()`. Each member puts a token of its own into `members`, where `OPEN`
    is for as long as the scope may be joined. To join is to put the token in and then to look for
    `OPEN`; to leave is to take the token out and then, if only `OPEN` is left, that as well.
    Whoever takes out `OPEN` has ended the scope, so it ends once. One that finds a token there
    afterwards, of a member that came in between and saw `OPEN`, puts it back.

    Who may write: the one that holds the write lock of the scope, the end of the scope included.
    So no flush overtakes a later one, and none comes after the end. The store's lock (`opened`) and
    the key's (`handle`) are given up inside of the write lock, too.

    What was interrupted. A scope writes its handle and its open record down before it uses them,
    and forgets them after they were given up; and what it has done so far stands in them. So all of
    it can be repeated. Who is interrupted as it ends the scope leaves the rest to a thread that
    nobody interrupts (`close_soon`), since others may have changed something before. Who is thrown
    away leaves nothing to be written (`abandon`), nor does one that never left: then the finaliser
    gives up what is left.
    """

    reference: Any  # a weak one to itself, from the beginning on
    callers: list[Caller]  # those in it, first the one that opened it
    opener: Caller | None

    __slots__ = (
        "__weakref__",
        "_ends_soon",
        "_is_failed",
        "_is_owed",
        "_is_to_end",
        "_on_loop",
        "_refused",
        "_session",
        "_stored",
        "_written",
        "call",
        "callers",
        "closed",
        "full_key",
        "handle",
        "held",
        "is_loaded",
        "is_of_several",
        "key",
        "members",
        "opened",
        "opener",
        "options",
        "queues",
        "reference",
        "tracker",
        "update",
    )

    def __init__(self, options: Options[S], key: str, full_key: str, update: Any) -> None:
        self.handle: LockHandle | None = None  # first: the finaliser looks at it
        self.opened: OpenRecord | None = None  # in a store that blocks
        self._ends_soon = False  # a thread was told to close it
        self.opener = None  # until it is open
        self.options: Final = options
        self.key: Final = key
        self.full_key: Final = full_key
        self.update: Any = update  # until it closes
        self._session: S | None = None  # from the first one on that asks for it
        self.tracker: ChangeTracker | None = None  # from loading on
        self.is_loaded = not options.lazy  # whether the session may be touched once it is there
        self.closed = False
        self.members: dict[object, None] = {}  # before it begins, and after it has ended
        self._is_to_end = False  # whether other members are in it or not
        self._is_owed = False  # see owe()
        self.is_of_several = False  # which are stored together, or none of them
        self._written: Record | None = None  # the last record that has reached a store that blocks
        # The locks of the scope alone: it is their table (see LockHandle).
        self.held: Final[dict[str, LockHandle]] = {}
        self.queues: dict[str, KeyQueue[LockHandle]] = NO_QUEUES
        self._on_loop = False
        self._is_failed = False  # its changes are to be rolled back, as soon as that can be
        self._refused = False  # a store in memory has raised as it was given the last record
        self.call: CallBlocking | None = None  # the one that is on its way

    def name_of(self, _key: str, /) -> str:
        """The session key that messages name, where one of the locks of the scope is waited for."""
        return self.full_key

    def locks_to_end(self) -> list[LockHandle]:
        """See Inside. Whoever ends it does not wait for those that have joined."""
        return [handle for name, handle in list(self.held.items()) if name != JOIN]

    @property
    def is_just_ending(self) -> bool:
        """See Inside."""
        return self._is_to_end and not self.closed and OPEN not in self.members

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
        if options.lazy:  # from here on, whatever waits for the key waits for all who are in it
            handle.callers = self.callers
        else:
            self.callers = handle.callers
            self.opener = handle.callers[0]

    def session(self) -> S:
        """The session: one object, which knows this scope weakly."""
        session = self._session
        if session is None:
            tracker = self.tracker if self.is_loaded else None
            session = self.options.session_type(self.reference, self.key, tracker)
            self._session = session
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

    # -- writing, always under the write lock

    def flushing(self) -> Flow:
        """Write what has changed since the last flush, or wait until the end has written it.

        Raises SessionClosedError if the scope ended meanwhile, and what was changed is not stored.
        """
        if self.tracker is None:
            return
        write = self.write_guard()
        try:
            yield from write.around(self._flushing(self.tracker, write.handle))
        finally:
            self.roll_back_failed()

    def _flushing(self, tracker: ChangeTracker, write: LockHandle) -> Flow:
        if not write.try_acquire():
            yield AcquireLock(write, None)
        self.roll_back_what_failed()
        if tracker.open:
            yield from self._writing(last=False)
            if not self._is_failed:
                tracker.lost = ""
        elif self.handle is not None:  # its end was interrupted
            yield from self._ending()
        else:
            tracker.check_not_lost()

    def close_now(self, may_block: bool) -> bool:
        """Write and unlock without a flow; False if that is not possible, and nothing was done.

        | store        | `may_block` (a thread)           | not (a coroutine)        |
        |--------------|----------------------------------|--------------------------|
        | in memory    | done here, unless a flush is on its way                     |
        | that blocks  | the same                         | False                    |
        """
        backend = self.options.backend
        if backend.blocking and not may_block:
            return False
        # The write lock with the handle of the key: there is only one that ends the scope, and all
        # that waits for it waits for the callers in it.
        handle = self.handle
        if handle is None:
            return False
        try:
            if self.held.setdefault(_WRITE, handle) is not handle:
                return False
            if self.handle is not handle:  # a thread has just closed it, after an interrupt
                self._release_write(handle)
                return False
            if backend.blocking:
                self._write_last()
            else:
                self._write_in_memory(last=True)
            self.unlock()
            self._release_write(handle)
        except BaseException as error:
            try:
                if self._cannot_be_saved(error):
                    self._loses_changes(error)
                    with suppress(Exception):  # the first error is the one to be raised
                        self._close_unsaved()
            finally:
                try:
                    self._release_write(handle)
                except BaseException:  # as in Guard.around
                    self._release_write(handle)
                    raise
            self.close_soon()  # unless it is closed by now
            raise
        return True

    def _release_write(self, handle: LockHandle) -> None:
        """Give up the write lock, if it was taken with the handle of the key."""
        if self.held.get(_WRITE) is handle:
            del self.held[_WRITE]
        if self.queues:
            self.write_guard().release()  # which hands it on

    def closing(self, may_block: bool) -> Flow:
        """Write and unlock."""
        if not self.close_now(may_block):
            yield from self._closing_in_turn()

    def _closing_in_turn(self, is_last_try: bool = False) -> Flow:
        """The same, where another one may be closing it: the second one finds nothing to do."""
        write = self.write_guard()
        acquire = AcquireLockInsisting(write.renew)
        yield from write.around(self._closing(acquire, write.handle, is_last_try))
        if acquire.cancelled is not None:
            raise acquire.cancelled

    def _closing(self, acquire: AcquireLockInsisting, write: LockHandle, is_last_try: bool) -> Flow:
        is_its_turn = False
        try:
            if not write.try_acquire():
                yield acquire
            is_its_turn = True
            yield from self._ending()
        except GeneratorExit:  # nothing awaits the steps of this any more, and it saves nothing
            self.abandon()
            raise
        except BaseException as error:
            if is_its_turn and (is_last_try or self._cannot_be_saved(error)):
                if not self._has_stored_all():
                    self._loses_changes(error)
                yield from self._giving_up(error)
            else:
                self.close_soon()
            raise

    def _ending(self) -> Flow:
        """Write and unlock, of that what is still to be done. A thread may be just giving it up,
        for a coroutine that was thrown away meanwhile."""
        lock = Guard(self, _GIVE_UP)
        yield from lock.around(self._ending_alone(lock.handle))

    def _ending_alone(self, lock: LockHandle) -> Flow:
        if not lock.try_acquire():
            yield AcquireLock(lock, None)
        handle = self.handle
        if handle is None:
            return
        # Else a record that blocks is closed, or the key is not of this scope any more; then only a
        # store with locks of its own has let nobody in.
        backend = self.options.backend
        if handle.is_held or backend.shared:
            if self.opened is not None or not backend.blocking:
                yield from self._writing(last=True)
        elif self.opened is not None:
            self._is_left_too_late()
            yield CallBlocking(closers, self._close_unsaved)
        self.unlock()

    def _cannot_be_saved(self, error: BaseException) -> bool:
        """Whether `error`, as the scope ends, is for a reason. Else it is an interrupt of the last
        one in it, of which those that have left it before know nothing."""
        is_closed = self.opened is None and self.options.backend.blocking
        return is_closed or self._refused or isinstance(error, _OWN_FAULTS)

    def _loses_changes(self, error: BaseException) -> None:
        """The last ones are not stored, because of `error`."""
        if self.tracker is not None:
            self.tracker.lost = f"{type(error).__name__} was raised"

    def _has_stored_all(self) -> bool:
        """At the end of the scope: whether what awaited the last write was cancelled, and that has
        reached the store all the same."""
        tracker, written = self.tracker, self._written
        return tracker is not None and written is not None and written is tracker.committed

    def write_guard(self) -> Guard:
        """The owner of a claim to the write lock, with which nothing was done yet."""
        return Guard(self, _WRITE)

    def _write_last(self) -> None:
        """Write to a store that blocks, and close the record there."""
        tracker, opened = self.tracker, self.opened
        assert tracker is not None
        assert opened is not None
        if self.call is not None:
            self.call.join()
            self.call = None
        self._close(tracker)
        committed = record = tracker.committed
        self._written = None
        try:
            record = tracker.take_changes()
            call_store(self.write, opened, None if record is committed else record, True)
        except BaseException:
            if self._written is not record:
                tracker.not_saved(committed)
            raise

    def _close(self, tracker: ChangeTracker) -> None:
        """Before they are written for the last time: a change that came later would be lost."""
        if self._is_failed:
            tracker.roll_back()
        tracker.close()

    def _write_in_memory(self, last: bool) -> None:
        tracker = self.tracker
        assert tracker is not None
        if last:
            self._close(tracker)
        committed = tracker.committed
        try:
            record = tracker.take_changes()
            if record is not committed:
                self.put(record)
        except BaseException:
            tracker.not_saved(committed)
            raise

    def put(self, record: Record) -> None:
        """Write to a store in memory."""
        try:
            if record:
                self._stored = True  # first: an interrupt does not say whether it is
                self.options.backend.save(self.full_key, record)
            elif self._stored:
                self.options.backend.delete(self.full_key)
                self._stored = False
        except Exception:
            assert self.tracker is not None
            self._refused = not self.tracker.open
            raise

    def _writing(self, last: bool) -> Flow:
        if not self.options.backend.blocking:
            self._write_in_memory(last)
            return
        tracker, opened = self.tracker, self.opened
        assert tracker is not None
        assert opened is not None
        if self.call is not None:
            yield from self.ending_the_call(self.call)
        if last:
            self._close(tracker)
        committed = record = tracker.committed
        self._written = None
        try:
            record = tracker.take_changes()
            changed = record is not committed
            if not (changed or last):
                return
            args = (opened, record if changed else None, last)
            nowait = self._write_nowait if last and self.options.backend.prompt else None
            call = self.call = CallBlocking(closers, self.write, *args, nowait=nowait)
            yield call
        except BaseException:
            if self._written is not record:  # else it was cancelled, and yet written
                tracker.not_saved(committed)
            raise
        self.call = None

    def ending_the_call(self, call: CallBlocking) -> Flow:
        """Of a coroutine that was thrown away, and could not wait for it."""
        if call.is_on_its_way:
            yield CallBlocking(closers, call.join)
        self.call = None

    def write(self, opened: OpenRecord, record: Record | None, last: bool) -> None:
        """Write to a store that blocks, if there is something to write; the `last` one closes."""
        record = self.to_write(record)
        if record:
            self._stored = True  # first: an interrupt does not say whether it is
        if last:
            try:
                opened.close(record)
            except Exception:  # it has let others in all the same; of an interrupt nobody knows
                self.opened = None
                raise
        elif record is not None:
            opened.save(record)
        self.has_written(record)
        if last:
            self.opened = None

    def _write_nowait(self, opened: OpenRecord, record: Record | None, _last: bool) -> bool:
        record = self.to_write(record)
        try:
            done = self.options.backend.close_nowait(opened, record)
        except Exception:  # as above
            self.opened = None
            raise
        if done:
            self.has_written(record)
            self.opened = None
        return done

    def to_write(self, record: Record | None) -> Record | None:
        """None if there is nothing to write, nor anything to remove."""
        return record if record or self._stored else None

    def has_written(self, record: Record | None) -> None:
        """The store has `record`, if it is one."""
        if record is not None:
            self._stored = bool(record)
            self._written = record

    def keeps(self, error: BaseException) -> bool:
        """Whether what a handler has changed is saved although it raised `error`."""
        # GeneratorExit: a coroutine thrown away half-way, which may not await a flush any more.
        keep = self.options.save_on_error and not isinstance(error, GeneratorExit)
        return keep or is_control_flow(error)

    def discard(self, error: BaseException) -> None:
        """A handler failed: forget what changed since the last flush, if the options say so."""
        if self.tracker is None or self.closed or self.keeps(error):
            return
        self._loses_changes(error)
        self._is_failed = True
        self.roll_back_failed()

    def roll_back_failed(self) -> None:
        """Roll back if a handler has failed. If another thread has the write lock, it does that: it
        looks for it when it has released the lock, so one of the two comes to it."""
        has_lock = True
        while has_lock and self._is_failed and not self.closed:
            write = self.write_guard()
            try:
                try:
                    has_lock = write.handle.try_acquire()
                    if has_lock:
                        self.roll_back_what_failed()
                    elif (holder := self.held.get(_WRITE)) is not None and holder.by_note:
                        has_lock = True  # that one has released it, as will be known presently
                        wait_for_notes()
                finally:
                    write.release()
            except BaseException:
                write.release()  # once more: see Guard.around
                raise

    def roll_back_what_failed(self) -> None:
        """The same under the write lock. What has ended meanwhile stays closed."""
        tracker = self.tracker
        if self._is_failed and not self.closed and tracker is not None:
            self._is_failed = False  # first: another handler may fail meanwhile
            try:
                tracker.roll_back()
            except BaseException:
                self._is_failed = True
                raise

    # -- unlocking

    def unlock(self) -> None:
        """Give the key to the next one."""
        handle, tracker = self.handle, self.tracker
        if tracker is not None and tracker.open:
            tracker.close()
        if handle is None:
            return
        backend = self.options.backend
        try:
            # After an interrupt, the key may be another one's by now, and loaded for that.
            if backend.unload is not None and not backend.blocking and handle.is_held:
                backend.unload(self.full_key)
        finally:
            if not self.is_loaded:  # a lazy one that failed to load, so it can be loaded again
                self.tracker = None
            # It may be known for longer, and what it keeps has a lock of its own.
            handle.keeps = None
            handle.release()
            self.handle = None

    def ending_unsaved(self, error: BaseException) -> Flow:
        """The end of the scope after `error`, whatever is still in it, under the write lock."""
        try:
            if self.end(current_caller().ending()):
                self._loses_changes(error)
                if self.tracker is not None:
                    self.tracker.close()
                yield from self._giving_up(error)
        except BaseException:
            self.abandon()
            raise

    def _giving_up(self, error: BaseException) -> Flow:
        """Unlock after `error`, and write nothing."""
        if isinstance(error, GeneratorExit) and not self._is_only_touched():
            self.abandon()  # nothing awaits the steps of this any more
        elif self.opened is None:
            self.unlock()
        else:
            yield CallBlocking(closers, self._close_unsaved)

    def _is_only_touched(self) -> bool:
        """Whether it is lazy, and what was thrown away has only waited for the key: then whatever
        uses it next loads it."""
        return not (self.is_loaded or self.closed or self.opened or self.call)

    def _close_unsaved(self) -> None:
        """Close what is open, and write nothing; to be called again after an interrupt. A record is
        never closed by two at a time, so this has a lock; whoever finds it taken leaves it to the
        one that has it."""
        lock = Guard(self, _GIVE_UP)
        run_flow(lock.around(self._closing_unsaved(lock.handle)))

    def _closing_unsaved(self, lock: LockHandle) -> Flow:
        if not lock.try_acquire():
            return
        if self.call is not None:
            self.call.join()
            self.call = None
        opened = self.opened
        try:
            if opened is not None:
                opened.close(None)
        finally:
            self.opened = None
            self.unlock()
        yield from ()  # it waits for nothing

    def abandon(self) -> None:
        """Give up from within a finaliser, which may run between any two lines of any thread. So it
        takes no mutex, and calls nothing that may: neither a storage nor the task that waits next
        for the key."""
        handle = self.handle
        if handle is None or self._ends_soon or _GIVE_UP in self.held:
            return
        handle.by_note = True  # to others, it may have no owner any more
        self._take_over(handle)
        self.closed = True  # what is to give it up keeps it alive: nobody is to join it meanwhile
        self._is_left_too_late()
        try:
            is_given_up = self._is_alone() and self.held.setdefault(_WRITE, handle) is handle
            if is_given_up:
                self.unlock()
        finally:
            self._release_write(handle)
        if not is_given_up:
            self._end_soon(handle, self._give_up)

    def _take_over(self, handle: LockHandle) -> Caller:
        """Make this caller the one that holds the key; before the scope is closed, since the thread
        that opened it may have gone on, and waits for the key as soon as it finds the scope closed.
        A signal handler in between must not wait: this caller has to go on first."""
        caller = current_caller()
        handle.callers[:] = [caller]
        return caller

    def _is_left_too_late(self) -> None:
        """Or never: the last changes are not stored."""
        if self.tracker is not None:
            self.tracker.lost = self.tracker.lost or _NOT_LEFT

    def _is_alone(self) -> bool:
        """Whether nothing waits for it, and no store has to be asked."""
        backend = self.options.backend
        has_record = self.opened is not None or self.call is not None or backend.unload is not None
        return not has_record and not self.held and self.full_key not in backend.locks.queues

    def _end_soon(self, handle: LockHandle, end: Callable[[], None]) -> None:
        """Call `end` in another thread."""
        self._take_over(handle)
        # To a collection, the weak reference to this scope is dead by now. So that nobody takes
        # the key before the store is closed, its owner is this call, for as long as it exists.
        handle.owner = weakref.ref(end)
        self._ends_soon = True
        try:
            errands.run_soon(end)
        except BaseException:
            self._ends_soon = False
            raise
        finally:
            handle.callers[:] = []

    def close_soon(self) -> None:
        """Write and unlock in another thread: the last one that was in it was interrupted, and what
        the others have changed is not to be lost for that. A finaliser may call this."""
        self.closed = True
        if not self.is_loaded:
            self.members[_TO_CLOSE] = None  # whatever is just loading it closes it
        handle = self.handle
        if handle is None or self._ends_soon or not self.is_loaded:
            return
        if self.tracker is None:  # nobody can have changed anything
            self.abandon()
            return
        self._end_soon(handle, self._close_for_others)

    def _close_for_others(self) -> None:
        self._end_unasked(self._closing_in_turn(is_last_try=True))  # some other one may end it, too

    def _give_up(self) -> None:
        write = self.write_guard()
        self._end_unasked(write.around(self._giving_up_in_turn(write.handle)))

    def _end_unasked(self, flow: Flow) -> None:
        """In a thread that nobody interrupts. If none can be started, it is in the middle of any
        code; and if that is a flush of this scope, it fails."""
        handle = self.handle
        if handle is None:
            return
        handle.owner = None  # from here on the key is not lost
        try:
            run_flow(flow)
        except BaseException:
            handle.owner = self.reference
            self._ends_soon = False  # to be told again, as the flush goes on, or by the finaliser
            raise

    def _giving_up_in_turn(self, write: LockHandle) -> Flow:
        if not write.try_acquire():  # another thread's flush is on its way
            yield AcquireLock(write, None)
        if self.tracker is not None and self.tracker.open:
            self._is_left_too_late()
        self._close_unsaved()

    def __del__(self) -> None:
        try:
            self._is_lost()
        except BaseException:  # an interrupt; nothing else would do it
            self._is_lost()
            raise

    def _is_lost(self) -> None:
        """Entered and never left (an interrupt came between, say): else the key would stay locked.
        And if one came before it was even made, it has no handle."""
        handle = getattr(self, "handle", None)
        if handle is None:
            return
        was_left = FIRST not in self.members
        # To the collector's finalisers the reference is dead. Else the thread that opened this may
        # just find it open around its next block, and join it: then that block ends it.
        if not (was_left or self.closed or self.reference() is None):
            caller = self._take_over(handle)
            if not self.leave(FIRST, caller) and self.is_loaded:
                return
        handle.by_note = True
        is_open = self.tracker is not None and self.tracker.open
        if (self._is_owed and is_open) or (was_left and not self.closed):
            self.close_soon()  # whoever opened it has left it to one that was lost, or owes it
        else:
            self.abandon()

    # -- who is in it

    def join(self, token: object, outer: object) -> bool:
        """One more is to come in, inside the member with the token `outer`; False if the scope has
        ended. Then it has to `leave` all the same, and perhaps to close what the last one believed
        to leave to it."""
        members = self.members
        members[token] = None
        # While `outer` is in it, one that leaves has OPEN in hand only to put it back.
        return OPEN in members or (outer in members and not (self._is_to_end or self.closed))

    def arrive(self, caller: Caller) -> None:
        """`caller` has joined: whatever waits for the key waits for it, too."""
        self.callers.append(caller)

    def owe(self, caller: Caller) -> None:
        """`caller` had joined, and has done its work. If it is the thread that opened this, that
        may be in a later block: an interrupt came before the first line of the `__exit__` of the
        first one, and a flush of another thread keeps that alive. What it has done is stored then.
        (What a task has done is not: that may be thrown away together with what it is inside of.)
        """
        opener = self.opener
        if opener is not None and caller.is_thread and opener.is_thread:
            self._is_owed |= caller.thread is opener.thread and not self.is_of_several

    def depart(self, caller: Caller) -> None:
        """`caller` goes on outside; no error if it has departed."""
        with suppress(ValueError):  # after a `release()` of another one, too
            self.callers.remove(caller)

    def leave(self, token: object = FIRST, caller: Caller | None = None) -> bool:
        """One less, and the end of the scope if that was the last one: True if whoever leaves now
        has to close it. To leave again completes what was interrupted."""
        members = self.members
        members.pop(token, None)  # none: it has left, or was interrupted before it came any further
        try:
            while members == _DESERTED and self._takes(OPEN):
                if not members:
                    return self._ended()
                members[OPEN] = None  # another one came in between
                if self._is_to_end and self._takes(OPEN):  # and wanted to end it meanwhile
                    self.callers[:] = [] if caller is None else [caller]
                    return self._ended()
        except BaseException:  # an interrupt: the one that came in between has to find it as well
            if members and not self.closed:
                members[OPEN] = None
            raise
        if caller is not None:
            self.depart(caller)
        return False

    @property
    def has_members(self) -> bool:
        """Whether code is in it that has not left; after a `release()` it may be over all the
        same."""
        return any(token is not _TO_CLOSE for token in list(self.members))

    def end(self, caller: Ender) -> bool:
        """The end of the scope, whoever is still in it; True as in `leave`."""
        self.arrive(caller)  # first: a signal handler may want the key when this has ended it
        self._is_to_end = True  # first: one that leaves may just have it in hand, and ends it then
        if not self._takes(OPEN):
            self.depart(caller)
            return False
        # Whatever waits for the key from here on waits for the caller of this, and no other.
        self.callers[:] = [caller]
        return self._ended()

    def _takes(self, token: object) -> bool:
        """Take a token out, as the only one that does."""
        return self.members.pop(token, token) is None

    def _ended(self) -> bool:
        self.closed = True
        if not self.options.lazy:
            self.update = None
            return True
        self.members[_TO_CLOSE] = None
        if _LOAD not in self.held:  # else it is just being loaded
            self.update = None
        return self.is_loaded and self._takes(_TO_CLOSE)

    # -- a lazy session, loaded once, by whatever asks first

    def begin_lazily(self) -> None:
        """Begin with a session that is not loaded yet."""
        self.callers = [current_caller()]
        self.opener = self.callers[0]

    def load_now(self, may_block: bool) -> bool:
        """`loading` without a flow; False if that is not possible, and nothing was done."""
        load = Guard(self, _LOAD)
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
            self.members[_TO_CLOSE] = None
            return False
        return True

    def loading(self, may_block: bool) -> Flow:
        """Lock and load a lazy session, once."""
        load = Guard(self, _LOAD)
        yield from load.around(self._loading(may_block, load.handle))

    def _loading(self, may_block: bool, load: LockHandle) -> Flow:
        if not load.try_acquire():
            yield AcquireLock(load, self.options.queue_timeout)
        if self.is_loaded:
            if self.closed and self._takes(_TO_CLOSE):
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
        return self._takes(_TO_CLOSE)

    # -- what the session asks (session.Lifecycle)

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


class Guard:
    """The owner of a lock inside a scope: releases it at the end, and if that was interrupted, when
    it is collected."""

    __slots__ = ("_name", "_scope", "handle")

    def __init__(self, scope: Scope[Any], name: str) -> None:
        self._scope: Final = scope
        self._name: Final = name
        self.renew()

    def renew(self) -> LockHandle:
        """A claim with which nothing was done yet, instead of the one that was released."""
        self.handle = LockHandle(self._scope, self._name, current_caller())
        return self.handle

    def around(self, flow: Flow) -> Flow:
        """Do `flow`, and release the lock."""
        try:
            try:
                yield from flow
            finally:
                self.release()
        except BaseException:
            # Once more, since an interrupt may have come before that did anything; and while that
            # is on its way, it keeps this guard, and the same thread may want the lock.
            self.release()
            raise

    def release(self) -> None:
        """Give the lock to the next one; to be called again does no harm."""
        self.handle.release()

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)  # an interrupt may have come before it had one
        if handle is not None:
            handle.by_note = True
            handle.release()


def _copy(value: Any) -> Any:
    """A value that shares no container with what `initial` returned."""
    return Ttl(dump(value.value), value.seconds) if isinstance(value, Ttl) else dump(value)
