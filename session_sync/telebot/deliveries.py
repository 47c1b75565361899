"""Updates that come again: their IDs are on what telebot makes no task of, the Update objects.

This module knows Update objects and what is in them; it does not know which have come before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from ..lifecycle.update import Delivery

#: The deliveries of the updates that are just being processed, by the id of what is in them.
delivered: Final[ContextVar[Mapping[int, Delivery]]] = ContextVar("session_sync_delivered")

_NO_DELIVERIES: Final[Mapping[int, Delivery]] = {}


def deliveries(updates: Iterable[Any]) -> dict[int, Delivery]:
    """Those of Update objects, for `delivered`."""
    inside = ((update, getattr(update, kind_of(update) or "", None)) for update in updates)
    return {id(payload): Delivery(update.update_id) for update, payload in inside}


def delivery_of(update: object) -> Delivery | None:
    """The delivery of what is in an Update, if any session has to know of it."""
    return delivered.get(_NO_DELIVERIES).get(id(update))


def kind_of(update: Any) -> str | None:
    """The name of the one field that an update has besides its number."""
    if update.message is not None:  # the one that most have
        return "message"
    named = (name for name, value in vars(update).items() if value is not None)
    return next((name for name in named if name != "update_id"), None)
