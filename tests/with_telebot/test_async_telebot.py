"""telebot's room for AsyncTeleBot: real objects, fed with Bot API JSON or by polling a local
Bot API through aiohttp."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("aiohttp", reason="needs aiohttp")

from conftest import Threads, callback_query, message, poll, run_client  # noqa: E402
from telebot import asyncio_helper, types  # noqa: E402
from telebot.async_telebot import AsyncTeleBot  # noqa: E402
from telebot.asyncio_filters import AdvancedCustomFilter, SimpleCustomFilter  # noqa: E402
from telebot.asyncio_handler_backends import (  # noqa: E402
    BaseMiddleware,
    CancelUpdate,
    ContinueHandling,
    SkipHandler,
)

import session_sync.telebot  # noqa: E402
from session_sync import (  # noqa: E402
    DiskStorage,
    MemoryStorage,
    SessionAwaitError,
    SessionClosedError,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionManager,
)
from session_sync.testing import OfflineBotAPI  # noqa: E402

# An old telebot gives a new aiohttp what that one deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:ssl_context is deprecated:DeprecationWarning")

KEY = "user:1:chat:1"
awaits_exception_handlers = hasattr(AsyncTeleBot, "_handle_exception")  # telebot 4.15
awaits_filters = hasattr(telebot.async_telebot, "iscoroutinefunction")  # telebot 4.12


class Exceptions:
    """An exception handler that keeps what it gets, and what the session was at that moment."""

    def __init__(self, sessions: SessionManager[Any] | None = None, answer: bool = True) -> None:
        self.got: list[Exception] = []
        self.sessions: list[Any] = []
        self._sessions = sessions
        self._answer = answer

    def handle(self, error: Exception) -> bool:
        self.got.append(error)
        if self._sessions is not None:
            with self._sessions.session_scope(KEY) as session:
                self.sessions.append(dict(session))
        return self._answer


class AsyncExceptions(Exceptions):
    async def handle(self, error: Exception) -> bool:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().handle(error)


class Middleware(BaseMiddleware):
    """Calls what it is given, before and after the handlers of messages."""

    def __init__(
        self,
        before: Callable[[Any, Any], Any] = lambda m, data: None,
        after: Callable[[Any, Any], Any] = lambda m, exception: None,
    ) -> None:
        self.update_types = ["message"]
        self._before = before
        self._after = after

    async def pre_process(self, m: Any, data: Any) -> Any:
        await asyncio.sleep(0)
        return self._before(m, data)

    async def post_process(self, m: Any, data: Any, exception: Any) -> None:
        await asyncio.sleep(0)
        self._after(m, exception)


@pytest.fixture
def sessions() -> SessionManager[Any]:
    return SessionManager()


def make_bot(sessions: SessionManager[Any], **options: Any) -> Any:
    return session_sync.telebot.install(AsyncTeleBot("1:token", **options), sessions)


def run(main: Coroutine[Any, Any, None]) -> None:
    run_client(asyncio.wait_for(main, 60))


def updates(*raw: dict[str, Any]) -> list[Any]:
    return [types.Update.de_json(update) for update in raw]


def feed(bot: Any, *raw: dict[str, Any]) -> None:
    run(bot.process_new_updates(updates(*raw)))


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)


def locks(sessions: SessionManager[Any]) -> Any:
    return sessions.locks


async def count(update: Any) -> None:
    """A handler that loses updates if it is not alone with its session."""
    counter = update.session.get("counter", 0)
    await asyncio.sleep(0)
    update.session.counter = counter + 1


async def note(update: Any) -> None:
    """A handler that keeps the order in which updates were begun, and ended."""
    text = getattr(update, "text", None) or update.data
    trail = update.session.setdefault("trail", [])
    trail.append(text)
    for _ in range(int(text) % 3):
        await asyncio.sleep(0)
    trail.append(text)


def twice(texts: range) -> list[str]:
    return [str(number) for number in texts for _ in "12"]


def mixed(texts: range, user: int = 1) -> list[dict[str, Any]]:
    """Messages and button presses."""
    return [
        message(user, str(number)) if number % 3 else callback_query(user, str(number))
        for number in texts
    ]


def register_for_all(bot: Any, handler: Callable[..., Any]) -> None:
    bot.register_message_handler(handler, func=lambda m: True)
    bot.register_callback_query_handler(handler, func=lambda q: True)


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


def keyless_if_bad(update: Any) -> str:
    if "bad" in update.text:
        raise LookupError(update.text)
    return KEY


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
