"""Scopes that are joined, or waited for, just as something else happens to them."""

from __future__ import annotations

import asyncio
import contextvars
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from race_tools import SOON, Hesitant, Quick, is_free, is_soon_free, let_others_run
from scope_tools import KEY, Counting

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionLockTimeoutError,
    SessionManager,
    SQLiteStorage,
    storage_from_url,
)
from session_sync.lifecycle import threads as pools
from session_sync.lifecycle.current import in_handler
from session_sync.locks.tickets import Tickets

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
    def open_record(key: str, timeout: float) -> Any:
        assert thrown.wait(20)  # a thread may be faster than the coroutine that waits for it
        return open_now(key, timeout)

    thrown = threading.Event()
    storage, other = (SQLiteStorage(tmp_path / "sessions.db") for _ in range(2))
    open_now = storage.open_record
    monkeypatch.setattr(storage, "open_record", open_record)
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
        thrown.set()

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
