"""A short chat with a bot, played on this machine and printed: no token and no network."""

import threading
from collections.abc import Iterable

import telebot
from telebot import apihelper

from session_sync.testing import OfflineBotAPI

TOKEN = "123456:OFFLINE"


def play(bot: telebot.TeleBot, chat: Iterable[str]) -> None:
    """Let Alex say the lines of `chat`, one after the other, and wait for each answer."""
    with OfflineBotAPI(TOKEN, longest_poll=0.1) as api:
        apihelper.API_URL = api.telebot_url
        polling = threading.Thread(target=bot.infinity_polling)
        polling.start()
        try:
            alex = api.user(1, first_name="Alex")
            for text in chat:
                print("Alex:", text)
                alex.send(text)
                print(" bot:", alex.wait_reply().text)
        finally:
            bot.stop_bot()
            polling.join()
