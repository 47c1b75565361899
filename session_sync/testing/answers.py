"""How the Bot API answers: a result, or an error with its code and description.

This module knows the form of an answer; it knows no method.
"""

from __future__ import annotations

import json
from typing import Any, Final


class BotAPIError(Exception):
    """An answer of the Bot API with `"ok": false`."""

    def __init__(self, code: int, description: str, **parameters: Any) -> None:
        super().__init__(description)
        self.code: Final = code
        self.description: Final = description
        self.parameters: Final = parameters


def succeeded(result: Any, **more: Any) -> bytes:
    return json.dumps({"ok": True, "result": result, **more}).encode()


def failed(error: BotAPIError) -> bytes:
    failure = {"ok": False, "error_code": error.code, "description": error.description}
    if error.parameters:
        failure["parameters"] = error.parameters
    return json.dumps(failure).encode()
