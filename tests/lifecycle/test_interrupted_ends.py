"""Ends of scopes that others come into: an interrupt, a joiner, a flush, another end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads, message
from end_tools import is_free
from interruptions import OutsideError, every_line, everywhere, raise_outside, raises_in_flows
from stores import OwnStorage
from waiting import SOON, until

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
