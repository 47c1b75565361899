"""Who gets a key and when: order, exclusion, time-outs, cancellations, circles, turns."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
from conftest import Threads

from session_sync import (
    MemoryStorage,
    SessionDeadlockError,
    SessionLockTimeout,
    SessionManager,
    locks,
)
from session_sync.locks import Hold, KeyLock, LockTable, Turn
from session_sync.scope import in_handler

SOON = 10.0  # seconds until a test that waits for something in vain gives up


def until(condition: Callable[[], object]) -> None:
    """Let other threads run until something about them can be seen."""
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up, "this never came to be"
        time.sleep(0)


async def until_async(condition: Callable[[], object]) -> None:
    """Let other tasks (and threads) run until something about them can be seen."""
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up, "this never came to be"
        await asyncio.sleep(0)


def queued(table: LockTable, key: str = "k") -> int:
    """How many wait for a key."""
    lock = lock_of(table, key)
    return 0 if lock is None else len(lock._queue) + len(lock._turns)


def lock_of(table: LockTable, key: str = "k") -> Any:
    """Where others wait for a key; None if nobody has wanted it since it was taken."""
    first = table._locks.get(key)
    while first is not None and not isinstance(first, KeyLock):
        first = first._fate.get("lock")
    return first


def holder_of(table: LockTable, key: str = "k") -> Hold | None:
    """Who has a key that somebody has or wants."""
    first = table._locks[key]
    return first.hold if isinstance(first, KeyLock) else first.holder


def table_of(sessions: SessionManager[Any]) -> LockTable:
    return sessions._options.door.locks


def is_free(table: LockTable, key: str = "k") -> bool:
    hold = table.try_acquire(key)
    if hold is not None:
        hold.release()
    return hold is not None


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        self.loop.close()


@pytest.fixture
def loops() -> Iterator[Callable[[], Loop]]:
    made: list[Loop] = []

    def make() -> Loop:
        made.append(Loop())
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture
def table() -> LockTable:
    return LockTable()


@pytest.fixture
def sessions() -> SessionManager[Any]:
    return SessionManager()


@pytest.fixture(autouse=True)
def nothing_is_left(table: LockTable, sessions: SessionManager[Any]) -> Iterator[None]:
    """After every test here: no lock in the table, nobody noted as waiting."""
    yield
    assert len(table) == 0
    assert len(table_of(sessions)) == 0
    assert not locks._blocked_threads
    assert not locks._waiting_tasks


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# -- exclusion


@pytest.mark.usefixtures("hasty")
def test_eight_threads_lose_no_increment(sessions: SessionManager[Any], threads: Threads) -> None:
    begin = threading.Barrier(8)

    def work() -> None:
        begin.wait()
        for _ in range(2_000):
            with sessions.session_scope("k") as session:
                seen = session.get("counter", 0)
                time.sleep(0)
                session.counter = seen + 1

    for _ in range(8):
        threads.start(work)
    threads.join(60)
    assert sessions.storage.get("k") == {"counter": 16_000}


@pytest.mark.usefixtures("hasty")
def test_threads_and_coroutines_of_two_loops_lose_no_increment(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    async def coroutine() -> None:
        for _ in range(250):
            async with sessions.session_scope("k") as session:
                seen = session.get("counter", 0)
                await asyncio.sleep(0)
                session.counter = seen + 1

    async def coroutines() -> None:
        await asyncio.gather(*(coroutine() for _ in range(4)))

    def thread() -> None:
        for _ in range(250):
            with sessions.session_scope("k") as session:
                seen = session.get("counter", 0)
                time.sleep(0)
                session.counter = seen + 1

    for _ in range(8):
        threads.start(thread)
    for _ in range(2):
        threads.start(asyncio.run, coroutines())
    threads.join(60)
    assert sessions.storage.get("k") == {"counter": 4_000}


def test_different_keys_do_not_wait_for_each_other(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    all_inside = threading.Barrier(8, timeout=SOON)

    def work(key: str) -> None:
        with sessions.session_scope(key):
            all_inside.wait()

    for number in range(8):
        threads.start(work, f"k{number}")
    threads.join()


def test_a_key_is_released_once(table: LockTable) -> None:
    hold = table.acquire("k", None)
    hold.release()
    with pytest.raises(RuntimeError, match="'k' was released twice"):
        hold.release()
    again = table.acquire("k", None)
    with pytest.raises(RuntimeError, match="'k' was released twice"):
        hold.release()
    assert not is_free(table)
    again.release()


# -- first come, first served


def test_threads_and_coroutines_of_several_loops_stand_in_one_queue(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    served: list[int] = []
    one, two = loops(), loops()
    coroutines: list[Future[Any]] = []

    def thread(number: int) -> None:
        hold = table.acquire("k", SOON)
        served.append(number)
        hold.release()

    async def coroutine(number: int) -> None:
        hold = await table.acquire_async("k", SOON)
        served.append(number)
        hold.release()

    first = table.acquire("k", None)
    for number in range(90):
        way = random.choice((None, one, two))
        if way is None:
            threads.start(thread, number)
        else:
            coroutines.append(way.run(coroutine(number)))
        until(lambda there=number + 1: queued(table) == there)
    first.release()
    threads.join()
    for waiting in coroutines:
        waiting.result(SOON)
    assert served == list(range(90))


def test_scopes_of_threads_and_tasks_are_served_in_the_order_they_came(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    table = table_of(sessions)

    def thread(number: int) -> None:
        with sessions.session_scope("k") as session:
            session.setdefault("served", []).append(number)

    async def task(number: int) -> None:
        async with sessions.session_scope("k") as session:
            session.setdefault("served", []).append(number)

    async def main() -> None:
        tasks = []
        hold = await table.acquire_async("k", None)
        for number in range(40):
            if number % 2:
                threads.start(thread, number)
            else:
                tasks.append(asyncio.create_task(task(number)))
            await until_async(lambda there=number + 1: queued(table) == there)
        hold.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    threads.join()
    assert sessions.storage.get("k") == {"served": list(range(40))}


def test_a_newcomer_does_not_overtake_who_waits(table: LockTable, threads: Threads) -> None:
    """Between the release and the moment in which the next one runs, the key is not free."""
    entered, go_on = threading.Event(), threading.Event()

    def work() -> None:
        hold = table.acquire("k", SOON)
        entered.set()
        go_on.wait(SOON)
        hold.release()

    hold = table.acquire("k", None)
    threads.start(work)
    until(lambda: queued(table))
    hold.release()
    assert table.try_acquire("k") is None
    with pytest.raises(SessionLockTimeout):
        table.acquire("k", 0)
    assert entered.wait(SOON)
    go_on.set()
    threads.join()


# -- nothing is left behind


def test_a_million_keys_leave_nothing_behind() -> None:
    table = LockTable()
    for number in range(1_000):
        table.acquire(str(number), None).release()
    gc.collect()
    size = sys.getsizeof(table._locks)
    blocks = sys.getallocatedblocks()
    for number in range(1_000_000):
        hold = table.try_acquire(str(number))
        assert hold is not None
        hold.release()
    del hold
    gc.collect()
    assert len(table) == 0
    assert sys.getsizeof(table._locks) <= size
    assert sys.getallocatedblocks() - blocks < 1_000


def test_a_hundred_thousand_sessions_leave_no_lock_behind(sessions: SessionManager[Any]) -> None:
    def touch(keys: range) -> None:
        for number in keys:
            with sessions.session_scope(f"user:{number}"):
                pass

    touch(range(1_000))
    gc.collect()
    tracemalloc.start(1)
    try:
        touch(range(10_000))
        before, _ = tracemalloc.get_traced_memory()
        touch(range(10_000, 20_000))
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000  # bytes; a lock per key would be five millions
    touch(range(20_000, 100_000))
    assert len(table_of(sessions)) == 0


def test_many_held_at_once_leave_an_empty_table(table: LockTable) -> None:
    holds = [table.acquire(str(number), None) for number in range(10_000)]
    assert len(table) == 10_000
    for hold in holds:
        hold.release()
    assert len(table) == 0


def test_ten_thousand_coroutines_wait_without_a_thread(sessions: SessionManager[Any]) -> None:
    table = table_of(sessions)

    async def work() -> None:
        async with sessions.session_scope("k") as session:
            session.counter = session.get("counter", 0) + 1

    async def main() -> None:
        hold = await table.acquire_async("k", None)
        before = threading.active_count()
        tasks = [asyncio.create_task(work()) for _ in range(10_000)]
        await until_async(lambda: queued(table) == 10_000)
        assert threading.active_count() == before
        hold.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert sessions.storage.get("k") == {"counter": 10_000}


# -- waiters that go away


def test_a_cancelled_waiter_disturbs_nobody(table: LockTable) -> None:
    served = []

    async def work(number: int) -> None:
        hold = await table.acquire_async("k", None)
        served.append(number)
        hold.release()

    async def main() -> None:
        hold = await table.acquire_async("k", None)
        tasks = [asyncio.create_task(work(number)) for number in range(5)]
        await until_async(lambda: queued(table) == 5)
        for number in (0, 2, 4):
            tasks[number].cancel()
        await until_async(lambda: queued(table) == 2)
        hold.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [True, False, True, False, True]

    asyncio.run(main())
    assert served == [1, 3]


def test_a_task_cancelled_before_its_first_step_takes_nothing(
    sessions: SessionManager[Any],
) -> None:
    table = table_of(sessions)

    async def work() -> None:
        async with sessions.session_scope("k"):
            raise AssertionError("it ran")

    async def main() -> None:
        for held in (False, True):
            hold = await table.acquire_async("k", None) if held else None
            task = asyncio.create_task(work())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert queued(table) == 0
            if hold is not None:
                hold.release()
            assert is_free(table)

    asyncio.run(main())


@pytest.mark.parametrize("first", ["release", "cancel"])
def test_a_task_cancelled_in_the_moment_it_is_given_the_key_gives_it_on(
    table: LockTable, first: str
) -> None:
    async def main() -> None:
        hold = await table.acquire_async("k", None)
        chosen = asyncio.create_task(table.acquire_async("k", SOON))
        next_one = asyncio.create_task(table.acquire_async("k", SOON))
        await until_async(lambda: queued(table) == 2)
        if first == "release":
            hold.release()
            chosen.cancel()
        else:
            chosen.cancel()
            hold.release()
        with pytest.raises(asyncio.CancelledError):
            await chosen
        (await next_one).release()

    asyncio.run(main())


def test_a_task_whose_time_is_up_in_the_moment_it_is_given_the_key_has_it(
    table: LockTable,
) -> None:
    async def main() -> None:
        hold = await table.acquire_async("k", None)
        task = asyncio.create_task(table.acquire_async("k", 0))
        await asyncio.sleep(0)  # it queues, and its time-out is due in the next round
        assert queued(table) == 1
        hold.release()
        (await task).release()
        assert task.cancelling() == 0

    asyncio.run(main())


def test_a_thread_whose_time_is_up_in_the_moment_it_is_given_the_key_has_it(
    table: LockTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that cannot be had otherwise: the time-out comes first, then the release."""
    hold = table.acquire("k", None)
    hold.parties.clear()  # as if another thread had it

    def wait(_: object, __: float | None) -> bool:
        hold.release()
        return False

    monkeypatch.setattr(locks._ThreadWaiter, "wait", wait)
    table.acquire("k", 1).release()


