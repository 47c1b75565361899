"""A session and its containers, driven at random beside plain dicts, lists and sets.

To look longer than CI does: SESSION_SYNC_EXAMPLES=2000 pytest tests/session/test_session_model.py
"""

from __future__ import annotations

import heapq
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import OwnStorage

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionClosedError,
    SessionManager,
    SessionScope,
)

EXAMPLES = int(os.environ.get("SESSION_SYNC_EXAMPLES", "40"))
MOST_NODES = 200  # of one session: aliases of aliases would grow without end
KEY = "user:1"
CONTAINERS = (dict, list, set)

atoms = st.sampled_from(
    [None, False, True, 0, 1, 2, 1.0, -0.0, 10**20, "", "a", "b", b"a", date(2026, 1, 2)]
) | st.sampled_from([Decimal("1.0"), ("a", 1), (1, (True,)), frozenset({"a"}), "ein Wert"])
keys = st.sampled_from(["a", "b", "c", 0, 1, True, 1.0, ("a", 1), None])
names = st.sampled_from(["a", "b", "c", "d", "items", "flush"])
plain = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(atoms, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)
indexes = st.integers(-3, 4)


def tree(value: Any) -> Any:
    """A copy in which nothing is shared any more, as a store and back makes it."""
    if isinstance(value, dict):
        return {k: tree(v) for k, v in value.items()}
    if isinstance(value, list):
        return [tree(v) for v in value]
    if isinstance(value, set):
        return set(value)
    if type(value) is tuple:
        return tuple(tree(v) for v in value)
    return value


def shape(value: Any) -> Any:
    """A value with the types of all that is in it, in its order; a session's containers are as
    good as plain ones."""
    for kind in CONTAINERS:
        if isinstance(value, kind):
            break
    else:
        kind = type(value)
    if kind is dict:
        return [kind, [(shape(k), shape(v)) for k, v in value.items()]]
    if kind in (list, tuple):
        return [kind, [shape(v) for v in value]]
    if kind in (set, frozenset):
        return [kind, sorted((shape(v) for v in value), key=repr)]
    return [kind, repr(value)]


def inside(value: Any) -> Iterator[Any]:
    """All containers in a value, itself included, once for each place."""
    if isinstance(value, CONTAINERS):
        yield value
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from inside(item)


def outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except SessionClosedError:
        raise
    except Exception as error:
        return type(error)


Change = Callable[[Any, Any, Any, int], Any]  # container, key or atom, value, number

