"""What observers are told of the sessions of a manager, and what is written to the log.

A manager without observers makes plain scopes, in which none of this is.

This module knows times, sizes and errors of sessions; it knows no value of one.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from ..errors import is_control_flow
from ..locks.watch import WaitReport
from ..session.session import BaseSession
from ..storages.base import Record
from .entry import SessionScope
from .flow import AcquireLock, Flow
from .options import Options
from .threads import errands

S = TypeVar("S", bound=BaseSession)

logger: Final = logging.getLogger("session_sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEvent:
    """What has happened to one session. It names the key, and never a value.

    Arguments:
        key: the session's key, without the manager's prefix.
        waited: how many seconds its update waited for it: for others of this process and of other
            ones, and under `install` in telebot's queue.
        open_seconds: `on_open`: how long it took to load, in seconds; `on_close`: how long it was
            open, with the saving; `on_wait`: 0.
        loaded: whether there was a stored session. False in `on_wait`.
        written: whether anything was written to the store, or deleted there, `flush()` included.
        stored_bytes: how large the session is as it is stored: `on_open`: as it was read,
            `on_close`: as it was last written. None in memory, of an adapter, and where nothing was
            read or written.
        error: what the handler raised, or what failed when it was saved; `on_wait`: why it could
            not be had. Else None. Its message names no value of the session, unless it is the
            handler's own.
        waiters: `on_wait`: how many callers and updates wait for the session at this moment. 0 in
            an event that tells that a wait has ended, and in all other ones.
        holder: with `waiters`: the thread or task that holds the session, in words; None if it is
            kept for an update that waits for a worker thread.
        held: with `holder`: for how many seconds it has been held.
    """

    key: str
    waited: float
    open_seconds: float = 0.0
    loaded: bool = False
    written: bool = False
    stored_bytes: int | None = None
    error: BaseException | None = None
    waiters: int = 0
    holder: str | None = None
    held: float = 0.0


Observer: TypeAlias = Callable[[SessionEvent], object]


class Observers(NamedTuple):
    """The functions that are told what happens to the sessions of a manager."""

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
        """A caller has waited for a session, and has it now; or could not have it."""
        if event.error is not None:
            end = type(event.error).__name__
            logger.debug("not opened %r: waited %.6f s, %s", event.key, event.waited, end)
        _tell(self.on_wait, event)


class WaitReporter:
    """What is told when callers wait for a session for too long: the log, and `on_wait`.

    `seconds` is after what time the first report is made.
    """

    def __init__(self, seconds: float, observers: Observers, prefix: str) -> None:
        self.seconds: Final = seconds
        self._observers: Final = observers
        self._prefix: Final = prefix

    def run_out(self, report: WaitReport, /) -> None:
        """Callers still wait."""
        holder = report.holder
        logger.warning(
            "%d waiting for session %r, for %.1f s so far: %s",
            report.waiters,
            report.key,
            report.waited,
            "it is kept for an update that waits for a free worker thread; give the bot more "
            "threads, or look for handlers that hang"
            if holder is None
            else f"{holder} has held it for {report.held:.1f} s. If that handler hangs, none of "
            f"these updates is handled; one that goes on for long calls session.release()",
        )
        event = SessionEvent(
            key=report.key.removeprefix(self._prefix),
            waited=report.waited,
            waiters=report.waiters,
            holder=holder,
            held=report.held,
        )
        _tell(self._observers.on_wait, event)


def _figures(event: SessionEvent) -> tuple[str, float, float]:
    return event.key, event.waited, event.open_seconds


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
        self, options: Options[S], key: str, full_key: str, update: Any, observers: Observers
    ) -> None:
        self._loaded: float | None = None  # while it is open; first: the finaliser looks at these
        self._error: BaseException | None = None
        super().__init__(options, key, full_key, update)
        self._observers: Final = observers
        # Before it is entered: a telebot's update has its scope while it is in the queue.
        self._asked = self._ours = time.perf_counter()
        self._found = self._has_put = False
        self._size: int | None = None

    # -- opening

    def open_now(self, may_block: bool) -> bool:
        self._asks()
        try:
            return super().open_now(may_block)
        except BaseException as error:
            self._has_failed(error)
            raise

    def opening(self, passes: bool) -> Flow:
        self._asks()
        try:
            handle = self.handle = self.handle or self.new_handle()
            if not (handle.is_held or handle.try_acquire()):
                try:
                    options = self.options
                    yield AcquireLock(handle, options.queue_timeout, passes, options.patience)
                except BaseException as error:
                    self._ours = time.perf_counter()
                    yield from self._giving_up(error)  # as in what this is instead of
                    raise
                self._ours = time.perf_counter()
            yield from super().opening(passes)
        except BaseException as error:
            self._has_failed(error)
            raise

    def _waiting_for_another_process(self) -> Flow:
        try:
            yield from super()._waiting_for_another_process()
        finally:
            self._ours = time.perf_counter()

    def _asks(self) -> None:
        """From here on it waits; for longer already, if its key was waited for in a queue."""
        self._ours = time.perf_counter()
        if self.handle is None:
            self._asked = self._ours

    def _hand_out(self, record: Record | None) -> None:
        super()._hand_out(record)
        if self._ours - self._asked >= _NOTICEABLE:
            self._has_waited(None)
        self._loaded = time.perf_counter()
        self._found = record is not None
        self._observers.opened(
            self._event(self._loaded - self._ours, getattr(self.opened, "size", None), None)
        )

    def _has_failed(self, error: BaseException) -> None:
        """It could not be opened; or it was, and what a migration has made could not be stored."""
        if self._loaded is None:
            self._has_waited(error)
        else:
            self._has_closed(error)

    def _has_waited(self, error: BaseException | None) -> None:
        waited = self._ours - self._asked
        event = SessionEvent(key=self.key, waited=waited, error=error)
        self._tell(self._observers.waited, event, error)

    # -- writing

    def put(self, record: Record) -> None:
        puts = self.to_write(record) is not None
        super().put(record)
        self._has_put |= puts

    def has_written(self, record: Record | None) -> None:
        super().has_written(record)
        if record is not None:
            self._has_put = True
            self._size = getattr(self.opened, "size", None)

    # -- closing

    def discard(self, error: BaseException) -> None:
        if self._loaded is not None and not is_control_flow(error):
            self._error = error
        super().discard(error)

    def close_now(self, may_block: bool) -> bool:
        try:
            closed = super().close_now(may_block)
        except BaseException as error:
            self._has_closed(error)
            raise
        if closed:
            self._has_closed(self._error)
        return closed

    def closing(self, may_block: bool) -> Flow:
        try:
            yield from super().closing(may_block)
        except BaseException as error:
            self._has_closed(error)
            raise
        self._has_closed(self._error)

    def __del__(self) -> None:
        try:
            super().__del__()
        finally:
            # An interrupt may have come before it had all its fields. And a finaliser calls nothing
            # that may take a mutex.
            if getattr(self, "_loaded", None) is not None:
                event = self._closed_event(self._error)
                if event is not None:
                    errands.run_soon(functools.partial(self._observers.closed, event))

    def _has_closed(self, error: BaseException | None) -> None:
        event = self._closed_event(error)
        if event is not None:
            self._tell(self._observers.closed, event, error)

    def _tell(
        self, tell: Callable[[SessionEvent], None], event: SessionEvent, error: BaseException | None
    ) -> None:
        """In a thread where this is a finaliser, in which nothing is called that takes a mutex."""
        if self.is_thrown_away(error):
            errands.run_soon(functools.partial(tell, event))
        else:
            tell(event)

    def _closed_event(self, error: BaseException | None) -> SessionEvent | None:
        """What observers are told, once."""
        self._error = None  # which knows its frames: no cycle stays
        if self._loaded is None:
            return None
        event = self._event(time.perf_counter() - self._loaded, self._size, error)
        self._loaded = None
        return event

    def _event(self, seconds: float, size: int | None, error: BaseException | None) -> SessionEvent:
        return SessionEvent(
            key=self.key,
            waited=self._ours - self._asked,
            open_seconds=seconds,
            loaded=self._found,
            written=self._has_put,
            stored_bytes=size,
            error=error,
        )
