"""A group becomes a supergroup, and its sessions go along: real bots that poll a local Bot API."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("aiohttp", reason="needs aiohttp")
pytest.importorskip("telegram", reason="needs the extra 'ptb'")

from conftest import Threads, run_client, stop_telebot  # noqa: E402
from stores import OwnStorage  # noqa: E402
from telebot import apihelper, asyncio_helper  # noqa: E402
from telebot.async_telebot import AsyncTeleBot  # noqa: E402
from telegram.ext import Application, MessageHandler, filters  # noqa: E402

import session_sync.ptb  # noqa: E402
import session_sync.telebot  # noqa: E402
from session_sync import (  # noqa: E402
    MemoryStorage,
    SessionDecodeError,
    SessionManager,
    SQLiteStorage,
    by_chat,
)
from session_sync.testing import OfflineBotAPI, OfflineChat  # noqa: E402

# An old telebot gives a new aiohttp what that one deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:ssl_context is deprecated:DeprecationWarning")

OLD, NEW = -100, -1001234
SOON = 20  # seconds until a test gives up waiting for what has to come
EVERY_KIND = ["text", "photo", "migrate_to_chat_id", "migrate_from_chat_id"]


class Bot:
    """A bot of any library that polls in a thread. Its one handler counts texts in the session and
    tells what it saw; at "wait" it waits until `go_on` is set."""

    def __init__(self) -> None:
        self.seen: SimpleQueue[tuple[int, str | None, dict[str, Any]]] = SimpleQueue()
        self.errors: SimpleQueue[Exception] = SimpleQueue()
        self.waits, self.go_on = threading.Event(), threading.Event()

    def handle(self, message: Any, session: Any) -> None:
        self.seen.put((message.chat.id, message.text, dict(session)))
        if message.text is not None:
            session.texts = session.get("texts", 0) + 1

    async def ahandle(self, message: Any, session: Any) -> None:
        if message.text == "wait":
            self.waits.set()
            while not self.go_on.is_set():
                await asyncio.sleep(0.001)  # other tasks run
        self.handle(message, session)

    def next(self) -> tuple[int, str | None, dict[str, Any]]:
        return self.seen.get(timeout=SOON)


Run = Callable[..., contextlib.AbstractContextManager[Bot]]


@contextlib.contextmanager
def telebot_runs(
    api: OfflineBotAPI, sessions: SessionManager[Any], threaded: bool = True, **options: Any
) -> Iterator[Bot]:
    bot, threads = Bot(), Threads()

    class Exceptions:
        def handle(self, error: Exception) -> bool:
            bot.errors.put(error)
            return True

    client = telebot.TeleBot(
        api.token, threaded=threaded, num_threads=4, exception_handler=Exceptions()
    )
    session_sync.telebot.install(client, sessions, **options)

    @client.message_handler(content_types=EVERY_KIND)
    def handle(message: Any) -> None:
        if message.text == "wait":
            bot.waits.set()
            assert bot.go_on.wait(SOON)
        bot.handle(message, message.session)

    threads.start(
        lambda: client.infinity_polling(timeout=1, long_polling_timeout=1, logger_level=None)
    )
    try:
        yield bot
    finally:
        stop_telebot(client)
        threads.join()
        for worker in client.worker_pool.workers if threaded else ():
            worker.exception_info = None  # telebot keeps the last one, and with it its message


def telebot_runs_inline(*args: Any, **options: Any) -> contextlib.AbstractContextManager[Bot]:
    return telebot_runs(*args, threaded=False, **options)


@contextlib.contextmanager
def async_telebot_runs(
    api: OfflineBotAPI, sessions: SessionManager[Any], **options: Any
) -> Iterator[Bot]:
    bot, threads = Bot(), Threads()

    class Exceptions:
        async def handle(self, error: Exception) -> bool:
            bot.errors.put(error)
            return True

    client = AsyncTeleBot(api.token, exception_handler=Exceptions())
    session_sync.telebot.install(client, sessions, **options)

    @client.message_handler(content_types=EVERY_KIND)
    async def handle(message: Any) -> None:
        await bot.ahandle(message, message.session)

    threads.start(
        lambda: run_client(
            client.infinity_polling(timeout=1, request_timeout=20, logger_level=None)
        )
    )
    try:
        yield bot
    finally:
        client._polling = False  # telebot's own way to stop is Ctrl-C
        threads.join()


@contextlib.contextmanager
def ptb_runs(api: OfflineBotAPI, sessions: SessionManager[Any], **options: Any) -> Iterator[Bot]:
    bot, threads, stopped, begun = Bot(), Threads(), threading.Event(), threading.Event()

    async def handle(update: Any, context: Any) -> None:
        await bot.ahandle(update.message, context.session)

    async def failed(update: Any, context: Any) -> None:
        bot.errors.put(context.error)

    async def main() -> None:
        builder = Application.builder().token(api.token).base_url(api.base_url)
        builder.concurrent_updates(64)
        app = session_sync.ptb.install(builder, sessions, **options).build()
        app.add_handler(MessageHandler(filters.ALL, handle))
        app.add_error_handler(failed)
        async with app:
            await app.start()
            await app.updater.start_polling()
            begun.set()
            await asyncio.to_thread(stopped.wait)
            await app.updater.stop()
            await app.stop()

    threads.start(lambda: run_client(main()))
    assert begun.wait(SOON)
    try:
        yield bot
    finally:
        stopped.set()
        threads.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, api: OfflineBotAPI) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")
    monkeypatch.setattr(apihelper, "API_URL", api.telebot_url)
    monkeypatch.setattr(asyncio_helper, "API_URL", api.telebot_url)


CONCURRENT = {"telebot": telebot_runs, "async telebot": async_telebot_runs, "ptb": ptb_runs}
ALL = {**CONCURRENT, "telebot inline": telebot_runs_inline}


@pytest.fixture(params=list(ALL))
def run(request: pytest.FixtureRequest) -> Run:
    return ALL[request.param]


@pytest.fixture(params=["memory", "sqlite"])
def sessions(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[SessionManager[Any]]:
    storage: Any = MemoryStorage() if request.param == "memory" else SQLiteStorage(tmp_path / "s")
    with SessionManager(storage=storage) as manager:
        yield manager


@pytest.fixture
def friends(api: OfflineBotAPI) -> OfflineChat:
    return api.group(OLD, title="Friends", type="group")


def set_up(sessions: SessionManager[Any], chat: int = OLD) -> None:
    for user in (1, 2):
        with sessions.session_scope(f"user:{user}:chat:{chat}") as session:
            session.name = f"user {user}"


def stored(sessions: SessionManager[Any]) -> dict[str, Any]:
    return {key: sessions.storage.get(key) for key in sessions.storage.keys()}


# -- by itself


def test_sessions_follow_their_group(
    run: Run, api: OfflineBotAPI, friends: OfflineChat, sessions: SessionManager[Any]
) -> None:
    set_up(sessions)
    with run(api, sessions) as bot:
        alex, bo = api.user(1), api.user(2)
        chat = alex.upgrade(friends, NEW)
        seen = {chat_id: session for chat_id, _, session in (bot.next(), bot.next())}
        assert seen == {OLD: {}, NEW: {"name": "user 1"}}  # moved before either was handled
        bo.send("hi", chat=chat)
        assert bot.next() == (NEW, "hi", {"name": "user 2"})
    assert stored(sessions) == {
        f"user:1:chat:{NEW}": {"name": "user 1"},
        f"user:2:chat:{NEW}": {"name": "user 2", "texts": 1},
    }
    assert bot.errors.empty()
    assert len(sessions.locks) == 0


@pytest.mark.parametrize("word", ["migrate_to_chat_id", "migrate_from_chat_id"])
def test_either_of_the_two_messages_will_do(
    run: Run, api: OfflineBotAPI, friends: OfflineChat, sessions: SessionManager[Any], word: str
) -> None:
    set_up(sessions)
    with run(api, sessions) as bot:
        alex = api.user(1)
        if word == "migrate_to_chat_id":
            alex.send(chat=friends, migrate_to_chat_id=NEW)
        else:
            alex.send(chat=api.group(NEW), migrate_from_chat_id=OLD)
        bot.next()
    assert set(stored(sessions)) == {f"user:1:chat:{NEW}", f"user:2:chat:{NEW}"}


def test_a_message_of_the_new_chat_may_come_first(
    run: Run, api: OfflineBotAPI, friends: OfflineChat, sessions: SessionManager[Any]
) -> None:
    set_up(sessions)
    with run(api, sessions) as bot:
        api.user(2).send("hi", chat=api.group(NEW))
        assert bot.next() == (NEW, "hi", {})
        api.user(1).upgrade(friends, NEW)
        bot.next(), bot.next()
    assert stored(sessions) == {
        f"user:1:chat:{NEW}": {"name": "user 1"},
        f"user:2:chat:{NEW}": {"name": "user 2", "texts": 1},
    }


def test_the_session_of_a_whole_chat_follows_it(
    run: Run, api: OfflineBotAPI, friends: OfflineChat
) -> None:
    sessions = SessionManager(get_storage_key=by_chat)
    with sessions.session_scope(f"chat:{OLD}") as session:
        session.name = "Friends"
    with run(api, sessions) as bot:
        api.user(1).upgrade(friends, NEW)
        bot.next(), bot.next()
    assert stored(sessions) == {f"chat:{NEW}": {"name": "Friends"}}


@pytest.mark.parametrize("concurrent", list(CONCURRENT))
def test_a_move_that_waits_for_a_handler_holds_up_nobody_else(
    concurrent: str, api: OfflineBotAPI, friends: OfflineChat, sessions: SessionManager[Any]
) -> None:
    set_up(sessions)
    with CONCURRENT[concurrent](api, sessions) as bot:
        alex, bo, kim = (api.user(number) for number in (1, 2, 3))
        bo.send("wait", chat=friends)
        assert bot.waits.wait(SOON)
        alex.upgrade(friends, NEW)
        kim.send("hi")
        assert bot.next() == (3, "hi", {})
        bot.go_on.set()
        seen = {(chat, text): session for chat, text, session in (bot.next() for _ in range(3))}
        assert seen[OLD, "wait"] == {"name": "user 2"}
        assert seen[NEW, None] == {"name": "user 1"}
    assert sessions.storage.get(f"user:2:chat:{NEW}") == {"name": "user 2", "texts": 1}
    assert list(sessions.find(chat=OLD)) == []
    assert bot.errors.empty()


def test_what_fails_goes_where_a_handlers_failure_goes_and_the_update_is_handled(
    run: Run, api: OfflineBotAPI, friends: OfflineChat
) -> None:
    sessions = SessionManager()
    set_up(sessions)
    broken = {"name": "x", "$ttl": "no timers"}
    sessions.storage.set(f"user:2:chat:{OLD}", broken)
    with run(api, sessions) as bot:
        alex = api.user(1)
        alex.send(chat=api.group(NEW), migrate_from_chat_id=OLD)
        assert bot.next() == (NEW, None, {"name": "user 1"})
        error = bot.errors.get(timeout=SOON)
        assert isinstance(error, ExceptionGroup)
        assert isinstance(error.exceptions[0], SessionDecodeError)
        alex.send("hi")  # and the bot goes on
        assert bot.next() == (1, "hi", {})
    assert sessions.storage.get(f"user:2:chat:{OLD}") == broken
    assert bot.errors.empty()


# -- or not


def test_it_can_be_switched_off(run: Run, api: OfflineBotAPI, friends: OfflineChat) -> None:
    sessions = SessionManager()
    set_up(sessions)
    before = stored(sessions)
    with run(api, sessions, migrate_chats=False) as bot:
        api.user(1).upgrade(friends, NEW)
        bot.next(), bot.next()
    assert stored(sessions) == before


def test_a_storage_that_cannot_list_its_keys_does_without(
    run: Run, api: OfflineBotAPI, friends: OfflineChat
) -> None:
    storage = OwnStorage()
    sessions = SessionManager(storage=storage)
    set_up(sessions)
    with run(api, sessions) as bot:
        api.user(1).upgrade(friends, NEW)
        bot.next(), bot.next()
    assert set(storage.values) == {f"user:1:chat:{OLD}", f"user:2:chat:{OLD}"}
    assert bot.errors.empty()


@pytest.mark.parametrize(
    ("install", "make"),
    [
        (session_sync.telebot.install, lambda: telebot.TeleBot("1:token", threaded=False)),
        (session_sync.telebot.install, lambda: AsyncTeleBot("1:token")),
        (session_sync.ptb.install, lambda: Application.builder().token("1:token")),
    ],
)
def test_who_asks_for_it_is_told_that_his_storage_cannot(install: Any, make: Any) -> None:
    with pytest.raises(TypeError, match=r"OwnStorage cannot list its keys.*migrate_chats=False"):
        install(make(), SessionManager(storage=OwnStorage()), migrate_chats=True)
    install(make(), SessionManager(), migrate_chats=True)


# -- telebot alone


@pytest.mark.parametrize("threaded", [False, True])
def test_sessions_follow_also_where_no_handler_takes_messages(
    threaded: bool, sessions: SessionManager[Any], threads: Threads
) -> None:
    set_up(sessions)
    bot = telebot.TeleBot("1:token", threaded=threaded)
    session_sync.telebot.install(bot, sessions)
    bot.register_callback_query_handler(lambda query: None, func=lambda query: True)
    person, chat = {"id": 1, "is_bot": False, "first_name": "Alex"}, {"id": OLD, "type": "group"}
    message = {"message_id": 1, "date": 1, "from": person, "chat": chat, "migrate_to_chat_id": NEW}
    update = telebot.types.Update.de_json({"update_id": 1, "message": message})
    bot.process_new_updates([update])
    while len(list(sessions.find(chat=NEW))) < 2 or any(sessions.find(chat=OLD)):
        assert threaded, "inline it is done by now"
    stop_telebot(bot)
    assert set(stored(sessions)) == {f"user:1:chat:{NEW}", f"user:2:chat:{NEW}"}


@pytest.mark.parametrize("concurrent", [False, True], ids=["TeleBot", "AsyncTeleBot"])
def test_without_an_exception_handler_the_failure_leaves_when_the_update_is_handled(
    concurrent: bool,
) -> None:
    sessions = SessionManager()
    sessions.storage.set(f"user:2:chat:{OLD}", {"name": "x", "$ttl": "no timers"})
    seen: list[int] = []
    bot: Any = AsyncTeleBot("1:token") if concurrent else telebot.TeleBot("1:t", threaded=False)
    session_sync.telebot.install(bot, sessions)

    def handle(message: Any) -> None:
        seen.append(message.chat.id)

    async def ahandle(message: Any) -> None:
        seen.append(message.chat.id)

    bot.register_message_handler(ahandle if concurrent else handle, content_types=EVERY_KIND)
    person, chat = {"id": 1, "is_bot": False, "first_name": "Alex"}, {"id": OLD, "type": "group"}
    message = {"message_id": 1, "date": 1, "from": person, "chat": chat, "migrate_to_chat_id": NEW}
    updates = [telebot.types.Update.de_json({"update_id": 1, "message": message})]
    with pytest.raises(ExceptionGroup, match="sessions were not moved"):
        if concurrent:
            asyncio.run(bot.process_new_updates(updates))
        else:
            bot.process_new_updates(updates)
    assert seen == [OLD]


def test_an_update_that_a_handler_feeds_in_moves_nothing_that_is_open_around_it() -> None:
    """It is told so, instead of waiting for its own caller."""
    sessions = SessionManager()
    set_up(sessions)
    errors: list[Any] = []

    class Exceptions:
        def handle(self, error: Exception) -> bool:
            errors.append(error)
            return True

    bot = AsyncTeleBot("1:token", exception_handler=Exceptions())  # type: ignore[arg-type]
    session_sync.telebot.install(bot, sessions)
    person, chat = {"id": 1, "is_bot": False, "first_name": "Alex"}, {"id": OLD, "type": "group"}
    message = {"message_id": 1, "date": 1, "from": person, "chat": chat}

    def update(**fields: Any) -> Any:
        return telebot.types.Update.de_json({"update_id": 1, "message": {**message, **fields}})

    @bot.message_handler(content_types=["text"])
    async def handle(m: Any) -> None:
        await bot.process_new_updates([update(migrate_to_chat_id=NEW)])
        m.session.texts = 1

    asyncio.run(bot.process_new_updates([update(text="hi")]))
    (error,) = errors
    assert f"'user:1:chat:{OLD}' is open around migrate_chat()" in str(error.exceptions[0])
    assert sessions.storage.get(f"user:1:chat:{OLD}") == {"name": "user 1", "texts": 1}
    assert sessions.storage.get(f"user:2:chat:{NEW}") == {"name": "user 2"}
