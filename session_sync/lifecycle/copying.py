"""From one store to another, while bots may be running on both.

This module knows stores and the scopes that lock a key in both; it knows no manager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..session.containers import dump
from ..storages.base import KVStorage, record_of
from .bulk import for_each_key, options_for, refuse_open_around, replace_record
from .entry import SessionScope


def copy_storage(
    source: KVStorage[Any],
    target: KVStorage[Any],
    *,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Copy every session of `source` into `target`, over what is there under the same key.

    Each session is locked in both stores while it is copied, timers and versions included, so what
    bots do meanwhile is either copied or comes after. Lifetimes begin anew: they are the target's.

    Arguments:
        source: a storage that can list its keys.
        target: any storage.
        progress: called with each key after it was copied, or found to be gone.

    Returns how many sessions were copied. Raises TypeError if `source` cannot list its keys, and
    what the storages raise. What `source` cannot decode, `target` cannot keep, or a bot keeps
    locked, is left out, as is a session whose lock was lost while it was copied
    (SessionConflictError: a lease that ran out, say), and one of `target` that is open around the
    call: an ExceptionGroup at the end has the errors, which name the keys.

    >>> from session_sync import MemoryStorage
    >>> laptop, cluster = MemoryStorage(), MemoryStorage()
    >>> laptop.set("user:1", {"counter": 1})
    >>> copy_storage(laptop, cluster)
    1
    >>> cluster.get("user:1")
    {'counter': 1}
    """
    here, there = options_for(source), options_for(target)

    def copy(key: str) -> bool:
        goal = SessionScope(there, key, key, key)
        with SessionScope(here, key, key, key), goal:
            refuse_open_around(goal, "copy_storage")
            fields = source.get(key)
            if fields is not None:  # else it was deleted meanwhile
                # With containers of its own, and not by target.set(): that would write also if the
                # lock was lost meanwhile.
                own = {name: dump(value) for name, value in fields.items()}
                replace_record(goal, record_of(own))
        return fields is not None

    return for_each_key(source, copy, "copied", progress)
