"""What the tests of sessions share: stores, and what is stored in them."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from session_sync import LruMemoryStorage, MemoryStorage, Session, SessionManager, ttl

KEY = "user:1"

Sessions = SessionManager[Session]


class OwnStorage:
    """The four methods, as a user of the library would write them."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []

    def get(self, key: str) -> dict[str, Any] | None:
        self.calls.append("get")
        return self.kept.get(key)

    def set(self, key: str, value: dict[str, Any]) -> None:
        self.calls.append("set")
        self.kept[key] = value

    def delete(self, key: str) -> None:
        self.calls.append("delete")
        self.kept.pop(key, None)

    def has(self, key: str) -> bool:
        return key in self.kept


class PicklingStorage(OwnStorage):
    """Keeps bytes, so that nothing in it is shared with anybody."""

    def get(self, key: str) -> dict[str, Any] | None:
        found: Any = super().get(key)
        return None if found is None else pickle.loads(found)

    def set(self, key: str, value: dict[str, Any]) -> None:
        super().set(key, pickle.dumps(value))  # type: ignore[arg-type]


class FailingStorage(MemoryStorage):
    """Refuses to save for as long as it is told so."""

    failing = False

    def save(self, key: str, record: Any) -> None:
        if self.failing:
            raise OSError("disk full")
        super().save(key, record)


def disk(folder: Path, **options: Any) -> Any:
    pytest.importorskip("diskcache")
    from session_sync import DiskStorage

    return DiskStorage(folder, **options)


#: The parameters of the fixture `storage`.
STORES = ["memory", "strict", "lru", "disk", "own", "pickling"]


def make_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made = {
        "memory": MemoryStorage,
        "strict": lambda: MemoryStorage(strict=True),
        "lru": lambda: LruMemoryStorage(10),
        "disk": lambda: disk(tmp_path / "sessions"),
        "own": OwnStorage,
        "pickling": PicklingStorage,
    }[request.param]()
    yield made
    getattr(made, "close", lambda: None)()


def make_sessions(storage: Any) -> Sessions:
    return SessionManager(storage=storage)


def make_in_memory() -> Sessions:
    return SessionManager()


def fill(sessions: Sessions, fields: Mapping[str, Any] = (), /, **more: Any) -> None:  # type: ignore[assignment]
    """Store a session under KEY."""
    with sessions.session_scope(KEY) as session:
        session.update(fields, **more)


def stored(sessions: Sessions, key: str = KEY) -> dict[str, Any]:
    """What lies in the store, as plain types, whatever it is."""
    return sessions.storage.get(key) or {}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types, in the same order."""
    return bool(one == other) and repr(one) == repr(other)


def closed_session(sessions: Sessions, /, **fields: Any) -> Session:
    fill(sessions, fields)
    with sessions.session_scope(KEY) as session:
        for name in session:
            session[name]
    return session


NESTED = {
    "cart": {"items": [{"name": "tea", "tags": {"hot"}}, (1, [2])], 7: None},
    "rows": [[1], [2, [3]]],
}


def into(session: Session, way: str, foreign: Any) -> Callable[[], Any]:
    """Put `foreign` into the session, and return how it is found there."""
    d, l = session.d, session.l  # noqa: E741
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "[]": (lambda: session.__setitem__("x", foreign), lambda: session.x),
        "attribute": (lambda: setattr(session, "x", foreign), lambda: session.x),
        "ttl": (lambda: session.__setitem__("x", ttl(foreign, 60)), lambda: session.x),
        "setdefault": (lambda: session.setdefault("x", foreign), lambda: session.x),
        "update": (lambda: session.update(x=foreign), lambda: session.x),
        "|=": (lambda: session.__ior__({"x": foreign}), lambda: session.x),
        "in a list": (lambda: session.__setitem__("x", [[foreign]]), lambda: session.x[0][0]),
        "in a dict": (lambda: session.__setitem__("x", {"y": foreign}), lambda: session.x["y"]),
        "in a tuple": (lambda: session.__setitem__("x", (foreign, 1)), lambda: session.x[0]),
        "in all three": (lambda: l.append([{"y": (foreign,)}]), lambda: l[-1][0]["y"][0]),
        "d[]": (lambda: d.__setitem__("x", foreign), lambda: d["x"]),
        "d.setdefault": (lambda: d.setdefault("x", foreign), lambda: d["x"]),
        "d.update(dict)": (lambda: d.update({"x": foreign}), lambda: d["x"]),
        "d.update(pairs)": (lambda: d.update([["x", foreign]]), lambda: d["x"]),
        "d.update(iterators)": (lambda: d.update([iter(("x", foreign))]), lambda: d["x"]),
        "d.update(keyword)": (lambda: d.update(x=foreign), lambda: d["x"]),
        "d.update(mapping)": (
            lambda: d.update(collections.UserDict(x=foreign)),
            lambda: d["x"],
        ),
        "d.update(items)": (lambda: d.update({"x": foreign}.items()), lambda: d["x"]),
        "d |=": (lambda: d.__ior__({"x": foreign}), lambda: d["x"]),
        "append": (lambda: l.append(foreign), lambda: l[-1]),
        "insert": (lambda: l.insert(0, foreign), lambda: l[0]),
        "l[0]": (lambda: l.__setitem__(0, foreign), lambda: l[0]),
        "extend(list)": (lambda: l.extend([foreign]), lambda: l[-1]),
        "extend(tuple)": (lambda: l.extend((foreign,)), lambda: l[-1]),
        "extend(generator)": (lambda: l.extend(f for f in [foreign]), lambda: l[-1]),
        "extend(values)": (lambda: l.extend({"x": foreign}.values()), lambda: l[-1]),
        "+=": (lambda: l.__iadd__([foreign]), lambda: l[-1]),
        "+= generator": (lambda: l.__iadd__(f for f in [foreign]), lambda: l[-1]),
        "slice": (lambda: l.__setitem__(slice(0, 1), [foreign]), lambda: l[0]),
        "slice of a generator": (
            lambda: l.__setitem__(slice(0, 1), (f for f in [foreign])),
            lambda: l[0],
        ),
    }
    put, find = ways[way]
    put()
    return find


WAYS = [
    *("[]", "attribute", "ttl", "setdefault", "update", "|=", "in a list", "in a dict"),
    *("in a tuple", "in all three", "d[]", "d.setdefault", "d.update(dict)", "d.update(pairs)"),
    *("d.update(iterators)", "d.update(keyword)", "d.update(mapping)", "d.update(items)", "d |="),
    *("append", "insert", "l[0]", "extend(list)", "extend(tuple)", "extend(generator)"),
    *("extend(values)", "+=", "+= generator", "slice", "slice of a generator"),
]
