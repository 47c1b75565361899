"""Clients of redis-py: which ones serve, those that a URL names, and how they are asked.

This module knows connections, time-outs and retries; it knows neither records nor scripts.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 # of a host's name; see RedisStorage.__init__
import os
import re
import socket
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import SplitResult, quote, unquote

import redis
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.cluster import RedisCluster
from redis.connection import parse_url
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from ..addresses import check_port, split

Client: TypeAlias = redis.Redis | RedisCluster
T = TypeVar("T")

#: Seconds until a socket has failed; redis-py's own default, which its old versions do not have.
TIMEOUT: Final = 5.0
_SENTINEL_PORT: Final = 26379
_IDLE, _PROBES, _BETWEEN = 30, 3, 5  # seconds until TCP looks after an idle connection; how often
_KEEPALIVE: Final = {
    getattr(socket, name): value
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_KEEPINTVL", _BETWEEN),
    )
    if hasattr(socket, name)
}
_TIMEOUTS: Final[dict[str, Any]] = {
    "socket_timeout": TIMEOUT,
    "socket_connect_timeout": TIMEOUT,
    "socket_keepalive": True,
    "socket_keepalive_options": _KEEPALIVE,
}


def retries(
    errors: tuple[type[Exception], ...] = (redis.ConnectionError, redis.TimeoutError),
) -> Retry:
    """As many as redis-py's default, within 2.6 to 5.3 seconds. (Its own pauses are drawn from 0
    on, and may be over in less than a second.)"""
    return Retry(EqualJitterBackoff(cap=1, base=0.01), 10, errors)


def no_retries() -> Retry:
    return Retry(NoBackoff(), 0)


# -- the client


def client_of(url_or_client: str | Client) -> Client:
    """The client to ask. Raises TypeError or ValueError for what cannot serve as one."""
    client = _connect(url_or_client) if isinstance(url_or_client, str) else url_or_client
    if not isinstance(client, redis.Redis | RedisCluster):
        what = f"{type(client).__module__}.{type(client).__qualname__}"
        why = " (async handlers are served all the same)" if ".asyncio" in what else ""
        raise TypeError(
            f"RedisStorage needs a URL, or a redis.Redis or redis.cluster.RedisCluster, which are "
            f"synchronous{why}; not a {what}"
        )
    if client.get_encoder().decode_responses:
        raise ValueError(
            "RedisStorage stores bytes, but this client was made with decode_responses=True: make "
            "one without it"
        )
    return client


def _connect(url: str) -> Client:
    """What a URL says has precedence over what is given here."""
    scheme, colon, rest = url.partition(":")
    base, _, kind = scheme.lower().partition("+")
    parts = split(url)
    if kind == "sentinel":
        return _by_sentinel(base, parts)
    check_port(parts)
    if kind == "cluster":
        cluster: RedisCluster = RedisCluster.from_url(base + colon + rest, **_TIMEOUTS)
        return cluster
    options = {"socket_timeout": TIMEOUT} if base == "unix" else _TIMEOUTS
    return redis.Redis.from_url(base + colon + rest, retry=retries(), **options)


def _by_sentinel(base: str, url: SplitResult) -> redis.Redis:
    """`redis+sentinel://user:password@host:26379,host:26379/service/0`. User and password are the
    server's; those of the sentinels are the options sentinel_username and sentinel_password."""
    login, at, hosts = url.netloc.rpartition("@")
    service, _, db = url.path.strip("/").partition("/")
    if not service or not hosts:
        raise ValueError(
            f"{url.scheme}:// names the sentinels and the service that they watch: "
            f"{url.scheme}://host:26379,host:26379/mymaster"
        )
    if db and not db.isdecimal():
        raise ValueError(
            f"{url.scheme}://: after the name of the service comes a database's number"
        )
    untyped: Any = parse_url, Sentinel
    parse, by_sentinels = untyped
    one: dict[str, Any] = parse(f"{base}://{login}{at}host/{db}?{url.query}")
    for name in ("host", "connection_class"):
        one.pop(name, None)
    sentinels = {
        name.removeprefix("sentinel_"): one.pop(name)
        for name in list(one)
        if name.startswith("sentinel_")
    }
    server = {**_TIMEOUTS, "retry": retries(), **one}
    if base == "rediss":
        server["ssl"] = True
    shared = {name: value for name, value in server.items() if name.startswith(("socket_", "ssl"))}
    client: redis.Redis = by_sentinels(
        [_address(url, host) for host in hosts.split(",")],
        sentinel_kwargs={**shared, "retry": no_retries(), **sentinels},  # the next one is asked
        **server,
    ).master_for(unquote(service))
    return client


