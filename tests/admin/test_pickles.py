"""Pickles that want to do something: refused, and nothing of them is run."""

from __future__ import annotations

import copyreg
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from importer_tools import EVERY_PROTOCOL, Reducible, taken

from session_sync import SessionDecodeError


def leave(path: str) -> None:
    """What must not happen."""
    Path(path).touch()


class Trap:
    """Does it at every turn that an unpickler may take."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        if path:
            leave(path)

    def __setstate__(self, path: str) -> None:
        leave(path)

    def append(self, path: str) -> None:
        leave(path)

    def __setitem__(self, key: object, path: str) -> None:
        leave(path)


class Victim:
    path: str | None = None


def opcodes(value: object, protocol: int) -> bytes:
    """What pickles `value`, without what begins and ends a pickle."""
    data = pickle.dumps(value, protocol)
    data = data.removesuffix(b".")
    data = data[2:] if protocol >= 2 else data
    return data[9:] if data[:1] == b"\x95" else data


def spoil(tmp_path: Path, payload: bytes) -> dict[str, Any]:
    """What is taken over of a file with `payload` in a field of the first of two users."""
    data = b"\x80\x05}(Vuser_data\n}(K\x01}Vx\n" + payload + b"sK\x02}Vfine\nK\x01suu."
    (tmp_path / "bot").write_bytes(data)
    return taken("ptb-pickle", tmp_path / "bot")


def name(thing: Any) -> bytes:
    return f"c{thing.__module__}\n{thing.__qualname__}\n".encode()


def attacks(path: str) -> dict[str, bytes]:
    """Opcodes that make pickle.loads create a file called `path`."""
    touch = f"touch {path}"
    source = f"open({path!r}, 'w').close()"
    command, witness = (f"V{text}\n".encode() for text in (touch, path))
    found = {
        f"{what} {protocol}": opcodes(Reducible(function, args), protocol)
        for protocol in EVERY_PROTOCOL
        for what, function, args in [
            ("os.system", os.system, (touch,)),
            ("eval", eval, (source,)),
            ("exec", exec, (source,)),
            ("mkdir", os.mkdir, (path,)),
        ]
    }
    return found | {
        "STACK_GLOBAL, dotted": b"Vposixpath\nVos.system\n\x93" + command + b"\x85R",
        "a method": b"cpathlib\nPath.touch\ncpathlib\nPath\n" + witness + b"\x85R\x85R",
        "getattr": b"cbuiltins\ngetattr\n(cpathlib\nPath\nVtouch\ntRcpathlib\nPath\n"
        + witness
        + b"\x85R\x85R",
        "INST": b"(" + command + b"ios\nsystem\n",
        "OBJ": b"(" + name(Trap) + witness + b"o",
        "NEWOBJ": name(Trap) + b")\x81" + witness + b"b",
        "NEWOBJ_EX": name(Trap) + b")}\x92" + witness + b"b",
        "BUILD": name(Trap) + b")R" + witness + b"b",
        "APPEND": name(Trap) + b")\x81" + witness + b"a",
        "APPENDS": name(Trap) + b")\x81(" + witness + b"e",
        "SETITEM": name(Trap) + b")\x81K\x01" + witness + b"s",
        "SETITEMS": name(Trap) + b")\x81(K\x01" + witness + b"u",
        "in a tuple": b"K\x01" + name(leave) + witness + b"\x85R\x86",
        "as a key": b"}" + name(leave) + witness + b"\x85RK\x01s",
        "in a set": b"\x8f(" + name(leave) + witness + b"\x85R\x90",
        "as a date's argument": b"cdatetime\ndate\n" + name(leave) + witness + b"\x85R\x85R",
        "under another": b"(" + name(leave) + witness + b"\x85R1K\x01",
        "EXT1": b"\x82\xf0" + command + b"\x85R",
        "EXT2": b"\x83\xf0\x00" + command + b"\x85R",
        "EXT4": b"\x84\xf0\x00\x00\x00" + command + b"\x85R",
    }


@pytest.fixture
def extension() -> Iterator[None]:
    """Another module has registered this, and pickles have used it."""
    copyreg.add_extension("os", "system", 0xF0)
    with suppress(Exception):
        pickle.loads(b"\x82\xf0.")
    yield
    copyreg.remove_extension("os", "system", 0xF0)
    copyreg.clear_extension_cache()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("attack", list(attacks("")))
def test_a_pickle_runs_nothing(tmp_path: Path, attack: str) -> None:
    witness = tmp_path / "witness"
    payload = attacks(str(witness))[attack]
    found = spoil(tmp_path, payload)
    assert not witness.exists()
    assert found["user:2"] == {"fine": 1}
    for start in (b"", b"\x80\x05"):  # names are written in another way before protocol 4
        with suppress(Exception):
            pickle.loads(start + payload + b".")
    assert witness.exists()  # so it was a real one


@pytest.mark.parametrize(
    "state",
    [
        b"}Vpath\nVchanged\ns",
        b"N}Vpath\nVchanged\ns\x86",
    ],
)
def test_no_class_is_changed(tmp_path: Path, state: bytes) -> None:
    payload = name(Victim) + state + b"b"
    with pytest.raises(SessionDecodeError, match="cannot be read at byte"):
        spoil(tmp_path, payload)
    with suppress(Exception):
        pickle.loads(payload + b".")
    changed, Victim.path = Victim.path, None
    assert changed == ("changed" if state.startswith(b"N") else None)


def test_the_default_of_a_defaultdict_is_not_called(tmp_path: Path) -> None:
    payload = b"ccollections\ndefaultdict\n" + name(leave) + b"\x85R"
    assert spoil(tmp_path, payload)["user:1"] == {"x": {}}


LONG_TEXT = b"V" + b"x" * 10_000 + b"\n"

DOUBLED = b"2\x86" * 100  # a pair of itself, a hundred times


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"]2a", id="a list in itself"),
        pytest.param(b"]2\x85a", id="through a tuple"),
        pytest.param(b"]" * 100_000 + b"a" * 99_999, id="lists"),
        pytest.param(b")" + b"\x85" * 100_000, id="tuples"),
        pytest.param(b"}" + b"K\x01}" * 50_000 + b"s" * 50_000, id="dicts"),
        pytest.param(b"cos\nsystem\n" + b")R" * 100_000, id="calls"),
        pytest.param(b"})" + b"\x85" * 100_000 + b"K\x01s", id="a key of tuples"),
        pytest.param(b"\x8f()" + b"\x85" * 100_000 + b"\x90", id="a member of tuples"),
        pytest.param(LONG_TEXT + DOUBLED, id="doubled"),
        pytest.param(b"}" + LONG_TEXT + DOUBLED + b"K\x01s", id="a doubled key"),
        pytest.param(b"\x8f(" + LONG_TEXT + DOUBLED + b"\x90", id="a doubled member"),
        pytest.param(b"}]K\x01s", id="a list as a key"),
        pytest.param(b"\x8f(]\x90", id="a list in a set"),
        pytest.param(b"cuuid\nUUID\n)\x81}" + b")" + DOUBLED + b"K\x01sb", id="a doubled name"),
        pytest.param(b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R", id="a large bytearray"),
        pytest.param(b"cbuiltins\nbytes\n\x8a\x06\0\0\0\0\0\x01\x85R", id="large bytes"),
    ],
)
def test_what_nothing_can_hold_spoils_its_record_only(tmp_path: Path, payload: bytes) -> None:
    found = spoil(tmp_path, payload)
    assert isinstance(found["user:1"], str)
    assert "x" * 100 not in found["user:1"]
    assert found["user:2"] == {"fine": 1}


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"K\x01r\xff\xff\xff\xff", id="memo index"),
        pytest.param(b"K\x01p99999999999999999999\n", id="long memo index"),
        pytest.param(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01", id="frame"),
        pytest.param(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx", id="bytes"),
        pytest.param(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fx", id="bytearray"),
        pytest.param(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx", id="text"),
        pytest.param(b"\x8b\xff\xff\xff\x7fx", id="int"),
        pytest.param(b"\x8e\0\0\0\x40\0\0\0\0x", id="a gigabyte of bytes"),
        pytest.param(b"\x96\0\0\0\x40\0\0\0\0x", id="a bytearray of a gigabyte"),
        pytest.param(b"\x8d\0\0\0\x40\0\0\0\0x", id="a gigabyte of text"),
    ],
)
def test_a_number_in_a_pickle_reserves_no_memory(tmp_path: Path, payload: bytes) -> None:
    tracemalloc.start()
    try:
        with suppress(SessionDecodeError):
            spoil(tmp_path, payload)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # bytes
    finally:
        tracemalloc.stop()
