"""Sessions in Redis: for threads, processes and machines.

This module knows records, their bytes and what the server keeps of them; it knows no session.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import re
import secrets
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import quote
from weakref import WeakValueDictionary

from session_sync.errors import (
    SessionConflictError,
    SessionError,
    SessionLockTimeoutError,
)
from session_sync.storages.background import Slots
from session_sync.storages.base import HeldHereError, OpenRecord, Record, StoredEntry
from session_sync.storages.codec import Codec
from session_sync.storages.durations import life_time
from session_sync.storages.redis.leases import Lease, renewer

try:
    import redis
except ImportError as error:
    raise ImportError("RedisStorage needs redis-py: pip install 'session-sync[redis]'") from error

from redis.cluster import RedisCluster
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError

from session_sync.storages.redis import clients, refusals
from session_sync.storages.redis.clients import Client
from session_sync.storages.redis.connections import PendingReply, ScriptConnections

_Written: TypeAlias = tuple[bytes, bytes]

_log: Final = logging.getLogger("session_sync")
_SHORTEST_LEASE: Final = 0.1  # seconds
_LONGEST_TTL: Final = 10**15  # milliseconds; the server cannot count much further
_OFFER: Final = 500  # milliseconds in which a waiter has to take the key that is kept for him
_PATIENCE: Final = 10.0  # seconds in which a request is sent again, if no lock ends meanwhile
_GRACE: Final = 0.5  # seconds between two calls in which a waiter keeps his place
_LONGEST_BLOCK: Final = 1.0  # seconds; then whoever waits shows that he is still there
_REMEMBERED: Final = 10.0  # seconds, or a lease if it is longer: how a close has ended
_PAGE: Final = 1000  # keys that are asked for at once
_GONE: Final = -2  # what PTTL answers then
_POLL: Final = 0.05  # seconds, where the server cannot wake us
_WAITS: Final = 64  # connections on which one process waits
_PLACES: Final = 1000  # that are remembered, before the old ones are looked for
_OLD_PLACE: Final = 60.0  # seconds


class _Script:
    """A script that the server runs as one step, called by its digest; `options`, which are the
    same for every call, are part of it."""

    def __init__(self, text: str, options: Mapping[str, int]) -> None:
        names, numbers = ", ".join(options), ", ".join(f"'{number}'" for number in options.values())
        self.text: Final = f"local {names} = {numbers}\n{_COMMON}{text}"
        self._digest: Final = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        self._by_digest: Final = _packed(b"EVALSHA", self._digest.encode(), b"5")
        self._by_text: Final = _packed(b"EVAL", self.text.encode(), b"5")

    def run(
        self,
        client: Client,
        lines: ScriptConnections | None,
        opened: OpenRedisRecord,
        *values: bytes,
        deadline: float,
        asked: PendingReply | None = None,
    ) -> Any:
        """Its answer; asked for on one of `lines`, or by `client` if there are none; or before."""
        if lines is None:
            return self._run_by(client, opened, *values)
        try:
            if asked is not None:
                return asked.insist(deadline)
            return lines.ask(self.request(opened, *values), deadline)
        except NoScriptError:  # the first time, or after a restart of the server, or a failover
            request = self.request(opened, *values).replace(self._by_digest, self._by_text, 1)
            return lines.ask(request, deadline)

    def request(self, opened: OpenRedisRecord, *values: bytes) -> bytes:
        """What is sent to ask for it."""
        size = b"*%d\r\n" % (9 + len(values))
        return size + self._by_digest + opened.packed + _packed(*values)

    def _run_by(self, client: Client, opened: OpenRedisRecord, *values: bytes) -> Any:
        values = (*opened.names, opened.token, *values)
        try:
            return clients.ask(client, lambda: client.evalsha(self._digest, 5, *values))
        except NoScriptError:
            return clients.ask(client, lambda: client.eval(self.text, 5, *values))


def _request(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + _packed(*parts)


def _packed(*parts: bytes) -> bytes:
    """Parts of a request, as the server reads them."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])


def _lua(name: str) -> str:
    return files(__package__).joinpath("scripts", f"{name}.lua").read_text("utf-8")


_COMMON, _OPEN, _SAVE, _CLOSE = map(_lua, ("common", "open", "save", "close"))
_SAVE_ALL, _RENEW = map(_lua, ("save_all", "renew"))


