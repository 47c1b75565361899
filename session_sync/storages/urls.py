"""A storage named by a URL, so that one environment variable moves a bot.

This module knows URLs and which storage each names; it knows nothing of what that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode

from .addresses import split
from .base import KVStorage
from .codec import Codec


def storage_from_url(url: str, *, codec: Codec | None = None) -> KVStorage[Any]:
    """The storage that `url` names.

    `memory://`, `sqlite:///sessions.db`, `disk:///sessions`, `redis://host:6379/0`, `rediss://...`
    with TLS, `redis+cluster://host:7000`, `redis+sentinel://host:26379,host:26379/mymaster/0`, and
    both with `rediss+`. A path after three slashes is relative, after four absolute. Options of the
    storage follow after a question mark, as numbers or words:
    `sqlite:///sessions.db?ttl=86400&synchronous=full`. What a Redis storage does not know is
    redis-py's (`redis://host?socket_timeout=5`). Of a path or a password, the characters `#`, `?`,
    `%` and, in a password, `/`, `@`, `[` and `]` are written as `urllib.parse.quote(text, safe="")`
    gives them. `codec` brings in types of your own.

    Raises ValueError for any other URL, naming what is wrong but never a password; and what the
    storage raises.

    >>> storage_from_url("memory://?ttl=3600")  # doctest: +ELLIPSIS
    <session_sync.storages.memory.MemoryStorage object at ...>
    >>> storage_from_url("mysql://localhost")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: no storage is called 'mysql'; there are disk, memory, redis, redis+cluster, ...
    """
    scheme, found, _ = url.partition("://")
    make = _MAKERS.get(scheme.lower()) if found else None
    if make is None:
        raise ValueError(_unknown(url, scheme, found))
    parts = split(url)
    return make(parts, dict(parse_qsl(parts.query, keep_blank_values=True)), codec)


def file_options(url: str) -> dict[str, Any]:
    """The options in the URL of a file or folder, `sqlite://` or `disk://`, of which nothing is
    opened. Raises ValueError as `storage_from_url`."""
    parts = split(url)
    _path(parts)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    return _known(parts, options, **_FILE_OPTIONS[parts.scheme])


_FILE_OPTIONS: Final[dict[str, dict[str, Callable[[str], Any]]]] = {
    "sqlite": {"ttl": float, "synchronous": str},
    "disk": {"ttl": float},
}


def _unknown(url: str, scheme: str, found: str) -> str:
    """What is wrong with a URL that is none of these. The rest of it may be a password."""
    known, _, path = url.partition(":")
    if known.lower() in ("sqlite", "disk"):
        return (
            f"{url!r} has too few slashes: {known}:///{path} is relative, {known}:////... absolute"
        )
    if known.lower() in _MAKERS:
        return f"the URL of a storage begins with {known.lower()}://, not with {known}:"
    if found:
        return f"no storage is called {scheme!r}; there are {', '.join(sorted(_MAKERS))}"
    if "@" in url:
        return "this is no URL of a storage: redis://user:password@host, say"
    return f"{url!r} is no URL of a storage; the file of that name is sqlite:///{quote(url)}"


def _memory(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .memory import MemoryStorage

    return MemoryStorage(codec=codec, **_known(url, options, ttl=float))


def _sqlite(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .sqlite import SQLiteStorage

    known = _known(url, options, **_FILE_OPTIONS["sqlite"])
    return SQLiteStorage(_path(url), codec=codec, **known)


def _disk(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .disk import DiskStorage

    known = _known(url, options, **_FILE_OPTIONS["disk"])
    return DiskStorage(_path(url), codec=codec, **known)


def _redis(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .redis.storage import RedisStorage

    kinds: dict[str, Callable[[str], Any]] = {"ttl": float, "lease": float, "prefix": str}
    ours = {name: options.pop(name) for name in kinds if name in options}
    rest = url._replace(query=urlencode(options)).geturl()
    return RedisStorage(rest, codec=codec, **_known(url, ours, **kinds))


_MAKERS: Final = {
    "memory": _memory,
    "sqlite": _sqlite,
    "disk": _disk,
    "redis": _redis,
    "rediss": _redis,
    "redis+cluster": _redis,
    "rediss+cluster": _redis,
    "redis+sentinel": _redis,
    "rediss+sentinel": _redis,
}


def _path(url: SplitResult) -> str:
    path = unquote(url.path)[1:]
    if url.netloc or not path:
        raise ValueError(
            f"{url.scheme}:// needs a path: {url.scheme}:///sessions (relative) or "
            f"{url.scheme}:////var/lib/bot/sessions (absolute)"
        )
    return path


def _known(
    url: SplitResult, options: dict[str, str], **kinds: Callable[[str], Any]
) -> dict[str, Any]:
    """The options as what they are."""
    unknown = options.keys() - kinds.keys()
    if unknown:
        raise ValueError(
            f"{url.scheme}:// has no option {min(unknown)!r}; it has {', '.join(sorted(kinds))}"
        )
    values = {}
    for name, text in options.items():
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise ValueError(f"{url.scheme}://: {name} takes a number, not {text!r}") from None
    return values
