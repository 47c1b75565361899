"""Whose sessions are stored: found by user and chat, forgotten, and moved to a chat's new number.

This module knows stored keys and the scopes that open them one by one; it knows no updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .containers import freeze
from .errors import SessionMigrationError
from .expiry import TIMERS, Timers, Ttl
from .keys import StorageKey
from .lifecycle.entry import SessionScope
from .lifecycle.options import Options
from .lifecycle.transaction import SessionScopes
from .repeats import UPDATES, updates_in
from .schema import NO_SCHEMA, is_field
from .session import Fields, Session
from .storages.base import Record, record_of
from .stored import for_each_key, refuse_open_around, replace_record


def find(names: Iterable[str], prefix: str, user: int | None, chat: int | None) -> Iterator[str]:
    """Of the stored keys `names`, without the `prefix` that all have: those of a user, of a chat,
    of a user in a chat, or all."""
    keys = (name.removeprefix(prefix) for name in names)
    if user is None and chat is None:
        return keys
    key_in = _keys_of(StorageKey(user=user, chat=chat))  # which refuses what is no id
    return (key for key in keys if key_in(key) is not None)


def forget(options: Options[Any], prefix: str, user: int | None, chat: int | None) -> int:
    """Delete what `find` finds; returns how many there were."""
    if user is None and chat is None:
        raise TypeError(
            "forget() deletes the sessions of somebody: forget(user=...), forget(chat=...), or "
            "both for those of one user in one chat"
        )
    key_in = _keys_of(StorageKey(user=user, chat=chat))

    def delete(name: str) -> bool:
        if key_in(name.removeprefix(prefix)) is None:
            return False
        with _opened(options, prefix, "forget", name) as (session,):
            found = bool(_record(session))
            if found:
                replace_record(session, record_of({}))
        return found

    return for_each_key(options.backend.storage, delete, "deleted", None, prefix)


def migrate_chat(options: Options[Any], prefix: str, old: int, new: int) -> int:
    """Move the sessions of a chat to its new number; returns how many there were."""
    wanted, moved = StorageKey(chat=old), StorageKey(chat=new)
    if wanted == moved:
        raise ValueError(f"migrate_chat({old}, {new}): a chat that moves has another number then")
    key_in = _keys_of(wanted)

    def move(name: str) -> bool:
        key = key_in(name.removeprefix(prefix))
        if key is None:
            return False
        target = prefix + str(replace(key, chat=moved.chat))
        # The goal first: a crash between the two leaves both, and nothing is lost.
        with _opened(options, prefix, "migrate_chat", target, name) as (goal, source):
            record, existing = _record(source), _record(goal)
            if not record:  # somebody else has moved it meanwhile
                return False
            if existing:
                record = _merged(options, source, goal)
            replace_record(goal, record)
            replace_record(source, record_of({}))
        return True

    return for_each_key(options.backend.storage, move, "moved", None, prefix)


def _keys_of(wanted: StorageKey) -> Callable[[str], StorageKey | None]:
    """What answers the key that a text is, if it is one of the wanted user and chat."""
    numbers = [str(number) for number in (wanted.user, wanted.chat) if number is not None]

    def read(text: str) -> StorageKey | None:
        for number in numbers:  # most keys are others', which is sooner seen than parsed
            if number not in text:
                return None
        try:
            key = StorageKey.parse(text)
        except ValueError:
            return None
        # A private chat has its user's number, so a key without a user is that of his chat.
        user = key.chat if key.user is None else key.user
        found = wanted.user in (None, user) and wanted.chat in (None, key.chat)
        return key if found else None

    return read


# -- sessions of any kind, opened to be moved or deleted whole


@contextmanager
def _opened(
    options: Options[Any], prefix: str, what: str, *names: str
) -> Iterator[list[SessionScope[Session]]]:
    """The sessions stored under `names`, whatever is in them; written together at the end, in the
    order of `names` by a store that takes one at a time."""
    options = replace(
        options,
        session_type=Session,
        schema=NO_SCHEMA,
        migrations=None,
        migrate_eagerly=False,
        initial=None,
        lazy=False,
        save_on_error=False,
    )
    keys = {name: name.removeprefix(prefix) for name in names}
    scopes = [SessionScope(options, key, name, key) for name, key in keys.items()]
    with SessionScopes(scopes):
        for scope in scopes:
            refuse_open_around(scope, what)
        yield scopes


def _record(scope: SessionScope[Session]) -> Record:
    """What is stored."""
    assert scope.fields is not None
    return scope.fields.record


# -- where the new chat has a session already


def _merged(
    options: Options[Any], source: SessionScope[Session], goal: SessionScope[Session]
) -> Record:
    """The old session with the new one put over it, field by field.

    What both have is the new one's, being the last that somebody has written. But what a session
    begins with was written by nobody: it does not win over what the old one has.
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
    hidden = {name: value for name, value in {**older, **newer}.items() if not is_field(name)}
    hidden.pop(TIMERS, None)
    if timers:
        hidden[TIMERS] = timers
    updates = updates_in(older, source.key) + updates_in(newer, goal.key)
    if updates:
        hidden[UPDATES] = updates
    return record_of({**lasting, **hidden} if lasting or updates else {})


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
    fields = Fields(key, record_of({}), options.schema)
    try:
        for name, value in (options.initial(key) or {}).items():
            fields.set(name, freeze(value.value if isinstance(value, Ttl) else value))
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
    """The fields whose time is not up, and the timers of those that have one."""
    timers = Timers(record.get(TIMERS, {}), key)
    expired = timers.all_expired()
    fields = {n: value for n, value in record.items() if is_field(n) and n not in expired}
    timers.keep(fields)
    return fields, timers.to_store()
