"""`watch`: what happens to one session, as it happens.

This module knows what is stored at one moment and the next; it takes no lock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import click

from ...errors import SessionDecodeError
from .output import is_terminal, json_option, plain, print_json
from .sessions import fields_of
from .store import View, with_view

_COLOURS: Final = {"new": "green", "changed": "yellow", "gone": "red"}

#: A field, or None for the session itself; and what it is now, by `fields_of`.
State = dict[str, dict[str, Any]]


@click.command()
@click.argument("key")
@click.option("--values", is_flag=True, help="Show what is in the fields, too.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.01),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait between two looks.",
)
@json_option
@with_view
def watch(view: View, key: str, values: bool, interval: float, as_json: bool) -> None:
    """Print what changes in a session, until Ctrl-C.

    The session KEY need not be stored yet. It is looked at as it was last saved: nothing is locked,
    and no lifetime renewed. What comes and goes between two looks is not seen.
    """
    before: State = {}
    trouble = ""
    while True:
        try:
            now, problem = _state(view, key), ""
        except SessionDecodeError as error:
            now, problem = before, str(error)
        if problem != trouble:
            _print({"what": "unreadable" if problem else "readable", "field": None}, as_json)
            trouble = problem
        for change in _changes(before, now):
            if not values:
                change.pop("value", None)
            _print(change, as_json)
        before = now
        time.sleep(interval)


def _state(view: View, key: str) -> State:
    # With the values, whether they are shown or not: else a change of one would not be seen.
    return {field["field"]: field for field in fields_of(key, view.get(key) or {}, values=True)}


def _changes(before: State, now: State) -> Iterator[dict[str, Any]]:
    for name in before.keys() - now.keys():
        yield {"what": "gone", "field": name}
    for name, field in now.items():
        old = before.get(name)
        if old is None or (old["type"], old["value"]) != (field["type"], field["value"]):
            what = "new" if old is None else "changed"
            yield {"what": what, "field": name, "type": field["type"], "value": field["value"]}


def _print(change: dict[str, Any], as_json: bool) -> None:
    at = time.time()
    if as_json:
        print_json({"at": at, **change})
    else:
        clock = time.strftime("%H:%M:%S", time.localtime(at))
        said = [clock, change["what"], change["field"] or "", change.get("type", "")]
        if "value" in change:
            said.append(repr(change["value"]))
        line = ("  " if is_terminal() else "\t").join(plain(part) for part in said)
        click.secho(line, fg=_COLOURS.get(change["what"]))
    sys.stdout.flush()
