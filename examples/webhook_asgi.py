"""A python-telegram-bot bot on webhooks, in four processes, that loses no message.

    export TOKEN=... WEBHOOK_SECRET=... SESSION_SYNC_STORAGE=sqlite:///sessions.db
    uvicorn --app-dir examples --workers 4 webhook_asgi:app

As webhook_flask.py, but asynchronous: one process handles many updates at a time.
"""

import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from telegram import Update
from telegram.ext import Application, MessageHandler, filters

from session_sync import Session, SessionManager, storage_from_url
from session_sync.ptb import SessionContext, install

sessions = SessionManager(
    storage=storage_from_url(os.environ.get("SESSION_SYNC_STORAGE", "sqlite:///sessions.db"))
)
builder = Application.builder().token(os.environ["TOKEN"]).updater(None)
if "BOT_API" in os.environ:  # another Bot API server than Telegram's
    builder = builder.base_url(os.environ["BOT_API"])
application = install(builder, sessions).build()


async def count(update: Update, context: SessionContext[Session]) -> None:
    """Answer with a number."""
    assert update.effective_message is not None
    context.session.counter = context.session.get("counter", 0) + 1
    await update.effective_message.reply_text(f"That was message {context.session.counter}.")


application.add_handler(MessageHandler(filters.ALL, count))


async def hook(request: Request) -> Response:
    """One update. `process_update` is where a session is opened, so any web framework will do."""
    secret = request.headers.get("X-Telegram-Bot-Api-Secret-Token", "")
    if not hmac.compare_digest(secret, os.environ["WEBHOOK_SECRET"]):
        return Response(status_code=403)
    update = Update.de_json(await request.json(), application.bot)
    await application.process_update(update)
    return Response()


@asynccontextmanager
async def running(_: Starlette) -> AsyncIterator[None]:
    """PTB's application lives as long as the server."""
    async with application:
        await application.start()
        yield
        await application.stop()


app = Starlette(routes=[Route("/hook", hook, methods=["POST"])], lifespan=running)
