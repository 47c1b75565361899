"""The conformance suite on every storage of ours, and what is particular to those in memory."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest

from session_sync import (
    Codec,
    KVStorage,
    ListableStorage,
    LruMemoryStorage,
    MemoryStorage,
    SessionEncodeError,
    SessionManager,
    TtlStorage,
    ttl,
)
from session_sync.testing import StorageConformance


class TestMemory(StorageConformance):
    def make_storage(self) -> KVStorage[Any]:
        return MemoryStorage()


class TestMemoryWithTtl(StorageConformance):
    def make_storage(self) -> KVStorage[Any]:
        return MemoryStorage(ttl=60, strict=True)


class TestLru(StorageConformance):
    def make_storage(self) -> KVStorage[Any]:
        return LruMemoryStorage(ttl=60)


class TestDisk(StorageConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> Any:
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
        self.folder, self.made = tmp_path, []
        yield
        for storage in self.made:
            storage.close()

    def make_storage(self) -> KVStorage[Any]:
        from session_sync import DiskStorage

        self.made.append(DiskStorage(self.folder / "sessions"))
        return self.made[-1]

    def reopen(self, storage: KVStorage[Any]) -> KVStorage[Any]:
        return self.make_storage()


class TestSQLite(StorageConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> Any:
        self.folder, self.made = tmp_path, []
        yield
        for storage in self.made:
            storage.close()

    def make_storage(self) -> KVStorage[Any]:
        from session_sync import SQLiteStorage

        self.made.append(SQLiteStorage(self.folder / "sessions.db", ttl=60))
        return self.made[-1]

    def reopen(self, storage: KVStorage[Any]) -> KVStorage[Any]:
        return self.make_storage()


class Plain:
    """The least that is a storage."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return copy.deepcopy(self.values.get(key))

    def set(self, key: str, value: Any) -> None:
        assert type(value) is dict
        self.values[key] = copy.deepcopy(value)

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.values


class TestFourMethodsAreEnough(StorageConformance):
    def make_storage(self) -> KVStorage[Any]:
        return Plain()


def test_a_storage_that_can_be_touched_is_at_every_load() -> None:
    class Touched(Plain):
        touches = 0

        def touch(self, key: str) -> None:
            self.touches += 1

    storage = Touched()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions.session_scope("user:1") as session:  # there is nothing to touch
        session.counter = 1
    for touches in (1, 2):
        with sessions.session_scope("user:1") as session:
            assert session.counter == 1
        assert storage.touches == touches


def test_a_session_of_many_fields_changes_in_many_steps() -> None:
    expected = {f"field {number}": number for number in range(200)}
    sessions: SessionManager[Any] = SessionManager(storage=Plain())
    sessions.storage.set("user:1", dict(expected))
    with sessions.session_scope("user:1") as session:
        for number in range(0, 200, 5):
            session[f"field {number}"] = expected[f"field {number}"] = -number
            session.flush()
            assert sessions.storage.get("user:1") == expected
        for number in range(1, 200, 5):
            del session[f"field {number}"], expected[f"field {number}"]
        session.flush()
        assert sessions.storage.get("user:1") == expected
        session["more"] = expected["more"] = True
    assert sessions.storage.get("user:1") == expected
    assert list(sessions.storage.get("user:1")) == list(expected)


def test_what_fails_in_a_thread_of_the_conformance_suite_fails_the_test() -> None:
    class Forgetful(StorageConformance):
        def make_storage(self) -> KVStorage[Any]:
            return ForgetfulStorage()

    class ForgetfulStorage(Plain):
        def get(self, key: str) -> Any:
            raise OSError("the disk is gone")

    names = [name for name in dir(Forgetful) if "thread" in name]
    assert names
    for name in names:
        suite = Forgetful()
        with pytest.raises(OSError, match="the disk is gone"):
            getattr(suite, name)()


def test_ours_can_be_listed_and_touched() -> None:
    for storage in (MemoryStorage(), LruMemoryStorage()):
        assert isinstance(storage, KVStorage)
        assert isinstance(storage, TtlStorage)
        assert isinstance(storage, ListableStorage)


@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
def test_in_memory_containers_are_copied_and_objects_are_not(make: Any) -> None:
    storage = make()
    given = {"deep": {"list": [{1}, (2, [3])]}, "own": Counter("aa"), "ordered": OrderedDict(a=[])}
    storage.set("key", given)
    found = storage.get("key")
    assert found == given
    assert found["own"] is given["own"]
    assert found["ordered"] is given["ordered"]
    given["deep"]["list"][0].add(2)  # type: ignore[index] # it is a dict
    given["deep"]["list"][1][1].append(4)  # type: ignore[index]
    assert found == storage.get("key") | {"deep": {"list": [{1}, (2, [3])]}}
    found["deep"]["list"].clear()
    assert storage.get("key")["deep"] == {"list": [{1}, (2, [3])]}


