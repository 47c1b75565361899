"""What a storage must do that several processes share: a suite of tests for your own adapter.

It needs no test framework; pytest finds its methods by their names. What a storage cannot do is
skipped, by unittest.SkipTest, which pytest knows. This module knows the protocols of
`session_sync.storages.base`, and what they promise; it knows no storage.
"""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Final
from unittest import SkipTest

from ..errors import SessionConflictError, SessionLockTimeoutError
from ..manager import SessionManager
from .conformance import KEYS
from .interruption import Interrupted, Interruption
from .other_process import SOON, OtherProcess, SharedStore, add, fields_of
from .shared_checks import (
    check_count,
    non_blocking,
    opened_nowait,
    opened_three,
    raised,
    refused,
    save_all,
)

_KEY: Final = "user:1"
_AT_ONCE: Final = 0.1  # seconds; the best of several tries takes less if nothing waits
_TRIES: Final = 5
_INTERRUPTIONS: Final = 60  # at so many places of a close, if it has more
_KILLS: Final = 4


class SharedStorageConformance:
    """Tests that every `SharedStorage` must pass: one with `open_record`. Inherit, say how to open
    the store from any process, and run pytest. The four methods have a suite of their own,
    `StorageConformance`.

    Each test opens the store in this process and in others, which are spawned and killed. So what
    `make_factory` returns is pickled, and has to be found by import in another process. Tests of
    optional abilities (`open_nowait`, `save_all`) are skipped where the storage has none.

    >>> from functools import partial
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from session_sync import SQLiteStorage
    >>> class TestMyStorage(SharedStorageConformance):
    ...     def make_factory(self):
    ...         return partial(SQLiteStorage, Path(self.folder, "sessions.db"))
    >>> with TemporaryDirectory() as TestMyStorage.folder:
    ...     TestMyStorage().test_an_empty_record_deletes()
    """

    #: How many seconds after a process was killed another one can open its keys, at the latest.
    #: With a lease, that is longer than the lease.
    freed_within: float = 2.0
    #: How many times each process adds 1, where increments are counted.
    increments: int = 200

    def make_factory(self) -> Callable[[], Any]:
        """What opens one new, empty store: each call, in any process, returns another storage
        object for it. It must be picklable: `functools.partial(MyStorage, path)`, say."""
        raise NotImplementedError(
            "say how to open a store: def make_factory(self): return partial(MyStorage, path)"
        )

    def lose_lock(self, storage: Any, key: str, opened: Any) -> None:
        """Make `opened`, the record that `storage` has open under `key`, lose its lock, so that
        another process can open the key: let its lease run out, or remove the file of its lock.

        If this is not overridden, the tests that need it are skipped. Raise SkipTest yourself if a
        lock of this storage can be lost in no way."""
        raise SkipTest("lose_lock() does not say how a lock of this storage is lost")

    # -- exclusion

    def test_two_processes_lose_no_increment(self) -> None:
        self._count_in_two_processes("count")

    def test_coroutines_of_two_processes_lose_no_increment(self) -> None:
        self._count_in_two_processes("count_in_coroutines")

    def _count_in_two_processes(self, how: str) -> None:
        with self._store() as store:
            processes = [store.elsewhere(), store.elsewhere()]
            for process in processes:
                process.start(how, _KEY, self.increments)
            for process in processes:
                process.result(timeout=SOON + self.increments / 10)
            check_count(store.here().get(_KEY), 2 * self.increments)

    def test_two_storage_objects_of_one_process_lose_no_increment(self) -> None:
        with self._store() as store:
            managers = [SessionManager(storage=store.here(), lock_timeout=SOON) for _ in range(2)]
            threads = [
                threading.Thread(target=add, args=(manager, _KEY, self.increments), daemon=True)
                for manager in managers
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            check_count(store.here().get(_KEY), 2 * self.increments)

    def test_a_key_that_another_process_has_open_is_refused(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            other.call("open", _KEY, SOON)
            error = refused(storage, _KEY, 0)
            assert str(error).strip(), "the error must say what has the key: 'another process'"
            other.call("save", _KEY, {"n": 1})  # which does not close it
            refused(storage, _KEY, 0)
            other.call("close", _KEY, {"n": 2})
            opened = storage.open_record(_KEY, SOON)
            assert fields_of(opened.record) == {"n": 2}
            assert other.is_refused(_KEY)
            opened.close(None)

    def test_keys_of_any_form_are_open_at_the_same_time(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = {key: storage.open_record(key, 0) for key in KEYS}
            for number, key in enumerate(KEYS):
                assert opened[key].record is None, key
                opened[key].save({"number": number})
            for key in KEYS:
                assert other.is_refused(key), f"{key!r} is open in two processes"
            for key in KEYS:
                opened[key].close(None)
            for number, key in enumerate(KEYS):
                assert other.call("open", key, SOON) == {"number": number}, key

    # -- waiting

    def test_a_waiter_gives_up_after_its_timeout(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            other.call("open", _KEY, SOON)
            begin = time.monotonic()
            refused(storage, _KEY, 0.3)
            waited = time.monotonic() - begin
            assert 0.25 < waited < SOON, f"a timeout of 0.3 s took {waited:.2f} s"

    def test_a_waiter_gets_the_key_when_it_is_closed(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = storage.open_record(_KEY, SOON)
            opened.save({"n": 1})
            other.start("open", _KEY, SOON)
            time.sleep(0.2)  # so that it waits
            opened.close({"n": 2})
            assert other.result() == {"n": 2}, "it was opened before the owner had closed it"

    def test_a_waiter_that_has_given_up_keeps_no_other_process_waiting(self) -> None:
        with self._store() as store:
            storage, owner, third = store.here(), store.elsewhere(), store.elsewhere()
            owner.call("open", _KEY, SOON)
            refused(storage, _KEY, 0.1)
            owner.call("close", _KEY, None)
            third.call("open", _KEY, SOON)

    # -- what is stored

    def test_an_open_record_has_what_was_stored_last(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            storage.set(_KEY, {"n": 1})
            opened = storage.open_record(_KEY, SOON)
            assert fields_of(opened.record) == {"n": 1}
            opened.save({"n": 2, "text": "naïve ☕"})
            assert other.call("get", _KEY) == {"n": 2, "text": "naïve ☕"}
            opened.save({"n": 3})
            opened.close({"n": 4})
            assert other.call("open", _KEY, SOON) == {"n": 4}

    def test_closing_without_a_record_stores_nothing(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            storage.open_record(_KEY, SOON).close(None)
            assert not storage.has(_KEY)
            storage.set(_KEY, {"n": 1})
            storage.open_record(_KEY, SOON).close(None)
            assert other.call("open", _KEY, SOON) == {"n": 1}

    def test_an_empty_record_deletes(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            for by_closing in (False, True):
                storage.set(_KEY, {"n": 1})
                opened = storage.open_record(_KEY, SOON)
                if by_closing:
                    opened.close({})
                else:
                    opened.save({})
                    assert not storage.has(_KEY)
                    opened.close(None)
                assert other.call("open", _KEY, SOON) is None
                other.call("close", _KEY, None)

    def test_a_record_that_cannot_be_stored_changes_nothing_and_locks_nothing(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = storage.open_record(_KEY, SOON)
            opened.save({"n": 1})
            raised(Exception, lambda: opened.save({"n": 2, "lock": threading.Lock()}))
            assert other.is_refused(_KEY), "a save that fails leaves the record open"
            raised(Exception, lambda: opened.close({"n": 3, "lock": threading.Lock()}))
            assert other.call("open", _KEY, SOON) == {"n": 1}

    # -- a lock that was lost

    def test_a_record_whose_lock_was_lost_writes_nothing(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = storage.open_record(_KEY, SOON)
            opened.save({"n": 1})
            self.lose_lock(storage, _KEY, opened)
            assert other.call("open", _KEY, SOON) == {"n": 1}
            other.call("close", _KEY, {"n": 2})
            raised(SessionConflictError, lambda: opened.save({"n": 3}))
            raised(SessionConflictError, lambda: opened.save({}))
            raised(SessionConflictError, lambda: opened.close({"n": 4}))
            assert other.call("open", _KEY, SOON) == {"n": 2}

    def test_a_record_whose_lock_was_lost_does_not_unlock_the_next_owner(self) -> None:
        with self._store() as store:
            storage, other, third = store.here(), store.elsewhere(), store.elsewhere()
            for record in ({"n": 2}, None):
                opened = storage.open_record(_KEY, SOON)
                opened.save({"n": 1})
                self.lose_lock(storage, _KEY, opened)
                other.call("open", _KEY, SOON)
                try:
                    opened.close(record)
                except SessionConflictError:
                    assert record is not None, "there was nothing to store"
                else:
                    assert record is None, "SessionConflictError was not raised"
                assert third.is_refused(_KEY), "it has unlocked what is another process's by now"
                other.call("close", _KEY, None)

    # -- processes that are killed

    def test_a_killed_process_frees_its_keys(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            other.call("open", _KEY, SOON)
            other.call("save", _KEY, {"n": 1})
            refused(storage, _KEY, 0)
            other.kill()
            opened = storage.open_record(_KEY, self.freed_within)
            assert fields_of(opened.record) == {"n": 1}
            opened.close(None)

    def test_a_killed_waiter_keeps_no_other_process_waiting(self) -> None:
        with self._store() as store:
            storage, waiter, third = store.here(), store.elsewhere(), store.elsewhere()
            opened = storage.open_record(_KEY, SOON)
            waiter.start("open", _KEY, SOON)
            time.sleep(0.2)  # so that it waits
            waiter.kill()
            opened.close(None)
            third.call("open", _KEY, self.freed_within)

    # -- interrupts

    def test_a_close_that_was_interrupted_is_finished_by_the_next_one(self) -> None:
        """At any place of the storage's own package: before the record is stored, the key stays
        locked; once it is unlocked, nothing is written any more."""
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = storage.open_record(_KEY, SOON)
            with Interruption(opened, 0) as whole:
                opened.close({"n": 0})
            for number in range(1, whole.places + 1, 1 + whole.places // _INTERRUPTIONS):
                for again in ({"n": number}, None):
                    _interrupt(storage, other, number, again)

    def test_a_record_that_was_dropped_locks_nothing(self) -> None:
        """As an interrupt does that comes before the caller has it."""
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            storage.open_record(_KEY, SOON)
            gc.collect()
            other.call("open", _KEY, self.freed_within)

    # -- without waiting: NonBlockingStorage

    def test_open_nowait_refuses_what_another_process_has_open_and_never_waits(self) -> None:
        with self._store() as store:
            storage, other = non_blocking(store.here()), store.elsewhere()
            opened_nowait(storage, _KEY).close(None)  # the first one may connect
            other.call("open", _KEY, SOON)
            took: list[float] = []

            def ask() -> None:
                for _ in range(_TRIES):
                    begin = time.monotonic()
                    if storage.open_nowait(_KEY) is not None:
                        return
                    took.append(time.monotonic() - begin)

            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(2 * _TRIES)
            assert not thread.is_alive(), "open_nowait waits until the key is closed"
            assert len(took) == _TRIES, "open_nowait gave a record that another process has open"
            assert min(took) < _AT_ONCE, f"open_nowait has waited for {min(took):.2f} s"

    def test_open_nowait_opens_a_key_and_locks_it(self) -> None:
        with self._store() as store:
            storage, other = non_blocking(store.here()), store.elsewhere()
            storage.set(_KEY, {"n": 1})
            opened = opened_nowait(storage, _KEY)
            assert fields_of(opened.record) == {"n": 1}
            assert other.is_refused(_KEY)
            opened.save({"n": 2})
            opened.close({"n": 3})
            assert other.call("open", _KEY, SOON) == {"n": 3}

    def test_close_nowait_stores_and_unlocks_or_lets_close_do_it(self) -> None:
        with self._store() as store:
            storage, other = non_blocking(store.here()), store.elsewhere()
            for record in ({"n": 1}, None, {"n": 2}, {}):
                before = fields_of(storage.get(_KEY))
                opened = opened_nowait(storage, _KEY)
                if not opened.close_nowait(record):
                    opened.close(record)
                expected = before if record is None else record or None
                assert other.call("open", _KEY, SOON) == expected
                other.call("close", _KEY, None)

    def test_close_nowait_writes_nothing_when_the_lock_was_lost(self) -> None:
        with self._store() as store:
            storage, other = non_blocking(store.here()), store.elsewhere()
            opened = opened_nowait(storage, _KEY)
            self.lose_lock(storage, _KEY, opened)
            other.call("open", _KEY, SOON)
            other.call("close", _KEY, {"n": 1})

            def close() -> None:
                if not opened.close_nowait({"n": 2}):
                    opened.close({"n": 2})

            raised(SessionConflictError, close)
            assert other.call("open", _KEY, SOON) == {"n": 1}

    # -- several in one step: AtomicStorage

    def test_save_all_stores_all_and_leaves_them_open(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = opened_three(storage)
            save_all(storage, {"a": {"n": 2}, "b": {}, "c": {"n": 3}}, opened)
            assert [other.call("get", key) for key in "abc"] == [{"n": 2}, None, {"n": 3}]
            assert all(other.is_refused(key) for key in "abc")
            for key in "abc":
                opened[key].close({"n": 4})
            assert [other.call("open", key, SOON) for key in "abc"] == [{"n": 4}] * 3

    def test_save_all_stores_nothing_if_one_record_cannot_be_stored(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            opened = opened_three(storage)
            for bad in "abc":
                records: dict[str, Any] = {key: {"n": 2} for key in "abc"}
                records[bad] = {"n": 2, "lock": threading.Lock()}
                raised(Exception, partial(save_all, storage, records, opened))
                assert [other.call("get", key) for key in "abc"] == [{"n": 1}] * 3

    def test_save_all_stores_nothing_if_one_lock_was_lost(self) -> None:
        with self._store() as store:
            storage, other = store.here(), store.elsewhere()
            for lost in "ac":
                opened = opened_three(storage)
                self.lose_lock(storage, lost, opened[lost])
                other.call("open", lost, SOON)
                other.call("close", lost, None)
                records = {key: {"n": 2} for key in "abc"}
                raised(SessionConflictError, partial(save_all, storage, records, opened))
                assert [other.call("get", key) for key in "abc"] == [{"n": 1}] * 3
                for each in opened.values():
                    each.close(None)

    def test_save_all_of_a_process_that_is_killed_is_whole(self) -> None:
        with self._store() as store:
            storage = store.here()
            opened = opened_three(storage)
            save_all(storage, {key: {"n": 0} for key in "abc"}, opened)
            for kill in range(_KILLS):
                for each in opened.values():
                    each.close(None)
                before = storage.get("c")
                other = store.elsewhere()
                other.start("save_all_forever", "a", "b", "c")
                end = time.monotonic() + SOON
                while storage.get("c") == before:
                    assert time.monotonic() < end, "save_all has stored nothing"
                time.sleep(0.007 * kill)
                other.kill()
                opened = {key: storage.open_record(key, self.freed_within) for key in "abc"}
                numbers = [opened[key].record["n"] for key in "abc"]
                assert len(set(numbers)) == 1, f"it was killed, and half is stored: {numbers}"

    def _store(self) -> SharedStore:
        return SharedStore(self.make_factory())


def _interrupt(
    storage: Any, other: OtherProcess, number: int, again: dict[str, Any] | None
) -> None:
    """Close a record, be interrupted at one of the places in that, and close it again."""
    opened = storage.open_record(_KEY, SOON)
    before, new = fields_of(opened.record), {"n": number}
    allowed: list[Any] = [new] if again is not None else [before, new]
    try:
        with warnings.catch_warnings(), Interruption(opened, number):
            # An interrupt may drop a file that was just opened, and that is no leak.
            warnings.simplefilter("ignore", ResourceWarning)
            opened.close(new)
    except Interrupted:
        where = f"interrupted at place {number} of a close"
        try:
            seen = other.call("open", _KEY, 0)
        except SessionLockTimeoutError:
            pass
        else:
            assert seen == new, f"{where}, the key was unlocked before its record was stored"
            other.call("close", _KEY, {"n": -number})
            allowed = [{"n": -number}]
        opened.close(again)
        seen = other.call("open", _KEY, SOON)
        assert seen in allowed, f"{where}, and closed again, it has stored {seen}, not {allowed}"
    else:  # it has fewer places this time
        assert other.call("open", _KEY, SOON) == new
    other.call("close", _KEY, None)
