"""RedisStorage where the server is away, cannot be reached, or is another one now."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Threads
from redis_servers import SERVER, Network, Sentinel, Server, free_port, replica_of, replicate
from waiting import SOON, until

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from redis.backoff import ConstantBackoff  # noqa: E402
from redis.exceptions import AuthenticationError, RedisError, ResponseError  # noqa: E402
from redis.retry import Retry  # noqa: E402

from session_sync import RedisStorage, SessionManager, storage_from_url  # noqa: E402
from session_sync.storages.base import record_of  # noqa: E402
from session_sync.storages.redis import clients as redis_clients  # noqa: E402
from session_sync.storages.redis import connections as lines  # noqa: E402
from session_sync.storages.redis import server as redis_module  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)

ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture
def network(server: Server) -> Iterator[Network]:
    with closing(Network(server)) as network:
        yield network


@pytest.fixture
def storage(network: Network) -> Iterator[RedisStorage]:
    """By its URL, as most bots name it."""
    url = f"redis://127.0.0.1:{network.port}?socket_timeout=2"
    with closing(RedisStorage(url)) as storage:
        storage.open_record("warm up", 0).close(None)
        yield storage


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


def count(sessions: SessionManager[Any], key: str = "key") -> None:
    with sessions.session_scope(key) as session:
        session.n = session.get("n", 0) + 1


# -- away for a moment


def test_a_storage_named_by_its_url_tries_again_as_a_client_does(
    storage: RedisStorage, network: Network
) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    opened = storage.open_record("other", 0)
    for number in range(1, 4):
        network.cut()
        network.refusing = 5
        count(sessions)
        assert network.refusing == 0
        assert storage.get("key") == {"n": number}
    for save in (opened.save, opened.close):
        network.cut()
        network.refusing = 5
        save(record_of({"a": network.made}))
        assert storage.get("other") == {"a": network.made - 6}


def test_a_first_use_waits_for_its_server(server: Server, network: Network) -> None:
    network.refusing = 5
    with closing(RedisStorage(f"redis://127.0.0.1:{network.port}")) as storage:
        count(SessionManager(storage=storage))
        assert storage.get("key") == {"n": 1}


def test_what_needs_no_session_tries_again_too(storage: RedisStorage, network: Network) -> None:
    def after_a_cut(call: Callable[..., Any], *args: Any) -> Any:
        network.cut()
        network.refusing = 5
        return call(*args)

    after_a_cut(storage.set, "key", {"a": 1})
    assert after_a_cut(storage.get, "key") == {"a": 1}
    assert after_a_cut(storage.has, "key")
    after_a_cut(storage.delete, "key")
    opened: Any = {key: storage.open_record(key, 0) for key in "ab"}
    assert after_a_cut(storage.save_all, dict.fromkeys("ab", record_of({"n": 1})), opened)
    assert [storage.get(key) for key in "ab"] == [{"n": 1}, {"n": 1}]


def test_a_wrong_password_is_not_tried_again(server: Server, network: Network) -> None:
    with closing(server.client()) as client:
        client.config_set("requirepass", "right")
    with closing(RedisStorage(f"redis://:wrong@127.0.0.1:{network.port}")) as storage:
        with pytest.raises(AuthenticationError):
            storage.open_record("key", SOON)
    assert network.made == 1


def test_a_restart_loses_nothing_that_was_reported_as_saved(
    tmp_path: Path, threads: Threads
) -> None:
    """However long it takes: an update may fail, which is reported, and nothing hangs."""
    port = free_port()
    server = Server(tmp_path / "server", "--port", str(port), *ALWAYS, port=port)
    saved = [0] * 4
    restarted = threading.Event()

    def work(number: int) -> None:
        while not restarted.is_set() or saved[number] < 10:
            with suppress(RedisError):  # only if the server takes seconds to come back
                count(sessions, f"user:{number}")
                saved[number] += 1

    try:
        with closing(RedisStorage(server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            for number in range(4):
                threads.start(work, number)
            until(lambda: all(saved))
            for _ in range(2):
                server.stop()
                server.start()
            restarted.set()
            threads.join(3 * SOON)
            stored = [storage.get(f"user:{number}") for number in range(4)]
        assert [fields["n"] >= n for fields, n in zip(stored, saved, strict=True) if fields] == (
            [True] * 4
        )
    finally:
        server.stop()


# -- connections that lead nowhere


def test_idle_connections_that_a_nat_has_dropped_cost_one_time_out_in_all(
    storage: RedisStorage, network: Network, threads: Threads
) -> None:
    def close_nowait(made: int) -> None:
        """Four records, so that each of them takes a connection."""
        opened = [storage.open_record(f"key:{number}", 0) for number in range(4)]
        with standing_still(network.to):
            for one in opened:
                threads.start(one.close, None)
            until(lambda: network.made == made or len(network.swallowed) > 1)
        threads.join()

    close_nowait(4)
    network.swallow()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    count(sessions)
    assert storage.get("key") == {"n": 1}
    close_nowait(8)
    assert len(network.swallowed) == 1


def test_a_server_that_stands_still_holds_up_nobody_for_ever(
    server: Server, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the options of a client say."""
    monkeypatch.setattr(lines, "TIMEOUT", 0.2)
    monkeypatch.setattr(redis_module, "_PATIENCE", 0.5)
    retry = Retry(ConstantBackoff(0.01), -1)  # without end
    errors: list[Exception] = []

    def use(storage: RedisStorage) -> None:
        try:
            storage.open_record("key", 0)
        except RedisError as error:
            errors.append(error)

    client = server.client(socket_timeout=None, socket_connect_timeout=None, retry=retry)
    with closing(client), closing(RedisStorage(client)) as storage:
        storage.open_record("key", 0).close(None)
        with standing_still(server):
            threads.start(use, storage)
            threads.join(SOON)
    assert [type(error) for error in errors] == [redis.TimeoutError]


