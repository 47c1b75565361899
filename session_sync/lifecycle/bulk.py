"""All stored sessions, one after the other, while bots may be running on the store: those of a user
or a chat are found, forgotten, and moved to a chat's new ID.

This module knows stored keys and the scopes that open them one by one; it knows no updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from ..errors import SessionDeadlockError, SessionError, SessionMigrationError
from ..session.changes import ChangeTracker
from ..session.containers import dump
from ..session.keys import StorageKey
from ..session.metadata import Timers, is_field, merged, outlives_fields, with_timers
from ..session.session import Session
from ..session.ttl import Ttl
from ..storages.base import KVStorage, ListableStorage, Record, record_of
from .backend import backend_of
from .entry import SessionScope
from .observers import Observers, WaitReporter
from .options import LOCK_TIMEOUT, Options
from .transaction import SessionScopes


def stored_keys(storage: KVStorage[Any], prefix: str = "") -> Iterator[str]:
    """Every stored key that begins with `prefix`, also while others write: one that is there all
    the time is among them. Raises TypeError, at once, if the storage cannot list its keys."""
    if not isinstance(storage, ListableStorage):
        raise TypeError(
            f"{type(storage).__name__} cannot list its keys: it has no method keys(). Give it one "
            f"that returns every stored key (see ListableStorage)."
        )
    keys = storage.keys()
    if isinstance(keys, Collection):  # perhaps a view, which would not outlive a change
        keys = list(keys)
    return (key for key in keys if key.startswith(prefix))


def for_each_key(
    storage: KVStorage[Any],
    act: Callable[[str], bool],
    done: str,
    progress: Callable[[str], None] | None,
    prefix: str = "",
) -> int:
    """Call `act` with every key that begins with `prefix`; returns how often it returned True, for
    which `done` is the word.

    `progress` is called with each key that was dealt with, without the prefix. Raises TypeError if
    the storage cannot list its keys. What `act` raises of this library's errors is kept, and the
    other keys are dealt with all the same: an ExceptionGroup at the end has the errors, and they
    name the keys.
    """
    keys = stored_keys(storage, prefix)
    count = 0
    errors: list[SessionError] = []
    try:
        for key in keys:
            try:
                count += act(key)
            except SessionError as error:
                errors.append(error if len(errors) < _IN_FULL else _without_tracebacks(error))
                continue
            if progress is not None:
                progress(key.removeprefix(prefix))
    except BaseException as error:
        for earlier in errors[:_IN_FULL]:
            error.add_note(f"before that, {type(earlier).__name__}: {earlier}")
        raise
    if errors:
        raise ExceptionGroup(f"{len(errors)} sessions were not {done}, {count} were", errors)
    return count


_IN_FULL: Final = 5


def _without_tracebacks(error: SessionError) -> SessionError:
    """The same error without all that its frames keep alive: there may be one for each session."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


# -- of a user or a chat


def find(
    full_keys: Iterable[str], prefix: str, user: int | None, chat: int | None
) -> Iterator[str]:
    """Of the stored keys, without the `prefix` that all have: those of a user, of a chat,
    of a user in a chat, or all."""
    keys = (full_key.removeprefix(prefix) for full_key in full_keys)
    if user is None and chat is None:
        return keys
    key_in = _keys_of(StorageKey(user=user, chat=chat))  # which refuses what is no id
    return (key for key in keys if key_in(key) is not None)


def forget(options: Options[Any], prefix: str, user: int | None, chat: int | None) -> int:
    """Delete what `find` finds; returns how many there were."""
    if user is None and chat is None:
        raise TypeError(
            "forget() needs a user, a chat or both: forget(user=...), forget(chat=...), or both "
            "for the sessions of one user in one chat"
        )
    key_in = _keys_of(StorageKey(user=user, chat=chat))

    def delete(full_key: str) -> bool:
        if key_in(full_key.removeprefix(prefix)) is None:
            return False
        with _opened(options, prefix, "forget", full_key) as (session,):
            found = bool(_record(session))
            if found:
                replace_record(session, record_of({}))
        return found

    return for_each_key(options.backend.storage, delete, "deleted", None, prefix)


def migrate_chat(options: Options[Any], prefix: str, old: int, new: int) -> int:
    """Move the sessions of a chat to its new ID; returns how many there were."""
    wanted, moved = StorageKey(chat=old), StorageKey(chat=new)
    if wanted == moved:
        raise ValueError(f"migrate_chat({old}, {new}): a chat that moves has another ID then")
    key_in = _keys_of(wanted)

    def move(full_key: str) -> bool:
        key = key_in(full_key.removeprefix(prefix))
        if key is None:
            return False
        target = prefix + str(replace(key, chat=moved.chat))
        # The goal first: a crash between the two leaves both, and nothing is lost.
        with _opened(options, prefix, "migrate_chat", target, full_key) as (goal, source):
            record, existing = _record(source), _record(goal)
            if not record:  # another caller has moved it meanwhile
                return False
            if existing:
                record = _merged(options, source, goal)
            replace_record(goal, record)
            replace_record(source, record_of({}))
        return True

    return for_each_key(options.backend.storage, move, "moved", None, prefix)


