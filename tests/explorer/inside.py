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
CORE = (
    "locks",
    "lifecycle",
    # before they became the two packages
    "locks.py",
    "turns.py",
    "scope.py",
    "scopes.py",
    "steps.py",
    "door.py",
    "bags.py",
)
#: What a session itself is made of: only for scenes that share one between threads.
SESSION = ("session.py", "session")

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
        answer = known[code] = inside and path.relative_to(PACKAGE).parts[0] in places
    return answer


def locks_left(manager: Any) -> int:
    """How many keys somebody holds or waits for."""
    return len(_table(manager))


def waiters(manager: Any, key: str) -> int:
    """How many wait for a key."""
    if hasattr(manager, "locks"):
        found = manager.locks.waiters(key)
        return found if isinstance(found, int) else len(list(found))
    entry = _table(manager)._locks.get(key)
    lock = entry._fate.get("lock") if hasattr(entry, "_fate") else entry
    return len(lock._queue) + len(lock._turns) if hasattr(lock, "_queue") else 0


def scopes_alive() -> list[str]:
    """The scopes that the garbage collector left alive."""
    found = [each for each in gc.get_objects() if type(each).__name__ in _SCOPES]
    return [f"{type(each).__name__} of {each.key!r}" for each in found]


def _table(manager: Any) -> Any:
    return manager.locks if hasattr(manager, "locks") else manager._options.door.locks
