"""A form across several messages: name, age, done. A draft that is left alone is forgotten.

For Telegram: TOKEN=... python examples/form_bot.py
A short chat on this machine, without a token: python examples/form_bot.py --offline
"""
# mypy: disallow-untyped-decorators=False
# (telebot's decorators have no types)

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import telebot
from offline import TOKEN, play
from telebot.types import Message

import session_sync.telebot
from session_sync import Session, SessionManager, ttl

TEN_MINUTES = 600  # seconds


def make_bot(token: str, sessions: SessionManager[Session]) -> telebot.TeleBot:
    """The bot. `session.draft` has the answers so far and the next step, `session.person` all."""
    bot = telebot.TeleBot(token)
    session_sync.telebot.install(bot, sessions)

    def at(step: str) -> Callable[[Any], bool]:
        return lambda message: message.session.get("draft", {}).get("step") == step

    def say(message: Message, text: str) -> None:
        bot.send_message(message.chat.id, text)

    @bot.message_handler(commands=["start"])
    def start(message: Any) -> None:
        message.session.draft = ttl({"step": "name"}, TEN_MINUTES)
        say(message, "What is your name?")

    @bot.message_handler(commands=["cancel"])
    def cancel(message: Any) -> None:
        message.session.pop("draft", None)
        say(message, "Cancelled.")

    @bot.message_handler(commands=["me"])
    @sessions.with_session  # the session as an argument, so that a type checker knows its type
    def me(message: Message, session: Session) -> None:
        person = session.get("person")
        say(message, f"{person['name']}, {person['age']}" if person else "Who are you? /start")

    @bot.message_handler(func=at("name"))
    def take_name(message: Any) -> None:
        # Assigned, not changed inside: that gives the draft another ten minutes.
        message.session.draft = {"step": "age", "name": message.text}
        say(message, "How old are you?")

    @bot.message_handler(func=at("age"))
    def take_age(message: Any) -> None:
        if not message.text.isdecimal():
            say(message, "A number, please.")
            return
        name = message.session.pop("draft")["name"]
        message.session.person = {"name": name, "age": int(message.text)}
        say(message, f"Done. Nice to meet you, {name}!")

    @bot.message_handler(func=lambda message: True)
    def anything_else(message: Message) -> None:
        say(message, "Say /start to fill in the form, /cancel to leave it, /me to see it.")

    return bot


def main() -> None:
    """Run the bot, or the short chat."""
    parser = argparse.ArgumentParser(description="A bot with a form.")
    parser.add_argument("--offline", action="store_true", help="play a short chat without Telegram")
    options = parser.parse_args()

    sessions = SessionManager()
    if options.offline:
        chat = ["/start", "Alex", "/cancel", "Hm", "/start", "Alex", "old enough", "33", "/me"]
        play(make_bot(TOKEN, sessions), chat)
    elif token := os.environ.get("TOKEN"):
        bot = make_bot(token, sessions)
        bot.infinity_polling()
        bot.stop_bot()  # waits for handlers that are running
    else:
        sys.exit("Set TOKEN to the token of your bot, or try --offline.")


if __name__ == "__main__":
    main()
