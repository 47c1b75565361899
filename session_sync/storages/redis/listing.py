"""What a Redis server has of a storage: its keys, sizes and locks, none of them read or touched.

This module knows names and what the server tells of them; it knows no records' insides.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any, Final

import redis
from redis.exceptions import NoPermissionError, ResponseError

from ..base import StoredEntry
from . import refusals
from .names import LOCK
from .server import Server
from .tokens import StoredLock

_PAGE: Final = 1000  # keys that are asked for at once
_GONE: Final = -2  # what PTTL answers then
_log: Final = logging.getLogger("session_sync")


def keys(server: Server, store: str | None) -> Iterator[str]:
    """See RedisStorage.keys(); `store` is what the log calls it."""
    unknown = 0
    for name in _names(server):
        key = server.names.key_of(name)
        if key is None:
            unknown += 1
        else:
            yield key
    if unknown:
        _log.warning(
            "%s: names that no key has were passed over: %d; session_sync has not written them",
            store or "a Redis server",
            unknown,
        )


def unknown_rows(server: Server) -> int:
    """See RedisStorage.unknown_rows()."""
    return sum(server.names.key_of(name) is None for name in _names(server))


def entries(server: Server, store: str | None) -> Iterator[StoredEntry]:
    """See RedisStorage.entries()."""
    every = keys(server, store)
    while page := list(itertools.islice(every, _PAGE)):
        with server.client.pipeline(transaction=False) as pipe:
            for key in page:
                name = server.names.of(key)
                pipe.object("IDLETIME", name)
                pipe.pttl(name)
                pipe.memory_usage(name, samples=0)
            answers: list[Any] = pipe.execute(raise_on_error=False)
        for at, key in enumerate(page):
            age, left, size = answers[3 * at : 3 * at + 3]
            for answer in (left, size):
                _check(server, answer)
            if isinstance(age, NoPermissionError):  # and not since it evicts by frequency
                _check(server, age)
            if size is not None:  # else it was deleted meanwhile
                yield StoredEntry(
                    key,
                    size,
                    float(age) if isinstance(age, int) else None,
                    left / 1000 if left >= 0 else None,
                )


def locks(server: Server) -> Iterator[StoredLock]:
    """See RedisStorage.locks()."""
    for lock in _names(server, LOCK):
        name = lock.removesuffix(LOCK)
        key = server.names.key_of(name)
        if key is None:
            continue
        node = server.node_of(name)
        try:
            held = _held(node, lock)
            left: Any = node.pttl(lock)
            seconds, microseconds = node.time()
        except ResponseError as error:
            raise server.refusal(error, key) from None
        if held is not None and left != _GONE:
            yield StoredLock.read(key, held, left, seconds * 1000 + microseconds // 1000)


def _held(node: redis.Redis, lock: bytes) -> Any:
    try:
        return node.get(lock)
    except ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
    return b""  # it was not written here


def _names(server: Server, end: bytes = b"") -> Iterator[bytes]:
    """The names of all records with `end` behind them, each once."""
    names = server.client.scan_iter(
        match=server.names.pattern(end), count=_PAGE, **server.everywhere
    )
    seen = set()  # the server may name one twice while it grows
    while True:
        try:
            name = next(names, None)
        except ResponseError as error:
            raise refusals.listing_refusal(error, server.names.prefix) from None
        if name is None:
            return
        if name not in seen:
            seen.add(name)
            yield name


def _check(server: Server, answer: object) -> None:
    """Raise what the server has answered about a record, if that is an error."""
    if isinstance(answer, ResponseError):
        raise refusals.listing_refusal(answer, server.names.prefix)
    if isinstance(answer, Exception):
        raise answer
