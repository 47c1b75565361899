"""From one store to another, by function; by command: see test_cli_transfer.py."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import (
    MemoryStorage,
    SessionManager,
    copy_storage,
    storage_from_url,
    ttl,
)


def urls(tmp_path: Path) -> list[str]:
    return [f"sqlite:///{tmp_path}/a.db", f"disk:///{tmp_path}/folder"]


def test_everything_goes_over_and_comes_back(tmp_path: Path) -> None:
    sqlite, disk = (storage_from_url(url) for url in urls(tmp_path))
    original = MemoryStorage()
    with SessionManager(storage=original).session_scope("user:1") as session:
        session.update(a=1, b={2: {3}}, code=ttl("x", 1000))
    for number in range(2, 50):
        original.set(f"user:{number}", {"n": number})
    keys: list[str] = []
    assert copy_storage(original, sqlite, progress=keys.append) == 49
    assert sorted(keys) == sorted(original.keys())
    assert copy_storage(sqlite, disk) == 49
    back = MemoryStorage()
    assert copy_storage(disk, back) == 49
    assert {key: back.get(key) for key in back.keys()} == {
        key: original.get(key) for key in original.keys()
    }
    for storage in (sqlite, disk):
        storage.close()  # type: ignore[attr-defined]


def test_a_running_bot_loses_nothing(threads: Threads) -> None:
    source, target = MemoryStorage(), MemoryStorage()
    for number in range(100):
        source.set(f"user:{number}", {"a": 0, "b": 0})
    bot: SessionManager[Any] = SessionManager(storage=source)

    def work() -> None:
        for number in [*range(100)] * 20:
            with bot.session_scope(f"user:{number}") as session:
                session.a += 1
                session.b += 1

    threads.start(work)
    assert copy_storage(source, target) == 100
    threads.join()
    for key in target.keys():
        fields = target.get(key)
        assert fields is not None
        assert fields["a"] == fields["b"]


def test_a_session_that_is_open_is_copied_when_it_has_closed(threads: Threads) -> None:
    source, target = MemoryStorage(), MemoryStorage()
    source.set("user:1", {"a": 0})
    copied = threading.Event()
    bot: SessionManager[Any] = SessionManager(storage=source)
    with bot.session_scope("user:1") as session:
        threads.start(lambda: copy_storage(source, target, progress=lambda key: copied.set()))
        session.a = 1
        assert not copied.wait(0.2)  # with no lock it has long been copied
    threads.join()
    assert target.get("user:1") == {"a": 1}


def test_what_cannot_be_copied_is_named_and_the_rest_is_copied() -> None:
    source, target = MemoryStorage(), MemoryStorage(strict=True)
    source.set("user:1", {"a": 1})
    source.set("user:2", {"a": object()})
    source.set("user:3", {"a": 3})
    with pytest.raises(ExceptionGroup, match="1 sessions were not copied, 2 were") as caught:
        copy_storage(source, target)
    assert "user:2" in str(caught.value.exceptions[0])
    assert sorted(target.keys()) == ["user:1", "user:3"]


def test_a_store_that_cannot_list_is_refused() -> None:
    class Plain:
        def get(self, key: str) -> Any: ...
        def set(self, key: str, value: Any) -> None: ...
        def delete(self, key: str) -> None: ...
        def has(self, key: str) -> bool:
            return False

    with pytest.raises(TypeError, match="Plain cannot list its keys"):
        copy_storage(Plain(), MemoryStorage())
