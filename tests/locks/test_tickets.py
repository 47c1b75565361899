"""Tasks that have not begun, and wait for one key or for several without a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from lock_tools import Loop, is_unlocked, queued, take, take_async
from waiting import SOON, until

from session_sync import SessionLockTimeoutError
from session_sync.locks import lock
from session_sync.locks import tickets as tickets_module
from session_sync.locks.lock import LockHandle, Ticket
from session_sync.locks.table import LockTable
from session_sync.locks.tickets import Tickets

table = pytest.fixture(lock_tools.make_table)
loops = pytest.fixture(lock_tools.make_loops)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


class Called(list[Tickets]):
    """The tasks that were called, in order."""

    def queue(self, table: LockTable, *keys: str) -> Tickets:
        """A task that needs the keys of one table."""
        return self.queue_in(*((table, key) for key in keys))

    def queue_in(self, *places: tuple[LockTable, str]) -> Tickets:
        tickets = Tickets([table.ticket(key) for table, key in places])
        tickets.queue(lambda: self.append(tickets))
        return tickets


@pytest.fixture
def called() -> Called:
    return Called()


def redeem_and_release(tickets: Tickets) -> None:
    assert tickets.redeem()
    release(tickets)


def release(tickets: Tickets) -> None:
    for ticket in tickets.handles:
        assert ticket.is_held
        ticket.release()


def queue_thread(
    table: LockTable, threads: Threads, work: Callable[[], object], key: str = "k"
) -> Tickets:
    """A task that a new thread begins when it is called: it does `work` and releases the key."""
    tickets = Tickets([table.ticket(key)])

    def run() -> None:
        if tickets.redeem():
            work()
            release(tickets)

    tickets.queue(lambda: (threads.start(run), None)[1])
    return tickets


# -- one key


def test_a_task_is_called_at_once_if_the_key_is_unlocked_and_has_it_when_it_redeems(
    table: LockTable, called: Called
) -> None:
    tickets = called.queue(table, "k")
    assert called == [tickets]
    (ticket,) = tickets.handles
    assert not ticket.begun
    assert tickets.redeem()
    assert ticket.begun
    assert [str(caller) for caller in ticket.callers] == ["thread 'MainThread'"]
    assert not table.handle("k").try_acquire()
    tickets.withdraw()  # no error, and nothing happens: it was redeemed
    assert ticket.is_held
    ticket.release()
    tickets.withdraw()
    assert not tickets.redeem()


def test_a_redeemed_ticket_is_a_handle_like_any_other(
    table: LockTable, called: Called, threads: Threads
) -> None:
    tickets = called.queue(table, "k")
    assert tickets.redeem()
    waiter = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 1)
    release(tickets)
    waiter.join(SOON)
    tickets.handles[0].release()  # once more does no harm


def test_a_task_that_was_called_twice_begins_once(table: LockTable, called: Called) -> None:
    tickets = called.queue(table, "k")
    assert tickets.redeem()
    assert not tickets.redeem()
    release(tickets)
    assert not tickets.redeem()


def test_a_task_may_begin_within_the_call_if_the_key_was_unlocked(table: LockTable) -> None:
    begun: list[bool] = []
    tickets = Tickets([table.ticket("k")])
    tickets.queue(lambda: begun.append(tickets.redeem()))
    assert begun == [True]
    release(tickets)


def test_tasks_are_called_one_after_the_other_in_the_order_they_came(
    table: LockTable, called: Called
) -> None:
    tasks = [called.queue(table, "k") for _ in range(50)]
    for number, tickets in enumerate(tasks):
        assert called == tasks[: number + 1]
        assert tickets.redeem()
        assert called == tasks[: number + 1]
        release(tickets)
    assert called == tasks


def test_tickets_threads_and_coroutines_stand_in_one_queue(
    table: LockTable, threads: Threads, loops: Callable[[], Loop]
) -> None:
    served: list[int] = []
    loop = loops()
    coroutines = []

    async def coroutine(number: int) -> None:
        handle = await take_async(table)
        served.append(number)
        handle.release()

    def thread(number: int) -> None:
        handle = take(table)
        served.append(number)
        handle.release()

    first = take(table)
    for number in range(60):
        if number % 3 == 0:
            queue_thread(table, threads, lambda n=number: served.append(n))
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


def test_a_caller_inside_a_handler_passes_tickets_and_others_do_not(
    table: LockTable, called: Called, threads: Threads
) -> None:
    served: list[str] = []
    tickets = called.queue(table, "k")  # on its way, say in the queue of a busy pool

    def behind() -> None:
        handle = take(table)
        served.append("behind")
        handle.release()

    threads.start(behind)
    until(lambda: queued(table) == 1)
    take(table, passes=True).release()  # at once
    assert served == []
    handle = take(table, passes=True)
    assert not tickets.redeem()  # a handler has passed
    assert called == [tickets]
    handle.release()
    assert called == [tickets, tickets]  # so it is called again
    assert tickets.redeem()
    served.append("task")
    release(tickets)
    threads.join()
    assert served == ["task", "behind"]


def test_a_coroutine_inside_a_handler_passes_tickets(table: LockTable, called: Called) -> None:
    tickets = called.queue(table, "k")
    handle = asyncio.run(take_async(table, passes=True))
    assert not tickets.redeem()
    handle.release()
    assert called == [tickets, tickets]
    redeem_and_release(tickets)


def test_a_task_that_was_passed_and_has_not_come_yet_is_not_called_again(
    table: LockTable, called: Called
) -> None:
    tickets = called.queue(table, "k")
    for _ in range(5):
        take(table, passes=True).release()
    assert called == [tickets]
    assert tickets.redeem()
    assert not table.queues  # nothing waits any more
    release(tickets)


def test_a_caller_that_passes_tickets_still_queues_behind_those_that_have_begun(
    table: LockTable, threads: Threads
) -> None:
    served: list[str] = []

    def work(name: str, passes: bool) -> None:
        handle = take(table, passes=passes)
        served.append(name)
        handle.release()

    first = take(table)
    threads.start(work, "one", False)
    until(lambda: queued(table) == 1)
    queue_thread(table, threads, lambda: served.append("ticket"))
    threads.start(work, "behind the ticket", False)
    until(lambda: queued(table) == 3)
    threads.start(work, "inside a handler", True)
    until(lambda: queued(table) == 4)
    first.release()
    until(lambda: len(served) == 4)
    threads.join()
    assert served == ["one", "inside a handler", "ticket", "behind the ticket"]


def test_once_the_ticket_ahead_is_redeemed_what_was_behind_it_is_passed_no_more(
    table: LockTable, called: Called, threads: Threads
) -> None:
    served: list[str] = []

    def work(name: str, passes: bool) -> None:
        handle = take(table, passes=passes)
        served.append(name)
        handle.release()

    tickets = called.queue(table, "k")
    threads.start(work, "behind the ticket", False)
    until(lambda: queued(table) == 1)
    queue_thread(table, threads, lambda: served.append("later ticket"))
    assert tickets.redeem()
    threads.start(work, "inside a handler", True)
    until(lambda: queued(table) == 3)
    release(tickets)
    until(lambda: len(served) == 3)
    threads.join()
    assert served == ["behind the ticket", "inside a handler", "later ticket"]


def test_a_called_task_that_withdraws_lets_the_next_one_in(
    table: LockTable, called: Called, threads: Threads
) -> None:
    first, second = called.queue(table, "k"), called.queue(table, "k")
    thread = threads.start(lambda: take(table).release())
    until(lambda: queued(table) == 2)
    assert not second.redeem()  # it has not been called
    first.withdraw()
    assert called == [first, second]
    assert not first.redeem()
    second.withdraw()
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_task_withdraws_while_the_key_is_held(table: LockTable, called: Called) -> None:
    handle = take(table)
    tasks = [called.queue(table, "k") for _ in range(3)]
    tasks[0].withdraw()
    tasks[0].withdraw()
    handle.release()
    assert called == [tasks[1]]
    tasks[2].withdraw()
    tasks[1].withdraw()
    assert len(table) == 0


def test_a_time_out_behind_a_ticket_says_that_no_caller_holds(
    table: LockTable, called: Called
) -> None:
    tickets = called.queue(table, "k")
    with pytest.raises(
        SessionLockTimeoutError, match="kept for a task that waits for a worker thread"
    ):
        take(table, timeout=0)
    tickets.withdraw()


@pytest.fixture
def before_the_mutex(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens, once, when tickets are about to take the mutex."""
    happens: list[Callable[[], object]] = []
    locked = tickets_module.locked

    def locked_late(*args: Any) -> Any:
        while happens:
            happens.pop()()
        return locked(*args)

    monkeypatch.setattr(tickets_module, "locked", locked_late)
    return happens


