"""Storage objects of one store, in this process and in others, which do what a test tells them.

The others are spawned, not forked: so they inherit no open file and no lock. This module knows
storages and open records; it does not know what a test expects of them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final
from unittest import SkipTest

from ..errors import SessionConflictError, SessionLockTimeoutError
from ..manager import SessionManager

SOON: Final = 30.0  # seconds until a test gives up waiting for what has to come
_OUTCOMES: Final = {"timeout": SessionLockTimeoutError, "conflict": SessionConflictError}


class OtherProcess:
    """A spawned process. What it is told to do, and what that returns or raises, goes through a
    pipe; the methods it has are those of `_Worker`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def start(self, name: str, *arguments: object) -> None:
        """Tell it to begin; `result` waits until it has done so."""
        self._pipe.send((name, arguments))

    def result(self, timeout: float = 2 * SOON) -> Any:
        """What it has returned. Raises SessionLockTimeoutError and SessionConflictError as they
        were raised there, AssertionError for everything else, also if nothing comes."""
        if not self._pipe.poll(timeout):
            raise AssertionError(f"the other process has not answered for {timeout:g} s")
        try:
            outcome, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise AssertionError(
                "the other process has ended; what it has written to stderr says why"
            ) from None
        if outcome == "returned":
            return value
        error = _OUTCOMES.get(outcome, AssertionError)
        raise error(value if error is not AssertionError else f"in the other process: {value}")

    def call(self, name: str, *arguments: object) -> Any:
        """Do it, and wait until it is done."""
        self.start(name, *arguments)
        return self.result()

    def is_refused(self, key: str) -> bool:
        """Whether it cannot open `key` now. If it could, it closes it again."""
        try:
            self.call("open", key, 0)
        except SessionLockTimeoutError:
            return True
        self.call("close", key, None)
        return False

    def kill(self) -> None:
        """SIGKILL: it can do nothing any more."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


_idle: Final[list[OtherProcess]] = []  # a new one takes half a second


def borrow(factory: Callable[[], Any]) -> OtherProcess:
    """A process with a storage of `factory`'s.

    Raises TypeError if that cannot be pickled."""
    try:
        pickled = pickle.dumps(factory)
    except Exception as error:
        raise TypeError(
            f"what make_factory() returns must be picklable, since it is called in other processes "
            f"too: a class or function at the top of a module, or a functools.partial of one "
            f"({error})"
        ) from error
    while _idle:
        process = _idle.pop()
        if process.is_alive():
            break
    else:
        process = OtherProcess()
    try:
        process.call("make", pickled)
    except BaseException:
        process.kill()
        raise
    return process


def give_back(process: OtherProcess) -> None:
    """Keep it for the next test."""
    if process.is_alive():
        process.call("clear")
        _idle.append(process)


class SharedStore:
    """One store for one test: storage objects of it here, and in other processes."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory: Final = factory
        self._storages: Final[list[Any]] = []
        self._processes: Final[list[OtherProcess]] = []

    def here(self) -> Any:
        self._storages.append(self._factory())
        return self._storages[-1]

    def elsewhere(self) -> OtherProcess:
        self._processes.append(borrow(self._factory))
        return self._processes[-1]

    def __enter__(self) -> SharedStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        try:
            for process in self._processes:
                if kind is None or issubclass(kind, SkipTest):
                    give_back(process)
                else:  # in which state it is, is unknown
                    process.kill()
        finally:
            for storage in self._storages:
                close_storage(storage)


def _serve(pipe: Connection) -> None:
    """In the other process: do what comes through the pipe, until nothing comes any more."""
    worker = _Worker()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            name, arguments = pipe.recv()
            pipe.send(_outcome(getattr(worker, name), *arguments))


def _outcome(act: Callable[..., object], *arguments: object) -> tuple[str, object]:
    try:
        return "returned", act(*arguments)
    except SessionLockTimeoutError as error:
        return "timeout", str(error)
    except SessionConflictError as error:
        return "conflict", str(error)
    except Exception:
        return "failed", traceback.format_exc()


class _Worker:
    """What the other process can be told to do."""

    def __init__(self) -> None:
        self._storage: Any = None
        self._opened: dict[str, Any] = {}

    def make(self, pickled: bytes) -> None:
        self._storage = pickle.loads(pickled)()

    def clear(self) -> None:
        self._opened.clear()
        close_storage(self._storage)
        self._storage = None

    def pid(self) -> int:
        return os.getpid()

    def open(self, key: str, timeout: float) -> dict[str, Any] | None:
        """Open `key`, and tell what is stored."""
        self._opened[key] = self._storage.open_record(key, timeout)
        return fields_of(self._opened[key].record)

    def save(self, key: str, fields: dict[str, Any]) -> None:
        self._opened[key].save(fields)

    def close(self, key: str, fields: dict[str, Any] | None) -> None:
        self._opened.pop(key).close(fields)

    def get(self, key: str) -> dict[str, Any] | None:
        return fields_of(self._storage.get(key))

    def count(self, key: str, times: int) -> None:
        """Add 1, in a handler of a thread."""
        sessions = SessionManager(storage=self._storage, lock_timeout=2 * SOON)
        add(sessions, key, times)

    def count_in_coroutines(self, key: str, times: int) -> None:
        """Add 1, in async handlers."""
        sessions = SessionManager(storage=self._storage, lock_timeout=2 * SOON)

        async def add_some() -> None:
            for _ in range(times):
                async with sessions.session_scope(key) as session:
                    count = session.get("count", 0)
                    await asyncio.sleep(0.0002)
                    session["count"] = count + 1

        asyncio.run(add_some())

    def save_all_forever(self, *keys: str) -> None:
        """Store one number under all keys, and the next one, until this process is killed."""
        opened = {key: self._storage.open_record(key, SOON) for key in keys}
        number = opened[keys[0]].record["n"]
        while True:
            number += 1
            self._storage.save_all({key: {"n": number} for key in keys}, opened)


def add(sessions: SessionManager[Any], key: str, times: int) -> None:
    """Add 1 to a field of a session, and let others in between, if they can come in."""
    for _ in range(times):
        with sessions.session_scope(key) as session:
            count = session.get("count", 0)
            time.sleep(0.0002)
            session["count"] = count + 1


def fields_of(record: Any) -> dict[str, Any] | None:
    """A record as a plain dict."""
    return None if record is None else dict(record)


def close_storage(storage: Any) -> None:
    """Close a storage, if that is something it can do."""
    close = getattr(storage, "close", None)
    if close is not None:
        close()
