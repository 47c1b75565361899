"""One session, or a list of them: `ls`, `show`, `set`, `rm`.

This module knows fields and keys; how a store is opened is known to `store.py`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import click

from ...errors import SessionDecodeError, SessionError
from ...session.keys import StorageKey
from ...session.metadata import AT, Timers, is_field, standing_in, version_of
from ...session.ttl import ttl
from .errors import Code, Failure, code_of, say
from .jsonl import jsonable, type_name, value_of
from .output import Columns, is_terminal, json_option, plain, print_json, print_rows, seconds, text
from .store import Store, View, confirm, with_store, with_view

_PARTS: Final = ("user", "chat", "thread", "business")
_NAMED: Final = 10  # keys that a question names


def user_and_chat(command: Any) -> Any:
    """The options that select sessions by their user and chat."""
    command = click.option("--chat", type=int, metavar="ID", help="Those of a chat.")(command)
    return click.option("--user", type=int, metavar="ID", help="Those of a user.")(command)


@click.command()
@user_and_chat
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="No more than N.")
@json_option
@with_view
def ls(view: View, user: int | None, chat: int | None, limit: int | None, as_json: bool) -> None:
    """List the keys of all sessions, or of those of a user or chat."""
    keys = itertools.islice(view.find(user, chat), limit)
    if as_json or not is_terminal():
        print_rows(({"key": key} for key in keys), {"key": text}, as_json)
    else:
        columns: Columns = {"key": text, **dict.fromkeys(_PARTS, text)}
        print_rows(({"key": key, **_parts(key)} for key in keys), columns, as_json)


def _parts(key: str) -> dict[str, Any]:
    try:
        parsed = StorageKey.parse(key)
    except ValueError:
        return dict.fromkeys(_PARTS)
    return {part: getattr(parsed, part) for part in _PARTS}


@click.command()
@click.argument("key", required=False)
@user_and_chat
@click.option("--values", is_flag=True, help="Show what is in the fields, too.")
@json_option
@with_view
def show(
    view: View, key: str | None, user: int | None, chat: int | None, values: bool, as_json: bool
) -> None:
    """Show the fields of one session, or of all of a user.

    Of each field the name, the type, and when it expires; and under $at the conversations in which
    the user stands. KEY names one session, --user and --chat all sessions of a user, of a chat, or
    of a user in a chat.
    """
    if (key is None) != (user is not None or chat is not None):
        raise click.UsageError("give a KEY, or --user ID, --chat ID, or both of them")
    if key is not None:
        if not _show(view, key, values, as_json):
            raise _not_there(key)
        return
    found = failed = 0
    for each in view.find(user, chat):
        try:
            found += _show(view, each, values, as_json, named=True)
        except SessionError as error:
            failed += 1
            say(str(error))
    if failed:
        raise Failure(f"{failed} sessions cannot be read")
    if not found:
        raise Failure("no such session is stored")


def _show(view: View, key: str, values: bool, as_json: bool, *, named: bool = False) -> bool:
    """Print one session; `named`: with its key, also on a pipe. False: there is none."""
    stored = view.get(key)
    if stored is None:
        return False
    fields = {field["field"]: field for field in fields_of(key, stored, values)}
    standing = standing_in(stored, key)
    if as_json:
        for field in fields.values():
            del field["field"]
        shown = {"key": key, "version": version_of(stored, key), "fields": fields}
        if standing:
            shown["stands_in"] = {
                name: {"type": type_name(value), **_said(value, values)}
                for name, value in standing.items()
            }
        print_json(shown)
        return True
    columns: dict[str, Any] = {"field": text, "type": text, "expires_in": seconds}
    if values:
        columns["value"] = text
        for field in fields.values():
            field["value"] = repr(stored[field["field"]])
    for name, value in standing.items():
        fields[f"{AT} {name}"] = {
            "field": f"{AT} {name}",
            "type": type_name(value),
            "expires_in": None,
            "value": repr(value),
        }
    if named and not is_terminal():
        columns = {"key": text, **columns}
    rows = ({"key": key, **field} for field in fields.values())
    print_rows(rows, columns, False, title=key)
    return True


def fields_of(key: str, stored: dict[str, Any], values: bool) -> Iterator[dict[str, Any]]:
    """What is shown of each field that has not expired."""
    timers = Timers(stored, key)
    deadlines, now, expired = timers.to_store(), time.time(), timers.all_expired()
    for name, value in stored.items():
        if not is_field(name) or name in expired:
            continue
        ends = round(deadlines[name][0] - now, 1) if name in deadlines else None
        yield {"field": name, "type": type_name(value), "expires_in": ends, **_said(value, values)}


def _said(value: Any, values: bool) -> dict[str, Any]:
    return {"value": jsonable(value)} if values else {}


def _not_there(key: str) -> Failure:
    return Failure(f"no session is stored under {key!r}")


# A value may begin with a minus sign.
@click.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("key")
@click.argument("field")
@click.argument("value", required=False)
@click.option("--text", "is_text", is_flag=True, help="VALUE is a plain string, not JSON.")
@click.option("--delete", is_flag=True, help="Delete the field instead.")
@click.option(
    "--ttl",
    "life_time",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="The field disappears after that time; 0: it stays.",
)
@click.option("--create", is_flag=True, help="Also if there is no such session yet.")
@with_store
def set_(
    store: Store,
    key: str,
    field: str,
    value: str | None,
    is_text: bool,
    delete: bool,
    life_time: float | None,
    create: bool,
) -> None:
    """Set a field of a session, or delete it.

    VALUE is JSON as in an export: 7, '"text"', [1, 2], '{"$set": [1]}'. A VALUE that is - is read
    from the standard input, where no list of processes shows it.

    With a store that has a ttl, give its URL the same one: the session is stored with that
    lifetime.
    """
    if (value is None) != delete:
        raise click.UsageError("give a VALUE, or --delete")
    new = None if value is None else _typed_in(value, is_text)
    if new is not None and life_time is not None:
        new = ttl(new, life_time)
    store.warn_of_life_times()
    with store.sessions.scopes.as_stored(key) as session:
        if not create and not store.has(key):
            raise Failure(f"no session is stored under {key!r}; --create makes it")
        if delete and field not in session:
            raise Failure(f"session {key!r} has no field {field!r}")
        try:
            if delete:
                del session[field]
            else:
                session[field] = new
        except ValueError as error:  # a name that no field may have
            raise click.UsageError(str(error)) from None


def _typed_in(value: str, is_text: bool) -> Any:
    if value == "-":
        value = sys.stdin.read()
        value = value.removesuffix("\n") if is_text else value
    if is_text:
        return value
    try:
        return value_of(value)
    except SessionDecodeError as error:
        raise click.UsageError(
            f"VALUE: {error}. Of a string, write the quotes, too ('\"text\"'), or use --text."
        ) from None


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@with_store
def rm(store: Store, keys: tuple[str, ...], yes: bool) -> None:
    """Delete sessions, also those that cannot be read.

    Each is deleted under its lock.
    """
    keys = tuple(dict.fromkeys(keys))
    confirm(f"Delete {named(keys)}?", yes)
    errors: list[SessionError] = []
    missing = False
    for key in keys:
        try:
            found = store.remove(key)
        except SessionError as error:
            errors.append(error)
            say(str(error))
            continue
        if found:
            click.echo(f"deleted {plain(key)}")
        else:
            missing = True
            say(str(_not_there(key)))
    if errors or missing:
        click.get_current_context().exit(Code.FAILED if missing else code_of(errors))


def named(keys: tuple[str, ...] | list[str]) -> str:
    """So many sessions, and which."""
    some = ", ".join(plain(key) for key in keys[:_NAMED])
    more = ", ..." if len(keys) > _NAMED else ""
    return f"{len(keys)} session{'s' * (len(keys) != 1)} ({some}{more})"
