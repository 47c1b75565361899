"""What pyTelegramBotAPI's StatePickleStorage has written, and the names that it has in common with
StateRedisStorage. telebot, of which 4.7.1 and newer are read, is not imported.

Until 4.22 a record was found by its chat, and in that by its user:
`{chat: {user: {"state": ..., "data": {...}}}}`. Since 4.23 each has a name of its own,
`prefix:bot:business:thread:chat:user`, of which the three in the middle may be missing. A bot that
was updated between may have left both in one place, and reads the newer ones only.

This module knows what telebot's states store; it knows no store of this library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

from session_sync.errors import SessionDecodeError
from session_sync.session.keys import StorageKey
from session_sync.storages.places import short

from .pickles import ExhaustedError, Thing, read_pickle
from .plain import Imported, Reader, RefusedError, an_id, imported, named, unnamed, unusable

#: The field that a state becomes, as in docs/migrating/telebot.md.
STATE: Final = "step"

NO_RECORD: Final = "is no record of telebot's, which has a state and data"

_FILE: Final = "the file_path that the bot gives StatePickleStorage: ./.state-save/states.pkl"


class Options(NamedTuple):
    """What the bot gave its state storage, and whose records are wanted."""

    prefix: str | None  # None: what it is unless the bot gave one
    separator: str
    bot: int | None  # None: of the only one


def telebot_pickle(source: str) -> Iterator[Imported]:
    """The sessions in the file of a StatePickleStorage.

    Args:
        source: its path. What the bot gave beside the path follows after a question mark, as does
            the bot whose states are wanted if several have one file:
            `states.pkl?prefix=shop&separator=/&bot=123456`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, has the states of several bots, or an option is none.
    """
    name, options = source, options_of({})
    if not Path(source).exists() and "?" in source:
        name, _, query = source.rpartition("?")
        options = options_of(dict(parse_qsl(query, keep_blank_values=True)))
    try:
        yield from _sessions(name, options)
    except ExhaustedError as error:
        raise SessionDecodeError(f"{name!r} {error}; it should be {_FILE}") from None


def _sessions(name: str, options: Options) -> Iterator[Imported]:
    reader, states = _states(name)
    newer = {key: item for key, item in states if type(key) is str}
    found = by_session(newer, options)
    yield from found.errors
    for key, each in found.records.items():
        yield from imported(key, partial(_fields, reader, newer[each]))
    for chat, users in states:
        if type(chat) is not str:
            yield from _older(reader, chat, users, found)


def _states(name: str) -> tuple[Reader, list[tuple[Any, Any]]]:
    """What lies in the file, and its reader."""
    try:
        data = Path(name).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {name!r}; it should be {_FILE}") from error
    reader = Reader(len(data))
    try:
        return reader, list(reader.pairs_of(read_pickle(data)))
    except RefusedError as refused:
        why = refused.reason
    except ValueError as error:
        why = str(error)
    raise SessionDecodeError(f"{name!r} {why}; it should be {_FILE}")


def _older(reader: Reader, chat: object, users: Any, found: Found) -> Iterator[Imported]:
    """The records of one chat, as they were until 4.22."""
    try:
        records = list(reader.pairs_of(users))
    except RefusedError as refused:
        yield unnamed(named(chat), f"it {refused.reason} of users")
        return
    for user, record in records:
        try:
            key = str(StorageKey(user=an_id(user), chat=an_id(chat)))
        except (TypeError, ValueError):
            yield unnamed(f"{named(chat)}[{named(user)}]", "these are no ids of a chat and a user")
        else:
            if key not in found.taken:
                yield from imported(key, partial(_fields, reader, record))


def _fields(reader: Reader, record: Any) -> dict[Any, Any]:
    parts = reader.by_name(record)
    if not parts.keys() <= {"state", "data"} or "state" not in parts:
        raise RefusedError(NO_RECORD)
    fields = reader.fields(parts["data"]) if "data" in parts else {}
    return with_state(fields, reader.field("state", parts["state"], _meaning))


def _meaning(reader: Reader, thing: Thing) -> Any:
    """A State, which the StatePickleStorage of 4.23 and newer keeps whole, is its name."""
    return (
        reader.by_name(thing.state).get("name") if thing.name == "telebot.states.State" else thing
    )


# -- for both storages


class Found(NamedTuple):
    """The records since 4.23."""

    records: dict[str, str]  # the key of a session, and the name of its record
    errors: list[Imported]  # for names of no session, and for sessions of several names
    taken: set[str]  # the keys of both


def options_of(options: dict[str, str]) -> Options:
    """`options` as what they are; raises ValueError."""
    unknown = options.keys() - Options._fields
    if unknown:
        raise ValueError(
            f"states of telebot have no option {min(unknown)!r}; it is one of prefix, separator "
            f"(as the bot gave them) and bot (a number: the states of that one only)"
        )
    bot = options.get("bot")
    if bot is not None and _NUMBER.fullmatch(bot) is None:
        raise ValueError(f"bot={bot!r} is no bot: it takes the number before the colon of a token")
    separator = options.get("separator", ":")
    prefix = options.get("prefix")
    if not separator or prefix == "":
        raise ValueError("prefix and separator are never empty: leave out what the bot left out")
    return Options(prefix, separator, None if bot is None else int(bot))


def by_session(names: Iterable[str], options: Options) -> Found:
    """The names of records, each with the key that `default_storage_key` gives the same update.

    There a topic is no part of the key. So what telebot has kept of one user in several topics of a
    chat would be one session: an error for each, since none of them is all.

    Raises ValueError if there are states of several bots, and `options` names none of them.
    """
    names_of: dict[str, list[str]] = {}
    errors: list[Imported] = []
    bots: set[int] = set()
    pattern = _pattern(options)
    for name in names:
        match = pattern.fullmatch(name)
        try:
            if match is None:
                raise ValueError
            bot, business, user, chat = match.group("bot", "business", "user", "chat")
            key = str(StorageKey(user=int(user), chat=int(chat), business=business))
        except ValueError:
            errors.append(unnamed(short(name), _no_name(options)))
            continue
        if bot is not None:
            if options.bot not in (None, int(bot)):
                continue
            bots.add(int(bot))
        names_of.setdefault(key, []).append(name)
    if len(bots) > 1:
        raise ValueError(
            f"there are states of {len(bots)} bots: {', '.join(map(str, sorted(bots)[:10]))}. Take "
            f"over one after the other, each into a store of its own, with ?bot={min(bots)} and "
            f"so on after the source"
        )
    records = {key: each[0] for key, each in names_of.items() if len(each) == 1}
    for key, each in names_of.items():
        if len(each) > 1:
            errors.append((key, unusable(key, _several(each))))
    return Found(records, errors, set(names_of))


def with_state(fields: dict[Any, Any], state: Any) -> dict[Any, Any]:
    """The fields of a session: a user's data, and their state if they have one."""
    if state is None:
        return fields
    if STATE in fields:
        raise RefusedError(
            f"has a state, which becomes the field {STATE!r}, and data called {STATE!r}, too: call "
            f"that something else in the bot"
        )
    return {**fields, STATE: state}


def _pattern(options: Options) -> re.Pattern[str]:
    prefix = re.escape(options.prefix or "telebot")
    separator = re.escape(options.separator)
    number = "[0-9]{1,19}"
    return re.compile(
        f"{prefix}{separator}(?:(?P<bot>{number}){separator})?"
        f"(?:(?P<business>(?!{number}{separator}).+?){separator})?"
        f"(?:{number}{separator})?"
        f"(?P<chat>-?{number}){separator}(?P<user>-?{number})",
        re.DOTALL,
    )


_NUMBER: Final = re.compile("[0-9]{1,19}")


def _no_name(options: Options) -> str:
    prefix, separator = options.prefix or "telebot", options.separator
    return (
        f"it does not read {separator.join((prefix, '...', '<chat>', '<user>'))}. If the bot gave "
        f"its state storage a prefix or a separator, put them after the source: "
        f"?prefix={prefix}&separator={separator}"
    )


def _several(names: list[str]) -> str:
    shown = ", ".join(map(short, names[:5]))
    return (
        f"telebot has {len(names)} records of it ({shown}), of topics, say; but here a user has "
        f"one session in all topics of a chat. Delete all but one with bot.delete_state()"
    )
