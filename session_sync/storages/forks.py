"""What a process has to forget after a fork: one register for all that must not be used in both.

Python calls what is registered here around `os.fork()`. C code that forks (uWSGI, with its
defaults) calls nothing, so code that uses what a parent may have left calls `check()` before.

This module knows functions to call; it does not know what they forget.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from .background import for_all

Act = Callable[[], object]


def _nothing() -> None:
    pass


class _Hooks(NamedTuple):
    before: Act
    in_parent: Act
    in_child: Act


_hooks: list[_Hooks] = []
_pid = os.getpid()  # of the process that has forgotten all that is not its own
_mutexes: dict[int, threading.RLock] = {}  # by process: a parent's may be held by a lost thread


def register(in_child: Act, *, before: Act = _nothing, in_parent: Act = _nothing) -> None:
    """Have these called around each fork.

    `in_child` may be called without `before`, if C code has forked, and more than once: it forgets
    what the parent has left, and closes it so that the parent can go on with it.
    """
    _hooks.append(_Hooks(before, in_parent, in_child))


def check() -> None:
    """To be called before anything is used that may have been the parent's."""
    if os.getpid() != _pid:
        _forget()


def _forget() -> None:
    global _pid
    pid = os.getpid()
    # A thread of the child waits until another one has forgotten all. A signal handler in its
    # middle does all once more.
    with _mutexes.setdefault(pid, threading.RLock()):
        if _pid != pid:
            for_all([hooks.in_child for hooks in _hooks])
            _pid = pid


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: for_all([hooks.before for hooks in reversed(_hooks)]),
        after_in_parent=lambda: for_all([hooks.in_parent for hooks in _hooks]),
        after_in_child=_forget,
    )
