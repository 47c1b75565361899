"""What a thread does, or what interrupts it, while another one stands in the middle of a step."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside
from stops import Stop, stopping
from stores import OwnStorage
from waiting import SOON, until, until_async

from session_sync import (
    MemoryStorage,
    SessionClosedError,
    SessionDeadlockError,
    SessionManager,
    SQLiteStorage,
)
from session_sync.lifecycle import ending, observers
from session_sync.lifecycle.entry import SessionScope
from session_sync.lifecycle.observers import ObservedScope
from session_sync.lifecycle.scope import Scope
from session_sync.lifecycle.threads import ThreadPool
from session_sync.lifecycle.update import tickets_for
from session_sync.locks import lock
from session_sync.locks.lock import LockHandle

KEY = "user:1"


class Interrupt(BaseException):
    """As Ctrl-C."""


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def begin_and_lose(handle: Callable[[], Any]) -> None:
    """A task that waits, and is known to nobody but the collector."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    loop.create_task(handle())  # noqa: RUF006 # it is thrown away
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


class Block:
    """A thread inside a session, in the context of another block if there is one."""

    def __init__(
        self, threads: Threads, sessions: SessionManager[Any], name: str, *stops: Stop
    ) -> None:
        self._sessions, self._name = sessions, name
        self._inside, self._leave = threading.Event(), threading.Event()
        self.session: Any = None
        self.failure: BaseException | None = None
        self.error: BaseException | None = None  # to fail with
        context = contextvars.copy_context()
        self._thread = threads.start(lambda: context.run(stopping(self._run, *stops)))

    def _run(self) -> None:
        try:
            with self._sessions.session_scope(KEY) as session:
                session[self._name] = 1
                self.context = contextvars.copy_context()
                self.session = session
                del session
                self._inside.set()
                assert self._leave.wait(SOON)
                if self.error is not None:
                    raise self.error
        except (Interrupt, LookupError) as error:
            self.failure = error

    def inside(self) -> Block:
        assert self._inside.wait(SOON)
        return self

    def leave(self) -> None:
        self._leave.set()

    def join(self) -> None:
        self.leave()
        self._thread.join(SOON)
        assert not self._thread.is_alive()


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
