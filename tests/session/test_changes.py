"""Two threads and the fields of one session: one flushes what the other one is just changing.

No luck is needed to see what happens then: a thread is stopped at its k-th line inside the package,
for every k, the other one does all that it has to do, and the first one goes on. To stop before
each instruction of the interpreter instead (minutes): SESSION_SYNC_OPCODES=1 pytest
tests/session/test_changes.py
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

import session_sync
from session_sync import Session, SessionClosedError, SessionEncodeError, field, ttl
from session_sync.session.changes import ChangeTracker
from session_sync.session.metadata import TIMERS
from session_sync.session.session import schema_of
from session_sync.storages.base import PatchedRecord, Record, record_of

KEY = "user:1"
SOON = 20.0  # seconds; nothing here waits so long unless it hangs
STOP_AT = "opcode" if os.environ.get("SESSION_SYNC_OPCODES") else "line"
FOLDER = os.path.join(os.path.dirname(session_sync.__file__), "session")
FILES = {os.path.join(FOLDER, name) for name in os.listdir(FOLDER)}
NOW = 1000.0


class Stopped:
    """A call in a thread of its own, which stops before its k-th line in these files."""

    def __init__(self, act: Callable[[], Any], k: int) -> None:
        self.act, self.left = act, k
        self.has_stopped = False
        self.error: BaseException | None = None
        self.result: Any = None
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.arrived.wait(SOON)

    def run(self) -> None:
        if STOP_AT == "opcode":  # before settrace(): CPython 3.12 looks only there
            sys._getframe().f_trace_opcodes = True
        sys.settrace(self.trace)
        try:
            self.result = self.act()
        except Exception as error:
            self.error = error
        finally:
            sys.settrace(None)
            self.arrived.set()

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if STOP_AT == "opcode":
            frame.f_trace_opcodes = True
        if event == STOP_AT:
            self.left -= 1
            if self.left == 0:
                self.has_stopped = True
                self.arrived.set()
                assert self.go_on.wait(SOON)
        return self.trace

    def finish(self) -> Any:
        self.go_on.set()
        self.thread.join(SOON)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def each_stop(begin: Callable[[], Callable[[], Any]]) -> Iterator[Stopped]:
    """What `begin` gives, begun anew and stopped at its first line, its second, ... and its end."""
    k, has_stopped = 1, True
    while has_stopped:
        stopped = Stopped(begin(), k)
        has_stopped = stopped.has_stopped
        yield stopped
        k += 1
    assert k > 3  # it was traced at all


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=NOW)
    monkeypatch.setattr("session_sync.session.ttl.time", SimpleNamespace(time=lambda: clock.now))
    return clock


@dataclass
class More:
    """A record of it may have been made before `less` was there."""

    more: int
    less: int = 0


class Typed(Session):
    count: int = 7
    rows: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=lambda: [1])
    kind: str = field(default_factory=lambda: "".join(["k", "ind"]))
    old_form: More


class Thing:
    """Changes inside it are not noticed."""

    def __init__(self, value: int) -> None:
        self.value = value


FIVE = 5_000_000
BIG = {f"f{n}": n for n in range(70)}  # fields enough that records share what they can
STORED: Mapping[str, Any] = {
    "a": FIVE,
    "b": [1, [2], {"x": {3}}],
    "c": {"x": 1},
    "d": 4.0,
    "old": "5",
    "over": "6",
    TIMERS: {"old": [NOW + 10, 20.0], "over": [NOW - 1, 20.0]},
}
PLAIN = {name: value for name, value in STORED.items() if name in ("a", "b", "c", "d")}

Step = Callable[[Any], object]
Change = tuple[Step, ...]  # nothing is to be seen half-way through one step


def put(name: str, value: Any) -> Step:
    return lambda it: it.__setitem__(name, value)


def away(name: str) -> Step:
    return lambda it: it.__delitem__(name)


# What a plain dict can do as well.
CHANGES: dict[str, Change] = {
    "a new field": (put("n", 1),),
    "a stored one": (put("a", 6_000_000),),
    "the same value": (put("a", FIVE),),
    "a container": (put("b", {"y": [1]}),),
    "twice": (put("a", 1), put("a", 2)),
    "an append": (lambda it: it["b"].append(4),),
    "an append, deep inside": (lambda it: it["b"][1].append([5]),),
    "an element, deep inside": (lambda it: it["b"][2]["x"].add(4),),
    "a key": (lambda it: it["c"].__setitem__("z", 2),),
    "a deletion": (away("a"),),
    "a deletion of a container": (away("b"),),
    "to the end": (away("a"), put("a", FIVE)),
    "pop": (lambda it: it.pop("a"),),
    "a pop without a field": (lambda it: it.pop("m", None),),
    "popitem": (lambda it: it.popitem(),),
    "clear": (away("a"), away("b"), away("c"), lambda it: it.clear()),
    "update": (put("a", 1), put("n", 2), lambda it: it.update(a=1, n=2, c=3)),
    "setdefault": (
        lambda it: it.setdefault("m", []),
        lambda it: it.setdefault("m", []).append(1),
    ),
    "setdefault of a stored one": (lambda it: it.setdefault("b", []).append(1),),
    "new and away": (put("m", 1), away("m")),
    "away and new": (away("a"), put("m", 1), put("a", FIVE)),
}
SOME = ("a new field", "the same value", "an append", "a deletion", "to the end")
SOME_CHANGES = {said: CHANGES[said] for said in SOME}
# What is pending when the flush begins.
PENDING: dict[str, Change] = {
    "nothing": (),
    "the fields": (
        lambda it: it.update(a=FIVE + 1, n=0),
        lambda it: it["b"].append(3),
        lambda it: it["c"].pop("x"),
    ),
    "deletions": (away("a"), away("d"), put("n", []), put("a", 0)),
}
# What it cannot.
TIMED: dict[str, Change] = {
    "a timer": (put("a", ttl(FIVE, 30)),),
    "a timer of a new field": (put("n", ttl([1], 30)),),
    "a timer restarts": (put("old", "7"),),
    "a timer is taken away": (lambda it: it.__setitem__("old", ttl(it["old"], 0)),),
    "a field with a timer goes": (away("old"),),
    "a field with a timer goes and comes": (away("old"), put("old", "8")),
    "an expired one is read": (lambda it: it.get("over"),),
    "an expired one is assigned": (put("over", "7"),),
    "an expired one gets a timer": (put("over", ttl("7", 5)),),
    "the names are read": (list,),
    "popitem": (lambda it: it.popitem(),),
}
TYPED: dict[str, Change] = {
    "a default is read": (lambda it: (it.count, it.rows),),
    "a default is assigned": (put("count", 7),),
    "a default is counted up": (lambda it: it.__setitem__("count", it.count + 1),),
    "a default is changed inside": (lambda it: it.rows.append(1),),
    "a default of a factory is read": (lambda it: (it.made, it.kind),),
    "... and changed inside": (lambda it: it.made, lambda it: it.made.append(2)),
    "... and something else is changed": (lambda it: it.kind, put("n", 1)),
    "... after a deletion": (
        lambda it: it.made.append(2),
        away("made"),
        lambda it: it.made.append(3),
    ),
    "changed and away": (lambda it: it.rows.append(1), away("rows")),
}
TYPED_PENDING: dict[str, Change] = {
    "nothing": (),
    "defaults": (lambda it: it.rows.append(0), put("count", 9), lambda it: it.made),
    "a deletion": (away("stored"),),
}


def do(change: Change, session: Any) -> None:
    for step in change:
        step(session)


class Case:
    """Fields with something pending, and a change that is made while they are flushed."""

    def __init__(
        self, stored: Mapping[str, Any], pending: Change, change: Change, cls: Any = Session
    ) -> None:
        self.stored, self.pending, self.change, self.cls = stored, pending, change, cls
        #: What is stored after none of the steps, after the first one, ...
        self.states = [self.state(steps, True) for steps in range(len(change) + 1)]
        #: The same if nothing is flushed before.
        self.states_at_once = [self.state(steps, False) for steps in range(len(change) + 1)]

    def state(self, steps: int, is_flushed_before: bool) -> dict[str, Any]:
        tracker, session = self.begin()
        if is_flushed_before:
            tracker.take_changes()
        do(self.change[:steps], session)
        return seen(tracker.take_changes())

    def begin(self) -> tuple[ChangeTracker, Any]:
        tracker = ChangeTracker(KEY, record_of(tree(self.stored)), schema_of(self.cls))
        session = self.cls(lambda: None, KEY, tracker)
        do(self.pending, session)
        return tracker, session

    def check_meanwhile(self, record: Record) -> None:
        """Each field is as after one of the steps, with the timer that it had then."""
        tracker = seen(record)
        states = [*self.states, *self.states_at_once]
        for name in {*tracker, *states[0], *states[-1]} - {TIMERS}:
            assert timed(tracker, name) in [timed(state, name) for state in states], name

    def check_at_the_end(self, tracker: ChangeTracker) -> None:
        """All is there, in the order that a dict has, and nothing is pending any more."""
        record = tracker.take_changes()
        assert seen(record) in (self.states[-1], self.states_at_once[-1])
        if self.cls is Session:
            assert names(record) == names(self.states[-1])
        assert tracker.take_changes() is record


def timed(tracker: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """A field and its timer, if its time is not up."""
    timer = tracker.get(TIMERS, {}).get(name)
    return (None, None) if timer and timer[0] <= NOW else (tracker.get(name), timer)


def tree(value: Any) -> Any:
    """A copy that shares nothing."""
    if isinstance(value, dict):
        return {key: tree(item) for key, item in value.items()}
    if isinstance(value, list | set):
        return type(value)(map(tree, value))
    return value


def seen(record: Record) -> dict[str, Any]:
    """A record as it is now."""
    return {name: tree(record[name]) for name in record}


def names(record: Record) -> list[str]:
    return [name for name in record if name != TIMERS]


def cases(
    stored: Mapping[str, Any],
    pending: Mapping[str, Change],
    changes: Mapping[str, Change],
    cls: Any = Session,
) -> list[Any]:
    return [
        pytest.param(lambda p=p, c=c: Case(stored, p, c, cls), id=f"{said}, {pending_name}")
        for said, c in changes.items()
        for pending_name, p in pending.items()
    ]


ALL = [
    *cases(PLAIN, {"the fields": PENDING["the fields"]}, CHANGES),
    *cases(PLAIN, {said: PENDING[said] for said in ("nothing", "deletions")}, SOME_CHANGES),
    *cases({**BIG, **PLAIN}, {"many fields": PENDING["the fields"]}, SOME_CHANGES),
    *cases(STORED, {said: PENDING[said] for said in ("nothing", "the fields")}, TIMED),
    *cases({"stored": 1}, TYPED_PENDING, TYPED, Typed),
]


def test_the_cases_are_what_they_are_taken_for() -> None:
    """Those without timers and types do what a dict does."""
    for pending in PENDING.values():
        for change in CHANGES.values():
            it = tree(PLAIN)
            do((*pending, *change), it)
            case = Case(PLAIN, pending, change)
            for stored in (case.states[-1], case.states_at_once[-1]):
                assert (stored, list(stored)) == (it, list(it))
    assert isinstance(record_of(BIG), PatchedRecord)


@pytest.mark.parametrize("make", ALL)
def test_a_change_while_a_flush_is_on_its_way_is_in_it_or_in_the_next(
    make: Callable[[], Case],
) -> None:
    case = make()
    now: list[Any] = []

    def begin() -> Callable[[], Record]:
        now[:] = case.begin()
        return now[0].take_changes

    for flush in each_stop(begin):
        tracker, session = now
        do(case.change, session)
        case.check_meanwhile(flush.finish())
        case.check_at_the_end(tracker)


@pytest.mark.parametrize("make", ALL)
def test_a_flush_while_a_change_is_being_made_takes_it_or_leaves_it_to_the_next(
    make: Callable[[], Case],
) -> None:
    case = make()
    now: list[Any] = []

    def begin() -> Callable[[], object]:
        now[:] = case.begin()
        return lambda: do(case.change, now[1])

    for change in each_stop(begin):
        tracker = now[0]
        case.check_meanwhile(tracker.take_changes())
        change.finish()
        case.check_at_the_end(tracker)


@pytest.mark.parametrize("make", cases(PLAIN, {"some": PENDING["the fields"]}, SOME_CHANGES))
def test_a_flush_that_fails_leaves_all_pending_and_what_came_meanwhile_too(
    make: Callable[[], Case],
) -> None:
    case = make()
    now: list[Any] = []

    def begin() -> Callable[[], Record]:
        tracker, session = case.begin()
        now[:] = tracker, session, tracker.committed
        return tracker.take_changes

    for flush in each_stop(begin):
        tracker, session, committed = now
        do(case.change, session)
        flush.finish()
        tracker.not_saved(committed)
        assert tracker.take_changes() is not committed
        tracker.not_saved(committed)  # and once more
        record = tracker.take_changes()
        assert (seen(record), names(record)) == (case.states[-1], names(case.states[-1]))
        assert tracker.take_changes() is record


def test_marks_outlive_a_flush_that_cannot_take_them() -> None:
    case = Case(PLAIN, (), ())
    tracker, session = case.begin()
    session["a"] = session.pop("a")
    session["n"] = itself = []
    itself.append(itself)
    with pytest.raises(SessionEncodeError):
        tracker.take_changes()
    session["m"] = 1
    session["b"] = session.pop("b")
    itself.clear()
    assert list(session) == ["c", "d", "a", "n", "m", "b"]
    assert names(tracker.take_changes()) == ["c", "d", "a", "n", "m", "b"]


READS: dict[str, Step] = {
    "a value": lambda it: it.get("a"),
    "a container": lambda it: it.get("b"),
    "an object": lambda it: it.get("thing"),
    "a field with a timer": lambda it: it.get("old"),
    "one whose time is up": lambda it: it.get("over"),
    "a default": lambda it: it.count,
    "a container that is a default": lambda it: it.rows,
    "a default of a factory": lambda it: it.made,
    "whether it is there": lambda it: [name in it for name in ("a", "over", "rows", "n")],
    "the names": list,
    "their number": len,
    "repr": repr,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_undoes_nothing_that_another_thread_does_meanwhile(read: Step) -> None:
    everything: Change = (
        lambda it: it.update(a=1, b=[2], thing=3, old="4", over="5", count=6, rows=[7], made=[8]),
        lambda it: it.rows.append(9),
        lambda it: it.setdefault("n", {}).update(x=10),
        away("c"),
    )
    stored = {**STORED, "thing": Thing(1)}
    now: list[Any] = []
    for change in (everything, (*everything, *map(away, ("a", "b", "over", "rows", "made")))):
        case = Case(stored, (), change, Typed)

        def begin(case: Case = case) -> Callable[[], object]:
            now[:] = case.begin()
            return lambda: read(now[1])

        for reading in each_stop(begin):
            tracker, session = now
            do(change, session)
            tracker.take_changes()
            reading.finish()
            case.check_at_the_end(tracker)


@pytest.mark.parametrize("name", ["b", "c", "rows", "made", "old_form", "thing"])
def test_two_threads_that_read_a_field_get_the_same_object(name: str) -> None:
    stored = {**PLAIN, "old_form": {"more": 1}, "thing": Thing(1)}
    now: list[Any] = []

    def begin() -> Callable[[], object]:
        tracker = ChangeTracker(KEY, record_of(tree(stored)), schema_of(Typed))
        now[:] = tracker, Typed(lambda: None, KEY, tracker)
        return lambda: now[1][name]

    for reading in each_stop(begin):
        tracker, session = now
        value = session[name]
        assert reading.finish() is value is session[name]
        assert session[name] is value
        if isinstance(value, list):
            value.append(1)
            assert tracker.take_changes()[name] == value
        record = tracker.committed
        assert (tracker.take_changes() is record) is (name != "thing")


def test_what_is_noted_of_one_field_is_not_lost_while_another_one_is_read() -> None:
    """A field with an object in it, in which no change would be noticed, is always saved."""
    now: list[Any] = []

    def begin() -> Callable[[], object]:
        record = record_of({"things": [Thing(1)], "b": [1], "c": {"x": [2]}})
        now[:] = [ChangeTracker(KEY, record)]
        return lambda: now[0].get("things")

    for reading in each_stop(begin):
        (tracker,) = now
        tracker.get("b")
        reading.finish()
        tracker.set("b", 0)
        record = tracker.take_changes()
        tracker.get("things")[0].value = 2
        assert tracker.take_changes() is not record


LATE: dict[str, Step] = {
    "a value": put("a", 1),
    "a new field": put("n", [1]),
    "a timer": put("a", ttl(1, 20)),
    "a deletion": away("a"),
    "an append": lambda it: it["b"].append(4),
    "an item": lambda it: it["b"].__setitem__(0, 4),
    "a key": lambda it: it["c"].__setitem__("z", 4),
}


@pytest.mark.parametrize("change", LATE.values(), ids=LATE)
def test_a_change_while_the_session_is_closed_is_saved_or_raises(change: Step) -> None:
    now: list[Any] = []

    def begin() -> Callable[[], object]:
        now[:] = Case(PLAIN, (), ()).begin()
        return lambda: change(now[1])

    raised = []
    for changing in each_stop(begin):
        tracker, session = now
        tracker.close()
        record = tracker.take_changes()
        try:
            changing.finish()
        except SessionClosedError:
            raised.append(True)
        else:
            raised.append(False)
            assert seen(record) != PLAIN
        with pytest.raises(SessionClosedError):
            session.clear()
    assert raised[0]
    assert not raised[-1]  # that one had ended before


@pytest.mark.parametrize("name", ["b", "c"])
def test_a_container_that_is_read_while_the_session_is_closed_is_closed(name: str) -> None:
    now: list[Any] = []

    def begin() -> Callable[[], object]:
        now[:] = Case(PLAIN, (), ()).begin()
        return lambda: now[1][name]

    for reading in each_stop(begin):
        now[0].close()
        container = reading.finish()
        with pytest.raises(SessionClosedError):
            container.clear()


def test_a_big_container_is_frozen_as_it_was_at_one_moment() -> None:
    """Not half before and half after what another thread does to it meanwhile."""
    now: list[Any] = []

    def begin() -> Callable[[], object]:
        record = record_of({"b": {"rows": [[n] for n in range(5)], "keys": {"x": [1], "y": [2]}}})
        now[:] = [ChangeTracker(KEY, record)]
        now[0].get("b")["rows"].append([5])
        return now[0].take_changes

    for flush in each_stop(begin):
        (tracker,) = now
        b = tracker.get("b")
        b["rows"].pop(0)
        b["keys"]["z"] = [3]
        del b["keys"]["x"]
        record = flush.finish()
        assert record["b"]["rows"] in ([[n] for n in range(6)], [[n] for n in range(1, 6)])
        assert set(record["b"]["keys"]) in ({"x", "y"}, {"x", "y", "z"}, {"y", "z"})
        assert tracker.take_changes()["b"] == b
