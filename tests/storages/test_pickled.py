"""Storages and managers in a pickle, as multiprocessing with spawn sends them: by their options."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from session_sync import (
    Codec,
    DiskStorage,
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionEvent,
    SessionManager,
    SQLiteStorage,
    by_user,
)

Make: TypeAlias = Callable[..., Any]
UPDATE = {"update_id": 1, "message": {"from": {"id": 1}, "chat": {"id": 2}}}


class MySession(Session):
    """What is to be imported in the other process."""

    n: int = 0


def encode(value: object) -> Any:
    if isinstance(value, Fraction):
        return "fraction", value.as_integer_ratio()
    return NotImplemented


def decode(_name: str, value: Any) -> Fraction:
    return Fraction(*value)


def initial(_update: object) -> dict[str, Any]:
    return {"begun": True}


def to_version_2(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "is_new": True}


def observe(_event: SessionEvent) -> None:
    pass


def work(sessions: SessionManager[MySession], times: int) -> None:
    for _ in range(times):
        with sessions.session_scope("user:1") as session:
            session.n += 1


@pytest.fixture(params=["sqlite", "disk", "redis"])
def make(request: pytest.FixtureRequest) -> Make:
    """Storages of one kind that processes share; those in Redis have no path."""
    if request.param == "sqlite":
        return lambda path, **options: SQLiteStorage(path / "s.db", **options)
    if request.param == "disk":
        return lambda path, **options: DiskStorage(path / "folder", **options)
    url = request.getfixturevalue("redis_url")  # or it is skipped, also without redis-py
    import redis

    from session_sync import RedisStorage

    with redis.Redis.from_url(url) as client:
        client.flushall()
    return lambda _path, **options: RedisStorage(url, prefix="bot:", **options)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_manager_is_given_to_processes(make: Make, method: str, tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context(method)
    with SessionManager(MySession, storage=make(tmp_path), lock_timeout=120) as sessions:
        processes = [context.Process(target=work, args=(sessions, 20)) for _ in range(2)]
        for process in processes:
            process.start()
        work(sessions, 20)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert sessions.storage.get("user:1") == {"n": 60}


def test_a_manager_is_given_away_while_its_sessions_are_open(make: Make, tmp_path: Path) -> None:
    """From a handler, say."""
    with SessionManager(storage=make(tmp_path)) as sessions, sessions.session_scope("user:1"):
        with pickle.loads(pickle.dumps(sessions)) as other:
            assert other.locks.is_locked("user:1")  # in this process it is the same store


def test_a_storage_keeps_its_options_and_its_place(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(make(Path("here"), ttl=60, codec=Codec(encode, decode))) as storage:
        storage.set("key", {"share": Fraction(1, 3)})
        text = pickle.dumps(storage)
        monkeypatch.chdir("/")
        with closing(pickle.loads(text)) as other:
            assert other.get("key") == {"share": Fraction(1, 3)}
            (entry,) = other.entries()
            assert 0 < entry.left <= 60
            opened = storage.open_record("key", 0)
            with pytest.raises(TimeoutError):
                other.open_record("key", 0)
            opened.close(None)


def test_a_manager_keeps_its_options(tmp_path: Path) -> None:
    storage = SQLiteStorage(tmp_path / "s.db", synchronous="full")
    made: SessionManager[MySession] = SessionManager(
        MySession,
        storage=storage,
        get_storage_key=by_user,
        initial=initial,
        lock_timeout=7,
        on_error="flush",
        prefix="shop:",
        dedupe=3,
        migrations={2: to_version_2},
        migrate_eagerly=True,
        on_close=observe,
    )
    with made, pickle.loads(pickle.dumps(made)) as sessions:
        with pytest.raises(ZeroDivisionError), sessions.session_scope(UPDATE) as session:
            assert session.begun
            session.n = 1
            raise ZeroDivisionError
        assert storage.get("shop:user:1") == {"begun": True, "n": 1, "$version": 2}
        assert (sessions.dedupe, sessions.prefix) == (3, "shop:")
        assert sessions.scopes.options.lock_timeout == 7
        assert sessions.scopes.options.migrate_eagerly
        assert sessions.scopes.observers.on_close is observe
        assert sessions.storage._waits_for_disk


@pytest.mark.parametrize("storage", [MemoryStorage(), LruMemoryStorage()])
def test_a_store_in_memory_says_what_to_take(storage: MemoryStorage) -> None:
    for one in (storage, SessionManager(storage=storage)):
        with pytest.raises(TypeError, match=r"other process .*SQLiteStorage\(path\)"):
            pickle.dumps(one)


@pytest.mark.parametrize(("ttl", "lease"), [(None, 30.0), (0.001, 0.3), (86_400.123, 7)])
def test_a_storage_in_redis_keeps_what_its_server_is_told(
    redis_url: str, ttl: float | None, lease: float
) -> None:
    from session_sync import RedisStorage

    with closing(RedisStorage(redis_url, ttl, lease, prefix="b\ud800t:")) as storage:
        with closing(pickle.loads(pickle.dumps(storage))) as other:
            assert (other.lease, other._ttl) == (storage.lease, storage._ttl)
            assert other._names.of_opening("key", b"token") == storage._names.of_opening(
                "key", b"token"
            )


def test_a_storage_that_was_given_a_client_says_what_to_take(redis_url: str) -> None:
    import redis

    from session_sync import RedisStorage

    with redis.Redis.from_url(redis_url) as client:
        storage = RedisStorage(client)
        for one in (storage, SessionManager(storage=storage)):
            with pytest.raises(TypeError, match=r"a client, .* RedisStorage\('redis://host"):
                pickle.dumps(one)
