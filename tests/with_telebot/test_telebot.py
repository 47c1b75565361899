"""telebot's integration: real TeleBot objects, fed with Bot API JSON or by polling a local Bot
API."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import telebot_tools
from telebot_tools import KEY, Bots, Exceptions, drain, feed, stored

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
from conftest import callback_query, message, poll  # noqa: E402
from telebot import types  # noqa: E402
from telebot.handler_backends import (  # noqa: E402
    BaseMiddleware,
    CancelUpdate,
    ContinueHandling,
    SkipHandler,
)

import session_sync.telebot  # noqa: E402
from session_sync import (  # noqa: E402
    MemoryStorage,
    SessionClosedError,
    SessionKeyError,
    SessionManager,
)

make_bot = pytest.fixture(telebot_tools.bot_maker)
threaded = pytest.fixture(params=[False, True], ids=["inline", "threaded"])(
    telebot_tools.make_threaded
)
sessions = pytest.fixture(telebot_tools.make_sessions)


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
