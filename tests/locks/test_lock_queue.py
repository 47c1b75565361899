"""The order in which callers and tickets stand in one queue."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from session_sync.locks.queue import KeyQueue


class Waiting:
    """A caller, or a ticket that was not redeemed."""

    def __init__(self, name: str, begun: bool) -> None:
        self.name = name
        self.begun = begun

    def __repr__(self) -> str:
        return self.name


def caller(name: str) -> Waiting:
    return Waiting(name, begun=True)


def ticket(name: str) -> Waiting:
    return Waiting(name, begun=False)


def names(queue: KeyQueue[Waiting]) -> list[str]:
    return [waiting.name for waiting in queue]


@pytest.fixture
def queue() -> KeyQueue[Waiting]:
    return KeyQueue()


def test_callers_and_tickets_are_in_the_order_in_which_they_came(queue: KeyQueue[Waiting]) -> None:
    assert len(queue) == 0
    assert list(queue) == []
    for waiting in (caller("a"), ticket("b"), caller("c"), ticket("d")):
        queue.enter(waiting, passes=False)
        assert waiting in queue
    assert names(queue) == ["a", "b", "c", "d"]
    assert len(queue) == 4


def test_a_caller_that_passes_is_behind_callers_and_ahead_of_tickets(
    queue: KeyQueue[Waiting],
) -> None:
    for waiting in (caller("a"), ticket("b"), caller("c")):
        queue.enter(waiting, passes=False)
    queue.enter(caller("inside a handler"), passes=True)
    queue.enter(caller("another one"), passes=True)
    assert names(queue) == ["a", "inside a handler", "another one", "b", "c"]


def test_a_ticket_passes_nothing(queue: KeyQueue[Waiting]) -> None:
    for name in "ab":
        queue.enter(ticket(name), passes=True)
    queue.enter(caller("c"), passes=True)
    assert names(queue) == ["c", "a", "b"]


def test_what_was_behind_the_first_ticket_is_passed_no_more_once_that_has_left(
    queue: KeyQueue[Waiting],
) -> None:
    first = ticket("first")
    for waiting in (first, caller("a"), caller("b"), ticket("second"), caller("c")):
        queue.enter(waiting, passes=False)
    queue.leave(first)
    queue.enter(caller("inside a handler"), passes=True)
    assert names(queue) == ["a", "b", "inside a handler", "second", "c"]


def test_the_ticket_that_has_the_lock_is_put_first(queue: KeyQueue[Waiting]) -> None:
    for waiting in (ticket("a"), caller("b")):
        queue.enter(waiting, passes=False)
    queue.enter(caller("inside a handler"), passes=True)
    queue.enter_first(ticket("has the lock"))
    assert names(queue) == ["inside a handler", "has the lock", "a", "b"]


def test_to_enter_again_keeps_the_place_and_to_leave_again_does_no_harm(
    queue: KeyQueue[Waiting],
) -> None:
    first, second = ticket("first"), ticket("second")
    queue.enter(first, passes=False)
    queue.enter(second, passes=False)
    queue.enter(first, passes=False)
    assert names(queue) == ["first", "second"]
    for _ in range(2):
        queue.leave(first)
        assert names(queue) == ["second"]
        assert first not in queue


def worked_off(count: int, make: Callable[[str], Waiting]) -> float:
    """How many seconds of the processor it takes to work off a queue from its head."""
    queue: KeyQueue[Waiting] = KeyQueue()
    begin = time.process_time()
    for number in range(count):
        queue.enter(make(str(number)), passes=False)
    while len(queue):
        queue.leave(next(iter(queue.front or queue.back)))
    return time.process_time() - begin


@pytest.mark.parametrize("make", [caller, ticket])
def test_a_long_queue_is_worked_off_in_linear_time(make: Callable[[str], Waiting]) -> None:
    """The first one of a plain dict is found in C by walking over all that have left, so this one
    measures time: of a few attempts, the machine does not disturb all."""
    few, many = 8_000, 128_000  # linear: 16, quadratic: 256
    assert any(worked_off(many, make) < 64 * worked_off(few, make) for _ in range(5))


def test_anything_can_leave_a_long_queue_at_once() -> None:
    queue: KeyQueue[Waiting] = KeyQueue()
    waiting = [caller(str(number)) for number in range(20_000)]
    for one in waiting:
        queue.enter(one, passes=False)
    expected = waiting.copy()
    leaving = random.Random(1).sample(waiting, 10_000)
    for one in leaving:
        queue.leave(one)
    gone = set(leaving)
    assert list(queue) == [one for one in expected if one not in gone]
