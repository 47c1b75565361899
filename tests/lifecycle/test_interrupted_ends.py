"""Ends of scopes that others come into: an interrupt, a joiner, a flush, another end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads, message
from interruptions import OutsideError, every_line, everywhere, raise_outside, raises_in_flows
from stores import OwnStorage
from waiting import SOON, until, until_async

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionClosedError,
    SessionDeadlockError,
    SessionLockTimeoutError,
    SessionManager,
    storage_from_url,
)
from session_sync.lifecycle import entry, flow, scope, transaction, update
from session_sync.lifecycle import threads as pools
from session_sync.lifecycle.members import Guard
from session_sync.lifecycle.update import UpdateScope
from session_sync.locks import lock
from session_sync.session.changes import ChangeTracker
from session_sync.storages.locked_record import LockedRecord

KEY = "user:1"

# Python only prints what interrupts a finaliser, and an interrupt may leave a coroutine unawaited.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <(function .*__del__|coroutine):"
    "pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0


def raised_by_opening(sessions: SessionManager[Any]) -> list[type[Exception]]:
    """What a signal handler gets that wants the session, too."""
    try:
        with sessions.session_scope(KEY):
            return []
    except Exception as error:
        return [type(error)]


@types.coroutine
def anything() -> Iterator[None]:
    """What a coroutine waits for."""
    yield


def raise_in_task() -> None:
    """Else asyncio itself loses it, and with it whatever its callback was about to do."""
    if asyncio.current_task() is not None:
        raise OutsideError


@raises_in_flows
def test_a_flush_that_was_interrupted_writes_nothing_later() -> None:
    """Not over what the next handler has stored."""

    class Slow(OwnStorage):
        def __init__(self) -> None:
            super().__init__()
            self.go_on, self.writing = threading.Event(), 0

        def set(self, key: str, value: Any) -> None:
            self.writing += 1
            if "b" not in value:
                self.go_on.wait(0.01)  # whoever interrupts a flush has to wait for this
            super().set(key, value)
            self.writing -= 1

    async def handle(interruption: contextlib.AbstractContextManager[Any]) -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            with interruption:
                await session.aflush()

    for interruption in everywhere(raise_in_task, pools, flow):
        storage = Slow()
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        pools.closers.seconds = 0.0  # so that it waits for a moment in place
        with contextlib.suppress(OutsideError):
            asyncio.run(handle(interruption))
        with sessions.session_scope(KEY) as session:
            session.b = 2
        storage.go_on.set()
        until(lambda storage=storage: not storage.writing)
        assert storage.values[KEY].get("b") == 2


def test_a_flush_that_waits_for_an_end_that_fails_says_that_nothing_was_saved(
    threads: Threads,
) -> None:
    class Failing(OwnStorage):
        def set(self, key: str, value: Any) -> None:
            begun.set()
            assert go_on.wait(SOON)
            raise OSError("the disk is full")

    def flush() -> None:
        assert begun.wait(SOON)
        with pytest.raises(SessionClosedError, match=r"closed before flush\(\).*OSError"):
            session.flush()

    def let_go() -> None:
        assert begun.wait(SOON)
        until(lambda: session._lifecycle().queues)  # it waits for the end
        go_on.set()

    begun, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Failing())
    with pytest.raises(OSError, match="full"), sessions.session_scope(KEY) as session:
        session.a = 1
        threads.start(flush)
        threads.start(let_go)
    threads.join()


def test_the_last_one_that_leaves_closes_it_though_one_joins_just_then(threads: Threads) -> None:
    """Whatever place of the one's leaving the other one comes at: not only when both are
    collected."""
    kept: list[Any] = []
    inside, go_on = threading.Event(), threading.Event()
    context = contextvars.Context()

    def join() -> None:
        kept.append(sessions.session_scope(KEY))
        with kept[-1] as session:
            inside.set()
            assert go_on.wait(SOON)
            session.b = 1

    def let_one_join() -> None:
        threads.start(lambda: context.run(join))
        until(lambda: inside.is_set() or sessions.locks.waiters(KEY) or lock._Section.busy)

    for interruption in every_line(let_one_join, scope, entry):
        sessions: SessionManager[Any] = SessionManager()
        inside.clear()
        go_on.clear()
        kept.append(sessions.session_scope(KEY))
        kept[-1].__enter__().a = 1
        context = contextvars.copy_context()
        with interruption:
            kept[-1].__exit__(None, None, None)
        go_on.set()
        threads.join()
        expected = {"a": 1, "b": 1} if interruption.happened else {"a": 1}
        assert sessions.storage.get(KEY) == expected
        assert is_free(sessions)


@raises_in_flows
def test_a_flush_that_waits_for_an_end_never_waits_for_ever(threads: Threads) -> None:
    """Though that fails, and is interrupted as it does."""

    class Failing(OwnStorage):
        def set(self, key: str, value: Any) -> None:
            begun.set()
            until(lambda: session._lifecycle().queues or flush is None)
            raise OSError("the disk is full")

    def flush_meanwhile() -> None:
        assert begun.wait(SOON)
        with contextlib.suppress(SessionClosedError, OSError):
            session.flush()

    for interruption in everywhere(raise_outside, scope):
        begun = threading.Event()
        sessions: SessionManager[Any] = SessionManager(storage=Failing())
        block = sessions.session_scope(KEY)
        session = block.__enter__()
        session.a = 1
        flush: threading.Thread | None = threads.start(flush_meanwhile)
        with interruption, contextlib.suppress(OutsideError, OSError):
            block.__exit__(None, None, None)
        begun.set()
        flush = None
        threads.join()
        until(lambda sessions=sessions: is_free(sessions))


@pytest.mark.parametrize("error", [None, LookupError()])
@raises_in_flows
def test_what_others_have_changed_is_stored_though_the_last_one_is_interrupted(
    threads: Threads, error: LookupError | None
) -> None:
    """The handler has ended without an error; a thread of its, which joined it, has not. (If that
    has failed, all is dropped that was not flushed, as without the interrupt; only one that comes
    before the first line of `__exit__` keeps that from being known.)"""

    def join(interruption: contextlib.AbstractContextManager[Any]) -> None:
        joined = sessions.session_scope(KEY)
        joined.__enter__().b = 2
        inside.set()
        assert go_on.wait(SOON)
        with contextlib.suppress(OutsideError), interruption:
            joined.__exit__(None if error is None else LookupError, error, None)

    inside, go_on = threading.Event(), threading.Event()
    for storage_type in (OwnStorage, LruMemoryStorage):
        for number, interruption in enumerate(everywhere(raise_outside, scope, entry)):
            sessions: SessionManager[Any] = SessionManager(storage=storage_type())
            inside.clear()
            go_on.clear()
            with sessions.session_scope(KEY) as session:
                context = contextvars.copy_context()
                threads.start(lambda c=context, i=interruption: c.run(join, i))
                assert inside.wait(SOON)
                session.a = 1
            del session
            go_on.set()
            threads.join()
            until(lambda sessions=sessions: is_free(sessions))
            is_saved = error is None or number == 0
            assert sessions.storage.get(KEY) == ({"a": 1, "b": 2} if is_saved else None)


@pytest.mark.parametrize("in_task", [False, True])
@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
@raises_in_flows
def test_a_release_that_is_interrupted_loses_nothing(
    threads: Threads, storage_type: Callable[[], Any], in_task: bool
) -> None:
    """It is another thread's, and the handler has changed something."""

    async def arelease(session: Any) -> None:
        await session.arelease()

    def release(session: Any, interruption: contextlib.AbstractContextManager[Any]) -> None:
        with contextlib.suppress(OutsideError), interruption:
            if in_task:
                asyncio.run(arelease(session))
            else:
                session.release()

    for interruption in everywhere(raise_outside, scope, entry):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type())
        with sessions.session_scope(KEY) as session:
            session.a = 1
            threads.start(lambda s=session, i=interruption: release(s, i))
            threads.join()
        until(lambda sessions=sessions: is_free(sessions))
        assert sessions.storage.get(KEY) == {"a": 1}


