"""Tasks that have not begun and wait for several keys at once."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
from conftest import Threads

from session_sync.locks import Hold, LockTable, Turn
from session_sync.turns import Turns

SOON = 20  # seconds until a test gives up waiting for what has to come


def release(holds: list[Hold] | None) -> None:
    assert holds is not None
    for hold in holds:
        hold.release()


class Called(list[Turns]):
    """Who was called, in order."""

    def __call__(self, turns: Turns) -> None:
        self.append(turns)


@pytest.fixture
def table() -> LockTable:
    return LockTable()


def test_free_keys_are_taken_at_once(table: LockTable) -> None:
    called = Called()
    turns = Turns([(table, "a"), (table, "b")], called)
    assert called == [turns]
    holds = turns.claim()
    assert holds is not None
    assert [hold.name for hold in holds] == ["a", "b"]
    assert table.try_acquire("a") is table.try_acquire("b") is None
    release(holds)
    assert len(table) == 0


def test_a_task_is_called_when_the_last_of_its_keys_is_free(table: LockTable) -> None:
    a, b = table.acquire("a", None), table.acquire("b", None)
    called = Called()
    turns = Turns([(table, "a"), (table, "b")], called)
    a.release()
    assert called == []
    b.release()
    assert called == [turns]
    release(turns.claim())
    assert len(table) == 0


def test_a_waiting_task_holds_nothing_that_others_could_want(table: LockTable) -> None:
    b = table.acquire("b", None)
    called = Called()
    turns = Turns([(table, "a"), (table, "b")], called)
    inside = table.acquire("a", 0, passes=True)  # in a handler
    inside.release()
    b.release()
    assert called == [turns]
    release(turns.claim())


@pytest.mark.parametrize(("passed", "other"), ["ab", "ba"])
def test_who_is_passed_gives_back_what_it_has_and_keeps_its_place(
    table: LockTable, passed: str, other: str
) -> None:
    called, later = Called(), Called()
    turns = Turns([(table, "a"), (table, "b")], called)
    behind = [Turns([(table, key)], later) for key in "ab"]
    inside = table.acquire(passed, None, passes=True)
    assert turns.claim() is None
    table.acquire(other, 0, passes=True).release()
    assert (called, later) == ([turns], [])
    inside.release()
    assert called == [turns, turns]
    assert later == []
    release(turns.claim())
    assert sorted(map(id, later)) == sorted(map(id, behind))
    for each in behind:
        release(each.claim())
    assert len(table) == 0


def test_two_tasks_that_want_the_same_keys_come_one_after_the_other(table: LockTable) -> None:
    called = Called()
    both = [(table, "a"), (table, "b")]
    first, second, third = (Turns(places, called) for places in (both, both[::-1], both))
    for each in (first, second, third):
        assert called[-1] is each
        release(each.claim())
    assert called == [first, second, third]
    assert len(table) == 0


def test_who_withdraws_lets_the_others_pass(table: LockTable) -> None:
    holder = table.acquire("a", None)
    called = Called()
    gone = Turns([(table, "a"), (table, "b")], called)
    stays = Turns([(table, "b")], called)
    gone.withdraw()
    assert called == [stays]
    release(stays.claim())
    holder.release()
    gone.withdraw()  # once more does no harm
    assert gone.claim() is None
    assert len(table) == 0


def test_who_withdraws_while_it_was_passed_leaves_nothing(table: LockTable) -> None:
    called = Called()
    turns = Turns([(table, "a"), (table, "b")], called)
    inside = table.acquire("b", None, passes=True)
    assert turns.claim() is None
    turns.withdraw()
    inside.release()
    assert called == [turns]
    assert len(table) == 0


def test_who_withdraws_in_the_middle_of_a_claim_leaves_nothing() -> None:
    class Withdrawn(LockTable):
        """Its second turn is withdrawn as soon as the first one is claimed."""

        def queue_turn(self, key: str, call: Callable[[Any], None]) -> Any:
            turn = super().queue_turn(key, call)
            if key == "a":
                claim = turn.claim

                def claimed() -> Hold | None:
                    hold = claim()
                    turns.withdraw()
                    return hold

                outer = turn

                class Proxy:
                    claim = staticmethod(claimed)
                    withdraw = outer.withdraw
                    put_back = outer.put_back

                return Proxy()
            return turn

    table = Withdrawn()
    turns = Turns([(table, "a"), (table, "b")], lambda _: None)
    assert turns.claim() is None
    assert len(table) == 0


class Yielding(LockTable):
    """Lets others go on between two keys of one task."""

    def queue_turn(self, key: str, call: Callable[[Turn], None]) -> Turn:
        turn = super().queue_turn(key, call)
        time.sleep(0)
        return turn


class Crowd:
    """Tasks that want any of six keys, two workers for them, and handlers that pass them."""

    def __init__(self) -> None:
        self.tables = Yielding(), Yielding()
        self._places = [(table, key) for table in self.tables for key in "abc"]
        self._having = [0] * len(self._places)
        self._pool: SimpleQueue[tuple[Turns, list[int]] | None] = SimpleQueue()
        self.done = threading.Semaphore(0)

    def feed(self, wishes: list[list[int]]) -> None:
        for numbers in wishes:
            places = [self._places[number] for number in numbers]
            Turns(places, lambda turns, numbers=numbers: self._pool.put((turns, numbers)))

    def work(self) -> None:
        while (job := self._pool.get(timeout=SOON)) is not None:
            turns, numbers = job
            holds = turns.claim()
            if holds is not None:
                self._have(numbers)
                release(holds)
                self.done.release()

    def pass_by(self, numbers: list[int]) -> None:
        for number in numbers:
            table, key = self._places[number]
            hold = table.acquire(key, SOON, passes=True)
            self._have([number])
            hold.release()

    def stop(self) -> None:
        self._pool.put(None)

    def _have(self, numbers: list[int]) -> None:
        for number in numbers:
            self._having[number] += 1
            assert self._having[number] == 1
        for number in numbers:
            self._having[number] -= 1


@pytest.mark.parametrize("seed", range(3))
def test_many_tasks_and_handlers_that_pass_them_all_come_to_an_end(
    threads: Threads, seed: int
) -> None:
    """Whatever they want: no circle, no call that is missed, and never two who have one key."""
    chance = random.Random(seed)
    crowd = Crowd()
    for _ in range(2):
        wishes = [chance.sample(range(6), chance.choice([1, 2, 2, 3])) for _ in range(200)]
        threads.start(crowd.work)
        threads.start(crowd.feed, wishes)
        threads.start(crowd.pass_by, [chance.randrange(6) for _ in range(200)])
    for _ in range(400):
        assert crowd.done.acquire(timeout=SOON)
    crowd.stop()
    crowd.stop()
    threads.join()
    assert [len(table) for table in crowd.tables] == [0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_somebody_queues_leaves_the_child_free_to_queue(threads: Threads) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(LockTable):
        def queue_turn(self, key: str, call: Callable[[Any], None]) -> Any:
            entered.set()
            assert go_on.wait(SOON)
            return super().queue_turn(key, call)

    threads.start(Turns, [(Slow(), "a")], lambda _: None)
    assert entered.wait(SOON)
    child = os.fork()
    if not child:
        done: list[Turns] = []
        thread = threading.Thread(target=Turns, args=([(LockTable(), "a")], done.append))
        thread.daemon = True
        thread.start()
        thread.join(SOON)
        os._exit(0 if done else 1)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    threads.join()
