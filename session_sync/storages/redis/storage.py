"""Sessions in Redis: for threads, processes and machines.

This module knows the options and the methods of the storage; it knows neither scripts nor
connections.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final
from urllib.parse import quote

try:
    from redis.cluster import RedisCluster
except ImportError as error:
    raise ImportError("RedisStorage needs redis-py: pip install 'session-sync[redis]'") from error

from ..base import OpenRecord, Record, StoredEntry
from ..codec import Codec
from ..durations import life_time
from . import clients, listing
from .clients import Client
from .names import Names
from .opening import Opener
from .records import OpenRedisRecord
from .scripts import SAVE_ALL, Scripts, milliseconds
from .server import Server
from .tokens import StoredLock

_SHORTEST_LEASE: Final = 0.1  # seconds
_LONGEST_TTL: Final = 10**15  # milliseconds; the server cannot count much further


class RedisStorage:
    """Sessions on a Redis server, or a cluster of them, for any number of processes and machines.

    `url_or_client` is what `redis.Redis.from_url` takes (`redis://`, `rediss://` for TLS,
    `unix://`), the same with `redis+cluster://` or `rediss+cluster://`, a primary that Sentinel
    names (`redis+sentinel://host:26379,host:26379/mymaster/0`, `rediss+sentinel://`), or a
    `redis.Redis` or `redis.cluster.RedisCluster` of your own. A password in a URL is written as
    `urllib.parse.quote(password, safe="")` gives it. Records that were left alone for
    `ttl` seconds (a number or a `timedelta`; None: never) disappear: a read and a write start the
    time anew. `lease` is how many seconds a key stays locked when its process dies. `prefix` goes
    before all names and has no braces; `codec` brings in types of your own.

    A `key`, here as in every storage, is the full key of a session. A session lies under the name
    `prefix{key}`, braces and percent signs in the key written as in a URL.
    Redis Cluster keeps on one node whatever has the same text in braces, so what belongs to a
    session stays together. An update takes two round trips, one to open and one to close. They go
    over connections of the storage's own, as many as there are threads that open or close at once,
    made with the options of the client's pool; a client of a class or with a pool of your own (or
    one of a cluster) is asked itself. A coroutine waits for a server that is near, as a thread
    does, but for half a millisecond at most, and then goes on in a thread.

    Why it is correct. A key is open for the opening whose token is in its lock. The lock is taken,
    and the data read, in one script, which the server runs as one step; data are written, and the
    lock is given back, in one script too, which looks first whether the lock is still ours. So
    whatever happens to this process (a pause, `kill -9`, a cut connection): if it writes, then
    nothing else has had the key since it read. The lock is a lease: it runs out by itself, and is
    renewed in the background while the record is open, so it is lost only where nothing here runs
    for that long, or where the server is unreachable or forgets it. Then a save raises
    SessionConflictError.

    A request that failed is sent again: by this storage, as often as the options of a client say,
    or ten times in five seconds where a URL names the server; by redis-py; by a proxy. It may have
    been carried out before, or arrive twice, or late. That is harmless. To open twice with one
    token is to open once. Saves have numbers, which the lock knows: one that comes again, or after
    a later one, writes nothing. A close leaves a note for the time of a lease, 10 seconds at least,
    by which it is recognised when it comes again, whatever has had the key meanwhile; and by which
    an open is that comes too late. After that time a close finds no lock of its own, and writes
    nothing: therefore it is not sent again when the lease is over. Each token is of one opening, so
    nothing that is late is ever taken for something of a later opening. What a replica refuses
    (READONLY) it has not done in part, since it refuses each write; and the primary that is asked
    then knows the lock, if that was replicated, or refuses to save.

    When the key is given back, it goes to the waiter that has waited longest, in the same step: the
    lock then has its token, for half a second, and something is pushed to a list on which that
    waiter blocks. Nothing can come between. A waiter comes back every few moments and so keeps its
    place; the places of dead processes lapse, as their locks do, and a caller that finds the key
    free with a waiter before it in the queue offers it to that one.

    Raises ValueError if the URL, `ttl`, `lease` or `prefix` make no sense or the client decodes
    answers (`decode_responses=True`), TypeError if it is no synchronous client of redis-py; and
    lets through what redis-py raises.

    >>> storage = RedisStorage("redis://localhost:6379/0", ttl=86_400, prefix="my_bot:")
    >>> storage.blocking  # it connects when it is used
    True
    >>> storage.close()
    """

    blocking: Final = True

    def __init__(
        self,
        url_or_client: str | Client,
        ttl: float | timedelta | None = None,
        lease: float = 30.0,
        *,
        prefix: str = "",
        codec: Codec | None = None,
    ) -> None:
        if not _SHORTEST_LEASE <= lease < _LONGEST_TTL / 1000:
            raise ValueError(f"lease must be {_SHORTEST_LEASE} seconds or more, not {lease!r}")
        self._names: Final = Names(prefix)
        self.lease: Final = float(lease)
        self._ttl = 0 if ttl is None else min(milliseconds(life_time(ttl)), _LONGEST_TTL)
        self._scripts: Final = Scripts(milliseconds(lease), self._ttl)
        self._codec = Codec() if codec is None else codec
        self._url_or_client: Final = url_or_client
        self._warned = False
        # At once, since redis-py imports modules for its first connection (which is not connected
        # here): a child that is forked while a thread does so would wait forever to import them.
        self._openers: Final = {os.getpid(): self._new_opener()}
        #: Which one it is, for all storage objects of this process; a client does not tell it.
        self.store: Final[str | None] = (
            f"{clients.server_of(url_or_client, self._client)}?prefix={quote(self._names.prefix)}"
            if isinstance(url_or_client, str)
            else None
        )

    def __reduce__(self) -> tuple[Callable[[], RedisStorage], tuple[()]]:
        """By its options: another process opens connections of its own."""
        if not isinstance(self._url_or_client, str):
            raise TypeError(
                f"this {type(self).__name__} cannot be pickled: it was made from a client, whose "
                f"connections no other process can use. Make it from a URL: "
                f"RedisStorage('redis://host:6379/0')"
            )
        make = partial(
            type(self),
            self._url_or_client,
            self._ttl / 1000 or None,
            self.lease,
            prefix=self._names.prefix.decode("utf-8", "surrogatepass"),
            codec=self._codec,
        )
        return make, ()

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None.

        Raises `SessionDecodeError` if what lies there is not ours.
        """
        data = self._command(key, "GET")
        return None if data is None else self._codec.decode(data, key)

    def check_value(self, value: Any, key: str, place: object, /) -> None:
        """Raise SessionEncodeError if `value` cannot be kept at this place of a session."""
        self._codec.check(value, key, place)

    def set(self, key: str, value: Mapping[str, Any], /) -> None:
        """Store `value` under `key`, in one step.

        Raises `SessionEncodeError` if it holds something that the codec does not keep.
        """
        life = (b"PX", b"%d" % self._ttl) if self._ttl else ()
        self._command(key, "SET", self._codec.encode(value, key), *life)

    def delete(self, key: str, /) -> None:
        """Remove `key`; no error if there is none."""
        self._command(key, "DEL")

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return bool(self._command(key, "EXISTS"))

    def touch(self, key: str, /) -> None:
        """Start the lifetime of the record anew; no error if there is none."""
        if self._ttl:
            self._command(key, "PEXPIRE", b"%d" % self._ttl)

    def keys(self) -> Iterator[str]:
        """Every stored key, in any order; those that come and go meanwhile may be among them. Names
        that nothing here has written, since no key is written so (one that is not UTF-8, say), are
        passed over, with a warning in the log."""
        return listing.keys(self._server, self.store)

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key, in any order, with what is known of its record; none is read or
        touched. Names are passed over as in `keys`.

        The size is what the server's memory has of it, and the age is since anything last read or
        wrote it; None, if the server evicts by frequency (LFU).
        """
        return listing.entries(self._server, self.store)

    def unknown_rows(self) -> int:
        """How many names are like those of sessions, and of no key, so that nothing here can have
        written them."""
        return listing.unknown_rows(self._server)

    def locks(self) -> Iterator[StoredLock]:
        """The sessions that are open, or were when their process died, and which process has
        them."""
        return listing.locks(self._server)

    def info(self, *sections: str) -> list[dict[str, Any]]:
        """What the server says of itself (redis-py's `info`), or each node of a cluster; nothing,
        if that is forbidden."""
        return self._server.info(*sections)

    def close(self) -> None:
        """Close the connections, but not those of a client that was given. The storage opens new
        ones when it is used again."""
        made = self._openers.get(os.getpid())
        if made is not None:
            made.server.close()

    def open_record(self, key: str, timeout: float, /) -> OpenRecord:
        """Wait until nothing else has `key` open, and open it.

        Raises SessionLockTimeoutError, saying what has it, after `timeout` seconds; then the place
        in the queue is kept for half a second. Raises SessionDecodeError if what lies there is not
        ours."""
        return self._warned_opener().open(key, timeout)

    def open_unread(self, key: str, timeout: float, /) -> OpenRecord:
        """As `open_record`, whatever text lies there: it can be removed, also if it cannot be read.

        What is no string raises SessionDecodeError all the same: nothing can have that open.
        """
        return self._warned_opener().open(key, timeout, read=False)

    def open_nowait(self, key: str, /) -> OpenRedisRecord | None:
        """As `open_record`, if the server answers at once and nothing else has `key` open; else
        None, and `open_record` goes on with what was begun."""
        return self._in_process().open_nowait(key) if self._warned else None

    def save_all(
        self, records: Mapping[str, Record], opened: Mapping[str, OpenRedisRecord], /
    ) -> bool:
        """Store several records in one step; not on a cluster, where they lie on several nodes."""
        if isinstance(self._client, RedisCluster):
            return False
        names = [name for key in records for name in opened[key].names[:2]]
        values = [
            value
            for key, record in records.items()
            for value in (opened[key].token, *opened[key].to_save(record))
        ]
        options = (b"%d" % milliseconds(self.lease), b"%d" % self._ttl)
        lost = self._server.command(
            list(records), "EVAL", SAVE_ALL.encode(), b"%d" % len(names), *names, *options, *values
        )
        if lost:
            raise opened[list(records)[lost - 1]].conflict()
        return True

    # -- in this process

    def _in_process(self) -> Opener:
        pid = os.getpid()
        made = self._openers.get(pid)
        return made or self._openers.setdefault(pid, self._new_opener())

    def _new_opener(self) -> Opener:
        server = Server(self._url_or_client, self._names, self._scripts, self.lease)
        return Opener(server, self._codec)

    def _warned_opener(self) -> Opener:
        if not self._warned:
            self._warn_of_eviction()
        return self._in_process()

    def _warn_of_eviction(self) -> None:
        """Once, at the first use."""
        policies = self._server.eviction_policies()
        self._warned = True
        for policy in sorted(policies - {"noeviction"}):
            warnings.warn(
                f"the Redis server's maxmemory-policy is {policy}: when its memory is full, it "
                f"drops sessions. Set it to noeviction (`CONFIG SET maxmemory-policy noeviction`, "
                f"and in redis.conf), or give sessions a server of their own.",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def _server(self) -> Server:
        return self._in_process().server

    @property
    def _client(self) -> Client:
        return self._server.client

    def _command(self, key: str, command: str, *arguments: bytes) -> Any:
        return self._server.command([key], command, self._names.of(key), *arguments)
