"""Several sessions at once: in one order, and all or none."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Counting, Threads
from scopes_tools import SOON, Plain, Slow, _add_to_both

from session_sync import (
    MemoryStorage,
    SessionClosedError,
    SessionConflictError,
    SessionDeadlockError,
    SessionEncodeError,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionManager,
    StorageKey,
    storage_from_url,
)


@pytest.fixture(params=["memory", "lru", "sqlite", "disk", "redis"])
def strict(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A storage of each kind that refuses what it cannot keep, and can write several at once."""
    if request.param == "memory":
        yield MemoryStorage(strict=True)
        return
    if request.param == "redis":
        url = request.getfixturevalue("redis_url") + f"?prefix={random.getrandbits(64)}:"
    elif request.param == "lru":
        url = "memory://?ttl=60"
    else:
        folder = request.getfixturevalue("tmp_path")
        url = f"{request.param}:///{folder}/sessions"
    if request.param == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    storage = storage_from_url(url)
    if request.param == "lru":
        storage = MemoryStorage(ttl=60, strict=True)
    yield storage
    storage.close()  # type: ignore[attr-defined] # all of them have it


# -- what it gives


def test_sessions_come_in_the_order_in_which_they_were_asked_for(storage: Any) -> None:
    sessions = SessionManager(storage=storage)
    with sessions.session_scopes("user:2", StorageKey(user=1)) as (bob, alice):
        assert (bob.key, alice.key) == ("user:2", "user:1")
        bob.name, alice.name = "bob", "alice"
    assert storage.get("user:1") == {"name": "alice"}
    assert storage.get("user:2") == {"name": "bob"}


def test_a_coroutine_gets_them_too(storage: Any) -> None:
    sessions = SessionManager(storage=storage)

    async def main() -> None:
        ways = [("user:1", "user:2"), ("user:2", "user:1")]
        await asyncio.gather(*(_add_to_both(sessions, *ways[n % 2]) for n in range(20)))

    asyncio.run(main())
    assert storage.get("user:1") == storage.get("user:2") == {"coins": 20}


def test_updates_and_keys_go_together() -> None:
    sessions = SessionManager()
    update = {"update_id": 1, "message": {"from": {"id": 1}, "chat": {"id": 1}}}
    with sessions.session_scopes(update, "user:2") as (sender, _receiver):
        assert sender.key == "user:1:chat:1"
    with pytest.raises(SessionKeyError):
        sessions.session_scopes("user:2", {"update_id": 2, "poll": {}})


def test_any_number_of_them() -> None:
    sessions = SessionManager()
    keys = [f"user:{number}" for number in range(50)]
    with sessions.session_scopes(*keys) as all_of_them:
        for session in all_of_them:
            session.seen = True
    assert len(list(sessions.find())) == 50
    with sessions.session_scopes() as none:
        assert none == ()
    with sessions.session_scopes("user:1") as (one,):
        one.seen = False
    assert sessions.storage.get("user:1") == {"seen": False}


def test_a_key_that_is_given_twice_is_one_session(storage: Any) -> None:
    sessions = SessionManager(storage=storage)
    with sessions.session_scopes("user:1", "user:2", "user:1") as (first, _other, second):
        assert first is second
        first.coins = 1
        second.coins += 1
    assert storage.get("user:1") == {"coins": 2}


def test_those_of_a_lazy_manager_are_loaded_in_order_too() -> None:
    storage = Counting()
    sessions = SessionManager(storage=storage, lazy=True)

    async def main() -> None:
        async with sessions.session_scopes("user:2", "user:1") as (bob, alice):
            assert storage.reads == 2
            bob.coins, alice.coins = 1, 2  # not awaited: there is nothing to wait for

    asyncio.run(main())
    assert storage.get("user:1") == {"coins": 2}


def test_each_is_read_once_and_written_once_and_only_if_it_has_changed() -> None:
    storage = Counting()
    sessions = SessionManager(storage=storage)
    with sessions.session_scopes("user:1", "user:2", "user:3") as (one, two, _three):
        one.coins, two.coins = 1, 2
        one.coins = 3
    assert (storage.reads, storage.writes) == (3, 2)


