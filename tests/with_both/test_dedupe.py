"""Updates that Telegram sends again: skipped by every kind of bot, and what is stored for that."""

from __future__ import annotations

import asyncio
import http.server
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from bots import BOTS, SOON, Group, ext, stop, telebot, telegram
from conftest import Counting, Threads, callback_query, message, poll
from telebot import types
from telebot.async_telebot import AsyncTeleBot
from telebot.handler_backends import BaseMiddleware

import session_sync.ptb
import session_sync.telebot
from session_sync import (
    MemoryStorage,
    Session,
    SessionDecodeError,
    SessionManager,
    SessionVersionError,
    StrictSession,
    by_chat,
    copy_storage,
    storage_from_url,
    ttl,
)
from session_sync.testing import OfflineBotAPI

KEY = "user:1:chat:1"


@pytest.fixture(params=BOTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sessions() -> SessionManager[Any]:
    return SessionManager(dedupe=5)


def count(at: Any) -> None:
    at.session.count = at.session.get("count", 0) + 1


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)


# -- which updates are skipped


def test_an_update_that_comes_again_is_handled_once(
    kind: str, sessions: SessionManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    first, second, press = message(), message(), callback_query()
    group = Group(kind, sessions=sessions)
    with caplog.at_level(logging.INFO, "session_sync"):
        group.play(count, first, first, second, first, press, press, second)
    assert group.errors == []
    numbers = [each["update_id"] for each in (first, second, press)]
    assert stored(sessions) == {"count": 3, "$updates": numbers}
    said = [record.getMessage() for record in caplog.records if record.name == "session_sync"]
    assert len(said) == 4
    assert said[0] == f"update {numbers[0]} has come again: {KEY!r} has had it"


def test_it_is_skipped_after_a_restart_too(kind: str, sessions: SessionManager[Any]) -> None:
    update = message()
    for _ in range(2):
        Group(kind, sessions=SessionManager(storage=sessions.storage, dedupe=1)).play(count, update)
    assert stored(sessions)["count"] == 1


def test_without_dedupe_it_is_handled_again_and_nothing_remembered(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager()
    update = message()
    Group(kind, sessions=sessions).play(count, update, update)
    assert stored(sessions) == {"count": 2}


def test_only_the_last_ones_are_remembered(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=2)
    updates = [message() for _ in range(3)]
    Group(kind, sessions=sessions).play(count, *updates, updates[2], updates[1], updates[0])
    assert stored(sessions)["count"] == 4
    assert stored(sessions)["$updates"] == [updates[2]["update_id"], updates[0]["update_id"]]


def test_each_session_remembers_its_own(kind: str, sessions: SessionManager[Any]) -> None:
    update, other = message(1), message(2)
    other["update_id"] = update["update_id"]  # two bots on one store, say
    Group(kind, sessions=sessions).play(count, update, other)
    assert stored(sessions) == stored(sessions, "user:2:chat:2")


def test_an_update_of_nobody_is_handled_each_time(kind: str, sessions: SessionManager[Any]) -> None:
    ran: list[Any] = []
    update = poll()
    Group(kind, sessions=sessions).play(ran.append, update, update)
    assert len(ran) == 2


@pytest.mark.parametrize("on_error", ["discard", "flush"])
def test_one_whose_handler_failed_is_handled_again_if_nothing_of_it_was_kept(
    kind: str, on_error: Any
) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5, on_error=on_error)
    update = message()
    outcomes = [ValueError("no"), None]

    def fail_once(at: Any) -> None:
        count(at)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    Group(kind, sessions=sessions).play(fail_once, update, update, update)
    assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}
    assert len(outcomes) == (0 if on_error == "discard" else 1)


def test_a_flush_remembers_nothing_yet(kind: str, sessions: SessionManager[Any]) -> None:
    update = message()
    seen: list[Any] = []

    def fail(at: Any) -> None:
        count(at)
        at.session.flush()
        seen.append(stored(sessions))
        raise ValueError("no")

    Group(kind, sessions=sessions).play(fail, update, update)
    assert seen == [{"count": 1}, {"count": 2}]
    assert stored(sessions) == {"count": 2}


