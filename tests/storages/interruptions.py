"""Something happens at each place of a program, one after the other, where CPython lets it happen.

Signal handlers, exceptions set by another thread and (from Python 3.12 on) the garbage collector
come after an instruction that looks out for them: a call, a jump back, or a function's first one.

Not for contextlib: CPython 3.11 crashes now and then if a tracer raises in there.
"""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType, ModuleType
from typing import Any

LOOKS_OUT = ("CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")


class OutsideError(Exception):
    """What a signal handler raises."""


def raise_outside() -> None:
    raise OutsideError


@cache
def instructions(code: CodeType) -> dict[int, str]:
    return {each.offset: each.opname for each in dis.get_instructions(code)}


def has_looked_out(code: CodeType, before: int, now: int) -> bool:
    """Whether `before`, the instruction that has just been executed, looks out at its end: not if
    it has raised, so that a handler begins `now`. There is no help against an exception before the
    first line of a finaliser: Python would not call it again."""
    if before < 0 or instructions(code)[now] == "PUSH_EXC_INFO":
        return False
    name = instructions(code)[before]
    return name.startswith(LOOKS_OUT) and (code.co_name, name) != ("__del__", "RESUME")


class Interruption:
    """Calls `act` at the `number`-th place that this thread passes in one of `modules`."""

    def __init__(self, number: int, act: Callable[[], object], modules: tuple[ModuleType, ...]):
        self.happened = False
        self._left = number
        self._act = act
        self._files = {module.__file__ for module in modules}

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        if sys.version_info[:2] == (3, 12):  # which looks only in settrace()
            sys._getframe().f_trace_opcodes = True
        sys.settrace(self._trace_call)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.settrace(self._before)

    def _trace_call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        last = -1

        def trace(frame: FrameType, event: str, _arg: Any) -> Any:
            nonlocal last
            if event == "opcode":
                before, last = last, frame.f_lasti
                # No line: code of CPython's own, as where it closes a generator.
                if frame.f_lineno is not None and has_looked_out(code, before, last):
                    self._pass()
            return trace

        return trace

    def _pass(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.happened = True
            self._act()


def everywhere(act: Callable[[], object], *modules: ModuleType) -> Iterator[Interruption]:
    """An interruption for each place, until one has not happened."""
    yield Interruption(0, act, modules)  # CPython 3.13 shows instructions from the second time on
    for number in itertools.count(1):
        interruption = Interruption(number, act, modules)
        yield interruption
        if not interruption.happened:
            assert number > 3, "nothing was interrupted"
            return
