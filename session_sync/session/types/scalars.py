"""The field types of values that have nothing of a session inside: numbers, texts, times, members
of an Enum, instances of classes of which nothing is known.

This module knows values that hold no others; it knows no annotation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime
from enum import Enum
from typing import Any, Final

import msgspec

from session_sync.session import containers
from session_sync.session.containers import ATOMS, MISSING, Owner
from session_sync.storages.codec.kinds import base_value

from .base import FieldType, MismatchError, alike, altered, unmade


class Atom(FieldType):
    """Values that cannot change and hold nothing: int, str, datetime, ... and None."""

    def __init__(self, cls: type) -> None:
        self.text = "None" if cls is type(None) else cls.__name__
        self.atoms = self.dumped = frozenset((cls, *_TAKEN_FOR.get(cls, ())))
        # A subclass of these is stored as its base value (PTB's chat.type is a str and an Enum).
        self._base: Final = cls if cls in (str, int, float) else None

    def fits(self, value: Any) -> bool:
        return value.__class__ in self.atoms or (
            self._base is not None and isinstance(value, self._base)
        )

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ not in self.atoms:
            raise self.mismatch(value)
        return value

    def validate(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        return value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if value.__class__ in self.atoms:
            return value
        if not self.fits(value):
            raise self.mismatch(value)
        dumped = base_value(value)
        return stored if alike(dumped, stored) else dumped


# As type checkers have it, and the interpreter: nothing is lost by either.
_TAKEN_FOR: Final[Mapping[type, tuple[type, ...]]] = {
    int: (bool,),
    float: (int, bool),
    date: (datetime,),
}


class OneOf(FieldType):
    """`Literal["light", "dark"]`."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.text = f"Literal[{', '.join(map(repr, values))}]"
        self.dumped = frozenset(map(type, values))
        self._values: Final = frozenset((type(value), value) for value in values)

    def fits(self, value: Any) -> bool:
        return value.__class__ in self.dumped

    def load(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        if (value.__class__, value) not in self._values:
            raise MismatchError(self.text, f"another {type(value).__name__}")
        return value

    validate = load

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        return self.load(value, owner)


class Member(FieldType):
    """Members of an Enum, stored as their values; `only`: some of them (`Literal[Color.RED]`)."""

    is_changed = True

    def __init__(self, cls: type[Enum], only: Collection[Enum] = ()) -> None:
        self.text = f"Literal[{', '.join(map(str, only))}]" if only else cls.__name__
        self._cls: Final = cls
        self._only: Final = frozenset(only)
        values = [member.value for member in cls]
        self.dumped = frozenset(map(type, values))
        kept = all(type(value) in ATOMS or _is_atomic_tuple(value) for value in values)
        if not kept:
            raise TypeError(
                f"{cls.__name__} has a value that no store keeps; give its members plain values "
                f"(auto() will do)"
            )

    def fits(self, value: Any) -> bool:
        return isinstance(value, self._cls)

    def load(self, value: Any, owner: Owner) -> Any:
        try:
            member = self._cls(value)
        except OSError:  # see unmade()
            raise
        except Exception:  # whatever an own `_missing_` raises
            raise MismatchError(
                self.text, f"a {type(value).__name__} that is none of them"
            ) from None
        if not alike(member.value, value):  # found by `_missing_`
            owner.met_old_form = True
        return self.validate(member, owner)

    def validate(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        if self._only and value not in self._only:
            raise MismatchError(self.text, f"another {self._cls.__name__}")
        return value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        dumped = self.validate(value, owner).value
        return stored if alike(dumped, stored) else dumped


def _is_atomic_tuple(value: object) -> bool:
    return type(value) is tuple and all(type(item) in ATOMS for item in value)


class Derived(FieldType):
    """Instances of an own subclass of str, int or float, stored as their base values."""

    is_changed = True

    def __init__(self, cls: type[Any], base: type[Any]) -> None:
        self.text = cls.__name__
        self.dumped = frozenset((base,))
        self._cls: Final = cls

    def fits(self, value: Any) -> bool:
        return value.__class__ is self._cls

    def load(self, value: Any, owner: Owner) -> Any:
        if not self.fits_dumped(value):
            raise self.mismatch(value)
        made = self._made(value)
        if not alike(base_value(made), value):
            owner.met_old_form = True
        return made

    def validate(self, value: Any, owner: Owner) -> Any:
        self.dump(value, owner)
        return value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        dumped = base_value(value)
        if alike(dumped, stored):
            return stored
        if not alike(base_value(self._made(dumped)), dumped):
            raise altered(self.text)
        return dumped

    def _made(self, value: Any) -> Any:
        try:
            return self._cls(value)
        except OSError:  # see unmade()
            raise
        except Exception as error:
            raise unmade(self.text, error) from None


class Foreign(FieldType):
    """Instances of any other class: kept by reference in memory, and for a store that serialises
    brought in by its Codec."""

    def __init__(self, cls: type) -> None:
        isinstance(None, cls)  # a protocol that cannot be asked raises TypeError here
        self.text = cls.__name__
        self.dumped = frozenset((cls,))
        self._cls: Final = cls

    def fits(self, value: Any) -> bool:
        return isinstance(value, self._cls)

    fits_dumped = fits

    def is_stored_like(self, other: FieldType) -> bool:
        return any(issubclass(cls, self._cls) for cls in other.dumped)

    def load(self, value: Any, owner: Owner) -> Any:
        return containers.load(self.validate(value, owner), owner)

    def validate(self, value: Any, owner: Owner) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        return value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        return containers.dump(self.validate(value, owner), stored, owner)


class Constrained(FieldType):
    """`Annotated[int, msgspec.Meta(ge=0)]`: a field type and what msgspec says of its values."""

    def __init__(self, inner: FieldType, annotation: Any) -> None:
        self.text = inner.text
        self.inner = (inner,)
        self._inner: Final = inner
        self._annotation: Final = annotation
        with suppress(MismatchError):
            self._check(None)  # raises TypeError for constraints that the type cannot have

    def _check(self, dumped: Any) -> None:
        if dumped.__class__ is bool:  # which msgspec does not take for an int
            dumped = int(dumped)
        try:
            msgspec.convert(dumped, self._annotation, builtin_types=_BUILTINS)
        except msgspec.ValidationError as error:
            said = str(error).partition(" - at ")[0]  # it names no values, but its own path
            expected = said.removeprefix("Expected ").replace("`", "")
            raise MismatchError(expected, f"another {self.text}") from None

    def finish(self) -> None:
        self.dumped = self._inner.dumped

    def fits(self, value: Any) -> bool:
        return self._inner.fits(value)

    def load(self, value: Any, owner: Owner) -> Any:
        live = self._inner.load(value, owner)
        self._check(value)
        return live

    def validate(self, value: Any, owner: Owner) -> Any:
        validated = self._inner.validate(value, owner)
        self.dump(validated, owner)
        return validated

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        dumped = self._inner.dump(value, owner, stored)
        self._check(dumped)
        return dumped


_BUILTINS: Final = tuple(ATOMS - {type(None), bool, int, float, str})