DICT: dict[str, Change] = {
    "[]": lambda c, k, v, n: c.__setitem__(k, v),
    "del": lambda c, k, v, n: c.__delitem__(k),
    "pop": lambda c, k, v, n: c.pop(k, None),
    "pop without default": lambda c, k, v, n: c.pop(k),
    "popitem": lambda c, k, v, n: c.popitem(),
    "setdefault": lambda c, k, v, n: c.setdefault(k, v),
    "update": lambda c, k, v, n: c.update({k: v, "z": n}),
    "update pairs": lambda c, k, v, n: c.update([[k, v], ("z", n)]),
    "update items": lambda c, k, v, n: c.update({k: v}.items(), self=n),
    "|=": lambda c, k, v, n: c.__ior__({k: v}) and None,
    "clear": lambda c, k, v, n: c.clear(),
    "past the methods": lambda c, k, v, n: dict.__setitem__(c, k, n),
    "to the end": lambda c, k, v, n: c.__setitem__(k, c.pop(k)),
}
LIST: dict[str, Change] = {
    "append": lambda c, k, v, n: c.append(v),
    "insert": lambda c, k, v, n: c.insert(n, v),
    "extend": lambda c, k, v, n: c.extend([v, k]),
    "extend generator": lambda c, k, v, n: c.extend(item for item in (k, v)),
    "extend itself": lambda c, k, v, n: c.extend(c),
    "+=": lambda c, k, v, n: c.__iadd__((v,)) and None,
    "*=": lambda c, k, v, n: c.__imul__(n) and None,
    "[]": lambda c, k, v, n: c.__setitem__(n, v),
    "slice": lambda c, k, v, n: c.__setitem__(slice(n, n + 2), [v, k]),
    "far slice": lambda c, k, v, n: c.__setitem__(slice(None, None, 2), (v, k)),
    "slice of generator": lambda c, k, v, n: c.__setitem__(slice(0, n), (i for i in (v,))),
    "del": lambda c, k, v, n: c.__delitem__(n),
    "del slice": lambda c, k, v, n: c.__delitem__(slice(n, None)),
    "pop": lambda c, k, v, n: c.pop(n),
    "remove": lambda c, k, v, n: c.remove(k),
    "reverse": lambda c, k, v, n: c.reverse(),
    "sort": lambda c, k, v, n: c.sort(key=lambda item: repr(shape(item))),
    "shuffle": lambda c, k, v, n: random.Random(n).shuffle(c),
    "clear": lambda c, k, v, n: c.clear(),
    "past the methods": lambda c, k, v, n: list.append(c, n),
    "heapify": lambda c, k, v, n: heapq.heapify(c),
    "heappush": lambda c, k, v, n: heapq.heappush(c, n),
}
SET: dict[str, Change] = {
    "add": lambda c, k, v, n: c.add(k),
    "add a value": lambda c, k, v, n: c.add(v),
    "discard": lambda c, k, v, n: c.discard(k),
    "remove": lambda c, k, v, n: c.remove(k),
    "update": lambda c, k, v, n: c.update([k, n], {n + 1}),
    "|=": lambda c, k, v, n: c.__ior__({k}) and None,
    "&=": lambda c, k, v, n: c.__iand__({k, n}) and None,
    "-=": lambda c, k, v, n: c.__isub__({k}) and None,
    "^=": lambda c, k, v, n: c.__ixor__({k, n}) and None,
    "intersection_update": lambda c, k, v, n: c.intersection_update([k, n]),
    "difference_update": lambda c, k, v, n: c.difference_update([k]),
    "symmetric_difference_update": lambda c, k, v, n: c.symmetric_difference_update([k]),
    "clear": lambda c, k, v, n: c.clear(),
    "past the methods": lambda c, k, v, n: set.add(c, n),
}
FIELDS: dict[str, Change] = {
    **{name: DICT[name] for name in DICT if name != "past the methods"},
    "del": lambda c, k, v, n: c.__delitem__(k),
    "+= a list": lambda c, k, v, n: c.__setitem__(k, c[k].__iadd__([n])),
}


