"""The tickets of a task that has not begun, for all the keys that it needs.

This module knows lock tables; it knows nothing of sessions, storages or pools.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from .callers import current_caller
from .lock import Ticket, TicketWaiter, begin_watch, hand_on, locked, queue_of
from .watch import Patience


class Tickets:
    """The places of one task in the queues of all its keys.

    When every key is unlocked for it, `call` is called (it must neither block nor raise: it puts
    the task into a pool, say), and the caller that then runs the task calls `redeem()`. Until that
    moment the task holds none of them; those that have not begun, either, wait behind it.

    Why no tasks wait in a circle. Tasks enter all of their queues in one step, so of two tasks the
    same one is ahead in every queue that both are in: the one that came first of all waits only
    for callers that hold a key. What holds a key has begun, and passes all that have not, so it
    does not wait for a task either.
    """

    __slots__ = ("_call", "_called", "handles")

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        #: As they were given. Their owners release them.
        self.handles: Final = tickets
        self._call: Callable[[], None] | None = None
        self._called = False  # and has not come yet

    def queue(self, call: Callable[[], None], patience: Patience | None = None) -> None:
        """Queue for all keys; `call` may be called before this returns, and again whenever
        `redeem` was too late."""
        self._call = call
        waiter = TicketWaiter(self._have_it_begin)
        for ticket in self.handles:
            ticket.waiter = waiter
        if len(self.handles) == 1:
            ticket = self.handles[0]
            # A caller that began to wait just now has not seen the ticket: into its queue with it.
            if ticket.try_acquire() and ticket.key not in ticket.table.queues:
                self._called = True  # before: the task may run at once, and be too late
                call()
                return
        locked(self._enter)
        for ticket in self.handles:
            begin_watch(ticket.table, ticket.key, patience)

    def redeem(self) -> bool:
        """Take all the locks: the task begins. False if a running handler has passed it: then
        `call` is called again."""
        redeemed = locked(self._redeem)
        if redeemed:
            self._call = None  # which leads back to these tickets: no cycle stays
        return redeemed

    def call_again(self) -> None:
        """The task was called, and did not come: it was lost on its way."""
        locked(self._call_again)

    def withdraw(self) -> None:
        """Leave all queues; no error if the locks were taken, or were given back, already."""
        for ticket in self.handles:
            ticket.withdraw()
        self._call = None

    def _enter(self) -> None:
        for ticket in self.handles:
            queue_of(ticket.table, ticket.key).enter(ticket, passes=False)
        for ticket in self.handles:
            hand_on(ticket.table, ticket.key)

    def _redeem(self) -> bool:
        self._called = False
        tickets = self.handles
        if not all(ticket.is_held and not ticket.begun for ticket in tickets):
            return False
        caller = current_caller()
        for ticket in tickets:
            ticket.callers.append(caller)
            ticket.begun = True
            ticket.waiter = None  # which leads back to these tickets: no cycle stays
            queue = ticket.table.queues.get(ticket.key)
            if queue is not None:
                queue.leave(ticket)
                hand_on(ticket.table, ticket.key)  # which removes a queue that is empty now
        return True

    def _call_again(self) -> None:
        self._called = False
        self._have_it_begin()

    def _have_it_begin(self) -> None:
        """One more key is unlocked for this task."""
        if not self._called and all(ticket.is_held for ticket in self.handles):
            call = self._call
            if call is not None:
                call()
                # Afterwards, since an interrupt may come: to be called twice does no harm. (The
                # task cannot come in between: this is under the mutex, and so is `redeem`.)
                self._called = True
