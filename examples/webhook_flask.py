"""A telebot bot on webhooks, in four processes with four threads each, that loses no message.

    export TOKEN=... WEBHOOK_SECRET=... SESSION_SYNC_STORAGE=sqlite:///sessions.db
    gunicorn --chdir examples --workers 4 --threads 4 webhook_flask:app

Telegram has to be told once where the bot is: bot.set_webhook("https://.../hook",
secret_token=os.environ["WEBHOOK_SECRET"]). On several machines, the storage is
redis://... instead; nothing else changes.
"""
# mypy: disallow-untyped-decorators=False
# (telebot's decorators have no types)

import hmac
import os
from typing import Any

import telebot
from flask import Flask, abort, request
from telebot import apihelper
from telebot.types import Update

import session_sync.telebot
from session_sync import SessionManager, storage_from_url

if "BOT_API" in os.environ:  # another Bot API server than Telegram's
    apihelper.API_URL = os.environ["BOT_API"]

# The front end has threads already, so the bot needs none of its own: a request waits until its
# update was handled, and Telegram sends no more of them at a time than set_webhook allows.
bot = telebot.TeleBot(os.environ["TOKEN"], threaded=False)
sessions = SessionManager(
    storage=storage_from_url(os.environ.get("SESSION_SYNC_STORAGE", "sqlite:///sessions.db"))
)
session_sync.telebot.install(bot, sessions)
app = Flask(__name__)


@app.post("/hook")
def hook() -> str:
    """One update. An error makes this answer 500, and then Telegram sends the update again."""
    secret = request.headers.get("X-Telegram-Bot-Api-Secret-Token", "")
    if not hmac.compare_digest(secret, os.environ["WEBHOOK_SECRET"]):
        abort(403)
    update = Update.de_json(request.get_json())
    if update is not None:
        bot.process_new_updates([update])
    return ""


@bot.message_handler(func=lambda message: True)
def count(message: Any) -> None:
    message.session.counter = message.session.get("counter", 0) + 1
    bot.send_message(message.chat.id, f"That was message {message.session.counter}.")
