"""What a handler holds: a session that reads and writes like a plain object.

A session knows its fields; how it is locked, loaded and saved is its scope's business, of which it
knows only the few calls of `Lifecycle`.
"""

from __future__ import annotations

import inspect
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, Self

from ..errors import SessionClosedError
from .changes import ChangeTracker
from .containers import MISSING
from .declarations import Declared, Schema, declared_by, read
from .migrations import Migration, Migrations
from .types.base import ANY, FieldType


class Lifecycle(Protocol):
    """What a session calls of its scope."""

    @property
    def is_loaded(self) -> bool: ...
    @property
    def tracker(self) -> ChangeTracker | None: ...  # from loading on
    def load(self) -> None: ...
    async def aload(self) -> None: ...
    def flush(self) -> None: ...
    async def aflush(self) -> None: ...
    def release(self) -> None: ...
    async def arelease(self) -> None: ...


class BaseSession(MutableMapping[str, Any]):
    """What `Session` and `StrictSession` have in common: see there."""

    __slots__ = ("__weakref__", "_key", "_lifecycle", "_tracker")

    #: How stored sessions of an older version become those of this class: see `SessionManager`.
    migrations: ClassVar[Mapping[int, Migration]] = {}
    #: Whether a migrated session is stored at once, and not with whatever is written next.
    migrate_eagerly: ClassVar[bool] = False

    # Weak: the block alone keeps its scope. The function around it may keep the session, and if an
    # interrupt comes just before the block is left, its scope has to be collected all the same.
    _lifecycle: Callable[[], Lifecycle | None]
    _key: str
    _tracker: ChangeTracker | None  # from loading on
    _reserved: ClassVar[frozenset[str]]  # what the class itself has: no field by attribute
    _declares: ClassVar[Mapping[str, Declared]] = {}  # the class itself ...
    _declared: ClassVar[Mapping[str, Declared]] = {}  # ... and with its bases
    _schema: ClassVar[Schema | None] = None  # None: not all of its types are defined yet
    _other: ClassVar[FieldType | None] = (
        None  # the field type of names that are not declared, if any
    )

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

    def __init__(
        self, lifecycle: Callable[[], Lifecycle | None], key: str, tracker: ChangeTracker | None
    ) -> None:
        _set_lifecycle(self, lifecycle)
        _set_key(self, key)
        _set_fields(self, tracker)

    def _opened(self) -> ChangeTracker:
        """The fields, loaded first if this is a lazy session."""
        tracker = self._tracker
        if tracker is None:
            lifecycle = self._to_load()
            if not lifecycle.is_loaded:
                lifecycle.load()
            tracker = self._loaded(lifecycle)
        return tracker

    def _to_load(self) -> Lifecycle:
        lifecycle = self._lifecycle()
        if lifecycle is None:
            raise SessionClosedError(
                f"the session {self._key!r} was closed before it was ever loaded"
            )
        return lifecycle

    def _loaded(self, lifecycle: Lifecycle) -> ChangeTracker:
        tracker = lifecycle.tracker
        assert tracker is not None
        _set_fields(self, tracker)
        return tracker

    # -- as a mapping

    def __getitem__(self, name: str) -> Any:
        tracker = self._tracker
        if tracker is None:
            tracker = self._opened()
        return tracker.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        tracker = self._tracker
        if tracker is None:
            tracker = self._opened()
        tracker.set(name, value)

    def __delitem__(self, name: str) -> None:
        self._opened().delete(name)

    def __contains__(self, name: object) -> bool:
        return name in self._opened()

    def __iter__(self) -> Iterator[str]:
        tracker = self._opened()
        return (name for name in tracker.names() if name in tracker)  # the time of one may run out

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._opened().names())

    def __len__(self) -> int:
        return len(self._opened().names())

    def setdefault(self, name: str, default: Any = None) -> Any:
        """The value of `name`, which is `default` from now on if there was none."""
        with suppress(KeyError):
            return self[name]
        self[name] = default
        return self.get(name, default)  # another thread may have removed it

    def pop(self, name: str, default: Any = MISSING) -> Any:
        """Remove a field and return its value, or `default` if there is none; raises KeyError if
        that is not given either."""
        try:
            value = self[name]
            del self[name]
        except KeyError:  # or another thread has removed it, or its time is up
            if default is MISSING:
                raise
            return default
        return value

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the field that came last; raises KeyError if there is none."""
        tracker = self._opened()
        for name in reversed(self):
            if not tracker.is_default(name):
                value = self.pop(name, MISSING)
                if value is not MISSING:
                    return name, value
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
        lifecycle = self._lifecycle()
        tracker = self._tracker if lifecycle is None else lifecycle.tracker
        inside = "not loaded" if tracker is None else ", ".join(tracker.names())
        return f"<{type(self).__name__} {self.key!r}: {inside}>"

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles are plain dicts
        return dict, (), None, None, iter(self.items())

    # -- the life of the session

    @property
    def key(self) -> str:
        """The key of this session."""
        return self._key

    def flush(self) -> None:
        """Write now what has changed. What comes after is a unit of its own: an error discards
        only that. Calling it again without a change does nothing.

        Raises what the storage raises; then nothing is lost: the changes are still pending.
        In async code, use `await session.aflush()`.
        """
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            lifecycle.flush()
        elif self._tracker is not None:
            self._tracker.check_not_lost()

    async def aflush(self) -> None:
        """As `flush`, for async code: the event loop goes on meanwhile."""
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            await lifecycle.aflush()
        elif self._tracker is not None:
            self._tracker.check_not_lost()

    def release(self) -> None:
        """Write what has changed and end the scope now, so that this user's next update can be
        handled: for a handler that goes on for long. The session can be read afterwards, not
        changed; a new scope may be opened. In async code, use `await session.arelease()`.
        """
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            lifecycle.release()

    async def arelease(self) -> None:
        """As `release`, for async code."""
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            await lifecycle.arelease()

    def __await__(self) -> Generator[Any, None, Self]:
        """Lock and load a lazy session in async code: `session = await session`."""
        if self._tracker is None:
            lifecycle = self._to_load()
            if not lifecycle.is_loaded:
                yield from lifecycle.aload().__await__()
            self._loaded(lifecycle)
        return self

    # -- as an object

    if not TYPE_CHECKING:  # else a type checker would let any name through

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith("_") or name in self._reserved:
                raise _reserved_name(self, name)
            if name not in self._declared:
                raise AttributeError(
                    f"session {self.key!r} has no field {name!r}: {type(self).__name__} declares "
                    f"{', '.join(self._declared) or 'none'}",
                    name=name,
                    obj=self,
                )
            self[name] = value

    def __delattr__(self, name: str) -> None:
        if name.startswith("_") or name in self._reserved:
            raise _reserved_name(self, name)
        try:
            del self[name]
        except KeyError:
            raise _no_attribute(self, name) from None


def _reserved_name(session: BaseSession, name: str) -> AttributeError:
    return AttributeError(
        f"{name!r} is reserved in {type(session).__name__}; use session[{name!r}]",
        name=name,
        obj=session,
    )


class _Attribute(property):
    """A declared field as an attribute. It is set and deleted as all others are."""

    def __init__(self, name: str) -> None:
        def get(session: BaseSession) -> Any:
            tracker = session._tracker
            if tracker is None:
                tracker = session._opened()
            try:
                return tracker.get(name)
            except KeyError:
                raise _no_attribute(session, name) from None

        super().__init__(get)


def _no_attribute(session: BaseSession, name: str) -> AttributeError:
    return AttributeError(
        f"session {session.key!r} has no field {name!r}; use session.get({name!r}, default), or "
        f"declare the field with a default",
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
    """The state of one user (or chat, or whatever the key names), for the time of one update.

    It reads and writes like a dict, and like an object: `session["counter"]` and `session.counter`
    are the same field. What is changed is saved when the scope ends; no other handler has the
    session meanwhile. Dicts, lists and sets in it are followed to any depth.

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

    _other = ANY

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return self._opened().get(name)
        except KeyError:
            raise _no_attribute(self, name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in self._reserved:
            raise _reserved_name(self, name)
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


# Past __setattr__.
_set_lifecycle: Final = BaseSession.__dict__["_lifecycle"].__set__
_set_key: Final = BaseSession.__dict__["_key"].__set__
_set_fields: Final = BaseSession.__dict__["_tracker"].__set__
