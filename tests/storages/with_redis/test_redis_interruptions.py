"""RedisStorage: whatever comes in between two lines, no key is locked for longer than a lease."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside
from waiting import SOON, until

pytest.importorskip("redis", reason="needs the extra 'redis'")
import redis

from session_sync import RedisStorage, SessionLockTimeoutError
from session_sync.storages import background
from session_sync.storages.base import OpenRecord, record_of
from session_sync.storages.redis import clients as redis_clients
from session_sync.storages.redis import connections as lines
from session_sync.storages.redis import (
    leases,
    names,
    opening,
    records,
    scripts,
    server,
    tokens,
)
from session_sync.storages.redis import storage as redis_module
from session_sync.storages.redis.connections import PendingReply

LEASE = 0.1
STORAGE = (redis_module, names, opening, records, scripts, server, tokens)
HERE = (*STORAGE, redis_clients, lines, leases, background)


@pytest.fixture(autouse=True)
def sockets_of_the_interrupted_are_collected() -> Iterator[None]:
    """What is interrupted just as it connects leaves the socket to the garbage collector, whose
    warning would be blamed on whatever test runs then."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as some:
        some.flushall()
        yield some


@pytest.fixture
def make(redis_url: str, client: redis.Redis) -> Iterator[Callable[..., RedisStorage]]:
    made = []

    def make(lease: float = 30.0) -> RedisStorage:
        made.append(RedisStorage(redis_url, lease=lease))
        made[-1].open_record("warm up", 0).close(None)
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def in_place(storage: RedisStorage, key: str = "key") -> None:
    """As a coroutine opens and closes a record, as long as nothing has to be waited for."""
    opened: Any = storage.open_nowait(key) or storage.open_record(key, SOON)
    a = 0 if opened.record is None else opened.record["a"]
    if not opened.close_nowait(record_of({"a": a + 1})):
        opened.close(record_of({"a": a + 1}))


def in_thread(storage: RedisStorage, key: str = "key") -> None:
    opened = storage.open_record(key, SOON)
    a = 0 if opened.record is None else opened.record["a"]
    opened.save(record_of({"a": a}))
    opened.close(record_of({"a": a + 1}))


@pytest.mark.parametrize("use", [in_place, in_thread])
def test_an_exception_at_any_place_locks_no_key_for_longer_than_a_lease(
    make: Callable[..., RedisStorage], client: redis.Redis, use: Callable[..., None]
) -> None:
    storage, other = make(LEASE), make()
    before = client.info("clients")["connected_clients"]
    for interruption in everywhere(raise_outside, *HERE):
        with contextlib.suppress(OutsideError), interruption:
            use(storage)
        begin = time.monotonic()
        in_thread(other)  # which knows of no token that was kept here
        assert time.monotonic() - begin < 10
        was = other.get("key")
        use(storage)
        assert was is not None
        assert storage.get("key") == {"a": was["a"] + 1}
    here = storage._in_process()
    assert here.begun == {}
    # The server takes a moment to see that a connection was closed.
    until(lambda: client.info("clients")["connected_clients"] < before + 5)


@pytest.mark.parametrize("use", [in_place, in_thread])
def test_a_nested_call_at_any_place_changes_nothing(
    make: Callable[..., RedisStorage], use: Callable[..., None]
) -> None:
    """By a signal handler, or a finaliser, in the thread that is inside."""
    storage = make()
    nested = 0

    def come_in_between() -> None:
        nonlocal nested
        nested += 1
        use(storage, "another")

    count = 0
    for interruption in everywhere(come_in_between, *HERE):
        with interruption:
            use(storage)
        count += 1
    assert storage.get("key") == {"a": count}
    assert storage.get("another") == {"a": nested}


def test_a_time_out_of_a_signal_handler_comes_out(make: Callable[..., RedisStorage]) -> None:
    """Where a failure would otherwise mean to ask again."""
    storage = make(LEASE)

    def raise_time_out() -> None:
        raise TimeoutError("the handler's time is up")

    for interruption in everywhere(raise_time_out, *STORAGE, redis_clients, lines):
        came = False
        try:
            with interruption:
                in_place(storage)
        except TimeoutError:
            came = True
        assert came == interruption.happened
        in_thread(storage)


def test_what_was_begun_long_ago_is_asked_again(
    make: Callable[..., RedisStorage], client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception came in before anybody went on with it, and its lease is over since."""
    storage, other = make(), make()
    storage.set("key", {"a": 1})
    with monkeypatch.context() as slow:
        slow.setattr(PendingReply, "is_ready", lambda asked: False)
        assert storage.open_nowait("key") is None
    here = storage._in_process()
    opened, asked = here.begun["key"]
    until(asked.is_ready)
    with pytest.raises(SessionLockTimeoutError):
        other.open_record("key", 0)
    client.delete("{key}:lock")  # as the end of the lease does
    other.open_record("key", SOON).close(record_of({"a": 2}))
    opened.due = time.monotonic()
    again: Any = storage.open_nowait("key") or storage.open_record("key", 0)
    assert dict(again.record) == {"a": 2}
    again.close(record_of({"a": 3}))
    assert other.get("key") == {"a": 3}


def test_what_was_begun_while_another_one_has_the_key_goes_on_with_waiting(
    make: Callable[..., RedisStorage],
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    threads: Threads,
) -> None:
    storage, other = make(), make()
    held = other.open_record("key", SOON)
    monkeypatch.setattr(PendingReply, "is_ready", lambda asked: False)
    assert storage.open_nowait("key") is None
    opened: list[OpenRecord] = []
    threads.start(lambda: opened.append(storage.open_record("key", SOON)))
    until(lambda: client.info("clients")["blocked_clients"])
    held.close(record_of({"a": 1}))
    threads.join()
    assert opened[0].record == {"a": 1}
    opened[0].close(None)


def test_what_was_begun_and_forgotten_goes_when_others_are_begun(
    make: Callable[..., RedisStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make()
    monkeypatch.setattr(PendingReply, "is_ready", lambda asked: False)
    for number in range(100):
        storage.open_record("warm up", 0).close(None)  # over a connection that is free then
        assert storage.open_nowait(f"key:{number}") is None
        storage._in_process().begun[f"key:{number}"][0].due = 0
    assert len(storage._in_process().begun) == 1
    storage.open_record("key:0", 0).close(None)  # by the token that has it


def test_an_exception_while_it_waits_leaves_all_slots_free(
    make: Callable[..., RedisStorage], client: redis.Redis
) -> None:
    storage = make()
    here = storage._in_process().server
    for interruption in everywhere(raise_outside, *HERE):
        with contextlib.suppress(OutsideError), interruption:
            here.wait(client, b"{key}", b"token", 0.01)
    slots = [here._slots.take() for _ in range(server._WAITS + 1)]
    assert slots.count(None) == 1
