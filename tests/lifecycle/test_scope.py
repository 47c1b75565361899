"""The life cycle of a session, for `with` and `async with`: what is read and written, and when."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Threads, message

from session_sync import (
    MemoryStorage,
    Session,
    SessionAwaitError,
    SessionClosedError,
    SessionDecodeError,
    SessionEncodeError,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionManager,
    ttl,
)
from session_sync.session.changes import ChangeTracker

KEY = "user:1:chat:1"


class Counting:
    """A storage of four methods that counts its calls and the threads that they come from."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.threads: set[int] = set()

    def get(self, key: str) -> Any:
        self._called("get")
        return self.values.get(key)

    def set(self, key: str, value: dict[str, Any]) -> None:
        self._called("set")
        self.values[key] = value

    def delete(self, key: str) -> None:
        self._called("delete")
        self.values.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.values

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())


def slow_store() -> tuple[Counting, threading.Event, threading.Event]:
    """A storage whose first `set` waits, and the events of its beginning and going on."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def set(self, key: str, value: dict[str, Any]) -> None:
            if not begun.is_set():
                begun.set()
                assert go_on.wait(20)
            super().set(key, value)

    return Slow(), begun, go_on


def run_handler(sessions: SessionManager[Any], handler: Callable[[Any], None], how: str) -> None:
    """Run a handler inside a scope, the sync or the async way."""
    if how == "with":
        with sessions.session_scope(KEY) as session:
            handler(session)
        return

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            if sessions.scopes.options.lazy and handler is not untouched:
                session = await session
            handler(session)

    asyncio.run(main())


def untouched(session: Any) -> None:
    pass


def reads(session: Any) -> None:
    assert session["counter"] == 1
    assert session.cart["items"] == ["tea"]
    assert "counter" in session
    assert len(session) == 2


def writes(session: Any) -> None:
    session["counter"] += 1
    session.counter += 1
    session.cart["items"].append("milk")
    session["cart"]["items"].append("bread")


def writes_inside(session: Any) -> None:
    session.cart["items"].append("milk")


@pytest.mark.parametrize("how", ["with", "async with"])
@pytest.mark.parametrize(
    ("handler", "eager", "lazy"),
    [
        (untouched, ["get"], []),
        (reads, ["get"], ["get"]),
        (writes, ["get", "set"], ["get", "set"]),
        (writes_inside, ["get", "set"], ["get", "set"]),
        (Session.clear, ["get", "delete"], ["get", "delete"]),
    ],
)
@pytest.mark.parametrize("is_lazy", [False, True], ids=["eager", "lazy"])
def test_what_reaches_the_storage(
    how: str, handler: Any, eager: list[str], lazy: list[str], is_lazy: bool
) -> None:
    storage = Counting()
    storage.values[KEY] = {"counter": 1, "cart": {"items": ["tea"]}}
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=is_lazy)
    run_handler(sessions, handler, how)
    assert storage.calls == (lazy if is_lazy else eager)


def test_a_lazy_session_that_nobody_touches_takes_no_lock(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True, lock_timeout=0)
    held, let_go = threading.Event(), threading.Event()

    def holder() -> None:
        with sessions.session_scope(KEY) as session:
            session.a = 1
            held.set()
            assert let_go.wait(20)

    threads.start(holder)
    assert held.wait(20)
    with sessions.session_scope(KEY):
        pass
    with pytest.raises(SessionLockTimeoutError), sessions.session_scope(KEY) as session:
        _ = session.a
    let_go.set()


# -- async code


def test_a_lazy_session_in_async_code_says_to_await_it() -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            for touch in (
                lambda: session["a"],
                lambda: session.a,
                lambda: len(session),
                lambda: session.update(a=1),
                lambda: "a" in session,
            ):
                with pytest.raises(SessionAwaitError, match="session = await session"):
                    touch()
            assert (await session) is session
            session.a = 1
            assert (await session).a == 1

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"a": 1}


def test_awaiting_an_eager_session_gives_it_back() -> None:
    sessions: SessionManager[Any] = SessionManager()

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            assert (await session) is session

    asyncio.run(main())


def test_a_blocking_store_never_runs_on_the_event_loop_and_memory_always_does() -> None:
    storage = Counting()

    class Memory(MemoryStorage):
        def load(self, key: str) -> Any:
            threads.add(threading.get_ident())
            return super().load(key)

        def save(self, key: str, record: Any) -> None:
            threads.add(threading.get_ident())
            super().save(key, record)

    threads: set[int] = set()

    async def main(sessions: SessionManager[Any]) -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await session.aflush()
            session.a = 2

    asyncio.run(main(SessionManager(storage=storage)))
    assert storage.calls == ["get", "set", "set"]
    assert threading.get_ident() not in storage.threads
    asyncio.run(main(SessionManager(storage=Memory())))
    assert threads == {threading.get_ident()}


def test_flush_and_release_on_the_event_loop_name_their_async_twins() -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Counting())

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            with pytest.raises(SessionAwaitError, match=r"await session\.aflush\(\)"):
                session.flush()
            with pytest.raises(SessionAwaitError, match=r"await session\.arelease\(\)"):
                session.release()
            await asyncio.to_thread(session.flush)  # a thread may block

    asyncio.run(main())


def test_a_cancelled_handler_is_discarded_and_its_key_free() -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Counting())

    async def handler(inside: asyncio.Event) -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            inside.set()
            await asyncio.Event().wait()

    async def main() -> None:
        inside = asyncio.Event()
        task = asyncio.create_task(handler(inside))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert sessions.storage.get(KEY) is None
    assert len(sessions.locks) == 0


@pytest.mark.parametrize("during", ["get", "set"])
def test_a_handler_cancelled_while_the_store_works_frees_the_key_only_afterwards(
    during: str,
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def _called(self, name: str) -> None:
            if name == during and not begun.is_set():
                begun.set()
                assert go_on.wait(20)
            super()._called(name)

    storage = Slow()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def handler(value: int) -> None:
        async with sessions.session_scope(KEY) as session:
            session.setdefault("trail", []).append(value)

    async def main() -> None:
        first = asyncio.create_task(handler(1))
        await asyncio.to_thread(begun.wait, 20)
        first.cancel()
        second = asyncio.create_task(handler(2))
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(storage.calls) == (0 if during == "get" else 1)  # the second one waits
        first.cancel()  # once more, while it waits for the store
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second

    asyncio.run(main())
    assert storage.get(KEY) == {"trail": [2] if during == "get" else [1, 2]}
    assert len(sessions.locks) == 0


def test_a_coroutine_that_is_thrown_away_frees_its_key() -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Counting(), on_error="flush")

    async def handler() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await asyncio.sleep(0)

    async def enter() -> None:
        coroutine = handler()
        future: Any = coroutine.send(None)
        while future is not None:  # what the scope waits for, before the handler's own sleep(0)
            while not future.done():
                await asyncio.sleep(0)
            future = coroutine.send(None)
        coroutine.close()

    asyncio.run(enter())
    with sessions.session_scope(KEY) as session:  # as soon as a thread has closed it
        assert dict(session) == {}
    assert len(sessions.locks) == 0
    assert sessions.storage.get(KEY) is None


# -- errors


@pytest.mark.parametrize("how", ["with", "async with"])
@pytest.mark.parametrize("on_error", ["discard", "flush"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_handler_that_raises(how: str, on_error: Any, error: type[BaseException]) -> None:
    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage, on_error=on_error)
    kept: list[Any] = []

    def fails(session: Any) -> None:
        session.update(a=1, items=[1])
        if how == "with":
            session.flush()
        session.a = 2
        session["items"].append(2)
        kept.append(session)
        raise error

    with pytest.raises(error):
        run_handler(sessions, fails, how)
    flushed = {"a": 1, "items": [1]} if how == "with" else {}
    expected = {"a": 2, "items": [1, 2]} if on_error == "flush" else flushed
    assert (storage.get(KEY) or {}) == expected
    assert kept[0] == expected  # what it shows once closed
    assert len(sessions.locks) == 0


class Failing(Counting):
    """A storage that fails in one of its methods while `broken` names it."""

    broken = ""

    def _called(self, name: str) -> None:
        if name == self.broken:
            raise OSError(f"{name} on fire")
        super()._called(name)


@pytest.mark.parametrize("how", ["with", "async with"])
def test_errors_of_a_store_propagate_and_leave_the_key_free(how: str) -> None:
    storage = Failing()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    run_handler(sessions, lambda session: session.update(a=1), how)
    for broken, handler in (
        ("get", lambda session: pytest.fail("ran")),
        ("set", lambda session: session.update(a=2)),
        ("delete", Session.clear),
    ):
        storage.broken = broken
        with pytest.raises(OSError, match=f"{broken} on fire"):
            run_handler(sessions, handler, how)
        assert len(sessions.locks) == 0
        assert storage.values == {KEY: {"a": 1}}


@pytest.mark.parametrize("value", [1, "text", [1], {"in": 1}])
def test_a_field_that_was_read_and_deleted_is_gone_after_a_flush(storage: Any, value: Any) -> None:
    sessions = SessionManager(storage=storage)
    storage.set(KEY, {"a": 0, "b": value})
    with sessions.session_scope(KEY) as session:
        assert session.pop("b") == value
        session.flush()
        assert session.get("b") is None
        with pytest.raises(KeyError):
            session["b"]
        session.b = 2
        session.flush()
        assert session == {"a": 0, "b": 2}
    assert storage.get(KEY) == {"a": 0, "b": 2}


def test_a_flush_that_fails_loses_nothing_and_a_later_one_writes_it() -> None:
    storage = Failing()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions.session_scope(KEY) as session:
        session.update(a=1, gone=1, items=[1])
        session.flush()
        del session.gone
        session.a = 2
        session.b = ttl(3, 60)
        session["items"].append(2)
        storage.broken = "set"
        with pytest.raises(OSError, match="on fire"):
            session.flush()
        assert session == {"a": 2, "b": 3, "items": [1, 2]}
        assert storage.values[KEY] == {"a": 1, "gone": 1, "items": [1]}
        storage.broken = ""
        session["items"].append(3)
    with sessions.session_scope(KEY) as session:
        assert session == {"a": 2, "b": 3, "items": [1, 2, 3]}


def test_a_value_that_contains_itself_is_refused_and_nothing_written() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with (
        pytest.raises(SessionEncodeError, match=r"'user:1:chat:1'.*'cart'.*contains itself"),
        sessions.session_scope(KEY) as session,
    ):
        session.other = 1
        session.cart = []
        session.cart.append(session.cart)
    assert sessions.storage.get(KEY) is None
    assert len(sessions.locks) == 0


def test_a_stored_value_that_is_no_mapping_is_refused_and_left() -> None:
    storage = Counting()
    storage.values[KEY] = ["not", "fields"]  # type: ignore[assignment]
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with pytest.raises(SessionDecodeError, match=r"user:1:chat:1.*prefix"):
        sessions.session_scope(KEY).__enter__()
    assert storage.values[KEY] == ["not", "fields"]
    assert len(sessions.locks) == 0


# -- flush, release


@pytest.mark.parametrize("how", ["with", "async with"])
def test_flush_writes_once_and_what_follows_is_a_unit_of_its_own(how: str) -> None:
    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await session.aflush()
            await session.aflush()
            assert storage.values == {KEY: {"a": 1}}
            session.a = 2
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        if how == "async with":
            asyncio.run(main())
        else:
            with sessions.session_scope(KEY) as session:
                session.a = 1
                session.flush()
                session.flush()
                session.a = 2
                raise ValueError("late")
    assert storage.values == {KEY: {"a": 1}}
    assert storage.calls == ["get", "set"]


def test_what_changes_while_a_flush_is_on_its_way_is_not_lost() -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.update(a=1, b=1, c=[1])
            flush = asyncio.create_task(session.aflush())
            await asyncio.to_thread(begun.wait, 20)
            session.a = 2
            del session.b
            session.c.append(2)
            session.d = 1
            assert session == {"a": 2, "c": [1, 2], "d": 1}
            go_on.set()
            await flush
            assert session == {"a": 2, "c": [1, 2], "d": 1}

    asyncio.run(main())
    assert sessions.storage.get(KEY) == {"a": 2, "c": [1, 2], "d": 1}


@pytest.mark.parametrize("by", ["a second flush", "the end of the scope"])
def test_a_flush_does_not_overtake_one_that_is_on_its_way(by: str) -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            first = asyncio.create_task(session.aflush())
            await asyncio.to_thread(begun.wait, 20)
            session.b = 2
            second = asyncio.create_task(session.aflush()) if by == "a second flush" else None
            asyncio.get_running_loop().call_soon(go_on.set)
            if second is not None:
                await second
                assert storage.values == {KEY: {"a": 1, "b": 2}}
        await first

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1, "b": 2}}
    assert storage.calls == ["get", "set", "set"]


class Own:
    """An object that a storage of four methods keeps by reference: always saved when touched."""


def test_no_flush_writes_after_the_key_was_given_on() -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def other() -> None:
        async with sessions.session_scope(KEY) as session:
            session.n += 100

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.n, session.own = 1, Own()
            following = contextvars.Context().run(asyncio.create_task, other())
            release = asyncio.create_task(session.arelease())
            await asyncio.to_thread(begun.wait, 20)
            flush = asyncio.create_task(session.aflush())
            for _ in range(3):
                await asyncio.sleep(0)
            go_on.set()
            await asyncio.gather(release, flush, following)

    asyncio.run(main())
    assert storage.values[KEY]["n"] == 101
    assert storage.calls == ["get", "set", "get", "set"]


async def cancelled_while(task: asyncio.Task[Any], begun: Any, go_on: Any) -> None:
    """Cancel `task` while the store writes, and let the store go on."""
    await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_session_is_closed_before_its_last_flush_releases_the_write_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a thread that waits with a flush of its own could write once more, without the key."""
    sessions: SessionManager[Any] = SessionManager(storage=Counting())
    is_locked: list[bool] = []
    close = ChangeTracker.close

    def watched(fields: ChangeTracker) -> None:
        is_locked.append("write" in scope.held)
        close(fields)

    monkeypatch.setattr(ChangeTracker, "close", watched)
    with sessions.session_scope(KEY) as session:
        scope: Any = session._lifecycle()
        session.flush()
        session.a = 1
    assert is_locked[0]


