"""Several sessions at once: locked in one order, written together, and left all.

This module knows scopes and how they are entered; it knows no keys or updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, TypeVar

from .scope import SavingTogether, Scope, SessionScope
from .session import BaseSession
from .steps import arun, run

S = TypeVar("S", bound=BaseSession)


class Several:
    """Scopes that are entered one after the other, and left the other way round: all of them,
    whatever fails in one."""

    __slots__ = ("_entered", "in_order")

    def __init__(self, in_order: Iterable[SessionScope[Any]]) -> None:
        self.in_order: Final = list(in_order)
        self._entered: list[SessionScope[Any]] = []

    def enter(self) -> dict[SessionScope[Any], Any]:
        """Enter them, which gives the session of each. Where one fails, those before it have still
        to be left."""
        sessions = {}
        for scope in self.in_order:
            sessions[scope] = scope.__enter__()
            self._entered.append(scope)
        return sessions

    async def aenter(self) -> dict[SessionScope[Any], Any]:
        """The same in a coroutine."""
        sessions = {}
        for scope in self.in_order:
            sessions[scope] = await scope.__aenter__()
            self._entered.append(scope)
        return sessions

    def leave(self, error: BaseException | None) -> list[BaseException]:
        """Leave those that were entered, for `error` if that came out of the block; what fails is
        not raised but returned."""
        failures: list[BaseException] = []
        while self._entered:
            try:
                self._entered.pop().__exit__(*_details(error))
            except BaseException as failure:
                failures.append(failure)
        return failures

    async def aleave(self, error: BaseException | None) -> list[BaseException]:
        """The same in a coroutine."""
        failures: list[BaseException] = []
        while self._entered:
            try:
                await self._entered.pop().__aexit__(*_details(error))
            except GeneratorExit as thrown_away:  # which can await nothing any more
                self.leave(thrown_away)
                raise
            except BaseException as failure:
                failures.append(failure)
        return failures


def _details(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


def close_all(scopes: Iterable[Scope[Any]]) -> list[BaseException]:
    """Close scopes that others have left; what fails is not raised but returned."""
    failures: list[BaseException] = []
    for scope in scopes:
        try:
            run(scope.closing())
        except BaseException as failure:
            failures.append(failure)
    return failures


async def aclose_all(scopes: Iterable[Scope[Any]]) -> list[BaseException]:
    """The same in a coroutine."""
    failures: list[BaseException] = []
    rest = iter(scopes)
    for scope in rest:
        try:
            await arun(scope.closing())
        except GeneratorExit:  # thrown away: it can await nothing any more
            close_all(rest)
            raise
        except BaseException as failure:
            failures.append(failure)
    return failures


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
        self._several: Final = Several(sorted(self._scopes, key=lambda scope: scope.name))

    def __enter__(self) -> tuple[S, ...]:
        try:
            sessions = self._several.enter()
        except BaseException as error:
            _raise_first([error, *self._several.leave(error)])
        return tuple(sessions[scope] for scope in self._scopes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failures: list[BaseException] = []
        try:
            if self._is_saved(error):
                run(SavingTogether(self._scopes).steps())
        except BaseException as failure:
            failures.append(failure)
        failures += self._several.leave(failures[0] if failures else error)
        try:
            if failures:
                _raise_first(failures)
        finally:
            del failures  # which know this frame: no cycle stays

    async def __aenter__(self) -> tuple[S, ...]:
        try:
            sessions = await self._several.aenter()
        except BaseException as error:
            _raise_first([error, *await self._several.aleave(error)])
        return tuple(sessions[scope] for scope in self._scopes)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failures: list[BaseException] = []
        try:
            if self._is_saved(error):
                await arun(SavingTogether(self._scopes).steps())
        except BaseException as failure:
            failures.append(failure)
        failures += await self._several.aleave(failures[0] if failures else error)
        try:
            if failures:
                _raise_first(failures)
        finally:
            del failures  # as above

    def _is_saved(self, error: BaseException | None) -> bool:
        """Whether anything is; else each of them is rolled back as it is left."""
        return error is None or any(scope.keeps(error) for scope in self._scopes)


def _raise_first(failures: Sequence[BaseException]) -> NoReturn:
    """Raise the first one, or who interrupts the program; what else has failed stands in its notes:
    most often that is the same store."""
    first = next((each for each in failures if not isinstance(each, Exception)), failures[0])
    for other in failures:
        if other is not first:
            first.add_note(f"besides, {type(other).__name__}: {other}")
    try:
        raise first
    finally:
        del failures, first  # which know this frame: no cycle stays
