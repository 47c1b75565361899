"""Scopes whose ends, turns and failures come in awkward orders; see test_scope for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import math
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads, message
from test_scope import KEY, Counting, slow_store

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionClosedError,
    SessionLockTimeoutError,
    SessionManager,
    SQLiteStorage,
    storage_from_url,
)
from session_sync.lifecycle import threads as pools
from session_sync.lifecycle.current import in_handler
from session_sync.locks.lock import LockHandle
from session_sync.locks.tickets import Tickets

SOON = 5  # seconds until a test that waits for something in vain gives up


class Quick(Counting):
    """As Counting, called at once and in the thread of whoever asks, like a store in memory."""

    blocking = False


class Hesitant(Counting):
    """A storage whose first `get` waits."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def get(self, key: str) -> Any:
        if not self.begun.is_set():
            self.begun.set()
            assert self.go_on.wait(20)
        return super().get(key)


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def is_soon_free(sessions: SessionManager[Any]) -> bool:
    """What a finaliser unlocks that blocks, a thread unlocks."""
    give_up = time.monotonic() + SOON
    while not is_free(sessions) and time.monotonic() < give_up:
        time.sleep(0)
    return is_free(sessions)


async def let_others_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# -- sessions that are touched early, late or never


@pytest.mark.parametrize("storage_type", [Quick, Counting])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_session_class_may_touch_its_fields_when_it_is_made(
    storage_type: type[Counting], lazy: bool
) -> None:
    class Bag(Session):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.setdefault("n", 0)

    storage = storage_type()
    sessions = SessionManager(Bag, storage=storage, lazy=lazy, lock_timeout=SOON)
    for _ in range(2):
        with sessions.session_scope(KEY) as session:
            session.n += 1
            assert type(session) is Bag
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


# -- joining


def test_scopes_of_two_stores_do_not_join_though_their_key_is_the_same() -> None:
    one: SessionManager[Any] = SessionManager(storage=Counting())
    two: SessionManager[Any] = SessionManager(storage=Counting())
    with one.session_scope(KEY) as outer, two.session_scope(KEY) as inner:
        assert outer is not inner
        outer.a = 1
        inner.b = 2
    assert one.storage.get(KEY) == {"a": 1}
    assert two.storage.get(KEY) == {"b": 2}


def test_a_joiner_whose_scope_is_released_while_it_loads_opens_one_of_its_own() -> None:
    storage = Hesitant()
    lazy: SessionManager[Any] = SessionManager(storage=storage, lazy=True, lock_timeout=SOON)
    eager: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=SOON)

    async def joiner(name: str) -> None:
        async with eager.session_scope(KEY) as session:
            await asyncio.sleep(0)
            session[name] = 1

    async def main() -> None:
        async with lazy.session_scope(KEY) as session:
            joiners = [asyncio.create_task(joiner(name)) for name in "ab"]
            await asyncio.to_thread(storage.begun.wait, 20)
            await let_others_run()  # `a` loads, `b` waits for its turn
            await session.arelease()
            storage.go_on.set()
            await asyncio.gather(*joiners)

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1, "b": 1}}
    assert storage.calls == ["get", "get", "set", "get", "set"]
    assert is_free(eager)


@pytest.mark.parametrize("storage_type", [Quick, Counting])
def test_joiners_whose_scope_is_released_while_they_wait_open_scopes_of_their_own(
    storage_type: type[Counting],
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=SOON)
    seen: list[Any] = []

    async def joiner(name: str) -> None:
        async with sessions.session_scope(KEY) as session:
            seen.append(session)
            await let_others_run()
            session[name] = 1
            if name == "a":
                await session.arelease()

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            await asyncio.gather(*(joiner(name) for name in "abc"))
        assert seen[0] is session
        assert len(set(map(id, seen))) == 3

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1, "b": 1, "c": 1}}
    assert is_free(sessions)


class Joiners:
    """A task `one` that is inside a scope which it has joined, and `two` that waits for its turn;
    `one` ends once `go_on` is set, and calls `at_end` in the very step in which it leaves."""

    def __init__(self, sessions: SessionManager[Any]) -> None:
        self._sessions = sessions
        self._inside, self.go_on = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        self.one = asyncio.create_task(self._one())
        await self._inside.wait()
        self.two = asyncio.create_task(self._two())
        await let_others_run()

    async def _one(self) -> None:
        async with self._sessions.session_scope(KEY) as session:
            session.a = 1
            self._inside.set()
            await self.go_on.wait()
        self.at_end()

    def at_end(self) -> None:
        pass

    async def _two(self) -> None:
        async with self._sessions.session_scope(KEY):
            pytest.fail("has its turn")


@pytest.mark.parametrize("storage_type", [Quick, Counting])
def test_a_joiner_that_is_cancelled_while_it_waits_keeps_nothing_open(
    storage_type: type[Counting],
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=SOON)

    async def main() -> None:
        async with sessions.session_scope(KEY):
            joiners = Joiners(sessions)
            await joiners.start()
        joiners.two.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joiners.two
        assert storage.calls == ["get"]  # `one` is still inside
        joiners.go_on.set()
        await joiners.one

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1}}
    assert is_free(sessions)


@pytest.mark.parametrize("storage_type", [Quick, Counting])
def test_the_last_joiner_closes_the_scope_though_it_is_cancelled_as_its_turn_comes(
    storage_type: type[Counting],
) -> None:
    storage = storage_type()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=SOON)

    async def main() -> None:
        async with sessions.session_scope(KEY):
            joiners = Joiners(sessions)
            await joiners.start()
        joiners.at_end = joiners.two.cancel  # type: ignore[assignment]
        joiners.go_on.set()
        await joiners.one
        with pytest.raises(asyncio.CancelledError):
            await joiners.two

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1}}
    assert is_free(sessions)


