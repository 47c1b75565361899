"""What a field type is: the meaning of a declared type for the values of a field.

A field type has the three verbs that containers.py has for values of any type, and checks the type
on the way: `load` makes of a dumped value what the type declares, `validate` looks at a value that
is assigned, `dump` makes plain containers again. An instance of a declared class is dumped as a
dict of its attributes, so that the store stays readable and a change inside it is found as one
inside a dict is. A field type knows values; it knows no session, and how a type is written only
`annotations`.

msgspec.convert would have been the other way to do it. It takes a list for a tuple and 1 for 1.0,
refuses types that the store keeps apart well (`A | B`, `str | datetime`, `list | set`), passes
instances without a look inside, makes its own containers of ours, and puts values into its errors.
It checks what it knows best, the constraints of `Annotated[..., msgspec.Meta(...)]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

from session_sync.session import containers
from session_sync.session.containers import (
    ATOMS,
    MISSING,
    Owner,
    SessionDict,
    SessionList,
    SessionSet,
)
from session_sync.storages.places import path, step


class MismatchError(Exception):
    """A value that is not of its declared type. Each level that it passes adds its step."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected: Final = expected
        self.found: Final = found
        self.steps: Final[list[str]] = []

    def place(self, field: str) -> str:
        """Where in the session the value is, which lies in the field of this name."""
        return path([*self.steps, step(field)])


class FieldType(ABC):
    """The values of one declared type.

    `text` is how the type is written in messages. Values of the classes in `atoms` need no look at
    all. `dumped` are the classes that its dumped values have, `inner` the field types of what is
    inside, and `is_changed` says that a value is dumped as one of another class."""

    text: str
    atoms: frozenset[type] = frozenset()
    dumped: frozenset[type] = frozenset()
    inner: Sequence[FieldType] = ()
    is_changed = False

    def finish(self) -> None:  # noqa: B027 (most have nothing to look at)
        """Look at what is inside, once all types are read that lead back to one another.

        Raises TypeError for values that the store could not keep apart.
        """

    @abstractmethod
    def fits(self, value: Any) -> bool:
        """Whether a live value may be of this field type, by its class."""

    def fits_dumped(self, value: Any) -> bool:
        """Whether a dumped value may be of this field type, by its class."""
        return value.__class__ in self.dumped

    @abstractmethod
    def load(self, value: Any, owner: Owner) -> Any:
        """The live value of a dumped one; raises MismatchError."""

    @abstractmethod
    def validate(self, value: Any, owner: Owner) -> Any:
        """`value`, on its way into a session: the same object, or a fresh copy of what comes out
        of another session; raises MismatchError."""

    @abstractmethod
    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        """The dumped value of a live one: `stored` itself, if it says the same; raises
        MismatchError."""

    def is_stored_like(self, other: FieldType) -> bool:
        """Whether a dumped value of one may be taken for one of the other."""
        return bool(self.dumped & other.dumped)

    def covers(self, value: Any) -> bool:
        """Whether a dumped value has nothing in it that this field type would leave out."""
        return True

    def mismatch(self, value: Any) -> MismatchError:
        """The error that `value` is of another class."""
        found = _NAMES.get(type(value), type(value).__name__)
        return MismatchError(self.text, f"another {found}" if found == self.text else found)


_NAMES: Final[Mapping[type, str]] = {SessionDict: "dict", SessionList: "list", SessionSet: "set"}


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same for the store: of the same class and value throughout."""
    if one is other:
        return True
    if one.__class__ is not other.__class__:
        return False
    if isinstance(one, dict):
        return alike(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if one.__class__ in _NOT_BY_REPR:
        return bool(one == other)
    return repr(one) == repr(other)  # which tells 1.0 from 1.00, and the zones of one moment


_NOT_BY_REPR: Final = frozenset((str, int, bool, bytes, set, frozenset))


class AnyType(FieldType):
    """Values of any type: those of a field that is not declared, or declared as `Any`."""

    text = "Any"

    def __init__(self) -> None:
        self.atoms = ATOMS  # which is found sooner in the object than in its class

    def fits(self, value: Any) -> bool:
        return True

    def fits_dumped(self, value: Any) -> bool:
        return True

    def load(self, value: Any, owner: Owner) -> Any:
        return containers.load(value, owner)

    def validate(self, value: Any, owner: Owner) -> Any:
        return containers.validate(value, owner)

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        return containers.dump(value, stored, owner)


ANY: Final = AnyType()


def unmade(text: str, error: Exception) -> MismatchError:
    """The error that an object cannot be made. What its class has said may contain a value.

    For all that a class of the program raises, but an OSError, which is no word on the value: a
    TimeoutError may be that of a signal handler.
    """
    return MismatchError(text, f"what it cannot be made from ({type(error).__name__})")


def altered(text: str) -> MismatchError:
    """The error that an object would be made again as something else."""
    return MismatchError(text, "what would come back as something else")
