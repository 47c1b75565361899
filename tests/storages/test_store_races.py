"""What a thread does with a store while another one stands in the middle of a step of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside
from stops import Stop, stopping
from waiting import SOON, until

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionConflictError,
    SessionLockTimeoutError,
    SessionManager,
    SQLiteStorage,
    storage_from_url,
)
from session_sync.storages import (
    connections,
    filelocks,
    locked_record,
    lockfile,
    memory,
    rows,
    sqlite,
)
from session_sync.storages.background import for_each
from session_sync.storages.base import record_of
from session_sync.storages.filelocks import FileLocks
from session_sync.storages.locked_record import LockedRecord

FILES = ["sqlite:///{}/s.db", "disk:///{}/s"]

forks = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture(params=FILES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param.format(tmp_path))


def in_another_process(url: str, program: str, timeout: float = 5.0) -> str:
    """What it prints, given `storage` and the open record `opened` of `key`."""
    text = f"""
from session_sync import SessionLockTimeoutError, storage_from_url
from session_sync.storages.base import record_of
storage = storage_from_url({url!r})
try:
    opened = storage.open_record("key", {timeout!r})
except SessionLockTimeoutError:
    print("locked")
else:
    {program}
"""
    command = [sys.executable, "-c", text]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


ADD = 'opened.close(record_of({"n": opened.record["n"] + 1})); print("saved")'


def test_a_store_that_is_closed_lets_nobody_in_before_a_save_has_ended(
    url: str, threads: Threads
) -> None:
    """The save has looked whether the key is its own."""
    storage: Any = storage_from_url(url)
    storage.set("key", {"n": 0})

    def add() -> None:
        opened = storage.open_record("key", 0)
        opened.close(record_of({"n": opened.record["n"] + 1}))

    saves = Stop(LockedRecord.save, "if record:")
    thread = threads.start(stopping(add, saves))
    saves.wait()
    storage.close()
    assert in_another_process(url, ADD, timeout=0.3) == "locked"
    saves.go_on()
    thread.join(SOON)
    threads.join()
    assert in_another_process(url, ADD) == "saved"
    assert storage.get("key") == {"n": 2}
    storage.close()


def test_a_record_that_was_open_at_the_close_is_not_saved(url: str) -> None:
    storage: Any = storage_from_url(url)
    storage.set("key", {"n": 0})
    opened = storage.open_record("key", 0)
    storage.close()
    assert in_another_process(url, ADD) == "saved"
    with pytest.raises(SessionConflictError):
        opened.save(record_of({"n": 5}))
    opened.close(None)
    assert storage.get("key") == {"n": 1}
    storage.close()


def test_a_disk_storage_closes_no_connection_in_the_middle_of_a_statement(
    tmp_path: Path, threads: Threads
) -> None:
    """CPython would crash."""
    storage: Any = storage_from_url(f"disk:///{tmp_path}/s")
    uses = Stop(connections.Connections.use, "result = act(cursor, *args)")
    thread = threads.start(stopping(lambda: storage.set("key", {"a": 1}), uses))
    uses.wait()
    storage.close()
    uses.go_on()
    thread.join(SOON)
    threads.join()
    assert storage.get("key") == {"a": 1}
    storage.close()


def test_a_disk_storage_may_be_closed_as_a_thread_begins_to_use_it(
    tmp_path: Path, threads: Threads
) -> None:
    storage: Any = storage_from_url(f"disk:///{tmp_path}/s")

    def use() -> None:
        storage.set("key", {"a": 1})
        storage.set("key", {"a": 2})

    begins = Stop(connections.Connections.use, "result = act(cursor, *args)")
    thread = threads.start(stopping(use, begins))
    begins.wait()
    storage.close()
    begins.go_on()
    thread.join(SOON)
    threads.join()
    assert storage.get("key") == {"a": 2}
    storage.close()


@forks
def test_a_fork_leaves_alone_a_connection_that_another_thread_has_just_taken(
    tmp_path: Path, threads: Threads
) -> None:
    storage = SQLiteStorage(tmp_path / "s.db")
    forks_now = threading.Event()

    def fork() -> None:
        storage.get("one")  # it was the last one to use the idle connection
        forks_now.set()
        takes.wait()
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def write() -> None:
        assert forks_now.wait(SOON)
        storage.save_all({"one": record_of({"a": 1}), "two": record_of({"a": 1})}, {})

    takes = Stop(connections.Connections.take, "connection.owner = get_ident()")
    shuts = Stop(connections.Connections.shut, "if made.owner == me:  # else")
    threads.start(stopping(write, takes))
    threads.start(stopping(fork, shuts))
    shuts.wait()
    takes.go_on()
    until(lambda: not storage._connections._idle)
    shuts.go_on()
    threads.join()
    assert (storage.get("one"), storage.get("two")) == ({"a": 1}, {"a": 1})
    storage.close()


@forks
def test_a_fork_waits_for_a_connection_that_is_just_being_closed(
    tmp_path: Path, threads: Threads
) -> None:
    """Else the child inherits it open, and takes the parent's locks for its own."""
    storage = SQLiteStorage(tmp_path / "s.db")
    storage.set("key", {"n": 0})
    closes = Stop(connections.Connections.drop, "connection.close()")
    threads.start(stopping(storage.close, closes))
    closes.wait()
    assert storage._connections._made or storage._prompt._made
    closes.go_on()
    threads.join()
    assert not storage._connections._made
    storage.close()


