"""Bytes that the codec has not written, or that were damaged since: read or refused."""

from __future__ import annotations

import os
import random
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from values import Money, money_from, money_to, same, sessions

from session_sync.errors import SessionDecodeError
from session_sync.storages.base import patched
from session_sync.storages.codec import Codec

MALFORMED = [
    b"",
    b"null",
    b"[]",
    b"5",
    b"{",
    b'{"a":1}{"a":1}',
    b'{"a":1} x',
    b'{"a":01}',
    b'{"a":NaN}',
    b'{"a":1e400}',
    b'{"a":"\xff"}',
    b'{"\xff":1}',
    b"\x80\x04K\x01.",
    b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' + b'{"$tuple":[' * 900 + b"]}" * 900 + b"}",
    b'{"a":{"$nonsense":1}}',
    b'{"a":{"$tuple":[1],"b":2}}',
    b'{"a":{"$tuple":[1],"$set":[]}}',
    b'{"a":{"$tuple":"ab"}}',
    b'{"a":{"$tuple":{"0":1}}}',
    b'{"a":{"$set":[[1]]}}',
    b'{"a":{"$set":[1,1]}}',
    b'{"a":{"$set":[1,true]}}',
    b'{"a":{"$frozenset":[1,1.0]}}',
    b'{"a":{"$dict":[[1,2],[1,3]]}}',
    b'{"a":{"$dict":[[1]]}}',
    b'{"a":{"$dict":["ab"]}}',
    b'{"a":{"$dict":[[[],1]]}}',
    b'{"a":{"$dict":5}}',
    b'{"a":{"$bytes":"a"}}',
    b'{"a":{"$bytes":"a b="}}',
    b'{"a":{"$bytes":5}}',
    b'{"a":{"$float":"1.5"}}',
    b'{"a":{"$float":[]}}',
    b'{"a":{"$int":"0x10"}}',
    b'{"a":{"$int":"1_0"}}',
    b'{"a":{"$int":16}}',
    b'{"a":{"$str":"\\\\n"}}',
    b'{"a":{"$str":"plain"}}',
    b'{"a":{"$str":5}}',
    b'{"$str:plain":1}',
    b'{"a":{"$datetime":"2024"}}',
    b'{"a":{"$datetime":"20240101T000000"}}',
    b'{"a":{"$datetime":"2024-01-01T00:00:00+99:00"}}',
    b'{"a":{"$datetime":"2024-13-01T00:00:00"}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00","No/Where"]}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00","../../etc/passwd"]}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00","America"]}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00",5]}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00",null,7]}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00",null,true]}}',
    b'{"a":{"$datetime":["2024-01-01T00:00:00",null,1,1]}}',
    b'{"a":{"$datetime":[]}}',
    b'{"a":{"$datetime":1704067200}}',
    b'{"a":{"$date":"2024-W01-1"}}',
    b'{"a":{"$time":"25:00:00"}}',
    b'{"a":{"$timedelta":[0,-1,0]}}',
    b'{"a":{"$timedelta":[9999999999,0,0]}}',
    b'{"a":{"$timedelta":[0,0,true]}}',
    b'{"a":{"$timedelta":[0,0]}}',
    b'{"a":{"$timedelta":5}}',
    b'{"a":{"$decimal":"abc"}}',
    b'{"a":{"$decimal":" 1"}}',
    b'{"a":{"$decimal":1}}',
    b'{"a":{"$uuid":"{12345678-1234-5678-1234-567812345678}"}}',
    b'{"a":{"$uuid":5}}',
    b'{"a":{"$type":["x",1]}}',
    b'{"a":{"$type":5}}',
]


class TestMalformed:
    @pytest.mark.parametrize("data", MALFORMED, ids=lambda data: ascii(data)[2:60])
    def test_data_is_refused_with_the_key(self, data: bytes) -> None:
        with pytest.raises(SessionDecodeError, match=r"^session 'user:1' cannot be read: "):
            Codec().decode(data, "user:1")
        with pytest.raises(SessionDecodeError, match=r"^session 'user:1' cannot be read: "):
            dict(Codec().decode_record(data, "user:1"))

    def test_data_is_not_quoted(self) -> None:
        for data in (
            b'{"a":"secret\xff"}',
            b'{"a":{"$int":"secret"}}',
            b'{"a":{"$decimal":"secret"}}',
            b'{"a":{"$datetime":"secret"}}',
            b'{"a":{"$bytes":"secret!"}}',
            b'{"a":secret}',
        ):
            with pytest.raises(SessionDecodeError) as caught:
                Codec().decode(data)
            assert "secret" not in str(caught.value)
            assert caught.value.__suppress_context__


EXAMPLES = int(os.environ.get("CODEC_EXAMPLES", "100"))

many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TestFuzz:
    @many
    @given(sessions)
    def test_whatever_goes_in_comes_out(self, fields: dict[str, Any]) -> None:
        codec = Codec()
        data = codec.encode(fields)
        data.decode("utf-8")
        assert same(codec.decode(data), fields)
        record = codec.decode_record(data, "user:1")
        assert codec.encode(record) == data
        assert same(dict(record), fields)
        assert codec.encode(record) == codec.encode(codec.decode(data)) == data

    @many
    @given(sessions, sessions)
    def test_a_changed_record_is_written_like_the_changed_fields(
        self, fields: dict[str, Any], changes: dict[str, Any]
    ) -> None:
        codec = Codec()
        record = codec.decode_record(codec.encode(fields), "user:1")
        assert codec.encode(patched(record, changes)) == codec.encode({**fields, **changes})

    @many
    @given(st.binary())
    def test_random_bytes_are_read_or_refused(self, data: bytes) -> None:
        self.read_or_refuse(data)

    @many
    @given(sessions, st.data())
    def test_changed_bytes_are_read_or_refused(self, fields: dict[str, Any], data: Any) -> None:
        document = bytearray(Codec().encode(fields))
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(document)))
            stop = data.draw(st.integers(start, min(len(document), start + 6)))
            document[start:stop] = data.draw(
                st.binary(max_size=3) | st.sampled_from(MARKS) | st.just(bytes(document[:start]))
            )
        self.read_or_refuse(bytes(document))

    @many
    @given(st.data())
    def test_any_tag_around_anything_is_read_or_refused(self, data: Any) -> None:
        plain = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.sampled_from(WORDS),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.builds(lambda tag, body: {tag: body}, st.sampled_from(TAGS), inner)
            ),
        )
        body = data.draw(plain)
        self.read_or_refuse(msgspec.json.encode({"a": {data.draw(st.sampled_from(TAGS)): body}}))

    def test_ten_thousand_damaged_documents_are_read_or_refused(self) -> None:
        chance = random.Random(DAMAGED)
        whole = [Codec(money_to, money_from).encode(fields) for fields in SEEDS]
        for _ in range(DAMAGED):
            document = bytearray(chance.choice(whole))
            for _ in range(chance.randint(1, 5)):
                start = chance.randint(0, len(document))
                stop = min(len(document), start + chance.choice((0, 1, 2, 8, len(document))))
                new = chance.choice((b"", chance.choice(MARKS), chance.randbytes(4)))
                document[start:stop] = new
            self.read_or_refuse(bytes(document))

    def read_or_refuse(self, data: bytes) -> None:
        codec = Codec(money_to, money_from)
        try:
            fields = codec.decode(data, "user:1")
        except SessionDecodeError as error:
            assert "'user:1'" in str(error)  # noqa: PT017
            return
        assert same(codec.decode(codec.encode(fields)), fields)
        assert same(dict(codec.decode_record(data, "user:1")), fields)


