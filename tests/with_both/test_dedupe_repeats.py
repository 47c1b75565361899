"""Updates that Telegram sends again while the first one is handled, or to a webhook."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import dedupe_tools
import pytest
from bots import BOTS, SOON, ext, stop, telebot, telegram
from conftest import Threads, callback_query, message
from dedupe_tools import count, stored
from telebot import types
from telebot.async_telebot import AsyncTeleBot
from telebot.handler_backends import BaseMiddleware

import session_sync.ptb
import session_sync.telebot
from session_sync import SessionManager, storage_from_url
from session_sync.testing import OfflineBotAPI

kind = pytest.fixture(params=BOTS)(dedupe_tools.make_kind)
sessions = pytest.fixture(dedupe_tools.make_sessions)


# -- what telebot makes of one update


def test_a_batch_may_have_an_update_twice(sessions: SessionManager[Any]) -> None:
    bot = session_sync.telebot.install(telebot.TeleBot("1:token", num_threads=2), sessions)
    done = threading.Semaphore(0)

    def handle(m: Any) -> None:
        count(m)
        done.release()

    bot.register_message_handler(handle, func=lambda m: True)
    first, second = message(), message()
    bot.process_new_updates([types.Update.de_json(each) for each in (first, first, second)])
    for _ in range(2):
        assert done.acquire(timeout=SOON)
    stop(bot)
    assert stored(sessions)["count"] == 2


@pytest.mark.parametrize("threaded", [False, True])
def test_all_that_telebot_does_about_one_update_is_one_unit(
    sessions: SessionManager[Any], threaded: bool
) -> None:
    """A reply goes to the callback that waits for it, and to the handlers."""
    bot = session_sync.telebot.install(telebot.TeleBot("1:token", threaded=threaded), sessions)
    done = threading.Semaphore(0)

    def log(name: str) -> Any:
        def handle(m: Any) -> None:
            m.session.setdefault("log", []).append(name)
            done.release()

        return handle

    bot.register_message_handler(log("handler"), func=lambda m: m.text == "answer")
    bot.register_message_handler(log("last"), func=lambda m: True)
    question = message()
    bot.register_for_reply(types.Update.de_json(question).message, log("reply"))
    answer = message(1, "answer", reply_to_message=question["message"])
    last = message(1, "last")
    bot.process_new_updates([types.Update.de_json(each) for each in (answer, answer, last)])
    for _ in range(3):
        assert done.acquire(timeout=SOON)
    stop(bot)
    assert stored(sessions)["log"] == ["reply", "handler", "last"]


def test_class_middlewares_are_skipped_too(sessions: SessionManager[Any]) -> None:
    bot = telebot.TeleBot("1:token", threaded=False, use_class_middlewares=True)
    session_sync.telebot.install(bot, sessions)
    seen: list[str] = []

    class Middleware(BaseMiddleware):
        update_types = ["message"]

        def pre_process(self, m: Any, data: Any) -> None:
            seen.append("before")

        def post_process(self, m: Any, data: Any, exception: Any) -> None:
            seen.append("after")

    bot.setup_middleware(Middleware())
    bot.register_message_handler(count, func=lambda m: True)
    update = types.Update.de_json(message())
    bot.process_new_updates([update])
    bot.process_new_updates([update])
    assert seen == ["before", "after"]


@pytest.mark.parametrize("threaded", [False, True])
def test_the_message_of_a_groups_migration_is_remembered(
    sessions: SessionManager[Any], threaded: bool
) -> None:
    """Though it is handled when the sessions have moved, in another thread perhaps."""
    bot = session_sync.telebot.install(telebot.TeleBot("1:token", threaded=threaded), sessions)
    done = threading.Semaphore(0)

    def handle(m: Any) -> None:
        count(m)
        done.release()

    kinds = ["text", "migrate_to_chat_id"]
    bot.register_message_handler(handle, func=lambda m: True, content_types=kinds)
    update = message(1, chat=-100, migrate_to_chat_id=-1001)
    del update["message"]["text"]
    bot.process_new_updates([types.Update.de_json(update)])
    assert done.acquire(timeout=SOON)
    stop(bot)
    session = {"count": 1, "$updates": [update["update_id"]]}
    assert stored(sessions, "user:1:chat:-100") == session


def test_nothing_of_it_shows_on_a_telebot_message(sessions: SessionManager[Any]) -> None:
    bot = session_sync.telebot.install(telebot.TeleBot("1:token", threaded=False), sessions)
    kept: list[Any] = []
    bot.register_callback_query_handler(kept.append, func=lambda q: True)
    update = callback_query()
    plain = types.Update.de_json(update).callback_query
    bot.process_new_updates([types.Update.de_json(update)])
    assert set(vars(kept[0])) == set(vars(plain))
    assert b"elivery" not in pickle.dumps(kept[0].message.chat)
    assert session_sync.telebot.deliveries.delivered.get(None) is None


@pytest.mark.parametrize("kind", ["TeleBot", "AsyncTeleBot"])
def test_a_handler_may_feed_another_update_of_its_user(
    kind: str, sessions: SessionManager[Any]
) -> None:
    outer, inner = message(1, "outer"), message(1, "inner")

    def handle(m: Any) -> Any:
        count(m)
        if m.text == "outer":
            return bots[0].process_new_updates([types.Update.de_json(inner)])
        return None

    bots: list[Any] = []
    if kind == "TeleBot":
        bots.append(telebot.TeleBot("1:token", threaded=False))
        session_sync.telebot.install(bots[0], sessions)
        bots[0].register_message_handler(handle, func=lambda m: True)
        bots[0].process_new_updates([types.Update.de_json(outer)])
        bots[0].process_new_updates([types.Update.de_json(inner)])
    else:

        async def ahandle(m: Any) -> None:
            feeding = handle(m)
            if feeding is not None:
                await feeding

        async def main() -> None:
            bots.append(AsyncTeleBot("1:token"))
            session_sync.telebot.install(bots[0], sessions)
            bots[0].register_message_handler(ahandle, func=lambda m: True)
            await bots[0].process_new_updates([types.Update.de_json(outer)])
            await bots[0].process_new_updates([types.Update.de_json(inner)])

        asyncio.run(main())
    numbers = [outer["update_id"], inner["update_id"]]
    assert stored(sessions) == {"count": 2, "$updates": numbers}


# -- a repeat that comes while the first one is handled


def test_in_threads_a_repeat_waits_and_is_skipped(
    sessions: SessionManager[Any], threads: Threads
) -> None:
    bot = session_sync.telebot.install(telebot.TeleBot("1:token", threaded=False), sessions)
    begun, go_on = threading.Event(), threading.Event()

    def handle(m: Any) -> None:
        count(m)
        begun.set()
        assert go_on.wait(SOON)

    bot.register_message_handler(handle, func=lambda m: True)
    update = message()
    threads.start(bot.process_new_updates, [types.Update.de_json(update)])
    assert begun.wait(SOON)
    for _ in range(5):
        threads.start(bot.process_new_updates, [types.Update.de_json(update)])
    go_on.set()
    threads.join()
    assert stored(sessions)["count"] == 1


@pytest.mark.parametrize("framework", ["AsyncTeleBot", "ptb"])
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_in_coroutines_a_repeat_waits_and_is_skipped(
    framework: str, store: str, tmp_path: Path
) -> None:
    url = "memory://" if store == "memory" else f"sqlite:///{tmp_path}/s.db"
    update = message()

    async def main() -> None:
        go_on = asyncio.Event()

        async def handle(at: Any) -> None:
            count(at)
            await go_on.wait()

        async def let_go() -> None:
            go_on.set()

        if framework == "AsyncTeleBot":
            bot = session_sync.telebot.install(AsyncTeleBot("1:token"), sessions)
            bot.register_message_handler(handle, func=lambda m: True)
            coming = [bot.process_new_updates([types.Update.de_json(update)]) for _ in range(5)]
            await asyncio.gather(*coming, let_go())
            return
        with OfflineBotAPI() as api:
            builder = ext.Application.builder().token(api.token).base_url(api.base_url)
            app = session_sync.ptb.install(builder, sessions).build()
            app.add_handler(ext.TypeHandler(telegram.Update, lambda u, context: handle(context)))
            async with app:
                raw = [telegram.Update.de_json(update, app.bot) for _ in range(5)]
                await asyncio.gather(*(app.process_update(each) for each in raw), let_go())

    with SessionManager(storage=storage_from_url(url), dedupe=5) as sessions:
        asyncio.run(asyncio.wait_for(main(), 60))
        assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}


WORKER = """
import json, sys
import telebot, session_sync.telebot
from session_sync import SessionManager, storage_from_url
url, raw = sys.argv[1:]
with SessionManager(storage=storage_from_url(url), lock_timeout=60, dedupe=50) as sessions:
    bot = telebot.TeleBot("1:token", threaded=False)
    session_sync.telebot.install(bot, sessions)
    def handle(m):
        m.session.count = m.session.get("count", 0) + 1
    bot.register_message_handler(handle, func=lambda m: True)
    updates = [telebot.types.Update.de_json(each) for each in json.loads(raw)]
    print("ready", flush=True)
    sys.stdin.readline()
    for update in updates:
        bot.process_new_updates([update])
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has locks between processes"
)
@pytest.mark.parametrize("store", ["sqlite", "disk", "redis"])
def test_a_repeat_that_is_sent_to_another_process_is_skipped(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if store == "redis":
        url = f"{request.getfixturevalue('redis_url')}?prefix=dedupe:"
    else:
        url = f"{store}:///{tmp_path}/sessions"
    raw = json.dumps([message() for _ in range(20)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, raw],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n", timeout=60)
        assert worker.returncode == 0
    with SessionManager(storage=storage_from_url(url)) as sessions:
        assert stored(sessions)["count"] == 20


# -- a webhook, to which Telegram sends again


def test_a_webhook_that_answers_too_late_handles_the_update_once(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    bot = session_sync.telebot.install(telebot.TeleBot(api.token, threaded=False), sessions)
    bot.register_message_handler(count, func=lambda m: True)

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bot.process_new_updates([types.Update.de_json(body.decode())])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    alex = api.user(1, first_name="Alex")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            telebot.apihelper.API_URL = api.telebot_url
            bot.set_webhook(f"http://127.0.0.1:{server.server_port}/")
            alex.send("hi")
            api.confirmed()
            assert api.redeliver() == 1
            alex.send("again")
            api.confirmed()
            assert api.redeliver(1) == 1
            with pytest.raises(LookupError, match="no update 7"):
                api.redeliver(7)
            api.confirmed()
            bot.delete_webhook()
        finally:
            server.shutdown()
            serving.join()
    assert stored(sessions) == {"count": 2, "$updates": [1, 2]}


def test_who_polls_gets_nothing_twice(api: OfflineBotAPI) -> None:
    with pytest.raises(LookupError):
        api.redeliver()
    api.push({"poll": {"id": "1"}})
    with pytest.raises(RuntimeError, match="set a webhook"):
        api.redeliver()
