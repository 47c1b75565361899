"""Random schedules with real signals, time-outs, cancellations and collections, on every store.

    python tests/torture/torture.py --seconds 600 --seed 1 --stores memory,sqlite --jobs 2

Each store is tortured for that many seconds in a process of its own (and a second one, if processes
may share it). Prints a line for each store, and exits with 1 if anything was lost, torn or locked.
The seed repeats what is drawn, not how the threads are switched. SESSION_SYNC_TORTURE_PATIENCE (20
seconds) is the long lock_timeout, which nobody may reach; 30 seconds more are a hang.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import functools
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from diagnosis import locks_and_stacks
from model import Failures, Slot
from rounds import LIMIT, SHARED, Round, open_storage

STORES = ("memory", "lru", "sqlite", "disk", "redis")
HUNG = 3  # the exit code of a process that hangs
MOST_HANGS = 5  # after so many a store is left alone


# -- in the process that is tortured


class Watchdog:
    """Ends this process with all stacks when something lasts too long."""

    def __init__(self, about: str, status: Status | None = None) -> None:
        self._about, self._status = about, status
        self.round: Round | None = None
        self.slot = Slot("the round")  # which may last as long as two of its parts
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while True:
            # For the case that nobody gets the interpreter's lock any more.
            faulthandler.dump_traceback_later(LIMIT + 60, exit=True)
            time.sleep(0.5)
            now = time.monotonic()
            current = self.round
            late = (
                [s for s in current.slots() if s.active and now - s.since > LIMIT]
                if current
                else []
            )
            if now - self.slot.since > 2 * LIMIT:
                late.append(self.slot)
            if late:
                self._bark(late, current)

    def _bark(self, late: list[Slot], current: Round | None) -> None:
        names = ", ".join(f"{slot.name} ({slot.what})" for slot in late)
        print(f"HANGS for {LIMIT:g} s, {self._about}: {names}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        for thread in threading.enumerate():
            print(f"{thread.ident or 0:#x} is {thread.name}", file=sys.stderr)
        doomed = [t for t in threading.enumerate() if hasattr(t, "doomed_loop")]
        for worker in [*(current.loops if current else ()), *doomed]:
            with contextlib.suppress(Exception):
                loop = worker.doomed_loop() if hasattr(worker, "doomed_loop") else worker.loop
                for task in asyncio.all_tasks(loop):
                    task.print_stack(file=sys.stderr)
                    print(task, file=sys.stderr)
        if current is not None:
            with contextlib.suppress(Exception):
                for _ in range(2):
                    used = current.main.used
                    print(
                        f"{used} sessions in signal handlers; gc {gc.get_count()}", file=sys.stderr
                    )
                    time.sleep(2)
                print(locks_and_stacks(current.world.managers["eager"]), file=sys.stderr)
            going_on = current.world.ledger.going_on()
            print(f"going on:{going_on}", file=sys.stderr)
        if self._status is not None:
            if current is not None:
                self._status.counts += current.counts()
            self._status.write()
        sys.stderr.flush()
        os._exit(HUNG)


class Status:
    """What came of it until now; kept in a file, since the process may be killed at any time."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.rounds = 0
        self.counts: Counter[str] = Counter()
        self.number: Counter[str] = Counter()
        self.details: list[str] = []

    def add(self, counts: Counter[str], failures: Failures, about: str) -> None:
        self.counts += counts
        self.number += failures.number
        if len(self.details) < 60:
            self.details += [f"[{about}] {detail}" for detail in failures.details[:12]]

    def write(self) -> None:
        assert self._path is not None
        whole = self._path.with_suffix(".new")
        whole.write_text(json.dumps({k: v for k, v in vars(self).items() if k[0] != "_"}))
        whole.replace(self._path)

    def read(self, path: Path) -> None:
        """Add what another process has written."""
        if path.exists():
            other = json.loads(path.read_text())
            self.rounds += other["rounds"]
            self.counts.update(other["counts"])
            self.number.update(other["number"])
            self.details += other["details"]


