"""Signals, finalisers and tracers that come in the middle of an acquisition or a release."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import interruptions
import lock_tools
import pytest
from conftest import Threads
from lock_tools import (
    Guest,
    Interrupted,
    Interruption,
    Loop,
    assert_nothing_is_left,
    is_unlocked,
    queued,
    take,
    take_async,
    take_unowned,
)
from waiting import SOON, until

from session_sync import SessionDeadlockError, SessionLockTimeoutError
from session_sync.locks import lock
from session_sync.locks.lock import LockHandle, ThreadWaiter
from session_sync.locks.table import LockTable
from session_sync.locks.tickets import Tickets

table = pytest.fixture(lock_tools.make_table)
loops = pytest.fixture(lock_tools.make_loops)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


class Elsewhere:
    """A thread that is told what to do, one thing after the other."""

    def __init__(self, threads: Threads) -> None:
        self._work: list[Callable[[], object]] = []
        self._begin, self._done = threading.Semaphore(0), threading.Semaphore(0)
        threads.start(self._run)

    def start(self, work: Callable[[], object] | None) -> None:
        self._work.append(work)  # type: ignore[arg-type]
        self._begin.release()

    def join(self) -> None:
        assert self._done.acquire(timeout=SOON)

    def _run(self) -> None:
        while True:
            self._begin.acquire()
            work = self._work.pop()
            if work is None:
                return
            work()
            self._done.release()


@pytest.fixture
def elsewhere(threads: Threads) -> Any:
    some = Elsewhere(threads)
    yield some
    some.start(None)


def interrupt_everywhere(work: Callable[[Interruption], object]) -> int:
    """Do `work`, interrupted at each place in turn; how many there are."""
    for after in itertools.count():
        interruption = Interruption(after)
        work(interruption)
        if not interruption.happened:
            return after
    raise AssertionError


# -- an exception from outside


def test_whatever_interrupts_an_acquisition_or_a_release_the_last_release_leaves_nothing(
    table: LockTable, elsewhere: Elsewhere
) -> None:
    def work(interruption: Interruption) -> None:
        handle = table.handle("k")
        try:
            with interruption:
                handle.acquire(SOON)
                handle.release()
        except Interrupted:
            handle.release()
        assert_nothing_is_left(table)
        elsewhere.start(lambda: take(table).release())  # which needs the mutex, too
        elsewhere.join()

    assert interrupt_everywhere(work) > 5


def test_an_interrupted_release_gives_the_key_to_the_waiter_all_the_same(
    table: LockTable, elsewhere: Elsewhere
) -> None:
    def work(interruption: Interruption) -> None:
        handle = take(table)
        elsewhere.start(lambda: take(table).release())
        until(lambda: queued(table) == 1)
        try:
            with interruption:
                handle.release()
        except Interrupted:
            handle.release()
        elsewhere.join()
        assert_nothing_is_left(table)

    assert interrupt_everywhere(work) > 20


def test_an_interrupted_release_does_not_take_the_key_from_the_task_that_has_gone_on_with_it(
    table: LockTable, loops: Callable[[], Loop]
) -> None:
    """What the interrupt has left half-done, which may be to tell the task, is done once more."""

    async def work(has_it: threading.Event, go_on: asyncio.Event) -> bool:
        handle = await take_async(table)
        has_it.set()
        await go_on.wait()
        was_held = handle.is_held
        handle.release()
        return was_held

    def interrupt() -> None:
        has_it.wait(0.02)  # in vain, if it comes before the task was told
        raise Interrupted

    loop = loops()
    for interruption in interruptions.everywhere(interrupt, lock):
        has_it, go_on = threading.Event(), asyncio.Event()
        handle = take_unowned(table)
        task = loop.run(work(has_it, go_on))
        until(lambda: queued(table) == 1)
        try:
            with interruption:
                handle.release()
        except Interrupted:
            handle.release()
        assert has_it.wait(SOON)
        loop.loop.call_soon_threadsafe(go_on.set)
        assert task.result(SOON)
        assert_nothing_is_left(table)


def test_an_interrupted_wait_leaves_the_queue_or_hands_the_key_on(
    table: LockTable, elsewhere: Elsewhere
) -> None:
    """The key is released when the waiter is in the queue: it is woken at once."""

    def work(interruption: Interruption) -> None:
        handle = table.handle("k")
        holder = take_unowned(table)
        over = threading.Event()

        def release() -> None:
            until(lambda: over.is_set() or queued(table))
            holder.release()

        elsewhere.start(release)
        try:
            with interruption:
                handle.acquire(SOON)
                handle.release()
        except Interrupted:
            handle.release()
        over.set()
        elsewhere.join()
        assert_nothing_is_left(table)
        assert is_unlocked(table)

    assert interrupt_everywhere(work) > 20


# An interrupt between the two halves of `await` loses the coroutine that would end the time-out.
@pytest.mark.filterwarnings("ignore:coroutine 'Timeout.__aexit__' was never awaited")
def test_an_interrupted_waiting_coroutine_leaves_the_queue_or_hands_the_key_on(
    table: LockTable,
) -> None:
    async def own() -> None:
        handle = None
        try:
            handle = table.handle("k")
            await handle.acquire_async(SOON)
            handle.release()
        except Interrupted:
            if handle is not None:
                handle.release()

    def release(holder: LockHandle) -> None:
        try:
            holder.release()
        except Interrupted:
            holder.release()

    async def main(interruption: Interruption) -> None:
        loop = asyncio.get_running_loop()
        holder = take_unowned(table)
        tasks = [loop.create_task(own()) for _ in range(2)]
        with interruption:
            loop.call_soon(release, holder)
            await asyncio.gather(*tasks)
        assert not holder.is_held

    def work(interruption: Interruption) -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # of callbacks that were interrupted
        loop.run_until_complete(asyncio.wait_for(main(interruption), SOON))
        loop.close()
        assert_nothing_is_left(table)
        assert is_unlocked(table)

    assert interrupt_everywhere(work) > 20


@pytest.mark.parametrize("keys", ["k", "kl"])
@pytest.mark.parametrize("held", [False, True])
def test_interrupted_tickets_leave_nothing_when_they_are_released(
    table: LockTable, keys: str, held: bool
) -> None:
    def work(interruption: Interruption) -> None:
        holder = table.handle("k")
        if held:
            holder.acquire(None)
        called: list[None] = []
        tickets = Tickets([table.ticket(key) for key in keys])
        try:
            with interruption:
                tickets.queue(lambda: called.append(None))
                holder.release()
                assert tickets.redeem()
                for ticket in tickets.handles:
                    ticket.release()
        except Interrupted:
            holder.release()
            tickets.withdraw()
            for ticket in tickets.handles:
                ticket.release()
        assert_nothing_is_left(table)
        assert all(is_unlocked(table, key) for key in keys)

    assert interrupt_everywhere(work) > 10


def test_what_another_thread_has_noted_is_not_lost_by_an_interrupt(table: LockTable) -> None:
    """It waits for the mutex, and will find that its release was done."""

    def work(interruption: Interruption) -> None:
        handle, other = take(table), take(table, "other")
        lock._released.append((other, True))
        try:
            with interruption:
                handle.release()
        except Interrupted:
            handle.release()
        assert_nothing_is_left(table)

    assert interrupt_everywhere(work) > 10


def test_a_withdrawal_that_was_interrupted_is_done_again(table: LockTable) -> None:
    def work(interruption: Interruption) -> None:
        called: list[Tickets] = []
        one, two = (Tickets([table.ticket("k")]) for _ in range(2))
        for tickets in (one, two):
            tickets.queue(lambda tickets=tickets: called.append(tickets))
        try:
            with interruption:
                one.withdraw()
        except Interrupted:
            one.withdraw()
        assert called[:2] == [one, two]
        assert two.redeem()
        two.handles[0].release()
        assert_nothing_is_left(table)

    assert interrupt_everywhere(work) > 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_real_signals_that_raise_while_threads_contend_leave_nothing_locked(
    table: LockTable, threads: Threads, request: pytest.FixtureRequest
) -> None:
    armed = False
    came = 0
    over = threading.Event()

    def handler(_number: int, _frame: FrameType | None) -> None:
        nonlocal armed, came
        if armed:
            armed = False
            came += 1
            raise Interrupted

    def contend() -> None:
        while not over.is_set():
            take(table).release()
            time.sleep(0)

    before = signal.signal(signal.SIGALRM, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGALRM, before))
    request.addfinalizer(lambda: signal.setitimer(signal.ITIMER_REAL, 0))
    chance = random.Random(1)
    for _ in range(2):
        threads.start(contend)
    while came < 300:
        handle = table.handle("k")
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-4))
        try:
            armed = True
            for _ in range(20):
                handle.acquire(SOON)
                handle.release()
            armed = False
        except Interrupted:
            pass
        armed = False
        handle.release()
        assert not handle.is_held
    over.set()
    threads.join()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
def test_an_interrupted_thread_leaves_the_queue(
    table: LockTable, threads: Threads, request: pytest.FixtureRequest
) -> None:
    holder = take_unowned(table)
    main, interrupted = threading.get_ident(), threading.Event()

    def only_once(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        until(lambda: queued(table) == 1)
        while not interrupted.is_set():  # a signal does not wake what is only about to wait
            signal.pthread_kill(main, signal.SIGINT)
            interrupted.wait(0.01)

    before = signal.signal(signal.SIGINT, only_once)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threads.start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        take(table)
    assert queued(table) == 0
    holder.release()
    assert is_unlocked(table)


def test_a_signal_handler_that_raises_while_the_thread_is_woken_hands_the_key_on(
    table: LockTable, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    holder = take_unowned(table)

    def raise_it(*_: object) -> None:
        raise KeyboardInterrupt

    def wait(_: object, __: float | None) -> None:
        holder.release()
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, raise_it)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(ThreadWaiter, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        take(table, timeout=1)
    assert is_unlocked(table)


# -- finalisers and signal handlers that use locks themselves


def everywhere(work: Callable[[int], Guest]) -> int:
    """Do `work`, with a guest in front of each line in turn; how many lines there are."""
    for after in itertools.count():
        guest = work(after)
        if guest.waits or not guest.came:
            return after
    raise AssertionError


def test_a_guest_that_releases_the_key_wakes_the_caller_it_has_interrupted(
    table: LockTable,
) -> None:
    """In front of each line of an acquisition that has to wait for that key."""

    def work(after: int) -> Guest:
        holder = take_unowned(table)
        handle = table.handle("k")
        with Guest(after, holder.release) as guest:
            handle.acquire(SOON)
        assert guest.came
        assert handle.is_held
        handle.release()
        assert_nothing_is_left(table)
        return guest

    assert everywhere(work) > 20


@pytest.mark.parametrize("key", ["k", "other"])
def test_a_guest_that_releases_a_key_in_the_middle_of_a_release_wakes_both_waiters(
    table: LockTable, threads: Threads, key: str
) -> None:
    """Another key; or the same one, whose next holder it interrupts while that is woken."""
    one, two = Elsewhere(threads), Elsewhere(threads)

    def work(after: int) -> Guest:
        handle, other = take(table), table.handle(key)
        if key == "other":
            other.acquire(None)
        one.start(lambda: take(table).release())
        until(lambda: queued(table) == 1)
        two.start(lambda: take(table, key).release())
        until(lambda: queued(table) + queued(table, "other") == 2)
        with Guest(after, other.release if key == "other" else handle.release) as guest:
            handle.release()
        if not guest.came:
            other.release()
        one.join()
        two.join()
        assert_nothing_is_left(table)
        return guest

    assert everywhere(work) > 20
    one.start(None)
    two.start(None)


def test_a_guest_that_withdraws_a_task_lets_the_next_one_in(table: LockTable) -> None:
    def work(after: int) -> Guest:
        called: list[Tickets] = []
        holder = take(table)
        gone, stays = (Tickets([table.ticket("k")]) for _ in range(2))
        for tickets in (gone, stays):
            tickets.queue(lambda tickets=tickets: called.append(tickets))
        with Guest(after, gone.withdraw) as guest:
            holder.release()
        if not guest.came:
            gone.withdraw()
        assert called[-1] is stays
        assert stays.redeem()
        stays.handles[0].release()
        assert_nothing_is_left(table)
        return guest

    assert everywhere(work) > 20


def test_a_guest_that_takes_another_key_has_it_in_front_of_each_line(table: LockTable) -> None:
    def work(after: int) -> Guest:
        holder = take_unowned(table)
        handle = table.handle("k")
        taken: list[bool] = []

        def visit() -> None:
            other = take(table, "other", timeout=0)
            taken.append(other.is_held)
            other.release()
            holder.release()

        with Guest(after, visit) as guest:
            handle.acquire(SOON)
        assert taken == [True]
        handle.release()
        assert_nothing_is_left(table)
        return guest

    assert everywhere(work) > 20


def test_a_guest_that_wants_the_same_key_is_refused_or_has_it_and_disturbs_nothing(
    table: LockTable, elsewhere: Elsewhere
) -> None:
    """In front of each line of a release whose key goes to another thread."""
    outcomes = set()

    def work(after: int) -> Guest:
        handle = take_unowned(table)
        elsewhere.start(lambda: take(table).release())
        until(lambda: queued(table) == 1)

        def visit() -> None:
            try:
                take(table, timeout=0).release()
                outcomes.add("has it")
            except (SessionDeadlockError, SessionLockTimeoutError) as error:
                outcomes.add(type(error).__name__)

        with Guest(after, visit) as guest:
            handle.release()
        elsewhere.join()
        assert_nothing_is_left(table)
        return guest

    assert everywhere(work) > 20
    assert {"SessionDeadlockError", "SessionLockTimeoutError"} <= outcomes


def test_a_guest_is_told_at_once_that_it_cannot_wait(table: LockTable) -> None:
    """Its thread would have to go on first, to pass on the lock."""
    holder = take(table)
    with pytest.raises(
        SessionDeadlockError, match=r"a signal handler .* cannot wait for a session"
    ):
        lock.locked(take, table, "k", SOON)
    assert lock.locked(is_unlocked, table, "other")
    holder.release()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
def test_a_signal_handler_is_told_that_it_would_wait_behind_its_own_thread(
    table: LockTable, threads: Threads, request: pytest.FixtureRequest
) -> None:
    holder = take_unowned(table)
    main, visited = threading.get_ident(), threading.Event()
    refused: list[str] = []

    def visit(*_: object) -> None:
        if not visited.is_set() and queued(table) == 1:
            with pytest.raises(SessionDeadlockError) as caught:
                take(table)
            refused.append(str(caught.value))
            visited.set()

    def interrupt() -> None:
        until(lambda: queued(table) == 1)
        while not visited.is_set():  # a signal does not wake what is only about to wait
            signal.pthread_kill(main, signal.SIGINT)
            visited.wait(0.01)
        holder.release()

    before = signal.signal(signal.SIGINT, visit)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threads.start(interrupt)
    take(table).release()
    assert refused == [
        "deadlock: this thread waits for 'k' already, and what has interrupted it (a signal "
        "handler, say) would wait behind it. Let the handler set a flag, and use the session later."
    ]


def test_the_finaliser_of_a_handles_owner_unlocks_the_key_wherever_it_runs(
    table: LockTable, elsewhere: Elsewhere
) -> None:
    class Owner:
        """It is in a cycle, so the garbage collector comes for it."""

        def __init__(self) -> None:
            self.me = self
            self.handle = take_unowned(table, "owned")

        def __del__(self) -> None:
            self.handle.release()

    def work(after: int) -> Guest:
        handle = take(table)
        Owner()
        elsewhere.start(lambda: take(table, "owned").release())
        until(lambda: queued(table, "owned") == 1)
        with Guest(after, gc.collect) as guest:
            handle.release()
            take(table).release()
        gc.collect()
        elsewhere.join()
        assert_nothing_is_left(table)
        return guest

    assert everywhere(work) > 5
