"""`python -m session_sync`: look into a store, and copy one to another."""

from __future__ import annotations

import argparse
import pprint
import sys
from typing import Any

from .copying import copy_storage
from .storages.base import KVStorage
from .storages.urls import storage_from_url


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; the exit code is 0 if it was done."""
    parser = argparse.ArgumentParser(prog="python -m session_sync", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    show = commands.add_parser("show", help="the fields of one session")
    show.add_argument("storage", help="sqlite:///sessions.db, redis://localhost, ...")
    show.add_argument("key", help="user:1:chat:1, for example")
    show.set_defaults(command=_show)
    copy = commands.add_parser("copy", help="all sessions from one store into another")
    copy.add_argument("source", help="a URL, as above")
    copy.add_argument("target")
    copy.set_defaults(command=_copy)
    options = parser.parse_args(arguments)
    try:
        return int(options.command(options))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        for each in getattr(error, "exceptions", ()):
            print(f"  {each}", file=sys.stderr)
        return 1


def _show(options: argparse.Namespace) -> int:
    storage = storage_from_url(options.storage)
    fields = storage.get(options.key)
    _close(storage)
    if fields is None:
        print(f"no session is stored under {options.key!r}", file=sys.stderr)
        return 1
    pprint.pp(fields, sort_dicts=False)
    return 0


def _copy(options: argparse.Namespace) -> int:
    source, target = storage_from_url(options.source), storage_from_url(options.target)
    done = 0

    def progress(key: str) -> None:
        nonlocal done
        done += 1
        if done % 1000 == 0 or sys.stderr.isatty():
            print(f"\r{done} sessions", end="", file=sys.stderr, flush=True)

    try:
        copied = copy_storage(source, target, progress=progress)
    finally:
        if done:
            print(file=sys.stderr)
        _close(source)
        _close(target)
    print(f"copied {copied} sessions")
    return 0


def _close(storage: KVStorage[Any]) -> None:
    close = getattr(storage, "close", None)
    if close is not None:
        close()


if __name__ == "__main__":
    sys.exit(main())