# -- another server


class Own(redis.Redis):
    """A client that the storage asks itself, past no pool."""


class Pair(NamedTuple):
    old: Server
    new: Server
    network: Network

    def fail_over(self) -> None:
        """As a service behind one address does: the old primary is a replica now, and keeps its
        connections; new ones go to the new primary."""
        replicate(self.old)
        with closing(self.old.client()) as old, closing(self.new.client()) as new:
            new.replicaof("NO", "ONE")
            old.replicaof("127.0.0.1", self.new.port)
            self.network.to = self.new


@pytest.fixture
def pair(server: Server, network: Network, tmp_path: Path) -> Iterator[Pair]:
    new = replica_of(tmp_path / "new", server)
    yield Pair(server, new, network)
    new.stop()


def by_url(network: Network) -> Any:
    return f"redis://127.0.0.1:{network.port}"


def by_client(network: Network) -> Any:
    return redis.Redis(port=network.port)


def by_client_without_retries(network: Network) -> Any:
    return redis.Redis.from_url(by_url(network))


def by_own_client(network: Network) -> Any:
    return Own(port=network.port)


@pytest.mark.parametrize("make", [by_url, by_client, by_client_without_retries, by_own_client])
def test_after_a_failover_the_new_primary_is_asked(
    pair: Pair, make: Callable[[Network], Any]
) -> None:
    with closing(RedisStorage(make(pair.network))) as storage:
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        count(sessions)
        opened = storage.open_record("opened before", 0)
        closed = storage.open_record("closed after", 0)
        pair.fail_over()
        opened.save(record_of({"a": 1}))
        closed.close(record_of({"a": 1}))
        count(sessions)
        storage.set("set", {"a": 1})
        assert storage.get("key") == {"n": 2}
        assert [storage.get(key) for key in ("opened before", "closed after", "set")] == (
            [{"a": 1}] * 3
        )
        opened.close(record_of({"a": 2}))
        assert storage.get("opened before") == {"a": 2}


def test_after_a_failover_leases_are_renewed_by_the_new_primary(pair: Pair) -> None:
    with closing(RedisStorage(by_url(pair.network), lease=3)) as storage:
        with closing(pair.new.client()) as new:
            opened: Any = storage.open_record("key", 0)
            opened.keeper.renew([opened])  # over a connection that leads to the old one later
            pair.fail_over()
            new.pexpire("{key}:lock", 60_000)  # the test is not to be in time
            until(lambda: 0 < new.pttl("{key}:lock") <= 3000)
            opened.close(record_of({"a": 1}))
        assert storage.get("key") == {"a": 1}