def _keys_of(wanted: StorageKey) -> Callable[[str], StorageKey | None]:
    """A function that returns the key that a string is, if it is of the wanted user and chat."""
    numbers = [str(number) for number in (wanted.user, wanted.chat) if number is not None]

    def read(text: str) -> StorageKey | None:
        for number in numbers:  # most keys are others', which is sooner seen than parsed
            if number not in text:
                return None
        try:
            key = StorageKey.parse(text)
        except ValueError:
            return None
        # A private chat has the ID of its user, so a key without a user is that user's.
        user = key.chat if key.user is None else key.user
        found = wanted.user in (None, user) and wanted.chat in (None, key.chat)
        return key if found else None

    return read


# -- sessions of any kind, opened to be moved or deleted whole


@contextmanager
def _opened(
    options: Options[Any], prefix: str, what: str, *full_keys: str
) -> Iterator[list[SessionScope[Session]]]:
    """The sessions stored under `full_keys`, whatever is in them; written together at the end, in
    the order of `full_keys` by a store that takes one at a time."""
    options = Options(
        Session,
        options.backend,
        lock_timeout=options.lock_timeout,
        queue_timeout=options.queue_timeout,
        patience=options.patience,
    )
    keys = {each: each.removeprefix(prefix) for each in full_keys}
    scopes = [SessionScope(options, key, full_key, key) for full_key, key in keys.items()]
    with SessionScopes(scopes):
        for scope in scopes:
            refuse_open_around(scope, what)
        yield scopes


def _record(scope: SessionScope[Session]) -> Record:
    """What is stored."""
    assert scope.tracker is not None
    return scope.tracker.flushed


# -- whole records, through the scope that has them open: a lock that was lost is noticed then


def replace_record(scope: SessionScope[Any], record: Record) -> None:
    """Store `record` instead when the scope closes; an empty one deletes the session."""
    fields = scope.tracker = ChangeTracker(scope.key, record)
    fields.save_as_it_is()


def refuse_open_around(scope: SessionScope[Any], what: str) -> None:
    """Raise SessionDeadlockError if `scope` has joined one that is open around the call of `what`:
    a handler's, whose own changes would be stored over what `what` stores."""
    if scope.joined is not None:
        raise SessionDeadlockError(
            f"session {scope.key!r} is open around {what}(), which has to wait until it is "
            f"closed; call session.release() before (in async code `await session.arelease()`), "
            f"or call {what}() outside of handlers"
        )


def scope_as_stored(options: Options[Any], key: str, full_key: str) -> SessionScope[Any]:
    """The scope of a session for a caller that looks at no declared fields, of whatever version it
    is."""
    return SessionScope(replace(options, lazy=False, migrations=None), key, full_key, key)


def options_for(storage: KVStorage[Any]) -> Options[Session]:
    """Those of a manager that was made with this storage alone."""
    patience = WaitReporter(LOCK_TIMEOUT, Observers(None, None, None), "")
    return Options(Session, backend_of(storage), patience=patience)


# -- where the new chat has a session already


def _merged(
    options: Options[Any], source: SessionScope[Session], goal: SessionScope[Session]
) -> Record:
    """The old session with the new one put over it, field by field.

    Of what both have, the new one's is taken: it was written last. But what a session begins with
    was never written by a handler: it does not win over what the old one has.
    """
    older = _current(options, source.key, _record(source))
    newer = _current(options, goal.key, _record(goal))
    begun = _beginning(options, goal.key)
    lasting, timers = _lasting(source.key, older)
    for_now, new_timers = _lasting(goal.key, newer)
    for name, value in for_now.items():
        if name in lasting and name in begun and begun[name] == value:
            continue
        lasting[name] = value
        timers.pop(name, None)
        if name in new_timers:
            timers[name] = new_timers[name]
    hidden = with_timers(merged(older, newer, source.key, goal.key), timers)
    return record_of({**lasting, **hidden} if lasting or outlives_fields(hidden) else {})


def _current(options: Options[Any], key: str, record: Record) -> Record:
    """A record in the version of this program, without which fields cannot be told apart."""
    migrations = options.migrations
    if migrations is None or migrations.are_done(record):
        return record
    return migrations.newest(key, record, options.schema)


def _beginning(options: Options[Any], key: str) -> Mapping[str, Any]:
    """What `initial` gives a session that begins, as it would be stored."""
    if options.initial is None:
        return {}
    fields = ChangeTracker(key, record_of({}), options.schema)
    try:
        for name, value in (options.initial(key) or {}).items():
            fields.set(name, dump(value.value if isinstance(value, Ttl) else value))
    except OSError:  # no word on the session: a signal handler's TimeoutError, say
        raise
    except Exception as error:
        raise SessionMigrationError(
            f"session {key!r} was there before the old chat's was moved, and which of its fields "
            f"are only those that it began with cannot be told: `initial` failed "
            f"({type(error).__name__}) for a key. Let it take a key (a str) instead of an update, "
            f"as it also has to for session_scope(key), and call migrate_chat() again. Both "
            f"sessions are left as they are."
        ) from error
    return fields.take_changes()


def _lasting(key: str, record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that have not expired, and the timers of those that have one."""
    timers = Timers(record, key)
    expired = timers.all_expired()
    fields = {n: value for n, value in record.items() if is_field(n) and n not in expired}
    timers.keep(fields)
    return fields, timers.to_store()
