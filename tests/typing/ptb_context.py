"""What type checkers know of `context.session`. Never run: mypy and pyright read it."""

from typing import assert_type

from telegram import Update
from telegram.ext import Application, CommandHandler, ContextTypes, filters

from session_sync import Session, SessionManager
from session_sync.ptb import SessionContext, install, session_filter


class MySession(Session):
    pass


class OwnContext(SessionContext[MySession]):
    greeting: str


class MyChatSession(Session):
    pass


async def start(update: Update, context: SessionContext[MySession]) -> None:
    assert_type(context.session, MySession)
    context.session = {"counter": 1}
    context.session = None
    context.session = 5  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]


async def greet(update: Update, context: OwnContext) -> None:
    assert_type(context.session, MySession)
    assert_type(context.greeting, str)


async def lazily(update: Update, context: SessionContext[MySession]) -> None:
    assert_type(await context.session, MySession)


async def untyped(update: Update, context: SessionContext[MySession]) -> None:
    assert_type(context.chat_session, Session)


async def both(update: Update, context: SessionContext[MySession, MyChatSession]) -> None:
    assert_type(context.session, MySession)
    assert_type(context.chat_session, MyChatSession)
    assert_type(await context.chat_session, MyChatSession)
    context.chat_session = {"total": 1}
    context.chat_session = None
    context.chat_session = 5  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]


class OwnOfBoth(SessionContext[MySession, MyChatSession]):
    pass


async def own_of_both(update: Update, context: OwnOfBoth) -> None:
    assert_type(context.chat_session, MyChatSession)


application = install(Application.builder().token("1:token"), SessionManager(MySession)).build()
application.add_handler(CommandHandler("start", start))
application.add_handler(CommandHandler("start", greet))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

chats = SessionManager(MyChatSession)
two = install(
    Application.builder().token("1:token"), SessionManager(MySession), chat_session=chats
).build()
two.add_handler(CommandHandler("start", both))
two.add_handler(CommandHandler("start", untyped))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

types = ContextTypes(context=OwnContext)
own = install(
    Application.builder().token("1:token").context_types(types), SessionManager(MySession)
)
own.build().add_handler(CommandHandler("start", greet))
assert_type(filters.TEXT & session_filter(bool), filters.BaseFilter)
