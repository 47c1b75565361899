"""What copies, imports or deletes whole sessions writes nothing once its lock is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from session_sync import (
    MemoryStorage,
    SessionConflictError,
    SessionDeadlockError,
    SessionManager,
    copy_storage,
)

pytest.importorskip("redis", reason="needs the extra 'redis'")

from session_sync import RedisStorage


class Paused(RedisStorage):
    """A store whose process stands still, once a session is open, until its lease is over and a bot
    has had the session."""

    def open_record(self, key: str, timeout: float, /) -> Any:
        opened = super().open_record(key, timeout)
        self._client.delete(opened.names[1])
        bot: SessionManager[Any] = SessionManager(storage=RedisStorage(self._client))
        with bot.session_scope(key) as session:
            session.by = "the bot"
        return opened

    def open_nowait(self, key: str, /) -> None:
        """Only the other way."""


@pytest.fixture
def store(redis_url: str) -> Iterator[Paused]:
    some = Paused(redis_url)
    yield some
    some.close()


@pytest.fixture
def key(store: Paused) -> str:
    name = f"user:{uuid4().int}"
    store.set(name, {"by": "nobody"})
    return name


def test_a_copy_writes_nothing_over_what_a_bot_stored_meanwhile(store: Paused, key: str) -> None:
    source = MemoryStorage()
    source.set(key, {"by": "the copy"})
    source.set("user:2", {})
    with pytest.raises(ExceptionGroup, match="1 sessions were not copied") as caught:
        copy_storage(source, store)
    (error,) = caught.value.exceptions
    assert isinstance(error, SessionConflictError)
    assert key in str(error)
    assert store.get(key) == {"by": "the bot"}


@pytest.mark.parametrize("command", ["import", "rm"])
def test_a_command_writes_nothing_over_what_a_bot_stored_meanwhile(
    command: str, store: Paused, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing = pytest.importorskip("click.testing", reason="needs the extra 'cli'")
    from session_sync.admin.cli import store as opening
    from session_sync.admin.cli.app import app
    from session_sync.admin.cli.jsonl import to_line

    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(to_line(key, {"by": "the import"}))
    arguments = {"import": ("import", str(lines)), "rm": ("rm", "-y", key)}[command]
    monkeypatch.setattr(opening, "storage_from_url", lambda *_args, **_options: store)
    done = testing.CliRunner().invoke(app, [*arguments, "-s", "redis://localhost"])
    assert done.exit_code == 1
    assert key in done.stderr
    assert "was not saved" in done.stderr
    assert store.get(key) == {"by": "the bot"}


def test_a_copy_into_a_session_that_is_open_around_it_is_refused() -> None:
    source, target = MemoryStorage(), MemoryStorage()
    source.set("user:1", {"a": 1})
    source.set("user:2", {"a": 2})
    bot: SessionManager[Any] = SessionManager(storage=target)
    with bot.session_scope("user:1") as session:
        with pytest.raises(ExceptionGroup, match="1 sessions were not copied, 1 were") as caught:
            copy_storage(source, target)
        session.b = 1
    (error,) = caught.value.exceptions
    assert isinstance(error, SessionDeadlockError)
    assert "call copy_storage() outside of handlers" in str(error)
    assert target.get("user:1") == {"b": 1}
    assert target.get("user:2") == {"a": 2}


def test_a_copy_shares_no_container_with_its_source() -> None:
    class Sharing(MemoryStorage):
        def get(self, key: str) -> Any:
            return shared

    shared = {"items": [1]}
    source, target = Sharing(), MemoryStorage()
    source.set("user:1", {})
    assert copy_storage(source, target) == 1
    shared["items"].append(2)
    assert target.get("user:1") == {"items": [1]}
