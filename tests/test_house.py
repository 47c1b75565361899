"""The house is as CONTRIBUTING.md draws it: imports point down, and each library has its place."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from pages import ROOT, snippets

PACKAGE = ROOT / "session_sync"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

# Who may import what is not Python's own. What only some have is for its one place.
LIBRARIES = {
    "cachetools": {"storages/memory.py"},
    "click": {f"admin/cli/{path.name}" for path in (PACKAGE / "admin" / "cli").glob("*.py")}
    - {f"admin/cli/{name}.py" for name in ("__init__", "files", "jsonl", "reader")},
    "diskcache": {"storages/disk.py"},
    "msgspec": {
        "admin/cli/jsonl.py",
        "session/types/annotations.py",
        "session/types/objects.py",
        "session/types/scalars.py",
        *(f"storages/codec/{name}.py" for name in ("codec", "malformed", "pack", "record")),
    },
    "pydantic": {"session/types/objects.py"},
    "redis": {
        "admin/importers/telebot_redis.py",
        "storages/redis/clients.py",
        "storages/redis/connections.py",
        "storages/redis/listing.py",
        "storages/redis/opening.py",
        "storages/redis/records.py",
        "storages/redis/refusals.py",
        "storages/redis/server.py",
        "storages/redis/storage.py",
    },
    "rich": {"admin/cli/__init__.py", "admin/cli/output.py"},
    "telebot": {"telebot/library.py", "testing/__main__.py"},
    "telegram": {"ptb/library.py", "testing/__main__.py"},
}
KNOWN = {*sys.stdlib_module_names, "annotationlib", "session_sync"}  # the second one: 3.14's


class Import(NamedTuple):
    """The dotted name that a line imports; `for_types` if it is never run."""

    line: int
    name: str
    for_types: bool


def imports(file: str) -> Iterator[Import]:
    """All imports of a file of the package, with absolute names."""
    tree = ast.parse(FILES[file].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["session_sync", *Path(file).parent.parts]
            above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(node.lineno, name, id(node) in for_types)


def file_of(name: str) -> str | None:
    """The file of the package that a dotted name leads to, if it leads into the package."""
    first, *parts = name.split(".")
    if first != "session_sync":
        return None
    while parts:  # the last ones may be names within a module
        for file in ("/".join(parts) + ".py", "/".join((*parts, "__init__.py"))):
            if file in FILES:
                return file
        parts.pop()
    return "__init__.py"


@cache
def drawn() -> list[str]:
    """What the map of the house names, from the roof down."""
    (house,) = [
        snippet.code
        for snippet in snippets(ROOT / "CONTRIBUTING.md")
        if snippet.code.startswith("session_sync/\n")
    ]
    left = [re.split(r" {3,}", line.strip())[0] for line in house.splitlines()[1:]]
    return " ".join(left).split()


def floor(file: str) -> int:
    """How far down a file stands on the map: as itself, or in its folder."""
    return drawn().index(top_of(file))


def top_of(file: str) -> str:
    """The entry at the top of the package that a file is, or is in."""
    folder, slash, _ = file.partition("/")
    return folder + slash


def test_the_map_has_every_entry_and_no_other() -> None:
    places = drawn()
    assert len(places) == len(set(places))
    assert set(places) == {top_of(file) for file in FILES}
    assert len({*places} - {"__init__.py", "__main__.py"}) <= 10


@pytest.mark.parametrize("file", sorted(FILES))
def test_imports_point_down(file: str) -> None:
    for each in imports(file):
        target = file_of(each.name)
        if target and not each.for_types:
            up = floor(target) < floor(file)
            assert not up, f"line {each.line} of {file} imports {each.name} from above"


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_module_says_what_it_is_for_and_what_it_does_not_know(file: str) -> None:
    text = FILES[file].read_text(encoding="utf-8")
    opening = ast.get_docstring(ast.parse(text)) or ""
    assert opening
    if not file.endswith(("__init__.py", "__main__.py")):
        assert re.search(r"\bknows?\b", opening)
    assert len(text.splitlines()) <= 500 or "is longer than others: " in " ".join(opening.split())


def test_no_import_leads_back() -> None:
    """Within a folder, too."""
    graph = {
        file: {
            target
            for each in imports(file)
            if (target := file_of(each.name)) and not each.for_types and target != file
        }
        for file in FILES
    }
    assert list(TopologicalSorter(graph).static_order())


def test_each_library_is_imported_in_its_place_alone() -> None:
    found: dict[str, set[str]] = {}
    for file in FILES:
        for each in imports(file):
            library = each.name.partition(".")[0]
            if library not in KNOWN and not each.for_types:
                found.setdefault(library, set()).add(file)
    assert found == LIBRARIES


def test_no_word_is_used_that_only_this_project_knows() -> None:
    private = re.compile(r"\b(rooms?|doors?|bags?|party|grip|crew)\b", re.I)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in (*FILES.values(), *pages):
        if "_build" not in path.parts:
            assert not private.search(path.read_text(encoding="utf-8")), path
