"""What pyTelegramBotAPI's StateRedisStorage has written: until 4.22 a text of JSON for each chat,
`prefix<chat>`, with all of its users; since 4.23 a hash for each record, with a state and the data
as JSON. Nothing is changed, and nothing asks the server for all of its keys at once.

This module knows the names and texts in telebot's Redis; it writes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, urlencode

from session_sync.session.keys import StorageKey
from session_sync.storages.addresses import check_port, split
from session_sync.storages.places import short

from .plain import Imported, RefusedError, imported, unnamed
from .telebot import NO_RECORD, Options, by_session, options_of, with_state

_PARTS: Final = ("state", "data")
_AT_ONCE: Final = 500  # records in one round trip
_SPECIAL: Final = re.compile(r"([*?\[\]^\\-])")  # in a pattern of Redis


def telebot_redis(source: str) -> Iterator[Imported]:
    """The sessions that a StateRedisStorage has in Redis.

    Args:
        source: the URL of the server, `redis://localhost:6379/0`. What the bot gave its
            StateRedisStorage follows after a question mark, as does the bot whose states are wanted
            if several have one server: `redis://localhost?prefix=shop&separator=/&bot=123456`.
            Further options are redis-py's.

    Raises:
        ImportError: redis-py is not installed.
        OSError: the server cannot be asked.
        ValueError: there are the states of several bots, an option is none, or the URL makes no
            sense; its message has no part of a password.
    """
    url = split(source)
    check_port(url)
    given = dict(parse_qsl(url.query, keep_blank_values=True))
    options = options_of({name: given.pop(name) for name in Options._fields if name in given})
    with _client(url._replace(query=urlencode(given))) as client:
        newer, older = _names(client, options)
        found = by_session(newer, options)
        yield from found.errors
        keys = {name: key for key, name in found.records.items()}
        for name, answer in _answers(client, keys, lambda pipe, name: pipe.hmget(name, _PARTS)):
            yield from _session(keys[name], answer)
        for name, answer in _answers(client, older, lambda pipe, name: pipe.get(name)):
            yield from _chat(name, older[name], answer, found.taken)


@contextmanager
def _client(url: SplitResult) -> Iterator[Any]:
    """A client, whose errors say which server they are about, and nothing of the URL's password."""
    try:
        import redis
    except ImportError as error:
        raise ImportError(
            "states in Redis are read by redis-py: pip install 'session-sync[redis]'"
        ) from error
    server = f"{url.hostname}:{url.port}" if url.port else url.hostname
    with closing(redis.Redis.from_url(url.geturl())) as client:
        try:
            yield client
        except redis.RedisError as error:
            raise ConnectionError(
                f"the Redis at {server} cannot be asked for telebot's states: {error}"
            ) from error


def _names(client: Any, options: Options) -> tuple[list[str], dict[str, int]]:
    """The names of the newer records, and those of the older ones with their chats."""
    newer: set[str] = set()  # as SCAN may answer a name twice
    older: dict[str, int] = {}
    start = (options.prefix or "telebot") + options.separator
    of_a_chat = re.compile(re.escape(options.prefix or "telebot_") + "(-?[0-9]{1,19})")
    pattern = _SPECIAL.sub(r"\\\1", options.prefix or "telebot") + "*"
    for raw in client.scan_iter(pattern, count=1000):
        name = raw.decode(errors="surrogateescape")
        match = of_a_chat.fullmatch(name)
        if match is not None:
            older[name] = int(match[1])
        elif name.startswith(start):  # else it is not telebot's
            newer.add(name)
    return sorted(newer), older


def _answers(
    client: Any, names: Iterable[str], ask: Callable[[Any, bytes], object]
) -> Iterator[tuple[str, Any]]:
    """What the server says to each name; an error that is about one of them is its answer."""
    left = iter(names)
    while some := list(islice(left, _AT_ONCE)):
        with client.pipeline(transaction=False) as pipe:
            for name in some:
                ask(pipe, name.encode(errors="surrogateescape"))
            yield from zip(some, pipe.execute(raise_on_error=False), strict=True)


def _session(key: str, answer: Any) -> Iterator[Imported]:
    if answer == [None, None]:  # deleted meanwhile
        return

    def fields() -> dict[str, Any]:
        state, data = _given(answer)
        made = {} if data is None else _dict_in(data)
        return with_state(made, None if state is None else _text(state))

    yield from imported(key, fields)


def _chat(name: str, chat: int, answer: Any, taken: set[str]) -> Iterator[Imported]:
    """The records of one chat, as they were until 4.22."""
    if answer is None:
        return
    try:
        users = _dict_in(_given(answer))
    except RefusedError as refused:
        yield unnamed(short(name), f"it {refused.reason}")
        return
    for user, record in users.items():
        try:
            key = str(StorageKey(user=int(user), chat=chat))
        except ValueError:
            yield unnamed(f"{short(name)}[{short(user)}]", "this is no id of a user")
        else:
            if key not in taken:
                yield from imported(key, partial(_fields, record))


def _fields(record: Any) -> dict[str, Any]:
    if type(record) is not dict or "state" not in record:
        raise RefusedError(NO_RECORD)
    data = record.get("data", {})
    if type(data) is not dict:
        raise RefusedError(f"is of class {type(data).__name__}, and not a dict")
    return with_state(data, record["state"])


def _given(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise RefusedError(f"cannot be read from Redis: {answer}")
    return answer


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except ValueError:
        raise RefusedError("has a state that is no text") from None


def _dict_in(data: bytes) -> dict[str, Any]:
    """The dict in a text of JSON, as telebot reads it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"is no JSON that can be read ({type(error).__name__})") from None
    if type(value) is not dict:
        raise RefusedError(f"is JSON of a {type(value).__name__}, and not of a dict")
    return value
