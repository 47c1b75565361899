"""Runs a scene again and again, with the trap at one place after the other.

All that is done to one actor of one scene is done in a forked child: what hangs there, or is left
behind, is in nobody's way.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any

import inside
from engine import HangError, describe
from model import SOON, World
from scenes import SCENES, STORES
from traps import AtCall, AtLine, AtStart, AtSuspension, Interrupt, Signal, Trap

from session_sync import SessionError

CHILD_LIMIT = 3600.0  # seconds for all runs of one child
SLOW = 3.0  # seconds that a signal handler must not take
_ALL = sys.maxsize


@dataclass(frozen=True)
class Job:
    """What is done to whom."""

    scene: str
    mode: str
    victim: str
    store: str

    @property
    def name(self) -> str:
        """What pytest calls it."""
        return "-".join((self.scene, self.mode, self.victim, self.store)).replace(" ", "_")

    def __str__(self) -> str:
        return f"{self.scene} {self.mode.replace(' ', '-')} {self.victim} --store {self.store}"


@dataclass
class Found:
    """What came of one run."""

    place: int  # the number of the place where the trap struck
    then: int = 0  # and how much later it struck again
    hits: int = 0
    count: int = 0  # how many places there were
    where: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What came of a job."""

    job: Job
    runs: int = 0
    places: int = 0
    stride: int = 1
    failures: list[Found] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.job}: {self.runs} runs, {self.places} places, every {self.stride}."
        for found in self.failures:
            text += (
                f"\n\nat {found.where}:\n" + "\n".join(found.problems) + "\nAgain: python "
                f"tests/explorer/run.py {self.job} --place {found.place}"
                + (f" --then {found.then}" if found.then else "")
            )
        return text


# -- the modes: each makes a trap for the k-th place; `then` is for a second stop in the same run

_MODES: dict[str, Callable[[World, Job, int, int], Trap]] = {
    "stop": lambda w, job, k, then: AtLine(k, w.run.stop, then, SCENES[job.scene].counts),
    # A loop drops what else a callback raises; only this one (and SystemExit) ends it.
    "raise": lambda w, job, k, _: AtCall(k, SystemExit if job.victim in w.loops else Interrupt),
    "ctrl-c": lambda w, job, k, _: AtCall(k, KeyboardInterrupt),
    "collect": lambda w, job, k, _: AtLine(k, lambda where: _collect()),
    "signal": lambda w, job, k, _: Signal(k, lambda where: _in_handler(w, _add_same)),
    "signal other": lambda w, job, k, _: Signal(k, lambda where: _in_handler(w, _add_other)),
    "signal flush": lambda w, job, k, _: Signal(k, lambda where: _in_handler(w, _flush)),
    "signal release": lambda w, job, k, _: Signal(k, lambda where: _in_handler(w, _release)),
    "cancel": lambda w, job, k, _: AtSuspension(k, "cancel"),
    "loop closed": lambda w, job, k, _: AtSuspension(k, "closed"),
    "loop thrown away": lambda w, job, k, _: AtSuspension(k, "thrown away"),
    "no thread": lambda w, job, k, _: AtStart(k),
}  # fmt: skip

#: What a mode of a scene stands for.
KINDS: dict[str, tuple[str, ...]] = {
    "raise": ("raise", "ctrl-c"),
    "signal": ("signal", "signal other", "signal flush", "signal release"),
    "cancel": ("cancel", "loop closed", "loop thrown away"),
}


def _collect() -> None:
    gc.collect()


def _abandon(world: World, key: str) -> None:
    """A scope that was entered and never left, in a cycle that only a collection frees; and a
    collection by another thread, in case that the victim waits for it."""

    def work() -> None:
        scope = world.sessions.session_scope(key)
        scope.__enter__()
        cycle: list[Any] = [scope]
        cycle.append(cycle)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    def collector() -> None:
        world.pause()
        gc.collect()

    world.thread("collector", collector)


def _in_handler(world: World, work: Callable[[World], None]) -> None:
    """What a signal handler does must end, at once."""
    begin = time.monotonic()
    with suppress(SessionError):
        work(world)
    took = time.monotonic() - begin
    if took > SLOW:
        world.problems.append(f"the signal handler took {took:.1f} s")


def _add_same(world: World) -> None:
    for key in sorted(world.keys) or ["k"]:
        world.add(key, group=f"{key}, signal", joins=True)


def _add_other(world: World) -> None:
    world.add("other")


def _flush(world: World) -> None:
    _call_sessions(world, "flush")


def _release(world: World) -> None:
    _call_sessions(world, "release")


def _call_sessions(world: World, method: str) -> None:
    for session in list(world.open):
        getattr(session, method)()


# -- one run


def run_once(job: Job, place: int, then: int = 0) -> Found:
    """Run the scene with the trap at the `place`-th place; -1: with none."""
    scene = SCENES[job.scene]
    world = World(STORES[job.store](), job.victim, scene.options)
    world.allowed = (*scene.allowed, *((SessionError,) if "signal" in job.mode else ()))
    scene.build(world)
    trap = world.trap = _MODES[job.mode](world, job, place, then)
    world.is_exclusive = job.mode != "signal release"
    if job.mode == "collect":
        _abandon(world, "k")
    found = Found(place, then)
    try:
        world.run.go()
        found.problems = world.check()
    except HangError as error:
        found.problems = [f"HANG: {error}"]
    found.where, found.hits, found.count = trap.hit, trap.hits or bool(trap.hit), trap.count
    if found.problems:
        found.problems += [f"({name}: {error})" for name, error in world.outcomes.items()]
    if found.problems:  # whose stacks keep everything alive
        return found
    world.sessions.close()
    del world, trap
    # Soon: a thread may still have one that it has just closed.
    end = time.monotonic() + SOON
    while (alive := _scopes_after_gc()) and time.monotonic() < end:
        time.sleep(0.01)
    if alive:
        found.problems.append(f"still in memory: {', '.join(alive)}")
    found.problems += _unraisable
    _unraisable.clear()
    return found


