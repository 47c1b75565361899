"""What a class of sessions declares: its fields, their types and defaults.

A class is looked at when it is made, and its types are read as soon as all of their names are
defined: then, or when the first SessionManager needs them. This module knows how classes are
written; it knows no session and no store.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Final, NamedTuple

from .containers import MISSING, Owner
from .types.annotations import Reader, filled, type_arguments
from .types.base import ANY, FieldType, MismatchError


class Default(NamedTuple):
    """What a field is while it is not stored: a dumped value, or what a factory makes."""

    dumped: Any
    factory: Callable[[], Any] | None


class Schema:
    """The fields of one class of sessions.

    `field types` has a field type for each declared field, and `other` is the one of all other
    names; None: there are no others. `defaults` are of the fields that every session has, and
    `version` is that of the program. `in_hand` is for the sessions: what all of them may have of a
    default that cannot change."""

    __slots__ = ("defaults", "field_types", "in_hand", "name", "other", "version")

    def __init__(
        self,
        name: str,
        field_types: Mapping[str, FieldType],
        defaults: Mapping[str, Default],
        other: FieldType | None,
        version: int = 1,
    ) -> None:
        self.name: Final = name
        self.field_types: Final = field_types
        self.defaults: Final = defaults
        self.in_hand: Final[dict[str, Any]] = {}
        self.other: Final = other
        self.version: Final = version

    def of_version(self, version: int) -> Schema:
        """The same fields in a program of another version."""
        return Schema(self.name, self.field_types, self.defaults, self.other, version)


_PACKAGE: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep

#: Of a class that declares nothing.
NO_SCHEMA: Final = Schema("Session", {}, {}, ANY)


class Declared(NamedTuple):
    """One annotated attribute: its annotation and default, its class, and the names around that."""

    note: Any
    default: Any
    owner: type[Any]
    names: dict[str, Any]


def declared_by(cls: type[Any], inherited: Mapping[str, Declared]) -> dict[str, Declared]:
    """The fields that a class of sessions declares itself.

    Raises TypeError for one that bears the name of something else in its sessions.
    """
    names, local_names = _names_around(cls)
    inside = {name: value for name, value in vars(cls).items() if isinstance(value, type)}
    found = {}
    for name, note in _annotations(cls).items():
        note = _resolved(note, names, local_names, inside)
        default = cls.__dict__.get(name, MISSING)
        if default is MISSING and name in inherited:
            default = inherited[name].default
        if name.startswith("_") or _is_constant(note, default):
            continue
        if name not in inherited and hasattr(super(cls, cls), name):
            raise TypeError(
                f"{cls.__name__}.{name}: a field cannot be called {name!r}, since every session "
                f"has something else of that name; choose another one, or do not declare it and "
                f"write session[{name!r}]"
            )
        found[name] = Declared(note, default, cls, names)
    for name in inherited.keys() & cls.__dict__.keys() - found.keys():
        found[name] = inherited[name]._replace(default=cls.__dict__[name])  # a default of its own
    for name, declared in found.items():
        if hasattr(declared.default, "__get__"):
            raise TypeError(
                f"{cls.__name__}.{name}: a field and something else ({type(declared.default)}) "
                f"have the same name; choose another one for the latter"
            )
    return found


def _is_constant(note: Any, default: Any) -> bool:
    """Whether an attribute is no field: a ClassVar, or Final with a value."""
    form = typing.get_origin(note) or note
    if isinstance(note, str):  # what it names is not defined yet, or for type checkers alone
        head = _HEAD.match(note)
        form = {"ClassVar": ClassVar, "Final": Final}.get(head[1]) if head else None
    return form is ClassVar or (form is Final and default is not MISSING)


_HEAD: Final = re.compile(r"(?:\w+\.)*(\w+)")


def read(cls: type[Any], declared: Mapping[str, Declared], other: FieldType | None) -> Schema:
    """The schema of what a class and its bases have declared.

    Raises TypeError for a type that says of no value whether it is one, and for a default of
    another type; NameError or AttributeError while a name in an annotation is not defined.
    """
    reader, arguments = Reader(), type_arguments(cls)
    field_types, defaults = {}, {}
    for field, (note, default, owner, names) in declared.items():
        try:
            note = filled(_evaluated(note, names, {}), arguments.get(owner, {}))
            field_types[field] = reader.read(note)
            made = _default(default)
            if made is not None and made.factory is None:
                made = _dumped(made.dumped, field_types[field])
            if made is not None:
                defaults[field] = made
        except TypeError as error:
            raise TypeError(f"{cls.__name__}.{field}: {error}") from error
        except MismatchError as wrong:
            raise TypeError(
                f"{cls.__name__}.{field}: its default does not have the declared type: "
                f"{wrong.place(field)} has to be {wrong.expected}, not {wrong.found}"
            ) from None
    return Schema(cls.__name__, field_types, defaults, other)


def _default(value: Any) -> Default | None:
    """What was written behind the equals sign of a field."""
    if value is MISSING:
        return None
    if not isinstance(value, dataclasses.Field):
        return Default(value, None)
    plain = dataclasses.field()
    for option in ("init", "repr", "hash", "compare", "kw_only"):
        if getattr(value, option) is not getattr(plain, option):
            raise TypeError(
                f"field({option}=...) means nothing for a session, whose fields have a default or "
                f"a default_factory"
            )
    if value.default_factory in (list, dict, set):
        return Default(value.default_factory(), None)  # the same each time
    if value.default_factory is not dataclasses.MISSING:
        return Default(MISSING, value.default_factory)
    return None if value.default is dataclasses.MISSING else Default(value.default, None)


def _dumped(value: Any, field_type: FieldType) -> Default:
    """A default of which nothing can be changed; raises MismatchError."""
    owner = Owner("")
    dumped = field_type.dump(value, owner)
    if owner.met_object:  # which is kept by reference: one for each session
        return Default(MISSING, functools.partial(copy.deepcopy, value))
    return Default(dumped, None)


# -- annotations, which may be strings, and name what is defined only later


def _annotations(cls: type[Any]) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF)
    return inspect.get_annotations(cls)


def _names_around(cls: type[Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The global and the local names where the class statement stands that is just being run."""
    frame = inspect.currentframe()
    while frame is not None and (
        frame.f_globals.get("__name__") != cls.__module__
        or frame.f_code.co_filename.startswith(_PACKAGE)
    ):
        frame = frame.f_back
    if frame is None:  # made by other code on behalf of a module
        return getattr(sys.modules.get(cls.__module__), "__dict__", {}), {}
    return frame.f_globals, frame.f_locals if "<locals>" in cls.__qualname__ else {}


def _resolved(note: Any, names: dict[str, Any], *local_names: Mapping[str, Any]) -> Any:
    """The type that an annotation is, or the annotation as it is, if a name is still missing."""
    for more in local_names:
        with suppress(NameError, AttributeError):
            return _evaluated(note, names, more)
    return note


def _evaluated(note: Any, names: dict[str, Any], local_names: Mapping[str, Any]) -> Any:
    holder = type("holder", (), {"__annotations__": {"note": note}})
    return typing.get_type_hints(holder, names, dict(local_names), include_extras=True)["note"]
