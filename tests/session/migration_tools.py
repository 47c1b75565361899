"""What the tests of migrations share: a class of sessions in its newest version, an old record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from session_sync import Session, SessionManager, field


def split_name(fields: dict[str, Any]) -> None:
    fields["first"], _, fields["last"] = fields.pop("name").partition(" ")


def count_lines(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "lines": [{"text": text} for text in fields.get("lines", [])]}


@dataclass
class Line:
    text: str


class Person(Session):
    migrations = {2: split_name, 3: count_lines}
    first: str = ""
    last: str = ""
    lines: list[Line] = field(default_factory=list)


OLD = {"name": "Alex Doe", "lines": ["a"]}

NEW = {"first": "Alex", "last": "Doe", "lines": [{"text": "a"}], "$version": 3}


def make_storage(storage: Any) -> Any:
    """Each kind, with an old session."""
    storage.set("user:1", OLD)
    return storage


def make_people(storage: Any) -> SessionManager[Person]:
    return SessionManager(Person, storage=storage)
