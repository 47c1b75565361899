"""The scenes: who does what with a session at the same time.

A scene is a function that gives a `World` its actors. Actors that are made first start first.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import inside
from model import World
from stores import OwnStorage

from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    SessionClosedError,
    SessionDeadlockError,
    SessionLockTimeoutError,
    SQLiteStorage,
)
from session_sync.storages.base import AtomicStorage

STORES: dict[str, Callable[[], Any]] = {
    "memory": MemoryStorage,
    "lru": LruMemoryStorage,
    "dict": OwnStorage,
    "sqlite": lambda: SQLiteStorage(tempfile.mkdtemp() + "/s.db"),
}


@dataclass(frozen=True)
class Scene:
    """A scene, and what is worth to be done to it."""

    name: str
    build: Callable[[World], None]
    victims: tuple[str, ...]  # in the bounded run; in the long one, those of `others` as well
    others: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()  # the victims of the mode "cancel"
    modes: tuple[str, ...] = ("stop", "raise")  # in the bounded run
    more: tuple[str, ...] = ()  # modes of the long run alone
    stores: tuple[str, ...] = ("memory",)  # the same
    allowed: tuple[type[BaseException], ...] = ()  # what an actor may raise
    options: dict[str, Any] = field(default_factory=dict)  # of the manager
    counts: Callable[[Any], bool] = inside.is_core  # where an actor can be stopped


SCENES: dict[str, Scene] = {}
EVERY = ("memory", "dict", "lru", "sqlite")
LINES = ("stop", "raise", "collect", "signal")


def scene(victims: str, **rest: Any) -> Callable[[Callable[[World], None]], Callable[..., None]]:
    """Enter a function into `SCENES`."""

    def enter(build: Callable[[World], None]) -> Callable[[World], None]:
        for name in ("others", "tasks", "modes", "more", "stores"):
            if isinstance(rest.get(name), str):
                rest[name] = tuple(rest[name].split())
        SCENES[build.__name__] = Scene(build.__name__, build, tuple(victims.split()), **rest)
        return build

    return enter


# -- one key, blocks that know nothing of each other


@scene("a", modes=LINES, stores=EVERY)
def uncontended(w: World) -> None:
    w.thread("a", lambda: w.add("k"))


@scene("a", modes=("stop", "raise", "signal"), stores=("dict", "memory", "sqlite"))
def uncontended_task(w: World) -> None:
    w.loop("a", task=lambda: w.aadd("k"))


@scene("a b", modes=LINES, stores=EVERY)
def two_blocks(w: World) -> None:
    w.thread("a", lambda: w.add("k", lambda s: w.pause()))
    w.thread("b", lambda: w.add("k"))


@scene("first", others="holder second", stores=EVERY)
def three_in_order(w: World) -> None:
    """Whoever is seen waiting when another one comes gets the key first."""
    came: list[str] = []
    w.thread("holder", lambda: w.add("k", lambda s: w.pause()))

    def second() -> None:
        w.pause(until=lambda: w.is_past("first"))
        queued = not came and inside.waiters(w.sessions, "k") > 0
        w.add("k", lambda s: came.append("second"))
        if queued and came[0] == "second" and not w.trap.raises:
            w.problems.append("the second one to ask for the key got it first")

    w.thread("second", second)
    w.thread("first", lambda: w.add("k", lambda s: came.append("first")))


@scene(
    "waiter",
    others="holder next",
    stores=EVERY,
    allowed=(SessionLockTimeoutError,),
    options={"lock_timeout": 0.02},
)
def time_out(w: World) -> None:
    """A waiter gives up while the key is given on."""

    def holder() -> None:
        w.add("k", lambda s: w.pause(until=lambda: w.is_past("waiter")))

    w.thread("holder", holder)
    w.thread("waiter", lambda: w.add("k"))
    w.thread("next", lambda: w.add("k"))


@scene(
    "waiter",
    stores=("memory", "dict"),
    modes=("stop", "raise"),
    allowed=(SessionLockTimeoutError,),
    options={"lock_timeout": 0.02},
)
def time_out_of_a_task(w: World) -> None:
    def holder() -> None:
        w.add("k", lambda s: w.pause(until=lambda: w.is_past("waiter")))

    w.thread("holder", holder)
    w.loop("waiter", task=lambda: w.aadd("k"))


# -- coroutines


@scene("loop", tasks="one two", modes=("stop", "raise", "cancel"), stores=("memory", "dict"))
def two_tasks(w: World) -> None:
    w.loop(
        "loop",
        one=lambda: w.aadd("k", lambda s: w.apause()),
        two=lambda: w.aadd("k"),
    )


@scene(
    "loop thread",
    tasks="task",
    modes=("stop", "raise", "cancel", "signal"),
    stores=("memory", "dict", "sqlite"),
)
def thread_and_task(w: World) -> None:
    w.thread("thread", lambda: w.add("k", lambda s: w.pause()))
    w.loop("loop", task=lambda: w.aadd("k"))


@scene("loop thread", stores=("memory", "dict"), tasks="task", modes=("stop", "cancel"))
def task_then_thread(w: World) -> None:
    w.loop("loop", task=lambda: w.aadd("k", lambda s: w.apause()))
    w.thread("thread", lambda: w.add("k"))


@scene("loop holder", stores=("memory", "dict"), modes=("stop",), allowed=(asyncio.CancelledError,))
def cancelled_waiter(w: World) -> None:
    """A waiting task is cancelled while the key is given on."""
    w.thread("holder", lambda: w.add("k", lambda s: w.pause()))

    async def canceller() -> None:
        await w.apause()
        if cancel := w.shared.get("task waiter"):
            cancel()

    w.loop("loop", waiter=lambda: w.aadd("k"), canceller=canceller)
    w.thread("next", lambda: w.add("k"))


# -- joining


@scene("a", modes=LINES, stores=EVERY)
def nested(w: World) -> None:
    def again(session: Any) -> None:
        w.add("k", group="inner", joins=True)
        w.add("k", group="inner", joins=True)

    w.thread("a", lambda: w.add("k", again))


def _join(w: World, name: str) -> None:
    context = w.take("context", "handler")
    if context is not None:
        context = context.copy()
        context.run(w.add, "k", lambda s: w.pause(), owner=name, group="joiners", joins=True)


@scene("handler one", others="two next", stores=EVERY)
def handler_leaves_before_joiners(w: World) -> None:
    """Threads of a handler join its scope, and leave after it."""

    def give(_session: object) -> None:
        w.give("context", contextvars.copy_context(), "one", "two")

    w.thread("handler", lambda: w.add("k", give, group="outer"))
    w.thread("one", lambda: _join(w, "one"))
    w.thread("two", lambda: _join(w, "two"))
    w.thread("next", lambda: w.add("k"))


@scene("handler one", others="two next", stores=EVERY)
def joiners_leave_before_handler(w: World) -> None:
    """The same, the other way round."""

    def body(session: Any) -> None:
        w.give("context", contextvars.copy_context(), "one", "two")
        w.pause()
        w.pause()

    w.thread("handler", lambda: w.add("k", body, group="outer"))
    w.thread("one", lambda: _join(w, "one"))
    w.thread("two", lambda: _join(w, "two"))
    w.thread("next", lambda: w.add("k"))


@scene("loop", tasks="task", modes=("stop", "raise", "cancel"), stores=("memory", "dict"))
def joiners_in_gather(w: World) -> None:
    async def join(number: int) -> None:
        await w.aadd(
            "k", lambda s: asyncio.sleep(0), owner=str(number), group="joiners", joins=True
        )

    async def body(session: Any) -> None:
        await asyncio.gather(*(join(number) for number in range(3)))

    w.loop("loop", task=lambda: w.aadd("k", body))
    w.thread("next", lambda: w.add("k"))


# -- flush, release, and the end


def _handler(w: World, after: Callable[[Any], None] = lambda s: None, group: str = "") -> None:
    """A handler that gives its session to a helper, which may not join it."""

    def body(session: Any) -> None:
        session.mark = 1
        w.give("session", session, "helper")
        after(session)

    w.thread("handler", lambda: w.add("k", body, group=group))


def _helper(w: World, work: Callable[[Any], None]) -> None:
    """What another thread does with that session."""

    def helper() -> None:
        session = w.take("session", "handler")
        if session is not None:
            with suppress(SessionClosedError):
                work(session)

    w.thread("helper", helper)


@scene("helper handler", others="next", stores=EVERY)
def flush_and_end(w: World) -> None:
    """Another thread's flush is on its way when the block ends."""
    _handler(w)
    _helper(w, lambda session: session.flush())
    w.thread("next", lambda: w.add("k"))


