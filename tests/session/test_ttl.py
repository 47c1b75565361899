"""`ttl()`: fields that disappear by themselves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import session_tools
from session_tools import KEY, WAYS, FailingStorage, OwnStorage, Sessions, fill, into, stored

from session_sync import Session, SessionDecodeError, SessionManager, ttl

storage = pytest.fixture(params=session_tools.STORES)(session_tools.make_storage)
sessions = pytest.fixture(session_tools.make_sessions)
in_memory = pytest.fixture(session_tools.make_in_memory)


class Clock:
    """The time that timers see."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.step = 0.0

    def time(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("session_sync.session.ttl.time", SimpleNamespace(time=clock.time))
    return clock


def test_a_field_disappears_when_its_time_is_up(sessions: Sessions, clock: Clock) -> None:
    with sessions.session_scope(KEY) as session:
        session["code"] = ttl("1234", 300)
        session.short = ttl([1], timedelta(seconds=10))
        session.default = ttl(1)
        session["stays"] = 1
        assert session == {"code": "1234", "short": [1], "default": 1, "stays": 1}
    clock.now += 10
    with sessions.session_scope(KEY) as session:
        assert session == {"code": "1234", "default": 1, "stays": 1}
    clock.now += 19.9
    with sessions.session_scope(KEY) as session:
        assert "default" in session
    clock.now += 0.2
    with sessions.session_scope(KEY) as session:
        assert session == {"code": "1234", "stays": 1}
        assert session.code == "1234"
        clock.now += 300  # while the handler runs
        assert "code" not in session
        assert session.get("code") is None
        assert not hasattr(session, "code")
        assert list(session) == ["stays"]
        assert len(session) == 1
    assert stored(sessions) == {"stays": 1}


@pytest.mark.parametrize(
    "look",
    [
        lambda session: session.get("code") is None,
        lambda session: not hasattr(session, "code"),
        lambda session: "code" not in session,
        lambda session: list(session) == [],
        lambda session: list(reversed(session)) == [],
        lambda session: len(session) == 0,
        lambda session: not session,
        lambda session: session == {},
        lambda session: session.copy() == {},
        lambda session: list(session.items()) == [],
        lambda session: session.pop("code", None) is None,
        lambda session: session.setdefault("code", 5) == 5,
        lambda session: repr(session) == "<Session 'user:1': >",
    ],
)
@pytest.mark.parametrize("touched", [False, True])
def test_nothing_shows_a_field_whose_time_is_up(
    in_memory: Sessions, clock: Clock, look: Callable[[Session], bool], touched: bool
) -> None:
    fill(in_memory, code=ttl([1], 10))
    with in_memory.session_scope(KEY) as session:
        if touched:
            session.code.append(2)
        clock.now += 11
        assert look(session)


def test_a_session_whose_fields_have_all_run_out_is_deleted(
    sessions: Sessions, clock: Clock
) -> None:
    fill(sessions, code=ttl(1, 10))
    clock.now += 11
    with sessions.session_scope(KEY) as session:
        assert not session
    assert not sessions.storage.has(KEY)


def test_a_plain_assignment_restarts_the_timer(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl([1], 10), other=ttl(1, 10))
    clock.now += 6
    with sessions.session_scope(KEY) as session:
        session.code = [2]
    clock.now += 6
    with sessions.session_scope(KEY) as session:
        assert session == {"code": [2]}
        session.update(code=[3])
    clock.now += 9.9
    with sessions.session_scope(KEY) as session:
        assert session == {"code": [3]}
    clock.now += 0.1
    with sessions.session_scope(KEY) as session:
        assert session == {}


def test_a_change_inside_the_value_does_not_restart_the_timer(
    sessions: Sessions, clock: Clock
) -> None:
    fill(sessions, code=ttl({"tries": []}, 10))
    clock.now += 6
    with sessions.session_scope(KEY) as session:
        session.code["tries"].append(1)
        session.code.setdefault("new", 1)
        session.setdefault("code", 1)
    assert stored(sessions)["code"] == {"tries": [1], "new": 1}
    clock.now += 4
    with sessions.session_scope(KEY) as session:
        assert session == {}


def test_a_zero_removes_the_timer(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10), other=ttl(1, 10))
    with sessions.session_scope(KEY) as session:
        session.code = ttl(session.code, 0)
        session.new = ttl(2, timedelta(0))
    clock.now += 60
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "new": 2}
        session.code = 5
    clock.now += 10_000
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 5, "new": 2}
    assert stored(sessions) == {"code": 5, "new": 2}


