"""A storage named by a URL, so that one environment variable moves a bot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ..codec import Codec
from .base import KVStorage


def storage_from_url(url: str, *, codec: Codec | None = None) -> KVStorage[Any]:
    """The storage that `url` names.

    `memory://`, `sqlite:///sessions.db`, `disk:///sessions`, `redis://host:6379/0`, `rediss://...`
    with TLS, `redis+cluster://host:7000`, `rediss+cluster://...`. A path after three slashes is
    relative, after four absolute. Options of the storage follow after a question mark, as numbers
    or words: `sqlite:///sessions.db?ttl=86400&synchronous=full`. What a Redis storage does not know
    is redis-py's (`redis://host?socket_timeout=5`). `codec` brings in types of your own.

    Raises ValueError for any other URL, naming what is wrong but never a password; and what the
    storage raises.

    >>> storage_from_url("memory://?ttl=3600")  # doctest: +ELLIPSIS
    <session_sync.storages.memory.MemoryStorage object at ...>
    >>> storage_from_url("mysql://localhost")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: no storage is called 'mysql'; there are disk, memory, redis, redis+cluster, ...
    """
    parts = urlsplit(url)
    make = _MAKERS.get(parts.scheme)
    if make is None:
        raise ValueError(
            f"no storage is called {parts.scheme!r}; there are {', '.join(sorted(_MAKERS))}"
        )
    return make(parts, dict(parse_qsl(parts.query, keep_blank_values=True)), codec)


def _memory(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .memory import MemoryStorage

    return MemoryStorage(codec=codec, **_known(url, options, ttl=float))


def _sqlite(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .sqlite import SQLiteStorage

    known = _known(url, options, ttl=float, synchronous=str)
    return SQLiteStorage(_path(url), codec=codec, **known)


def _disk(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .disk import DiskStorage

    return DiskStorage(_path(url), codec=codec, **_known(url, options, ttl=float))


def _redis(url: SplitResult, options: dict[str, str], codec: Codec | None) -> KVStorage[Any]:
    from .redis import RedisStorage

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
