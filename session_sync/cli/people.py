"""`forget`: every session of a person, or of a chat, deleted."""

from __future__ import annotations

import click

from .output import json_option, print_json, print_rows, text
from .sessions import named, somebody
from .store import Store, confirm, with_store


@click.command()
@somebody
@click.option("--dry-run", is_flag=True, help="List what would be deleted, and delete nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@with_store
def forget(
    store: Store, user: int | None, chat: int | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete every session of a user: his right under data-protection law. Or of a chat, or of a
    user in a chat.

    What a group shares is nobody's, and stays. Nor are backups known here, or what the bot keeps
    elsewhere.
    """
    if user is None and chat is None:
        raise click.UsageError("say whose sessions: --user ID, --chat ID, or both")
    keys = list(store.sessions.find(user=user, chat=chat))
    if dry_run:
        print_rows(({"key": key} for key in keys), {"key": text}, as_json)
        return
    if keys:
        confirm(f"Delete {named(keys)}?", yes)
    try:
        number = store.sessions.forget(user=user, chat=chat)
    except ExceptionGroup as group:
        group.add_note("Sessions that cannot be read are deleted by: session-sync rm KEY")
        raise
    if as_json:
        print_json({"deleted": number})
    else:
        click.echo(f"{number} sessions deleted")
