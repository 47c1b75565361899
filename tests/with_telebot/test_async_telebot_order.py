"""AsyncTeleBot: updates of one user come one after the other; and bots that poll."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import async_telebot_tools
import pytest
from async_telebot_tools import (
    KEY,
    Exceptions,
    Middleware,
    count,
    feed,
    keyless_if_bad,
    locks,
    make_bot,
    note,
    register_for_all,
    run,
    stored,
    twice,
    updates,
)

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("aiohttp", reason="needs aiohttp")
from conftest import Threads, callback_query, message, poll  # noqa: E402
from telebot import asyncio_helper  # noqa: E402

import session_sync.telebot  # noqa: E402
from session_sync import (  # noqa: E402
    DiskStorage,
    MemoryStorage,
    SessionAwaitError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.testing import OfflineBotAPI  # noqa: E402

# An old telebot gives a new aiohttp what that one deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:ssl_context is deprecated:DeprecationWarning")
sessions = pytest.fixture(async_telebot_tools.make_sessions)


def mixed(texts: range, user: int = 1) -> list[dict[str, Any]]:
    """Messages and button presses."""
    return [
        message(user, str(number)) if number % 3 else callback_query(user, str(number))
        for number in texts
    ]


# -- order and turns


@pytest.fixture(params=["memory", "disk"])
def any_sessions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SessionManager[Any]]:
    if request.param == "disk":
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
    storage = DiskStorage(tmp_path / "sessions") if request.param == "disk" else MemoryStorage()
    with SessionManager(storage=storage) as some:
        yield some


def test_nothing_is_lost_and_each_users_order_is_kept(any_sessions: SessionManager[Any]) -> None:
    bot = make_bot(any_sessions)
    number = 100 if isinstance(any_sessions.storage, MemoryStorage) else 20
    ends: list[int] = []

    @bot.message_handler(func=lambda m: True)
    async def both(m: Any) -> None:
        await count(m)
        await note(m)
        ends.append(m.from_user.id)

    bot.register_callback_query_handler(both, func=lambda q: True)
    by_user = [mixed(range(number), user) for user in range(1, 11)]
    feed(bot, *(update for row in zip(*by_user, strict=True) for update in row))
    expected = {"counter": number, "trail": twice(range(number))}
    for user in range(1, 11):
        assert stored(any_sessions, f"user:{user}:chat:{user}") == expected
    assert len(set(ends[:20])) > 1  # the users took turns


def test_a_button_press_does_not_overtake_the_message_before_it(
    sessions: SessionManager[Any],
) -> None:
    bot = make_bot(sessions)
    register_for_all(bot, note)
    feed(bot, callback_query(1, "0"), message(1, "1"), callback_query(1, "2"))
    assert stored(sessions) == {"trail": twice(range(3))}


def test_batches_that_overlap_keep_the_order_in_which_they_came(
    any_sessions: SessionManager[Any],
) -> None:
    """As polling hands them on: a task for each batch. A batch of one is no faster than others."""
    bot = make_bot(any_sessions)
    register_for_all(bot, note)

    async def main() -> None:
        bounds = [0, 3, 4, 5, 9, 10, 16, 17, 30]
        batches = [mixed(range(a, b)) for a, b in itertools.pairwise(bounds)]
        async with asyncio.TaskGroup() as tasks:
            for number, batch in enumerate(batches):
                tasks.create_task(bot.process_new_updates(updates(*batch)))
                if number % 2:
                    await asyncio.sleep(0)

    run(main())
    assert stored(any_sessions) == {"trail": twice(range(30))}


def test_the_users_of_one_batch_are_served_side_by_side(any_sessions: SessionManager[Any]) -> None:
    """The message waits for the button press that stands behind it in the batch."""
    bot = make_bot(any_sessions)
    pressed = asyncio.Event()

    @bot.message_handler(func=lambda m: True)
    async def wait(m: Any) -> None:
        await pressed.wait()
        m.session.done = True

    @bot.callback_query_handler(func=lambda q: True)
    async def press(q: Any) -> None:
        pressed.set()

    feed(bot, message(1), message(1), message(2), callback_query(3))
    assert stored(any_sessions) == stored(any_sessions, "user:2:chat:2") == {"done": True}


class OffTheLoop:
    """A storage that refuses to be called by an event loop's thread."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def _check(self) -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()

    def get(self, key: str) -> Any:
        self._check()
        return self._values.get(key)

    def set(self, key: str, value: Any) -> None:
        self._check()
        self._values[key] = value

    def delete(self, key: str) -> None:
        self._check()
        del self._values[key]

    def has(self, key: str) -> bool:
        return key in self._values


