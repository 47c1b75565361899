"""Waits that could never end are refused at once, and no others."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from counting import lines_run
from lock_tools import (
    Loop,
    StandingLoop,
    queued,
    table_of,
    take,
    take_async,
    take_elsewhere,
    take_unowned,
)
from waiting import SOON, until, until_async

from session_sync import SessionDeadlockError, SessionLockTimeoutError, SessionManager
from session_sync.locks.deadlock import Waits, waits
from session_sync.locks.lock import LockHandle, ThreadWaiter
from session_sync.locks.table import LockTable
from session_sync.locks.tickets import Tickets

table = pytest.fixture(lock_tools.make_table)
sessions = pytest.fixture(lock_tools.make_sessions)
loops = pytest.fixture(lock_tools.make_loops)
hasty = pytest.fixture(lock_tools.make_hasty)
standing = pytest.fixture(lock_tools.make_standing)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


# -- an event loop's own thread


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
        with sessions.session_scope("k"):  # unlocked: it works
            pass

    asyncio.run(main())


def test_a_blocking_with_behind_a_coroutine_of_the_same_loop_is_refused_at_once(
    table: LockTable, threads: Threads
) -> None:
    async def main() -> None:
        release = take_elsewhere(table, threads)
        ahead = asyncio.create_task(take_async(table))
        await until_async(lambda: queued(table) == 1)
        with pytest.raises(SessionDeadlockError, match="waits for it ahead"):
            take(table)
        assert queued(table) == 1
        release()
        (await ahead).release()

    asyncio.run(main())


def test_a_blocking_with_on_a_loops_thread_waits_for_another_thread(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    async def work() -> None:
        handle = await take_async(table)
        has_it.set()
        await until_async(lambda: queued(table) == 1)
        handle.release()

    async def main() -> None:
        take(table).release()

    for _ in range(2):
        has_it = threading.Event()
        other = loops().run(work())
        assert has_it.wait(SOON)
        asyncio.run(main())
        other.result(SOON)

    release = take_elsewhere(table, threads)
    blocked = threads.start(asyncio.run, main())
    until(lambda: queued(table) == 1)
    release()
    blocked.join(SOON)


def test_a_ticket_that_was_queued_on_the_loops_thread_is_no_coroutine(
    table: LockTable, threads: Threads
) -> None:
    """A webhook may queue updates on its loop; the workers will run them."""

    def redeem(tickets: Tickets) -> None:
        assert tickets.redeem()
        tickets.handles[0].release()

    async def main() -> None:
        release = take_elsewhere(table, threads)
        tickets = Tickets([table.ticket("k")])
        tickets.queue(lambda: (threads.start(redeem, tickets), None)[1])
        threads.start(lambda: (until(lambda: queued(table) == 2), release()))
        take(table).release()
        assert not tickets.handles[0].is_held

    asyncio.run(main())
    threads.join()


def test_a_blocked_loop_that_is_in_the_way_of_its_own_key_is_seen(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    """The loop's thread wants `a` from a thread that queues for `b` behind a coroutine of that
    very loop, which will be given `b` and cannot run."""
    loop = loops()
    b = take(table, "b")

    async def ahead() -> None:
        (await take_async(table, "b")).release()

    def thread() -> None:
        a = take(table, "a")
        take(table, "b").release()
        a.release()

    async def block() -> None:
        with pytest.raises(SessionDeadlockError, match="waits for 'a'"):
            take(table, "a")

    coroutine = loop.run(ahead())
    until(lambda: queued(table, "b") == 1)
    threads.start(thread)
    until(lambda: queued(table, "b") == 2)
    loop.run(block()).result(SOON)
    b.release()
    coroutine.result(SOON)
    threads.join()


def test_those_ahead_are_looked_at_once_each_however_many_wait(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    """While a loop's thread is blocked, those ahead of a caller count as the holders do; and so do
    those ahead of them."""
    release, stuck, waiting = take_elsewhere(table, threads, "a"), loops(), loops()
    k = take_unowned(table, "k")

    async def take_and_release() -> None:
        (await take_async(table, "k")).release()

    async def block() -> None:
        take(table, "a").release()

    def lines_behind(number: int) -> int:
        tasks.extend(waiting.run(take_and_release()) for _ in range(number - len(tasks)))
        until(lambda: queued(table) == number)

        def wait() -> None:
            with pytest.raises(SessionLockTimeoutError):
                take(table, "k", timeout=0)

        return lines_run(wait)

    blocked = stuck.run(block())
    until(lambda: queued(table, "a") == 1)
    tasks: list[Any] = []
    few = lines_behind(50)
    assert lines_behind(500) < 20 * few  # linear: 10, quadratic: 100
    k.release()
    release()
    for task in (blocked, *tasks):
        task.result(SOON)


def test_a_thread_behind_a_coroutine_whose_loop_waits_for_that_thread_is_refused(
    table: LockTable, loops: Callable[[], Loop], threads: Threads
) -> None:
    """The same circle, closed from the other side."""
    loop = loops()
    b = take(table, "b")
    a_taken, refused = threading.Event(), threading.Event()

    async def ahead() -> None:
        (await take_async(table, "b")).release()

    async def block() -> None:
        take(table, "a").release()

    def thread() -> None:
        a = take(table, "a")
        a_taken.set()
        until(lambda: queued(table, "a") == 1)
        with pytest.raises(SessionDeadlockError, match="waits for 'b'"):
            take(table, "b")
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


def test_a_thread_that_wants_a_key_of_its_own_stopped_loop_is_refused(
    table: LockTable, standing: StandingLoop
) -> None:
    """The loop can go on nowhere but in this thread."""
    inside = standing.loop.run_until_complete(take_async(table))

    def wait() -> None:
        with pytest.raises(SessionDeadlockError):
            take(table)

    wait()
    inside.release()


# -- circles


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
    threads.join(SOON)  # less than lock_timeout: no time-out has opened the circle
    assert len(refused) == 1
    assert len(went_on) == size - 1
    assert "in the same order everywhere" in str(refused[0])
    assert len(sessions.locks) == 0


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
        handle = take(table, str(number))
        all_have_one.wait(SOON)
        try:
            take(table, str((number + 1) % size)).release()
        except SessionDeadlockError:
            refused.append(number)
        handle.release()

    async def task(number: int) -> None:
        handle = await take_async(table, str(number))
        await asyncio.to_thread(all_have_one.wait, SOON)
        try:
            (await take_async(table, str((number + 1) % size))).release()
        except SessionDeadlockError:
            refused.append(number)
        handle.release()

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
def test_two_callers_that_begin_to_wait_at_once_are_looked_at_one_after_the_other(
    sessions: SessionManager[Any], threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both would find the other one not waiting yet, and then wait for each other."""
    look = Waits.reason_against
    looking: list[object] = []

    def look_slowly(all_waits: Waits, wait: Any) -> str:
        looking.append(wait)
        assert looking == [wait]
        for _ in range(100):
            time.sleep(0)
        reason = look(all_waits, wait)
        looking.clear()
        return reason

    monkeypatch.setattr(Waits, "reason_against", look_slowly)
    for _ in range(10):
        circle_of_threads(sessions, threads, 4)


