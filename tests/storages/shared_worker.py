"""One of several processes on one store. Usage: URL of the store, what to do, arguments."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from typing import Any

from session_sync import SessionConflictError, SessionManager, storage_from_url

url, what, *arguments = sys.argv[1:]
sessions: SessionManager[Any] = SessionManager(storage=storage_from_url(url), lock_timeout=60)


def say(word: object) -> None:
    print(word, flush=True)


def heard() -> None:
    """Wait for a line of whoever started this."""
    sys.stdin.readline()


def add(key: str) -> int:
    with sessions.session_scope(key) as session:
        counter = session.get("counter", 0)
        time.sleep(0)  # let others in, if they can come in
        session.counter = counter + 1
        session["list"] = [counter] * 20
    return counter + 1


def count(keys: str, threads: str, times: str) -> None:
    """Add 1, `times` in each of `threads`, going round `keys` keys."""
    heard()

    def work(number: int) -> None:
        for n in range(int(times)):
            add(f"key:{(n + number) % int(keys)}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(int(threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def without_lock(*rest: str) -> None:
    """The same, where every process believes that it is alone."""
    from session_sync.storages import filelocks

    filelocks.HAS_OFD = False
    count(*rest)


def hold(*keys: str) -> None:
    """Keep keys open until a line comes."""
    scopes = [sessions.session_scope(key) for key in keys]
    for scope in scopes:
        scope.__enter__().held = os.getpid()
    say("holding")
    heard()
    for scope in scopes:
        scope.__exit__(None, None, None)


def turns(key: str, seconds: str) -> None:
    """How many turns this process gets."""
    heard()
    number, end = 0, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        with sessions.session_scope(key):
            number += 1
            time.sleep(0.005)
    say(number)


def go_on_adding(key: str) -> None:
    """Until this is killed; says each number that is saved for certain."""
    while True:
        say(add(key))


def try_adding(key: str, times: str) -> None:
    """Say what was saved, and go on after errors."""
    heard()
    for _ in range(int(times)):
        try:
            say(add(key))
        except (ConnectionError, SessionConflictError, redis_errors()):
            say("error")


def redis_errors() -> type[Exception]:
    from redis.exceptions import RedisError

    return RedisError


def migrate_chat(old: str, new: str) -> None:
    """Move the sessions of a chat."""
    heard()
    say(sessions.migrate_chat(int(old), int(new)))


def visit(chat: str, users: str, rounds: str) -> None:
    """Add 1 to a field of this process in the session of each user of a chat."""
    heard()
    for number in range(int(users) * int(rounds)):
        with sessions.session_scope(f"user:{number % int(users)}:chat:{chat}") as session:
            visits = session.get(f"visits {os.getpid()}", 0)
            time.sleep(0.001)  # let others in, if they can come in
            session[f"visits {os.getpid()}"] = visits + 1


def full_disk(key: str, folder: str) -> None:
    """A file that may not grow any more."""
    size = max(entry.stat().st_size for entry in os.scandir(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with sessions.session_scope(key) as session:
            session.text = "x" * 10_000_000
    except Exception as error:
        say(type(error).__name__)
    with sessions.session_scope(key) as session:
        say(session.get("counter"))


def read_only(key: str, folder: str) -> None:
    """Files that belong to this process, which may not write them any more."""
    sessions.storage.close()
    nobody = 65534
    for path in [*(entry.path for entry in os.scandir(folder)), folder]:
        if os.geteuid() == 0:
            os.chown(path, nobody, nobody)
        os.chmod(path, 0o500 if path == folder else 0o400)
    if os.geteuid() == 0:  # who may do everything
        os.setuid(nobody)
    try:
        with sessions.session_scope(key) as session:
            session.counter = 5
    except Exception as error:
        say(type(error).__name__)
    say(len(sessions.locks))


if __name__ == "__main__":
    {
        "count": count,
        "without_lock": without_lock,
        "hold": hold,
        "turns": turns,
        "go_on_adding": go_on_adding,
        "try_adding": try_adding,
        "migrate_chat": migrate_chat,
        "visit": visit,
        "full_disk": full_disk,
        "read_only": read_only,
    }[what](*arguments)
