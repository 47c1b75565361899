"""RedisStorage as a user of few rights, where commands are missing, and beside foreign keys."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT
from redis_servers import SERVER, Server, free_port

redis = pytest.importorskip("redis", reason="needs the extra 'redis'")

from redis.exceptions import NoPermissionError, ResponseError  # noqa: E402

from session_sync import (  # noqa: E402
    RedisStorage,
    SessionDecodeError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.storages.base import record_of  # noqa: E402
from session_sync.storages.redis import refusals as redis_refusals  # noqa: E402
from session_sync.storages.redis import scripts, tokens  # noqa: E402
from session_sync.storages.redis.refusals import RIGHTS  # noqa: E402

if SERVER is None:
    pytest.skip("needs redis-server", allow_module_level=True)

PAGE = (ROOT / "docs/storages.md").read_text(encoding="utf-8")
(LINE,) = re.findall(r"^ACL SETUSER .*$", PAGE, re.M)
(LISTING,) = re.findall(r"`(\+scan [^`]*)`", PAGE)
#: Without it, whoever waits looks again and again.
NOT_NEEDED = "+blpop"

Make = Callable[..., RedisStorage]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def client(shared_server: Server) -> Iterator[Any]:
    with closing(shared_server.client()) as client:
        client.flushall()
        client.script_flush()
        yield client
        client.acl_deluser("bot")


@pytest.fixture
def make(shared_server: Server, client: Any) -> Iterator[Make]:
    """Storages of the user `bot`, who is as the docs say, with more rights or fewer."""
    made: list[RedisStorage] = []

    def make(more: str = "", db: int = 0, **options: Any) -> RedisStorage:
        client.execute_command(*LINE.split(), *more.split())
        url = f"redis://bot:password@127.0.0.1:{shared_server.port}/{db}"
        made.append(RedisStorage(url, prefix="bot:", ttl=100, **options))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def use(storage: RedisStorage, other: RedisStorage) -> None:
    """All that the storage does for sessions, once."""
    opened: Any = storage.open_record("key", 0)
    opened.save(record_of({"a": 1}))
    renewed = opened.keeper.renew([opened])
    with pytest.raises(SessionLockTimeoutError):
        other.open_record("key", 0)
    opened.close(record_of({"a": 2}))
    other.open_record("key", 0).close(record_of({}))  # it was kept for this one
    both: Any = {key: storage.open_record(key, 0) for key in "ab"}
    storage.save_all(dict.fromkeys("ab", record_of({"a": 1})), both)
    for each in both.values():
        each.close(None)
    storage.set("key", {"a": 3})
    storage.touch("key")
    assert storage.has("key")
    assert storage.get("key") == {"a": 3}
    storage.delete("key")
    assert renewed == {opened: True}


def test_the_line_of_the_docs_is_the_one_of_the_errors() -> None:
    assert f"ACL SETUSER bot on >password ~bot:* {RIGHTS}" == LINE
    assert redis_refusals.LISTING == LISTING


def test_the_rights_of_the_docs_are_enough(make: Make) -> None:
    use(make(), make())


def test_more_are_needed_to_list_and_for_another_database(make: Make) -> None:
    storage = make(f"+select {LISTING}", db=1)
    use(storage, make(f"+select {LISTING}", db=1))
    storage.set("key", {"a": 1})
    with closing(storage):
        assert sorted(entry.key for entry in storage.entries()) == ["a", "b", "key"]
        opened = storage.open_record("key", 0)
        assert [lock.key for lock in storage.locks()] == ["key"]
        opened.close(None)


LISTS: dict[str, Callable[[RedisStorage], object]] = {
    "keys": lambda storage: list(storage.keys()),
    "entries": lambda storage: list(storage.entries()),
    "locks": lambda storage: list(storage.locks()),
    "find": lambda storage: list(SessionManager(storage=storage).find(user=1)),
    "forget": lambda storage: SessionManager(storage=storage).forget(user=1),
    "migrate_all": lambda storage: SessionManager(
        storage=storage, migrations={2: dict}
    ).migrate_all(),
}


@pytest.mark.parametrize("use", LISTS.values(), ids=LISTS)
def test_listing_without_the_rights_for_it_names_them(
    make: Make, use: Callable[[RedisStorage], object]
) -> None:
    check_refused_listing(use, make())


@pytest.mark.parametrize("right", sorted({*LISTING.split(), "+pttl"} - {"+info"}))
def test_a_right_that_is_missing_to_list_is_named_with_the_line_that_helps(
    make: Make, right: str
) -> None:
    storage = make(f"{LISTING} {right.replace('+', '-')}")
    storage.set("key", {"a": 1})
    check_refused_listing(LISTS["entries"], storage)


def check_refused_listing(use: Callable[[RedisStorage], object], storage: RedisStorage) -> None:
    with pytest.raises(NoPermissionError) as caught:
        use(storage)
    said = str(caught.value)
    assert said.startswith("the sessions cannot be listed: ")
    assert f"ACL SETUSER <user> ~bot:* {RIGHTS} {LISTING} " in said
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("right", ["+get", "+pttl", "+time"])
def test_a_right_that_is_missing_to_look_at_a_lock_is_told_with_its_session(
    make: Make, right: str
) -> None:
    opened = make().open_record("key", 0)
    storage = make(f"{LISTING} {right.replace('+', '-')}")
    with pytest.raises(NoPermissionError, match=rf"'key': .*{re.escape(RIGHTS)}"):
        list(storage.locks())
    make(LISTING)
    opened.close(None)


def test_the_command_line_names_the_rights_it_lacks(make: Make, shared_server: Server) -> None:
    pytest.importorskip("click", reason="needs the extra 'cli'")
    make().close()
    url = f"redis://bot:password@127.0.0.1:{shared_server.port}?prefix=bot:"
    done = subprocess.run(
        [sys.executable, "-m", "session_sync", "ls", "-s", url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert LISTING in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("right", sorted({*RIGHTS.split()} - {NOT_NEEDED}))
def test_a_right_that_is_missing_is_named_with_the_line_that_helps(
    make: Make, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "_GRACE", 20)  # who waits keeps the place on a busy machine
    without = right.replace("+", "-")
    with pytest.raises(NoPermissionError) as caught:
        use(make(without), make(without))
    said = str(caught.value)
    assert re.search(r"'(key|a|b)'", said)
    assert f"ACL SETUSER <user> ~bot:* {RIGHTS}" in said


def test_keys_that_are_not_allowed_say_the_same(make: Make) -> None:
    with pytest.raises(NoPermissionError, match=r"session 'key': .* ~bot:\* \+evalsha"):
        make("resetkeys ~other:*").open_record("key", 0)


def test_a_server_without_a_command_is_told_by_its_name_and_shows_no_value(tmp_path: Path) -> None:
    port = free_port()
    missing = [
        word for name in ("EVALSHA", "SET", "SCAN") for word in ("--rename-command", name, "")
    ]
    server = Server(tmp_path / "less", "--port", str(port), *missing, port=port)
    try:
        with closing(RedisStorage(server.url)) as storage:
            with pytest.raises(ResponseError, match=r"'key'.* Lua scripts .*\+evalsha"):
                storage.open_record("key", 0)
            with pytest.raises(ResponseError, match="unknown command 'SET'") as caught:
                storage.set("key", {"password": "hunter2"})
            assert "hunter2" not in str(caught.value)
            with pytest.raises(ResponseError, match=r"cannot be listed: .*'SCAN'.* \+scan"):
                list(storage.keys())
    finally:
        server.stop()


# -- what others wrote


PLANTED = [
    b"1@here:" + b"9" * 5000 + b" 0 1",
    b"1@here:1 0 " + b"9" * 5000,
    b"1@here:1 " + b"9" * 5000 + b" 1",
    b"1@\xff\xfe:1 0 1",
    b"",
]


@pytest.mark.parametrize("held", PLANTED)
def test_a_planted_lock_is_told_as_something_else(make: Make, client: Any, held: bytes) -> None:
    storage = make(LISTING)
    client.set("bot:{key}:lock", held)
    (lock,) = storage.locks()
    assert lock == ("key", None, None, None, None)
    assert not lock.is_left_over()
    with pytest.raises(SessionLockTimeoutError, match="something else holds its lock"):
        storage.open_record("key", 0)


@pytest.mark.parametrize("pid", [0, 2**31, 9_999_999_999])
def test_a_lock_of_a_process_that_cannot_be_is_not_left_over(
    make: Make, client: Any, pid: int
) -> None:
    storage = make(LISTING)
    client.set("bot:{key}:lock", f"1@{tokens.HOST}:{pid} 0 1")
    (lock,) = storage.locks()
    assert not lock.is_left_over()


def test_a_planted_lock_of_another_kind_hides_no_other(make: Make, client: Any) -> None:
    storage = make(LISTING)
    client.hset("bot:{hash}:lock", "a", 1)
    opened = storage.open_record("key", 0)
    assert {lock.key: lock.pid is None for lock in storage.locks()} == {"hash": True, "key": False}
    with pytest.raises(SessionDecodeError, match="'hash'"):
        storage.open_record("hash", 0)
    opened.close(None)


def test_the_session_of_a_manager_tells_it_too(make: Make) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=make("-time"))
    with pytest.raises(NoPermissionError, match="'user:1'"):
        with sessions.session_scope("user:1"):
            pass


def test_a_lock_under_a_name_that_no_key_has_is_passed_over(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        client.set(b"{%41}:lock", b"x")  # no key is written so
        client.set(b"{\xff}:lock", b"x")
        with closing(RedisStorage(redis_url)) as storage:
            opened = storage.open_record("user:1", 0)
            assert [lock.key for lock in storage.locks()] == ["user:1"]
            opened.close(None)


def test_names_of_no_key_are_passed_over_and_reported(
    make: Make, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program's: bytes that are no text, and texts as no key is written."""
    storage = make(LISTING)
    keys = ["", "a", "user:1", "я", "\ud800", "{x}"]
    for key in keys:
        storage.set(key, {"a": 1})
    for name in (b"{\xff}", b"{user:\xd0}", b"{%41}", b"{}", b"{a}:{b}"):
        client.set(b"bot:" + name, "{}")
    client.set(b"other:{\xff}", "{}")
    opened = storage.open_record("user:1", 0)  # what lies beside it is ours
    for listed in (storage.keys, lambda: (entry.key for entry in storage.entries())):
        assert sorted(listed()) == sorted(keys)
        assert "names that no key has were passed over: 5; session_sync has not" in caplog.text
        assert "?prefix=bot%3A: " in caplog.text
        assert "password" not in caplog.text
        caplog.clear()
    assert storage.unknown_rows() == 5
    opened.close(None)


def test_where_all_names_are_ours_nothing_is_reported(
    make: Make, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for storage in (make(LISTING), RedisStorage(client)):
        opened = storage.open_record("key", 0)
        opened.save(record_of({"a": 1}))
        with pytest.raises(SessionLockTimeoutError):
            make(LISTING).open_record("key", 0)
        assert list(storage.keys()) == ["key"]
        assert storage.unknown_rows() == 0
        opened.close(record_of({}))
    assert caplog.text == ""
    client.set(b"{\xff}", "{}")
    assert list(storage.keys()) == []
    assert "a Redis server: names that no key has were passed over: 1" in caplog.text
