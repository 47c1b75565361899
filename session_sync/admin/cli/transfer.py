"""Many sessions at once, out of a store and into one: `export`, `import`, `copy`.

This module knows lines, records and stores; what another library has written is known to the
importers.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any, TypeAlias

import click

from ...errors import SessionDecodeError, SessionError
from ...lifecycle.bulk import replace_record
from ...lifecycle.copying import copy_storage
from ...session.metadata import check_metadata
from ...storages.base import record_of
from ..importers import IMPORTERS
from .errors import Failure, code_of, say
from .files import new_file
from .jsonl import from_line, to_line
from .output import progress
from .sessions import user_and_chat
from .store import (
    Place,
    Store,
    View,
    at_place,
    named_files,
    opened,
    refuse_store_before,
    remember_secrets,
    shown,
    with_view,
)

#: Where it comes from, for messages; and the key with its fields, or why there are none.
Incoming: TypeAlias = tuple[str, str, dict[str, Any] | SessionError]


@click.command()
@click.argument("file", default="-")
@user_and_chat
@with_view
def export(view: View, file: str, user: int | None, chat: int | None) -> None:
    """Write all sessions, or those of a user, as lines of JSON.

    They go to FILE (or the standard output), one JSON object in each line, with all types.

    FILE is readable by you alone, and complete or not there at all. A session is written as it was
    last saved; nothing is locked.
    """
    failed = written = 0
    find = partial(view.find, user, chat)
    with (
        _output(file) as out,
        progress("exported", lambda: _count(find()), hidden=out.isatty()) as advance,
    ):
        for key in find():
            try:
                fields = view.get(key)
                line = None if fields is None else to_line(key, fields)
            except SessionError as error:
                failed += 1
                say(str(error))
                continue
            if line is not None:
                out.write(_harmless(line) if out.isatty() else line)
                written += 1
            advance()
    say(f"{written} sessions exported")
    if failed:
        raise Failure(f"{failed} sessions were not exported")


def _count(keys: Iterable[str]) -> int:
    return sum(1 for _ in keys)


@contextmanager
def _output(file: str) -> Iterator[IO[bytes]]:
    """A new file, as `new_file` makes it; or the standard output, or a pipe."""
    if file == "-":
        yield sys.stdout.buffer
    elif os.path.exists(file) and not stat.S_ISREG(os.stat(file).st_mode):  # a pipe, say
        with open(file, "wb") as out:
            yield out
    else:
        with new_file(file) as unfinished, open(unfinished, "wb") as out:
            yield out


def _harmless(line: bytes) -> bytes:
    """The same JSON, without a character that a terminal would obey."""
    text = line.decode()
    return (
        "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text[:-1]).encode() + b"\n"
    )


@click.command("import")
@click.argument("source", default="-")
@click.option(
    "--from",
    "kind",
    type=click.Choice(("jsonl", *IMPORTERS)),
    default="jsonl",
    show_default=True,
    help="What SOURCE is: an export, or the data of a bot without session_sync.",
)
@click.option("--skip-existing", is_flag=True, help="Leave sessions alone that are there already.")
@click.option("--dry-run", is_flag=True, help="Read everything, and store nothing.")
@at_place
def import_(place: Place, source: str, kind: str, skip_existing: bool, dry_run: bool) -> None:
    """Store the sessions of an export, or of a bot without session_sync.

    SOURCE is a file or the standard input, of the kind that --from names; for telebot-redis it is
    the URL of a server. The store is made if there is none. Each session is stored under its lock,
    over what is there under its key. What cannot be read is named, and the rest is stored.
    """
    done = skipped = 0
    errors: list[SessionError] = []
    with ExitStack() as stack:
        store = None if dry_run else stack.enter_context(place.open(create=True))
        if store is not None:
            store.warn_of_life_times()
        advance = stack.enter_context(progress("imported"))
        for origin, key, fields in _incoming(source, kind):
            try:
                if isinstance(fields, SessionError):
                    raise fields
                check_metadata(fields, key)
                if store is None:
                    to_line(key, fields)  # which refuses what no store would take
                    done += 1
                elif _put(store, key, fields, skip_existing):
                    done += 1
                else:
                    skipped += 1
            except SessionError as error:
                errors.append(error)
                say(f"{origin}: {error}")
            advance()
    click.echo(_summary(done, skipped, len(errors), dry_run))
    if errors:
        click.get_current_context().exit(code_of(errors))


def _summary(done: int, skipped: int, failed: int, dry_run: bool) -> str:
    counts = [f"{done} sessions " + ("can be imported" if dry_run else "imported")]
    if skipped:
        counts.append(f"{skipped} were there already")
    if failed:
        counts.append(f"{failed} failed")
    return ", ".join(counts)


def _put(store: Store, key: str, fields: dict[str, Any], skip_existing: bool) -> bool:
    scope = store.sessions.scopes.as_stored(key)
    with scope:
        if skip_existing and store.has(key):
            return False
        replace_record(scope, record_of(fields))
    return True


def _incoming(source: str, kind: str) -> Iterator[Incoming]:
    """What is to be stored, one after the other."""
    if kind != "jsonl":
        yield from _foreign(source, kind)
        return
    with click.open_file(source, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", *from_line(line)
            except SessionDecodeError as error:
                yield f"line {number}", "", error


def _foreign(source: str, kind: str) -> Iterator[Incoming]:
    remember_secrets(source)
    try:
        for key, fields in IMPORTERS[kind](source):
            yield f"session {key!r}", key, fields
    except (SessionDecodeError, ValueError) as error:
        raise Failure(f"{shown(source)} cannot be read: {error}") from None


def _is_same_file(source: str, target: str) -> bool:
    files = [named_files(url) for url in (source, target)]
    first, second = (each and os.path.realpath(each.database) for each in files)
    return first is not None and first == second


@click.command()
@click.argument("source")
@click.argument("target")
def copy(source: str, target: str) -> None:
    """Copy all sessions of one store into another.

    Both are URLs. Each session is locked in both stores meanwhile. TARGET is made if there is none;
    what it has under the same key is replaced. Stop the bot all the same, or it goes on writing to
    the old store.
    """
    refuse_store_before("copy")
    remember_secrets(source)
    remember_secrets(target)
    if source == target or _is_same_file(source, target):
        raise click.UsageError("SOURCE and TARGET are the same store")
    with opened(source) as here, opened(target, create=True) as there:
        storages: tuple[Any, Any] = here, there
        with progress("copied", lambda: _count(here.keys())) as advance:
            number = copy_storage(*storages, progress=lambda _key: advance())
    click.echo(f"copied {number} sessions")
