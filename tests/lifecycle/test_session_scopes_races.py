"""Several sessions at once, with others around them, and with stores that fail as they close."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from conftest import Threads
from scopes_tools import SOON, Plain, Slow, _add_to_both

from session_sync import Session, SessionManager

# -- with others around it


def test_one_that_is_open_around_it_is_saved_with_its_own_scope(storage: Any) -> None:
    sessions = SessionManager(storage=storage)
    with pytest.raises(ZeroDivisionError), sessions.session_scope("user:1") as outer:
        with sessions.session_scopes("user:2", "user:1") as (two, one):
            assert one is outer
            one.coins = two.coins = 1
        assert storage.get("user:2") == {"coins": 1}
        assert storage.get("user:1") is None
        raise ZeroDivisionError
    assert storage.get("user:1") is None


def test_flush_and_release_do_as_always(storage: Any) -> None:
    sessions = SessionManager(storage=storage)
    with sessions.session_scopes("user:1", "user:2") as (one, two):
        one.coins = two.coins = 1
        one.flush()
        assert storage.get("user:1") == {"coins": 1}
        two.release()
        assert storage.get("user:2") == {"coins": 1}
        one.coins = 2
    assert (storage.get("user:1"), storage.get("user:2")) == ({"coins": 2}, {"coins": 1})


def test_a_cancelled_coroutine_has_written_all_of_them() -> None:
    storage = Slow()
    sessions = SessionManager(storage=storage)
    seen: list[Any] = []

    async def main() -> None:
        task = asyncio.create_task(_add_to_both(sessions, "user:1", "user:2", seen=seen))
        assert await asyncio.to_thread(storage.begun.wait, SOON)
        task.cancel()
        storage.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == [{"coins": 1}, {"coins": 1}]
        async with sessions.session_scope("user:1") as session:
            session.coins += 1

    asyncio.run(main())
    assert storage.kept == {"user:1": {"coins": 2}, "user:2": {"coins": 1}}


class SlowFlush(Slow):
    """An adapter that is overtaken, if that is possible, while it writes one."""

    def set(self, key: str, value: Any) -> None:
        self.begun.set()
        self.may_end.wait(0.3)
        super().set(key, value)

    def save_all(self, records: Any, _opened: Any) -> bool:
        self.put(records)
        self.may_end.set()
        return True


def test_a_flush_that_is_on_its_way_is_waited_for(threads: Threads) -> None:
    storage = SlowFlush()
    with SessionManager(storage=storage).session_scopes("user:1", "user:2") as (one, two):
        one.coins = 1
        threads.start(one.flush)
        assert storage.begun.wait(SOON)
        one.coins = two.coins = 2
    threads.join()
    assert storage.kept == {"user:1": {"coins": 2}, "user:2": {"coins": 2}}


class Held(Plain):
    """An adapter that takes its time with the first value of `user:1`, and may refuse it then."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def set(self, key: str, value: Any) -> None:
        if key == "user:1":
            self.begun.set()
            assert self.may_end.wait(SOON)
        try:
            super().set(key, value)
        finally:
            self.broken = ""


async def _flush_meanwhile(storage: Held, session: Any, change: Any) -> asyncio.Task[None]:
    """Begin to flush. As soon as that is waited for, `change` is awaited; then it goes on."""
    flushing = asyncio.create_task(session.aflush())
    assert await asyncio.to_thread(storage.begun.wait, SOON)

    async def go_on() -> None:
        await change()
        storage.may_end.set()
        await flushing

    return asyncio.create_task(go_on())


def test_what_a_flush_could_not_write_meanwhile_is_written() -> None:
    storage = Held()
    storage.broken = "user:1"
    sessions = SessionManager(storage=storage)

    async def nothing() -> None: ...

    async def main() -> None:
        async with sessions.session_scopes("user:1", "user:2") as (one, two):
            one.coins = two.coins = 1
            flushing = await _flush_meanwhile(storage, one, nothing)
        with pytest.raises(OSError, match="full"):
            await flushing

    asyncio.run(main())
    assert storage.kept == {"user:1": {"coins": 1}, "user:2": {"coins": 1}}


