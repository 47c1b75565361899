"""What the tests of `chat_session` share."""

from __future__ import annotations

from typing import Any

import pytest

from session_sync import MemoryStorage, Session, SessionManager, by_chat

USER, CHAT = "user:1:chat:-100", "chat:-100"


class MySession(Session):
    count: int = 0


class MyChatSession(Session):
    total: int = 0


#: The parameters of the fixture `managers`.
STORES = ["one store", "two stores"]


def make_managers(
    request: pytest.FixtureRequest,
) -> tuple[SessionManager[MySession], SessionManager[MyChatSession]]:
    sessions = SessionManager(MySession)
    storage = sessions.storage if request.param == "one store" else MemoryStorage()
    return sessions, SessionManager(MyChatSession, storage=storage, get_storage_key=by_chat)


def locks(*managers: SessionManager[Any]) -> list[int]:
    return [len(manager.locks) for manager in managers]
