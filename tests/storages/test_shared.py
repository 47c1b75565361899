"""Stores that several processes share: what each promises, with real processes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import (
    SessionConflictError,
    SessionLockTimeoutError,
    SessionManager,
    storage_from_url,
)
from session_sync.storages import lockfile
from session_sync.storages.filelocks import FileLocks

WORKER = Path(__file__).with_name("shared_worker.py")
SOON = 20  # seconds until a test gives up waiting for what has to come

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has such locks between processes"
)


class Process:
    """A worker (see shared_worker.py) that listens and says something."""

    def __init__(self, url: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER, url, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self) -> None:
        """Let it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def rest(self) -> list[str]:
        """What it said until it ended."""
        assert self._process.stdout is not None
        return self._process.stdout.read().split()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Wait until it has done its work."""
        assert self._process.wait(60) == 0

    def clean(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


Start = Callable[..., Process]
# With a short lease, since that is for how long a killed process keeps its keys.
LEASE = 0.3

EVERY_STORE = pytest.mark.parametrize("kind", ["sqlite", "disk", "redis"], indirect=True)


@pytest.fixture(params=["sqlite", "disk"])  # of Redis alone: test_redis
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    return str(request.param)


@pytest.fixture
def url(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "redis":
        server = request.getfixturevalue("redis_url")
        return f"{server}?lease={LEASE}&prefix={tmp_path.name}:"
    return f"{kind}:///{tmp_path}/sessions"


@pytest.fixture
def start(url: str) -> Iterator[Start]:
    started: list[Process] = []

    def start(*arguments: object) -> Process:
        started.append(Process(url, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.clean()


@pytest.fixture
def sessions(url: str) -> Iterator[SessionManager[Any]]:
    with SessionManager(storage=storage_from_url(url), lock_timeout=SOON) as manager:
        yield manager


def total(sessions: SessionManager[Any], keys: int) -> int:
    values = [sessions.storage.get(f"key:{number}") for number in range(keys)]
    return sum(value["counter"] for value in values if value is not None)


# -- nothing is lost


@EVERY_STORE
@pytest.mark.parametrize("keys", [1, 50])
def test_processes_with_threads_lose_nothing(
    start: Start, sessions: SessionManager[Any], keys: int
) -> None:
    processes = [start("count", keys, 4, 250) for _ in range(4)]
    for process in processes:
        process.tell()
    for process in processes:
        process.end()
    assert total(sessions, keys) == 4000


def test_the_same_without_the_lock_loses(start: Start, sessions: SessionManager[Any]) -> None:
    processes = [start("without_lock", 1, 4, 250) for _ in range(4)]
    for process in processes:
        process.tell()
    for process in processes:
        process.end()
    assert total(sessions, 1) < 4000


def test_two_storage_objects_in_one_process_exclude_each_other(url: str, threads: Threads) -> None:
    managers = [SessionManager(storage=storage_from_url(url)) for _ in range(2)]

    def work(manager: SessionManager[Any]) -> None:
        for _ in range(200):
            with manager.session_scope("key:0") as session:
                session.counter = session.get("counter", 0) + 1

    for manager in managers * 2:
        threads.start(work, manager)
    threads.join()
    assert total(managers[0], 1) == 800
    for manager in managers:
        manager.close()


@EVERY_STORE
def test_owners_that_are_killed_lose_no_finished_flush_and_lock_nobody_out(
    start: Start, sessions: SessionManager[Any], url: str, kind: str
) -> None:
    """In mid-handler and in mid-flush, while others go on. On Redis each kill costs a lease."""
    kills = int(os.environ.get("SESSION_SYNC_KILLS", "15" if kind == "redis" else "40"))
    chance = random.Random(1)
    victims = [start("go_on_adding", f"key:{number % 2}") for number in range(4)]
    for number in range(kills):
        victim = victims[number % 4]
        for _ in range(chance.randrange(1, 30)):
            saved = int(victim.hear())
        victim.kill()
        saved = max([saved, *map(int, victim.rest()[:-1])])  # the last may be half a line
        with sessions.session_scope(f"key:{number % 2}") as session:  # free at once, or soon
            assert session.counter >= saved
        victims[number % 4] = start("go_on_adding", f"key:{number % 2}")
    for victim in victims:
        victim.kill()
    if url.startswith("sqlite"):
        file = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
def test_connections_that_are_cut_lose_and_double_nothing_that_was_reported(
    start: Start, sessions: SessionManager[Any], redis_url: str, threads: Threads
) -> None:
    import redis

    processes = [start("try_adding", "key:0", 300) for _ in range(4)]
    for process in processes:
        process.tell()
    words: list[str] = []

    def listen(process: Process) -> None:
        while word := process.hear():
            words.append(word)

    listening = [threads.start(listen, process) for process in processes]
    chance, cut = random.Random(1), 0
    with redis.Redis.from_url(redis_url) as operator:
        while any(thread.is_alive() for thread in listening):
            if len(words) > 5 * cut:  # one for each five updates
                cut += 1
                clients = operator.client_list(_type="normal")
                operator.client_kill_filter(_id=chance.choice(clients)["id"], skipme=True)
    reported = [int(word) for word in words if word != "error"]
    assert cut > 100
    assert len(reported) > 500
    assert len(set(reported)) == len(reported)
    with sessions.session_scope("key:0") as session:
        assert session.counter >= max(len(reported), *reported)


@EVERY_STORE
def test_a_chat_that_several_processes_move_while_others_write_loses_nothing(
    start: Start, sessions: SessionManager[Any]
) -> None:
    users, rounds = 30, 5
    for user in range(users):
        with sessions.session_scope(f"user:{user}:chat:-100") as session:
            session.old = rounds
    movers = [start("migrate_chat", -100, -1001234) for _ in range(2)]
    visitors = [start("visit", -1001234, users, rounds) for _ in range(4)]
    for process in visitors + movers:
        process.tell()
    moved = sum(int(process.hear()) for process in movers)
    for process in movers + visitors:
        process.end()
    assert moved == users  # each by one of them
    assert list(sessions.find(chat=-100)) == []
    for user in range(users):
        with sessions.session_scope(f"user:{user}:chat:-1001234") as session:
            assert list(session.values()) == [rounds] * 5


@EVERY_STORE
def test_a_move_that_is_killed_loses_nothing_and_is_finished_by_the_next_one(
    start: Start, sessions: SessionManager[Any]
) -> None:
    users = 200
    for user in range(users):
        with sessions.session_scope(f"user:{user}:chat:-100") as session:
            session.old = user
    mover = start("migrate_chat", -100, -1001234)
    mover.tell()
    while not any(sessions.find(chat=-1001234)):
        pass  # until it has begun
    mover.kill()
    sessions.migrate_chat(-100, -1001234)
    assert list(sessions.find(chat=-100)) == []
    for user in range(users):
        with sessions.session_scope(f"user:{user}:chat:-1001234") as session:
            assert session == {"old": user}


# -- waiting


def test_eight_processes_that_want_one_key_share_it_fairly(start: Start) -> None:
    processes = [start("turns", "key:0", 3) for _ in range(8)]
    for process in processes:
        process.tell()
    turns = sorted(int(process.hear()) for process in processes)
    # Else, some have all turns but a few; and how often the system lets each run is its affair.
    assert turns[0] * 4 >= turns[-1], turns


def test_who_comes_later_does_not_pass_who_stands_before_the_key(tmp_path: Path) -> None:
    """Not even if the key is free in that very moment."""
    path = str(tmp_path / "locks")
    first, later = FileLocks(path), FileLocks(path)
    place, file = lockfile.range_of("key"), first.generation.file()
    file.wait_for(place.gate)
    with pytest.raises(SessionLockTimeoutError):
        later.acquire("key", 0)
    file.set(place.open)
    later.acquire("key", 0).release()


def test_a_key_that_another_process_has_is_waited_for_and_others_are_not(
    start: Start, sessions: SessionManager[Any], url: str
) -> None:
    holder = start("hold", "key:0")
    assert holder.hear() == "holding"
    with sessions.session_scope("key:1") as session:
        session.a = 1
    with SessionManager(storage=storage_from_url(url), lock_timeout=0.2) as impatient:
        with pytest.raises(
            SessionLockTimeoutError, match=r"'key:0' was not unlocked within 0\.2 s: another"
        ):
            with impatient.session_scope("key:0"):
                pass
        assert len(impatient.locks) == 0
    holder.tell()
    with sessions.session_scope("key:0") as session:
        assert "held" in session


def test_who_gives_up_loses_nobodys_place(
    start: Start, sessions: SessionManager[Any], url: str, threads: Threads
) -> None:
    """The thread that waits for the kernel's lock serves whoever asks next, or lets it go."""
    holder = start("hold", "key:0", "key:1")
    assert holder.hear() == "holding"

    async def give_up(key: str) -> None:
        async with sessions.session_scope(key):
            raise AssertionError("another process has it")

    async def main() -> None:
        tasks = [asyncio.create_task(give_up(f"key:{number}")) for number in (0, 1)]
        while sessions.storage._locks.waiting() < {"key:0", "key:1"}:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(main())
    entered = threading.Event()

    def work() -> None:
        with sessions.session_scope("key:0") as session:
            entered.set()
            session.mine = True

    threads.start(work)
    holder.tell()
    threads.join()
    with SessionManager(storage=storage_from_url(url), lock_timeout=SOON) as other:
        with other.session_scope("key:1") as session:  # nobody asked again: it was let go
            assert not session.get("mine")
        with other.session_scope("key:0") as session:
            assert session.mine
    assert sessions.storage._locks.waiting() == set()  # type: ignore[attr-defined]


