"""The command line: `session-sync`, for the operator of a store while bots run on it.

It is an extra, and the only place that knows click and rich; nothing imports it but
`session_sync.__main__`.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Do what the command line says, and exit with a code that scripts can use."""
    try:
        import rich  # noqa: F401 (which is otherwise imported only when it is needed)

        from .app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        print("session-sync needs click and rich: pip install 'session-sync[cli]'", file=sys.stderr)
        sys.exit(2)
    app(prog_name="session-sync")
    sys.exit()  # which it has done
