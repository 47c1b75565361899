"""What the scripts share: rounds that take turns, medians with their spread, and tables.

The numbers of one run are made on one machine in one sitting, so what they say is their ratio. A
ratio is taken within each round, where both sides saw the same machine, and then the median of it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_PEERS: Final = ("session-sync", "pyTelegramBotAPI", "cachetools", "msgspec", "diskcache", "redis")


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, between their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        values = list(numbers)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        """`1.20 (1.18 to 1.25)`, each number times `scale`."""
        low, median, high = (f"{n * scale:,.{digits}f}" for n in (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Case:
    """One thing to be timed: `work(times)` does it `times` times."""

    name: str
    work: Callable[[int], object]
    times: int


class Timings:
    """Seconds for doing each case once, by round."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds: Final = seconds

    def of(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        """How many times as long as `to` the case `name` takes."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Spread.of(one / other for one, other in pairs)


def measure(cases: Sequence[Case], rounds: int) -> Timings:
    """Time every case in every round, starting with another one each time.

    The garbage collector stays on, since a bot has it on as well; what the case before has left is
    collected first. Each case is done once before the first round, to warm up.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        case.work(max(1, case.times // 10))
    for number in range(rounds):
        first = number % len(cases)
        for case in (*cases[first:], *cases[:first]):
            gc.collect()
            begin = time.perf_counter()
            case.work(case.times)
            seconds[case.name].append((time.perf_counter() - begin) / case.times)
    return Timings(seconds)


def in_threads(threads: int, run: Callable[[int], object]) -> float:
    """Seconds from the moment in which all threads are there until the last one has done `run`,
    which is given the thread's number."""
    begin: list[float] = []
    # By the barrier, not after it: the main thread would have to wait for its turn of the GIL.
    start = threading.Barrier(threads, action=lambda: begin.append(time.perf_counter()))
    ends: list[float] = []

    def work(number: int) -> None:
        start.wait()
        run(number)
        ends.append(time.perf_counter())

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if len(ends) < threads:
        raise RuntimeError("a thread failed; its traceback is above")
    return max(ends) - begin[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its columns padded, so that it reads well in a terminal too."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(map(str.ljust, line, widths)) + " |"  # one line of the table
        for line in lines
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of the command line with what all scripts have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31, help="how often everything is measured")
    return parser


def print_machine(rounds: int) -> None:
    """Where and with what this was measured."""
    print(f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}")
    print(f"{platform.python_implementation()} {platform.python_version()}, {_versions()}")
    if hasattr(os, "getloadavg"):
        print(f"load before the start {os.getloadavg()[0]:.1f}", end="; ")
    print(f"median of {rounds} rounds (quartiles)\n", flush=True)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith("model name")).split(": ")[1][:-1]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> str:
    found = []
    for name in _PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name == "session-sync":
                from session_sync import __version__

                found.append(f"{name} {__version__}")
    return ", ".join(found)


def log(text: str) -> None:
    """Say what is going on, past the tables on standard output."""
    print(text, file=sys.stderr, flush=True)
