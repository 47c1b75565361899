"""From one store to another, while bots may be running on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .manager import SessionManager
from .storages.base import KVStorage
from .stored import for_each_key


def copy_storage(
    source: KVStorage[Any],
    target: KVStorage[Any],
    *,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Copy every session of `source` into `target`, over what is there under the same key.

    Each session is locked in both stores while it is copied, timers and versions included, so what
    bots do meanwhile is either copied or comes after. Life times begin anew: they are the target's.

    Arguments:
        source: a storage that can list its keys.
        target: any storage.
        progress: called with each key after it was copied, or found to be gone.

    Returns how many sessions were copied. Raises TypeError if `source` cannot list its keys, and
    what the storages raise. What `source` cannot decode, `target` cannot keep, or a bot does not
    let go of, is left out: an ExceptionGroup at the end has the errors, which name the keys.

    >>> from session_sync import MemoryStorage
    >>> laptop, cluster = MemoryStorage(), MemoryStorage()
    >>> laptop.set("user:1", {"counter": 1})
    >>> copy_storage(laptop, cluster)
    1
    >>> cluster.get("user:1")
    {'counter': 1}
    """
    here, there = SessionManager(storage=source), SessionManager(storage=target)

    def copy(key: str) -> bool:
        with here.scope_as_stored(key), there.scope_as_stored(key):
            fields = source.get(key)
            if fields is not None:  # else it was deleted meanwhile
                target.set(key, fields)
        return fields is not None

    return for_each_key(source, copy, "copied", progress)
