"""Several RedisStorage objects of one server in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads, add_by_two
from redis_servers import SERVER, Sentinel, Server, free_port

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from session_sync import (  # noqa: E402
    RedisStorage,
    SessionDeadlockError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.storages.base import record_of  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)

Make = Callable[..., SessionManager[Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("redis")
    port = free_port()
    socket = ("--unixsocket", str(folder / "socket"))
    server = Server(folder, "--port", str(port), *socket, port=port)
    yield server
    server.stop()


@pytest.fixture
def make(server: Server) -> Iterator[Make]:
    """Managers, each with a storage object of its own."""
    made: list[SessionManager[Any]] = []

    def make(where: Any = server.url, **options: Any) -> SessionManager[Any]:
        storage = RedisStorage(where, **options)
        made.append(SessionManager(storage=storage, lock_timeout=0.05))
        return made[-1]

    with closing(server.client()) as client:
        client.flushall()
    yield make
    for sessions in made:
        sessions.close()


def check_refused_at_once(one: SessionManager[Any], other: SessionManager[Any]) -> None:
    """A block of `other` inside one of `one`, which would wait for itself."""
    with one.session_scope("key") as session:
        session.a = 1
        with pytest.raises(SessionDeadlockError, match="'key'"), other.session_scope("key"):
            raise AssertionError("both have it")
    assert other.storage.get("key") == {"a": 1}


def check_that_both_have_one(one: SessionManager[Any], other: SessionManager[Any]) -> None:
    with one.session_scope("key") as session, other.session_scope("key") as another:
        session.a, another.a = 1, 2
    assert (one.storage.get("key"), other.storage.get("key")) == ({"a": 1}, {"a": 2})


def test_a_block_inside_a_handler_of_a_second_object_is_refused_at_once(make: Make) -> None:
    one, other = make(prefix="bot:"), make(prefix="bot:", ttl=60, lease=10)
    check_refused_at_once(one, other)

    async def nested() -> None:
        async with one.session_scope("key"), other.session_scope("key"):
            raise AssertionError("both have it")

    with pytest.raises(SessionDeadlockError, match="'key'"):
        asyncio.run(nested())
    with one.session_scope("key"), other.session_scope("another") as session:
        session.a = 2
    assert one.storage.get("another") == {"a": 2}


def test_updates_through_two_objects_lose_nothing(make: Make, threads: Threads) -> None:
    one, other = (SessionManager(storage=make().storage, lock_timeout=60) for _ in range(2))
    add_by_two(threads, one, other)


def test_a_server_has_one_name_however_its_url_is_written(make: Make, server: Server) -> None:
    address = f"127.0.0.1:{server.port}"
    urls = ["redis://{}/3", "REDIS://{}?db=3", "redis://{}/3?socket_timeout=4&client_name=x"]
    one, *others = (make(url.format(address)) for url in urls)
    for other in others:
        check_refused_at_once(one, other)
    with closing(server.client()) as client:
        client.execute_command("ACL", "SETUSER", "bot", "on", ">pass", "~*", "+@all")
    check_refused_at_once(make(f"redis://bot:pass@{address}/3"), one)
    check_refused_at_once(
        make(f"redis://LOCALHOST:{server.port}"), make(f"redis://localhost:{server.port}/0")
    )


def test_a_socket_is_its_file(make: Make, server: Server, tmp_path: Path) -> None:
    with closing(server.client()) as client:
        path = Path(client.config_get("unixsocket")["unixsocket"])
    (tmp_path / "link").symlink_to(path)
    check_refused_at_once(make(f"unix://{path}?db=2"), make(f"unix://{tmp_path}/link?db=2"))
    check_that_both_have_one(make(f"unix://{path}?db=2"), make(f"unix://{path}?db=1"))


def test_sentinels_name_a_service(make: Make, server: Server, tmp_path: Path) -> None:
    sentinel = Sentinel(tmp_path / "sentinel", server, "mymaster")
    try:
        address = f"redis+sentinel://127.0.0.1:{sentinel.port}"
        check_refused_at_once(make(f"{address}/mymaster"), make(f"{address}/mymaster/0?db=0"))
        check_that_both_have_one(make(f"{address}/mymaster/1"), make(f"{address}/mymaster/2"))
    finally:
        sentinel.stop()


def test_other_databases_and_prefixes_are_other_stores(make: Make, server: Server) -> None:
    check_that_both_have_one(make(f"{server.url}/1"), make(f"{server.url}/2"))
    for prefix in ("bot", "bot:", "bot?", "?prefix=bot"):
        check_that_both_have_one(make(), make(prefix=prefix))
    check_that_both_have_one(make(prefix="a?prefix=b"), make(prefix="b"))


@pytest.mark.parametrize("where", ["another name", "a client"])
def test_a_time_out_names_the_other_object_of_this_process(
    make: Make, server: Server, where: str
) -> None:
    one = make(f"redis://localhost:{server.port}")
    with closing(server.client()) as client:
        other = make(client if where == "a client" else server.url)
        with one.session_scope("key"):
            with pytest.raises(SessionLockTimeoutError) as caught, other.session_scope("key"):
                raise AssertionError("both have it")
            said = str(caught.value)
            assert said.startswith("the session 'key' was not unlocked within 0.05 s: another ")
            assert "another storage object of this process has it, for " in said
            assert "Use one storage object for each server" in said
            assert str(os.getpid()) not in said
            assert "release()" not in said


def test_a_time_out_does_not_take_another_process_for_this_one(make: Make, server: Server) -> None:
    """In two containers, each may be process 1 of a host of one name; and a child has what its
    parent has had."""
    one, other = make(f"redis://localhost:{server.port}"), make()
    with one.session_scope("key"), closing(server.client()) as client:
        held = client.get("{key}:lock")
        client.set("{key}:lock", held.replace(held.partition(b"@")[0], b"0" + b"f" * 16))
        message = rf"process {os.getpid()} on .* has it, for .*session\.release\(\)"
        with pytest.raises(SessionLockTimeoutError, match=message), other.session_scope("key"):
            pass
        client.set("{key}:lock", held.replace(b":%d " % os.getpid(), b":1 "))
        with (
            pytest.raises(SessionLockTimeoutError, match="process 1 on"),
            other.session_scope("key"),
        ):
            pass
        client.set("{key}:lock", held)


def test_what_one_object_has_itself_is_not_another_ones(make: Make) -> None:
    storage: Any = make().storage
    opened = storage.open_record("key", 0)
    with pytest.raises(SessionLockTimeoutError, match=f"process {os.getpid()} on"):
        storage.open_record("key", 0)
    opened.close(record_of({}))