def test_those_who_wait_for_another_process_hold_up_nobody_else(
    start: Start, sessions: SessionManager[Any]
) -> None:
    """More than a pool of threads has."""
    held = [f"held:{number}" for number in range(40)]
    holder = start("hold", *held)
    assert holder.hear() == "holding"

    async def use(key: str) -> None:
        async with sessions.session_scope(key) as session:
            session.a = 1

    async def main() -> None:
        waiting = [asyncio.create_task(use(key)) for key in held]
        while len(sessions.storage._locks.waiting()) < len(held):  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        for number in range(50):
            await asyncio.wait_for(use(f"key:{number}"), SOON)
        assert not any(task.done() for task in waiting)
        holder.tell()
        await asyncio.wait_for(asyncio.gather(*waiting), SOON)

    asyncio.run(main())


def test_who_waits_does_not_keep_the_process_from_ending(start: Start, url: str) -> None:
    holder = start("hold", "key:0")
    assert holder.hear() == "holding"
    program = f"""if True:
        import asyncio, os
        from session_sync import SessionManager, storage_from_url
        sessions = SessionManager(storage=storage_from_url({url!r}), lock_timeout=None)
        async def use():
            async with sessions.session_scope("key:0"):
                pass
        async def main():
            task = asyncio.create_task(use())
            while not sessions.storage._locks.waiting():
                await asyncio.sleep(0.01)
        asyncio.run(main())
        print("ended")
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON, check=True
    )
    assert done.stdout == "ended\n"


def test_a_store_that_hangs_does_not_keep_the_process_from_ending() -> None:
    program = """if True:
        import asyncio, threading
        from session_sync import MemoryStorage, SessionManager

        class Hanging(MemoryStorage):
            blocking = True
            hangs = threading.Event()

            def load(self, key):
                self.hangs.set()
                threading.Event().wait()

        async def use():
            async with SessionManager(storage=Hanging()).session_scope("key"):
                pass

        loop = asyncio.new_event_loop()
        task = loop.create_task(use())
        loop.run_until_complete(asyncio.sleep(0))
        assert Hanging.hangs.wait(20)
        print("ended", flush=True)
    """
    call = [sys.executable, "-W", "ignore", "-c", program]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.communicate(timeout=SOON)[0] == b"ended\n"
        finally:
            process.kill()


# -- fork


def in_a_child(work: Callable[[], object]) -> int:
    """Fork; the child does `work` and exits with 0 if that raised nothing."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@EVERY_STORE
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_manager_made_before_the_fork_works_in_every_child(
    sessions: SessionManager[Any],
) -> None:
    def work() -> None:
        for _ in range(50):
            with sessions.session_scope("key:0") as session:
                session.counter = session.get("counter", 0) + 1

    async def awork() -> None:
        for _ in range(50):
            async with sessions.session_scope("key:0") as session:
                session.counter = session.get("counter", 0) + 1

    work()  # so that there are connections and threads to inherit
    asyncio.run(awork())
    children = [in_a_child(work), in_a_child(lambda: asyncio.run(awork())), in_a_child(work)]
    work()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert total(sessions, 1) == 300


