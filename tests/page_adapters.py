"""The storages of docs/adapters.md and their suites, as a module for other processes, too."""

from __future__ import annotations

import re

from pages import DOCS, python_of

PAGE = DOCS / "adapters.md"

for _snippet in python_of(PAGE):
    if re.search(r"^class ", _snippet.code, re.M):
        _lines = "\n" * (_snippet.line - 1) + _snippet.code
        exec(compile(_lines, str(PAGE), "exec", dont_inherit=True), globals())
