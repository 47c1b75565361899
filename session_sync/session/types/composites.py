"""The field types of lists, tuples, sets and dicts.

This module knows lists, tuples, sets and dicts; it knows no annotation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain, repeat
from typing import Any, Final

from session_sync.session import containers
from session_sync.session.containers import (
    MISSING,
    Owner,
    SessionDict,
    SessionList,
    SessionSet,
    is_foreign,
    owned,
    same,
)
from session_sync.storages.places import step

from .base import ANY, FieldType, MismatchError, alike, altered, unmade


def each(
    verb: str,
    field_types: Iterable[FieldType],
    values: Iterable[Any],
    owner: Owner,
    place: Callable[[int], str],
    *stored: Iterable[Any],
) -> list[Any]:
    """What the verb makes of each value, with the field type that it has to have (and what is
    stored at its place); `place(n)` is the step to the n-th, for the path of a MismatchError."""
    done: list[Any] = []
    try:
        for field_type, value, *was in zip(field_types, values, *stored, strict=False):
            is_simple = value.__class__ in field_type.atoms
            done.append(value if is_simple else getattr(field_type, verb)(value, owner, *was))
    except MismatchError as wrong:
        wrong.steps.append(place(len(done)))
        raise
    return done


def _all(
    verb: str,
    field_type: FieldType,
    values: Collection[Any],
    owner: Owner,
    place: Callable[[int], str],
    *stored: Iterable[Any],
) -> Collection[Any]:
    """The same where all values have one field type: most often one of atoms, and nothing to do."""
    if field_type.atoms.issuperset(map(type, values)):
        return values
    if field_type.atoms:
        return each(verb, repeat(field_type), values, owner, place, *stored)
    act = getattr(field_type, verb)
    done: list[Any] = []
    try:
        for arguments in zip(values, repeat(owner), *stored, strict=False):
            done.append(act(*arguments))  # noqa: PERF401 (how far it came is the path)
    except MismatchError as wrong:
        wrong.steps.append(place(len(done)))
        raise
    return done


def _or_missing(stored: Iterable[Any]) -> Iterable[Any]:
    return chain(stored, repeat(MISSING))


def _at(index: int) -> str:
    return f"[{index}]"


class ListOf(FieldType):
    """`list[int]`."""

    dumped = frozenset((list,))

    def __init__(self, item: FieldType) -> None:
        self.text = f"list[{item.text}]"
        self.inner = (item,)
        self._item: Final = item

    def fits(self, value: Any) -> bool:
        return value.__class__ in (list, SessionList)

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ is not list:
            raise self.mismatch(value)
        return owned(
            SessionList(_all("load", self._item, value, owner, _at)),
            owner,
            declared=ANY not in self.inner,
        )

    def validate(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        if is_foreign(value, owner):
            return self.load(self.dump(value, owner), owner)
        for at, item in enumerate(_all("validate", self._item, value, owner, _at)):
            if item is not value[at]:
                value[at] = item
        return value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        value = list(value)  # in one step, since another thread may change it
        was = stored if stored.__class__ is list else []
        items = _all("dump", self._item, value, owner, _at, _or_missing(was))
        return stored if was is stored and same(items, was) else list(items)


class TupleOf(FieldType):
    """`tuple[int, ...]`, if `items` is one field type; else `tuple[int, str]`, or a NamedTuple
    `cls`."""

    dumped = frozenset((tuple,))

    def __init__(self, items: FieldType | Sequence[FieldType], cls: type[Any] = tuple) -> None:
        self._cls: Final = cls
        self._is_uniform: Final = isinstance(items, FieldType)
        self.inner = (items,) if isinstance(items, FieldType) else items
        self.is_changed = cls is not tuple
        inside = ", ".join(item.text for item in self.inner) or "()"
        if cls is tuple:
            self.text = f"tuple[{inside}{', ...' if self._is_uniform else ''}]"
        else:
            self.text = cls.__name__

    def fits(self, value: Any) -> bool:
        return value.__class__ is self._cls

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ is not tuple:
            raise self.mismatch(value)
        if self._cls is tuple:
            return self._made(self._map("load", value, owner), value)
        if len(value) > len(self.inner):
            raise MismatchError(self.text, f"a tuple of {len(value)}")
        items = each("load", self.inner, value, owner, _at)
        made = self._made(items, value)
        if not same(made, items):  # it has got more attributes since, say, with defaults
            owner.met_old_form = True
            own = self._map("dump", made, owner, repeat(MISSING))
            return self._cls._make(self._map("load", tuple(own), owner))
        return made

    def validate(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        self._check_made(value)
        return self._made(self._map("validate", value, owner), value)

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        was = stored if stored.__class__ is tuple else ()
        items = self._map("dump", value, owner, _or_missing(was))
        if was is stored and same(items, was):
            return stored
        self._check_made(value)
        return value if self._cls is tuple and same(items, value) else tuple(items)

    def _check_made(self, value: Any) -> None:
        """Refuse a NamedTuple that its class would not make again as it is."""
        if self._cls is not tuple and not same(self._made(list(value), None), value):
            raise altered(self.text)

    def _made(self, items: Collection[Any], value: Any) -> Any:
        if value.__class__ is self._cls and same(items, value):
            return value
        try:
            return tuple(items) if self._cls is tuple else self._cls(*items)
        except OSError:  # see unmade()
            raise
        except Exception as error:
            raise unmade(self.text, error) from None

    def _map(self, verb: str, value: Any, owner: Owner, *stored: Iterable[Any]) -> Collection[Any]:
        if self._is_uniform:
            return _all(verb, self.inner[0], value, owner, _at, *stored)
        if len(value) != len(self.inner):
            raise MismatchError(self.text, f"a tuple of {len(value)}")
        return each(verb, self.inner, value, owner, _at, *stored)


class SetOf(FieldType):
    """`set[int]` and `frozenset[int]`."""

    def __init__(self, item: FieldType, cls: type[Any]) -> None:
        self.text = f"{cls.__name__}[{item.text}]"
        self.dumped = frozenset((cls,))
        self.inner = (item,)
        self._item: Final = item
        self._cls: Final = cls

    def fits(self, value: Any) -> bool:
        return value.__class__ is self._cls or (self._cls is set and value.__class__ is SessionSet)

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ is not self._cls:
            raise self.mismatch(value)
        items = _all("load", self._item, value, owner, lambda _: "{...}")
        if self._cls is frozenset:
            return frozenset(items)
        return owned(SessionSet(items), owner, declared=ANY not in self.inner)

    def validate(self, value: Any, owner: Owner) -> Any:
        dumped = self.dump(value, owner)
        return self.load(dumped, owner) if is_foreign(value, owner) else value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        value = self._cls(value)  # as above
        items = _all("dump", self._item, value, owner, lambda _: "{...}")
        was = {item: item for item in stored} if stored.__class__ is self._cls else {}
        # What is stored, where it says the same: a value of an Enum is another object.
        dumped = self._cls([old if alike(old := was.get(i, MISSING), i) else i for i in items])
        if len(dumped) != len(value):
            raise MismatchError(self.text, "elements that are equal once stored")
        is_same = len(was) == len(dumped) and all(was.get(item) is item for item in dumped)
        return stored if is_same and stored.__class__ is self._cls else dumped


class DictLike(FieldType):
    """What is a dict, whatever it says of its keys and values."""

    dumped = frozenset((dict,))

    def fits(self, value: Any) -> bool:
        return value.__class__ in (dict, SessionDict)

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ is not dict:
            raise self.mismatch(value)
        return owned(
            SessionDict(self.pairs("load", value, owner)), owner, declared=ANY not in self.inner
        )

    def validate(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        if is_foreign(value, owner):
            return self.load(self.dump(value, owner), owner)
        validated = list(self.pairs("validate", value, owner))
        for (key, item), (_, instead) in zip(list(value.items()), validated, strict=True):
            if instead is not item:
                value[key] = instead
        return value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        value = dict(value)  # as above
        was = stored if stored.__class__ is dict else {}
        dumped = dict(self.pairs("dump", value, owner, was))
        if len(dumped) != len(value):
            raise MismatchError(self.text, "keys that are equal once stored")
        if stored.__class__ is not dict or len(stored) != len(dumped):
            return dumped
        keys = zip(dumped, stored, strict=True)
        if all(containers.dump(one, other) is other for one, other in keys):
            return stored if same(dumped.values(), stored.values()) else dumped
        return dumped

    @abstractmethod
    def pairs(
        self, verb: str, value: dict[Any, Any], owner: Owner, *stored: dict[Any, Any]
    ) -> Iterable[tuple[Any, Any]]:
        """What the verb makes of each key and value; raises MismatchError."""


class DictOf(DictLike):
    """`dict[str, int]`."""

    def __init__(self, key: FieldType, value: FieldType) -> None:
        self.text = f"dict[{key.text}, {value.text}]"
        self.inner = (key, value)
        self._key: Final = key
        self._value: Final = value

    def pairs(
        self, verb: str, value: dict[Any, Any], owner: Owner, *stored: dict[Any, Any]
    ) -> Iterable[tuple[Any, Any]]:
        """As the base class says."""
        beside = (_or_missing(old) for old in stored)
        keys = _all(verb, self._key, value.keys(), owner, lambda _: ".keys()", *beside)
        was = ([old.get(key, MISSING) for key in keys] for old in stored)

        def place(index: int) -> str:
            return step(list(value)[index])

        return zip(keys, _all(verb, self._value, value.values(), owner, place, *was), strict=True)