@forks
@pytest.mark.parametrize(
    ("make", "stop"),
    [
        (lambda: MemoryStorage(ttl=60), lambda: Stop(MemoryStorage._note_age, "self._ages[key]")),
        (LruMemoryStorage, lambda: Stop(LruMemoryStorage._note_all, "idle = self._idle")),
    ],
    ids=["ttl", "lru"],
)
def test_a_store_in_memory_works_in_a_child_that_was_forked_in_the_middle_of_a_write(
    make: Callable[[], Any], stop: Callable[[], Stop], threads: Threads
) -> None:
    storage, notes = make(), stop()
    threads.start(stopping(lambda: storage.save("a", record_of({"n": 1})), notes))
    notes.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sessions: SessionManager[Any] = SessionManager(storage=storage)
            with sessions.session_scope("b") as session:
                session.n = 1
            status = int(storage.get("b") != {"n": 1})
        finally:
            os._exit(status)
    notes.go_on()
    threads.join()
    try:
        until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    finally:
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == 0


def test_what_an_interrupted_save_of_several_puts_back_expires_and_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    for interruption in everywhere(raise_outside, memory):
        with monkeypatch.context() as patch:
            patch.setattr(memory.time, "monotonic", lambda: now[0])
            now[0] = 0.0
            storage = MemoryStorage(ttl=60)
            storage.set("one", {"a": 1})
            storage.set("two", {"a": 1})
            changes = {"one": record_of({}), "two": record_of({"a": 2})}
            with contextlib.suppress(OutsideError), interruption:
                storage.save_all(changes, {})
            now[0] = 1000.0
            storage.set("three", {"a": 1})
            assert list(storage.keys()) == ["three"]


def test_a_connection_that_the_collector_has_closed_is_replaced(tmp_path: Path) -> None:
    """With a storage that something has brought back: a session that is still to be saved."""
    storage = SQLiteStorage(tmp_path / "s.db")
    storage.set("key", {"a": 1})
    for cursor in list(storage._connections._idle):
        cursor.connection.__del__()  # type: ignore[attr-defined]
    assert storage.get("key") == {"a": 1}
    storage.close()


def test_a_record_that_was_given_up_keeps_nothing_locked_when_its_write_is_refused(
    tmp_path: Path,
) -> None:
    locks = FileLocks(str(tmp_path / "locks"))
    old = locks.acquire("key", 0)
    old.release()
    with pytest.raises(SessionConflictError):
        old.begin_to_write()
    kept = locks.acquire("key", 0)
    locks.close()
    FileLocks(str(tmp_path / "locks")).acquire("key", 0).release()
    kept.release()


@pytest.mark.usefixtures("collector")
def test_a_key_whose_lock_file_the_collector_has_closed_is_not_ours(tmp_path: Path) -> None:
    """It closes the file together with all that has it; a finaliser may yet want to save."""
    said: list[type[BaseException] | None] = []

    class Owner:
        def __del__(self) -> None:
            try:
                self.handle.begin_to_write()
            except SessionConflictError as error:
                said.append(type(error))
            else:
                said.append(None)

    owner: Any = Owner()
    owner.locks = FileLocks(str(tmp_path / "locks"))
    owner.handle = owner.locks.acquire("key", 0)
    owner.file = owner.locks.generation.file()
    owner.me = owner
    owner.file.close()  # as its finaliser does, which may be called first
    del owner
    gc.collect()
    assert said == [SessionConflictError]


