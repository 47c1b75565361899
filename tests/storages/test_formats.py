"""Sessions that earlier versions of session_sync have stored still load: golden files.

`tests/data/formats/write.py` has made them, run by the version that first stored each form.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from session_sync import Codec, DiskStorage, MemoryStorage, SQLiteStorage

FORMATS = Path(__file__).parents[1] / "data" / "formats"


def _writer() -> Any:
    spec = importlib.util.spec_from_file_location("formats", FORMATS / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["formats"] = module  # where its dataclasses look for names
    spec.loader.exec_module(module)
    return module


WRITER = _writer()


def sqlite(folder: Path) -> Any:
    return SQLiteStorage(folder / "sessions.db")


def disk(folder: Path) -> Any:
    return DiskStorage(folder / "disk")


def json_lines(folder: Path) -> Any:
    """What lies in Redis is the same JSON."""
    storage, codec = MemoryStorage(), Codec()
    for line in (folder / "sessions.jsonl").read_bytes().splitlines():
        found = codec.decode(line)
        storage.set(found["key"], found["fields"])
    return storage


@pytest.mark.parametrize("open_storage", [sqlite, disk, json_lines])
@pytest.mark.parametrize("number", WRITER.FORMATS)
def test_an_earlier_form_still_loads(
    number: str, open_storage: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = tmp_path / number
    shutil.copytree(FORMATS / number, folder)
    storage, form = open_storage(folder), WRITER.FORMATS[number]
    sessions = form.sessions(storage)
    assert sorted(storage.keys()) == sorted(form.contents)
    for key, fields in form.contents.items():
        before = storage.get(key)
        with sessions.session_scope(key) as session:
            assert session == fields
            for name, value in fields.items():
                assert isinstance(session[name], type(value))
        assert storage.get(key) == before
        with sessions.session_scope(key) as session:  # and is still written so
            session.new = 1
        assert storage.get(key) == {**before, "new": 1}
        assert list(before.get("$ttl", {})) == list(filter(None, [form.timed.get(key)]))
        assert before.get("$version", 1) == (1 if number == "1" else 3)
    storage.close()


def test_the_declared_form_is_readable() -> None:
    """What an operator sees, and what other programs may rely on."""
    stored = json_lines(FORMATS / "2").get("user:1")
    assert stored["lines"] == [
        {"name": "tea", "price": 4, "color": "none"},
        {"name": "milk", "price": 2, "color": {"Color": "red"}},
    ]
    assert stored["step"] == {"AskAge": {"prompt": "?"}}
    assert stored["points"] == {(1, 0.0): {(2, 0.5)}}
