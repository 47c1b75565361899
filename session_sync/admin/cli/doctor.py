"""`doctor`: what is wrong with a store, and what to do about it.

This module knows what each kind of store can tell; it changes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import click

from ... import __version__
from ...errors import SessionDecodeError
from ...session.metadata import check_metadata, version_of
from ...storages.lockfile import held_keys
from .errors import Code, Failure
from .files import Files, check_readable, exists, user_name
from .output import json_option, plain, print_rows, progress, size, text
from .reader import Database, FileReader
from .store import Place, ReadStorage, View, at_place, named_files, refuse_foreign

State: TypeAlias = Literal["ok", "note", "wrong"]

_LITTLE: Final = 100 * 2**20  # bytes of free disk space
_COLOURS: Final = {"ok": "green", "note": "", "wrong": "bold red"}
_NAMED: Final = 10  # sessions that are named one by one


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: State
    about: str
    text: str


@click.command()
@json_option
@at_place
def doctor(place: Place, as_json: bool) -> None:
    """Look for what is wrong with a store.

    That is: the permissions of the files, sessions that cannot be decoded, locks that were left
    behind, space, versions. Exits with 1 if something is wrong. Every session is read; nothing is
    locked, changed or repaired.
    """
    findings: list[Finding] = []
    files = named_files(place.url)
    try:
        if files is not None and exists(files.database):
            refuse_foreign(place.url, files)
            findings += _files(files)
        with place.look() as view:
            findings += _versions(view.storage)
            findings += _server(view.storage)
            findings += _locks(view.storage) if files is None else _open_sessions(view, files)
            findings += _sessions(view)
    finally:  # also if the store cannot be opened: then this may say why
        findings.sort(key=lambda finding: finding.state != "wrong")
        rows = (finding._asdict() for finding in findings)
        columns = dict.fromkeys(Finding._fields, text)
        print_rows(rows, columns, as_json, colour=lambda row: _COLOURS[row["state"]])
    if any(finding.state == "wrong" for finding in findings):
        click.get_current_context().exit(Code.FAILED)


# -- files


def _files(files: Files) -> Iterator[Finding]:
    if os.name == "posix":
        yield from _permissions(files)
    check_readable(files.database)
    yield from _integrity(files.database)
    free = shutil.disk_usage(files.path).free
    state: State = "wrong" if free < _LITTLE else "ok"
    yield Finding(state, "space", f"{size(free)} are free on the disk")


def _permissions(files: Files) -> Iterator[Finding]:
    open_to_others = False
    own = _own_files(files)
    for each, found in _found(files, own):
        if stat.S_ISLNK(found.st_mode):  # its own mode says nothing
            yield _link(each, each in own)
            continue
        mode = stat.S_IMODE(found.st_mode)
        right = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
        if mode & 0o077:
            open_to_others = True
            yield Finding(
                "wrong", "permissions", f"others may use {each}: mode {mode:04o}; chmod {right:o}"
            )
        if found.st_uid != os.geteuid():
            yield Finding("note", "permissions", f"{each} belongs to {user_name(found.st_uid)}")
    if not open_to_others:
        yield Finding("ok", "permissions", "only the owner may read the files")


def _link(path: str, is_own: bool) -> Finding:
    if is_own:
        return Finding(
            "wrong", "links", f"{path} is a link in the place of a file of the store; remove it"
        )
    return Finding("note", "links", f"{path} is a link, which the store does not use")


def _own_files(files: Files) -> list[str]:
    """What a storage makes, and follows no link to."""
    database = files.database if files.is_disk else os.path.realpath(files.database)
    return [database, files.locks, *(f"{database}{end}" for end in ("-wal", "-shm", "-journal"))]


def _found(files: Files, own: list[str]) -> Iterator[tuple[str, os.stat_result]]:
    """What is there of a store: a folder and what is in it, or the files of SQLiteStorage. SQLite
    removes some of them while they are looked at."""
    names = own
    if files.is_disk:
        yield files.path, os.stat(files.path)  # to which a link may lead
        names = sorted(os.path.join(files.path, name) for name in os.listdir(files.path))
    for name in names:
        with suppress(FileNotFoundError):
            yield name, os.lstat(name)


def _integrity(path: str) -> Iterator[Finding]:
    with closing(Database(path)) as database:
        try:
            answers = [row[0].decode() for row in database.run("PRAGMA quick_check(10)")]
        except Failure as failure:
            answers = [str(failure)]
    if answers == ["ok"]:
        yield Finding("ok", "file", "SQLite finds the file whole")
        return
    for answer in answers:
        yield Finding("wrong", "file", f"SQLite finds {path} damaged: {answer}")


# -- versions and servers


_LIBRARIES: Final = {"RedisStorage": "redis"}  # what talks to the servers of a storage


def _versions(storage: ReadStorage) -> Iterator[Finding]:
    from importlib.metadata import version  # which takes as long as all other imports here

    yield Finding("note", "versions", f"session_sync {__version__}, {_python()}")
    if isinstance(storage, FileReader):
        yield Finding("note", "versions", f"SQLite {sqlite3.sqlite_version}")
        return
    library = _LIBRARIES[type(storage).__name__]
    yield Finding("note", "versions", f"{library} {version(library)}")


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} on {sys.platform}"


def _server(storage: Any) -> Iterator[Finding]:
    if not hasattr(storage, "info"):
        return
    nodes = storage.info()
    if not nodes:
        yield Finding("note", "server", "INFO is forbidden, so nothing is known of the server")
    for node in nodes:
        yield Finding("note", "versions", f"Redis server {node['redis_version']}")
        policy = node["maxmemory_policy"]
        if policy == "noeviction":
            yield Finding("ok", "eviction", "the server evicts nothing")
        else:
            yield Finding(
                "wrong",
                "eviction",
                f"maxmemory-policy is {policy}: when its memory is full, the server drops "
                f"sessions; CONFIG SET maxmemory-policy noeviction",
            )
        used, most = node["used_memory"], node["maxmemory"]
        full = bool(most) and used > 0.9 * most
        usage = f"{size(used)} of {size(most) if most else 'what the machine has'} are in use"
        yield Finding("wrong" if full else "ok", "space", usage)
        if not node.get("aof_enabled"):
            yield Finding(
                "note", "persistence", "appendonly is off: a crash of the server takes writes"
            )


def _locks(storage: Any) -> Iterator[Finding]:
    held = 0
    wrong = False
    for lock in storage.locks():
        held += 1
        if lock.left is None or lock.pid is None or lock.is_left_over():
            wrong = True
            yield Finding("wrong", "locks", _trouble(lock))
    if not wrong:
        yield Finding("ok", "locks", f"{held} sessions are open, none of a process that is gone")


def _open_sessions(view: View, files: Files) -> Iterator[Finding]:
    """Which are open now. Of a process that is gone there are none: the system drops its locks."""
    if not os.path.exists(files.locks):  # as where the system has none between processes
        return
    names = (view.prefix + key for key in view.find())
    try:
        keys = [name.removeprefix(view.prefix) for name in held_keys(files.locks, names)]
    except OSError as error:
        yield Finding("note", "locks", f"which sessions are open cannot be seen: {error}")
        return
    which = f": {', '.join(map(plain, keys[:_NAMED]))}" if keys else ""
    more = ", ..." if len(keys) > _NAMED else ""
    yield Finding("ok", "locks", f"{len(keys)} stored sessions are open now{which}{more}")


def _trouble(lock: Any) -> str:
    key = plain(lock.key)
    if lock.left is None:
        return f"the lock of {key} never ends, so another program has set it; delete it"
    if lock.pid is None:
        return f"what is in the lock of {key} was not written here; free in {lock.left:.0f} s"
    return f"process {lock.pid}, which had {key} open, is gone; free in {lock.left:.0f} s"


# -- sessions


def _sessions(view: View) -> Iterator[Finding]:
    versions: Counter[int] = Counter()
    broken: list[str] = []
    with progress("read") as advance:
        for error, version in _read(view):
            if error:
                broken.append(error)
            else:
                versions[version] += 1
            advance()
    unknown: Callable[[], int] | None = getattr(view.storage, "unknown_rows", None)
    if unknown is not None and (rows := unknown()):
        what = f"keys that no session has, which session_sync has not written: {rows}"
        yield Finding("wrong", "sessions", what)
    for error in broken[:_NAMED]:
        yield Finding("wrong", "sessions", error)
    if len(broken) > _NAMED:
        yield Finding("wrong", "sessions", f"{len(broken)} cannot be read in all")
    if broken:
        yield Finding("note", "sessions", "what cannot be read is deleted by: session-sync rm KEY")
    else:
        yield Finding("ok", "sessions", f"{versions.total()} can be read")
    if versions.keys() - {1}:
        yield Finding("note", "sessions", f"sessions by schema version: {_counts(versions)}")


def _read(view: View) -> Iterator[tuple[str, int]]:
    """For each session what is wrong with it, and its version."""
    for key in view.find():
        try:
            fields = view.get(key)
            if fields is not None:
                check_metadata(fields, key)
                yield "", version_of(fields, key)
        except SessionDecodeError as error:
            yield str(error), 0


def _counts(versions: Mapping[int, int]) -> str:
    return ", ".join(f"v{version}: {number}" for version, number in sorted(versions.items()))
