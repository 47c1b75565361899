"""The benchmarks still run. What they measure is never asserted: a test machine is noisy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("telegram", reason="needs the extra 'ptb'")
pytest.importorskip("diskcache", reason="needs the extra 'disk'")
pytest.importorskip("redis", reason="needs the extra 'redis'")


def benchmarks(*arguments: str) -> str:
    """What `python -m benchmarks` prints."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def everything() -> str:
    """What it prints for all sections, each measured as little as it can be."""
    return benchmarks("--quick")


@pytest.mark.parametrize(
    "row",
    [
        "| session_sync, async with ",
        "| PTB user_data, PicklePersistence ",
        "| never touches it, lazy ",
        "| SQLite, 1,000 fields ",
        "| telebot retrieve_data, memory, one key, 64 ",
        "| with lock: dict ",
        "| disk, 200 ",
        "| PTB, answers, SQLite ",
        "| bare sqlite3, one key, 2 ",
        "| a price in 3 lines, dicts / dataclasses, SQLite ",
        "| list[index] ",
        "| one thread, traced ",
    ],
)
def test_each_section_prints_its_tables(everything: str, row: str) -> None:
    assert row in everything
