"""The field types of one of several types, and of types that have a name.

This module knows field types by what they load and dump; it knows no annotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from session_sync.session.containers import MISSING, Owner

from .base import ANY, FieldType, MismatchError
from .composites import DictOf, SetOf, TupleOf
from .scalars import Atom


class Alias(FieldType):
    """`type Json = dict[str, Json] | str`: a type that may lead back to itself."""

    field_type: FieldType

    def __init__(self, text: str) -> None:
        self.text = text

    def finish(self) -> None:
        self.inner = (self.field_type,)
        self.atoms, self.dumped = self.field_type.atoms, self.field_type.dumped

    def fits(self, value: Any) -> bool:
        return self.field_type.fits(value)

    def fits_dumped(self, value: Any) -> bool:
        return self.field_type.fits_dumped(value)

    def load(self, value: Any, owner: Owner) -> Any:
        return self.field_type.load(value, owner)

    def validate(self, value: Any, owner: Owner) -> Any:
        return self.field_type.validate(value, owner)

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        return self.field_type.dump(value, owner, stored)


class Union(FieldType):
    """`A | B`.

    Which of them a value is, its class says; of those that it leaves open, it is the first that
    takes it. A dumped value says so too, unless two of them are dumped alike: `A | B` are dicts,
    and `Color | str` are strings. Then those that are not stored as they are (and dicts, which
    could be taken for such a one) get a label around them: `{"A": {...}}`.
    """

    def __init__(self, options: Sequence[FieldType]) -> None:
        self.text = " | ".join(option.text for option in options)
        self.inner = options
        self._options: Sequence[FieldType] = ()
        self._labels: dict[FieldType, str] = {}
        self._labelled: dict[str, FieldType] = {}

    def finish(self) -> None:
        options = list(dict.fromkeys(_flat(self.inner, [])))
        if ANY in options:
            options = [ANY]
        # Atoms of the very class are known by it: what is left for them are subclasses.
        self._options = sorted(options, key=lambda option: isinstance(option, Atom))
        self._labels = _labels(options)
        self._labelled = {label: option for option, label in self._labels.items()}
        self.atoms = frozenset[type]().union(*(option.atoms for option in options))
        self.dumped = frozenset[type]().union(*(option.dumped for option in options))
        if self._labels:
            self.dumped |= {dict}

    def fits(self, value: Any) -> bool:
        return any(option.fits(value) for option in self._options)

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ in self.atoms:
            return value
        if self._labels and value.__class__ is dict and len(value) == 1:
            ((label, inside),) = value.items()
            if label in self._labelled:
                return self._labelled[label].load(inside, owner)
        # One without its label may be from a time when there was one class less to choose from.
        fitting = [option for option in self._options if option.fits_dumped(value)]
        fitting.sort(key=lambda option: (option in self._labels, not option.covers(value)))

        def load(option: FieldType) -> Any:
            live = option.load(value, owner)
            owner.met_old_form |= option in self._labels
            return live

        return self._first(fitting, load, value)

    def validate(self, value: Any, owner: Owner) -> Any:
        if value.__class__ in self.atoms:
            return value
        return self._first(
            self._fitting(value), lambda option: option.validate(value, owner), value
        )

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if value.__class__ in self.atoms:
            return value
        was = stored.__class__ is dict and len(stored) == 1 and next(iter(stored.items()))

        def dump(option: FieldType) -> Any:
            label = self._labels.get(option)
            if label is None:
                return option.dump(value, owner, stored)
            old = was[1] if was and was[0] == label else MISSING
            dumped = option.dump(value, owner, old)
            return stored if dumped is old else {label: dumped}

        return self._first(self._fitting(value), dump, value)

    def _fitting(self, value: Any) -> list[FieldType]:
        return [option for option in self._options if option.fits(value)]

    def _first(self, options: list[FieldType], act: Callable[[FieldType], Any], value: Any) -> Any:
        """What the first of `options` makes of it that does not refuse it."""
        wrong: MismatchError | None = None
        for option in options:
            try:
                return act(option)
            except MismatchError as mismatch:
                wrong = mismatch
        if wrong is not None and len(options) == 1:
            raise wrong
        raise self.mismatch(value)


def _flat(options: Sequence[FieldType], around: list[FieldType]) -> Iterator[FieldType]:
    """The options of a union, and of those among them."""
    for option in options:
        while isinstance(option, Alias):
            option = option.field_type
        if not isinstance(option, Union):
            yield option
        elif option not in around:
            yield from _flat(option.inner, [*around, option])


def _labels(options: Sequence[FieldType]) -> dict[FieldType, str]:
    """The labels of those that could not be told apart once dumped."""
    changed = [option for option in options if _changes(option, [])]
    alike = [
        option
        for option in changed
        if any(
            option.is_stored_like(other) or other.is_stored_like(option)
            for other in options
            if other is not option
        )
    ]
    if alike:
        dicts = DictOf(ANY, ANY)
        alike += [o for o in options if o.is_stored_like(dicts) and o not in alike]
    labels = {option: option.text for option in alike}
    if len(set(labels.values())) < len(labels):
        raise TypeError(
            f"{' | '.join(option.text for option in options)} cannot be kept: two of these classes "
            f"have the same name, by which the store tells them apart; rename one"
        )
    return labels


def _changes(field_type: FieldType, around: list[FieldType]) -> bool:
    """Whether something in a value of this field type is dumped as one of another class."""
    if field_type in around:
        return False
    return field_type.is_changed or any(
        _changes(inner, [*around, field_type]) for inner in field_type.inner
    )


# -- what has to have a hash


def check_hashable(field_type: FieldType) -> None:
    """Refuse a set or a dict whose elements or keys could not be such once they are dumped; raises
    TypeError."""
    if isinstance(field_type, (SetOf, DictOf)):
        for part in _with_tuples(field_type.inner[0], set()):
            if part is not ANY and part.dumped & {dict, list, set}:
                raise TypeError(
                    f"{field_type.text} cannot be kept: {part.text} is stored as something that "
                    f"has no hash; keep such values in a list, or under keys of their own"
                )


def _with_tuples(field_type: FieldType, seen: set[FieldType]) -> Iterator[FieldType]:
    """A field type and those of the items of a tuple."""
    if field_type not in seen:
        seen.add(field_type)
        yield field_type
        if isinstance(field_type, (TupleOf, Alias, Union)):
            for item in field_type.inner:
                yield from _with_tuples(item, seen)
