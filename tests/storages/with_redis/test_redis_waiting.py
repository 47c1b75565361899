"""Waiting for a session in Redis, within one process and between several."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis_tools
from conftest import Threads
from redis_servers import SERVER, Server
from redis_tools import HOLD, LIMITED, SOON, Make, Start, forbid, monitored, put

import session_sync
from session_sync import SessionEncodeError, SessionLockTimeoutError, SessionManager
from session_sync.storages.base import record_of

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from session_sync.storages.redis import scripts  # noqa: E402
from session_sync.storages.redis import server as server_module  # noqa: E402
from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)
shared_server = pytest.fixture(scope="module")(redis_tools.make_shared_server)
server = pytest.fixture(redis_tools.make_server)
client = pytest.fixture(redis_tools.make_client)
make = pytest.fixture(redis_tools.maker)
storage = pytest.fixture(redis_tools.make_storage)
start = pytest.fixture(redis_tools.make_start)


# -- servers, processes, a bad network

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
