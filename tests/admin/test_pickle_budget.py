"""A small pickle takes neither gigabytes nor hours: what repeats its own parts is refused."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from session_sync import SessionDecodeError
from session_sync.admin.importers import IMPORTERS
from session_sync.admin.importers.pickles import read_pickle

MANY = 30_000  # values that are copied ...
OFTEN = 1_000  # ... so many times: a quarter of a gigabyte


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def remembered(payload: bytes, number: int) -> bytes:
    return payload + b"q" + bytes([number]) + b"0"


def recalled(*numbers: int) -> bytes:
    return b"".join(b"h" + bytes([number]) for number in numbers)


TRUES = b"(" + b"\x88" * MANY + b"t"
NAME = text("m") + text("c") + b"\x93"
COPYING = {
    "arguments": remembered(TRUES, 0)
    + remembered(NAME, 1)
    + remembered(b"]", 2)
    + b"("
    + (recalled(1, 0, 2) + b"\x92") * OFTEN
    + b"l.",
    "arguments that are thrown away": remembered(TRUES, 0)
    + remembered(NAME, 1)
    + remembered(b"]", 2)
    + (recalled(1, 0, 2) + b"\x920") * OFTEN
    + b"N.",
    "arguments of a constructor": remembered(NAME, 3)
    + remembered(b"(" + recalled(3) + TRUES[1:], 0)
    + remembered(b"ccopyreg\n_reconstructor\n", 1)
    + b"("
    + (recalled(1, 0) + b"R") * OFTEN
    + b"l.",
    "names": remembered(text("m" * 4 * MANY), 0)
    + remembered(text("c" * 4 * MANY), 1)
    + b"("
    + (recalled(0, 1) + b"\x93") * OFTEN
    + b"l.",
    "names of names": remembered(text("c" * MANY), 0)
    + remembered(b"cbuiltins\ngetattr\n", 1)
    + remembered(NAME, 2)
    + b"("
    + (recalled(1, 2, 0) + b"\x86R" + b"q\x022") * OFTEN
    + b"l.",
}


@pytest.mark.parametrize("kind", COPYING)
def test_what_copies_its_own_parts_is_refused(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "states.pkl"
    source.write_bytes(b"\x80\x04" + COPYING[kind])
    tracemalloc.start()
    try:
        with pytest.raises(SessionDecodeError, match=r"states\.pkl' would make more than \d+ MB"):
            list(IMPORTERS["telebot-pickle"](str(source)))
        assert tracemalloc.get_traced_memory()[1] < 200_000_000  # bytes
    finally:
        tracemalloc.stop()


def sessions(kind: str, data: object, tmp_path: Path) -> Iterator[Any]:
    source = tmp_path / "file"
    source.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    return IMPORTERS[kind](str(source))


def test_one_text_in_all_sessions_fills_no_disk(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    data = {"user_data": {user: {"a": long} for user in range(1000)}, "chat_data": {}}
    taken = 0
    with pytest.raises(SessionDecodeError, match=r"would make more than 12\d MB"):
        for _ in sessions("ptb-pickle", data, tmp_path):
            taken += 1
    assert 100 < taken < 150


def test_one_text_in_all_sessions_is_taken_over_if_it_is_as_long_as_bots_have_it(
    tmp_path: Path,
) -> None:
    greeting = "Hello, and welcome! " * 25
    data = {"user_data": {user: {"greeting": greeting} for user in range(20_000)}, "chat_data": {}}
    found = [fields for _, fields in sessions("ptb-pickle", data, tmp_path)]
    assert found == [{"greeting": greeting}] * 20_000


def test_one_dict_of_users_in_all_chats_makes_no_million_of_sessions(tmp_path: Path) -> None:
    users = {user: {"state": "a", "data": {}} for user in range(2000)}
    data = dict.fromkeys(range(2000), users)
    with pytest.raises(SessionDecodeError, match="would make more than"):
        for _ in islice(sessions("telebot-pickle", data, tmp_path), 400_000):
            pass


def test_one_large_dict_is_not_walked_through_for_each_object(tmp_path: Path) -> None:
    state = remembered(b"}(" + b"K\x01K\x01" * 20_000 + text("int") + b"K\x01u", 0)
    identity = b"cuuid\nUUID\n)\x81" + recalled(0) + b"b"
    value = b"(" + identity * OFTEN + b"l"
    data = state + b"}" + text("user_data") + b"}K\x01}" + text("a") + value + b"sss."
    with pytest.raises(SessionDecodeError, match="would make more than"):
        list(sessions("ptb-pickle", b"\x80\x04" + data, tmp_path))


def test_one_long_number_is_not_read_for_each_decimal(tmp_path: Path) -> None:
    digits = remembered(text("9" * 1_000_000), 0)
    value = b"(" + (b"cdecimal\nDecimal\n" + recalled(0) + b"\x85R") * 100 + b"l"
    data = digits + b"}" + text("user_data") + b"}K\x01}" + text("a") + value + b"sss."
    ((_, error),) = sessions("ptb-pickle", b"\x80\x04" + data, tmp_path)
    assert "has more than 16 MB when it is written out" in str(error)


@pytest.mark.parametrize(
    ("opcode", "length"),
    [
        (pickle.BYTEARRAY8, "<Q"),
        (pickle.BINBYTES8, "<Q"),
        (pickle.BINUNICODE8, "<Q"),
        (pickle.BINBYTES, "<I"),
        (pickle.BINUNICODE, "<I"),
        (pickle.FRAME, "<Q"),
    ],
)
def test_an_announced_gigabyte_is_not_reserved(opcode: bytes, length: str) -> None:
    """The file has a few bytes; Python's own reader reserves memory for what is announced."""
    data = b"\x80\x05" + opcode + struct.pack(length, 2**30) + b"short."
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cannot be read at byte"):
            read_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes
    finally:
        tracemalloc.stop()