def test_a_joiner_waits_for_its_turn_no_longer_than_its_manager_says() -> None:
    sessions: SessionManager[Any] = SessionManager(lock_timeout=SOON)
    hasty: SessionManager[Any] = SessionManager(storage=sessions.storage, lock_timeout=0)

    async def main() -> None:
        async with asyncio.timeout(SOON), sessions.session_scope(KEY):
            joiners = Joiners(sessions)
            await joiners.start()
            joiners.two.cancel()
            with pytest.raises(SessionLockTimeoutError, match=KEY):
                await hasty.session_scope(KEY).__aenter__()
            joiners.go_on.set()
            await joiners.one

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"a": 1}
    assert is_free(sessions)


# -- turns that have not begun


def update_it(sessions: SessionManager[Any]) -> None:
    with sessions.session_scope(KEY) as session:
        session.a = 1


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("inside", ["a handler", "another scope"])
def test_a_scope_inside_a_handler_passes_tickets_that_have_not_begun(
    lazy: bool, inside: str
) -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=lazy, lock_timeout=0)
    tickets = Tickets([sessions.scopes.options.backend.locks.ticket(KEY)])
    tickets.queue(lambda: None)

    def handler() -> None:
        if inside == "a handler":
            in_handler.set(True)
            update_it(sessions)
        else:
            with sessions.session_scope("other"):
                update_it(sessions)

    contextvars.copy_context().run(handler)
    assert sessions.storage.get(KEY) == {"a": 1}
    tickets.withdraw()
    assert is_free(sessions)


def test_a_lazy_session_touched_outside_its_scope_but_in_a_handler_passes_tickets() -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True, lock_timeout=0)
    tickets = Tickets([sessions.scopes.options.backend.locks.ticket(KEY)])
    tickets.queue(lambda: None)

    def touch() -> None:
        in_handler.set(True)
        session.a = 1

    with sessions.session_scope(KEY) as session:
        contextvars.Context().run(touch)
    assert sessions.storage.get(KEY) == {"a": 1}
    tickets.withdraw()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_scope_outside_any_handler_queues_behind_tickets_that_have_not_begun(lazy: bool) -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=lazy, lock_timeout=0)
    tickets = Tickets([sessions.scopes.options.backend.locks.ticket(KEY)])
    tickets.queue(lambda: None)
    with pytest.raises(SessionLockTimeoutError, match="a task that waits for a worker"):
        update_it(sessions)
    tickets.withdraw()
    assert is_free(sessions)


def test_a_lazy_session_that_nobody_touched_has_nothing_to_flush(tmp_path: Path) -> None:
    for storage in (MemoryStorage(), SQLiteStorage(tmp_path / "sessions.db")):
        sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=True)
        with sessions.session_scope("user:1") as session:
            session.flush()

        async def handler(sessions: SessionManager[Any] = sessions) -> None:
            async with sessions.session_scope("user:1") as session:
                await session.aflush()

        asyncio.run(handler())
        assert not storage.has("user:1")
        storage.close()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_coroutine_thrown_away_while_it_opens_leaves_the_record_free(
    tmp_path: Path, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, other = (SQLiteStorage(tmp_path / "sessions.db") for _ in range(2))
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=lazy)
    for name in ("seconds", "in_threads_until"):  # after a slow call nobody waits in place
        monkeypatch.setattr(pools.openers, name, math.inf)

    async def handler() -> None:
        async with sessions.session_scope("user:1") as session:
            await session
            pytest.fail("it went on")

    async def main() -> None:
        thrown_away = handler()
        thrown_away.send(None)  # it waits for a thread that opens the record
        thrown_away.close()

    asyncio.run(main())
    assert is_soon_free(sessions)
    # Another storage object on the file is to the first one what another process is.
    for free in (sessions, SessionManager(storage=other, lock_timeout=1)):
        with free.session_scope("user:1") as session:
            session.counter = session.get("counter", 0) + 1
    assert storage.get("user:1") == {"counter": 2}
    storage.close()
    other.close()


@pytest.mark.parametrize("kind", ["memory", "lru", "sqlite", "disk"])
def test_what_the_collector_has_freed_is_not_freed_again(kind: str, tmp_path: Path) -> None:
    """It clears a cycle in any order: a scope may go before the coroutine that is inside of it."""
    if kind == "lru":
        storage: Any = LruMemoryStorage()
    else:
        path = "" if kind == "memory" else f"/{tmp_path}/sessions"
        storage = storage_from_url(f"{kind}://{path}")
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    scope = sessions.session_scope(KEY)

    async def handle() -> None:
        async with scope as session:
            session.n = 1
            await asyncio.get_running_loop().create_future()

    async def begin() -> Any:
        coroutine = handle()
        task: Any = asyncio.create_task(coroutine)
        task._log_destroy_pending = False
        while scope.session is None:
            await asyncio.sleep(0)
        return coroutine

    loop = asyncio.new_event_loop()
    coroutine = loop.run_until_complete(begin())
    loop.close()
    scope.__del__()
    assert is_soon_free(sessions)
    with sessions.session_scope(KEY) as session:
        coroutine.close()
        assert not is_free(sessions)
        if kind in ("sqlite", "disk") and sys.platform.startswith("linux"):
            other: Any = storage_from_url(f"{kind}:///{tmp_path}/sessions")  # as another process
            with pytest.raises(SessionLockTimeoutError):
                other.open_record(KEY, 0)
            other.close()
        session.n = 2
    assert storage.get(KEY) == {"n": 2}
    storage.close()
