"""The pages of the documentation, and the code in them: for the tests that run it."""

from __future__ import annotations

import re
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
