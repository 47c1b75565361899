"""`forget`: every session of a user, or of a chat, deleted.

This module knows the options of the command; how sessions are found and deleted is known to
`lifecycle/bulk.py`.
"""

from __future__ import annotations

import click

from .output import json_option, print_json, print_rows, text
from .sessions import named, user_and_chat
from .store import Place, at_place, confirm


@click.command()
@user_and_chat
@click.option("--dry-run", is_flag=True, help="List what would be deleted, and delete nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@at_place
def forget(
    place: Place, user: int | None, chat: int | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete all sessions of a user, or of a chat.

    Of a user: the right to erasure of data-protection law (GDPR). With both options, of one user in
    one chat. Sessions that a group shares belong to no user, and stay. Backups are not looked
    through, nor what the bot keeps elsewhere.
    """
    if user is None and chat is None:
        raise click.UsageError("give --user ID, --chat ID, or both")
    with place.look() as view:
        keys = list(view.find(user, chat))
    if dry_run:
        print_rows(({"key": key} for key in keys), {"key": text}, as_json)
        return
    if keys:
        confirm(f"Delete {named(keys)}?", yes)
    with place.open() as store:
        try:
            number = store.sessions.forget(user=user, chat=chat)
        except ExceptionGroup as group:
            group.add_note("Sessions that cannot be read are deleted by: session-sync rm KEY")
            raise
    if as_json:
        print_json({"deleted": number})
    else:
        click.echo(f"{number} sessions deleted")
