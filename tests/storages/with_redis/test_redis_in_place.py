"""Sessions in Redis without a thread: in place of a coroutine, and several at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import closing
from contextvars import Context
from typing import Any

import pytest
import redis_tools
from redis_servers import SERVER, Server
from redis_tools import Make, Proxy, put

from session_sync import (
    SessionConflictError,
    SessionDecodeError,
    SessionLockTimeoutError,
    SessionManager,
)

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
from redis.exceptions import OutOfMemoryError  # noqa: E402

from session_sync.storages.redis.storage import RedisStorage  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)
shared_server = pytest.fixture(scope="module")(redis_tools.make_shared_server)
server = pytest.fixture(redis_tools.make_server)
own_server = pytest.fixture(redis_tools.make_own_server)
client = pytest.fixture(redis_tools.make_client)
make = pytest.fixture(redis_tools.maker)
storage = pytest.fixture(redis_tools.make_storage)
proxy = pytest.fixture(redis_tools.make_proxy)


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
