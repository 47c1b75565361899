"""Measures this library next to its peers, in one run: see docs/benchmarks.md.

python -m benchmarks                       everything, as tables
python -m benchmarks update users          two sections of it
python -m benchmarks --out results         and JSON with plots in the folder `results`
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .machine import machine, today, versions
from .results import Results
from .sections import (
    bots,
    locks,
    partial,
    processes,
    reading,
    targets,
    threads,
    typed,
    update,
    users,
)
from .setting import MissingError, Setting, redis_server
from .tables import Table
from .timing import log

DOCS: Final = Path(__file__).parent.parent / "docs" / "benchmarks"

SECTIONS: Final[dict[str, Callable[[Setting], list[Table]]]] = {
    "update": update.run,
    "partial": partial.run,
    "threads": threads.run,
    "users": users.run,
    "bots": bots.run,
    "processes": processes.run,
    "typed": typed.run,
    "reading": reading.run,
    "locks": locks.run,
}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped
    options = _options()
    if options.list:
        for name, run in SECTIONS.items():
            said = (sys.modules[run.__module__].__doc__ or "").partition("\n")[0]
            print(f"{name:12}{said}")
    elif options.render:
        _render(Results.load(DOCS), DOCS)
    else:
        try:
            results = _measure(options)
        except MissingError as error:
            sys.exit(str(error))
        if options.docs:
            results.save(DOCS)
            _render(Results.load(DOCS), DOCS)  # as it was saved, which is rounded
        elif options.out is not None:
            results.save(options.out)
            _plot(results, options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Tables go to standard output, what is going on to standard error.",
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help="what to measure; by default everything"
    )
    parser.add_argument("--list", action="store_true", help="say which sections there are")
    parser.add_argument("--rounds", type=int, default=25, help="how often everything is measured")
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    parser.add_argument(
        "--users", type=int, default=1_000_000, help="how many there are in the largest store"
    )
    parser.add_argument(
        "--redis-server", metavar="PATH", default="redis-server", help="the program to start"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results.json and plots there"
    )
    parser.add_argument(
        "--docs", action="store_true", help="measure everything for the docs, and write them"
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="write the tables and plots of the docs again, from their results.json",
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.docs and (options.quick or options.sections):
        parser.error("--docs measures all sections, and not quickly")
    return options


def _measure(options: argparse.Namespace) -> Results:
    rounds = 1 if options.quick else options.rounds
    results = Results(
        date=today(),
        machine=machine(),
        versions=versions(options.redis_server),
        options={"rounds": rounds, "users": options.users, "quick": options.quick},
        skipped={},
        tables=[],
    )
    with redis_server(options.redis_server) as redis_url:
        setting = Setting(rounds, options.quick, options.users, redis_url, results.skipped)
        if redis_url is None:
            setting.skip("Redis", f"{options.redis_server} was not found")
        for name in options.sections or SECTIONS:
            log(f"{name} ...")
            tables = SECTIONS[name](setting)
            results.tables += tables
            for table in tables:
                _print(table)
    targets_of_it = targets.of(results.tables)
    if targets_of_it.rows:
        results.tables.append(targets_of_it)
        _print(targets_of_it)
    print(results.provenance())
    return results


def _print(table: Table) -> None:
    print(f"{table.title} [{table.name}]\n\n{table.markdown()}\n\n{table.note}\n", flush=True)


def _plot(results: Results, folder: Path) -> None:
    try:
        from . import plots
    except ImportError as error:
        log(f"left out: the plots, since {error}; the extra 'bench' has matplotlib")
        return
    plots.draw(results, folder)


def _render(results: Results, folder: Path) -> None:
    from .pages import render_pages

    render_pages(results)
    _plot(results, folder)


if __name__ == "__main__":
    main()
