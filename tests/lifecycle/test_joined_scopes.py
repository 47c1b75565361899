"""Scopes of one key inside each other: they share the session, one after the other."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Threads

from session_sync import SessionLockTimeoutError, SessionManager


@pytest.fixture
def sessions() -> Iterator[SessionManager[Any]]:
    some: SessionManager[Any] = SessionManager()
    yield some
    assert len(some.locks) == 0


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


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


def test_children_of_a_gather_come_one_after_the_other(sessions: SessionManager[Any]) -> None:
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
def test_threads_with_a_copied_context_come_one_after_the_other(
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
                pytest.raises(SessionLockTimeoutError, match=r"task .* has held it for"),
            ):
                await asyncio.get_running_loop().run_in_executor(pool, work)
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(main())


def test_joining_tasks_that_are_cancelled_let_the_others_in(
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
        hurried = SessionManager(storage=sessions.storage, lock_timeout=0.001)
        with pytest.raises(SessionLockTimeoutError, match=r"task 'detached' has held it for"):
            async with hurried.session_scope("k"):
                pass
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


def test_a_scope_entered_in_one_thread_can_be_left_in_another(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    scope = sessions.session_scope("k")
    threads.start(scope.__enter__)
    threads.join()
    assert sessions.locks.is_locked("k")
    scope.__exit__(None, None, None)
    assert not sessions.locks.is_locked("k")
