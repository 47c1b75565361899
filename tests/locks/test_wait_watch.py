"""Reports of waits that take too long: when they come, how often, and what they say."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading
import weakref
from math import inf
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from lock_tools import queued, take
from waiting import SOON, until

from session_sync import SessionLockTimeoutError
from session_sync.locks import lock as lock_module
from session_sync.locks import queue as queue_module
from session_sync.locks import watch as watch_module
from session_sync.locks.callers import Caller
from session_sync.locks.lock import LockHandle
from session_sync.locks.table import LockTable, StoreLocks
from session_sync.locks.tickets import Tickets
from session_sync.locks.watch import WaitReport, Watch

table = pytest.fixture(lock_tools.make_table)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


class Patience:
    """It keeps the reports."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reports: SimpleQueue[WaitReport] = SimpleQueue()

    def run_out(self, report: WaitReport) -> None:
        self.reports.put(report)

    def next(self) -> WaitReport:
        return self.reports.get(timeout=SOON)

    def all(self) -> list[WaitReport]:
        return [self.reports.get_nowait() for _ in range(self.reports.qsize())]


class Clock:
    """The time, which goes on when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    some = Clock()
    for module in (lock_module, queue_module, watch_module):
        monkeypatch.setattr(module, "time", some)
    return some


class Watched:
    """A table that is watched by a watch without a thread, which looks when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
        self.table = LockTable()
        self.watch = Watch()
        self.watch.add(self.table)
        self._threads = threads
        self.woken = 0
        monkeypatch.setattr(self.watch, "_start", lambda: None)
        monkeypatch.setattr(self.watch, "_begun", SimpleNamespace(put=self._wake))
        monkeypatch.setattr(lock_module, "watch", self.watch)

    def _wake(self, _: None) -> None:
        self.woken += 1

    def wait(self, patience: Patience | None, key: str = "k") -> threading.Thread:
        """A thread that waits for a key, and releases it at once."""
        before = queued(self.table, key)

        def work() -> None:
            handle = self.table.handle(key)
            handle.acquire(SOON, patience=patience)
            handle.release()

        thread = self._threads.start(work)
        queues = self.table.queues
        until(lambda: queued(self.table, key) == before + 1)
        until(lambda: patience is None or queues[key].patience is not None)
        return thread

    def look(self) -> float:
        """Report what is due; returns when the next report is."""
        wakes = self.watch._wakes = self.watch._report_all()
        return wakes


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, threads: Threads, clock: Clock) -> Any:
    monkeypatch.setattr(watch_module, "_LOOK", inf)  # no looking for lost holders in between
    some = Watched(monkeypatch, threads)
    yield some
    threads.join()
    assert len(some.table) == 0


def queue_ticket(table: LockTable, patience: Patience) -> Tickets:
    """A task that has not begun, and waits."""
    tickets = Tickets([table.ticket("k")])
    tickets.queue(lambda: None, patience)
    return tickets


# -- when reports come (the clock is ours)


def test_a_report_comes_when_patience_has_run_out_and_not_before(
    watched: Watched, clock: Clock
) -> None:
    patience = Patience(10.0)
    holder = take(watched.table)
    clock.now += 5
    watched.wait(patience)
    assert watched.woken == 1
    clock.now += 9.9
    assert watched.look() == pytest.approx(1015)
    assert patience.all() == []
    clock.now += 0.2
    watched.look()
    (report,) = patience.all()
    assert report.key == "k"
    assert report.waiters == 1
    assert report.waited == pytest.approx(10.1)
    assert report.holder == "thread 'MainThread'"
    assert report.held == pytest.approx(15.1)
    holder.release()


