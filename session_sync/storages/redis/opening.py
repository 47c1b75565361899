"""Opening records in Redis: taking the lock, or waiting for it.

This module knows how an opening is begun, goes on and fails; it does not know how one is closed.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final

from redis.exceptions import RedisError

from ...errors import SessionError, SessionLockTimeoutError
from ..base import HeldHereError
from ..codec import Codec
from .connections import PendingReply
from .leases import renewer
from .records import OpenRedisRecord, Renewals
from .scripts import LONGEST_BLOCK, place_for
from .server import Server
from .tokens import StoredLock, Tokens, maker_of


class Opener:
    """Opens the records of a storage for one process.

    A signal handler or a finaliser may call any of this in a thread that is inside: there is no
    mutex, each step is one operation of a dict. Nor has anything to be given back after an
    exception: what was begun becomes too old.
    """

    def __init__(self, server: Server, codec: Codec) -> None:
        self.server: Final = server
        self._codec: Final = codec
        self._renewals: Final = Renewals(server)
        self.tokens: Final = Tokens()
        #: What is being opened, and was asked for in place.
        self.begun: Final[dict[str, tuple[OpenRedisRecord, PendingReply]]] = {}

    def open(self, key: str, timeout: float, *, read: bool = True) -> OpenRedisRecord:
        """See RedisStorage.open_record(); `read`: decode what is stored, too."""
        opened, asked = self._pop_begun(key) or (self.record(key), None)
        try:
            data = self._take(opened, timeout, asked)
        except BaseException:
            # Whether it was opened may be unknown: then the next caller that asks here has it.
            self.tokens.keep(key, opened.token)
            raise
        try:
            opened.renewed()  # the waiting does not count
            renewer().keep(opened)
            if read and data is not None:
                opened.has_read(data)
        except BaseException:
            opened.close(None)
            raise
        return opened

    def open_nowait(self, key: str) -> OpenRedisRecord | None:
        """See RedisStorage.open_nowait()."""
        server = self.server
        if server.lines is None or key in self.begun:
            return None
        opened = self.record(key)
        try:
            asked = server.send(server.scripts.open, opened, place_for(0))
            if asked is not None and not asked.is_ready():
                self.note_begun(opened, asked)
                return None
            data = [] if asked is None else asked.answer()
            if isinstance(data, list):
                raise SessionLockTimeoutError
            if data is not None:
                opened.has_read(data)
            renewer().keep(opened)
        except (RedisError, SessionError):  # it is asked again, and may take its time to fail
            self.tokens.keep(key, opened.token)
            return None
        except BaseException:  # as in open()
            self.tokens.keep(key, opened.token)
            raise
        return opened

    def record(self, key: str) -> OpenRedisRecord:
        """One that is to be opened."""
        return OpenRedisRecord(self._renewals, self._codec, key, self.tokens.pop(key))

    def _take(
        self, opened: OpenRedisRecord, timeout: float, asked: PendingReply | None
    ) -> bytes | None:
        """What is stored, once the lock is ours."""
        deadline, left = time.monotonic() + timeout, timeout
        while True:
            block = min(left, LONGEST_BLOCK)
            answer: bytes | list[Any] | None
            answer = self.server.run(
                self.server.scripts.open, opened, place_for(block), asked=asked
            )
            asked = None
            if not isinstance(answer, list):
                return answer
            rest, held, now = answer
            if not left:
                raise self._refusal(held, now)
            until_free = rest / 1000 + 0.001 if rest >= 0 else block
            name = opened.names[0]
            self.server.wait(self.server.node_of(name), name, opened.token, min(block, until_free))
            left = max(0.0, deadline - time.monotonic())

    def _refusal(self, held: bytes, now: bytes) -> SessionLockTimeoutError:
        """What to raise where `held` is the lock of another opening."""
        maker = maker_of(held)
        lock = StoredLock.read("", held, 0, int(now))
        if lock.pid is None:
            return SessionLockTimeoutError("something else holds its lock")
        if maker is None or maker is self.tokens or lock.pid != os.getpid():  # of the parent
            return SessionLockTimeoutError(
                f"process {lock.pid} on {lock.host!r} has it, for {lock.seconds:.1f} s now"
            )
        return HeldHereError(
            f"another storage object of this process has it, for {lock.seconds:.1f} s now. Use one "
            f"storage object for each server, and give it to all managers"
        )

    # -- what was begun in place

    def note_begun(self, opened: OpenRedisRecord, asked: PendingReply) -> None:
        """Let `open` go on with this; until it does, the connection is busy."""
        for oldest in self.begun:  # one that is abandoned goes when the next ones come
            begun = self.begun[oldest]
            is_over = begun[0].due <= time.monotonic()
            # Nothing comes in between the look and the removal: there is no call.
            if is_over and oldest in self.begun and self.begun[oldest] is begun:
                del self.begun[oldest]
                self.tokens.keep(oldest, begun[0].token)
            break
        self.begun[opened.key] = opened, asked

    def _pop_begun(self, key: str) -> tuple[OpenRedisRecord, PendingReply] | None:
        """What was begun just now. An older answer tells of a lock that another opening may have by
        now, and of data that may be older than what that has written: then it is asked again, by
        the same token, which is to open once."""
        begun = self.begun.pop(key, None)
        if begun is not None and begun[0].due <= time.monotonic():
            self.tokens.keep(key, begun[0].token)
            return None
        return begun
