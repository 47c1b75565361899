"""What the tests of interrupted ends and of lost scopes share."""

from __future__ import annotations

from typing import Any

from session_sync import SessionManager


def is_free(sessions: SessionManager[Any]) -> bool:
    return len(sessions.locks) == 0
