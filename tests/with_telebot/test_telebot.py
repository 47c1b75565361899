"""telebot's room: real TeleBot objects, fed with Bot API JSON or by polling a local Bot API."""

from __future__ import annotations

import contextlib
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")

from conftest import Threads, callback_query, message, poll, stop_telebot  # noqa: E402
from interruptions import OutsideError, everywhere, raise_outside, raises_in_flows  # noqa: E402
from telebot import apihelper, types  # noqa: E402
from telebot.handler_backends import (  # noqa: E402
    BaseMiddleware,
    CancelUpdate,
    ContinueHandling,
    SkipHandler,
)
from waiting import until  # noqa: E402

import session_sync.telebot  # noqa: E402
from session_sync import (  # noqa: E402
    MemoryStorage,
    SessionClosedError,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionManager,
    StorageKey,
    by_chat,
)
from session_sync.lifecycle import entry, transaction, update  # noqa: E402
from session_sync.testing import OfflineBotAPI  # noqa: E402

KEY = "user:1:chat:1"


class Exceptions:
    """An exception handler that keeps what it gets, and what was stored at that moment."""

    def __init__(self, sessions: SessionManager[Any] | None = None) -> None:
        self.got: list[Exception] = []
        self.stored: list[Any] = []
        self._sessions = sessions
        self._arrived = threading.Semaphore(0)

    def handle(self, error: Exception) -> bool:
        self.got.append(error)
        if self._sessions is not None:
            with self._sessions.session_scope(KEY) as session:
                self.stored.append(dict(session))
        self._arrived.release()
        return True

    def wait(self) -> None:
        assert self._arrived.acquire(timeout=10)


