"""Rounds in which everything takes its turn, and medians with their spread.

The numbers of one run are made on one machine in one sitting, so what they say is their ratio. A
ratio is taken within each round, where both sides saw the same machine, and then the median of it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")

# Does one thing so many times.
Work = Callable[[int], object]


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

    def __mul__(self, factor: float) -> Spread:
        return Spread(self.low * factor, self.median * factor, self.high * factor)


class Rounds:
    """Some figures, by name: one of each for every round."""

    def __init__(self, figures: Mapping[str, Sequence[float]]) -> None:
        self._figures: Final = figures

    def of(self, name: str) -> Spread:
        return Spread.of(self._figures[name])

    def ratio(self, name: str, to: str) -> Spread:
        """How many times as much as `to` the figure `name` is."""
        return Spread.of(one / other for one, other in self._pairs(name, to))

    def over(self, name: str, than: str) -> Spread:
        """How much more than `than` the figure `name` is."""
        return Spread.of(one - other for one, other in self._pairs(name, than))

    def share_over(self, name: str, than: str, of: str) -> Spread:
        """What `name` is more than `than`, as a share of `of`."""
        pairs = zip(self._pairs(name, than), self._figures[of], strict=True)
        return Spread.of((one - other) / whole for (one, other), whole in pairs)

    def _pairs(self, name: str, other: str) -> Iterator[tuple[float, float]]:
        return zip(self._figures[name], self._figures[other], strict=True)


def measure(works: Mapping[str, Work], rounds: int, slice_: float) -> Rounds:
    """Seconds for doing each work once, timed in every round for about `slice_` seconds (0: once).

    The garbage collector stays on, since a bot has it on as well; what the work before has left is
    collected first. What was there before them all is not looked at again.
    """
    times = {name: _times(work, slice_) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    if slice_:
        gc.collect()
        gc.freeze()
    for name, work in in_turns(works.items(), rounds):
        if slice_:
            gc.collect()
        begin = time.perf_counter()
        work(times[name])
        seconds[name].append((time.perf_counter() - begin) / times[name])
    gc.unfreeze()
    return Rounds(seconds)


def _times(work: Work, slice_: float) -> int:
    """How often `work` can be done in `slice_` seconds. Trying it out warms it up, too."""
    work(1)
    times, took = 1, 0.0
    while slice_:
        begin = time.perf_counter()
        work(times)
        took = time.perf_counter() - begin
        if took > slice_ / 2:
            return max(1, round(times * slice_ / took))
        times *= 2
    return times


def in_turns(cases: Iterable[T], rounds: int) -> Iterator[T]:
    """Every case in every round, each round beginning with another one."""
    every = list(cases)
    for number in range(rounds):
        first = number % len(every)
        yield from (*every[first:], *every[:first])


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


def share_of(whole: int, parts: int, number: int) -> int:
    """How much of `whole` falls to part `number` when it is shared out."""
    return whole // parts + (number < whole % parts)


def log(text: str) -> None:
    """Say what is going on, past the tables on standard output."""
    print(text, file=sys.stderr, flush=True)
