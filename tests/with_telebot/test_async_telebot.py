"""telebot's integration for AsyncTeleBot: real objects, fed with Bot API JSON or by polling a local
Bot API through aiohttp."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable
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
from conftest import callback_query, message, poll  # noqa: E402
from telebot.async_telebot import AsyncTeleBot  # noqa: E402
from telebot.asyncio_filters import AdvancedCustomFilter, SimpleCustomFilter  # noqa: E402
from telebot.asyncio_handler_backends import (  # noqa: E402
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

sessions = pytest.fixture(async_telebot_tools.make_sessions)

# An old telebot gives a new aiohttp what that one deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:ssl_context is deprecated:DeprecationWarning")

awaits_exception_handlers = hasattr(AsyncTeleBot, "_handle_exception")  # telebot 4.15

awaits_filters = hasattr(telebot.async_telebot, "iscoroutinefunction")  # telebot 4.12


class AsyncExceptions(Exceptions):
    async def handle(self, error: Exception) -> bool:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().handle(error)


# -- message.session


def test_every_kind_of_handler_has_its_users_session(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)

    async def seen(update: Any) -> None:
        update.session.setdefault("seen", []).append(type(update).__name__)

    register_for_all(bot, seen)
    bot.register_edited_message_handler(seen, func=lambda m: True)
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
        {"update_id": 10**6 + 2, "poll_answer": answer},
        {"update_id": 10**6 + 1, "pre_checkout_query": checkout},
        {"update_id": 10**6, "inline_query": inline},
        callback_query(1),
        message(2),
        edited,
        message(1),
    )
    assert stored(sessions)["seen"] == [
        "PollAnswer",
        "PreCheckoutQuery",
        "InlineQuery",
        "CallbackQuery",
        "Message",
        "Message",
    ]
    assert stored(sessions, "user:2:chat:2") == {"seen": ["Message"]}


def test_filters_can_ask_the_session(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)
    got: list[str] = []

    class AtStep(AdvancedCustomFilter):
        key = "step"

        async def check(self, m: Any, step: str) -> bool:
            await asyncio.sleep(0)
            return bool(m.session.get("step") == step)

    class IsKnown(SimpleCustomFilter):
        key = "known"

        async def check(self, m: Any) -> bool:
            return "name" in m.session

    bot.add_custom_filter(AtStep())
    bot.add_custom_filter(IsKnown())

    @bot.message_handler(step="name")
    async def name(m: Any) -> None:
        m.session.name = m.text
        del m.session.step

    @bot.message_handler(commands=["start"], func=lambda m: "step" not in m.session)
    async def start(m: Any) -> None:
        m.session.step = "name"

    @bot.message_handler(known=True)
    async def known(m: Any) -> None:
        got.append(m.session.name + m.text)

    feed(bot, *(message(1, text) for text in ("early", "/start", "Alex", "!")))
    assert got == ["Alex!"]
    assert stored(sessions) == {"name": "Alex"}


@pytest.mark.skipif(not awaits_filters, reason="this telebot awaits no func=")
def test_an_async_filter_can_ask_the_session(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)

    async def is_second(m: Any) -> bool:
        await asyncio.sleep(0)
        return bool(m.session.get("counter") == 1)

    async def second(m: Any) -> None:
        m.session.second = m.text

    bot.register_message_handler(second, func=is_second)
    bot.register_message_handler(count, func=lambda m: True)
    feed(bot, message(1, "a"), message(1, "b"))
    assert stored(sessions) == {"counter": 1, "second": "b"}


def test_assigning_the_session_replaces_or_empties_it(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)
    todo: list[Callable[[Any], None]] = []

    @bot.message_handler(func=lambda m: True)
    async def handle(m: Any) -> None:
        todo.pop(0)(m)

    def replace(m: Any) -> None:
        m.session = {"a": 1, "b": 2}

    def merge(m: Any) -> None:
        m.session |= {"b": 3}

    def wrong(m: Any) -> None:
        with pytest.raises(TypeError, match="mapping of fields"):
            m.session = 5

    def empty(m: Any) -> None:
        m.session = None

    expected = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 3}, None]
    for step, after in zip((replace, merge, wrong, empty), expected, strict=True):
        todo.append(step)
        feed(bot, message(1))
        assert stored(sessions) == after


def test_a_kept_message_shows_its_closed_session_and_nothing_is_left_of_a_forgotten_one(
    sessions: SessionManager[Any],
) -> None:
    bot = make_bot(sessions)
    kept: list[Any] = []

    @bot.message_handler(func=lambda m: True)
    async def keep(m: Any) -> None:
        await count(m)
        kept.append(m)

    feed(bot, message(1), message(1))
    assert [m.session.counter for m in kept] == [1, 2]
    with pytest.raises(SessionClosedError, match=KEY):
        kept[0].session.counter = 5
    places = {id(m) for m in kept}
    assert places <= session_sync.telebot.attribute.bound.keys()
    kept.clear()
    gc.collect()
    assert places.isdisjoint(session_sync.telebot.attribute.bound)


def test_an_update_without_a_key_is_handled_and_asking_for_its_session_raises(
    sessions: SessionManager[Any],
) -> None:
    bot = make_bot(sessions)
    ran: list[str] = []

    @bot.poll_handler(func=lambda p: True)
    async def on_poll(p: Any) -> None:
        with pytest.raises(SessionKeyError, match="neither a user nor a chat"):
            _ = p.session
        ran.append(p.question)

    feed(bot, poll())
    assert ran == ["?"]


def test_update_listeners_get_their_list(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)
    got: asyncio.Queue[Any] = asyncio.Queue()
    bot.set_update_listener(got.put)

    async def main() -> None:
        await bot.process_new_updates(updates(message(1, "a"), message(1, "b")))
        assert [[m.text for m in await got.get()] for _ in "ab"] == [["a"], ["b"]]

    run(main())


def test_a_handler_that_feeds_its_own_user_an_update_shares_its_session(
    sessions: SessionManager[Any],
) -> None:
    bot = make_bot(sessions)
    register_for_all(bot, count)

    @bot.edited_message_handler(func=lambda m: True)
    async def again(m: Any) -> None:
        await bot.process_new_updates(updates(message(1), callback_query(1), message(1)))
        m.session.counted = m.session.counter

    edited = message(1)
    edited["edited_message"] = edited.pop("message")
    feed(bot, edited)
    assert stored(sessions) == {"counter": 3, "counted": 3}


# -- errors and middlewares


async def fail(m: Any) -> None:
    m.session.saved = True
    await m.session.aflush()
    m.session.lost = True
    await asyncio.sleep(0)
    raise ValueError("no")


@pytest.mark.parametrize(
    "kind",
    [
        Exceptions,
        pytest.param(
            AsyncExceptions,
            marks=pytest.mark.skipif(not awaits_exception_handlers, reason="an old telebot"),
        ),
    ],
)
@pytest.mark.parametrize("with_middleware", [False, True])
def test_a_handler_that_raises_is_rolled_back_and_the_exception_handler_sees_that(
    sessions: SessionManager[Any], kind: type[Exceptions], with_middleware: bool
) -> None:
    exceptions = kind(sessions)
    bot = make_bot(sessions, exception_handler=exceptions)
    bot.register_message_handler(fail, func=lambda m: True)
    if with_middleware:
        bot.setup_middleware(Middleware())
    feed(bot, message(1))
    assert [type(error) for error in exceptions.got] == [ValueError]
    assert exceptions.sessions == [{"saved": True}]
    assert stored(sessions) == {"saved": True}
    assert len(locks(sessions)) == 0


@pytest.mark.parametrize("on_error", ["discard", "flush"])
def test_telebot_swallows_the_exception_but_not_the_roll_back(on_error: Any) -> None:
    sessions: SessionManager[Any] = SessionManager(on_error=on_error)
    exceptions = Exceptions(sessions)
    bot = make_bot(sessions, exception_handler=exceptions)
    seen: list[Any] = []

    def after(m: Any, exception: Any) -> None:
        seen.append(dict(m.session))
        m.session.after = True

    bot.setup_middleware(Middleware(lambda m, data: m.session.update(before=True), after))
    bot.register_message_handler(fail, func=lambda m: True)
    feed(bot, message(1))
    kept = {"before": True, "saved": True, **({"lost": True} if on_error == "flush" else {})}
    assert exceptions.sessions == [kept]
    assert seen == [kept]
    assert stored(sessions) == {**kept, "after": True}


@pytest.mark.parametrize("with_middleware", [False, True])
def test_a_filter_that_raises_is_rolled_back_as_a_handler_is(
    sessions: SessionManager[Any], with_middleware: bool
) -> None:
    exceptions = Exceptions(sessions)
    bot = make_bot(sessions, exception_handler=exceptions)

    def fails(m: Any) -> bool:
        m.session.filtered = True
        raise ValueError("no")

    bot.register_message_handler(count, func=fails)
    if with_middleware:
        bot.setup_middleware(Middleware())
    feed(bot, message(1))
    assert [type(error) for error in exceptions.got] == [ValueError]
    assert exceptions.sessions == [{}]
    assert stored(sessions) is None


def test_class_middlewares_share_the_session_with_the_handler(
    sessions: SessionManager[Any],
) -> None:
    bot = make_bot(sessions)

    def before(m: Any, data: Any) -> None:
        m.session.trail = ["before"]
        data["extra"] = "data"

    bot.setup_middleware(Middleware(before, lambda m, _: m.session.trail.append("after")))

    @bot.message_handler(func=lambda m: m.session.trail == ["before"])
    @sessions.with_session
    async def handle(m: Any, session: Any, extra: str) -> None:
        assert session is m.session
        session.trail.append(extra)

    feed(bot, message(1))
    assert stored(sessions) == {"trail": ["before", "data", "after"]}


@pytest.mark.parametrize("answer", [CancelUpdate, SkipHandler, RuntimeError])
def test_a_middleware_that_stops_the_update_leaves_no_key_locked(
    sessions: SessionManager[Any], answer: type
) -> None:
    exceptions, raises = Exceptions(), issubclass(answer, Exception)
    bot = make_bot(sessions, exception_handler=exceptions)
    ran: list[Any] = []

    def before(m: Any, data: Any) -> Any:
        m.session.counter = m.session.get("counter", 0) + 1
        if raises:
            raise answer
        return answer()

    async def handle(m: Any) -> None:
        ran.append(m)

    bot.setup_middleware(Middleware(before))
    bot.register_message_handler(handle, func=lambda m: True)
    feed(bot, message(1), message(1))
    assert ran == []
    assert len(locks(sessions)) == 0
    assert [type(error) for error in exceptions.got] == ([answer, answer] if raises else [])
    assert stored(sessions) == (None if raises else {"counter": 2})


def test_handlers_that_continue_share_the_session(sessions: SessionManager[Any]) -> None:
    bot = make_bot(sessions)
    seen: list[Any] = []

    @bot.message_handler(func=lambda m: True)
    async def first(m: Any) -> ContinueHandling:
        m.session.first = 1
        seen.append(m.session)
        return ContinueHandling()

    @bot.message_handler(func=lambda m: m.session.first == 1)
    async def second(m: Any) -> None:
        m.session.second = 2
        seen.append(m.session)

    feed(bot, message(1))
    assert stored(sessions) == {"first": 1, "second": 2}
    assert seen[0] is seen[1]


@pytest.mark.parametrize("kind", [Exceptions, AsyncExceptions])
@pytest.mark.parametrize("answer", [True, False])
def test_a_key_function_that_raises_fails_its_own_update_only(
    kind: type[Exceptions], answer: bool
) -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=keyless_if_bad)
    exceptions = kind(answer=answer)
    bot = make_bot(sessions, exception_handler=exceptions)
    bot.register_message_handler(note, func=lambda m: True)
    batch = [message(1, text) for text in ("0", "bad", "1")]
    if answer:
        feed(bot, *batch)
    else:  # as it is without an exception handler
        with pytest.raises(LookupError, match="bad"):
            feed(bot, *batch)
    assert [type(error) for error in exceptions.got] == [LookupError]
    assert stored(sessions) == {"trail": twice(range(2))}


def test_no_error_of_a_batch_is_lost() -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=keyless_if_bad)
    bot = make_bot(sessions)
    bot.register_message_handler(note, func=lambda m: True)
    with pytest.raises(ExceptionGroup, match="2 updates") as raised:
        feed(bot, *(message(1, text) for text in ("bad 1", "0", "bad 2")))
    assert [str(error) for error in raised.value.exceptions] == ["bad 1", "bad 2"]
    assert stored(sessions) == {"trail": twice(range(1))}


class Faulty(MemoryStorage):
    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self._fail)

    def _fail(self, *args: Any) -> Any:
        raise OSError("disk on fire")


@pytest.mark.parametrize(("method", "ran"), [("load", []), ("save", ["0"])])
def test_an_error_of_the_store_goes_to_the_exception_handler(method: str, ran: Any) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=Faulty(method))
    exceptions = Exceptions()
    bot = make_bot(sessions, exception_handler=exceptions)
    got: list[str] = []

    @bot.message_handler(func=lambda m: True)
    async def handle(m: Any) -> None:
        m.session.text = m.text
        got.append(m.text)

    feed(bot, message(1, "0"))
    assert got == ran
    assert [str(error) for error in exceptions.got] == ["disk on fire"]
    assert len(locks(sessions)) == 0


# -- what install refuses


def test_install_refuses_what_it_cannot_serve(
    sessions: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = make_bot(sessions)
    with pytest.raises(RuntimeError, match=r"install\(\) was called before"):
        session_sync.telebot.install(bot, sessions)
    with pytest.raises(TypeError, match="not type"):
        session_sync.telebot.install(AsyncTeleBot, sessions)  # type: ignore[type-var]

    async def other_order(self: Any, handlers: Any, message: Any, middlewares: Any) -> None: ...

    monkeypatch.setattr(AsyncTeleBot, "_run_middlewares_and_handlers", other_order)
    with pytest.raises(RuntimeError, match="pip install --upgrade"):
        make_bot(sessions)
    monkeypatch.delattr(AsyncTeleBot, "_run_middlewares_and_handlers")
    with pytest.raises(RuntimeError, match="pip install --upgrade"):
        make_bot(sessions)


def test_who_has_no_async_bot_needs_no_aiohttp() -> None:
    program = """if True:
        import sys
        sys.modules["aiohttp"] = None  # what imports it fails
        import telebot, session_sync.telebot
        from session_sync import SessionManager
        session_sync.telebot.install(telebot.TeleBot("1:token", threaded=False), SessionManager())
        try:
            session_sync.telebot.install("bot", SessionManager())
        except TypeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "not str" in done.stdout
