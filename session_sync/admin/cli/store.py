"""The store that a command is for: named by a URL, opened, and never made by mistake.

A URL may have a password in it, which must not come out again in any message.

This module knows URLs, options and managers; it knows no command.
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
from click.core import ParameterSource

from ...errors import SessionDecodeError, SessionLockTimeoutError
from ...lifecycle import bulk
from ...lifecycle.bulk import replace_record
from ...manager import SessionManager
from ...storages.base import KVStorage, OpenRecord, StoredEntry, record_of
from ...storages.durations import life_time
from ...storages.urls import storage_from_url
from .errors import Code, Failure, say
from .files import Files, check_readable, check_writable, exists, files_of
from .jsonl import CODEC
from .reader import FileReader, refuse_another_programs

P = ParamSpec("P")
_SOME: Final = 100  # sessions, of which one shows whether they have lifetimes
_SECRET: Final = re.compile("pass|secret|token|credential", re.I)
_USERINFO: Final = re.compile(r"://\S*@")
_SECRETS: Final = f"{__name__}.secrets"


class ReadStorage(Protocol):
    """What a command that only looks needs of a storage."""

    def get(self, key: str, /) -> dict[str, Any] | None: ...
    def keys(self) -> Iterator[str]: ...
    def entries(self) -> Iterator[StoredEntry]: ...
    def close(self) -> None: ...


@runtime_checkable
class OperatorsStorage(ReadStorage, Protocol):
    """What all commands need of a storage; all have it that outlive a process."""

    def set(self, key: str, value: dict[str, Any], /) -> None: ...
    def delete(self, key: str, /) -> None: ...
    def has(self, key: str, /) -> bool: ...
    def open_unread(self, key: str, timeout: float, /) -> OpenRecord: ...


@dataclass(frozen=True)
class View:
    """One bot's sessions in a storage, to be looked at: nothing is locked, and no lifetime renewed.
    Keys are without the prefix."""

    storage: ReadStorage
    prefix: str

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored fields."""
        return self.storage.get(self.prefix + key)

    def find(self, user: int | None = None, chat: int | None = None) -> Iterator[str]:
        """As `SessionManager.find`."""
        stored = self.storage.keys()
        full_keys = (full_key for full_key in stored if full_key.startswith(self.prefix))
        return bulk.find(full_keys, self.prefix, user, chat)

    def entries(self) -> Iterator[StoredEntry]:
        """What is known of each session."""
        for entry in self.storage.entries():
            if entry.key.startswith(self.prefix):
                yield entry._replace(key=entry.key.removeprefix(self.prefix))


@dataclass(frozen=True)
class Store(View):
    """The same, to be changed. The manager takes the sessions as they are stored, of whatever class
    and version they are."""

    storage: OperatorsStorage
    lock_timeout: float
    has_ttl: bool

    @functools.cached_property
    def sessions(self) -> SessionManager[Any]:
        storage = cast("KVStorage[Any]", self.storage)
        return SessionManager(storage=storage, prefix=self.prefix, lock_timeout=self.lock_timeout)

    def has(self, key: str) -> bool:
        return self.storage.has(self.prefix + key)

    def remove(self, key: str) -> bool:
        """Delete a session under its lock, also one that cannot be read; False: there is none."""
        full_key = self.prefix + key
        try:
            scope = self.sessions.scopes.as_stored(key)
            with scope:
                found = self.storage.has(full_key)
                if found:
                    replace_record(scope, record_of({}))
            return found
        except SessionDecodeError:
            pass  # no handler can open it either; but another one may be removing it
        try:
            opened = self.storage.open_unread(full_key, self.lock_timeout)
        except SessionLockTimeoutError as error:
            raise SessionLockTimeoutError(f"the session {key!r} was not deleted: {error}") from None
        except SessionDecodeError:  # of a kind that a lock has nothing to do with, see Redis
            self.storage.delete(full_key)
        else:
            opened.close(record_of({}))
        return True

    def warn_of_life_times(self) -> None:
        """Before something is stored: warn if sessions have a lifetime, and this one would have
        none, because the URL lacks the bot's ttl."""
        if self.has_ttl:
            return
        with suppress(SessionDecodeError):
            if any(entry.left is not None for entry in islice(self.entries(), _SOME)):
                say(
                    "warning: sessions in this store have a lifetime, and what is stored now has "
                    "none until the bot opens it: give the URL the same ?ttl= as the bot's"
                )


@dataclass(frozen=True)
class Place:
    """Where a store is, according to the command line; not open yet."""

    url: str
    prefix: str
    lock_timeout: float

    @contextmanager
    def look(self) -> Iterator[View]:
        """The store, of which nothing is changed, nor any file made."""
        with opened_to_read(self.url) as storage:
            yield View(storage, self.prefix)

    @contextmanager
    def open(self, create: bool = False) -> Iterator[Store]:
        """The store, to be changed; `create`: also one that is not there yet."""
        with opened(self.url, create) as storage:
            yield Store(storage, self.prefix, self.lock_timeout, "ttl" in _options(self.url))


def place_options(command: Callable[P, None]) -> Callable[P, None]:
    """The options that name the store: of the group, and of each command."""
    for option in (
        click.option(
            "--lock-timeout",
            type=click.FloatRange(min=0),
            metavar="SECONDS",
            help="How long to wait for a locked session.  [default: 30.0]",
        ),
        click.option("--prefix", help="The prefix= of the bot's SessionManager."),
        click.option(
            "--storage",
            "-s",
            metavar="URL",
            help="The store, as in sqlite:///sessions.db.  [env var: SESSION_SYNC_STORAGE]",
        ),
    ):
        command = option(command)
    return command


