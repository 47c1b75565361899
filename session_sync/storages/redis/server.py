"""The Redis server of a storage, as one process reaches it.

This module knows connections, and which of them asks for what; it knows no records.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import Any, Final

import redis
from redis.cluster import RedisCluster
from redis.exceptions import NoScriptError, RedisError, ResponseError

from ..background import Slots
from . import clients, refusals
from .clients import Client
from .connections import PendingReply, ScriptConnections, request_of
from .names import Names, wake_of
from .scripts import LONGEST_BLOCK, Opening, Script, Scripts

_PATIENCE: Final = 10.0  # seconds in which a request is sent again, if no lock ends meanwhile
_POLL: Final = 0.05  # seconds, where the server cannot wake us
_WAITS: Final = 64  # connections on which one process waits


class Server:
    """What one process has of its server, or cluster.

    A forked child has a client of its own, if it was named by a URL: another thread of the parent
    may have been inside the other one's pool, whose mutex nothing gives back then.

    Waiting has connections of its own, a bounded number, so that closing never lacks one; they do
    not try again by themselves, and their time-out exceeds what they wait for.

    A signal handler or a finaliser may call any of this in a thread that is inside: there is no
    mutex, each step is one operation of a dict. Nor has anything to be given back after an
    exception: a slot to wait is free when it is forgotten.
    """

    def __init__(
        self, url_or_client: str | Client, names: Names, scripts: Scripts, lease: float
    ) -> None:
        self._owns_client: Final = isinstance(url_or_client, str)
        self.pid: Final = os.getpid()
        self.names: Final = names
        self.scripts: Final = scripts
        self.lease: Final = lease
        self.client: Final = clients.client_of(url_or_client)
        #: What redis-py is told for something that every node of a cluster has to answer.
        self.everywhere: Final[dict[str, Any]] = (
            {"target_nodes": "primaries"} if isinstance(self.client, RedisCluster) else {}
        )
        self.lines: Final = ScriptConnections.of(self.client)
        # Soon enough to try again to renew a lease; and well over what anything blocks for.
        self._timeout: Final = max(2 * LONGEST_BLOCK, min(lease / 3, 5.0))
        self._slots: Final = Slots(_WAITS)
        self._clients: Final[dict[tuple[object, ...], redis.Redis]] = {}

    # -- asking

    def run(
        self,
        script: Script,
        opening: Opening,
        *values: bytes,
        deadline: float | None = None,
        asked: PendingReply | None = None,
    ) -> Any:
        """The answer of `script`. After `deadline` (of time.monotonic(); None: a while from now),
        it is not sent again; `asked`: it was sent before."""
        if deadline is None:
            deadline = time.monotonic() + _PATIENCE
        try:
            try:
                if asked is not None:
                    return asked.insist(deadline)
                return self._run(script, opening, *values, deadline=deadline)
            except NoScriptError:  # the first time, or after a restart of the server, or a failover
                return self._run(script, opening, *values, deadline=deadline, by_text=True)
        except ResponseError as error:
            raise self.refusal(error, opening.key) from None

    def _run(
        self,
        script: Script,
        opening: Opening,
        *values: bytes,
        deadline: float,
        by_text: bool = False,
    ) -> Any:
        if self.lines is not None:
            return self.lines.ask(script.request(opening, *values, by_text=by_text), deadline)
        return self._ask_client(*script.command(opening, *values, by_text=by_text))

    def send(self, script: Script, opening: Opening, *values: bytes) -> PendingReply | None:
        """Ask for `script`, if nothing has to be waited for; else None, and nothing was done."""
        return None if self.lines is None else self.lines.send(script.request(opening, *values))

    def command(self, keys: Sequence[str], command: str, *arguments: bytes) -> Any:
        """The answer to a command for the records of `keys`, which may be sent twice."""
        try:
            if self.lines is not None:
                request = request_of(command.encode(), *arguments)
                return self.lines.ask(request, time.monotonic() + _PATIENCE)
            return self._ask_client(command, *arguments)
        except ResponseError as error:
            raise self.refusal(error, *keys) from None

    def _ask_client(self, *command: Any) -> Any:
        client: Any = self.client
        return clients.ask(client, lambda: client.execute_command(*command))

    def refusal(self, error: ResponseError, *keys: str) -> Exception:
        """What to raise for `error`."""
        shown = ", ".join(map(repr, keys))
        return refusals.refusal(error, shown, self.names.of(keys[0]), self.names.prefix)

    def node_of(self, name: bytes) -> redis.Redis:
        """A client for the server on which a name lies."""
        if not isinstance(self.client, RedisCluster):
            return self.client
        cluster: Any = self.client  # it has no types
        node: redis.Redis = cluster.get_redis_connection(cluster.get_node_from_key(name))
        return node

    def info(self, *sections: str) -> list[dict[str, Any]]:
        """See RedisStorage.info()."""
        try:
            info: Any = self.client.info(*sections, **self.everywhere)
        except ResponseError:
            return []
        nodes = list(info.values())
        return nodes if all(isinstance(node, dict) for node in nodes) else [info]

    def eviction_policies(self) -> set[str]:
        """What the server, or each node, does when its memory is full; empty, if it must not be
        asked."""
        if self.lines is None:
            return {node["maxmemory_policy"] for node in self.info("memory")}
        try:
            request = request_of(b"INFO", b"memory")
            said = self.lines.ask(request, time.monotonic() + _PATIENCE)
        except ResponseError:  # it is forbidden
            return set()
        return {policy.decode() for policy in re.findall(rb"maxmemory_policy:([\w-]+)", said)}

    # -- waiting

    def wait(self, node: redis.Redis, name: bytes, token: bytes, seconds: float) -> None:
        """Until the session is kept for `token`, or for `seconds`, or less."""
        slot = self._slots.take()
        if slot is None:
            time.sleep(min(seconds, _POLL))
            return
        client = self.aside(node)
        try:
            with clients.Whole(client):
                # 0 would be forever.
                client.blpop([wake_of(name, token)], timeout=max(seconds, 0.01))
        except RedisError:
            time.sleep(min(seconds, _POLL))

    def aside(self, node: redis.Redis) -> redis.Redis:
        """A client for the same server as `node`, with connections of its own."""
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
            # Of two that make one at once, both get the first: the other one has not connected.
            client = self._clients.setdefault(
                address,
                redis.Redis(
                    connection_pool=redis.ConnectionPool(
                        connection_class=pool.connection_class, **options
                    )
                ),
            )
        return client

    def close(self) -> None:
        """Close the connections, but not those of a client that was given."""
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