@scene("helper handler", others="next", stores=EVERY)
def release_and_end(w: World) -> None:
    """Another thread releases the session when the block ends."""
    _handler(w, group="released")
    _helper(w, lambda session: session.release())
    w.thread("next", lambda: w.add("k"))


@scene("helper handler", stores=EVERY)
def flush_and_flush(w: World) -> None:
    """An older flush must not overtake one that was confirmed."""

    def after(session: Any) -> None:
        session.paid = True
        session.flush()
        w.equal("right after flush()", (w.stored("k").get("paid"), True))

    _handler(w, after)
    _helper(w, lambda session: session.flush())
    w.checks.append(lambda: _paid_if_ended(w))


def _paid_if_ended(w: World) -> None:
    if w.ended["k"]:
        w.equal("what was flushed", (w.stored("k").get("paid"), True))


@scene("helper handler", others="next", stores=EVERY, allowed=(SessionClosedError,))
def flush_and_release(w: World) -> None:
    _handler(w, lambda session: session.release(), group="released")
    _helper(w, lambda session: session.flush())
    w.thread("next", lambda: w.add("k"))


@scene("helper handler", stores=EVERY, modes=("stop",), counts=inside.is_session)
def change_and_flush(w: World) -> None:
    """A change of another thread, while a flush takes the changes, belongs to the next one."""
    _handler(w, lambda session: session.flush())
    changed: list[bool] = []

    def change(session: Any) -> None:
        session.color = "red"
        changed.append(True)

    _helper(w, change)
    w.checks.append(lambda: w.equal("color", (w.stored("k").get("color"), "red")) if changed else 0)


