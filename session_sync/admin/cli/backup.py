"""`backup`: a copy of a SQLite store, of one moment, while bots run on it.

This module knows SQLite's backup; it knows no session.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import Final

import click

from .errors import Code, Failure, say
from .files import Files, new_file, refuse_link
from .output import size
from .reader import Database
from .store import Place, at_place, named_files, opened_to_read, shown

_OF_OTHERS: Final = {
    "disk": (
        "stop its bots and copy the whole folder; or, while they run, write a SQLite store with: "
        "session-sync copy URL sqlite:///backup.db"
    ),
    "redis": (
        "use the server's own backups (BGSAVE writes its dump.rdb; see redis.io on persistence); "
        "or write the sessions with: session-sync export backup.jsonl"
    ),
}


@click.command()
@click.argument("target", metavar="DST")
@at_place
def backup(place: Place, target: str) -> None:
    """Copy a SQLite store into one file, while bots run on it.

    DST is a store of one moment, complete in that file, and readable by you alone. It takes the
    place of an older backup when it is complete. Nothing is locked: bots go on writing meanwhile.
    """
    with opened_to_read(place.url):  # which raises what is wrong with it
        pass
    files = named_files(place.url)
    if files is None or files.is_disk:
        scheme = place.url.partition(":")[0]
        way = _OF_OTHERS["disk" if scheme == "disk" else "redis"]
        raise Failure(
            f"{shown(place.url)} is no SQLite store, and only those are copied by this command. "
            f"To back it up, {way}",
            Code.USAGE,
        )
    _check_target(files, target)
    with new_file(target) as unfinished, closing(Database(files.database)) as source:
        with closing(sqlite3.connect(unfinished, isolation_level=None)) as copy:
            # All pages in one step: between two, a bot's write would start the copy anew.
            source.use(lambda connection: connection.backup(copy))
        written = os.path.getsize(unfinished)
    say(f"{size(written)} written to {target}")


def _check_target(files: Files, target: str) -> None:
    if not os.path.lexists(target):
        return
    if os.path.exists(target) and os.path.samefile(files.database, target):
        raise Failure(f"{target} is the store itself", Code.USAGE)
    refuse_link(target)
    if not os.path.isfile(target):
        raise Failure(f"{target} is no file; give the name of the file to write", Code.USAGE)
    for end in ("-wal", "-journal"):
        if os.path.exists(target + end):
            raise Failure(
                f"{target} is a database in use: {target}{end} is beside it, and SQLite would "
                f"read that into the copy. Give another name, or remove both files if no program "
                f"uses them"
            )
