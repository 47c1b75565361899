"""Many callers of one key and of many: they join, they wait, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Threads, message
from scope_tools import KEY, Counting, slow_store

from session_sync import (
    MemoryStorage,
    Session,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionManager,
)

# -- joining


def test_a_scope_inside_a_scope_joins_it(threads: Threads) -> None:
    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions.session_scope(message(1)) as session:
        session.a = 1
        with sessions.session_scope(KEY) as inner:
            assert inner is session
            inner.a += 1
        assert storage.calls == ["get"]
        with sessions.session_scope("other") as other:
            with sessions.session_scope(KEY) as inner:
                assert inner is session
            other.b = 1
    assert storage.values == {KEY: {"a": 2}, "other": {"b": 1}}
    assert storage.calls == ["get", "get", "set", "set"]


def test_an_error_caught_between_joined_scopes_discards_nothing() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with sessions.session_scope(KEY) as session:
        with pytest.raises(ValueError, match="inner"), sessions.session_scope(KEY):
            session.a = 1
            raise ValueError("inner")
    assert sessions.storage.get(KEY) == {"a": 1}


def test_tasks_that_join_take_turns() -> None:
    sessions: SessionManager[Any] = SessionManager()

    async def add(times: int) -> None:
        for _ in range(times):
            async with sessions.session_scope(KEY) as session:
                value = session.get("n", 0)
                await asyncio.sleep(0)
                session.n = value + 1

    async def main() -> None:
        async with sessions.session_scope(KEY):
            await asyncio.gather(*(add(50) for _ in range(10)))

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"n": 500}


def test_threads_that_join_take_turns() -> None:
    sessions: SessionManager[Any] = SessionManager()

    def add(times: int) -> None:
        for _ in range(times):
            with sessions.session_scope(KEY) as session:
                value = session.get("n", 0)
                threading.Event().wait(0.0001)  # the handler's work, in which others could run
                session.n = value + 1

    async def main() -> None:
        async with sessions.session_scope(KEY):
            await asyncio.gather(*(asyncio.to_thread(add, 20) for _ in range(5)))

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"n": 100}


def test_a_task_that_outlives_its_handler_keeps_the_scope_open() -> None:
    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def background(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        async with sessions.session_scope(KEY) as session:
            inside.set()
            await go_on.wait()
            session.b = 2

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            task = asyncio.create_task(background(inside, go_on))
            await inside.wait()
        assert storage.values == {}
        go_on.set()
        await task

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1, "b": 2}}
    assert storage.calls == ["get", "set"]


def test_a_job_that_inherits_the_context_of_a_finished_handler_starts_outside() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with sessions.session_scope(KEY) as session:
        context = contextvars.copy_context()
        session.a = 1

    def job() -> None:
        with sessions.session_scope(KEY) as fresh:
            assert fresh is not session
            fresh.a += 1

    context.run(job)
    assert sessions.storage.get(KEY) == {"a": 2}


def test_scopes_that_end_in_another_context_neither_raise_nor_pile_up() -> None:
    sessions: SessionManager[Any] = SessionManager()
    for number in range(100):
        scope = sessions.session_scope(f"user:{number}")
        scope.__enter__().update(a=1)
        contextvars.copy_context().run(scope.__exit__, None, None, None)
    with sessions.session_scope("user:x") as session:
        session.a = 1
        assert scope.outer is None


def test_tasks_that_start_one_another_leave_no_chain_of_scopes() -> None:
    sessions: SessionManager[Any] = SessionManager()

    async def link(number: int, started: asyncio.Event, tasks: list[Any]) -> None:
        scope = sessions.session_scope(f"user:{number}")
        async with scope:
            started.set()
            for _ in range(3):
                await asyncio.sleep(0)
            if number < 100:
                following = asyncio.Event()
                tasks.append(asyncio.create_task(link(number + 1, following, tasks)))
                await following.wait()
        depth, entry = 0, scope.outer
        while entry is not None:
            depth, entry = depth + 1, entry.outer
        assert depth <= 3

    async def main() -> None:
        tasks: list[Any] = []
        await link(0, asyncio.Event(), tasks)
        for number in range(100):
            await tasks[number]

    asyncio.run(main())


def test_whoever_waits_for_a_lazy_session_waits_for_all_who_are_in_it() -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    locks = sessions.scopes.options.backend.locks

    def touch() -> None:
        with sessions.session_scope(KEY) as session:
            session.a = 1

    async def child(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        async with sessions.session_scope(KEY) as session:
            (await session).b = 1
            inside.set()
            await go_on.wait()

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        async with sessions.session_scope(KEY):
            await asyncio.to_thread(touch)  # a thread that has left waits for nothing any more
            (handle,) = locks.held.values()
            assert [caller.task for caller in handle.callers] == [asyncio.current_task()]
            task = asyncio.create_task(child(inside, go_on), name="the child")
            await inside.wait()
        with pytest.raises(SessionLockTimeoutError, match="task 'the child' has held it"):
            await contextvars.Context().run(locks.handle(KEY).acquire_async, 0)
        go_on.set()
        await task

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1}


def test_a_session_class_that_cannot_be_made_leaves_the_key_free() -> None:
    class Broken(Session):
        def __init__(self, *args: Any) -> None:
            raise LookupError("no")

    sessions = SessionManager(Broken)
    with pytest.raises(LookupError):
        sessions.session_scope(KEY).__enter__()
    assert len(sessions.locks) == 0


def test_two_managers_on_one_store_exclude_each_other_and_two_stores_do_not() -> None:
    storage = MemoryStorage()
    one: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=0)
    two: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=0)
    three: SessionManager[Any] = SessionManager(lock_timeout=0)
    with one.session_scope(KEY):

        def other() -> None:
            with pytest.raises(SessionLockTimeoutError):
                two.session_scope(KEY).__enter__()
            with three.session_scope(KEY) as session:
                session.a = 1

        contextvars.Context().run(lambda: thread(other))


def thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    runner.join(20)
    if errors:
        raise errors[0]


def test_a_closed_session_leaves_no_cycle_behind() -> None:
    sessions: SessionManager[Any] = SessionManager()
    gc.collect()
    gc.disable()
    try:
        with sessions.session_scope(message(1)) as session:
            session.cart = {"items": [1]}
        alive = weakref.ref(session)
        del session
        assert alive() is None
    finally:
        gc.enable()


# -- eight threads and eight coroutines, on one key and on many


@pytest.mark.parametrize("keys", [1, 100])
def test_no_update_is_lost_by_threads_and_coroutines_together(keys: int, threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager(lock_timeout=None)
    times = 200

    def work(number: int) -> None:
        for count in range(times):
            with sessions.session_scope(f"user:{(number + count) % keys}") as session:
                value = session.get("n", 0)
                threading.Event().wait(0.00001)  # the handler's work, in which others could run
                session.n = value + 1

    async def awork(number: int) -> None:
        for count in range(times):
            async with sessions.session_scope(f"user:{(number + count) % keys}") as session:
                value = session.get("n", 0)
                await asyncio.sleep(0)
                session.n = value + 1

    async def main() -> None:
        await asyncio.gather(*(awork(number) for number in range(8)))

    for number in range(8):
        threads.start(work, number)
    threads.start(lambda: asyncio.run(main()))
    threads.join()
    kept = [(sessions.storage.get(f"user:{number}") or {"n": 0})["n"] for number in range(keys)]
    assert sum(kept) == 16 * times
    assert len(sessions.locks) == 0


def test_asking_for_the_session_of_a_poll_raises() -> None:
    with pytest.raises(SessionKeyError, match=r"session_scope\(StorageKey\(user=\.\.\.\)\)"):
        SessionManager().session_scope({"update_id": 1, "poll": {"id": "1"}})


def test_an_event_loop_goes_on_while_a_slow_store_works() -> None:
    """A coroutine looks only for a moment whether a quick store is done."""
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def handler() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1

    async def main() -> None:
        for _ in range(3):  # quick ones, after which the next coroutine waits in place
            async with sessions.session_scope("another key"):
                pass
        task = asyncio.create_task(handler())
        while not begun.is_set():
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        await task

    asyncio.run(main())
    assert storage.values[KEY] == {"a": 1}
