"""What is done to one actor of a run, at the k-th place where it can be done.

A trap is put into the actor's thread when it starts (`install`), counts the places that it passes
(`count`), and strikes at one of them (`hit`). The next run takes the next place, until an actor has
fewer places than that.
"""

from __future__ import annotations

import _thread
import asyncio
import dis
import os
import sys
import threading
import types
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

from engine import place
from inside import is_core


class Interrupt(BaseException):
    """Comes from outside, as an alarm or a `sys.exit` in a signal handler does."""


class Trap:
    """No trap: nothing happens."""

    #: What may come out of the actor that was hit.
    raises: tuple[type[BaseException], ...] = ()
    #: Whether the actor stands for the main thread, the one that signal handlers run in.
    warm = False

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.count = 0
        self.hit = ""  # where it has struck
        self.hits = 0  # how often
        self._pid = os.getpid()

    def install(self) -> None:
        """Begin to count in this thread."""

    def remove(self) -> None:
        """End it."""

    def wrap(self, coroutine: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        """A coroutine of the actor, with the trap in it."""
        return coroutine

    def _is_here(self) -> bool:
        """Whether this is the place. What a child of the actor's process does is not looked at."""
        if os.getpid() != self._pid:
            return False
        self.count += 1
        return self.count == self.at


class AtLine(Trap):
    """Strikes at the k-th line of the core that the actor comes to; `then` lines later again."""

    def __init__(
        self,
        at: int,
        strike: Callable[[str], None],
        then: int = 0,
        counts: Callable[[types.CodeType], bool] = is_core,
    ) -> None:
        super().__init__(at)
        self._strike = strike
        self._then = then
        self._counts = counts

    def install(self) -> None:
        sys.settrace(self._call)

    def remove(self) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        return self._line if self._counts(frame.f_code) else None

    def _line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line" and self._is_here():
            self.hit += f", then {_place_of(frame)}" if self.hit else _place_of(frame)
            self.hits += 1
            self.at, self._then = (self.at + self._then, 0) if self._then else (0, 0)
            self._strike(_place_of(frame))
        return self._line


# While these wait, a signal handler may run and raise: then they have done nothing.
_WAITS = {"acquire", "sleep", "select", "poll"}


class Signal(AtLine):
    """Runs a signal handler at the k-th line that a handler of CPython can come before.

    It runs them when a function begins, after a call, and when it jumps back: not, for example,
    between a lock's `__enter__` and what the body of the `with` does before it calls something.
    """

    warm = True

    def install(self) -> None:
        sys._getframe().f_trace_opcodes = True  # before settrace(): CPython 3.12 looks only there
        super().install()

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if not self._counts(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        code, may_come = frame.f_code.co_code, True

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal may_come
            if event == "opcode":
                may_come |= code[frame.f_lasti] in _CHECKS
            elif event == "line" and may_come:
                may_come = False
                self._line(frame, event, arg)
            return step

        return step


_CHECKS = {
    number
    for name, number in dis.opmap.items()
    if name.startswith(("RESUME", "CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "SEND", "YIELD"))
}


class AtCall(Trap):
    """Raises where CPython itself raises what comes from outside: when a function begins, and when
    one that is written in C has returned or waits.

    A profiler is told of just these places, and what it raises comes out of the call itself. (From
    a line, or from the opcode after the call, it could come between `lock.__enter__` and the body
    of its `with`, or after the end of the `try` around the call: no signal ever does.)
    """

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__(at)
        self.raises = (error,)

    def install(self) -> None:
        sys.setprofile(self._event)

    def remove(self) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if (
            is_core(frame.f_code)
            and (
                event == "c_return"
                or (event == "call" and _may_be_interrupted(frame))
                or (event == "c_call" and arg.__name__ in _WAITS)
            )
            and self._is_here()
        ):
            self.hit = f"{_place_of(frame)} ({event} {getattr(arg, '__name__', '')})"
            raise self.raises[0]


_RESUME = dis.opmap["RESUME"]


def _may_be_interrupted(frame: FrameType) -> bool:
    """Not where a coroutine comes back from an `await`."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return code[at] == _RESUME and code[at + 1] & 3 < 2


class AtSuspension(Trap):
    """Strikes when a coroutine is suspended for the k-th time; with k = 1 before its first step."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__(at)
        self.how = how
        self.raises = (asyncio.CancelledError,)
        self.loop_ends = ""  # how the loop ends

    def wrap(self, coroutine: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        return self._wrapped(coroutine)

    async def _wrapped(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await self._steps(coroutine)

    @types.coroutine
    def _steps(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        answer: Any = None
        error: BaseException | None = None
        try:
            while True:
                try:
                    if error is None:
                        waits_for = coroutine.send(answer)
                    else:
                        error, given = None, error
                        waits_for = coroutine.throw(given)
                except StopIteration as end:
                    return end.value
                if self._is_here():
                    self._strike()
                try:
                    answer = yield waits_for
                except GeneratorExit:
                    raise
                except BaseException as thrown:
                    error = thrown
        finally:
            coroutine.close()

    def before_first_step(self, task: asyncio.Task[Any]) -> None:
        """The task was made."""
        if self._is_here():
            self._strike(task)

    def _strike(self, task: asyncio.Task[Any] | None = None) -> None:
        self.hit = f"suspension {self.count}"
        if self.how == "cancel":
            task = task or asyncio.current_task()
            assert task is not None
            task.cancel()
        else:
            self.loop_ends = self.how
            asyncio.get_running_loop().stop()


class AtStart(Trap):
    """The core's k-th thread cannot be started; k = 0 stands for the first 40."""

    raises = (RuntimeError,)

    def install(self) -> None:
        self._real = [getattr(module, name) for module, name in _STARTS]
        for (module, name), real in zip(_STARTS, self._real, strict=True):
            setattr(module, name, self._instead_of(real))

    def remove(self) -> None:
        for (module, name), real in zip(_STARTS, self._real, strict=True):
            setattr(module, name, real)

    def _instead_of(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def start(*args: Any, **kwargs: Any) -> Any:
            if _is_from_core():
                here = self._is_here()
                if here or (self.at == 0 and self.count <= 40):
                    self.hit = f"start {self.count}"
                    raise RuntimeError("can't start new thread")
            return real(*args, **kwargs)

        return start


# Where the core, and `threading` for it, finds what starts a thread.
_STARTS = [
    (_thread, "start_new_thread"),
    (
        threading,
        "_start_joinable_thread" if sys.version_info >= (3, 13) else "_start_new_thread",
    ),
]


def _is_from_core() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and not is_core(frame.f_code):
        frame = frame.f_back
    return frame is not None


def _place_of(frame: FrameType) -> str:
    return place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
