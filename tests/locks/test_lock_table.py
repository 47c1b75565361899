"""What stands in a lock table, and that nothing is left behind; forks."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from typing import Any

import lock_tools
import pytest
from lock_tools import assert_nothing_is_left, queued, table_of, take, take_async
from waiting import until_async

from session_sync import SessionManager
from session_sync.locks import table as table_module
from session_sync.locks.table import LockTable, StoreLocks

table = pytest.fixture(lock_tools.make_table)
sessions = pytest.fixture(lock_tools.make_sessions)
nothing_is_left = pytest.fixture(autouse=True)(lock_tools.check_that_nothing_is_left)


# -- nothing is left behind


def test_a_key_is_in_the_table_while_it_is_held_or_waited_for(table: LockTable) -> None:
    async def main() -> None:
        a, b = await take_async(table, "a"), await take_async(table, "b")
        assert len(table) == 2
        waiter = asyncio.create_task(take_async(table, "b"))
        await until_async(lambda: queued(table, "b") == 1)
        assert len(table) == 2
        assert list(table.queues) == ["b"]
        a.release()
        assert len(table) == 1
        b.release()
        assert len(table) == 1
        assert not table.queues
        (await waiter).release()

    asyncio.run(main())


def test_half_a_million_keys_leave_nothing_behind(table: LockTable) -> None:
    def touch(keys: range) -> None:
        for number in keys:
            handle = table.handle(str(number))
            assert handle.try_acquire()
            handle.release()

    touch(range(1_000))
    gc.collect()
    size = sys.getsizeof(table.held)
    blocks = sys.getallocatedblocks()
    touch(range(500_000))
    gc.collect()
    assert len(table) == 0
    assert sys.getsizeof(table.held) <= size
    assert sys.getallocatedblocks() - blocks < 1_000


def test_twenty_thousand_sessions_leave_no_lock_behind(sessions: SessionManager[Any]) -> None:
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
    assert_nothing_is_left(table_of(sessions))


def test_many_held_at_once_leave_an_empty_table(table: LockTable) -> None:
    handles = [take(table, str(number)) for number in range(10_000)]
    assert len(table) == 10_000
    for handle in handles:
        handle.release()
    assert len(table) == 0


def test_keys_that_were_waited_for_leave_no_queue(table: LockTable) -> None:
    async def main() -> None:
        for number in range(1_000):
            key = str(number)
            handle = await take_async(table, key)
            waiter = asyncio.create_task(take_async(table, key))
            await until_async(lambda key=key: queued(table, key) == 1)
            handle.release()
            (await waiter).release()

    asyncio.run(main())
    assert not table.queues
    assert not table.held


def test_ten_thousand_coroutines_wait_without_a_thread(sessions: SessionManager[Any]) -> None:
    table = table_of(sessions)

    async def work() -> None:
        async with sessions.session_scope("k") as session:
            session.counter = session.get("counter", 0) + 1

    async def main() -> None:
        handle = await take_async(table)
        before = set(threading.enumerate())
        tasks = [asyncio.create_task(work()) for _ in range(10_000)]
        await until_async(lambda: queued(table) == 10_000)
        begun = {thread.name for thread in {*threading.enumerate()} - before}
        assert begun <= {"session_sync-watch"}  # one for the whole process
        handle.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert sessions.storage.get("k") == {"counter": 10_000}
    assert_nothing_is_left(table)


def test_a_table_is_collected_with_its_store() -> None:
    known = len(table_module._tables)
    store = StoreLocks()
    assert len(table_module._tables) == known + 1
    gone = weakref.ref(store)
    del store
    assert gone() is None
    assert len(table_module._tables) == known


def test_a_table_names_its_keys_in_messages(table: LockTable) -> None:
    assert table.name_of("k") == "k"
    assert LockTable("user:1").name_of("write") == "user:1"
    assert LockTable("user:1").handle("write").name == "user:1"


# -- fork


def run_script(script: str) -> None:
    """A program of its own: pytest has threads."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_keeps_what_its_own_thread_holds_and_nothing_else() -> None:
    run_script("""
        import os, sys, threading, warnings
        from session_sync import SessionLockTimeoutError
        from session_sync.locks import lock
        from session_sync.locks.table import StoreLocks
        from session_sync.locks.tickets import Tickets
        warnings.simplefilter("ignore", DeprecationWarning)
        table = StoreLocks()
        held, go_on = threading.Event(), threading.Event()

        def take(key, timeout=30, passes=False):
            handle = table.handle(key)
            handle.acquire(timeout, passes)
            return handle

        def other():
            handle = take("theirs")
            held.set()
            go_on.wait(30)
            handle.release()

        def queue(key):
            tickets = Tickets([table.ticket(key)])
            tickets.queue(lambda: None)
            return tickets

        ours = take("ours")
        not_begun, queued = queue("not begun"), queue("passed")
        passed = take("passed", passes=True)
        threads = [
            threading.Thread(target=other),
            threading.Thread(target=lambda: take("ours").release()),
        ]
        for thread in threads:
            thread.start()
        held.wait(30)
        while "ours" not in table.queues:
            pass

        def fork():
            # As if a third thread were in the middle of a step.
            lock._mutex.acquire()
            lock._Section.busy = True
            lock._released.append((passed, True))
            in_middle.set()
            forked.wait(30)
            lock._released.clear()
            lock._Section.busy = False
            lock._mutex.release()

        in_middle, forked = threading.Event(), threading.Event()
        third = threading.Thread(target=fork)
        third.start()
        in_middle.wait(30)
        child = os.fork()
        if child == 0:
            take("theirs", 1).release()
            take("not begun", 1).release()
            assert not not_begun.redeem() and not queued.redeem()
            assert passed.is_held and not table.handle("passed").try_acquire()
            passed.release()
            answer = []
            def wait():
                try:
                    take("ours", 0)
                except SessionLockTimeoutError:
                    answer.append("held")
                take("ours", 20).release()
                answer.append("unlocked")
            thread = threading.Thread(target=wait)
            thread.start()
            while not answer:
                pass
            ours.release()
            thread.join(20)
            os._exit(0 if answer == ["held", "unlocked"] and not len(table) else 1)
        forked.set()
        third.join()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        passed.release()
        for tickets in (not_begun, queued):
            tickets.withdraw()
        ours.release()
        go_on.set()
        for thread in threads:
            thread.join()
        sys.exit(status or len(table))
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_has_reports_of_its_own() -> None:
    """The parent's watching thread does not live on in it."""
    run_script("""
        import os, sys, threading, warnings
        from session_sync.locks.table import StoreLocks
        warnings.simplefilter("ignore", DeprecationWarning)

        class Patience:
            seconds = 0.01
            def __init__(self):
                self.told = threading.Event()
            def run_out(self, report):
                self.told.set()

        def wait_for_report():
            table, patience = StoreLocks(), Patience()
            handle = table.handle("k")
            handle.acquire(None)
            def wait():
                waiter = table.handle("k")
                waiter.acquire(30, patience=patience)
                waiter.release()
            thread = threading.Thread(target=wait)
            thread.start()
            told = patience.told.wait(30)
            handle.release()
            thread.join()
            return told

        assert wait_for_report()
        child = os.fork()
        if child == 0:
            os._exit(0 if wait_for_report() else 1)
        assert wait_for_report()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_keeps_a_session_that_its_thread_has_joined() -> None:
    run_script("""
        import os, sys, threading, warnings
        from session_sync import SessionManager
        warnings.simplefilter("ignore", DeprecationWarning)
        sessions = SessionManager()
        with sessions.session_scope("k"), sessions.session_scope("k"):
            child = os.fork()
            held = sessions.locks.is_locked("k")
        if child == 0:
            os._exit(0 if held and len(sessions.locks) == 0 else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
