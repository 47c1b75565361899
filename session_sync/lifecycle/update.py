"""What one update has open: its sessions, `session` and `chat_session`, for both integrations.

They are opened in one order, and closed all, whatever fails in one of them. Before that, they may
wait for all their keys without a thread. This module knows scopes and tickets; it knows no
framework, and not how an update is handled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..locks.tickets import Tickets
from ..session.changes import ChangeTracker
from ..session.session import BaseSession
from ..storages import forks
from .entry import SessionScope
from .observers import logger
from .scope import Scope
from .transaction import ScopeStack

if TYPE_CHECKING:
    from ..manager import SessionManager

#: The managers that `install` was given for a bot's updates, that of `session` first.
Managers: TypeAlias = "tuple[SessionManager[Any], ...]"


class UpdateScope(ScopeStack):
    """The scopes of one update as one `with` or `async with`.

    Why two updates never wait for each other in a circle. Of one store, they take their keys in the
    order of their full names, as every caller does that takes several; of two stores, that of
    `session` first. So of all updates that wait, the one whose key is the last in this order waits
    for a holder that waits for none of these keys.

    What fails when one of them is closed is neither an error of the other's, which is saved, nor
    lost: it is raised when both are closed, two errors as an ExceptionGroup.
    """

    __slots__ = ("_delivery", "eager", "is_new", "scopes", "sessions", "tickets")

    def __init__(self, managers: Managers, update: Any, delivery: Delivery | None = None) -> None:
        #: In the order of `managers`; None for one that the update has no key for.
        self.scopes: Final = [sessions.scopes.of_update(update) for sessions in managers]
        super().__init__(scope for scope in self.scopes if scope is not None)
        if len(self.in_order) > 1:
            _put_in_order(self.in_order)
        #: Those whose keys have to be unlocked before the update is handled, each key once.
        self.eager: Final = [scope for scope in self.in_order if not scope.options.lazy]
        if len(self.eager) > 1 and self.eager[0].is_same(self.eager[1]):
            self.eager.pop()
        self.tickets: Tickets | None = None  # while it waits, until it begins
        #: As `scopes`, from entering on; also after they have closed.
        self.sessions: Sequence[BaseSession | None] = ()
        self._delivery: Final = delivery  # None: no session remembers updates
        #: Whether the update is to be handled, from entering on: not if it comes again.
        self.is_new = True

    # -- before it begins

    def queue(self, call: Callable[[], None]) -> None:
        """Wait for the keys of those that are `eager`; `call` is called when all are unlocked."""
        tickets = self.tickets = tickets_for(self.eager)
        tickets.queue(call, self.eager[0].options.patience)

    def redeem(self) -> bool:
        """Take the keys: the update begins. False if a running handler has passed it; then `call`
        is called again."""
        tickets = self.tickets
        if tickets is None or not tickets.redeem():
            return False
        self.tickets = None
        return True

    def withdraw(self) -> None:
        """Leave the queues, unless it has begun, which another thread may do just now."""
        if self.tickets is not None:
            self.tickets.withdraw()

    def release(self) -> None:
        """Give up the keys, unless it was entered: it never will be."""
        self.tickets = None
        release_all(self.in_order)

    # -- its life

    def __enter__(self) -> Sequence[BaseSession | None]:
        try:
            self.enter()
            return self._hand_out()
        except BaseException as error:
            self.release()
            raise_all(self.leave(error), NOT_CLOSED)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            raise_all(self.leave(error), NOT_CLOSED)
        except BaseException:
            self.leave(error)  # else they were left
            raise

    async def __aenter__(self) -> Sequence[BaseSession | None]:
        try:
            await self.aenter()
            return self._hand_out()
        except BaseException as error:
            raise_all(await self.aleave(error), NOT_CLOSED)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            raise_all(await self.aleave(error), NOT_CLOSED)
        except GeneratorExit as thrown_away:
            await self.aleave(thrown_away)
            raise
        except BaseException:
            await self.aleave(error)  # as above
            raise

    def _hand_out(self) -> Sequence[BaseSession | None]:
        self.is_new = self._delivery is None or self._delivery.lets_in(self.in_order)
        self.sessions = [None if scope is None else scope.target.session() for scope in self.scopes]
        return self.sessions

    def opened(self) -> Sequence[Scope[Any] | None]:
        """The scopes that were joined or opened; unlike `scopes`, they forget the update when they
        close."""
        return [None if scope is None else scope.target for scope in self.scopes]

    def discard(self, error: BaseException) -> None:
        """A handler failed with `error`."""
        for scope in self.in_order:
            scope.target.discard(error)


class Delivery:
    """One coming of an update, which may have come before; all that is done about it is one unit,
    though an integration may do it in several tasks.

    It is a repeat if one of its sessions has had it. Where only one of two was saved (the process
    died in between), the other one goes without what was lost: better than to give the first one
    the same change twice.
    """

    __slots__ = ("_is_new", "_number")

    def __init__(self, number: int) -> None:
        self._number: Final = number
        self._is_new = False  # a task of this delivery was let in

    def lets_in(self, scopes: Sequence[SessionScope[Any]]) -> bool:
        """Whether the update is to be handled, now that its scopes are open. If so, its sessions
        remember it from their end on."""
        remembering = [scope for scope in scopes if scope.options.dedupe]
        if not self._is_new:
            for scope in remembering:
                if _tracker_of(scope).has_had(self._number):
                    logger.info("update %d has come again: %r has had it", self._number, scope.key)
                    return False
        self._is_new = True
        for scope in remembering:
            _tracker_of(scope).remember(self._number, scope.options.dedupe)
        return True


def _tracker_of(scope: SessionScope[Any]) -> ChangeTracker:
    tracker = scope.target.tracker
    assert tracker is not None  # it is not lazy
    return tracker


def _put_in_order(scopes: list[SessionScope[Any]]) -> None:
    first, second = scopes
    if first.is_same(second):
        here, there = first.options.session_type, second.options.session_type
        if here is not there:
            raise TypeError(
                f"session and chat_session are one for this update, both managers having the key "
                f"{first.full_key!r} in one store, and it cannot be a {here.__name__} and a "
                f"{there.__name__}: give one of them a prefix or another get_storage_key"
            )
        if first.options.lazy:  # the other one joins it, and may have a ticket for the key
            scopes.reverse()
    elif first.options.backend is second.options.backend:
        scopes.sort(key=_name)


def _name(scope: SessionScope[Any]) -> str:
    return scope.full_key


def tickets_for(scopes: Sequence[SessionScope[Any]]) -> Tickets:
    """The tickets of an update that has not begun. The scopes own them, and release them."""
    forks.check()
    tickets = []
    for scope in scopes:
        ticket = scope.options.backend.locks.ticket(scope.full_key)
        scope.handle = ticket  # which is not left alone: the update that waits keeps the scope
        tickets.append(ticket)
    return Tickets(tickets)


def release_all(scopes: Sequence[SessionScope[Any]]) -> None:
    """Unlock the keys of scopes that were not entered, and never will be."""
    for scope in scopes:
        if scope.handle is not None and not scope.members and not scope.closed:
            scope.handle.release()
            scope.handle = None


#: Where both fail.
NOT_CLOSED: Final = "neither session nor chat_session could be closed"


def raise_all(failures: list[BaseException], what: str) -> None:
    """Raise what failed, if anything did; what interrupts the program is not put into a group."""
    for failure in failures:
        if len(failures) == 1 or not isinstance(failure, Exception):
            raise failure
    if failures:
        raise BaseExceptionGroup(what, failures)