def _address(url: SplitResult, host: str) -> tuple[str, int]:
    part = url._replace(netloc=host)
    check_port(part)
    return part.hostname or "localhost", part.port or _SENTINEL_PORT


def server_of(url: str, client: Client) -> str:
    """The server that `url`, of which `client` was made, names, whatever the user and the other
    options. Two names may lead to one server, but never one name to two."""
    if isinstance(client, RedisCluster):
        scheme, _, rest = url.partition(":")
        untyped: Any = parse_url
        options = untyped(f"{scheme.partition('+')[0].lower()}:{rest}")
        return f"redis+cluster://{_host_and_port(options)}"
    pool = client.connection_pool
    options = pool.connection_kwargs
    db = options.get("db") or 0
    if isinstance(pool, SentinelConnectionPool):
        sentinels = [
            _host_and_port(each.connection_pool.connection_kwargs)
            for each in pool.sentinel_manager.sentinels
        ]
        service = quote(pool.service_name, safe="")
        return f"redis+sentinel://{','.join(sorted(sentinels))}/{service}/{db}"
    if "path" in options:
        return f"unix://{quote(os.path.realpath(options['path']))}/{db}"
    return f"redis://{_host_and_port(options)}/{db}"


def _host_and_port(options: dict[str, Any]) -> str:
    return f"{options.get('host') or 'localhost'}:{options.get('port') or 6379}"


def close(client: Client) -> None:
    """Close the connections of a client, and those to the sentinels that it asks."""
    client.close()
    pool = None if isinstance(client, RedisCluster) else client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            sentinel.close()


# -- asking


def ask(client: Client, call: Callable[[], T]) -> T:
    """What `call` gets from `client`; after a failover, as soon as that leads to the new server."""

    def attempt() -> T:
        with Whole(client):
            return call()

    return retries((ReadOnlyError,)).call_with_retry(attempt, lambda _: None)


def leads_nowhere(error: BaseException) -> bool:
    """Whether `error` says that what it came from is no connection to use, nor are those that are
    as old: it is cut, or leads to a server that is none now, or is a replica since a failover."""
    return isinstance(error, redis.ConnectionError | redis.TimeoutError) or is_from_replica(error)


def is_from_replica(error: BaseException) -> bool:
    """Whether a server has refused to write because it is a replica; Redis 6 says so in the midst
    of the text, if a script has written."""
    return isinstance(error, ReadOnlyError) or (
        isinstance(error, ResponseError)
        and re.search(r"(^|[ -])(READONLY|MASTERDOWN) ", str(error)) is not None
    )


class Whole:  # a class, since an interrupt may leave a generator's block open
    """Around a command of redis-py's own: if an exception from outside interrupts it, no connection
    stays in the pool; nor does one after an error that says that it leads nowhere.

    It may have been made by half, or have an answer that nothing has read; and redis-py would take
    that for the answer to its next command.
    """

    __slots__ = ("_client",)

    def __init__(self, client: Client) -> None:
        self._client: Final = client

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or (isinstance(error, RedisError) and not leads_nowhere(error)):
            return
        drop_idle(self._client)
        if is_from_replica(error) and not isinstance(error, ReadOnlyError):
            raise ReadOnlyError(str(error)) from None


def drop_idle(client: Client) -> None:
    """Close the connections of a client that are not in use now."""
    if isinstance(client, RedisCluster):
        nodes: Any = client  # it has no types
        clients = [node.redis_connection for node in nodes.get_nodes()]
    else:
        clients = [client]
    for each in clients:
        if each is not None:
            each.connection_pool.disconnect(inuse_connections=False)
