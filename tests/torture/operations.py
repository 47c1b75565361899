"""What workers do with sessions, in threads and in coroutines.

Both halves do the same things in the same order; the second one awaits.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from random import Random
from typing import Any

from model import Boom, Ledger, Op, Record, Slot

from session_sync import (
    SessionClosedError,
    SessionDeadlockError,
    SessionLockTimeoutError,
    SessionManager,
)

Held = dict[str, Record]  # the sessions that are open around, by key
DEPTH = 3  # of nested blocks
EXPECTED = (SessionDeadlockError, SessionLockTimeoutError)


@dataclass
class World:
    """What all workers of a round share."""

    ledger: Ledger
    managers: dict[str, SessionManager[Any]]  # by what they are like
    pool: Pool
    shared: bool  # another process is there, and no circle with it is noticed
    without: frozenset[str] = frozenset()  # what is left out, to find out what it takes
    stopped: bool = False
    broken: list[str] = field(default_factory=list)  # what went wrong outside of sessions
    open_before: list[str] = field(default_factory=list)  # blocks that were never left, most likely

    def manager(self, op: Op, rng: Random) -> tuple[str, SessionManager[Any]]:
        # One that saves in spite of errors would save half a change, if an interrupt halves it.
        name = rng.choices(("eager", "lazy", "short", "keep"), (5, 2, 2, 2 * op.calm))[0]
        return name, self.managers[name]

    def weights(self, actions: list[Any], weights: list[int]) -> list[int]:
        names = [action.__name__.strip("_") for action in actions]
        return [0 if n in self.without else w for n, w in zip(names, weights, strict=True)]

    def inner_key(self, rng: Random, held: Held) -> str | None:
        """For a nested block. Where no circle is noticed, in one order."""
        keys = self.ledger.keys
        if self.shared:
            highest = max(held)
            keys = [key for key in keys if key > highest or key in held]
        return rng.choice(keys) if keys else None

    def prepare(self, op: Op, key: str, held: Held, name: str, kind: str) -> Record:
        """The record of a block of one of the managers."""
        joined = held.get(key)
        record = self.ledger.record(op, f"join {kind}" if joined is not None else kind, key)
        record.joined = joined
        record.may_circle = bool(held)
        record.may_time_out = name == "short"
        record.keeps = name == "keep"
        return record

    def prepare_pair(
        self, op: Op, rng: Random, kind: str
    ) -> tuple[SessionManager[Any], list[Record]]:
        """The records of a block of one of the managers around two sessions: both or neither."""
        name, manager = self.manager(op, rng)
        records = [self.ledger.record(op, kind, key) for key in rng.sample(self.ledger.keys, 2)]
        self.ledger.pairs.append((records[0], records[1]))
        for record in records:
            record.may_circle = True  # with nested blocks
            record.may_time_out = name == "short"
            record.keeps = name == "keep"
        return manager, records


class Job:
    """Something for another thread to do, and when it has."""

    def __init__(self, what: Callable[[], None]) -> None:
        self._what = what
        self._context = contextvars.copy_context()
        self._gate = threading.Lock()
        self._gate.acquire()
        self.ok = False

    def run(self, broken: list[str]) -> None:
        try:
            self._context.run(self._what)
            self.ok = True
        except (Boom, SessionClosedError, *EXPECTED):  # the block around it may have failed
            pass  # its record has it
        except BaseException as error:
            broken.append(f"in a helper thread: {type(error).__name__}: {error}")
        finally:
            self._gate.release()

    def wait(self) -> bool:
        self._gate.acquire()
        return self.ok


class Pool:
    """Helper threads, which nobody interrupts."""

    def __init__(self, size: int, broken: list[str]) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._broken = broken
        self.slots = [Slot(f"helper {n}") for n in range(size)]
        self.threads = [
            threading.Thread(target=self._work, args=(slot,), name=slot.name, daemon=True)
            for slot in self.slots
        ]
        for thread in self.threads:
            thread.start()

    def put(self, what: Callable[[], None]) -> Job:
        job = Job(what)
        self._jobs.put(job)
        return job

    def end(self) -> None:
        for _ in self.threads:
            self._jobs.put(None)

    def _work(self, slot: Slot) -> None:
        while True:
            slot.active = False
            job = self._jobs.get()
            if job is None:
                return
            slot.beat("a job")
            slot.active = True
            job.run(self._broken)
            del job


def loosen(record: Record) -> None:
    """A flush begins: until it is confirmed, nobody knows what is stored."""
    for each in record.all_joined():
        each.loose = True


def confirm(record: Record) -> None:
    for each in record.all_joined():
        each.flushed = each.changed
        each.loose = False


class Threaded:
    """In a thread."""

    def __init__(self, world: World, rng: Random) -> None:
        self.world, self.rng, self.ledger = world, rng, world.ledger
        self._transfers = 0 if "transfer" in world.without else 0.16
        self._actions: list[Callable[[Op, Any, Record, Held], None]] = [
            self._nothing,
            self._pause,
            self._flush,
            self._flush_elsewhere,
            self._flush_meanwhile,
            self._release,
            self._release_elsewhere,
            self._nest,
            self._join_elsewhere,
            self._collect,
            self._fail,
        ]
        self._weights = self.world.weights(self._actions, [6, 3, 3, 2, 2, 2, 1, 5, 3, 1, 3])

    def operate(self, op: Op) -> None:
        roll = self.rng.random()
        key = self.rng.choice(self.ledger.keys)
        if roll < self._transfers and len(self.ledger.keys) > 1:
            self._transfer(op)
        elif roll < 0.20:
            self._idle(op, key)
        elif roll < 0.22 and "abandon" not in self.world.without:
            self._abandon(op, key)
        else:
            name, manager = self.world.manager(op, self.rng)
            self.block(op, key, {}, name, manager)

    def block(self, op: Op, key: str, held: Held, name: str, manager: SessionManager[Any]) -> None:
        record = self.world.prepare(op, key, held, name, "with")
        try:
            with manager.session_scope(key) as session:
                self.body(op, session, record, held)
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise

    def body(self, op: Op, session: Any, record: Record, held: Held) -> None:
        try:
            if record.joined is None:
                session["n"]
                self.ledger.come_in(record)
            for _ in self.ledger.change(session, record):
                self.pause()
            act = self.rng.choices(self._actions, self._weights)[0]
            act(op, session, record, {**held, record.key: record})
        except BaseException:
            record.raised = True
            raise
        finally:
            record.inside = False

    def pause(self) -> None:
        roll = self.rng.random()
        if roll < 0.3:
            time.sleep(0)
        elif roll < 0.4:
            time.sleep(self.rng.random() * 0.002)

    # -- what a handler does besides

    def _nothing(self, op: Op, session: Any, record: Record, held: Held) -> None:
        pass

    def _pause(self, op: Op, session: Any, record: Record, held: Held) -> None:
        time.sleep(self.rng.random() * 0.005)

    def _flush(self, op: Op, session: Any, record: Record, held: Held) -> None:
        loosen(record)
        session.flush()
        confirm(record)
        if self.rng.random() < 0.3:
            raise Boom

    def _flush_elsewhere(self, op: Op, session: Any, record: Record, held: Held) -> None:
        loosen(record)
        job = self.world.pool.put(session.flush)
        if self.rng.random() < 0.5 and job.wait():
            confirm(record)

    def _flush_meanwhile(self, op: Op, session: Any, record: Record, held: Held) -> None:
        """A change while another thread flushes."""
        loosen(record)
        job = self.world.pool.put(session.flush)
        late = self.ledger.record(op, "late change", record.key, "d")
        late.joined = record
        for _ in self.ledger.change_one(session, late):
            self.pause()
        if self.rng.random() < 0.5 and job.wait():
            confirm(record)
        late.finish()

    def _release(self, op: Op, session: Any, record: Record, held: Held) -> None:
        for each in record.all_joined():
            each.inside = False
        loosen(record)
        session.release()
        confirm(record)
        if self.rng.random() < 0.5:
            name, manager = self.world.manager(op, self.rng)
            rest = {key: each for key, each in held.items() if key != record.key}
            if not self.world.shared or not rest or record.key > max(rest):
                self._try_block(op, record.key, rest, name, manager)

    def _release_elsewhere(self, op: Op, session: Any, record: Record, held: Held) -> None:
        for each in record.all_joined():
            each.inside = False
        loosen(record)
        job = self.world.pool.put(session.release)
        if self.rng.random() < 0.5 and job.wait():
            confirm(record)

    def _nest(self, op: Op, session: Any, record: Record, held: Held) -> None:
        key = self.world.inner_key(self.rng, held)
        if key is not None and len(held) < DEPTH:
            self._try_block(op, key, held, *self.world.manager(op, self.rng))

    def _join_elsewhere(self, op: Op, session: Any, record: Record, held: Held) -> None:
        """Some helper threads join, and this one waits for them."""
        if len(list(record.all_joined())) > 1:
            return  # whose turn it is already
        jobs = [
            self.world.pool.put(lambda: self.join(op, record))
            for _ in range(self.rng.randint(1, 3))
        ]
        for job in jobs:
            job.wait()

    def join(self, op: Op, around: Record) -> None:
        """In another thread, which may come too late: then it waits as everybody does."""
        record = self.ledger.record(op, "join elsewhere", around.key, "c")
        record.joined = around
        record.may_time_out = True
        try:
            with self.world.managers["short"].session_scope(around.key) as session:
                try:
                    self.ledger.take_turn(record)
                    for _ in self.ledger.change_one(session, record):
                        time.sleep(0)
                finally:
                    record.inside = False
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise

    def _collect(self, op: Op, session: Any, record: Record, held: Held) -> None:
        gc.collect()

    def _fail(self, op: Op, session: Any, record: Record, held: Held) -> None:
        raise Boom

    def _try_block(
        self, op: Op, key: str, held: Held, name: str, manager: SessionManager[Any]
    ) -> None:
        with suppress(*EXPECTED):  # and the handler goes on without
            self.block(op, key, held, name, manager)

    # -- other operations

    def _transfer(self, op: Op) -> None:
        """Coins from one to another."""
        manager, records = self.world.prepare_pair(op, self.rng, "transfer")
        keys = [record.key for record in records]
        try:
            with manager.session_scopes(*keys) as sessions:
                self._move(sessions, records)
            for record in records:
                record.finish()
        except BaseException as error:
            for record in records:
                self.ledger.failed(record, error)
            raise

    def _move(self, sessions: Any, records: list[Record]) -> None:
        try:
            for record in records:
                self.ledger.come_in(record)
            coins = self.rng.randint(1, 5)
            sessions[0].coins -= coins
            self.pause()
            sessions[1].coins += coins
            for session, record in zip(sessions, records, strict=True):
                for _ in self.ledger.change(session, record):
                    self.pause()
            if self.rng.random() < 0.2:
                raise Boom
        except BaseException:
            for record in records:
                record.raised = True
            raise
        finally:
            for record in records:
                record.inside = False

    def _idle(self, op: Op, key: str) -> None:
        """A lazy session that nobody touches, or an eager one that is only read."""
        record = self.ledger.record(op, "idle", key)
        try:
            if self.rng.random() < 0.5:
                with self.world.managers["lazy"].session_scope(key):
                    self.pause()
            else:
                with self.world.managers["eager"].session_scope(key) as session:
                    self.ledger.look(session, record)
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise

    def _abandon(self, op: Op, key: str) -> None:
        """Enter and never leave, in a thread that ends, and in a cycle for the collector. A helper
        starts the thread: an interrupt in Thread.start() may leave locks of Python's own behind."""
        record = self.ledger.record(op, "abandon", key)
        record.may_time_out = True
        manager = self.world.managers["short"]

        def abandon() -> None:
            thread = threading.Thread(target=_enter_in_cycle, args=(manager, record), daemon=True)
            thread.start()
            thread.join()

        self.world.pool.put(abandon)


