"""A thread stands still in front of a line, while others do a whole step of theirs."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from waiting import SOON


class Stop:
    """In front of the first line of `function` that contains `text`, once; or, for those calls of
    it of which `when` says so, given its variables. `error` is then raised there, as by a signal
    handler."""

    def __init__(
        self,
        function: Callable[..., Any],
        text: str,
        *,
        when: Callable[[dict[str, Any]], bool] = lambda _variables: True,
        error: BaseException | None = None,
    ) -> None:
        lines, first = inspect.getsourcelines(function)
        found = [number for number, line in enumerate(lines, first) if text in line]
        assert found, f"{function.__qualname__} has no line with {text!r} any more"
        self.code, self.line = function.__code__, found[0]
        self._when, self._error = when, error
        self._reached, self._go_on = threading.Event(), threading.Event()

    @property
    def is_reached(self) -> bool:
        """Whether the thread stands there, or has."""
        return self._reached.is_set()

    def wait(self) -> None:
        """Until the thread stands there."""
        assert self._reached.wait(SOON), f"no thread has come to {self.code.co_qualname}"

    def go_on(self) -> None:
        """Let the thread go on."""
        self._go_on.set()

    def look(self, frame: FrameType) -> None:
        """In the thread, in front of each line."""
        if frame.f_lineno != self.line or self._reached.is_set() or not self._when(frame.f_locals):
            return
        self._reached.set()
        assert self._go_on.wait(SOON)
        if self._error is not None:
            raise self._error


def stopping(work: Callable[[], object], *stops: Stop) -> Callable[[], None]:
    """`work`, which stands still at these places; for a thread of its own."""

    def call(frame: FrameType, _event: str, _arg: Any) -> Any:
        here = [stop for stop in stops if stop.code is frame.f_code]

        def step(frame: FrameType, event: str, _arg: Any) -> Any:
            if event == "line":
                for stop in here:
                    stop.look(frame)
            return step

        return step if here else None

    def traced() -> None:
        before = sys.gettrace()
        sys.settrace(call)
        try:
            work()
        finally:
            sys.settrace(before)

    return traced
