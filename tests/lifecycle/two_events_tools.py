"""What the tests of two events at once share."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

from conftest import Threads
from stops import Stop, stopping
from waiting import SOON

from session_sync import SessionManager

KEY = "user:1"


class Interrupt(BaseException):
    """As Ctrl-C."""


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def begin_and_lose(handle: Callable[[], Any]) -> None:
    """A task that waits, and is known to nobody but the collector."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    loop.create_task(handle())  # noqa: RUF006 # it is thrown away
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


class Block:
    """A thread inside a session, in the context of another block if there is one."""

    def __init__(
        self, threads: Threads, sessions: SessionManager[Any], name: str, *stops: Stop
    ) -> None:
        self._sessions, self._name = sessions, name
        self._inside, self._leave = threading.Event(), threading.Event()
        self.session: Any = None
        self.failure: BaseException | None = None
        self.error: BaseException | None = None  # to fail with
        context = contextvars.copy_context()
        self._thread = threads.start(lambda: context.run(stopping(self._run, *stops)))

    def _run(self) -> None:
        try:
            with self._sessions.session_scope(KEY) as session:
                session[self._name] = 1
                self.context = contextvars.copy_context()
                self.session = session
                del session
                self._inside.set()
                assert self._leave.wait(SOON)
                if self.error is not None:
                    raise self.error
        except (Interrupt, LookupError) as error:
            self.failure = error

    def inside(self) -> Block:
        assert self._inside.wait(SOON)
        return self

    def leave(self) -> None:
        self._leave.set()

    def join(self) -> None:
        self.leave()
        self._thread.join(SOON)
        assert not self._thread.is_alive()
