"""An exception that comes from outside, at a chosen place of a storage's own code.

This module knows where CPython lets one come in; it does not know what a storage must do then.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Final

# Their functions are called by the interpreter, which drops what they raise.
_CALLBACKS: Final = ("weakref", "_weakrefset")


class Interrupted(BaseException):
    """What a signal handler raises."""


class Interruption:
    """Raises at the `at`-th place that this thread comes to in the package of a record, and counts
    the places: where a function begins, and where a call of C code has ended.

    Between two of them, CPython runs no signal handler (but at the end of a round of a loop). Not
    in finalisers, out of which no exception comes.
    """

    def __init__(self, opened: Any, at: int) -> None:
        self.places = 0
        self._at: Final = at
        self._package: Final = type(opened).__module__.partition(".")[0]

    def __enter__(self) -> Interruption:
        self._before = sys.getprofile()
        sys.setprofile(self._step)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.setprofile(self._before)

    def _step(self, frame: FrameType, event: str, _arg: Any) -> None:
        if event == "call":
            is_place = self._is_ours(frame) or self._is_ours(frame.f_back)
        else:
            is_place = event == "c_return" and self._is_ours(frame)
        if is_place and not _is_finalising(frame):
            self.places += 1
            if self.places == self._at:
                raise Interrupted

    def _is_ours(self, frame: FrameType | None) -> bool:
        name: str = "" if frame is None else frame.f_globals.get("__name__", "")
        is_suite = name.startswith(f"{__package__}.")
        return name.partition(".")[0] == self._package and not is_suite


def _is_finalising(frame: FrameType | None) -> bool:
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "__del__" or module in _CALLBACKS:
            return True
        frame = frame.f_back
    return False
