"""Which caller gets a key and when: exclusion, order, releases, and what a time-out says."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from counting import lines_run
from lock_tools import Loop, is_unlocked, queued, table_of, take, take_async, take_elsewhere
from waiting import SOON, until, until_async

from session_sync import MemoryStorage, SessionLockTimeoutError, SessionManager
from session_sync.locks.lock import LockHandle
from session_sync.locks.table import LockTable

table = pytest.fixture(lock_tools.make_table)
sessions = pytest.fixture(lock_tools.make_sessions)
loops = pytest.fixture(lock_tools.make_loops)
hasty = pytest.fixture(lock_tools.make_hasty)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


# -- exclusion


@pytest.mark.usefixtures("hasty")
def test_eight_threads_lose_no_increment(sessions: SessionManager[Any], threads: Threads) -> None:
    begin = threading.Barrier(8)

    def work() -> None:
        begin.wait()
        for _ in range(1_000):
            with sessions.session_scope("k") as session:
                seen = session.get("counter", 0)
                time.sleep(0)
                session.counter = seen + 1

    for _ in range(8):
        threads.start(work)
    threads.join(60)
    assert sessions.storage.get("k") == {"counter": 8_000}
    assert len(sessions.locks) == 0


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
    assert len(sessions.locks) == 0


@pytest.mark.usefixtures("hasty")
def test_many_handles_that_only_try_never_have_one_key_at_once(
    table: LockTable, threads: Threads
) -> None:
    inside: list[LockHandle] = []
    begin = threading.Barrier(4)

    def work() -> None:
        begin.wait()
        for _ in range(3_000):
            handle = table.handle("k")
            if handle.try_acquire():
                inside.append(handle)
                assert inside == [handle]
                inside.clear()
                handle.release()

    for _ in range(4):
        threads.start(work)
    threads.join(60)


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


def test_two_managers_on_one_store_exclude_each_other_and_two_stores_do_not(
    threads: Threads,
) -> None:
    store = MemoryStorage()
    one, two = SessionManager(storage=store), SessionManager(storage=store, lock_timeout=0.001)
    other = SessionManager(storage=MemoryStorage(), lock_timeout=0.001)

    def outside() -> None:
        with pytest.raises(SessionLockTimeoutError), two.session_scope("k"):
            pass
        with other.session_scope("k"):
            pass

    with one.session_scope("k"):
        threads.start(outside)
        threads.join()


# -- what a handle is


def test_a_handle_has_the_key_from_acquire_to_release(table: LockTable) -> None:
    handle = table.handle("k")
    assert not handle.is_held
    assert len(table) == 0
    handle.acquire(None)
    assert handle.is_held
    assert not table.handle("k").try_acquire()
    handle.release()
    assert not handle.is_held


def test_a_release_of_what_was_never_acquired_does_no_harm(table: LockTable) -> None:
    table.handle("k").release()
    holder = take(table)
    table.handle("k").release()
    assert holder.is_held
    holder.release()


def test_a_second_release_does_no_harm_to_the_next_holder(table: LockTable) -> None:
    first = take(table)
    first.release()
    first.release()
    second = take(table)
    first.release()
    assert second.is_held
    assert not is_unlocked(table)
    second.release()


def test_a_second_release_does_no_harm_while_others_wait(
    table: LockTable, threads: Threads
) -> None:
    first = take(table)
    first.release()
    release = take_elsewhere(table, threads)
    waiter = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 1)
    first.release()
    assert not is_unlocked(table)
    assert queued(table) == 1
    release()
    waiter.join(SOON)


def test_a_handle_is_used_again_after_its_release(table: LockTable, threads: Threads) -> None:
    handle = table.handle("k")
    for _ in range(3):
        release = take_elsewhere(table, threads)
        assert not handle.try_acquire()
        threads.start(lambda release=release: (until(lambda: queued(table)), release()))
        handle.acquire(SOON)
        assert handle.is_held
        handle.release()
        threads.join()


def test_a_handle_that_is_released_while_it_waits_leaves_the_queue(
    table: LockTable, threads: Threads
) -> None:
    release = take_elsewhere(table, threads)

    async def main() -> None:
        handle = table.handle("k")
        task = asyncio.create_task(handle.acquire_async(None))
        await until_async(lambda: queued(table) == 1)
        handle.release()
        assert queued(table) == 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    release()


def test_a_handle_that_has_waited_leaves_no_cycle(table: LockTable, threads: Threads) -> None:
    """Its memory is returned at once, not when the garbage collector comes."""
    release = take_elsewhere(table, threads)
    handle = table.handle("k")
    threads.start(lambda: (until(lambda: queued(table)), release()))
    handle.acquire(SOON)
    assert handle.waiter is not None
    handle.release()
    assert handle.waiter is None


# -- first come, first served


def test_threads_and_coroutines_of_several_loops_stand_in_one_queue(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    served: list[int] = []
    one, two = loops(), loops()
    coroutines: list[Future[Any]] = []

    def thread(number: int) -> None:
        handle = take(table)
        served.append(number)
        handle.release()

    async def coroutine(number: int) -> None:
        handle = await take_async(table)
        served.append(number)
        handle.release()

    first = take(table)
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
        handle = await take_async(table)
        for number in range(40):
            if number % 2:
                threads.start(thread, number)
            else:
                tasks.append(asyncio.create_task(task(number)))
            await until_async(lambda there=number + 1: queued(table) == there)
        handle.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    threads.join()
    assert sessions.storage.get("k") == {"served": list(range(40))}


def test_many_waiting_coroutines_are_served_in_linear_time(table: LockTable) -> None:
    async def work() -> None:
        (await take_async(table, timeout=None)).release()

    def serve(count: int) -> int:
        with asyncio.Runner() as runner:
            handle = runner.run(take_async(table))
            loop = runner.get_loop()
            tasks = [loop.create_task(work()) for _ in range(count)]
            runner.run(until_async(lambda: queued(table) == count))

            def release_and_wait() -> None:
                handle.release()
                loop.run_until_complete(asyncio.wait(tasks))

            return lines_run(release_and_wait)

    assert serve(2_000) < 20 * serve(200)  # linear: 10, quadratic: 100


def test_a_newcomer_does_not_overtake_a_waiter(table: LockTable, threads: Threads) -> None:
    """Between the release and the moment in which the next one runs, the key is not unlocked."""
    entered, go_on = threading.Event(), threading.Event()

    def work() -> None:
        handle = take(table)
        entered.set()
        go_on.wait(SOON)
        handle.release()

    handle = take(table)
    threads.start(work)
    until(lambda: queued(table))
    handle.release()
    assert not table.handle("k").try_acquire()
    with pytest.raises(SessionLockTimeoutError):
        take(table, timeout=0)
    assert entered.wait(SOON)
    go_on.set()
    threads.join()


class StepIn(dict[str, LockHandle]):
    """What a table holds, with a caller that comes between two steps of another one."""

    def __init__(self) -> None:
        self.before: list[Callable[[], object]] = []  # before a handle enters
        self.letting_go: list[Callable[[], object]] = []  # before one is taken out
        self.after: list[Callable[[], object]] = []  # after one was taken out

    def setdefault(self, key: str, handle: LockHandle, /) -> LockHandle:  # type: ignore[override]
        while self.before:
            self.before.pop()()
        return super().setdefault(key, handle)

    def __delitem__(self, key: str) -> None:
        while self.letting_go:
            self.letting_go.pop()()
        super().__delitem__(key)
        while self.after:
            self.after.pop()()


@pytest.fixture
def step_in(table: LockTable) -> StepIn:
    held = table.held = StepIn()  # type: ignore[misc] # it is final
    return held


def test_a_waiter_that_comes_while_a_quick_one_enters_is_woken_by_it(
    table: LockTable, step_in: StepIn, threads: Threads
) -> None:
    """It finds the key unlocked, and the quick one has already seen that there is no queue."""
    holder, quick = table.handle("k"), table.handle("k")

    def wait() -> None:
        assert holder.try_acquire()
        holder.callers.clear()  # as if another thread had it
        threads.start(lambda: take(table).release())
        until(lambda: queued(table) == 1)
        del table.held["k"]  # the first half of its release

    step_in.before.append(wait)
    assert quick.try_acquire()
    holder.release()  # the second half
    assert quick.is_held
    assert queued(table) == 1
    quick.release()
    threads.join()


def test_a_newcomer_in_the_middle_of_a_release_does_not_overtake_a_waiter(
    table: LockTable, step_in: StepIn, threads: Threads
) -> None:
    """The holder is out of the table, and the waiter not yet in it."""
    newcomer, tried = table.handle("k"), []
    holder = take(table)
    threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 1)
    step_in.after.append(lambda: tried.append(newcomer.try_acquire()))
    holder.release()
    assert tried == [False]
    threads.join()


def test_a_waiter_that_comes_while_the_holder_lets_go_is_not_forgotten(
    table: LockTable, step_in: StepIn, threads: Threads
) -> None:
    """The holder has seen no queue; so it looks once more after it has let go."""
    handle = take(table)

    def wait() -> None:
        threads.start(lambda: take(table).release())
        until(lambda: queued(table) == 1)

    step_in.letting_go.append(wait)
    handle.release()
    assert not handle.is_held
    threads.join(SOON)


@pytest.mark.usefixtures("hasty")
def test_a_queue_that_comes_in_the_moment_of_a_release_is_worked_off(
    table: LockTable, threads: Threads
) -> None:
    def work() -> None:
        for _ in range(1_500):
            take(table).release()

    for _ in range(3):
        threads.start(work)
    threads.join(60)


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
            SessionLockTimeoutError,
            match=r"'user:7' was not unlocked within 0\.25 s: "
            r"thread 'the slow one' has held it for \d+\.\d s\. .*session\.release\(\)",
        ) as caught,
        hurried.session_scope("user:7"),
    ):
        pass
    assert time.monotonic() - begin >= 0.25
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
        with pytest.raises(SessionLockTimeoutError, match="task 'the slow one' has held it for"):
            async with hurried.session_scope("k"):
                pass
        go_on.set()
        await task

    asyncio.run(main())


def test_a_time_out_says_that_the_holder_has_ended(table: LockTable, threads: Threads) -> None:
    handle = lock_tools.take_unowned(table)
    with pytest.raises(SessionLockTimeoutError, match="a task that has ended has held it for"):
        take(table, timeout=0)
    handle.release()


def test_a_time_out_names_the_key_as_the_table_does(threads: Threads) -> None:
    table = LockTable("user:9")
    release = take_elsewhere(table, threads, "write")
    with pytest.raises(SessionLockTimeoutError, match="the session 'user:9' was not unlocked"):
        take(table, "write", timeout=0)
    release()


def test_a_time_out_of_nothing_does_not_wait(table: LockTable, threads: Threads) -> None:
    take(table, timeout=0).release()

    async def main() -> None:
        (await take_async(table, timeout=0)).release()
        release = take_elsewhere(table, threads)
        with pytest.raises(SessionLockTimeoutError, match="not unlocked within 0 s"):
            await take_async(table, timeout=0)
        with pytest.raises(SessionLockTimeoutError, match="not unlocked within 0 s"):
            take(table, timeout=0)
        release()

    asyncio.run(main())


def test_no_time_out_waits_for_as_long_as_it_takes(table: LockTable, threads: Threads) -> None:
    release = take_elsewhere(table, threads)
    thread = threads.start(lambda: take(table, timeout=None).release())
    until(lambda: queued(table) == 1)
    assert thread.is_alive()
    release()
    threads.join()


@pytest.mark.parametrize("timeout", [1e300, float("inf"), threading.TIMEOUT_MAX * 2])
def test_an_enormous_time_out_is_none(table: LockTable, threads: Threads, timeout: float) -> None:
    release = take_elsewhere(table, threads)

    async def wait() -> None:
        (await take_async(table, timeout=timeout)).release()

    threads.start(lambda: take(table, timeout=timeout).release())
    threads.start(asyncio.run, wait())
    until(lambda: queued(table) == 2)
    release()
    threads.join()
