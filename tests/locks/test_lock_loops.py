"""Coroutines that wait on event loops which stop, are closed, or are thrown away."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from interruptions import everywhere, raise_outside
from lock_tools import (
    StandingLoop,
    is_unlocked,
    queued,
    take,
    take_async,
    take_elsewhere,
    take_unowned,
)
from stops import Stop, stopping
from waiting import SOON, until, until_async

from session_sync import SessionLockTimeoutError, SessionManager
from session_sync.locks import lock
from session_sync.locks.deadlock import waits
from session_sync.locks.lock import LockHandle, TaskWaiter
from session_sync.locks.table import LockTable

table = pytest.fixture(lock_tools.make_table)
standing = pytest.fixture(lock_tools.make_standing)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


def release_and_stop(holder: LockHandle, loop: asyncio.AbstractEventLoop) -> None:
    """The key is given to a coroutine of a loop, which stops before that coroutine goes on."""
    loop.call_soon(lambda: (holder.release(), loop.stop()))
    loop.run_forever()


# -- loops that stop


def test_a_waiter_whose_loop_has_stopped_is_passed_over(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table)
    behind = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 2)
    release()
    behind.join(SOON)
    take(table).release()  # newcomers do not wait for it either
    assert not task.done()
    standing.go_on(task).release()  # but once its loop moves, it is served


def test_a_loop_that_goes_on_finds_its_waiter_in_its_old_place(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    served: list[str] = []
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table)
    release()  # passed over
    release = take_elsewhere(table, threads)

    def behind() -> None:
        handle = take(table)
        served.append("behind")
        handle.release()

    threads.start(behind)
    until(lambda: queued(table) == 2)
    standing.loop.run_until_complete(asyncio.sleep(0))  # it looks: the key is held; it waits on

    async def finish() -> None:
        waiting = asyncio.ensure_future(task)
        threading.Thread(target=release, daemon=True).start()
        handle = await waiting
        served.append("first")
        handle.release()

    standing.go_on(finish())
    threads.join()
    assert served == ["first", "behind"]


def test_a_loop_that_stands_still_is_told_once_to_look(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    told: list[object] = []
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table)
    call_soon = standing.loop.call_soon_threadsafe
    standing.loop.call_soon_threadsafe = lambda call, *args: (  # type: ignore[method-assign]
        told.append(call),
        call_soon(call, *args),
    )[1]
    release()
    for _ in range(100):
        take(table).release()
    assert len(told) == 1
    del standing.loop.call_soon_threadsafe  # type: ignore[method-assign]
    standing.go_on(task).release()


def test_a_stopped_waiter_whose_time_is_up_leaves(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table, timeout=0.001)
    with pytest.raises(SessionLockTimeoutError):
        standing.go_on(task)
    release()


def test_a_time_out_says_that_only_stopped_loops_wait(
    table: LockTable, threads: Threads, standing: StandingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table, timeout=SOON)
    release()

    ready, time = standing.loop._ready, standing.loop.time  # type: ignore[attr-defined]
    (look,) = ready
    ready.clear()  # its time is up before it looks
    monkeypatch.setattr(standing.loop, "time", lambda: time() + SOON)
    with pytest.raises(SessionLockTimeoutError, match="belong to event loops that stopped"):
        standing.go_on(task)
    look._run()


def test_a_loop_that_stops_after_its_waiter_was_given_the_key_keeps_it(
    table: LockTable, standing: StandingLoop
) -> None:
    """As if it had stopped a moment later, inside the session."""
    holder = take_unowned(table)
    task = standing.wait_for(table)
    release_and_stop(holder, standing.loop)
    assert not is_unlocked(table)
    assert not task.done()
    standing.go_on(task).release()


def test_a_waiter_that_looks_while_it_is_being_told_to_look_is_not_forgotten(
    table: LockTable, threads: Threads, standing: StandingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on in the very moment in which the releasing thread finds it standing."""
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table)
    (handle,) = table.queues["k"]
    waiter = handle.waiter
    assert isinstance(waiter, TaskWaiter)
    loop = standing.loop

    def call_at_once(look: Callable[[], None], *_: object) -> None:
        """As a loop does that goes on just now; it looks as soon as the mutex is free."""
        monkeypatch.undo()
        loop.call_soon_threadsafe(look)

    monkeypatch.setattr(loop, "call_soon_threadsafe", call_at_once)
    release()
    release = take_elsewhere(table, threads)
    loop.run_until_complete(asyncio.sleep(0))  # it has looked: the key is held
    threading.Thread(target=release, daemon=True).start()
    standing.go_on(task).release()


