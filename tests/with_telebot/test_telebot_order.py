"""TeleBot: updates of one user come one after the other; and bots that poll."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import telebot_tools
from telebot_tools import KEY, Bots, Exceptions, drain, feed, stored

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
from conftest import Threads, callback_query, message, stop_telebot  # noqa: E402
from interruptions import OutsideError, everywhere, raise_outside, raises_in_flows  # noqa: E402
from telebot import apihelper  # noqa: E402
from waiting import until  # noqa: E402

import session_sync.telebot  # noqa: E402
from session_sync import (  # noqa: E402
    MemoryStorage,
    SessionLockTimeoutError,
    SessionManager,
    StorageKey,
    by_chat,
)
from session_sync.lifecycle import entry, transaction, update  # noqa: E402
from session_sync.testing import OfflineBotAPI  # noqa: E402

make_bot = pytest.fixture(telebot_tools.bot_maker)
threaded = pytest.fixture(params=[False, True], ids=["inline", "threaded"])(
    telebot_tools.make_threaded
)
sessions = pytest.fixture(telebot_tools.make_sessions)


# -- order and turns


def test_updates_of_one_user_run_in_the_order_they_came(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions, threaded=True, num_threads=8)

    def note(update: Any) -> None:
        update.session.setdefault("trail", []).append(getattr(update, "text", None) or update.data)

    bot.register_message_handler(note, func=lambda m: True)
    bot.register_callback_query_handler(note, func=lambda q: True)
    updates, expected = [], []
    for number in range(200):
        expected.append(str(number))
        updates.append(message(1, str(number)) if number % 3 else callback_query(1, str(number)))
    feed(bot, *updates)
    drain(sessions)
    assert stored(sessions)["trail"] == expected


class Slow:
    """A handler that goes on only when the test lets it."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.finished: list[int] = []
        self._go = threading.Semaphore(0)
        self._changed = threading.Condition()

    def __call__(self, m: Any) -> None:
        with self._changed:
            self.started.append(m.from_user.id)
            self._changed.notify_all()
        assert self._go.acquire(timeout=20)
        with self._changed:
            self.finished.append(m.from_user.id)
            self._changed.notify_all()

    def let(self, number: int) -> None:
        self._go.release(number)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=20), (self.started, self.finished)


