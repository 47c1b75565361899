"""Mistakes that would pass in silence, or mislead: each is told at once, with the way out."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from session_sync import (
    DiskStorage,
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionManager,
    SQLiteStorage,
    StorageKey,
    StrictSession,
    storage_from_url,
)

UPDATE = {"update_id": 1, "message": {"from": {"id": 1}, "chat": {"id": 1}}}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _nothing(_fields: dict[str, Any]) -> None:
    return None


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "the class of a storage": (
        lambda: SessionManager(storage=SQLiteStorage),  # type: ignore[arg-type]
        TypeError,
        r"SQLiteStorage is a class; .* storage=SQLiteStorage\(...\)",
    ),
    "a URL as storage": (
        lambda: SessionManager(storage="sqlite:///s.db"),  # type: ignore[arg-type]
        TypeError,
        "str is no storage",
    ),
    "in memory": (lambda: SQLiteStorage(":memory:"), ValueError, r"':memory:'; .* MemoryStorage"),
    "no name": (lambda: SQLiteStorage(""), ValueError, "takes the path of a file, not ''"),
    "SQLite's own URLs": (lambda: SQLiteStorage("file:s.db?mode=ro"), ValueError, "path of a file"),
    "a folder": (lambda: SQLiteStorage("."), IsADirectoryError, "is a folder; .*sessions.db"),
    "a slash too few": (
        lambda: storage_from_url("sqlite:bot/x.db"),
        ValueError,
        "too few slashes: sqlite:///bot/x.db is relative",
    ),
    "two slashes too few": (
        lambda: storage_from_url("disk:/bot"),
        ValueError,
        "'disk:/bot' has too few slashes",
    ),
    "a file's name as URL": (
        lambda: storage_from_url("s.db"),
        ValueError,
        "'s.db' is no URL of a storage; the file of that name is sqlite:///s.db",
    ),
    "a # in a file's name": (lambda: storage_from_url("sqlite:///a#b.db"), ValueError, "%23"),
    "a # at the end of it": (lambda: storage_from_url("sqlite:///a#"), ValueError, "%23"),
    "an unknown storage": (
        lambda: storage_from_url("mysql://localhost"),
        ValueError,
        "no storage is called 'mysql'; there are disk, memory, ",
    ),
    "migrations with a hole": (
        lambda: SessionManager(migrations={2: _nothing, 4: _nothing}),
        ValueError,
        "migrations has number 4 and no number 3",
    ),
}
for name, what in (("sqlite", SQLiteStorage), ("disk", DiskStorage)):
    MISTAKES[f"a text as ttl, {name}"] = (
        lambda what=what: what("x", ttl="1h"),  # type: ignore[misc]
        TypeError,
        "ttl must be a positive number of seconds .*, not '1h'",
    )
for storage in (MemoryStorage, LruMemoryStorage):
    MISTAKES[f"a text as ttl, {storage.__name__}"] = (
        lambda storage=storage: storage(ttl="1h"),  # type: ignore[misc]
        TypeError,
        "ttl must be a positive number of seconds .*, not '1h'",
    )
MISTAKES["a text as lock_timeout"] = (
    lambda: SessionManager(lock_timeout="5"),  # type: ignore[arg-type]
    TypeError,
    "lock_timeout must be a number of seconds",
)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_at_once_and_leaves_no_file(
    mistake: tuple[Callable[[], object], type[Exception], str],
) -> None:
    make, error, message = mistake
    with pytest.raises(error, match=message):
        make()
    assert os.listdir() == []


@pytest.mark.parametrize("character", ["#", "/", "?", "@6379/"])
@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster"])
def test_no_part_of_a_password_is_in_a_message(scheme: str, character: str) -> None:
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    url = f"{scheme}://user:secret{character}word@localhost/0"
    with pytest.raises(ValueError, match=r"quote\(password, safe=\"\"\)") as raised:
        storage_from_url(url)
    for part in ("secret", "word@"):
        assert part not in str(raised.value)


def test_a_port_that_is_none_is_not_in_the_message() -> None:
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    with pytest.raises(ValueError, match="the port is no number") as raised:
        storage_from_url("redis://localhost:secret/0")
    assert "secret" not in str(raised.value)


class Integration(NamedTuple):
    """What a program has of one library."""

    bot: Any
    install: Any


@pytest.fixture(params=["telebot", "async telebot", "ptb"])
def integration(request: pytest.FixtureRequest) -> Integration:
    if request.param == "ptb":
        telegram = pytest.importorskip("telegram.ext", reason="needs the extra 'ptb'")
        import session_sync.ptb

        builder = telegram.Application.builder().token("1:token")
        return Integration(builder, session_sync.ptb.install)
    telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    import session_sync.telebot

    if request.param == "telebot":
        return Integration(telebot.TeleBot("1:token", threaded=False), session_sync.telebot.install)
    async_telebot = pytest.importorskip("telebot.async_telebot", reason="needs aiohttp")
    return Integration(async_telebot.AsyncTeleBot("1:token"), session_sync.telebot.install)


def test_install_takes_no_storage(integration: Integration) -> None:
    bot, install = integration
    storage: Any = MemoryStorage()
    with pytest.raises(TypeError, match=r"takes a SessionManager for session, not a MemoryStorage"):
        install(bot, storage)
    with pytest.raises(TypeError, match=r"takes a SessionManager for chat_session, not a Memory"):
        install(bot, SessionManager(), chat_session=storage)


def test_a_manager_that_was_closed_opens_nothing() -> None:
    storage = SQLiteStorage("s.db")
    sessions: SessionManager[Any] = SessionManager(storage=storage)
    with sessions, sessions.session_scope("user:1") as session:
        session.a = 1
    with pytest.raises(RuntimeError, match="session 'user:1' cannot be opened: its SessionManager"):
        sessions.session_scope("user:1")
    other: SessionManager[Any] = SessionManager(storage=storage)
    with other.session_scope("user:1") as session:
        assert session.a == 1
    storage.close()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda sessions: sessions.session_scopes("user:1"), id="session_scopes"),
        pytest.param(lambda sessions: sessions.scopes.of_key("user:1", None), id="of_key"),
        pytest.param(lambda sessions: sessions.scopes.as_stored("user:1"), id="as_stored"),
        pytest.param(lambda sessions: sessions.find(user=1), id="find"),
        pytest.param(lambda sessions: sessions.forget(user=1), id="forget"),
        pytest.param(lambda sessions: sessions.migrate_chat(1, 2), id="migrate_chat"),
        pytest.param(lambda sessions: sessions.migrate_all(), id="migrate_all"),
    ],
)
def test_a_manager_that_was_closed_leaves_its_store_closed(
    use: Callable[[SessionManager[Any]], object],
) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=SQLiteStorage("s.db"))
    with sessions, sessions.session_scope("user:1:chat:1") as session:
        session.a = 1
    before = sorted(os.listdir())
    with pytest.raises(RuntimeError, match=r"its SessionManager was closed, .*make another one"):
        use(sessions)
    assert sorted(os.listdir()) == before == ["s.db", "s.db-locks"]


def test_a_list_of_keys_ends_when_its_manager_is_closed() -> None:
    with SessionManager(storage=SQLiteStorage("s.db")) as sessions:
        for number in range(3):
            with sessions.session_scope(f"user:{number}") as session:
                session.a = 1
        keys = sessions.find()
        assert next(keys) == "user:0"
    with pytest.raises(RuntimeError, match=r"find\(\) cannot list further sessions: its Session"):
        next(keys)
    assert sorted(os.listdir()) == ["s.db", "s.db-locks"]


def test_a_manager_that_was_closed_is_not_installed(integration: Integration) -> None:
    bot, install = integration
    closed: SessionManager[Any] = SessionManager()
    closed.close()
    for managers in ((closed, None), (SessionManager(), closed)):
        with pytest.raises(RuntimeError, match="cannot give the bot sessions: its SessionManager"):
            install(bot, managers[0], chat_session=managers[1])
    install(bot, SessionManager())  # nothing was left half installed


def test_a_name_may_have_any_character_if_it_is_quoted() -> None:
    storage: Any = storage_from_url("sqlite:///a@b%23%3F%25.db")
    storage.close()
    assert "a@b#?%.db" in os.listdir()


@pytest.mark.parametrize("key", ["user:1", StorageKey(user=1)])
def test_a_decorated_handler_takes_an_update_and_no_key(key: str | StorageKey) -> None:
    sessions: SessionManager[Any] = SessionManager()

    @sessions.with_session
    def greet(language: Any, message: Any, session: Any) -> None:
        session.language = language

    with pytest.raises(
        TypeError, match=r"with a (str|StorageKey) in place of an update, .*partial"
    ):
        functools.partial(greet, key)({"from": {"id": 1}})
    assert list(sessions.storage.keys()) == []


RULE = "the session arrives as the argument named `session`, and this handler has none"


class Cart(Session):
    """A class of a bot's own."""

    bought: list[str]