def test_release_remembers(kind: str, sessions: SessionManager[Any]) -> None:
    update = message()
    seen: list[Any] = []

    def release(at: Any) -> None:
        count(at)
        at.session.release()
        seen.append(stored(sessions))

    Group(kind, sessions=sessions).play(release, update, update)
    assert seen == [{"count": 1, "$updates": [update["update_id"]]}]


def test_what_could_not_be_saved_is_not_remembered(kind: str) -> None:
    class Broken(MemoryStorage):
        fails = 1

        def save(self, key: str, record: Any) -> None:
            if self.fails:
                self.fails -= 1
                raise ConnectionError("no save")
            super().save(key, record)

    sessions: SessionManager[Any] = SessionManager(storage=Broken(), dedupe=5)
    update = message()
    group = Group(kind, sessions=sessions)
    group.play(count, update, update, update)
    assert [type(error) for error in group.errors] == [ConnectionError]
    assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}


def test_blocks_and_decorated_handlers_skip_nothing(sessions: SessionManager[Any]) -> None:
    @sessions.with_session
    def handle(update: Any, session: Any) -> None:
        session.count = session.get("count", 0) + 1

    update = message()
    handle(update)
    handle(update)
    with sessions.session_scope(update) as session:
        session.count += 1
    assert stored(sessions) == {"count": 3}


# -- what a session is to who looks at it


def test_the_numbers_are_no_fields(kind: str, sessions: SessionManager[Any]) -> None:
    seen: list[Any] = []

    def look(at: Any) -> None:
        session = at.session
        seen.append((len(session), list(session), session == {}, "$updates" in session))
        assert session.get("$updates") is None
        with pytest.raises(ValueError, match="kept for what the library itself stores"):
            session["$updates"] = 1

    group = Group(kind, sessions=sessions)
    group.play(look, message(), message())
    assert group.errors == []
    assert seen == [(0, [], True, False)] * 2


def test_each_update_writes_once_and_a_repeat_only_reads(kind: str) -> None:
    storage = Counting()
    sessions: SessionManager[Any] = SessionManager(storage=storage, dedupe=5)
    update = message()
    Group(kind, sessions=sessions).play(lambda at: at.session.get("count"), update)
    assert (storage.reads, storage.writes) == (1, 1)
    Group(kind, sessions=sessions).play(lambda at: at.session.get("count"), update)
    assert (storage.reads, storage.writes) == (2, 1)


def test_an_emptied_session_keeps_what_it_remembers(
    kind: str, sessions: SessionManager[Any]
) -> None:
    fill, empty = message(), message()
    todo = [count, lambda at: setattr(at, "session", None)]
    group = Group(kind, sessions=sessions)
    group.play(lambda at: todo.pop(0)(at), fill, empty, empty, fill)
    assert group.errors == []
    assert stored(sessions) == {"$updates": [fill["update_id"], empty["update_id"]]}
    with sessions.session_scope(KEY) as session:  # also where nobody asks
        session.count = 1
    with sessions.session_scope(KEY) as session:
        session.clear()
    assert stored(sessions) == {"$updates": [fill["update_id"], empty["update_id"]]}


def test_a_session_without_fields_begins_anew(kind: str) -> None:
    made: list[Any] = []

    def initial(update: Any) -> dict[str, Any]:
        made.append(update)
        return {"language": "en"}

    sessions: SessionManager[Any] = SessionManager(dedupe=5, initial=initial)
    seen: list[Any] = []
    updates = [message(), message(), message()]

    def read(at: Any) -> None:
        seen.append((at.session.language, at.session))

    Group(kind, sessions=sessions).play(read, *updates[:2])
    assert stored(sessions) == {"$updates": [each["update_id"] for each in updates[:2]]}
    assert [session.language for _, session in seen] == ["en", "en"]
    Group(kind, sessions=sessions).play(count, updates[2])
    assert stored(sessions) == {
        "language": "en",
        "count": 1,
        "$updates": [each["update_id"] for each in updates],
    }
    assert len(made) == 3


