"""While a thread stands in the middle of an end: failures, collections, flushes of others."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from stops import Stop, stopping
from stores import OwnStorage
from two_events_tools import KEY, Block, Interrupt, begin_and_lose, is_free
from waiting import SOON, until, until_async

from session_sync import MemoryStorage, SessionClosedError, SessionDeadlockError, SessionManager
from session_sync.lifecycle import ending
from session_sync.lifecycle.entry import SessionScope
from session_sync.lifecycle.scope import Scope
from session_sync.lifecycle.threads import ThreadPool
from session_sync.lifecycle.update import tickets_for
from session_sync.locks import lock

# -- what has failed, and what was thrown away


def test_a_handler_that_fails_as_a_flush_ends_is_rolled_back_though_other_keys_change_hands(
    threads: Threads,
) -> None:
    """The flush releases the write lock by a note, which another thread is to work off."""
    sessions: SessionManager[Any] = SessionManager()
    writes = Stop(Scope._write_in_memory, "self.put(record)")
    busy = Stop(lock.queue_of, "queue = table", when=lambda v: v["key"] == "user:2")

    def hold() -> None:
        with sessions.session_scope("user:2"):
            holds.set()
            assert let_go.wait(SOON)

    def want() -> None:
        with sessions.session_scope("user:2"):
            pass

    holds, let_go = threading.Event(), threading.Event()
    with sessions.session_scope(KEY) as session:
        session.n = 1
        scope: Any = session._lifecycle()
        with sessions.session_scope(KEY):
            failing = Block(threads, sessions, "bad").inside()
        first = Stop(Scope._write_in_memory, "self.put(record)")
        threads.start(stopping(session.flush, first))
        first.wait()
        flush = threads.start(stopping(session.flush, writes))  # which has to wait
        until(lambda: scope.queues)
        session.m = 2
        first.go_on()
        writes.wait()
        failing.error = LookupError()
        failing.join()
        threads.start(hold)
        assert holds.wait(SOON)
        threads.start(stopping(want, busy))
        busy.wait()
        writes.go_on()
        until(lambda: lock._released or not flush.is_alive())
        busy.go_on()
        flush.join(SOON)
        assert not scope._is_failed
        let_go.set()
        session.late = 1  # it is not rolled back with the others
    threads.join()
    assert sessions.storage.get(KEY)["late"] == 1


def test_a_flush_that_waits_for_the_end_of_a_handler_that_fails_says_so_after_an_earlier_one(
    threads: Threads,
) -> None:
    """What was stored before is not what is lost."""

    def flush() -> None:
        with pytest.raises(SessionClosedError, match="LookupError was raised"):
            session.flush()

    storage = Slow()
    storage.go_on.set()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with contextlib.suppress(LookupError), sessions.session_scope(KEY) as session:
        session.a = 1
        session.flush()
        session.b = 2
        raise LookupError
    flush()
    assert storage.values == {KEY: {"a": 1}}


def test_several_are_written_without_what_a_failed_handler_has_changed(threads: Threads) -> None:
    """It has failed while a flush was on its way, behind which the end of the block comes."""
    sessions: SessionManager[Any] = SessionManager()
    writes = Stop(Scope._write_in_memory, "self.put(record)")
    with sessions.session_scopes(KEY, "user:2") as (one, two):
        one.n = two.n = 1
        with sessions.session_scope(KEY):
            failing = Block(threads, sessions, "x").inside()
        scope: Any = one._lifecycle()
        threads.start(stopping(one.flush, writes))
        writes.wait()
        failing.session.bad = 1  # behind what the flush has taken
        failing.error = LookupError()
        failing.join()

        def let_go() -> None:
            until(lambda: scope.queues)  # the end of the block waits
            writes.go_on()

        threads.start(let_go)
    threads.join()
    assert failing.failure
    assert "bad" not in sessions.storage.get(KEY)


def test_a_task_that_only_wanted_to_load_a_lazy_session_does_not_close_it(
    threads: Threads,
) -> None:
    lazy: SessionManager[Any] = SessionManager(lazy=True)
    eager: SessionManager[Any] = SessionManager(storage=lazy.storage)
    holder = Block(threads, eager, "held").inside()
    with lazy.session_scope(KEY) as session:

        async def touch() -> None:
            await session

        begin_and_lose(touch)
        gc.collect()
        assert not lazy.locks.waiters(KEY)
        holder.join()
        session.a = 1
    assert lazy.storage.get(KEY) == {"held": 1, "a": 1}
    assert is_free(lazy)


@pytest.mark.parametrize("url", ["memory://", "sqlite:///s.db", "disk:///s"])
@pytest.mark.parametrize("kind", ["task", "block"])
def test_what_is_open_at_the_end_of_the_process_complains_of_nothing(
    tmp_path: Path, url: str, kind: str
) -> None:
    """The interpreter ends, and with it what can be done in a thread."""
    program = {
        "block": "scope = sessions.session_scope('user:1'); session = scope.__enter__()",
        "task": """