@pytest.mark.usefixtures("hasty")
def test_a_circle_that_the_woken_caller_closes_is_seen(threads: Threads) -> None:
    """It may want its next key before the caller that has woken it goes on: then all that it
    could wait for has to be noted already."""
    for _ in range(200):
        table = LockTable()
        first = take_unowned(table, "a")

        def one(table: LockTable = table) -> None:
            a = take(table, "a")
            with pytest.raises(SessionDeadlockError):
                take(table, "b")
            a.release()

        def two(table: LockTable = table) -> None:
            b = take(table, "b")
            take(table, "a").release()
            b.release()

        threads.start(one)
        until(lambda table=table: queued(table, "a") == 1)
        threads.start(two)
        until(lambda table=table: queued(table, "a") == 2)
        first.release()
        threads.join()
        assert len(table) == 0


def test_a_caller_is_woken_when_all_is_written(
    table: LockTable, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, ...]] = []
    wake = ThreadWaiter.wake

    def look_and_wake(waiter: ThreadWaiter) -> bool:
        handle = waiter.handle
        noted = any(waiter in some for some in waits._by_caller.values())
        seen.append((handle.is_held, noted, handle in table.queues.get("k", ()), released.is_held))
        return wake(waiter)

    monkeypatch.setattr(ThreadWaiter, "wake", look_and_wake)
    released = take_unowned(table)
    threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 1)
    released.release()
    threads.join()
    assert seen == [(True, False, False, False)]


def test_a_caller_that_wants_a_key_twice_without_joining_is_refused(table: LockTable) -> None:
    handle = take(table)
    with pytest.raises(SessionDeadlockError):
        take(table, timeout=None)
    handle.release()

    async def main() -> None:
        handle = await take_async(table)
        with pytest.raises(SessionDeadlockError):
            await take_async(table, timeout=None)
        handle.release()

    asyncio.run(main())


def test_a_circle_through_a_caller_that_has_joined_is_seen(sessions: SessionManager[Any]) -> None:
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
        handle = await take_async(table, str(number), None)
        await all_have_one.wait()
        try:
            (await take_async(table, str((number + 1) % size), None)).release()
        finally:
            handle.release()

    async def main() -> None:
        # Not by work() itself: in this order the chain grows at its far end.
        tasks = [asyncio.create_task(work(number)) for number in range(size)]
        await until_async(lambda: len(table) == size)
        all_have_one.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in results if one] == [SessionDeadlockError]

    all_have_one = asyncio.Event()
    asyncio.run(main())


def test_a_refused_caller_leaves_the_queue_as_it_was(table: LockTable, threads: Threads) -> None:
    """And whatever is behind it does not wait for it."""
    handle = take(table)
    waiter = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 1)
    with pytest.raises(SessionDeadlockError):
        take(table)
    assert queued(table) == 1
    handle.release()
    waiter.join(SOON)


