"""Several sessions at once: locked in one order, and written together.

This module knows scopes and how they are entered; it knows no keys or updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from types import TracebackType
from typing import Final, Generic, TypeVar

from .scope import SavingTogether, SessionScope
from .session import BaseSession
from .steps import arun, run

S = TypeVar("S", bound=BaseSession)


class SessionScopes(Generic[S]):
    """One `with` or `async with` around several sessions, made by `SessionManager.session_scopes`.

    Why it never waits in a circle. Whoever takes several keys of a store in this way takes them in
    the order of their names, so of all who wait, the one whose key has the last name waits for
    somebody who waits for nobody of them. (Blocks that are nested by hand have no such order; a
    circle of those raises SessionDeadlockError, within one process.)

    What the block has changed is written before any key is let go: in one step where the storage
    can, else one session after the other. A session that is open around the block is joined: it is
    written with the scope that it belongs to.
    """

    def __init__(self, scopes: Sequence[SessionScope[S]]) -> None:
        self._scopes: Final = tuple(scopes)
        self._in_order: Final = sorted(self._scopes, key=lambda scope: scope.name)
        self._entered = ExitStack()
        self._aentered = AsyncExitStack()

    def __enter__(self) -> tuple[S, ...]:
        with ExitStack() as entering:
            sessions = {scope: entering.enter_context(scope) for scope in self._in_order}
            self._entered = entering.pop_all()
        return tuple(sessions[scope] for scope in self._scopes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.push(self._save)
        self._entered.__exit__(kind, error, trace)

    def _save(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object
    ) -> None:
        if self._keeps(error):
            run(SavingTogether(self._scopes).steps())

    async def __aenter__(self) -> tuple[S, ...]:
        async with AsyncExitStack() as entering:
            sessions = {
                scope: await entering.enter_async_context(scope) for scope in self._in_order
            }
            self._aentered = entering.pop_all()
        return tuple(sessions[scope] for scope in self._scopes)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._aentered.push_async_exit(self._asave)
        await self._aentered.__aexit__(kind, error, trace)

    async def _asave(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object
    ) -> None:
        if self._keeps(error):
            await arun(SavingTogether(self._scopes).steps())

    def _keeps(self, error: BaseException | None) -> bool:
        """Whether anything is saved; else each of them is rolled back as it is left."""
        return error is None or any(scope.keeps(error) for scope in self._scopes)