def _optional(message: Any, basket: Cart = None) -> None:  # type: ignore[assignment]
    raise AssertionError


def _first(basket: Session, message: Any) -> None:
    raise AssertionError


async def _async(update: Any, context: Any, *, basket: StrictSession) -> None:
    raise AssertionError


class Shop:
    """A bot in a class."""

    def buy(self, message: Any, basket: Cart) -> None:
        raise AssertionError

    def __call__(self, message: Any, basket: Cart) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "handler",
    [
        _optional,
        _first,
        _async,
        Shop.buy,
        Shop().buy,
        Shop(),
        functools.partial(_async, context=None),
    ],
)
def test_a_session_under_another_name_is_refused_when_it_is_decorated(
    handler: Callable[..., Any],
) -> None:
    sessions: SessionManager[Any] = SessionManager()
    with pytest.raises(
        TypeError, match=rf"`basket` is annotated as (Cart|Session|StrictSession); {RULE}"
    ):
        sessions.with_session(handler)


def test_a_session_that_the_caller_gives_may_have_any_name() -> None:
    sessions: SessionManager[Any] = SessionManager(session_type=Cart)
    seen: list[Any] = []

    @sessions.with_session
    def move(message: Any, target: Cart, session: Cart) -> None:
        seen.append((target, session))

    def look(message: Any, target: Cart, *others: Cart, **named: Cart) -> None:
        seen.append((target, others, named))

    with sessions.session_scope("user:2") as target:
        move(UPDATE, target)
        sessions.with_session(functools.partial(look, target=target))(UPDATE)
    assert [each[0] for each in seen] == [target, target]


