"""Files and folders that are closed to other users, and that are what their path says.

A path is resolved once, so that a store has one name however many links lead to it; from then on no
link is followed. This module knows files; it does not know what is in them.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from os.path import samestat
from typing import Final

_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
_FOLDER: Final = 0o700
_FILE: Final = 0o600
_OTHERS: Final = 0o077


def resolve(path: str | os.PathLike[str]) -> str:
    """The one absolute path of what `path` names, also if that is not there yet."""
    return os.path.realpath(os.path.expanduser(os.fspath(path)))


def make_folder(path: str) -> bool:
    """Make a folder, and those above it that are missing; False if it is there already."""
    if os.path.isdir(path):
        return False
    make_folder(os.path.dirname(path))
    try:
        os.mkdir(path, _FOLDER)
    except FileExistsError:
        if os.path.isdir(path):  # made in between
            return False
        raise
    _set_mode(path, _FOLDER)  # whatever the umask
    return True


def close_folder(path: str) -> None:
    """Close a folder of this user to other users. Of another user's, the mode is theirs."""
    found = os.lstat(path)
    if _is_ours(found) and found.st_mode & _OTHERS:
        _set_mode(path, _FOLDER)


def make_file(path: str) -> None:
    """Make an empty file, if there is none; one that is there is closed to other users.

    It has its name only when it is closed again: to close a file drops all locks on it that this
    process has through SQLite, and another thread, or a nested call, may open it at once. For the
    same reason, one that is there is never opened here.

    Raises PermissionError if it is a link or belongs to another user, ValueError if the file has
    more names than one.
    """
    if os.path.lexists(path):
        _remove_unfinished(path)
        close_file(path)
        return
    new = _unfinished(path) + secrets.token_hex(8)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    try:
        os.close(os.open(new, flags, _FILE))
        _set_mode(new, _FILE)  # whatever the umask
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError as error:
        if isinstance(error, TimeoutError) or not os.path.lexists(new):
            raise
        with suppress(FileExistsError):  # a file system without links
            os.close(os.open(path, flags, _FILE))
            _set_mode(path, _FILE)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new)


def check_file(path: str) -> bool:
    """Whether there is such a file. Raises as `make_file` does, and changes no mode."""
    try:
        _remove_unfinished(path)
        refuse_foreign(path, os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):  # the latter: where a folder is to be made
        return False
    return True


def close_file(path: str) -> None:
    """Close a file to other users, if it is there. Raises as `make_file` does."""
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        refuse_foreign(path, found)
        if found.st_mode & _OTHERS:
            _set_mode(path, _FILE)


def open_file(path: str, flags: int) -> int:
    """Open a file, made if there is none, but nothing that a link leads to: FileIO's opener."""
    try:
        return os.open(path, flags | os.O_CREAT | _NO_LINK, _FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_file(path) from None
        raise


def refuse_foreign(path: str, found: os.stat_result) -> None:
    """Raise PermissionError if this is a link or another user's file, ValueError if it has more
    names than one."""
    if not stat.S_ISREG(found.st_mode):
        raise _no_file(path)
    if not _is_ours(found):
        raise PermissionError(
            f"{path} belongs to another user (uid {found.st_uid}; this process runs as uid "
            f"{os.geteuid()}), who could read and change all sessions. Run this process as that "
            f"user, or make the file yours with chown."
        )
    if found.st_nlink > 1:
        raise ValueError(
            f"{path} has {found.st_nlink} names (hard links). Programs that use different ones do "
            f"not see each other's locks and logs, and destroy what is in it. Remove the other "
            f"names, or make symbolic links of them."
        )


class StoreFile:
    """A file, and which one it was when this process opened it."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._known: Final[dict[str, os.stat_result]] = {}

    def check(self) -> None:
        """Raise OSError (ESTALE) if another file has the path by now, or none."""
        found = None
        with suppress(FileNotFoundError, NotADirectoryError):
            found = os.lstat(self.path)
        if found is None or not samestat(self._known.setdefault("file", found), found):
            raise OSError(
                errno.ESTALE,
                f"{self.path} was moved, removed or replaced while this process uses it, so "
                f"nothing was read or written. Put it back, or start this process anew.",
            )

    def forget(self) -> None:
        """Take the file that is there when it is opened next."""
        self._known.clear()


def _no_file(path: str) -> PermissionError:
    return PermissionError(
        f"{path} is a link, or something else that is no file; it was not followed. Remove it, or "
        f"take another path."
    )


def _is_ours(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def _unfinished(path: str) -> str:
    return f"{path}-new-"


def _remove_unfinished(path: str) -> None:
    """Remove the second name of a file whose maker was killed, or is about to remove it."""
    found = os.lstat(path)
    if found.st_nlink > 1:
        folder, start = os.path.split(_unfinished(path))
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):
                other = os.path.join(folder, name)
                if name.startswith(start) and samestat(os.lstat(other), found):
                    os.unlink(other)


def _set_mode(path: str, mode: int) -> None:
    """chmod, but not of what a link leads to.

    A file that is opened for its path alone keeps its locks when it is closed.
    """
    if not hasattr(os, "O_PATH"):
        os.chmod(path, mode, follow_symlinks=os.chmod not in os.supports_follow_symlinks)
        return
    number = os.open(path, os.O_PATH | _NO_LINK)
    try:
        if stat.S_ISLNK(os.fstat(number).st_mode):
            raise _no_file(path)
        try:
            os.chmod(f"/proc/self/fd/{number}", mode)
        except FileNotFoundError:  # no /proc here
            os.chmod(path, mode)
    finally:
        os.close(number)
