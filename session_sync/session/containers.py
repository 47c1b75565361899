"""The dicts, lists and sets that a session hands out, and how they go into a store and come back.

Two words: *loaded* values are what a handler sees and changes, *dumped* ones are what a store
keeps: plain containers that are never changed again, so that several records may share them.

How changes are found. Not by listening: `heapq`, `random.shuffle` and C code in general write past
a subclass's methods, and an object that a handler put into its session stays an ordinary object.
Instead `dump` compares what a handler had in its hands with what was stored, by identity of the
leaves and keys, and gives back the very same dumped object where nothing differs. That costs a walk
over the fields that were touched, and only over those.

The methods that change a container are overridden all the same, for two reasons: a change after the
session has closed must raise, and a container of another session goes in as a copy.

Objects of other types are the same object before and after, whatever changed in them. So a field
that has one is taken as changed whenever it was handed out (`Owner.met_object`).

This module knows containers and what a store keeps of them; it knows no field and no record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import chain, repeat
from operator import is_, is_not
from typing import Any, Final, TypeAlias
from uuid import UUID

from ..errors import SessionClosedError, SessionEncodeError
from ..storages.base import COPIERS, Check
from .ttl import Ttl

#: Types whose values cannot change and hold nothing that can.
ATOMS: Final = frozenset(
    (type(None), bool, int, float, str, bytes, datetime, date, time, timedelta, Decimal, UUID)
)
#: Those of them that have a time zone, which a store may refuse; of the others it keeps all values.
ZONED: Final = frozenset((datetime, time))
_KEPT: Final = ATOMS - ZONED
#: What `dump` is given where nothing is stored yet.
MISSING: Final = object()
_NO_HASH: Final = (None, object.__hash__)


class Owner:
    """What the containers of one session have in common: the session's key, and whether it is open.

    A roll-back closes the owner and the session goes on with a new one. `met_object` is set when a
    loaded or dumped value has an object in it whose changes would go unnoticed, `met_old_form`
    when a loaded value would be dumped as something else than it was. These two are of the last
    value that was begun, by whichever thread.
    """

    __slots__ = ("_begun", "check", "key", "met_object", "met_old_form", "open", "place_of")

    def __init__(
        self,
        key: str,
        check: Check | None = None,
        place_of: Callable[[object], str] | None = None,
    ) -> None:
        self.key: Final = key
        self.check: Final = check  # None: the store keeps whatever it is given
        self.place_of: Final = place_of  # where a container is, for messages
        self.open = True
        self._begun: object = None
        self.met_object = self.met_old_form = False

    def begin(self) -> object:
        """A value is going to be loaded or dumped: nothing has been met yet."""
        begun = self._begun = object()  # first: a thread that is at another value has to see it
        self.met_object = self.met_old_form = False
        return begun

    def is_still_at(self, begun: object) -> bool:
        """Whether no other thread has begun a value since. To be asked after a look at what was
        met: if not, that may be wrong."""
        return self._begun is begun

    def refuse(self) -> SessionClosedError:
        return SessionClosedError(
            f"the session {self.key!r} is closed (its handler has ended, or was rolled back): this "
            f"change could not be saved. Open it again with sessions.session_scope(...)."
        )

    def too_deep(self, what: str) -> SessionEncodeError:
        return SessionEncodeError(
            f"session {self.key!r}: {what} contains itself, or is nested too deeply; nothing was "
            f"written. Store a flat form of it."
        )

    def stray_ttl(self) -> TypeError:
        return TypeError(
            f"session {self.key!r}: ttl() gives a lifetime to a field of the session itself, not "
            f"to something inside it; assign it as session[name] = ttl(...)"
        )


#: The owner of a container that was made outside any session; what it has met is never read.
NO_OWNER: Final = Owner("")


class SessionDict(dict[Any, Any]):
    """A dict inside a session. Of one whose content is declared, the field type knows what may be
    in it; the same goes for lists and sets."""

    _owner = NO_OWNER
    _is_declared = False
    fromkeys: Any = dict.fromkeys  # makes a plain one

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (), None, None, iter(self.items())


class SessionList(list[Any]):
    """A list inside a session."""

    _owner = NO_OWNER
    _is_declared = False

    def __setitem__(self, at: Any, value: Any, /) -> None:
        owner = self._owner
        if not owner.open:
            raise owner.refuse()
        validate_value = _validate_each if at.__class__ is slice else _validate_inside
        super().__setitem__(at, validate_value(value, self))
        if not owner.open:
            raise owner.refuse()

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        # In one step: list.sort() shows an empty list as long as it lasts, and a flush that comes
        # meanwhile would store that.
        if not self._owner.open:
            raise self._owner.refuse()
        before = list(self)
        after = sorted(before, key=key, reverse=reverse)
        if len(self) != len(before) or any(map(is_not, self, before)):
            raise ValueError("list modified during sort")  # as list.sort() does
        self[:] = after

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (), None, iter(self)


class SessionSet(set[Any]):
    """A set inside a session."""

    _owner = NO_OWNER
    _is_declared = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        return set, (list(self),)

    def __repr__(self) -> str:  # dict's and list's show no class name either
        return repr(set(self))


_Validate: TypeAlias = Callable[[Any, Any], Any]  # a value, and the container that it goes into


def _guarded(
    method: Callable[..., Any], validate_last: _Validate | None, has_key: bool
) -> Callable[..., Any]:
    """`method`, which changes its container: refused when closed, also when another thread has
    closed the session meanwhile, which may have been too soon for the change to be saved.
    `validate_last` is for a method whose last argument goes in, `has_key` for one whose first
    argument is a dict's key."""

    @functools.wraps(method)
    def guarded(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner
        if not owner.open:
            raise owner.refuse()
        if validate_last is not None:
            if has_key and args and args[0].__class__ not in _KEPT:
                _check(args[0], self)
            if args:
                args = (*args[:-1], validate_last(args[-1], self))
            if kwargs:
                kwargs = {name: _validate_inside(arg, self) for name, arg in kwargs.items()}
        result = method(self, *args, **kwargs)
        if not owner.open:
            raise owner.refuse()
        return result

    return guarded


def _guard(
    cls: type, names: str, validate_last: _Validate | None = None, *, has_key: bool = False
) -> None:
    for name in names.split():
        setattr(cls, name, _guarded(getattr(cls, name), validate_last, has_key))


_OWNED: Final = frozenset((SessionDict, SessionList, SessionSet))
_WITH_PLACES: Final = frozenset((dict, list, SessionDict, SessionList))


def _refuse_ttl(_value: Ttl) -> Any:
    raise NO_OWNER.stray_ttl()


# What a store is given past a session, by `set`, becomes plain, too.
COPIERS.update(
    {
        SessionDict: COPIERS[dict],
        SessionList: COPIERS[list],
        SessionSet: COPIERS[set],
        Ttl: _refuse_ttl,
    }
)


# -- out of the store


def load(value: Any, owner: Owner) -> Any:
    """What a handler of `owner` may have of a dumped `value`: containers of its own."""
    cls = value.__class__
    if cls in ATOMS:
        return value
    if cls is dict:
        return owned(
            SessionDict(
                {k: v if v.__class__ in ATOMS else load(v, owner) for k, v in value.items()}
            ),
            owner,
        )
    if cls is list:
        return owned(
            SessionList([v if v.__class__ in ATOMS else load(v, owner) for v in value]), owner
        )
    if cls is set:
        return owned(SessionSet(value), owner)
    if cls is tuple:
        items = [load(item, owner) for item in value]
        return value if same(items, value) else tuple(items)
    _note(value, owner)
    return value


def _note(thing: Any, owner: Owner) -> None:
    """Remember that `thing` is there, unless it has a hash of its own: then it does not change."""
    if thing.__class__.__hash__ in _NO_HASH or isinstance(thing, tuple):
        owner.met_object = True


def owned(container: Any, owner: Owner, *, declared: bool = False) -> Any:
    """`container`, a new one of ours, which belongs to `owner` from now on."""
    container._owner = owner
    if declared:
        container._is_declared = True
    return container


def is_foreign(value: Any, owner: Owner) -> bool:
    """Whether `value` is a container that another session, or a closed one, has handed out."""
    return value.__class__ in _OWNED and value._owner is not owner and value._owner is not NO_OWNER


# -- into a session


def validate(value: Any, owner: Owner) -> Any:
    """`value`, on its way into something of `owner`: the same object, unless it comes out of
    another session or a closed one; that goes in as a fresh copy, wherever in `value` it lies.

    Raises RecursionError if it is nested too deeply.
    """
    return value if value.__class__ in ATOMS else _validate(value, owner, set())


def _validate_inside(value: Any, into: Any) -> Any:
    """The same for what a handler puts into a container, if the store keeps it."""
    if value.__class__ in _KEPT:
        return value
    owner = into._owner
    try:
        validated = _validate(value, owner, set())
        _check(validated, into)
    except RecursionError:
        raise owner.too_deep("what was put into one of its containers") from None
    return validated


def _check(value: Any, into: Any) -> None:
    """Raise SessionEncodeError if the store would refuse `value`, which goes into a container."""
    owner = into._owner
    if owner.check is not None and not into._is_declared:
        owner.check(dump(value), owner.key, _Inside(into))


class _Inside:
    """In words, the place of what goes into a container: looked for when it is to be printed."""

    __slots__ = ("_container",)

    def __init__(self, container: Any) -> None:
        self._container: Final = container

    def __str__(self) -> str:
        place_of = self._container._owner.place_of
        return f"{'' if place_of is None else place_of(self._container)}[...]"


def _validate(value: Any, owner: Owner, seen: set[int]) -> Any:
    cls = value.__class__
    if cls in ATOMS:
        return value
    if cls in _OWNED and value._owner is owner:
        return value
    if is_foreign(value, owner):
        return load(dump(value, MISSING, owner), owner)
    if cls is Ttl:
        raise owner.stray_ttl()
    if cls in _WITH_PLACES:
        if id(value) not in seen:
            seen.add(id(value))
            _validate_items(value, owner, seen)
        return value
    if cls is tuple:
        items = [_validate(item, owner, seen) for item in value]
        return value if same(items, value) else tuple(items)
    return value


def _validate_items(plain: Any, owner: Owner, seen: set[int]) -> None:
    """Replace what is foreign inside a handler's own list or dict."""
    for at, item in list(plain.items() if isinstance(plain, dict) else enumerate(plain)):
        if item.__class__ not in ATOMS:
            validated = _validate(item, owner, seen)
            if validated is not item:
                plain[at] = validated


def _validate_each(items: Any, into: Any) -> Any:
    """The items of an iterable, which may be the very container that they go into."""
    validated = (
        item if item.__class__ in _KEPT else _validate_inside(item, into) for item in items
    )
    return list(validated) if isinstance(items, list | tuple) else validated


def _validate_pairs(items: Any, into: Any) -> Any:
    """The same for whatever `dict.update` takes."""
    if isinstance(items, dict):
        for key in items:
            if key.__class__ not in _KEPT:
                _check(key, into)
        return {
            k: v if v.__class__ in _KEPT else _validate_inside(v, into) for k, v in items.items()
        }
    if hasattr(items, "keys"):
        return {k: _validate_inside(items[k], into) for k in items.keys()}  # noqa: SIM118 (as dict.update does)
    return ([_validate_inside(part, into) for part in pair] for pair in items)


def _validate_elements(elements: Any, into: Any) -> Any:
    """The same for another set, or whatever `set.update` takes: they are hashable, so no container
    of a session is among them."""
    if not isinstance(elements, Collection):
        elements = list(elements)
    for element in elements:
        if element.__class__ not in _KEPT:
            _check(element, into)
    return elements


def _validate_element(element: Any, into: Any) -> Any:
    if element.__class__ not in _KEPT:
        _check(element, into)
    return element


_guard(SessionDict, "__delitem__ clear pop popitem")
_guard(SessionDict, "__setitem__ setdefault", _validate_inside, has_key=True)
_guard(SessionDict, "__ior__ update", _validate_pairs)
_guard(SessionList, "__delitem__ __imul__ pop remove clear reverse")
_guard(SessionList, "append insert", _validate_inside)
_guard(SessionList, "__iadd__ extend", _validate_each)
_guard(
    SessionSet,
    "__iand__ __isub__ discard remove pop clear intersection_update difference_update",
)
_guard(SessionSet, "add", _validate_element)
_guard(SessionSet, "__ior__ __ixor__ update symmetric_difference_update", _validate_elements)


# -- into the store


def dump(value: Any, stored: Any = MISSING, owner: Owner = NO_OWNER) -> Any:
    """What a store may keep of `value`: plain containers, none of which a handler has.

    `stored` is what the store has now; where `value` says the same, the very same object is given
    back, so that `dump(value, stored) is stored` means: nothing changed.

    Raises RecursionError if `value` contains itself or is nested too deeply.
    """
    cls = value.__class__
    if cls in ATOMS:
        return value
    if cls is dict or cls is SessionDict:
        return _dump_dict(value, stored if stored.__class__ is dict else {}, owner)
    if cls is list or cls is SessionList:
        return _dump_list(value, stored if stored.__class__ is list else [], owner)
    if cls is set or cls is SessionSet:
        items = set(value)
        same = stored.__class__ is set and set(map(id, items)) == set(map(id, stored))
        return stored if same else items
    if cls is tuple:
        return _dump_tuple(value, stored if stored.__class__ is tuple else (), owner)
    if cls is Ttl:
        raise owner.stray_ttl()
    _note(value, owner)
    return value


def _dump_dict(value: dict[Any, Any], stored: dict[Any, Any], owner: Owner) -> dict[Any, Any]:
    value = value.copy()
    same_keys = same(value, stored)
    if same_keys and same(value.values(), stored.values()):
        return stored
    items = {
        k: v if v.__class__ in ATOMS else dump(v, stored.get(k, MISSING), owner)
        for k, v in value.items()
    }
    return stored if same_keys and same(items.values(), stored.values()) else items


def _dump_list(value: list[Any], stored: list[Any], owner: Owner) -> list[Any]:
    value = value.copy()
    if same(value, stored):
        return stored
    items = [v if v.__class__ in ATOMS else dump(v, was, owner) for v, was in beside(value, stored)]
    return stored if same(items, stored) else items


def _dump_tuple(value: tuple[Any, ...], stored: tuple[Any, ...], owner: Owner) -> tuple[Any, ...]:
    items = [dump(v, was, owner) for v, was in beside(value, stored)]
    for whole in (stored, value):
        if same(items, whole):
            return whole
    return tuple(items)


def beside(value: Sequence[Any], stored: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    """Each item of `value` with what stands at its place in `stored`."""
    return zip(value, chain(stored, repeat(MISSING)), strict=False)


def same(one: Collection[Any], other: Collection[Any]) -> bool:
    """Whether both have the very same objects in the same order."""
    return len(one) == len(other) and all(map(is_, one, other))