DAMAGED = int(os.environ.get("CODEC_DAMAGED", "10000"))

SEEDS: list[dict[str, Any]] = [
    {"counter": 1, "name": "Åse", "cart": {"items": ["tea", ("milk", 2)], "total": 7.5}},
    {"ids": {7: "a", -100: [None, True]}, "seen": {1, 2}, "no": frozenset({"x"})},
    {"at": datetime(2026, 1, 2, 3, 4, 5), "day": date(2026, 1, 2), "for": timedelta(days=2)},
    {"big": 10**40, "nan": float("nan"), "inf": float("-inf"), "price": Decimal("1.50")},
    {"raw": b"\x00\xff", "id": UUID(int=5), "$ttl": {"code": [1.5, 300.0]}, "money": Money(5)},
]

TAGS = re.findall(r'"(\$\w+)":', " ".join(data.decode("latin-1") for data in MALFORMED))

MARKS = [b"", b'"', b"{", b"}", b"[", b"]", b",", b"$", b"\\", b"\xff", b"0", b'{"$set":', b"null"]

WORDS = [
    "nan",
    "ff",
    "2024-01-01",
    "00:00:00",
    "2024-01-01T00:00:00+01:00",
    "UTC",
    "1E+5",
    "Kw==",
    "\\ud800",
]
