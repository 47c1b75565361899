"""Workers in which gevent or eventlet has put greenlets in the place of threads: one that waits for
another process holds up no other one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from waiting import SOON

from session_sync import SessionManager, SQLiteStorage, storage_from_url

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has locks between processes"
)

PATCHED = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
BEGIN = """
import json, sys, threading, time
from pathlib import Path
from session_sync import SessionLockTimeoutError, SessionManager, storage_from_url

def until(condition):
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)

def side_by_side(*work):
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

folder, url, *args = sys.argv[1:]
folder, said = Path(folder), []
"""


@pytest.fixture(params=PATCHED)
def green(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a program whose threads are greenlets."""
    library: str = request.param
    if find_spec(library) is None:  # not imported here, where eventlet would warn of each fork
        pytest.skip(f"needs {library}")

    def start(program: str, url: str, *args: str) -> subprocess.Popen[str]:
        call = [sys.executable, "-W", "ignore", "-c", f"{PATCHED[library]}\n{BEGIN}{program}"]
        return subprocess.Popen(
            [*call, str(tmp_path), url, *args], stdout=subprocess.PIPE, text=True
        )

    return start


def said(process: subprocess.Popen[str]) -> Any:
    try:
        output, _ = process.communicate(timeout=2 * SOON)
    finally:
        process.kill()
    return json.loads(output)


HOLDS_ONE_AND_WANTS_THE_OTHER = """
mine, others = args
sessions = SessionManager(storage=storage_from_url(url), lock_timeout=20)

def holds():
    with sessions.session_scope(mine) as session:
        session.n = 1
        (folder / f"{mine} is open").touch()
        until((folder / f"{others} is open").exists)
        until(lambda: said == ["wants"])
        (folder / f"{mine} is wanted").touch()
        until((folder / f"{others} is wanted").exists)

def wants():
    until((folder / f"{mine} is open").exists)
    until((folder / f"{others} is open").exists)
    said.append("wants")
    with sessions.session_scope(others) as session:
        session.m = 2
    said.append("had it")

side_by_side(holds, wants)
print(json.dumps(said))
"""


@pytest.mark.parametrize("kind", ["sqlite", "disk"])
def test_two_workers_that_hold_a_session_each_and_want_the_others_go_on(
    green: Callable[..., subprocess.Popen[str]], kind: str, tmp_path: Path
) -> None:
    """No handler wants two: each of the two sessions is wanted by another greenlet."""
    url = f"{kind}:///{tmp_path}/sessions"
    workers = [
        green(HOLDS_ONE_AND_WANTS_THE_OTHER, url, *keys) for keys in (("a", "b"), ("b", "a"))
    ]
    assert [said(worker) for worker in workers] == [["wants", "had it"]] * 2
    with SessionManager(storage=storage_from_url(url)) as sessions:
        assert sessions.storage.get("a") == sessions.storage.get("b") == {"n": 1, "m": 2}


WAITS_IN_VAIN = """
sessions = SessionManager(storage=storage_from_url(url), lock_timeout=2)

def waits():
    try:
        with sessions.session_scope("k"):
            pass
    except SessionLockTimeoutError:
        said.append("time-out")

def goes_on():
    for _ in range(5):
        time.sleep(0.001)
    said.append("went on")

side_by_side(waits, goes_on)
print(json.dumps(said))
"""


def test_a_wait_in_vain_holds_up_no_other_greenlet_and_ends_in_time(
    green: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    path = tmp_path / "sessions.db"
    with (
        SessionManager(storage=SQLiteStorage(path)) as sessions,
        sessions.session_scope("k") as session,
    ):
        session.n = 1
        assert said(green(WAITS_IN_VAIN, f"sqlite:///{path}")) == ["went on", "time-out"]


COUNTS = """
sessions = SessionManager(storage=storage_from_url(url), lock_timeout=20)

def count():
    for _ in range(10):
        with sessions.session_scope("k") as session:
            session.n = session.get("n", 0) + 1
            time.sleep(0)

side_by_side(*[count] * 5)
print(json.dumps(said))
"""


@pytest.mark.parametrize("kind", ["sqlite", "disk", "redis"])
def test_four_workers_lose_nothing(
    green: Callable[..., subprocess.Popen[str]],
    kind: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "redis":
        url = f"{request.getfixturevalue('redis_url')}?prefix={request.node.name}:"
    else:
        url = f"{kind}:///{tmp_path}/sessions"
    workers = [green(COUNTS, url) for _ in range(4)]
    assert [said(worker) for worker in workers] == [[]] * 4
    with SessionManager(storage=storage_from_url(url)) as sessions:
        assert sessions.storage.get("k") == {"n": 200}