def test_a_timed_out_waiter_disturbs_nobody(table: LockTable, threads: Threads) -> None:
    served = []

    def patient() -> None:
        hold = table.acquire("k", SOON)
        served.append("patient")
        hold.release()

    async def hurried() -> None:
        with pytest.raises(SessionLockTimeout):
            await table.acquire_async("k", 0.001)

    hold = table.acquire("k", None)
    hurry = threads.start(asyncio.run, hurried())
    threads.start(patient)
    hurry.join(SOON)
    until(lambda: queued(table) == 1)
    hold.release()
    threads.join()
    assert served == ["patient"]


def test_ten_thousand_waiters_cancelled_at_once_leave_the_key_to_the_last(
    table: LockTable,
) -> None:
    async def main() -> None:
        hold = await table.acquire_async("k", None)
        tasks = [asyncio.create_task(table.acquire_async("k", None)) for _ in range(10_000)]
        await until_async(lambda: queued(table) == 10_000)
        random.shuffle(tasks)
        last = tasks.pop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        hold.release()
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
            try:
                hold = self._table.acquire("k", chance.choice((0, 0.0005, 0.002, SOON)))
            except SessionLockTimeout:
                continue
            self.enter()
            time.sleep(0)
            self._inside.clear()
            hold.release()

    async def task(self, chance: random.Random) -> None:
        timeout = chance.choice((None, 0, 0.0005, 0.002, SOON))
        try:
            hold = await self._table.acquire_async("k", timeout)
        except SessionLockTimeout:
            return
        try:
            self.enter()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        finally:
            self._inside.clear()
            hold.release()

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
def test_waiters_that_give_up_at_random_leave_the_key_free(
    table: LockTable, threads: Threads, seed: int
) -> None:
    """Cancelled, timed out, both, in the middle of being given the key: never two inside, and
    none for ever outside."""
    crowd = Crowd(table)
    for number in range(3):
        threads.start(asyncio.run, crowd.tasks(seed * 10 + number))
        threads.start(crowd.thread, seed * 10 + number)
    threads.join(60)
    assert crowd.taken > 300
    assert is_free(table)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals between threads")
