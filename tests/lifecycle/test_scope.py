"""The life cycle of a session, for `with` and `async with`: what is read and written, and when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Threads, message
from scope_tools import KEY, Counting, Failing

from session_sync import (
    MemoryStorage,
    Session,
    SessionAwaitError,
    SessionDecodeError,
    SessionEncodeError,
    SessionLockTimeoutError,
    SessionManager,
    ttl,
)


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
