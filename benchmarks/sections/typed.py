"""What declared fields cost: one update of a typed session, next to the same of an untyped one.

The same fields and the same handlers, in memory (where there is nothing else that costs) and on
SQLite. Declared are plain types, and then a dataclass in a list, as bots have them in a cart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from session_sync import Session, SessionManager, field

from ..fields import SMALL, message
from ..setting import Place, Setting
from ..sides import ours
from ..tables import Table, table
from ..timing import Work


@dataclass
class Line:
    name: str
    price: int


class Small(Session):
    """The small session of the other benchmarks."""

    counter: int = 0
    step: str = "menu"
    user: dict[str, str] = field(default_factory=dict)
    cart: dict[str, list[str] | int] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)


class Cart(Session):
    counter: int = 0
    lines: list[Line] = field(default_factory=list)


LINES = [("tea", 4), ("milk", 2), ("bread", 3)]
PLAIN_CART = {"counter": 0, "lines": [{"name": name, "price": price} for name, price in LINES]}
TYPED_CART = {"counter": 0, "lines": [Line(name, price) for name, price in LINES]}

Handler = Callable[[Any], object]


def adds(session: Any) -> None:
    session["counter"] += 1


def adds_by_attribute(session: Any) -> None:
    session.counter += 1


def adds_in_a_list(session: Any) -> None:
    session["seen"][0] += 1


def raises_a_price(session: Any) -> None:
    session["lines"][0]["price"] += 1


def raises_a_declared_price(session: Any) -> None:
    session.lines[0].price += 1


@dataclass(frozen=True)
class Pair:
    """What is done to an untyped session, and the same to a typed one."""

    untyped: Handler
    fields: dict[str, Any]
    typed: Handler
    session_type: type[Session]
    declared: dict[str, Any]


PAIRS = {
    '`session["counter"] += 1`': Pair(adds, SMALL, adds, Small, SMALL),
    "`session.counter += 1`": Pair(adds_by_attribute, SMALL, adds_by_attribute, Small, SMALL),
    '`session["seen"][0] += 1`': Pair(adds_in_a_list, SMALL, adds_in_a_list, Small, SMALL),
    "a price in 3 lines, dicts / dataclasses": Pair(
        raises_a_price, PLAIN_CART, raises_a_declared_price, Cart, TYPED_CART
    ),
}


def run(setting: Setting) -> list[Table]:
    """Each handler in memory and on SQLite."""
    rows = [*_rows(setting, "memory"), *_rows(setting, "SQLite")]
    title = "One update, typed and untyped, in microseconds"
    head = ("handler", "untyped", "typed", "typed / untyped")
    return [
        table("typed", title, "Median (quartiles).", head, rows),
        table(
            "typed_short",
            title,
            "Medians; the ratio is taken within each round.",
            head,
            ((name, *(spread.median for spread in spreads)) for name, *spreads in rows),
        ),
    ]


def _rows(setting: Setting, kind: str) -> Iterator[tuple[Any, ...]]:
    with Place(setting) as place:
        works = {}
        for name, pair in PAIRS.items():
            untyped = _sessions(place, kind, Session)
            works[f"untyped {name}"] = _work(untyped, pair.fields, pair.untyped)
            typed = _sessions(place, kind, pair.session_type)
            works[f"typed {name}"] = _work(typed, pair.declared, pair.typed)
        timings = setting.measure(works)
    for name in PAIRS:
        yield (
            f"{name}, {kind}",
            timings.of(f"untyped {name}") * 1e6,
            timings.of(f"typed {name}") * 1e6,
            timings.ratio(f"typed {name}", to=f"untyped {name}"),
        )


def _sessions(place: Place, kind: str, session_type: type[Session]) -> SessionManager[Any]:
    return SessionManager(session_type, storage=ours.storage_of(place, kind))


def _work(sessions: SessionManager[Any], fields: dict[str, Any], handler: Handler) -> Work:
    update = message()
    with sessions.session_scope(update) as session:
        session.update(fields)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with sessions.session_scope(update) as session:
                handler(session)

    return work
