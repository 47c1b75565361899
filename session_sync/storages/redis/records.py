"""Open records in Redis, and how their leases are renewed.

This module knows how a record is written under its lock; it does not know how it came to be opened.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import redis
from redis.cluster import RedisCluster
from redis.exceptions import RedisError, ResponseError

from ...errors import SessionConflictError, SessionError
from ..base import Record
from ..codec import Codec
from . import clients
from .connections import PendingReply, packed
from .leases import Lease, renewer
from .scripts import RENEW, milliseconds
from .server import Server

_log: Final = logging.getLogger("session_sync")


class OpenRedisRecord(Lease):
    """An open record: a lease, which is renewed until `close`."""

    __slots__ = (
        "_asked",
        "_codec",
        "_server",
        "key",
        "names",
        "packed",
        "record",
        "saves",
        "size",
        "token",
    )

    def __init__(self, renewals: Renewals, codec: Codec, key: str, token: bytes) -> None:
        self._server: Final = renewals.server
        super().__init__(renewals, self._server.lease)
        self._codec: Final = codec
        self.key: Final = key
        self.token: Final = token
        self.names: Final = self._server.names.of_opening(key, token)
        self.packed: Final = packed(*self.names, token)
        self.record: Record | None = None
        self.saves = 0
        self.size: int | None = None  # bytes that were read, or written last
        self._asked: PendingReply | None = None  # to close it

    def has_read(self, data: bytes) -> None:
        """That is what is stored."""
        self.record = self._codec.decode_record(data, self.key)
        self.size = len(data)

    def save(self, record: Record, /) -> None:
        """Store `record` and stay open. Raises SessionConflictError if the lease was lost."""
        save = self._server.scripts.save
        if not self._server.run(save, self, *self.to_save(record), deadline=self.end):
            raise self.conflict()

    def to_save(self, record: Record) -> tuple[bytes, ...]:
        """How to store `record` as the next one: its number, how and what."""
        self._refuse_in_child()
        written = self._written(record)
        self.saves += 1
        return b"%d" % self.saves, *written

    def close(self, record: Record | None, /) -> None:
        """Store `record`, unless it is None, and let others open it."""
        if record is None and self._is_in_child():
            return
        self._refuse_in_child()
        try:
            try:
                written = self._written(record)
            except Exception:
                self._close(self._written(None))
                raise
            asked, self._asked = self._asked, None  # first: its answer comes once
            if not self._close(written, asked) and record is not None:
                raise self.conflict()
        except Exception:
            renewer().drop(self)
            raise
        renewer().drop(self)  # not after an interrupt: it will be closed once more

    def close_nowait(self, record: Record | None, /) -> bool:
        """As `close`, if the server answers at once; else False, and `close` goes on with what was
        begun."""
        if self._is_in_child():
            return False
        try:
            asked = self._server.send(self._server.scripts.close, self, *self._written(record))
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

    def _written(self, record: Record | None) -> tuple[bytes, bytes]:
        """How to write `record`, and what."""
        if record is None:
            return b"keep", b""
        if not record:
            self.size = None
            return b"delete", b""
        data = self._codec.encode(record, self.key)
        self.size = len(data)
        return b"set", data

    def _close(self, written: tuple[bytes, bytes], asked: PendingReply | None = None) -> bool:
        """Write and give the key back; False if it was lost. `asked`: that was begun before."""
        close = self._server.scripts.close
        return bool(self._server.run(close, self, *written, deadline=self.end, asked=asked))

    def _is_in_child(self) -> bool:
        return self._server.pid != os.getpid()

    def _refuse_in_child(self) -> None:
        if self._is_in_child():
            raise SessionConflictError(
                f"the session {self.key!r} was not saved: process {self._server.pid} has opened "
                f"it, and this is a child that was forked meanwhile. Open it in the child."
            )

    def conflict(self) -> SessionConflictError:
        """What to raise where the lease was lost."""
        return SessionConflictError(
            f"the session {self.key!r} was not saved, since another process may have changed it "
            f"meanwhile: its lease of {self.seconds:g} s was lost, because this process (or its "
            f"connection) stood still for longer than that, or the server forgot it in a restart. "
            f"Handle the update again, or give RedisStorage a longer lease."
        )


class Renewals:
    """Renews the leases of the records that one process has open on its server."""

    def __init__(self, server: Server) -> None:
        self.server: Final = server
        self._failing: Final[set[redis.Redis | None]] = set()  # where leases are not renewed now

    def renew(self, records: Sequence[OpenRedisRecord], /) -> Mapping[OpenRedisRecord, bool]:
        """Renew the leases of all of `records`, in one round trip to each node. A failure is logged
        once, until it has worked again."""
        nodes: defaultdict[redis.Redis | None, list[OpenRedisRecord]] = defaultdict(list)
        answers: dict[OpenRedisRecord, bool] = {}
        errors: dict[redis.Redis | None, Exception] = {}
        for opened in records:
            try:
                node = self.server.aside(self.server.node_of(opened.names[0]))
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
            self._note(node, errors.get(node), group)
        return answers

    def _renew_on(
        self,
        node: redis.Redis,
        group: Sequence[OpenRedisRecord],
        answers: dict[OpenRedisRecord, bool],
    ) -> None:
        """Put into `answers` what is known, and raise the first error if there is one."""
        lease = milliseconds(self.server.lease)
        requests = [(RENEW, 1, opened.names[1], opened.token, lease) for opened in group]
        with node.pipeline(transaction=False) as pipe:
            for request in requests:
                pipe.eval(*request)
            said = pipe.execute(raise_on_error=False)
        failed = None
        for opened, request, answer in zip(group, requests, said, strict=True):
            try:
                if isinstance(answer, ResponseError):
                    if not isinstance(self.server.client, RedisCluster):
                        raise answer
                    # The key has moved to another node, say.
                    answer = self.server.client.eval(*request)
                answers[opened] = bool(answer)
            except ResponseError as error:
                failed = failed or self.server.refusal(error, opened.key)
            except RedisError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _note(
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
