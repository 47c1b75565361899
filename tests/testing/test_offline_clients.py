"""`OfflineBotAPI` as telebot and python-telegram-bot see it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import offline_tools
import pytest
from conftest import run_client, stop_telebot

from session_sync.testing import OfflineBotAPI

telebot = pytest.importorskip("telebot")
telegram_ext = pytest.importorskip("telegram.ext")
from telebot import apihelper  # noqa: E402
from telebot import types as telebot_types  # noqa: E402
from telebot import util as telebot_util  # noqa: E402

api = pytest.fixture(offline_tools.make_api)
patient = pytest.fixture(offline_tools.make_patient)


# -- telebot


@pytest.fixture
def bot(api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A telebot that polls in a thread. Its requests sessions are kept by thread: ours goes."""
    monkeypatch.setattr(apihelper, "API_URL", api.telebot_url)
    bot = telebot.TeleBot(api.token)

    @bot.message_handler(commands=["start"])
    def start(message: Any) -> None:
        markup = telebot_types.InlineKeyboardMarkup()
        markup.add(telebot_types.InlineKeyboardButton("Yes", callback_data="vote:yes"))
        bot.reply_to(message, f"Hello, {message.from_user.first_name}", reply_markup=markup)

    @bot.callback_query_handler(func=lambda query: True)
    def pressed(query: Any) -> None:
        bot.answer_callback_query(query.id, "Thanks", show_alert=True)
        place = {"chat_id": query.message.chat.id, "message_id": query.message.message_id}
        bot.edit_message_text(f"You said {query.data}", **place)

    @bot.message_handler(content_types=["text"])
    def echo(message: Any) -> None:
        bot.send_message(message.chat.id, message.text, message_thread_id=message.message_thread_id)

    thread = threading.Thread(
        target=bot.infinity_polling, kwargs={"timeout": 5, "long_polling_timeout": 1}
    )
    thread.start()
    api.call("getUpdates")
    yield bot
    stop_telebot(bot)
    thread.join()
    telebot_util.per_thread("req_session", lambda: None, True)


def test_telebot_polls_and_answers(api: OfflineBotAPI, bot: Any) -> None:
    alex = api.user(1, first_name="Alex")
    asked = alex.send("/start")
    reply = alex.reply()
    assert reply.text == "Hello, Alex"
    assert reply.raw["reply_to_message"]["message_id"] == asked["message_id"]
    press = alex.press(reply, "Yes")
    assert press.answer()["text"] == "Thanks"
    assert press.id
    assert reply.edit().text == "You said vote:yes"
    assert reply.edit().buttons == []
    api.confirmed()


def test_telebot_answers_in_groups_and_topics(api: OfflineBotAPI, bot: Any) -> None:
    forum = api.group(-1001, title="Forum", is_forum=True)
    alex = api.user(1)
    alex.send("in topic 7", chat=forum, thread=7)
    assert alex.reply(chat=forum, thread=7).text == "in topic 7"