def test_a_flush_that_comes_while_the_last_one_is_on_its_way_waits_and_writes_nothing() -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    sessions_of_others: list[Any] = []

    def handler() -> None:
        with sessions.session_scope(KEY) as session:
            sessions_of_others.append(session)
            session.a = 1

    thread = threading.Thread(target=handler)
    thread.start()
    assert begun.wait(20)
    flush = threading.Thread(target=sessions_of_others[0].flush)
    flush.start()
    while not sessions_of_others[0]._lifecycle().queues:
        time.sleep(0)  # until it waits for the last one
    go_on.set()
    flush.join(20)
    thread.join(20)
    assert storage.calls == ["get", "set"]


def test_a_write_that_has_begun_is_finished_before_the_process_ends() -> None:
    """Also where nobody waits for it any more, since its event loop has stopped."""
    program = """if True:
        import asyncio, atexit, threading
        from session_sync import SessionManager

        begun, go_on = threading.Event(), threading.Event()

        class Slow(dict):
            has = dict.__contains__
            def set(self, key, value):
                begun.set()
                go_on.wait(20)
                print("written", flush=True)
            def delete(self, key):
                pass

        async def handler():
            async with SessionManager(storage=Slow()).session_scope("user:1") as session:
                session.a = 1

        loop = asyncio.new_event_loop()
        task = loop.create_task(handler())
        loop.run_until_complete(asyncio.to_thread(begun.wait, 20))
        atexit.register(go_on.set)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"written\n")


def test_what_an_interrupt_has_left_to_a_thread_is_stored_before_the_process_ends() -> None:
    """Though the process is about to end before that thread has even begun."""
    program = """if True:
        from session_sync import SessionManager
        from session_sync.lifecycle import scope

        class Store(dict):
            has = dict.__contains__
            def set(self, key, value):
                print("written", flush=True)
            def delete(self, key):
                pass

        def interrupt(self):
            scope.Scope._write_last = write_last
            raise KeyboardInterrupt

        write_last = scope.Scope._write_last
        try:
            with SessionManager(storage=Store()).session_scope("user:1") as session:
                session.a = 1
                scope.Scope._write_last = interrupt  # as the block ends
        except KeyboardInterrupt:
            pass
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"written\n")