def test_what_was_open_at_the_fork_is_not_saved_by_the_child(
    sessions: SessionManager[Any],
) -> None:
    with sessions.session_scope("key:0") as session:
        session.who = "parent"

        def work() -> None:
            session.who = "child"
            with pytest.raises(SessionConflictError, match="before this process was forked"):
                session.flush()

        assert os.waitpid(in_a_child(work), 0)[1] == 0
    assert sessions.storage.get("key:0") == {"who": "parent"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_keeps_nothing_of_its_parents_locks(start: Start, url: str) -> None:
    """Neither those that the parent has, nor those that it waits for."""
    holder = start("hold", "key:0")
    assert holder.hear() == "holding"
    parent = storage_from_url(url)
    parent.open_record("key:1", 0)  # type: ignore[attr-defined]
    with pytest.raises(SessionLockTimeoutError):
        parent.open_record("key:0", 0.01)  # type: ignore[attr-defined] # a thread goes on waiting
    read, write = os.pipe()
    child = in_a_child(lambda: os.read(read, 1))
    parent.close()  # type: ignore[attr-defined]
    holder.tell()
    holder.end()
    with SessionManager(storage=storage_from_url(url), lock_timeout=SOON) as other:
        for key in ("key:0", "key:1"):
            with other.session_scope(key) as session:
                session.free = True
    os.write(write, b"x")
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)
    os.close(write)


