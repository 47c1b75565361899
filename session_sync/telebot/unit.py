"""One task of telebot's for an update as a unit of work: its scopes go around it, and it waits for
its keys without a worker of the pool.

This module knows scopes, and a pool by two of its methods; it knows no handlers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from ..lifecycle.current import in_handler
from ..lifecycle.entry import SessionScope
from ..lifecycle.threads import errands
from ..lifecycle.update import UpdateScope, release_all, tickets_for
from ..locks.tickets import Tickets
from .attribute import bind

_NO_SCOPE: Final = (None,)
_NO_SESSION: Final = (None,)


class LightUnit:
    """One task of telebot's with the scope that goes around it (None: the update has no key)."""

    __slots__ = ("_args", "_kwargs", "_scope", "_task", "has_session", "tickets", "waits")

    def __init__(
        self,
        scope: SessionScope[Any] | None,
        task: Callable[..., Any],
        args: tuple[Any, ...],  # the update first
        kwargs: dict[str, Any],
    ) -> None:
        self._scope: Final = scope
        self._task: Final = task
        self._args: Final = args
        self._kwargs: Final = kwargs
        self.has_session: Final = scope is not None
        #: Whether it has to have its key before it begins.
        self.waits: Final = scope is not None and not scope.options.lazy
        self.tickets: Tickets | None = None

    def queue(self, call: Callable[[], None]) -> None:
        """Wait for the key; `call` is called when it is unlocked."""
        scope = self._scope
        assert scope is not None
        self.tickets = tickets_for([scope])
        self.tickets.queue(call, scope.options.patience)

    def redeem(self) -> bool:
        """Take the key: the task begins. False if a running handler has passed it."""
        return self.tickets is not None and self.tickets.redeem()

    def withdraw(self) -> None:
        """Leave the queue, unless it has begun, which another thread may do just now."""
        if self.tickets is not None:
            self.tickets.withdraw()

    def release(self) -> None:
        """Give up the key: this is not going to run."""
        if self._scope is not None:
            release_all([self._scope])

    def run(self) -> None:
        """Do it, in a worker or in the polling thread."""
        scope = self._scope
        token = in_handler.set(True)
        try:
            if scope is None:
                bind(self._args[0], _NO_SCOPE, _NO_SESSION)
                self._task(*self._args, **self._kwargs)
                return
            with scope as session:
                bind(self._args[0], (scope.joined or scope,), (session,))
                self._task(*self._args, **self._kwargs)
        finally:
            in_handler.reset(token)


class UnitOfWork:
    """The same with all that a bot may have: a `chat_session`, and updates that come again."""

    __slots__ = ("_args", "_kwargs", "_task", "_update_scope", "has_session", "waits")

    def __init__(
        self,
        update_scope: UpdateScope,
        task: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._update_scope: Final = update_scope
        self._task: Final = task
        self._args: Final = args
        self._kwargs: Final = kwargs
        self.has_session: Final = bool(update_scope.in_order)
        self.waits: Final = bool(update_scope.eager)

    @property
    def tickets(self) -> Tickets | None:
        """Its places in the queues, until it begins."""
        return self._update_scope.tickets

    def queue(self, call: Callable[[], None]) -> None:
        """Wait for the keys; `call` is called when all are unlocked."""
        self._update_scope.queue(call)

    def redeem(self) -> bool:
        """Take the keys: the task begins. False if a running handler has passed it."""
        return self._update_scope.redeem()

    def withdraw(self) -> None:
        """Leave the queues, unless it has begun, which another thread may do just now."""
        self._update_scope.withdraw()

    def release(self) -> None:
        """Give up the keys: this is not going to run."""
        self._update_scope.release()

    def run(self) -> None:
        """Do it, in a worker or in the polling thread."""
        token = in_handler.set(True)
        try:
            with self._update_scope as sessions:
                if self._update_scope.is_new:
                    bind(self._args[0], self._update_scope.opened(), sessions)
                    self._task(*self._args, **self._kwargs)
        finally:
            in_handler.reset(token)


class WaitingUnits:
    """The units of one TeleBot that wait for their keys, and go into its pool when they have them.

    What has its keys goes to the end of the pool's queue, so that users take turns there, however
    many updates one of them has sent.
    """

    def __init__(self, bot: Any) -> None:
        self.stopped = False
        self._exec_task: Final = bot._exec_task
        self._units: Final[set[LightUnit | UnitOfWork]] = set()
        if bot.threaded:
            self._close_pool: Final = bot.worker_pool.close
            bot.worker_pool.close = self.close_pool

    def queue(self, unit: LightUnit | UnitOfWork) -> None:
        """Let `unit` wait without a worker."""
        self._units.add(unit)
        try:
            unit.queue(functools.partial(self._call, unit))
        except BaseException:
            self._withdraw(unit)
            raise
        if self.stopped:
            self._withdraw(unit)

    def redeem(self, unit: LightUnit | UnitOfWork) -> bool:
        """Whether `unit` has its keys now, and begins; else a handler has passed it, and it will be
        called again."""
        try:
            redeemed = unit.redeem()
            if redeemed:
                self._units.discard(unit)
        except BaseException:  # from outside: the unit is lost, and its keys must not be
            self._withdraw(unit)
            unit.release()
            raise
        return redeemed

    def call_again(self, unit: LightUnit | UnitOfWork) -> None:
        """The pool has lost the task that was to begin `unit`."""
        if unit in self._units and unit.tickets is not None and not self.stopped:
            errands.run_soon(unit.tickets.call_again)

    def close_pool(self) -> None:
        """Nothing will run what still waits, so nothing may have to wait behind it."""
        self.stopped = True
        try:
            self._close_pool()  # which waits for the handlers: Ctrl-C may come once more
        finally:
            for unit in list(self._units):
                self._withdraw(unit)

    def _call(self, unit: LightUnit | UnitOfWork) -> None:
        self._exec_task(_PoolTask(self, unit))

    def _withdraw(self, unit: LightUnit | UnitOfWork) -> None:
        self._units.discard(unit)
        unit.withdraw()


class _PoolTask:
    """What goes into the pool to begin a unit. A worker that is interrupted before it comes to the
    unit loses it; then another task is put into the pool."""

    __slots__ = ("_is_over", "_unit", "_waiting")

    def __init__(self, waiting: WaitingUnits, unit: LightUnit | UnitOfWork) -> None:
        self._waiting: Final = waiting
        self._unit: Final = unit
        self._is_over = False

    def __call__(self) -> None:
        redeemed = self._waiting.redeem(self._unit)
        self._is_over = True
        if redeemed:
            self._unit.run()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):  # else an interrupt came before it was made
            self._waiting.call_again(self._unit)


def run_as_handler(work: Callable[..., None], *args: Any) -> None:
    """Do what is no unit, and may need a session all the same."""
    token = in_handler.set(True)
    try:
        work(*args)
    finally:
        in_handler.reset(token)


def raise_error(error: Exception) -> None:
    """A task that has failed already, elsewhere."""
    raise error