def test_a_caller_that_comes_in_the_moment_in_which_a_ticket_is_redeemed_passes_it(
    table: LockTable, called: Called, before_the_mutex: list[Callable[[], object]]
) -> None:
    tickets = called.queue(table, "k")
    passed: list[LockHandle] = []
    before_the_mutex.append(lambda: passed.append(take(table, timeout=0, passes=True)))
    assert not tickets.redeem()
    assert passed[0].is_held
    assert called == [tickets]
    passed[0].release()
    assert called == [tickets, tickets]
    redeem_and_release(tickets)


def test_a_task_that_begins_as_it_is_withdrawn_keeps_its_locks_or_does_not_begin(
    table: LockTable, called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool is closed while a worker takes up its last task: what is noted first counts, and the
    lock is held if, and only if, the task begins."""
    tickets = called.queue(table, "k")
    settle = lock.settle

    def settle_late() -> None:
        monkeypatch.undo()
        assert not tickets.redeem()
        settle()

    monkeypatch.setattr(lock, "settle", settle_late)
    tickets.withdraw()
    assert is_unlocked(table)
    later = called.queue(table, "k")
    assert later.redeem()
    later.withdraw()
    assert later.handles[0].is_held
    release(later)


def test_a_ticket_that_is_unlocked_while_a_caller_begins_to_wait_keeps_its_place(
    table: LockTable, called: Called, threads: Threads
) -> None:
    """The ticket saw no queue, and the caller no ticket. Yet the ticket is in the queue, and a
    caller inside a handler does not wait for it."""
    has_entered, is_taken, passed = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        handle = take(table, passes=True)
        passed.set()
        handle.release()

    class Race(dict[str, LockHandle]):
        calls = 0  # of the caller

        def setdefault(self, key: str, handle: LockHandle, /) -> LockHandle:  # type: ignore[override]
            if isinstance(handle, Ticket) and not is_taken.is_set():
                threads.start(wait)
                assert has_entered.wait(SOON)
                holder = super().setdefault(key, handle)
                is_taken.set()
                return holder
            self.calls += 1
            if self.calls == 2:
                has_entered.set()
                assert is_taken.wait(SOON)
            holder = super().setdefault(key, handle)
            if self.calls == 1:
                del self[key]  # the holder lets go, and sees no queue
            return holder

    table.held = Race(k=take(LockTable()))  # type: ignore[misc] # it is final
    tickets = called.queue(table, "k")
    assert passed.wait(SOON)
    threads.join()
    assert called == [tickets]
    redeem_and_release(tickets)


# -- several keys


def test_unlocked_keys_are_taken_at_once(table: LockTable, called: Called) -> None:
    tickets = called.queue(table, "a", "b")
    assert called == [tickets]
    assert tickets.redeem()
    assert [ticket.name for ticket in tickets.handles] == ["a", "b"]
    assert not is_unlocked(table, "a")
    assert not is_unlocked(table, "b")
    release(tickets)


def test_a_task_is_called_when_the_last_of_its_keys_is_unlocked(
    table: LockTable, called: Called
) -> None:
    a, b = take(table, "a"), take(table, "b")
    tickets = called.queue(table, "a", "b")
    a.release()
    assert called == []
    assert not tickets.redeem()
    b.release()
    assert called == [tickets]
    redeem_and_release(tickets)


def test_a_waiting_task_holds_nothing_that_a_handler_could_want(
    table: LockTable, called: Called
) -> None:
    b = take(table, "b")
    tickets = called.queue(table, "a", "b")
    take(table, "a", timeout=0, passes=True).release()
    b.release()
    assert called == [tickets]
    redeem_and_release(tickets)


@pytest.mark.parametrize(("passed", "other"), ["ab", "ba"])
def test_a_task_that_is_passed_holds_nothing_and_keeps_its_place(
    table: LockTable, called: Called, passed: str, other: str
) -> None:
    later = Called()
    tickets = called.queue(table, "a", "b")
    behind = [later.queue(table, key) for key in "ab"]
    inside = take(table, passed, passes=True)
    assert not tickets.redeem()
    take(table, other, timeout=0, passes=True).release()
    assert (called, later) == ([tickets], [])
    inside.release()
    assert called == [tickets, tickets]
    assert later == []
    redeem_and_release(tickets)
    assert sorted(map(id, later)) == sorted(map(id, behind))
    for each in behind:
        redeem_and_release(each)


def test_two_tasks_that_want_the_same_keys_come_one_after_the_other(
    table: LockTable, called: Called
) -> None:
    tasks = [called.queue(table, *keys) for keys in ("ab", "ba", "ab")]
    for each in tasks:
        assert called[-1] is each
        redeem_and_release(each)
    assert called == tasks


def test_a_task_of_two_tables_waits_for_both(called: Called, table: LockTable) -> None:
    other = LockTable()
    a = take(other, "a")
    tickets = called.queue_in((table, "a"), (other, "a"))
    assert called == []
    a.release()
    assert called == [tickets]
    redeem_and_release(tickets)
    assert len(other) == 0


def test_a_task_that_withdraws_lets_the_others_pass(table: LockTable, called: Called) -> None:
    holder = take(table, "a")
    gone = called.queue(table, "a", "b")
    stays = called.queue(table, "b")
    gone.withdraw()
    assert called == [stays]
    redeem_and_release(stays)
    holder.release()
    gone.withdraw()  # once more does no harm
    assert not gone.redeem()


def test_a_task_that_withdraws_while_it_is_passed_leaves_nothing(
    table: LockTable, called: Called
) -> None:
    tickets = called.queue(table, "a", "b")
    inside = take(table, "b", passes=True)
    assert not tickets.redeem()
    tickets.withdraw()
    inside.release()
    assert called == [tickets]


def test_a_ticket_that_its_owner_releases_lets_the_others_pass(
    table: LockTable, called: Called
) -> None:
    """Before it was redeemed: the task is given up."""
    gone, stays = called.queue(table, "a", "b"), called.queue(table, "a", "b")
    gone.handles[0].release()
    assert not gone.redeem()
    gone.handles[1].release()
    assert called == [gone, stays]
    redeem_and_release(stays)