@pytest.fixture
def caller(api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A telebot that does not poll. telebot keeps a requests session by thread: close ours."""
    monkeypatch.setattr(apihelper, "API_URL", api.telebot_url)
    apihelper._get_req_session(reset=True)
    yield telebot.TeleBot(api.token, threaded=False)
    apihelper._get_req_session().close()
    apihelper._get_req_session(reset=True)


def test_telebot_reads_every_kind_of_answer(api: OfflineBotAPI, caller: Any) -> None:
    assert caller.get_me().username == "offline_bot"
    assert caller.send_photo(1, b"JPEG", caption="Cat").photo[-1].file_size == 4
    assert caller.send_document(1, "file-1").document.file_id == "file-1"
    assert caller.send_sticker(1, "sticker-1").sticker.file_id == "sticker-1"
    media = [telebot_types.InputMediaPhoto("a", caption="A"), telebot_types.InputMediaPhoto("b")]
    assert [message.message_id for message in caller.send_media_group(1, media)] == [4, 5]
    assert caller.send_poll(1, "Q?", ["a", "b"]).poll.options[1].text == "b"
    assert caller.send_location(1, 1.5, 2.5).location.latitude == 1.5
    assert caller.send_chat_action(1, "typing") is True
    assert caller.get_chat(1).type == "private"
    assert caller.get_chat_member(-100, 1).status == "member"
    assert caller.get_chat_member(-100, caller.get_me().id).user.is_bot
    assert caller.get_chat_member_count(-100) == 2
    assert caller.get_chat_administrators(-100) == []
    prices = [telebot_types.LabeledPrice("Tea", 150), telebot_types.LabeledPrice("Milk", 50)]
    invoice = caller.send_invoice(1, "Cart", "Tea", "payload", "", "EUR", prices).invoice
    assert (invoice.title, invoice.currency, invoice.total_amount) == ("Cart", "EUR", 200)
    assert caller.send_contact(1, "+1", "Alex").contact.first_name == "Alex"
    assert caller.copy_message(2, 1, 1).message_id == 1
    assert caller.delete_messages(1, [1, 2, 99]) is True
    assert caller.set_my_commands([telebot_types.BotCommand("start", "Start")]) is True
    assert caller.get_my_commands()[0].command == "start"
    assert caller.create_forum_topic(-100, "Topic").name == "Topic"
    assert caller.answer_inline_query("1", []) is True


def test_telebot_raises_what_the_api_answers(api: OfflineBotAPI, caller: Any) -> None:
    api.fail_next("sendMessage", 429, retry_after=7)
    with pytest.raises(apihelper.ApiTelegramException) as caught:
        caller.send_message(1, "x")
    assert caught.value.error_code == 429
    assert caught.value.result_json["parameters"]["retry_after"] == 7
    assert caller.set_webhook("http://127.0.0.1:1/") is True
    assert caller.get_webhook_info().url == "http://127.0.0.1:1/"
    assert caller.remove_webhook() is True


# -- python-telegram-bot


def application(api: OfflineBotAPI) -> Any:
    builder = telegram_ext.Application.builder().token(api.token).base_url(api.base_url)
    app = builder.build()

    async def start(update: Any, context: Any) -> None:
        from telegram import InlineKeyboardButton, InlineKeyboardMarkup

        markup = InlineKeyboardMarkup([[InlineKeyboardButton("Yes", callback_data="vote:yes")]])
        name = update.effective_user.first_name
        await update.message.reply_text(f"Hello, {name}", reply_markup=markup)

    async def pressed(update: Any, context: Any) -> None:
        await update.callback_query.answer("Thanks", show_alert=True)
        await update.callback_query.edit_message_text(f"You said {update.callback_query.data}")

    app.add_handler(telegram_ext.CommandHandler("start", start))
    app.add_handler(telegram_ext.CallbackQueryHandler(pressed))
    return app


async def converse(api: OfflineBotAPI) -> None:
    alex = api.user(1, first_name="Alex")
    alex.send("/start")
    reply = await alex.areply()
    assert reply.text == "Hello, Alex"
    press = alex.press(reply, "vote:yes")
    assert await press.aanswer() == {
        "callback_query_id": press.id,
        "text": "Thanks",
        "show_alert": True,
    }
    assert (await reply.aedit()).text == "You said vote:yes"
    await api.aconfirmed()


def test_ptb_polls_and_answers(patient: OfflineBotAPI) -> None:
    async def main() -> None:
        async with application(patient) as app:
            await app.start()
            await app.updater.start_polling()
            await converse(patient)
            await app.updater.stop()
            await app.stop()

    run_client(main())


def test_ptb_serves_a_webhook(patient: OfflineBotAPI) -> None:
    pytest.importorskip("tornado")

    async def main() -> None:
        async with application(patient) as app:
            await app.start()
            port = free_port()
            await app.updater.start_webhook(
                listen="127.0.0.1",
                port=port,
                url_path="hook",
                webhook_url=f"http://127.0.0.1:{port}/hook",
                secret_token="s3cret",
                drop_pending_updates=True,
            )
            await converse(patient)
            await app.bot.delete_webhook()
            await app.updater.stop()
            await app.stop()

    run_client(main())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_ptb_processes_an_update_by_hand(api: OfflineBotAPI) -> None:
    async def main() -> None:
        from telegram import Update

        async with application(api) as app:
            alex = api.user(1, first_name="Alex")
            message = alex.send("/start")
            await app.process_update(Update.de_json({"update_id": 1, "message": message}, app.bot))
            assert alex.reply(timeout=0).text == "Hello, Alex"

    asyncio.run(main())


def test_ptb_reads_every_kind_of_answer(
    api: OfflineBotAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # else RetryAfter warns of a deprecation

    async def main() -> None:
        from telegram import BotCommand, InputMediaPhoto, error

        async with application(api) as app:
            bot = app.bot
            assert bot.username == "offline_bot"
            photo = await bot.send_photo(1, b"JPEG", caption="Cat")
            assert (photo.photo[-1].file_size, photo.caption) == (4, "Cat")
            for kind in ("audio", "document", "animation", "sticker", "video", "voice"):
                sent = await getattr(bot, f"send_{kind}")(1, "file-1")
                assert getattr(sent, kind).file_id == "file-1"
            note = await bot.send_video_note(1, "file-1")
            assert note.video_note.length == 1
            album = [InputMediaPhoto(b"one"), InputMediaPhoto("file-2")]
            sizes = [m.photo[0].file_size for m in await bot.send_media_group(1, album)]
            assert sizes == [3, None]
            assert (await bot.send_poll(1, "Q?", ["a", "b"])).poll.options[1].text == "b"
            assert (await bot.send_dice(1)).dice.value == 1
            assert (await bot.send_venue(1, 1.5, 2.5, "T", "A")).venue.location.longitude == 2.5
            assert (await bot.send_contact(1, "+1", "Kim")).contact.first_name == "Kim"
            assert (await bot.get_chat("@news")).type == "channel"
            assert (await bot.get_chat_member(-100, 1)).user.id == 1
            assert (await bot.forward_message(2, 1, photo.message_id)).forward_origin
            assert await bot.set_my_commands([BotCommand("start", "Start")])
            assert (await bot.get_my_commands())[0].command == "start"
            assert (await bot.create_forum_topic(-100, "Topic")).name == "Topic"
            api.fail_next("sendMessage", 429, retry_after=7)
            with pytest.raises(error.RetryAfter):
                await bot.send_message(1, "x")
            api.fail_next("sendMessage", 403)
            with pytest.raises(error.Forbidden, match="bot was blocked by the user"):
                await bot.send_message(1, "x")

    asyncio.run(main())
