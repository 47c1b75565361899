"""What the suite for shared storages does and checks again and again.

This module knows the protocols of `session_sync.storages.base`; it knows no storage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import SkipTest

from ..errors import SessionLockTimeoutError
from ..storages.base import AtomicStorage, NonBlockingStorage
from .other_process import SOON, fields_of


def raised(kind: type[Exception], act: Callable[[], object]) -> Exception:
    """What `act` raises, which must be of this kind."""
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def refused(storage: Any, key: str, timeout: float) -> Exception:
    """How `storage` refuses to open `key`; in a thread, as it may never do so."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            storage.open_record(key, timeout).close(None)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + SOON)
    assert outcome, f"open_record with a timeout of {timeout:g} s still waits"
    error = outcome[0]
    assert error is not None, f"{key!r} was opened while another process had it open"
    if not isinstance(error, SessionLockTimeoutError):
        raise error
    return error


def check_count(stored: Mapping[str, Any] | None, expected: int) -> None:
    count = 0 if stored is None else stored["count"]
    assert count == expected, f"{expected - count} of {expected} increments were lost"


def non_blocking(storage: Any) -> Any:
    if not isinstance(storage, NonBlockingStorage):
        raise SkipTest("this storage has no open_nowait(): coroutines open it in threads")
    return storage


def opened_nowait(storage: Any, key: str) -> Any:
    """A record that was opened without waiting: that may fail often, but not always."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        opened = storage.open_nowait(key)
        if opened is not None:
            return opened
        storage.open_record(key, SOON).close(None)  # which goes on with what was begun
        time.sleep(0.02)
    raise AssertionError(f"open_nowait has opened nothing for {SOON:g} s, though the key was free")


def opened_three(storage: Any) -> dict[str, Any]:
    can_save_all(storage)
    opened = {key: storage.open_record(key, SOON) for key in "abc"}
    for each in opened.values():
        each.save({"n": 1})
    return opened


def can_save_all(storage: Any) -> None:
    if not isinstance(storage, AtomicStorage):
        raise SkipTest("this storage has no save_all(): several sessions are saved in turn")


def save_all(storage: Any, records: Mapping[str, Any], opened: Mapping[str, Any]) -> None:
    before = {key: fields_of(storage.get(key)) for key in records}
    if not storage.save_all(records, opened):
        after = {key: fields_of(storage.get(key)) for key in records}
        assert after == before, "save_all has returned False, and stored something"
        raise SkipTest("this storage cannot save these keys in one step: save_all returned False")
