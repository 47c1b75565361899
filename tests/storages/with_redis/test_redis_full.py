"""Redis servers that are full, that evict, that start anew; and what an operator asks of them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis_tools
from conftest import Threads
from redis_servers import SERVER, Server
from redis_tools import LIMITED, SOON, Make, fields, forbid, put

from session_sync import (
    SessionConflictError,
    SessionDecodeError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.storages.base import record_of

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
from redis.backoff import ConstantBackoff  # noqa: E402
from redis.exceptions import OutOfMemoryError  # noqa: E402
from redis.retry import Retry  # noqa: E402

from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)
shared_server = pytest.fixture(scope="module")(redis_tools.make_shared_server)
server = pytest.fixture(redis_tools.make_server)
own_server = pytest.fixture(redis_tools.make_own_server)
client = pytest.fixture(redis_tools.make_client)
make = pytest.fixture(redis_tools.maker)
storage = pytest.fixture(redis_tools.make_storage)


# -- what an operator asks


def test_entries_tell_what_the_server_knows_and_touch_nothing(make: Make, client: Any) -> None:
    storage = make(ttl=1000, prefix="bot:")
    for number in range(1200):
        storage.set(f"user:{number}", {"a": 1})
    storage.set("large", {"a": "x" * 5000})
    client.set("other", "x" * 9000)
    client.restore("bot:{old}", 400_000, client.dump("bot:{large}"), idletime=500)
    for _ in range(2):
        entries = {entry.key: entry for entry in storage.entries()}
        assert len(entries) == 1202
        assert 5000 < entries["large"].size < 9000
        assert entries["user:7"].size < 500
        assert 500 <= entries["old"].age <= 560
        assert 340 < entries["old"].left <= 400
        assert 940 < entries["large"].left <= 1000
    storage.get("old")
    (age,) = (entry.age for entry in storage.entries() if entry.key == "old")
    assert age is not None
    assert age < 60
    client.config_set("maxmemory-policy", "allkeys-lfu")
    try:
        assert {entry.age for entry in storage.entries()} == {None}
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert [entry.left for entry in make(prefix="none:").entries()] == []


def test_locks_tell_who_has_a_session_open(make: Make, client: Any) -> None:
    storage = make(lease=20)
    opened = storage.open_record("user:1{%}", SOON)
    client.set("{user:2}:lock", "mine")
    client.set("{user:3}:lock", "mine", px=60_000)
    found = {lock.key: lock for lock in storage.locks()}
    assert found.keys() == {"user:1{%}", "user:2", "user:3"}
    ours = found["user:1{%}"]
    assert (ours.host, ours.pid) == (platform.node(), os.getpid())
    assert 0 <= ours.seconds < 60
    assert 0 < ours.left <= 20
    assert not ours.is_left_over()
    assert found["user:2"][1:] == (None, None, None, None)
    assert 0 < found["user:3"].left <= 60
    opened.close(None)
    assert {lock.key for lock in storage.locks()} == {"user:2", "user:3"}


def test_a_lock_of_a_process_that_is_gone_is_left_over(make: Make) -> None:
    storage = make()
    opened = storage.open_record("user:1", SOON)
    (lock,) = storage.locks()
    opened.close(None)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        of_another = lock._replace(pid=process.pid)
        assert not of_another.is_left_over()
        process.kill()
    assert of_another.is_left_over()
    assert not of_another._replace(host="elsewhere").is_left_over()
    assert not of_another._replace(pid=None).is_left_over()


def test_what_cannot_be_read_can_be_opened_to_be_removed(make: Make, client: Any) -> None:
    storage, other = make(), make()
    client.set("{user:1}", b"nonsense")
    with pytest.raises(SessionDecodeError):
        storage.open_record("user:1", SOON)
    opened = storage.open_unread("user:1", SOON)
    with pytest.raises(SessionLockTimeoutError):
        other.open_unread("user:1", 0)
    opened.close(record_of({}))
    assert not storage.has("user:1")
    other.open_unread("user:1", SOON).close(None)
    client.lpush("{user:2}", b"x")
    with pytest.raises(SessionDecodeError):
        storage.open_unread("user:2", SOON)


def test_info_is_that_of_the_server(make: Make) -> None:
    (info,) = make().info()
    assert info["maxmemory_policy"] == "noeviction"
    assert "redis_version" in info
    (memory,) = make().info("memory")
    assert "redis_version" not in memory


# -- servers that are full, gone, clustered, guarded


class TestFullMemory:
    def test_frees_the_key_and_says_so(
        self, storage: RedisStorage, client: Any, make: Make
    ) -> None:
        put(storage, "key", a=1)
        opened = storage.open_record("key", 0)
        client.config_set("maxmemory", 1)
        with pytest.raises(OutOfMemoryError):
            opened.save(record_of({"a": 2}))
        for _ in range(2):  # also if it is sent again
            with pytest.raises(OutOfMemoryError):
                opened.close(record_of({"a": 3}))
        assert not client.exists("{key}:lock")
        client.config_set("maxmemory", 0)
        opened = make().open_record("key", 0)
        assert fields(opened) == {"a": 1}
        opened.close(None)

    def test_lets_sessions_be_emptied(self, storage: RedisStorage, client: Any) -> None:
        put(storage, "key", a=1)
        opened = storage.open_record("key", 0)
        client.config_set("maxmemory", 1)
        opened.close(record_of({}))
        assert not client.exists("{key}")

    def test_hands_the_key_to_who_waits(self, make: Make, client: Any, threads: Threads) -> None:
        opened, waiter = make().open_record("key", 0), make()
        with pytest.raises(SessionLockTimeoutError):
            waiter.open_record("key", 0)
        client.config_set("maxmemory", 1)
        with pytest.raises(OutOfMemoryError):
            opened.close(record_of({"a": 3}))
        waiter.open_record("key", 0).close(None)


class TestEviction:
    @pytest.fixture
    def evicting(self, client: Any) -> Iterator[None]:
        client.config_set("maxmemory-policy", "allkeys-lru")
        yield
        client.config_set("maxmemory-policy", "noeviction")

    @pytest.mark.usefixtures("evicting")
    def test_is_warned_of_once(self, storage: RedisStorage) -> None:
        with pytest.warns(RuntimeWarning, match=r"allkeys-lru: .*drops sessions.*noeviction"):
            storage.open_record("a", 0).close(None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            storage.open_record("b", 0).close(None)

    @pytest.mark.usefixtures("evicting")
    def test_is_not_asked_for_where_that_is_forbidden(
        self, make: Make, client: Any, server: Server
    ) -> None:
        forbid(client, "info")
        storage = make(server.client(**LIMITED))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            storage.open_record("a", 0).close(None)


class TestRestart:
    def test_goes_on_and_says_what_was_lost(self, own_server: Server) -> None:
        with closing(RedisStorage(own_server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            with sessions.session_scope("key") as session:
                session.a = 1
            with pytest.raises(SessionConflictError, match="restart"):
                with sessions.session_scope("key") as session:
                    own_server.stop()
                    own_server.start()
                    session.a = 2
            with sessions.session_scope("key") as session:
                assert session == {}
                session.a = 3
            assert storage.get("key") == {"a": 3}

    def test_a_server_that_stands_still_loses_and_doubles_nothing(
        self, own_server: Server, threads: Threads
    ) -> None:
        """It answers no more, and then does all that it was asked meanwhile."""
        client = own_server.client(
            socket_timeout=0.1,
            retry=Retry(ConstantBackoff(0.01), 50),
            retry_on_error=[redis.TimeoutError],
        )
        storage = RedisStorage(client)
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        with sessions.session_scope("key") as session:
            session.n = 0
        done = threading.Event()

        def disturb() -> None:
            while not done.wait(0.02):
                own_server.signal(signal.SIGSTOP)
                time.sleep(0.15)  # more than the time-out
                own_server.signal(signal.SIGCONT)

        threads.start(disturb)
        end, number = time.monotonic() + 2, 0
        while time.monotonic() < end:
            with sessions.session_scope("key") as session:
                session.n += 1
                session.flush()
                session.n += 1
            number += 2
        done.set()
        threads.join()
        assert storage.get("key") == {"n": number}
        storage.close()
        client.close()
