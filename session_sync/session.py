"""What a handler holds: a session that reads and writes like a plain object.

A session knows its fields and whether they changed; how it is locked, loaded and saved is its
scope's business, which it knows only as the few calls of `Lifecycle`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Final, Protocol, Self

from .containers import ATOMS, Owner, admit, freeze, thaw
from .expiry import TIMERS, Timers, Ttl
from .storages.base import Record

_MISSING: Final = object()
_NONE: Final[frozenset[str]] = frozenset()


class Lifecycle(Protocol):
    """What a session asks of its scope."""

    @property
    def key(self) -> str: ...
    @property
    def fields(self) -> Fields | None: ...  # from loading on
    def load(self) -> None: ...
    async def aload(self) -> None: ...
    def flush(self) -> None: ...
    async def aflush(self) -> None: ...
    def release(self) -> None: ...
    async def arelease(self) -> None: ...


class Fields:
    """The fields of one open session: what was stored, and over it what the handler has in hand.

    `kept` is what the store has, and `record` what it should have had since the last flush: the
    same one, unless that flush failed. Of its fields only those that a handler asked for are
    thawed, into `live`; `gone` are the ones it deleted, `written` the ones that it assigned (in
    their order; True for a name that stands at the end, being new), and `loose` the ones with an
    object in them whose changes nobody would notice, so that they are always saved, but for those
    that a failed handler has `spoilt`. So a session of a thousand fields costs what its handler
    touches, not a thousand.
    """

    __slots__ = (
        "_owner",
        "gone",
        "kept",
        "key",
        "live",
        "loose",
        "open",
        "record",
        "spoilt",
        "timers",
        "written",
    )

    def __init__(self, key: str, record: Record) -> None:
        self.key = key
        self.open = True
        self._owner: Owner | None = None  # from the first container on
        self.spoilt = _NONE
        self.record = self.kept = record
        self.live: dict[str, Any] = {}
        self.written: dict[str, bool] = {}
        self.gone: set[str] | frozenset[str] = _NONE
        self.loose = _NONE
        self.timers = Timers(record[TIMERS], key) if TIMERS in record else None

    @property
    def owner(self) -> Owner:
        """Whom the containers belong to that these fields hand out."""
        if self._owner is None:
            self._owner = Owner(self.key)
            self._owner.open = self.open
        return self._owner

    def close(self) -> None:
        """Nothing may change any more, in no container either."""
        self.open = False
        if self._owner is not None:
            self._owner.open = False

    # -- the handler's side

    def get(self, name: str) -> Any:
        """The value of a field; raises KeyError."""
        if self.timers and self.timers.expired(name):
            self._remove(name)
        live = self.live
        if name in live:
            return live[name]
        if name in self.gone:
            raise KeyError(name)
        value = self.record[name]
        if name.startswith("$"):
            raise KeyError(name)
        if value.__class__ in ATOMS:
            return value
        return self._thaw(name, value)

    def _thaw(self, name: str, value: Any) -> Any:
        value = self.live[name] = thaw(value, self.owner)
        self._note_loose(name)
        return value

    def _note_loose(self, name: str) -> None:
        owner = self.owner
        if owner.met_object:
            owner.met_object = False
            if name not in self.spoilt:
                self.loose |= {name}

    def set(self, name: str, value: Any) -> None:
        """Assign a field."""
        if not self.open:
            raise self.owner.refuse()
        if name.__class__ is not str or name.startswith("$"):
            name = _checked_name(self.key, name)
        seconds = None
        if value.__class__ not in ATOMS:
            if value.__class__ is Ttl:
                seconds, value = value.seconds, value.value
            value = admit(value, self.owner, f"the value of {name!r}")
        if self.timers and self.timers.expired(name):
            self._remove(name)
        if name not in self.written:
            self.written[name] = name in self.gone or name not in self.record
        self.live[name] = value
        if self.loose or self.spoilt:
            self.loose -= {name}
            self.spoilt -= {name}
        if seconds is not None and self.timers is None:
            self.timers = Timers({}, self.key)
        if self.timers is not None:
            self.timers.assign(name, seconds)

    def delete(self, name: str) -> None:
        """Remove a field; raises KeyError."""
        if name not in self:
            raise KeyError(name)
        if not self.open:
            raise self.owner.refuse()
        self._remove(name)

    def _remove(self, name: str) -> None:
        self.live.pop(name, None)
        self.written.pop(name, None)
        self.loose -= {name}
        if self.timers is not None:
            self.timers.drop(name)
        if name in self.record:
            if not isinstance(self.gone, set):
                self.gone = set()
            self.gone.add(name)

    def names(self) -> list[str]:
        """The names of all fields, in the order that a dict would have."""
        self._remove_expired()
        gone = self.gone
        kept = [name for name in self.record if name not in gone and _is_field(name)]
        return [*kept, *(name for name, is_new in self.written.items() if is_new)]

    def _remove_expired(self) -> None:
        for name in self.timers.all_expired() if self.timers else ():
            self._remove(name)

    def __contains__(self, name: object) -> bool:
        if self.timers and isinstance(name, str) and self.timers.expired(name):
            self._remove(name)
        if name in self.live:
            return True
        return name not in self.gone and _is_field(name) and name in self.record

    # -- the scope's side

    def pending(self) -> Record:
        """The record that the store should have; the present one if nothing changed.

        Raises SessionEncodeError if a value contains itself.
        """
        record, changes = self.record, {}
        for name, value in self.live.items():
            is_written = name in self.written
            if value.__class__ in ATOMS:  # only an assignment brings one in here
                if is_written:
                    changes[name] = value
                continue
            stored = record.get(name, _MISSING)
            frozen = self._freeze(name, value, stored)
            if frozen is not stored or is_written or name in self.loose:
                changes[name] = frozen
        if self.gone or self.timers is not None:
            return self._rearranged(changes)
        return record.patched(changes) if changes else record  # the way that copies least

    def _rearranged(self, changes: dict[str, Any]) -> Record:
        """The record that the store should have, where fields have gone, or may have expired."""
        record = self.record
        if not changes and not self.gone and record is self.kept:
            return record
        if self.timers:
            self._remove_expired()
            changes = {name: changes[name] for name in changes if name in self.live}
            if self.timers:
                changes[TIMERS] = self.timers.to_store()
        if not self.gone and (TIMERS in changes or TIMERS not in record):
            return record.patched(changes)
        kept = [*self.names(), *(name for name in changes if name == TIMERS)]
        return record.only(kept, changes)

    def _freeze(self, name: str, value: Any, stored: Any) -> Any:
        try:
            frozen = freeze(value, stored, self.owner)
        except RecursionError:
            raise self.owner.too_deep(f"the value of {name!r}") from None
        self._note_loose(name)
        return frozen

    def take_changes(self) -> Record:
        """The record that is to go into the store, which is taken to succeed: changes count from
        here. It is `kept` if there is nothing to store."""
        record = self.pending()
        if record is not self.record:
            self.gone = _NONE
            self.written = {}
        self.record = self.kept = record
        return record

    def not_saved(self, kept: Record) -> None:
        """The store did not take it after all, and still has what was `kept`."""
        self.kept = kept

    def roll_back(self) -> None:
        """Back to what the store has; containers handed out so far cannot be changed any more."""
        self.close()
        spoilt = self.spoilt | self.loose  # objects that the failed handler may have changed
        Fields.__init__(self, self.key, self.kept.reread())
        self.spoilt = spoilt


def _is_field(name: object) -> bool:
    return isinstance(name, str) and not name.startswith("$")


def _checked_name(key: str, name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(
            f"session {key!r}: a field name is a str, not {type(name).__name__}; ids may be the "
            f"keys of a dict in a field: session['carts'][user_id]"
        )
    if name.startswith("$"):
        raise ValueError(
            f"session {key!r}: the field name {name!r} begins with '$', which is kept for what the "
            f"library itself stores; choose another name"
        )
    return str.__str__(name)  # of a member of a StrEnum, say


class Session(MutableMapping[str, Any]):
    """The state of one user (or chat, or whatever the key says), for the time of one update.

    It reads and writes like a dict, and like an object: `session["counter"]` and `session.counter`
    are the same field. What is changed is saved when the scope ends; nobody else has the session
    meanwhile. Dicts, lists and sets in it are followed to any depth.

    A name that a method has (`items`, `flush`, ...) or that begins with an underscore is reached
    with brackets. Names that begin with `$` are the library's own.

    >>> from session_sync import SessionManager
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1") as session:
    ...     session.counter = session.get("counter", 0) + 1
    ...     session["cart"] = {"items": []}
    ...     session["cart"]["items"].append("tea")
    >>> with sessions.session_scope("user:1") as session:
    ...     session == {"counter": 1, "cart": {"items": ["tea"]}}
    True
    """

    __slots__ = ("__weakref__", "_lifecycle")

    _lifecycle: Lifecycle
    _reserved: ClassVar[frozenset[str]]  # what the class itself has: no field by attribute

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._reserved = frozenset(dir(cls))

    def __init__(self, lifecycle: Lifecycle) -> None:
        _set_lifecycle(self, lifecycle)

    def _opened(self) -> Fields:
        """The fields, loaded first if this is a lazy session."""
        fields = self._lifecycle.fields
        if fields is None:
            self._lifecycle.load()
            fields = self._lifecycle.fields
            assert fields is not None
        return fields

    # -- as a mapping

    def __getitem__(self, name: str) -> Any:
        fields = self._lifecycle.fields
        if fields is None:
            fields = self._opened()
        return fields.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        fields = self._lifecycle.fields
        if fields is None:
            fields = self._opened()
        fields.set(name, value)

    def __delitem__(self, name: str) -> None:
        self._opened().delete(name)

    def __contains__(self, name: object) -> bool:
        return name in self._opened()

    def __iter__(self) -> Iterator[str]:
        fields = self._opened()
        return (name for name in fields.names() if name in fields)  # the time of one may run out

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._opened().names())

    def __len__(self) -> int:
        return len(self._opened().names())

    def setdefault(self, name: str, default: Any = None) -> Any:
        """The value of `name`, which is `default` from now on if there was none."""
        if name not in self:
            self[name] = default
        return self[name]

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the field that came last; raises KeyError if there is none."""
        for name in reversed(self):
            return name, self.pop(name)
        raise KeyError(f"session {self.key!r} is empty")

    def clear(self) -> None:
        """Remove all fields; a session that is empty when its scope ends is deleted."""
        fields = self._opened()
        for name in fields.names():
            fields.delete(name)

    def copy(self) -> dict[str, Any]:
        """The fields as a plain dict; containers in it are still the session's own."""
        return dict(self)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | dict(self) if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        self.update(other)
        return self

    def __repr__(self) -> str:
        """The key and the names of the fields; never a value, since a repr ends in logs."""
        fields = self._lifecycle.fields
        inside = "not loaded" if fields is None else ", ".join(fields.names())
        return f"<{type(self).__name__} {self.key!r}: {inside}>"

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles are plain dicts
        return dict, (), None, None, iter(self.items())

    # -- as an object

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return self._opened().get(name)
        except KeyError:
            raise AttributeError(
                f"session {self.key!r} has no field {name!r}; session.get({name!r}) answers None",
                name=name,
                obj=self,
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_attribute(name)
        self[name] = value

    def __delattr__(self, name: str) -> None:
        self._check_attribute(name)
        try:
            del self[name]
        except KeyError:
            raise AttributeError(
                f"session {self.key!r} has no field {name!r}", name=name, obj=self
            ) from None

    def _check_attribute(self, name: str) -> None:
        if name.startswith("_") or name in self._reserved:
            raise AttributeError(
                f"{name!r} is a name of {type(self).__name__} itself; as a field it is reached "
                f"with brackets: session[{name!r}]",
                name=name,
                obj=self,
            )

    # -- the life of the session

    @property
    def key(self) -> str:
        """The key of this session."""
        return self._lifecycle.key

    def flush(self) -> None:
        """Write now what has changed. What comes after is a unit of its own: an error discards
        only that. Calling it again without a change does nothing.

        Raises what the storage raises; then nothing is lost: the changes are still pending.
        In async code, use `await session.aflush()`.
        """
        self._lifecycle.flush()

    async def aflush(self) -> None:
        """As `flush`, for async code: the event loop goes on meanwhile."""
        await self._lifecycle.aflush()

    def release(self) -> None:
        """Write what has changed and end the scope now, so that this user's next update may come
        in: for a handler that goes on for long. The session can be read afterwards, not changed;
        a new scope may be opened. In async code, use `await session.arelease()`.
        """
        self._lifecycle.release()

    async def arelease(self) -> None:
        """As `release`, for async code."""
        await self._lifecycle.arelease()

    def __await__(self) -> Generator[Any, None, Self]:
        """Lock and load a lazy session in async code: `session = await session`."""
        if self._lifecycle.fields is None:
            yield from self._lifecycle.aload().__await__()
        return self


def replace_fields(session: Session, fields: Mapping[str, Any] | None) -> None:
    """What `message.session = ...` and `context.session = ...` mean: other fields, or none.

    Raises TypeError if `fields` is neither a mapping nor None.
    """
    if fields is session:  # context.session |= {...}
        return
    if fields is not None and not isinstance(fields, Mapping):
        raise TypeError(
            f"session {session.key!r} can be replaced by a mapping of fields or emptied by None, "
            f"not set to {type(fields).__name__}"
        )
    fields = dict(fields or {})
    session.clear()
    session.update(fields)


Session._reserved = frozenset(dir(Session))
_set_lifecycle: Final = Session.__dict__["_lifecycle"].__set__  # past Session.__setattr__
