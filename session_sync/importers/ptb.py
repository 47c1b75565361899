"""What python-telegram-bot's PicklePersistence has written. telegram is not imported.

In one file there is a dict of all kinds of data. In several, whose names begin alike, there is one
kind in each. `user_data` and `chat_data` are dicts of dicts, by id; a bot of PTB 13 wrote
defaultdicts. The steps of conversations and PTB's cache of callback data are for PTB alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from session_sync.errors import SessionDecodeError
from session_sync.keys import StorageKey

from .pickles import PERSISTENT, Thing, read_pickle
from .plain import (
    Imported,
    RefusedError,
    an_id,
    by_name,
    imported,
    named,
    pairs_of,
    plain_fields,
    unnamed,
)

#: Where `bot_data` goes, as in docs/migrating/ptb.md.
BOT: Final = StorageKey(key="bot")

_VALUES: Final = ([str], [int], [float])

_BY_ID: Final[dict[str, Callable[[int], StorageKey]]] = {
    "user_data": lambda user: StorageKey(user=user),
    "chat_data": lambda chat: StorageKey(chat=chat),
}
_KINDS: Final = (*_BY_ID, "bot_data")
_FILE: Final = "the filepath that the bot gives PicklePersistence"


def ptb_pickle(source: str) -> Iterator[Imported]:
    """The sessions in the file or the files of a PicklePersistence.

    Each user's `user_data` is that of `by_user`, each chat's `chat_data` that of `by_chat`, and
    `bot_data` lies under `StorageKey(key="bot")`. What is empty is left out.

    Args:
        source: the path as the bot gave it, also if it is only the beginning of several (with
            `single_file=False`).

    Raises:
        OSError: a file cannot be read, or there is none.
        ValueError: it is no such file.
    """
    data = _data(source)
    for kind, key_of in _BY_ID.items():
        if data.get(kind) is not None:  # as it is where PTB was told not to store it
            yield from _each(kind, data[kind], key_of)
    if data.get("bot_data") is not None:
        yield from imported(str(BOT), partial(plain_fields, data["bot_data"], _meaning))


def _data(source: str) -> dict[str, Any]:
    """Each kind of data that there is."""
    if Path(source).exists():
        data: dict[str, Any] = _read(source, by_name)
        if not data.keys() & _BY_ID.keys():
            raise SessionDecodeError(
                f"{source!r} has neither user_data nor chat_data; it should be {_FILE}. Of several "
                f"files, name what their names begin with: 'bot' for bot_user_data"
            )
        return data
    files = {kind: f"{source}_{kind}" for kind in _KINDS}
    found = {kind: name for kind, name in files.items() if Path(name).exists()}
    if not found:
        raise FileNotFoundError(
            f"there is no file {source!r}, nor {files['user_data']!r}; it should be {_FILE}"
        )
    return {kind: _read(name, lambda value: value) for kind, name in found.items()}


def _read(name: str, of: Callable[[Any], Any]) -> Any:
    """What `of` makes of the pickle in a file."""
    try:
        return of(read_pickle(Path(name).read_bytes()))
    except RefusedError as refused:
        why = refused.reason
    except ValueError as error:
        why = str(error)
    raise SessionDecodeError(f"{name!r} {why}; it should be {_FILE}")


def _each(kind: str, data: Any, key_of: Callable[[int], StorageKey]) -> Iterator[Imported]:
    """The sessions of all users, or of all chats."""
    try:
        records = list(pairs_of(data))
    except RefusedError as refused:
        yield unnamed(kind, f"it {refused.reason}")
        return
    for number, record in records:
        try:
            key = str(key_of(an_id(number)))
        except (TypeError, ValueError):
            yield unnamed(f"{kind}[{named(number)}]", "this is no id of Telegram's")
        else:
            yield from imported(key, partial(plain_fields, record, _meaning))


def _meaning(thing: Thing) -> Any:
    """What PTB has put into the place of a bot has its class; a member of an enum of PTB's, such as
    `ChatType.PRIVATE`, is the str or the number that it is, as a storage would keep it."""
    if thing.name == PERSISTENT:
        return Thing("telegram.Bot")
    if thing.name.startswith("telegram.constants.") and list(map(type, thing.args)) in _VALUES:
        return thing.args[0]
    return thing