def test_a_field_keeps_no_timer_that_was_removed(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10), other=1)
    fill(sessions, code=ttl(1, 0))
    assert stored(sessions) == {"code": 1, "other": 1}
    clock.now += 11
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "other": 1}


def test_a_new_ttl_replaces_the_old_one(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10))
    fill(sessions, code=ttl(1, 100))
    clock.now += 99
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1}
    clock.now += 1
    with sessions.session_scope(KEY) as session:
        assert session == {}


@pytest.mark.parametrize("end", ["deleted", "run out", "run out and seen"])
def test_a_field_that_went_away_has_no_timer_when_it_comes_back(
    sessions: Sessions, clock: Clock, end: str
) -> None:
    fill(sessions, code=ttl(1, 10), z=1)
    with sessions.session_scope(KEY) as session:
        if end == "deleted":
            del session.code
        else:
            clock.now += 11
        if end == "run out and seen":
            assert "code" not in session
        session.code = 2
        assert list(session) == ["z", "code"]
    assert stored(sessions) == {"z": 1, "code": 2}
    clock.now += 1_000
    with sessions.session_scope(KEY) as session:
        assert list(session.items()) == [("z", 1), ("code", 2)]


def test_timers_are_stored_with_the_session(storage: Any, clock: Clock) -> None:
    fill(SessionManager(storage=storage), code=ttl(1, 10))
    assert storage.get(KEY) == {"code": 1, "$ttl": {"code": [clock.now + 10, 10.0]}}
    clock.now += 9
    with SessionManager(storage=storage).session_scope(KEY) as session:  # after a restart, say
        assert session == {"code": 1}
        assert "$ttl" not in session
        session.other = 1
    assert list(session) == ["code", "other"]
    clock.now += 1
    with SessionManager(storage=storage).session_scope(KEY) as session:
        assert session == {"other": 1}


def test_timers_belong_to_one_session(sessions: Sessions, clock: Clock) -> None:
    with sessions.session_scope("one") as one, sessions.session_scope("two") as two:
        one.code = ttl(1, 10)
        two.code = 1
    clock.now += 5
    with sessions.session_scope("two") as two:
        two.code = 2
    clock.now += 6
    with sessions.session_scope("one") as one, sessions.session_scope("two") as two:
        assert one == {}
        assert two == {"code": 2}


def test_timers_go_with_what_was_rolled_back(sessions: Sessions, clock: Clock) -> None:
    fill(sessions, code=ttl(1, 10), plain=1)
    with pytest.raises(LookupError), sessions.session_scope(KEY) as session:
        session.code = ttl(2, 100)
        session.plain = ttl(1, 1)
        raise LookupError
    clock.now += 9
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "plain": 1}
    clock.now += 1
    with sessions.session_scope(KEY) as session:
        assert session == {"plain": 1}


def test_timers_survive_a_flush_that_fails(clock: Clock) -> None:
    storage = FailingStorage()
    sessions = SessionManager(storage=storage)
    fill(sessions, old=ttl(1, 10))
    with sessions.session_scope(KEY) as session:
        session.new = ttl(1, 20)
        storage.failing = True
        with pytest.raises(OSError, match="disk full"):
            session.flush()
        storage.failing = False
        clock.now += 10
    assert stored(sessions) == {"new": 1, "$ttl": {"new": [clock.now + 10, 20.0]}}


def test_a_time_that_runs_out_while_the_session_is_stored_leaves_nothing(clock: Clock) -> None:
    sessions = SessionManager()
    fill(sessions, code=ttl(1, 10))
    with sessions.session_scope(KEY) as session:
        session.other = 1
        session.code = 2
        clock.now += 9.99
        clock.step = 0.004
        session.flush()
        clock.step = 0
    found = stored(sessions)
    assert ("code" in found) == ("code" in found.get("$ttl", {}))


