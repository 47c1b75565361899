"""Waiters that go away: cancelled, timed out, or both, also while they are given the key."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from lock_tools import is_unlocked, queued, table_of, take, take_async, take_unowned
from waiting import SOON, until, until_async

from session_sync import SessionLockTimeoutError, SessionManager
from session_sync.locks.lock import ThreadWaiter
from session_sync.locks.table import LockTable

table = pytest.fixture(lock_tools.make_table)
hasty = pytest.fixture(lock_tools.make_hasty)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


def test_a_cancelled_waiter_disturbs_nobody(table: LockTable) -> None:
    served = []

    async def work(number: int) -> None:
        handle = await take_async(table, timeout=None)
        served.append(number)
        handle.release()

    async def main() -> None:
        handle = await take_async(table)
        tasks = [asyncio.create_task(work(number)) for number in range(5)]
        await until_async(lambda: queued(table) == 5)
        for number in (0, 2, 4):
            tasks[number].cancel()
        await until_async(lambda: queued(table) == 2)
        handle.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [True, False, True, False, True]

    asyncio.run(main())
    assert served == [1, 3]


def test_a_task_cancelled_before_its_first_step_takes_nothing() -> None:
    sessions: SessionManager[Any] = SessionManager()
    table = table_of(sessions)

    async def work() -> None:
        async with sessions.session_scope("k"):
            raise AssertionError("it ran")

    async def main() -> None:
        for held in (False, True):
            handle = await take_async(table) if held else None
            task = asyncio.create_task(work())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert queued(table) == 0
            if handle is not None:
                handle.release()
            assert is_unlocked(table)

    asyncio.run(main())
    assert len(table) == 0


@pytest.mark.parametrize("first", ["release", "cancel"])
def test_a_task_cancelled_in_the_moment_it_is_given_the_key_gives_it_on(
    table: LockTable, first: str
) -> None:
    async def main() -> None:
        handle = await take_async(table)
        chosen = asyncio.create_task(take_async(table))
        next_one = asyncio.create_task(take_async(table))
        await until_async(lambda: queued(table) == 2)
        if first == "release":
            handle.release()
            chosen.cancel()
        else:
            chosen.cancel()
            handle.release()
        with pytest.raises(asyncio.CancelledError):
            await chosen
        (await next_one).release()

    asyncio.run(main())


def test_a_task_whose_time_is_up_in_the_moment_it_is_given_the_key_has_it(
    table: LockTable,
) -> None:
    async def main() -> None:
        handle = await take_async(table)
        task = asyncio.create_task(take_async(table, timeout=0))
        await asyncio.sleep(0)  # it queues, and its time-out is due in the next round
        assert queued(table) == 1
        handle.release()
        (await task).release()
        assert task.cancelling() == 0

    asyncio.run(main())


def test_a_thread_whose_time_is_up_in_the_moment_it_is_given_the_key_has_it(
    table: LockTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that cannot be had otherwise: the time-out comes first, then the release."""
    holder = take_unowned(table)
    monkeypatch.setattr(ThreadWaiter, "wait", lambda *_: holder.release())
    take(table, timeout=1).release()


def test_a_time_out_around_the_wait_is_not_taken_for_the_locks_own(table: LockTable) -> None:
    async def main() -> None:
        handle = await take_async(table)

        async def wait() -> None:
            async with asyncio.timeout(0):
                await take_async(table)

        with pytest.raises(TimeoutError) as caught:
            await asyncio.create_task(wait())
        assert not isinstance(caught.value, SessionLockTimeoutError)
        handle.release()

    asyncio.run(main())


def test_a_time_out_thrown_into_the_wait_is_raised_as_it_is(table: LockTable) -> None:
    async def main() -> None:
        holder = await take_async(table)
        holder.callers.clear()
        wait = table.handle("k").acquire_async(SOON)
        wait.send(None)
        with pytest.raises(TimeoutError, match="from outside"):
            wait.throw(TimeoutError("from outside"))
        assert queued(table) == 0
        holder.release()

    asyncio.run(main())


def test_a_timed_out_waiter_disturbs_nobody(table: LockTable, threads: Threads) -> None:
    served = []

    def patient() -> None:
        handle = take(table)
        served.append("patient")
        handle.release()

    async def hurried() -> None:
        with pytest.raises(SessionLockTimeoutError):
            await take_async(table, timeout=0.001)

    handle = take(table)
    hurry = threads.start(asyncio.run, hurried())
    threads.start(patient)
    hurry.join(SOON)
    until(lambda: queued(table) == 1)
    handle.release()
    threads.join()
    assert served == ["patient"]


def test_ten_thousand_waiters_cancelled_at_once_leave_the_key_to_the_last(
    table: LockTable,
) -> None:
    async def main() -> None:
        handle = await take_async(table)
        tasks = [asyncio.create_task(take_async(table, timeout=None)) for _ in range(10_000)]
        await until_async(lambda: queued(table) == 10_000)
        random.shuffle(tasks)
        last = tasks.pop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handle.release()
        (await last).release()

    asyncio.run(main())


class Crowd:
    """Threads and tasks that want one key and give up at random."""

    def __init__(self, table: LockTable) -> None:
        self.taken = 0
        self._table = table
        self._inside: list[int] = []

    def enter(self) -> None:
        self._inside.append(threading.get_ident())
        assert len(self._inside) == 1
        self.taken += 1

    def thread(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            handle = self._table.handle("k")
            try:
                handle.acquire(chance.choice((0, 0.0005, 0.002, SOON)))
            except SessionLockTimeoutError:
                continue
            self.enter()
            time.sleep(0)
            self._inside.clear()
            handle.release()
            if chance.random() < 0.2:
                handle.release()  # once more, while others have the key and wait for it

    async def task(self, chance: random.Random) -> None:
        handle = self._table.handle("k")
        try:
            await handle.acquire_async(chance.choice((None, 0, 0.0005, 0.002, SOON)))
        except SessionLockTimeoutError:
            return
        try:
            self.enter()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        finally:
            self._inside.clear()
            handle.release()

    async def tasks(self, seed: int) -> None:
        chance = random.Random(seed)
        tasks: list[asyncio.Task[None]] = []
        for _ in range(600):
            tasks.append(asyncio.create_task(self.task(chance)))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
            if chance.random() < 0.4:
                chance.choice(tasks[-8:]).cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [one for one in results if isinstance(one, Exception)] == []


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", range(4))
def test_waiters_that_give_up_at_random_leave_the_key_unlocked(
    table: LockTable, threads: Threads, seed: int
) -> None:
    """Cancelled, timed out, both, in the middle of being given the key: never two inside, and
    none forever outside."""
    crowd = Crowd(table)
    for number in range(3):
        threads.start(asyncio.run, crowd.tasks(seed * 10 + number))
        threads.start(crowd.thread, seed * 10 + number)
    threads.join(60)
    assert crowd.taken > 300
    assert is_unlocked(table)
