"""What python-telegram-bot's PicklePersistence has written. telegram is not imported.

In one file there is a dict of all kinds of data. In several, whose names begin alike, there is one
kind in each. `user_data` and `chat_data` are dicts of dicts, by id; a bot of PTB 13 wrote
defaultdicts. The steps of conversations and PTB's cache of callback data are for PTB alone.

This module knows what PTB's persistence stores; it knows no store of this library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from session_sync.errors import SessionDecodeError
from session_sync.session.keys import StorageKey

from .pickles import PERSISTENT, ExhaustedError, Thing, read_pickle
from .plain import Imported, Reader, RefusedError, an_id, imported, named, unnamed

#: Where `bot_data` goes, as in docs/migrating/ptb.md.
BOT: Final = StorageKey(key="bot")

_VALUES: Final = (str, int, float)

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
    try:
        yield from _sessions(source)
    except ExhaustedError as error:
        raise SessionDecodeError(f"{source!r} {error}; it should be {_FILE}") from None


def _sessions(source: str) -> Iterator[Imported]:
    data = _data(source)
    for kind, key_of in _BY_ID.items():
        if kind in data:
            yield from _each(kind, *data[kind], key_of)
    if "bot_data" in data:
        reader, value = data["bot_data"]
        yield from imported(str(BOT), partial(reader.fields, value, _meaning))


def _data(source: str) -> dict[str, tuple[Reader, Any]]:
    """Each kind of data that there is, and its reader."""
    if Path(source).exists():
        reader, data = _read(source, Reader.by_name)
        if not data.keys() & _BY_ID.keys():
            raise SessionDecodeError(
                f"{source!r} has neither user_data nor chat_data; it should be {_FILE}. Of several "
                f"files, name what their names begin with: 'bot' for bot_user_data"
            )
        # None, where PTB was told not to store it.
        return {kind: (reader, value) for kind, value in data.items() if value is not None}
    files = {kind: f"{source}_{kind}" for kind in _KINDS}
    found = {kind: name for kind, name in files.items() if Path(name).exists()}
    if not found:
        raise FileNotFoundError(
            f"there is no file {source!r}, nor {files['user_data']!r}; it should be {_FILE}"
        )
    read = {kind: _read(name, lambda _reader, value: value) for kind, name in found.items()}
    return {kind: (reader, value) for kind, (reader, value) in read.items() if value is not None}


def _read(name: str, of: Callable[[Reader, Any], Any]) -> tuple[Reader, Any]:
    """What `of` makes of the pickle in a file, and the reader of the rest."""
    data = Path(name).read_bytes()
    reader = Reader(len(data))
    try:
        return reader, of(reader, read_pickle(data))
    except RefusedError as refused:
        why = refused.reason
    except ValueError as error:
        why = str(error)
    raise SessionDecodeError(f"{name!r} {why}; it should be {_FILE}")


def _each(
    kind: str, reader: Reader, data: Any, key_of: Callable[[int], StorageKey]
) -> Iterator[Imported]:
    """The sessions of all users, or of all chats."""
    try:
        records = list(reader.pairs_of(data))
    except RefusedError as refused:
        yield unnamed(kind, f"it {refused.reason}")
        return
    for number, record in records:
        try:
            key = str(key_of(an_id(number)))
        except (TypeError, ValueError):
            yield unnamed(f"{kind}[{named(number)}]", "this is no id of Telegram's")
        else:
            yield from imported(key, partial(reader.fields, record, _meaning))


def _meaning(_reader: Reader, thing: Thing) -> Any:
    """What PTB has put into the place of a bot has its class; a member of an enum of PTB's, such as
    `ChatType.PRIVATE`, is the str or the number that it is, as a storage would keep it."""
    if thing.name == PERSISTENT:
        return Thing("telegram.Bot")
    if thing.name.startswith("telegram.constants.") and len(thing.args) == 1:
        (value,) = thing.args
        return value if type(value) in _VALUES else thing
    return thing
