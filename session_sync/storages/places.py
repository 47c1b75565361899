"""Words for the place of a value inside a session: `cart.items[2]`.

A value's own keys may be private, but they are how its owner finds it: keys may appear in messages,
values never do.

This module knows values and their places; it knows no session.
"""

from __future__ import annotations

_MIN_INT = -(2**63)
_MAX_INT = 2**63 - 1


def short(text: str) -> str:
    """`text` in quotes, not too long."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


def step(key: object) -> str:
    """The way from a dict to the value under `key`."""
    if type(key) is str:
        return f".{key}" if key.isidentifier() and len(key) <= 40 else f"[{short(key)}]"
    if key is None or (isinstance(key, int) and _MIN_INT <= key <= _MAX_INT):
        return f"[{key}]"
    return f"[<{type(key).__name__}>]"


def path(steps: list[str]) -> str:
    """The whole way from a session to a value; `steps` has the last one first."""
    way = steps[::-1]
    if len(way) > 12:
        way[6:-6] = [" ... "]
    return "".join(way).removeprefix(".")


def place_of(wanted: object, fields: dict[str, object]) -> str:
    """The way to a container that lies in one of these fields; empty if it lies in none."""
    ways: list[tuple[object, list[str]]] = [(value, [step(name)]) for name, value in fields.items()]
    seen: set[int] = set()
    while ways:
        value, steps = ways.pop()
        if value is wanted:
            return path(steps)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            ways += [(item, [step(key), *steps]) for key, item in value.copy().items()]
        elif isinstance(value, (list, tuple)):
            ways += [(item, [f"[{at}]", *steps]) for at, item in enumerate(tuple(value))]
    return ""
