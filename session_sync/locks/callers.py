"""The threads and tasks that hold locks and wait for them.

This module knows threads and event loops; it knows no lock.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from typing import Final


class Caller:
    """A thread, or a task of an event loop, that holds or wants a lock.

    A task is one caller, and so is the thread of its event loop: while that thread blocks, no task
    of the loop moves. A caller keeps neither its task nor its loop alive: a task that was thrown
    away inside a session has to be collected, so that its key is unlocked.
    """

    __slots__ = ("_loop", "_task", "thread")

    def __init__(
        self, thread: threading.Thread, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        # The object: the number of a thread that has ended is soon that of another one.
        self.thread: Final = thread
        task = None if loop is None else asyncio.current_task(loop)
        self._loop: Final = None if loop is None else weakref.ref(loop)
        self._task: Final = None if task is None else weakref.ref(task)

    @property
    def is_thread(self) -> bool:
        """Whether it is a thread, outside of event loops."""
        return self._loop is None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that the caller runs on, while there is one."""
        return None if self._loop is None else self._loop()

    @property
    def task(self) -> asyncio.Task[object] | None:
        """The task, while there is one."""
        return None if self._task is None else self._task()

    def stops(self, other: Caller, blocking: bool) -> bool:
        """Whether `other` cannot move while this caller waits, blocking its thread or not."""
        if blocking or self.task is None:
            return self.thread is other.thread
        return self.task is other.task

    def again(self) -> Caller:
        """The same caller as another object, so that in a list of callers it can be told from the
        first one."""
        return Caller(self.thread, self.loop)

    def ending(self) -> Ender:
        """The same one, about to end what it has locked."""
        return Ender(self.thread, self.loop)

    def __str__(self) -> str:
        task = self.task
        return f"thread {self.thread.name!r}" if task is None else f"task {task.get_name()!r}"


class Ender(Caller):
    """One that is about to end what it has locked, whatever others are in it."""

    __slots__ = ()


def current_caller() -> Caller:
    """The caller that runs this code."""
    # asyncio exports this one for code that may run outside of any loop; get_running_loop()
    # would raise there, which costs more than everything else in an acquisition.
    loop = asyncio._get_running_loop()
    try:
        caller = _this_thread.caller
    except AttributeError:  # a finaliser, in the middle of making the one of this thread
        caller = Caller(threading.current_thread())
    return caller if loop is None else Caller(caller.thread, loop)


def names_of(callers: Sequence[Caller]) -> str:
    """Those that hold a lock, in words."""
    return " and ".join(map(str, list(callers))) or "a task that has ended"


class _ThisThread(threading.local):
    """The caller that a thread is outside of event loops, made once for each thread."""

    def __init__(self) -> None:
        self.caller: Final = Caller(threading.current_thread())


_this_thread: Final = _ThisThread()
