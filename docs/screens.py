"""Makes the pictures of the command line for these pages: `python docs/screens.py`.

Each is what a real command has printed on a terminal, over a store that is made for it.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from rich import _export_format as export_format
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from session_sync import SessionManager, SQLiteStorage, StorageKey, ttl

ROOT: Final = Path(__file__).parents[1]
COLUMNS: Final = 92
#: The name of each picture, the command, and what the operator answers.
SCREENS: Final = {
    "cli_ls": ("ls --user 7", ""),
    "cli_show": ("show user:7:chat:7 --values", ""),
    "cli_rm": ("rm user:7:chat:-100", "y\n"),
    "cli_stats": ("stats --limit 2", ""),
    "cli_doctor": ("doctor", ""),
}
# Without the fonts that rich would have a browser fetch from elsewhere.
FORMAT: Final = re.sub(
    r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", "", export_format.CONSOLE_SVG_FORMAT, flags=re.S
)


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "pictures")
    into = parser.parse_args().into.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_store()
        for name, (arguments, typed) in SCREENS.items():
            screen = on_terminal(arguments.split(), typed)
            (into / f"{name}.svg").write_text(picture(name, arguments, screen), encoding="utf-8")


def make_store() -> None:
    """A bot's store: some users, one of them with a cart, and one session is damaged."""
    with SessionManager(storage=SQLiteStorage("sessions.db", ttl=30 * 86_400)) as sessions:
        for number in range(7, 240):
            with sessions.session_scope(StorageKey(user=number, chat=number)) as session:
                session.counter = number
                session.history = ["tea"] * (number**2 % 97)
        for key in (StorageKey(user=7, chat=7), StorageKey(user=7, chat=-100)):
            with sessions.session_scope(key) as session:
                session.cart = {1: ("tea", 2)}
                session.history = []
                session.code = ttl("4711", 900)
                session.admin = False
        sessions.storage.set("user:8:chat:8", {"$ttl": "damaged"})
    with closing(sqlite3.connect("sessions.db", isolation_level=None)) as file:
        # As if each had been left alone for another time, up to three weeks.
        file.execute("UPDATE sessions SET expires = expires - length(value) * 3000")


def on_terminal(arguments: list[str], typed: str) -> str:
    """What a command prints on a terminal."""
    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SESSION_SYNC_STORAGE": f"sqlite:///sessions.db?ttl={30 * 86_400}",
        "COLUMNS": str(COLUMNS),
        "TERM": "xterm-256color",
    }
    call = [sys.executable, "-m", "session_sync", *arguments]
    with subprocess.Popen(call, stdin=slave, stdout=slave, stderr=slave, env=environment):
        os.close(slave)
        screen = b""
        with suppress(OSError):  # which is how it ends
            while data := os.read(master, 65_536):
                screen += data
                if typed and screen.endswith(b"[y/N]: "):
                    os.write(master, typed.encode())
                    typed = ""
    os.close(master)
    lines = screen.decode().replace("\r\n", "\n")
    # A progress bar has been taken away again when the command has ended.
    return re.sub(r"\x1b\[\?25l.*?\x1b\[\?25h|\r?\x1b\[(?:1A\x1b\[)?2K", "", lines, flags=re.S)


def picture(name: str, arguments: str, screen: str) -> str:
    """The screen as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ session-sync {arguments}", style="bold"))
    console.print(Text.from_ansi(screen.rstrip()))
    svg = console.export_svg(
        title="session-sync", theme=MONOKAI, code_format=FORMAT, unique_id=name
    )
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    main()
