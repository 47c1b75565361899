"""What is special about sessions in Redis: a lease, a queue, two round trips; on real servers."""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from redis_servers import SERVER, Server, certificate, free_port
from waiting import until

import session_sync
from session_sync import (
    SessionConflictError,
    SessionDeadlockError,
    SessionDecodeError,
    SessionEncodeError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.storages.base import (
    ListableStorage,
    OpenRecord,
    RecordStorage,
    SharedStorage,
    TtlStorage,
    record_of,
)
from session_sync.testing import StorageConformance

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

import redis.asyncio as redis_asyncio  # noqa: E402
from redis.backoff import ConstantBackoff  # noqa: E402
from redis.cluster import RedisCluster  # noqa: E402
from redis.crc import key_slot  # noqa: E402
from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: E402
from redis.exceptions import OutOfMemoryError, RedisError  # noqa: E402
from redis.retry import Retry  # noqa: E402

from session_sync.storages.redis import scripts, tokens  # noqa: E402
from session_sync.storages.redis import server as server_module  # noqa: E402
from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

SOON = 20  # seconds until a test gives up waiting for what has to come

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)


# -- servers, processes, a bad network


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A server with nothing in it, and its defaults."""
    with closing(shared_server.client()) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """One that may be killed."""
    server = Server(tmp_path / "own")
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with closing(server.client()) as client:
        yield client


Make = Callable[..., RedisStorage]


@pytest.fixture
def make(server: Server) -> Iterator[Make]:
    made: list[RedisStorage] = []

    def make(where: Any = None, *args: Any, **options: Any) -> RedisStorage:
        made.append(RedisStorage(server.url if where is None else where, *args, **options))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


@pytest.fixture
def storage(make: Make) -> RedisStorage:
    return make()


def put(storage: RedisStorage, key: str, **fields: Any) -> None:
    storage.open_record(key, SOON).close(record_of(fields))


LIMITED = {"username": "limited", "password": "secret"}


def forbid(client: Any, command: str) -> None:
    """To the user LIMITED."""
    client.acl_setuser(
        "limited",
        enabled=True,
        reset=True,
        passwords=["+secret"],
        keys=["*"],
        commands=["+@all", f"-{command}"],
    )


def fields(opened: OpenRecord) -> dict[str, Any]:
    return dict(opened.record or {})


def helpers(client: Any) -> list[bytes]:
    return [name for name in client.scan_iter() if not name.endswith(b"}")]


PRELUDE = """
import os, sys, threading, time
from session_sync import (
    SessionConflictError, SessionError, SessionLockTimeoutError, SessionManager, storage_from_url
)

def say(word):
    print(word, flush=True)

def heard():
    sys.stdin.readline()

sessions = SessionManager(storage=storage_from_url(sys.argv[1]), lock_timeout=60)
"""

COUNT = """
with sessions.session_scope("warm up " + str(os.getpid())):
    say("here")
heard()
def work():
    for n in range(50):
        with sessions.session_scope(f"key:{n % int(sys.argv[2])}") as session:
            counter = session.get("counter", 0)
            time.sleep(0)
            session.counter = counter + 1
workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
"""

HOLD = """
try:
    with sessions.session_scope("key") as session:
        session.by = "holder"
        session.flush()
        session.by = "nobody"
        say("holding")
        heard()
        session.by = "holder again"
except SessionError as error:
    say(f"{type(error).__name__}: {error}")
else:
    say("saved")
"""

TURNS = """
with sessions.session_scope("warm up " + str(os.getpid())):
    say("here")
heard()
number, end = 0, time.monotonic() + 3
while time.monotonic() < end:
    with sessions.session_scope("key"):
        number += 1
        time.sleep(0.002)
say(number)
"""

WAIT = """
try:
    sessions.storage.open_record("key", 0)
except SessionLockTimeoutError:
    say("waiting")
sessions.storage.open_record("key", 60).close(None)
say("done")
"""


class Program:
    """Another process, which listens and says something."""

    def __init__(self, source: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self) -> None:
        """Let it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        assert self._process.wait(SOON * 2) == 0

    def clean(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Program] = []

    def start(*arguments: object) -> Program:
        started.append(Program(*arguments))
        return started[-1]

    yield start
    for program in started:
        program.clean()


