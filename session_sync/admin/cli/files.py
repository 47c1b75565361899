"""The files of a store that is on this machine: where they are, and whether this user may use them.

A command reports what is in its way before it makes, locks or opens anything.

This module knows paths and modes; it does not know what is in a file.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from ...storages.urls import file_options
from .errors import Code, Failure

_IS_BY_EFFECTIVE_USER: Final = os.access in os.supports_effective_ids


class Files(NamedTuple):
    """Of a store that is a file or a folder."""

    path: str  # of the URL
    database: str  # the SQLite file in which the sessions are
    locks: str
    is_disk: bool
    options: dict[str, Any]


def files_of(url: str) -> Files | None:
    """The files of a SQLite or disk storage; None for all others. Raises ValueError for a URL that
    names none."""
    parts = urlsplit(url)
    if parts.scheme not in ("sqlite", "disk") or "://" not in url:
        return None
    options = file_options(url)
    path = os.path.abspath(os.path.expanduser(unquote(parts.path)[1:]))
    if parts.scheme == "sqlite":
        return Files(path, path, f"{os.path.realpath(path)}-locks", False, options)
    # A folder without the database may be of anything.
    database, locks = (os.path.join(path, name) for name in ("cache.db", "locks"))
    return Files(path, database, locks, True, options)


def exists(path: str) -> bool:
    """Whether there is such a file. Raises Failure if that may not be seen."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        for folder in reversed(Path(path).parents):
            if not _may(str(folder), os.X_OK):
                raise _denied(str(folder), "looked into") from None
        raise
    return True


def check_readable(database: str) -> None:
    """Raise Failure if the file may not be read."""
    if not _may(database, os.R_OK):
        raise _denied(database, "read")


def check_writable(database: str) -> None:
    """Raise Failure if the file, or what SQLite has beside it, may not be changed."""
    folder = os.path.dirname(database)
    if not _may(database, os.R_OK | os.W_OK):
        raise _denied(database, "changed")
    if not _may(folder, os.W_OK | os.X_OK):
        raise _denied(folder, "written to, as a change of the store needs,")


def _may(path: str, how: int) -> bool:
    return os.access(path, how, effective_ids=_IS_BY_EFFECTIVE_USER)


def _denied(path: str, what: str) -> Failure:
    found = os.stat(path)
    return Failure(
        f"permission denied: {path} may not be {what} by this user: it belongs to "
        f"{user_name(found.st_uid)} and has mode {stat.S_IMODE(found.st_mode):04o}; run this "
        f"command as the user whose bot it is",
        Code.UNREACHABLE,
    )


@contextmanager
def new_file(path: str) -> Iterator[str]:
    """The name of an empty file of mode 0600, which takes the place of `path` when it is written
    without an error; also of a link that another user plants there meanwhile. Raises Failure for
    one that is there."""
    refuse_link(path)
    folder = os.path.realpath(os.path.dirname(path))
    number, unfinished = tempfile.mkstemp(dir=folder, prefix=".session-sync-")
    try:
        os.close(number)
        yield unfinished
        with open(unfinished, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, os.path.join(folder, os.path.basename(path)))
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise


def refuse_link(path: str) -> None:
    """Raise Failure if a link has the place of a file to write: the user that made it would choose
    which file that is."""
    if os.path.islink(path):
        raise Failure(
            f"{path} is a link, to {os.readlink(path)}, and is not followed: another user may have "
            f"made it. Give the name of the file itself, or remove the link",
            Code.USAGE,
        )


def user_name(number: int) -> str:
    """The name of a user of this machine, or the number of one without a name."""
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"the user {number}"
