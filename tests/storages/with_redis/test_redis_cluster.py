"""Sessions in a Redis cluster, and through TLS."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import redis_tools
from conftest import Threads
from redis_servers import SERVER, Server, certificate, free_port
from redis_tools import SOON, Make, fields, put
from waiting import until

from session_sync import SessionDeadlockError, SessionLockTimeoutError, SessionManager
from session_sync.storages.base import record_of

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
from redis.cluster import RedisCluster  # noqa: E402
from redis.crc import key_slot  # noqa: E402

from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)
shared_server = pytest.fixture(scope="module")(redis_tools.make_shared_server)
server = pytest.fixture(redis_tools.make_server)
client = pytest.fixture(redis_tools.make_client)
make = pytest.fixture(redis_tools.maker)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three primaries that have a third of the slots each."""
    nodes = []
    for number in range(3):
        folder = tmp_path_factory.mktemp(f"node{number}")
        port, bus = free_port(), free_port()
        options = ["--port", str(port), "--cluster-port", str(bus), "--cluster-enabled", "yes"]
        nodes.append(Server(folder, *options, port=port))
        nodes[-1].bus = bus  # type: ignore[attr-defined]
    clients = [node.client() for node in nodes]
    bounds = [0, 5461, 10923, 16384]
    for number, client in enumerate(clients):
        client.execute_command("CLUSTER ADDSLOTS", *range(bounds[number], bounds[number + 1]))
        for node in nodes:
            client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, node.bus)  # type: ignore[attr-defined]

    def ready(client: Any) -> bool:
        info = str(client.execute_command("CLUSTER INFO"))
        nodes = re.search(r"cluster_known_nodes'?:\W*(\d)", info)
        return bool(re.search(r"cluster_state'?:\W*ok", info) and nodes and nodes[1] == "3")

    until(lambda: all(map(ready, clients)))
    for client in clients:
        client.close()
    yield nodes
    for node in nodes:
        node.stop()


@pytest.fixture(params=["client", "url"])
def clustered(
    request: pytest.FixtureRequest, cluster: list[Server]
) -> Iterator[Callable[..., RedisStorage]]:
    made: list[Any] = []
    port = cluster[0].port

    def make(**options: Any) -> RedisStorage:
        if request.param == "url":
            made.append(RedisStorage(f"redis+cluster://127.0.0.1:{port}", **options))
            return made[-1]
        made.append(RedisCluster("127.0.0.1", port))
        return RedisStorage(made[-1], **options)

    yield make
    make()._client.flushall(target_nodes="primaries")
    for one in made:
        one.close()


