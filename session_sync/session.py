"""What a handler holds: a session that reads and writes like a plain object.

A session knows its fields and whether they changed; how it is locked, loaded and saved is its
scope's business, which it knows only as the few calls of `Lifecycle`.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, Self

from .containers import MISSING, Owner
from .errors import SessionTypeError
from .expiry import TIMERS, Timers, Ttl
from .migrations import VERSION, Migration, Migrations
from .repeats import UPDATES, updates_in, without_fields
from .schema import (
    NO_SCHEMA,
    Declared,
    Schema,
    checked_name,
    declared_by,
    is_field,
    read,
)
from .shapes.base import FREE, MismatchError, Shape
from .storages.base import Record, only, patched, record_of, reread

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
    same one, unless that flush failed or the session was just migrated. Of its fields only those
    that a handler asked for are thawed, into `live`; `gone` are the ones it deleted, `written` the
    ones that it assigned (in their order; True for a name that stands at the end, being new), and
    `loose` the ones with an object in them whose changes nobody would notice, so that they are
    always saved, but for those that a failed handler has `spoilt`. So a session of a thousand
    fields costs what its handler touches, not a thousand.

    `updates` are the numbers of updates that are to be stored at the end, if any, with whatever the
    handler has changed. `begun` is the record of a session that has only what `initial` gave it: as
    long as the fields are still those, nothing of it is stored.

    What the class declares stands in `schema`. `seen` is what a field would be stored as if it had
    not been touched since it was thawed, where that may be something else than `record` has: a
    default, or an object whose class has got an attribute more. `made` are the defaults that a
    factory has made here: they are stored together with whatever changes first.
    """

    __slots__ = (
        "_owner",
        "begun",
        "gone",
        "kept",
        "key",
        "live",
        "loose",
        "made",
        "open",
        "record",
        "schema",
        "seen",
        "spoilt",
        "timers",
        "updates",
        "written",
    )

    gone: set[str] | frozenset[str]

    def __init__(self, key: str, record: Record, schema: Schema = NO_SCHEMA) -> None:
        self.key = key
        self.schema = schema
        self.open = True
        self._owner: Owner | None = None  # from the first container on
        self.spoilt = self.made = self.loose = self.gone = _NONE
        self.record = self.kept = record
        self.live: dict[str, Any] = {}
        self.seen: dict[str, Any] | None = None
        self.updates: list[int] | None = None
        self.begun: Record | None = None
        self.written: dict[str, bool] = {}
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
        """The value of a field; raises KeyError, and SessionTypeError if it is stored as something
        else than was declared."""
        if self.timers and self.timers.expired(name):
            self._remove(name)
        live = self.live
        if name in live:
            return live[name]
        if name in self.gone:
            return self._default(name)
        try:
            value = self.record[name]
        except KeyError:
            return self._default(name)
        schema = self.schema
        shape = schema.shapes.get(name, schema.other)
        if shape is None or ("$" in name and name.startswith("$")):  # the first is a fifth of both
            raise KeyError(name)
        if value.__class__ in shape.atoms:
            return value
        return self._thaw(name, value, shape)

    def _default(self, name: str) -> Any:
        default = self.schema.defaults.get(name)
        if default is None:
            raise KeyError(name)
        shape, frozen = self.schema.shapes[name], default.frozen
        if default.factory is not None:
            try:
                made = default.factory()
            except (LookupError, AttributeError) as error:  # which would say that there is no field
                raise RuntimeError(
                    f"session {self.key!r}: the default_factory of {name!r} raised "
                    f"{type(error).__name__}"
                ) from error
            frozen = self._freeze(name, made, MISSING, shape)
            self.made |= {name}
        self._note_seen(name, frozen)
        return self._thaw(name, frozen, shape)

    def _thaw(self, name: str, frozen: Any, shape: Shape) -> Any:
        owner = self.owner
        owner.met_old_form = False
        try:
            value = shape.thaw(frozen, owner)
            if owner.met_old_form:
                self._note_seen(name, shape.freeze(value, owner, frozen))
        except RecursionError:
            raise owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} is stored as {wrong.found}, where "
                f"{self.schema.name} declares {wrong.expected}. It is left as it is; a migration "
                f"({self.schema.name}.migrations) brings stored sessions into the new form."
            ) from wrong.__cause__
        self.live[name] = value
        self._note_loose(name)
        return value

    def _note_seen(self, name: str, frozen: Any) -> None:
        self.seen = self.seen or {}
        self.seen[name] = frozen

    def _note_loose(self, name: str) -> None:
        owner = self.owner
        if owner.met_object:
            owner.met_object = False
            if name not in self.spoilt:
                self.loose |= {name}

    def set(self, name: str, value: Any) -> None:
        """Assign a field; raises SessionTypeError, KeyError for a name that there must not be."""
        if name.__class__ is not str or "$" in name:
            name = checked_name(self.key, name)
        schema, seconds = self.schema, None
        shape = schema.shapes.get(name, schema.other)
        if shape is None or value.__class__ not in shape.atoms or not self.open:
            value, seconds = self._admitted(name, value)
        if self.timers is not None or seconds is not None:
            self._assign_timer(name, seconds)
        if name not in self.written:
            self.written[name] = name in self.gone or name not in self.record
        self.live[name] = value
        if self.loose or self.spoilt:
            self.loose -= {name}
            self.spoilt -= {name}

    def _assign_timer(self, name: str, seconds: float | None) -> None:
        self.timers = self.timers or Timers({}, self.key)
        if self.timers.expired(name):
            self._remove(name)
        self.timers.assign(name, seconds)

    def check_all(self, fields: Mapping[str, Any]) -> None:
        """Raise what assigning one of them would raise."""
        for name, value in fields.items():
            self._admitted(checked_name(self.key, name), value)

    def _admitted(self, name: str, value: Any) -> tuple[Any, float | None]:
        """A value that is to be assigned, and its life time, once it has been looked at."""
        if not self.open:
            raise self.owner.refuse()
        shape = self.schema.shapes.get(name, self.schema.other)
        if shape is None:
            raise KeyError(
                f"session {self.key!r} has no field {name!r}: {self.schema.name} declares "
                f"{', '.join(self.schema.shapes) or 'none'}"
            )
        seconds = None
        if value.__class__ is Ttl:
            seconds, value = value.seconds, value.value
        try:
            return shape.admit(value, self.owner), seconds
        except RecursionError:
            raise self.owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} has to be {wrong.expected}, not "
                f"{wrong.found}; nothing was changed"
            ) from wrong.__cause__

    def delete(self, name: str) -> None:
        """Remove a field; raises KeyError."""
        if name not in self:
            raise KeyError(name)
        if not self.open:
            raise self.owner.refuse()
        self._remove(name)

    def clear(self) -> None:
        """Remove all fields."""
        names = {*self._stored_names(), *self.live}
        if names and not self.open:
            raise self.owner.refuse()
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.live.pop(name, None)
        self.written.pop(name, None)
        self.loose -= {name}
        self.made -= {name}
        if self.timers is not None:
            self.timers.drop(name)
        if name in self.record:
            if not isinstance(self.gone, set):
                self.gone = set()
            self.gone.add(name)

    def names(self) -> list[str]:
        """The names of all fields: the declared ones, and then in the order that a dict has."""
        self._remove_expired()
        stored, schema = self._stored_names(), self.schema
        if not schema.shapes and schema.other is not None:
            return stored
        present = schema.defaults.keys() | stored
        declared = [name for name in schema.shapes if name in present]
        others = [name for name in stored if name not in schema.shapes]
        return declared if schema.other is None else declared + others

    def _stored_names(self) -> list[str]:
        gone = self.gone
        kept = [name for name in self.record if name not in gone and is_field(name)]
        return [*kept, *(name for name, is_new in self.written.items() if is_new)]

    def _remove_expired(self) -> None:
        for name in self.timers.all_expired() if self.timers else ():
            self._remove(name)

    def __contains__(self, name: object) -> bool:
        if self.timers and isinstance(name, str) and self.timers.expired(name):
            self._remove(name)
        if name in self.live or name in self.schema.defaults:
            return True
        if self.schema.other is None and name not in self.schema.shapes:
            return False
        return name not in self.gone and is_field(name) and name in self.record

    def is_default(self, name: str) -> bool:
        """Whether a field is there only because its class declares it."""
        if name in self.written or (name in self.record and name not in self.gone):
            return False
        value, shape = self.live.get(name), self.schema.shapes[name]
        if name not in self.live or value.__class__ in shape.atoms:
            return True
        unchanged = self._unchanged(name)
        return self._freeze(name, value, unchanged, shape) is unchanged

    # -- the scope's side

    def has_had(self, number: int) -> bool:
        """Whether the update of this number was handled before."""
        return number in updates_in(self.record, self.key)

    def remember(self, number: int, limit: int) -> None:
        """Store the number of an update at the end, unless its handler fails, and with it those
        that came before, at most `limit` in all."""
        had = updates_in(self.record, self.key) if self.updates is None else self.updates
        self.updates = [*(each for each in had if each != number), number][-limit:]

    def take_changes(self) -> Record:
        """The record that is to go into the store, which is taken to succeed: changes count from
        here. It is `kept` if there is nothing to store.

        Raises SessionEncodeError if a value contains itself, and SessionTypeError if something
        inside one is not of its declared type any more.
        """
        record = self.record
        changes = self._changes() if self.live else {}
        if self.gone or self.timers is not None or self.schema.version > 1:
            record = self._completed(changes)
        elif changes:
            record = patched(record, changes)  # the way that copies least
        if record is not self.record:
            self.record = record
            self.gone = _NONE
            self.written = {}
            if self.seen:
                self.seen = {n: frozen for n, frozen in self.seen.items() if n not in changes}
        if self.updates is not None and not self.open:  # not by a flush: the handler may yet fail
            record = self._with_updates(record, self.updates)
        self.kept = record
        return record

    def _with_updates(self, record: Record, updates: list[int]) -> Record:
        """What is to be stored at the end; the fields that the handler has had stay as they are."""
        hidden: dict[str, Any] = {UPDATES: updates}
        if self.schema.version > 1:
            hidden[VERSION] = self.schema.version
        return patched(record_of({}) if record is self.begun else record, hidden)

    def _changes(self) -> dict[str, Any]:
        """What fields would be stored as, of which the store has something else."""
        changes: dict[str, Any] = {}
        schema, written = self.schema, self.written
        shapes, other = schema.shapes, schema.other
        for name, value in self.live.items():
            shape: Any = shapes.get(name, other)
            if value.__class__ in shape.atoms:  # an assignment brings one in here, or a factory
                if name in written:
                    changes[name] = value
                continue
            stored = self._unchanged(name)
            frozen = self._freeze(name, value, stored, shape)
            if frozen is not stored or name in written or name in self.loose:
                changes[name] = frozen
        if self.made and (changes or self._is_written_without()):
            changes.update((name, self._unchanged(name)) for name in self.made - changes.keys())
        return changes

    def _is_written_without(self) -> bool:
        """Whether there is something to write, though no field has another value."""
        return bool((self.gone or self.is_unsaved) and self._stored_names())

    def _unchanged(self, name: str) -> Any:
        """What a field would be stored as if it had not been touched; MISSING, if not at all."""
        if self.seen is not None and name in self.seen:
            return self.seen[name]
        return self.record.get(name, MISSING)

    def _completed(self, changes: dict[str, Any]) -> Record:
        """The record with `changes`, and what goes with them: the version and the timers."""
        record = self.record
        if not changes and not self.gone and record is self.kept:
            return record
        if self.timers:
            self._remove_expired()
            for name in changes.keys() - self.live.keys():
                del changes[name]
            if self.timers:
                changes[TIMERS] = self.timers.to_store()
        if self.schema.version > 1 and VERSION not in record and (changes or record):
            changes[VERSION] = self.schema.version
        last_timer_went = self.timers is not None and TIMERS in record and TIMERS not in changes
        if self.gone or last_timer_went:
            return self._rearranged(changes)
        return patched(record, changes) if changes else record

    def _rearranged(self, changes: dict[str, Any]) -> Record:
        """The record with `changes`, where something has gone."""
        fields = dict.fromkeys((*self._stored_names(), *filter(is_field, changes)))
        if not fields:  # then it is not stored at all, whatever else it has
            return without_fields(self.record)
        hidden = [name for name in (*self.record, *changes) if not is_field(name)]
        if not self.timers:
            hidden = [name for name in hidden if name != TIMERS]
        return only(self.record, dict.fromkeys((*fields, *hidden)), changes)

    def _freeze(self, name: str, value: Any, stored: Any, shape: Shape) -> Any:
        try:
            frozen = shape.freeze(value, self.owner, stored)
        except RecursionError:
            raise self.owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} has become {wrong.found}, where "
                f"{self.schema.name} declares {wrong.expected}; nothing was written"
            ) from wrong.__cause__
        self._note_loose(name)
        return frozen

    def not_saved(self, kept: Record) -> None:
        """The store did not take it after all, and still has what was `kept`."""
        self.kept = kept

    @property
    def is_unsaved(self) -> bool:
        """Whether the store has something older, whatever the handler does."""
        return self.record is not self.kept

    def save_as_it_is(self) -> None:
        """The store has something older, which is to be replaced by the next flush; but not if the
        handler fails."""
        self.record = patched(self.record, {})

    def roll_back(self) -> None:
        """Back to what the store has; containers handed out so far cannot be changed any more."""
        self.close()
        spoilt = self.spoilt | self.loose  # objects that the failed handler may have changed
        begun = self.begun is self.kept
        Fields.__init__(self, self.key, reread(self.kept), self.schema)
        self.spoilt = spoilt
        self.begun = self.kept if begun else None


