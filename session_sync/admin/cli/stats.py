"""`stats`: how many sessions there are, how large and how old.

This module knows sizes and ages; it decodes no session.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import click

from ...storages.base import StoredEntry
from .output import (
    is_terminal,
    json_option,
    plain,
    print_json,
    print_rows,
    progress,
    seconds,
    size,
    text,
)
from .store import View, with_view

_SMALLEST: Final = 64  # bytes, of the first class of sizes; each next one takes four times as much
_BAR: Final = 40  # characters


@click.command()
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    metavar="N",
    help="How many of the largest and the oldest to name.",
)
@json_option
@with_view
def stats(view: View, limit: int, as_json: bool) -> None:
    """Count the sessions, and show how large and how old they are.

    None is read or touched.
    """
    entries: list[StoredEntry] = []
    with progress("measured") as advance:
        for entry in view.entries():
            entries.append(entry._replace(age=_rounded(entry.age), left=_rounded(entry.left)))
            advance()
    classes = _classes(entries)
    largest = heapq.nlargest(limit, entries, key=lambda entry: entry.size)
    oldest = heapq.nlargest(limit, filter(_has_age, entries), key=_age)
    total = sum(entry.size for entry in entries)
    numbers = {"sessions": len(entries), "total": total, "average": _average(entries)}
    if as_json:
        _print_json(numbers, classes, largest, oldest)
    elif is_terminal():
        _print_tables(numbers, classes, largest, oldest)
    else:
        _print_lines(numbers, classes, largest, oldest)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _average(entries: Sequence[StoredEntry]) -> int:
    return round(sum(entry.size for entry in entries) / len(entries)) if entries else 0


def _classes(entries: Sequence[StoredEntry]) -> dict[int, int]:
    """How many sessions take no more than so many bytes, and more than the class before."""
    found = Counter(_class_of(entry.size) for entry in entries)
    classes: dict[int, int] = {}
    bound = _SMALLEST
    while found and bound <= max(found):
        if classes or found[bound]:
            classes[bound] = found[bound]
        bound *= 4
    return classes


def _class_of(number: int) -> int:
    bound = _SMALLEST
    while number > bound:
        bound *= 4
    return bound


def _has_age(entry: StoredEntry) -> bool:
    return entry.age is not None or entry.left is not None


def _age(entry: StoredEntry) -> tuple[float, float]:
    """By age; and where the store does not note it, by the time that is left: the session with the
    least was not used for the longest, since all are given the same."""
    return entry.age or 0.0, -(entry.left or 0.0)


def _print_json(
    numbers: dict[str, int],
    classes: dict[int, int],
    largest: list[StoredEntry],
    oldest: list[StoredEntry],
) -> None:
    print_json(
        {
            **numbers,
            "histogram": [{"up_to": bound, "sessions": n} for bound, n in classes.items()],
            "largest": [{"key": entry.key, "size": entry.size} for entry in largest],
            "oldest": [
                {"key": entry.key, "age": entry.age, "expires_in": entry.left} for entry in oldest
            ],
        }
    )


def _print_lines(
    numbers: dict[str, int],
    classes: dict[int, int],
    largest: list[StoredEntry],
    oldest: list[StoredEntry],
) -> None:
    lines: list[tuple[Any, ...]] = [*numbers.items()]
    lines += [("histogram", bound, number) for bound, number in classes.items()]
    lines += [("largest", plain(entry.key), entry.size) for entry in largest]
    lines += [("oldest", plain(entry.key), entry.age, entry.left) for entry in oldest]
    for line in lines:
        click.echo("\t".join("" if part is None else str(part) for part in line))


def _print_tables(
    numbers: dict[str, int],
    classes: dict[int, int],
    largest: list[StoredEntry],
    oldest: list[StoredEntry],
) -> None:
    sizes = {"sessions": text, "total": size, "average": size}
    print_rows([numbers], sizes, False)
    most = max(classes.values(), default=0)
    bars = (
        {"up_to": bound, "sessions": number, "": "█" * -(-number * _BAR // most)}
        for bound, number in classes.items()
    )
    print_rows(bars, {"up_to": size, "sessions": text, "": text}, False, title="Sizes")
    big = ({"key": entry.key, "size": entry.size} for entry in largest)
    print_rows(big, {"key": text, "size": size}, False, title="Largest")
    old = ({"key": e.key, "age": e.age, "expires_in": e.left} for e in oldest)
    columns = {"key": text, "age": seconds, "expires_in": seconds}
    print_rows(old, columns, False, title="Oldest")
