"""Kills a writing child at a random moment, again and again, and looks what is left.

A process of its own, so that it may fork: nothing else runs in it. Usage: directory, lives, seed.
Prints the number of the last record; exits with an assertion if a finished write is missing.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time

from session_sync.storages.disk import DiskStorage


def fields(number: int) -> dict[str, object]:
    # Of several pages, and of a size that changes.
    return {"first": number, "text": "x" * (number * 997 % 20_000), "last": (number,)}


def write_for_ever(directory: str, number: int, done: int) -> None:
    storage = DiskStorage(directory)
    while True:
        number += 1
        storage.set("user:1", fields(number))
        os.write(done, number.to_bytes(8, "big"))


def finished_in(pipe: int, seconds: float, writes: int) -> bytes:
    """What the child reports in that time, which begins with so many writes, however long these
    take; then it is killed in the middle of its work."""
    reports = b"".join(os.read(pipe, 8) for _ in range(writes))
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            reports += os.read(pipe, 1 << 16)
    return reports


def one_life(directory: str, number: int, seconds: float, writes: int) -> int:
    """The number of the last write that the child has finished."""
    pipe, done = os.pipe()
    child = os.fork()
    if not child:
        try:
            write_for_ever(directory, number, done)
        finally:
            os._exit(1)
    os.close(done)
    reports = finished_in(pipe, seconds, writes)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the writer failed by itself"
    while more := os.read(pipe, 1 << 16):
        reports += more
    os.close(pipe)
    return int.from_bytes(reports[-8:], "big") if reports else number


def main(directory: str, lives: int, seed: int) -> None:
    chance = random.Random(seed)
    number = 0
    for life in range(lives):  # every other one may be killed before its first write
        finished = one_life(directory, number, chance.uniform(0, 0.08), writes=life % 2)
        storage = DiskStorage(directory)
        stored = storage.get("user:1")
        storage.close()
        if stored is None:
            assert finished == 0, f"{finished} was finished and is gone"
            continue
        number = stored["first"]
        assert number >= finished, f"{finished} was finished, {number} is there"
        assert stored == fields(number), "a part of a write"
    print(number)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
