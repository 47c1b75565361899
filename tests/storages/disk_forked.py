"""Uses one storage in a parent and in its forked children. Usage: directory."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Callable

from session_sync.storages.disk import DiskStorage

Act = Callable[[DiskStorage, str], None]


def write_in_a_thread(storage: DiskStorage, name: str) -> None:
    """In a new one, which must not share what the forked one has inherited."""
    other = threading.Thread(target=storage.set, args=(f"{name}:thread", {"n": 1}))
    other.start()
    other.join()


def write(storage: DiskStorage, name: str) -> None:
    assert storage.get("parent") == {"n": 0}
    write_in_a_thread(storage, name)
    storage.set(f"{name}:main", {"n": 1})


def in_a_child(act: Act, storage: DiskStorage, name: str, start: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.read(start, 1)
        act(storage, name)
        status = 0
    finally:
        os._exit(status)


def main(directory: str) -> None:
    storage = DiskStorage(directory)
    storage.set("parent", {"n": 0})
    start, started = os.pipe()
    children = [
        in_a_child(act, storage, f"{act.__name__}:{n}", start)
        for act in (write, write_in_a_thread)
        for n in range(2)
    ]
    storage.set("parent:2", {"n": 2})
    # The last connection takes the log along, with what a child wrote that was not really there.
    storage.close()
    os.write(started, b"1234")
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0
    keys = sorted(storage.keys())
    assert len(keys) == 8, keys
    storage.close()
    con = sqlite3.connect(f"{directory}/cache.db")
    assert con.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    con.close()
    print("fine")


if __name__ == "__main__":
    main(sys.argv[1])
