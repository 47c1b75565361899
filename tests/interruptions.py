"""Something happens at each place of a program, one after the other, where CPython lets it happen.

Signal handlers, exceptions set by another thread and (from Python 3.12 on) the garbage collector
come after an instruction that looks out for them: a call, a jump back, a function's first one, or
the first one after a `yield`. Between a `yield from` or `await` and what that waits for, CPython
lets nothing come.

Not for contextlib: CPython 3.11 crashes now and then if a tracer raises in there.
"""

from __future__ import annotations

import dis
import itertools
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from functools import cache
from types import CodeType, FrameType, ModuleType
from typing import Any, TypeVar

import pytest

from session_sync.lifecycle import ending, members, scope, writing

if sys.version_info >= (3, 12):
    from sys import monitoring

    _TOOL = 4  # none of those that CPython gives a name
    # The first two for RESUME, which is not shown as an instruction.
    _EVENTS = (
        monitoring.events.PY_START,
        monitoring.events.PY_RESUME,
        monitoring.events.INSTRUCTION,
    )

_AFTER_YIELD_FROM = 2  # the argument of RESUME; 3 is after an `await`
LOOKS_OUT = ("CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")


#: For tests in which a tracer raises inside of a flow. (The explorer interrupts flows on 3.11, too:
#: from a profiler, which may raise.)
raises_in_flows = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="CPython 3.11 may crash if a tracer raises in a generator"
)


class OutsideError(Exception):
    """What a signal handler raises."""


def raise_outside() -> None:
    raise OutsideError


AnyInterruption = TypeVar("AnyInterruption", "Interruption", "LineInterruption")


@cache
def instructions(code: CodeType) -> dict[int, str]:
    found = {}
    for each in dis.get_instructions(code):
        is_quiet = each.opname == "RESUME" and (each.arg or 0) & 3 >= _AFTER_YIELD_FROM
        found[each.offset] = "quiet" if is_quiet else each.opname
    return found


def has_looked_out(code: CodeType, before: int, now: int) -> bool:
    """Whether `before`, the instruction that has just been executed, looks out at its end: not if
    it has raised, so that a handler begins `now`. There is no help against an exception before the
    first line of a finaliser: Python would not call it again."""
    if before < 0 or instructions(code)[now] == "PUSH_EXC_INFO":
        return False
    name = instructions(code)[before].replace("JUMP_BACKWARD_NO_INTERRUPT", "quiet")
    return name.startswith(LOOKS_OUT) and (code.co_name, name) != ("__del__", "RESUME")


class Interruption:
    """Calls `act` at the `number`-th place that this thread passes in one of these files.

    Afterwards `happened` says whether it did.
    """

    def __init__(self, number: int, act: Callable[[], object], files: Container[str]) -> None:
        self.happened = False
        self._left = number
        self._act = act
        self._files = files
        self._last: dict[FrameType, int] = {}  # the instruction that each frame has come to

    def __enter__(self) -> Interruption:
        self._begin()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end()
        self._last.clear()

    def _step(self, frame: FrameType, now: int) -> None:
        before = self._last.get(frame, -1)
        self._last[frame] = now
        # No line: code of CPython's own, as where it closes a generator.
        if frame.f_lineno is None or not has_looked_out(frame.f_code, before, now):
            return
        self._left -= 1
        if self._left == 0:
            self.happened = True
            self._last.clear()  # which keeps all that these frames have
            self._act()

    if sys.version_info >= (3, 12):
        # A tracer of sys.settrace() is not shown the instructions of code that runs with it for the
        # first time, or for the first time since it ran without.

        def _begin(self) -> None:
            self._thread = threading.get_ident()
            monitoring.use_tool_id(_TOOL, __name__)
            for event in _EVENTS:
                monitoring.register_callback(_TOOL, event, self._instruction)
            monitoring.restart_events()
            monitoring.set_events(_TOOL, sum(_EVENTS))

        def _end(self) -> None:
            monitoring.set_events(_TOOL, 0)
            for event in _EVENTS:
                monitoring.register_callback(_TOOL, event, None)
            monitoring.free_tool_id(_TOOL)

        def _instruction(self, code: CodeType, offset: int) -> object:
            if code.co_filename not in self._files:
                return monitoring.DISABLE
            if threading.get_ident() == self._thread:
                self._step(sys._getframe(1), offset)
            return None

    else:

        def _begin(self) -> None:
            self._before = sys.gettrace()
            sys.settrace(self._call)

        def _end(self) -> None:
            sys.settrace(self._before)

        def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
            if frame.f_code.co_filename not in self._files:
                return None
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            self._last[frame] = frame.f_lasti  # RESUME, which is not shown
            return self._opcode

        def _opcode(self, frame: FrameType, event: str, _arg: Any) -> Any:
            if event == "opcode":
                self._step(frame, frame.f_lasti)
            return self._opcode


#: A scope is one thing in four modules.
LAYERS = {scope: [scope, ending, writing, members]}


def everywhere(act: Callable[[], object], *modules: ModuleType) -> Iterator[Interruption]:
    """An interruption for each place, until one has not happened."""
    return _until_one_has_not_happened(lambda n, files: Interruption(n, act, files), modules)


def _until_one_has_not_happened(
    make: Callable[[int, set[str]], AnyInterruption], modules: Iterable[ModuleType]
) -> Iterator[AnyInterruption]:
    files = {layer.__file__ or "" for module in modules for layer in LAYERS.get(module, [module])}
    for number in itertools.count(1):
        interruption = make(number, files)
        yield interruption
        if not interruption.happened:
            assert number > 3, "nothing was interrupted"
            return


class LineInterruption:
    """Calls `act` before the `number`-th line that this thread comes to in one of these files: also
    where CPython would let nothing happen, but another interpreter might."""

    def __init__(self, number: int, act: Callable[[], object], files: Container[str]) -> None:
        self.happened = False
        self._left = number
        self._act = act
        self._files = files

    def __enter__(self) -> LineInterruption:
        self._before = sys.gettrace()
        sys.settrace(self._step)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.settrace(self._before)

    def _step(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                self.happened = True
                self._act()
        return self._step


def every_line(act: Callable[[], object], *modules: ModuleType) -> Iterator[LineInterruption]:
    """The same for each line."""
    return _until_one_has_not_happened(lambda n, files: LineInterruption(n, act, files), modules)
