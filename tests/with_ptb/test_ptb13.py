"""python-telegram-bot 13, synchronous and threaded: the decorator and the block know its types."""

from __future__ import annotations

from typing import Any

import pytest

from session_sync import SessionManager
from session_sync.testing import OfflineBotAPI

telegram = pytest.importorskip("telegram")
if int(telegram.__version__.split(".")[0]) >= 20:
    pytest.skip("for python-telegram-bot 13 alone", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default")  # its own, of long ago


def test_handlers_of_ptb_13(api: OfflineBotAPI) -> None:
    from telegram import InlineKeyboardButton, InlineKeyboardMarkup
    from telegram.ext import (
        CallbackQueryHandler,
        Dispatcher,
        DispatcherHandlerStop,
        Filters,
        MessageHandler,
        Updater,
    )

    sessions: SessionManager[Any] = SessionManager()

    @sessions.with_session
    def count(update: Any, context: Any, session: Any) -> None:
        session.counter = session.get("counter", 0) + 1
        markup = InlineKeyboardMarkup([[InlineKeyboardButton("+10", callback_data="x")]])
        update.effective_message.reply_text(str(session.counter), reply_markup=markup)

    @sessions.with_session
    def stops(update: Any, context: Any, session: Any) -> None:
        session.counter += 100
        raise DispatcherHandlerStop  # control flow, which saves

    def pressed(update: Any, context: Any) -> None:
        with sessions.session_scope(update) as session:
            session.counter += 10
            update.callback_query.answer(str(session.counter))

    def fails(update: Any, context: Any) -> None:
        with sessions.session_scope(update) as session:
            session.half = True
            raise ValueError("oops")

    updater = Updater(api.token, base_url=api.base_url, workers=8)
    dispatcher: Dispatcher = updater.dispatcher
    dispatcher.add_handler(MessageHandler(Filters.text(["fail"]), fails))
    dispatcher.add_handler(MessageHandler(Filters.text(["stop"]), stops))
    dispatcher.add_handler(MessageHandler(Filters.text, count, run_async=True))
    dispatcher.add_handler(CallbackQueryHandler(pressed))
    dispatcher.add_error_handler(lambda update, context: None)
    updater.start_polling(poll_interval=0, timeout=1)
    try:
        alex = api.user(1)
        for _ in range(20):
            alex.send("hi")
        replies = [alex.reply() for _ in range(20)]
        assert sorted(int(reply.text) for reply in replies) == list(range(1, 21))
        assert alex.press(replies[-1], "x").answer()["text"] == "30"
        alex.send("fail")
        alex.send("stop")
        alex.send("hi")
        assert alex.reply().text == "131"
    finally:
        updater.stop()
    assert sessions.storage.get("user:1:chat:1") == {"counter": 131}
