"""The thread that renews leases: it comes when it can, and only the process ends it."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
from interruptions import OutsideError, everywhere, raise_outside

from session_sync.storages import background
from session_sync.storages.redis import leases
from session_sync.storages.redis.leases import Lease, Renewer

SOON = 20.0
NAME = "a renewer of a test"
HERE = (leases, background)


class Server:
    """Renews all, and counts how often."""

    def __init__(self) -> None:
        self._renewed = threading.Condition()
        self.counts: dict[int, int] = {}
        self.threads: set[int] = set()

    def renew(self, leases: Sequence[Lease], /) -> Mapping[Lease, bool]:
        with self._renewed:
            self.threads.add(threading.get_ident())
            for lease in leases:
                self.counts[id(lease)] = self.counts.get(id(lease), 0) + 1
            self._renewed.notify_all()
        return dict.fromkeys(leases, True)

    def wait_for(self, *leases: Lease, times: int = 2) -> None:
        """Until each was renewed `times` more."""
        with self._renewed:
            goals = {id(lease): self.counts.get(id(lease), 0) + times for lease in leases}
            assert self._renewed.wait_for(
                lambda: all(self.counts.get(key, 0) >= goal for key, goal in goals.items()), SOON
            )


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def renewer() -> Renewer:
    """Not the one of the process; its thread has another name."""
    return Renewer(NAME)


@contextlib.contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_args: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", fail)
        yield


def test_a_thread_that_could_not_be_started_is_started_at_the_next_lease(
    renewer: Renewer,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second, third = (Lease(server, 0.2) for _ in range(3))
    with no_threads(monkeypatch), caplog.at_level(logging.WARNING, "session_sync"):
        renewer.keep(first)
        renewer.keep(second)
    assert [record.name for record in caplog.records] == ["session_sync"]
    assert "no thread can be started to renew leases" in caplog.text
    renewer.keep(third)
    server.wait_for(first, second, third)


def test_of_two_threads_that_are_started_at_once_one_renews(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    renewer = Renewer("one of two")
    begins: list[Callable[[], object]] = []
    start = leases.start_thread
    monkeypatch.setattr(leases, "start_thread", lambda target: begins.append(target) or True)
    one, another = Lease(server, 0.03), Lease(server, 0.03)
    renewer.keep(one)
    renewer.keep(another)
    assert len(begins) == 2
    for begin in begins:
        start(begin)
    server.wait_for(one, another, times=5)
    assert len(server.threads) == 1
    assert [thread.name for thread in threading.enumerate()].count("one of two") == 1


def test_an_exception_at_any_place_does_not_keep_leases_from_being_renewed(
    server: Server,
) -> None:
    for interruption in everywhere(raise_outside, *HERE):
        one, another, third = (Lease(server, 0.03) for _ in range(3))
        some = Renewer(NAME)
        with contextlib.suppress(OutsideError), interruption:
            some.keep(one)
            some.drop(third)
            some.keep(one)
        some.keep(one)
        some.keep(another)
        server.threads.clear()
        server.wait_for(one, another)
        assert len(server.threads) == 1


def test_what_comes_into_the_middle_of_it_breaks_nothing(server: Server) -> None:
    """A finaliser in the renewing thread that closes a record, or a signal handler in another."""
    renewer = Renewer(NAME)
    renewer._owner["thread"] = 0  # no thread: what it does is done here
    others = [Lease(server, 1000) for _ in range(5)]
    for lease in others:
        renewer.keep(lease)

    def nested() -> None:
        renewer.drop(others.pop())
        others.insert(0, Lease(server, 1000))
        renewer.keep(others[0])

    for interruption in everywhere(nested, *HERE, weakref):
        due, lost = Lease(server, 0), Lease(server, 1000)
        renewer.keep(due)
        renewer.keep(lost)
        with interruption:
            renewer.keep(lost)
            assert renewer._seconds_left() <= 0
            assert due in renewer._due()[server]
            renewer.drop(due)
            renewer.drop(lost)
            assert renewer._seconds_left() > 300
        assert set(renewer._kept()) == set(others)


def test_a_lease_that_is_due_before_all_others_wakes_the_thread(
    renewer: Renewer, server: Server
) -> None:
    late, soon = Lease(server, 3000), Lease(server, 0.1)
    renewer.keep(late)
    renewer.keep(soon)
    server.wait_for(soon)


def test_a_lease_that_comes_while_the_thread_looks_wakes_it(server: Server) -> None:
    late = Lease(server, 3000)

    def nested() -> None:
        renewer.keep(soon)

    for interruption in everywhere(nested, *HERE):
        renewer, soon = Renewer(NAME), Lease(server, 1)
        renewer._owner["thread"] = 0  # no thread: what it does is done here
        renewer.keep(late)
        while not renewer._news.empty():
            renewer._news.get()
        renewer._wakes = 0.0  # as while it renews
        with interruption:
            left = renewer._seconds_left()
        if interruption.happened:
            assert left < 1 or not renewer._news.empty()


def test_nothing_but_the_end_of_the_process_ends_the_thread(
    renewer: Renewer, server: Server
) -> None:
    lease = Lease(server, 0.01)
    renewer.keep(lease)
    server.wait_for(lease)
    for error in [SystemExit, KeyboardInterrupt, MemoryError, OSError] * 5:
        for ident in server.threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(ident), ctypes.py_object(error)
            )
        lease.renewed()
        server.wait_for(lease)


@pytest.mark.parametrize("error", [OSError, ValueError, SystemExit, KeyboardInterrupt])
def test_a_storage_that_raises_holds_up_no_other(
    renewer: Renewer, server: Server, error: type[BaseException]
) -> None:
    class Broken:
        def renew(self, leases: Sequence[Lease], /) -> Mapping[Lease, bool]:
            raise error

    broken, whole = Lease(Broken(), 0.01), Lease(server, 0.03)
    renewer.keep(broken)
    renewer.keep(whole)
    server.wait_for(whole)


def test_a_lease_that_everybody_has_forgotten_is_not_renewed(
    renewer: Renewer, server: Server
) -> None:
    forgotten, kept = Lease(server, 0.03), Lease(server, 0.03)
    renewer.keep(forgotten)
    renewer.keep(kept)
    server.wait_for(forgotten, kept)
    del forgotten
    server.wait_for(kept)
    assert renewer._kept() == [kept]