def _scopes_after_gc() -> list[str]:
    gc.collect()
    return inside.scopes_alive()


_unraisable: list[str] = []


def _note_unraisable(args: Any) -> None:
    error = args.exc_value
    if isinstance(error, (Interrupt, KeyboardInterrupt, SystemExit)):
        return  # it came in a finaliser, and Python itself drops it
    if any(inside.PACKAGE in Path(f.filename).parents for f in extract_tb(error.__traceback__)):
        _unraisable.append(f"unraisable in {args.object!r}: {describe(error)}")


def _note_in_thread(args: Any) -> None:
    _unraisable.append(f"in thread {args.thread.name}: {describe(args.exc_value)}")


# -- all runs of a job


def explore(job: Job, limit: int = _ALL, keep_going: bool = False) -> Report:
    """Take every place, or every n-th, so that there are at most `limit` runs."""
    report = Report(job)
    first = 0 if job.mode == "no thread" else 1
    report.places = _in_child(partial(_one, job, -1), 60)[0].count
    report.stride = max(1, -(-report.places // limit))
    while True:
        found = _in_child(partial(_runs, job, first, report.stride), CHILD_LIMIT)
        report.runs += len(found)
        report.failures += [each for each in found if each.problems]
        if not found or not found[-1].hits or (report.failures and not keep_going):
            return report
        first = found[-1].place + report.stride


def explore_pairs(
    job: Job, stride: int = 1, first_stride: int = 1, keep_going: bool = False
) -> Report:
    """Two stops in each run: the first one at every `first_stride`-th place."""
    report = Report(job, stride=stride)
    report.places = _in_child(partial(_one, job, -1), 60)[0].count
    first = 1 + sum(job.name.encode()) % first_stride  # others in other jobs
    for place in range(first, report.places + 1, first_stride):
        then = 1 + place % stride
        while True:
            found = _in_child(partial(_pairs, job, place, then, stride), CHILD_LIMIT)
            report.runs += len(found)
            report.failures += [each for each in found if each.problems]
            if report.failures and not keep_going:
                return report
            if not found or found[-1].hits < 2:
                break
            then = found[-1].then + stride
    return report


def repeat(job: Job, place: int, then: int = 0) -> Report:
    """One run alone."""
    found = _in_child(partial(_one, job, place, then), 120)
    return Report(job, 1, found[0].count, failures=[each for each in found if each.problems])


def _one(job: Job, place: int, then: int = 0) -> Iterator[Found]:
    yield run_once(job, place, then)


def _runs(job: Job, first: int, stride: int) -> Iterator[Found]:
    place, found = first, Found(first, hits=1)
    while found.hits and not found.problems:  # what has failed may have left something behind
        # Other threads are used by one run, and not by the next: each begins with none.
        found = (
            _in_child(partial(_one, job, place), 60)[0]
            if job.mode == "no thread"
            else run_once(job, place)
        )
        yield found
        place += stride


def _pairs(job: Job, place: int, then: int, stride: int) -> Iterator[Found]:
    found = Found(place, hits=2)
    while found.hits == 2 and not found.problems:
        found = run_once(job, place, then)
        yield found
        then += stride


def _in_child(work: Callable[[], Iterator[Found]], seconds: float) -> list[Found]:
    """What `work` gives, in a forked child."""
    with tempfile.TemporaryDirectory(prefix="explorer-") as folder:
        return _fork(work, seconds, folder)


def _fork(work: Callable[[], Iterator[Found]], seconds: float, folder: str) -> list[Found]:
    reading, writing = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a fork leaves threads behind
        child = os.fork()
    if child == 0:
        os.close(reading)
        tempfile.tempdir = folder  # where stores in files are made
        _be_child(work, writing)
    os.close(writing)
    try:
        lines = _read(reading, seconds).splitlines()
    finally:  # it may hang, and so may those who wait for it
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [Found(**json.loads(line)) for line in lines]
    return found or [Found(0, problems=["the child has ended without a word"])]


def _be_child(work: Callable[[], Iterator[Found]], writing: int) -> None:
    try:
        sys.unraisablehook = _note_unraisable
        threading.excepthook = _note_in_thread
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        gc.collect()
        gc.freeze()
        gc.disable()
        for found in work():
            _write(writing, found)
    except BaseException as error:
        _write(writing, Found(0, problems=[f"in the explorer itself: {describe(error)}"]))
    finally:
        os._exit(0)


def _write(writing: int, found: Found) -> None:
    text = json.dumps(asdict(found)).encode() + b"\n"
    while text:
        text = text[os.write(writing, text) :]


def _read(reading: int, seconds: float) -> str:
    end = time.monotonic() + seconds
    text = b""
    with os.fdopen(reading, "rb", buffering=0) as file:
        while True:
            if not select.select([file], [], [], max(0, end - time.monotonic()))[0]:
                break
            if not (part := file.read(1 << 16)):
                break
            text += part
    return text.decode()
