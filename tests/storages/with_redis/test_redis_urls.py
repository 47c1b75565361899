"""What a URL says about a Redis server, and about the sentinels that know it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from redis_servers import SERVER, Sentinel, Server, certificate, free_port

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: E402

from session_sync import RedisStorage, storage_from_url  # noqa: E402
from session_sync.storages.base import record_of  # noqa: E402
from session_sync.storages.redis import server as redis_module  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)

PASSWORD, QUOTED = "p@ss/w:rd", "p%40ss%2Fw%3Ard"
QUOTE = r"quote\(password, safe=\"\"\)"
SCHEMES = [base + kind for base in ("redis", "rediss") for kind in ("", "+cluster", "+sentinel")]


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
    check_refused(url, said)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "password", ["6399#er2", "6399/er2", "6399?er2", "hu@6399/er2", "hu@9?er2"]
)
def test_a_password_is_never_taken_for_an_address(scheme: str, password: str) -> None:
    """Each begins with what could be the port of a server."""
    for user in ("", "hunt"):
        check_refused(f"{scheme}://{user}:{password}@prod-redis/service", QUOTE)
    check_refused(f"{scheme}://prod-redis/service?password={password}@", QUOTE)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("password", ["hunt[er2", "[er2]", "hunter2\u2100"])
def test_a_password_that_is_no_part_of_any_url_is_not_in_the_message(
    scheme: str, password: str
) -> None:
    check_refused(f"{scheme}://:{password}@prod-redis/service", QUOTE)


def check_refused(url: str, said: str) -> None:
    for make in (storage_from_url, RedisStorage):
        with pytest.raises(ValueError, match=said) as caught:
            make(url)
        for part in ("hu@", "hunt", "6399", "er2"):
            assert part not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("password", [PASSWORD, "6399#s3cret", "a?b", "@", "[x]", "100%", "\u2100"])
def test_a_password_that_is_quoted_may_have_any_character(tmp_path: Path, password: str) -> None:
    server = Server(tmp_path)
    try:
        with closing(server.client()) as client:
            client.execute_command("ACL", "SETUSER", "bot", "on", f">{password}", "~*", "+@all")
        url = f"redis://bot:{quote(password, safe='')}@127.0.0.1:{server.port}"
        for make in (RedisStorage, storage_from_url):
            with closing(make(url)) as storage:
                storage.set("key", {"a": 1})
                assert storage.get("key") == {"a": 1}
    finally:
        server.stop()


def test_a_socket_in_the_file_system_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a@b#c"
    server = Server(tmp_path, "--port", "0", "--unixsocket", str(path), unix_socket_path=str(path))
    try:
        with closing(RedisStorage(f"unix://{quote(str(path))}?db=3")) as storage:
            storage.set("key", {"a": 1})
            assert storage._client.client_info()["db"] == 3  # type: ignore[union-attr]
        for wrong in (f"unix://{path}", f"unix://{tmp_path}/a@b"):
            with pytest.raises(ValueError, match=QUOTE):
                RedisStorage(wrong)
    finally:
        server.stop()


def test_the_options_of_a_url_win() -> None:
    with closing(RedisStorage("redis://h?socket_timeout=7&socket_keepalive=no")) as storage:
        options = storage._client.connection_pool.connection_kwargs  # type: ignore[union-attr]
    assert options["socket_timeout"] == 7
    assert not options["socket_keepalive"]