class Unraisable:
    """What is raised where nobody can catch it."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        sys.unraisablehook = self

    def __call__(self, given: Any) -> None:
        self.found[f"{given.exc_type.__name__} in a finaliser"] += 1

    def take(self) -> Counter[str]:
        found, self.found = self.found, Counter()
        return found


class Partner:
    """The second process of a store that processes share."""

    def __init__(self, about: str) -> None:
        command = [sys.executable, __file__, "--partner", about]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, plan: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            print("the second process is gone", file=sys.stderr, flush=True)
            os._exit(HUNG)
        found: dict[str, Any] = json.loads(line)
        return found


def prepare_process() -> Unraisable:
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    # Asked for at each connection by redis-py; an interrupt may leave its mutex locked.
    logging.getLogger = functools.cache(logging.getLogger)  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    sys.set_int_max_str_digits(0)
    with contextlib.suppress(ImportError):
        import telebot  # noqa: F401 # imported before the freeze

        import session_sync.telebot  # noqa: F401 # likewise
    gc.collect()
    gc.freeze()
    return Unraisable()


def be_partner(about: str) -> None:
    unraisable = prepare_process()
    dog = Watchdog(f"second process, {about}")
    storages: dict[str, Any] = {}
    dog.slot.since = float("inf")
    for line in sys.stdin:
        plan = json.loads(line)
        dog.slot.beat("a round")
        storage = storages.get(plan["url"]) or storages.setdefault(
            plan["url"], open_storage(plan["url"])
        )
        current = dog.round = Round(plan, storage, 1)
        current.run()
        failures, counts = Failures(), current.counts() + unraisable.take()
        current.judge(failures, counts)
        ledger = current.world.ledger
        answer = {
            "bits": ledger.bits(),
            "pairs": ledger.open_pairs(),
            "story": ledger.story(),
            "counts": counts,
            "number": failures.number,
            "details": failures.details,
        }
        dog.round = None
        dog.slot.since = float("inf")
        print(json.dumps(answer), flush=True)
    os._exit(0)


class Child:
    """Round after round on one store."""

    def __init__(self, store: str, seed: str, folder: Path, options: argparse.Namespace) -> None:
        self._store, self._seed, self._folder = store, seed, folder
        self._redis, self._without = options.redis, options.without.split(",")
        self._unraisable = prepare_process()
        self._rng = Random(seed)
        self._about = f"--stores {store} --seed {seed}"
        self._status = Status(folder / "status.json")
        self._dog = Watchdog(self._about, self._status)
        self._partner = Partner(self._about) if store in SHARED else None
        self._stores = 0
        self._renew_storage()

    def _renew_storage(self) -> None:
        """So that what is broken in one round is not in the next."""
        self._stores += 1
        file = f"{self._folder}/{self._stores}"
        self._url = {
            "sqlite": f"sqlite:///{file}.db",
            "disk": f"disk:///{file}",
            "redis": f"{self._redis}/{self._stores % 16}?lease=5",
        }.get(self._store, self._store)
        self._storage = open_storage(self._url)

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._round(min(self._rng.uniform(0.7, 1.7), max(0.3, end - time.monotonic())))
        os._exit(0)  # whatever is still there

    def _round(self, seconds: float) -> None:
        status, rng = self._status, self._rng
        number = status.rounds + 1
        users = [number * 10 + n for n in range(100_000, 100_000 + rng.randint(1, 4))]
        plan = {
            "url": self._url,
            "seed": f"{self._seed} {number}",
            "keys": [f"user:{user}:chat:{user}" for user in users],
            "seconds": seconds,
            "without": self._without,
            "shared": self._partner is not None and rng.random() < 0.6,
        }
        self._dog.slot.beat("sets up")
        current = Round(plan, self._storage, 0)
        current.set_up()
        self._dog.round = current
        self._dog.slot.beat("works")
        if self._partner is not None and plan["shared"]:
            self._partner.begin(plan)
        current.run()
        self._dog.round = None
        others = []
        if self._partner is not None and plan["shared"]:
            others.append(self._partner.result())
        self._dog.slot.beat("is judged")
        failures, counts = Failures(), current.counts() + self._unraisable.take()
        current.judge(failures, counts)
        for other in others:
            counts.update(other["counts"])
            failures.number.update(other["number"])
            failures.details += [f"(second process) {detail}" for detail in other["details"]]
        current.check(others, failures)
        status.rounds = number
        status.add(counts, failures, f"round {number}, {self._about}")
        status.write()
        if failures:
            self._renew_storage()


# -- in the process that looks on


@contextlib.contextmanager
def redis_server(wanted: bool) -> Iterator[str]:
    """A Redis of our own, if it is wanted."""
    if not wanted:
        yield ""
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as server:
            for _ in range(400):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)  # until it listens
            try:
                yield f"redis://127.0.0.1:{port}"
            finally:
                server.terminate()


def torture(store: str, seed: str, options: argparse.Namespace) -> tuple[Status, int]:
    """A store, in a new process after each hang; what came of it, and how many hangs."""
    total, hangs = Status(), 0
    end = time.monotonic() + options.seconds
    while hangs < MOST_HANGS and (left := end - time.monotonic()) > 0.3:
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            name = f"{seed}-{hangs}" if hangs else seed
            code = _one_process(store, left, name, Path(folder), options)
            total.read(Path(folder) / "status.json")
            if code == 0:
                break
            hangs += 1
            log = (Path(folder) / "log").read_text(errors="replace")
            total.details.append(f"a process ended with {code} (seed {name}):\n{log[-30000:]}")
    return total, hangs


def _one_process(
    store: str, seconds: float, seed: str, folder: Path, options: argparse.Namespace
) -> int:
    command = [sys.executable, __file__, "--child", "--stores", store, "--seed", seed]
    command += ["--seconds", str(seconds), "--folder", str(folder)]
    command += ["--redis", options.redis, "--without", options.without]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, start_new_session=True)
        try:
            return process.wait(seconds + 4 * LIMIT + 120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # which prints all stacks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return HUNG
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report(store: str, status: Status, hangs: int) -> str:
    counts = status.counts
    operations = sum(counts[name] for name in counts if name[0].islower() and not _is_extra(name))
    each = ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    ends = ", ".join(f"{kind} {status.number[kind]}" for kind in Failures.KINDS)
    return (
        f"{store}: {status.rounds} rounds, {operations} operations\n"
        f"    {each}\n    {ends}, hung {hangs}"
    )


def _is_extra(name: str) -> bool:
    return name.startswith(("interrupt", "sessions in", "loops thrown")) or name.endswith(
        "finaliser"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each store")
    parser.add_argument("--seed", default="")
    parser.add_argument("--stores", default=",".join(STORES))
    parser.add_argument("--jobs", type=int, default=1, help="how many stores at a time")
    parser.add_argument(
        "--without",
        default="",
        help="what to leave out, to find out what a failure takes: thread, loop, doomed, bot, "
        "signals, raises (of the signal handler), interrupts, cancellations, collections, "
        "or the name of an action",
    )
    for hidden in ("--child", "--partner", "--folder", "--redis"):
        flag = {"action": "store_true"} if hidden == "--child" else {"default": ""}
        parser.add_argument(hidden, help=argparse.SUPPRESS, **flag)  # type: ignore[arg-type]
    options = parser.parse_args()
    if options.partner:
        be_partner(options.partner)
    seed = options.seed or str(int(time.time()))
    stores = options.stores.split(",")
    if options.child:
        Child(stores[0], seed, Path(options.folder), options).run(options.seconds)
    if unknown := set(stores) - set(STORES):
        parser.error(f"unknown stores: {', '.join(sorted(unknown))}")
    if "redis" in stores and shutil.which("redis-server") is None:
        parser.error("needs redis-server, or --stores without redis")
    print(f"seed {seed}, {options.seconds:g} s for each store", flush=True)
    failed = False
    with redis_server("redis" in stores) as url, ThreadPoolExecutor(options.jobs) as pool:
        options.redis = url
        runs = {s: pool.submit(torture, s, seed, options) for s in stores}
        for store, run in runs.items():
            status, hangs = run.result()
            print(report(store, status, hangs), flush=True)
            if status.number or hangs or not status.rounds:
                failed = True
                print("\n".join(status.details), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
