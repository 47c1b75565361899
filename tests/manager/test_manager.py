"""The options of a manager, and its two ways in."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import message, poll

import session_sync
from session_sync import (
    LruMemoryStorage,
    MemoryStorage,
    Session,
    SessionKeyError,
    SessionLockTimeoutError,
    SessionManager,
    StorageKey,
)

KEY = "user:1:chat:1"


@pytest.fixture
def sessions() -> SessionManager[Any]:
    return SessionManager()


def stored(sessions: SessionManager[Any], key: str = KEY) -> Any:
    return sessions.storage.get(key)


# -- with_session


def test_a_decorated_function_gets_its_session_by_name(sessions: SessionManager[Any]) -> None:
    @sessions.with_session
    def start(message: Any, session: Session) -> str:
        """Doc."""
        session.counter = session.get("counter", 0) + 1
        return "answer"

    assert start(message(1)) == "answer"
    assert start(message=message(1)) == "answer"
    assert stored(sessions) == {"counter": 2}
    assert (start.__name__, start.__doc__) == ("start", "Doc.")
    assert list(inspect.signature(start).parameters) == ["message"]


def test_a_handler_without_a_session_argument_still_runs_inside_its_scope(
    sessions: SessionManager[Any],
) -> None:
    @sessions.with_session
    def outer(message: Any, *args: Any, **kwargs: Any) -> None:
        assert (args, kwargs) == ((5,), {"extra": 6})
        with sessions.session_scope(message) as session:
            session.a = 1

    @sessions.with_session
    def bare(message: Any) -> None:
        assert len(sessions.locks) == 1
        assert sessions.locks.is_locked(KEY)

    outer(message(1), 5, extra=6)
    bare(message(1))
    assert stored(sessions) == {"a": 1}


def test_an_async_handler_is_awaited_inside_its_scope(sessions: SessionManager[Any]) -> None:
    @sessions.with_session
    async def start(update: Any, context: Any, session: Session) -> str:
        value = session.get("counter", 0)
        await asyncio.sleep(0)
        session.counter = value + 1
        return context

    async def main() -> list[str]:
        return await asyncio.gather(*(start(message(1), str(n)) for n in range(20)))

    assert inspect.iscoroutinefunction(start)
    assert asyncio.run(main()) == [str(n) for n in range(20)]
    assert stored(sessions) == {"counter": 20}


def test_methods_partials_and_callable_objects_are_handlers_too(
    sessions: SessionManager[Any],
) -> None:
    class Shop:
        @sessions.with_session
        def buy(self, message: Any, session: Any) -> None:
            session.setdefault("by", []).append("method")

        @sessions.with_session
        async def abuy(self, message: Any, session: Any) -> None:
            session.by.append("async method")

        @classmethod
        @sessions.with_session
        def cbuy(cls, message: Any, session: Any) -> None:
            session.by.append(cls.__name__)

        @staticmethod
        @sessions.with_session
        def sbuy(message: Any, session: Any) -> None:
            session.by.append("static")

        def bound(self, message: Any, session: Any) -> None:
            session.by.append("bound")

        def __call__(self, message: Any, session: Any) -> None:
            session.by.append("called")

    class AsyncShop:
        async def __call__(self, message: Any, session: Any) -> None:
            session.by.append("async called")

    def many(what: str, message: Any, session: Any, more: str = "") -> None:
        session.by.append(what + more)

    async def amany(what: str, message: Any, session: Any) -> None:
        session.by.append(what)

    update = message(1)
    shop = Shop()
    shop.buy(update)
    asyncio.run(shop.abuy(update))
    Shop.cbuy(update)
    Shop.sbuy(update)
    sessions.with_session(shop.bound)(update)
    sessions.with_session(shop)(message=update)
    sessions.with_session(functools.partial(many, "partial", more="!"))(update)
    wrapped: Any = sessions.with_session(AsyncShop())  # type: ignore[type-var]
    asyncio.run(wrapped(update))
    asyncio.run(sessions.with_session(functools.partial(amany, "async partial"))(update))
    assert stored(sessions)["by"] == [
        "method",
        "async method",
        "Shop",
        "static",
        "bound",
        "called",
        "partial!",
        "async called",
        "async partial",
    ]


def test_decorating_twice_joins_and_two_managers_nest(sessions: SessionManager[Any]) -> None:
    chats: SessionManager[Any] = SessionManager(get_storage_key=session_sync.by_chat)

    @sessions.with_session
    @sessions.with_session
    def handler(message: Any, session: Any) -> None:
        with chats.session_scope(message) as chat:
            chat.visits = chat.get("visits", 0) + 1
        session.a = session.get("a", 0) + 1

    handler(message(1))
    assert stored(sessions) == {"a": 1}
    assert stored(chats, "chat:1") == {"visits": 1}


def test_what_cannot_be_decorated_says_why(sessions: SessionManager[Any]) -> None:
    def nothing() -> None: ...
    def positional(message: Any, session: Any, /) -> None: ...
    def only_keywords(*, session: Any, **kwargs: Any) -> None: ...

    for handler, reason in (
        (nothing, "takes no update"),
        (only_keywords, "takes no update"),
        (positional, "cannot stand before a /"),
    ):
        with pytest.raises(TypeError, match=reason):
            sessions.with_session(handler)

    @sessions.with_session
    def fine(message: Any) -> None: ...

    with pytest.raises(TypeError, match="without an update"):
        fine()  # type: ignore[call-arg]


def test_an_update_without_a_key_raises_in_both_doors(sessions: SessionManager[Any]) -> None:
    @sessions.with_session
    def handler(update: Any) -> None:
        pytest.fail("ran")

    with pytest.raises(SessionKeyError, match="neither a user nor a chat"):
        handler(poll())
    with pytest.raises(LookupError, match="get_storage_key"):
        sessions.session_scope(poll())


# -- options


def test_a_key_may_be_given_itself_and_the_prefix_goes_before_every_key() -> None:
    storage = MemoryStorage()
    one: SessionManager[Any] = SessionManager(storage=storage, prefix="one:")
    two: SessionManager[Any] = SessionManager(storage=storage, prefix="two:")
    for sessions in (one, two):
        for key in (message(1), KEY, StorageKey(user=1, chat=1)):
            with sessions.session_scope(key) as session:
                session.n = session.get("n", 0) + 1
                assert session.key == KEY
                with sessions.session_scope(session.key) as again:
                    assert again is session
    assert {key: storage.get(key) for key in storage.keys()} == {
        f"one:{KEY}": {"n": 3},
        f"two:{KEY}": {"n": 3},
    }


@pytest.mark.parametrize(
    ("answer", "key"), [("k", "k"), (StorageKey(user=5), "user:5"), (StorageKey(key=""), "key:")]
)
def test_get_storage_key_answers_a_str_or_a_storage_key(answer: Any, key: str) -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=lambda update: answer)
    with sessions.session_scope({"any": "thing"}) as session:
        session.a = 1
    assert stored(sessions, key) == {"a": 1}


def test_a_key_of_another_type_is_refused() -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=lambda update: 5)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="a str, a StorageKey or None, not int"):
        sessions.session_scope(message(1))


def test_lock_timeout_is_a_number_a_timedelta_or_none() -> None:
    storage = MemoryStorage()
    with SessionManager(storage=storage).session_scope(KEY):
        for timeout in (0, timedelta(0)):
            sessions: SessionManager[Any] = SessionManager(storage=storage, lock_timeout=timeout)

            def wait(sessions: SessionManager[Any] = sessions) -> None:
                with pytest.raises(
                    SessionLockTimeoutError, match=r"'user:1:chat:1'.*within 0 s.*Main"
                ):
                    sessions.session_scope(KEY).__enter__()

            asyncio.run(asyncio.to_thread(_outside(wait)))
    assert SessionManager(lock_timeout=None).scopes.options.lock_timeout is None


def _outside(work: Any) -> Any:
    import contextvars

    return lambda: contextvars.Context().run(work)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"on_error": "ignore"}, ValueError, "'discard' or 'flush'"),
        ({"lock_timeout": -1}, ValueError, "lock_timeout must be"),
        ({"lock_timeout": float("nan")}, ValueError, "lock_timeout must be"),
        ({"session_type": dict}, TypeError, "Session or a subclass"),
        ({"storage": {}}, TypeError, "no method set"),
        ({"storage": object()}, TypeError, "no method get"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(
    options: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        SessionManager(**options)


def test_async_functions_are_refused_by_name() -> None:
    class AsyncStorage:
        async def get(self, key: str) -> Any: ...
        async def set(self, key: str, value: Any) -> None: ...
        async def delete(self, key: str) -> None: ...
        async def has(self, key: str) -> Any: ...

    async def function(update: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"AsyncStorage\.get is an `async def`"):
        SessionManager(storage=AsyncStorage())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="get_storage_key is an `async def`"):
        SessionManager(get_storage_key=function)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="initial is an `async def`"):
        SessionManager(initial=function)  # type: ignore[arg-type]


def test_closing_the_manager_closes_its_storage() -> None:
    class Closing(MemoryStorage):
        closed = False

        def close(self) -> None:
            self.closed = True

    storage = Closing()
    with SessionManager(storage=storage) as sessions:
        assert not storage.closed
    assert storage.closed
    assert sessions.storage is storage


def test_a_subclass_of_session_is_what_handlers_get() -> None:
    class MySession(Session):
        def total(self) -> int:
            return sum(self.get("items", ()))

    sessions = SessionManager(MySession)
    with sessions.session_scope(KEY) as session:
        session["items"] = [1, 2]
        assert session.total() == 3
        with pytest.raises(AttributeError, match=r"session\['total'\]"):
            session.total = 5  # type: ignore[method-assign,assignment]


def test_values_appear_in_no_log(
    sessions: SessionManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with sessions.session_scope(KEY) as session:
        session.secret = "hidden words"
        assert "hidden" not in repr(session)
        assert "hidden" not in str(session)
    assert "hidden" not in caplog.text


# -- the package


def test_importing_the_package_imports_no_framework_and_no_extra() -> None:
    code = (
        "import sys, session_sync, session_sync.testing\n"
        "print(sorted({'telebot', 'telegram', 'diskcache', 'redis', 'pytest'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (answer.stdout.strip(), answer.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("module", "code", "extra"),
    [
        ("diskcache", "from session_sync import DiskStorage", "session-sync[disk]"),
        ("telebot", "import session_sync.telebot", "session-sync[telebot]"),
    ],
)
def test_a_missing_extra_is_named(module: str, code: str, extra: str, tmp_path: Path) -> None:
    hidden = f"import sys; sys.modules[{module!r}] = None\n{code}"
    answer = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert answer.returncode == 1
    assert f"pip install '{extra}'" in answer.stderr.splitlines()[-1]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        session_sync.Nothing  # type: ignore[attr-defined]  # noqa: B018
    for name in session_sync.__all__:
        assert getattr(session_sync, name) is not None
    assert issubclass(LruMemoryStorage, MemoryStorage)