def test_what_began_and_was_flushed_is_stored(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager(
        dedupe=5, initial=lambda update: {"language": "en"}
    )

    def flush(at: Any) -> None:
        count(at)
        at.session.flush()

    update = message()
    Group(kind, sessions=sessions).play(flush, update)
    assert stored(sessions) == {"language": "en", "count": 1, "$updates": [update["update_id"]]}


def test_an_error_handler_that_only_reads_stores_nothing_that_began(
    sessions: SessionManager[Any],
) -> None:
    began: SessionManager[Any] = SessionManager(
        storage=sessions.storage, initial=lambda update: {"language": "en"}, dedupe=5
    )

    def fail(at: Any) -> None:
        count(at)
        raise ValueError("no")

    Group("ptb", sessions=began).play(fail, message())
    assert stored(sessions) is None


def test_declared_fields_and_strict_sessions_see_nothing_of_it(kind: str) -> None:
    class Cart(StrictSession):
        total: int = 0

    sessions = SessionManager(Cart, dedupe=5)

    def add(at: Any) -> None:
        at.session.total += 1
        assert list(at.session) == ["total"]

    first, second = message(), message()
    group = Group(kind, sessions=sessions)
    group.play(add, first, second, first)
    assert group.errors == []
    assert stored(sessions) == {
        "total": 2,
        "$updates": [first["update_id"], second["update_id"]],
    }


def test_a_field_that_expires_takes_nothing_else_along(
    kind: str, sessions: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = message(), message()
    todo: list[Any] = [
        lambda at: setattr(at.session, "code", ttl("1234", 60)),
        lambda at: at.session.get("code"),
    ]
    now = __import__("time").time()
    group = Group(kind, sessions=sessions)
    group.play(lambda at: todo.pop(0)(at), first)
    monkeypatch.setattr("session_sync.session.ttl.time.time", lambda: now + 120)
    group.play(lambda at: todo.pop(0)(at), second, first)
    assert group.errors == []
    assert stored(sessions) == {"$updates": [first["update_id"], second["update_id"]]}


def test_a_damaged_record_is_reported_and_left_alone(
    kind: str, sessions: SessionManager[Any]
) -> None:
    sessions.storage.set(KEY, {"count": 1, "$updates": {"a": 1}})
    group = Group(kind, sessions=sessions)
    group.play(lambda at: pytest.fail("ran"), message())
    (error,) = group.errors
    assert isinstance(error, SessionDecodeError)
    assert KEY in str(error)
    assert stored(sessions) == {"count": 1, "$updates": {"a": 1}}
    assert len(sessions.locks) == 0


# -- versions


class Old(Session):
    pass


class New(Session):
    migrations = {2: lambda fields: fields.update(migrated=True)}


def test_what_a_session_remembers_goes_through_migrations(kind: str) -> None:
    storage = MemoryStorage()
    first, second = message(), message()
    Group(kind, sessions=SessionManager(Old, storage=storage, dedupe=5)).play(count, first)
    sessions = SessionManager(New, storage=storage, dedupe=5)
    Group(kind, sessions=sessions).play(count, second, first)
    assert stored(sessions) == {
        "count": 2,
        "migrated": True,
        "$updates": [first["update_id"], second["update_id"]],
        "$version": 2,
    }


def test_a_session_without_fields_needs_no_step_and_is_migrated_once() -> None:
    storage = MemoryStorage()
    storage.set(KEY, {"$updates": [1]})
    sessions = SessionManager(New, storage=storage, dedupe=5)
    assert (sessions.migrate_all(), sessions.migrate_all()) == (1, 0)
    assert stored(sessions) == {"$updates": [1], "$version": 2}
    begun = SessionManager(New, storage=storage, dedupe=5, initial=lambda update: {"a": 1})
    with begun.session_scope(KEY) as session:
        assert session == {"a": 1}
    assert stored(sessions) == {"$updates": [1], "$version": 2}


def test_a_newer_version_is_refused_as_ever(kind: str) -> None:
    storage = MemoryStorage()
    update = message()
    new = SessionManager(New, storage=storage, dedupe=5)
    Group(kind, sessions=new).play(lambda at: None, update)
    group = Group(kind, sessions=SessionManager(Old, storage=storage, dedupe=5))
    group.play(count, message())
    assert [type(error) for error in group.errors] == [SessionVersionError]
    assert stored(new) == {"$updates": [update["update_id"]], "$version": 2}


# -- all sessions of somebody


def test_find_forget_and_copy_take_it_for_a_session(sessions: SessionManager[Any]) -> None:
    Group("TeleBot", sessions=sessions).play(lambda at: None, message())
    assert list(sessions.find(user=1)) == [KEY]
    copy: SessionManager[Any] = SessionManager(dedupe=5)
    assert copy_storage(sessions.storage, copy.storage) == 1
    assert stored(copy) == stored(sessions)
    assert sessions.forget(user=1) == 1
    assert stored(sessions) is None


def test_two_sessions_that_become_one_remember_what_both_have_had() -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5)
    sessions.storage.set("user:1:chat:-100", {"count": 1, "$updates": [1, 2]})
    sessions.storage.set("user:1:chat:-1001", {"$updates": [3]})
    sessions.storage.set("user:2:chat:-100", {"$updates": [4]})
    sessions.storage.set("user:2:chat:-1001", {"$updates": [5]})
    assert sessions.migrate_chat(-100, -1001) == 2
    assert stored(sessions, "user:1:chat:-1001") == {"count": 1, "$updates": [1, 2, 3]}
    assert stored(sessions, "user:2:chat:-1001") == {"$updates": [4, 5]}
    assert stored(sessions, "user:1:chat:-100") is None


# -- two sessions


@pytest.mark.parametrize(
    "remembers", [("session",), ("chat_session",), ("session", "chat_session")]
)
def test_an_update_is_skipped_if_either_session_has_had_it(
    kind: str, remembers: tuple[str, ...]
) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5 * ("session" in remembers))
    chats: SessionManager[Any] = SessionManager(
        storage=sessions.storage, get_storage_key=by_chat, dedupe=5 * ("chat_session" in remembers)
    )

    def both(at: Any) -> None:
        count(at)
        at.chat_session.count = at.chat_session.get("count", 0) + 1

    update, later = message(1, chat=-100), message(2, chat=-100)
    group = Group(kind, sessions=sessions, chat_session=chats)
    group.play(both, update, update, later)
    assert group.errors == []
    chat = stored(chats, "chat:-100")
    assert stored(sessions, "user:1:chat:-100")["count"] == 1
    assert chat["count"] == 2
    numbers = [update["update_id"], later["update_id"]]
    assert chat.get("$updates") == (numbers if "chat_session" in remembers else None)
    # The process died between the two saves.
    sessions.storage.set("user:1:chat:-100", {"count": 0})
    group.play(both, update)
    assert stored(chats, "chat:-100")["count"] == (3 if remembers == ("session",) else 2)


def test_one_session_under_both_names_remembers_once(kind: str) -> None:
    sessions: SessionManager[Any] = SessionManager(dedupe=5)
    others: SessionManager[Any] = SessionManager(storage=sessions.storage, dedupe=5)
    update = message()
    Group(kind, sessions=sessions, chat_session=others).play(count, update, update)
    assert stored(sessions) == {"count": 1, "$updates": [update["update_id"]]}


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


# -- the option


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"dedupe": -1}, ValueError, "0 or more updates, not -1"),
        ({"dedupe": 2.0}, TypeError, "not float"),
        ({"dedupe": True}, TypeError, "not bool"),
        ({"dedupe": "5"}, TypeError, "not str"),
        ({"dedupe": 5, "lazy": True}, ValueError, "exclude each other"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        SessionManager(**options)
    SessionManager(dedupe=0, lazy=True)
