"""The options, and the entry points: `session_scope`, `session_scopes` and `with_session`.

This module knows what a program can set and call; how a scope is made and what it does is
`lifecycle`'s.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar, cast

from .errors import SessionKeyError, SessionMigrationError
from .lifecycle import bulk
from .lifecycle.backend import backend_of
from .lifecycle.entry import SessionScope
from .lifecycle.factory import ScopeFactory
from .lifecycle.handlers import HandlerSignature, is_async
from .lifecycle.observers import Observer, Observers, WaitReporter
from .lifecycle.options import LOCK_TIMEOUT, Options
from .lifecycle.transaction import SessionScopes
from .locks.table import Locks
from .session.keys import (
    StorageKey,
    default_key_text,
    default_storage_key,
    message_types,
    text_of,
)
from .session.migrations import Migration, Migrations
from .session.session import BaseSession, Session, schema_of
from .storages.base import KVStorage
from .storages.durations import seconds_of
from .storages.memory import MemoryStorage

if TYPE_CHECKING:  # a manager made without arguments is a SessionManager[Session]
    from typing_extensions import TypeVar as TypeVarWithDefault

    S = TypeVarWithDefault("S", bound=BaseSession, default=Session)
else:
    S = TypeVar("S", bound=BaseSession)
Handler = TypeVar("Handler", bound=Callable[..., Any])
_SHORTEST_PATIENCE: Final = 0.1


class SessionManager(Generic[S]):
    """Opens, locks and saves the sessions of one type in one storage.

    Arguments:
        session_type: `Session` or `StrictSession`, or a subclass with declared fields.
        storage: any `KVStorage`; `MemoryStorage()` if None.
        get_storage_key: the key of an update: a `str`, a `StorageKey`, or None for an update that
            has no session. By default one session per user and chat.
        initial: the fields of a session that is not stored yet, given the update (or the key that
            `session_scope` got). Called once per missing session; not stored until something
            changes; what it raises propagates.
        lazy: lock and load at the first access instead of at the beginning.
        lock_timeout: how many seconds (or a timedelta) a scope waits for its key before it raises
            SessionLockTimeoutError; None waits forever.
        on_error: "discard": a handler that raises leaves the stored session as it was at the last
            flush; "flush": save anyway.
        prefix: goes before every key, for several bots on one store.
        dedupe: how many updates a session remembers, so that one that Telegram sends again (a
            webhook was answered too late, say) is skipped. Under `install` only. They are stored
            with the session, in one step; one whose handler failed is forgotten if its changes are
            (see `on_error`). 0: none. Not available with `lazy=True`.
        migrations: how stored sessions of an older version become those of this program: for each
            version from 2 on a function that gets the fields of the version before, as they are
            stored, in a dict that it may change (or returns another one). By default those that the
            class has under this name. They run in order when a session is loaded, under its lock,
            and what comes out is stored with whatever is written next.
        migrate_eagerly: store a migrated session at once. By default as the class sets it: False.
        on_open, on_close, on_wait: observers, called with a SessionEvent when a session was loaded,
            when it was saved and unlocked (or could not be saved), and when a caller has waited for
            one, or could not have it; `on_wait` also while callers still wait, for the first time
            after `lock_timeout` seconds, and then ever more rarely (as a warning in the log). They
            are for figures, and must be quick: they run where the session is used, on the event
            loop too. What they raise is logged, and goes no further.

    Raises TypeError and ValueError for options that cannot work, at once.

    >>> from session_sync import SessionManager
    >>> with SessionManager() as sessions:
    ...     with sessions.session_scope("user:1") as session:
    ...         session.counter = 1
    ...     sessions.storage.get("user:1")
    {'counter': 1}
    """

    def __init__(
        self,
        session_type: type[S] = Session,  # type: ignore[assignment] # S's default, which mypy forgets
        *,
        storage: KVStorage[Any] | None = None,
        get_storage_key: Callable[[Any], str | StorageKey | None] = default_storage_key,
        initial: Callable[[Any], Mapping[str, Any] | None] | None = None,
        lazy: bool = False,
        lock_timeout: float | timedelta | None = LOCK_TIMEOUT,
        on_error: Literal["discard", "flush"] = "discard",
        prefix: str = "",
        dedupe: int = 0,
        migrations: Mapping[int, Migration] | None = None,
        migrate_eagerly: bool | None = None,
        on_open: Observer | None = None,
        on_close: Observer | None = None,
        on_wait: Observer | None = None,
    ) -> None:
        if not (isinstance(session_type, type) and issubclass(session_type, BaseSession)):
            raise TypeError(f"session_type must be Session or a subclass, not {session_type!r}")
        if migrations is not None and session_type.migrations:
            raise TypeError(
                f"{session_type.__name__} has migrations already; give them to the class or to the "
                f"manager, so that there is one answer to which version is the newest"
            )
        if on_error not in ("discard", "flush"):
            raise ValueError(f"on_error must be 'discard' or 'flush', not {on_error!r}")
        _check_dedupe(dedupe, lazy)
        for name, function in (
            ("get_storage_key", get_storage_key),
            ("initial", initial),
            ("on_open", on_open),
            ("on_close", on_close),
            ("on_wait", on_wait),
        ):
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} is an `async def`; it must be a plain function")
        self.storage: Final = storage if storage is not None else MemoryStorage()
        self.prefix: Final = prefix
        self.dedupe: Final = dedupe
        # The same without a StorageKey in between, which is as much work as all the rest.
        self._given_storage_key: Final = get_storage_key
        is_default = get_storage_key is default_storage_key
        self._get_storage_key: Final = default_key_text if is_default else get_storage_key
        steps = Migrations(
            session_type.migrations if migrations is None else migrations, "migrations"
        )
        observers = Observers(on_open, on_close, on_wait)
        timeout = None if lock_timeout is None else seconds_of(lock_timeout, "lock_timeout")
        options = Options(
            session_type=session_type,
            schema=schema_of(session_type).of_version(steps.version),
            migrations=steps,
            migrate_eagerly=(
                session_type.migrate_eagerly if migrate_eagerly is None else migrate_eagerly
            ),
            backend=backend_of(self.storage),
            initial=initial,
            lazy=lazy,
            lock_timeout=timeout,
            queue_timeout=timeout,
            patience=WaitReporter(
                max(_SHORTEST_PATIENCE, LOCK_TIMEOUT if timeout is None else timeout),
                observers,
                prefix,
            ),
            save_on_error=on_error == "flush",
            dedupe=dedupe,
        )
        self._migrations: Final = migrations
        #: For the integrations.
        self.scopes: Final = ScopeFactory(options, prefix, self._get_storage_key, observers)
        self.locks: Final = Locks(options.backend.locks, prefix)

    def __reduce__(self) -> tuple[Callable[[], SessionManager[S]], tuple[()]]:
        """By its options: for a process of multiprocessing, which then has a manager of its own."""
        options = self.scopes.options
        make = functools.partial(
            type(self),
            options.session_type,
            storage=self.storage,
            get_storage_key=self._given_storage_key,
            initial=options.initial,
            lazy=options.lazy,
            lock_timeout=options.lock_timeout,
            on_error="flush" if options.save_on_error else "discard",
            prefix=self.prefix,
            dedupe=self.dedupe,
            migrations=self._migrations,
            migrate_eagerly=options.migrate_eagerly,
            **self.scopes.observers._asdict(),
        )
        return make, ()

    # -- the entry points

    def session_scope(self, update_or_key: Any) -> SessionScope[S]:
        """The session of an update or a key (`str`, `StorageKey`), for `with` or `async with`.

        Raises SessionKeyError if the update has no session. Entering raises
        SessionLockTimeoutError, SessionDeadlockError, and what the storage raises; so does leaving,
        for the storage.

        >>> from session_sync import SessionManager, StorageKey
        >>> sessions = SessionManager()
        >>> with sessions.session_scope(StorageKey(user=1, chat=1)) as session:
        ...     session.counter = 1
        >>> update = {"update_id": 1, "message": {"from": {"id": 1}, "chat": {"id": 1}}}
        >>> with sessions.session_scope(update) as session:
        ...     session.counter
        1
        """
        # No message is a key, which to find out takes longer than to look whether it is a message.
        is_message = type(update_or_key) in message_types
        if not is_message and isinstance(update_or_key, (str, StorageKey)):
            key: Any = str(update_or_key)
        else:
            key = self._get_storage_key(update_or_key)
            if key.__class__ is not str:
                key = text_of(key)
                if key is None:
                    raise SessionKeyError(no_key(update_or_key))
        return self.scopes.of_key(key, update_or_key)

    def session_scopes(self, *updates_or_keys: Any) -> SessionScopes[S]:
        """The sessions of several updates or keys at once, for `with` or `async with`: a transfer
        from one user to another, say.

        They are locked in one fixed order, whatever the order in which they are given, so two
        transfers never wait for each other in a circle. A block that raises leaves all of them as
        they were (see `on_error`). At its end all are written or, if that fails, none, where the
        storage can write several in one step: those in memory, SQLiteStorage, DiskStorage and
        RedisStorage can, but for a cluster, and an adapter may (see AtomicStorage). Another one
        gets them one by one; if that fails half-way, a note on the exception names those that it
        has.

        A key that is given twice, or is open around the block, is one session; the latter is saved
        with the scope around it. All are loaded at the beginning, also by a lazy manager.

        Raises as `session_scope` does, entered and left.

        >>> from session_sync import SessionManager
        >>> sessions = SessionManager(initial=lambda key: {"coins": 10})
        >>> with sessions.session_scopes("user:1", "user:2") as (alice, bob):
        ...     alice.coins -= 3
        ...     bob.coins += 3
        >>> sessions.storage.get("user:1"), sessions.storage.get("user:2")
        ({'coins': 7}, {'coins': 13})
        """
        scopes = [self.session_scope(each) for each in updates_or_keys]
        if self.scopes.options.lazy:
            options = replace(self.scopes.options, lazy=False)
            scopes = [self.scopes.of_key(each.key, each.update, options) for each in scopes]
        return SessionScopes(scopes)

    def with_session(self, handler: Handler) -> Handler:
        """Run a handler, sync or async, function or method, inside the scope of its update.

        The update is the handler's first argument (after `self`). The session arrives as the
        argument named `session`; a handler without one still runs inside its scope. What is
        returned shows no `session` in its signature, because telebot looks at signatures.

        Raises TypeError if another argument is annotated as a session, or is missing in a call.

        >>> from session_sync import SessionManager
        >>> sessions = SessionManager()
        >>> @sessions.with_session
        ... def start(message, session):
        ...     session.counter = session.get("counter", 0) + 1
        ...     return session.counter
        >>> update = {"update_id": 1, "message": {"from": {"id": 1}, "chat": {"id": 1}}}
        >>> start(update), start(update)
        (1, 2)
        """
        known = HandlerSignature(handler)

        if is_async(handler):

            @functools.wraps(handler)
            async def awrapper(*args: Any, **kwargs: Any) -> Any:
                async with self.session_scope(known.update(args, kwargs)) as session:
                    if known.wants_session:
                        kwargs["session"] = session
                    try:
                        return await handler(*args, **kwargs)
                    except TypeError as error:
                        known.refuse_other_name(error, args, kwargs)
                        raise

            return cast(Handler, known.dress(awrapper))

        @functools.wraps(handler)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.session_scope(known.update(args, kwargs)) as session:
                if known.wants_session:
                    kwargs["session"] = session
                try:
                    return handler(*args, **kwargs)
                except TypeError as error:
                    known.refuse_other_name(error, args, kwargs)
                    raise

        return cast(Handler, known.dress(wrapper))

    # -- all of them

    def migrate_all(self, progress: Callable[[str], None] | None = None) -> int:
        """Bring every stored session up to date now, each under its lock, while bots may run that
        know this version.

        Only those under the manager's prefix are looked at; without one, all of the store. A
        session that is up to date costs one read; so when this was interrupted, calling it again
        goes on. Reading restarts the lifetime that a storage's `ttl` gives. In async code:
        `await asyncio.to_thread(sessions.migrate_all)`.

        Arguments:
            progress: called with each key (without the prefix) after it was looked at.

        Returns how many sessions were migrated. Raises TypeError if the storage cannot list its
        keys, and what it raises otherwise. Sessions that could not be opened or migrated are left
        as they are: an ExceptionGroup at the end has the errors, which name the keys.

        >>> from session_sync import MemoryStorage
        >>> storage = MemoryStorage()
        >>> storage.set("user:1", {"name": "Alex Doe"})
        >>> def split_name(fields):
        ...     fields["first"], fields["last"] = fields.pop("name").split()
        >>> sessions = SessionManager(storage=storage, migrations={2: split_name})
        >>> sessions.migrate_all()
        1
        >>> storage.get("user:1")
        {'first': 'Alex', 'last': 'Doe', '$version': 2}
        """
        self.scopes.refuse_closed("migrate_all() cannot open the sessions")
        # What is gone meanwhile is not to be made again, and closing stores what was migrated.
        options = replace(self.scopes.options, lazy=False, migrate_eagerly=False, initial=None)

        def migrate(full_key: str) -> bool:
            key = full_key.removeprefix(self.prefix)
            entry = SessionScope(options, key, full_key, key)
            with entry:
                if entry.joined is not None:
                    raise SessionMigrationError(
                        f"session {key!r} is open around migrate_all(), so it is stored only when "
                        f"that handler has ended; call it outside of handlers"
                    )
                return entry.tracker is not None and entry.tracker.is_unsaved

        return bulk.for_each_key(self.storage, migrate, "migrated", progress, self.prefix)

    # -- those of one user or chat

    def find(self, *, user: int | None = None, chat: int | None = None) -> Iterator[str]:
        """The keys (without the prefix) of all stored sessions of a user, of a chat, or of a user
        in a chat; with neither, of all that the manager has.

        A key without a user is taken for that of the private chat whose ID it has: of a manager
        with `by_chat`, `user=7` finds `chat:7`. Sessions that a group shares (`chat:-100`) belong
        to no user: only `chat=` finds them. Keys that are not strings of a `StorageKey` have
        neither user nor chat. All keys are read, not the sessions, and nothing is locked: a session
        may be gone when its key comes, and one that comes meanwhile may be missed.

        Raises TypeError if the storage cannot list its keys, and what StorageKey raises for what
        is no ID.

        >>> from session_sync import SessionManager
        >>> sessions = SessionManager()
        >>> for key in ("user:7:chat:7", "user:7:chat:-100", "user:8:chat:-100"):
        ...     with sessions.session_scope(key) as session:
        ...         session.counter = 1
        >>> list(sessions.find(user=7)), list(sessions.find(user=8, chat=-100))
        (['user:7:chat:7', 'user:7:chat:-100'], ['user:8:chat:-100'])
        """
        self.scopes.refuse_closed("find() cannot list the sessions")
        full_keys = self._until_closed(bulk.stored_keys(self.storage, self.prefix))
        return bulk.find(full_keys, self.prefix, user, chat)

    def _until_closed(self, full_keys: Iterator[str]) -> Iterator[str]:
        for full_key in full_keys:
            yield full_key
            self.scopes.refuse_closed("find() cannot list further sessions")

    def forget(self, *, user: int | None = None, chat: int | None = None) -> int:
        """Delete every stored session of a user, of a chat, or of a user in a chat: those that
        `find` finds, which does not find what a group shares by its user.

        Each is deleted under its lock: a handler that runs in it ends first, and what it saves is
        deleted as well. A later update begins a new session, as that of a new user does. Call it
        outside of handlers; in one, `session.release()` before. In async code: `await
        asyncio.to_thread(sessions.forget, user=...)`.

        Returns how many sessions were deleted. Raises TypeError with neither user nor chat, and as
        `find` does; and what the storage raises. Sessions that another caller keeps locked for
        longer than `lock_timeout`, that are open around the call, or that cannot be decoded stay as
        they are: an ExceptionGroup at the end has the errors, which name the keys. Calling it again
        goes on.

        >>> from session_sync import SessionManager
        >>> sessions = SessionManager()
        >>> with sessions.session_scope("user:7:chat:7") as session:
        ...     session.counter = 1
        >>> sessions.forget(user=7), sessions.forget(user=7)
        (1, 0)
        """
        self.scopes.refuse_closed("forget() cannot open the sessions")
        return bulk.forget(self.scopes.options, self.prefix, user, chat)

    def migrate_chat(self, old: int, new: int) -> int:
        """Move all sessions of a group to the ID that it has as a supergroup: of every user, topic,
        business connection and `key`. `install` does this by itself, see `migrate_chats`.

        Each is moved under its lock and that of its new key, with its timers and its version; a
        handler that runs in one of them ends first. Both are written in one step, where the storage
        can (see `session_scopes`); else the new place first, so a crash in between loses nothing.
        After any interruption, calling it again finishes. Call it outside of handlers;
        in one, `session.release()` before. In async code: `await asyncio.to_thread(
        sessions.migrate_chat, old, new)`.

        Where the new chat has a session already, both become one, field by field. What both have is
        the new one's, for it was written last; except what that one has only because `initial` gave
        it, which does not win over the old one's. Both are brought to the current version before.

        Arguments:
            old: the ID of the group: `message.chat.id` beside `migrate_to_chat_id`.
            new: that of the supergroup: `message.chat.id` beside `migrate_from_chat_id`.

        Returns how many sessions were moved. Raises ValueError if both are the same, and otherwise
        as `forget` does. Where `initial` fails for a key, or a migration does, both stay as they
        are.

        >>> from session_sync import SessionManager
        >>> sessions = SessionManager()
        >>> with sessions.session_scope("user:7:chat:-100") as session:
        ...     session.counter = 1
        >>> sessions.migrate_chat(-100, -1001234)
        1
        >>> list(sessions.find())
        ['user:7:chat:-1001234']
        """
        self.scopes.refuse_closed("migrate_chat() cannot open the sessions")
        return bulk.migrate_chat(self.scopes.options, self.prefix, old, new)

    # -- the end

    def close(self) -> None:
        """Close the storage, if it can be closed. From then on the manager opens no session, and
        lists, moves and deletes none: that raises RuntimeError, as `install` does with it."""
        self.scopes.close()
        close = getattr(self.storage, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_dedupe(dedupe: object, lazy: bool) -> None:
    if type(dedupe) is not int:
        raise TypeError(
            f"dedupe must be an int, how many updates a session remembers, not "
            f"{type(dedupe).__name__}"
        )
    if dedupe < 0:
        raise ValueError(f"dedupe must be 0 or more updates, not {dedupe}")
    if dedupe and lazy:
        raise ValueError(
            "dedupe and lazy exclude each other: whether an update was handled before is read from "
            "its session before its handler runs, and a lazy one is not loaded then; leave "
            "lazy=True away"
        )


def no_key(update: Any) -> str:
    """Why there is no session, and what to do."""
    return (
        f"this {type(update).__name__} belongs to no session: it has neither a user nor a chat (a "
        f"poll, say), or get_storage_key returned None. Give the manager a get_storage_key that "
        f"knows it, or open a session by its key: session_scope(StorageKey(user=...))."
    )
