"""One update as a unit of work: its scopes go around it, and it waits for its keys without one of
PTB's slots.

This module knows scopes and an event loop; it knows no application and no handlers.
"""

from __future__ import annotations

import asyncio
import weakref
from contextvars import ContextVar
from typing import Final

from ..lifecycle.current import entries
from ..lifecycle.supergroups import Migration
from ..lifecycle.update import UpdateScope


class UnitOfWork:
    """One update from its coming until it is handled.

    One that PTB has fetched waits here for its keys, and then for one of PTB's slots
    (`concurrent_updates`), so that those that wait for their keys occupy no slot. Meanwhile running
    handlers, which have theirs, may pass it: see Tickets.
    """

    #: The one that PTB is about to handle in this task.
    current: Final[ContextVar[UnitOfWork | None]] = ContextVar(
        "session_sync_ptb_unit", default=None
    )

    __slots__ = ("__weakref__", "_called", "failures", "migration", "update", "update_scope")

    def __init__(self, update: object) -> None:
        self.update: Final = update
        self.migration: Migration | None = None  # that it tells of, and that has to be done first
        self.update_scope: UpdateScope | None = None  # it could not be made
        #: What the error handlers are to be told.
        self.failures: Final[list[Exception]] = []
        self._called: asyncio.Event | None = None  # the keys may be unlocked

    @classmethod
    def take(cls, update: object) -> UnitOfWork | None:
        """The one that this task has waited for, to be handled now. None if the application has
        made another update of it: that passes the tickets of this one."""
        unit = cls.current.get()
        if unit is None:
            return None
        cls.current.set(None)
        if unit.update is not update:
            return None
        if next(entries(), None) is not None:  # the application has opened a scope, to be joined
            unit.withdraw()
        return unit

    async def queue(self) -> None:
        """Wait until all of its keys are unlocked for it."""
        update_scope = self.update_scope
        if update_scope is not None and update_scope.eager:
            self._called = called = asyncio.Event()
            update_scope.queue(_Call(self))
            if not called.is_set():
                await called.wait()

    async def enter(self) -> None:
        """Take its keys, and open its sessions."""
        update_scope, called = self.update_scope, self._called
        assert update_scope is not None
        try:
            while update_scope.tickets is not None and called is not None:
                called.clear()  # first: it may be called again at once
                if not update_scope.redeem():
                    # Passed by a handler; at most one update of a key waits for that in a slot.
                    await called.wait()
            await update_scope.__aenter__()
        except BaseException:
            update_scope.release()
            raise

    def withdraw(self) -> None:
        """Leave the queues of its keys, unless it has begun."""
        if self.update_scope is not None and self.update_scope.tickets is not None:
            self.update_scope.release()

    def call(self) -> None:
        """Its keys are unlocked; told in the thread of its event loop."""
        if self._called is not None:
            self._called.set()

    def call_from_outside(self, loop: asyncio.AbstractEventLoop) -> None:
        """The same in another thread, under the mutex of all locks."""
        tickets = None if self.update_scope is None else self.update_scope.tickets
        try:
            if loop.is_running():
                loop.call_soon_threadsafe(self.call)
                return
            # It may go on later. Until then others come first; then it waits again, and so do all
            # that are called meanwhile, in their old order.
            loop.call_soon_threadsafe(self._queue_again)
        except RuntimeError:  # it was closed: this update will never be handled
            pass
        if tickets is not None:
            tickets.withdraw()

    def _queue_again(self) -> None:
        if self.update_scope is not None and self.update_scope.tickets is not None:
            self.update_scope.queue(_Call(self))


class _Call:
    """Tells a unit that its keys are unlocked. The queues have it, and keep neither the unit nor
    its event loop alive: what is thrown away has to be collected, so that it is withdrawn."""

    __slots__ = ("_loop", "_unit")

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit: Final = weakref.ref(unit)
        self._loop: Final = weakref.ref(asyncio.get_running_loop())

    def __call__(self) -> None:
        unit, loop = self._unit(), self._loop()
        if unit is None or loop is None:
            return
        if asyncio._get_running_loop() is loop:
            unit.call()
        else:
            unit.call_from_outside(loop)