class RedisStorage:
    """Sessions on a Redis server, or a cluster of them, for any number of processes and machines.

    `url_or_client` is what `redis.Redis.from_url` takes (`redis://`, `rediss://` for TLS,
    `unix://`), the same with `redis+cluster://` or `rediss+cluster://`, a primary that Sentinel
    names (`redis+sentinel://host:26379,host:26379/mymaster/0`, `rediss+sentinel://`), or a
    `redis.Redis` or `redis.cluster.RedisCluster` of your own. A password in a URL is written as
    `urllib.parse.quote(password, safe="")` gives it. Records that were left alone for
    `ttl` seconds (a number or a `timedelta`; None: never) disappear: a read and a write start the
    time anew. `lease` is how many seconds a key stays locked when its process dies. `prefix` goes
    before all keys and has no braces; `codec` brings in types of your own.

    A session lies under `prefix{key}`, braces and percent signs in the key written as in a URL.
    Redis Cluster keeps on one node whatever has the same text in braces, so what belongs to a
    session stays together. An update takes two round trips, one to open and one to close. They go
    over connections of the storage's own, as many as there are threads that open or close at once,
    made with the options of the client's pool; a client of a class or with a pool of your own (or
    one of a cluster) is asked itself. A coroutine waits for a server that is near, as a thread
    does, but for half a millisecond at most, and then goes on in a thread.

    Why it is correct. A key is open for whoever's token is in its lock. The lock is taken, and the
    data read, in one script, which the server runs as one step; data are written, and the lock is
    given back, in one script too, which looks first whether the lock is still ours. So whatever
    happens to this process (a pause, `kill -9`, a cut connection): if it writes, then nobody has
    had the key since it read. The lock is a lease: it runs out by itself, and is renewed in the
    background while the record is open, so it is lost only where nothing here runs for that long,
    or where the server is unreachable or forgets it. Then a save raises SessionConflictError.

    A request that failed is sent again: by this storage, as often as the options of a client say,
    or ten times in five seconds where a URL names the server; by redis-py; by a proxy. It may have
    been carried out before, or arrive twice, or late. That is harmless. To open twice with one
    token is to open once. Saves have numbers, which the lock knows: one that comes again, or after
    a later one, writes nothing. A close leaves a note for the time of a lease, 10 seconds at least,
    by which it is recognised when it comes again, whoever has had the key meanwhile; and by which
    an open is that comes too late. After that time a close finds no lock of its own, and writes
    nothing: therefore it is not sent again when the lease is over. Each token is of one opening, so
    nothing that is late is ever taken for something of a later opening. What a replica refuses
    (READONLY) it has not done in part, since it refuses each write; and the primary that is asked
    then knows the lock, if that was replicated, or refuses to save.

    When the key is given back, it goes to whoever has waited longest, in the same step: the lock
    then has his token, for half a second, and something is pushed to a list on which he blocks.
    Nobody can come between. Who waits comes back every few moments and so keeps his place; the
    places of the dead lapse, as their locks do, and he who finds the key free with somebody before
    him in the queue offers it to that one.

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
        if "{" in prefix or "}" in prefix:
            raise ValueError(
                f"prefix must have no braces, not {prefix!r}: braces mark the part of a key that "
                f"says on which node of a cluster it lies, and that is the session's key"
            )
        self.lease: Final = float(lease)
        self._lease: Final = _milliseconds(lease)
        self._ttl = 0 if ttl is None else min(_milliseconds(life_time(ttl)), _LONGEST_TTL)
        self._prefix: Final = prefix.encode("utf-8", "surrogatepass")
        self._codec = Codec() if codec is None else codec
        self._url_or_client: Final = url_or_client
        self._warned = False
        # At once, since redis-py imports modules for its first connection (which is not connected
        # here): a child that is forked while a thread does so would wait for ever to import them.
        self._made: Final[dict[int, _InProcess]] = {
            os.getpid(): _InProcess(url_or_client, self.lease)
        }
        #: Which one it is, for all storage objects of this process; a client does not tell it.
        self.store: Final[str | None] = (
            f"{clients.server_of(url_or_client, self._client)}?prefix={quote(self._prefix)}"
            if isinstance(url_or_client, str)
            else None
        )
        options = {
            "lease": self._lease,
            "ttl": self._ttl,
            "offered": min(_OFFER, self._lease),
            "kept": _milliseconds(2 * (_LONGEST_BLOCK + _GRACE)),
            "remembered": max(self._lease, _milliseconds(_REMEMBERED)),
        }
        self._open_script: Final = _Script(_OPEN, options)
        self._save_script: Final = _Script(_SAVE, options)
        self._close_script: Final = _Script(_CLOSE, options)

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
            prefix=self._prefix.decode("utf-8", "surrogatepass"),
            codec=self._codec,
        )
        return make, ()

    def get(self, key: str, /) -> dict[str, Any] | None:
        """The fields stored under `key`, or None.

        Raises `SessionDecodeError` if what lies there is not ours.
        """
        data = self._command([key], "GET", self._name(key))
        return None if data is None else self._codec.decode(data, key)

    def check_value(self, value: Any, key: str, place: object, /) -> None:
        """Raise SessionEncodeError if `value` cannot be kept at this place of a session."""
        self._codec.check(value, key, place)

    def set(self, key: str, value: Mapping[str, Any], /) -> None:
        """Store `value` under `key`, in one step.

        Raises `SessionEncodeError` if it holds something that the codec does not keep.
        """
        life = (b"PX", b"%d" % self._ttl) if self._ttl else ()
        self._command([key], "SET", self._name(key), self._codec.encode(value, key), *life)

    def delete(self, key: str, /) -> None:
        """Remove `key`; no error if there is none."""
        self._command([key], "DEL", self._name(key))

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        return bool(self._command([key], "EXISTS", self._name(key)))

    def touch(self, key: str, /) -> None:
        """Start the life time of the record anew; no error if there is none."""
        if self._ttl:
            self._command([key], "PEXPIRE", self._name(key), b"%d" % self._ttl)

    def keys(self) -> Iterator[str]:
        """Every stored key, in any order; those that come and go meanwhile may be among them. Names
        that nothing here has written, since no key is written so (one that is not UTF-8, say), are
        passed over, with a warning in the log."""
        unknown = 0
        for name in self._scan(b"{*}"):
            key = self._key(name)
            if key is None:
                unknown += 1
            else:
                yield key
        if unknown:
            _log.warning(
                "%s: names that no key has were passed over: %d; session_sync has not written them",
                self.store or "a Redis server",
                unknown,
            )

    def entries(self) -> Iterator[StoredEntry]:
        """Every stored key, in any order, with what is known of its record; none is read or
        touched. Names are passed over as in `keys`.

        The size is what the server's memory has of it, and the age is since it was last read or
        written by anybody; None, if the server evicts by frequency (LFU).
        """
        keys = self.keys()
        while page := list(itertools.islice(keys, _PAGE)):
            with self._client.pipeline(transaction=False) as pipe:
                for key in page:
                    name = self._name(key)
                    pipe.object("IDLETIME", name)
                    pipe.pttl(name)
                    pipe.memory_usage(name, samples=0)
                answers: list[Any] = pipe.execute(raise_on_error=False)
            for at, key in enumerate(page):
                age, left, size = answers[3 * at : 3 * at + 3]
                for answer in (left, size):
                    self._check_listed(answer)
                if isinstance(age, NoPermissionError):  # and not since it evicts by frequency
                    self._check_listed(age)
                if size is not None:  # else it was deleted meanwhile
                    yield StoredEntry(
                        key,
                        size,
                        float(age) if isinstance(age, int) else None,
                        left / 1000 if left >= 0 else None,
                    )

    def unknown_rows(self) -> int:
        """How many names are like those of sessions, and of no key, so that nothing here can have
        written them."""
        return sum(self._key(name) is None for name in self._scan(b"{*}"))

    def locks(self) -> Iterator[StoredLock]:
        """The sessions that are open, or were when their process died, and who has them."""
        for name in self._scan(b"{*}:lock"):
            key = self._key(name.removesuffix(b":lock"))
            if key is None:
                continue
            node = self._node_of(key)
            try:
                held: Any = self._held(node, name)
                left: Any = node.pttl(name)
                seconds, microseconds = node.time()
            except ResponseError as error:
                raise self._refusal(error, key) from None
            if held is not None and left != _GONE:
                yield StoredLock.read(key, held, left, seconds * 1000 + microseconds // 1000)

    def _held(self, node: redis.Redis, name: bytes) -> Any:
        try:
            return node.get(name)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
        return b""  # it was not written here

    def info(self, *sections: str) -> list[dict[str, Any]]:
        """What the server says of itself (redis-py's `info`), or each node of a cluster; nothing,
        if that is forbidden."""
        try:
            info: Any = self._client.info(*sections, **self._everywhere())
        except ResponseError:
            return []
        nodes = list(info.values())
        return nodes if all(isinstance(node, dict) for node in nodes) else [info]

    def close(self) -> None:
        """Close the connections, but not those of a client that was given. The storage opens new
        ones when it is used again."""
        made = self._made.get(os.getpid())
        if made is not None:
            made.close()

    def open_record(self, key: str, timeout: float, /) -> OpenRecord:
        """Wait until nobody else has `key` open, and open it.

        Raises SessionLockTimeoutError, saying who has it, after `timeout` seconds; then the place
        in the queue is kept for half a second. Raises SessionDecodeError if what lies there is not
        ours."""
        return self._kept(*self._opened(key, timeout))

    def open_unread(self, key: str, timeout: float, /) -> OpenRecord:
        """As `open_record`, whatever text lies there: it can be removed, also if it cannot be read.

        What is no string raises SessionDecodeError all the same: nobody can have that open.
        """
        opened, _data = self._opened(key, timeout)
        return self._kept(opened, None)

    def open_nowait(self, key: str, /) -> OpenRedisRecord | None:
        """As `open_record`, if the server answers at once and nobody else has `key` open; else
        None, and `open_record` goes on with what was begun."""
        here = self._in_process()
        if here.lines is None or not self._warned or key in here.begun:
            return None
        opened = self._record(here, key)
        try:
            asked = here.lines.send(self._open_script.request(opened, _place(0)))
            if asked is not None and not asked.is_ready():
                here.note_begun(opened, asked)
                return None
            data = [] if asked is None else asked.answer()
            if isinstance(data, list):
                raise SessionLockTimeoutError
            if data is not None:
                opened.record = self._codec.decode_record(data, key)
            renewer().keep(opened)
        except (RedisError, SessionError):  # it is asked again, and may take its time to fail
            here.places.keep(key, opened.token)
            return None
        except BaseException:  # as in _opened()
            here.places.keep(key, opened.token)
            raise
        return opened

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
        options = (b"%d" % self._lease, b"%d" % self._ttl)
        lost = self._command(
            list(records), "EVAL", _SAVE_ALL.encode(), b"%d" % len(names), *names, *options, *values
        )
        if lost:
            raise list(opened.values())[lost - 1].conflict()
        return True

    # -- opening

    def _opened(self, key: str, timeout: float) -> tuple[OpenRedisRecord, bytes | None]:
        """The key, locked, and what lies there."""
        if not self._warned:
            self._warn_of_eviction()
        here = self._in_process()
        opened, asked = here.pop_begun(key) or (self._record(here, key), None)
        try:
            return opened, self._take(opened, timeout, asked)
        except BaseException:
            # Whether it was opened may be unknown: then whoever is next to ask here has it.
            here.places.keep(key, opened.token)
            raise

    def _kept(self, opened: OpenRedisRecord, data: bytes | None) -> OpenRedisRecord:
        try:
            opened.renewed()  # the waiting does not count
            renewer().keep(opened)
            if data is not None:
                opened.record = self._codec.decode_record(data, opened.key)
        except BaseException:
            opened.close(None)
            raise
        return opened

    def _record(self, here: _InProcess, key: str) -> OpenRedisRecord:
        token = here.places.pop(key)
        return OpenRedisRecord(self, key, token, self._names(key, token))

    def _take(
        self, opened: OpenRedisRecord, timeout: float, asked: PendingReply | None
    ) -> bytes | None:
        deadline, left = time.monotonic() + timeout, timeout
        while True:
            block = min(left, _LONGEST_BLOCK)
            patience = time.monotonic() + _PATIENCE
            answer = self._run(
                self._open_script, opened, _place(block), deadline=patience, asked=asked
            )
            asked = None
            if not isinstance(answer, list):
                data: bytes | None = answer
                return data
            rest, held, now = answer
            if not left:
                raise self._in_process().refusal(held, now)
            until_free = rest / 1000 + 0.001 if rest >= 0 else block
            node = self._node_of(opened.key)
            self._in_process().wait(node, opened.names[0], opened.token, min(block, until_free))
            left = max(0.0, deadline - time.monotonic())

    def _node_of(self, key: str) -> redis.Redis:
        if not isinstance(self._client, RedisCluster):
            return self._client
        cluster: Any = self._client  # it has no types
        node: redis.Redis = cluster.get_redis_connection(cluster.get_node_from_key(self._name(key)))
        return node

    # -- for an open record

    def written(self, opened: OpenRedisRecord, record: Record | None) -> _Written:
        """How to write `record`, and what."""
        if record is None:
            return b"keep", b""
        if not record:
            opened.size = None
            return b"delete", b""
        data = self._codec.encode(record, opened.key)
        opened.size = len(data)
        return b"set", data

    def save_open(self, opened: OpenRedisRecord, number: bytes, *written: bytes) -> bool:
        """Write under the lock; False if it was lost."""
        return bool(self._run(self._save_script, opened, number, *written, deadline=opened.end))

    def close_open(
        self, opened: OpenRedisRecord, written: _Written, asked: PendingReply | None = None
    ) -> bool:
        """Write and give the key back; False if it was lost. `asked`: that was begun before."""
        return bool(
            self._run(self._close_script, opened, *written, deadline=opened.end, asked=asked)
        )

    def send_close(self, opened: OpenRedisRecord, written: _Written) -> PendingReply | None:
        """Begin to close, if nothing in that has to wait; else None, and nothing was done."""
        lines = self._in_process().lines
        request = self._close_script.request(opened, *written)
        return None if lines is None else lines.send(request)

    def renew(self, records: Sequence[OpenRedisRecord], /) -> Mapping[OpenRedisRecord, bool]:
        """Renew the leases of all of `records`, in one round trip to each node. A failure is logged
        once, until it has worked again."""
        here = self._in_process()
        nodes: defaultdict[redis.Redis | None, list[OpenRedisRecord]] = defaultdict(list)
        answers: dict[OpenRedisRecord, bool] = {}
        errors: dict[redis.Redis | None, Exception] = {}
        for opened in records:
            try:
                node = here.aside(self._node_of(opened.key))
            except RedisError as error:
                node, errors[None] = None, error
            nodes[node].append(opened)
        for node, group in nodes.items():
            try:
                if node is not None:
                    self._renew_on(node, group, answers)
            except Exception as error:
                errors[node] = error
                if node is not None and clients.leads_nowhere(error):
                    clients.drop_idle(node)
        for node, group in nodes.items():
            here.note_renewal(node, errors.get(node), group)
        return answers

    def _renew_on(
        self,
        node: redis.Redis,
        group: Sequence[OpenRedisRecord],
        answers: dict[OpenRedisRecord, bool],
    ) -> None:
        """Put into `answers` what is known, and raise the first error if there is one."""
        requests = [(_RENEW, 1, opened.names[1], opened.token, self._lease) for opened in group]
        with node.pipeline(transaction=False) as pipe:
            for request in requests:
                pipe.eval(*request)
            said = pipe.execute(raise_on_error=False)
        failed = None
        for opened, request, answer in zip(group, requests, said, strict=True):
            try:
                if isinstance(answer, ResponseError):
                    if not isinstance(self._client, RedisCluster):
                        raise answer
                    answer = self._client.eval(*request)  # the key has moved to another node, say
                answers[opened] = bool(answer)
            except ResponseError as error:
                failed = failed or self._refusal(error, opened.key)
            except RedisError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    # -- names

    def _scan(self, what: bytes) -> Iterator[bytes]:
        """The names, each once, that have `what` behind the prefix: a pattern."""
        pattern = re.sub(rb"([\\*?\[\]])", rb"\\\1", self._prefix) + what
        names = self._client.scan_iter(match=pattern, count=_PAGE, **self._everywhere())
        seen = set()  # the server may name one twice while it grows
        while True:
            try:
                name = next(names, None)
            except ResponseError as error:
                raise refusals.listing_refusal(error, self._prefix) from None
            if name is None:
                return
            if name not in seen:
                seen.add(name)
                yield name

    def _check_listed(self, answer: object) -> None:
        """Raise what the server has answered about a record, if that is an error."""
        if isinstance(answer, ResponseError):
            raise refusals.listing_refusal(answer, self._prefix)
        if isinstance(answer, Exception):
            raise answer

    def _everywhere(self) -> dict[str, Any]:
        """What redis-py is told for something that every node of a cluster has to answer."""
        return {"target_nodes": "primaries"} if isinstance(self._client, RedisCluster) else {}

    def _name(self, key: str) -> bytes:
        text = key.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
        # Empty braces are none for a cluster; a lone percent sign comes from no key.
        return self._prefix + b"{" + (text.encode("utf-8", "surrogatepass") or b"%") + b"}"

    def _key(self, name: bytes) -> str | None:
        """The key of which `name` was made, if it was."""
        escaped = name[len(self._prefix) + 1 : -1]
        try:
            text = "" if escaped == b"%" else escaped.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return None
        key = text.replace("%7B", "{").replace("%7D", "}").replace("%25", "%")
        return key if self._name(key) == name else None

    def _names(self, key: str, token: bytes) -> list[bytes]:
        data = self._name(key)
        return [
            data,
            data + b":lock",
            data + b":queue",
            data + b":seen",
            data + b":closed:" + token,
        ]

    # -- besides

    def _run(
        self,
        script: _Script,
        opened: OpenRedisRecord,
        *values: bytes,
        deadline: float,
        asked: PendingReply | None = None,
    ) -> Any:
        here = self._in_process()
        try:
            return script.run(
                here.client, here.lines, opened, *values, deadline=deadline, asked=asked
            )
        except ResponseError as error:
            raise self._refusal(error, opened.key) from None

    def _command(self, keys: Sequence[str], command: str, *arguments: bytes) -> Any:
        """What the server answers to a command for `keys`, which may be sent twice."""
        here = self._in_process()
        try:
            if here.lines is not None:
                request = _request(command.encode(), *arguments)
                return here.lines.ask(request, time.monotonic() + _PATIENCE)
            client: Any = here.client
            return clients.ask(client, lambda: client.execute_command(command, *arguments))
        except ResponseError as error:
            raise self._refusal(error, *keys) from None

    def _refusal(self, error: ResponseError, *keys: str) -> Exception:
        """What to raise for `error`."""
        names = ", ".join(map(repr, keys))
        return refusals.refusal(error, names, self._name(keys[0]), self._prefix)

    def _warn_of_eviction(self) -> None:
        """Once, at the first use."""
        lines = self._in_process().lines
        if lines is None:
            policies = {node["maxmemory_policy"] for node in self.info("memory")}
        else:
            try:
                said = lines.ask(_request(b"INFO", b"memory"), time.monotonic() + _PATIENCE)
            except ResponseError:  # it is forbidden
                said = b""
            policies = {name.decode() for name in re.findall(rb"maxmemory_policy:([\w-]+)", said)}
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
    def _client(self) -> Client:
        return self._in_process().client

    def _in_process(self) -> _InProcess:
        pid = os.getpid()
        made = self._made.get(pid)
        return made or self._made.setdefault(pid, _InProcess(self._url_or_client, self.lease))


class OpenRedisRecord(Lease):
    """An open record: a lease, which is renewed until `close`."""

    __slots__ = (
        "_asked",
        "_owner",
        "_storage",
        "key",
        "names",
        "packed",
        "record",
        "saves",
        "size",
        "token",
    )

    def __init__(
        self, storage: RedisStorage, key: str, token: bytes, names: Sequence[bytes]
    ) -> None:
        super().__init__(storage, storage.lease)
        self._storage: Final = storage
        self._owner: Final = os.getpid()
        self.key: Final = key
        self.token: Final = token
        self.names: Final = names  # of all that belongs to it ...
        self.packed: Final = _packed(*names, token)  # ... as it is sent with each script
        self.record: Record | None = None
        self.saves = 0
        self.size: int | None = None  # bytes that were written last
        self._asked: PendingReply | None = None  # to close it

    def save(self, record: Record, /) -> None:
        """Store `record` and stay open. Raises SessionConflictError if the lease was lost."""
        if not self._storage.save_open(self, *self.to_save(record)):
            raise self.conflict()

    def to_save(self, record: Record) -> tuple[bytes, ...]:
        """How to store `record` as the next one: its number, how and what."""
        self._refuse_in_child()
        written = self._storage.written(self, record)
        self.saves += 1
        return b"%d" % self.saves, *written

    def close(self, record: Record | None, /) -> None:
        """Store `record`, unless it is None, and let others open it."""
        if record is None and self._owner != os.getpid():
            return
        self._refuse_in_child()
        try:
            try:
                written = self._storage.written(self, record)
            except Exception:
                self._storage.close_open(self, self._storage.written(self, None))
                raise
            asked, self._asked = self._asked, None  # first: its answer comes once
            if not self._storage.close_open(self, written, asked) and record is not None:
                raise self.conflict()
        except Exception:
            renewer().drop(self)
            raise
        renewer().drop(self)  # not after an interrupt: it will be closed once more

    def close_nowait(self, record: Record | None, /) -> bool:
        """As `close`, if the server answers at once; else False, and `close` goes on with what was
        begun."""
        if self._owner != os.getpid():
            return False
        try:
            asked = self._storage.send_close(self, self._storage.written(self, record))
            if asked is not None and not asked.is_ready():
                self._asked = asked
                return False
            closed = asked is not None and bool(asked.answer())
        except (RedisError, SessionError):  # it is asked again, and that one raises it
            return False
        except Exception:  # from a hook for own types
            with suppress(RedisError):  # the lease runs out
                self.close(None)
            raise
        if closed:
            renewer().drop(self)
        return closed

    def _refuse_in_child(self) -> None:
        if self._owner != os.getpid():
            raise SessionConflictError(
                f"the session {self.key!r} was not saved: process {self._owner} has opened it, and "
                f"this is a child that was forked meanwhile. Open it in the child."
            )

    def conflict(self) -> SessionConflictError:
        """What to raise where the lease was lost."""
        return SessionConflictError(
            f"the session {self.key!r} was not saved, since somebody else may have changed it "
            f"meanwhile: its lease of {self.seconds:g} s was lost, because this process (or its "
            f"connection) stood still for longer than that, or the server forgot it in a restart. "
            f"Handle the update again, or give RedisStorage a longer lease."
        )


class _InProcess:
    """What a storage has in one process: connections, and places in queues.

    A forked child has a client of its own, if it was named by a URL: another thread of the parent
    may have been inside the other one's pool, whose mutex nobody gives back then.

    Waiting has connections of its own, a bounded number, so that closing never lacks one; they do
    not try again by themselves, and their time-out exceeds what they wait for.

    A signal handler or a finaliser may call any of this in a thread that is inside: there is no
    mutex, each step is one operation of a dict. Nor has anything to be given back after an
    exception: a slot to wait is free when it is forgotten, and what was begun becomes too old.
    """

    def __init__(self, url_or_client: str | Client, lease: float) -> None:
        self._owns_client: Final = isinstance(url_or_client, str)
        self.client: Final = clients.client_of(url_or_client)
        self.places: Final = _Places()
        self.lines: Final = ScriptConnections.of(self.client)
        #: What is being opened, and was asked for in place.
        self.begun: Final[dict[str, tuple[OpenRedisRecord, PendingReply]]] = {}
        # Soon enough to try again to renew a lease; and well over what anybody blocks for.
        self._timeout: Final = max(2 * _LONGEST_BLOCK, min(lease / 3, 5.0))
        self._slots: Final = Slots(_WAITS)
        self._failing: Final[set[redis.Redis | None]] = set()  # where leases are not renewed now
        self._clients: Final[dict[tuple[object, ...], redis.Redis]] = {}

    def refusal(self, held: bytes, now: bytes) -> SessionLockTimeoutError:
        """What to raise where `held` is somebody else's lock."""
        owner = _places.get(_Places.name_of(held))
        lock = StoredLock.read("", held, 0, int(now))
        if lock.pid is None:
            return SessionLockTimeoutError("something else holds its lock")
        if owner is None or owner is self.places or lock.pid != os.getpid():  # of the parent
            return SessionLockTimeoutError(
                f"process {lock.pid} on {lock.host!r} has it, for {lock.seconds:.1f} s now"
            )
        return HeldHereError(
            f"another storage object of this process has it, for {lock.seconds:.1f} s now. Use one "
            f"storage object for each server, and give it to all managers"
        )

    def note_begun(self, opened: OpenRedisRecord, asked: PendingReply) -> None:
        """Let `open_record` go on with this; as long as nobody does, the connection is busy."""
        for oldest in self.begun:  # one that nobody went on with goes when the next ones come
            begun = self.begun[oldest]
            is_over = begun[0].due <= time.monotonic()
            # Nothing comes in between the look and the removal: there is no call.
            if is_over and oldest in self.begun and self.begun[oldest] is begun:
                del self.begun[oldest]
                self.places.keep(oldest, begun[0].token)
            break
        self.begun[opened.key] = opened, asked

    def pop_begun(self, key: str) -> tuple[OpenRedisRecord, PendingReply] | None:
        """What was begun just now. An older answer tells of a lock that may be somebody else's by
        now, and of data that may be older than theirs: then it is asked again, by the same token,
        which is to open once."""
        begun = self.begun.pop(key, None)
        if begun is not None and begun[0].due <= time.monotonic():
            self.places.keep(key, begun[0].token)
            return None
        return begun

    def wait(self, node: redis.Redis, name: bytes, token: bytes, seconds: float) -> None:
        """Until the key is kept for us, or for `seconds`, or less."""
        slot = self._slots.take()
        if slot is None:
            time.sleep(min(seconds, _POLL))
            return
        client = self.aside(node)
        try:
            with clients.Whole(client):
                # 0 would be for ever.
                client.blpop([name + b":wake:" + token], timeout=max(seconds, 0.01))
        except RedisError:
            time.sleep(min(seconds, _POLL))

    def aside(self, node: redis.Redis) -> redis.Redis:
        """A client for the same server as `node`."""
        pool = node.connection_pool
        options = dict(pool.connection_kwargs)
        address = tuple(options.get(name) for name in ("host", "port", "path"))
        client = self._clients.get(address)
        if client is None:
            options.pop("retry_on_timeout", None)
            options.update(
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                retry=clients.no_retries(),
                retry_on_error=[],
            )
            # Of two who make one at once, both get the first: the other one has not connected.
            client = self._clients.setdefault(
                address,
                redis.Redis(
                    connection_pool=redis.ConnectionPool(
                        connection_class=pool.connection_class, **options
                    )
                ),
            )
        return client

    def note_renewal(
        self,
        node: redis.Redis | None,
        error: Exception | None,
        leases: Sequence[OpenRedisRecord],
    ) -> None:
        """Log a failure, once until it has worked again."""
        if error is None:
            self._failing.discard(node)
        elif node not in self._failing:
            self._failing.add(node)
            _log.warning(
                "the lock of session %r%s cannot be renewed: %s: %s. This is tried again; if it "
                "still fails %.1f s from now, another process may open the session, and this one "
                "cannot save it",
                leases[0].key,
                f" (and of {len(leases) - 1} more)" if leases[1:] else "",
                type(error).__name__,
                error,
                max(0.0, leases[0].end - time.monotonic()),
            )

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()
        for address in list(self._clients):
            client = self._clients.pop(address, None)
            if client is not None:
                # Those in use end with their call; redis-py raises what is no error of its own
                # where one is closed beneath it.
                client.connection_pool.disconnect(inuse_connections=False)
        if self._owns_client:
            clients.close(self.client)


class _Places:
    """The tokens with which this process waits, by key: whoever asks again keeps his place. Without
    a mutex, as _InProcess."""

    def __init__(self) -> None:
        name = secrets.token_hex(_NAME // 2)
        _places[name.encode()] = self
        self._token: Final = f"%x{name}@{_HOST}:{os.getpid()}".encode()
        self._numbers: Final = itertools.count()
        self._tokens: Final[dict[str, tuple[bytes, float]]] = {}

    @staticmethod
    def name_of(held: bytes) -> bytes:
        """Which of them has made the token in a lock."""
        return held.partition(b"@")[0][-_NAME:]

    def pop(self, key: str) -> bytes:
        """A token that nobody else uses now: the one that was kept for `key`, or a new one."""
        kept = self._tokens.pop(key, None)
        return self._token % next(self._numbers) if kept is None else kept[0]

    def keep(self, key: str, token: bytes) -> None:
        """Whoever is next to ask for `key` gets `token`."""
        now = time.monotonic()
        tokens = self._tokens
        tokens[key] = token, now
        if len(tokens) > _PLACES:
            for other in list(tokens):
                # Nothing comes in between the look and the removal: there is no call.
                if other in tokens and tokens[other][1] < now - _OLD_PLACE:
                    del tokens[other]


_NAME: Final = 16  # characters
#: Those of this process, and of those that it was forked from.
_places: Final[WeakValueDictionary[bytes, _Places]] = WeakValueDictionary()
_HOST: Final = re.sub(r"[^\w.-]", "-", platform.node(), flags=re.ASCII)


class StoredLock(NamedTuple):
    """A session that a process has open: which process (None: what holds the lock was not written
    here), for how many seconds, and how many are left of its lease (None: it never ends)."""

    key: str
    host: str | None
    pid: int | None
    seconds: float | None
    left: float | None

    @classmethod
    def read(cls, key: str, held: bytes, left: int, now: int) -> StoredLock:
        """What lies under the name of a lock; times in milliseconds."""
        rest = left / 1000 if left >= 0 else None
        # As long as no process id or time is longer, so that none of them fails to be a number.
        found = re.fullmatch(rb"\w+@([\w.-]*):(\d{1,10}) \d{1,19} (\d{1,19})", held)
        if found is None:
            return cls(key, None, None, None, rest)
        host, pid, since = found.groups()
        return cls(key, host.decode(), int(pid), (now - int(since)) / 1000, rest)

    def is_left_over(self) -> bool:
        """Whether its process is certainly gone: it ran on this machine, and does no more."""
        if self.host != _HOST or self.pid is None or sys.platform == "win32":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False


def _place(seconds: float) -> bytes:
    """For how many milliseconds a place in the queue is kept for who waits for `seconds`."""
    return b"%d" % _milliseconds(seconds + _GRACE)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
