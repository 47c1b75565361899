"""The locks of one store, by key.

This module knows what is in a table; how locks change hands is in lock.py.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Final, NamedTuple

from .callers import current_caller, names_of
from .lock import LockHandle, Ticket, forget_others, locked, recover
from .queue import KeyQueue
from .watch import watch


class LockTable:
    """Which handle holds a key, and which ones wait for it.

    Nothing is left behind: a key is in `held` only while a handle has it, and in `queues` only
    while something waits for it. There is no mutex around the table: with one, 64 threads on 64
    keys would wait for each other. See LockHandle for why it needs none.
    """

    __slots__ = ("__weakref__", "_name", "held", "queues")

    def __init__(self, name: str | None = None) -> None:
        self._name: Final = name
        self.held: Final[dict[str, LockHandle]] = {}
        self.queues: dict[str, KeyQueue[LockHandle]] = {}

    def __len__(self) -> int:
        return len(self.held.keys() | self.queues.keys())

    def name_of(self, key: str, /) -> str:
        """The session key that messages name for `key`."""
        return key if self._name is None else self._name

    def handle(self, key: str) -> LockHandle:
        """A claim to `key` for the caller of this, with which nothing was done yet."""
        return LockHandle(self, key, current_caller())

    def ticket(self, key: str) -> Ticket:
        """The same for a task that has not begun."""
        return Ticket(self, key)


class StoreLocks(LockTable):
    """The locks of one store: they are watched, and looked after when the process forks."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        watch.add(self)  # which calls `recover`
        _tables.append(weakref.ref(self, _tables.remove))

    def recover(self, key: str) -> None:
        """Give a key that nothing holds, or whose holder was lost, to the next one."""
        locked(recover, self, key)


class LockHolder(NamedTuple):
    """The thread or task that holds a session.

    Arguments:
        name: the thread or task, in words: `thread 'WorkerThread1'`; those that have joined it
            behind it.
        seconds: for how long it has been held.
    """

    name: str
    seconds: float


class Locks:
    """The locks of a manager's sessions in this process: `sessions.locks`.

    It shows what is held and waited for at this moment, and changes nothing. Locks of other
    processes are not seen here.

    >>> from session_sync import SessionManager
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1"):
    ...     len(sessions.locks), sessions.locks.is_locked("user:1")
    (1, True)
    >>> len(sessions.locks), sessions.locks.is_locked("user:1")
    (0, False)
    """

    def __init__(self, table: LockTable, prefix: str) -> None:
        self._table: Final = table
        self._prefix: Final = prefix

    def __len__(self) -> int:
        """How many keys are held or waited for, of those under the manager's prefix."""
        keys = {*list(self._table.held), *list(self._table.queues)}
        return sum(key.startswith(self._prefix) for key in keys)

    def is_locked(self, key: str) -> bool:
        """Whether the session of `key` is open, or kept for an update that is about to begin."""
        return self._prefix + key in self._table.held

    def waiters(self, key: str) -> int:
        """How many callers and updates wait for the session of `key`."""
        queue = self._table.queues.get(self._prefix + key)
        if queue is None:
            return 0
        return sum(not handle.is_held for handle in list(queue))

    def holder(self, key: str) -> LockHolder | None:
        """The holder of the session of `key`, and for how long; None if no handler has it.

        >>> from session_sync import SessionManager
        >>> sessions = SessionManager()
        >>> with sessions.session_scope("user:1"):
        ...     sessions.locks.holder("user:1").name
        "thread 'MainThread'"
        """
        handle = self._table.held.get(self._prefix + key)
        if handle is None or not handle.begun:
            return None
        return LockHolder(names_of(handle.callers), time.monotonic() - handle.since)


_tables: Final[list[weakref.ref[StoreLocks]]] = []


def after_fork() -> None:
    """In a forked child: keep what the thread that has forked holds, and nothing else.

    If C code has forked, another thread may be the first to notice. Then the main thread counts as
    the one that has: it may have locked something in the child by now.
    """
    forget_others()
    watch.after_fork()
    threads = {threading.current_thread(), threading.main_thread()}
    for reference in _tables:
        if (table := reference()) is not None:
            table.queues.clear()
            for key, handle in list(table.held.items()):
                if threads.isdisjoint(caller.thread for caller in handle.callers):
                    del table.held[key]