@pytest.mark.parametrize("url", ["", "memory://", "sqlite:///{}/a.db", "disk:///{}/a", "redis"])
def test_what_a_handler_left_to_one_that_is_lost_is_stored(
    request: pytest.FixtureRequest, threads: Threads, tmp_path: Path, url: str
) -> None:
    """The collector finalises the scope together with all that only the scope has: its record, and
    the lock of that between processes."""

    def join() -> None:
        joined: Any = sessions.session_scope(KEY)
        joined.__enter__()
        cycle = [joined]
        cycle.append(cycle)  # type: ignore[arg-type]

    url = request.getfixturevalue("redis_url") if url == "redis" else url.format(tmp_path)
    storage: Any = storage_from_url(url) if url else OwnStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        session.a = 1
        threads.start(contextvars.copy_context().run, join)
        threads.join()
    del session
    gc.collect()
    until(lambda: is_free(sessions))
    assert sessions.storage.get(KEY) == {"a": 1}
    with sessions:
        pass


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
def test_a_scope_that_is_lost_is_given_up_though_its_finaliser_is_interrupted(
    tmp_path: Path, url: str
) -> None:
    """No caller of this process waits for the key; another process may."""
    storage = storage_from_url(url.format(tmp_path))
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    first = True
    for interruption in everywhere(raise_outside, scope):
        kept = [sessions.session_scope(KEY)]
        contextvars.Context().run(lambda kept=kept: kept[0].__enter__() and None)
        with interruption:
            kept.clear()
        if first:  # before the finaliser has begun: then it is left to whoever waits for the key
            first = False
            with sessions.session_scope(KEY):
                pass
        until(lambda: is_free(sessions))
    sessions.close()


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
@pytest.mark.parametrize("next_one", ["succeeds", "fails", "releases"])
@pytest.mark.parametrize("is_in_cycle", [False, True])
@pytest.mark.parametrize("owes", [False, True])
def test_what_is_lost_elsewhere_is_waited_for_by_the_thread_that_opened_it(
    threads: Threads, tmp_path: Path, url: str, next_one: str, is_in_cycle: bool, owes: bool
) -> None:
    """An interrupt came before the block was left, and what kept it alive was another thread's.
    The next block of this thread may still find it open, and then ends it."""

    def lose() -> None:
        kept.append(sessions.session_scope(KEY))
        kept[0].__enter__().lost = 1
        if owes:
            with sessions.session_scope(KEY) as session:
                session.owed = 1
        if is_in_cycle:
            kept.append(kept)
        opened.set()
        assert go_on.wait(SOON)
        with contextlib.suppress(LookupError), sessions.session_scope(KEY) as session:
            session.a = 1
            if next_one == "releases":
                session.release()
            if next_one == "fails":
                raise LookupError

    def go_on_elsewhere() -> None:
        go_on.set()
        until(lambda: sessions.locks.waiters(KEY) or lock._Section.busy or not loser.is_alive())

    sessions: SessionManager[Any] = SessionManager(storage=storage_from_url(url.format(tmp_path)))
    for interruption in everywhere(go_on_elsewhere, entry, scope, pools):
        sessions.storage.delete(KEY)
        kept: list[Any] = []
        opened, go_on = threading.Event(), threading.Event()
        loser = threads.start(lose)
        assert opened.wait(SOON)
        with interruption:
            if is_in_cycle:
                kept = []
                gc.collect()
            else:
                kept.clear()
        go_on.set()
        threads.join()
        until(lambda: is_free(sessions))
        stored = sessions.storage.get(KEY) or {}
        assert stored.get("a") == (None if next_one == "fails" else 1)
        if owes and next_one != "fails":  # which may undo all that is not stored yet
            assert stored.get("owed") == 1
    sessions.close()


