"""What this library is to reach, and what was measured: made of the tables of the same run."""

from __future__ import annotations

from collections.abc import Iterable

from ..tables import Cell, Table, table


def of(tables: Iterable[Table]) -> Table:
    """Every target whose section was measured."""
    rows: list[tuple[Cell, ...]] = []
    return table("targets", "Targets", "", ("target", "at most", "measured", "met"), rows)
