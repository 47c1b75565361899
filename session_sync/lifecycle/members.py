"""The state of a scope, and the members that are in it: blocks, tasks, lazy loads.

This module knows tokens, callers and locks; it knows nothing of opening, writing or closing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from ..locks.callers import Caller, Ender, current_caller
from ..locks.lock import NO_QUEUES, LockHandle
from ..locks.queue import KeyQueue
from ..session.changes import ChangeTracker
from ..session.session import BaseSession
from ..storages.base import OpenRecord, Record
from .flow import Flow
from .options import Options
from .threads import CallBlocking

S = TypeVar("S", bound=BaseSession)

# The locks of a scope alone: which of those that have joined under one entry runs, what writes,
# what loads it if it is lazy, what closes it unsaved.
JOIN: Final = "join"
WRITE: Final = "write"
LOAD: Final = "load"
GIVE_UP: Final = "give up"

# What is in `members`: this while the scope is open, and a token of each member, first this one.
OPEN: Final = object()
FIRST: Final = object()
_DESERTED: Final = {OPEN: None}
# And this in a lazy one that has ended: the caller that takes it out closes the scope, if that is
# loaded by then.
TO_CLOSE: Final = object()


class Members(Generic[S]):
    """Which members a scope has, and whether it is open.

    Each member puts a token of its own into `members`, where `OPEN` is for as long as the scope may
    be joined. To join is to put the token in and then to look for `OPEN`; to leave is to take the
    token out and then, if only `OPEN` is left, that as well. The caller that takes out `OPEN` has
    ended the scope, so it ends once. One that finds a token there afterwards, of a member that came
    in between and saw `OPEN`, puts it back.
    """

    reference: Any  # a weak one to itself, from the beginning on
    callers: list[Caller]  # those in it, first the one that opened it
    opener: Caller | None

    __slots__ = (
        "__weakref__",
        "_ends_soon",
        "_is_failed",
        "_is_owed",
        "_is_to_end",
        "_on_loop",
        "_refused",
        "_stored",
        "_written",
        "call",
        "callers",
        "closed",
        "full_key",
        "handed_out",
        "handle",
        "held",
        "is_loaded",
        "is_of_several",
        "key",
        "members",
        "opened",
        "opener",
        "options",
        "queues",
        "reference",
        "tracker",
        "update",
    )

    def __init__(self, options: Options[S], key: str, full_key: str, update: Any) -> None:
        self.handle: LockHandle | None = None  # first: the finaliser looks at it
        self.opened: OpenRecord | None = None  # in a store that blocks
        self._ends_soon = False  # a thread was told to close it
        self.opener = None  # until it is open
        self.options: Final = options
        self.key: Final = key
        self.full_key: Final = full_key
        self.update: Any = update  # until it closes
        self.handed_out: S | None = None  # from loading on; a lazy one, from the first look on
        self.tracker: ChangeTracker | None = None  # from loading on
        self.is_loaded = not options.lazy  # whether the session may be touched once it is there
        self.closed = False
        self.members: dict[object, None] = {}  # before it begins, and after it has ended
        self._is_to_end = False  # whether other members are in it or not
        self._is_owed = False  # see owe()
        self.is_of_several = False  # which are stored together, or none of them
        self._written: Record | None = None  # the last record that has reached a store that blocks
        # The locks of the scope alone: it is their table (see LockHandle).
        self.held: Final[dict[str, LockHandle]] = {}
        self.queues: dict[str, KeyQueue[LockHandle]] = NO_QUEUES
        self._on_loop = False
        self._is_failed = False  # its changes are to be rolled back, as soon as that can be
        self._refused = False  # a store in memory has raised as it was given the last record
        self.call: CallBlocking | None = None  # the one that is on its way

    def name_of(self, _key: str, /) -> str:
        """The session key that messages name, where one of the locks of the scope is waited for."""
        return self.full_key

    def locks_to_end(self) -> list[LockHandle]:
        """See Inside. The caller that ends it does not wait for those that have joined."""
        return [handle for name, handle in list(self.held.items()) if name != JOIN]

    @property
    def is_just_ending(self) -> bool:
        """See Inside."""
        return self._is_to_end and not self.closed and OPEN not in self.members

    def join(self, token: object, outer: object) -> bool:
        """One more is to come in, inside the member with the token `outer`; False if the scope has
        ended. Then it has to `leave` all the same, and perhaps to close what the last one believed
        to leave to it."""
        members = self.members
        members[token] = None
        # While `outer` is in it, one that leaves has OPEN in hand only to put it back.
        return OPEN in members or (outer in members and not (self._is_to_end or self.closed))

    def arrive(self, caller: Caller) -> None:
        """`caller` has joined: whatever waits for the key waits for it, too."""
        self.callers.append(caller)

    def owe(self, caller: Caller) -> None:
        """`caller` had joined, and has done its work. If it is the thread that opened this, that
        may be in a later block: an interrupt came before the first line of the `__exit__` of the
        first one, and a flush of another thread keeps that alive. What it has done is stored then.
        (What a task has done is not: that may be thrown away together with what it is inside of.)
        """
        opener = self.opener
        if opener is not None and caller.is_thread and opener.is_thread:
            self._is_owed |= caller.thread is opener.thread and not self.is_of_several

    def depart(self, caller: Caller) -> None:
        """`caller` goes on outside; no error if it has departed."""
        with suppress(ValueError):  # after a `release()` of another one, too
            self.callers.remove(caller)

    def leave(self, token: object = FIRST, caller: Caller | None = None) -> bool:
        """One less, and the end of the scope if that was the last one: True if the caller of this
        has to close it. To leave again completes what was interrupted."""
        members = self.members
        members.pop(token, None)  # none: it has left, or was interrupted before it came any further
        try:
            while members == _DESERTED and self._takes(OPEN):
                if not members:
                    return self._ended()
                members[OPEN] = None  # another one came in between
                if self._is_to_end and self._takes(OPEN):  # and wanted to end it meanwhile
                    self.callers[:] = [] if caller is None else [caller]
                    return self._ended()
        except BaseException:  # an interrupt: the one that came in between has to find it as well
            if members and not self.closed:
                members[OPEN] = None
            raise
        if caller is not None:
            self.depart(caller)
        return False

    @property
    def has_members(self) -> bool:
        """Whether code is in it that has not left; after a `release()` it may be over all the
        same."""
        return any(token is not TO_CLOSE for token in list(self.members))

    def end(self, caller: Ender) -> bool:
        """The end of the scope, whatever members are still in it; True as in `leave`."""
        self.arrive(caller)  # first: a signal handler may want the key when this has ended it
        self._is_to_end = True  # first: one that leaves may just have it in hand, and ends it then
        if not self._takes(OPEN):
            self.depart(caller)
            return False
        # Whatever waits for the key from here on waits for the caller of this, and no other.
        self.callers[:] = [caller]
        return self._ended()

    def _takes(self, token: object) -> bool:
        """Take a token out, as the only one that does."""
        return self.members.pop(token, token) is None

    def _ended(self) -> bool:
        self.closed = True
        if not self.options.lazy:
            self.update = None
            return True
        self.members[TO_CLOSE] = None
        if LOAD not in self.held:  # else it is just being loaded
            self.update = None
        return self.is_loaded and self._takes(TO_CLOSE)


class Guard:
    """The owner of a lock inside a scope: releases it at the end, and if that was interrupted, when
    it is collected."""

    __slots__ = ("_name", "_scope", "handle")

    def __init__(self, scope: Members[Any], name: str) -> None:
        self._scope: Final = scope
        self._name: Final = name
        self.renew()

    def renew(self) -> LockHandle:
        """A claim with which nothing was done yet, instead of the one that was released."""
        self.handle = LockHandle(self._scope, self._name, current_caller())
        return self.handle

    def around(self, flow: Flow) -> Flow:
        """Do `flow`, and release the lock."""
        try:
            try:
                yield from flow
            finally:
                self.release()
        except BaseException:
            # Once more, since an interrupt may have come before that did anything; and while that
            # is on its way, it keeps this guard, and the same thread may want the lock.
            self.release()
            raise

    def release(self) -> None:
        """Give the lock to the next one; to be called again does no harm."""
        self.handle.release()

    def __del__(self) -> None:
        handle = getattr(self, "handle", None)  # an interrupt may have come before it had one
        if handle is not None:
            handle.by_note = True
            handle.release()