def test_a_flood_of_one_user_does_not_hold_up_another(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot, slow = make_bot(sessions, threaded=True, num_threads=2), Slow()
    bot.register_message_handler(slow, func=lambda m: True)
    feed(bot, *(message(1) for _ in range(50)), message(2))
    slow.wait(lambda: len(slow.started) == 2)
    assert sorted(slow.started) == [1, 2]  # the second worker is free for the other user
    slow.let(51)
    slow.wait(lambda: len(slow.finished) == 51)


def test_two_floods_leave_a_third_user_to_wait_for_one_update(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot, slow = make_bot(sessions, threaded=True, num_threads=2), Slow()
    bot.register_message_handler(slow, func=lambda m: True)
    feed(bot, *(message(1 + n % 2) for n in range(100)), message(3))
    slow.wait(lambda: len(slow.started) == 2)
    slow.let(1)
    slow.wait(lambda: len(slow.started) == 3)
    assert slow.started[2] == 3
    slow.let(100)
    slow.wait(lambda: len(slow.finished) == 101)


def test_a_cron_job_that_holds_a_key_parks_no_worker(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot, slow = make_bot(sessions, threaded=True, num_threads=1), Slow()
    bot.register_message_handler(slow, func=lambda m: True)
    with sessions.session_scope(StorageKey(user=1, chat=1)):
        feed(bot, message(1), message(1), message(2))
        slow.wait(lambda: slow.started == [2])
        slow.let(3)
        slow.wait(lambda: slow.finished == [2])
    slow.wait(lambda: slow.finished == [2, 1, 1])


@pytest.mark.parametrize("lazy_first", [True, False])
def test_a_lazy_session_and_an_eager_chat_session_may_be_one(
    threads: Threads, lazy_first: bool
) -> None:
    storage = MemoryStorage()
    lazy, eager = (
        SessionManager(
            storage=storage, lazy=is_lazy, get_storage_key=lambda _update: "one", lock_timeout=5
        )
        for is_lazy in (True, False)
    )
    first, second = (lazy, eager) if lazy_first else (eager, lazy)
    bot = telebot.TeleBot("1:token", threaded=True, num_threads=1)
    session_sync.telebot.install(bot, first, chat_session=second)
    exceptions = Exceptions()
    bot.exception_handler = exceptions

    @bot.message_handler(func=lambda m: True)
    def handle(m: Any) -> None:
        m.session.count = m.session.get("count", 0) + 1
        m.chat_session.count += 1

    feed(bot, message(1), message(1), message(2))
    until(lambda: exceptions.got or (storage.get("one") or {}).get("count") == 6)
    until(lambda: len(eager.locks) == 0)
    stop_telebot(bot)
    assert exceptions.got == []


def test_a_handler_may_open_the_session_of_a_user_whose_update_waits_for_its_worker(
    make_bot: Bots,
) -> None:
    """With one worker, the other user's update cannot begin before this handler has ended."""
    sessions: SessionManager[Any] = SessionManager(lock_timeout=20)
    bot = make_bot(sessions, threaded=True, num_threads=1)
    both_are_queued = threading.Event()

    @bot.message_handler(func=lambda m: True)
    def handle(m: Any) -> None:
        assert both_are_queued.wait(20)
        other = 3 - m.from_user.id
        with sessions.session_scope(StorageKey(user=other, chat=other)) as session:
            session.visits = session.get("visits", 0) + 1

    feed(bot, message(1), message(2))
    both_are_queued.set()
    drain(sessions, KEY, "user:2:chat:2")
    assert stored(sessions) == stored(sessions, "user:2:chat:2") == {"visits": 1}


def test_an_update_waits_its_turn_for_longer_than_the_lock_timeout(
    make_bot: Bots, threads: Threads, threaded: bool
) -> None:
    sessions: SessionManager[Any] = SessionManager(lock_timeout=0)
    bot = make_bot(sessions, threaded=threaded)
    bot.register_message_handler(lambda m: m.session.update(done=1), func=lambda m: True)
    holds, let_go = threading.Event(), threading.Event()

    def cron_job() -> None:
        with sessions.session_scope(KEY) as session:
            session.cron = 1
            holds.set()
            assert let_go.wait(20)

    threads.start(cron_job)
    assert holds.wait(20)
    threads.start(feed, bot, message(1))
    with pytest.raises(SessionLockTimeoutError):
        sessions.session_scope(KEY).__enter__()
    let_go.set()
    threads.join()
    drain(SessionManager(storage=sessions.storage))
    assert stored(sessions) == {"cron": 1, "done": 1}


def test_a_stopped_bot_leaves_nothing_in_the_way_of_the_next_one(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot, slow = make_bot(sessions, threaded=True, num_threads=1), Slow()
    bot.register_message_handler(slow, func=lambda m: True)
    feed(bot, message(1), message(1), message(2))
    slow.wait(lambda: slow.started == [1])
    slow.let(1)
    bot.stop_bot()
    assert len(sessions.locks) == 0
    bot = make_bot(sessions)
    bot.register_message_handler(lambda m: m.session.update(again=1), func=lambda m: True)
    feed(bot, message(1), message(2))
    assert stored(sessions) == stored(sessions, "user:2:chat:2") == {"again": 1}


def test_lazy_sessions_take_no_lock_until_they_are_touched(make_bot: Bots) -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    bot = make_bot(sessions, threaded=True)
    ran, counted = threading.Semaphore(0), threading.Semaphore(0)

    @bot.message_handler(commands=["count"])
    def count(m: Any) -> None:
        m.session.counter = m.session.get("counter", 0) + 1
        counted.release()

    @bot.message_handler(func=lambda m: True)
    def other(m: Any) -> None:
        ran.release()

    with sessions.session_scope(KEY) as session:
        session["held"] = True
        feed(bot, message(1, "no session needed"))
        assert ran.acquire(timeout=10)
    for _ in range(20):
        feed(bot, message(1, "/count"))
    for _ in range(20):
        assert counted.acquire(timeout=10)
    drain(sessions)
    assert stored(sessions) == {"held": True, "counter": 20}


# -- with telebot's HTTP client


def test_a_second_ctrl_c_while_the_bot_stops_locks_no_key(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    """The key of an update that waits for a worker."""

    def interrupt() -> None:
        for worker in bot.worker_pool.workers:
            worker.stop()  # and while they are waited for:
        raise KeyboardInterrupt

    inside, go_on = threading.Event(), threading.Event()
    bot = make_bot(None, threaded=True, num_threads=1)
    close = bot.worker_pool.close
    bot.worker_pool.close = interrupt
    session_sync.telebot.install(bot, sessions)

    @bot.message_handler(func=lambda message: True)
    def handle(message: Any) -> None:
        inside.set()
        assert go_on.wait(10)

    feed(bot, message(1))
    assert inside.wait(10)
    feed(bot, message(2))
    assert sessions.locks.is_locked("user:2:chat:2")
    with pytest.raises(KeyboardInterrupt):
        bot.worker_pool.close()
    go_on.set()
    until(lambda: len(sessions.locks) == 0)
    bot.worker_pool.close = close


@pytest.mark.parametrize("has_chat_session", [False, True])
@raises_in_flows
def test_an_update_is_stored_wherever_the_one_before_it_was_interrupted(
    make_bot: Bots, has_chat_session: bool
) -> None:
    """What knows the sessions of a message keeps no scope that was cut off before its end."""
    for interruption in everywhere(raise_outside, entry, transaction, update):
        sessions: SessionManager[Any] = SessionManager()
        chats: SessionManager[Any] = SessionManager(get_storage_key=by_chat)
        bot = make_bot(None)
        session_sync.telebot.install(
            bot, sessions, chat_session=chats if has_chat_session else None
        )

        @bot.message_handler(func=lambda message: True)
        def handle(message: Any) -> None:
            message.session[message.text] = 1

        with contextlib.suppress(OutsideError), interruption:
            feed(bot, message(text="first"))
        feed(bot, message(text="second"))
        assert stored(sessions)["second"] == 1


def polling(bot: Any) -> None:
    bot.infinity_polling(timeout=1, long_polling_timeout=1, logger_level=None)


@pytest.mark.parametrize("workers", [0, 8])
def test_a_polling_bot_keeps_every_update(
    api: OfflineBotAPI,
    make_bot: Bots,
    sessions: SessionManager[Any],
    threads: Threads,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(apihelper, "API_URL", api.telebot_url)
    bot = make_bot(sessions, threaded=bool(workers), num_threads=workers or 1)
    bot.token = api.token
    users = [api.user(number) for number in range(1, 6)]

    @bot.message_handler(commands=["count"])
    def count(m: Any) -> None:
        m.session.counter = m.session.get("counter", 0) + 1
        bot.send_message(m.chat.id, str(m.session.counter))

    threads.start(polling, bot)
    for _ in range(20):
        for user in users:
            user.send("/count")
    for user in users:
        assert [user.reply().text for _ in range(20)] == [str(n) for n in range(1, 21)]
    stop_telebot(bot)
    threads.join()