class SessionBesideADict(RuleBasedStateMachine):
    """Whatever a handler does to its session, a plain dict would say the same.

    `held` are containers that the handler has in hand, each with its model; `foreign` are those of
    the scopes before, which are closed.
    """

    def storage(self) -> Any:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.sessions: Any = SessionManager(storage=self.storage())
        self.model: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}
        self.held: list[tuple[Any, Any]] = []
        self.foreign: list[tuple[Any, Any]] = []
        self.enter()

    def enter(self) -> None:
        self.scope: SessionScope[Any] = self.sessions.session_scope(KEY)
        self.session = self.scope.__enter__()

    def leave(self, error: BaseException | None = None) -> None:
        kind = None if error is None else type(error)
        self.scope.__exit__(kind, error, None)

    @initialize(fields=st.dictionaries(names, plain, max_size=4))
    def begin(self, fields: dict[str, Any]) -> None:
        self.model = tree(fields)
        self.session.update(fields)
        self.close_and_open()

    # -- what goes in

    def value(self, data: st.DataObject, real: Any, target: Any) -> tuple[Any, Any]:
        """Something to put into the container `real`, whose model is `target`, with its model."""
        how = data.draw(st.sampled_from(["new", "new", "held", "place", "foreign"]), "source")
        if how == "held" and self.held:
            pair = data.draw(st.sampled_from(self.held), "held")
        elif how == "place" and (places := self.places()):
            pair = self.at(data.draw(st.sampled_from(places), "place"))
        elif how == "foreign" and self.foreign and type(real) not in CONTAINERS:
            # Into a list that the handler made, it would go as it is, and stay closed.
            closed, model = data.draw(st.sampled_from(self.foreign), "foreign")
            pair = closed, tree(model)
        else:
            new = data.draw(plain, "new")
            pair = new, tree(new)
            self.hold(*pair)
        if any(one is target for one in inside(pair[1])):
            pair = None, None  # no container may contain itself
        wrap = data.draw(st.sampled_from([*"      ", "list", "dict", "tuple"]), "wrapped in")
        wraps: dict[str, Callable[[Any], Any]] = {
            "list": lambda v: [v],
            "dict": lambda v: {"in": v},
            "tuple": lambda v: (v, 1),
        }
        return tuple(map(wraps.get(wrap, lambda v: v), pair))  # type: ignore[return-value]

    def hold(self, real: Any, model: Any) -> None:
        """Remember all containers of a value, which the handler could change later."""
        self.held += zip(inside(real), inside(model), strict=True)
        del self.held[:-20]

    # -- where

    def places(self) -> list[tuple[Any, ...]]:
        """The paths to all containers."""
        found: list[tuple[Any, ...]] = []

        def walk(value: Any, path: tuple[Any, ...]) -> None:
            if isinstance(value, CONTAINERS):
                found.append(path)
            if isinstance(value, dict):
                for key, item in value.items():
                    walk(item, (*path, key))
            elif isinstance(value, list | tuple):
                for at, item in enumerate(value):
                    walk(item, (*path, at))

        for name, value in self.model.items():
            walk(value, (name,))
        return found[:50]

    def at(self, path: tuple[Any, ...]) -> tuple[Any, Any]:
        real: Any = self.session
        model: Any = self.model
        for step in path:
            real, model = real[step], model[step]
        return real, model

    # -- changes

    @rule(data=st.data(), change=st.sampled_from(sorted(FIELDS)), name=names, n=indexes)
    def change_the_session(self, data: st.DataObject, change: str, name: str, n: int) -> None:
        self.apply(data, FIELDS[change], (self.session, self.model), name, n)

    @rule(data=st.data(), n=indexes)
    def change_what_is_in_the_session(self, data: st.DataObject, n: int) -> None:
        places = self.places()
        if places:
            pair = self.at(data.draw(st.sampled_from(places), "place"))
            self.change(data, pair, n)

    @rule(data=st.data(), n=indexes)
    def change_what_is_in_hand(self, data: st.DataObject, n: int) -> None:
        if self.held:
            self.change(data, data.draw(st.sampled_from(self.held), "held"), n)

    def change(self, data: st.DataObject, pair: tuple[Any, Any], n: int) -> None:
        real, model = pair
        assert shape(real) == shape(model)
        changes = DICT if isinstance(model, dict) else LIST if isinstance(model, list) else SET
        change = changes[data.draw(st.sampled_from(sorted(changes)), "change")]
        self.apply(data, change, pair, data.draw(keys if changes is DICT else atoms, "key"), n)

    def apply(
        self, data: st.DataObject, change: Change, pair: tuple[Any, Any], key: Any, n: int
    ) -> None:
        real, model = pair
        real_value, model_value = self.value(data, real, model)
        real_out = outcome(lambda: change(real, key, real_value, n))
        model_out = outcome(lambda: change(model, key, model_value, n))
        assert shape(real_out) == shape(model_out)
        self.hold(real_out, model_out)
        if sum(1 for _ in inside(self.model)) > MOST_NODES:
            self.session.clear()
            self.model.clear()

    @rule(data=st.data())
    def pop_from_a_set(self, data: st.DataObject) -> None:
        sets = [path for path in self.places() if self.at(path)[1].__class__ is set]
        if sets:
            real, model = self.at(data.draw(st.sampled_from(sets), "place"))
            if real:
                model.remove(real.pop())  # any of them: the two need not have one order

    # -- the life of the session

    @rule()
    def flush(self) -> None:
        self.session.flush()
        self.is_saved()

    @rule()
    def flush_in_vain(self) -> None:
        def fail(*_: Any) -> None:
            raise OSError

        with pytest.MonkeyPatch.context() as patch:
            for way in (self.sessions.scopes.options.backend, self.sessions.storage):
                for name in ("save", "delete"):
                    patch.setattr(way, name, fail, raising=False)
            try:
                self.session.flush()
            except OSError:
                pass
            else:
                assert shape(self.model) == shape(self.saved)

    @rule()
    def close_and_open(self) -> None:
        self.leave()
        self.is_saved()
        self.open_again()

    @rule()
    def fail_and_open(self) -> None:
        self.leave(LookupError())
        self.model = tree(self.saved)
        self.is_saved()
        self.open_again()

    def is_saved(self) -> None:
        self.saved = tree(self.model)
        kept = self.sessions.storage.get(KEY)
        assert (kept is None) == (not self.saved)
        assert shape(kept or {}) == shape(self.saved)

    def open_again(self) -> None:
        closed = self.session
        assert shape(closed.copy()) == shape(self.saved)
        handed_out = [
            (real, model)
            for name, value in self.model.items()
            for real, model in zip(inside(closed[name]), inside(value), strict=True)
            if type(real) not in CONTAINERS
        ]
        self.foreign = [*self.foreign, *handed_out][-10:]
        self.model = tree(self.saved)
        self.held.clear()
        self.enter()

    # -- what is seen

    @rule()
    def look_at_all(self) -> None:
        assert shape(self.session.copy()) == shape(self.model)
        assert self.session == self.model

    @rule(data=st.data())
    @precondition(lambda self: self.foreign)
    def a_closed_container_stays_as_it_is(self, data: st.DataObject) -> None:
        closed, model = data.draw(st.sampled_from(self.foreign))
        assert shape(closed) == shape(model)
        with pytest.raises(SessionClosedError):
            closed.clear()

    @invariant()
    def names_are_in_order(self) -> None:
        assert list(self.session) == list(self.model)
        assert len(self.session) == len(self.model)

    def teardown(self) -> None:
        self.leave()
        self.is_saved()
        self.sessions.close()


