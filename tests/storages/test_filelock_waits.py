"""Locks between processes: whatever comes in between, no key stays locked, and none has two owners.

Another process is another FileLocks on the same file: to the kernel, it is the same.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from conftest import Threads
from interruptions import OutsideError, everywhere, raise_outside
from waiting import until

from session_sync import SessionConflictError, SessionLockTimeoutError, SQLiteStorage
from session_sync.storages import background, filelocks, locked_record, lockfile, rows, sqlite
from session_sync.storages.base import record_of
from session_sync.storages.filelocks import FileLockHandle, FileLocks

pytestmark = [
    pytest.mark.skipif(not filelocks.HAS_OFD, reason="this system has no such locks"),
    # What comes into a finaliser, Python writes on stderr and forgets.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SOON = 20.0
HERE = (filelocks, lockfile, background)


@pytest.fixture
def locks(tmp_path: Path) -> FileLocks:
    return FileLocks(str(tmp_path / "locks"))


@pytest.fixture
def other(tmp_path: Path) -> FileLocks:
    """Those of another process."""
    return FileLocks(str(tmp_path / "locks"))


def is_free(locks: FileLocks, key: str = "key") -> bool:
    try:
        locks.acquire(key, 0).release()
    except SessionLockTimeoutError:
        return False
    return True


def descriptors(path: Path) -> int:
    """How often the file is open in this process."""
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link) == str(path) for link in links if os.path.lexists(link))


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a container: threads that wait cannot be started."""

    def fail(*_args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", fail)


def waiting_threads() -> int:
    return sum(is_waiter(frame) for frame in sys._current_frames().values())


def is_waiter(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_qualname == "_Waiter.run":
            return True
        frame = frame.f_back
    return False


# -- exceptions


def test_an_exception_at_any_place_leaves_no_key_locked(locks: FileLocks, other: FileLocks) -> None:
    for interruption in everywhere(raise_outside, *HERE):
        with contextlib.suppress(OutsideError), interruption:
            handle = locks.acquire("key", 0)
            handle.check()
            handle.release()
        handle = None  # type: ignore[assignment]
        assert is_free(other)
        assert is_free(locks)
    assert locks.generation.file().claims == {}


def test_an_exception_while_it_waits_leaves_no_key_locked(
    locks: FileLocks, other: FileLocks, threads: Threads
) -> None:
    """Nor anything that waits: the key is let go as soon as the thread has it."""
    for interruption in everywhere(raise_outside, *HERE):
        held = other.acquire("key", 0)
        over = threading.Event()

        def let_go(held: FileLockHandle = held, over: threading.Event = over) -> None:
            until(lambda: bool(locks.waiting()) or over.is_set())
            held.release()

        thread = threads.start(let_go)
        with contextlib.suppress(OutsideError), interruption:
            locks.acquire("key", SOON).release()
        over.set()
        thread.join(SOON)
        other.acquire("key", SOON).release()
        locks.acquire("key", SOON).release()
        until(lambda: not waiting_threads())
    assert locks.generation.file().claims == {}


def test_an_exception_while_it_looks_again_and_again_leaves_no_key_locked(
    locks: FileLocks, other: FileLocks, no_threads: None
) -> None:
    for interruption in everywhere(raise_outside, *HERE):
        held = other.acquire("key", 0)
        with contextlib.suppress(OutsideError, SessionLockTimeoutError), interruption:
            locks.acquire("key", 0.004)
        held.release()
        assert is_free(other)
        assert is_free(locks)
    assert locks.generation.file().claims == {}


def test_what_an_exception_cut_loose_lets_go_when_it_is_forgotten(
    locks: FileLocks, other: FileLocks
) -> None:
    """And never lets go what somebody else of this process has by now."""
    loose = locks.acquire("key", 0)
    with pytest.raises(SessionLockTimeoutError):
        locks.acquire("key", 0.05)
    del loose
    handle = locks.acquire("key", 0)
    assert not is_free(other)
    handle.release()
    handle.release()
    mine = locks.acquire("key", 0)
    handle.release()
    del handle
    assert not is_free(other)
    mine.check()
    mine.release()
    assert is_free(other)


def test_a_record_that_is_not_there_yet_frees_its_key(tmp_path: Path) -> None:
    """An exception between the lock and the record, and in the loading."""
    storage, other = SQLiteStorage(tmp_path / "s.db"), SQLiteStorage(tmp_path / "s.db")
    storage.set("key", {"a": 1})
    for interruption in everywhere(raise_outside, *HERE, locked_record, rows, sqlite):
        with contextlib.suppress(OutsideError), interruption:
            opened = storage.open_record("key", 0)
            opened.close(record_of({"a": 1}))
        opened = None  # type: ignore[assignment]
        other.open_record("key", 0).close(None)
        storage.open_record("key", 0).close(None)
        assert other.get("key") == {"a": 1}
    storage.close()
    other.close()


def test_a_closed_record_saves_nothing(tmp_path: Path) -> None:
    """A signal handler may have closed it, before the one that was about to save goes on."""
    storage = SQLiteStorage(tmp_path / "s.db")
    opened = storage.open_record("key", 0)
    opened.close(record_of({"a": 1}))
    with pytest.raises(SessionConflictError, match="'key' was closed"):
        opened.save(record_of({"a": 2}))
    assert storage.get("key") == {"a": 1}
    storage.close()


# -- nested calls: by a signal handler, or a finaliser, in the thread that is inside


def test_a_nested_call_for_another_key_at_any_place(locks: FileLocks, other: FileLocks) -> None:
    def nested() -> None:
        handle = locks.acquire("another", 0)
        assert not is_free(other, "another")
        handle.release()
        assert is_free(other, "another")

    for interruption in everywhere(nested, *HERE):
        locks = FileLocks(other._path)  # which opens its file at its first use
        with interruption:
            handle = locks.acquire("key", 0)
            owned = not is_free(other)
            handle.check()
            handle.release()
        assert owned
        assert is_free(other)
        assert locks.generation.file().claims == {}
        assert len(locks.generation._open_files()) == 1


def test_a_nested_call_for_the_same_key_never_makes_two_owners(
    locks: FileLocks, other: FileLocks
) -> None:
    outcomes = []

    def nested() -> None:
        try:
            handle = locks.acquire("key", 0.003)
        except SessionLockTimeoutError:
            outcomes.append(False)
            return
        outcomes.append(True)
        assert not is_free(other)
        handle.release()

    for interruption in everywhere(nested, *HERE):
        with interruption, contextlib.suppress(SessionLockTimeoutError):
            handle = locks.acquire("key", 0)
            owned = not is_free(other)
            handle.release()
            assert owned
        assert is_free(other)
        assert is_free(locks)
    assert set(outcomes) == {True, False}


def test_whoever_comes_in_between_keeps_the_key_that_he_took(
    locks: FileLocks, other: FileLocks
) -> None:
    """Nothing that goes on afterwards in the frames beneath takes it away."""
    taken: list[FileLockHandle] = []

    def nested() -> None:
        with contextlib.suppress(SessionLockTimeoutError):
            taken.append(locks.acquire("key", 0))

    for interruption in everywhere(nested, *HERE):
        with interruption, contextlib.suppress(SessionLockTimeoutError):
            handle = locks.acquire("key", 0)
            handle.release()
        for one in taken:
            one.check()
            assert not is_free(other)
            one.release()
        taken.clear()
        assert is_free(other)


def test_a_nested_release_takes_nothing_from_who_comes_after_it(
    locks: FileLocks, other: FileLocks
) -> None:
    """A signal handler that closes the very session which is just being closed."""
    taken: list[FileLockHandle] = []

    for interruption in everywhere(lambda: nested(), *HERE):
        handle = locks.acquire("key", 0)

        def nested(handle: FileLockHandle = handle) -> None:
            handle.release()
            with contextlib.suppress(SessionLockTimeoutError):
                taken.append(locks.acquire("key", 0))

        with interruption:
            handle.release()
        for one in taken:
            assert not is_free(other)
            one.release()
        taken.clear()
        assert is_free(other)


def test_a_nested_close_is_noticed_by_who_is_beneath(locks: FileLocks, other: FileLocks) -> None:
    for interruption in everywhere(lambda: locks.close(), *HERE):
        with interruption, contextlib.suppress(SessionLockTimeoutError):
            handle = locks.acquire("key", 0)
            if is_free(other):
                with pytest.raises(SessionConflictError):
                    handle.check()
            handle.release()
        handle = None  # type: ignore[assignment]
        assert is_free(other)
        assert is_free(locks)


def test_what_was_taken_before_a_close_lets_go_nothing_of_today(
    locks: FileLocks, other: FileLocks, tmp_path: Path
) -> None:
    before = locks.acquire("key", 0)
    locks.close()
    today = locks.acquire("key", 0)
    before.release()
    assert not is_free(other)
    with pytest.raises(SessionConflictError):
        before.check()
    today.check()
    today.release()
    other.close()
    locks.close()
    del before, today
    assert descriptors(tmp_path / "locks") == 0


# -- threads that wait


def test_where_no_thread_can_be_started_time_outs_are_kept_and_nothing_is_left(
    locks: FileLocks, other: FileLocks, no_threads: None, tmp_path: Path
) -> None:
    held = other.acquire("key", 0)
    is_free(locks, "another")
    before = descriptors(tmp_path / "locks")
    for _ in range(3):
        begin = time.monotonic()
        with pytest.raises(SessionLockTimeoutError, match="another process has it"):
            locks.acquire("key", 0.1)
        assert 0.1 <= time.monotonic() - begin < SOON
    assert locks.waiting() == set()
    assert locks.generation.file().claims == {}
    assert descriptors(tmp_path / "locks") == before
    assert not background.start_thread(lambda: None)
    held.release()
    locks.acquire("key", 0).release()


def test_without_a_thread_it_gets_the_key_that_becomes_free(
    locks: FileLocks, other: FileLocks, no_threads: None, threads: Threads
) -> None:
    held = other.acquire("key", 0)
    looked = threading.Event()

    def let_go() -> None:
        assert looked.wait(SOON)
        held.release()

    threads.start(let_go)
    threading.Timer(0, looked.set).start()
    handle = locks.acquire("key", SOON)
    assert not is_free(other)
    handle.release()


def test_a_thousand_waits_leave_64_threads_and_keep_their_time_outs(
    locks: FileLocks, other: FileLocks, tmp_path: Path
) -> None:
    until(lambda: not waiting_threads())
    held = [other.acquire(f"key:{number}", 0) for number in range(1000)]
    for number in range(1000):
        begin = time.monotonic()
        with pytest.raises(SessionLockTimeoutError):
            locks.acquire(f"key:{number}", 0.002)
        assert time.monotonic() - begin < 10
    assert waiting_threads() == 64 == len(locks.waiting())
    assert descriptors(tmp_path / "locks") == 2
    for one in held:
        one.release()
    until(lambda: not waiting_threads())
    assert locks.waiting() == set()
    assert all(is_free(each, f"key:{n}") for n in range(1000) for each in (locks, other))


def test_the_next_caller_takes_the_place_of_who_gave_up(
    locks: FileLocks, other: FileLocks, threads: Threads
) -> None:
    held = other.acquire("key", 0)
    with pytest.raises(SessionLockTimeoutError):
        locks.acquire("key", 0.01)
    assert locks.waiting() == {"key"}
    with pytest.raises(SessionLockTimeoutError):
        locks.acquire("key", 0.01)
    until(lambda: waiting_threads() == 1)
    threads.start(held.release)
    handle = locks.acquire("key", SOON)
    assert not is_free(other)
    assert is_free(other, "another")
    handle.check()
    handle.release()
    until(lambda: is_free(other))  # the thread may have to see first that nobody waits any more


def test_a_key_that_comes_when_nobody_wants_it_any_more_is_let_go(
    locks: FileLocks, other: FileLocks
) -> None:
    held = other.acquire("key", 0)
    with pytest.raises(SessionLockTimeoutError):
        locks.acquire("key", 0.01)
    held.release()
    other.acquire("key", SOON).release()
    until(lambda: not waiting_threads())
    assert is_free(other)
    assert is_free(locks)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_an_exception_ends_is_not_waited_for_for_ever(
    locks: FileLocks, other: FileLocks
) -> None:
    """It is set in that thread while the kernel lets it wait, and comes when it has the key."""
    held = other.acquire("key", 0)
    with pytest.raises(SessionLockTimeoutError):
        locks.acquire("key", 0.01)
    until(waiting_threads)  # it may not even have begun
    (ident,) = (ident for ident, frame in sys._current_frames().items() if is_waiter(frame))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))
    held.release()
    until(lambda: not waiting_threads())
    assert locks.waiting() == set()
    other.acquire("key", SOON).release()
    locks.acquire("key", 0).release()


