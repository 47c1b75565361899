"""Scopes whose ends, turns and failures come in awkward orders."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from typing import Any

import pytest
from conftest import Threads, message
from race_tools import SOON, Hesitant, Quick, is_free, is_soon_free, let_others_run
from scope_tools import KEY, Counting, slow_store

from session_sync import (
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.locks.lock import LockHandle

# -- sessions that are touched early, late or never


@pytest.mark.parametrize("storage_type", [Quick, Counting])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_session_class_may_touch_its_fields_when_it_is_made(
    storage_type: type[Counting], lazy: bool
) -> None:
    class MySession(Session):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.setdefault("n", 0)

    storage = storage_type()
    sessions = SessionManager(MySession, storage=storage, lazy=lazy, lock_timeout=SOON)
    for _ in range(2):
        with sessions.session_scope(KEY) as session:
            session.n += 1
            assert type(session) is MySession
    assert storage.values == {KEY: {"n": 2}}
    assert storage.calls == ["get", "set"] * 2
    assert is_free(sessions)


def test_what_a_session_that_could_not_be_made_gave_away_is_closed() -> None:
    class Broken(Session):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            given.extend([self, self["items"]])
            raise LookupError("no")

    given: list[Any] = []
    sessions = SessionManager(Broken, initial=lambda update: {"items": []})
    with pytest.raises(LookupError):
        sessions.session_scope(KEY).__enter__()
    with pytest.raises(SessionClosedError, match=KEY):
        given[0].a = 1
    with pytest.raises(SessionClosedError, match=KEY):
        given[1].append(1)


@pytest.mark.parametrize("storage_type", [Quick, Counting])
def test_a_session_and_its_containers_are_closed_once_it_was_left(
    storage_type: type[Counting],
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    storage.values[KEY] = {"counter": 0, "list": []}
    for has_changed in (True, False):
        with sessions.session_scope(KEY) as session:
            items = session.list
            if has_changed:
                session.counter += 1
        with pytest.raises(SessionClosedError, match=KEY):
            session.a = 1
        with pytest.raises(SessionClosedError, match=KEY):
            items.append(1)
    assert storage.values == {KEY: {"counter": 1, "list": []}}


async def load(session: Any) -> None:
    await session


@pytest.mark.parametrize("storage_type", [Quick, Counting])
@pytest.mark.parametrize("entries", [1, 2])
def test_a_lazy_session_that_nobody_touched_in_time_is_never_loaded(
    storage_type: type[Counting], entries: int
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=True)
    with contextlib.ExitStack() as stack:
        for _ in range(entries):
            session = stack.enter_context(sessions.session_scope(KEY))
    with pytest.raises(SessionClosedError, match="before it was ever loaded"):
        session.a = 1
    with pytest.raises(SessionClosedError, match="before it was ever loaded"):
        asyncio.run(load(session))
    assert storage.calls == []
    assert is_free(sessions)


@pytest.mark.parametrize("storage_type", [Quick, Counting])
@pytest.mark.parametrize("initial", [None, lambda update: {"b": 1}])
def test_a_missing_session_that_is_empty_in_the_end_writes_nothing(
    storage_type: type[Counting], initial: Any
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage, initial=initial)
    with sessions.session_scope(KEY) as session:
        session.a = 1
        del session.a
        session.clear()
    assert storage.calls == ["get"]


def test_a_lazy_session_that_two_tasks_await_at_once_is_loaded_once() -> None:
    storage = Hesitant()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=True, lock_timeout=SOON)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:

            async def touch(name: str) -> None:
                (await session)[name] = 1

            tasks = [asyncio.create_task(touch(name)) for name in "ab"]
            await asyncio.to_thread(storage.begun.wait, 20)
            await let_others_run()
            storage.go_on.set()
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1, "b": 1}}
    assert storage.calls == ["get", "set"]


def test_a_lazy_session_in_memory_that_two_threads_touch_at_once_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    asked: list[Any] = []
    second: list[threading.Thread] = []
    is_waiting, acquire = threading.Event(), LockHandle.acquire

    def watched(*args: Any) -> Any:
        is_waiting.set()
        return acquire(*args)

    def initial(update: Any) -> dict[str, Any]:
        asked.append(update)
        second.append(threads.start(lambda: session.update(b=2)))
        assert is_waiting.wait(20)
        return {"a": 1}

    monkeypatch.setattr(LockHandle, "acquire", watched)
    sessions: SessionManager[Any] = SessionManager(lazy=True, initial=initial, lock_timeout=SOON)
    with sessions.session_scope(KEY) as session:
        session.c = 3
        second[0].join(20)
        assert session == {"a": 1, "b": 2, "c": 3}
    assert asked == [KEY]
    assert is_free(sessions)


def test_whoever_waits_until_another_thread_has_loaded_the_session_waits_no_longer_than_said(
    threads: Threads,
) -> None:
    storage = Hesitant()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=True, lock_timeout=0)
    with sessions.session_scope(KEY) as session:
        loader = threads.start(lambda: session.update(a=1))
        assert storage.begun.wait(20)
        try:
            with pytest.raises(SessionLockTimeoutError, match=KEY):
                _ = session["a"]
        finally:
            storage.go_on.set()
        loader.join(20)
        assert session.a == 1
    assert is_free(sessions)


@pytest.mark.parametrize("blocking", [False, True])
def test_initial_is_given_the_update_though_the_scope_has_ended_meanwhile(
    threads: Threads, blocking: bool
) -> None:
    storage, asked = Hesitant(), []
    storage.blocking = blocking
    sessions: SessionManager[Any] = SessionManager(
        storage=storage, lazy=True, initial=lambda update: asked.append(update) or {"a": 1}
    )
    update = message(1)
    with sessions.session_scope(update) as session:
        loader = threads.start(lambda: asked.append(session.a))
        assert storage.begun.wait(20)
    storage.go_on.set()
    loader.join(20)
    assert asked == [update, 1]
    assert is_free(sessions)


# -- what fails


@pytest.mark.parametrize("how", ["with", "async with"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_storage_that_raises_stop_iteration_is_told_of(how: str, lazy: bool) -> None:
    class Empty(Counting):
        def get(self, key: str) -> Any:
            return next(iter(()))

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            await session

    sessions: SessionManager[Any] = SessionManager(storage=Empty(), lazy=lazy)
    with pytest.raises(RuntimeError, match="storage raised StopIteration"):
        if how == "async with":
            loop = asyncio.new_event_loop()  # asyncio.run would wait for a task that hangs
            task = loop.create_task(main())
            loop.run_until_complete(asyncio.wait([task], timeout=SOON))
            assert task.done()
            loop.close()
            task.result()
        else:
            with sessions.session_scope(KEY) as session:
                len(session)
    assert is_free(sessions)


@pytest.mark.parametrize("storage_type", [Quick, Counting])
@pytest.mark.parametrize("how", ["flush", "aflush"])
def test_what_a_flush_could_not_save_is_saved_at_the_end(
    storage_type: type[Counting], how: str
) -> None:
    class Failing(storage_type):  # type: ignore[valid-type,misc]
        def set(self, key: str, value: Any) -> None:
            super().set(key, value)
            if self.calls.count("set") == 1:
                del self.values[key]
                raise OSError("on fire")

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.update(a=1, items=[1])
            with pytest.raises(OSError, match="on fire"):
                await session.aflush()

    storage = Failing()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    if how == "aflush":
        asyncio.run(main())
    else:
        with sessions.session_scope(KEY) as session:
            session.update(a=1, items=[1])
            with pytest.raises(OSError, match="on fire"):
                session.flush()
    assert storage.values == {KEY: {"a": 1, "items": [1]}}
    assert storage.calls == ["get", "set", "set"]


def test_an_error_after_release_does_not_open_the_session_again() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with pytest.raises(ValueError, match="late"), sessions.session_scope(KEY) as session:
        session.release()
        raise ValueError("late")
    with pytest.raises(SessionClosedError, match=KEY):
        session.a = 1


def test_a_task_that_fails_after_its_handler_has_left_saves_nothing() -> None:
    sessions: SessionManager[Any] = SessionManager(lock_timeout=SOON)

    async def background(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        async with sessions.session_scope(KEY) as session:
            inside.set()
            await go_on.wait()
            session.b = 2
            raise ValueError("late")

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await session.aflush()
            task = asyncio.create_task(background(inside, go_on))
            await inside.wait()
        go_on.set()
        with pytest.raises(ValueError, match="late"):
            await task

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"a": 1}
    assert is_free(sessions)


# -- changes that come too late


def test_a_change_that_a_joiner_makes_during_the_last_write_is_refused() -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=SOON)

    async def joiner(inside: asyncio.Event) -> None:
        async with sessions.session_scope(KEY) as session:
            inside.set()
            await asyncio.to_thread(begun.wait, 20)
            try:
                with pytest.raises(SessionClosedError, match=KEY):
                    session.b = 1
            finally:
                go_on.set()

    async def main() -> None:
        inside = asyncio.Event()
        async with sessions.session_scope(KEY) as session:
            task = asyncio.create_task(joiner(inside))
            await inside.wait()
            session.a = 1
            await session.arelease()
            await task

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1}}


def test_a_change_during_the_last_write_to_memory_is_refused() -> None:
    class Memory(MemoryStorage):
        def save(self, key: str, record: Any) -> None:
            with pytest.raises(SessionClosedError, match=KEY):  # as another thread could now
                session.b = 1
            super().save(key, record)

    sessions: SessionManager[Any] = SessionManager(storage=Memory())
    with sessions.session_scope(KEY) as session:
        session.a = 1
    assert sessions.storage.get(KEY) == {"a": 1}


# -- what is thrown away


@pytest.mark.parametrize("storage_type", [Quick, Counting])
@pytest.mark.parametrize("lazy", [False, True])
def test_an_entry_that_is_dropped_without_leaving_frees_its_key(
    storage_type: type[Counting], lazy: bool
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=lazy)

    def enter() -> None:
        scope = sessions.session_scope(KEY)
        scope.__enter__().update(a=1)

    contextvars.Context().run(enter)
    gc.collect()
    assert is_soon_free(sessions)
    assert storage.calls == ["get"]


@pytest.mark.parametrize("storage_type", [Quick, Counting])
def test_a_task_left_inside_a_scope_when_its_loop_closes_is_collected_and_frees_the_key(
    storage_type: type[Counting],
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def handler(inside: asyncio.Event) -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            inside.set()
            await asyncio.Event().wait()

    async def main() -> weakref.ref[asyncio.Task[None]]:
        inside = asyncio.Event()
        task: Any = asyncio.create_task(handler(inside))
        task._log_destroy_pending = False
        await inside.wait()
        return weakref.ref(task)

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(main())
    loop.close()
    del loop
    gc.collect()
    assert task() is None
    assert is_soon_free(sessions)
    assert storage.calls == ["get"]


def test_a_task_that_was_given_its_key_as_its_loop_ends_frees_it() -> None:
    sessions: SessionManager[Any] = SessionManager()
    ran: list[str] = []

    async def hold(go_on: asyncio.Event) -> None:
        async with sessions.session_scope(KEY):
            await go_on.wait()

    async def wait() -> None:
        async with sessions.session_scope(KEY):
            ran.append("after its loop has ended")

    async def main() -> weakref.ref[asyncio.Task[None]]:
        go_on = asyncio.Event()
        holding = asyncio.create_task(hold(go_on))
        await let_others_run()
        assert not holding.done()
        task: Any = asyncio.create_task(wait())
        task._log_destroy_pending = False
        await let_others_run()
        go_on.set()  # the key is handed on in the loop's last round, and nobody is woken any more
        return weakref.ref(task)

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(main())
    loop.close()
    del loop
    gc.collect()
    assert ran == []
    assert task() is None
    assert is_soon_free(sessions)


def test_a_task_that_has_taken_its_key_as_its_loop_ends_frees_it(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager()
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with sessions.session_scope(KEY):
            held.set()
            assert go_on.wait(SOON)

    async def wait() -> None:
        async with sessions.session_scope(KEY):
            pass

    async def begin() -> weakref.ref[asyncio.Task[None]]:
        task: Any = asyncio.create_task(wait())
        task._log_destroy_pending = False
        await let_others_run()
        return weakref.ref(task)

    threads.start(hold)
    assert held.wait(SOON)
    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(begin())
    go_on.set()  # while the loop stands still, so the task has to look for itself
    threads.join()
    loop.stop()
    loop.run_forever()  # one more round, in which it does
    assert not is_free(sessions)
    loop.close()
    del loop
    gc.collect()
    assert task() is None
    assert is_soon_free(sessions)


def test_a_coroutine_cancelled_and_thrown_away_during_the_last_write_frees_the_key_after_it() -> (
    None
):
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def handler() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1

    async def main() -> None:
        task: Any = asyncio.create_task(handler())
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        await let_others_run()
        task.get_coro().close()
        assert not is_free(sessions)
        go_on.set()
        assert is_soon_free(sessions)
        assert storage.values == {KEY: {"a": 1}}
        task.cancel()
        await asyncio.wait([task])
        assert isinstance(task.exception(), RuntimeError)  # of asyncio: its coroutine was closed

    asyncio.run(main())