def test_an_interrupted_thread_leaves_the_queue(
    table: LockTable, threads: Threads, request: pytest.FixtureRequest
) -> None:
    hold = table.acquire("k", None)
    hold.parties.clear()  # as if another thread had it
    main, interrupted = threading.get_ident(), threading.Event()

    def only_once(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        until(lambda: queued(table) == 1)
        while not interrupted.is_set():  # a signal does not wake who is only about to wait
            signal.pthread_kill(main, signal.SIGINT)
            interrupted.wait(0.01)

    before = signal.signal(signal.SIGINT, only_once)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threads.start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        table.acquire("k", SOON)
    assert queued(table) == 0
    hold.release()
    assert is_free(table)


def test_interrupted_in_the_moment_it_is_given_the_key_it_gives_it_on(
    table: LockTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = table.acquire("k", None)
    hold.parties.clear()

    def wait(_: object, __: float | None) -> bool:
        hold.release()
        raise KeyboardInterrupt

    monkeypatch.setattr(locks._ThreadWaiter, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        table.acquire("k", 1)
    assert is_free(table)


# -- event loops that stand still


class StandingLoop:
    """An event loop of this thread, which runs only when told to."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda *_: None)  # of tasks destroyed while they wait

    def wait_for(self, table: LockTable, timeout: float | None = None) -> asyncio.Task[Hold]:
        """A coroutine that waits for the key, on a loop that then stops."""
        task = self.loop.create_task(table.acquire_async("k", timeout))
        before = queued(table)
        self.loop.run_until_complete(until_async(lambda: queued(table) == before + 1))
        return task

    def go_on(self, task: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(task, SOON))


@pytest.fixture
def standing() -> Iterator[StandingLoop]:
    made = StandingLoop()
    yield made
    if not made.loop.is_closed():
        made.loop.run_until_complete(asyncio.sleep(0))
        made.loop.close()


def foreign_hold(table: LockTable, threads: Threads) -> Callable[[], None]:
    """The key held by another thread; answers what makes it give the key back."""
    has_it, give_back = threading.Event(), threading.Event()

    def work() -> None:
        hold = table.acquire("k", SOON)
        has_it.set()
        give_back.wait(SOON)
        hold.release()

    thread = threads.start(work)
    assert has_it.wait(SOON)

    def release() -> None:
        give_back.set()
        thread.join(SOON)

    return release


def test_a_waiter_whose_loop_has_stopped_is_passed_over(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    release = foreign_hold(table, threads)
    task = standing.wait_for(table)
    behind = threads.start(lambda: table.acquire("k", SOON).release())
    until(lambda: queued(table) == 2)
    release()
    behind.join(SOON)
    table.acquire("k", SOON).release()  # newcomers do not wait for it either
    assert not task.done()
    standing.go_on(task).release()  # but once its loop moves, it has its turn


def test_a_loop_that_goes_on_finds_its_waiter_in_its_old_place(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    served: list[str] = []
    release = foreign_hold(table, threads)
    task = standing.wait_for(table)
    release()  # passed over
    release = foreign_hold(table, threads)

    def behind() -> None:
        hold = table.acquire("k", SOON)
        served.append("behind")
        hold.release()

    threads.start(behind)
    until(lambda: queued(table) == 2)
    standing.loop.run_until_complete(asyncio.sleep(0))  # it looks: the key is held; it waits on

    async def take() -> None:
        waiting = asyncio.ensure_future(task)
        threading.Thread(target=release, daemon=True).start()
        hold = await waiting
        served.append("first")
        hold.release()

    standing.go_on(take())
    threads.join()
    assert served == ["first", "behind"]


def test_a_stopped_waiter_whose_time_is_up_leaves(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    release = foreign_hold(table, threads)
    task = standing.wait_for(table, timeout=0.001)
    with pytest.raises(SessionLockTimeout):
        standing.go_on(task)
    release()


@pytest.mark.parametrize("passed_over", [False, True])
def test_a_waiter_whose_loop_was_closed_is_forgotten(
    table: LockTable, threads: Threads, standing: StandingLoop, passed_over: bool
) -> None:
    release = foreign_hold(table, threads)
    task = standing.wait_for(table)
    if passed_over:  # before it is closed the loop is told to look at the key
        release()
        release = foreign_hold(table, threads)
    standing.loop.close()
    lock = lock_of(table)
    behind = threads.start(lambda: table.acquire("k", SOON).release())
    until(lambda: queued(table) == 2)
    release()
    behind.join(SOON)
    assert len(table) == 0
    assert not locks._waiting_tasks
    # Its coroutine ends when the garbage collector comes, maybe in a thread that has the mutex.
    gone = weakref.ref(task)
    del task
    with lock._mutex:
        gc.collect()
    assert gone() is None
    assert is_free(table)


def test_a_waiter_that_looks_while_it_is_being_told_to_look_is_not_forgotten(
    table: LockTable, threads: Threads, standing: StandingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on in the very moment in which the releaser finds it standing."""
    release = foreign_hold(table, threads)
    task = standing.wait_for(table)
    (waiter,) = lock_of(table)._queue
    assert isinstance(waiter, locks._TaskWaiter)

    def call_at_once(look: Callable[[], None], *_: object) -> None:
        """As a loop does that goes on just now; but the key has been taken when it looks."""
        monkeypatch.undo()
        waiter._asked = False  # the first line of _look; the second one waits for the mutex

    monkeypatch.setattr(standing.loop, "call_soon_threadsafe", call_at_once)
    release()
    release = foreign_hold(table, threads)
    threading.Thread(target=release, daemon=True).start()
    standing.go_on(task).release()


# -- what a time-out says


def test_a_time_out_names_key_duration_and_the_thread_that_holds(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    hurried = SessionManager(storage=sessions.storage, lock_timeout=0.25)
    inside, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with sessions.session_scope("user:7"):
            inside.set()
            go_on.wait(SOON)

    threads.start(work, name="the slow one")
    assert inside.wait(SOON)
    begin = time.monotonic()
    with (
        pytest.raises(
            SessionLockTimeout,
            match=r"'user:7' was not free within 0\.25 s: .*thread 'the slow one', for 0\.\d s",
        ) as caught,
        hurried.session_scope("user:7"),
    ):
        pass
    assert 0.25 <= time.monotonic() - begin < SOON
    assert isinstance(caught.value, TimeoutError)
    go_on.set()
    threads.join()


def test_a_time_out_names_the_task_that_holds(sessions: SessionManager[Any]) -> None:
    hurried = SessionManager(storage=sessions.storage, lock_timeout=0.01)

    async def holder(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        async with sessions.session_scope("k"):
            inside.set()
            await go_on.wait()

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(inside, go_on), name="the slow one")
        await inside.wait()
        with pytest.raises(SessionLockTimeout, match="held by task 'the slow one', for"):
            async with hurried.session_scope("k"):
                pass
        go_on.set()
        await task

    asyncio.run(main())


def test_a_time_out_of_nothing_does_not_wait(table: LockTable, threads: Threads) -> None:
    table.acquire("k", 0).release()

    async def main() -> None:
        (await table.acquire_async("k", 0)).release()
        release = foreign_hold(table, threads)
        with pytest.raises(SessionLockTimeout, match="not free within 0 s"):
            await table.acquire_async("k", 0)
        with pytest.raises(SessionLockTimeout, match="not free within 0 s"):
            table.acquire("k", 0)
        release()

    asyncio.run(main())


def test_no_time_out_waits_for_as_long_as_it_takes(table: LockTable, threads: Threads) -> None:
    release = foreign_hold(table, threads)
    thread = threads.start(lambda: table.acquire("k", None).release())
    until(lambda: queued(table) == 1)
    assert thread.is_alive()
    release()
    threads.join()


@pytest.mark.parametrize("timeout", [1e300, float("inf"), threading.TIMEOUT_MAX * 2])
def test_an_enormous_time_out_is_none(table: LockTable, threads: Threads, timeout: float) -> None:
    release = foreign_hold(table, threads)

    async def wait() -> None:
        (await table.acquire_async("k", timeout)).release()

    threads.start(lambda: table.acquire("k", timeout).release())
    threads.start(asyncio.run, wait())
    until(lambda: queued(table) == 2)
    release()
    threads.join()


# -- waits that could never end: a loop's own thread


def test_a_blocking_with_for_a_key_that_the_same_loop_holds_is_refused_at_once(
    sessions: SessionManager[Any],
) -> None:
    async def holder(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        async with sessions.session_scope("k"):
            inside.set()
            await go_on.wait()

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(inside, go_on))
        await inside.wait()
        with (
            pytest.raises(SessionDeadlockError, match=r"'k' .*Use `async with"),
            sessions.session_scope("k"),
        ):
            pass
        go_on.set()
        await task
        with sessions.session_scope("k"):  # free: it works
            pass

    asyncio.run(main())


def test_a_blocking_with_behind_a_coroutine_of_the_same_loop_is_refused_at_once(
    table: LockTable, threads: Threads
) -> None:
    async def main() -> None:
        release = foreign_hold(table, threads)
        ahead = asyncio.create_task(table.acquire_async("k", SOON))
        await until_async(lambda: queued(table) == 1)
        with pytest.raises(SessionDeadlockError, match="waits for it ahead"):
            table.acquire("k", SOON)
        assert queued(table) == 1
        release()
        (await ahead).release()

    asyncio.run(main())


def test_a_blocking_with_on_a_loops_thread_waits_for_another_thread(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    async def work() -> None:
        hold = await table.acquire_async("k", SOON)
        has_it.set()
        await until_async(lambda: queued(table) == 1)
        hold.release()

    async def main() -> None:
        table.acquire("k", SOON).release()

    for _ in range(2):  # held by a coroutine of another loop, then by a thread
        has_it = threading.Event()
        other = loops().run(work())
        assert has_it.wait(SOON)
        asyncio.run(main())
        other.result(SOON)

    release = foreign_hold(table, threads)
    blocked = threads.start(asyncio.run, main())
    until(lambda: queued(table) == 1)
    release()
    blocked.join(SOON)


def test_a_turn_that_was_queued_on_the_loops_thread_is_no_coroutine(
    table: LockTable, threads: Threads
) -> None:
    """A webhook may queue updates on its loop; it is the workers who will run them."""

    async def main() -> None:
        release = foreign_hold(table, threads)
        turn = table.queue_turn("k", claim_in(threads, lambda _: None))
        threads.start(lambda: (until(lambda: queued(table) == 2), release()))
        table.acquire("k", SOON).release()
        assert turn.place is None

    asyncio.run(main())


def test_a_blocked_loop_that_stands_in_the_way_of_its_own_key_is_seen(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    """The loop's thread wants `a` from a thread that queues for `b` behind a coroutine of that
    very loop, which will be given `b` and cannot run."""
    has_a, got_b = threading.Event(), threading.Event()
    loop = loops()
    b = table.acquire("b", None)

    async def ahead() -> None:
        (await table.acquire_async("b", SOON)).release()

    def thread() -> None:
        a = table.acquire("a", SOON)
        has_a.set()
        table.acquire("b", SOON).release()
        got_b.set()
        a.release()

    async def block() -> None:
        with pytest.raises(SessionDeadlockError, match="'a' would never end"):
            table.acquire("a", SOON)

    coroutine = loop.run(ahead())
    until(lambda: queued(table, "b") == 1)
    threads.start(thread)
    until(lambda: queued(table, "b") == 2)
    assert has_a.is_set()
    loop.run(block()).result(SOON)
    b.release()
    coroutine.result(SOON)
    threads.join()


def test_a_thread_behind_a_coroutine_whose_loop_waits_for_that_thread_is_refused(
    table: LockTable, loops: Callable[[], Loop], threads: Threads
) -> None:
    """The same circle, closed from the other side."""
    loop = loops()
    b = table.acquire("b", None)
    a_taken, refused = threading.Event(), threading.Event()

    async def ahead() -> None:
        (await table.acquire_async("b", SOON)).release()

    async def block() -> None:
        table.acquire("a", SOON).release()

    def thread() -> None:
        a = table.acquire("a", SOON)
        a_taken.set()
        until(lambda: queued(table, "a") == 1)
        with pytest.raises(SessionDeadlockError, match="'b' would never end"):
            table.acquire("b", SOON)
        refused.set()
        a.release()

    coroutine = loop.run(ahead())
    until(lambda: queued(table, "b") == 1)
    threads.start(thread)
    assert a_taken.wait(SOON)
    blocked = loop.run(block())
    assert refused.wait(SOON)
    b.release()
    blocked.result(SOON)
    coroutine.result(SOON)
    threads.join()


# -- waits that could never end: circles


def circle_of_threads(sessions: SessionManager[Any], threads: Threads, size: int) -> None:
    all_have_one = threading.Barrier(size, timeout=SOON)
    refused: list[SessionDeadlockError] = []
    went_on: list[int] = []

    def work(number: int) -> None:
        with sessions.session_scope(f"k{number}"):
            all_have_one.wait()
            try:
                with sessions.session_scope(f"k{(number + 1) % size}"):
                    went_on.append(number)
            except SessionDeadlockError as error:
                refused.append(error)

    for number in range(size):
        threads.start(work, number)
    threads.join(SOON)  # less than lock_timeout: nobody was freed by a time-out
    assert len(refused) == 1
    assert len(went_on) == size - 1
    assert "in the same order everywhere" in str(refused[0])


@pytest.mark.parametrize("size", [2, 3, 7])
def test_of_threads_in_a_circle_exactly_one_is_refused(
    sessions: SessionManager[Any], threads: Threads, size: int
) -> None:
    for _ in range(20):
        circle_of_threads(sessions, threads, size)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_of_tasks_in_a_circle_exactly_one_is_refused(
    sessions: SessionManager[Any], size: int
) -> None:
    async def work(number: int, all_have_one: asyncio.Barrier) -> None:
        async with sessions.session_scope(f"k{number}"):
            await all_have_one.wait()
            async with sessions.session_scope(f"k{(number + 1) % size}"):
                pass

    async def main() -> None:
        barrier = asyncio.Barrier(size)
        results = await asyncio.wait_for(
            asyncio.gather(*(work(n, barrier) for n in range(size)), return_exceptions=True), SOON
        )
        assert [type(one) for one in results if one] == [SessionDeadlockError]

    asyncio.run(main())


def test_a_circle_of_threads_and_tasks_of_two_loops_is_seen(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    size = 6
    all_have_one = threading.Barrier(size)
    refused: list[int] = []

    def thread(number: int) -> None:
        hold = table.acquire(str(number), SOON)
        all_have_one.wait(SOON)
        try:
            table.acquire(str((number + 1) % size), SOON).release()
        except SessionDeadlockError:
            refused.append(number)
        hold.release()

    async def task(number: int) -> None:
        hold = await table.acquire_async(str(number), SOON)
        await asyncio.to_thread(all_have_one.wait, SOON)
        try:
            (await table.acquire_async(str((number + 1) % size), SOON)).release()
        except SessionDeadlockError:
            refused.append(number)
        hold.release()

    one, two = loops(), loops()
    running = []
    for number in range(size):
        if number % 3 == 0:
            threads.start(thread, number)
        else:
            running.append((one if number % 3 == 1 else two).run(task(number)))
    threads.join(SOON)
    for future in running:
        future.result(SOON)
    for loop in (one, two):
        loop.run(loop.loop.shutdown_default_executor()).result(SOON)
    assert len(refused) == 1


@pytest.mark.usefixtures("hasty")
def test_two_who_begin_to_wait_at_once_are_looked_at_one_after_the_other(
    sessions: SessionManager[Any], threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both would find the other one not waiting yet, and then wait for each other."""
    look = KeyLock._deadlock_of
    looking: list[object] = []

    def look_slowly(lock: KeyLock, waiter: Any) -> str:
        looking.append(waiter)
        assert looking == [waiter]
        for _ in range(100):
            time.sleep(0)
        reason = look(lock, waiter)
        looking.clear()
        return reason

    monkeypatch.setattr(KeyLock, "_deadlock_of", look_slowly)
    for _ in range(10):
        circle_of_threads(sessions, threads, 4)


def test_who_wants_a_key_twice_without_joining_is_refused(table: LockTable) -> None:
    hold = table.acquire("k", None)
    with pytest.raises(SessionDeadlockError):
        table.acquire("k", None)
    hold.release()

    async def main() -> None:
        hold = await table.acquire_async("k", None)
        with pytest.raises(SessionDeadlockError):
            await table.acquire_async("k", None)
        hold.release()

    asyncio.run(main())


def test_a_circle_through_somebody_who_joined_is_seen(sessions: SessionManager[Any]) -> None:
    """`a` is held by a task and a child of it; the child waits for `b`, whose holder wants `a`."""

    async def child() -> None:
        async with sessions.session_scope("a"), sessions.session_scope("b"):
            pass

    async def one(b_taken: asyncio.Event) -> None:
        async with sessions.session_scope("a"):
            await b_taken.wait()
            await asyncio.create_task(child())

    async def two(b_taken: asyncio.Event) -> None:
        async with sessions.session_scope("b"):
            b_taken.set()
            await until_async(lambda: queued(table_of(sessions), "b") == 1)
            async with sessions.session_scope("a"):
                pass

    async def main() -> None:
        b_taken = asyncio.Event()
        results = await asyncio.wait_for(
            asyncio.gather(one(b_taken), two(b_taken), return_exceptions=True), SOON
        )
        assert [type(one) for one in results] == [type(None), SessionDeadlockError]

    asyncio.run(main())


def test_a_chain_of_thousands_is_followed_to_its_end(table: LockTable) -> None:
    size = 3_000

    async def work(number: int) -> None:
        hold = await table.acquire_async(str(number), None)
        await all_have_one.wait()
        try:
            (await table.acquire_async(str((number + 1) % size), None)).release()
        finally:
            hold.release()

    async def main() -> None:
        # Not by work() itself: in this order the chain grows at its far end.
        tasks = [asyncio.create_task(work(number)) for number in range(size)]
        await until_async(lambda: len(table) == size)
        all_have_one.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in results if one] == [SessionDeadlockError]

    all_have_one = asyncio.Event()
    asyncio.run(main())


# -- no false alarms


def test_a_new_thread_is_not_taken_for_one_that_has_ended(table: LockTable) -> None:
    """The system gives the number of an ended thread to the next one."""
    holds: list[Hold] = []
    idents: list[int | None] = []

    def enter() -> None:
        holds.append(table.acquire("k", None))

    def wait() -> None:
        idents.append(threading.get_ident())
        with pytest.raises(SessionLockTimeout, match="thread 'the first'"):
            table.acquire("k", 0)
        done.append(True)

    done: list[bool] = []
    for _ in range(20):
        first = threading.Thread(target=enter, name="the first")
        first.start()
        first.join()
        second = threading.Thread(target=wait)
        second.start()
        second.join()
        holds.pop().release()
        if idents[-1] == first.ident:
            break
    assert all(done)
    assert len(done) == len(idents)
    if idents[-1] != first.ident:
        pytest.skip("this system gave every thread a new number")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", range(4))
def test_keys_taken_in_the_same_order_everywhere_are_never_refused(
    table: LockTable, threads: Threads, loops: Callable[[], Loop], seed: int
) -> None:
    keys = [str(number) for number in range(6)]

    def thread(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            holds = [table.acquire(key, SOON) for key in keys if chance.random() < 0.5]
            time.sleep(0)
            chance.shuffle(holds)
            for hold in holds:
                hold.release()

    async def task(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            holds = [await table.acquire_async(key, SOON) for key in keys if chance.random() < 0.5]
            await asyncio.sleep(0)
            chance.shuffle(holds)
            for hold in holds:
                hold.release()

    one, two = loops(), loops()
    running = [(one, two)[n % 2].run(task(seed * 100 + n)) for n in range(6)]
    for number in range(6):
        threads.start(thread, seed * 100 + 50 + number)
    for future in running:
        future.result(60)
    threads.join(60)


# -- joining


def test_scopes_of_one_key_inside_each_other_share_the_session(
    sessions: SessionManager[Any],
) -> None:
    with sessions.session_scope("k") as outer:
        outer.counter = 1
        with sessions.session_scope("k") as inner:
            assert inner is outer
            with sessions.session_scope("k") as innermost:
                innermost.counter += 1
        assert sessions.storage.get("k") is None  # it closes when the last one leaves
    assert sessions.storage.get("k") == {"counter": 2}

    async def main() -> None:
        async with sessions.session_scope("k") as outer:
            with sessions.session_scope("k") as plain:
                assert plain is outer
            async with sessions.session_scope("k") as inner:
                assert inner is outer
                inner.counter += 1

    asyncio.run(main())
    assert sessions.storage.get("k") == {"counter": 3}


def test_children_of_a_gather_take_turns(sessions: SessionManager[Any]) -> None:
    inside = []

    async def child() -> None:
        for _ in range(20):
            async with sessions.session_scope("k") as session:
                inside.append(1)
                assert len(inside) == 1
                seen = session.counter
                await asyncio.sleep(0)
                session.counter = seen + 1
                inside.clear()

    async def main() -> None:
        async with sessions.session_scope("k") as session:
            session.counter = 0
            await asyncio.gather(*(child() for _ in range(8)))

    asyncio.run(main())
    assert sessions.storage.get("k") == {"counter": 160}


@pytest.mark.usefixtures("hasty")
def test_threads_with_a_copied_context_take_turns(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    def work() -> None:
        for _ in range(100):
            with sessions.session_scope("k") as session:
                seen = session.counter
                time.sleep(0)
                session.counter = seen + 1

    with sessions.session_scope("k") as session:
        session.counter = 0
        for _ in range(8):
            threads.start(contextvars.copy_context().run, work)
        threads.join()
    assert sessions.storage.get("k") == {"counter": 800}


def test_to_thread_joins_and_run_in_executor_waits_for_its_own_caller(
    sessions: SessionManager[Any],
) -> None:
    hurried = SessionManager(storage=sessions.storage, lock_timeout=0.01)

    def work() -> int:
        with hurried.session_scope("k") as session:
            session.counter += 1
            return session.counter

    async def main() -> None:
        async with hurried.session_scope("k") as session:
            session.counter = 0
            assert await asyncio.to_thread(work) == 1
            assert session.counter == 1
            with (
                ThreadPoolExecutor(1) as pool,
                pytest.raises(SessionLockTimeout, match="held by task"),
            ):
                await asyncio.get_running_loop().run_in_executor(pool, work)
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(main())


def test_joiners_that_are_cancelled_let_the_others_have_their_turn(
    sessions: SessionManager[Any],
) -> None:
    async def child(number: int) -> None:
        async with sessions.session_scope("k") as session:
            seen = session.counter
            await asyncio.sleep(0)
            session.counter = seen + 1

    async def main() -> None:
        async with sessions.session_scope("k") as session:
            session.counter = 0
            children = [asyncio.create_task(child(number)) for number in range(40)]
            for number, one in enumerate(children):
                if number % 3 == 0:
                    one.cancel()
                await asyncio.sleep(0)
            results = await asyncio.gather(*children, return_exceptions=True)
            assert not [one for one in results if isinstance(one, Exception)]
            assert session.counter == sum(one is None for one in results)

    asyncio.run(main())


def test_a_task_that_outlives_its_opener_keeps_the_key(sessions: SessionManager[Any]) -> None:
    async def detached(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        async with sessions.session_scope("k") as session:
            inside.set()
            await go_on.wait()
            session.late = True

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        async with sessions.session_scope("k") as session:
            session.early = True
            task = asyncio.create_task(detached(inside, go_on), name="detached")
            await inside.wait()
        assert sessions.storage.get("k") is None
        with pytest.raises(SessionLockTimeout, match=r"held by task 'detached'"):
            await table_of(sessions).acquire_async("k", 0.001)
        go_on.set()
        await task
        assert sessions.storage.get("k") == {"early": True, "late": True}

    asyncio.run(main())


def test_a_context_inherited_from_a_closed_scope_joins_nothing(
    sessions: SessionManager[Any],
) -> None:
    with sessions.session_scope("k") as session:
        session.counter = 1
        context = contextvars.copy_context()

    def job() -> Any:
        with sessions.session_scope("k") as later:
            assert later is not session
            later.counter += 1
        return later

    context.run(job)
    assert sessions.storage.get("k") == {"counter": 2}


def test_two_managers_on_one_store_exclude_each_other_and_two_stores_do_not(
    threads: Threads,
) -> None:
    store = MemoryStorage()
    one, two = SessionManager(storage=store), SessionManager(storage=store, lock_timeout=0.001)
    other = SessionManager(storage=MemoryStorage(), lock_timeout=0.001)

    def outside() -> None:
        with pytest.raises(SessionLockTimeout), two.session_scope("k"):
            pass
        with other.session_scope("k"):
            pass

    with one.session_scope("k"):
        threads.start(outside)
        threads.join()


def test_a_scope_entered_in_one_thread_can_be_left_in_another(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    scope = sessions.session_scope("k")
    threads.start(scope.__enter__)
    threads.join()
    assert not is_free(table_of(sessions))
    scope.__exit__(None, None, None)
    assert is_free(table_of(sessions))


# -- turns: tasks that have not begun


def claim_in(threads: Threads, work: Callable[[Hold], object]) -> Callable[[Turn], None]:
    """What a Turn calls: a new thread claims it, does `work` and gives the key back."""

    def run(turn: Turn) -> None:
        hold = turn.claim()
        if hold is not None:
            work(hold)
            hold.release()

    return lambda turn: (threads.start(run, turn), None)[1]


def test_a_turn_is_called_at_once_if_the_key_is_free_and_holds_nothing_before_it_claims(
    table: LockTable,
) -> None:
    called: list[Turn] = []
    turn = table.queue_turn("k", called.append)
    assert called == [turn]
    assert holder_of(table) is None
    hold = turn.claim()
    assert hold is not None
    assert turn.claim() is None
    assert table.try_acquire("k") is None
    turn.withdraw()  # no error, and nothing happens: it was taken
    assert holder_of(table) is hold
    hold.release()
    turn.withdraw()
    assert len(table) == 0


def test_who_comes_in_the_moment_in_which_a_turn_claims_passes_it(
    table: LockTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Turn] = []
    turn = table.queue_turn("k", called.append)
    passer: list[Hold] = []
    look_around = locks.here

    def here() -> Any:
        """Somebody is quicker than who claims, and is who he says he is."""
        monkeypatch.setattr(locks, "here", look_around)
        passer.append(table.acquire("k", 0, passes=True))
        return look_around()

    monkeypatch.setattr(locks, "here", here)
    assert turn.claim() is None
    assert holder_of(table) is passer[0]
    assert called == [turn]
    passer[0].release()
    assert called == [turn, turn]
    hold = turn.claim()
    assert hold is not None
    hold.release()


def test_who_finds_the_lock_of_a_turn_finds_the_turn_in_its_queue(
    table: LockTable, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Turn] = []
    served: list[str] = []
    turn = table.queue_turn("k", called.append)
    enter = KeyLock._enter

    def behind(name: str) -> None:
        hold = table.acquire("k", SOON)
        served.append(name)
        hold.release()

    def enter_late(lock: KeyLock, waiter: Any, queue: Any) -> None:
        monkeypatch.setattr(KeyLock, "_enter", enter)
        threads.start(behind, "second").join(0.1)  # it would be done by then, if it could
        enter(lock, waiter, queue)

    monkeypatch.setattr(KeyLock, "_enter", enter_late)
    threads.start(behind, "first")
    until(lambda: queued(table) == 3)
    assert served == []
    hold = turn.claim()
    assert hold is not None
    served.append("turn")
    hold.release()
    threads.join()
    assert served[0] == "turn"
    assert called == [turn]


def test_a_turn_is_withdrawn_in_the_moment_in_which_somebody_wants_the_key(
    table: LockTable, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = table.queue_turn("k", lambda _: None)
    enter = KeyLock._enter

    def enter_late(lock: KeyLock, waiter: Any, queue: Any) -> None:
        monkeypatch.setattr(KeyLock, "_enter", enter)
        threads.start(turn.withdraw).join(0.1)  # it would be done by then, if it could
        enter(lock, waiter, queue)

    monkeypatch.setattr(KeyLock, "_enter", enter_late)
    table.acquire("k", SOON).release()
    threads.join()


def test_turns_are_called_one_after_the_other_in_the_order_they_came(table: LockTable) -> None:
    called: list[Turn] = []
    turns = [table.queue_turn("k", called.append) for _ in range(50)]
    for number, turn in enumerate(turns):
        assert called == turns[: number + 1]
        hold = turn.claim()
        assert hold is not None
        assert called == turns[: number + 1]
        hold.release()
    assert called == turns


def test_turns_threads_and_coroutines_stand_in_one_queue(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    served: list[int] = []
    loop = loops()
    coroutines = []

    async def coroutine(number: int) -> None:
        hold = await table.acquire_async("k", SOON)
        served.append(number)
        hold.release()

    def thread(number: int) -> None:
        hold = table.acquire("k", SOON)
        served.append(number)
        hold.release()

    first = table.acquire("k", None)
    for number in range(60):
        if number % 3 == 0:
            table.queue_turn("k", claim_in(threads, lambda _, n=number: served.append(n)))
        elif number % 3 == 1:
            threads.start(thread, number)
        else:
            coroutines.append(loop.run(coroutine(number)))
        until(lambda there=number + 1: queued(table) == there)
    first.release()
    for future in coroutines:
        future.result(SOON)
    until(lambda: len(served) == 60)
    threads.join()
    assert served == list(range(60))


def test_who_is_inside_a_handler_passes_turns_and_others_do_not(
    table: LockTable, threads: Threads
) -> None:
    called: list[Turn] = []
    served: list[str] = []
    turn = table.queue_turn("k", called.append)  # on its way, say in the queue of a busy pool

    def behind() -> None:
        hold = table.acquire("k", SOON)
        served.append("behind")
        hold.release()

    threads.start(behind)
    until(lambda: queued(table) == 2)
    table.acquire("k", SOON, passes=True).release()  # at once
    assert served == []
    hold = table.acquire("k", SOON, passes=True)
    assert turn.claim() is None  # somebody has passed
    assert called == [turn]
    hold.release()
    assert called == [turn, turn]  # so it is called again
    hold = turn.claim()
    assert hold is not None
    served.append("turn")
    hold.release()
    threads.join()
    assert served == ["turn", "behind"]


def test_who_passes_turns_still_queues_behind_those_who_have_begun(
    table: LockTable, threads: Threads
) -> None:
    served: list[str] = []

    def work(name: str, passes: bool) -> None:
        hold = table.acquire("k", SOON, passes)
        served.append(name)
        hold.release()

    first = table.acquire("k", None)
    threads.start(work, "one", False)
    until(lambda: queued(table) == 1)
    table.queue_turn("k", claim_in(threads, lambda _: served.append("turn")))
    threads.start(work, "behind the turn", False)
    until(lambda: queued(table) == 3)
    threads.start(work, "inside a handler", True)
    until(lambda: queued(table) == 4)
    first.release()
    until(lambda: len(served) == 4)
    threads.join()
    assert served == ["one", "inside a handler", "turn", "behind the turn"]


def test_once_the_turn_ahead_is_over_who_stood_behind_it_is_passed_no_more(
    table: LockTable, threads: Threads
) -> None:
    served: list[str] = []

    def work(name: str, passes: bool) -> None:
        hold = table.acquire("k", SOON, passes)
        served.append(name)
        hold.release()

    turn = table.queue_turn("k", lambda _: None)
    threads.start(work, "behind the turn", False)
    until(lambda: queued(table) == 2)
    later = table.queue_turn("k", claim_in(threads, lambda _: served.append("later turn")))
    hold = turn.claim()
    assert hold is not None
    threads.start(work, "inside a handler", True)
    until(lambda: queued(table) == 3)
    hold.release()
    until(lambda: later.place is None and len(served) == 3)
    threads.join()
    assert served == ["behind the turn", "inside a handler", "later turn"]


def test_a_called_turn_that_is_withdrawn_lets_the_next_in(
    table: LockTable, threads: Threads
) -> None:
    called: list[Turn] = []
    first = table.queue_turn("k", called.append)
    second = table.queue_turn("k", called.append)
    thread = threads.start(lambda: table.acquire("k", SOON).release())
    until(lambda: queued(table) == 3)
    assert second.claim() is None  # it has not been called
    first.withdraw()
    assert called == [first, second]
    assert first.claim() is None
    second.withdraw()
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_turn_is_withdrawn_while_the_key_is_held(table: LockTable) -> None:
    called: list[Turn] = []
    hold = table.acquire("k", None)
    turns = [table.queue_turn("k", called.append) for _ in range(3)]
    turns[0].withdraw()
    turns[0].withdraw()
    hold.release()
    assert called == [turns[1]]
    turns[2].withdraw()
    turns[1].withdraw()
    assert len(table) == 0


def test_a_time_out_behind_a_turn_says_that_nobody_holds(table: LockTable) -> None:
    turn = table.queue_turn("k", lambda _: None)
    with pytest.raises(SessionLockTimeout, match="a task that waits for a worker"):
        table.acquire("k", 0)
    turn.withdraw()


def test_ten_thousand_turns_of_one_key_are_no_burden(table: LockTable) -> None:
    called: SimpleQueue[Turn] = SimpleQueue()
    for _ in range(10_000):
        table.queue_turn("k", called.put)
    for _ in range(10_000):
        hold = called.get_nowait().claim()
        assert hold is not None
        hold.release()
    assert called.empty()


class Pool:
    """A pool of workers as a framework has it: it runs turns, each in the session of its key."""

    def __init__(self, sessions: SessionManager[Any], workers: int, threads: Threads) -> None:
        self._sessions = sessions
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._size = workers
        self._over = threading.Semaphore(0)
        for _ in range(workers):
            threads.start(self._work)

    def queue(self, key: str, inner: list[str]) -> None:
        """A task for the session of `key`, inside which it opens others, one after the other."""
        table_of(self._sessions).queue_turn(
            key, lambda turn: self._jobs.put(lambda: self._run(turn, key, inner))
        )

    def queue_and_withdraw(self, key: str) -> None:
        turn = table_of(self._sessions).queue_turn(key, lambda turn: self._jobs.put(turn.claim))
        turn.withdraw()

    def finish(self, jobs: int) -> None:
        for _ in range(jobs):
            assert self._over.acquire(timeout=SOON)
        for _ in range(self._size):
            self._jobs.put(None)

    def _work(self) -> None:
        in_handler.set(True)
        while (job := self._jobs.get()) is not None:
            # A turn that was claimed although it had been withdrawn would never be given back.
            assert job() is None

    def _run(self, turn: Turn, key: str, inner: list[str]) -> None:
        hold = turn.claim()
        if hold is None:
            return
        scope = self._sessions.scope_of(key, None)
        scope.hold = hold
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
    threads: Threads, sessions: SessionManager[Any], workers: int, seed: int
) -> None:
    """Sessions for which others are queued are opened inside others (in one order everywhere),
    while a thread and a coroutine come and go and some turns are withdrawn."""
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


# -- fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_keeps_what_its_own_thread_holds_and_nothing_else() -> None:
    script = """
        import os, sys, threading, warnings
        from session_sync import SessionLockTimeout
        from session_sync import locks
        warnings.simplefilter("ignore", DeprecationWarning)
        table = locks.LockTable()
        held, go_on = threading.Event(), threading.Event()

        def other():
            hold = table.acquire("theirs", None)
            held.set()
            go_on.wait(30)
            hold.release()

        def waiter():
            table.acquire("ours", 30).release()

        ours = table.acquire("ours", None)
        table.queue_turn("not begun", lambda turn: None)
        table.queue_turn("passed", lambda turn: None)
        passed = table.acquire("passed", None, passes=True)
        threads = [threading.Thread(target=other), threading.Thread(target=waiter)]
        for thread in threads:
            thread.start()
        held.wait(30)
        while not table._lock("ours")._queue:
            pass
        locks._waits_mutex.acquire()  # as if a third thread were about to wait
        table._lock("theirs")._mutex.acquire()
        table._lock("ours")._mutex.acquire()
        child = os.fork()
        if child == 0:
            table.acquire("theirs", 1).release()
            table.acquire("not begun", 1).release()
            assert table.try_acquire("passed") is None
            passed.release()
            answer = []
            def wait():
                try:
                    table.acquire("ours", 0)
                except SessionLockTimeout:
                    answer.append("held")
                table.acquire("ours", 10).release()
                answer.append("free")
            thread = threading.Thread(target=wait)
            thread.start()
            while not answer:
                pass
            ours.release()
            thread.join(20)
            os._exit(0 if answer == ["held", "free"] and not len(table) else 1)
        locks._waits_mutex.release()
        table._lock("theirs")._mutex.release()
        table._lock("ours")._mutex.release()
        ours.release()
        go_on.set()
        for thread in threads:
            thread.join()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- locks in and out of the table


def test_who_found_a_lock_that_has_left_the_table_asks_the_table_again(
    table: LockTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = table.acquire("k", None)
    old = lock_of(table)
    hold.release()
    assert old.acquire(0) is None
    assert asyncio.run(old.acquire_async(0)) is None
    assert not old.queue_turn(Turn("k", lambda _: None, {}))

    look_up = LockTable._lock

    def too_late(table: LockTable, key: str) -> KeyLock:
        """Finds the lock; by the time it is looked at, it has left the table."""
        monkeypatch.setattr(LockTable, "_lock", look_up)
        return old

    monkeypatch.setattr(LockTable, "_lock", too_late)
    hold = table.acquire("k", 0)
    assert not is_free(table)
    hold.release()


def test_who_comes_in_the_moment_in_which_a_key_is_let_go_looks_again_until_it_is(
    table: LockTable, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = table.try_acquire("k")
    assert hold is not None
    hold._fate["lock"] = None  # the owner's first step
    looked = threading.Event()
    monkeypatch.setattr(locks.time, "sleep", lambda _: looked.set())
    got: list[Hold] = []
    threads.start(lambda: got.append(table.acquire("k", SOON)))
    assert looked.wait(SOON)
    assert not got
    del table._locks["k"]  # and the second one
    threads.join()
    got[0].release()


def test_an_interrupt_while_a_key_is_let_go_locks_nobody_out(table: LockTable) -> None:
    class Interrupted(dict[str, Any]):
        interrupts = 1

        def get(self, key: str, default: Any = None) -> Any:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return super().get(key, default)

    table._locks = Interrupted()  # type: ignore[misc] # it is final
    hold = table.try_acquire("k")
    assert hold is not None
    with pytest.raises(KeyboardInterrupt):
        hold.release()
    assert is_free(table)


def test_a_lock_without_a_table_is_never_retired() -> None:
    lock = KeyLock("k")
    for _ in range(3):
        hold = lock.acquire(0)
        assert hold is not None
        hold.release()
    assert not lock.retired
