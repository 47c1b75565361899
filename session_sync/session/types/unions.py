"""The shapes of one of several types, and of types that have a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from session_sync.session.containers import MISSING, Owner

from .base import FREE, MismatchError, Shape
from .composites import DictOf, SetOf, TupleOf
from .scalars import Atom


class Alias(Shape):
    """`type Json = dict[str, Json] | str`: a type that may lead back to itself."""

    shape: Shape

    def __init__(self, text: str) -> None:
        self.text = text

    def finish(self) -> None:
        self.inner = (self.shape,)
        self.atoms, self.frozen = self.shape.atoms, self.shape.frozen

    def fits(self, value: Any) -> bool:
        return self.shape.fits(value)

    def fits_frozen(self, value: Any) -> bool:
        return self.shape.fits_frozen(value)

    def thaw(self, value: Any, owner: Owner) -> Any:
        return self.shape.thaw(value, owner)

    def admit(self, value: Any, owner: Owner) -> Any:
        return self.shape.admit(value, owner)

    def freeze(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        return self.shape.freeze(value, owner, stored)


class Union(Shape):
    """`A | B`.

    Which of them a value is, its class says; of those that it leaves open, it is the first that
    takes it. A frozen value says so too, unless two of them are frozen alike: `A | B` are dicts,
    and `Color | str` are strings. Then those that are not stored as they are (and dicts, which
    could be taken for such a one) get a label around them: `{"A": {...}}`.
    """

    def __init__(self, options: Sequence[Shape]) -> None:
        self.text = " | ".join(option.text for option in options)
        self.inner = options
        self._options: Sequence[Shape] = ()
        self._labels: dict[Shape, str] = {}
        self._labelled: dict[str, Shape] = {}

    def finish(self) -> None:
        options = list(dict.fromkeys(_flat(self.inner, [])))
        if FREE in options:
            options = [FREE]
        # Atoms of the very class are known by it: what is left for them are subclasses.
        self._options = sorted(options, key=lambda option: isinstance(option, Atom))
        self._labels = _labels(options)
        self._labelled = {label: option for option, label in self._labels.items()}
        self.atoms = frozenset[type]().union(*(option.atoms for option in options))
        self.frozen = frozenset[type]().union(*(option.frozen for option in options))
        if self._labels:
            self.frozen |= {dict}

    def fits(self, value: Any) -> bool:
        return any(option.fits(value) for option in self._options)

    def thaw(self, value: Any, owner: Owner) -> Any:
        if value.__class__ in self.atoms:
            return value
        if self._labels and value.__class__ is dict and len(value) == 1:
            ((label, inside),) = value.items()
            if label in self._labelled:
                return self._labelled[label].thaw(inside, owner)
        # One without its label may be from a time when there was one class less to choose from.
        fitting = [option for option in self._options if option.fits_frozen(value)]
        fitting.sort(key=lambda option: (option in self._labels, not option.covers(value)))

        def thaw(option: Shape) -> Any:
            live = option.thaw(value, owner)
            owner.met_old_form |= option in self._labels
            return live

        return self._first(fitting, thaw, value)

    def admit(self, value: Any, owner: Owner) -> Any:
        if value.__class__ in self.atoms:
            return value
        return self._first(self._fitting(value), lambda option: option.admit(value, owner), value)

    def freeze(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if value.__class__ in self.atoms:
            return value
        was = stored.__class__ is dict and len(stored) == 1 and next(iter(stored.items()))

        def freeze(option: Shape) -> Any:
            label = self._labels.get(option)
            if label is None:
                return option.freeze(value, owner, stored)
            old = was[1] if was and was[0] == label else MISSING
            frozen = option.freeze(value, owner, old)
            return stored if frozen is old else {label: frozen}

        return self._first(self._fitting(value), freeze, value)

    def _fitting(self, value: Any) -> list[Shape]:
        return [option for option in self._options if option.fits(value)]

    def _first(self, options: list[Shape], act: Callable[[Shape], Any], value: Any) -> Any:
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


def _flat(options: Sequence[Shape], around: list[Shape]) -> Iterator[Shape]:
    """The options of a union, and of those among them."""
    for option in options:
        while isinstance(option, Alias):
            option = option.shape
        if not isinstance(option, Union):
            yield option
        elif option not in around:
            yield from _flat(option.inner, [*around, option])


def _labels(options: Sequence[Shape]) -> dict[Shape, str]:
    """The labels of those that could not be told apart once frozen."""
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
        dicts = DictOf(FREE, FREE)
        alike += [o for o in options if o.is_stored_like(dicts) and o not in alike]
    labels = {option: option.text for option in alike}
    if len(set(labels.values())) < len(labels):
        raise TypeError(
            f"{' | '.join(option.text for option in options)} cannot be kept: two of these classes "
            f"have the same name, by which the store tells them apart; rename one"
        )
    return labels


def _changes(shape: Shape, around: list[Shape]) -> bool:
    """Whether something in a value of this shape is frozen as one of another class."""
    if shape in around:
        return False
    return shape.is_changed or any(_changes(inner, [*around, shape]) for inner in shape.inner)


# -- what has to have a hash


def check_hashable(shape: Shape) -> None:
    """Refuse a set or a dict whose elements or keys could not be such once they are frozen; raises
    TypeError."""
    if isinstance(shape, (SetOf, DictOf)):
        for part in _with_tuples(shape.inner[0], set()):
            if part is not FREE and part.frozen & {dict, list, set}:
                raise TypeError(
                    f"{shape.text} cannot be kept: {part.text} is stored as something that has no "
                    f"hash; keep such values in a list, or under keys of their own"
                )


def _with_tuples(shape: Shape, seen: set[Shape]) -> Iterator[Shape]:
    """A shape and those of the items of a tuple."""
    if shape not in seen:
        seen.add(shape)
        yield shape
        if isinstance(shape, (TupleOf, Alias, Union)):
            for item in shape.inner:
                yield from _with_tuples(item, seen)
