"""The sessions that are measured, and a user's message that they belong to."""

from __future__ import annotations

from typing import Any, Final

import telebot

USER: Final = 700_000_001
TOKEN: Final = "123456789:benchmark"  # belongs to nobody; nothing here goes to the network

# So many digits from the first to the last update: what is stored keeps its length.
COUNTER: Final = 1_000_000

# The small session is one as bots have them. telebot copies what is nested, so for it a session of
# plain values alone is cheaper, and that is measured as well.
SMALL: Final[dict[str, Any]] = {
    "counter": COUNTER,
    "step": "menu",
    "user": {"name": "Alex", "language": "en"},
    "cart": {"items": ["tea", "milk"], "total": 7},
    "seen": [1, 2, 3],
}
FLAT: Final[dict[str, Any]] = {
    "counter": COUNTER,
    "name": "Alex",
    "language": "en",
    "step": "menu",
    "paid": False,
}
LARGE: Final[dict[str, Any]] = {
    "counter": COUNTER,
    **{f"field{n}": {"id": n, "items": [n, n + 1], "name": f"item {n}"} for n in range(999)},
}
TEXT: Final[dict[str, Any]] = {
    **SMALL,
    "text": ('She said: "Tea, please."\n' * 4_097)[: 100 * 1_024],
}
SESSIONS: Final = {"small": SMALL, "flat": FLAT, "large": LARGE, "text": TEXT}
TITLES: Final = {
    "small": "small session",
    "flat": "small session, nothing nested",
    "large": "1,000 fields, nested",
    "text": "small session and 100 KB of text",
}


def message(user: int = USER) -> Any:
    """A private message, made by telebot of the JSON that the Bot API sends."""
    return telebot.types.Message.de_json(message_json(user))


def message_json(user: int) -> dict[str, Any]:
    return {
        "message_id": 1,
        "date": 1_700_000_000,
        "from": {"id": user, "is_bot": False, "first_name": "Alex", "language_code": "en"},
        "chat": {"id": user, "type": "private", "first_name": "Alex"},
        "text": "hi",
    }
