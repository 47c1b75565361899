"""The tasks that PTB makes for an update: they keep its scopes open until the last one has ended.

This module knows tasks and the scopes that they belong to; it does not know what they do.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from ..lifecycle.flow import run_flow
from ..lifecycle.scope import Scope
from ..lifecycle.threads import errands
from ..lifecycle.transaction import aclose_all
from ..lifecycle.update import UpdateScope
from ..locks.callers import Caller, current_caller

if TYPE_CHECKING:
    from .application import Integration


class UnitTask:
    """A task that PTB has made for a unit of work: its scopes stay open until it has ended."""

    #: The one that the task is which is just being made.
    current: Final[ContextVar[UnitTask | None]] = ContextVar("session_sync_ptb", default=None)

    def __init__(
        self,
        integration: Integration,
        update: object,
        update_scope: UpdateScope,
        scopes: list[Scope[Any]],
        token: object,
    ) -> None:
        self._integration: Final = integration
        self._update: Final = update
        self._update_scope: Final = update_scope  # for the contexts of the task: see Binding
        self._scopes: Final = scopes
        self._token: Final = token
        self._begun = False

    @classmethod
    def of(
        cls, integration: Integration, update: object, update_scope: UpdateScope
    ) -> UnitTask | None:
        """A member of the scopes that are open; None if none is."""
        token = object()
        scopes: list[Scope[Any]] = []
        for entry in update_scope.in_order:
            scope = entry.target
            if scope.join(token, entry.token):
                scopes.append(scope)
            elif scope.leave(token):  # a thread that has left just now has left it to this one
                errands.run_soon(functools.partial(run_flow, scope.closing(may_block=True)))
        return cls(integration, update, update_scope, scopes, token) if scopes else None

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do what the task is for, which includes its error handlers, and leave."""
        self._begun = True
        caller = current_caller()
        for scope in self._scopes:
            scope.arrive(caller)
        try:
            return await work
        except Exception:
            raise  # process_error has seen it
        except BaseException as error:
            for scope in self._scopes:
                scope.discard(error)
            raise
        finally:
            try:
                last = self._leave(caller)
                if isinstance(sys.exc_info()[1], GeneratorExit):  # thrown away: may not await
                    for scope in last:
                        scope.abandon()
                else:
                    await self._close(last)
            except BaseException:
                for scope in self._scopes:  # once more, as the end of a block: it may have left one
                    if scope.leave(self._token, caller) or scope.closed or not scope.has_members:
                        scope.close_soon()
                raise

    def ended(self, task: asyncio.Task[Any]) -> None:
        """A task that was cancelled before its first step has done nothing of `run`."""
        if not self._begun and (last := self._leave()):
            self._integration.wait_for(asyncio.create_task(self._close(last)))

    def _leave(self, caller: Caller | None = None) -> list[Scope[Any]]:
        """The scopes that have to be closed now."""
        return [scope for scope in reversed(self._scopes) if scope.leave(self._token, caller)]

    async def _close(self, scopes: list[Scope[Any]]) -> None:
        await self._integration.report(self._update, await aclose_all(scopes))
