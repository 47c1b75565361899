"""Plots of a run's tables, as SVG: the same tables give the same bytes.

They have a white ground of their own, so that they can be read on a dark page, too, and keep their
text as text, which makes them small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .results import Results
from .tables import Table, shown
from .timing import Spread

_OURS, _PEER, _FLOOR = "#2a6fb0", "#c98a3a", "#9a9a9a"
_SHADES: Final = ("#9a9a9a", "#2a6fb0", "#5d9fd6", "#a5c9e8")
_MARKERS: Final = "os^Dvx*P"
_WIDTH: Final = 7.2  # inches
_STYLE: Final[Any] = {
    "svg.hashsalt": "session_sync",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "legend.frameon": False,
}
_NO_METADATA: Final[dict[str, Any]] = {"Date": None, "Creator": None}


def draw(results: Results, folder: Path) -> None:
    """Write every plot whose table was measured into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            table = results.table(name)
            if table is not None:
                figure = plot(table)
                path = folder / f"{name}.svg"
                figure.savefig(path, facecolor="white", metadata=_NO_METADATA)


def _figure(height: float, panels: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _at(table: Table, row: str, column: int = 1) -> Spread:
    found = table.at(row, table.head[column])
    assert found is not None, "the row is from this table"
    return found


# -- what an update takes on each side


def _bars(table: Table) -> Figure:
    names = [str(row[0]) for row in table.rows]
    figure, (axes,) = _figure(0.26 * len(names) + 0.7)
    medians = [_at(table, name).median for name in names]
    bars = axes.barh(names, medians, color=[_colour(name) for name in names], height=0.7)
    axes.bar_label(bars, [shown(median) for median in medians], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds for one update (median)")
    axes.set_title(table.title)
    return figure


def _colour(name: str) -> str:
    if name.startswith("session_sync"):
        return _OURS
    return _FLOOR if name.startswith(("bare", "with lock")) else _PEER


# -- something by a number, which ends the names of the rows


def _lines(table: Table) -> dict[str, list[int]]:
    """Names without their number, and the numbers that they have."""
    lines: defaultdict[str, list[int]] = defaultdict(list)
    for row in table.rows:
        name, _, number = str(row[0]).rpartition(", ")
        lines[name].append(int(number.replace(",", "")))
    return lines


def _by_workers(what: str) -> Callable[[Table], Figure]:
    """Updates per second by the number of `what`; what was not kept stands at its point."""

    def plot(table: Table) -> Figure:
        figure, panels = _figure(3.6, panels=2)
        for axes, keys in zip(panels, ("different keys", "one key"), strict=True):
            for name, numbers in _lines(table).items():
                side, _, on = name.rpartition(", ")
                if on == keys:
                    _draw_side(axes, table, name, side, numbers)
            axes.set_xscale("log", base=2)
            axes.set_xticks(numbers, [str(number) for number in numbers])
            _scale(axes)
            axes.set_xlabel(what)
            axes.set_title(f"{keys}: updates per second")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure

    return plot


def _draw_side(axes: Any, table: Table, name: str, side: str, numbers: list[int]) -> None:
    medians = [_at(table, f"{name}, {number}").median for number in numbers]
    marker = _MARKERS[len(axes.lines) % len(_MARKERS)]
    axes.plot(numbers, medians, marker=marker, color=_colour(side), label=side, linewidth=1)
    for number, median in zip(numbers, medians, strict=True):
        kept = _at(table, f"{name}, {number}", 3).median
        if kept < 100:
            text = f"{kept:.0f} % kept"
            axes.annotate(text, (number, median), (0, 5), textcoords="offset points", ha="right")


def _scale(axes: Any) -> None:
    """A logarithmic scale with plain numbers at it."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _by_users(table: Table) -> Figure:
    figure, (axes,) = _figure(3.2)
    for (name, numbers), marker in zip(_lines(table).items(), _MARKERS, strict=False):
        for column, colour, side in ((1, _OURS, "session_sync"), (2, _FLOOR, "bare store")):
            medians = [_at(table, f"{name}, {number:,}", column).median for number in numbers]
            axes.plot(
                numbers, medians, marker=marker, color=colour, label=f"{side}, {name}", linewidth=1
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _scale(axes)
    axes.set_xlabel("users stored")
    axes.set_title("microseconds for one update of a random user")
    figure.legend(loc="outside right upper")
    return figure


# -- whole bots


def _bots(table: Table) -> Figure:
    clients: defaultdict[str, list[str]] = defaultdict(list)
    for row in table.rows:
        client, _, store = str(row[0]).rpartition(", ")
        clients[client].append(store)
    figure, (axes,) = _figure(0.62 * len(clients) + 0.9)
    for number, (client, stores) in enumerate(clients.items()):
        most = _at(table, f"{client}, {stores[0]}").median
        for place, store in enumerate(stores):
            speed = _at(table, f"{client}, {store}").median
            bar = axes.barh(
                number + 0.2 * place,
                100 * speed / most,
                height=0.18,
                color=_SHADES[place],
                label="" if number else store,
            )
            axes.bar_label(bar, [shown(round(speed))], padding=3, fontsize=7)
    axes.set_yticks([number + 0.3 for number in range(len(clients))], list(clients))
    axes.invert_yaxis()
    axes.set_xlabel("% of the updates per second without sessions; at the bars: updates per second")
    axes.set_title(table.title)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# The name of a plot is that of its table.
PLOTS: Final[dict[str, Callable[[Table], Figure]]] = {
    "update_memory_small": _bars,
    "update_disk_small": _bars,
    "update_redis_small": _bars,
    "threads_memory": _by_workers("threads"),
    "processes": _by_workers("processes"),
    "users": _by_users,
    "bots": _bots,
}