class Proxy:
    """A network before a server that can lose an answer and cut the connection."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._before_cut: Callable[[], object] | None = None
        self._fatal = self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_next_answer(self, before_cut: Callable[[], object] = lambda: None) -> None:
        """`before_cut` is called when the server has done what it was asked."""
        self._before_cut = before_cut

    def lose_each(self, number: int) -> None:
        """Of each connection that answer, and with it the connection."""
        self._fatal = number

    def client(self, retries: int = 3, **options: Any) -> Any:
        return redis.Redis(
            port=self.port,
            retry=Retry(ConstantBackoff(0.01), retries),
            retry_on_error=[RedisConnectionError],
            **options,
        )

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [near, far]
                threading.Thread(target=self._pass, args=(near, far), daemon=True).start()
                threading.Thread(target=self._pass_back, args=(far, near), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def _pass_back(self, far: socket.socket, near: socket.socket) -> None:
        answers = itertools.count(1)
        with suppress(OSError):
            while data := far.recv(65536):
                if self._loses(next(answers)):
                    self.lost += 1
                    break
                near.sendall(data)
            near.shutdown(socket.SHUT_RDWR)

    def _loses(self, number: int) -> bool:
        before_cut, self._before_cut = self._before_cut, None
        if before_cut is not None:
            before_cut()
        return before_cut is not None or number == self._fatal

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with closing(Proxy(server.port)) as proxy:
        yield proxy


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


@contextmanager
def monitored(server: Server) -> Iterator[list[str]]:
    """What clients ask the server; what scripts do is not among it."""
    requests: list[str] = []
    with closing(server.client()) as client, client.monitor() as monitor:
        yield requests
        with closing(server.client()) as other:
            other.echo("end")
        for command in monitor.listen():
            if command["client_type"] != "lua":
                requests.append(command["command"].split()[0])
                if command["command"] == "ECHO end":
                    break
    # The one that has said so is new; and some have begun with a word about the library.
    requests[:] = [name for name in requests if name not in ("ECHO", "CLIENT", "HELLO")]


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
        opened.close(opened.record.patched({"by": "other"}) if opened.record else None)
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


# -- waiting


class TestWaiting:
    def test_ends_soon_after_a_release(self, make: Make, threads: Threads) -> None:
        holder, waiter = make(), make()
        took: list[float] = []
        for _ in range(20):
            opened = holder.open_record("key", SOON)
            with pytest.raises(SessionLockTimeoutError):
                waiter.open_record("key", 0)
            released = []

            def wait(released: list[float] = released) -> None:
                mine = waiter.open_record("key", SOON)
                took.append(time.perf_counter() - released[0])
                mine.close(None)

            threads.start(wait)
            time.sleep(0.01)  # mostly it is blocked by now; if not, it is only sooner
            released.append(time.perf_counter())
            opened.close(None)
            threads.join()
        print(f"hand-over: median {statistics.median(took) * 1000:.2f} ms")
        assert statistics.median(took) < 0.05

    def test_is_no_busy_poll(self, make: Make, server: Server) -> None:
        opened, waiter = make().open_record("key", 0), make()
        with pytest.raises(SessionLockTimeoutError):
            waiter.open_record("key", 0)
        with monitored(server) as requests:
            with pytest.raises(SessionLockTimeoutError):
                waiter.open_record("key", 1)
        assert sorted(requests) == ["BLPOP", "EVALSHA", "EVALSHA"]
        opened.close(None)

    def test_is_in_order_and_keeps_its_place_between_calls(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scripts, "_GRACE", 5)
        holder, *waiters = storages = [make() for _ in range(4)]
        opened = holder.open_record("key", 0)
        for _ in range(2):
            for waiter in waiters:
                with pytest.raises(SessionLockTimeoutError):
                    waiter.open_record("key", 0.01)
        for waiter in waiters:
            opened.close(None)
            for other in storages:  # whoever had it is the last in the queue now
                if other is not waiter:
                    with pytest.raises(SessionLockTimeoutError):
                        other.open_record("key", 0)
            opened = waiter.open_record("key", 0)
        opened.close(None)

    def test_of_one_who_never_comes_back_holds_up_nobody_for_long(
        self, make: Make, server: Server, start: Start
    ) -> None:
        opened = make().open_record("key", 0)
        dead = start(WAIT, server.url)
        assert dead.hear() == "waiting"
        dead.signal(signal.SIGKILL)
        opened.close(None)
        begun = time.monotonic()
        make().open_record("key", SOON).close(None)
        assert time.monotonic() - begun < 4

    def test_takes_no_connection_that_is_needed_to_close(
        self, make: Make, server: Server, threads: Threads, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server_module, "_WAITS", 4)
        holder = make()
        storage = make(server.client(max_connections=16, socket_timeout=2))
        opened = [holder.open_record(f"key:{n}", 0) for n in range(12)]

        def wait(n: int) -> None:
            storage.open_record(f"key:{n}", SOON).close(record_of({"n": n}))

        for n in range(12):
            threads.start(wait, n)
        put(storage, "other", a=1)
        for one in opened:
            one.close(None)
        threads.join()
        assert len(list(storage.keys())) == 13

    def test_is_not_cut_by_a_short_time_out(self, make: Make, server: Server) -> None:
        opened = make().open_record("key", 0)
        with pytest.raises(SessionLockTimeoutError):
            make(server.client(socket_timeout=0.2)).open_record("key", 0.8)
        opened.close(None)

    def test_works_where_the_server_wakes_nobody(
        self, make: Make, client: Any, threads: Threads, server: Server
    ) -> None:
        forbid(client, "blpop")
        waiter, opened = make(server.client(**LIMITED)), make().open_record("key", 0)
        with pytest.raises(SessionLockTimeoutError):
            waiter.open_record("key", 0)
        threads.start(put, waiter, "key")
        opened.close(None)
        threads.join()

    def test_shares_fairly(self, server: Server, start: Start) -> None:
        programs = [start(TURNS, server.url) for _ in range(8)]
        for program in programs:
            assert program.hear() == "here"
        for program in programs:
            program.tell()
        turns = sorted(int(program.hear()) for program in programs)
        print(f"turns: {turns}")
        assert turns[0] * 2 >= turns[-1], turns


# -- several processes, and the face of the library


def count(server: Server, start: Start, client: Any, keys: int) -> int:
    programs = [start(COUNT, server.url, keys) for _ in range(4)]
    for program in programs:
        assert program.hear() == "here"
    for program in programs:
        program.tell()
    for program in programs:
        program.end()
    values = [client.get(f"{{key:{number}}}") for number in range(keys)]
    return sum(int(re.findall(rb'"counter":(\d+)', value)[0]) for value in values)


class TestProcesses:
    @pytest.mark.parametrize("keys", [1, 5])
    def test_lose_nothing(self, server: Server, start: Start, client: Any, keys: int) -> None:
        assert count(server, start, client, keys) == 400

    def test_without_the_lock_do(
        self,
        server: Server,
        start: Start,
        client: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        package = Path(session_sync.__file__).parent
        shutil.copytree(package, tmp_path / "session_sync")
        file = tmp_path / "session_sync/storages/redis/scripts/common.lua"
        text = file.read_text()
        lock = "return held and string.sub(held, 1, #token + 1) == token .. ' '\nend\n"
        assert text.count(lock) == 1
        file.write_text(text.replace(lock, "return true\nend\n"))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PYTHONSAFEPATH", "1")  # not what lies in the current directory
        assert count(server, start, client, 1) < 400

    def test_may_fork(self, server: Server, start: Start, client: Any) -> None:
        program = start(
            """
