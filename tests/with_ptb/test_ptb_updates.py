"""python-telegram-bot: the ways in which updates come, one by one and concurrently."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import ptb_tools
import pytest
from conftest import callback_query, message, run_client
from ptb_tools import (
    KEY,
    SOON,
    Gate,
    count,
    fail,
    on_text,
    process,
    queue,
    running,
    settle,
    slow_count,
    stored,
)

from session_sync import MemoryStorage, SessionManager
from session_sync.locks.lock import LockHandle
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
ext = pytest.importorskip("telegram.ext")


_no_deprecation = pytest.fixture(autouse=True)(ptb_tools.make_no_deprecation)
sessions = pytest.fixture(params=ptb_tools.STORES)(ptb_tools.make_sessions)
in_memory = pytest.fixture(ptb_tools.make_in_memory)


# -- the ways in which updates come


def processor() -> Any:
    """Somebody's own update processor."""
    if not hasattr(ext, "BaseUpdateProcessor"):
        pytest.skip("PTB has update processors since 20.4")

    class Processor(ext.BaseUpdateProcessor):
        async def do_process_update(self, update: object, coroutine: Any) -> None:
            await coroutine

        async def initialize(self) -> None: ...

        async def shutdown(self) -> None: ...

    return Processor(8)


async def start_polling(app: Any) -> None:
    await app.updater.start_polling()


