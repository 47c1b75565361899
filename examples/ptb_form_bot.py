"""A form across several messages: name, age, done. A ConversationHandler, kept in the session.

For Telegram: TOKEN=... python examples/ptb_form_bot.py
A short chat on this machine, without a token: python examples/ptb_form_bot.py --offline

The session has the step and the answers. A draft that is left alone is forgotten.
"""

import argparse
import os
import sys
from typing import Any

from offline import play_ptb
from telegram import Update
from telegram.ext import (
    Application,
    ApplicationBuilder,
    CommandHandler,
    MessageHandler,
    filters,
)

from session_sync import Session, SessionManager, ttl
from session_sync.ptb import ConversationHandler, SessionContext, install

AnyBuilder = ApplicationBuilder[Any, Any, Any, Any, Any, Any]
AnyApplication = Application[Any, Any, Any, Any, Any, Any]

TEN_MINUTES = 600  # seconds
NAME, AGE = range(2)


async def say(update: Update, text: str) -> None:
    """Answer the user."""
    assert update.effective_message is not None
    await update.effective_message.reply_text(text)


def text_of(update: Update) -> str:
    """What the user wrote."""
    assert update.effective_message is not None
    return update.effective_message.text or ""


async def start(update: Update, context: SessionContext[Session]) -> int:
    """Begin the form, or begin it anew."""
    context.session.draft = ttl({}, TEN_MINUTES)
    await say(update, "What is your name?")
    return NAME


async def take_name(update: Update, context: SessionContext[Session]) -> int:
    """The first answer."""
    if "draft" not in context.session:
        return await too_late(update)
    # Assigned, not changed inside: that gives the draft another ten minutes.
    context.session.draft = {"name": text_of(update)}
    await say(update, "How old are you?")
    return AGE


async def take_age(update: Update, context: SessionContext[Session]) -> int:
    """The last answer."""
    if "draft" not in context.session:
        return await too_late(update)
    if not text_of(update).isdecimal():
        await say(update, "A number, please.")
        return AGE
    name = context.session.pop("draft")["name"]
    context.session.person = {"name": name, "age": int(text_of(update))}
    await say(update, f"Done. Nice to meet you, {name}!")
    return ConversationHandler.END


async def too_late(update: Update) -> int:
    """The draft has been forgotten, while the step is still known."""
    await say(update, "That took too long. /start again.")
    return ConversationHandler.END


async def cancel(update: Update, context: SessionContext[Session]) -> int:
    """Leave the form."""
    context.session.pop("draft", None)
    await say(update, "Cancelled.")
    return ConversationHandler.END


async def me(update: Update, context: SessionContext[Session]) -> None:
    """Show what was filled in."""
    person = context.session.get("person")
    await say(update, f"{person['name']}, {person['age']}" if person else "Who are you? /start")


async def anything_else(update: Update, context: SessionContext[Session]) -> None:
    """Outside of the form."""
    await say(update, "Say /start to fill in the form, /cancel to leave it, /me to see it.")


def make_application(builder: AnyBuilder, sessions: SessionManager[Session]) -> AnyApplication:
    """The bot. PTB asks for no `concurrent_updates` with its own ConversationHandler, because the
    next answer could come before the step has changed; here a user's next update waits for that."""
    application = install(builder.concurrent_updates(256), sessions).build()
    answer = filters.TEXT & ~filters.COMMAND
    form = ConversationHandler(
        entry_points=[CommandHandler("start", start)],
        states={NAME: [MessageHandler(answer, take_name)], AGE: [MessageHandler(answer, take_age)]},
        fallbacks=[CommandHandler("cancel", cancel)],
        allow_reentry=True,
        name="form",
    )
    application.add_handlers([CommandHandler("me", me), form])
    application.add_handler(MessageHandler(filters.ALL, anything_else))
    return application


def main() -> None:
    """Run the bot, or the short chat."""
    parser = argparse.ArgumentParser(description="A bot with a form.")
    parser.add_argument("--offline", action="store_true", help="play a short chat without Telegram")
    options = parser.parse_args()

    sessions = SessionManager()
    if options.offline:
        chat = ["/start", "Alex", "/cancel", "Hm", "/start", "Alex", "old enough", "33", "/me"]
        play_ptb(lambda builder: make_application(builder, sessions), chat)
    elif token := os.environ.get("TOKEN"):
        make_application(Application.builder().token(token), sessions).run_polling()
    else:
        sys.exit("Set TOKEN to the token of your bot, or try --offline.")


if __name__ == "__main__":
    main()
