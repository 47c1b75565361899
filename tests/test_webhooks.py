"""Bots on webhooks: real servers with four workers, and real posts from many clients at a time."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import SessionManager, storage_from_url
from session_sync.testing import OfflineBotAPI

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIENTS, USERS, POSTS = 16, 8, 5  # each client posts so often for each user
SECRET = "s3cret"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has locks between processes"
)


def gunicorn(port: int) -> list[str]:
    pytest.importorskip("gunicorn", reason="needs gunicorn")
    pytest.importorskip("flask", reason="needs Flask")
    call = ["gunicorn", "--workers", "4", "--threads", "4", "--chdir", str(EXAMPLES)]
    return [*call, "--bind", f"127.0.0.1:{port}", "--log-level", "warning", "webhook_flask:app"]


def preloaded(port: int) -> list[str]:
    """The manager is made before the workers are forked."""
    return [*gunicorn(port), "--preload"]


def gevent(port: int) -> list[str]:
    """The workers have greenlets in the place of threads."""
    if find_spec("gevent") is None:
        pytest.skip("needs gevent")
    return [*gunicorn(port), "--worker-class", "gevent"]


def uvicorn(port: int) -> list[str]:
    pytest.importorskip("uvicorn", reason="needs uvicorn")
    pytest.importorskip("starlette", reason="needs starlette")
    call = ["uvicorn", "--workers", "4", "--app-dir", str(EXAMPLES), "--port", str(port)]
    return [*call, "--log-level", "warning", "webhook_asgi:app"]


@contextmanager
def serving(command: Any, url: str, bot_api: str, token: str) -> Iterator[int]:
    """A server on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "TOKEN": token,
        "BOT_API": bot_api,
        "WEBHOOK_SECRET": SECRET,
        "SESSION_SYNC_STORAGE": url,
    }
    call = [sys.executable, "-m", *command(port)]
    server = subprocess.Popen(call, env=environment)
    try:
        for _ in range(600):
            assert server.poll() is None, "the server has not started"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)  # until it listens
        yield port
    finally:
        server.terminate()
        assert server.wait(30) is not None


def post(connection: http.client.HTTPConnection, update: dict[str, Any], secret: str) -> int:
    headers = {
        "Content-Type": "application/json",
        "X-Telegram-Bot-Api-Secret-Token": secret,
    }
    connection.request("POST", "/hook", json.dumps(update), headers)
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.mark.parametrize(
    ("command", "storage"),
    [
        *product([gunicorn, uvicorn], ["sqlite", "disk", "redis"]),
        *product([preloaded], ["sqlite", "redis"]),
        (gevent, "sqlite"),
    ],
)
def test_four_workers_keep_every_message(
    command: Any,
    storage: str,
    tmp_path: Path,
    threads: Threads,
    request: pytest.FixtureRequest,
) -> None:
    if storage == "redis":
        url = f"{request.getfixturevalue('redis_url')}?prefix={command.__name__}:"
    else:
        url = f"{storage}:///{tmp_path}/sessions"
    with OfflineBotAPI(longest_poll=0.1) as api:
        people = [api.user(number, first_name="Alex") for number in range(1, USERS + 1)]
        messages = [[p.send("hi") for _ in range(CLIENTS * POSTS)] for p in people]
        bot_api = api.base_url if command is uvicorn else api.telebot_url
        with serving(command, url, bot_api, api.token) as port:
            statuses: list[int] = []
            mutex = threading.Lock()

            def client(number: int) -> None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                for n in range(POSTS):
                    for sent in messages:
                        update = {"update_id": 1, "message": sent[number * POSTS + n]}
                        status = post(connection, update, SECRET)
                        with mutex:
                            statuses.append(status)
                connection.close()

            for number in range(CLIENTS):
                threads.start(client, number)
            threads.join(100)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            assert post(connection, {"update_id": 1}, "wrong") == 403
            connection.close()
        assert statuses == [200] * (CLIENTS * POSTS * USERS)
        for person in people:
            replies = [person.reply(timeout=0).text for _ in range(CLIENTS * POSTS)]
            numbers = [int(re.findall(r"\d+", text)[0]) for text in replies]
            assert sorted(numbers) == list(range(1, CLIENTS * POSTS + 1))
    with SessionManager(storage=storage_from_url(url)) as sessions:
        for number in range(1, USERS + 1):
            key = f"user:{number}:chat:{number}"
            assert sessions.storage.get(key) == {"counter": CLIENTS * POSTS}
