"""What type checkers know of declared fields. Never run: mypy and pyright read it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, assert_type

from telegram import Update
from telegram.ext import Application, CommandHandler

import session_sync.ptb
from session_sync import (
    Session,
    SessionManager,
    SessionScope,
    StrictSession,
    field,
    ttl,
)
from session_sync.ptb import SessionContext


@dataclass
class Item:
    name: str
    price: int


def split_name(fields: dict[str, Any]) -> None:
    fields["first"], fields["last"] = fields.pop("name").split()


def add_total(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "total": 0}


class Cart(Session):
    migrations = {2: split_name, 3: add_total}
    migrate_eagerly = True
    lines: list[Item] = field(default_factory=list)
    counter: int = 0
    theme: Literal["light", "dark"] = "light"
    seen: datetime | None = None
    name: str


class Strict(StrictSession):
    counter: int = 0
    lines: list[Item] = field(default_factory=list)


carts = SessionManager(Cart)
assert_type(carts, SessionManager[Cart])
assert_type(SessionManager(), SessionManager[Session])
assert_type(carts.session_scope("user:1"), SessionScope[Cart])
assert_type(carts.migrate_all(print), int)

with carts.session_scope("user:1") as cart:
    assert_type(cart, Cart)
    assert_type(cart.counter, int)
    assert_type(cart.lines, list[Item])
    assert_type(cart.lines[0].price, int)
    assert_type(cart.seen, datetime | None)
    cart.counter += 1
    cart.theme = "dark"
    cart.seen = datetime.now()
    cart.name = ttl("Alex", 300)
    cart.undeclared = 5  # free-form
    assert_type(cart.other, Any)
    assert_type(cart["counter"], Any)
    cart.counter = "5"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    cart.theme = "blue"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    cart.lines.append("tea")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    cart.lines[0].prize  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


class Wrong(Session):
    counter: int = "5"  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]


with SessionManager(Strict).session_scope("user:1") as strict:
    assert_type(strict, Strict)
    assert_type(strict.counter, int)
    strict.counter += 1
    strict.countre = 5  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
    strict.countre += 1  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
    strict.flush()


async def opened() -> None:
    async with carts.session_scope("user:1") as session:
        assert_type(session, Cart)
        assert_type(await session, Cart)
        await session.aflush()


# -- decorated handlers keep their signature


@carts.with_session
def start(message: Update, session: Cart) -> int:
    return session.counter


@carts.with_session
async def astart(message: Update, session: Cart) -> int:
    return session.counter


class Bot:
    @carts.with_session
    def start(self, message: Update, session: Cart) -> str:
        return session.theme


takes_start: Callable[[Update, Cart], int] = start
wrong_start: Callable[[Update, Cart], str] = start  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]


async def calls(update: Update, cart: Cart) -> None:
    assert_type(start(update, cart), int)
    assert_type(await astart(update, session=cart), int)
    assert_type(Bot().start(update, cart), str)
    start(5, cart)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# -- python-telegram-bot


async def buy(update: Update, context: SessionContext[Cart]) -> None:
    assert_type(context.session, Cart)
    context.session.lines.append(Item("tea", 4))
    context.session.counter = "5"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]


async def buy_strictly(update: Update, context: SessionContext[Strict]) -> None:
    assert_type(context.session, Strict)
    context.session.countre  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


builder = Application.builder().token("1:token")
application = session_sync.ptb.install(builder, carts).build()
application.add_handler(CommandHandler("buy", buy))
application.add_handler(CommandHandler("buy", buy_strictly))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

# -- options

SessionManager(migrations={2: split_name, 3: add_total}, migrate_eagerly=True)
SessionManager(migrations={"2": split_name})  # type: ignore[dict-item] # pyright: ignore[reportArgumentType]
SessionManager(int)  # type: ignore[type-var] # pyright: ignore[reportArgumentType]
