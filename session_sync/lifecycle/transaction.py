"""Several sessions at once: locked in one order, written together, and left all.

This module knows scopes and how they are entered; it knows no keys or updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Generic, NoReturn, TypeVar

from ..locks.lock import LockHandle
from ..session.changes import ChangeTracker
from ..session.session import BaseSession
from ..storages.base import Record
from .backend import Backend
from .entry import SessionScope
from .flow import AcquireLock, Flow, arun_flow, run_flow
from .scope import Scope
from .threads import CallBlocking, closers

S = TypeVar("S", bound=BaseSession)


class ScopeStack:
    """Scopes that are entered one after the other, and left the other way round: all of them,
    whatever fails in one."""

    __slots__ = ("__weakref__", "_entered", "in_order")

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
        not raised but returned. To leave again completes what was interrupted."""
        failures: list[BaseException] = []
        try:
            try:
                self._leave_all(error, failures)
            except BaseException as interrupt:  # it came between two lines
                failures.append(interrupt)
                self._leave_all(error, failures)
            return failures
        finally:
            del failures  # which know this frame: no cycle stays

    def _leave_all(self, error: BaseException | None, failures: list[BaseException]) -> None:
        try:
            while self._entered:
                entry = self._entered[-1]
                for _ in range(2):
                    try:
                        entry.__exit__(*_details(error))
                    except BaseException as failure:
                        failures.append(failure)
                    if not entry.is_entered:
                        break  # else an interrupt came before the first line of `__exit__`
                self._entered.pop()
        finally:
            del failures  # as above

    async def aleave(self, error: BaseException | None) -> list[BaseException]:
        """The same in a coroutine."""
        failures: list[BaseException] = []
        try:
            try:
                await self._aleave_all(error, failures)
            except GeneratorExit as thrown_away:
                await self._aleave_all(thrown_away, failures)  # all goes to threads, not awaited
                raise
            except BaseException as interrupt:  # as above
                failures.append(interrupt)
                await self._aleave_all(error, failures)
            return failures
        finally:
            del failures

    async def _aleave_all(self, error: BaseException | None, failures: list[BaseException]) -> None:
        try:
            while self._entered:
                entry = self._entered[-1]
                for _ in range(2):
                    try:
                        await entry.__aexit__(*_details(error))
                    except GeneratorExit:
                        raise
                    except BaseException as failure:
                        failures.append(failure)
                    if not entry.is_entered:  # as above
                        break
                self._entered.pop()
        finally:
            del failures