class Bots:
    """Makes bots, and stops them when the test is over."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def __call__(self, sessions: SessionManager[Any] | None, **options: Any) -> Any:
        bot = telebot.TeleBot("1:token", **{"threaded": False, **options})
        self._made.append(bot)
        if sessions is not None:
            session_sync.telebot.install(bot, sessions)
        return bot

    def stop(self) -> None:
        for bot in self._made:
            stop_telebot(bot)


@pytest.fixture
def make_bot() -> Iterator[Bots]:
    bots = Bots()
    yield bots
    bots.stop()


@pytest.fixture(params=[False, True], ids=["inline", "threaded"])
def threaded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def sessions() -> SessionManager[Any]:
    return SessionManager()


def feed(bot: Any, *updates: dict[str, Any]) -> None:
    bot.process_new_updates([types.Update.de_json(update) for update in updates])


def drain(sessions: SessionManager[Any], *keys: str) -> None:
    """Wait until every update of the keys has been handled: they are served in order."""
    for key in keys or (KEY,):
        while sessions.locks.is_locked(key):
            with sessions.session_scope(key):
                pass


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)


# -- message.session


def test_a_handler_has_its_users_session(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool
) -> None:
    bot = make_bot(sessions, threaded=threaded)

    @bot.message_handler(func=lambda m: True)
    def count(m: Any) -> None:
        m.session.counter = m.session.get("counter", 0) + 1

    feed(bot, message(1), message(2), message(1))
    drain(sessions, KEY, "user:2:chat:2")
    assert stored(sessions) == {"counter": 2}
    assert stored(sessions, "user:2:chat:2") == {"counter": 1}


def test_every_kind_of_handler_has_a_session(make_bot: Bots, sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)

    def seen(update: Any) -> None:
        update.session.setdefault("seen", []).append(type(update).__name__)

    bot.register_message_handler(seen, func=lambda m: True)
    bot.register_edited_message_handler(seen, func=lambda m: True)
    bot.register_callback_query_handler(seen, func=lambda q: True)
    bot.register_inline_handler(seen, func=lambda q: True)
    bot.register_pre_checkout_query_handler(seen, func=lambda q: True)
    bot.register_poll_answer_handler(seen, func=lambda a: True)
    person = {"id": 1, "is_bot": False, "first_name": "Alex"}
    edited = message(1)
    edited["edited_message"] = edited.pop("message")
    inline = {"id": "1", "from": person, "query": "q", "offset": ""}
    checkout = {
        "id": "1",
        "from": person,
        "currency": "XTR",
        "total_amount": 1,
        "invoice_payload": "tea",
    }
    answer = {"poll_id": "1", "user": person, "option_ids": [0], "option_persistent_ids": ["a"]}
    feed(
        bot,
        message(1),
        edited,
        callback_query(1),
        {"update_id": 10**6, "inline_query": inline},
        {"update_id": 10**6 + 1, "pre_checkout_query": checkout},
        {"update_id": 10**6 + 2, "poll_answer": answer},
    )
    assert stored(sessions)["seen"] == [
        "Message",
        "Message",
        "CallbackQuery",
        "InlineQuery",
        "PreCheckoutQuery",
        "PollAnswer",
    ]


def test_filters_can_ask_the_session(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool
) -> None:
    bot = make_bot(sessions, threaded=threaded)
    got: list[str] = []

    @bot.message_handler(func=lambda m: m.session.get("step") == "name")
    def name(m: Any) -> None:
        got.append(m.text)
        del m.session.step

    @bot.message_handler(commands=["start"])
    def start(m: Any) -> None:
        m.session.step = "name"

    feed(bot, message(1, "early"), message(1, "/start"), message(1, "Alex"), message(1, "late"))
    drain(sessions)
    assert got == ["Alex"]
    assert stored(sessions) is None


def test_next_step_and_reply_callbacks_have_a_session(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool
) -> None:
    bot = make_bot(sessions, threaded=threaded)

    def step(m: Any, extra: str) -> None:
        m.session["step"] = m.text + extra

    def reply(m: Any) -> None:
        m.session["reply"] = m.text

    first = message(1)
    bot.register_next_step_handler(types.Update.de_json(first).message, step, "!")
    feed(bot, message(1, "next"))
    bot.register_for_reply(types.Update.de_json(first).message, reply)
    feed(bot, message(1, "answer", reply_to_message=first["message"]))
    drain(sessions)
    assert stored(sessions) == {"step": "next!", "reply": "answer"}


def test_assigning_the_session_replaces_or_empties_it(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions)
    todo: list[Callable[[Any], None]] = []
    bot.register_message_handler(lambda m: todo.pop(0)(m), func=lambda m: True)

    def replace(m: Any) -> None:
        m.session = {"a": 1, "b": 2}

    def merge(m: Any) -> None:
        m.session |= {"b": 3}

    def out_of_itself(m: Any) -> None:
        m.session = {"c": m.session["b"]}

    def wrong(m: Any) -> None:
        with pytest.raises(TypeError, match="mapping of fields"):
            m.session = 5

    def empty(m: Any) -> None:
        m.session = None

    expected = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"c": 3}, {"c": 3}, None]
    for step, after in zip((replace, merge, out_of_itself, wrong, empty), expected, strict=True):
        todo.append(step)
        feed(bot, message(1))
        assert stored(sessions) == after


def test_what_hangs_on_a_telebot_object_shows_in_neither_str_nor_pickle(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions)
    kept: list[Any] = []

    @bot.message_handler(func=lambda m: True)
    def keep(m: Any) -> None:
        m.session.secret = "tea"
        kept.append(m)

    update = types.Update.de_json(message(1))
    before = str(update.message), set(vars(update.message))
    bot.process_new_updates([update])
    assert (str(kept[0]), set(vars(kept[0]))) == before
    assert b"secret" not in pickle.dumps(kept[0].chat)
    with pytest.raises(AttributeError, match="not the update that is being handled"):
        _ = pickle.loads(pickle.dumps(kept[0].chat)).session


def test_a_kept_message_shows_its_closed_session_and_nothing_is_left_of_a_forgotten_one(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions)
    before = set(session_sync.telebot.attribute.bound)  # of failed workers of other tests, say
    kept: list[Any] = []

    @bot.message_handler(func=lambda m: True)
    def keep(m: Any) -> None:
        m.session.counter = m.session.get("counter", 0) + 1
        m.session.cart = {"items": []}
        kept.append(m)

    feed(bot, message(1), message(1))
    assert kept[0].session.counter == 1
    assert kept[1].session.counter == 2
    for change in (
        lambda s: s.update(counter=5),
        lambda s: setattr(s, "counter", 5),
        lambda s: s.clear(),
    ):
        with pytest.raises(SessionClosedError, match=KEY):
            change(kept[0].session)
    kept.clear()
    gc.collect()
    assert set(session_sync.telebot.attribute.bound) <= before


def test_the_message_under_a_button_is_the_bots_own_and_has_no_session(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions)

    @bot.callback_query_handler(func=lambda q: True)
    def pressed(q: Any) -> None:
        q.session.pressed = True
        with pytest.raises(AttributeError, match=r"call\.session, not call\.message\.session"):
            _ = q.message.session
        assert not hasattr(q.message, "session")

    feed(bot, callback_query(1))
    assert stored(sessions) == {"pressed": True}


def test_an_update_without_a_key_is_handled_and_asking_for_its_session_raises(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions)
    ran: list[str] = []

    @bot.poll_handler(func=lambda p: True)
    def on_poll(p: Any) -> None:
        ran.append(p.question)
        with pytest.raises(SessionKeyError, match="neither a user nor a chat"):
            _ = p.session
        with pytest.raises(SessionKeyError):
            sessions.session_scope(p)

    feed(bot, poll())
    assert ran == ["?"]


def test_update_listeners_get_their_list(make_bot: Bots, sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions, threaded=True)
    got: SimpleQueue[Any] = SimpleQueue()
    bot.set_update_listener(got.put)
    feed(bot, message(1, "a"), message(2, "b"), callback_query(1), message(1, "c"))
    texts = [[m.text for m in got.get(timeout=20)] for _ in range(2)]
    assert sorted(texts) == [["a", "b"], ["c"]]


def test_an_update_leaves_nothing_for_the_garbage_collector(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions, threaded=True, num_threads=1)
    came, gone = threading.Semaphore(0), threading.Semaphore(0)

    @bot.message_handler(func=lambda m: True)
    def handle(m: Any) -> None:
        weakref.finalize(m, gone.release)
        came.release()

    gc.disable()
    try:
        feed(bot, message(1), message(2), message(1))
        for _ in range(3):
            assert came.acquire(timeout=20)
        bot.worker_pool.put(str)  # a worker forgets its last task when it gets another one
        for _ in range(3):
            assert gone.acquire(timeout=20)
    finally:
        gc.enable()


def test_without_a_pool_a_message_is_the_next_step_of_the_one_before_it(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(sessions)
    steps: list[str] = []

    @bot.message_handler(commands=["name"])
    def ask(m: Any) -> None:
        bot.register_next_step_handler(m, lambda answer: steps.append(answer.text))

    feed(bot, message(1, "/name"), message(1, "Alex"))
    assert steps == ["Alex"]


# -- errors and middlewares


def test_a_handler_that_raises_is_rolled_back_and_the_exception_handler_sees_that(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool
) -> None:
    exceptions = Exceptions(sessions)
    bot = make_bot(sessions, threaded=threaded, exception_handler=exceptions)

    @bot.message_handler(func=lambda m: True)
    def fail(m: Any) -> None:
        m.session.saved = True
        m.session.flush()
        m.session.lost = True
        raise ValueError("no")

    feed(bot, message(1))
    exceptions.wait()
    assert [type(error) for error in exceptions.got] == [ValueError]
    assert exceptions.stored == [{"saved": True}]
    drain(sessions)
    assert stored(sessions) == {"saved": True}


@pytest.mark.parametrize("on_error", ["discard", "flush"])
def test_class_middlewares_swallow_the_exception_but_not_the_roll_back(
    make_bot: Bots, threaded: bool, on_error: Any
) -> None:
    sessions: SessionManager[Any] = SessionManager(on_error=on_error)
    exceptions = Exceptions(sessions)
    bot = make_bot(
        sessions, threaded=threaded, exception_handler=exceptions, use_class_middlewares=True
    )
    seen: list[Any] = []

    class Middleware(BaseMiddleware):
        update_types = ["message"]

        def pre_process(self, m: Any, data: Any) -> None:
            m.session.before = True
            m.session.flush()

        def post_process(self, m: Any, data: Any, exception: Any) -> None:
            seen.append((dict(m.session), type(exception)))
            m.session.after = True

    bot.setup_middleware(
        Middleware(),
    )

    @bot.message_handler(func=lambda m: True)
    def fail(m: Any) -> None:
        m.session.handler = True
        raise ValueError("no")

    feed(bot, message(1))
    exceptions.wait()
    drain(sessions)
    kept = {"handler": True} if on_error == "flush" else {}
    assert exceptions.stored == [{"before": True, **kept}]
    assert seen == [({"before": True, **kept}, ValueError)]
    assert stored(sessions) == {"before": True, **kept, "after": True}


@pytest.mark.parametrize("use_class_middlewares", [False, True])
def test_a_filter_that_raises_is_rolled_back_as_a_handler_is(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool, use_class_middlewares: bool
) -> None:
    exceptions = Exceptions(sessions)
    bot = make_bot(
        sessions,
        threaded=threaded,
        exception_handler=exceptions,
        use_class_middlewares=use_class_middlewares,
    )

    def fails(m: Any) -> bool:
        m.session.filtered = True
        raise ValueError("no")

    bot.register_message_handler(lambda m: pytest.fail("ran"), func=fails)
    feed(bot, message(1))
    exceptions.wait()
    drain(sessions)
    assert stored(sessions) is None


def test_class_middlewares_share_the_session_with_the_handler(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool
) -> None:
    bot = make_bot(sessions, threaded=threaded, use_class_middlewares=True)

    class Middleware(BaseMiddleware):
        update_types = ["message"]

        def pre_process(self, m: Any, data: Any) -> None:
            m.session.trail = ["before"]
            data["extra"] = "data"

        def post_process(self, m: Any, data: Any, exception: Any) -> None:
            m.session.trail.append("after")

    bot.setup_middleware(Middleware())

    @bot.message_handler(func=lambda m: m.session.trail == ["before"])
    @sessions.with_session
    def handle(m: Any, session: Any, extra: str) -> None:
        assert session is m.session
        session.trail.append(extra)

    feed(bot, message(1))
    drain(sessions)
    assert stored(sessions) == {"trail": ["before", "data", "after"]}


@pytest.mark.parametrize("answer", [CancelUpdate(), SkipHandler(), RuntimeError("no")])
def test_a_middleware_that_stops_the_update_leaves_no_key_locked(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool, answer: Any
) -> None:
    exceptions = Exceptions()
    bot = make_bot(
        sessions, threaded=threaded, exception_handler=exceptions, use_class_middlewares=True
    )

    class Middleware(BaseMiddleware):
        update_types = ["message"]

        def pre_process(self, m: Any, data: Any) -> Any:
            m.session.counter = m.session.get("counter", 0) + 1
            if isinstance(answer, Exception):
                raise answer
            return answer

        def post_process(self, m: Any, data: Any, exception: Any) -> None: ...

    bot.setup_middleware(Middleware())
    bot.register_message_handler(lambda m: pytest.fail("skipped"), func=lambda m: True)
    feed(bot, message(1), message(1))
    drain(sessions)
    assert len(sessions.locks) == 0
    raised = isinstance(answer, Exception)
    for _ in range(2 * raised):
        exceptions.wait()
    assert stored(sessions) == (None if raised else {"counter": 2})
    assert len(exceptions.got) == (2 if raised else 0)


def test_handlers_that_continue_share_the_session(
    make_bot: Bots, sessions: SessionManager[Any], threaded: bool
) -> None:
    bot = make_bot(sessions, threaded=threaded)
    ids: list[int] = []

    @bot.message_handler(func=lambda m: True)
    def first(m: Any) -> ContinueHandling:
        m.session.first = 1
        ids.append(id(m.session))
        return ContinueHandling()

    @bot.message_handler(func=lambda m: m.session.first == 1)
    def second(m: Any) -> None:
        m.session.second = 2
        ids.append(id(m.session))

    feed(bot, message(1))
    drain(sessions)
    assert stored(sessions) == {"first": 1, "second": 2}
    assert len(set(ids)) == 1


def test_a_key_function_that_raises_fails_its_own_update_only(
    make_bot: Bots, threaded: bool
) -> None:
    def key(update: Any) -> str:
        if update.text == "bad":
            raise LookupError("no key")
        return "k"

    sessions: SessionManager[Any] = SessionManager(get_storage_key=key)
    exceptions = Exceptions()
    bot = make_bot(sessions, threaded=threaded, exception_handler=exceptions)
    bot.register_message_handler(
        lambda m: m.session.setdefault("texts", []).append(m.text), func=lambda m: True
    )
    feed(bot, message(1, "a"), message(1, "bad"), message(1, "b"))
    drain(sessions, "k")
    exceptions.wait()
    assert [type(error) for error in exceptions.got] == [LookupError]
    assert stored(sessions, "k") == {"texts": ["a", "b"]}


def test_a_store_that_fails_to_load_keeps_the_handler_from_running(
    make_bot: Bots, threaded: bool
) -> None:
    class Broken(MemoryStorage):
        def load(self, key: str) -> Any:
            raise OSError("disk on fire")

    sessions: SessionManager[Any] = SessionManager(storage=Broken())
    exceptions = Exceptions()
    bot = make_bot(sessions, threaded=threaded, exception_handler=exceptions)
    bot.register_message_handler(lambda m: pytest.fail("ran"), func=lambda m: True)
    feed(bot, message(1))
    exceptions.wait()
    assert [type(error) for error in exceptions.got] == [OSError]
    assert len(sessions.locks) == 0


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


# -- what install refuses


def test_install_refuses_what_it_cannot_serve(
    make_bot: Bots, sessions: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="not str"):
        session_sync.telebot.install("bot", sessions)  # type: ignore[arg-type]
    bot = make_bot(sessions)
    with pytest.raises(RuntimeError, match="install\\(\\) was called before"):
        session_sync.telebot.install(bot, sessions)
    monkeypatch.delattr(telebot.TeleBot, "_run_middlewares_and_handler")
    with pytest.raises(RuntimeError, match="pip install --upgrade"):
        make_bot(sessions)


def test_the_decorator_alone_needs_no_install(
    make_bot: Bots, sessions: SessionManager[Any]
) -> None:
    bot = make_bot(None)

    class Shop:
        @sessions.with_session
        def buy(self, m: Any, session: Any) -> None:
            session.setdefault("cart", []).append(m.text)

    bot.register_message_handler(Shop().buy, func=lambda m: True)
    feed(bot, message(1, "tea"), message(1, "milk"))
    assert stored(sessions) == {"cart": ["tea", "milk"]}
