"""What a scope writes, and what it rolls back; always under its write lock.

This module knows records, changes and stores; it knows nothing of keys and of the end of a scope.
"""

from __future__ import annotations

from typing import Final

from ..errors import SessionEncodeError, SessionTypeError, is_control_flow
from ..locks.lock import wait_for_notes
from ..session.changes import ChangeTracker
from ..storages.base import OpenRecord, Record
from .flow import Flow
from .members import WRITE, Guard, Members, S
from .threads import CallBlocking, call_store, closers

# What the changes themselves can be to blame for, before a store has seen them.
_OWN_FAULTS: Final = (SessionEncodeError, SessionTypeError)


class Writing(Members[S]):
    """The writes of a scope.

    Only the holder of the scope's write lock may write, the end of the scope included. So no flush
    overtakes a later one, and none comes after the end.
    """

    __slots__ = ()

    def write_guard(self) -> Guard:
        """The owner of a claim to the write lock, with which nothing was done yet."""
        return Guard(self, WRITE)

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
            except Exception:  # others are let in all the same (an interrupt: perhaps)
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

    def _has_stored_all(self) -> bool:
        """At the end of the scope: whether what awaited the last write was cancelled, and that has
        reached the store all the same."""
        tracker, written = self.tracker, self._written
        return tracker is not None and written is not None and written is tracker.committed

    def _cannot_be_saved(self, error: BaseException) -> bool:
        """Whether `error`, as the scope ends, is for a reason. Else it is an interrupt of the last
        one in it, of which those that have left it before know nothing."""
        is_closed = self.opened is None and self.options.backend.blocking
        return is_closed or self._refused or isinstance(error, _OWN_FAULTS)

    def _loses_changes(self, error: BaseException) -> None:
        """The last ones are not stored, because of `error`."""
        if self.tracker is not None:
            self.tracker.lost = f"{type(error).__name__} was raised"

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
                    elif (holder := self.held.get(WRITE)) is not None and holder.by_note:
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
