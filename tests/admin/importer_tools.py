"""What the tests of the importers share."""

from __future__ import annotations

import pickle
from typing import Any

from session_sync import SessionDecodeError
from session_sync.admin.importers import IMPORTERS

EVERY_PROTOCOL = range(pickle.HIGHEST_PROTOCOL + 1)


def taken(name: str, source: object) -> dict[str, Any]:
    """What an importer yields, each key once; of an error its message."""
    found = list(IMPORTERS[name](str(source)))
    result = {key: str(got) if isinstance(got, Exception) else got for key, got in found}
    assert len(result) == len(found)
    assert all(isinstance(got, dict | SessionDecodeError) for _, got in found)
    return result


class Reducible:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts
