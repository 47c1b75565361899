"""Which types of values are kept, and what is said of all others.

This module knows types; it does not know how they are written.
"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Context
from types import NoneType
from typing import Any, Final

# What is written can be read again from any place in a program: some four frames to a level stay
# far below Python's limit of 1,000.
MAX_DEPTH: Final = 128

_KEPT: Final = (
    "None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, datetime, date, time, "
    "timedelta, Decimal and UUID"
)
TOO_DEEP: Final = f"contains itself, or lies more than {MAX_DEPTH} levels deep"
ALWAYS_PLAIN: Final = frozenset((NoneType, bool, str))
NUMBERS: Final = frozenset((int, float))
LEAVES: Final = ALWAYS_PLAIN | NUMBERS
# A context of our own: the caller's may write a small `e`.
DECIMALS: Final = Context(capitals=1)


def session_named(key: str | None) -> str:
    return "the session" if key is None else f"session {key!r}"


def refusal(value: object, what: str = "") -> str:
    return (
        f"is of type {what or type(value).__name__}. Kept are {_KEPT}: "
        "declare the type of the field in a subclass of Session, convert the value, or pass "
        "codec=Codec(encode, decode) to the storage."
    )


def base_value(value: Any) -> Any:
    """`value`, or what it is without its subclass if that is one of str, int, float, datetime,
    date, time or timedelta."""
    if type(value) in LEAVES or type(value) in _MOMENTS:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    for base in type(value).__mro__:
        if base in _MOMENTS:
            # As the base has them: a subclass may mean something else by these names.
            parts = {name: getattr(base, name).__get__(value) for name in _MOMENTS[base]}
            return base(**parts)
    return value


_DATE: Final = ("year", "month", "day")
_TIME: Final = ("hour", "minute", "second", "microsecond", "tzinfo", "fold")
# Taken from here, since freezegun puts its own classes into the names of modules.
_MOMENTS: Final[dict[type, tuple[str, ...]]] = {
    datetime: _DATE + _TIME,
    date: _DATE,
    time: _TIME,
    timedelta: ("days", "seconds", "microseconds"),
}
