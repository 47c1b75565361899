"""What a command prints: a table where a terminal looks, plain lines or JSON where a pipe does.

Keys and names may hold anything, so they are never taken for a terminal's or rich's commands.

This module knows terminals; it knows no store and no session.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import click

#: The columns of a table, and how each value looks in a table.
Columns: TypeAlias = Mapping[str, Callable[[Any], str]]

_AT_ONCE: Final = 500  # rows of a table, which has to know them all
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))

json_option: Final = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object in each line."
)


def plain(text: str) -> str:
    r"""`text` with nothing in it that a terminal would obey, in one line.

    >>> print(plain("user:1\x1b[2J"))
    user:1\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def seconds(number: float | None) -> str:
    """How long something takes, for a reader.

    >>> seconds(12), seconds(7200), seconds(200_000)
    ('12 s', '2 h', '2 d')
    """
    if number is None:
        return ""
    for unit, name in _UNITS:
        if number >= 2 * unit:
            return f"{number / unit:.0f} {name}"
    return f"{number:.0f} s"


def size(number: float) -> str:
    """A number of bytes, for a reader.

    >>> size(12), size(20_000)
    ('12 B', '19.5 KiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def is_terminal() -> bool:
    """Whether a terminal shows what is printed."""
    return sys.stdout.isatty()


def print_json(value: Any) -> None:
    """One object in one line; no character in it that a terminal would obey."""
    click.echo(json.dumps(value))


def print_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Columns,
    as_json: bool,
    title: str = "",
    colour: Callable[[Mapping[str, Any]], str] = lambda row: "",
) -> None:
    """Print `rows`: as JSON, as a table, or with a tab between two columns, without a heading and
    with numbers as they are."""
    if is_terminal() and not as_json:
        rows = iter(rows)
        while page := list(itertools.islice(rows, _AT_ONCE)):
            _print_table(page, columns, title, colour)
        return
    for row in rows:
        if as_json:
            print_json(row)
        else:
            click.echo("\t".join(_cell(row[name]) for name in columns))


def _cell(value: Any) -> str:
    return "" if value is None else plain(str(value))


def _print_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Columns,
    title: str,
    colour: Callable[[Mapping[str, Any]], str],
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(plain(title)) if title else None)
    for name, looks in columns.items():
        is_number = looks in (seconds, size)
        table.add_column(
            name.replace("_", " "), justify="right" if is_number else "left", overflow="fold"
        )
    for row in rows:
        cells = (Text(plain(looks(row[name]))) for name, looks in columns.items())
        table.add_row(*cells, style=colour(row))
    Console().print(table)


def text(value: Any) -> str:
    """A value as it is, and nothing for None."""
    return "" if value is None else str(value)


@contextmanager
def progress(
    what: str, total: Callable[[], int] | None = None, *, hidden: bool = False
) -> Generator[Callable[[], None], None, None]:
    """A bar for something that takes long, on a terminal; what is yielded is to be called after
    each piece. `total` counts them, and is called only if the bar is shown. `hidden`: none."""
    if hidden or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None if total is None else total())
        yield lambda: bar.advance(task)