def test_in_memory_what_comes_out_of_a_session_is_stored_as_plain_containers() -> None:
    storage = MemoryStorage()
    storage.set("key", {"cart": {"items": [{1}]}})
    with SessionManager(storage=storage).session_scope("key") as session:
        storage.set("other", {"cart": session.cart})
    cart = storage.get("other")["cart"]  # type: ignore[index] # it is there
    classes = [type(each) for each in (cart, cart["items"], cart["items"][0])]
    assert classes == [dict, list, set]
    cart["items"].append(1)  # as the session's own could not be any more
    with pytest.raises(TypeError, match="ttl"):
        storage.set("other", {"code": ttl("1234")})


@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
def test_memory_hands_out_and_takes_in_copies(make: Any) -> None:
    storage, given = make(), {"items": [1, {"a": {2}}], "pair": ([3],)}
    storage.set("k", given)
    given["items"].append(4)
    storage.get("k")["items"][1]["a"].add(5)
    storage.get("k")["pair"][0].append(6)
    assert storage.get("k") == {"items": [1, {"a": {2}}], "pair": ([3],)}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("session_sync.storages.memory.time.monotonic", clock)
    return clock


@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
def test_a_session_in_memory_lives_for_ttl_after_its_last_use(make: Any, clock: Clock) -> None:
    storage = make(ttl=10)
    sessions = SessionManager(storage=storage)
    for key in ("read", "written", "left"):
        storage.set(key, {"a": 1})
    clock.now += 6
    with sessions.session_scope("read") as session:
        assert session.a == 1
    with sessions.session_scope("written") as session:
        session.a = 2
    clock.now += 6
    assert storage.has("read")
    assert storage.get("written") == {"a": 2}
    assert not storage.has("left")
    assert storage.get("left") is None
    assert sorted(storage.keys()) == ["read", "written"]
    clock.now += 6
    storage.set("new", {"a": 1})  # what expired is removed by the next write
    assert set(storage._records) == {"new"}


def test_a_write_restarts_the_life_of_a_session_that_others_sweep(clock: Clock) -> None:
    storage = MemoryStorage(ttl=10)
    sessions = SessionManager(storage=storage)
    storage.set("slow", {"n": 1})
    with sessions.session_scope("slow") as session:
        session.n += 1
        clock.now += 20  # a handler that outlives the ttl
        storage.set("other", {"a": 1})
    assert storage.get("slow") == {"n": 2}


def test_what_has_expired_pushes_nothing_out(clock: Clock) -> None:
    storage = LruMemoryStorage(maxsize=2, ttl=10)
    storage.set("a", {"x": 1})
    storage.set("b", {"x": 1})
    storage.get("a")
    clock.now += 6
    storage.touch("b")
    clock.now += 6  # "a" has expired
    storage.set("c", {"x": 1})
    assert sorted(storage.keys()) == ["b", "c"]
    assert set(storage._idle) == {"b", "c"}


def test_the_least_recently_used_session_goes() -> None:
    storage = LruMemoryStorage(maxsize=2)
    sessions = SessionManager(storage=storage)
    for key in ("a", "b"):
        with sessions.session_scope(key) as session:
            session.x = 1
    with sessions.session_scope("a") as session:
        assert session.x == 1
    with sessions.session_scope("c") as session:
        session.x = 1
    assert sorted(storage.keys()) == ["a", "c"]
    storage.get("a")
    storage.set("d", {"x": 1})
    assert sorted(storage.keys()) == ["a", "d"]


def test_a_session_in_use_is_not_the_one_that_goes() -> None:
    storage = LruMemoryStorage(maxsize=1)
    sessions = SessionManager(storage=storage)
    storage.set("in use", {"x": 1})
    with sessions.session_scope("in use") as session:
        for number in range(5):
            with sessions.session_scope(f"other {number}") as other:
                other.x = 1
        assert session.x == 1
        assert storage.has("in use")
    assert sorted(storage.keys()) == ["in use"]
    with sessions.session_scope("in use") as session:
        session.clear()
    with sessions.session_scope("nothing"):
        pass
    assert (len(storage._idle), len(storage._in_use)) == (0, 0)


def test_strict_memory_refuses_what_a_serialising_store_would_refuse() -> None:
    class Own: ...

    sessions = SessionManager(storage=MemoryStorage(strict=True))
    with (
        pytest.raises(SessionEncodeError, match=r"cart\.items\[1\]"),
        sessions.session_scope("k") as session,
    ):
        session.cart = {"items": [1, Own()]}
    assert not sessions.storage.has("k")
    codec = Codec(encode=lambda value: ("own", None), decode=lambda name, value: Own())
    sessions = SessionManager(storage=MemoryStorage(strict=True, codec=codec))
    with sessions.session_scope("k") as session:
        session.own = Own()


@pytest.mark.parametrize("make", [MemoryStorage, LruMemoryStorage])
@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
def test_a_life_time_that_is_none_is_refused(make: Any, ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl must be"):
        make(ttl=ttl)


def test_an_lru_storage_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="maxsize must be 1 or more"):
        LruMemoryStorage(maxsize=0)
