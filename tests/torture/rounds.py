"""A round: some workers, and somebody who disturbs them, for a second or two; then the check."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from random import Random
from types import FrameType
from typing import Any, ClassVar

from diagnosis import collections, current_frames, locks_and_stacks, open_blocks
from model import (
    COINS,
    FIELDS,
    Alarm,
    Bits,
    Boom,
    Failures,
    Interrupt,
    Ledger,
    Op,
    Record,
    Slot,
    compare,
    compare_pairs,
)
from operations import Pool, Tasked, Threaded, World

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionLockTimeoutError,
    SessionManager,
    storage_from_url,
)

SHARED = ("sqlite", "disk", "redis")  # stores that several processes may have
PATIENCE = float(
    os.environ.get("SESSION_SYNC_TORTURE_PATIENCE", "20")
)  # seconds: the long time-out
LIMIT = PATIENCE + 30  # seconds that anything may last
OPENS = 10.0  # seconds in which a key can be had after the round


def open_storage(url: str) -> Any:
    Interruptible.may_log = url.startswith("redis")
    if url.startswith("memory"):
        return MemoryStorage()
    if url.startswith("lru"):
        return LruMemoryStorage(maxsize=64)  # which drops the keys of the rounds before
    return storage_from_url(url)


class Interruptible:
    """A thread that can be interrupted while it works, once in each operation."""

    #: Whether the store logs something, as redis-py does. Only then is it looked where a thread
    #: is: with CPython 3.11, to follow the frames of a thread that runs may crash the process.
    may_log: ClassVar[bool] = False

    def __init__(self) -> None:
        self.ident = 0
        self.window: Op | None = None  # what may be interrupted ...
        self._target: Op | None = None  # ... what somebody is about to interrupt ...
        self._hit: Op | None = None  # ... and has interrupted

    def interrupt(self, error: type[BaseException]) -> bool:
        """By another thread. It first says so, and then looks once more; `close` does these two
        things the other way round, so one of them knows of the other."""
        op = self.window
        if op is None or op.interrupted:
            return False
        if self.may_log and _is_logging(current_frames().get(self.ident)):
            return False
        self._target = op
        sent = self.window is op
        if sent:
            op.interrupted = True
            ident, raised = ctypes.c_ulong(self.ident), ctypes.py_object(error)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, raised)
        self._hit = op
        return sent

    def close(self, op: Op) -> None:
        """Let nothing more come; what is on its way comes here."""
        self.window = None
        if self._target is op:
            while self._hit is not op:
                time.sleep(0)
            for _ in range(1000):
                pass


def _is_logging(frame: FrameType | None) -> bool:
    """Whether a thread is in `logging`, as redis-py is when it connects: an interrupt may leave the
    mutex of that locked."""
    while frame is not None:
        if frame.f_code.co_filename == logging.__file__:
            return True
        frame = frame.f_back
    return False


def note(world: World, op: Op, error: BaseException) -> None:
    """An operation has raised what no session has seen: a mistake in here, or worse."""
    if type(error).__name__ != op.error and not isinstance(error, (Interrupt, Alarm)):
        world.broken.append(f"{type(error).__name__}: {error}")


class ThreadWorker(threading.Thread):
    """Does operations with `with`."""

    def __init__(self, world: World, rng: Random, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.world, self.rng, self.slot = world, rng, Slot(name)
        self.ops = Threaded(world, rng)
        self.guard = Interruptible()

    def run(self) -> None:
        self.guard.ident = threading.get_ident()
        while not self.world.stopped:
            with suppress(Interrupt, Alarm):  # that came between two operations
                self._once()
        self.slot.active = False

    def _once(self) -> None:
        op = Op(calm=self.rng.random() < 0.25)
        self.slot.beat("an operation")
        self.world.open_before += open_blocks()
        try:
            if not op.calm:
                self.guard.window = op
            self.ops.operate(op)
        except BaseException as error:
            note(self.world, op, error)
        self.guard.close(op)


class LoopWorker(threading.Thread):
    """An event loop whose tasks do operations with `async with`, some of them cancelled."""

    def __init__(self, world: World, rng: Random, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.world, self.rng = world, rng
        self.slots = [Slot(f"{name}, task {n}") for n in range(rng.randint(1, 4))]
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self.world.broken.append(f"{self.name}: {type(error).__name__}: {error}")
        for slot in self.slots:
            slot.active = False

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        await asyncio.gather(*map(self._work, self.slots))

    async def _work(self, slot: Slot) -> None:
        rng = Random(self.rng.random())
        ops = Tasked(self.world, rng)
        while not self.world.stopped:
            op = Op(calm=rng.random() < 0.5 or "cancellations" in self.world.without)
            slot.beat("an operation")
            try:
                if op.calm:
                    await ops.operate(op)
                elif rng.random() < 0.5:
                    await asyncio.wait_for(ops.operate(op), rng.random() * 0.01)
                else:
                    await self._cancelled(op, ops, rng)
            except TimeoutError as error:
                op.interrupted = not isinstance(error, SessionLockTimeoutError)
            except BaseException as error:
                note(self.world, op, error)
            await asyncio.sleep(0)
        slot.active = False

    async def _cancelled(self, op: Op, ops: Tasked, rng: Random) -> None:
        task = asyncio.create_task(ops.operate(op))
        if rng.random() < 0.5:
            for _ in range(rng.randrange(6)):  # none: it is cancelled before its first step
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(rng.random() * 0.01)
        if task.cancel():
            op.interrupted = True
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            note(self.world, op, error)


class DoomedLoops(threading.Thread):
    """Event loops that are closed or thrown away with all that is in them, or interrupted."""

    def __init__(self, world: World, rng: Random, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.world, self.rng, self.slot = world, rng, Slot(name)
        self.guard = Interruptible()
        self.number = 0

    def run(self) -> None:
        self.guard.ident = threading.get_ident()
        while not self.world.stopped:
            self.slot.beat("a loop")
            with suppress(Interrupt, Alarm):
                self._one_loop()
            # What an interrupted run_forever() may have left behind.
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(None, None)
            time.sleep(self.rng.random() * 0.02)
        self.slot.active = False

    def _one_loop(self) -> None:
        self.number += 1
        loop = asyncio.new_event_loop()
        self.doomed_loop = weakref.ref(loop)
        op = Op()
        tasks = []
        for _ in range(self.rng.randint(1, 4)):
            ops = Tasked(self.world, Random(self.rng.random()), doomed=True)
            tasks.append(loop.create_task(ops.operate(Op(thrown_away=True))))
        try:
            loop.call_later(5, loop.stop)  # asyncio has lost a callback, if it comes to that
            self.guard.window = op
            loop.run_until_complete(asyncio.sleep(self.rng.random() * 0.01))
        except (Interrupt, Alarm):
            pass
        except RuntimeError as error:
            if "stopped before" not in str(error):
                raise
        self.guard.close(op)
        fate = self.rng.choice(("close", "close", "drop", "drop", "finish", "go on"))
        if op.interrupted:  # it may have lost a callback, so that a task waits for ever
            fate = self.rng.choice(("close", "drop"))
        if fate == "go on":
            time.sleep(self.rng.random() * 0.01)
            loop.run_until_complete(asyncio.sleep(self.rng.random() * 0.01))
        elif fate == "finish":
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks))
        if fate != "drop":
            loop.close()


def _soon_empty(manager: SessionManager[Any]) -> int:
    """How many keys are in the lock table after all; what blocks is unlocked by a thread."""
    give_up = time.monotonic() + OPENS
    locks = manager.scopes.options.backend.locks
    while (size := len(manager.locks)) and time.monotonic() < give_up:
        if all(handle.is_orphaned for handle in list(locks.held.values())) and not locks.queues:
            return 0  # its finaliser was interrupted, too: it is given to whoever comes to wait
        time.sleep(0.01)
    return size


class Tasks(SimpleQueue[Any]):
    """For telebot's workers: `queue.Queue` is written in Python, and a `put` that is interrupted
    may leave its mutex locked, which no library on top of it can mend."""

    def task_done(self) -> None:
        pass


class BotWorker(threading.Thread):
    """Feeds a TeleBot; its own workers run the handlers."""

    def __init__(self, world: World, rng: Random, name: str) -> None:
        super().__init__(name=name, daemon=True)
        import telebot

        import session_sync.telebot

        self.world, self.rng, self.slot = world, rng, Slot(name)
        self.ops = Threaded(world, rng)
        self.records: dict[str, Record] = {}
        self.handled: SimpleQueue[None] = SimpleQueue()
        self.number = 0
        self._de_json = telebot.types.Update.de_json
        self.bot = telebot.TeleBot(
            "1:token", threaded=True, num_threads=rng.randint(1, 3), exception_handler=self
        )
        self._use(Tasks())
        session_sync.telebot.install(self.bot, world.managers[rng.choice(("eager", "lazy"))])
        self.bot.register_message_handler(self._on_message, func=lambda message: True)

    def _use(self, tasks: Tasks) -> None:
        pool = self.bot.worker_pool
        old, pool.tasks = pool.tasks, tasks
        for worker in pool.workers:
            worker.queue = tasks
        for _ in pool.workers:  # which wait there
            old.put((str, (), {}))

    def handle(self, error: Exception) -> bool:  # as telebot calls it
        if not isinstance(error, Boom):
            self.world.broken.append(f"the bot: {type(error).__name__}: {error}")
            self.handled.put(None)  # perhaps before its handler was called
        return True

    def run(self) -> None:
        while not self.world.stopped:
            self.slot.beat("updates")
            updates = [self._update() for _ in range(self.rng.randint(1, 4))]
            self.bot.process_new_updates([self._de_json(update) for update in updates])
            for _ in updates:
                self._wait()
        self._stop_bot()
        self.slot.active = False

    def _wait(self) -> None:
        with suppress(Empty):
            self.handled.get(timeout=LIMIT + 5)

    def _update(self) -> dict[str, Any]:
        self.number += 1
        record = self.world.ledger.record(
            Op(calm=True), "telebot", self.rng.choice(self.world.ledger.keys)
        )
        self.records[str(self.number)] = record
        user = int(record.key.split(":")[1])
        return {
            "update_id": self.number,
            "message": {
                "message_id": self.number,
                "date": 1,
                "from": {"id": user, "is_bot": False, "first_name": "Alex"},
                "chat": {"id": user, "type": "private"},
                "text": str(self.number),
            },
        }

    def _on_message(self, message: Any) -> None:
        record = self.records[message.text]
        try:
            self.ops.body(record.op, message.session, record, {})
            record.finish()
        except BaseException as error:
            self.world.ledger.failed(record, error)
            raise
        finally:
            self.handled.put(None)

    def _stop_bot(self) -> None:
        """`stop_bot()` without the half second for which a worker looks out for its next task."""
        self.bot.stop_polling()
        workers = self.bot.worker_pool.workers
        for worker in workers:
            worker.stop()
        for _ in workers:
            self.bot.worker_pool.put(lambda: None)
        self.bot.stop_bot()


class MainWorker:
    """Works in the main thread, where signals come."""

    def __init__(self, world: World, rng: Random) -> None:
        self.world, self.rng, self.slot = world, rng, Slot("main thread")
        self.ops = Threaded(world, rng)
        self.window: Op | None = None
        self.sent = self.used = 0
        self._in_handler = False
        self._holder = Record(Op(), "the operation around", "", 0, "a")

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        signal.signal(signal.SIGALRM, self._on_alarm)
        if "signals" not in self.world.without:
            self._set_timer()
        try:
            while time.monotonic() < end and not self.world.ledger.alarmed:
                with suppress(Interrupt, Alarm):
                    self._once()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        self.slot.active = False

    def _once(self) -> None:
        op = Op(calm=self.rng.random() < 0.25)
        self._holder = Record(op, "the operation around", "", 0, "a")
        self.slot.beat("an operation")
        self.world.open_before += open_blocks()
        try:
            self.window = op
            self.ops.operate(op)
            self._holder.finish()
        except BaseException as error:
            note(self.world, op, error)
        self.window = None

    def _set_timer(self, spent: float = 0.0) -> None:
        """The next signal; what is interrupted gets as much time as the handler has taken."""
        signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(0.0003, 0.006) + spent)

    def _on_alarm(self, _number: int, frame: FrameType | None) -> None:
        if self._in_handler:
            return
        if _is_logging(frame):
            self._set_timer()
            return
        op, roll = self.window, self.rng.random()
        is_fair = op is not None and not op.calm and not op.interrupted
        if roll < 0.4 and is_fair and "raises" not in self.world.without:
            op.interrupted = True
            self.sent += 1
            self._set_timer()
            raise Interrupt if roll < 0.2 else Alarm
        began = time.monotonic()
        # What a collection of this thread would unlock, the handler could wait for in vain.
        if roll < 0.7 and not collections.begun:
            self._in_handler = True
            try:
                self._use_session()
            finally:
                self._in_handler = False
        self._set_timer(time.monotonic() - began)

    def _use_session(self) -> None:
        """It may find its own thread in the middle of a handler, whose session it joins, or of
        anything else."""
        key = self.rng.choice(self.world.ledger.keys)
        record = self.world.ledger.record(Op(calm=True), "signal", key, "s")
        record.may_time_out = True
        if self.window is not None:
            record.joined = self._holder
        self.used += 1
        try:
            with self.world.managers["short"].session_scope(key) as session:
                for _ in self.world.ledger.change_one(session, record):
                    pass
            record.finish()
        except Exception as error:
            record.failed(error)


class Chaos(threading.Thread):
    """Interrupts, collects, and changes how threads are switched."""

    def __init__(self, world: World, rng: Random, guards: list[Interruptible]) -> None:
        super().__init__(name="chaos", daemon=True)
        self.world, self.rng, self.guards = world, rng, guards
        self.sent = 0

    def run(self) -> None:
        rng = self.rng
        collected = time.monotonic()
        while not self.world.stopped:
            time.sleep(rng.random() * 0.004)
            roll = rng.random()
            if roll < 0.6:
                if self.guards and "interrupts" not in self.world.without:
                    self.sent += rng.choice(self.guards).interrupt(rng.choice((Interrupt, Alarm)))
            elif roll < 0.7:
                sys.setswitchinterval(rng.choice((1e-6, 1e-5, 1e-4, 1e-3, 5e-3)))
            elif roll < 0.73 and "collections" not in self.world.without:
                gc.set_threshold(*rng.choice(((700, 10, 10), (100, 5, 5), (10, 5, 5), (2, 2, 50))))
            elif roll < 0.76 or time.monotonic() > collected + 0.1:
                gc.collect()
                collected = time.monotonic()


class Round:
    """Everything of one round in one process."""

    def __init__(self, plan: dict[str, Any], storage: Any, process: int) -> None:
        self.plan, self.storage, self.process = plan, storage, process
        rng = Random(f"{plan['seed']} {process}")
        broken: list[str] = []
        short = rng.choice((0.0, 0.001, 0.01, 0.05))
        self.world = World(
            ledger=Ledger(plan["keys"], process),
            managers={
                "eager": SessionManager(storage=storage, lock_timeout=PATIENCE),
                "lazy": SessionManager(storage=storage, lock_timeout=PATIENCE, lazy=True),
                "keep": SessionManager(storage=storage, lock_timeout=PATIENCE, on_error="flush"),
                "short": SessionManager(storage=storage, lock_timeout=short),
            },
            pool=Pool(3, broken),
            shared=plan["shared"],
            without=frozenset(plan["without"]),
            broken=broken,
        )
        self.world.ledger.diagnose = lambda: locks_and_stacks(self.world.managers["eager"])
        self._draw(rng)

    def _draw(self, rng: Random) -> None:
        """Who takes part; often few, so that more goes on in each of them."""

        def some(kind: Callable[..., Any], most: int, name: str) -> list[Any]:
            number = rng.randint(0, most)
            if name.split()[0] in self.world.without:
                number = 0
            return [kind(self.world, Random(rng.random()), f"{name} {n}") for n in range(number)]

        self.threads = some(ThreadWorker, 4, "thread")
        self.loops = some(LoopWorker, 2, "loop")
        self.doomed = some(DoomedLoops, 1, "doomed")
        self.bots = some(BotWorker, 1, "bot")
        self.main = MainWorker(self.world, Random(rng.random()))
        guards = [worker.guard for worker in (*self.threads, *self.doomed)]
        self.chaos = Chaos(self.world, Random(rng.random()), guards)

    @property
    def _workers(self) -> list[Any]:
        return [*self.threads, *self.loops, *self.doomed, *self.bots]

    def slots(self) -> Iterator[Slot]:
        """What is looked after by the watchdog."""
        for worker in self._workers:
            yield from worker.slots if isinstance(worker, LoopWorker) else [worker.slot]
        yield from self.world.pool.slots
        yield self.main.slot

    def set_up(self) -> None:
        for key in self.world.ledger.keys:
            with self.world.managers["eager"].session_scope(key) as session:
                session.update({"a": 0, "box": {"m": 0}, "n": 0, "coins": COINS})
                session.update({"c": 0, "d": 0, "s": 0})

    def run(self) -> None:
        """Until all workers have ended."""
        for slot in self.slots():
            slot.beat("starts")
        for worker in (*self._workers, self.chaos):
            worker.start()
        self.main.run(self.plan["seconds"])
        self.world.stopped = True
        self.chaos.join()
        sys.setswitchinterval(0.005)
        for worker in self._workers:
            while worker.is_alive():  # it may wait for what was thrown away
                gc.collect()
                worker.join(0.1)
        self.world.pool.end()
        for thread in self.world.pool.threads:
            thread.join()
        gc.set_threshold(700, 10, 10)
        for _ in range(3):
            gc.collect()

    def counts(self) -> Counter[str]:
        found = Counter(self.world.ledger.kinds())
        found["interrupts by signal"] = self.main.sent
        found["interrupts by thread"] = self.chaos.sent
        found["sessions in signal handlers"] = self.main.used
        found["loops thrown away"] = sum(each.number for each in self.doomed)
        return found

    def judge(self, failures: Failures, counts: Counter[str]) -> None:
        """What can be said of this process alone."""
        self.world.ledger.judge_errors(failures, counts, self.plan["shared"])
        for text in self.world.broken:
            failures.add("unexpected", text)
        if (size := _soon_empty(self.world.managers["eager"])) != 0:
            seen = locks_and_stacks(self.world.managers["eager"])
            failures.add("locked", f"{size} keys are left in the lock table\n{seen}")

    def check(self, others: list[dict[str, Any]], failures: Failures) -> None:
        """Whether all keys can be had, and hold what they must."""
        manager = SessionManager(storage=self.storage, lock_timeout=OPENS)
        stored = {}
        locked = False
        for key in self.world.ledger.keys:
            for way in (_open_in_thread, _open_in_task):
                fields = _elsewhere(lambda way=way, key=key: way(manager, key))
                if isinstance(fields, str):
                    failures.add("locked", f"{key}, by {way.__name__}: {fields}")
                    locked = True
                    break
                stored[key] = fields
        if locked:
            return
        ledger = self.world.ledger
        bits: list[Bits] = [ledger.bits(), *(other["bits"] for other in others)]
        story = ledger.story()
        for other in others:
            story += map(tuple, other["story"])
        compare(stored, bits, failures, story)
        pairs = ledger.open_pairs()
        for other in others:
            pairs += other["pairs"]
        compare_pairs(stored, pairs, failures)
        if failures:
            failures.details += self.world.open_before
        gc.collect()
        if (size := _soon_empty(manager)) != 0:
            failures.add("locked", f"{size} keys are left in the lock table after all were opened")


def _snapshot(session: Any) -> dict[str, int]:
    fields = {name: session[name] for name in (*FIELDS, "n", "coins")}
    return {**fields, "m": session["box"]["m"]}


def _open_in_thread(manager: SessionManager[Any], key: str) -> dict[str, int]:
    with manager.session_scope(key) as session:
        return _snapshot(session)


def _open_in_task(manager: SessionManager[Any], key: str) -> dict[str, int]:
    async def opened() -> dict[str, int]:
        async with manager.session_scope(key) as session:
            return _snapshot(session)

    return asyncio.run(asyncio.wait_for(opened(), OPENS + 5))


def _elsewhere(what: Callable[[], Any]) -> Any:
    """What comes of it in a fresh thread; a text, if that is an error or nothing."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(what())
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(OPENS + 10)
    return found[0] if found else "it hangs"
