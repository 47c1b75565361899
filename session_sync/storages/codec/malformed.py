"""What is wrong with a stored value, and the checks that find it.

This module knows what was expected; it does not know how any type is written. The words that it
finds never contain the value.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")
C = TypeVar("C", bound=Collection[Any])

# What the parsers and constructors used here raise about a value. No more than that: the rest comes
# from a signal handler, say, and has to come out as it is.
MALFORMED: Final = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    msgspec.MsgspecError,
)


class MalformedError(Exception):
    """What is wrong with a stored value, in words that do not contain it."""


def expect(kind: type[T], body: Any) -> T:
    if type(body) is not kind:
        raise MalformedError(f"has a tag around something that is no {kind.__name__}")
    return body


def same(value: T, written: object, body: object) -> T:
    """`value`, if it would be written as it was found: many constructors take more than that."""
    if written != body:
        raise MalformedError(f"has a malformed {type(value).__name__}")
    return value


def complete(values: C, body: list[Any]) -> C:
    if len(values) != len(body):
        raise MalformedError(f"has a {type(values).__name__} with something in it twice")
    return values
