"""The store that a command is for: named by a URL, opened, and never made by mistake.

A URL may have a password in it, which must not come out again in any message.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Concatenate, Final, ParamSpec, Protocol, cast, runtime_checkable
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import click

from ..errors import SessionDecodeError, SessionLockTimeout
from ..manager import SessionManager
from ..storages.base import KVStorage, OpenRecord, StoredEntry, record_of
from ..storages.urls import storage_from_url
from ..stored import replace_record
from .exits import Code, Failure, say
from .lines import CODEC

P = ParamSpec("P")
#: Of the folder of a disk storage, and of what SQLite has beside its file.
_DATABASE: Final = "cache.db"
_SOME: Final = 100  # sessions, of which one shows whether they have life times
_SECRET: Final = re.compile("pass|secret|token|credential", re.I)
_USERINFO: Final = re.compile(r"://\S*@")
_SECRETS: Final = f"{__name__}.secrets"


@runtime_checkable
class OperatorsStorage(Protocol):
    """What a command needs of a storage; all have it that outlive a process."""

    def get(self, key: str, /) -> dict[str, Any] | None: ...
    def set(self, key: str, value: dict[str, Any], /) -> None: ...
    def delete(self, key: str, /) -> None: ...
    def has(self, key: str, /) -> bool: ...
    def keys(self) -> Iterator[str]: ...
    def entries(self) -> Iterator[StoredEntry]: ...
    def open_unread(self, key: str, timeout: float, /) -> OpenRecord: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Store:
    """One bot's sessions in a storage. The manager takes them as they are stored, of whatever
    class and version they are."""

    storage: OperatorsStorage
    prefix: str
    lock_timeout: float
    has_ttl: bool

    @functools.cached_property
    def sessions(self) -> SessionManager[Any]:
        storage = cast("KVStorage[Any]", self.storage)
        return SessionManager(storage=storage, prefix=self.prefix, lock_timeout=self.lock_timeout)

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored fields; nothing is locked, and no life time renewed."""
        return self.storage.get(self.prefix + key)

    def has(self, key: str) -> bool:
        return self.storage.has(self.prefix + key)

    def remove(self, key: str) -> bool:
        """Delete a session under its lock, also one that cannot be read; False: there is none."""
        name = self.prefix + key
        try:
            scope = self.sessions.scope_as_stored(key)
            with scope:
                found = self.storage.has(name)
                if found:
                    replace_record(scope, record_of({}))
            return found
        except SessionDecodeError:
            pass  # no handler can open it either; but another one may be removing it
        try:
            opened = self.storage.open_unread(name, self.lock_timeout)
        except SessionLockTimeout as error:
            raise SessionLockTimeout(f"the session {key!r} was not deleted: {error}") from None
        except SessionDecodeError:  # of a kind that a lock has nothing to do with, see Redis
            self.storage.delete(name)
        else:
            opened.close(record_of({}))
        return True

    def warn_of_life_times(self) -> None:
        """Before something is stored: say so if sessions live for a while, and this one would not,
        because the URL lacks the bot's ttl."""
        if self.has_ttl:
            return
        with suppress(SessionDecodeError):
            if any(entry.left is not None for entry in islice(self.entries(), _SOME)):
                say(
                    "warning: sessions in this store have a life time, and what is stored now has "
                    "none until the bot opens it: give the URL the same ?ttl= as the bot's"
                )

    def entries(self) -> Iterator[StoredEntry]:
        """What is known of each session, by its key without the prefix."""
        for entry in self.storage.entries():
            if entry.key.startswith(self.prefix):
                yield entry._replace(key=entry.key.removeprefix(self.prefix))


@dataclass(frozen=True)
class Place:
    """Where a store is, according to the command line; not open yet."""

    url: str
    prefix: str
    lock_timeout: float

    @contextmanager
    def open(self, create: bool = False) -> Iterator[Store]:
        """The store; `create`: also one that is not there yet."""
        with opened(self.url, create) as storage:
            yield Store(storage, self.prefix, self.lock_timeout, "ttl" in _options(self.url))