class TestCluster:
    def test_a_storage_that_was_made_for_one_server_says_how_to_name_a_cluster(
        self, cluster: list[Server], make: Make
    ) -> None:
        storage = make(cluster[0].url)
        elsewhere = next(
            key for key in map(str, range(99)) if key_slot(b"{%s}" % key.encode()) > 5460
        )
        for use in (lambda: storage.open_record(elsewhere, 0), lambda: storage.get(elsewhere)):
            with pytest.raises(redis.ResponseError, match=rf"'{elsewhere}'.* redis\+cluster://"):
                use()

    def test_keeps_what_it_is_given(self, clustered: Callable[..., RedisStorage]) -> None:
        storage = clustered(ttl=60)
        keys = [f"user:{n}" for n in range(50)] + ["a{b}c", ""]
        for key in keys:
            storage.set(key, {"key": key})
            opened = storage.open_record(key, 0)
            assert fields(opened) == {"key": key}
            opened.save(record_of({"key": key, "n": 1}))
            opened.close(record_of({"key": key, "n": 2}))
        assert sorted(storage.keys()) == sorted(keys)
        assert sorted(entry.key for entry in storage.entries()) == sorted(keys)
        assert all(entry.size and entry.left for entry in storage.entries())
        opened = storage.open_record(keys[0], 0)
        assert [lock.key for lock in storage.locks()] == [keys[0]]
        opened.close(None)
        assert len(storage.info()) == 3
        for key in keys:
            storage.touch(key)
            assert storage.has(key)
            assert storage.get(key) == {"key": key, "n": 2}
            storage.delete(key)
        assert list(storage.keys()) == []

    def test_excludes_and_hands_on(
        self, clustered: Callable[..., RedisStorage], threads: Threads
    ) -> None:
        def work(sessions: SessionManager[Any]) -> None:
            for n in range(40):
                with sessions.session_scope(f"key:{n % 3}") as session:
                    session.counter = session.get("counter", 0) + 1

        managers: list[SessionManager[Any]] = [
            SessionManager(storage=clustered()) for _ in range(3)
        ]
        for sessions in managers:
            threads.start(work, sessions)
        threads.join()
        storage = managers[0].storage
        assert sum(storage.get(f"key:{n}")["counter"] for n in range(3)) == 120

    def test_is_one_store_for_all_objects_of_a_url(self, cluster: list[Server]) -> None:
        url = f"redis+cluster://127.0.0.1:{cluster[0].port}"
        with (
            SessionManager(storage=RedisStorage(url)) as one,
            SessionManager(storage=RedisStorage(f"{url.upper()}?socket_timeout=3")) as other,
            SessionManager(storage=RedisStorage(url, prefix="bot:")) as another,
            one.session_scope("key"),
        ):
            with pytest.raises(SessionDeadlockError, match="'key'"), other.session_scope("key"):
                raise AssertionError("both have it")
            with another.session_scope("key"):
                pass

    def test_of_another_name_is_another_store(self, cluster: list[Server]) -> None:
        """It may be another cluster, for all that is known."""
        urls = [f"redis+cluster://127.0.0.1:{server.port}" for server in cluster]
        with ExitStack() as stack:
            stores = [stack.enter_context(closing(RedisStorage(url))).store for url in urls]
        assert len(set(stores)) == len(urls)

    def test_renews_leases_on_all_nodes(self, clustered: Callable[..., RedisStorage]) -> None:
        storage = clustered(lease=0.5)
        opened = [storage.open_record(f"key:{n}", 0) for n in range(9)]
        with pytest.raises(SessionLockTimeoutError):
            clustered().open_record("key:0", 1.0)
        for one in opened:
            one.close(record_of({"a": 1}))
        assert len(list(storage.keys())) == 9

    def test_goes_where_a_session_has_moved(
        self, clustered: Callable[..., RedisStorage], cluster: list[Server], threads: Threads
    ) -> None:
        storage, other = clustered(lease=0.5), clustered()
        opened = storage.open_record("key", 0)
        opened.save(record_of({"a": 1}))
        with pytest.raises(SessionLockTimeoutError):
            other.open_record("key", 0)
        move(cluster, key_slot(b"{key}"))
        threads.start(lambda: put(other, "key", a=3))
        with pytest.raises(SessionLockTimeoutError):  # its lease is renewed at the new place
            clustered().open_record("key", 1.0)
        opened.close(record_of({"a": 2}))
        threads.join()
        assert storage.get("key") == {"a": 3}


def move(cluster: list[Server], slot: int) -> None:
    """A slot of the cluster to the next node, with all that is in it."""
    clients = [node.client() for node in cluster]
    ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
    old = next(n for n, client in enumerate(clients) if owns(client, slot))
    new = (old + 1) % 3
    clients[new].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[old])
    clients[old].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[new])
    while names := clients[old].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        clients[old].migrate("127.0.0.1", cluster[new].port, names, 0, 5000)
    for client in (clients[new], clients[old], *clients):
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[new])
    for client in clients:
        client.close()


def owns(client: Any, slot: int) -> bool:
    """Whether the node of `client` answers for `slot`."""
    name = next(f"{{{n}}}" for n in range(10**6) if key_slot(f"{{{n}}}".encode()) == slot)
    try:
        client.get(name)
    except redis.ResponseError:  # MOVED
        return False
    return True


class TestTls:
    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[Server]:
        public, private = map(str, certificate(tmp_path))
        port = free_port()
        server = Server(
            tmp_path / "tls",
            *("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", public, "--tls-key-file", private, "--requirepass", "pass word"),
            port=port,
            ssl=True,
            ssl_ca_certs=public,
            password="pass word",
        )
        server.url = f"rediss://:pass%20word@127.0.0.1:{port}/2?ssl_ca_certs={public}"
        yield server
        server.stop()

    def test_and_a_password_come_by_url(self, guarded: Server, threads: Threads) -> None:
        with closing(RedisStorage(guarded.url)) as one, closing(RedisStorage(guarded.url)) as two:
            opened = one.open_record("key", 0)
            waiter = threads.start(lambda: put(two, "key", a=2))
            time.sleep(0.05)
            opened.close(record_of({"a": 1}))
            waiter.join(SOON)
            assert one.get("key") == {"a": 2}

    def test_a_wrong_password_is_told_and_not_shown(self, server: Server, make: Make) -> None:
        storage = make(f"redis://bot:hunter2@127.0.0.1:{server.port}")
        with pytest.raises(redis.AuthenticationError) as it:
            storage.open_record("key", 0)
        assert "hunter2" not in str(it.value)
