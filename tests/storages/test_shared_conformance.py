"""The suite for shared storages on every one of ours, and on broken ones, which it must catch."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import broken_storages as broken
import pytest

from session_sync import SessionConflictError, SessionLockTimeoutError, SQLiteStorage
from session_sync.testing import SharedStorageConformance


class TestSQLite(SharedStorageConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_factory(self) -> Any:
        return partial(SQLiteStorage, self.folder / "sessions.db")

    def lose_lock(self, storage: Any, key: str, opened: Any) -> None:
        storage.close()


class TestDisk(TestSQLite):
    def make_factory(self) -> Any:
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
        from session_sync import DiskStorage

        return partial(DiskStorage, self.folder / "sessions")


class TestRedis(SharedStorageConformance):
    freed_within = 5.0

    @pytest.fixture(autouse=True)
    def _server(self, redis_url: str, tmp_path: Path) -> None:
        self.url, self.prefix = redis_url, f"{tmp_path.name}:"

    def make_factory(self) -> Any:
        from session_sync import RedisStorage

        return partial(RedisStorage, self.url, lease=1.0, prefix=self.prefix)

    def lose_lock(self, storage: Any, key: str, opened: Any) -> None:
        storage._client.delete(opened.names[1])


# What catches it. In the suite: of the five kinds that lose most, by the first test each.
BROKEN = {
    broken.ExcludesNothing: [
        "two_processes_lose_no_increment",
        "coroutines_of_two_processes_lose_no_increment",
        "a_key_that_another_process_has_open_is_refused",
        "keys_of_any_form_are_open_at_the_same_time",
        "a_waiter_gives_up_after_its_timeout",
        "a_waiter_gets_the_key_when_it_is_closed",
        "open_nowait_opens_a_key_and_locks_it",
    ],
    broken.HasNoFence: [
        "a_record_whose_lock_was_lost_writes_nothing",
        "a_record_whose_lock_was_lost_does_not_unlock_the_next_owner",
        "close_nowait_writes_nothing_when_the_lock_was_lost",
    ],
    broken.WaitsInOpenNowait: ["open_nowait_refuses_what_another_process_has_open_and_never_waits"],
    broken.WaitsForEverInOpenNowait: [
        "open_nowait_refuses_what_another_process_has_open_and_never_waits"
    ],
    broken.GivesWhatIsLocked: [
        "coroutines_of_two_processes_lose_no_increment",
        "open_nowait_refuses_what_another_process_has_open_and_never_waits",
        "open_nowait_opens_a_key_and_locks_it",
    ],
    broken.NeverOpensNowait: ["open_nowait_opens_a_key_and_locks_it"],
    broken.StoresNothingInCloseNowait: [
        "close_nowait_stores_and_unlocks_or_lets_close_do_it",
        "coroutines_of_two_processes_lose_no_increment",
    ],
    broken.SavesHalf: [
        "save_all_stores_nothing_if_one_record_cannot_be_stored",
        "save_all_of_a_process_that_is_killed_is_whole",
    ],
    broken.SavesAllWithoutFence: ["save_all_stores_nothing_if_one_lock_was_lost"],
    broken.SavesHalfAndReturnsFalse: ["save_all_stores_all_and_leaves_them_open"],
    broken.NeverFreed: [
        "a_killed_process_frees_its_keys",
        "a_record_that_was_dropped_locks_nothing",
    ],
    broken.StaysLockedWhenSavingFails: [
        "a_record_that_cannot_be_stored_changes_nothing_and_locks_nothing"
    ],
    broken.UnlocksBeforeItStores: [
        "a_close_that_was_interrupted_is_finished_by_the_next_one",
        "a_record_whose_lock_was_lost_writes_nothing",
    ],
    broken.StoresTwice: ["a_close_that_was_interrupted_is_finished_by_the_next_one"],
    broken.KeepsWhatWasDropped: ["a_record_that_was_dropped_locks_nothing"],
    broken.NeverGivesUp: ["a_waiter_gives_up_after_its_timeout"],
    broken.GivesUpAtOnce: [
        "a_waiter_gives_up_after_its_timeout",
        "a_waiter_gets_the_key_when_it_is_closed",
    ],
    broken.NamesNoOwner: ["a_key_that_another_process_has_open_is_refused"],
    broken.LocksAllKeysAtOnce: ["keys_of_any_form_are_open_at_the_same_time"],
    broken.StoresEmptyRecords: ["an_empty_record_deletes"],
}
IN_THE_SUITE = (
    broken.ExcludesNothing,
    broken.HasNoFence,
    broken.GivesWhatIsLocked,
    broken.SavesHalf,
    broken.NeverFreed,
)
CASES = [(storage, name) for storage, names in BROKEN.items() for name in names]
if os.environ.get("SESSION_SYNC_BROKEN") != "all":
    CASES = [(storage, BROKEN[storage][0]) for storage in IN_THE_SUITE]


def test_a_factory_that_no_other_process_can_call_is_refused() -> None:
    class Suite(SharedStorageConformance):
        def make_factory(self) -> Any:
            return lambda: None

    with pytest.raises(TypeError, match="must be picklable"):
        Suite().test_two_processes_lose_no_increment()


def test_a_factory_that_fails_in_another_process_fails_the_test() -> None:
    class Suite(SharedStorageConformance):
        def make_factory(self) -> Any:
            return partial(SQLiteStorage, ":memory:")

    with pytest.raises(AssertionError, match=r"(?s)in the other process: .*SQLiteStorage takes"):
        Suite().test_two_processes_lose_no_increment()


def test_what_a_storage_cannot_do_is_skipped_with_a_reason(tmp_path: Path) -> None:
    class Suite(SharedStorageConformance):
        def make_factory(self) -> Any:
            return partial(SQLiteStorage, tmp_path / "sessions.db")

    with pytest.raises(SkipTest, match="lose_lock"):
        Suite().test_a_record_whose_lock_was_lost_writes_nothing()


@pytest.mark.parametrize(
    ("storage", "name"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_storage_is_caught(
    storage: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("shared_conformance", "shared_checks"):
        monkeypatch.setattr(f"session_sync.testing.{module}.SOON", 2.0)

    class Suite(SharedStorageConformance):
        freed_within = 1.0

        def make_factory(self) -> Any:
            return partial(storage, tmp_path / "sessions.db")

        def lose_lock(self, storage: Any, key: str, opened: Any) -> None:
            storage.close()

    with pytest.raises((AssertionError, SessionLockTimeoutError, SessionConflictError)) as caught:
        getattr(Suite(), f"test_{name}")()
    assert "Traceback" not in str(caught.value), "it is broken in another way"