class InMemory(SessionBesideADict):
    def storage(self) -> Any:
        return MemoryStorage()


class InStrictMemory(SessionBesideADict):
    def storage(self) -> Any:
        return MemoryStorage(strict=True)


class InLruMemory(SessionBesideADict):
    def storage(self) -> Any:
        return LruMemoryStorage(1)


class InAnOwnStorage(SessionBesideADict):
    def storage(self) -> Any:
        return OwnStorage()


class OnDisk(SessionBesideADict):
    def storage(self) -> Any:
        from session_sync import DiskStorage

        self.folder = tempfile.mkdtemp()
        return DiskStorage(self.folder)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


class InSQLite(SessionBesideADict):
    def storage(self) -> Any:
        from session_sync import SQLiteStorage

        self.folder = tempfile.mkdtemp()
        return SQLiteStorage(f"{self.folder}/sessions.db", synchronous="off")

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestInMemory = InMemory.TestCase
TestInStrictMemory = InStrictMemory.TestCase
TestInLruMemory = InLruMemory.TestCase
TestInAnOwnStorage = InAnOwnStorage.TestCase
TestOnDisk = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('diskcache')", reason="needs diskcache"
)(OnDisk.TestCase)

TestInSQLite = InSQLite.TestCase

_IN_PROCESS = (TestInMemory, TestInStrictMemory, TestInLruMemory, TestInAnOwnStorage)
for _case in (*_IN_PROCESS, TestOnDisk, TestInSQLite):
    _case.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
del _case  # or pytest would run it again