def test_one_that_is_released_meanwhile_is_not_written_again() -> None:
    storage = Held()
    sessions = SessionManager(storage=storage)

    async def main() -> None:
        async with sessions.session_scopes("user:1", "user:2", "user:3") as (one, two, three):

            async def release() -> None:
                await two.arelease()
                async with sessions.session_scope("user:2") as again:
                    again.coins += 10

            one.coins = two.coins = three.coins = 1
            flushing = await _flush_meanwhile(storage, one, release)
        await flushing

    asyncio.run(main())
    assert storage.kept == {
        "user:1": {"coins": 1},
        "user:2": {"coins": 11},
        "user:3": {"coins": 1},
    }


class MySession(Session):
    coins: int = 5


def test_typed_sessions_are_typed() -> None:
    sessions = SessionManager(MySession)
    with sessions.session_scopes("user:1", "user:2") as (one, two):
        one.coins, two.coins = two.coins + 1, one.coins + 2
    assert [sessions.storage.get(f"user:{n}")["coins"] for n in (1, 2)] == [6, 7]


# -- closing that fails


class FailsToClose(Plain):
    """An adapter for several processes that fails to close the records of some keys."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys_that_fail = keys
        self.failures: dict[str, BaseException] = {}
        self.open: list[str] = []

    def open_record(self, key: str, _timeout: float) -> Any:
        storage = self
        storage.open.append(key)

        class Opened:
            record = storage.get(key)

            def save(self, record: Any) -> None:
                storage.set(key, dict(record))

            def close(self, record: Any) -> None:
                storage.open.remove(key)
                if record is not None:
                    self.save(record)
                if key in storage.keys_that_fail:
                    raise storage.failures.get(key, OSError(f"{key} was not closed"))

        return Opened()


@pytest.mark.parametrize("how", ["with", "async with"])
def test_one_that_fails_to_close_keeps_no_other_from_it(how: str) -> None:
    storage = FailsToClose("user:1", "user:3")
    sessions = SessionManager(storage=storage)
    keys = ["user:1", "user:2", "user:3"]
    with pytest.raises(OSError, match="user:3 was not closed") as caught:
        if how == "with":
            with sessions.session_scopes(*keys) as (_one, two, _three):
                two.coins = 1
        else:
            asyncio.run(_add_to_both(sessions, *keys))
    assert caught.value.__notes__ == ["besides, OSError: user:1 was not closed"]
    assert storage.open == []
    assert storage.kept["user:2"] == {"coins": 1}
    assert len(sessions.locks) == 0


def test_an_interrupt_is_never_a_note() -> None:
    storage = FailsToClose("user:1", "user:2")
    storage.failures["user:1"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        with SessionManager(storage=storage).session_scopes("user:1", "user:2"):
            pass
    assert caught.value.__notes__ == ["besides, OSError: user:2 was not closed"]
    assert storage.open == []


@pytest.mark.parametrize("fails", [(), ("user:2",), ("user:1", "user:2")])
def test_a_coroutine_that_is_thrown_away_frees_all_of_them(fails: tuple[str, ...]) -> None:
    storage = FailsToClose(*fails)
    sessions = SessionManager(storage=storage)

    async def handle() -> None:
        async with sessions.session_scopes("user:1", "user:2") as (one, _two):
            one.coins = 1
            await asyncio.get_running_loop().create_future()

    async def begin() -> Any:
        coroutine = handle()
        task = asyncio.create_task(coroutine)
        while storage.open != ["user:1", "user:2"]:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        return coroutine

    loop = asyncio.new_event_loop()
    coroutine = loop.run_until_complete(begin())
    loop.close()
    with suppress(OSError):  # a RuntimeError says that it wanted to go on
        coroutine.close()
    give_up = time.monotonic() + SOON
    while len(sessions.locks):  # threads do it, where a finaliser would have to wait
        assert time.monotonic() < give_up
        time.sleep(0)
    assert storage.open == []
    assert storage.kept == {}
    assert len(sessions.locks) == 0