@scene("handler helper", stores=EVERY, modes=("stop",))
def flush_while_the_block_ends(w: World) -> None:
    """What has been changed is stored when flush() returns, also if the block is just closing."""
    _handler(w)

    def flush(session: Any) -> None:
        session.flush()
        w.equal("right after flush()", (w.stored("k").get("mark"), 1))

    _helper(w, flush)


@scene("loop", tasks="task", modes=("stop", "cancel", "raise"), stores=("dict", "memory"))
def flush_in_tasks(w: World) -> None:
    """A task flushes while another one does, and while the block ends."""

    async def body(session: Any) -> None:
        flush = asyncio.create_task(session.aflush())
        await asyncio.sleep(0)
        session.paid = True
        await session.aflush()
        w.equal("right after aflush()", (w.stored("k").get("paid"), True))
        await asyncio.gather(flush, return_exceptions=True)

    w.loop("loop", task=lambda: w.aadd("k", body))
    w.thread("next", lambda: w.add("k"))


# -- lazy sessions


@scene("one", others="two handler", stores=EVERY, options={"lazy": True})
def lazy_load_by_two(w: World) -> None:
    """Two threads touch one lazy session; it is loaded once."""
    read: list[object] = []

    def touch() -> None:
        session = w.take("lazy", "handler")
        if session is not None:
            with suppress(SessionClosedError):
                read.append(session.get("n", 0))

    def handler() -> None:
        with w.sessions.session_scope("k") as session:
            w.give("lazy", session, "one", "two")

    w.keys.add("k")
    w.thread("handler", handler)
    w.thread("one", touch)
    w.thread("two", touch)

    def counted() -> range:  # a signal handler may have counted meanwhile
        return range(w.ended["k"] + w.joined["k"] + 1)

    w.checks.append(lambda: w.equal("what was read", (set(read) - {*counted()}, set())))


@scene("a b", modes=LINES, stores=EVERY, options={"lazy": True})
def lazy_blocks(w: World) -> None:
    w.thread("a", lambda: w.add("k", lambda s: w.pause()))
    w.thread("b", lambda: w.add("k"))


@scene("loop", tasks="one two", options={"lazy": True}, modes=("stop", "cancel"))
def lazy_tasks(w: World) -> None:
    w.loop("loop", one=lambda: w.aadd("k", lambda s: w.apause()), two=lambda: w.aadd("k"))