def _enter_in_cycle(manager: SessionManager[Any], record: Record) -> None:
    scope = manager.session_scope(record.key)
    cycle: list[Any] = [scope]
    cycle.append(cycle)
    try:
        scope.__enter__()
        record.finish()
    except BaseException as error:
        record.failed(error)


class Tasked:
    """In a coroutine."""

    def __init__(self, world: World, rng: Random, doomed: bool = False) -> None:
        self.world, self.rng, self.ledger = world, rng, world.ledger
        self._threaded = Threaded(world, rng)
        self._transfers = 0 if "transfer" in world.without else 0.16
        self._actions: list[Callable[[Op, Any, Record, Held], Any]] = [
            self._nothing,
            self._pause,
            self._flush,
            self._flush_meanwhile,
            self._release,
            self._nest,
            self._gather,
            self._collect,
            self._fail,
            self._flush_elsewhere,
            self._join_elsewhere,
        ]
        # A loop that is thrown away would leave threads behind that it has started.
        weights = [6, 3, 3, 2, 2, 5, 3, 1, 3, *((0, 0) if doomed else (2, 3))]
        self._weights = self.world.weights(self._actions, weights)

    async def operate(self, op: Op) -> None:
        roll = self.rng.random()
        key = self.rng.choice(self.ledger.keys)
        if roll < self._transfers and len(self.ledger.keys) > 1:
            await self._transfer(op)
        elif roll < 0.20:
            await self._idle(op, key)
        elif roll < 0.24 and "block_the_loop" not in self.world.without:
            self._block_the_loop(op, key)
        else:
            name, manager = self.world.manager(op, self.rng)
            await self.block(op, key, {}, name, manager)

    async def block(
        self, op: Op, key: str, held: Held, name: str, manager: SessionManager[Any]
    ) -> None:
        record = self.world.prepare(op, key, held, name, "async with")
        try:
            async with manager.session_scope(key) as session:
                await self.body(op, session, record, held, name)
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise

    async def body(self, op: Op, session: Any, record: Record, held: Held, name: str) -> None:
        try:
            if name == "lazy":
                session = await session
            if record.joined is None:
                self.ledger.come_in(record)
            for _ in self.ledger.change(session, record):
                await self.pause()
            act = self.rng.choices(self._actions, self._weights)[0]
            await act(op, session, record, {**held, record.key: record})
        except BaseException:
            record.raised = True
            raise
        finally:
            record.inside = False

    async def pause(self) -> None:
        roll = self.rng.random()
        if roll < 0.3:
            await asyncio.sleep(0)
        elif roll < 0.4:
            await asyncio.sleep(self.rng.random() * 0.002)

    async def _nothing(self, op: Op, session: Any, record: Record, held: Held) -> None:
        pass

    async def _pause(self, op: Op, session: Any, record: Record, held: Held) -> None:
        await asyncio.sleep(self.rng.random() * 0.005)

    async def _flush(self, op: Op, session: Any, record: Record, held: Held) -> None:
        loosen(record)
        await session.aflush()
        confirm(record)
        if self.rng.random() < 0.3:
            raise Boom

    async def _flush_elsewhere(self, op: Op, session: Any, record: Record, held: Held) -> None:
        loosen(record)
        await asyncio.to_thread(session.flush)
        confirm(record)

    async def _flush_meanwhile(self, op: Op, session: Any, record: Record, held: Held) -> None:
        """A change while another task flushes."""
        loosen(record)
        flush = asyncio.create_task(session.aflush())
        await asyncio.sleep(0)
        late = self.ledger.record(op, "late change", record.key, "d")
        late.joined = record
        for _ in self.ledger.change_one(session, late):
            pass
        if self.rng.random() < 0.7:
            await flush
            confirm(record)
        late.finish()

    async def _release(self, op: Op, session: Any, record: Record, held: Held) -> None:
        for each in record.all_joined():
            each.inside = False
        loosen(record)
        await session.arelease()
        confirm(record)
        if self.rng.random() < 0.5:
            rest = {key: each for key, each in held.items() if key != record.key}
            if not self.world.shared or not rest or record.key > max(rest):
                await self._try_block(op, record.key, rest)

    async def _nest(self, op: Op, session: Any, record: Record, held: Held) -> None:
        key = self.world.inner_key(self.rng, held)
        if key is not None and len(held) < DEPTH:
            await self._try_block(op, key, held)

    async def _gather(self, op: Op, session: Any, record: Record, held: Held) -> None:
        """Some tasks join, and this one waits for them."""
        if len(list(record.all_joined())) > 1:
            return
        joins = (self._join(op, record) for _ in range(self.rng.randint(2, 4)))
        for error in await asyncio.gather(*joins, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, EXPECTED):
                raise error

    async def _join(self, op: Op, around: Record) -> None:
        record = self.ledger.record(op, "join in gather", around.key, "c")
        record.joined = around
        record.may_time_out = True
        try:
            async with self.world.managers["short"].session_scope(around.key) as session:
                try:
                    self.ledger.take_turn(record)
                    for _ in self.ledger.change_one(session, record):
                        await asyncio.sleep(0)
                finally:
                    record.inside = False
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise

    async def _join_elsewhere(self, op: Op, session: Any, record: Record, held: Held) -> None:
        if len(list(record.all_joined())) > 1:
            return
        join = self._threaded.join
        joins = (asyncio.to_thread(join, op, record) for _ in range(self.rng.randint(1, 3)))
        for error in await asyncio.gather(*joins, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, EXPECTED):
                raise error

    async def _collect(self, op: Op, session: Any, record: Record, held: Held) -> None:
        gc.collect()

    async def _fail(self, op: Op, session: Any, record: Record, held: Held) -> None:
        raise Boom

    async def _try_block(self, op: Op, key: str, held: Held) -> None:
        with suppress(*EXPECTED):
            await self.block(op, key, held, *self.world.manager(op, self.rng))

    async def _transfer(self, op: Op) -> None:
        manager, records = self.world.prepare_pair(op, self.rng, "async transfer")
        keys = [record.key for record in records]
        try:
            async with manager.session_scopes(*keys) as sessions:
                await self._move(sessions, records)
            for record in records:
                record.finish()
        except BaseException as error:
            for record in records:
                self.ledger.failed(record, error)
            raise

    async def _move(self, sessions: Any, records: list[Record]) -> None:
        try:
            for record in records:
                self.ledger.come_in(record)
            coins = self.rng.randint(1, 5)
            sessions[0].coins -= coins
            await self.pause()
            sessions[1].coins += coins
            for session, record in zip(sessions, records, strict=True):
                for _ in self.ledger.change(session, record):
                    await self.pause()
            if self.rng.random() < 0.2:
                raise Boom
        except BaseException:
            for record in records:
                record.raised = True
            raise
        finally:
            for record in records:
                record.inside = False

    async def _idle(self, op: Op, key: str) -> None:
        record = self.ledger.record(op, "async idle", key)
        try:
            if self.rng.random() < 0.5:
                async with self.world.managers["lazy"].session_scope(key):
                    await self.pause()
            else:
                async with self.world.managers["eager"].session_scope(key) as session:
                    self.ledger.look(session, record)
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise

    def _block_the_loop(self, op: Op, key: str) -> None:
        """A plain `with` in a coroutine: never an endless wait."""
        record = self.ledger.record(op, "with in a coroutine", key)
        record.may_time_out = record.may_circle = True
        try:
            with self.world.managers["short"].session_scope(key) as session:
                try:
                    self.ledger.come_in(record)
                    for _ in self.ledger.change(session, record):
                        pass
                except BaseException:
                    record.raised = True
                    raise
                finally:
                    record.inside = False
            record.finish()
        except BaseException as error:
            self.ledger.failed(record, error)
            raise
