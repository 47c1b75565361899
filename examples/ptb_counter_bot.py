"""A bot that counts your messages, and goes on counting after a restart: python-telegram-bot.

For Telegram: TOKEN=... python examples/ptb_counter_bot.py
A short chat on this machine, without a token: python examples/ptb_counter_bot.py --offline
Run it twice: the second chat goes on where the first one ended. So does counter_bot.py, the same
bot for telebot: a session's key does not depend on the library.
"""

import argparse
import os
import sys
from typing import Any

from offline import play_ptb
from telegram import Update
from telegram.ext import Application, ApplicationBuilder, CommandHandler, MessageHandler, filters

from session_sync import DiskStorage, Session, SessionManager
from session_sync.ptb import SessionContext, install

AnyBuilder = ApplicationBuilder[Any, Any, Any, Any, Any, Any]
AnyApplication = Application[Any, Any, Any, Any, Any, Any]


async def forget(update: Update, context: SessionContext[Session]) -> None:
    """Empty the session."""
    assert update.effective_message is not None
    context.session = None
    await update.effective_message.reply_text("Forgotten.")


async def count(update: Update, context: SessionContext[Session]) -> None:
    """Answer with a number."""
    assert update.effective_message is not None
    context.session.counter = context.session.get("counter", 0) + 1
    await update.effective_message.reply_text(f"That was message {context.session.counter}.")


def make_application(builder: AnyBuilder, sessions: SessionManager[Session]) -> AnyApplication:
    """The bot, with a session for each of its users."""
    # How many updates PTB handles at a time; without this, one. A user's own are handled one after
    # the other all the same, and those that wait for an earlier one do not count.
    builder = builder.concurrent_updates(256)
    application = install(builder, sessions).build()
    application.add_handler(CommandHandler("forget", forget))
    application.add_handler(MessageHandler(filters.ALL, count))
    return application


def main() -> None:
    """Run the bot, or the short chat."""
    parser = argparse.ArgumentParser(description="A bot that counts your messages.")
    parser.add_argument("--offline", action="store_true", help="play a short chat without Telegram")
    parser.add_argument("--directory", default="sessions", help="where the sessions are kept")
    options = parser.parse_args()

    with SessionManager(storage=DiskStorage(options.directory)) as sessions:
        if options.offline:
            chat = ["Hello!", "Are you counting?", "And now?"]
            play_ptb(lambda builder: make_application(builder, sessions), chat)
        elif token := os.environ.get("TOKEN"):
            make_application(Application.builder().token(token), sessions).run_polling()
        else:
            sys.exit("Set TOKEN to the token of your bot, or try --offline.")


if __name__ == "__main__":
    main()
