"""What observers are told of the sessions of a manager, and what the log says of them.

A manager without observers makes plain scopes, in which none of this is.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from .errors import is_control_flow
from .locks import Hold
from .scope import Options, SessionScope
from .session import BaseSession
from .steps import Steps, Take
from .storages.base import Record

S = TypeVar("S", bound=BaseSession)

logger: Final = logging.getLogger("session_sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEvent:
    """What has happened to one session. It names the key, and never a value.

    Arguments:
        key: the session's key, without the manager's prefix.
        waited: how many seconds its update waited for it: for others of this process and of other
            ones, and under `install` in telebot's queue.
        seconds: `on_open`: how long it took to load; `on_close`: how long it was open, with the
            saving; `on_wait`: 0.
        loaded: whether there was a stored session. False in `on_wait`.
        written: whether anything was written to the store, or deleted there, `flush()` included.
        bytes: how large the session is as it is stored: `on_open`: as it was read, `on_close`: as
            it was last written. None in memory, of an adapter, and where nothing was read or
            written.
        error: what the handler raised, or what failed when it was saved; `on_wait`: why it could
            not be had. Else None. Its message names no value of the session, unless it is the
            handler's own.
    """

    key: str
    waited: float
    seconds: float = 0.0
    loaded: bool = False
    written: bool = False
    bytes: int | None = None
    error: BaseException | None = None


Observer: TypeAlias = Callable[[SessionEvent], object]


class Observers(NamedTuple):
    """Who wants to know."""

    on_open: Observer | None = None
    on_close: Observer | None = None
    on_wait: Observer | None = None

    def opened(self, event: SessionEvent) -> None:
        """A session was loaded."""
        logger.debug("opened %r: waited %.6f s, loaded in %.6f s", *_figures(event))
        _tell(self.on_open, event)

    def closed(self, event: SessionEvent) -> None:
        """A session was saved and unlocked, or was not saved."""
        if event.error is None:
            end = "written" if event.written else "unchanged"
        else:  # not the error itself: a handler's may have anything in it
            end = f"{type(event.error).__name__} was raised"
        logger.debug("closed %r: waited %.6f s, open for %.6f s, %s", *_figures(event), end)
        _tell(self.on_close, event)

    def waited(self, event: SessionEvent) -> None:
        """Somebody has waited for a session, and has it now; or could not have it."""
        if event.error is not None:
            end = type(event.error).__name__
            logger.debug("not opened %r: waited %.6f s, %s", event.key, event.waited, end)
        _tell(self.on_wait, event)


def _figures(event: SessionEvent) -> tuple[str, float, float]:
    return event.key, event.waited, event.seconds


def _tell(observer: Observer | None, event: SessionEvent) -> None:
    """An observer that fails must not lose a session."""
    if observer is not None:
        try:
            observer(event)
        except Exception as error:
            # Without the errors around it: a handler's may have anything in it.
            trace = "".join(traceback.format_exception(error, chain=False))
            logger.error("an observer failed for the session %r\n%s", event.key, trace)


_NOTICEABLE: Final = 0.001  # seconds of waiting


class ObservedScope(SessionScope[S]):
    """A scope that tells observers when it has waited, opened and closed.

    It looks at the clock around the steps of the life cycle, and does none of them itself but one:
    it takes the key before it goes on, so as to know when it has it.
    """

    __slots__ = (
        "_asked",
        "_error",
        "_found",
        "_has_put",
        "_loaded",
        "_observers",
        "_ours",
        "_size",
    )

    def __init__(
        self, options: Options[S], key: str, name: str, update: Any, observers: Observers
    ) -> None:
        super().__init__(options, key, name, update)
        self._observers: Final = observers
        # Before it is entered: a telebot's update has its scope while it is in the queue.
        self._asked = self._ours = time.perf_counter()
        self._loaded: float | None = None  # while it is open
        self._found = self._has_put = False
        self._size: int | None = None
        self._error: BaseException | None = None

    # -- opening

    def opens_at_once(self) -> bool:
        return self._opens(super().opens_at_once)

    def opens_here(self) -> bool:
        return self._opens(super().opens_here)

    def _opens(self, open_now: Callable[[], bool]) -> bool:
        self._asks()
        try:
            return open_now()
        except BaseException as error:
            self._has_failed(error)
            raise

    def opening(self, passes: bool) -> Steps:
        self._asks()
        try:
            locks = self.options.door.locks
            self.hold = self.hold or locks.try_acquire(self.name)
            if self.hold is None:
                try:
                    timeout = self.options.queue_timeout
                    self.hold = yield Take(locks, self.name, timeout, passes)
                finally:
                    self._ours = time.perf_counter()
            yield from super().opening(passes)
        except BaseException as error:
            self._has_failed(error)
            raise

    def _waiting_for_another_process(self) -> Steps:
        try:
            yield from super()._waiting_for_another_process()
        finally:
            self._ours = time.perf_counter()

    def _asks(self) -> None:
        """From here on it waits; for longer already, if its key was waited for in a queue."""
        self._ours = time.perf_counter()
        if self.hold is None:
            self._asked = self._ours

    def _hand_out(self, hold: Hold, record: Record | None) -> None:
        super()._hand_out(hold, record)
        if self._ours - self._asked >= _NOTICEABLE:
            self._has_waited(None)
        self._loaded = time.perf_counter()
        self._found = record is not None
        self._observers.opened(
            self._event(self._loaded - self._ours, getattr(record, "size", None), None)
        )

    def _has_failed(self, error: BaseException) -> None:
        """It could not be opened; or it was, and what a migration has made could not be stored."""
        if self._loaded is None:
            self._has_waited(error)
        else:
            self._has_closed(error)

    def _has_waited(self, error: BaseException | None) -> None:
        waited = self._ours - self._asked
        self._observers.waited(SessionEvent(key=self.key, waited=waited, error=error))

    # -- writing

    def _put(self, record: Record) -> None:
        puts = self._to_write(record) is not None
        super()._put(record)
        self._has_put |= puts

    def _has_written(self, record: Record | None) -> None:
        super()._has_written(record)
        if record is not None:
            self._has_put = True
            opened = getattr(self, "_opened", None)  # in a store that blocks
            self._size = getattr(opened, "size", None)

    # -- closing

    def discard(self, error: BaseException) -> None:
        if self._loaded is not None and not is_control_flow(error):
            self._error = error
        super().discard(error)

    def closes_at_once(self) -> bool:
        return self._closes(super().closes_at_once)

    def closes_here(self) -> bool:
        return self._closes(super().closes_here)

    def _closes(self, close_now: Callable[[], bool]) -> bool:
        try:
            closed = close_now()
        except BaseException as error:
            self._has_closed(error)
            raise
        if closed:
            self._has_closed(self._error)
        return closed

    def closing(self) -> Steps:
        try:
            yield from super().closing()
        except BaseException as error:
            self._has_closed(error)
            raise
        self._has_closed(self._error)

    def __del__(self) -> None:
        try:
            super().__del__()
        finally:
            self._has_closed(self._error)

    def _has_closed(self, error: BaseException | None) -> None:
        self._error = None  # which knows its frames: no cycle stays
        if self._loaded is not None:
            event = self._event(time.perf_counter() - self._loaded, self._size, error)
            self._loaded = None
            self._observers.closed(event)

    def _event(self, seconds: float, size: int | None, error: BaseException | None) -> SessionEvent:
        return SessionEvent(
            key=self.key,
            waited=self._ours - self._asked,
            seconds=seconds,
            loaded=self._found,
            written=self._has_put,
            bytes=size,
            error=error,
        )