async def start_webhook(app: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/hook"
    await app.updater.start_webhook("127.0.0.1", port, "hook", webhook_url=url)


async def arrive(app: Any, way: str, updates: list[dict[str, Any]]) -> None:
    """Feed what the updater does not fetch by itself."""
    if way == "queue":
        await queue(app, *updates)
    elif way == "process_update":
        await asyncio.gather(*(process(app, update) for update in updates))


async def no_updater(app: Any) -> None: ...


@pytest.mark.parametrize("concurrent", [False, True, "processor"])
@pytest.mark.parametrize("way", ["polling", "webhook", "queue", "process_update"])
def test_it_works_however_updates_come(
    api: OfflineBotAPI, in_memory: SessionManager[Any], way: str, concurrent: Any
) -> None:
    begin = {"polling": start_polling, "webhook": start_webhook}
    begin |= {"queue": no_updater, "process_update": no_updater}

    async def answer(update: Any, context: Any) -> None:
        await slow_count(update, context)
        await update.message.reply_text(str(context.session.counter))

    def build(builder: Any) -> Any:
        wanted = processor() if concurrent == "processor" else concurrent
        return builder.concurrent_updates(wanted) if concurrent else builder

    async def main() -> None:
        async with running(api, in_memory, on_text(answer), build=build) as app:
            alex = api.user(1)
            await begin[way](app)
            sent = [alex.send(str(number)) for number in range(5)]
            await arrive(app, way, [{"update_id": n, "message": sent[n]} for n in range(5)])
            replies = [(await alex.areply()).text for _ in sent]
            assert sorted(replies) == ["1", "2", "3", "4", "5"]
            if app.updater.running:
                await app.updater.stop()

    run_client(main())
    assert stored(in_memory) == {"counter": 5, "seen": ["0", "1", "2", "3", "4"]}


def test_every_handler_class_of_ptb_gives_a_session(
    api: OfflineBotAPI, in_memory: SessionManager[Any]
) -> None:
    """Each that is fed with updates of a user; the others are tested above (polls, strings)."""
    user = {"id": 1, "is_bot": False, "first_name": "Alex"}
    chat = {"id": 1, "type": "private"}
    member = {"status": "member", "user": user}
    answered = {"poll_id": "1", "user": user, "option_ids": [0], "option_persistent_ids": ["a"]}
    group = {"id": -100, "type": "supergroup", "title": "x"}
    changed = {
        "chat": chat,
        "from": user,
        "date": 1,
        "old_chat_member": member,
        "new_chat_member": {"status": "left", "user": user},
    }
    handlers: dict[str, tuple[Any, dict[str, Any]]] = {
        "MessageHandler": (on_text(count), message()),
        "CommandHandler": (
            ext.CommandHandler("go", count),
            message(text="/go", entities=[{"type": "bot_command", "offset": 0, "length": 3}]),
        ),
        "PrefixHandler": (ext.PrefixHandler("!", "go", count), message(text="!go")),
        "TypeHandler": (ext.TypeHandler(telegram.Update, count), message()),
        "CallbackQueryHandler": (ext.CallbackQueryHandler(count), callback_query()),
        "InlineQueryHandler": (
            ext.InlineQueryHandler(count),
            {"inline_query": {"id": "1", "from": user, "query": "", "offset": ""}},
        ),
        "ChosenInlineResultHandler": (
            ext.ChosenInlineResultHandler(count),
            {"chosen_inline_result": {"result_id": "1", "from": user, "query": ""}},
        ),
        "PollAnswerHandler": (
            ext.PollAnswerHandler(count),
            {"poll_answer": answered},
        ),
        "PreCheckoutQueryHandler": (
            ext.PreCheckoutQueryHandler(count),
            {
                "pre_checkout_query": {
                    "id": "1",
                    "from": user,
                    "currency": "EUR",
                    "total_amount": 1,
                    "invoice_payload": "x",
                }
            },
        ),
        "ShippingQueryHandler": (
            ext.ShippingQueryHandler(count),
            {
                "shipping_query": {
                    "id": "1",
                    "from": user,
                    "invoice_payload": "x",
                    "shipping_address": {
                        "country_code": "DE",
                        "state": "",
                        "city": "x",
                        "street_line1": "",
                        "street_line2": "",
                        "post_code": "1",
                    },
                }
            },
        ),
        "ChatMemberHandler": (
            ext.ChatMemberHandler(count, ext.ChatMemberHandler.ANY_CHAT_MEMBER),
            {"chat_member": changed},
        ),
        "ChatJoinRequestHandler": (
            ext.ChatJoinRequestHandler(count),
            {"chat_join_request": {"chat": group, "from": user, "user_chat_id": 1, "date": 1}},
        ),
    }
    if hasattr(ext, "MessageReactionHandler"):  # PTB 20.8
        reaction = {"chat": chat, "message_id": 1, "date": 1, "user": user}
        handlers["MessageReactionHandler"] = (
            ext.MessageReactionHandler(count),
            {"message_reaction": {**reaction, "old_reaction": [], "new_reaction": []}},
        )
        source = {"source": "premium", "user": user}
        boost = {"boost_id": "1", "add_date": 1, "expiration_date": 2, "source": source}
        handlers["ChatBoostHandler"] = (
            ext.ChatBoostHandler(count),
            {"chat_boost": {"chat": chat, "boost": boost}},
        )
    if hasattr(ext, "BusinessConnectionHandler"):  # PTB 21.1
        connection = {"id": "b", "user": user, "user_chat_id": 1, "date": 1, "is_enabled": True}
        connection["can_reply"] = True
        handlers["BusinessConnectionHandler"] = (
            ext.BusinessConnectionHandler(count),
            {"business_connection": connection},
        )
        deleted = {"business_connection_id": "b", "chat": chat, "message_ids": [1]}
        handlers["BusinessMessagesDeletedHandler"] = (
            ext.BusinessMessagesDeletedHandler(count),
            {"deleted_business_messages": deleted},
        )
    if hasattr(ext, "PaidMediaPurchasedHandler"):  # PTB 21.6
        handlers["PaidMediaPurchasedHandler"] = (
            ext.PaidMediaPurchasedHandler(count),
            {"purchased_paid_media": {"from": user, "paid_media_payload": "x"}},
        )
    if hasattr(ext, "ManagedBotUpdatedHandler"):
        made = {"id": 5, "is_bot": True, "first_name": "Bot", "username": "made_bot"}
        handlers["ManagedBotUpdatedHandler"] = (
            ext.ManagedBotUpdatedHandler(count),
            {"managed_bot": {"user": user, "bot": made}},
        )
    elsewhere = {"BaseHandler", "ConversationHandler", "PollHandler", "StringCommandHandler"}
    elsewhere |= {"StringRegexHandler"}
    known = {name for name in vars(ext) if name.endswith("Handler")}
    assert known - elsewhere - handlers.keys() == set()

    async def main() -> None:
        for name, (handler, update) in handlers.items():
            async with running(api, in_memory, handler) as app:
                app.add_error_handler(fail)
                before = total(in_memory)
                await process(app, {"update_id": 1, **update})
                assert total(in_memory) == before + 1, name

    asyncio.run(main())


def total(sessions: SessionManager[Any]) -> int:
    values = [stored(sessions, key) for key in sessions.storage.keys()]  # type: ignore[attr-defined]
    return sum(value["counter"] for value in values)


@pytest.mark.parametrize("per_message", [False, True])
def test_conversations_entry_points_states_fallbacks_and_nested_ones(
    api: OfflineBotAPI, in_memory: SessionManager[Any], per_message: bool
) -> None:
    def log(name: str, state: Any) -> Any:
        async def handler(update: Any, context: Any) -> Any:
            context.session.log = [*context.session.get("log", ()), name]
            return state

        return handler

    def on(data: str, callback: Any) -> Any:
        if per_message:
            return ext.CallbackQueryHandler(callback, pattern=f"^{data}$")
        return ext.MessageHandler(ext.filters.Regex(f"^{data}$"), callback)

    end = ext.ConversationHandler.END
    inner = ext.ConversationHandler(
        [on("inner", log("inner", 1))],
        {1: [on("done", log("done", end))]},
        [],
        map_to_parent={end: 2},
        per_message=per_message,
    )
    # PTB warns of a conversation inside one with per_message.
    nested = [on("inner", log("inner", 1)), on("done", log("done", 2))] if per_message else [inner]
    outer = ext.ConversationHandler(
        [on("begin", log("begin", 1))],
        {1: nested, 2: [on("state", log("state", 2))]},
        [on("cancel", log("cancel", end))],
        per_message=per_message,
    )
    words = ["begin", "inner", "done", "state", "cancel"]

    def update(word: str) -> dict[str, Any]:
        if not per_message:
            return message(text=word)
        pressed = callback_query(data=word)
        pressed["callback_query"]["message"]["message_id"] = 1
        return pressed

    async def main() -> None:
        async with running(api, in_memory, outer) as app:
            await process(app, *map(update, words))

    asyncio.run(main())
    assert stored(in_memory) == {"log": words}


# -- concurrency


def test_nothing_is_lost_and_the_order_kept_with_concurrent_updates(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    """1,000 updates, 10 users; with the lock taken out this loses (see the next test)."""

    async def main() -> None:
        build = lambda builder: builder.concurrent_updates(1000)  # noqa: E731
        async with running(api, sessions, on_text(slow_count), build=build) as app:
            texts = [str(number) for number in range(100)]
            await queue(app, *(message(user, text) for text in texts for user in range(1, 11)))

    asyncio.run(main())
    for user in range(1, 11):
        expected = {"counter": 100, "seen": [str(number) for number in range(100)]}
        assert stored(sessions, f"user:{user}:chat:{user}") == expected


def test_the_same_without_the_lock_loses(
    api: OfflineBotAPI, in_memory: SessionManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LockHandle, "try_acquire", lambda handle: True)

    async def main() -> None:
        async with running(api, in_memory, on_text(slow_count)) as app:
            await asyncio.gather(*(process(app, message()) for _ in range(100)))

    asyncio.run(main())
    assert stored(in_memory)["counter"] < 100


def test_a_flood_of_one_user_holds_up_nobody_and_takes_no_threads(
    api: OfflineBotAPI, sessions: SessionManager[Any]
) -> None:
    """2,000 queued updates of one user; `concurrent_updates` is far less."""

    async def main() -> None:
        gate = Gate()

        async def handle(update: Any, context: Any) -> None:
            if update.message.text == "0":
                await gate()
            await slow_count(update, context)

        build = lambda builder: builder.concurrent_updates(8)  # noqa: E731
        async with running(api, sessions, on_text(handle), build=build) as app:
            before = threading.active_count()
            flood = [message(1, str(number)) for number in range(2000)]
            flooding = asyncio.create_task(queue(app, *flood))
            await gate.reached()
            await asyncio.wait_for(process(app, message(2, "a"), message(3, "b")), SOON)
            await app.update_queue.put(telegram.Update.de_json(message(4, "c"), app.bot))
            while stored(sessions, "user:4:chat:4") is None:
                await asyncio.sleep(0.01)
            # Its pools have 16 threads each; 1,999 updates wait.
            assert threading.active_count() - before <= 32
            assert stored(sessions) is None
            gate.open()
            await asyncio.wait_for(flooding, 60)

    asyncio.run(main())
    seen = stored(sessions)["seen"]
    assert seen == [str(number) for number in range(2000)]
    assert stored(sessions, "user:4:chat:4")["seen"] == ["c"]


def test_a_store_that_hangs_delays_its_own_key_only(api: OfflineBotAPI) -> None:
    class Hanging(MemoryStorage):
        blocking = True  # type: ignore[misc]

        def __init__(self) -> None:
            super().__init__()
            self.hangs = threading.Event()
            self.goes_on = threading.Event()

        def load(self, key: str) -> Any:
            if key == KEY:
                self.hangs.set()
                assert self.goes_on.wait(SOON)
            return super().load(key)

    storage = Hanging()
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    lags: list[float] = []

    async def probe() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - before)

    async def main() -> None:
        build = lambda builder: builder.concurrent_updates(100)  # noqa: E731
        async with running(api, sessions, on_text(slow_count), build=build) as app:
            probing = asyncio.create_task(probe())
            await settle()
            hanging = asyncio.create_task(process(app, message(1)))
            assert await asyncio.to_thread(storage.hangs.wait, SOON)
            for user in range(2, 50):
                await asyncio.wait_for(process(app, message(user)), SOON)
            assert not hanging.done()
            probing.cancel()
            storage.goes_on.set()
            await hanging

    asyncio.run(main())
    assert stored(sessions)["counter"] == 1
    # A loop that stands still while the store hangs would not have come so far; the worst half of
    # them may be the machine's.
    assert sorted(lags)[len(lags) // 2] < 0.05
