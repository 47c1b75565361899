"""The only place of the explorer that knows the inside of the core: where its files are, and how to
look at its lock table. All else goes through the public names.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import CodeType
from typing import Any

import session_sync

PACKAGE = Path(session_sync.__file__).parent

#: Files and folders below session_sync/ in which an actor can be stopped.
CORE = ("locks", "lifecycle")
#: What a session itself is made of: only for scenes that share one between threads.
SESSION = ("session/session.py", "session/changes.py", "session/flush.py")

_SCOPES = {"Scope", "SessionScope", "ObservedScope"}
_is_core: dict[CodeType, bool] = {}
_is_session: dict[CodeType, bool] = {}


def is_core(code: CodeType) -> bool:
    """Whether this function belongs to the core."""
    return _is_in(code, CORE, _is_core)


def is_session(code: CodeType) -> bool:
    """Whether it belongs to the core, or to the session."""
    return _is_in(code, (*CORE, *SESSION), _is_session)


def _is_in(code: CodeType, places: tuple[str, ...], known: dict[CodeType, bool]) -> bool:
    answer = known.get(code)
    if answer is None:
        path = Path(code.co_filename)
        inside = path.is_relative_to(PACKAGE)
        answer = inside and any(path.is_relative_to(PACKAGE / place) for place in places)
        known[code] = answer
    return answer


def locks_left(manager: Any) -> int:
    """How many keys are held or waited for."""
    return len(manager.locks)


def waiters(manager: Any, key: str) -> int:
    """How many wait for a key."""
    return int(manager.locks.waiters(key))


def scopes_alive() -> list[str]:
    """The scopes that the garbage collector left alive."""
    found = [each for each in gc.get_objects() if type(each).__name__ in _SCOPES]
    return [f"{type(each).__name__} of {each.key!r}" for each in found]