@pytest.mark.parametrize("lazy", [False, True])
def test_a_storage_that_blocks_is_never_called_on_the_event_loop(lazy: bool) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=OffTheLoop(), lazy=lazy)
    bot = make_bot(sessions)
    bot.setup_middleware(Middleware(after=lambda m, _: m.session.update(after=True)))

    @bot.message_handler(commands=["empty"])
    async def empty(m: Any) -> None:
        await m.session
        m.session = None

    @bot.message_handler(func=lambda m: True)
    async def handle(m: Any) -> None:
        session = await m.session
        session.counter = session.get("counter", 0) + 1
        await session.aflush()

    feed(bot, message(1), message(1))
    assert stored(sessions) == {"counter": 2, "after": True}
    feed(bot, message(1, "/empty"))
    assert stored(sessions) == {"after": True}


def test_a_flood_that_waits_for_a_cron_job_holds_no_thread() -> None:
    """Other users, whose storage blocks, find a thread all the same."""
    sessions: SessionManager[Any] = SessionManager(storage=OffTheLoop())
    bot = make_bot(sessions)
    register_for_all(bot, count)

    outside = contextvars.copy_context()  # what begins inside of a scope would join it

    async def main() -> None:
        create_task = asyncio.get_running_loop().create_task
        flood = bot.process_new_updates(updates(*(message(1) for _ in range(100))))
        others = bot.process_new_updates(updates(message(2), message(3)))
        async with sessions.session_scope(KEY) as session:
            task = create_task(flood, context=outside.copy())
            await create_task(others, context=outside.copy())
            assert not task.done()
            session.counter = 1000
        await task

    run(main())
    assert stored(sessions) == {"counter": 1100}
    assert stored(sessions, "user:2:chat:2") == stored(sessions, "user:3:chat:3") == {"counter": 1}


def test_an_update_waits_its_turn_for_longer_than_the_lock_timeout(threads: Threads) -> None:
    sessions: SessionManager[Any] = SessionManager(lock_timeout=0)
    bot = make_bot(sessions)
    register_for_all(bot, count)
    holds, let_go = threading.Event(), threading.Event()

    def cron_job() -> None:
        with sessions.session_scope(KEY) as session:
            session.counter = 1000
            holds.set()
            assert let_go.wait(20)

    async def main() -> None:
        task = asyncio.create_task(bot.process_new_updates(updates(message(1), message(1))))
        await bot.process_new_updates(updates(message(2)))  # so that the others wait by now
        with pytest.raises(SessionLockTimeoutError):
            async with sessions.session_scope(KEY):
                pass
        assert not task.done()
        let_go.set()
        await task

    threads.start(cron_job)
    assert holds.wait(20)
    run(main())
    threads.join()
    assert stored(sessions) == {"counter": 1002}


@pytest.mark.parametrize("begun", [False, True], ids=["before its first step", "midway"])
def test_a_cancelled_task_frees_its_key(any_sessions: SessionManager[Any], begun: bool) -> None:
    bot = make_bot(any_sessions)
    started = asyncio.Semaphore(0)

    @bot.callback_query_handler(func=lambda q: True)
    async def hang(q: Any) -> None:
        q.session.lost = True
        started.release()
        await asyncio.Event().wait()

    bot.register_message_handler(count, func=lambda m: True)

    async def main() -> None:
        batch = updates(callback_query(1), message(1), message(1), callback_query(2))
        task = asyncio.create_task(bot.process_new_updates(batch))
        if begun:
            await started.acquire()
            await started.acquire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(locks(any_sessions)) == 0
        await bot.process_new_updates(updates(message(1), message(2)))

    run(main())
    assert stored(any_sessions) == stored(any_sessions, "user:2:chat:2") == {"counter": 1}


def test_a_cancelled_waiter_disturbs_nobody(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)
    register_for_all(bot, note)
    go, started = asyncio.Event(), asyncio.Event()

    @bot.edited_message_handler(func=lambda m: True)
    async def hold(m: Any) -> None:
        started.set()
        await go.wait()

    async def main() -> None:
        edited = message(1)
        edited["edited_message"] = edited.pop("message")
        async with asyncio.TaskGroup() as group:
            batches = [[edited], mixed(range(2)), [message(1, "9")], mixed(range(2, 4))]
            tasks = [
                group.create_task(bot.process_new_updates(updates(*batch))) for batch in batches
            ]
            await started.wait()
            await bot.process_new_updates(updates(message(2, "0")))  # so that all of them wait
            tasks[2].cancel()
            go.set()

    run(main())
    assert stored(sessions) == {"trail": twice(range(4))}
    assert len(locks(sessions)) == 0


