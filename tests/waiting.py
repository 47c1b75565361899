"""Waiting for what other threads, tasks and processes do, without a time that must be right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SOON = 20.0  # seconds until a test that waits for something in vain gives up


def until(condition: Callable[[], object]) -> None:
    """Let other threads and processes run until something about them can be seen."""
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up, "this never came to be"
        time.sleep(0.0001)


async def until_async(condition: Callable[[], object]) -> None:
    """Let other tasks (and threads) run until something about them can be seen."""
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up, "this never came to be"
        await asyncio.sleep(0)
