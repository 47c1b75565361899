"""The end of a process, and of its use of a store: the file alone has everything then."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import storage_from_url

LONG = 120.0
KINDS = pytest.mark.parametrize(
    ("url", "file"),
    [("sqlite:///{}/s.db", "s.db"), ("disk:///{}", "cache.db")],
    ids=["sqlite", "disk"],
)
BOT = """
import asyncio, signal, sys, threading
from session_sync import SessionManager, storage_from_url

sessions = SessionManager(storage=storage_from_url(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

def use(key):
    with sessions.session_scope(key) as session:
        session.n = 1

async def ause(key):
    async with sessions.session_scope(key) as session:
        session.n = 1

def idle():
    use("thread")
    ready.set()
    threading.Event().wait()  # what it has in its frames, nobody ever closes

ready = threading.Event()
threading.Thread(target=idle, daemon=True).start()
ready.wait()
for number in range(10):
    use(f"user:{number}")
    asyncio.run(ause(f"async:{number}"))
print("ready", flush=True)
threading.Event().wait()
"""


def keys_in_the_file_alone(url: str, file: str, folder: Path, copy: Path) -> set[str]:
    copy.mkdir()
    shutil.copy(folder / file, copy / file)
    storage: Any = storage_from_url(url.format(copy))
    with closing(storage):
        return set(storage.keys())


@KINDS
def test_a_program_that_ends_after_a_sigterm_leaves_all_in_the_file(
    url: str, file: str, tmp_path: Path
) -> None:
    folder = tmp_path / "bot"
    call = [sys.executable, "-c", BOT, url.format(folder)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as bot:
        assert bot.stdout is not None
        assert bot.stdout.readline() == "ready\n"
        bot.send_signal(signal.SIGTERM)
        assert bot.wait(LONG) == 0
    users = {f"{kind}:{number}" for kind in ("user", "async") for number in range(10)}
    assert keys_in_the_file_alone(url, file, folder, tmp_path / "copy") == {"thread", *users}


@KINDS
def test_a_storage_that_is_closed_leaves_all_in_the_file(
    url: str, file: str, tmp_path: Path, threads: Threads
) -> None:
    """Though another thread uses a connection of its own, or another process has one."""
    folder = tmp_path / "bot"
    storage: Any = storage_from_url(url.format(folder))
    other: Any = storage_from_url(url.format(folder))
    other.set("other", {"n": 1})
    for number in range(10):
        storage.set(f"user:{number}", {"n": number})
    storage.close()
    users = {f"user:{number}" for number in range(10)}
    assert keys_in_the_file_alone(url, file, folder, tmp_path / "copy") == {"other", *users}
    assert other.get("user:1") == {"n": 1}
    other.close()


@KINDS
def test_a_save_that_is_on_its_way_as_the_process_ends_is_in_the_file(
    url: str, file: str, tmp_path: Path
) -> None:
    """The pool makes it when the interpreter ends, and the log comes into the file after that."""
    folder = tmp_path / "bot"
    program = """
import asyncio, sys, threading
from session_sync import SessionManager, storage_from_url

storage = storage_from_url(sys.argv[1])
sessions = SessionManager(storage=storage)
slow, begun = storage.save, threading.Event()

def save(key, record):
    begun.set()
    threading.Event().wait(0.3)
    return slow(key, record)

storage.save = save
async def use():
    async with sessions.session_scope("key") as session:
        session.text = "x" * 100_000  # too large to be written in place

loop = asyncio.new_event_loop()
task = loop.create_task(use())
while not begun.is_set():
    loop.run_until_complete(asyncio.sleep(0))
threading.Thread(target=lambda: (storage, threading.Event().wait()), daemon=True).start()
"""
    call = [sys.executable, "-W", "ignore", "-c", program, url.format(folder)]
    subprocess.run(call, timeout=LONG, check=True, stderr=subprocess.DEVNULL)
    assert keys_in_the_file_alone(url, file, folder, tmp_path / "copy") == {"key"}