def _by_position(message: Any, basket: Any) -> None:
    raise AssertionError


def _by_name(message: Any, *, basket: Any) -> None:
    raise AssertionError


def _unknown(message: Any, basket: OnlyForTypeCheckers) -> None:  # type: ignore[name-defined] # noqa: F821
    raise AssertionError


async def _awaited(message: Any, basket: Any, page: int = 1) -> None:
    raise AssertionError


@pytest.mark.parametrize("handler", [_by_position, _by_name, _unknown, _awaited])
def test_a_missing_argument_is_told_with_the_rule_for_sessions(handler: Any) -> None:
    sessions: SessionManager[Any] = SessionManager()
    decorated: Any = sessions.with_session(handler)

    async def call() -> None:
        await decorated(UPDATE)

    with pytest.raises(TypeError, match=rf"{handler.__name__}.* without basket; {RULE}") as raised:
        asyncio.run(call()) if handler is _awaited else decorated(UPDATE)
    assert "required" in str(raised.value.__cause__)  # Python's own words
    assert len(sessions.locks) == 0


def test_what_a_handler_raises_itself_is_left_as_it_is() -> None:
    sessions: SessionManager[Any] = SessionManager()

    def greet(name: str) -> None:
        raise AssertionError

    def supply(handler: Any) -> Any:
        @functools.wraps(handler)
        def call(message: Any) -> None:
            handler(message, "a basket" + message)

        return call

    @sessions.with_session
    def forgetful(message: Any) -> None:
        greet()  # type: ignore[call-arg]

    @sessions.with_session
    @supply
    def supplied(message: Any, basket: Any) -> None:
        raise AssertionError

    @sessions.with_session
    def other(message: Any, context: Any, session: Any, **more: Any) -> None:
        raise AssertionError

    @sessions.with_session
    def short(message: Any) -> None:
        raise AssertionError

    calls: dict[str, Callable[[], Any]] = {
        r"greet\(\) missing 1 required positional argument: 'name'$": lambda: forgetful(UPDATE),
        r"can only concatenate str": lambda: supplied(UPDATE),
        r"other\(\) missing 1 required positional argument: 'context'$": lambda: other(UPDATE),  # type: ignore[call-arg]
        r"short\(\) takes 1 positional argument but 2 were given$": lambda: short(UPDATE, 1),  # type: ignore[call-arg]
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message) as raised:
            call()
        assert raised.value.__cause__ is None