class BaseSession(MutableMapping[str, Any]):
    """What `Session` and `StrictSession` have in common: see there."""

    __slots__ = ("__weakref__", "_lifecycle")

    #: How stored sessions of an older version become those of this class: see `SessionManager`.
    migrations: ClassVar[Mapping[int, Migration]] = {}
    #: Whether a migrated session is stored at once, and not with whatever is written next.
    migrate_eagerly: ClassVar[bool] = False

    _lifecycle: Lifecycle
    _reserved: ClassVar[frozenset[str]]  # what the class itself has: no field by attribute
    _declares: ClassVar[Mapping[str, Declared]] = {}  # the class itself ...
    _declared: ClassVar[Mapping[str, Declared]] = {}  # ... and with its bases
    _schema: ClassVar[Schema | None] = None  # None: not all of its types are defined yet
    _other: ClassVar[Shape | None] = None  # the shape of names that are not declared, if any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited: dict[str, Declared] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= base.__dict__.get("_declares", {})
        cls._declares = declared_by(cls, inherited)
        for name in cls._declares:
            setattr(cls, name, _Attribute(name))
        cls._declared = inherited | cls._declares
        for name in cls._declared:
            if not isinstance(inspect.getattr_static(cls, name), _Attribute):
                raise TypeError(
                    f"{cls.__name__}.{name}: one of its bases has a field {name!r}, and another "
                    f"one something else of that name"
                )
        cls._reserved = frozenset(dir(cls)) - cls._declared.keys()
        cls._schema = None
        with suppress(NameError, AttributeError):
            cls._schema = read(cls, cls._declared, cls._other)
        Migrations(cls.migrations, f"{cls.__name__}.migrations")  # a look at them

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
        fields = self._opened()
        for name in reversed(self):
            if not fields.is_default(name):
                return name, self.pop(name)
        raise KeyError(f"session {self.key!r} is empty")

    # One signature for what MutableMapping has in several overloads.
    def update(  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        self, other: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any
    ) -> None:
        """Assign several fields, or none if one of them is refused."""
        fields = dict(other, **more)
        self._opened().check_all(fields)
        for name, value in fields.items():
            self[name] = value

    def clear(self) -> None:
        """Remove all fields; a session that has none but defaults when its scope ends is deleted
        from the store."""
        self._opened().clear()

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

    # -- as an object

    if not TYPE_CHECKING:  # else a type checker would let any name through

        def __setattr__(self, name: str, value: Any) -> None:
            self._check_attribute(name)
            if name not in self._declared:
                raise AttributeError(
                    f"session {self.key!r} has no field {name!r}: {type(self).__name__} declares "
                    f"{', '.join(self._declared) or 'none'}",
                    name=name,
                    obj=self,
                )
            self[name] = value

    def __delattr__(self, name: str) -> None:
        self._check_attribute(name)
        try:
            del self[name]
        except KeyError:
            raise _no_attribute(self, name) from None

    def _check_attribute(self, name: str) -> None:
        if name.startswith("_") or name in self._reserved:
            raise AttributeError(
                f"{name!r} is a name of {type(self).__name__} itself; as a field it is reached "
                f"with brackets: session[{name!r}]",
                name=name,
                obj=self,
            )