def at_place(command: Callable[Concatenate[Place, P], None]) -> Callable[P, None]:
    """The options that say which store; the command gets its place as the first argument."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        options = cast("dict[str, Any]", kwargs)
        place = Place(*(options.pop(name) for name in ("storage", "prefix", "lock_timeout")))
        command(place, *args, **kwargs)

    for option in (
        click.option(
            "--lock-timeout",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait for a session that somebody has open.",
        ),
        click.option("--prefix", default="", help="The prefix= of the bot's SessionManager."),
        click.option(
            "--storage",
            "-s",
            envvar="SESSION_SYNC_STORAGE",
            show_envvar=True,
            required=True,
            metavar="URL",
            help="The store, as in sqlite:///sessions.db.",
        ),
    ):
        wrapper = option(wrapper)
    return wrapper


def with_store(command: Callable[Concatenate[Store, P], None]) -> Callable[P, None]:
    """The same; the command gets the store, open."""

    @functools.wraps(command)
    def wrapper(place: Place, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with place.open() as store:
            command(store, *args, **kwargs)

    return at_place(wrapper)


@contextmanager
def opened(url: str, create: bool = False) -> Iterator[OperatorsStorage]:
    """The storage that `url` names; `create`: also one that is not there yet."""
    remember_secrets(url)
    path = path_of(url)
    if path is not None and not create and not _is_store(url, path):
        raise Failure(f"there is no store at {shown(url)}; nothing was made", Code.UNREACHABLE)
    try:
        storage = storage_from_url(url, codec=CODEC)
    except ImportError as error:
        raise Failure(str(error), Code.USAGE) from None
    except (ValueError, TypeError) as error:
        raise _refusal(url, error) from None
    if not isinstance(storage, OperatorsStorage):
        raise Failure(
            f"{shown(url)} is the memory of one process, which nobody else can look into",
            Code.USAGE,
        )
    try:
        yield storage
    finally:
        storage.close()


def _options(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def path_of(url: str) -> str | None:
    """The file of a SQLite storage, or the folder of one on disk; None for all others."""
    parts = urlsplit(url)
    path = unquote(parts.path)[1:]
    if parts.scheme not in ("sqlite", "disk") or not path:
        return None
    return os.path.abspath(os.path.expanduser(path))


def _is_store(url: str, path: str) -> bool:
    # A folder may be of anything; and not to see what is in it is another error.
    return os.path.exists(os.path.join(path, _DATABASE) if url.startswith("disk:") else path)


def _refusal(url: str, error: Exception) -> Failure:
    parts = urlsplit(url)
    if "@" in url and parts.scheme.startswith("redis"):
        try:
            _ = parts.port, parts.hostname
        except ValueError:  # which would tell a part of the password
            return Failure(
                f"{shown(url)} is no URL of a Redis server: its host and port cannot be read. "
                f"A password needs its special characters as %XX.",
                Code.USAGE,
            )
    return Failure(f"{shown(url)} cannot be used: {error}", Code.USAGE)


# -- passwords


def shown(url: str) -> str:
    """A URL without the passwords that are in it."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "the URL" if "@" in url else url
    _userinfo, at, host = rest.rpartition("@")
    if at and not scheme.startswith(("sqlite", "disk")):
        rest = f"***@{host}"
    rest, question, query = rest.partition("?")
    if question:
        options = parse_qsl(query, keep_blank_values=True)
        hidden = [(name, "***" if _SECRET.search(name) else value) for name, value in options]
        query = urlencode(hidden, safe="*/:@")
    return f"{scheme}://{rest}{question}{query}"


def remember_secrets(url: str) -> None:
    """What of `url` no message may contain, whoever words it."""
    meta = click.get_current_context().meta
    known = meta.setdefault(_SECRETS, set())
    rest = url.partition("://")[2]
    userinfo = rest.rpartition("@")[0]
    found = [userinfo.partition(":")[2], userinfo]
    options = parse_qsl(rest.partition("?")[2], keep_blank_values=True)
    found += [value for name, value in options if _SECRET.search(name)]
    known.update(secret for text in found for secret in (text, unquote(text)) if secret)


def without_secrets(ctx: click.Context, text: str) -> str:
    """A message without the passwords of the URLs that this command was given."""
    for secret in sorted(ctx.meta.get(_SECRETS, ()), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _USERINFO.sub("://***@", text)  # of a URL that is no option's, by mistake


def confirm(question: str, yes: bool) -> None:
    """Ask before something is deleted; `yes`: it was said beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(
            "nobody is there to be asked: say --yes to delete without a question"
        )
    if not click.confirm(question, err=True):
        raise Failure("nothing was deleted")
