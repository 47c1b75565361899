"""The benchmark scripts still run. What they measure is never asserted: a test machine is noisy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("telebot")
pytest.importorskip("diskcache")


@pytest.mark.parametrize(
    ("name", "tiny", "row"),
    [
        ("lost_updates", ["--updates=16"], "| session_sync, memory "),
        ("overhead", ["--updates=2"], "| 1,000 "),
        ("reading", ["--times=1"], "| list[index] "),
        ("threads", ["--updates=128"], "| one key "),
        ("lock_table", ["--keys=100"], "| one thread, traced "),
        ("stored", ["--many=200", "--updates=2"], "| sqlite "),
        ("typed", ["--updates=10"], "| a price in 3 lines"),
    ],
)
def test_a_benchmark_prints_its_table(name: str, tiny: list[str], row: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds=1", *tiny]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert row in done.stdout
