"""One `with` or `async with` around a session: it opens a scope, or joins one that is open.

This module knows scopes and what is open around the code; it knows nothing of updates.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

from ..errors import SessionVersionError
from ..locks.callers import Caller, current_caller
from ..locks.lock import LockHandle
from ..session.session import BaseSession
from .current import Around, current, entries, in_handler, open_around
from .flow import AcquireLock, Flow, arun_flow, run_flow
from .members import FIRST, JOIN, OPEN
from .options import Options
from .scope import Scope

S = TypeVar("S", bound=BaseSession)


class SessionScope(Scope[S]):
    """One `with` or `async with` around a session, made by `SessionManager.session_scope`.

    Inside another one for the same key it joins that one's scope and gives the same session; else
    it is a scope itself. Entries that join at the same time under the same outer entry (`gather`,
    several threads) run one after the other. The outer entry itself does not wait for them: it
    awaits them, or knows what it does.
    """

    __slots__ = ("_caller", "_token", "_turn", "_under", "is_entered", "joined", "outer")

    reference: Around  # to itself
    outer: Around | None  # the innermost open entry around this one
    is_entered: bool  # and leaving it has not begun
    _under: SessionScope[Any]  # where it has joined: the entry that found the scope open ...
    _caller: Caller  # ... and the caller that has joined
    joined: Scope[S] | None  # also after leaving it: a task begun inside may join
    _turn: LockHandle | None  # of one that has joined, until it leaves

    def __enter__(self) -> S:
        if self.members or self.closed:
            raise self._entered_before()
        is_there = self._begins()  # an interrupt in there has nothing to be cleaned up
        try:
            if not is_there:
                around = self.outer
                if around is not None or not self.open_now(may_block=True):
                    run_flow(self._entering(around, may_block=True))
            scope = self.joined or self
            session = scope.handed_out
            if session is None:
                session = scope.session()
            current.set(self.reference)
        except BaseException:
            self._has_not_entered()
            raise
        return session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._leaves(error):
                scope = self.joined or self
                if self.is_thrown_away(error):
                    self._abandon(scope, error)
                elif not scope.close_now(may_block=True):
                    run_flow(scope.closing(may_block=True))
            if self._turn is not None:
                self._end_turn()
        except BaseException:
            self._interrupted(error)
            raise

    async def __aenter__(self) -> S:
        if self.members or self.closed:
            raise self._entered_before()
        self._on_loop = True
        is_there = self._begins()  # as above
        try:
            if not is_there:
                around = self.outer
                if around is not None or not self.open_now(may_block=False):
                    await arun_flow(self._entering(around, may_block=False))
            scope = self.joined or self
            session = scope.handed_out
            if session is None:
                session = scope.session()
            current.set(self.reference)
        except BaseException:
            self._has_not_entered()
            raise
        return session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._leaves(error):
                scope = self.joined or self
                if self.is_thrown_away(error):
                    self._abandon(scope, error)
                elif not scope.close_now(may_block=False):
                    await arun_flow(scope.closing(may_block=False))
            if self._turn is not None:
                self._end_turn()
        except BaseException:
            self._interrupted(error)
            raise

    @property
    def target(self) -> Scope[S]:
        """The one that was joined, or this one."""
        return self.joined or self

    def __del__(self) -> None:
        try:
            handle = self.handle
        except AttributeError:  # an interrupt came before it was made
            return
        if handle is not None:
            self.is_entered = False  # what fails in one that has joined does not go on to this
            Scope.__del__(self)
        elif self.members and self._turn is not None:
            if self.joined is not None:
                self._interrupted(None)
            else:
                self._end_turn()

    @property
    def token(self) -> object:
        """Its own among the members of the scope."""
        return FIRST if self.joined is None else self._token

    # -- entering and leaving

    def _entered_before(self) -> RuntimeError:
        return RuntimeError(
            f"this scope of {self.key!r} was entered before; call session_scope() again for each "
            f"`with`"
        )

    def _begins(self) -> bool:
        """Look around for open entries; True if the session is there already, as a lazy one is
        that has nothing around it."""
        self.joined = self._turn = None
        self.members = {OPEN: None, FIRST: None}
        self.is_entered = True
        self.reference = Around(self)
        self.outer = self.reference.outer = None if current.get() is None else open_around()
        if self.outer is not None or not self.options.lazy:
            return False
        self.begin_lazily()
        return True

    def _entering(self, around: Around | None, may_block: bool) -> Flow:
        """Join a scope that is open around here, or open this one."""
        if around is None:
            return self.opening(in_handler.get())
        return self._joining_or_opening(around, may_block)

    def _joining_or_opening(self, around: Around, may_block: bool) -> Flow:
        yield from self._joining(around, may_block)
        joined = self.joined
        if joined is not None and not self.options.lazy and not joined.is_loaded:  # of a lazy one
            try:
                yield from joined.loading(may_block)
            except BaseException as error:
                if self._leaves(None):
                    yield from self._closing_for_others(joined, error, may_block)
                self._end_turn()
                raise
            if joined.closed:  # released while it was loaded here
                self._end_turn()
                self.joined = joined = None
        if joined is None:
            if self.options.lazy:
                self.begin_lazily()
            else:
                yield from self.opening(passes=True)

    def _joining(self, around: Around, may_block: bool) -> Flow:
        """Join the scope of the same key that is open around here, if there is one."""
        entry = self._same_around(around)
        if entry is None:
            return
        scope: Scope[S] = entry.target
        self._check_version(scope.options)
        caller = current_caller()
        self._under, self._token, self._caller = entry, object(), caller.again()
        turn = self._turn = LockHandle(entry, JOIN, caller)
        self.joined = scope
        if not scope.join(self._token, entry.token):
            self.joined = self._turn = None
            if scope.leave(self._token):
                yield from scope.closing(may_block)
            return
        try:
            if not turn.try_acquire():
                yield AcquireLock(turn, self.options.queue_timeout)
        except BaseException as error:
            self.joined = None
            if scope.leave(self._token):
                yield from self._closing_for_others(scope, error, may_block)
            self._end_turn()
            raise
        scope.arrive(self._caller)
        if scope.closed:  # released by the one that ran before
            scope.depart(self._caller)
            self.joined = None
            self._end_turn()

    def _closing_for_others(self, scope: Scope[S], error: BaseException, may_block: bool) -> Flow:
        """Close a scope whose other members are done, and nothing of theirs has failed."""
        if isinstance(error, GeneratorExit):  # nothing awaits the steps of this any more
            scope.close_soon()
        else:
            yield from scope.closing(may_block)

    def _same_around(self, around: Around) -> SessionScope[Any] | None:
        """The innermost open entry around here for the session of this one."""
        each: Around | None = around
        while each is not None:
            entry = each()
            if entry is not None and not entry.target.closed and entry.is_same(self):
                return entry
            each = each.outer
        return None

    def _leaves(self, error: BaseException | None) -> bool:
        """Out of the scope; True if this one has to close it. To leave again does no harm."""
        if current.get() is self.reference:
            current.set(self.outer)
        self.is_entered = False
        scope = self.joined
        if scope is None:
            if error is not None:
                self.discard(error)
            return self.leave(FIRST, self.opener)
        if error is None:
            scope.owe(self._caller)
        elif not self._under.is_entered:
            scope.discard(error)  # else it goes on to the entry around this one
        return scope.leave(self._token, self._caller)

    def is_thrown_away(self, error: BaseException | None) -> bool:
        """Whether the generator or coroutine around this is closed half-way, by `error`; or, if the
        weak reference to the scope is dead, collected with it."""
        scope = self.joined or self
        return isinstance(error, GeneratorExit) or scope.reference() is None

    def _abandon(self, scope: Scope[S], error: BaseException | None) -> None:
        """Save nothing of what was thrown away, and do not wait: this may be a finaliser."""
        if error is None and scope is not self:  # what others have left to it is to be saved
            scope.close_soon()
        else:
            scope.abandon()

    def _has_not_entered(self) -> None:
        """Leave all the same; most often, what has failed did so, and nothing is left to do."""
        if self.joined is not None:
            self._interrupted(None)
        elif self._leaves(None):
            self.abandon()  # with no handler, there is nothing to be saved

    def _interrupted(self, error: BaseException | None) -> None:
        """The same after leaving was interrupted; `error` is what the handler had raised."""
        scope = self.joined or self
        try:
            # Or it had just left, as the one that ends it. To be told so twice does no harm.
            if self._leaves(error) or scope.closed or not scope.has_members:
                scope.close_soon()
        finally:
            self._end_turn()

    def _end_turn(self) -> None:
        """Let the next one run that has joined under the same entry."""
        turn = self._turn
        if turn is not None:
            turn.release()
            self._turn = None

    def is_same(self, other: Scope[Any]) -> bool:
        """Whether both are for one session."""
        return self.full_key == other.full_key and self.options.backend is other.options.backend

    def is_inside(self) -> bool:
        """Whether this code runs inside a handler or another scope."""
        others = (entry.target for entry in entries() if entry.target is not self)
        return any(not scope.closed for scope in others) or in_handler.get()

    def _check_version(self, around: Options[Any]) -> None:
        """Refuse to join a session of another version: what is written here would be taken for
        something older or newer than it is."""
        own = self.options
        versions = own.schema.version, around.schema.version
        if versions[0] != versions[1] and None not in (own.migrations, around.migrations):
            raise SessionVersionError(
                f"session {self.key!r} is open around this code as one of version {versions[1]}, "
                f"and this manager ({own.schema.name}) knows version {versions[0]}; give both "
                f"managers the same class or the same migrations"
            )
