"""A large record of which one field is touched, next to a full decode and encode of it.

A store that keeps bytes must read and write all of them, but need not make objects of all: what an
update costs over the bare store (which moves the same bytes and looks at none) is for the lock, the
key, and as much of decoding and encoding as the update needs. "to full" is that difference divided
by what it takes to decode and to encode the whole record with the library's own Codec, msgspec's
JSON: 1 would say that nothing was saved. The rows of the codec alone have no store: the record is
opened, one field read and changed, and encoded.

Of the 1,000 fields, each a dict with a list in it, one number in one dict is changed; of the
session with a text of 100 KB, the counter.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

from session_sync import Codec
from session_sync.storages.base import patched

from ..fields import LARGE, SMALL, TEXT, message
from ..setting import Place, Setting
from ..sides import bare, ours
from ..tables import Table, table
from ..timing import Work

RECORDS: dict[str, dict[str, Any]] = {
    "5 fields": SMALL,
    "1,000 fields": LARGE,
    "100 KB of text": TEXT,
}
BARE: dict[str, Callable[[Place, dict[str, Any]], Work]] = {
    "SQLite": bare.sqlite,
    "disk": bare.disk,
    "Redis": bare.redis,
}


def run(setting: Setting) -> list[Table]:
    """Each record in each store."""
    stores = [name for name in BARE if name != "Redis" or setting.has_redis]
    rows = [_codec_row(setting, name, fields) for name, fields in RECORDS.items()]
    rows += [
        _row(setting, store, name, fields) for store in stores for name, fields in RECORDS.items()
    ]
    return [
        table(
            "partial",
            "One update that touches one field, in microseconds",
            "Median (quartiles). Over the bare store: ours minus bare, within each round; to full: "
            "that, divided by a full decode and encode.",
            (
                "store, record",
                "session_sync",
                "bare store",
                "over the bare store",
                "full decode and encode",
                "to full",
            ),
            rows,
        )
    ]


def _codec_row(setting: Setting, name: str, fields: dict[str, Any]) -> tuple[Any, ...]:
    figures = setting.measure(
        {"partly": _touching_in_codec(fields), "full": _decoding_and_encoding(fields)}
    )
    return (
        f"codec alone, {name}",
        figures.of("partly") * 1e6,
        "",
        "",
        figures.of("full") * 1e6,
        figures.ratio("partly", to="full"),
    )


def _row(setting: Setting, store: str, name: str, fields: dict[str, Any]) -> tuple[Any, ...]:
    with Place(setting) as place:
        figures = setting.measure(
            {
                "ours": _touching(place, store, fields),
                "bare": BARE[store](place, fields),
                "full": _decoding_and_encoding(fields),
            }
        )
    return (
        f"{store}, {name}",
        figures.of("ours") * 1e6,
        figures.of("bare") * 1e6,
        figures.over("ours", than="bare") * 1e6,
        figures.of("full") * 1e6,
        figures.share_over("ours", than="bare", of="full"),
    )


def _touching(place: Place, store: str, fields: dict[str, Any]) -> Work:
    if fields is not LARGE:
        return ours.adding(place, store, fields)
    update = message()
    sessions = ours.sessions_with(place, store, fields, update)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            with sessions.session_scope(update) as session:
                session["field500"]["id"] += 1

    return work


def _touching_in_codec(fields: dict[str, Any]) -> Work:
    codec = Codec()
    data = codec.encode(fields)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            record = codec.decode_record(data, "key")
            codec.encode(patched(record, {"counter": record["counter"] + 1}))

    return work


def _decoding_and_encoding(fields: dict[str, Any]) -> Work:
    codec = Codec()
    data = codec.encode(fields)

    def work(times: int) -> None:
        for _ in repeat(None, times):
            codec.encode(codec.decode(data))

    return work
