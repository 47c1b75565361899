"""How a scope is flushed and ends: written, unlocked; given up, if it was thrown away or lost.

This module knows the locks of a scope and what interrupts it; it knows nothing of opening.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..locks.callers import Caller, current_caller
from ..locks.lock import LockHandle
from ..session.changes import ChangeTracker
from .flow import AcquireLock, AcquireLockInsisting, Flow, run_flow
from .members import FIRST, GIVE_UP, TO_CLOSE, WRITE, Guard, S
from .threads import CallBlocking, closers, errands
from .writing import Writing

_NOT_LEFT: Final = "its block was not left"  # see ChangeTracker.lost


class Ending(Writing[S]):
    """The flushes of a scope, and its end.

    What was interrupted. A scope writes its handle and its open record down before it uses them,
    and forgets them after they were given up; and what it has done so far is in them. So all of it
    can be repeated. A caller that is interrupted as it ends the scope leaves the rest to a thread
    that nothing interrupts (`close_soon`), since others may have changed something before. A caller
    that is thrown away leaves nothing to be written (`abandon`), nor does one that never left: then
    the finaliser gives up what is left. The store's lock (`opened`) and the key's (`handle`) are
    given up inside of the write lock.
    """

    __slots__ = ()

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
            if self.held.setdefault(WRITE, handle) is not handle:
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
        if self.held.get(WRITE) is handle:
            del self.held[WRITE]
        if self.queues:
            self.write_guard().release()  # which gives it to the next one

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
        lock = Guard(self, GIVE_UP)
        yield from lock.around(self._ending_alone(lock.handle))

    def _ending_alone(self, lock: LockHandle) -> Flow:
        if not lock.try_acquire():
            yield AcquireLock(lock, None)
        handle = self.handle
        if handle is None:
            return
        # Else a record that blocks is closed, or the key is not of this scope any more; then only a
        # store with locks of its own has kept all others out.
        backend = self.options.backend
        if handle.is_held or backend.shared:
            if self.opened is not None or not backend.blocking:
                yield from self._writing(last=True)
        elif self.opened is not None:
            self._is_left_too_late()
            yield CallBlocking(closers, self._close_unsaved)
        self.unlock()

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

    # -- without what was changed last

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
        never closed by two callers at a time, so this has a lock; a caller that finds it taken
        leaves the record to the holder."""
        lock = Guard(self, GIVE_UP)
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
        if handle is None or self._ends_soon or GIVE_UP in self.held:
            return
        handle.by_note = True  # to others, it may have no owner any more
        self._take_over(handle)
        self.closed = (
            True  # what is to give it up keeps it alive: no caller is to join it meanwhile
        )
        self._is_left_too_late()
        try:
            is_given_up = self._is_alone() and self.held.setdefault(WRITE, handle) is handle
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
        """Whether nothing waits for it, and no store has to be called."""
        backend = self.options.backend
        has_record = self.opened is not None or self.call is not None or backend.unload is not None
        return not has_record and not self.held and self.full_key not in backend.locks.queues

    def _giving_up_in_turn(self, write: LockHandle) -> Flow:
        if not write.try_acquire():  # another thread's flush is on its way
            yield AcquireLock(write, None)
        if self.tracker is not None and self.tracker.open:
            self._is_left_too_late()
        self._close_unsaved()

    def _give_up(self) -> None:
        write = self.write_guard()
        self._end_unasked(write.around(self._giving_up_in_turn(write.handle)))

    # -- in another thread

    def _end_soon(self, handle: LockHandle, end: Callable[[], None]) -> None:
        """Call `end` in another thread."""
        self._take_over(handle)
        # To a collection, the weak reference to this scope is dead by now. So that the key is not
        # given to a waiter before the store is closed, its owner is this call, for as long as it
        # exists.
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
            self.members[TO_CLOSE] = None  # whatever is just loading it closes it
        handle = self.handle
        if handle is None or self._ends_soon or not self.is_loaded:
            return
        if self.tracker is None:  # nothing can have been changed
            self.abandon()
            return
        self._end_soon(handle, self._close_for_others)

    def _close_for_others(self) -> None:
        self._end_unasked(self._closing_in_turn(is_last_try=True))  # some other one may end it, too

    def _end_unasked(self, flow: Flow) -> None:
        """In a thread that nothing interrupts. If none can be started, it is in the middle of any
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

    # -- never left

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
            self.close_soon()  # its opener has left it to a member that was lost, or owes it
        else:
            self.abandon()