def _details(
    error: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


async def aclose_all(scopes: Iterable[Scope[Any]]) -> list[BaseException]:
    """Close scopes that others have left; what fails is not raised but returned."""
    failures: list[BaseException] = []
    rest = iter(scopes)
    for scope in rest:
        try:
            await arun_flow(scope.closing(may_block=False))
        except GeneratorExit:  # thrown away: it can await nothing any more
            for other in rest:
                other.abandon()
            raise
        except BaseException as failure:
            failures.append(failure)
            scope.close_soon()  # unless it is closed by now
    return failures


class AtomicFlush:
    """The end of a block around several sessions of one store: what has changed in them is written
    before any of them is closed, all of it or, where the store can, nothing.

    Those that were joined are left to the scopes that they belong to, and those that were released
    to what has released them. It holds the write locks of all of them, so no flush is on its way
    meanwhile.

    What fails leaves all of them as they were before. Where that came after the store was called,
    nothing knows whether it has written them: an interrupt may have come just behind that, or the
    server's answer was lost. A block that has joined one of them and goes on must not write that
    one alone, on top of what was before. So those are closed, and nothing more is written.
    """

    def __init__(self, scopes: Iterable[SessionScope[Any]]) -> None:
        self._trackers: Final[dict[Scope[Any], ChangeTracker]] = {}
        for scope in scopes:
            if scope.joined is None and not scope.closed and scope.tracker is not None:
                self._trackers[scope] = scope.tracker
        self._committed: Final[dict[Scope[Any], Record]] = {}
        self._records: Final[dict[Scope[Any], Record]] = {}
        self._in_doubt: Iterable[Scope[Any]] = ()
        self._written: Final[set[Scope[Any]]] = set()

    def flow(self) -> Flow:
        """Write."""
        if len(self._trackers) < 2:
            return  # to close one is to write it
        guards = [scope.write_guard() for scope in self._trackers]
        flow = self._writing_under([guard.handle for guard in guards])
        for guard in guards:
            flow = guard.around(flow)
        try:
            yield from flow
        finally:
            for scope in self._trackers:
                scope.roll_back_failed()

    def _writing_under(self, locks: Sequence[LockHandle]) -> Flow:
        for lock in locks:
            if not lock.try_acquire():
                yield AcquireLock(lock, None)
        try:
            for scope in self._trackers:
                scope.roll_back_what_failed()
            yield from self._writing()
        except BaseException as error:
            try:
                self._take_back()
            finally:
                yield from self._ending_unsaved(error)
            raise

    def _writing(self) -> Flow:
        self._committed.update(
            (s, tracker.committed) for s, tracker in self._trackers.items() if tracker.open
        )
        for scope in self._committed:
            if scope.call is not None:
                yield from scope.ending_the_call(scope.call)
        for scope, committed in self._committed.items():
            record = self._trackers[scope].take_changes()
            if record is not committed and scope.to_write(record) is not None:
                self._records[scope] = record
        if not self._records:
            return
        backend = next(iter(self._records)).options.backend
        self._in_doubt = self._records
        if backend.blocking:
            call = CallBlocking(closers, self._write, backend)
            for scope in self._records:
                scope.call = call
            yield call
            for scope in self._records:
                scope.call = None
        else:
            self._write(backend)

    def _write(self, backend: Backend) -> None:
        records = {scope.full_key: record for scope, record in self._records.items()}
        opened = {}
        for scope in self._records:
            if backend.blocking and scope.opened is not None:
                opened[scope.full_key] = scope.opened
        if backend.save_all(records, opened):
            for scope, record in self._records.items():
                scope.has_written(record)
            self._written.update(self._records)
            return
        for scope, record in self._records.items():
            try:
                if scope.full_key in opened:
                    scope.write(opened[scope.full_key], record, last=False)
                else:
                    scope.put(record)
            except BaseException as error:
                if self._written:
                    keys = ", ".join(repr(scope.key) for scope in self._written)
                    error.add_note(f"already written, by a store that takes one at a time: {keys}")
                raise
            self._written.add(scope)

    def _ending_unsaved(self, error: BaseException) -> Flow:
        in_doubt = [scope for scope in self._in_doubt if scope not in self._written]
        try:
            for scope in in_doubt:
                with suppress(Exception):  # the first error is the one to be raised
                    yield from scope.ending_unsaved(error)
        except BaseException:
            for scope in in_doubt:  # it leaves the rest to threads
                run_flow(scope.ending_unsaved(GeneratorExit()))
            raise

    def _take_back(self) -> None:
        for scope, committed in self._committed.items():
            if scope not in self._written:  # else it was cancelled, and yet written
                self._trackers[scope].not_saved(committed)
        for scope, tracker in self._trackers.items():
            if not scope.closed:
                tracker.roll_back()


class SessionScopes(Generic[S]):
    """One `with` or `async with` around several sessions, made by `SessionManager.session_scopes`.

    Why it never waits in a circle. Every caller that takes several keys of a store in this way
    takes them in the order of their names, so of all that wait, the one that waits for the key with
    the last name waits for a holder that waits for none of these keys. (Blocks that are nested by
    hand have no such order; a circle of those raises SessionDeadlockError, within one process.)

    What the block has changed is written before any key is unlocked: in one step where the storage
    can, else one session after the other. A session that is open around the block is joined: it is
    written with the scope that it belongs to.
    """

    def __init__(self, scopes: Sequence[SessionScope[S]]) -> None:
        self._scopes: Final = tuple(scopes)
        for scope in self._scopes:
            scope.is_of_several = len(self._scopes) > 1
        self._stack: Final = ScopeStack(sorted(self._scopes, key=lambda scope: scope.full_key))

    def __enter__(self) -> tuple[S, ...]:
        try:
            sessions = self._stack.enter()
        except BaseException as error:
            _raise_first([error, *self._stack.leave(error)])
        return tuple(sessions[scope] for scope in self._scopes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failures: list[BaseException] = []
        try:
            try:
                if self._is_saved(error):
                    run_flow(AtomicFlush(self._scopes).flow())
            except BaseException as failure:
                failures.append(failure)
            failures += self._stack.leave(failures[0] if failures else error)
            if failures:
                _raise_first(failures)
        except BaseException:
            self._stack.leave(failures[0] if failures else error)  # else they were left
            raise
        finally:
            del failures  # which know this frame: no cycle stays

    async def __aenter__(self) -> tuple[S, ...]:
        try:
            sessions = await self._stack.aenter()
        except BaseException as error:
            _raise_first([error, *await self._stack.aleave(error)])
        return tuple(sessions[scope] for scope in self._scopes)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failures: list[BaseException] = []
        try:
            try:
                if self._is_saved(error):
                    await arun_flow(AtomicFlush(self._scopes).flow())
            except BaseException as failure:
                failures.append(failure)
            failures += await self._stack.aleave(failures[0] if failures else error)
            if failures:
                _raise_first(failures)
        except GeneratorExit as thrown_away:
            await self._stack.aleave(thrown_away)
            raise
        except BaseException:
            await self._stack.aleave(failures[0] if failures else error)  # as above
            raise
        finally:
            del failures

    def _is_saved(self, error: BaseException | None) -> bool:
        """Whether anything is; else each of them is rolled back as it is left, or given up with
        the generator or coroutine around this, which is just being collected."""
        if any((scope.joined or scope).reference() is None for scope in self._scopes):
            return False
        return error is None or any(scope.keeps(error) for scope in self._scopes)


def _raise_first(failures: Sequence[BaseException]) -> NoReturn:
    """Raise the first one, or one that interrupts the program; what else has failed is in its
    notes: most often that is the same store."""
    first = next((each for each in failures if not isinstance(each, Exception)), failures[0])
    for other in failures:
        if other is not first:
            first.add_note(f"besides, {type(other).__name__}: {other}")
    try:
        raise first
    finally:
        del failures, first  # which know this frame: no cycle stays
