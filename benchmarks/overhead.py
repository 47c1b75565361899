"""What one update costs, next to telebot's own `retrieve_data` and to bare diskcache.

An update in session_sync derives the key from the message, locks it, loads the session, reads the
counter and adds 1, saves and unlocks. telebot is given the ids by its user, does not lock, and
copies all fields. Both in memory and in one thread, with nobody else about.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import diskcache
from telebot.storage import StateMemoryStorage

from session_sync import Codec, DiskStorage, MemoryStorage, SessionManager
from session_sync.storages.disk import _SETTINGS as DISK_SETTINGS

from .peers import USER, message, telebot_with
from .timing import Case, Timings, arguments, measure, print_machine, table

# The small session is one as bots have them; telebot copies what is nested, so for it a session of
# plain values alone is cheaper, and that is measured as well.
SMALL = {
    "counter": 0,
    "step": "menu",
    "user": {"name": "Alex", "language": "en"},
    "cart": {"items": ["tea", "milk"], "total": 7},
    "seen": [1, 2, 3],
}
PLAIN = {"counter": 0, "name": "Alex", "language": "en", "step": "menu", "paid": False}
LARGE = {
    "counter": 0,
    **{f"field{n}": {"id": n, "items": [n, n + 1], "name": f"item {n}"} for n in range(999)},
}
SESSIONS = {"5": SMALL, "5, none of them nested": PLAIN, "1,000": LARGE}

Work = Callable[[int], object]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=51)
    parser.add_argument("--updates", type=int, default=2_000, help="in one round")
    options = parser.parse_args()
    print_machine(options.rounds)
    _against_telebot(options.updates, options.rounds)
    _kinds_of_update(options.updates, options.rounds)
    _on_disk(options.updates, options.rounds)


# -- one update that adds 1


def _against_telebot(updates: int, rounds: int) -> None:
    cases = []
    for name, fields in SESSIONS.items():
        few = max(1, updates // 200) if fields is LARGE else updates  # telebot: milliseconds each
        cases += [
            Case(f"ours {name}", _ours(fields, _adding), updates),
            Case(f"telebot {name}", _telebot(fields), few),
        ]
    timings = measure(cases, rounds)
    print("One update in memory that adds 1, microseconds\n")
    print(
        table(
            ("fields", "session_sync", "telebot", "session_sync / telebot"),
            (
                (
                    name,
                    _micros(timings, f"ours {name}"),
                    _micros(timings, f"telebot {name}"),
                    timings.ratio(f"ours {name}", to=f"telebot {name}").show(digits=4),
                )
                for name in SESSIONS
            ),
        )
    )
    small, large = next(iter(SESSIONS)), next(reversed(SESSIONS))
    ratio = timings.ratio(f"ours {large}", to=f"ours {small}").show()
    print(f"\nsession_sync, 1,000 fields / 5 fields: {ratio}\n")


def _telebot(fields: dict[str, Any]) -> Work:
    bot = telebot_with(StateMemoryStorage(), copy.deepcopy(fields))
    update = message()

    def work(times: int) -> None:
        for _ in itertools.repeat(None, times):
            with bot.retrieve_data(update.from_user.id, update.chat.id) as data:
                data["counter"] += 1

    return work


def _ours(
    fields: dict[str, Any], kind: Callable[[SessionManager[Any], Any, int], None], **options: Any
) -> Work:
    sessions: SessionManager[Any] = SessionManager(**{"storage": MemoryStorage(), **options})
    update = message()
    with sessions.session_scope(update) as session:
        session.update(copy.deepcopy(fields))
    return lambda times: kind(sessions, update, times)


def _adding(sessions: SessionManager[Any], update: Any, times: int) -> None:
    for _ in itertools.repeat(None, times):
        with sessions.session_scope(update) as session:
            session["counter"] += 1


# -- what else an update may do


def _adding_by_attribute(sessions: SessionManager[Any], update: Any, times: int) -> None:
    for _ in itertools.repeat(None, times):
        with sessions.session_scope(update) as session:
            session.counter += 1


def _reading(sessions: SessionManager[Any], update: Any, times: int) -> None:
    for _ in itertools.repeat(None, times):
        with sessions.session_scope(update) as session:
            session["counter"]


def _passing(sessions: SessionManager[Any], update: Any, times: int) -> None:
    for _ in itertools.repeat(None, times):
        with sessions.session_scope(update):
            pass


def _deriving(sessions: SessionManager[Any], update: Any, times: int) -> None:
    for _ in itertools.repeat(None, times):
        sessions.key_of(update)


def _kinds_of_update(updates: int, rounds: int) -> None:
    kinds = {
        "adds 1: session['counter'] += 1": _ours(SMALL, _adding),
        "adds 1: session.counter += 1": _ours(SMALL, _adding_by_attribute),
        "adds 1, lazy": _ours(SMALL, _adding, lazy=True),
        "reads": _ours(SMALL, _reading),
        "never touches the session": _ours(SMALL, _passing),
        "never touches the session, lazy": _ours(SMALL, _passing, lazy=True),
        "(the key alone)": _ours(SMALL, _deriving),
    }
    timings = measure([Case(name, work, updates) for name, work in kinds.items()], rounds)
    first = next(iter(kinds))
    print("One update of a session of 5 fields in memory\n")
    print(
        table(
            ("an update that", "microseconds", "to the first"),
            (
                (name, _micros(timings, name), timings.ratio(name, to=first).show())
                for name in kinds
            ),
        )
    )


# -- on disk


def _on_disk(updates: int, rounds: int) -> None:
    updates = max(1, updates // 20)
    with contextlib.ExitStack() as stack:
        kinds = {
            "diskcache, get and set bytes": _bare_diskcache(stack, Codec().encode(SMALL)),
            "diskcache, get and set a dict (a pickle)": _bare_diskcache(stack, SMALL),
            "session_sync, adds 1": _our_disk(stack, _adding),
            "session_sync, reads": _our_disk(stack, _reading),
        }
        timings = measure([Case(name, work, updates) for name, work in kinds.items()], rounds)
    first = next(iter(kinds))
    print("\nOne update of a session of 5 fields on disk, same settings of diskcache\n")
    print(
        table(
            ("", "microseconds", "to the first"),
            (
                (name, _micros(timings, name), timings.ratio(name, to=first).show())
                for name in kinds
            ),
        )
    )


def _bare_diskcache(stack: contextlib.ExitStack, value: Any) -> Work:
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    cache = stack.enter_context(diskcache.Cache(directory, **DISK_SETTINGS))
    key = f"user:{USER}:chat:{USER}"
    cache.set(key, value)

    def work(times: int) -> None:
        for _ in itertools.repeat(None, times):
            cache.set(key, cache.get(key))

    return work


def _our_disk(
    stack: contextlib.ExitStack, kind: Callable[[SessionManager[Any], Any, int], None]
) -> Work:
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    storage = DiskStorage(directory)
    stack.callback(storage.close)
    return _ours(SMALL, kind, storage=storage)


def _micros(timings: Timings, name: str) -> str:
    return timings.of(name).show(scale=1e6)


if __name__ == "__main__":
    main()