def test_lazy_sessions_take_no_lock_until_they_are_awaited() -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    bot = make_bot(sessions)
    ran: list[str] = []

    @bot.message_handler(commands=["count"])
    async def counting(m: Any) -> None:
        with pytest.raises(SessionAwaitError, match="await"):
            _ = m.session.counter
        session = await m.session
        counter = session.get("counter", 0)
        await asyncio.sleep(0)
        m.session.counter = counter + 1

    @bot.message_handler(func=lambda m: True)
    async def other(m: Any) -> None:
        ran.append(m.text)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            batch = updates(*(message(1, "/count") for _ in range(20)), message(1, "hi"))
            tasks.create_task(bot.process_new_updates(batch))
            async with sessions.session_scope(KEY) as held:
                (await held).update(held=True)
                while not ran:
                    await asyncio.sleep(0)
                assert len(locks(sessions)) == 1

    run(main())
    assert stored(sessions) == {"held": True, "counter": 20}


def test_a_handler_without_a_key_does_not_queue_behind_updates_that_have_not_begun(
    sessions: SessionManager[Any],
) -> None:
    """Those of a TeleBot on the same sessions, whose only worker waits for this very handler."""
    ends, begins = threading.Event(), threading.Event()
    pool_bot = telebot.TeleBot("1:token", threaded=True, num_threads=1)
    session_sync.telebot.install(pool_bot, sessions)

    @pool_bot.message_handler(commands=["wait"])
    def wait(m: Any) -> None:
        begins.set()
        assert ends.wait(20)

    bot = make_bot(sessions)

    @bot.poll_handler(func=lambda p: True)
    async def on_poll(p: Any) -> None:
        async with sessions.session_scope(KEY) as session:
            session.polled = True
        ends.set()

    try:
        pool_bot.process_new_updates(updates(message(2, "/wait")))
        assert begins.wait(20)
        pool_bot.process_new_updates(updates(message(1)))  # waits for the worker, not for its key
        feed(bot, poll())
    finally:
        ends.set()
        pool_bot.stop_bot()
    assert stored(sessions) == {"polled": True}


# -- with telebot's HTTP client


@pytest.fixture
def poll_offline(
    api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any, Coroutine[Any, Any, None]], None]:
    """Runs a coroutine while the bot polls the local Bot API."""
    monkeypatch.setattr(asyncio_helper, "API_URL", api.telebot_url)

    def poll_while(bot: Any, main: Coroutine[Any, Any, None]) -> None:
        bot.token = api.token

        async def both() -> None:
            polling = asyncio.create_task(
                bot.infinity_polling(timeout=1, request_timeout=20, logger_level=None)
            )
            try:
                await main
            finally:
                assert not polling.done()
                bot._polling = False  # telebot's own way to stop is Ctrl-C
                await polling

        run(both())

    return poll_while


def test_a_polling_bot_keeps_every_update(
    api: OfflineBotAPI, any_sessions: SessionManager[Any], poll_offline: Any
) -> None:
    bot = make_bot(any_sessions)
    users = [api.user(number) for number in range(1, 6)]

    @bot.message_handler(commands=["count"])
    async def counting(m: Any) -> None:
        counter = m.session.get("counter", 0) + 1
        await bot.send_message(m.chat.id, str(counter))
        m.session.counter = counter

    async def main() -> None:
        for _ in range(20):
            for user in users:
                user.send("/count")
        for user in users:
            texts = [(await user.areply()).text for _ in range(20)]
            assert texts == [str(number) for number in range(1, 21)]

    poll_offline(bot, main())


@pytest.mark.parametrize("answer", [True, False])
def test_polling_goes_on_after_a_key_function_that_raises(
    api: OfflineBotAPI, poll_offline: Any, answer: bool
) -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=keyless_if_bad)
    exceptions = Exceptions(answer=answer)
    bot = make_bot(sessions, exception_handler=exceptions)
    user = api.user(1)
    reported: list[str] = []

    @bot.message_handler(func=lambda m: True)
    async def echo(m: Any) -> None:
        await count(m)
        await bot.send_message(m.chat.id, f"{m.text} {m.session.counter}")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.append(str(context["exception"]))
        )
        for text in ("bad", "a", "bad", "b"):
            user.send(text)
        assert [(await user.areply()).text for _ in "ab"] == ["a 1", "b 2"]
        user.send("c")
        assert (await user.areply()).text == "c 3"

    poll_offline(bot, main())
    assert [type(error) for error in exceptions.got] == [LookupError, LookupError]
    assert bool(reported) is not answer
