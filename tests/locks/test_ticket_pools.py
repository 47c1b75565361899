"""Many tasks that wait for keys with tickets, and pools of workers that begin them."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from conftest import Threads
from counting import lines_run
from lock_tools import assert_nothing_is_left, table_of, take
from waiting import SOON

from session_sync import SessionManager
from session_sync.lifecycle.current import in_handler
from session_sync.lifecycle.update import tickets_for
from session_sync.locks.table import LockTable
from session_sync.locks.tickets import Tickets


def release(tickets: Tickets) -> None:
    for ticket in tickets.handles:
        assert ticket.is_held
        ticket.release()


def work_off(count: int) -> None:
    """Queue and do this many tasks of one key."""
    table, called = LockTable(), SimpleQueue[Tickets]()
    for _ in range(count):
        tickets = Tickets([table.ticket("k")])
        tickets.queue(lambda tickets=tickets: called.put(tickets))
    for _ in range(count):
        tickets = called.get_nowait()
        assert tickets.redeem()
        release(tickets)
    assert called.empty()
    assert_nothing_is_left(table)


def test_tasks_of_one_key_are_worked_off_in_linear_time() -> None:
    few = lines_run(lambda: work_off(500))
    assert lines_run(lambda: work_off(5_000)) < 20 * few  # linear: 10, quadratic: 100


def test_two_hundred_thousand_tasks_of_one_key_are_worked_off() -> None:
    work_off(200_000)


class Pool:
    """A pool of workers as a framework has it: it runs tasks, each in the session of its key."""

    def __init__(self, sessions: SessionManager[Any], workers: int, threads: Threads) -> None:
        self._sessions = sessions
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._size = workers
        self._over = threading.Semaphore(0)
        for _ in range(workers):
            threads.start(self._work)

    def queue(self, key: str, inner: list[str]) -> None:
        """A task for the session of `key`, inside which it opens others, one after the other."""
        scope = self._sessions.session_scope(key)
        tickets = tickets_for([scope])
        tickets.queue(lambda: self._jobs.put(lambda: self._run(scope, tickets, inner)))

    def queue_and_withdraw(self, key: str) -> None:
        """A task that is withdrawn, perhaps while a worker begins with it."""
        tickets = Tickets([table_of(self._sessions).ticket(key)])

        def run() -> None:
            if tickets.redeem():
                assert all(ticket.is_held for ticket in tickets.handles)
                time.sleep(0)
                release(tickets)

        tickets.queue(lambda: self._jobs.put(run))
        tickets.withdraw()

    def finish(self, jobs: int) -> None:
        for _ in range(jobs):
            assert self._over.acquire(timeout=SOON)
        for _ in range(self._size):
            self._jobs.put(None)

    def _work(self) -> None:
        in_handler.set(True)
        while (job := self._jobs.get()) is not None:
            job()

    def _run(self, scope: Any, tickets: Tickets, inner: list[str]) -> None:
        if not tickets.redeem():
            return
        with scope as session:
            session.counter = session.get("counter", 0) + 1
            for other in inner:
                with self._sessions.session_scope(other) as nested:
                    seen = nested.get("counter", 0)
                    time.sleep(0)
                    nested.counter = seen + 1
        self._over.release()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_pool_that_opens_other_sessions_inside_loses_nothing_and_never_stops(
    threads: Threads, workers: int, seed: int
) -> None:
    """Sessions for which others are queued are opened inside others (in one order everywhere),
    while a thread and a coroutine come and go and some tasks are withdrawn."""
    sessions: SessionManager[Any] = SessionManager()
    chance = random.Random(seed)
    keys = ["a", "b", "c", "d"]
    expected = dict.fromkeys(keys, 50)

    def cron() -> None:
        for _ in range(50):
            with sessions.session_scope("a") as a, sessions.session_scope("d") as d:
                a.counter = a.get("counter", 0) + 1
                d.counter = d.get("counter", 0) + 1

    async def job() -> None:
        for _ in range(50):
            async with sessions.session_scope("b") as b, sessions.session_scope("c") as c:
                b.counter = b.get("counter", 0) + 1
                await asyncio.sleep(0)
                c.counter = c.get("counter", 0) + 1

    pool = Pool(sessions, workers, threads)
    threads.start(cron)
    threads.start(asyncio.run, job())
    for _ in range(300):
        key = chance.choice(keys)
        inner = [other for other in keys if other > key and chance.random() < 0.5]
        for one in (key, *inner):
            expected[one] += 1
        pool.queue(key, inner)
        if chance.random() < 0.3:
            pool.queue_and_withdraw(key)
    pool.finish(300)
    threads.join()
    assert {key: sessions.storage.get(key)["counter"] for key in keys} == expected
    assert_nothing_is_left(table_of(sessions))


class Crowd:
    """Tasks that want any of six keys, two workers for them, and handlers that pass them."""

    def __init__(self) -> None:
        self.tables = LockTable(), LockTable()
        self._places = [(table, key) for table in self.tables for key in "abc"]
        self._having = [0] * len(self._places)
        self._pool: SimpleQueue[tuple[Tickets, list[int]] | None] = SimpleQueue()
        self.done = threading.Semaphore(0)

    def feed(self, wishes: list[list[int]]) -> None:
        for numbers in wishes:
            places = [self._places[number] for number in numbers]
            tickets = Tickets([table.ticket(key) for table, key in places])
            tickets.queue(
                lambda tickets=tickets, numbers=numbers: self._pool.put((tickets, numbers))
            )

    def work(self) -> None:
        while (job := self._pool.get(timeout=SOON)) is not None:
            tickets, numbers = job
            if tickets.redeem():
                self._have(numbers)
                release(tickets)
                self.done.release()

    def pass_by(self, numbers: list[int]) -> None:
        for number in numbers:
            handle = take(*self._places[number], passes=True)
            self._have([number])
            handle.release()

    def stop(self) -> None:
        self._pool.put(None)

    def _have(self, numbers: list[int]) -> None:
        for number in numbers:
            self._having[number] += 1
            assert self._having[number] == 1
        time.sleep(0)
        for number in numbers:
            self._having[number] -= 1


@pytest.fixture(params=range(3))
def chance(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield random.Random(request.param)
    sys.setswitchinterval(before)


def test_many_tasks_and_handlers_that_pass_them_all_come_to_an_end(
    threads: Threads, chance: random.Random
) -> None:
    """Whatever they want: no circle, no call that is missed, and never two that have one key."""
    crowd = Crowd()
    for _ in range(2):
        wishes = [chance.sample(range(6), chance.choice([1, 2, 2, 3])) for _ in range(200)]
        threads.start(crowd.work)
        threads.start(crowd.feed, wishes)
        threads.start(crowd.pass_by, [chance.randrange(6) for _ in range(200)])
    for _ in range(400):
        assert crowd.done.acquire(timeout=SOON)
    crowd.stop()
    crowd.stop()
    threads.join()
    for table in crowd.tables:
        assert_nothing_is_left(table)
