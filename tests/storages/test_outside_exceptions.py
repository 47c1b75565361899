"""An exception from outside (Ctrl-C, a signal handler's time-out) comes out as what it is.

It is no word on the value, the hook or the server that was just looked at.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from conftest import message
from interruptions import OutsideError, everywhere, raise_outside

import session_sync.admin.importers.pickles
import session_sync.session.keys
from session_sync import (
    Codec,
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionDecodeError,
    SessionEncodeError,
    SessionManager,
    SessionMigrationError,
    SQLiteStorage,
    default_storage_key,
)
from session_sync.admin.importers.pickles import read_pickle
from session_sync.session.keys import default_key_text
from session_sync.storages.codec import codec as codec_module
from session_sync.storages.codec import kinds, malformed, pack, record, strings, unpack, zones

SOON = 20.0
CODEC = (codec_module, kinds, malformed, pack, record, strings, unpack, zones)


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    """SIGALRM says that a handler has taken too long."""

    def on_alarm(_number: int, _frame: object) -> None:
        raise TimeoutError("the handler's time is up")

    before = signal.signal(signal.SIGALRM, on_alarm)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def ring(*_args: object) -> Any:
    """The time is up, in the middle of a hook."""
    signal.raise_signal(signal.SIGALRM)


def comes_out(act: Callable[[], object], interruption: Any, error: type[Exception]) -> bool:
    try:
        with interruption:
            act()
    except error:
        return True
    return False


# -- a codec


FIELDS = {
    "plain": 1,
    "odd": "\ud800",
    "\ud801": [1, 2],
    "tags": {"a", "b"},
    "more": [(1, 2), {1: b"?"}, frozenset({1}), float("inf"), 2**70],
    "times": [datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Rome")), date(2026, 1, 1), time(1)],
    "rest": [timedelta(1), Decimal("1.0"), UUID(int=1), datetime(2026, 1, 1, tzinfo=UTC)],
    "share": Fraction(1, 3),
}


def codec(encode: Any = None, decode: Any = None) -> Codec:
    def enc(value: Any) -> Any:
        if encode is not None:
            encode()
        return ("fraction", value.as_integer_ratio()) if type(value) is Fraction else NotImplemented

    def dec(_name: str, value: Any) -> Any:
        if decode is not None:
            decode()
        return Fraction(*value)

    return Codec(enc, dec)


@pytest.mark.parametrize("error", [OutsideError, TimeoutError])
@pytest.mark.parametrize("what", ["encode", "decode", "decode_record"])
def test_at_any_place_of_a_codec(what: str, error: type[Exception]) -> None:
    """With hooks only a TimeoutError: whether a hook has raised another one, nobody can know."""
    some = codec() if error is TimeoutError else Codec()
    fields = {n: value for n, value in FIELDS.items() if n != "share" or error is TimeoutError}
    data = some.encode(fields)
    acts: dict[str, Callable[[], object]] = {
        "encode": lambda: some.encode(fields),
        "decode": lambda: some.decode(data),
        "decode_record": lambda: dict(some.decode_record(data, "key")),
    }

    def fail() -> None:
        raise error

    for interruption in everywhere(fail, *CODEC):
        assert comes_out(acts[what], interruption, error) == interruption.happened


@pytest.mark.parametrize("name", ["nowhere/at/all", "Europe", "../x", "", "a\0b", "x" * 300])
def test_a_time_zone_that_cannot_be_is_still_a_damaged_record(name: str) -> None:
    data = codec().encode({"at": datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Rome"))})
    with pytest.raises(SessionDecodeError, match="time zone"):
        codec().decode(data.replace(b"Europe/Rome", name.replace("\0", "\\u0000").encode()))


@pytest.fixture(params=["strict", "lru", "sqlite", "disk", "redis"])
def make_storage(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[Codec], Any]]:
    made = []

    def make(codec: Codec) -> Any:
        made.append(kinds[request.param](codec))
        return made[-1]

    def disk(codec: Codec) -> Any:
        pytest.importorskip("diskcache", reason="needs the extra 'disk'")
        from session_sync import DiskStorage

        return DiskStorage(tmp_path / "sessions", codec=codec)

    def redis(codec: Codec) -> Any:
        from session_sync import RedisStorage

        return RedisStorage(request.getfixturevalue("redis_url"), codec=codec, prefix="outside:")

    kinds: dict[str, Callable[[Codec], Any]] = {
        "strict": lambda codec: MemoryStorage(strict=True, codec=codec),
        "lru": lambda codec: LruMemoryStorage(strict=True, codec=codec),
        "sqlite": lambda codec: SQLiteStorage(tmp_path / "s.db", codec=codec),
        "disk": disk,
        "redis": redis,
    }
    yield make
    for storage in made:
        storage.close()


def test_a_time_out_in_a_hook_comes_out_and_the_key_is_free(
    make_storage: Callable[[Codec], Any],
) -> None:
    hooks: list[Callable[[], object]] = []

    def hook() -> None:
        if hooks:
            hooks.pop()()

    storage = make_storage(codec(hook, hook))
    sessions = SessionManager(storage=storage, lock_timeout=2)
    storage.delete("key")
    with sessions.session_scope("key") as session:
        session.share = Fraction(1, 3)
    with pytest.raises(TimeoutError, match="the handler's time is up"):
        with sessions.session_scope("key") as session:
            session.other = Fraction(1, 2)
            hooks.append(ring)
    assert hooks == []
    with sessions.session_scope("key") as session:
        assert dict(session) == {"share": Fraction(1, 3)}
        session.share = Fraction(2, 3)
    if not isinstance(storage, MemoryStorage):  # which decodes nothing
        with pytest.raises(TimeoutError, match="the handler's time is up"):
            with sessions.session_scope("key") as session:
                hooks.append(ring)
                session.share  # noqa: B018 # it is read
        assert hooks == []
    with sessions.session_scope("key") as session:
        assert dict(session) == {"share": Fraction(2, 3)}


def test_what_else_a_hook_raises_is_wrapped() -> None:
    def fail() -> None:
        raise ValueError("secret")

    with pytest.raises(SessionEncodeError, match="`encode` raised ValueError"):
        codec(encode=fail).encode({"share": Fraction(1, 3)})
    data = codec().encode({"share": Fraction(1, 3)})
    with pytest.raises(SessionDecodeError, match="made `decode` raise ValueError"):
        codec(decode=fail).decode(data)


# -- declared types


class Kind(Enum):
    ONE = "one"

    @classmethod
    def _missing_(cls, value: object) -> Any:
        ring()


@dataclass
class Address:
    city: str

    def __post_init__(self) -> None:
        if self.city == "late":
            ring()


class Name(str):
    __slots__ = ()

    def __new__(cls, text: str) -> Name:
        if text == "late":
            ring()
        return super().__new__(cls, text)


@pytest.mark.parametrize(
    ("cls", "stored"),
    [(Kind, "late"), (Address, {"city": "late"}), (Name, "late")],
)
def test_a_time_out_in_a_class_of_the_program(cls: Any, stored: Any) -> None:
    class MySession(Session):
        value: cls | None = None  # type: ignore[valid-type]

    storage = MemoryStorage()
    storage.set("key", {"value": stored})
    sessions = SessionManager(MySession, storage=storage, lock_timeout=2)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="the handler's time is up"):
            with sessions.session_scope("key") as session:
                session.value  # noqa: B018 # it is read
    assert storage.get("key") == {"value": stored}
    with sessions.session_scope("key") as session:
        session.value = None
    assert storage.get("key") == {"value": None}


def test_a_time_out_in_a_validator_of_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic", reason="needs pydantic")

    class Model(pydantic.BaseModel):  # type: ignore[name-defined, misc]
        city: str

        @pydantic.field_validator("city")
        @classmethod
        def check(cls, value: str) -> str:
            if value == "late":
                ring()
            return value

    class MySession(Session):
        value: Model | None = None

    storage = MemoryStorage()
    storage.set("key", {"value": {"city": "late"}})
    sessions = SessionManager(MySession, storage=storage, lock_timeout=2)
    with pytest.raises(TimeoutError, match="the handler's time is up"):
        with sessions.session_scope("key") as session:
            session.value  # noqa: B018 # it is read


# -- functions of the program


def test_a_time_out_in_a_migration(tmp_path: Path) -> None:
    acts: list[Callable[..., Any]] = [ring]

    def second(fields: dict[str, Any]) -> None:
        if acts:
            acts.pop()()
        fields["version"] = 2

    class MySession(Session):
        migrations = {2: second}

    storage = SQLiteStorage(tmp_path / "s.db")
    storage.set("key", {"a": 1})
    sessions = SessionManager(MySession, storage=storage, lock_timeout=2)
    with pytest.raises(TimeoutError, match="the handler's time is up") as raised:
        with sessions.session_scope("key"):
            pass
    assert any("'key': the migration to version 2" in note for note in raised.value.__notes__)
    assert storage.get("key") == {"a": 1}
    with sessions.session_scope("key") as session:
        assert session.version == 2

    def fail() -> None:
        raise KeyError("secret")

    acts.append(fail)
    storage.set("key", {"a": 1})
    with pytest.raises(SessionMigrationError, match="KeyError"):
        with sessions.session_scope("key"):
            pass
    storage.close()


def test_a_time_out_in_what_a_moved_session_begins_with() -> None:
    storage = MemoryStorage()
    sessions = SessionManager(storage=storage, initial=lambda _key: ring())
    for chat in (-1, -1001):
        storage.set(f"user:1:chat:{chat}", {"a": chat})
    with pytest.raises(TimeoutError, match="the handler's time is up"):
        sessions.migrate_chat(-1, -1001)
    assert storage.get("user:1:chat:-1") == {"a": -1}


def test_a_time_out_while_the_key_of_an_update_is_read() -> None:
    """As an update without a key it would be handled without its session."""
    update = message()

    def act() -> None:
        assert default_key_text(update) == "user:1:chat:1"
        assert str(default_storage_key(update)) == "user:1:chat:1"

    def time_is_up() -> None:
        raise TimeoutError

    for interruption in everywhere(time_is_up, session_sync.session.keys):
        assert comes_out(act, interruption, TimeoutError) == interruption.happened


def test_a_damaged_pickle_is_none_because_of_an_interruption() -> None:
    data = pickle.dumps([{"a": (1, 2.0, b"?")}, datetime(2026, 1, 1, tzinfo=UTC), {1}])
    for interruption in everywhere(raise_outside, session_sync.admin.importers.pickles):
        came = comes_out(lambda: read_pickle(data), interruption, OutsideError)
        assert came == interruption.happened
