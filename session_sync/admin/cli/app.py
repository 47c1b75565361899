"""The commands together, and what becomes of their errors.

This module knows the commands by name; it knows nothing of what they do.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any, Final

import click

from ... import __version__
from .backup import backup
from .doctor import doctor
from .errors import Code, failure_of, say
from .forget import forget
from .sessions import ls, rm, set_, show
from .stats import stats
from .store import place_options, remember_secrets, without_secrets
from .transfer import copy, export, import_
from .watch import watch

_EPILOG: Final = (
    "Exit codes: 0 success, 1 not found or not all done, 2 wrong usage, 3 session locked "
    "(timeout), 4 store not found, unreachable or refused."
)


class _App(click.Group):
    """A group whose commands end with one sentence and an exit code, and never with a traceback
    for what the user can put right."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe is noticed
        except BrokenPipeError:
            # What is left in the buffer has to go somewhere when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(Code.BROKEN_PIPE)
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            ctx.exit(Code.INTERRUPTED)
        except click.UsageError as error:
            text = without_secrets(ctx, error.format_message())
            raise click.UsageError(text, error.ctx) from None
        except Exception as error:
            failure = failure_of(error)
            if failure is None:  # also click's own ways to end
                raise
            say(without_secrets(ctx, str(failure)))
            ctx.exit(failure.code)
        return result


@click.group(cls=_App, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="session-sync")
@place_options
def app(storage: str | None, **_place: object) -> None:
    """Look into a store of sessions, and change it, while bots run on it.

    The store is a URL, such as sqlite:///sessions.db, disk:///sessions or redis://localhost: the
    same one that the bot has, with --storage before or after the command, or in
    SESSION_SYNC_STORAGE.
    """
    if storage is not None:
        remember_secrets(storage)
    warnings.simplefilter("always", RuntimeWarning)
    setattr(warnings, "showwarning", _warn)  # noqa: B010 (mypy wants all parameters by name)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # in a locale that is not UTF-8


def _warn(message: Warning | str, *_where: object) -> None:
    say(f"warning: {message}")


_COMMANDS: Final[tuple[click.Command, ...]] = (
    ls,
    show,
    set_,
    rm,
    export,
    import_,
    copy,
    backup,
    stats,
    forget,
    watch,
    doctor,
)
for _command in _COMMANDS:
    app.add_command(_command)