def test_a_loop_that_goes_on_as_it_is_told_to_look_is_told_again_when_it_stands_still(
    table: LockTable, threads: Threads, standing: StandingLoop
) -> None:
    def hold(handle: LockHandle) -> None:
        handle.acquire(None)
        holds.set()
        assert let_go.wait(SOON)
        handle.release()

    def run_loop() -> None:
        standing.loop.run_until_complete(until_async(gives_on.is_set))

    holds, let_go, gives_on = (threading.Event() for _ in range(3))
    holder = take_unowned(table)
    task = standing.wait_for(table)
    threads.start(hold, table.handle("k"))
    until(lambda: queued(table) == 2)
    asks = Stop(TaskWaiter.can_take, "self._asked = True")
    giver = threads.start(stopping(holder.release, asks))
    asks.wait()
    loop = threads.start(run_loop)
    until(standing.loop.is_running)
    gives_on.set()
    asks.go_on()
    giver.join(SOON)
    assert holds.wait(SOON)
    loop.join(SOON)  # it has looked, and stands still again
    let_go.set()
    threads.join()
    standing.go_on(task).release()


def test_a_loop_that_is_interrupted_as_it_looks_looks_again(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler that raises, of which asyncio tells only the log."""
    sessions: SessionManager[Any] = SessionManager(lock_timeout=None)

    async def handle() -> None:
        async with sessions.session_scope("k"):
            pass

    def hold() -> None:
        with sessions.session_scope("k"):
            holds.set()
            assert let_go.wait(SOON)

    look = TaskWaiter._look
    for interruption in everywhere(raise_outside, lock):

        def interrupted(waiter: TaskWaiter, interruption: Any = interruption) -> None:
            monkeypatch.setattr(TaskWaiter, "_look", look)
            with interruption:
                look(waiter)

        holds, let_go = threading.Event(), threading.Event()
        threads.start(hold)
        assert holds.wait(SOON)
        standing = StandingLoop()
        task = standing.loop.create_task(handle())
        standing.loop.run_until_complete(until_async(lambda: sessions.locks.waiters("k") == 1))
        monkeypatch.setattr(TaskWaiter, "_look", interrupted)
        let_go.set()
        threads.join()  # the loop stands still, and is told to look
        standing.go_on(task)
        standing.loop.close()


# -- loops that are closed or thrown away


@pytest.mark.parametrize("passed_over", [False, True])
def test_a_waiter_whose_loop_was_closed_is_forgotten(
    table: LockTable, threads: Threads, standing: StandingLoop, passed_over: bool
) -> None:
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table)
    if passed_over:  # before it is closed the loop is told to look at the key
        release()
        release = take_elsewhere(table, threads)
    standing.loop.close()
    behind = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 2)
    release()
    behind.join(SOON)
    assert len(table) == 0
    assert not waits._by_caller
    gone = weakref.ref(task)
    del task
    gc.collect()
    assert gone() is None
    assert is_unlocked(table)


def test_a_loop_that_is_closed_in_the_moment_its_waiter_is_woken_gives_the_key_on(
    table: LockTable, threads: Threads, standing: StandingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = take_elsewhere(table, threads)
    task = standing.wait_for(table)
    behind = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 2)
    monkeypatch.setattr(TaskWaiter, "can_take", lambda _: True)  # as if the loop were running
    wake = TaskWaiter.wake

    def wake_too_late(waiter: TaskWaiter) -> bool:
        standing.loop.close()
        return wake(waiter)

    monkeypatch.setattr(TaskWaiter, "wake", wake_too_late)
    release()
    behind.join(SOON)
    assert len(table) == 0
    del task
    gc.collect()


def test_a_key_that_a_closed_loop_cannot_take_while_its_task_is_thrown_away_has_one_owner(
    table: LockTable, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that gives it the key takes it back, and the task lets it go: of these two, the
    second one finds the key with another owner."""
    gives, taken_back = threading.Event(), threading.Event()

    def wake(_waiter: TaskWaiter) -> bool:
        gives.set()
        assert taken_back.wait(SOON)
        return False

    def come_in() -> None:
        taken_back.set()
        giver.join(SOON)
        other.try_acquire()

    monkeypatch.setattr(TaskWaiter, "can_take", lambda _: True)  # as if the loop were running
    monkeypatch.setattr(TaskWaiter, "wake", wake)
    for interruption in everywhere(come_in, lock):
        gives.clear()
        taken_back.clear()
        release = take_elsewhere(table, threads)
        standing, other = StandingLoop(), table.handle("k")
        task: Any = standing.wait_for(table)
        giver = threads.start(release)
        assert gives.wait(SOON)
        with interruption:
            task.get_coro().close()
        if not interruption.happened:
            come_in()
        assert other.is_held
        other.release()
        standing.loop.close()
        del task
        gc.collect()


@pytest.mark.parametrize("closed", [True, False])
def test_handles_of_a_loop_that_is_thrown_away_vanish(
    table: LockTable, threads: Threads, closed: bool
) -> None:
    """Nothing of the locks keeps a task or a loop alive; they leave their places in the queue."""
    release = take_elsewhere(table, threads)

    def begin() -> list[weakref.ref[Any]]:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # of tasks destroyed while they wait
        tasks = [loop.create_task(take_async(table, timeout=limit)) for limit in (None, 60, None)]
        loop.run_until_complete(until_async(lambda: queued(table) == 3))
        if closed:
            loop.close()
        else:
            loop._selector.close()  # type: ignore[attr-defined] # what close() is there for
            loop._ssock.close()  # type: ignore[attr-defined]
            loop._csock.close()  # type: ignore[attr-defined]
            loop._closed = True  # type: ignore[attr-defined] # as far as its own finaliser knows
        return [weakref.ref(one) for one in (loop, *tasks)]

    gone = begin()
    gc.collect()
    assert [one() for one in gone] == [None] * 4
    assert queued(table) == 0
    assert not waits._by_caller
    release()


def test_a_task_that_is_thrown_away_after_it_was_given_the_key_unlocks_it(
    table: LockTable,
) -> None:
    holder = take_unowned(table)

    def begin() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        loop.create_task(take_async(table, timeout=None))  # noqa: RUF006 # it is thrown away
        loop.run_until_complete(until_async(lambda: queued(table) == 1))
        release_and_stop(holder, loop)
        assert not is_unlocked(table)
        loop.close()

    begin()
    gc.collect()
    assert is_unlocked(table)


def test_a_place_in_the_queue_that_is_thrown_away_under_the_mutex_is_left(
    table: LockTable,
) -> None:
    """The garbage collector may come in a thread that is handing a key on."""
    holder = take_unowned(table)

    def begin() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        loop.create_task(take_async(table, timeout=None))  # noqa: RUF006 # it is thrown away
        loop.run_until_complete(until_async(lambda: queued(table) == 1))
        loop.close()

    begin()
    lock.locked(gc.collect)
    assert queued(table) == 0
    holder.release()


def test_a_handle_keeps_no_task_alive_that_has_it(table: LockTable) -> None:
    handles: list[LockHandle] = []

    async def work() -> None:
        handles.append(await take_async(table))

    loop = asyncio.new_event_loop()
    task = loop.create_task(work())
    loop.run_until_complete(task)
    loop.close()
    gone = [weakref.ref(task), weakref.ref(loop)]
    del task, loop
    gc.collect()
    assert [one() for one in gone] == [None, None]
    handles[0].release()