class _Attribute(property):
    """A declared field as an attribute. It is set and deleted as all others are."""

    def __init__(self, name: str) -> None:
        def get(session: BaseSession) -> Any:
            fields = session._lifecycle.fields
            if fields is None:
                fields = session._opened()
            try:
                return fields.get(name)
            except KeyError:
                raise _no_attribute(session, name) from None

        super().__init__(get)


def _no_attribute(session: BaseSession, name: str) -> AttributeError:
    return AttributeError(
        f"session {session.key!r} has no field {name!r}; session.get({name!r}) answers None",
        name=name,
        obj=session,
    )


class StrictSession(BaseSession):
    """A session that has the fields which its class declares, and no others.

    A typo in a name is an error of the type checker, and where none looks, AttributeError (KeyError
    with brackets). What is stored under other names stays there, and is not seen. All else is as
    in a `Session`.

    >>> from session_sync import SessionManager, StrictSession
    >>> class Cart(StrictSession):
    ...     total: int = 0
    >>> with SessionManager(Cart).session_scope("user:1") as session:  # doctest: +ELLIPSIS
    ...     session.totl = 5
    Traceback (most recent call last):
    AttributeError: session 'user:1' has no field 'totl': Cart declares total...
    """

    __slots__ = ()


class Session(BaseSession):
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

    A subclass may declare fields, with types and defaults. They are there in every session, and
    what is assigned or loaded is checked: SessionTypeError. Other names stay free. A default is not
    stored, and no two sessions share it; to delete a field is to go back to its default.

    >>> from dataclasses import dataclass
    >>> from session_sync import field
    >>> @dataclass
    ... class Line:
    ...     name: str
    ...     price: int
    >>> class Cart(Session):
    ...     lines: list[Line] = field(default_factory=list)
    ...     paid: bool = False
    >>> sessions = SessionManager(Cart)
    >>> with sessions.session_scope("user:1") as session:
    ...     session.lines.append(Line("tea", 4))
    >>> with sessions.session_scope("user:1") as session:
    ...     session.lines[0].price += 1  # saved, as a change in a dict is
    >>> sessions.storage.get("user:1")
    {'lines': [{'name': 'tea', 'price': 5}]}
    """

    __slots__ = ()

    _other = FREE

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return self._opened().get(name)
        except KeyError:
            raise _no_attribute(self, name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_attribute(name)
        self[name] = value


def schema_of(session_type: type[BaseSession]) -> Schema:
    """The fields that a class declares.

    Raises TypeError if a name in an annotation is still not defined, or if a decorator has made it
    a class of another kind.
    """
    for mark, decorator in (("__dataclass_fields__", "dataclass"), ("__attrs_attrs__", "attrs")):
        if hasattr(session_type, mark):
            raise TypeError(
                f"{session_type.__name__} has the fields that it declares without a decorator: "
                f"leave @{decorator} away"
            )
    if session_type._schema is None:
        try:
            session_type._schema = read(session_type, session_type._declared, session_type._other)
        except (NameError, AttributeError) as error:
            raise TypeError(
                f"the types of {session_type.__name__} cannot be read: {error}. Define or import "
                f"it, in the module itself and not under TYPE_CHECKING, before the SessionManager "
                f"is made"
            ) from error
    return session_type._schema


def replace_fields(session: BaseSession, fields: Mapping[str, Any] | None) -> None:
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
    session._opened().check_all(fields)
    session.clear()
    session.update(fields)


_set_lifecycle: Final = BaseSession.__dict__["_lifecycle"].__set__  # past __setattr__
