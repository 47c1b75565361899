"""Puts the tables of a run into the pages, between markers that name them.

<!-- benchmark: NAME -->
what stands here is replaced
<!-- /benchmark -->
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Final

from .results import Results

ROOT: Final = Path(__file__).parent.parent
_BLOCK: Final = re.compile(
    r"(?P<begin><!-- benchmark: (?P<name>\w+) -->\n).*?(?P<end><!-- /benchmark -->)", re.S
)


def pages() -> list[Path]:
    """Every page that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render_pages(results: Results) -> None:
    """Write the tables of `results` into all pages."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(rendered(text, results), encoding="utf-8")


def rendered(text: str, results: Results) -> str:
    """The text of a page with the tables of `results` in it."""
    return _BLOCK.sub(
        lambda found: f"{found['begin']}\n{_block(found['name'], results)}\n\n{found['end']}", text
    )


def _block(name: str, results: Results) -> str:
    table = results.table(name)
    if table is None:
        return "Not measured in this run."
    section = "" if table.name == "targets" else f" {table.section}"  # those are made of all
    command = f"`python -m benchmarks{section} --rounds {results.options['rounds']}`"
    said = f"{table.note} {command}: {results.provenance()}".lstrip()
    lines = textwrap.fill(f"({said})", 100, break_long_words=False, break_on_hyphens=False)
    return f"{table.markdown()}\n\n{lines}"