def test_reports_come_ever_more_rarely(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    holder = take(watched.table)
    watched.wait(patience)
    times = []
    for _ in range(5):
        clock.now = watched.look()
        watched.look()
        times += [report.waited for report in patience.all()]
    assert times == pytest.approx([10, 20, 40, 80, 160])
    holder.release()


def test_nothing_is_reported_where_nothing_waits(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    assert watched.look() == float("inf")
    holder = take(watched.table)
    assert watched.look() == float("inf")
    thread = watched.wait(patience)
    holder.release()
    thread.join(SOON)
    clock.now += 100
    assert watched.look() == float("inf")
    assert patience.all() == []


def test_a_wait_without_patience_is_not_reported(watched: Watched, clock: Clock) -> None:
    holder = take(watched.table)
    watched.wait(None)
    clock.now += 1e6
    assert watched.look() == float("inf")
    holder.release()


def test_all_that_wait_for_a_key_are_in_one_report(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    holder = take(watched.table)
    for _ in range(3):
        watched.wait(patience)
        clock.now += 1
    clock.now += 8
    watched.look()
    (report,) = patience.all()
    assert report.waiters == 3
    assert report.waited == pytest.approx(11)
    holder.release()


def test_each_key_has_its_own_time(watched: Watched, clock: Clock) -> None:
    patience, hurried = Patience(10.0), Patience(1.0)
    holders = [take(watched.table, key) for key in "ab"]
    watched.wait(patience, "a")
    assert watched.look() == pytest.approx(1010)
    watched.wait(hurried, "b")
    assert watched.woken == 2  # its report comes sooner than the thread would wake up
    clock.now += 1
    watched.look()
    assert [report.key for report in hurried.all()] == ["b"]
    assert patience.all() == []
    for holder in holders:
        holder.release()


def test_a_wait_whose_report_comes_later_than_the_next_one_wakes_nothing(
    watched: Watched,
) -> None:
    patience = Patience(10.0)
    holders = [take(watched.table, key) for key in "abc"]
    for key in "abc":
        watched.wait(patience, key)
        watched.look()
    assert watched.woken == 1
    for holder in holders:
        holder.release()


def test_a_new_wait_for_the_key_has_its_own_time(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    for _ in range(3):
        holder = take(watched.table)
        thread = watched.wait(patience)
        clock.now += 9
        watched.look()
        holder.release()
        thread.join(SOON)
    assert patience.all() == []


def test_a_key_whose_waiters_come_and_go_is_reported_only_if_one_has_waited_for_long(
    watched: Watched, clock: Clock
) -> None:
    """There is always a waiter, but each has the key soon: nothing hangs."""
    patience = Patience(10.0)
    holder: LockHandle = take(watched.table)
    ahead = queue_ticket(watched.table, patience)
    for _ in range(20):
        clock.now += 4
        behind = queue_ticket(watched.table, patience)
        watched.look()
        holder.release()
        assert ahead.redeem()
        (holder,) = ahead.handles
        ahead = behind
    assert patience.all() == []
    clock.now += 7  # this one has waited for 7 s, and so it is due in 3 s
    assert watched.look() == pytest.approx(clock.now + 3)
    clock.now += 3
    watched.look()
    assert [report.waited for report in patience.all()] == [pytest.approx(10)]
    holder.release()
    ahead.withdraw()


# -- what a report says


def test_a_report_names_all_that_have_joined_the_holder(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    holder = take(watched.table)
    holder.callers += [Caller(threading.Thread(name="joined"))]
    watched.wait(patience)
    clock.now += 10
    watched.look()
    (report,) = patience.all()
    assert report.holder == "thread 'MainThread' and thread 'joined'"
    holder.release()


def test_a_report_of_a_key_that_is_kept_for_a_task_names_no_holder(
    watched: Watched, clock: Clock
) -> None:
    patience = Patience(10.0)
    tickets = queue_ticket(watched.table, patience)
    watched.wait(patience)
    clock.now += 10
    watched.look()
    (report,) = patience.all()
    assert (report.holder, report.held) == (None, 0.0)
    tickets.withdraw()


def test_tickets_that_wait_are_reported(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    holder = take(watched.table)
    tickets = queue_ticket(watched.table, patience)
    clock.now += 10
    watched.look()
    (report,) = patience.all()
    assert report.waiters == 1
    assert report.holder == "thread 'MainThread'"
    tickets.withdraw()
    holder.release()


def test_a_task_that_waits_for_nothing_is_not_reported(watched: Watched, clock: Clock) -> None:
    patience = Patience(10.0)
    tickets = queue_ticket(watched.table, patience)
    clock.now += 100
    watched.look()
    assert patience.all() == []
    tickets.withdraw()


# -- the thread that makes them (the clock is the system's)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, table: LockTable) -> Watch:
    """A watch of its own, so that its thread has not been started."""
    some = Watch()
    some.add(table)
    monkeypatch.setattr(lock_module, "watch", some)
    return some


def wait_for_report(table: LockTable, threads: Threads, key: str, patience: Patience) -> None:
    """A thread waits for a key until that is reported."""
    holder = take(table, key)

    def work() -> None:
        handle = table.handle(key)
        handle.acquire(SOON, patience=patience)
        handle.release()

    thread = threads.start(work)
    report = patience.next()
    assert report.key == key
    assert report.waited >= patience.seconds
    holder.release()
    thread.join(SOON)


def test_the_thread_begins_with_the_first_wait_and_there_is_one(
    table: LockTable, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, started = Watch(), []
    watch.add(table)
    monkeypatch.setattr(lock_module, "watch", watch)
    start = threading.Thread.start

    def note_and_start(thread: threading.Thread) -> None:
        if thread.name == "session_sync-watch":
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note_and_start)
    take(table).release()
    assert started == []
    for key in "abc":
        wait_for_report(table, threads, key, Patience(0.001))
    assert len(started) == 1
    assert started[0].daemon


def test_reports_go_on_while_something_waits(
    table: LockTable, watch: Watch, threads: Threads
) -> None:
    patience = Patience(0.001)
    holder = take(table)
    thread = threads.start(lambda: _wait(table, patience))
    times = [patience.next().waited for _ in range(4)]
    assert times[0] >= 0.001
    for earlier, later in itertools.pairwise(times):
        assert later > 1.9 * earlier
    holder.release()
    thread.join(SOON)


def _wait(table: LockTable, patience: Patience) -> None:
    handle = table.handle("k")
    handle.acquire(SOON, patience=patience)
    handle.release()


def test_a_coroutine_that_waits_is_reported(
    table: LockTable, watch: Watch, threads: Threads
) -> None:
    patience = Patience(0.001)
    release = lock_tools.take_elsewhere(table, threads, name="the slow one")

    async def main() -> None:
        handle = table.handle("k")
        waiting = asyncio.create_task(handle.acquire_async(None, patience=patience))
        report = await asyncio.to_thread(patience.next)
        assert report.holder == "thread 'the slow one'"
        await asyncio.to_thread(release)
        await waiting
        handle.release()
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(main())


def test_a_hurried_wait_wakes_the_thread_that_sleeps_for_a_patient_one(
    table: LockTable, watch: Watch, threads: Threads
) -> None:
    holder = take(table, "patient")

    def work() -> None:
        handle = table.handle("patient")
        handle.acquire(SOON, patience=Patience(1e6))
        handle.release()

    thread = threads.start(work)
    until(lambda: watch._wakes < float("inf"))  # until it sleeps
    wait_for_report(table, threads, "hurried", Patience(0.001))
    holder.release()
    thread.join(SOON)


def fail_to_start_once(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """The thread that watches; returns what starts threads, as it is again afterwards."""
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "session_sync-watch":
            monkeypatch.setattr(threading.Thread, "start", start)
            raise error
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    return start


def test_a_thread_that_could_not_be_started_is_started_by_the_next_wait(
    table: LockTable, watch: Watch, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = fail_to_start_once(monkeypatch, RuntimeError("can't start new thread"))
    missed = Patience(0.001)
    holder = take(table, "missed")

    def work() -> None:
        handle = table.handle("missed")
        handle.acquire(SOON, patience=missed)
        handle.release()

    thread = threads.start(work)
    until(lambda: threading.Thread.start is start)
    wait_for_report(table, threads, "k", Patience(0.001))
    assert missed.next().key == "missed"  # it was not lost, only late
    holder.release()
    thread.join(SOON)


def test_an_interrupt_while_the_thread_starts_does_not_keep_the_next_wait_from_being_reported(
    table: LockTable, watch: Watch, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            table.handle("k").acquire(SOON, patience=Patience(1000))

    start = fail_to_start_once(monkeypatch, KeyboardInterrupt())
    holder = take(table, "k")
    threads.start(work).join(SOON)
    assert threading.Thread.start is start
    holder.release()
    wait_for_report(table, threads, "k", Patience(0.001))


def test_after_a_report_that_has_failed_the_next_wait_is_reported(
    table: LockTable, watch: Watch, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: SimpleQueue[Any] = SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", failures.put)

    class Failing(Patience):
        def run_out(self, report: WaitReport) -> None:
            super().run_out(report)
            raise SystemError("from a handler of the log, say")

    wait_for_report(table, threads, "failing", Failing(0.001))
    assert failures.get(timeout=SOON).exc_type is SystemError
    wait_for_report(table, threads, "k", Patience(0.001))


def test_tables_may_come_and_go_while_the_watch_looks(threads: Threads) -> None:
    watch, over = Watch(), threading.Event()
    before = sys.getswitchinterval()
    tables = [LockTable() for _ in range(100)]
    for table in tables:
        watch.add(table)

    def come_and_go() -> None:
        while not over.is_set():
            for _ in range(50):
                watch.add(LockTable())

    sys.setswitchinterval(1e-5)
    try:
        threads.start(come_and_go)
        for _ in range(1_000):
            assert watch._report_all() == float("inf")
    finally:
        over.set()
        threads.join()
        sys.setswitchinterval(before)


def test_a_watch_keeps_no_table_and_no_waiting_alive(
    table: LockTable, watch: Watch, threads: Threads
) -> None:
    wait_for_report(table, threads, "k", Patience(0.001))
    other = StoreLocks()
    watch.add(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_a_time_out_ends_the_reports(table: LockTable, watch: Watch, threads: Threads) -> None:
    release = lock_tools.take_elsewhere(table, threads)
    handle = table.handle("k")
    with pytest.raises(SessionLockTimeoutError):
        handle.acquire(0, patience=Patience(0.001))
    assert not table.queues
    release()
