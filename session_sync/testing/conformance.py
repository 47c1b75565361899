"""What any storage must do: a suite of tests for your own adapter.

It needs no test framework; pytest finds its methods by their names.

This module knows the four methods of a storage; it knows no test framework.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..manager import SessionManager
from ..storages.base import KVStorage, ListableStorage, TtlStorage

#: Keys that a storage may take for one another, for a path, or for a name of its own.
KEYS = (
    "user:1:chat:1",
    "user:1:chat:10",
    "user:1:chat:1:lock",
    "user:1:chat:1.lock",
    "",
    "user:1:chat:-1001234567890:thread:5:key:cart",
    "bot/../../etc/passwd",
    "..",
    "C:\\key",
    "CASE",
    "case",
    "ключ 🔑 %2F%00",
    "user:1:chat:1:key:" + "long" * 60,
)


class StorageConformance:
    """Tests that every `KVStorage` must pass. Inherit, say how to make an empty storage, and run
    pytest.

    A storage that outlives its object says in `reopen` how another object finds the same data.

    >>> from session_sync import MemoryStorage
    >>> class TestMyStorage(StorageConformance):
    ...     def make_storage(self):
    ...         return MemoryStorage()
    >>> TestMyStorage().test_what_is_set_can_be_read()
    """

    def make_storage(self) -> KVStorage[Any]:
        """A new, empty storage."""
        raise NotImplementedError("say how to make a storage: def make_storage(self): return ...")

    def reopen(self, storage: KVStorage[Any]) -> KVStorage[Any]:
        """Another object for the data of `storage`; the same one, if it cannot have two."""
        return storage

    # -- get, set, delete, has

    def test_a_key_that_was_never_set_is_not_there(self) -> None:
        storage = self.make_storage()
        assert storage.get("user:1") is None
        assert not storage.has("user:1")
        storage.delete("user:1")  # no error

    def test_what_is_set_can_be_read(self) -> None:
        storage = self.make_storage()
        storage.set("user:1", {"counter": 1})
        assert storage.get("user:1") == {"counter": 1}
        assert storage.has("user:1")
        assert self.reopen(storage).get("user:1") == {"counter": 1}

    def test_a_second_set_replaces_the_whole_value(self) -> None:
        storage = self.make_storage()
        storage.set("user:1", {"counter": 1, "name": "Alex"})
        storage.set("user:1", {"counter": 2})
        assert storage.get("user:1") == {"counter": 2}
        assert self.reopen(storage).get("user:1") == {"counter": 2}

    def test_what_is_deleted_is_gone(self) -> None:
        storage = self.make_storage()
        storage.set("user:1", {"counter": 1})
        storage.set("user:2", {"counter": 2})
        storage.delete("user:1")
        assert storage.get("user:1") is None
        assert not storage.has("user:1")
        assert self.reopen(storage).get("user:1") is None
        assert storage.get("user:2") == {"counter": 2}

    def test_keys_of_any_form_are_kept_apart(self) -> None:
        storage = self.make_storage()
        for number, key in enumerate(KEYS):
            storage.set(key, {"number": number})
        for number, key in enumerate(KEYS):
            assert storage.get(key) == {"number": number}, key
            storage.delete(key)
            assert not storage.has(key), key

    def test_values_come_back_as_they_were(self) -> None:
        storage = self.make_storage()
        value = {
            "none": None,
            "yes": True,
            "small": -1,
            "big": 2**53 + 1,
            "half": 0.5,
            "text": "naïve ☕ \n \\ \" '",
            "long": "x" * 1_000_000,
            "list": [1, [2, [3, {}]], []],
            "dict": {"a": {"b": {"c": None}}},
        }
        storage.set("user:1", value)
        back = self.reopen(storage).get("user:1")
        assert back is not None
        assert dict(back) == value
        assert back["yes"] is True
        assert list(back) == list(value)  # a dict keeps its order

    # -- what a storage may do beyond

    def test_all_keys_are_listed_once(self) -> None:
        storage = self.make_storage()
        if not isinstance(storage, ListableStorage):
            return
        assert list(storage.keys()) == []
        for key in KEYS:
            storage.set(key, {"a": 1})
            storage.set(key, {"a": 2})
        storage.delete(KEYS[0])
        assert sorted(storage.keys()) == sorted(KEYS[1:])

    def test_touching_is_no_error_and_changes_nothing(self) -> None:
        storage = self.make_storage()
        if not isinstance(storage, TtlStorage):
            return
        storage.touch("user:1")
        assert not storage.has("user:1")
        storage.set("user:1", {"counter": 1})
        storage.touch("user:1")
        assert storage.get("user:1") == {"counter": 1}

    # -- by many threads

    def test_threads_with_keys_of_their_own_do_not_disturb_each_other(self) -> None:
        storage = self.make_storage()

        def work(number: int) -> None:
            key = f"user:{number}"
            for count in range(20):
                storage.set(key, {"count": count})
                assert storage.get(key) == {"count": count}

        _in_threads(work)
        assert [storage.get(f"user:{n}") for n in range(8)] == [{"count": 19}] * 8

    def test_a_value_is_never_half_written(self) -> None:
        storage = self.make_storage()
        storage.set("user:1", {"a": 0, "b": [0] * 100})

        def work(number: int) -> None:
            for _ in range(20):
                storage.set("user:1", {"a": number, "b": [number] * 100})
                value = storage.get("user:1")
                assert value is not None
                assert value["b"] == [value["a"]] * 100

        _in_threads(work)

    # -- under a session manager

    def test_sessions_keep_every_update(self) -> None:
        storage = self.make_storage()
        sessions = SessionManager(storage=storage)

        def work(number: int) -> None:
            for _ in range(10):
                with sessions.session_scope("user:1") as session:
                    session["count"] = session.get("count", 0) + 1
                    session.setdefault("by", []).append(number)

        _in_threads(work)
        with SessionManager(storage=self.reopen(storage)).session_scope("user:1") as session:
            assert session["count"] == 80
            assert sorted(session["by"]) == sorted(list(range(8)) * 10)

    def test_a_handler_that_raises_changes_nothing(self) -> None:
        storage = self.make_storage()
        sessions = SessionManager(storage=storage)
        with sessions.session_scope("user:1") as session:
            session["cart"] = {"items": ["tea"]}
        try:
            with sessions.session_scope("user:1") as session:
                session["cart"]["items"].append("milk")
                raise _HandlerError
        except _HandlerError:
            pass
        with sessions.session_scope("user:1") as session:
            assert session == {"cart": {"items": ["tea"]}}

    def test_an_emptied_session_is_deleted(self) -> None:
        storage = self.make_storage()
        sessions = SessionManager(storage=storage)
        with sessions.session_scope("user:1") as session:
            session["counter"] = 1
        assert storage.has("user:1")
        with sessions.session_scope("user:1") as session:
            session.clear()
        assert not storage.has("user:1")


class _HandlerError(Exception):
    pass


def _in_threads(work: Callable[[int], None]) -> None:
    """Run `work` in eight threads at once; the first error is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