def test_a_time_that_runs_out_while_fields_are_listed_raises_nothing(clock: Clock) -> None:
    sessions = SessionManager()
    fill(sessions, {f"f{i}": ttl(i, 10 + i) for i in range(20)})
    clock.now += 9
    clock.step = 0.01
    with sessions.session_scope(KEY) as session:
        while session:
            for name in session:
                assert name in session or clock.now >= 1_000_010
            assert repr(session)


def test_initial_fields_may_have_timers(storage: Any, clock: Clock) -> None:
    sessions = SessionManager(storage=storage, initial=lambda update: {"code": ttl(1, 10), "x": 1})
    with sessions.session_scope(KEY) as session:
        assert session == {"code": 1, "x": 1}
        session.x = 2
    clock.now += 10
    with sessions.session_scope(KEY) as session:
        assert session == {"x": 2}


@pytest.mark.parametrize(
    "seconds", [-1, -0.001, float("nan"), float("inf"), -float("inf"), timedelta(seconds=-1)]
)
def test_a_life_time_is_a_number_of_seconds_from_zero_up(seconds: Any) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        ttl(1, seconds)


@pytest.mark.parametrize("seconds", [None, [], {}, object()])
def test_a_life_time_is_a_number(seconds: Any) -> None:
    with pytest.raises(TypeError):
        ttl(1, seconds)


def test_a_ttl_in_a_ttl_is_refused() -> None:
    with pytest.raises(TypeError, match="one timer"):
        ttl(ttl(1, 10), 20)


@pytest.mark.parametrize(
    "way", [way for way in WAYS if way.startswith(("d", "l", "in", "app", "ext", "+", "sl"))]
)
def test_a_ttl_inside_a_value_is_refused(in_memory: Sessions, way: str) -> None:
    fill(in_memory, d={}, l=[0])
    with in_memory.session_scope(KEY) as session:
        with pytest.raises(TypeError, match=r"'user:1'.*session\[name\] = ttl"):
            into(session, way, ttl(1, 10))
        assert session == {"d": {}, "l": [0]}
    assert stored(in_memory) == {"d": {}, "l": [0]}


@pytest.mark.parametrize(
    "put",
    [
        lambda session: session.__setitem__("x", {ttl(1): 1}),
        lambda session: session.__setitem__("x", {ttl(1)}),
        lambda session: session.__setitem__("x", frozenset([ttl(1)])),
        lambda session: session.s.add(ttl(1)),
        lambda session: session.s.update([ttl(1)]),
        lambda session: session.__setitem__(ttl("x"), 1),
        lambda session: session.__setitem__("x", ttl([ttl(1)])),
    ],
)
def test_a_ttl_as_a_key_or_in_a_set_is_refused(
    in_memory: Sessions, put: Callable[[Session], object]
) -> None:
    fill(in_memory, s={1})
    with in_memory.session_scope(KEY) as session, pytest.raises(TypeError):
        put(session)
    assert stored(in_memory) == {"s": {1}}


def test_a_ttl_that_came_into_a_plain_list_later_is_refused_at_the_flush(
    in_memory: Sessions,
) -> None:
    mine: list[Any] = []
    with in_memory.session_scope(KEY) as session:
        session.mine = mine
        mine.append(ttl(1))
        with pytest.raises(TypeError, match=r"'user:1'.*session\[name\] = ttl"):
            session.flush()
        mine.clear()
    assert stored(in_memory) == {"mine": []}


@pytest.mark.parametrize("timers", [5, "text", [1], {"a": 5}, {"a": [1]}, {"a": ["x", "y"]}])
def test_timers_that_are_none_raise_and_stay(timers: Any) -> None:
    storage = OwnStorage()
    storage.kept[KEY] = {"a": 1, "$ttl": timers}
    sessions = SessionManager(storage=storage, lock_timeout=1)
    for _ in range(2):
        with (
            pytest.raises(SessionDecodeError, match="'user:1' cannot be read"),
            sessions.session_scope(KEY),
        ):
            pass
    assert storage.kept[KEY] == {"a": 1, "$ttl": timers}
