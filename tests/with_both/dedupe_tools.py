"""What the tests of repeated updates share."""

from __future__ import annotations

from typing import Any

import pytest

from session_sync import SessionManager

KEY = "user:1:chat:1"


def make_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_sessions() -> SessionManager[Any]:
    return SessionManager(dedupe=5)


def count(at: Any) -> None:
    at.session.count = at.session.get("count", 0) + 1


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)
