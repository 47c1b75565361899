"""Threads in the background, where one can be started, slots in a bounded number, and what is to be
done to all objects of a kind, or when the process ends.

Nothing here waits, has a mutex, or has to be given back: a signal handler, a finaliser or an
exception may come between any two lines.

This module knows threads and the end of the process; it knows no storage.
"""

from __future__ import annotations

import _thread
import atexit
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


def start_thread(target: Callable[[], object]) -> bool:
    """Call `target` in a thread that does not keep the process from ending; False if none can be
    started: there are as many as the system allows, or the interpreter is about to end.

    Not with threading.Thread, whose `start` has a mutex and waits for the new thread, and which
    keeps all that a thread was to do if that is interrupted.
    """
    try:
        _thread.start_new_thread(target, ())
    except RuntimeError as error:
        if "new thread" not in str(error):  # it was raised by a signal handler
            raise
        return False
    return True


def threads_may_block() -> bool:
    """Whether a thread can wait in the kernel and hold up no other one. Not where gevent or
    eventlet has put its greenlets in the place of threads: they all run in one."""
    return _thread.start_new_thread.__module__.partition(".")[0] not in ("gevent", "eventlet")


def for_each(known: WeakValueDictionary[int, T], act: Callable[[T], object]) -> None:
    """Call `act` with each of these that is still there, whatever it raises for another one."""
    for_all([partial(_act_on, reference, act) for reference in known.valuerefs()])


def _act_on(reference: Callable[[], T | None], act: Callable[[T], object]) -> None:
    if (one := reference()) is not None:
        act(one)


def for_all(acts: Iterable[Callable[[], object]]) -> None:
    """Call each of these, whatever another one raises."""
    failed = None
    for act in acts:
        try:
            act()
        except BaseException as error:
            failed = error
    if failed is not None:
        raise failed


def at_exit(act: Callable[[], object]) -> None:
    """Call `act` when the process ends, after the saves that are still on their way."""
    _at_exit.append(act)


_at_exit: Final[list[Callable[[], object]]] = []
atexit.register(lambda: for_all(_at_exit))  # what registers later, is called before


class Slot:
    """Taken for as long as this object lives."""

    __slots__ = ("__weakref__",)


class Slots:
    """At most `limit` slots at a time."""

    def __init__(self, limit: int) -> None:
        self._limit: Final = limit
        self._taken: Final[WeakValueDictionary[int, Slot]] = WeakValueDictionary()

    def take(self) -> Slot | None:
        """A slot; None if all are taken."""
        slot = Slot()
        self._taken[id(slot)] = slot  # before looking: so two at once are not one too many
        return slot if len(self._taken) <= self._limit else None

    def clear(self) -> None:
        """Forget all that are taken: in a forked child, no other thread of the parent goes on."""
        self._taken.clear()
