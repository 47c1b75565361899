"""The command line as a user who owns none of the files: `python unprivileged.py ARGUMENTS`.

Whoever is root may do everything, so it becomes another user, after all has been imported that it
could not import then.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from contextlib import suppress

MODULES = (
    "difflib",
    "importlib.metadata",
    "pwd",
    "rich.console",
    "session_sync.admin.cli.app",
    "session_sync.storages.disk",
    "session_sync.storages.sqlite",
)
NOBODY = 65_534

if __name__ == "__main__":
    for module in MODULES:
        with suppress(ImportError):
            importlib.import_module(module)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        atexit.register(os.seteuid, 0)  # for coverage, which writes what it has seen after this
    sys.modules["session_sync.admin.cli.app"].app(prog_name="session-sync")
