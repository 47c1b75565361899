"""What a URL says about a Redis server, and about the sentinels that know it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis_servers import SERVER, Sentinel, Server, certificate, free_port

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: E402

from session_sync import RedisStorage, storage_from_url  # noqa: E402
from session_sync.storages import redis as redis_module  # noqa: E402
from session_sync.storages.base import record_of  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)

PASSWORD, QUOTED = "p@ss/w:rd", "p%40ss%2Fw%3Ard"


@pytest.fixture(params=["plain", "tls"])
def watched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a server that a sentinel watches; both have passwords."""
    port = free_port()
    if request.param == "tls":
        public, private = certificate(tmp_path)
        tls = {"tls-cert-file": public, "tls-key-file": private, "tls-auth-clients": "no"}
        tls |= {"tls-ca-cert-file": public, "tls-replication": "yes"}
        ports = ["--port", "0", "--tls-port", str(port)]
        connection, scheme, more = {"ssl": True, "ssl_ca_certs": str(public)}, "rediss", ""
        more = f"&ssl_ca_certs={public}"
    else:
        tls, ports, connection, scheme, more = {}, ["--port", str(port)], {}, "redis", ""
    options = [word for name, value in tls.items() for word in (f"--{name}", str(value))]
    server = Server(
        tmp_path / "server",
        *(*ports, *options, "--requirepass", PASSWORD),
        port=port,
        password=PASSWORD,
        **connection,
    )
    sentinel = Sentinel(
        tmp_path / "sentinel",
        server,
        "my-master",
        *(f"{name} {value}" for name, value in tls.items()),
        "requirepass watch",
        password="watch",
        **connection,
    )
    with closing(sentinel.client()) as client:
        client.sentinel_set("my-master", "auth-pass", PASSWORD)
    yield (
        f"{scheme}+sentinel://:{QUOTED}@127.0.0.1:{sentinel.port}/my-master/2"
        f"?sentinel_password=watch&socket_timeout=4{more}"
    )
    sentinel.stop()
    server.stop()


def test_sentinels_name_the_server_with_passwords_database_and_options(watched: str) -> None:
    with closing(RedisStorage(watched)) as storage:
        storage.open_record("key", 0).close(record_of({"a": 1}))
        assert storage.get("key") == {"a": 1}
        assert list(storage.keys()) == ["key"]
        assert storage._client.client_info()["db"] == 2  # type: ignore[union-attr]


def test_sentinels_that_refuse_are_an_error_without_a_password(
    watched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "_PATIENCE", 0)  # it is an error of a connection
    wrong = watched.replace("sentinel_password=watch", "sentinel_password=hunter2")
    with closing(RedisStorage(wrong)) as storage:
        with pytest.raises(RedisConnectionError) as caught:
            storage.open_record("key", 0)
    assert "hunter2" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+sentinel://host:26379", r"redis\+sentinel://host:26379,host:26379/mymaster"),
        ("redis+sentinel:///mymaster", r"redis\+sentinel://host:26379,host:26379/mymaster"),
        ("redis+sentinel://:hunter2@host/mymaster/one", "a database's number"),
        ("redis+sentinel://:hunter2@host:x,host/mymaster", "the port is no number"),
        ("redis://:hunt/er2@host", "password"),
        ("redis+cluster://:hunt/er2@host", "password"),
    ],
)
def test_a_url_that_is_wrong_is_told_without_its_password(url: str, said: str) -> None:
    for make in (storage_from_url, RedisStorage):
        with pytest.raises(ValueError, match=said) as caught:
            make(url)
        assert "hunt" not in str(caught.value)
        assert "er2" not in str(caught.value)


def test_the_options_of_a_url_win() -> None:
    with closing(RedisStorage("redis://h?socket_timeout=7&socket_keepalive=no")) as storage:
        options = storage._client.connection_pool.connection_kwargs  # type: ignore[union-attr]
    assert options["socket_timeout"] == 7
    assert not options["socket_keepalive"]
