"""What a thread does, or what interrupts it, while another one stands in the middle of a step."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside
from stops import Stop, stopping
from two_events_tools import KEY, Block, Interrupt, begin_and_lose, is_free
from waiting import SOON, until

from session_sync import MemoryStorage, SessionManager, SQLiteStorage
from session_sync.lifecycle import ending, observers
from session_sync.lifecycle.entry import SessionScope
from session_sync.lifecycle.observers import ObservedScope
from session_sync.lifecycle.scope import Scope
from session_sync.lifecycle.threads import ThreadPool
from session_sync.locks.lock import LockHandle


def leaves_while_another_comes_in(
    threads: Threads, sessions: SessionManager[Any], looks: Stop, *more: Stop
) -> tuple[Block, Block]:
    """Two blocks of one session: the first one has taken itself for the last, and stands at
    `looks`, with OPEN in hand; the second one has come in between."""
    takes = Stop(Scope._takes, "return")
    one = Block(threads, sessions, "a", takes, looks, *more).inside()
    one.leave()
    takes.wait()
    two = one.context.run(Block, threads, sessions, "b").inside()
    takes.go_on()
    looks.wait()
    return one, two


# -- what is given up while others use it


async def _left_half_way(sessions: SessionManager[Any], given: list[Any]) -> None:
    async def generate() -> AsyncIterator[None]:
        async with sessions.session_scope(KEY) as session:
            given.append(session)
            yield

    generator: Any = generate()
    async for _ in generator:
        break
    await generator.aclose()


def test_a_session_is_not_given_up_while_a_flush_is_about_to_write(threads: Threads) -> None:
    def flush() -> None:
        given[0].n = 1
        given[0].flush()

    sessions: SessionManager[Any] = SessionManager()
    given: list[Any] = []
    gives_up = Stop(Scope.abandon, "self._is_alone()")
    writes = Stop(Scope._write_in_memory, "self.put(record)")
    threads.start(stopping(lambda: asyncio.run(_left_half_way(sessions, given)), gives_up))
    gives_up.wait()
    helper = threads.start(stopping(flush, writes))
    until(lambda: writes.is_reached or not helper.is_alive())
    gives_up.go_on()

    def next_one() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = 2

    other = threads.start(next_one)
    until(lambda: sessions.locks.waiters(KEY) or not other.is_alive())
    writes.go_on()
    threads.join()
    until(lambda: is_free(sessions))
    assert sessions.storage.get(KEY)["b"] == 2


def test_a_session_that_is_given_up_is_not_ended_by_a_flush_as_well(threads: Threads) -> None:
    """Both would release one handle, the second one of them when the next handler has the key."""

    def flush() -> None:
        with contextlib.suppress(Exception):  # it says that nothing was saved
            given[0].flush()

    sessions: SessionManager[Any] = SessionManager()
    given: list[Any] = []
    releases = Stop(LockHandle.release, "key, table =", when=lambda v: v["self"].key == KEY)
    threads.start(stopping(lambda: asyncio.run(_left_half_way(sessions, given)), releases))
    releases.wait()
    helper = threads.start(flush)
    scope: Any = given[0]._lifecycle()
    until(lambda: scope.queues or not helper.is_alive())
    assert helper.is_alive()  # it waits until that is done
    releases.go_on()
    with sessions.session_scope(KEY) as session:
        threads.join()
        assert sessions.locks.is_locked(KEY)
        session.a = 1
    assert is_free(sessions)


@pytest.mark.usefixtures("collector")
def test_a_key_that_a_collected_task_releases_is_taken_out_once(threads: Threads) -> None:
    """The task is closed by the collector, when the weak references to its scope are dead: to
    others, the key has no owner."""

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await asyncio.Event().wait()

    sessions: SessionManager[Any] = SessionManager()
    handles: list[LockHandle] = []
    begin_and_lose(handle)
    releases = Stop(LockHandle.release, "key, table =", when=lambda v: v["self"].key == KEY)
    threads.start(stopping(gc.collect, releases))
    releases.wait()
    handles.append(sessions.scopes.options.backend.locks.held[KEY])
    assert handles[0].is_orphaned
    assert handles[0].by_note
    handles.clear()
    releases.go_on()
    threads.join()
    assert is_free(sessions)


@pytest.mark.usefixtures("collector")
def test_a_task_that_goes_on_while_it_is_collected_writes_nothing(threads: Threads) -> None:
    cleaning, go_on = threading.Event(), threading.Event()

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            try:
                await asyncio.Event().wait()
            except GeneratorExit:
                cleaning.set()
                assert go_on.wait(SOON)
                session.stopped = True

    sessions: SessionManager[Any] = SessionManager()
    begin_and_lose(handle)
    threads.start(gc.collect)
    assert cleaning.wait(SOON)
    with sessions.session_scope(KEY) as session:  # the watch finds that it has no owner
        session.b = 2
    go_on.set()
    threads.join()
    assert sessions.storage.get(KEY) == {"b": 2}
    assert is_free(sessions)


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_generator_that_is_collected_calls_nobody_in_the_collector_s_thread(
    threads: Threads, tmp_path: Path, is_shared: bool
) -> None:
    mutex = threading.Lock()  # of a library for metrics, say

    def observe(_event: object) -> None:
        with mutex:
            pass

    def rows() -> Generator[Any, Any, None]:
        me = yield
        with sessions.session_scope(KEY) as session:
            session.a = 1
            yield me  # a cycle

    def begin() -> None:
        generator = rows()
        next(generator)
        generator.send(generator)

    def collect() -> None:
        with mutex:
            gc.collect()

    storage = SQLiteStorage(tmp_path / "s.db") if is_shared else MemoryStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage, on_close=observe)
    contextvars.Context().run(begin)
    threads.start(collect)
    threads.join(SOON)
    until(lambda: is_free(sessions))
    assert storage.get(KEY) is None


@pytest.mark.usefixtures("collector")
def test_a_session_that_is_lost_while_it_is_flushed_is_freed_though_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[Any] = []
    given: list[Any] = []

    class Storage(MemoryStorage):
        def save(self, key: str, record: Any) -> None:
            if lost:
                lost.clear()
                gc.collect()
            super().save(key, record)

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            given.append(session)
            await asyncio.Event().wait()

    def fail(*_args: Any) -> None:
        raise RuntimeError("can't start new thread")

    sessions: SessionManager[Any] = SessionManager(storage=Storage())
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    lost += [loop, loop.create_task(handle())]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del loop
    monkeypatch.setattr(_thread, "start_new_thread", fail)
    monkeypatch.setattr(ending, "errands", ThreadPool("test", 1, insists=False))
    given[0].flush()
    given.clear()
    gc.collect()
    assert is_free(sessions)


# -- those who leave, and those who come in


def test_two_interrupts_of_two_members_lose_nothing(threads: Threads) -> None:
    """The first one tells a thread to end the session; the second one has that in hand."""
    sessions: SessionManager[Any] = SessionManager()
    writes = Stop(Scope._write_in_memory, "self.put(record)", error=Interrupt())
    ends = Stop(SessionScope.__exit__, "if self._turn is not None", error=Interrupt())
    one = Block(threads, sessions, "a", writes).inside()
    two = one.context.run(Block, threads, sessions, "b", ends).inside()
    two.leave()
    ends.wait()
    one.leave()
    writes.wait()
    ends.go_on()
    two.join()
    writes.go_on()
    one.join()
    until(lambda: is_free(sessions))
    assert one.failure
    assert two.failure
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1}


def test_the_last_one_ends_the_session_though_the_one_before_it_was_interrupted_as_it_left(
    threads: Threads,
) -> None:
    sessions: SessionManager[Any] = SessionManager()
    looks = Stop(Scope.leave, "if not members", error=Interrupt())
    one, two = leaves_while_another_comes_in(threads, sessions, looks)
    looks.go_on()
    one.join()
    two.join()
    until(lambda: is_free(sessions))
    assert one.failure  # which is kept, and with it the block
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1}


def test_a_release_that_comes_while_another_one_leaves_ends_the_session(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager()
    looks = Stop(Scope.leave, "if not members")
    one, two = leaves_while_another_comes_in(threads, sessions, looks)
    two.session.release()
    looks.go_on()
    one.join()
    assert is_free(sessions)
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1}
    two.join()


def test_a_release_that_was_interrupted_before_it_ended_anything_ends_nothing_later(
    threads: Threads,
) -> None:
    def release() -> None:
        with pytest.raises(Interrupt):
            one.session.release()

    sessions: SessionManager[Any] = SessionManager()
    takes, looks = Stop(Scope._takes, "return"), Stop(Scope.leave, "if not members")
    one = Block(threads, sessions, "a", takes, looks).inside()
    ends = Stop(Scope.end, "if not self._takes", error=Interrupt())
    helper = threads.start(stopping(release, ends))
    ends.wait()
    ends.go_on()
    helper.join(SOON)
    one.leave()
    takes.wait()
    two = one.context.run(Block, threads, sessions, "b").inside()
    takes.go_on()
    looks.wait()
    looks.go_on()
    one.join()
    two.session.later = 1  # it is as open as before
    two.join()
    threads.join()
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1, "later": 1}


# -- whoever leaves holds nothing any more, and whoever is inside joins


def test_one_that_has_left_while_another_came_in_does_not_hold_it(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager()
    takes = Stop(Scope._takes, "return")
    again: list[object] = []

    def leave_and_come_again() -> None:
        with sessions.session_scope(KEY) as session:
            session.a = 1
            context.append(contextvars.copy_context())
            inside.set()
            assert leave.wait(SOON)
        with sessions.session_scope(KEY) as session:
            again.append(dict(session))

    context: list[contextvars.Context] = []
    inside, leave = threading.Event(), threading.Event()
    threads.start(stopping(leave_and_come_again, takes))
    assert inside.wait(SOON)
    leave.set()
    takes.wait()
    two = context[0].run(Block, threads, sessions, "b").inside()
    takes.go_on()
    until(lambda: sessions.locks.waiters(KEY) == 1)
    two.join()
    threads.join()
    assert again == [{"a": 1, "b": 1}]


def test_a_block_inside_another_one_joins_it_while_a_third_one_leaves(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager()
    looks = Stop(Scope.leave, "if not members")
    one, two = leaves_while_another_comes_in(threads, sessions, looks)
    nested = two.context.run(Block, threads, sessions, "c").inside()
    looks.go_on()
    for block in (nested, one, two):
        block.join()
    assert is_free(sessions)
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    "place", [(Scope._ended, "self.closed = True"), (Scope.end, "self.callers[:] = [caller]")]
)
def test_a_block_waits_for_a_helper_that_is_just_about_to_end_the_session(
    threads: Threads, place: tuple[Callable[..., Any], str]
) -> None:
    sessions: SessionManager[Any] = SessionManager()
    with sessions.session_scope(KEY) as session:
        session.a = 1
        stop = Stop(*place)
        threads.start(stopping(session.release, stop))
        stop.wait()

        def let_go() -> None:
            until(lambda: sessions.locks.waiters(KEY))
            stop.go_on()

        threads.start(let_go)
        with sessions.session_scope(KEY) as again:
            assert again == {"a": 1}
    threads.join()
    assert is_free(sessions)


def test_one_that_is_interrupted_as_it_ends_the_session_for_another_one_loses_nothing(
    threads: Threads,
) -> None:
    sessions: SessionManager[Any] = SessionManager()
    looks = Stop(Scope.leave, "if not members")
    closes = Stop(SessionScope.__exit__, "if self.is_thrown_away", error=Interrupt())
    one, two = leaves_while_another_comes_in(threads, sessions, looks, closes)
    two.session.release()
    looks.go_on()
    closes.wait()
    closes.go_on()
    one.join()
    until(lambda: is_free(sessions))
    assert sessions.storage.get(KEY) == {"a": 1, "b": 1}
    two.join()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_scope_with_observers_that_was_never_made_raises_nothing_in_its_finaliser() -> None:
    sessions: SessionManager[Any] = SessionManager(on_open=lambda _event: None)
    for interruption in everywhere(raise_outside, observers):
        with contextlib.suppress(OutsideError), interruption:
            assert isinstance(sessions.session_scope(KEY), ObservedScope)
        gc.collect()
