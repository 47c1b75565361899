"""Threads and tasks as callers: what they are called, what stops them, what keeps them alive."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextlib import AbstractContextManager

from conftest import Threads
from interruptions import everywhere

from session_sync.locks import callers as callers_module
from session_sync.locks.callers import Caller, current_caller


def test_a_thread_is_one_caller_however_often_it_asks(threads: Threads) -> None:
    callers: list[Caller] = []
    for name in ("first", "second"):
        threads.start(lambda: callers.extend((current_caller(), current_caller())), name=name)
        threads.join()
    assert callers[0] is callers[1]
    assert callers[2] is callers[3]
    assert callers[0] is not callers[2]
    assert [str(caller) for caller in callers[::2]] == ["thread 'first'", "thread 'second'"]
    assert callers[0].loop is None
    assert callers[0].task is None


def test_a_task_is_a_caller_on_its_loop() -> None:
    async def work() -> None:
        caller = current_caller()
        assert caller.task is asyncio.current_task()
        assert caller.loop is asyncio.get_running_loop()
        assert caller.thread is threading.current_thread()
        assert str(caller) == "task 'worker'"

    async def main() -> None:
        await asyncio.create_task(work(), name="worker")

    asyncio.run(main())


def test_a_callback_of_a_loop_is_its_thread() -> None:
    callers: list[Caller] = []

    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: callers.append(current_caller()))
        await asyncio.sleep(0)
        assert callers[0].loop is asyncio.get_running_loop()

    asyncio.run(main())
    assert callers[0].task is None
    assert str(callers[0]) == "thread 'MainThread'"


def test_a_caller_keeps_neither_its_task_nor_its_loop_alive() -> None:
    async def work() -> Caller:
        return current_caller()

    loop = asyncio.new_event_loop()
    task = loop.create_task(work())
    caller = loop.run_until_complete(task)
    loop.close()
    gone = [weakref.ref(task), weakref.ref(loop)]
    assert caller.task is task
    del task, loop
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert caller.task is None
    assert caller.loop is None
    assert str(caller) == "thread 'MainThread'"


def test_a_blocked_thread_stops_its_tasks_and_a_waiting_task_only_itself() -> None:
    async def child() -> Caller:
        return current_caller()

    async def main() -> None:
        me, other = current_caller(), await asyncio.create_task(child())
        kept = asyncio.current_task()
        assert kept is not None
        again = current_caller()
        assert me.stops(again, blocking=False)
        assert not me.stops(other, blocking=False)
        assert me.stops(other, blocking=True)
        thread = await asyncio.to_thread(current_caller)
        assert not me.stops(thread, blocking=True)
        assert not thread.stops(me, blocking=True)
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(main())
    assert current_caller().stops(current_caller(), blocking=True)


def test_a_finaliser_has_a_caller_while_that_of_its_thread_is_being_made(threads: Threads) -> None:
    def come_in_between() -> None:
        found.append(current_caller().thread)

    def work(interruption: AbstractContextManager[object]) -> None:
        with interruption:
            current_caller()
        assert set(found) <= {threading.current_thread()}

    found: list[threading.Thread] = []
    for interruption in everywhere(come_in_between, callers_module):
        found.clear()
        threads.start(work, interruption)
        threads.join()
