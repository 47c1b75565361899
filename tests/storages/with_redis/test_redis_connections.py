"""Connections to a Redis server: how many, what is sent again, and what comes too late."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
import redis_tools
from conftest import Threads
from redis_servers import SERVER, Server
from redis_tools import Make, Proxy, fields, put
from waiting import until

from session_sync import SessionManager
from session_sync.storages.base import record_of

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: E402
from redis.exceptions import RedisError  # noqa: E402

from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)
shared_server = pytest.fixture(scope="module")(redis_tools.make_shared_server)
server = pytest.fixture(redis_tools.make_server)
client = pytest.fixture(redis_tools.make_client)
make = pytest.fixture(redis_tools.maker)
storage = pytest.fixture(redis_tools.make_storage)
proxy = pytest.fixture(redis_tools.make_proxy)


# -- connections


def connections(client: Any) -> int:
    return len(client.client_list(_type="normal"))


class TestConnections:
    def test_are_as_many_as_are_needed_at_once(
        self, storage: RedisStorage, client: Any, threads: Threads
    ) -> None:
        put(storage, "key", n=0)
        before = connections(client)
        opened = [storage.open_record(f"key:{n}", 0) for n in range(10)]
        for one in opened:
            one.close(None)
        assert connections(client) == before
        gate = threading.Barrier(4)

        def work(number: int) -> None:
            gate.wait(20)
            for n in range(20):
                put(storage, f"key:{number}", n=n)

        for number in range(4):
            threads.start(work, number)
        threads.join()
        assert connections(client) <= before + 3

    def test_end_with_the_storage_which_may_be_used_again(
        self, client: Any, server: Server
    ) -> None:
        before = connections(client)
        storage = RedisStorage(server.url)
        for _ in range(2):
            put(storage, "key", n=0)
            assert connections(client) > before
            storage.close()
            until(lambda: connections(client) == before)

    def test_that_were_interrupted_answer_nobody_else(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = make()
        for key in "abc":
            put(storage, key, name=key)

        def interrupted(self: Any, **_options: object) -> None:
            raise KeyboardInterrupt  # between the request and its answer

        with monkeypatch.context() as patch:
            patch.setattr(redis.Connection, "read_response", interrupted)
            with pytest.raises(KeyboardInterrupt):
                storage.open_record("a", 0)
        for key in "bca":
            opened = storage.open_record(key, 0)
            assert fields(opened) == {"name": key}
            opened.close(None)

    def test_of_a_client_that_does_more_are_its_own(self, make: Make, server: Server) -> None:
        asked: list[object] = []

        class Client(redis.Redis):
            def execute_command(self, *args: Any, **options: Any) -> Any:
                asked.append(args[0])
                return super().execute_command(*args, **options)

        with closing(Client(port=server.port)) as client:
            storage = make(client)
            put(storage, "key", n=0)
            asked.clear()
            put(storage, "key", n=1)
        assert asked == ["EVALSHA", "EVALSHA"]


# -- requests that are sent again


class TestLostAnswers:
    """redis-py sends again what was not answered."""

    @pytest.fixture
    def storage(self, make: Make, proxy: Proxy) -> RedisStorage:
        storage = make(proxy.client())
        put(storage, "key", n=0)
        return storage

    def test_to_open(self, storage: RedisStorage, proxy: Proxy) -> None:
        proxy.lose_next_answer()
        opened = storage.open_record("key", 0)
        assert fields(opened) == {"n": 0}
        opened.close(record_of({"n": 1}))
        assert proxy.lost == 1
        assert storage.get("key") == {"n": 1}

    def test_to_open_when_it_is_given_up(self, make: Make, proxy: Proxy) -> None:
        storage = make(proxy.client(retries=0))
        put(storage, "key", n=0)
        proxy.lose_next_answer(proxy.lose_next_answer)  # of the new connection, too
        with pytest.raises(RedisConnectionError):
            storage.open_record("key", 0)
        assert proxy.lost == 2
        assert fields(storage.open_record("key", 0)) == {"n": 0}  # the key is ours

    def test_to_save(self, storage: RedisStorage, proxy: Proxy) -> None:
        opened = storage.open_record("key", 0)
        proxy.lose_next_answer()
        opened.save(record_of({"n": 1}))
        assert proxy.lost == 1
        assert storage.get("key") == {"n": 1}
        opened.close(record_of({"n": 2}))

    @pytest.mark.parametrize("record", [{"n": 1}, {}, None])
    def test_to_close(self, storage: RedisStorage, proxy: Proxy, record: Any) -> None:
        opened = storage.open_record("key", 0)
        proxy.lose_next_answer()
        opened.close(None if record is None else record_of(record))
        assert proxy.lost == 1
        assert storage.get("key") == ({"n": 0} if record is None else record or None)

    def test_to_close_when_others_came_before_it_was_sent_again(
        self, make: Make, storage: RedisStorage, proxy: Proxy
    ) -> None:
        other = make()

        def others() -> None:
            for _ in range(3):
                opened = other.open_record("key", 0)
                opened.close(record_of({"n": fields(opened)["n"] + 10}))

        opened = storage.open_record("key", 0)
        proxy.lose_next_answer(others)
        opened.close(record_of({"n": 1}))
        assert proxy.lost == 1
        assert storage.get("key") == {"n": 31}

    @pytest.mark.parametrize("storages", [1, 4])
    def test_again_and_again_lose_and_double_nothing(
        self, make: Make, proxy: Proxy, threads: Threads, storages: int
    ) -> None:
        def work() -> None:
            sessions: SessionManager[Any] = SessionManager(storage=make(proxy.client(retries=10)))
            for _ in range(50):
                with sessions.session_scope("key") as session:
                    session.n = session.get("n", 0) + 1
                    session.flush()
                    session.n += 1

        proxy.lose_each(11)  # more than it takes to connect
        for _ in range(storages):
            threads.start(work)
        threads.join()
        assert proxy.lost > 10
        assert make().get("key") == {"n": storages * 100}


class TestLateRequests:
    """What was sent again may arrive a second time, later."""

    def test_a_save_does_not_overwrite_a_later_one(self, storage: RedisStorage) -> None:
        opened = storage.open_record("key", 0)
        opened.save(record_of({"n": 1}))
        opened.save(record_of({"n": 2}))
        opened.saves = 0  # type: ignore[attr-defined]
        opened.save(record_of({"n": 1}))
        assert storage.get("key") == {"n": 2}
        opened.saves = 0  # type: ignore[attr-defined]
        assert storage.save_all({"key": record_of({"n": 1})}, {"key": opened})  # type: ignore[dict-item]
        assert storage.get("key") == {"n": 2}
        opened.close(None)

    def test_an_open_takes_nothing_that_was_closed(self, make: Make) -> None:
        storage = make()
        opened = storage.open_record("key", 0)
        opened.close(None)
        storage._in_process().tokens.keep("key", opened.token)  # type: ignore[attr-defined]
        with pytest.raises(RedisError, match="over"):
            storage.open_record("key", 0)
        make().open_record("key", 0).close(None)
