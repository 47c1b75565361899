"""Forks: what is in use in the parent, what the child must not use, and C code that tells nobody.

In programs of their own: a fork by C in the middle of the tests would take all of them along.
"""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Threads

from session_sync import storage_from_url

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has locks between processes"
)

LONG = 120.0  # seconds until a program that hangs is given up, on a busy machine too
START = """
import ctypes, os, sys, threading, warnings
sys.path.append({tests!r})
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork where there are threads
from session_sync import SessionManager, storage_from_url

sessions = SessionManager(storage=storage_from_url({url!r}), lock_timeout={long})

def add(key):
    with sessions.session_scope(key) as session:
        session.n = session.get("n", 0) + 1

def is_asleep(thread):
    with open(f"/proc/self/task/{{thread}}/stat") as file:  # which lets the others run
        return file.read().rpartition(") ")[2].startswith("S")

def fork():
    # One that just takes or gives back the interpreter's lock would leave that locked for ever.
    while not all(map(is_asleep, set(os.listdir("/proc/self/task")) - {{str(os.getpid())}})):
        pass
    return ctypes.PyDLL(None).fork() if {by_c} else os.fork()
"""


@pytest.fixture(params=["sqlite:///{}/s.db", "disk:///{}/s"], ids=["sqlite", "disk"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param.format(tmp_path))


@pytest.fixture(params=[False, True], ids=["Python", "C"])
def by_c(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def run(url: str, by_c: bool, program: str) -> str:
    """What the program prints."""
    start = START.format(url=url, by_c=by_c, long=LONG, tests=str(Path(__file__).parents[1]))
    call = [sys.executable, "-c", start + textwrap.dedent(program)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.stderr == ""
    return done.stdout


def stored(url: str, key: str) -> Any:
    storage: Any = storage_from_url(url)
    with closing(storage):
        return storage.get(key)


def test_workers_lose_nothing_of_a_store_that_was_used_before(url: str, by_c: bool) -> None:
    program = """
        add("key")
        children = []
        for _ in range(4):
            child = fork()
            if child == 0:
                for _ in range(50):
                    add("key")
                os._exit(0)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
    """
    assert run(url, by_c, program) == "[0, 0, 0, 0]\n"
    assert stored(url, "key") == {"n": 201}


def test_a_child_keeps_what_it_writes_after_its_parent_has_closed(url: str, by_c: bool) -> None:
    """The parent has idle threads, which have used the store. The last one to close it takes its
    log along, and must see that the child has it open."""
    program = """
        from concurrent.futures import ThreadPoolExecutor

        pool, together = ThreadPoolExecutor(3), threading.Barrier(3)
        def use(number):
            together.wait()
            add(f"idle:{number}")
        list(pool.map(use, range(3)))
        add("key")
        here, there = os.pipe(), os.pipe()
        child = fork()
        if child == 0:
            add("key")
            os.write(here[1], b"x")
            os.read(there[0], 1)
            for _ in range(20):
                add("key")
            os._exit(0)
        os.read(here[0], 1)
        sessions.close()
        os.write(there[1], b"x")
        print(os.waitpid(child, 0)[1])
    """
    assert run(url, by_c, program) == "0\n"
    assert stored(url, "key") == {"n": 22}


@pytest.mark.parametrize("store", ["memory://", "sqlite:///{}/s.db", "disk:///{}/s"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_child_does_not_wait_for_a_session_that_another_thread_had_open(
    tmp_path: Path, store: str, by_c: bool, in_thread: bool
) -> None:
    """And that another one waits for; not in the test of C code: what tells of waits wakes now and
    then, and if it just wants the interpreter's lock, that is of no use to the child."""
    program = """
        opened, leave = threading.Event(), threading.Event()
        def hold():
            with sessions.session_scope("key") as session:
                opened.set()
                leave.wait()
                session.n = 1
        threads = [threading.Thread(target=hold)]
        threads[0].start()
        opened.wait()
        if not %r:
            threads.append(threading.Thread(target=add, args=("key",)))
            threads[1].start()
            while not sessions.locks.waiters("key"):
                pass
        child = fork()
        if child == 0:
            if %r:
                thread = threading.Thread(target=add, args=("key",))
                thread.start()
                thread.join()
            else:
                add("key")
            os._exit(len(sessions.locks))
        leave.set()
        print(os.waitpid(child, 0)[1])
        for thread in threads:
            thread.join()
        print(len(sessions.locks), sessions.storage.get("key")["n"])
    """
    expected = 1 + (not by_c) + (store != "memory://")  # a child's memory is its own
    said = run(store.format(tmp_path), by_c, program % (by_c, in_thread))
    assert said == f"0\n0 {expected}\n"


@pytest.mark.parametrize("store", ["memory://", "sqlite:///{}/s.db", "disk:///{}/s"])
def test_what_the_main_thread_of_a_child_has_locked_is_not_given_to_another_one(
    tmp_path: Path, store: str, by_c: bool
) -> None:
    """Which is the first to notice that C code has forked."""
    program = """
        opened, leave = threading.Event(), threading.Event()
        def hold(key):
            with sessions.session_scope(key):
                opened.set()
                leave.wait()
        thread = threading.Thread(target=hold, args=("other",))
        thread.start()
        opened.wait()
        child = fork()
        if child == 0:
            with sessions.session_scope("key") as session:
                thread = threading.Thread(target=add, args=("key",))
                thread.start()
                while not sessions.locks.waiters("key"):
                    assert thread.is_alive()
                session.n = 1
            thread.join()
            os._exit(sessions.storage.get("key")["n"])
        print(os.waitpid(child, 0)[1] >> 8)
        leave.set()
        thread.join()
    """
    assert run(store.format(tmp_path), by_c, program) == "2\n"


def test_an_update_in_a_child_is_not_queued_behind_a_session_that_another_thread_had_open(
    by_c: bool,
) -> None:
    program = """
        from session_sync.lifecycle.update import tickets_for

        opened, leave = threading.Event(), threading.Event()
        def hold():
            with sessions.session_scope("key"):
                opened.set()
                leave.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        opened.wait()
        child = fork()
        if child == 0:
            calls = []
            tickets_for([sessions.scopes.of_key("key", None)]).queue(lambda: calls.append(1))
            os._exit(len(calls))
        print(os.waitpid(child, 0)[1] >> 8)
        leave.set()
        thread.join()
    """
    assert run("memory://", by_c, program) == "1\n"


def test_a_child_of_c_code_that_cut_off_another_thread_is_refused(url: str) -> None:
    """Else SQLite would wait for that thread, which is not there, or take its locks for its own."""
    program = """
        from session_sync.storages.connections import Connections
        from stops import Stop, stopping

        add("key")
        uses = Stop(Connections.use, "result = act(cursor, *args)")
        thread = threading.Thread(target=stopping(lambda: sessions.storage.get("key"), uses))
        thread.start()
        uses.wait()
        child = fork()
        if child == 0:
            for act in (lambda: add("key"), lambda: storage_from_url(%r)):
                try:
                    act()
                except RuntimeError as error:
                    print(str(error).split(" ", 1)[1], flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        uses.go_on()
        thread.join()
        add("key")
    """
    said = run(url, True, program % url)
    assert len(set(said.splitlines())) == 1
    assert "C code has forked it while another thread was using that file" in said
    assert "lazy-apps = true" in said
    assert len(said.splitlines()) == 2
    assert stored(url, "key") == {"n": 2}


def test_threads_of_a_child_of_c_code_begin_at_the_same_time(url: str) -> None:
    """One of them forgets what was the parent's, and the others wait for that."""
    program = """
        add("key")
        child = fork()
        if child == 0:
            together = threading.Barrier(8)
            def work(number):
                together.wait()
                for _ in range(10):
                    add(f"key:{number}")
                add("key")
            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    assert run(url, True, program) == "0\n"
    assert stored(url, "key") == {"n": 9}
    assert [stored(url, f"key:{number}") for number in range(8)] == [{"n": 10}] * 8


# -- uWSGI, which forks by C

APP = """
from session_sync import SessionManager, storage_from_url

sessions = SessionManager(storage=storage_from_url({url!r}), lock_timeout={long})
with sessions.session_scope("key") as session:
    session.n = 0

def application(environ, start_response):
    try:
        with sessions.session_scope("key") as session:
            session.n += 1
        status, body = "200 OK", b"kept"
    except Exception as error:
        status, body = "500 Error", repr(error).encode()
    start_response(status, [("Content-Type", "text/plain")])
    return [body]
"""


@contextmanager
def uwsgi(app: Path) -> Iterator[int]:
    """Its port; four workers, all else by default."""
    beside = os.path.dirname(sys.executable)
    program = shutil.which("uwsgi", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs uWSGI")
    version = subprocess.run(
        [program, "--python-version"], capture_output=True, text=True, check=True
    ).stdout
    if version.strip() != platform.python_version():
        pytest.skip(f"uWSGI is of Python {version.strip()}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    call = [program, "--http-socket", f"127.0.0.1:{port}", "--wsgi-file", str(app)]
    call += ["--master", "--processes", "4", "--need-app", "--die-on-term", "--disable-logging"]
    same_packages = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(call, cwd=app.parent, env=same_packages, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + LONG
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert server.poll() is None, "it did not start"
                assert time.monotonic() < give_up, "it did not listen"
                time.sleep(0.01)
        yield port
    finally:
        server.terminate()
        server.wait(LONG)


def test_uwsgi_with_its_defaults_loses_nothing(url: str, tmp_path: Path, threads: Threads) -> None:
    app = tmp_path / "app.py"
    app.write_text(APP.format(url=url, long=LONG))
    answers: list[bytes] = []

    def ask(port: int) -> None:
        for _ in range(25):
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as client:
                client.request("GET", "/")
                answers.append(client.getresponse().read())

    with uwsgi(app) as port:
        for _ in range(8):
            threads.start(ask, port)
        threads.join()
    assert answers == [b"kept"] * 200
    assert stored(url, "key") == {"n": 200}
