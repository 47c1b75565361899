"""RedisStorage in a process that forks while another thread is just using it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from waiting import SOON

pytest.importorskip("redis", reason="needs the extra 'redis'")


def run(program: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), url],
        capture_output=True,
        text=True,
        check=False,
        timeout=3 * SOON,
    )


def test_nothing_is_imported_at_the_first_use(redis_url: str) -> None:
    """A child that is forked while a thread imports a module waits for ever to import it itself."""
    done = run(
        """
        import sys
        from session_sync import RedisStorage
        storage = RedisStorage(sys.argv[1], ttl=60)
        before = set(sys.modules)
        storage.open_record("key", 0).close({"a": 1})
        storage.get("key"), list(storage.keys()), list(storage.entries()), list(storage.locks())
        storage.close()
        print(sorted(set(sys.modules) - before))
        """,
        redis_url,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_child_that_is_forked_while_a_thread_connects_can_do_it_all(redis_url: str) -> None:
    done = run(
        """
        import faulthandler, os, sys, threading, warnings
        import redis
        from session_sync import RedisStorage
        warnings.simplefilter("ignore")
        storage = RedisStorage(sys.argv[1])
        is_inside, make = threading.Event(), redis.Connection.__init__

        def stop_in(connection, **options):
            if threading.current_thread() is other:
                is_inside.set()
                threading.Event().wait()  # with the mutexes of whatever makes the connection
            make(connection, **options)

        redis.Connection.__init__ = stop_in
        for use in (lambda: list(storage.keys()), lambda: storage.open_record("other", 0)):
            is_inside.clear()
            other = threading.Thread(target=use, daemon=True)
            other.start()
            is_inside.wait()
            child = os.fork()
            if not child:
                faulthandler.dump_traceback_later(20, exit=True)
                storage.open_record("key", 0).close({"a": 1})
                assert storage.get("key") == {"a": 1}
                assert "key" in storage.keys()
                storage.close()
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        os._exit(0)
        """,
        redis_url,
    )
    assert (done.stdout, done.stderr) == ("0\n0\n", "")