def test_after_a_failover_waiters_are_woken_by_the_new_primary(
    pair: Pair, threads: Threads
) -> None:
    url = by_url(pair.network)
    with closing(RedisStorage(url)) as holder, closing(RedisStorage(url)) as waiter:
        opened = holder.open_record("key", 0)
        threads.start(lambda: waiter.open_record("key", SOON).close(record_of({"a": 2})))
        with closing(pair.old.client()) as old:
            until(lambda: old.exists("{key}:queue"))
        pair.fail_over()
        opened.close(record_of({"a": 1}))
        threads.join()
        assert holder.get("key") == {"a": 2}


def test_a_coroutine_does_not_wait_in_place_for_a_failover(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tried again takes time, and is done in a thread."""
    monkeypatch.setattr(lines, "_MOMENT", SOON)
    with closing(RedisStorage(by_url(pair.network))) as storage:
        storage.open_record("warm up", 0).close(None)
        opened: Any = storage.open_record("key", 0)
        pair.fail_over()
        made = pair.network.made
        assert not opened.close_nowait(record_of({"a": 1}))
        assert pair.network.made == made
        opened.close(record_of({"a": 1}))
        assert storage.get("key") == {"a": 1}


@pytest.mark.parametrize(
    "said",
    [
        "READONLY You can't write against a read only replica.",
        "ERR Error running script (call to f_e1): @user_script:7: @user_script: 7: -READONLY You "
        "can't write against a read only replica. ",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    ],
)
def test_servers_of_all_versions_say_that_they_are_replicas(said: str) -> None:
    assert redis_clients.is_from_replica(ResponseError(said))
    assert not redis_clients.is_from_replica(ResponseError("ERR no such key: 'READONLY'"))


# -- Sentinel


def test_by_sentinel_a_primary_that_dies_costs_nothing_that_was_saved(
    server: Server, tmp_path: Path, threads: Threads
) -> None:
    replica = replica_of(tmp_path / "replica", server)
    sentinel = Sentinel(tmp_path / "sentinel", server, "mymaster")
    try:
        until(sentinel.knows_replicas)
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/mymaster/0?lease=60"
        with closing(storage_from_url(url)) as storage:  # type: ignore[type-var]
            assert isinstance(storage, RedisStorage)
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            for _ in range(3):
                count(sessions)
            opened = storage.open_record("other", 0)
            replicate(server)
            server.stop()
            until(lambda: counted(sessions))
            until(lambda: closed(opened))
            count(sessions)
            assert storage.get("key") == {"n": 5}
            assert storage.get("other") == {"a": 1}
            assert sorted(storage.keys()) == ["key", "other"]
            with closing(replica.client()) as client:
                assert client.info("replication")["role"] == "master"
    finally:
        sentinel.stop()
        replica.stop()


def counted(sessions: SessionManager[Any]) -> bool:
    """Whether an update was handled; nobody knows how long Sentinel takes on a busy machine."""
    try:
        count(sessions)
    except RedisError:
        return False
    return True


def closed(opened: Any) -> bool:
    try:
        opened.close(record_of({"a": 1}))
    except RedisError:
        return False
    return True


# -- renewals that fail


def test_a_renewal_that_fails_is_logged_when_it_fails_and_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def failures() -> list[str]:
        return [r.getMessage() for r in caplog.records if "cannot be renewed" in r.getMessage()]

    with closing(RedisStorage(server.url, lease=60)) as storage:
        with closing(server.client()) as client, caplog.at_level(logging.WARNING, "session_sync"):
            opened: list[Any] = [storage.open_record(key, 0) for key in ("user:1", "user:2")]
            client.acl_setuser("default", enabled=True, commands=["-eval"])
            for _ in range(3):
                assert opened[0].keeper.renew(opened) == {}
            (said,) = failures()
            assert "'user:1' (and of 1 more)" in said
            assert "NoPermissionError" in said
            assert "+eval " in said
            client.acl_setuser("default", enabled=True, commands=["+eval"])
            assert all(opened[0].keeper.renew(opened).values())
            server.stop()
            for _ in range(3):
                assert opened[0].keeper.renew(opened) == {}
            assert "ConnectionError" in failures()[1]
            assert len(failures()) == 2