async def handle():
    async with sessions.session_scope("user:1") as session:
        session.a = 1
        await asyncio.Event().wait()
loop = asyncio.new_event_loop()
task = loop.create_task(handle())
task._log_destroy_pending = False
loop.run_until_complete(asyncio.sleep(0.05))
""",
    }[kind]
    text = f"""
import asyncio
from session_sync import SessionManager, storage_from_url
sessions = SessionManager(storage=storage_from_url({url!r}))
{program}
print("end")
"""
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", text]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")


# -- what the collector finds, and goes on for a while


def _generator_in(
    enter: Callable[[], Any], change: Callable[[Any], object]
) -> Generator[Any, Any, None]:
    """A generator that enters such a block at its next step, and then is known to the collector
    alone. Closed by that, it goes on until `GO_ON`, and leaves the block without an error."""

    def rows() -> Generator[Any, Any, None]:
        me = yield
        yield
        with enter() as entered:
            change(entered)
            try:
                yield me  # a cycle
            except GeneratorExit:
                CLEANING.set()
                assert GO_ON.wait(SOON)

    generator = rows()
    next(generator)
    generator.send(generator)
    return generator


CLEANING, GO_ON = threading.Event(), threading.Event()


def _collect_and_let_the_next_one_in(threads: Threads, sessions: SessionManager[Any]) -> None:
    CLEANING.clear()
    GO_ON.clear()
    threads.start(gc.collect)
    assert CLEANING.wait(SOON)
    with sessions.session_scope(KEY) as session:  # the watch finds that it has no owner
        session.b = 2
    GO_ON.set()
    threads.join()
    until(lambda: is_free(sessions))


@pytest.mark.usefixtures("collector")
def test_several_sessions_of_a_generator_that_is_collected_are_not_written(
    threads: Threads,
) -> None:
    def change(entered: Any) -> None:
        for session in entered:
            session.a = 1

    sessions: SessionManager[Any] = SessionManager()
    scopes = lambda: sessions.session_scopes(KEY, "user:2")  # noqa: E731
    contextvars.Context().run(lambda: next(_generator_in(scopes, change)))
    _collect_and_let_the_next_one_in(threads, sessions)
    assert sessions.storage.get(KEY) == {"b": 2}
    assert sessions.storage.get("user:2") is None


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("storage_type", [OwnStorage, MemoryStorage])
def test_a_member_that_goes_on_while_it_is_collected_overwrites_nothing(
    threads: Threads, storage_type: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_after_the_other = ThreadPool("test", 1, insists=False)
    monkeypatch.setattr(ending, "errands", one_after_the_other)

    def begin() -> None:
        generator = _generator_in(lambda: sessions.session_scope(KEY), change)
        with sessions.session_scope(KEY) as session:
            session.a = 1
            next(generator)

    def change(session: Any) -> None:
        session.member = 1

    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    contextvars.Context().run(begin)
    _collect_and_let_the_next_one_in(threads, sessions)
    is_done = threading.Event()
    one_after_the_other.run_soon(is_done.set)
    assert is_done.wait(SOON)
    assert sessions.storage.get(KEY) == {"b": 2}


@pytest.mark.usefixtures("collector")
def test_a_wait_that_is_collected_calls_no_observer_in_the_collector_s_thread(
    threads: Threads,
) -> None:
    mutex = threading.Lock()
    seen: list[str] = []

    def observe(_event: object) -> None:
        with mutex:
            seen.append(threading.current_thread().name)

    async def handle() -> None:
        async with sessions.session_scope(KEY):
            pass

    def collect() -> None:
        with mutex:
            gc.collect()

    sessions: SessionManager[Any] = SessionManager(on_wait=observe)
    holder = Block(threads, sessions, "held").inside()
    contextvars.Context().run(begin_and_lose, handle)
    collector = threads.start(collect, name="collector")
    collector.join(SOON)
    assert not collector.is_alive()
    until(lambda: seen)
    assert "collector" not in seen
    holder.join()
    assert is_free(sessions)


def test_a_ticket_whose_update_is_lost_with_an_interrupted_finaliser_is_recovered(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_scope: object) -> None:
        raise Interrupt

    def lose() -> None:
        scope = sessions.scopes.of_key(KEY, None)
        tickets = tickets_for([scope])
        tickets.queue(lambda: None)
        assert tickets.redeem()
        scope.__enter__()
        monkeypatch.setattr(SessionScope, "__del__", interrupted)

    monkeypatch.setattr(sys, "unraisablehook", lambda _args: None)
    sessions: SessionManager[Any] = SessionManager()
    threads.start(lose).join(SOON)
    gc.collect()
    monkeypatch.undo()
    with sessions.session_scope(KEY) as session:
        session.a = 1
    assert is_free(sessions)


# -- what a flush and an end say


class Slow(OwnStorage):
    """Each write takes until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def set(self, key: str, value: Any) -> None:
        self.begun.set()
        assert self.go_on.wait(SOON)
        super().set(key, value)


