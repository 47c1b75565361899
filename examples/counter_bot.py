"""A bot that counts your messages, and goes on counting after a restart.

For Telegram: TOKEN=... python examples/counter_bot.py
A short chat on this machine, without a token: python examples/counter_bot.py --offline
Run it twice: the second chat goes on where the first one ended.
"""
# mypy: disallow-untyped-decorators=False
# (telebot's decorators have no types)

import argparse
import os
import sys
from typing import Any

import telebot
from offline import TOKEN, play

import session_sync.telebot
from session_sync import DiskStorage, Session, SessionManager


def make_bot(token: str, sessions: SessionManager[Session]) -> telebot.TeleBot:
    """The bot, with a session for each of its users."""
    bot = telebot.TeleBot(token)
    session_sync.telebot.install(bot, sessions)

    @bot.message_handler(commands=["forget"])
    def forget(message: Any) -> None:
        message.session = None
        bot.send_message(message.chat.id, "Forgotten.")

    @bot.message_handler(func=lambda message: True)
    def count(message: Any) -> None:
        message.session.counter = message.session.get("counter", 0) + 1
        bot.send_message(message.chat.id, f"That was message {message.session.counter}.")

    return bot


def main() -> None:
    """Run the bot, or the short chat."""
    parser = argparse.ArgumentParser(description="A bot that counts your messages.")
    parser.add_argument("--offline", action="store_true", help="play a short chat without Telegram")
    parser.add_argument("--directory", default="sessions", help="where the sessions are kept")
    options = parser.parse_args()

    with SessionManager(storage=DiskStorage(options.directory)) as sessions:
        if options.offline:
            play(make_bot(TOKEN, sessions), ["Hello!", "Are you counting?", "And now?"])
        elif token := os.environ.get("TOKEN"):
            bot = make_bot(token, sessions)
            bot.infinity_polling()
            bot.stop_bot()  # waits for handlers that are running
        else:
            sys.exit("Set TOKEN to the token of your bot, or try --offline.")


if __name__ == "__main__":
    main()