def test_a_lost_session_is_given_up_though_it_was_interrupted_as_it_was_loaded() -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    for interruption in everywhere(raise_outside, scope):
        kept: list[Any] = [sessions.session_scope(KEY)]
        kept.append(contextvars.Context().run(kept[0].__enter__))
        with contextlib.suppress(OutsideError), interruption:
            kept[1].get("a")
        kept.clear()
        assert is_free(sessions)


class ThrownAway:
    """A coroutine that opens a session and will never go on: it stands inside of that, where it
    waits for the key, or for the store."""

    def __init__(self, storage: Any, stands: str) -> None:
        self.sessions: SessionManager[Any] = SessionManager(storage=storage)
        self._stands, self._inside = stands, False
        self._around = self.sessions.session_scope(KEY)
        if stands == "at the key":
            contextvars.Context().run(self._around.__enter__)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        task = loop.create_task(self._handle())
        loop.run_until_complete(until_async(self._stands_there))
        self._coroutine: Any = task.get_coro()
        loop.close()

    async def _handle(self) -> None:
        async with self.sessions.session_scope(KEY) as session:
            session.a = 1
            self._inside = True
            await asyncio.Event().wait()

    def _stands_there(self) -> bool:
        if self._stands == "inside":
            return self._inside
        locks = self.sessions.locks
        return bool(locks.waiters(KEY) if self._stands == "at the key" else locks.is_locked(KEY))

    def close(self) -> None:
        try:
            self._coroutine.close()
        except OutsideError:
            pass
        except RuntimeError as error:
            if not isinstance(error.__context__, OutsideError):
                raise

    def end(self) -> None:
        del self._coroutine
        if self._stands == "at the key":
            self._around.__exit__(None, None, None)