def test_a_flush_that_waits_for_an_end_which_is_cancelled_and_stores_all_has_not_failed(
    threads: Threads,
) -> None:
    storage = Slow()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    given: list[Any] = []

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            given.append(session)

    async def main() -> None:
        task = asyncio.create_task(handle())
        await until_async(storage.begun.is_set)
        scope: Any = given[0]._lifecycle()
        threads.start(given[0].flush)
        await until_async(lambda: bool(scope.queues))
        task.cancel()
        await asyncio.sleep(0)
        storage.go_on.set()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())
    threads.join()  # which raises what the flush has raised
    assert storage.values == {KEY: {"a": 1}}


def test_a_circle_is_noticed_though_what_touched_a_lazy_session_first_was_cancelled() -> None:
    async def hold() -> None:
        with contextlib.suppress(SessionDeadlockError):
            async with eager.session_scope(KEY):
                inside.set()
                await go_on.wait()
                async with eager.session_scope("user:2"):
                    pass
                return
        refused.append("the holder")

    async def main() -> None:
        holder = asyncio.create_task(hold(), context=contextvars.Context())
        await inside.wait()
        try:
            async with eager.session_scope("user:2"), lazy.session_scope(KEY) as session:

                async def touch() -> None:
                    await session

                first = asyncio.create_task(touch())
                await until_async(lambda: lazy.locks.waiters(KEY) == 1)
                first.cancel()
                await asyncio.wait([first])
                asyncio.get_running_loop().call_later(0.05, go_on.set)
                await session
        except SessionDeadlockError:
            refused.append("the one that touched it")
        await holder

    storage, refused = MemoryStorage(), list[str]()
    lazy: SessionManager[Any] = SessionManager(
        storage=storage, lazy=True, lock_timeout=SOON, on_wait=lambda _event: None
    )
    eager: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=SOON)
    inside, go_on = asyncio.Event(), asyncio.Event()
    asyncio.run(main())
    assert len(refused) == 1


def test_the_process_ends_though_what_was_left_open_waits_for_code_that_has_stopped(
    tmp_path: Path,
) -> None:
    """A task of a loop that has stopped is in the middle of a flush."""
    text = """
import asyncio, gc, threading
from session_sync import SessionManager
from session_sync.lifecycle import threads
threads._LAST_WAIT = 0.2
go_on = threading.Event()
class Store:
    blocking = True
    def get(self, key): return None
    def has(self, key): return False
    def delete(self, key): pass
    def set(self, key, value):
        begun.set(); go_on.wait()
begun = threading.Event()
sessions = SessionManager(storage=Store())
async def handle():
    async with sessions.session_scope("user:1") as session:
        session.a = 1
        helpers.append(asyncio.create_task(session.aflush()))
        await asyncio.Event().wait()
async def main():
    tasks.append(asyncio.create_task(handle()))
    while not begun.is_set(): await asyncio.sleep(0.01)
helpers, tasks = [], []
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
tasks.clear()
gc.collect()
print("end")
"""
    command = [sys.executable, "-W", "ignore", "-c", text]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "end\n"), ended.stderr
