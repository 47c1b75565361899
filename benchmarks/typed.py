"""What declared fields cost: one update of a typed session, next to the same of an untyped one.

The same fields and the same handlers, in memory (where there is nothing else that costs) and on
SQLite. Declared are plain types, and then a dataclass in a list, as bots have them in a cart.

    python -m benchmarks.typed
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from session_sync import MemoryStorage, Session, SessionManager, SQLiteStorage, field

from .overhead import SMALL
from .peers import message
from .timing import Case, arguments, measure, print_machine, table


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


# What is done, and how: untyped with its fields, typed with its class and fields.
Row = tuple[str, Handler, dict[str, Any], Handler, type[Session], dict[str, Any]]
ROWS: list[Row] = [
    ("session['counter'] += 1", adds, SMALL, adds, Small, SMALL),
    ("session.counter += 1", adds_by_attribute, SMALL, adds_by_attribute, Small, SMALL),
    ("session['seen'][0] += 1", adds_in_a_list, SMALL, adds_in_a_list, Small, SMALL),
    (
        "a price in 3 lines, dicts / dataclasses",
        raises_a_price,
        PLAIN_CART,
        raises_a_declared_price,
        Cart,
        TYPED_CART,
    ),
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--updates", type=int, default=2_000, help="in one round")
    options = parser.parse_args()
    print_machine(options.rounds)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for kind in ("memory", "SQLite"):
            cases = []
            for number, (name, plain, fields, typed, cls, declared) in enumerate(ROWS):
                for how, handler, session_type, contents in (
                    ("untyped", plain, Session, fields),
                    ("typed", typed, cls, declared),
                ):
                    storage: Any = MemoryStorage()
                    if kind == "SQLite":
                        storage = SQLiteStorage(f"{folder}/{number}{how}")
                        stack.callback(storage.close)
                    few = options.updates if kind == "memory" else max(1, options.updates // 10)
                    work = _work(SessionManager(session_type, storage=storage), contents, handler)
                    cases.append(Case(f"{how} {name}", work, few))
            timings = measure(cases, options.rounds)
            rows = (
                (
                    name,
                    timings.of(f"untyped {name}").show(1e6),
                    timings.of(f"typed {name}").show(1e6),
                    timings.ratio(f"typed {name}", to=f"untyped {name}").show(),
                )
                for name, *_ in ROWS
            )
            print(f"One update, {kind}, microseconds\n")
            print(table(("handler", "untyped", "typed", "typed / untyped"), rows))
            print()


def _work(
    sessions: SessionManager[Any], fields: dict[str, Any], handler: Handler
) -> Callable[[int], object]:
    update = message()
    with sessions.session_scope(update) as session:
        session.update(fields)

    def work(times: int) -> None:
        for _ in itertools.repeat(None, times):
            with sessions.session_scope(update) as session:
                handler(session)

    return work


if __name__ == "__main__":
    main()
