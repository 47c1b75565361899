"""A table of results as data, and its two forms: markdown for people, JSON to make plots of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .timing import Spread

# What a column's numbers count (microseconds, bytes, a ratio) stands in its head.
Cell: TypeAlias = str | float | Spread


@dataclass(frozen=True)
class Table:
    """Rows under a head, the first cell of each being its name. The table's own name begins with
    that of its section; `note` is one line on how to read it."""

    name: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def section(self) -> str:
        return self.name.partition("_")[0]

    def at(self, row: str, column: str) -> Spread | None:
        """The figure in a row and a column, or None if that row was left out."""
        place = self.head.index(column)
        for cells in self.rows:
            if cells[0] == row and not isinstance(cells[place], str):
                return _spread(cells[place])
        return None

    def as_json(self) -> dict[str, Any]:
        rows = [[_cell_as_json(cell) for cell in row] for row in self.rows]
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "head": list(self.head),
            "rows": rows,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Table:
        rows = tuple(tuple(_cell_from_json(cell) for cell in row) for row in data["rows"])
        return cls(data["name"], data["title"], data["note"], tuple(data["head"]), rows)

    def markdown(self) -> str:
        """A markdown table, its columns padded, so that it reads well in a terminal too."""
        lines = [self.head, *(tuple(map(shown, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * max(3, width) for width in widths))
        return "\n".join(
            "| " + " | ".join(map(str.ljust, line, widths)) + " |"  # one line of the table
            for line in lines
        )


def table(
    name: str, title: str, note: str, head: Iterable[str], rows: Iterable[Iterable[Cell]]
) -> Table:
    """A table made of whatever can be looped over."""
    return Table(name, title, note, tuple(head), tuple(tuple(row) for row in rows))


def shown(cell: Cell) -> str:
    """A cell as text: `8.70 (8.61 to 8.93)`."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Spread):
        low, median, high = map(_number, (cell.low, cell.median, cell.high))
        return median if low == median == high else f"{median} ({low} to {high})"
    return _number(cell)


def _number(value: float) -> str:
    """Three digits that count, or all of a whole number."""
    size = abs(value)
    if size >= 100 or isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.4f}"


def _spread(cell: float | Spread | str) -> Spread:
    if isinstance(cell, Spread):
        return cell
    return Spread(float(cell), float(cell), float(cell))


def _cell_as_json(cell: Cell) -> Any:
    if isinstance(cell, Spread):
        return {
            name: float(f"{value:.6g}")
            for name, value in (("low", cell.low), ("median", cell.median), ("high", cell.high))
        }
    return cell


def _cell_from_json(cell: Any) -> Cell:
    return Spread(**cell) if isinstance(cell, dict) else cell
