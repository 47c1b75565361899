"""What a storage is: the protocols, each found by what an object can do.

A storage knows keys and mappings of fields. It knows nothing of sessions, locks or scopes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isqrt
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from ..errors import SessionLockTimeoutError

V = TypeVar("V")


@runtime_checkable
class KVStorage(Protocol[V]):
    """The four methods that make a storage. A user's own adapter needs no base class.

    `V` is what the storage keeps under a key; for sessions, a mapping of fields
    (`dict[str, object]`). Errors propagate to the code that opened or closed the session.
    """

    def get(self, key: str, /) -> V | None:
        """The value stored under `key`, or None. The library never changes what this returns."""
        ...

    def set(self, key: str, value: V, /) -> None:
        """Store `value`, a new plain dict that the library will not touch again."""

    def delete(self, key: str, /) -> None:
        """Remove `key`; no error if there is none."""

    def has(self, key: str, /) -> bool:
        """Whether something is stored under `key`."""
        ...


@runtime_checkable
class TtlStorage(KVStorage[V], Protocol[V]):
    """A storage whose records expire when they are left alone: `touch` is called on every read."""

    def touch(self, key: str, /) -> None:
        """Start the lifetime of the record anew; no error if there is none."""


@runtime_checkable
class ListableStorage(KVStorage[V], Protocol[V]):
    """A storage that can say which keys it has."""

    def keys(self) -> Iterable[str]:
        """Every stored key, in any order."""
        ...


class StoredEntry(NamedTuple):
    """What a storage knows of a record without reading it.

    `size` is in bytes. `age` is how many seconds ago it was last used, or written, as far as the
    storage notes that; `left` how many seconds it has to live if it is left alone. None means for
    `age` that it was not noted, for `left` that it stays forever.
    """

    key: str
    size: int
    age: float | None
    left: float | None


#: Raises SessionEncodeError for a value that the store would refuse. It is given what would be
#: stored of it, and for the message the key of the session and the place of the value in it, which
#: `str()` says in words.
Check: TypeAlias = Callable[[Any, str, object], None]


@runtime_checkable
class CheckingStorage(KVStorage[V], Protocol[V]):
    """A storage that does not keep values of every type, and says so in the line that assigns one,
    which otherwise would be known when the session is saved."""

    def check_value(self, value: Any, key: str, place: object, /) -> None:
        """Raise SessionEncodeError if `value` cannot be stored: `Codec.check` does that. `key` and
        `str(place)` name the session and where in it the value is."""
        ...


@runtime_checkable
class RecordStorage(Protocol):
    """Methods for the scope alone, which go past `get` and `set`, for storages of one process that
    can do better than to copy a whole mapping: one that takes the changed fields only, or decodes
    on demand.

    `blocking` says whether these calls may wait for a disk or a network; such a storage is never
    called on an event loop's thread. A storage without this attribute is taken to block.
    """

    @property
    def blocking(self) -> bool: ...

    def load(self, key: str, /) -> Record | None:
        """The stored record, its lifetime started anew, or None."""

    def save(self, key: str, record: Record, /) -> int | None:
        """Store `record` whole, or raise and leave what was stored before.

        Returns how many bytes it takes, if that is known.
        """

    def delete(self, key: str, /) -> None:
        """Remove `key`; no error if there is none."""


class OpenRecord(Protocol):
    """One record for as long as it is open: no other process can open it until it is closed.

    It may have a `size`: how many bytes took what was read, or written last, for observers.
    """

    @property
    def record(self) -> Record | None:
        """What was stored when it was opened, its lifetime started anew; None: nothing."""

    def save(self, record: Record, /) -> None:
        """Store `record` whole (an empty one: remove what is stored) and stay open; or raise and
        leave what was stored before.

        Raises SessionConflictError if it may have another owner by now; nothing is written
        then.
        """

    def close(self, record: Record | None, /) -> None:
        """Store `record` as `save` does, unless it is None, and let others open it: the latter
        also if storing fails. Called once; or once more, with the same record or with None, if
        an exception from outside that is no Exception (Ctrl-C, say) has interrupted it: until
        then, others must not be able to open it."""


class HeldHereError(SessionLockTimeoutError):
    """Another storage object of this very process has the key open. The message has the way out,
    which is not to wait for longer."""


@runtime_checkable
class SharedStorage(Protocol):
    """A storage that several processes share, which brings the exclusion between them with it.

    Open is to lock and load, close is to save and unlock: one step each, since a server needs one
    round trip for both halves. Within one storage object a key is open once at a time: the scope
    sees to that. The calls may wait, and are never made on an event loop's thread.
    """

    def open_record(self, key: str, timeout: float, /) -> OpenRecord:
        """Wait until no other process has `key` open, and open it.

        Raises SessionLockTimeoutError, saying what has it, after `timeout` seconds (0: at once). It
        is then called again, for as long as the scope may wait: if it can, it keeps its place."""
        ...


class NonBlockingRecord(OpenRecord, Protocol):
    """An OpenRecord that can often be closed without waiting for anything."""

    def close_nowait(self, record: Record | None, /) -> bool:
        """As `close`, if nothing in that has to wait; else False: it is then closed the other way,
        with the same record, which goes on with what was begun here."""
        ...


@runtime_checkable
class NonBlockingStorage(SharedStorage, Protocol):
    """A shared storage that often need not wait: a coroutine then asks it in place, on the event
    loop's thread, since to go to another thread and back takes longer than all the rest.

    It must refuse whenever another owner or waiter is in the way, or a disk has to be waited for.
    Reading what the system may have in memory is not waiting, nor is half a millisecond for a
    server that is near; once it was slow, it is not asked for a second.
    """

    def open_nowait(self, key: str, /) -> NonBlockingRecord | None:
        """As `open_record`, if nothing in that has to wait; else None: it is then opened the other
        way, which goes on with what was begun here."""
        ...


@runtime_checkable
class AtomicStorage(Protocol):
    """A storage that can write several sessions in one step, as `session_scopes` would like to."""

    def save_all(self, records: Mapping[str, Record], opened: Mapping[str, OpenRecord], /) -> bool:
        """Store each record under its key (an empty one: remove what is stored), or raise and leave
        all of them as they were. False if these keys cannot be written in one step: nothing was
        done then.

        `opened` has the open records of a SharedStorage, by the same keys, which stay open; of any
        other storage it is not looked at. Raises SessionConflictError as `OpenRecord.save` does.
        """
        ...


#: The stored fields of one session at one moment: a mapping that never changes, so that any thread
#: can read it while another one stores its successor. A dict that is not changed any more, or a
#: PatchedRecord. `record_of` makes one, and the functions below make others of it.
Record: TypeAlias = Mapping[str, Any]


def record_of(fields: Mapping[str, Any]) -> Record:
    """The record of `fields`.

    >>> one = record_of({"counter": 1, "name": "alex"})
    >>> two = patched(one, {"counter": 2})
    >>> dict(one), dict(two)
    ({'counter': 1, 'name': 'alex'}, {'counter': 2, 'name': 'alex'})
    """
    return dict(fields) if len(fields) <= SMALL else PatchedRecord(dict(fields), {})


def plain(value: Any) -> Any:
    """`value` with containers of its own: dicts, lists, sets and tuples that nothing else has.

    Objects of other classes, subclasses of these included, are the same objects. Raises
    RecursionError if it contains itself or is nested too deeply.

    >>> cart = {"items": [1, 2]}
    >>> copy = plain(cart)
    >>> cart["items"].append(3)
    >>> copy
    {'items': [1, 2]}
    """
    copier = COPIERS.get(value.__class__)
    return value if copier is None else copier(value)


#: What `plain` does with a value of exactly this class. The containers of a session add themselves.
COPIERS: Final[dict[type, Callable[[Any], Any]]] = {
    dict: lambda value: {key: plain(item) for key, item in value.items()},
    list: lambda value: [plain(item) for item in value],
    set: set,
    tuple: lambda value: tuple(plain(item) for item in value),
}


def patched(record: Record, changes: Mapping[str, Any]) -> Record:
    """`record` with `changes` put over it, in the order that a dict would have."""
    if record.__class__ is dict and len(record) <= SMALL:
        return {**record, **changes}  # sooner done than anything cleverer
    # Not by isinstance(), which takes an abstract class longer than the rest of this.
    own_way: Callable[[Mapping[str, Any]], Record] | None = getattr(record, "patched", None)
    return record_of({**record, **changes}) if own_way is None else own_way(changes)


def only(record: Record, names: Iterable[str], changes: Mapping[str, Any]) -> Record:
    """The fields called `names`, in that order, with `changes` put over them."""
    if isinstance(record, PatchedRecord):
        return record.only(names, changes)
    return record_of({name: changes[name] if name in changes else record[name] for name in names})


def reread(record: Record) -> Record:
    """`record` as it was stored, without what a handler may have done to objects in it."""
    return record.reread() if isinstance(record, PatchedRecord) else record


class PatchedRecord(Mapping[str, Any]):
    """A record that shares what it can with the one it was made from.

    Writing one field of a thousand does not copy the thousand: changes gather in a small `patch`
    over `base` until it has grown to the square root of `base`, and then both are merged.
    """

    __slots__ = ("base", "patch")

    def __init__(self, base: dict[str, Any], patch: dict[str, Any]) -> None:
        self.base = base
        self.patch = patch

    def patched(self, changes: Mapping[str, Any]) -> PatchedRecord:
        """This record with `changes` put over it."""
        patch = {**self.patch, **changes}
        if len(patch) > 8 + isqrt(len(self.base)):
            return PatchedRecord({**self.base, **patch}, {})
        return PatchedRecord(self.base, patch)

    def only(self, names: Iterable[str], changes: Mapping[str, Any]) -> Record:
        """The fields called `names`, in that order, with `changes` put over them."""
        return record_of({name: changes[name] if name in changes else self[name] for name in names})

    def reread(self) -> Record:
        """This record as it was stored, without what a handler may have done to objects in it."""
        return self

    def __getitem__(self, name: str) -> Any:
        patch = self.patch
        return patch[name] if name in patch else self.base[name]

    def __contains__(self, name: object) -> bool:
        return name in self.patch or name in self.base

    def __iter__(self) -> Iterator[str]:
        base = self.base
        yield from base
        for name in self.patch:
            if name not in base:
                yield name

    def __len__(self) -> int:
        return len(self.base) + len(set(self.patch).difference(self.base))

    def __bool__(self) -> bool:
        return bool(self.patch or self.base)


SMALL: Final = 64  # fields; copying so many takes half a microsecond