@pytest.mark.parametrize("storage_type", [OwnStorage, MemoryStorage])
@pytest.mark.parametrize("stands", ["inside", "at the key", "in the store"])
def test_a_coroutine_that_is_thrown_away_is_given_up_wherever_that_is_interrupted(
    storage_type: Callable[[], Any], stands: str
) -> None:
    """What cleans up after the interrupt may want to await something, and asyncio says that it
    cannot; then the finaliser of the scope does it."""

    class Slow(OwnStorage):
        def get(self, key: str) -> Any:
            if stands == "in the store":
                assert go_on.wait(SOON)
            return super().get(key)

    def interrupt() -> None:
        go_on.set()
        raise OutsideError

    for interruption in everywhere(interrupt, entry, scope, flow, pools):
        go_on = threading.Event()
        storage = Slow() if storage_type is OwnStorage else storage_type()
        thrown_away = ThrownAway(storage, stands)
        with interruption:
            thrown_away.close()
        go_on.set()
        thrown_away.end()
        until(lambda thrown_away=thrown_away: is_free(thrown_away.sessions))
        assert storage.get(KEY) is None
        until(lambda: not busy_errands())


def busy_errands() -> list[str]:
    """Where the threads are that close what others have left."""
    stacks = (traceback.extract_stack(frame) for frame in sys._current_frames().values())
    return [f"{stack[-1]}" for stack in stacks if any(at.name == "_end_unasked" for at in stack)]


def test_what_collects_a_lost_scope_never_waits_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread whose collection gives a key up, and that wants this key next: its record is just
    being closed elsewhere, which is worth waiting for."""
    url = f"sqlite:///{tmp_path}/a.db"
    sessions: SessionManager[Any] = SessionManager(storage=storage_from_url(url))
    close, here = LockedRecord.close, threading.current_thread()
    waits = False

    def close_late(record: Any, *args: Any) -> None:
        if threading.current_thread() is not here:
            until(lambda: not waits or sessions.locks.waiters(KEY))
        close(record, *args)

    monkeypatch.setattr(LockedRecord, "close", close_late)
    for interruption in everywhere(raise_outside, scope, pools):
        kept = [sessions.session_scope(KEY)]
        contextvars.Context().run(lambda kept=kept: kept[0].__enter__() and None)
        waits = True
        with interruption:
            kept.clear()
        with sessions.session_scope(KEY):
            waits = False
        until(lambda: is_free(sessions))
    sessions.close()


def test_a_record_whose_close_was_interrupted_is_let_go_though_its_lock_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a telebot's job, say, or by the traceback of that interrupt."""
    url = f"sqlite:///{tmp_path}/a.db"
    sessions: SessionManager[Any] = SessionManager(storage=storage_from_url(url))
    block = sessions.session_scope(KEY)
    block.__enter__()
    kept = block.handle
    with monkeypatch.context() as patch:
        patch.setattr(LockedRecord, "close", lambda *_: raise_outside())
        with pytest.raises(OutsideError):
            block.__exit__(OutsideError, OutsideError(), None)
        until(lambda: is_free(sessions))
    del block
    assert kept is not None
    other: Any = storage_from_url(url)
    other.open_record(KEY, 0).close(None)
    other.close()
    sessions.close()


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
def test_what_a_handler_left_to_one_that_is_lost_is_stored_before_the_next_one_comes_in(
    threads: Threads, tmp_path: Path, url: str
) -> None:
    """Who comes just as the collector has found it."""

    def join() -> None:
        joined: Any = sessions.session_scope(KEY)
        joined.__enter__()
        cycle = [joined]
        cycle.append(cycle)  # type: ignore[arg-type]

    def work() -> None:
        with sessions.session_scope(KEY) as session:
            session.b = session.a + 1

    def come_in() -> None:
        thread = threads.start(work)
        until(lambda: sessions.locks.waiters(KEY) or lock._Section.busy or not thread.is_alive())

    storage = storage_from_url(url.format(tmp_path))
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    for interruption in everywhere(come_in, entry, scope, lock):
        storage.delete(KEY)
        with sessions.session_scope(KEY) as session:
            session.a = 1
            contextvars.copy_context().run(join)
        del session
        with interruption:
            gc.collect()
        threads.join()
        until(lambda: is_free(sessions))
        if interruption.happened:
            assert storage.get(KEY) == {"a": 1, "b": 2}
    sessions.close()


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_what_others_have_changed_is_stored_though_the_last_one_waits_in_a_lost_loop(
    threads: Threads, storage_type: Callable[[], Any]
) -> None:
    """It has joined, and waits for its turn: nothing of its own is there to be dropped."""

    def join() -> None:
        with sessions.session_scope(KEY) as session:
            inside.set()
            assert go_on.wait(SOON)
            session.b = 2

    async def wait() -> None:
        async with sessions.session_scope(KEY):
            raise AssertionError("it is not its turn")

    def handle() -> tuple[Any, Any]:
        loop = asyncio.new_event_loop()
        with sessions.session_scope(KEY) as session:
            session.a = 1
            context = contextvars.copy_context()
            threads.start(lambda: context.run(join))
            assert inside.wait(SOON)
            waiting = loop.create_task(wait())
            loop.run_until_complete(until_async(lambda: session._lifecycle().queues))
        return loop, waiting

    inside, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    kept: Any = handle()
    go_on.set()
    threads.join()
    assert sessions.storage.get(KEY) is None
    del kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    until(lambda: is_free(sessions))
    assert sessions.storage.get(KEY) == {"a": 1, "b": 2}