def test_a_timer_that_raises_while_it_waits_is_raised_at_once(
    locks: FileLocks, other: FileLocks
) -> None:
    held = other.acquire("key", 0)

    def on_alarm(_number: int, _frame: object) -> None:
        raise TimeoutError("the handler's time is up")

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TimeoutError, match="the handler's time is up") as raised:
            locks.acquire("key", SOON)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    held.release()
    other.acquire("key", SOON).release()
    locks.acquire("key", SOON).release()
    assert raised.tb is not None  # nor does it matter that somebody still has the traceback


# -- forks


@pytest.mark.parametrize("fork", ["Python", "C"])
def test_a_forked_child_lets_nothing_of_its_parent_go(fork: str, tmp_path: Path) -> None:
    """Neither by a release, nor by forgetting it, nor by locking the same; in a program of its own,
    since C code that forks tells Python nothing."""
    program = f"""if True:
        import ctypes, gc, os
        from session_sync import SessionConflictError, SessionLockTimeoutError
        from session_sync.storages.filelocks import FileLocks
        path = {str(tmp_path / "locks")!r}
        def is_free(locks, key):
            try:
                locks.acquire(key, 0).release()
            except SessionLockTimeoutError:
                return False
            return True
        locks = FileLocks(path)
        handles = [locks.acquire(key, 0) for key in "abcd"]
        child = os.fork() if {fork!r} == "Python" else ctypes.PyDLL(None).fork()
        if child == 0:
            try:
                try:
                    handles[1].release()
                    del handles[2]
                    gc.collect()
                    handles[0].check()
                except SessionConflictError:
                    handles[0].release()
                    handles.clear()
                    gc.collect()
                    if not any(is_free(locks, key) for key in "abcd"):
                        locks.close()
                        os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        other = FileLocks(path)
        assert not any(is_free(other, key) for key in "abcd")
        handles[0].check()
        handles.clear()
        assert all(is_free(other, key) for key in "abcd")
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    until(lambda: not waiting_threads())