def test_a_key_whose_release_was_interrupted_is_not_ours_once_others_may_have_it(
    tmp_path: Path,
) -> None:
    path = f"{tmp_path}/locks"
    for interruption in everywhere(raise_outside, filelocks, lockfile, locked_record):
        locks, others = FileLocks(path), FileLocks(path)
        handle = locks.acquire("key", SOON)
        with contextlib.suppress(OutsideError), interruption:
            handle.release()
        with contextlib.suppress(SessionLockTimeoutError):
            other = others.acquire("key", 0)
            with pytest.raises(SessionConflictError):
                handle.check()
            other.release()
        handle.release()
        others.acquire("key", 0).release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finaliser
@pytest.mark.parametrize(
    ("url", "in_place"), [(FILES[0], True), (FILES[0], False), (FILES[1], False)], indirect=["url"]
)
def test_a_close_that_is_interrupted_as_it_lets_others_in_stores_nothing_when_it_is_done_again(
    url: str, in_place: bool
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    storage: Any = storage_from_url(url)
    other: Any = storage_from_url(url)
    came_in = False
    modules = (filelocks, lockfile, locked_record, connections, rows, sqlite)
    for interruption in everywhere(interrupt, *modules):
        storage.set("key", {})
        opened: Any = storage.open_record("key", SOON)
        with contextlib.suppress(KeyboardInterrupt), interruption:
            (opened.close_nowait if in_place else opened.close)(record_of({"a": 1}))
        if not interruption.happened:
            break
        with contextlib.suppress(SessionLockTimeoutError):
            other.open_record("key", 0).close(record_of({"b": 2}))
        comes_in = storage.get("key") == {"b": 2}
        opened.close(record_of({"a": 1}))
        assert storage.get("key") == ({"b": 2} if comes_in else {"a": 1})
        came_in |= comes_in
        other.open_record("key", SOON).close(None)
    assert came_in
    storage.close()
    other.close()


def test_a_close_in_redis_that_is_interrupted_anywhere_can_be_done_again(redis_url: str) -> None:
    """It was begun in place, without a wait, and its connection breaks."""
    redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
    from session_sync import RedisStorage
    from session_sync.storages.redis import connections as lines
    from session_sync.storages.redis import records, scripts, server

    client = redis.Redis.from_url(redis_url)
    client.flushall()
    storage = RedisStorage(redis_url)
    here = (records, scripts, server, lines)
    for number, interruption in enumerate(everywhere(raise_outside, *here)):
        opened: Any = storage.open_record("key", SOON)
        reached = opened._server
        written = opened._written(record_of({"n": number}))
        opened._asked = reached.send(reached.scripts.close, opened, *written)
        client.client_kill_filter(_type="normal", skipme=True)
        with contextlib.suppress(OutsideError), interruption:
            opened.close(record_of({"n": number}))
        if interruption.happened:
            opened.close(record_of({"n": number}))
        assert storage.get("key") == {"n": number}
    storage.close()
    client.close()


def test_a_wait_for_redis_that_was_interrupted_as_it_connected_breaks_no_other(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py keeps the connection, whose socket is there and whose parser is not."""
    redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
    from redis.connection import AbstractConnection

    def interrupt(*_args: object, **_options: object) -> None:
        raise OutsideError

    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    holder, storage = storage_from_url(redis_url), storage_from_url(redis_url)
    opened = holder.open_record("key", SOON)
    with pytest.raises(SessionLockTimeoutError):
        storage.open_record("key", 0)  # the first connection
    with monkeypatch.context() as patched, pytest.raises(OutsideError):
        patched.setattr(AbstractConnection, "on_connect_check_health", interrupt)
        storage.open_record("key", 1)
    with pytest.raises(SessionLockTimeoutError):
        storage.open_record("key", 0.1)
    opened.close(None)
    holder.close()
    storage.close()


def test_a_wait_for_redis_that_was_interrupted_ends_no_other(
    redis_url: str, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
    from redis.connection import AbstractConnection

    def interrupt(*_args: object, **_options: object) -> None:
        raise OutsideError

    client = redis.Redis.from_url(redis_url)
    client.flushall()
    holder, storage = storage_from_url(redis_url), storage_from_url(redis_url)
    opened = [holder.open_record(key, SOON) for key in ("one", "two")]
    with pytest.raises(SessionLockTimeoutError):
        storage.open_record("two", 0)  # the first connection
    waiting = threads.start(lambda: storage.open_record("one", SOON).close(None))
    until(lambda: client.info("clients")["blocked_clients"])
    with monkeypatch.context() as patched, pytest.raises(OutsideError):
        patched.setattr(AbstractConnection, "on_connect_check_health", interrupt)
        storage.open_record("two", SOON)
    for each in opened:
        each.close(None)
    waiting.join(SOON)
    threads.join()  # which raises what the wait has raised
    for each in (holder, storage, client):
        each.close()


def test_the_answer_to_what_was_interrupted_in_redis_is_not_taken_for_that_to_the_next_command(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py keeps a connection that was just being made, and on which it waits for an answer."""
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    from redis.connection import AbstractConnection

    def interrupt(connection: Any, **_options: object) -> None:
        connection._parser.on_connect(connection)
        connection.send_command("BLPOP", "nothing", "0.2")  # answered by nothing, after a while
        raise OutsideError

    storage = storage_from_url(redis_url)
    storage.set("key", {"n": 1})
    storage.close()
    with monkeypatch.context() as patched, pytest.raises(OutsideError):
        patched.setattr(AbstractConnection, "on_connect_check_health", interrupt)
        storage.get("key")
    assert storage.get("key") == {"n": 1}
    storage.close()


def test_a_redis_storage_that_is_closed_breaks_no_wait(redis_url: str, threads: Threads) -> None:
    redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
    from session_sync.storages.redis.storage import RedisStorage

    client = redis.Redis.from_url(redis_url)
    client.flushall()
    holder, storage = RedisStorage(redis_url), RedisStorage(redis_url)
    opened = holder.open_record("key", 0)
    waiting = threads.start(lambda: storage.open_record("key", SOON).close(None))
    until(lambda: client.info("clients")["blocked_clients"])
    storage.close()
    opened.close(None)
    waiting.join(SOON)
    threads.join()  # which raises what the wait has raised
    for each in (holder, storage, client):
        each.close()


def test_a_begun_opening_in_redis_keeps_no_token_that_another_thread_has_used(
    redis_url: str, threads: Threads
) -> None:
    redis = pytest.importorskip("redis", reason="needs the extra 'redis'")
    from session_sync.storages.redis.opening import Opener
    from session_sync.storages.redis.storage import RedisStorage

    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    storage = RedisStorage(redis_url)
    storage.set("key", {"n": 0})
    here = storage._in_process()
    begun: Any = here.record("key")
    begun.due = 0.0  # it is too old
    here.begun["key"] = begun, None

    def begin_another() -> None:
        here.note_begun(here.record("third"), None)  # type: ignore[arg-type]

    looks = Stop(Opener.note_begun, "if is_over and oldest")
    threads.start(stopping(begin_another, looks))
    looks.wait()
    opened = storage.open_record("key", SOON)
    opened.close(record_of({"n": 1}))
    looks.go_on()
    threads.join()
    begin = time.monotonic()
    storage.open_record("key", SOON).close(None)
    assert time.monotonic() - begin < SOON  # not after the lease
    here.begun.clear()
    storage.close()


def test_what_is_done_with_each_storage_is_done_with_all_though_it_fails_for_one() -> None:
    """After a fork, say."""

    class Storage:
        def __init__(self, error: Exception | None) -> None:
            self.error, self.was_reached = error, False

        def act(self) -> None:
            self.was_reached = True
            if self.error is not None:
                raise self.error

    storages = [Storage(None), Storage(OSError("the first")), Storage(None)]
    known = weakref.WeakValueDictionary(enumerate(storages))
    with pytest.raises(OSError, match="the first"):
        for_each(known, Storage.act)
    assert all(storage.was_reached for storage in storages)
