"""python-telegram-bot's `user_data`, written by `update_persistence` after each update.

PTB itself does that once a minute; here an update ends when what it changed is in the file (with
DictPersistence: in the memory of the persistence), as with everybody else. Only `user_data` is
kept, in a pickle of its own (`single_file=False`), which is the smaller one to write. PTB copies
the user's data and compares them with what was written last; if they differ, it writes the file of
all users over, so that a process that dies meanwhile leaves half of it.
"""

from __future__ import annotations

import copy
import os
from itertools import repeat
from typing import Any

from telegram.ext import (
    Application,
    BasePersistence,
    DictPersistence,
    PersistenceInput,
    PicklePersistence,
)

from ..fields import TOKEN, USER
from ..setting import Place
from ..timing import Work

_USER_DATA = PersistenceInput(bot_data=False, chat_data=False, user_data=True, callback_data=False)

AnyPersistence = BasePersistence[dict[Any, Any], dict[Any, Any], dict[Any, Any]]


def persistence_of(place: Place, kind: str) -> AnyPersistence:
    """A new persistence: "pickle" or "dict"."""
    if kind == "dict":
        return DictPersistence(store_data=_USER_DATA)
    return pickle_in(os.path.join(place.folder(), "data"))


def pickle_in(path: str) -> AnyPersistence:
    """The persistence that has its pickle in `path`, with its suffix `_user_data`."""
    return PicklePersistence(path, store_data=_USER_DATA, single_file=False, on_flush=False)


def application_with(persistence: AnyPersistence) -> Application[Any, Any, Any, Any, Any, Any]:
    """An application that asks nobody who it is: for that it would need a server."""
    application = Application.builder().token(TOKEN).persistence(persistence).build()
    persistence.set_bot(application.bot)
    return application


def adding(place: Place, kind: str, fields: dict[str, Any]) -> Work:
    """Updates that read a counter and add 1."""
    application = application_with(persistence_of(place, kind))
    application.user_data[USER].update(copy.deepcopy(fields))

    async def many(times: int) -> None:
        for _ in repeat(None, times):
            application.user_data[USER]["counter"] += 1
            application.mark_data_for_update_persistence(user_ids=USER)
            await application.update_persistence()

    return lambda times: place.loop.run_until_complete(many(times))
