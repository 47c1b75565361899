"""How a type is written, and which field type that is.

This module knows annotations; what a field type does is known to the others.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, TypeVar

import msgspec

from session_sync.session.containers import ATOMS

from .base import ANY, FieldType
from .composites import DictOf, ListOf, SetOf, TupleOf
from .objects import Attribute, KeysOf, ModelOf, ObjectOf, is_model
from .scalars import Atom, Constrained, Derived, Foreign, Member, OneOf
from .unions import Alias, Union, check_hashable


class Reader:
    """Reads types. It remembers what it has read, since the type of a part may lead back to its
    class; so one is used for one class of sessions."""

    def __init__(self) -> None:
        self._known: Final[dict[Any, FieldType]] = {}
        self._unfinished: Final[list[FieldType]] = []

    def read(self, annotation: Any) -> FieldType:
        """The field type of what is annotated so, ready for use.

        Raises what `field_type` raises, and TypeError for types that the store could not keep
        apart."""
        field_type = self.field_type(annotation)
        made, self._unfinished[:] = list(self._unfinished), []
        for each in made:
            each.finish()
        for each in made:
            check_hashable(each)
        return field_type

    def field_type(self, annotation: Any) -> FieldType:
        """The field type of what is annotated so, which may still lead to one that is being read.

        Raises TypeError if it says of no value whether it is one, and NameError for a name in a
        class's own annotations that is not defined (yet).
        """
        try:
            known = self._known.get(annotation)
        except TypeError as error:
            raise TypeError(f"{annotation!r} has no hash: {error}") from None
        if known is None:
            field_type = self._shape(annotation)
            # What is read meanwhile may have come by here and found it to be known by now.
            known = self._known.setdefault(annotation, field_type)
            self._unfinished.append(known)
        return known

    def _shape(self, annotation: Any) -> FieldType:
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if annotation is Any or annotation is object:
            return ANY
        if annotation is tuple:
            return self._any_tuple(())  # while tuple[()] is empty
        if annotation is None or annotation in ATOMS:
            return Atom(annotation or types.NoneType)
        if isinstance(annotation, TypeVar):
            return self.field_type(annotation.__bound__ or Any)
        if hasattr(annotation, "__supertype__"):  # a NewType
            return self.field_type(annotation.__supertype__)
        if hasattr(annotation, "__value__"):  # `type Lines = list[Line]`
            return self._alias(annotation, origin, args)
        if origin in _FORMS:
            return _FORMS[origin](self, args)
        if origin in _CONTAINERS or annotation in _CONTAINERS:
            return _CONTAINERS[origin or annotation](self, args)
        cls = origin or annotation
        if isinstance(cls, type):
            return self._class(annotation, cls, args)
        raise TypeError(f"{annotation!r} is no type whose values can be told from others")

    def _alias(self, annotation: Any, origin: Any, args: tuple[Any, ...]) -> FieldType:
        text = getattr(origin, "__name__", None) or annotation.__name__
        if args:
            text = f"{text}[{', '.join(self.field_type(arg).text for arg in args)}]"
        alias = self._known[annotation] = Alias(text)
        alias.field_type = self.field_type(
            annotation.__value__ if origin is None else origin.__value__[args]
        )
        return alias

    # -- special forms

    def _annotated(self, args: tuple[Any, ...]) -> FieldType:
        base, *notes = args
        constraints = [note for note in notes if isinstance(note, msgspec.Meta) and _limits(note)]
        if not constraints:
            return self.field_type(base)
        # What is inside has a field type of its own; Annotated[...] takes a tuple of all of it.
        checked: Any = typing.Annotated
        origin = typing.get_origin(base)
        if _FORMS.get(origin) is Reader._union:  # which msgspec does not take as a whole
            kinds = typing.get_args(base)
            none = types.NoneType
            return self._union(
                tuple(kind if kind is none else checked[(kind, *constraints)] for kind in kinds)
            )
        return Constrained(self.field_type(base), checked[(origin or base, *constraints)])

    def _literal(self, args: tuple[Any, ...]) -> FieldType:
        plain = [value for value in args if not isinstance(value, Enum)]
        members = [value for value in args if isinstance(value, Enum)]
        options: list[FieldType] = [
            *([OneOf(plain)] if plain else []),
            *(
                Member(cls, [member for member in members if isinstance(member, cls)])
                for cls in dict.fromkeys(map(type, members))
            ),
        ]
        return options[0] if len(options) == 1 else self._one_of(options)

    def _union(self, args: tuple[Any, ...]) -> FieldType:
        options = list(dict.fromkeys(map(self.field_type, args)))
        return ANY if ANY in options else self._one_of(options)

    def _one_of(self, options: list[FieldType]) -> FieldType:
        union = Union(options)
        self._unfinished.append(union)
        return union

    def _first(self, args: tuple[Any, ...]) -> FieldType:
        return self.field_type(args[0])

    # -- containers

    def _list(self, args: tuple[Any, ...]) -> FieldType:
        return ListOf(self.field_type(*args or (Any,)))

    def _tuple(self, args: tuple[Any, ...]) -> FieldType:
        if len(args) == 2 and args[1] is Ellipsis:
            return TupleOf(self.field_type(args[0]))
        return TupleOf(list(map(self.field_type, args)))

    def _any_tuple(self, args: tuple[Any, ...]) -> FieldType:
        return TupleOf(self.field_type(*args or (Any,)))

    def _set(self, args: tuple[Any, ...]) -> FieldType:
        return SetOf(self.field_type(*args or (Any,)), set)

    def _frozenset(self, args: tuple[Any, ...]) -> FieldType:
        return SetOf(self.field_type(*args or (Any,)), frozenset)

    def _dict(self, args: tuple[Any, ...]) -> FieldType:
        return DictOf(*map(self.field_type, args or (Any, Any)))

    def _sequence(self, args: tuple[Any, ...]) -> FieldType:
        return self._one_of([self._list(args), self._any_tuple(args)])

    def _abstract_set(self, args: tuple[Any, ...]) -> FieldType:
        return self._one_of([self._set(args), self._frozenset(args)])

    # -- classes

    def _class(self, annotation: Any, cls: type[Any], args: tuple[Any, ...]) -> FieldType:
        if issubclass(cls, Enum):
            return Member(cls)
        for base in (str, int, float):
            if issubclass(cls, base):
                return Derived(cls, base)
        if is_model(annotation if isinstance(annotation, type) else cls):
            return ModelOf(annotation)
        text = cls.__name__
        if args:
            text = f"{text}[{', '.join(self.field_type(arg).text for arg in args)}]"
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            return self._named_tuple(annotation, cls, args)
        read_parts = _parts_of(cls)
        if read_parts is None:
            return Foreign(cls)
        kind = KeysOf if read_parts is _of_typed_dict else ObjectOf
        field_type = self._known[annotation] = kind(cls, text)
        attributes = [
            Attribute(name, self.field_type(note), is_required, argument)
            for name, note, is_required, argument in read_parts(cls, _hints(cls, args))
        ]
        field_type.has_attributes(attributes)
        if kind is ObjectOf:
            _check_can_be_made(cls, attributes)
        return field_type

    def _named_tuple(self, annotation: Any, cls: type[Any], args: tuple[Any, ...]) -> FieldType:
        field_type = self._known[annotation] = TupleOf([], cls)
        hints = _hints(cls, args)
        field_type.inner = [self.field_type(hints.get(name, Any)) for name in cls._fields]
        return field_type


_Read = Callable[[Reader, tuple[Any, ...]], FieldType]
_FORMS: Final[Mapping[Any, _Read]] = {
    typing.Annotated: Reader._annotated,
    typing.Literal: Reader._literal,
    typing.Union: Reader._union,
    types.UnionType: Reader._union,
    typing.Final: Reader._first,
}
_CONTAINERS: Final[Mapping[Any, _Read]] = {
    list: Reader._list,
    tuple: Reader._tuple,
    set: Reader._set,
    frozenset: Reader._frozenset,
    dict: Reader._dict,
    abc.Sequence: Reader._sequence,
    abc.MutableSequence: Reader._list,
    abc.Set: Reader._abstract_set,
    abc.MutableSet: Reader._set,
    abc.Mapping: Reader._dict,
    abc.MutableMapping: Reader._dict,
}


def _limits(note: msgspec.Meta) -> bool:
    """Whether it says anything of the values."""
    names = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz")
    return any(getattr(note, name) is not None for name in names)


# -- what a class says of its parts: name, type, whether it has no default, name as an argument

_Found = list[tuple[str, Any, bool, str | None]]
_Hints = dict[str, Any]


def _of_dataclass(cls: Any, hints: _Hints) -> _Found:
    missing = dataclasses.MISSING
    return [
        (
            field.name,
            hints[field.name],
            field.init and field.default is missing and field.default_factory is missing,
            field.name if field.init else None,
        )
        for field in dataclasses.fields(cls)
    ]


def _of_attrs(cls: Any, hints: _Hints) -> _Found:
    nothing = sys.modules["attr"].NOTHING
    return [
        (
            field.name,
            hints.get(field.name, field.type or Any),
            field.init and field.default is nothing,
            field.alias if field.init else None,
        )
        for field in cls.__attrs_attrs__
    ]


def _of_struct(cls: Any, hints: _Hints) -> _Found:
    return [
        (field.name, hints[field.name], field.required, field.name)
        for field in msgspec.structs.fields(cls)
    ]


def _of_typed_dict(cls: Any, hints: _Hints) -> _Found:
    found: _Found = []
    for name, note in hints.items():
        is_required = name in cls.__required_keys__  # not if it says so in an annotation in quotes
        while (form := getattr(typing.get_origin(note), "_name", None)) in _QUALIFIERS:
            is_required = _QUALIFIERS.get(form) or (is_required and form == "ReadOnly")
            (note,) = typing.get_args(note)
        found.append((name, note, is_required, None))
    return found


# By name, since those of typing_extensions are others.
_QUALIFIERS: Final = {"Required": True, "NotRequired": False, "ReadOnly": False}


def _parts_of(cls: type[Any]) -> Callable[[Any, _Hints], _Found] | None:
    if hasattr(cls, "__required_keys__") and hasattr(cls, "__total__"):  # of whichever library
        return _of_typed_dict
    if issubclass(cls, msgspec.Struct):
        return _of_struct
    if dataclasses.is_dataclass(cls):
        return _of_dataclass
    return _of_attrs if hasattr(cls, "__attrs_attrs__") else None


def _check_can_be_made(cls: type[Any], attributes: list[Attribute]) -> None:
    arguments = {part.argument: None for part in attributes if part.argument is not None}
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"a {cls.__name__} cannot be made again from what is stored of it, its attributes: "
            f"{error}"
        ) from None


def _hints(cls: Any, args: tuple[Any, ...]) -> _Hints:
    """The types of the attributes of a class, which may be generic (`Page[Item]`)."""
    arguments = type_arguments(cls, args)
    # A TypedDict has the annotations of its bases for its own.
    values = {name: value for known in arguments.values() for name, value in known.items()}
    owners = {
        name: base
        for base in reversed(getattr(cls, "__mro__", (cls,)))
        for name in inspect.get_annotations(base)
    }
    return {
        name: filled(note, {**values, **arguments.get(owners.get(name), {})})
        for name, note in typing.get_type_hints(cls, include_extras=True).items()
    }


def type_arguments(cls: Any, args: tuple[Any, ...] = ()) -> dict[Any, dict[Any, Any]]:
    """What the type variables of a class, and of each of its bases, stand for."""
    found = {cls: dict(zip(getattr(cls, "__parameters__", ()), args, strict=False))}
    for base in getattr(cls, "__mro__", (cls,)):
        for generic in base.__dict__.get("__orig_bases__", ()):
            origin = typing.get_origin(generic)
            if isinstance(origin, type):
                given = [filled(arg, found.get(base, {})) for arg in typing.get_args(generic)]
                names = getattr(origin, "__parameters__", ())
                found.setdefault(origin, dict(zip(names, given, strict=False)))
    return found


def filled(note: Any, values: dict[Any, Any]) -> Any:
    """`note` with the type variables in it replaced by what they stand for."""
    if isinstance(note, TypeVar):
        return values.get(note, note)
    names = getattr(note, "__parameters__", ())
    if isinstance(note, type) or not names:
        return note
    return note[tuple(values.get(name, name) for name in names)]
