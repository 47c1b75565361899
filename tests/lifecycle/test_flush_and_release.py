"""`flush()` and `release()`: what is stored then, what waits for it, and what stays locked."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from conftest import Threads
from scope_tools import KEY, Counting, Failing, slow_store

from session_sync import MemoryStorage, SessionClosedError, SessionManager
from session_sync.session.changes import ChangeTracker


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

    def watched(tracker: ChangeTracker) -> None:
        is_locked.append("write" in scope.held)
        close(tracker)

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