def test_the_process_ends_when_the_last_thread_has_written() -> None:
    """Not when one has ended that had nothing to do any more."""
    program = """if True:
        import threading, time
        from session_sync.lifecycle.threads import closers

        def write():
            begun.set()
            time.sleep(0.2)  # so that the process comes to its end
            print("written", flush=True)

        begun = threading.Event()
        closers.run_soon(write)
        begun.wait()
        closers.run_soon(lambda: None)  # whose thread has not begun as the process ends
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"written\n")


def test_a_cancelled_flush_knows_that_it_has_written() -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            await cancelled_while(asyncio.create_task(session.aflush()), begun, go_on)
            session.clear()  # what was written has to be deleted

    asyncio.run(main())
    assert storage.values == {}
    assert storage.calls == ["get", "set", "delete"]


def test_a_release_cancelled_behind_a_flush_saves_all_the_same() -> None:
    storage, begun, go_on = slow_store()
    sessions: SessionManager[Any] = SessionManager(storage=storage)

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            flush = asyncio.create_task(session.aflush())
            await asyncio.to_thread(begun.wait, 20)
            session.b = 2
            await cancelled_while(asyncio.create_task(session.arelease()), begun, go_on)
            await flush

    asyncio.run(main())
    assert storage.values == {KEY: {"a": 1, "b": 2}}
    assert len(sessions.locks) == 0


def test_a_storage_that_fails_to_unload_leaves_the_key_free() -> None:
    class Failing(MemoryStorage):
        def unload(self, key: str) -> None:
            raise OSError("on fire")

    sessions: SessionManager[Any] = SessionManager(storage=Failing())
    with pytest.raises(OSError, match="on fire"):
        with sessions.session_scope(KEY) as session:
            session.a = 1
    assert sessions.storage.get(KEY) == {"a": 1}
    assert len(sessions.locks) == 0


def test_entries_of_one_thread_count_once_each(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager()
    inside, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with sessions.session_scope(KEY) as session:
            inside.set()
            assert go_on.wait(20)
            session.other = 1

    with sessions.session_scope(KEY):
        with sessions.session_scope(KEY):
            context = contextvars.copy_context()
            thread = threads.start(context.run, other)
            assert inside.wait(20)
        with sessions.session_scope(KEY) as session:
            session.mine = 1
    go_on.set()
    thread.join(20)
    assert sessions.storage.get(KEY) == {"mine": 1, "other": 1}
    assert len(sessions.locks) == 0


@pytest.mark.parametrize("how", ["with", "async with"])
def test_a_lazy_session_whose_scope_ends_while_it_loads_is_closed_and_not_lost(
    how: str, threads: Threads
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def get(self, key: str) -> Any:
            begun.set()
            assert go_on.wait(20)
            return super().get(key)

    storage = Slow()
    storage.values[KEY] = {"a": 1}
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=True)
    seen: list[Any] = []

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            task = asyncio.ensure_future(session)
            await asyncio.to_thread(begun.wait, 20)
        go_on.set()
        seen.append((await task).a)

    if how == "async with":
        asyncio.run(main())
    else:
        with sessions.session_scope(KEY) as session:
            thread = threads.start(lambda: seen.append(session.a))
            assert begun.wait(20)
        go_on.set()
        thread.join(20)
    assert seen == [1]
    assert len(sessions.locks) == 0


@pytest.mark.parametrize("how", ["with", "async with"])
def test_an_eager_manager_that_joins_a_lazy_one_finds_the_session_loaded(how: str) -> None:
    storage = Counting()
    lazy: SessionManager[Any] = SessionManager(storage=storage, lazy=True)
    eager: SessionManager[Any] = SessionManager(storage=storage)

    async def main() -> None:
        async with lazy.session_scope(KEY), eager.session_scope(KEY) as session:
            session.a = 1

    if how == "async with":
        asyncio.run(main())
    else:
        with lazy.session_scope(KEY), eager.session_scope(KEY) as session:
            session.a = 1
    assert storage.values == {KEY: {"a": 1}}


@pytest.mark.parametrize("how", ["with", "async with"])
def test_an_eager_manager_that_cannot_load_what_it_joined_leaves_it_again(how: str) -> None:
    storage = Failing()
    storage.values[KEY] = {"a": 1}
    storage.broken = "get"
    lazy: SessionManager[Any] = SessionManager(storage=storage, lazy=True, lock_timeout=5)
    eager: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=5)

    async def main() -> None:
        async with lazy.session_scope(KEY):
            with pytest.raises(OSError, match="on fire"):
                await eager.session_scope(KEY).__aenter__()
            storage.broken = ""
            async with eager.session_scope(KEY) as session:
                session.a += 1

    if how == "async with":
        asyncio.run(main())
    else:
        with lazy.session_scope(KEY):
            with pytest.raises(OSError, match="on fire"):
                eager.session_scope(KEY).__enter__()
            storage.broken = ""
            with eager.session_scope(KEY) as session:
                session.a += 1
    assert storage.values == {KEY: {"a": 2}}
    assert len(eager.locks) == 0


def test_one_scope_object_serves_one_with() -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Counting())
    scope = sessions.session_scope(KEY)

    async def use() -> None:
        async with scope as session:
            session.a = session.get("a", 0) + 1

    async def main() -> list[Any]:
        return await asyncio.gather(use(), use(), return_exceptions=True)

    outcome = asyncio.run(main())
    assert [type(error) for error in outcome] == [type(None), RuntimeError]
    with pytest.raises(RuntimeError, match="call session_scope"), scope:  # nor one after the other
        pass
    scope = sessions.session_scope(KEY)
    with scope, pytest.raises(RuntimeError, match="call session_scope"), scope:  # nor inside itself
        pass
    with sessions.session_scope(KEY) as session:
        assert session.a == 1
    assert len(sessions.locks) == 0


def test_what_initial_returned_is_left_alone_whatever_is_in_it() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with sessions.session_scope("other") as session:
        session.update(items=[1])
        session.flush()
    with sessions.session_scope("other") as session:
        items = session["items"]  # of a session that is closed now
    default = {"a": {"b": items}}
    sessions = SessionManager(initial=lambda update: default)
    with sessions.session_scope(KEY) as session:
        session.a["b"].append(2)
    assert default["a"]["b"] is items
    assert items == [1]


@pytest.mark.parametrize("how", ["with", "async with"])
def test_release_saves_and_lets_the_next_update_in(how: str, threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Counting())
    done = threading.Event()

    def next_update() -> None:
        with sessions.session_scope(KEY) as session:
            session.a += 1
        done.set()

    def after(session: Any) -> None:
        assert done.wait(20)
        assert session.a == 1
        with pytest.raises(SessionClosedError, match=KEY):
            session.a = 5
        with sessions.session_scope(KEY) as again:
            again.a += 1

    async def main() -> None:
        async with sessions.session_scope(KEY) as session:
            session.a = 1
            threads.start(next_update)
            await session.arelease()
            await asyncio.to_thread(after, session)

    if how == "async with":
        asyncio.run(main())
    else:
        with sessions.session_scope(KEY) as session:
            session.a = 1
            threads.start(next_update)
            session.release()
            after(session)
    assert sessions.storage.get(KEY) == {"a": 3}


def test_an_error_after_release_discards_nothing() -> None:
    sessions: SessionManager[Any] = SessionManager()
    with pytest.raises(ValueError, match="late"), sessions.session_scope(KEY) as session:
        session.a = 1
        session.release()
        session.release()
        session.flush()
        raise ValueError("late")
    assert sessions.storage.get(KEY) == {"a": 1}


# -- initial


def test_initial_is_asked_once_per_missing_session_and_stored_only_with_a_change() -> None:
    default = {"counter": 5, "items": [1], "code": ttl("x", 60)}
    asked: list[Any] = []

    def initial(update: Any) -> dict[str, Any]:
        asked.append(update)
        return default

    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage, initial=initial)
    update = message(1)
    with sessions.session_scope(update) as session:
        assert session == {"counter": 5, "items": [1], "code": "x"}
    assert storage.values == {}
    with sessions.session_scope(KEY) as session:
        session["items"].append(2)
    with sessions.session_scope("user:2") as session:
        assert session["items"] == [1]  # two users do not share a default
    with sessions.session_scope(KEY) as session:
        assert session == {"counter": 5, "items": [1, 2], "code": "x"}
    assert asked == [update, KEY, "user:2"]
    assert default["items"] == [1]


@pytest.mark.parametrize("lazy", [False, True])
def test_what_initial_raises_propagates_and_leaves_the_key_free(lazy: bool) -> None:
    def initial(update: Any) -> Any:
        raise LookupError("no such user")

    sessions: SessionManager[Any] = SessionManager(initial=initial, lazy=lazy)
    with (
        pytest.raises(LookupError, match="no such user"),
        sessions.session_scope(KEY) as session,
    ):
        _ = session.get("a")
    assert len(sessions.locks) == 0


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
