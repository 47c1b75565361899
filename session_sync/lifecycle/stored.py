"""Every stored session, one after the other, while bots may be running on the store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from ..errors import SessionDeadlockError, SessionError
from ..session.session import Fields
from ..storages.base import KVStorage, ListableStorage, Record
from .entry import SessionScope


def stored_keys(storage: KVStorage[Any], prefix: str = "") -> Iterator[str]:
    """Every stored key that begins with `prefix`, also while others write: one that is there all
    the time is among them. Raises TypeError, at once, if the storage cannot list its keys."""
    if not isinstance(storage, ListableStorage):
        raise TypeError(
            f"{type(storage).__name__} cannot list its keys: it has no method keys(). Give it one "
            f"that answers every stored key (see ListableStorage)."
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
    """Call `act` with every key that begins with `prefix`; returns how often it answered True, for
    which `done` is the word.

    `progress` is called with each key that was dealt with, without the prefix. Raises TypeError if
    the storage cannot list its keys. What `act` raises of this library's errors is kept, and the
    others have their turn: an ExceptionGroup at the end has them, and they name the keys.
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


# -- whole records, through the scope that has them open: a lock that was lost is noticed then


def replace_record(scope: SessionScope[Any], record: Record) -> None:
    """Store `record` instead when the scope closes; an empty one deletes the session."""
    fields = scope.fields = Fields(scope.key, record)
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


_IN_FULL: Final = 5


def _without_tracebacks(error: SessionError) -> SessionError:
    """The same error without all that its frames keep alive: there may be one for each session."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
