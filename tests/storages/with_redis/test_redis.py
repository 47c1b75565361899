"""What is special about sessions in Redis: a lease, two round trips; on real servers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import redis_tools
from conftest import Threads
from redis_servers import SERVER, Server
from redis_tools import HOLD, SOON, Make, Proxy, Start, fields, monitored, put
from waiting import until

from session_sync import (
    SessionConflictError,
    SessionDecodeError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.storages.base import (
    ListableStorage,
    RecordStorage,
    SharedStorage,
    TtlStorage,
    patched,
    record_of,
)
from session_sync.testing import StorageConformance

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
import redis.asyncio as redis_asyncio  # noqa: E402
from redis.crc import key_slot  # noqa: E402

from session_sync.storages.redis import scripts, tokens  # noqa: E402
from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

shared_server = pytest.fixture(scope="module")(redis_tools.make_shared_server)
server = pytest.fixture(redis_tools.make_server)
client = pytest.fixture(redis_tools.make_client)
make = pytest.fixture(redis_tools.maker)
storage = pytest.fixture(redis_tools.make_storage)
start = pytest.fixture(redis_tools.make_start)
proxy = pytest.fixture(redis_tools.make_proxy)


if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)


# -- servers, processes, a bad network


def helpers(client: Any) -> list[bytes]:
    return [name for name in client.scan_iter() if not name.endswith(b"}")]


# -- records


class TestConformance(StorageConformance):
    @pytest.fixture(autouse=True)
    def _makes(self, make: Make) -> None:
        self.make = make

    def make_storage(self) -> Any:
        return self.make(ttl=60, prefix="bot*[1]:")

    def reopen(self, storage: Any) -> Any:
        return self.make_storage()


class TestRecords:
    def test_satisfy_the_protocols(self, storage: RedisStorage) -> None:
        assert isinstance(storage, TtlStorage)
        assert isinstance(storage, ListableStorage)
        assert isinstance(storage, SharedStorage)
        assert not isinstance(storage, RecordStorage)
        assert storage.blocking

    def test_are_what_redis_cli_shows(self, make: Make, client: Any) -> None:
        put(make(prefix="bot:"), "user:1:chat:1", counter=1, tags={"a"})
        assert client.get("bot:{user:1:chat:1}") == b'{"counter":1,"tags":{"$set":["a"]}}'

    def test_are_removed_when_empty(self, storage: RedisStorage, client: Any) -> None:
        put(storage, "key", a=1)
        put(storage, "key")
        assert not client.exists("{key}")

    def test_live_on_when_they_are_used(self, make: Make, client: Any) -> None:
        storage = make(ttl=100)

        def aged() -> bool:
            left: int = client.pttl("{key}")
            client.pexpire("{key}", 50_000)
            return 99_000 < left <= 100_000

        put(storage, "key", a=1)
        assert aged()
        storage.open_record("key", 0).close(None)
        assert aged()
        opened = storage.open_record("key", 0)
        assert aged()
        opened.save(record_of({"a": 2}))
        assert aged()
        opened.close(None)
        storage.touch("key")
        assert aged()
        storage.set("key", {"a": 3})
        assert aged()
        assert storage.get("key") == {"a": 3}
        assert not aged()

    def test_without_a_life_time_stay(self, make: Make, client: Any) -> None:
        make(ttl=1).set("key", {"a": 1})
        put(make(), "key", a=2)
        assert client.pttl("{key}") == -1

    @pytest.mark.parametrize(
        "key", ["", "%", "{", "}", "{}", "a{b}c", "%7B", "%257B", "a\ud800b", "x:lock", "é}:lock"]
    )
    def test_have_any_key_and_all_of_one_in_one_slot(
        self, make: Make, client: Any, key: str
    ) -> None:
        storage = make(prefix="p:")
        opened = storage.open_record(key, 0)
        with pytest.raises(SessionLockTimeoutError):
            make(prefix="p:").open_record(key, 0)
        opened.save(record_of({"a": 1}))
        names = list(client.scan_iter())
        assert len(names) == 4  # data, lock, queue, seen
        assert len({key_slot(name) for name in names}) == 1
        opened.close(None)
        assert list(storage.keys()) == [key]
        assert storage.get(key) == {"a": 1}

    def test_of_others_are_not_listed(self, make: Make, client: Any) -> None:
        for name in ("a", "a}", "{a", "{a{b}", "{%41}", "{}", b"{\xff}", "other:{key}", "{a}b"):
            client.set(name, "x")
        make(prefix="bot:").set("key", {"a": 1})
        assert list(make().keys()) == []
        assert list(make(prefix="bot:").keys()) == ["key"]


class TestForeignValues:
    @pytest.mark.parametrize("value", [b"\x80\x04.", b"nonsense", b"[]", b"{", b"\xff" * 9])
    def test_are_refused_and_left(self, storage: RedisStorage, client: Any, value: bytes) -> None:
        client.set("{key}", value)
        for read in (storage.get, lambda key: storage.open_record(key, 0)):
            with pytest.raises(SessionDecodeError, match="'key'"):
                read("key")
        assert client.get("{key}") == value
        client.delete("{key}")
        assert storage.open_record("key", 0).record is None  # free

    def test_of_another_type_are_refused_and_left(self, storage: RedisStorage, client: Any) -> None:
        client.rpush("{key}", "secret")
        for read in (storage.get, lambda key: storage.open_record(key, 0)):
            with pytest.raises(SessionDecodeError, match=r"'key'.*give the storage a prefix") as it:
                read("key")
            assert "secret" not in str(it.value)
        assert client.lrange("{key}", 0, -1) == [b"secret"]
        assert helpers(client) == []


# -- round trips


class TestRoundTrips:
    @pytest.fixture
    def sessions(self, make: Make) -> SessionManager[Any]:
        sessions: SessionManager[Any] = SessionManager(storage=make(ttl=60))
        with sessions.session_scope("key") as session:  # connected, and the scripts are known
            session.a = 1
            session.flush()
        return sessions

    def test_an_update_that_writes_takes_two(
        self, server: Server, sessions: SessionManager[Any]
    ) -> None:
        with monitored(server) as requests:
            with sessions.session_scope("key") as session:
                session.a += 1
        assert requests == ["EVALSHA", "EVALSHA"]

    def test_one_that_only_reads_takes_two(
        self, server: Server, sessions: SessionManager[Any]
    ) -> None:
        with monitored(server) as requests:
            with sessions.session_scope("key") as session:
                assert session.a == 1
        assert requests == ["EVALSHA", "EVALSHA"]

    def test_ten_of_new_users_and_emptied_ones_take_twenty(
        self, server: Server, sessions: SessionManager[Any]
    ) -> None:
        with monitored(server) as requests:
            for number in range(5):
                with sessions.session_scope(f"user:{number}") as session:
                    session.a = 1
                with sessions.session_scope(f"user:{number}") as session:
                    session.clear()
        assert requests == ["EVALSHA"] * 20

    def test_a_flush_takes_one_more(self, server: Server, sessions: SessionManager[Any]) -> None:
        with monitored(server) as requests:
            with sessions.session_scope("key") as session:
                session.a += 1
                session.flush()
        assert requests == ["EVALSHA"] * 3

    def test_the_servers_own_count_agrees(
        self, client: Any, server: Server, sessions: SessionManager[Any]
    ) -> None:
        client.config_resetstat()
        for _ in range(10):
            with sessions.session_scope("key") as session:
                session.a += 1
        calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
        assert calls["cmdstat_evalsha"] == 20
        from_scripts = {"get", "set", "del", "exists", "time", "pexpire", "zrange"}
        names = {name.removeprefix("cmdstat_").partition("|")[0] for name in calls}
        assert names == from_scripts | {"evalsha", "config"}


# -- the lease


class TestLease:
    def test_is_renewed_while_a_record_is_open(self, make: Make) -> None:
        opened = make(lease=0.5).open_record("key", 0)
        held = r"of this process has it, for [\d.]+ s now"
        with pytest.raises(SessionLockTimeoutError, match=held):
            make().open_record("key", 1.0)
        opened.close(record_of({"a": 1}))
        assert make().get("key") == {"a": 1}

    def test_is_renewed_by_one_thread_for_all(self, make: Make, client: Any) -> None:
        storages = [make(lease=lease) for lease in (0.4, 0.5)]
        opened = [storages[n % 2].open_record(f"key:{n}", 0) for n in range(40)]
        ends = time.monotonic() + 1
        until(lambda: time.monotonic() > ends)  # leases that nobody renews are over by now
        assert len(list(client.scan_iter("*:lock"))) == 40
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("session_sync-renew") == 1
        for one in opened:
            one.close(record_of({"a": 1}))

    def test_that_was_lost_saves_nothing(self, storage: RedisStorage, client: Any) -> None:
        put(storage, "key", a=1)
        for write in ("save", "close"):
            opened = storage.open_record("key", 0)
            client.delete("{key}:lock")
            with pytest.raises(
                SessionConflictError,
                match=r"'key' was not saved, .* lease of 30 s was lost, because .* stood still .*"
                r"longer lease",
            ):
                getattr(opened, write)(record_of({"a": 2}))
            opened.close(None)  # nothing to be saved, nothing to complain about
            assert storage.get("key") == {"a": 1}

    def test_that_somebody_else_has_is_left_to_him(self, make: Make, client: Any) -> None:
        storage, other = make(), make()
        opened = storage.open_record("key", 0)
        client.delete("{key}:lock")
        his = other.open_record("key", 0)
        with pytest.raises(SessionConflictError):
            opened.close(record_of({"a": "mine"}))
        with pytest.raises(SessionLockTimeoutError):
            storage.open_record("key", 0)
        his.close(record_of({"a": "his"}))
        assert storage.get("key") == {"a": "his"}

    def test_of_a_forgotten_record_runs_out(self, make: Make) -> None:
        opened = make(lease=0.3).open_record("key", 0)
        del opened
        make().open_record("key", SOON).close(None)

    def test_of_a_killed_process_runs_out(
        self, make: Make, client: Any, server: Server, start: Start
    ) -> None:
        holder = start(HOLD, f"{server.url}?lease=0.5")
        assert holder.hear() == "holding"
        holder.signal(signal.SIGKILL)
        opened = make().open_record("key", SOON)
        assert fields(opened) == {"by": "holder"}
        opened.close(None)

    def test_of_a_paused_process_is_lost_and_it_overwrites_nothing(
        self, make: Make, server: Server, start: Start
    ) -> None:
        holder = start(HOLD, f"{server.url}?lease=0.5")
        assert holder.hear() == "holding"
        holder.signal(signal.SIGSTOP)
        opened = make().open_record("key", SOON)
        opened.close(patched(opened.record, {"by": "other"}))
        holder.signal(signal.SIGCONT)
        holder.tell()
        assert holder.hear().startswith("SessionConflictError: the session 'key' was not saved")
        holder.end()
        assert make().get("key") == {"by": "other"}

    def test_survives_the_loss_of_a_connection(self, storage: RedisStorage, client: Any) -> None:
        opened = storage.open_record("key", 0)
        client.client_kill_filter(_type="normal", skipme=True)
        opened.close(record_of({"a": 1}))
        assert storage.get("key") == {"a": 1}

    def test_renewals_go_on_after_errors(self, make: Make, proxy: Proxy, client: Any) -> None:
        opened = make(proxy.client(), lease=0.5).open_record("key", 0)
        for _ in range(3):
            proxy.lose_next_answer()
            until(lambda: proxy._before_cut is None)
        ends = time.monotonic() + 0.6
        until(lambda: time.monotonic() > ends)
        opened.close(record_of({"a": 1}))

    @pytest.mark.parametrize("lease", [0, -1, 0.05, float("nan"), float("inf")])
    def test_has_to_be_possible(self, lease: float) -> None:
        with pytest.raises(ValueError, match="lease"):
            RedisStorage("redis://localhost", lease=lease)


class TestNothingIsLeft:
    @pytest.fixture(autouse=True)
    def _forgets_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scripts, "_REMEMBERED", 0.3)

    def test_but_data(self, make: Make, client: Any, threads: Threads) -> None:
        def work(storage: RedisStorage) -> None:
            for number in range(20):
                opened = storage.open_record(f"key:{number % 3}", SOON)
                opened.save(record_of({"n": number}))
                opened.close(record_of({"n": number}))

        for _ in range(4):
            threads.start(work, make(lease=0.3))
        threads.join()
        assert all(client.pttl(name) != -1 for name in helpers(client))
        until(lambda: not helpers(client))
        assert sorted(client.scan_iter()) == [b"{key:0}", b"{key:1}", b"{key:2}"]

    def test_of_those_who_gave_up(self, make: Make, client: Any) -> None:
        opened = make(lease=0.5).open_record("key", 0)
        with pytest.raises(SessionLockTimeoutError):
            make(lease=0.5).open_record("key", 0.1)
        opened.close(None)
        until(lambda: not helpers(client))

    def test_in_this_process(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens, "_LIMIT", 10)
        monkeypatch.setattr(tokens, "_OLD", 0)
        storage, other = make(), make()
        opened = [storage.open_record(f"key:{n}", 0) for n in range(50)]
        for n in range(50):
            with pytest.raises(SessionLockTimeoutError):
                other.open_record(f"key:{n}", 0)
        assert len(other._in_process().tokens._kept) <= 11
        for one in opened:
            one.close(None)


# -- how it is made


class TestMaking:
    def test_refuses_clients_that_decode(self, server: Server) -> None:
        for decoding in (
            server.client(decode_responses=True),
            "redis://localhost?decode_responses=True",
        ):
            with pytest.raises(ValueError, match="decode_responses"):
                RedisStorage(decoding)

    def test_refuses_async_clients(self) -> None:
        with pytest.raises(TypeError, match=r"synchronous.*redis\.asyncio"):
            RedisStorage(redis_asyncio.Redis())  # type: ignore[arg-type]

    def test_refuses_what_is_no_client(self) -> None:
        with pytest.raises(TypeError, match=r"not a builtins\.int"):
            RedisStorage(5)  # type: ignore[arg-type]

    def test_refuses_braces_in_a_prefix(self) -> None:
        with pytest.raises(ValueError, match="braces"):
            RedisStorage("redis://localhost", prefix="{app}")

    def test_leaves_a_client_of_ones_own_open(self, client: Any) -> None:
        storage = RedisStorage(client)
        put(storage, "key", a=1)
        storage.close()
        assert client.ping()
        put(storage, "key", a=2)  # and the storage can be used again
        storage.close()

    def test_without_the_extra_says_which_one(self) -> None:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.modules['redis'] = None; from session_sync import RedisStorage",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "pip install 'session-sync[redis]'" in done.stderr