# -- several sessions


def _transfer(w: World, body: Callable[[Any, Any], None]) -> None:
    for key in "ab":
        w.sessions.storage.set(key, {"coins": 10})
        w.keys.add(key)

    def work() -> None:
        with w.sessions.session_scopes("b", "a") as (b, a):
            a.coins -= 3
            b.coins += 3
            body(a, b)

    def both() -> None:
        coins = [w.stored(key).get("coins", 0) for key in "ab"]
        lost = w.shared.get("spent", 0)
        # A store that cannot write both in one step may have written one when an interrupt came.
        is_halved = w.was_interrupted() and not isinstance(w.sessions.storage, AtomicStorage)
        if not is_halved or sum(coins) not in (17, 20, 23):
            w.equal("coins", (sum(coins), 20 - lost))

    w.thread("transfer", work)
    w.checks.append(both)


@scene("transfer a", others="b", stores=EVERY, modes=("stop", "raise", "signal"))
def transfer_and_blocks(w: World) -> None:
    _transfer(w, lambda a, b: w.pause())
    w.thread("a", lambda: w.add("a"))
    w.thread("b", lambda: w.add("b"))


@scene("transfer helper", others="next", stores=EVERY, modes=("stop",))
def transfer_and_release(w: World) -> None:
    """Both sessions are released by a thread while the block around them ends."""

    def give(a: Any, b: Any) -> None:
        w.give("both", (a, b), "helper", "next")

    def release() -> None:
        both = w.take("both", "transfer")
        if both is not None:
            for session in both:
                session.release()

    def spend() -> None:
        w.take("both", "transfer")
        with w.sessions.session_scope("a") as session:
            session.coins -= 1
            w.shared["spent"] = 1

    _transfer(w, give)
    w.thread("helper", release)
    w.thread("next", spend)


# -- circles: one of them gets an error at once


@scene("one two", stores=("memory", "dict"), allowed=(SessionDeadlockError,))
def circle(w: World) -> None:
    w.thread("one", lambda: w.add("a", lambda s: (w.pause(), w.add("b"))))
    w.thread("two", lambda: w.add("b", lambda s: (w.pause(), w.add("a"))))


@scene("owner", others="one two", stores=("memory", "dict"), allowed=(SessionDeadlockError,))
def circle_handed_on(w: World) -> None:
    """The circle closes while the first key is handed on."""
    w.thread("owner", lambda: w.add("b", lambda s: w.pause()))
    w.thread("one", lambda: w.add("b", lambda s: w.add("c")))
    w.thread("two", lambda: w.add("c", lambda s: w.add("b")))


@scene("owner loop", others="two", stores=("memory", "dict"), allowed=(SessionDeadlockError,))
def circle_with_a_task(w: World) -> None:
    """The same, handed on to a task."""
    w.thread("owner", lambda: w.add("a", lambda s: w.pause()))
    w.loop("loop", task=lambda: w.aadd("a", lambda s: w.aadd("b")))
    w.thread("two", lambda: w.add("b", lambda s: (w.pause(), w.add("a"))))


@scene("loop", stores=("memory", "dict"), allowed=(SessionDeadlockError,), modes=("stop",))
def block_on_the_loop(w: World) -> None:
    """A blocking `with` for a key that a coroutine of the same loop holds."""

    async def block() -> None:
        await w.apause()
        w.add("k", owner="block")

    w.loop("loop", one=lambda: w.aadd("k", lambda s: w.apause()), two=block)


# -- tasks that have not begun: telebot's


def _bot(w: World, users: list[int], workers: int = 1) -> Callable[[], None]:
    """A bot with a queue; what is returned lets it handle a message of each user."""
    import telebot

    import session_sync.telebot

    bot = telebot.TeleBot("1:token", threaded=True, num_threads=workers)
    session_sync.telebot.install(bot, w.sessions)
    handled = threading.Semaphore(0)

    @bot.message_handler(func=lambda message: True)
    def handle(message: Any) -> None:
        key = message.session.key
        w.add(key, group="inner", owner="worker", joins=True)
        handled.release()

    def process() -> None:
        bot.worker_pool.put(w.adopt, "worker")
        bot.process_new_updates([telebot.types.Update.de_json(_message(user)) for user in users])

    w.shared["bot"] = bot
    w.shared["handled"] = handled
    return process