# -- what the system does


def test_a_full_disk_leaves_the_old_value_and_a_free_key(
    start: Start, sessions: SessionManager[Any], url: str, tmp_path: Path
) -> None:
    with sessions.session_scope("key:0") as session:
        session.counter = 1
    sessions.storage.close()
    folder = tmp_path if url.startswith("sqlite") else tmp_path / "sessions"
    process = start("full_disk", "key:0", folder)
    assert process.hear() in ("OperationalError", "OSError", "DatabaseError", "FullError")
    assert process.hear() == "1"
    process.end()
    with sessions.session_scope("key:0") as session:
        session.counter += 1
    assert total(sessions, 1) == 2


def test_a_read_only_folder_leaves_the_old_value_and_a_free_key(kind: str) -> None:
    # Not in pytest's folder, into which root alone can look.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        url = f"{kind}:///{parent}/folder/{'sessions.db' if kind == 'sqlite' else ''}"
        with SessionManager(storage=storage_from_url(url)) as sessions:
            with sessions.session_scope("key:0") as session:
                session.counter = 1
        process = Process(url, "read_only", "key:0", f"{parent}/folder")
        try:
            assert process.hear() in ("OperationalError", "PermissionError")
            assert process.hear() == "0"
            process.end()
        finally:
            process.clean()
        for path in [Path(parent, "folder"), *Path(parent, "folder").iterdir()]:
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.chown(path, os.geteuid(), os.getegid())
        with SessionManager(storage=storage_from_url(url)) as sessions:
            assert total(sessions, 1) == 1


def test_on_a_system_without_such_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("session_sync.storages.filelocks.HAS_OFD", False)
    with pytest.warns(RuntimeWarning, match="not locked between processes"):
        locks = FileLocks(str(tmp_path / "locks"))
    locks.acquire("key", 0).release()
    assert not (tmp_path / "locks").exists()