# -- what the error says


def test_the_error_names_both_callers_and_both_keys(table: LockTable, threads: Threads) -> None:
    b_taken = threading.Event()

    def other() -> None:
        b = take(table, "b")
        b_taken.set()
        take(table, "a").release()
        b.release()

    a = take(table, "a")
    threads.start(other, name="the other one")
    assert b_taken.wait(SOON)
    until(lambda: queued(table, "a") == 1)
    with pytest.raises(SessionDeadlockError) as caught:
        take(table, "b")
    assert str(caught.value).startswith(
        "deadlock: this thread holds 'a' and waits for 'b'; "
        "thread 'the other one' holds 'b' and waits for 'a'. "
        "Open the sessions of several users in the same order everywhere"
    )
    a.release()


def test_the_error_names_all_tasks_of_a_circle_in_their_order(table: LockTable) -> None:
    async def work(name: str, wanted: str) -> None:
        handle = await take_async(table, name)
        await all_have_one.wait()
        try:
            (await take_async(table, wanted)).release()
        finally:
            handle.release()

    async def main() -> None:
        pairs = ("ab", "bc", "ca")
        tasks = [asyncio.create_task(work(*pair), name=f"task {pair[0]}") for pair in pairs]
        await until_async(lambda: len(table) == 3)
        all_have_one.set()
        with pytest.raises(SessionDeadlockError) as caught:
            await asyncio.gather(*tasks)
        assert str(caught.value).startswith(
            "deadlock: this task holds 'c' and waits for 'a'; "
            "task 'task a' holds 'a' and waits for 'b'; "
            "task 'task b' holds 'b' and waits for 'c'. "
        )
        await asyncio.gather(*tasks, return_exceptions=True)

    all_have_one = asyncio.Event()
    asyncio.run(main())


def test_a_session_that_is_opened_while_it_is_opened_is_refused_in_words_of_its_own() -> None:
    def initial(_update: object) -> dict[str, Any]:
        with sessions.session_scope("k"):
            raise AssertionError("it is open twice")

    sessions: SessionManager[Any] = SessionManager(initial=initial)
    with pytest.raises(SessionDeadlockError) as caught, sessions.session_scope("k"):
        pass
    assert str(caught.value) == (
        "deadlock: this thread holds 'k' and waits for it. A block joins the one around it only "
        "where both managers have the same storage object: give one object to all managers of a "
        "store. What runs while a session is opened (`initial`, a migration) cannot open it, too."
    )


# -- no false alarms


def test_a_new_thread_is_not_taken_for_one_that_has_ended(table: LockTable) -> None:
    """The system gives the number of an ended thread to the next one."""
    handles: list[LockHandle] = []
    idents: list[int | None] = []

    def enter() -> None:
        handles.append(take(table))

    def wait() -> None:
        idents.append(threading.get_ident())
        with pytest.raises(SessionLockTimeoutError, match="thread 'the first'"):
            take(table, timeout=0)
        done.append(True)

    done: list[bool] = []
    for _ in range(20):
        first = threading.Thread(target=enter, name="the first")
        first.start()
        first.join()
        second = threading.Thread(target=wait)
        second.start()
        second.join()
        handles.pop().release()
        if idents[-1] == first.ident:
            break
    assert all(done)
    assert len(done) == len(idents)
    if idents[-1] != first.ident:
        pytest.skip("this system gave every thread a new number")


def test_a_wait_that_has_ended_closes_no_circle(table: LockTable, threads: Threads) -> None:
    """This thread has waited in vain for what the other one holds, and holds what that one wants:
    but it waits no more."""
    a = take(table, "a")
    release = take_elsewhere(table, threads, "b")
    with pytest.raises(SessionLockTimeoutError):
        take(table, "b", timeout=0)
    other = threads.start(lambda: take(table, "a").release())
    until(lambda: queued(table, "a") == 1)
    a.release()
    other.join(SOON)
    release()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", range(4))
def test_keys_taken_in_the_same_order_everywhere_are_never_refused(
    table: LockTable, threads: Threads, loops: Callable[[], Loop], seed: int
) -> None:
    keys = [str(number) for number in range(6)]

    def thread(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            handles = [take(table, key) for key in keys if chance.random() < 0.5]
            time.sleep(0)
            chance.shuffle(handles)
            for handle in handles:
                handle.release()

    async def task(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            handles = [await take_async(table, key) for key in keys if chance.random() < 0.5]
            await asyncio.sleep(0)
            chance.shuffle(handles)
            for handle in handles:
                handle.release()

    one, two = loops(), loops()
    running = [(one, two)[n % 2].run(task(seed * 100 + n)) for n in range(6)]
    for number in range(6):
        threads.start(thread, seed * 100 + 50 + number)
    for future in running:
        future.result(60)
    threads.join(60)