def _message(user: int) -> dict[str, Any]:
    person = {"id": user, "is_bot": False, "first_name": "Alex"}
    message = {"message_id": 1, "date": 1, "text": "hi", "from": person}
    return {"update_id": 1, "message": {**message, "chat": {"id": user, "type": "private"}}}


def _stop(w: World) -> None:
    """As tests/with_both/bots.py does: the workers are woken."""
    bot = w.shared.pop("bot")

    def stop() -> None:
        w.adopt("closer")
        bot.stop_bot()

    stopping = threading.Thread(target=stop)
    stopping.start()
    while stopping.is_alive():
        bot.worker_pool.tasks.put((str, (), {}))
        stopping.join(0.001)


_USER = "user:1:chat:1"


@scene("worker block", others="polling", modes=("stop",), stores=("memory", "dict"))
def tickets_and_block(w: World) -> None:
    process = _bot(w, [1, 1])

    def polling() -> None:
        process()
        for _ in range(2):
            w.shared["handled"].acquire()
        _stop(w)
        w.equal("handled", (w.joined[_USER], 2))

    w.thread("block", lambda: w.add(_USER, lambda s: w.pause(), owner="block"))
    w.thread("polling", polling)


@scene("polling worker closer", others="block", modes=("stop",))
def tickets_and_close(w: World) -> None:
    """The bot is stopped while messages wait for a key: they are in nobody's way."""
    process = _bot(w, [1, 1])

    def closer() -> None:
        w.pause()
        _stop(w)

    def block(session: Any) -> None:
        w.pause(until=lambda: w.is_past("closer"))

    w.thread("block", lambda: w.add(_USER, block, owner="block"))
    w.thread("polling", process)
    w.thread("closer", closer)


# -- what ends early


@scene("loop", tasks="one", others="thread", modes=("cancel",), more=("stop",), stores=("dict",))
def loop_with_a_waiter(w: World) -> None:
    """A loop ends with a task that has the key and others that wait for it."""
    w.loop("loop", one=lambda: w.aadd("k", lambda s: asyncio.sleep(0)), two=lambda: w.aadd("k"))
    w.thread("thread", lambda: w.add("k"))


@scene("holder", modes=("collect",), stores=("memory", "dict"))
def thrown_away_waiter(w: World) -> None:
    """While a handler has the key, a loop is thrown away in which a task waits for it."""

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(w.aadd("k"))
        cycle: list[Any] = [waiting]
        cycle.append(cycle)
        loop.run_until_complete(asyncio.sleep(0))

    def body(session: Any) -> None:
        thread = threading.Thread(target=abandon)
        thread.start()
        thread.join()

    w.thread("holder", lambda: w.add("k", body))


@scene("waiter", others="holder forker", modes=("stop",), stores=("memory", "dict"))
def fork_while_others_wait(w: World) -> None:
    """In a child, the forking thread's own key is usable and nothing of the others is left."""

    def body(session: Any) -> None:
        w.pause(until=lambda: w.is_past("holder"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            signal.alarm(5)  # it may hang
            try:
                session.flush()
                left = inside.locks_left(w.sessions)
                w.sessions.session_scope("k").__enter__()
                os._exit(0 if left == 1 else 10 + left)
            except BaseException:
                os._exit(9)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        w.equal("the child's exit code (-14: it hung)", (status, 0))

    w.thread("holder", lambda: w.add("k", lambda s: w.pause()))
    w.thread("waiter", lambda: w.add("k"))
    w.thread("forker", lambda: w.add("own", body))


@scene("loop", modes=("no thread",), stores=("sqlite", "dict"))
def async_blocks(w: World) -> None:
    """Sessions of coroutines, in a store that needs threads for them. What could not be done is
    not done later, over what others have stored meanwhile."""

    async def many() -> None:
        for number in range(50):
            key = f"k{number % 3}"
            try:
                await w.aadd(key, lambda s: s.aflush())
            except RuntimeError:
                w.add(key)  # which needs no thread
                w.add(key)

    w.loop("loop", task=many)
