"""From one store to another, while bots may be running on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import SessionDecodeError, SessionEncodeError
from .manager import SessionManager
from .storages.base import KVStorage, ListableStorage


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
        progress: called with each key after it was copied.

    Returns how many sessions were copied. Raises TypeError if `source` cannot list its keys, and
    what the storages raise. What `source` cannot decode, or `target` cannot keep, is left out: an
    ExceptionGroup at the end has the errors, which name the keys.

    >>> from session_sync import MemoryStorage
    >>> laptop, cluster = MemoryStorage(), MemoryStorage()
    >>> laptop.set("user:1", {"counter": 1})
    >>> copy_storage(laptop, cluster)
    1
    >>> cluster.get("user:1")
    {'counter': 1}
    """
    if not isinstance(source, ListableStorage):
        raise TypeError(f"{type(source).__name__} cannot list its keys: it has no method keys()")
    here, there = SessionManager(storage=source), SessionManager(storage=target)
    copied, errors = 0, []
    for key in source.keys():  # noqa: SIM118 (not a dict)
        try:
            with here.session_scope(key), there.session_scope(key):
                fields = source.get(key)
                if fields is None:  # deleted meanwhile
                    continue
                target.set(key, fields)
        except (SessionDecodeError, SessionEncodeError) as error:
            errors.append(error)
            continue
        copied += 1
        if progress is not None:
            progress(key)
    if errors:
        raise ExceptionGroup(f"{len(errors)} sessions were not copied, {copied} were", errors)
    return copied