storage = sessions.storage
with sessions.session_scope("other"):  # connections, threads
    pass
scope = sessions.session_scope("key")
session = scope.__enter__()
session.by = "parent"
opened = storage.open_record("third", 0)
child = os.fork()
if not child:
    status = 1
    try:
        try:
            scope.__exit__(None, None, None)
        except SessionConflictError as error:
            assert "forked" in str(error), error
        opened.close(None)
        for key in ("key", "third"):  # still the parent's
            try:
                storage.open_record(key, 0.2)
            except SessionLockTimeoutError as error:
                assert str(os.getppid()) in str(error), error
            else:
                raise AssertionError(key)
        mine = storage.open_record("child", 0)
        time.sleep(1.2)  # more than a lease
        mine.close(storage._codec.decode_record(b'{"by":"child"}', "child"))
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("session_sync-renew") == 1, names
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
scope.__exit__(None, None, None)
opened.close(None)
say("done")
""",
            f"{server.url}?lease=0.5",
        )
        assert program.hear() == "done"
        program.end()
        assert client.get("{key}") == b'{"by":"parent"}'
        assert client.get("{child}") == b'{"by":"child"}'


class TestSessions:
    @pytest.fixture
    def apart(self, server: Server, make: Make) -> Iterator[Callable[..., SessionManager[Any]]]:
        """Managers that are to each other what those of other processes are: they have clients, of
        which nobody knows that they lead to one server."""
        clients: list[Any] = []

        def manager(**options: Any) -> SessionManager[Any]:
            clients.append(server.client())
            return SessionManager(storage=make(clients[-1]), **options)

        yield manager
        for client in clients:
            client.close()

    def test_under_with(self, storage: RedisStorage) -> None:
        with SessionManager(storage=storage) as sessions:
            with sessions.session_scope("user:1") as session:
                session.cart = ["tea"]
            with pytest.raises(ZeroDivisionError):
                with sessions.session_scope("user:1") as session:
                    session.cart.append("milk")
                    raise ZeroDivisionError
            with sessions.session_scope("user:1") as session:
                assert session == {"cart": ["tea"]}

    def test_under_async_with(self, apart: Callable[..., SessionManager[Any]]) -> None:
        managers: list[SessionManager[Any]] = [apart() for _ in range(2)]

        async def add(sessions: SessionManager[Any]) -> None:
            async with sessions.session_scope("user:1") as session:
                counter = session.get("counter", 0)
                await asyncio.sleep(0)
                session.counter = counter + 1

        async def main() -> None:
            await asyncio.gather(*(add(sessions) for sessions in managers * 20))

        asyncio.run(main())
        assert managers[0].storage.get("user:1") == {"counter": 40}

    def test_a_cancelled_waiter_disturbs_nobody(
        self, apart: Callable[..., SessionManager[Any]]
    ) -> None:
        async def wait(sessions: SessionManager[Any]) -> None:
            async with sessions.session_scope("key"):
                pass

        async def main() -> None:
            holder, waiter, last = (apart() for _ in range(3))
            async with holder.session_scope("key"):
                task = asyncio.create_task(wait(waiter))
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            async with asyncio.timeout(4):
                await wait(last)
                await wait(waiter)

        asyncio.run(main())

    def test_the_message_of_a_time_out_says_who_has_it(
        self, apart: Callable[..., SessionManager[Any]], start: Start, server: Server
    ) -> None:
        holder = start(HOLD, server.url)
        assert holder.hear() == "holding"
        waited = rf"'key' .*0\.1 s: process {holder.pid} on"
        with pytest.raises(SessionLockTimeoutError, match=waited):
            with apart(lock_timeout=0.1).session_scope("key"):
                pass
        holder.tell()
        assert holder.hear() == "saved"
        holder.end()

    def test_what_cannot_be_stored_frees_the_key(self, storage: RedisStorage) -> None:
        opened = storage.open_record("key", 0)
        with pytest.raises(SessionEncodeError):
            opened.close(record_of({"a": object()}))
        storage.open_record("key", 0).close(None)


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


class TestSeveralAtOnce:
    """What `session_scopes` writes is written whole, or not at all."""

    def test_a_full_memory_takes_none(self, storage: RedisStorage, client: Any) -> None:
        sessions: SessionManager[Any] = SessionManager(storage=storage)
        for key in ("a", "b"):
            put(storage, key, n=1)
        with pytest.raises(OutOfMemoryError):
            with sessions.session_scopes("a", "b") as (a, b):
                a.n = b.n = 2
                client.config_set("maxmemory", 1)
        client.config_set("maxmemory", 0)
        assert (storage.get("a"), storage.get("b")) == ({"n": 1}, {"n": 1})
        with sessions.session_scopes("a", "b") as (a, b):  # which are free again
            a.n = b.n = 3
        assert (storage.get("a"), storage.get("b")) == ({"n": 3}, {"n": 3})

    def test_a_restart_loses_all_or_none(self, own_server: Server) -> None:
        with closing(RedisStorage(own_server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            with pytest.raises(SessionConflictError, match="restart"):
                with sessions.session_scopes("a", "b") as (a, b):
                    a.n = b.n = 1
                    own_server.stop()
                    own_server.start()
            assert storage.get("a") is storage.get("b") is None
            with sessions.session_scopes("a", "b") as (a, b):
                a.n = b.n = 2
            assert (storage.get("a"), storage.get("b")) == ({"n": 2}, {"n": 2})

    def test_a_lost_answer_doubles_nothing(self, make: Make, proxy: Proxy) -> None:
        sessions: SessionManager[Any] = SessionManager(storage=make(proxy.client()))

        def others() -> None:  # come between the two sendings, and find both open
            with pytest.raises(SessionLockTimeoutError):
                make().open_record("a", 0)

        with sessions.session_scopes("a", "b") as (a, b):
            a.n = b.n = 1
            a.flush()  # so that the number of the next save is another one
            a.n = 2
            proxy.lose_next_answer(others)
        assert proxy.lost == 1
        assert (make().get("a"), make().get("b")) == ({"n": 2}, {"n": 1})


class TestInPlace:
    """A coroutine asks a server that is near without going to a thread, and waits in threads."""

    @staticmethod
    async def goes_on(task: asyncio.Task[None]) -> None:
        """The event loop does, while `task` waits."""
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()

    def test_a_server_that_is_near_needs_no_thread(self, own_server: Server) -> None:
        """Sooner or later, that is: it may be late now and then."""
        asked: list[str] = []

        class Watched(RedisStorage):
            def open_record(self, *args: Any) -> Any:
                asked.append("open")
                return super().open_record(*args)

            def close_open(self, *args: Any) -> bool:
                asked.append("close")
                return super().close_open(*args)

        async def main() -> int:
            updates = 0
            while not updates or asked:
                asked.clear()
                async with sessions.session_scope("key") as session:
                    session.n = session.get("n", 0) + 1
                updates += 1
            return updates

        with closing(Watched(own_server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            assert storage.get("key") is None
            updates = asyncio.run(main())
            assert storage.get("key") == {"n": updates}

    @pytest.mark.parametrize("stopped_at", ["opening", "closing"])
    def test_the_loop_goes_on_while_the_server_stands_still(
        self, own_server: Server, stopped_at: str
    ) -> None:
        def nothing() -> None:
            pass

        async def update(stop: Callable[[], None] = nothing) -> None:
            if stopped_at == "opening":
                stop()
            async with sessions.session_scope("key") as session:
                session.n = session.get("n", 0) + 1
                if stopped_at == "closing":
                    stop()

        async def main() -> None:
            await update()  # from here on there is a connection
            for _ in range(3):
                stopped = asyncio.Event()

                def stop(stopped: asyncio.Event = stopped) -> None:
                    own_server.signal(signal.SIGSTOP)
                    stopped.set()

                task = asyncio.create_task(update(stop))
                await stopped.wait()
                await self.goes_on(task)
                own_server.signal(signal.SIGCONT)
                await task
            await update()

        with closing(RedisStorage(own_server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            asyncio.run(main())
            assert storage.get("key") == {"n": 5}
        client = own_server.client()
        assert all(name == b"{key}" or b":closed:" in name for name in client.keys())
        client.close()

    @pytest.mark.parametrize("lost_at", ["opening", "closing"])
    def test_a_kept_connection_that_the_server_has_closed(
        self, own_server: Server, lost_at: str
    ) -> None:
        killer = own_server.client()

        def lose() -> None:
            killer.client_kill_filter(_type="normal", skipme=True)

        async def main() -> None:
            for _ in range(20):
                if lost_at == "opening":
                    lose()
                async with sessions.session_scope("key") as session:
                    session.n = session.get("n", 0) + 1
                    if lost_at == "closing":
                        lose()

        with closing(RedisStorage(own_server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            asyncio.run(main())
            assert storage.get("key") == {"n": 20}
        killer.close()

    def test_a_session_that_another_process_has_is_waited_for(self, own_server: Server) -> None:
        """The two storages here know of each other as little as two processes do."""

        async def main() -> None:
            async with mine.session_scope("key") as session:
                session.n = 1  # also makes a connection
            async with theirs.session_scope("key") as session:
                session.n += 1
                task = asyncio.create_task(third(), context=Context())
                await self.goes_on(task)
            await task

        async def third() -> None:
            async with mine.session_scope("key") as session:
                session.n *= 10

        with (
            closing(RedisStorage(own_server.url)) as one,
            closing(RedisStorage(own_server.url.replace("127.0.0.1", "localhost"))) as two,
        ):
            mine: SessionManager[Any] = SessionManager(storage=one)
            theirs: SessionManager[Any] = SessionManager(storage=two)
            asyncio.run(main())
            assert one.get("key") == {"n": 20}

    def test_a_record_that_does_not_decode_is_refused_and_left(self, own_server: Server) -> None:
        client = own_server.client()

        async def main() -> None:
            async with sessions.session_scope("other"):
                pass
            client.set("{key}", b"not ours")
            with pytest.raises(SessionDecodeError, match="key"):
                async with sessions.session_scope("key"):
                    pass

        with closing(RedisStorage(own_server.url)) as storage:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            asyncio.run(main())
        assert client.get("{key}") == b"not ours"
        assert client.get("{key}:lock") is None
        client.close()


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