def at_place(command: Callable[Concatenate[Place, P], None]) -> Callable[P, None]:
    """The options that name the store; the command gets its place as the first argument."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        options = cast("dict[str, Any]", kwargs)
        own = {name: options.pop(name) for name in ("storage", "prefix", "lock_timeout")}
        command(_place(own), *args, **kwargs)

    return place_options(wrapper)


def _place(own: dict[str, Any]) -> Place:
    """By the options after the command; what is not given there, by those before it."""
    group = click.get_current_context().find_root().params
    given = {name: group.get(name) if value is None else value for name, value in own.items()}
    url = given["storage"] or os.environ.get("SESSION_SYNC_STORAGE")
    if not url:
        raise click.UsageError(
            "name the store: --storage URL (-s), or SESSION_SYNC_STORAGE in the environment"
        )
    timeout = given["lock_timeout"]
    return Place(url, given["prefix"] or "", 30.0 if timeout is None else timeout)


def refuse_store_before(command: str) -> None:
    """Raise UsageError if a store is named before a command that names its own."""
    root = click.get_current_context().find_root()
    for name in ("storage", "prefix", "lock_timeout"):
        if root.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{command} takes no {option}: it names its stores itself")


def with_store(command: Callable[Concatenate[Store, P], None]) -> Callable[P, None]:
    """The same; the command gets the store, open to be changed."""

    @functools.wraps(command)
    def wrapper(place: Place, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with place.open() as store:
            command(store, *args, **kwargs)

    return at_place(wrapper)


def with_view(command: Callable[Concatenate[View, P], None]) -> Callable[P, None]:
    """The same; the command gets the store, open to be looked at."""

    @functools.wraps(command)
    def wrapper(place: Place, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with place.look() as view:
            command(view, *args, **kwargs)

    return at_place(wrapper)


@contextmanager
def opened(url: str, create: bool = False) -> Iterator[OperatorsStorage]:
    """The storage that `url` names; `create`: also one that is not there yet."""
    remember_secrets(url)
    files = named_files(url)
    if files is not None:
        if exists(files.database):
            check_writable(files.database)
        elif not create:
            raise _missing(url)
    storage = _generated(url)
    try:
        yield storage
    finally:
        storage.close()


@contextmanager
def opened_to_read(url: str) -> Iterator[ReadStorage]:
    """The same to be looked at, which makes and changes no file."""
    remember_secrets(url)
    files = named_files(url)
    storage = _generated(url) if files is None else _reader(url, files)
    try:
        yield storage
    finally:
        storage.close()


def named_files(url: str) -> Files | None:
    """The files of a store on this machine; None for one elsewhere."""
    try:
        return files_of(url)
    except ValueError as error:
        raise _refusal(url, error) from None


def _reader(url: str, files: Files) -> FileReader:
    if not exists(files.database):
        raise _missing(url)
    check_readable(files.database)
    try:
        ttl = files.options.get("ttl")
        ttl = None if ttl is None else life_time(ttl)
        return FileReader(files.database, CODEC, ttl, files.is_disk)
    except ValueError as error:
        raise _refusal(url, error) from None


def refuse_foreign(url: str, files: Files) -> None:
    """Raise Failure if the file that is there is another program's."""
    try:
        refuse_another_programs(files.database, files.is_disk)
    except ValueError as error:
        raise _refusal(url, error) from None


def _missing(url: str) -> Failure:
    return Failure(f"there is no store at {shown(url)}; nothing was made", Code.UNREACHABLE)


def _generated(url: str) -> OperatorsStorage:
    try:
        storage = storage_from_url(url, codec=CODEC)
    except ImportError as error:
        raise Failure(str(error), Code.USAGE) from None
    except (ValueError, TypeError) as error:
        raise _refusal(url, error) from None
    if not isinstance(storage, OperatorsStorage):
        raise Failure(
            f"{shown(url)} is the memory of one process, which no other process can read",
            Code.USAGE,
        )
    return storage


def _options(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def _refusal(url: str, error: Exception) -> Failure:
    try:
        parts = urlsplit(url)
    except ValueError:
        return Failure(
            f"{shown(url)} is no URL: brackets other than those around an IPv6 address are written "
            f"%5B and %5D",
            Code.USAGE,
        )
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
    if not scheme.startswith(("sqlite", "disk")):
        if at:
            rest = f"***@{host}"
        elif "#" in rest:  # which no other URL has: the host of a password was forgotten
            rest = "***"
    rest, question, query = rest.partition("?")
    if question:
        options = parse_qsl(query, keep_blank_values=True)
        hidden = [(name, "***" if _SECRET.search(name) else value) for name, value in options]
        query = urlencode(hidden, safe="*/:@")
    return f"{scheme}://{rest}{question}{query}"


def remember_secrets(url: str) -> None:
    """What of `url` no message may contain, wherever it comes from."""
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
    """Ask before something is deleted; `yes`: the user has confirmed it beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("stdin is not a terminal; use --yes to skip the confirmation")
    if not click.confirm(question, err=True):
        raise Failure("nothing was deleted")
