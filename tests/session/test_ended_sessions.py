"""What a session does that is used after its block has ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from session_sync import MemoryStorage, SessionClosedError, SessionManager


def test_a_lazy_one_that_was_never_loaded_has_nothing_to_write() -> None:
    storage = MemoryStorage()
    sessions: SessionManager[Any] = SessionManager(storage=storage, lazy=True)

    async def use() -> None:
        async with sessions.session_scope("user:1") as session:
            pass
        await session.aflush()
        await session.arelease()

    with sessions.session_scope("user:1") as session:
        pass
    session.flush()
    session.release()
    asyncio.run(use())
    assert storage.get("user:1") is None


def test_one_whose_last_changes_were_not_saved_says_so_at_a_flush() -> None:
    class Full(MemoryStorage):
        def save(self, key: str, record: Any) -> None:
            raise OSError(28, "No space left on device")

    sessions: SessionManager[Any] = SessionManager(storage=Full())
    with pytest.raises(OSError, match="No space"), sessions.session_scope("user:1") as session:
        session.a = 1
    with pytest.raises(SessionClosedError, match="were not saved"):
        session.flush()
    with pytest.raises(SessionClosedError, match="were not saved"):
        asyncio.run(session.aflush())
    session.release()
    asyncio.run(session.arelease())