@raises_in_flows
def test_whoever_was_interrupted_as_it_left_is_not_taken_for_a_holder_any_more() -> None:
    """Else there would be deadlocks that are none."""
    for interruption in everywhere(raise_outside, scope, entry):
        sessions: SessionManager[Any] = SessionManager()
        with sessions.session_scope(KEY):
            joined = sessions.session_scope(KEY)
            joined.__enter__()
            with contextlib.suppress(OutsideError), interruption:
                joined.__exit__(None, None, None)
            del joined
            holder = sessions.locks.holder(KEY)
            assert holder is not None
            assert holder.name == f"thread {threading.current_thread().name!r}"


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_what_can_never_be_saved_is_not_tried_for_ever(
    storage_type: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks like an interrupt, but the thread that closes the session instead meets it, too."""

    def fail(_fields: object) -> None:
        raise ZeroDivisionError

    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    monkeypatch.setattr(ChangeTracker, "take_changes", fail)
    with pytest.raises(ZeroDivisionError), sessions.session_scope(KEY) as session:
        session.a = 1
    until(lambda: is_free(sessions))


def test_a_loop_that_was_thrown_away_is_collected_though_a_thread_is_on_its_way() -> None:
    """Else the task in it would keep its key for as long as the store takes."""

    class Slow(OwnStorage):
        def set(self, key: str, value: Any) -> None:
            begun.set()
            assert go_on.wait(SOON)

    async def handle() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await session.aflush()

    begun, go_on = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Slow())
    loop = asyncio.new_event_loop()
    task = loop.create_task(handle())
    loop.run_until_complete(until_async(begun.is_set))
    loop.run_until_complete(asyncio.sleep(0))  # it waits by now
    known = weakref.ref(task)
    del task, loop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    try:
        assert known() is None
    finally:
        go_on.set()
    until(lambda: is_free(sessions))


@pytest.mark.parametrize("lock", ["write", "load"])
def test_a_scope_that_is_lost_with_a_lock_of_its_own_is_collected(lock: str) -> None:
    """The table of the keys must not know it by way of that lock."""

    def enter() -> None:
        scope: Any = sessions.session_scope(KEY)
        scope.__enter__().get("a")
        guard = Guard(scope, lock)
        assert guard.handle.try_acquire()
        scope.members[guard] = None  # a cycle: both are lost at once
        del guard

    sessions: SessionManager[Any] = SessionManager(lazy=True)
    contextvars.Context().run(enter)
    gc.collect()
    until(lambda: is_free(sessions))


def test_a_thread_that_has_made_its_call_keeps_no_scope_alive() -> None:
    """Else the key of a scope that was never left stayed locked until that thread got on."""

    class Hurried(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *args: Any, **options: Any) -> Any:
            handle = super().call_soon_threadsafe(*args, **options)
            assert go_on.wait(SOON)  # whoever called this is overtaken
            return handle

    class Slow(OwnStorage):
        def get(self, key: str) -> Any:
            assert suspended.wait(SOON)
            return super().get(key)

    async def enter() -> None:
        asyncio.get_running_loop().call_soon(suspended.set)
        await sessions.session_scope(KEY).__aenter__()

    go_on, suspended = threading.Event(), threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=Slow(), lock_timeout=SOON)
    loop = Hurried()
    try:
        loop.run_until_complete(enter())
        gc.collect()
        with sessions.session_scope(KEY) as session:
            session.a = 1
    finally:
        go_on.set()
        loop.close()
    assert sessions.storage.get(KEY) == {"a": 1}


def test_a_key_that_a_finaliser_gives_up_belongs_to_nobody_until_the_store_has_closed_it() -> None:
    """The threads that close are all busy, and the scope itself is gone."""

    def enter() -> None:
        scope: Any = sessions.session_scope(KEY)
        scope.__enter__().cycle = [lambda: scope]  # so that all weak references die first

    gate = threading.Event()
    sessions: SessionManager[Any] = SessionManager(storage=LruMemoryStorage(), lock_timeout=0.05)
    try:
        for _ in range(16):
            pools.errands.run_soon(lambda: gate.wait(SOON) and None)
        contextvars.Context().run(enter)
        gc.collect()
        with pytest.raises(SessionLockTimeoutError), sessions.session_scope(KEY):
            pass
    finally:
        gate.set()
    until(lambda: is_free(sessions))


def test_a_key_that_one_caller_finds_lost_while_the_collector_gives_it_up_has_one_owner(
    threads: Threads,
) -> None:
    """The caller takes the key from the scope that is being collected; to give it up then is not to
    take it from the caller."""

    def enter() -> None:
        scope: Any = sessions.session_scope(KEY)
        scope.__enter__().cycle = [lambda: scope]  # so that all weak references die first

    def work() -> None:
        with sessions.session_scope(KEY):
            inside.set()
            assert leave.wait(SOON)

    def come_in() -> None:
        threads.start(work)
        until(lambda: inside.is_set() or sessions.locks.waiters(KEY) or lock._Section.busy)

    for interruption in everywhere(come_in, lock):
        sessions: SessionManager[Any] = SessionManager()
        inside, leave = threading.Event(), threading.Event()
        contextvars.Context().run(enter)
        with interruption:
            gc.collect()
        if interruption.happened:
            assert inside.wait(SOON)
            assert sessions.locks.is_locked(KEY)
        leave.set()
        threads.join()
        until(lambda sessions=sessions: is_free(sessions))


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_a_block_does_not_join_one_that_was_never_left(storage_type: Callable[[], Any]) -> None:
    """As after an interrupt that came before the first line of `__exit__`. What gives that scope up
    keeps it alive for a moment."""

    def handle() -> None:
        sessions.session_scope(KEY).__enter__().a = 1
        with sessions.session_scope(KEY) as session:
            session.b = 2

    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    contextvars.copy_context().run(handle)
    assert sessions.storage.get(KEY) == {"b": 2}


@pytest.mark.parametrize("storage_type", [MemoryStorage, OwnStorage, LruMemoryStorage])
@raises_in_flows
def test_a_block_is_stored_wherever_the_one_before_it_was_interrupted(
    storage_type: Callable[[], Any],
) -> None:
    """Also where that came before the first line of `__exit__`, and the same function still has the
    session, as in a loop: it must not join what was never left."""
    for interruption in everywhere(raise_outside, scope, entry):
        sessions: SessionManager[Any] = SessionManager(storage=storage_type())
        with contextlib.suppress(OutsideError), interruption:
            with sessions.session_scope(KEY) as session:
                session.a = 1
        with sessions.session_scope(KEY) as session:
            session.b = 2
        assert sessions.storage.get(KEY)["b"] == 2
        assert session.b == 2


def test_a_flush_after_a_block_that_was_never_left_says_that_nothing_was_saved() -> None:
    sessions: SessionManager[Any] = SessionManager()
    never_left = sessions.session_scope(KEY)
    session = contextvars.Context().run(never_left.__enter__)
    session.a = 1
    del never_left
    until(lambda: is_free(sessions))
    with pytest.raises(SessionClosedError, match="not saved"):
        session.flush()


@pytest.mark.parametrize("storage_type", [OwnStorage, LruMemoryStorage])
def test_a_scope_that_is_closed_a_second_time_writes_nothing(
    storage_type: Callable[[], Any],
) -> None:
    """Two may come to close it, if one of them was interrupted before it knew better."""
    sessions: SessionManager[Any] = SessionManager(storage=storage_type())
    some = sessions.session_scope(KEY)
    with some as session:
        session.a = 1
    with sessions.session_scope(KEY) as later:
        later.b = 2
    assert some.tracker is not None
    some.tracker.loaded["late"] = 3  # a thread was just about to change it
    flow.run_flow(some.closing(may_block=True))
    assert sessions.storage.get(KEY) == {"a": 1, "b": 2}


def test_a_wait_that_fails_leaves_nothing_to_the_collector(threads: Threads) -> None:
    """Whatever the functions have that it is raised through would stay for as long as that takes:
    the scope of an interrupted block, say."""

    class Kept:
        """Something that a handler has."""

    def handle() -> None:
        kept = Kept()
        with contextlib.suppress(SessionLockTimeoutError), sessions.session_scope(KEY):
            pass
        seen.append(weakref.ref(kept))

    seen: list[weakref.ref[Kept]] = []
    sessions: SessionManager[Any] = SessionManager(lock_timeout=0)
    gc.disable()
    try:
        with sessions.session_scope(KEY):
            threads.start(contextvars.Context().run, handle)
            threads.join()
        assert seen[0]() is None
    finally:
        gc.enable()


@raises_in_flows
def test_several_sessions_are_left_wherever_that_is_interrupted() -> None:
    """Each of them, though something still has them: the next block must find none open around it.
    The first place is before the first line of `__exit__`: nothing can know of that."""
    for number, interruption in enumerate(everywhere(raise_outside, transaction, entry)):
        sessions: SessionManager[Any] = SessionManager()
        scopes = sessions.session_scopes("user:1", "user:2")
        for session in scopes.__enter__():
            session.a = 1
        with contextlib.suppress(OutsideError), interruption:
            scopes.__exit__(None, None, None)
        if number > 0:
            with sessions.session_scope("user:1") as session:
                session.b = 2
        del scopes, session
        until(lambda sessions=sessions: is_free(sessions))
        one, two = (sessions.storage.get(key) or {} for key in ("user:1", "user:2"))
        assert one.pop("b", None) == (2 if number > 0 else None)
        assert one == two


@raises_in_flows
def test_a_task_leaves_several_sessions_wherever_that_is_interrupted() -> None:
    async def handle(scopes: Any, interruption: Any, is_left: bool) -> None:
        for session in await scopes.__aenter__():
            session.a = 1
        with contextlib.suppress(OutsideError), interruption:
            await scopes.__aexit__(None, None, None)
        if is_left:
            async with sessions.session_scope("user:1") as session:
                session.b = 2

    for number, interruption in enumerate(everywhere(raise_outside, transaction, entry)):
        sessions: SessionManager[Any] = SessionManager()
        scopes: list[Any] = [sessions.session_scopes("user:1", "user:2")]
        asyncio.run(handle(scopes[0], interruption, number > 0))
        scopes.clear()
        until(lambda sessions=sessions: is_free(sessions))
        one, two = (sessions.storage.get(key) or {} for key in ("user:1", "user:2"))
        assert one.pop("b", None) == (2 if number > 0 else None)
        assert one == two


@pytest.mark.parametrize(
    ("blocking", "of_coroutine"), [(True, False), (False, False), (False, True)]
)
def test_a_key_that_the_thread_beneath_is_giving_up_cannot_be_waited_for(
    threads: Threads, blocking: bool, of_coroutine: bool
) -> None:
    """By a signal handler that has interrupted a finaliser: that would have to go on first. Until
    that has said so, a few lines long, the handler waits in vain, as long as it may."""

    async def handle() -> None:
        async with sessions.session_scope(KEY):
            await anything()

    def enter() -> None:
        if of_coroutine:
            never_left.append(handle())
            never_left[0].send(None)
        else:
            never_left.append(sessions.session_scope(KEY))
            never_left[0].__enter__()

    def open_too() -> None:
        raised.extend(raised_by_opening(sessions))

    raised: list[type[Exception]] = []
    never_left: list[Any] = []
    for interruption in everywhere(open_too, scope):
        storage = OwnStorage()
        storage.blocking = blocking
        sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=0.05)
        threads.start(enter)
        threads.join()
        with interruption:
            never_left.clear()
        until(lambda sessions=sessions: is_free(sessions))
    if of_coroutine:  # which first rolls back
        assert set(raised[-5:]) == {SessionDeadlockError}
    else:
        assert set(raised[raised.index(SessionDeadlockError) :]) == {SessionDeadlockError}


def test_a_signal_handler_in_the_middle_of_a_release_does_not_wait_for_that(
    threads: Threads,
) -> None:
    """A release of a session that another thread has opened, which goes on meanwhile."""

    def handle() -> None:
        with sessions.session_scope(KEY) as session:
            opened.append(session)
            is_open.set()
            assert go_on.wait(SOON)

    def open_too() -> None:
        raised.extend(raised_by_opening(sessions))

    raised: list[type[Exception]] = []
    for interruption in everywhere(open_too, scope):
        opened: list[Any] = []
        is_open, go_on = threading.Event(), threading.Event()
        sessions: SessionManager[Any] = SessionManager(lock_timeout=0.2)
        threads.start(handle)
        assert is_open.wait(SOON)
        with interruption:
            opened[0].release()
        go_on.set()
        threads.join()
    # Before the release has begun, it is a session that a thread has; and then it is refused.
    assert set(raised[raised.index(SessionDeadlockError) :]) == {SessionDeadlockError}


@raises_in_flows
def test_the_sessions_of_an_update_are_left_wherever_that_is_interrupted() -> None:
    """As the integrations leave them."""
    for number, interruption in enumerate(everywhere(raise_outside, transaction, entry)):
        sessions: SessionManager[Any] = SessionManager()
        update_scope = UpdateScope((sessions, SessionManager(prefix="chat")), message())
        update_scope.__enter__()
        with contextlib.suppress(OutsideError), interruption:
            update_scope.leave(None)
        assert number == 0 or not any(each.is_entered for each in update_scope.in_order)
        del update_scope
        until(lambda sessions=sessions: is_free(sessions))


@raises_in_flows
def test_an_update_is_left_wherever_that_is_interrupted() -> None:
    for number, interruption in enumerate(everywhere(raise_outside, update, transaction, entry)):
        sessions: SessionManager[Any] = SessionManager()
        update_scope = UpdateScope((sessions,), message())
        (session,) = update_scope.__enter__()
        assert session is not None
        session["a"] = 1
        with contextlib.suppress(OutsideError), interruption:
            update_scope.__exit__(None, None, None)
        if number > 0:
            with sessions.session_scope(session.key) as later:
                later.b = 2
            assert sessions.storage.get(session.key) == {"a": 1, "b": 2}
        del update_scope
        until(lambda sessions=sessions: is_free(sessions))


def test_an_update_whose_scopes_could_not_be_entered_leaves_no_record_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted when the record was open; the threads that close it are all busy."""

    class Opened:
        record = size = None

        def save(self, record: Any) -> None: ...
        def close(self, record: Any) -> None:
            closed.append(record)

    class Shared(OwnStorage):
        def open_record(self, key: str, timeout: float) -> Opened:
            return Opened()

    def interrupt(self: Any) -> None:
        raise OutsideError

    closed: list[Any] = []
    gate = threading.Event()
    for _ in range(16):
        pools.errands.run_soon(lambda: gate.wait(SOON) and None)
    sessions: SessionManager[Any] = SessionManager(storage=Shared())
    update_scope = UpdateScope((sessions,), message())
    monkeypatch.setattr(scope.Scope, "session", interrupt)
    with pytest.raises(OutsideError):
        update_scope.__enter__()
    gate.set()
    until(lambda: closed and is_free(sessions))
    assert closed == [None]
