"""The pages of the documentation, and the code in them: for the tests that run it.

As a program, it follows pages in empty folders with the session_sync that is installed, and nothing
of this tree: `python tests/pages.py docs/quickstart/telebot.md`. For that it needs Python alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>[\w{}-]*)(?P<rest>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
# The line before the code of a program that the reader is to put into a file.
_INTO = re.compile(r"`(?P<file>\w+\.py)`[^`\n]*:\n\n$")


class Snippet(NamedTuple):
    """Code on a page; `file` if the page says into which file it goes."""

    line: int
    kind: str
    code: str
    file: str | None


class Run(NamedTuple):
    """A command on a page, and what it prints according to the page."""

    line: int
    command: str
    printed: str


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def snippets(page: Path) -> list[Snippet]:
    """All code of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        named = _INTO.search(text, 0, match.start()) if match["kind"] == "python" else None
        line = text.count("\n", 0, match.start("code")) + 1
        file = named["file"] if named else None
        found.append(Snippet(line, match["kind"], textwrap.dedent(match["code"]), file))
    return found


def python_of(page: Path) -> list[Snippet]:
    """The Python code of a page that is not a program of its own."""
    return [one for one in snippets(page) if one.kind == "python" and one.file is None]


def programs_of(page: Path) -> list[Snippet]:
    """The programs on a page."""
    return [one for one in snippets(page) if one.file is not None]


def steps(page: Path) -> Iterator[Snippet | Run]:
    """What a reader does who follows the page: he writes programs, and runs them. A command is one
    that is followed by what it prints."""
    found = snippets(page)
    for one, following in zip(found, [*found[1:], None], strict=True):
        if one.file is not None:
            yield one
        elif one.kind == "sh" and following is not None and following.kind == "text":
            yield Run(one.line, one.code.strip(), following.code)


def run(folder: Path, command: str, typed: str, package: Path | None = None) -> str:
    """What a command prints in `folder`, with this Python and the session_sync in `package`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TOKEN", "PYTHONPATH")
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def typed_in(chat: str) -> str:
    """What Alex says in a chat."""
    return "".join(f"{line}\n" for line in re.findall(r"^Alex: (.*)$", chat, re.M))


def follow(page: Path, folder: Path, package: Path | None = None) -> None:
    """Do all that a page says, in an empty folder."""
    for step in steps(page):
        if isinstance(step, Run):
            printed = run(folder, step.command, typed_in(step.printed), package)
            assert printed == step.printed, f"{title(page)}:{step.line}: {printed}"
        else:
            assert step.file is not None
            (folder / step.file).write_text(step.code, encoding="utf-8")


def main() -> None:
    """Follow the pages that the command line names."""
    for argument in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            follow(Path(argument).resolve(), Path(folder))
        print(f"{argument}: done, and all was printed as it stands there")


if __name__ == "__main__":
    main()
