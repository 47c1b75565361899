"""Where and with what something was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import sqlite3
import subprocess
from typing import Any, Final

import session_sync

_PACKAGES: Final = (
    "pyTelegramBotAPI",
    "python-telegram-bot",
    "aiogram",
    "diskcache",
    "redis",
    "msgspec",
    "cachetools",
)


def machine() -> dict[str, Any]:
    """The computer, and how busy it was."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "load at the start": load,
    }


def versions(redis_server: str) -> dict[str, str]:
    """Python, this library, its peers and the servers."""
    found = {
        platform.python_implementation(): platform.python_version(),
        "session-sync": session_sync.__version__,
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["SQLite"] = sqlite3.sqlite_version
    program = shutil.which(redis_server)
    if program is not None:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        match = re.search(r"v=(\S+)", said.stdout)
        found["redis-server"] = match[1] if match else said.stdout.strip()
    return found


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line for line in lines if line.startswith("model name")).split(": ")[1][:-1]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
