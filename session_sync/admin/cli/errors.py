"""How a command ends: exit codes, and an error in one sentence.

This module knows errors and exit codes; it knows no command.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

import click

from ...errors import SessionError, SessionLockTimeoutError
from .output import plain


class Code(IntEnum):
    """The exit codes; 0 is fine, and 2 is also click's for a wrong usage."""

    FAILED = 1  # not found, or some sessions could not be done
    USAGE = 2
    LOCKED = 3
    UNREACHABLE = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class Failure(Exception):  # noqa: N818 (named after what the user sees)
    """What ends a command: a sentence for the user, and the exit code."""

    def __init__(self, message: str, code: Code = Code.FAILED) -> None:
        super().__init__(message)
        self.code: Final = code


def say(text: str) -> None:
    """What the user is told beside the output: a sentence, or several lines."""
    lines = "\n".join(map(plain, text.split("\n")))
    click.echo(f"session-sync: {lines}", err=True)


def code_of(errors: Iterable[BaseException]) -> Code:
    """The code for several sessions that could not be done."""
    locked = all(isinstance(error, SessionLockTimeoutError) for error in errors)
    return Code.LOCKED if locked else Code.FAILED


def failure_of(error: Exception) -> Failure | None:
    """The end that `error` means; None if it is nothing that the user could put right."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, ExceptionGroup):
        lines = [f"{error.message}:", *(f"  {each}" for each in error.exceptions)]
        lines += getattr(error, "__notes__", ())
        return Failure("\n".join(lines), code_of(error.exceptions))
    if isinstance(error, SessionError):
        return Failure(str(error), code_of([error]))
    # By name, since neither of the two is imported for a store of the other kind.
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, (OSError, sqlite3.Error)) or library in ("redis", "diskcache"):
        return Failure(f"{type(error).__name__}: {error}", Code.UNREACHABLE)
    return None
