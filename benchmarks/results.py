"""All that one run has found, with where it ran; it is kept as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .tables import Table

_NAME: Final = "results.json"


@dataclass
class Results:
    """The tables of one run, and what they depend on."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    skipped: dict[str, str]
    tables: list[Table]

    def table(self, name: str) -> Table | None:
        """The table of this name, if it was measured."""
        return next((table for table in self.tables if table.name == name), None)

    def provenance(self) -> str:
        """One sentence: machine, versions, date."""
        where = (
            f"{self.machine['processor']}, {self.machine['cpus']} CPUs, {self.machine['system']}"
        )
        what = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{where}; {what}; {self.date}."

    def save(self, folder: Path) -> None:
        """Write `results.json` into a folder."""
        data = {**vars(self), "tables": [table.as_json() for table in self.tables]}
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, indent=1, ensure_ascii=False)
        (folder / _NAME).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read what `save` has written."""
        data = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        return cls(**{**data, "tables": [Table.from_json(table) for table in data["tables"]]})