def test_nothing_is_written_of_one_that_is_empty_and_was_never_stored() -> None:
    storage = Slow()
    sessions = SessionManager(storage=storage, initial=lambda key: {"coins": 10})
    with sessions.session_scopes("user:1", "user:2") as both:
        for session in both:
            session.clear()
    assert not storage.begun.is_set()


def test_a_scope_serves_one_block_and_closes_its_sessions() -> None:
    sessions = SessionManager()
    scopes = sessions.session_scopes("user:1", "user:2")
    with scopes as (one, _two):
        pass
    with pytest.raises(SessionClosedError):
        one.coins = 1
    with pytest.raises(RuntimeError, match="entered before"), scopes:
        pass


# -- in one order


def _transfer(sessions: SessionManager[Any], source: str, target: str) -> None:
    with sessions.session_scopes(source, target) as (giver, taker):
        giver.coins = giver.get("coins", 100) - 1
        taker.coins = taker.get("coins", 100) + 1


def test_two_transfers_never_wait_for_each_other(storage: Any, threads: Threads) -> None:
    sessions = SessionManager(storage=storage, lock_timeout=SOON)
    accounts = [f"user:{number}" for number in range(5)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            _transfer(sessions, *chance.sample(accounts, 2))

    for seed in range(8):
        threads.start(work, seed)
    threads.join()
    assert sum(storage.get(account)["coins"] for account in accounts) == 500


PROCESS = """
import sys
from session_sync import SessionManager, storage_from_url

with SessionManager(storage=storage_from_url(sys.argv[1]), lock_timeout=20) as sessions:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(100):
        with sessions.session_scopes(*sys.argv[2:]) as (giver, taker):
            giver.coins = giver.get("coins", 100) - 1
            taker.coins = taker.get("coins", 100) + 1
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has such locks")
@pytest.mark.parametrize("kind", ["sqlite", "disk", "redis"])
def test_nor_do_those_of_several_processes(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "redis":
        url = request.getfixturevalue("redis_url") + f"?prefix={random.getrandbits(64)}:"
    else:
        url = f"{kind}:///{tmp_path}/sessions"
    keys = ["user:1", "user:2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, url, *order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in (keys, keys[::-1])
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        with process:
            assert process.wait(60) == 0
    storage = storage_from_url(url)
    assert storage.get("user:1") == storage.get("user:2") == {"coins": 100}
    storage.close()  # type: ignore[attr-defined] # all of them have it


def test_one_that_is_not_free_in_time_leaves_the_others_free() -> None:
    sessions = SessionManager(lock_timeout=0.05)
    with sessions.session_scope("user:2"):
        with pytest.raises(ExceptionGroup) as caught:
            _run_in_thread(lambda: sessions.session_scopes("user:1", "user:2").__enter__())
    assert caught.group_contains(SessionLockTimeoutError, match="user:2")
    with sessions.session_scopes("user:1", "user:2") as (one, _two):
        one.coins = 1


def _run_in_thread(work: Any) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(SOON)
    if errors:
        raise ExceptionGroup("in the thread", errors)


def test_blocks_nested_by_hand_have_no_such_order(threads: Threads) -> None:
    sessions = SessionManager(lock_timeout=SOON)
    both = threading.Barrier(2)
    refused = []

    def nested(first: str, second: str) -> None:
        try:
            with sessions.session_scope(first):
                both.wait(SOON)
                with sessions.session_scope(second):
                    pass
        except SessionDeadlockError as error:
            refused.append(error)

    threads.start(nested, "user:1", "user:2")
    threads.start(nested, "user:2", "user:1")
    threads.join()
    assert len(refused) == 1


# -- all or none


def test_a_block_that_raises_leaves_all_as_they_were(strict: Any) -> None:
    sessions = SessionManager(storage=strict)
    with sessions.session_scopes("user:1", "user:2") as (one, two):
        one.coins = two.coins = 10
    with (
        pytest.raises(ZeroDivisionError),
        sessions.session_scopes("user:1", "user:2") as (one, two),
    ):
        one.coins = two.coins = 11
        raise ZeroDivisionError
    assert strict.get("user:1") == strict.get("user:2") == {"coins": 10}


def put_object(session: Any) -> None:
    """What no store keeps, in a list of the handler's own, which is looked at as it is saved."""
    session.coins = mine = []
    mine.append(object())


@pytest.mark.parametrize("on_error", ["discard", "flush"])
@pytest.mark.parametrize("bad", ["user:1", "user:2"])
def test_what_one_cannot_keep_leaves_all_as_they_were(strict: Any, bad: str, on_error: Any) -> None:
    sessions = SessionManager(storage=strict, on_error=on_error)
    strict.set("user:1", {"coins": 10})
    with pytest.raises(SessionEncodeError, match="coins"):
        with sessions.session_scopes("user:1", "user:2") as both:
            for session in both:
                session.coins = 11
                if session.key == bad:
                    put_object(session)
    assert strict.get("user:1") == {"coins": 10}
    assert strict.get("user:2") is None
    assert {session.key: dict(session) for session in both} == {
        "user:1": {"coins": 10},
        "user:2": {},
    }
    with sessions.session_scopes("user:1", "user:2") as (one, two):  # which are free again
        one.coins, two.coins = 12, 13
    assert (strict.get("user:1"), strict.get("user:2")) == ({"coins": 12}, {"coins": 13})


class Stop(Exception):  # noqa: N818 (named as the framework has it)
    """As a framework has one that says what comes next."""


Stop.__name__, Stop.__module__ = "ApplicationHandlerStop", "telegram.ext"


@pytest.mark.parametrize("how", ["with", "async with"])
@pytest.mark.parametrize(("on_error", "raised"), [("flush", ZeroDivisionError), ("discard", Stop)])
def test_so_it_is_where_the_block_raises_and_is_saved_all_the_same(
    strict: Any, on_error: Any, raised: type[Exception], how: str
) -> None:
    sessions = SessionManager(storage=strict, on_error=on_error)

    def change(both: Any, is_bad: bool) -> None:
        for session in both:
            session.coins = 11
            if session.key == "user:1" and is_bad:
                put_object(session)
        raise raised

    async def achange(is_bad: bool) -> None:
        async with sessions.session_scopes("user:1", "user:2") as both:
            change(both, is_bad)

    def change_both(is_bad: bool) -> None:
        if how == "async with":
            asyncio.run(achange(is_bad))
        with sessions.session_scopes("user:1", "user:2") as both:
            change(both, is_bad)

    with pytest.raises(SessionEncodeError):
        change_both(True)
    assert strict.get("user:1") is strict.get("user:2") is None
    with pytest.raises(raised):
        change_both(False)
    assert strict.get("user:1") == strict.get("user:2") == {"coins": 11}


@pytest.mark.parametrize("kind", ["sqlite", "disk"])
@pytest.mark.parametrize("event", ["INSERT", "DELETE"])
def test_a_store_that_fails_half_way_takes_nothing(kind: str, event: str, tmp_path: Path) -> None:
    storage: Any = storage_from_url(f"{kind}:///{tmp_path}/sessions")
    for key in ("user:1", "user:2"):
        storage.set(key, {"coins": 10})
    sessions = SessionManager(storage=storage)
    file, table = ("sessions", "sessions") if kind == "sqlite" else ("sessions/cache.db", "Cache")
    row = "NEW" if event == "INSERT" else "OLD"
    with sqlite3.connect(tmp_path / file) as connection:
        connection.execute(
            f"CREATE TRIGGER broken BEFORE {event} ON {table} WHEN {row}.key = 'user:2'"
            f"BEGIN SELECT RAISE(ABORT, 'broken'); END"
        )
    connection.close()
    with pytest.raises(sqlite3.IntegrityError, match="broken"):
        with sessions.session_scopes("user:1", "user:2") as (one, two):
            one.coins = 11
            two.coins = 11
            if event == "DELETE":
                two.clear()
    assert storage.get("user:1") == storage.get("user:2") == {"coins": 10}
    storage.close()


@pytest.mark.parametrize("kind", ["sqlite", "disk"])
@pytest.mark.parametrize("statement", ["BEGIN", "first", "second"])
def test_an_interrupt_half_way_leaves_no_transaction_behind(
    kind: str, statement: str, tmp_path: Path
) -> None:
    storage: Any = storage_from_url(f"{kind}:///{tmp_path}/sessions")
    sessions = SessionManager(storage=storage)
    left = ["BEGIN", "first", "second"].index(statement)

    def interrupt(_frame: Any, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_return" and function.__name__ == "execute":
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with sessions.session_scopes("user:1", "user:2") as (one, two):
            one.coins = two.coins = 1
            sys.setprofile(interrupt)
    assert storage.get("user:1") is storage.get("user:2") is None
    with sessions.session_scope("user:3") as three:
        three.coins = 1
    other: Any = storage_from_url(f"{kind}:///{tmp_path}/sessions")
    assert other.get("user:3") == {"coins": 1}
    other.close()
    storage.close()


def test_a_chat_moves_all_at_once_or_not_at_all(tmp_path: Path) -> None:
    storage: Any = storage_from_url(f"sqlite:///{tmp_path}/sessions")
    sessions = SessionManager(storage=storage)
    storage.set("user:2:chat:-1", {"coins": 1})
    with sqlite3.connect(tmp_path / "sessions") as connection:
        connection.execute(
            "CREATE TRIGGER broken BEFORE DELETE ON sessions "
            "BEGIN SELECT RAISE(ABORT, 'broken'); END"
        )
    connection.close()
    with pytest.raises(sqlite3.IntegrityError, match="broken"):
        sessions.migrate_chat(-1, -100)
    assert list(storage.keys()) == ["user:2:chat:-1"]
    storage.close()


def test_a_lease_that_one_has_lost_leaves_all_as_they_were(redis_url: str) -> None:
    import redis

    prefix = f"{random.getrandbits(64)}:"
    storage: Any = storage_from_url(f"{redis_url}?prefix={prefix}")
    sessions = SessionManager(storage=storage)
    with redis.Redis.from_url(redis_url) as client:
        for lost in ("user:1", "user:2"):
            with pytest.raises(SessionConflictError, match=lost):
                with sessions.session_scopes("user:2", "user:1") as (two, one):
                    one.coins = two.coins = 1
                    client.delete(f"{prefix}{{{lost}}}:lock")
            assert storage.get("user:1") is storage.get("user:2") is None
    with sessions.session_scopes("user:2", "user:1") as (two, one):
        one.coins = two.coins = 1
        one.flush()
        one.coins = 2
    assert (storage.get("user:1"), storage.get("user:2")) == ({"coins": 2}, {"coins": 1})
    storage.close()


def test_life_times_begin_anew(redis_url: str) -> None:
    import redis

    sessions = SessionManager(storage=storage_from_url(f"{redis_url}?prefix=life:&ttl=100"))
    with sessions, sessions.session_scopes("user:1", "user:2") as (one, two):
        one.coins = two.coins = 1
    with redis.Redis.from_url(redis_url) as client:
        assert 90_000 < client.pttl("life:{user:1}") <= 100_000


def test_an_adapter_gets_them_one_by_one_and_says_which_it_has() -> None:
    storage = Plain()
    sessions = SessionManager(storage=storage)
    storage.broken = "user:1"
    with pytest.raises(OSError, match="full") as caught:
        with sessions.session_scopes("user:2", "user:1", "user:3") as all_of_them:
            for session in all_of_them:
                session.coins = 1
    assert storage.kept == {"user:2": {"coins": 1}}
    assert caught.value.__notes__ == [
        "already written, by a store that takes one at a time: 'user:2'"
    ]
    storage.broken = ""
    with sessions.session_scopes("user:2", "user:1") as (two, one):
        two.clear()
        one.coins = 1
    assert storage.kept == {"user:1": {"coins": 1}}
