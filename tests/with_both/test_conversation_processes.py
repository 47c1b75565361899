"""Conversations of one user in two processes of a bot, which take the updates in turn.

As many as are promised: SESSION_SYNC_CONVERSATIONS=100 pytest tests/with_both -k conversation
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from conftest import message

from session_sync import SessionManager, storage_from_url
from session_sync.testing import OfflineBotAPI

HERE = Path(__file__).parent
WORKER = HERE / "conversation_worker.py"
NUMBER = int(os.environ.get("SESSION_SYNC_CONVERSATIONS", "10"))
KILLS = 50 if NUMBER >= 100 else 1
KEY = "user:1:chat:1"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has locks between processes"
)


@pytest.fixture(params=["ptb", "telebot"])
def framework(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"ptb": "telegram", "telebot": "telebot"}[request.param])
    return str(request.param)


@pytest.fixture(params=["sqlite", "disk", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        prefix = request.node.name.replace("[", "-").replace("]", "-")
        # The key of a process that was killed is free when its lease ends.
        lease = 5 if "killed" in prefix else 60
        return f"{request.getfixturevalue('redis_url')}/0?prefix={prefix}:&lease={lease}"
    return f"{request.param}:///{tmp_path / 'store'}"


class Worker:
    """A process of the bot."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    def send(self, update: dict[str, Any]) -> None:
        self._stdin.write(json.dumps(update).encode() + b"\n")
        self._stdin.flush()

    def handled(self) -> int:
        """The ID of the next update that it has handled; 0: it has ended."""
        return int(self._stdout.readline() or 0)

    def handle(self, update: dict[str, Any]) -> None:
        self.send(update)
        assert self.handled() == update["update_id"]

    def die(self) -> None:
        """Be killed in the middle of a step."""
        self.send(message(text="die"))
        assert self.handled() == 0
        assert self._process.wait(60) == -signal.SIGKILL


@pytest.fixture
def make_worker(framework: str, url: str, api: OfflineBotAPI) -> Iterator[Callable[[], Worker]]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PTB_TIMEDELTA": "1"}
    call = [sys.executable, str(WORKER), framework, url, api.base_url, api.token]
    with ExitStack() as stack:

        def make() -> Worker:
            process = subprocess.Popen(
                call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            stack.enter_context(process)  # which waits for it when its input has ended
            return Worker(process)

        yield make


def start() -> dict[str, Any]:
    return message(text="/start", entities=[{"type": "bot_command", "offset": 0, "length": 6}])


def stored(url: str) -> dict[str, Any]:
    with SessionManager(storage=storage_from_url(url)) as sessions:
        return dict(sessions.storage.get(KEY) or {})


def test_every_answer_finds_its_state(make_worker: Callable[[], Worker], url: str) -> None:
    both = [make_worker(), make_worker()]
    turns = cycle(both)
    for _ in range(NUMBER):
        for update in (start(), message(text="a"), message(text="b"), message(text="end")):
            next(turns).handle(update)
    assert stored(url) == {"counter": 3, "finished": NUMBER}
    next(turns).handle(start())
    for number in range(20 * NUMBER):
        next(turns).send(message(text=f"at once {number}"))
    for worker in both:
        for _ in range(10 * NUMBER):
            assert worker.handled()
    found = stored(url)
    assert "wrong" not in found
    assert found["counter"] == 20 * NUMBER


def test_a_process_that_is_killed_in_a_step_has_done_nothing(
    make_worker: Callable[[], Worker], url: str
) -> None:
    one, other = make_worker(), make_worker()
    one.handle(start())
    one.handle(message(text="a"))
    for _ in range(KILLS):
        before = stored(url)
        make_worker().die()
        assert stored(url) == before
        other.handle(message(text="b"))  # nobody is stuck
        assert stored(url)["counter"] == before["counter"] + 1
    assert "wrong" not in stored(url)
