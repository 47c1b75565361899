"""`sessions.locks`: what is held and waited for at this moment."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import lock_tools
import pytest
from conftest import Threads
from lock_tools import assert_nothing_is_left, queued, table_of, take_async, take_unowned
from waiting import SOON, until, until_async

from session_sync import MemoryStorage, SessionManager
from session_sync.locks.table import LockHolder
from session_sync.locks.tickets import Tickets

hasty = pytest.fixture(lock_tools.make_hasty)


@pytest.fixture
def sessions() -> Any:
    some: SessionManager[Any] = SessionManager()
    yield some
    assert_nothing_is_left(table_of(some))


def test_an_open_session_is_locked_and_has_a_holder(sessions: SessionManager[Any]) -> None:
    locks = sessions.locks
    assert len(locks) == 0
    assert not locks.is_locked("k")
    assert locks.holder("k") is None
    with sessions.session_scope("k"):
        assert len(locks) == 1
        assert locks.is_locked("k")
        assert not locks.is_locked("other")
        assert locks.waiters("k") == 0
        first, second = locks.holder("k"), locks.holder("k")
        assert isinstance(first, LockHolder)
        assert isinstance(second, LockHolder)
        assert first.name == "thread 'MainThread'"
        assert 0 <= first.seconds <= second.seconds
    assert len(locks) == 0
    assert locks.holder("k") is None


def test_a_holder_is_a_task_by_its_name(sessions: SessionManager[Any]) -> None:
    async def work() -> None:
        async with sessions.session_scope("k"):
            holder = sessions.locks.holder("k")
            assert holder is not None
            assert holder.name == "task 'the task'"

    async def main() -> None:
        await asyncio.create_task(work(), name="the task")

    asyncio.run(main())


def test_callers_that_have_joined_are_behind_the_first_holder(
    sessions: SessionManager[Any],
) -> None:
    async def child() -> None:
        async with sessions.session_scope("k"):
            holder = sessions.locks.holder("k")
            assert holder is not None
            assert holder.name == "task 'one' and task 'two'"
            assert len(sessions.locks) == 1

    async def main() -> None:
        async with sessions.session_scope("k"):
            await asyncio.create_task(child(), name="two")
            holder = sessions.locks.holder("k")
            assert holder is not None
            assert holder.name == "task 'one'"

    async def named() -> None:
        await asyncio.create_task(main(), name="one")

    asyncio.run(named())


def test_a_holder_that_has_ended_is_said_to_have(sessions: SessionManager[Any]) -> None:
    handle = take_unowned(table_of(sessions))
    holder = sessions.locks.holder("k")
    assert holder is not None
    assert holder.name == "a task that has ended"
    handle.release()


def test_waiters_are_threads_coroutines_and_updates(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    table, locks = table_of(sessions), sessions.locks

    def thread() -> None:
        with sessions.session_scope("k"):
            pass

    async def main() -> None:
        handle = await take_async(table)
        threads.start(thread)
        await until_async(lambda: locks.waiters("k") == 1)
        task = asyncio.create_task(take_async(table))
        await until_async(lambda: locks.waiters("k") == 2)
        tickets = Tickets([table.ticket("k")])
        tickets.queue(lambda: None)
        assert locks.waiters("k") == 3
        assert locks.waiters("other") == 0
        assert len(locks) == 1
        handle.release()
        (await task).release()
        await until_async(lambda: locks.waiters("k") == 0)  # the thread may be handing it on
        tickets.withdraw()

    asyncio.run(main())


def test_a_key_that_is_kept_for_an_update_is_locked_and_has_no_holder(
    sessions: SessionManager[Any],
) -> None:
    table, locks = table_of(sessions), sessions.locks
    for keys in (["k"], ["k", "other"]):
        tickets = Tickets([table.ticket(key) for key in keys])
        tickets.queue(lambda: None)
        assert locks.is_locked("k")
        assert locks.holder("k") is None
        assert locks.waiters("k") == 0  # it has the key, and waits for a worker only
        assert len(locks) == len(keys)
        assert tickets.redeem()
        assert locks.holder("k") is not None
        for ticket in tickets.handles:
            ticket.release()


def test_keys_are_those_under_the_managers_prefix() -> None:
    store = MemoryStorage()
    one: SessionManager[Any] = SessionManager(storage=store, prefix="one:")
    two: SessionManager[Any] = SessionManager(storage=store, prefix="two:")
    every: SessionManager[Any] = SessionManager(storage=store)
    with one.session_scope("k"), one.session_scope("l"), two.session_scope("k"):
        assert [len(each.locks) for each in (one, two, every)] == [2, 1, 3]
        assert one.locks.is_locked("l")
        assert not two.locks.is_locked("l")
        assert not every.locks.is_locked("l")
        assert every.locks.is_locked("one:l")
        assert two.locks.holder("l") is None
        assert two.locks.holder("k") is not None
    assert [len(each.locks) for each in (one, two, every)] == [0, 0, 0]


def test_managers_of_two_stores_see_their_own_locks() -> None:
    one: SessionManager[Any] = SessionManager(storage=MemoryStorage())
    two: SessionManager[Any] = SessionManager(storage=MemoryStorage())
    with one.session_scope("k"):
        assert one.locks.is_locked("k")
        assert not two.locks.is_locked("k")


@pytest.mark.usefixtures("hasty")
def test_looking_while_threads_come_and_go_neither_fails_nor_disturbs(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            assert 0 <= len(sessions.locks) <= 2
            for key in "ab":
                sessions.locks.is_locked(key)
                assert 0 <= sessions.locks.waiters(key) <= 4
                holder = sessions.locks.holder(key)
                assert holder is None or holder.name.startswith("thread")

    def work() -> None:
        for _ in range(300):
            with sessions.session_scope("a"), sessions.session_scope("b"):
                pass

    looking = threads.start(look)
    working = [threads.start(work) for _ in range(4)]
    for thread in working:
        thread.join(SOON)
    over.set()
    looking.join(SOON)
    threads.join()


def test_a_waiter_in_the_view_is_one_in_the_queue(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    table = table_of(sessions)
    handle = take_unowned(table)

    def wait() -> None:
        with sessions.session_scope("k"):
            pass

    threads.start(wait)
    until(lambda: queued(table) == 1)
    assert sessions.locks.waiters("k") == 1
    handle.release()
    threads.join()
