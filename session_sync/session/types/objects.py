"""The field types of values with named parts: dataclasses, attrs classes, msgspec.Structs,
TypedDicts and pydantic models. Each is dumped as a dict of its parts.

An object is made again by its class, so that what its `__post_init__` sets up is there.

This module knows how objects of each library are made and read; it knows no annotation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import repeat
from operator import contains, is_
from typing import Any, Final, NamedTuple

import msgspec

from session_sync.session import containers
from session_sync.session.containers import (
    ATOMS,
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
from .composites import DictLike, each


class Attribute(NamedTuple):
    """One attribute of an object, or one key of a TypedDict.

    `argument` is what the class calls it when an object is made; None: it does not take it.
    """

    name: str
    field_type: FieldType
    is_required: bool
    argument: str | None = None


def _each(
    verb: str,
    field_types: Mapping[str, FieldType],
    values: Mapping[str, Any],
    owner: Owner,
    stored: Any = MISSING,
) -> dict[str, Any]:
    """What the verb makes of the part of each field type; `values` has all of them."""
    names = list(field_types)
    was = stored if stored.__class__ is dict else {}
    beside = (map(was.get, names, repeat(MISSING)),) if verb == "dump" else ()
    found = map(values.__getitem__, names)
    done = each(verb, field_types.values(), found, owner, lambda index: step(names[index]), *beside)
    return dict(zip(names, done, strict=True))


def _check_complete(attributes: Sequence[Attribute], values: Mapping[str, Any]) -> None:
    for part in attributes:
        if part.is_required and part.name not in values:
            wrong = MismatchError(part.field_type.text, "nothing")
            wrong.steps.append(step(part.name))
            raise wrong


class ObjectOf(FieldType):
    """Instances of a class that says which attributes they have; of a subclass they are refused,
    since they would come back as something else."""

    dumped = frozenset((dict,))
    is_changed = True

    def __init__(self, cls: type[Any], text: str) -> None:
        self.text = text
        self._cls: Final = cls
        self._runs_code: Final = _runs_code(cls)

    def has_attributes(self, attributes: Sequence[Attribute]) -> None:
        """What they are comes later, since the type of one may lead back to this class."""
        self.inner = [part.field_type for part in attributes]
        self._parts = attributes
        self._shapes = {part.name: part.field_type for part in attributes}
        self._names = tuple(self._shapes)
        self._atoms: list[frozenset[type]] | None = None
        self._takes_all = all(part.argument == part.name for part in attributes)

    def fits(self, value: Any) -> bool:
        return value.__class__ is self._cls

    def covers(self, value: Any) -> bool:
        return value.__class__ is dict and value.keys() <= self._shapes.keys()

    def load(self, value: Any, owner: Owner) -> Any:
        if value.__class__ is not dict:
            raise self.mismatch(value)
        is_known = tuple(value) == self._names
        if self._runs_code or not is_known:
            owner.met_old_form = True
        if is_known and self._takes_all and self._are_atoms(value.values()):  # most often
            return self._made(value, {})
        if value and value.keys().isdisjoint(self._shapes):
            raise MismatchError(self.text, "a dict of other names")  # not an object of defaults
        _check_complete(self._parts, value)
        field_types = {
            name: field_type for name, field_type in self._shapes.items() if name in value
        }
        made = self._made_of(_each("load", field_types, value, owner))
        if self._runs_code or len(field_types) < len(
            self._shapes
        ):  # it has made containers of its own
            _own_parts(made, self._names, owner)
        return made

    def validate(self, value: Any, owner: Owner) -> Any:
        given = dict(zip(self._names, self._values(value), strict=True))
        validated = _each("validate", self._shapes, given, owner)
        return value if same(validated.values(), given.values()) else self._made_of(validated)

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        values = self._values(value)
        are_atoms = self._are_atoms(values)
        is_known = stored.__class__ is dict and tuple(stored) == self._names
        if is_known and are_atoms and all(map(is_, values, stored.values())):
            return stored
        dumped = given = dict(zip(self._names, values, strict=True))
        if not are_atoms:
            dumped = _each("dump", self._shapes, given, owner, stored)
            if is_known and same(dumped.values(), stored.values()):
                return stored
        if self._runs_code:  # which may refuse what it has become: then it could not be read again
            self.load(dumped, Owner(""))
        return dumped

    def _values(self, value: Any) -> list[Any]:
        if value.__class__ is not self._cls:
            raise self.mismatch(value)
        try:
            return [getattr(value, name) for name in self._names]
        except AttributeError:
            found = f"a {self.text} of which an attribute was deleted"
            raise MismatchError(self.text, found) from None

    def _are_atoms(self, values: Iterable[Any]) -> bool:
        if self._atoms is None:  # not before all types are read that lead back to one another
            self._atoms = [field_type.atoms for field_type in self.inner]
        return all(map(contains, self._atoms, map(type, values)))

    def _made_of(self, values: dict[str, Any]) -> Any:
        arguments, others = {}, {}
        for part in self._parts:
            if part.name in values:
                if part.argument is None:
                    others[part.name] = values[part.name]
                else:
                    arguments[part.argument] = values[part.name]
        return self._made(arguments, others)

    def _made(self, arguments: dict[str, Any], others: dict[str, Any]) -> Any:
        try:
            made = self._cls(**arguments)
            for name, value in others.items():
                _set(made, name, value)
        except OSError:  # see unmade()
            raise
        except Exception as error:
            raise unmade(self.text, error) from None
        return made


def _runs_code(cls: type[Any]) -> bool:
    """Whether making an instance runs code that may refuse or change what it is given."""
    if any(hasattr(cls, name) for name in ("__post_init__", "__attrs_post_init__")):
        return True
    if hasattr(cls, "__pydantic_validator__"):  # a dataclass of pydantic's
        return True
    if any(field.validator or field.converter for field in getattr(cls, "__attrs_attrs__", ())):
        return True
    code = getattr(cls.__init__, "__code__", None)
    return code is not None and not code.co_filename.startswith(("<string>", "<attrs generated"))


def _own_parts(made: Any, names: Iterable[str], owner: Owner) -> None:
    """Make the containers in an object the session's own."""
    for name in names:
        part = getattr(made, name, None)
        own = _own(part, owner)
        if own is not part:
            _set(made, name, own)


def _set(made: Any, name: str, value: Any) -> None:
    """Set an attribute of an object that may be frozen."""
    if isinstance(made, msgspec.Struct):
        msgspec.structs.force_setattr(made, name, value)
    else:
        object.__setattr__(made, name, value)


class KeysOf(DictLike):
    """A TypedDict. It may have more keys than were declared, as type checkers have it."""

    def __init__(self, cls: type[Any], text: str) -> None:
        self.text = text

    def has_attributes(self, attributes: Sequence[Attribute]) -> None:
        """As those of an object."""
        self.inner = [part.field_type for part in attributes]
        self._parts = attributes
        self._shapes = {part.name: part.field_type for part in attributes}

    def pairs(
        self, verb: str, value: dict[Any, Any], owner: Owner, *stored: dict[Any, Any]
    ) -> Iterable[tuple[Any, Any]]:
        """As the base class says."""
        _check_complete(self._parts, value)
        field_types = {name: self._shapes.get(name, ANY) for name in value}
        return _each(verb, field_types, value, owner, *stored).items()


class ModelOf(FieldType):
    """A pydantic model, which pydantic takes apart, checks and makes again.

    What `model_dump` leaves as an object (a member of an Enum, a Path) is stored as its JSON, if
    pydantic makes the same of that again.
    """

    is_changed = True

    def __init__(self, cls: type[Any]) -> None:
        if "by_name" not in inspect.signature(cls.model_validate).parameters:
            raise TypeError(
                f"{cls.__name__} is a pydantic model: that needs pydantic 2.11 or newer"
            )
        self.text = cls.__name__
        is_root = getattr(cls, "__pydantic_root_model__", False)
        self.dumped = frozenset((*ATOMS, dict, list, set, tuple) if is_root else (dict,))
        self._cls: Final = cls

    def fits(self, value: Any) -> bool:
        return value.__class__ is self._cls

    def load(self, value: Any, owner: Owner) -> Any:
        owner.met_old_form = True  # pydantic fills in and converts what it likes
        # Of a copy: of what it does not know the inside of, it takes the very container.
        return _own(self._made(containers.dump(value)), owner)

    def validate(self, value: Any, owner: Owner) -> Any:
        dumped = self.dump(value, owner)
        return self.load(dumped, owner) if _has_foreign(value, owner) else value

    def dump(self, value: Any, owner: Owner, stored: Any = MISSING) -> Any:
        if not self.fits(value):
            raise self.mismatch(value)
        try:
            dumped = value.model_dump(round_trip=True, by_alias=False, warnings=False)
        except OSError:  # see unmade()
            raise
        except Exception as error:
            found = f"what pydantic cannot take apart ({type(error).__name__})"
            raise MismatchError(self.text, found) from None
        dumped = _plain(dumped)
        if alike(dumped, stored):
            return stored
        if not _alike(self._made(dumped), value):
            raise altered(self.text)
        return dumped

    def _made(self, dumped: Any) -> Any:
        from pydantic import ValidationError

        try:
            return self._cls.model_validate(dumped, by_name=True, by_alias=False)
        except ValidationError as error:
            said = error.errors(include_url=False, include_context=False, include_input=False)[0]
            wrong = MismatchError(self.text, f"what pydantic does not take ({said['type']})")
            wrong.steps.extend(map(step, reversed(said["loc"])))
            raise wrong from None  # pydantic's own words contain the value
        except OSError:  # see unmade()
            raise
        except Exception as error:  # an own validator's
            raise unmade(self.text, error) from None


def _plain(value: Any) -> Any:
    """What `model_dump` made, without any object in it."""
    cls = value.__class__
    if cls in ATOMS:
        return value
    if cls is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if cls in (list, tuple, set, frozenset):
        return cls([_plain(item) for item in value])
    try:
        adapter = _adapter(cls)
        plain = adapter.dump_python(value, mode="json")
        if adapter.validate_python(plain) == value:
            return plain
    except OSError:  # see unmade()
        raise
    except Exception:  # whatever an own serializer or validator raises
        pass
    raise MismatchError("something that a store keeps", cls.__name__)  # a SecretStr, say


@cache
def _adapter(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def is_model(cls: type[Any]) -> bool:
    """Whether this is a pydantic model; a program that has one has imported pydantic."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of a model or a dataclass, as dicts that are its own; None for all else."""
    cls = value.__class__
    if is_model(cls):
        return {**value.__dict__, **(value.__pydantic_extra__ or {})}
    if hasattr(cls, "__dataclass_fields__"):
        return {name: getattr(value, name, None) for name in cls.__dataclass_fields__}
    return None


def _own(value: Any, owner: Owner) -> Any:
    """`value` with all containers in it, also those inside a model, being `owner`'s."""
    cls = value.__class__
    if cls in ATOMS:
        return value
    if cls is dict:
        return owned(
            SessionDict({k: _own(v, owner) for k, v in value.items()}), owner, declared=True
        )
    if cls is list:
        return owned(SessionList([_own(item, owner) for item in value]), owner, declared=True)
    if cls is set:
        return owned(SessionSet(value), owner, declared=True)
    if cls is tuple:
        items = [_own(item, owner) for item in value]
        return value if same(items, value) else tuple(items)
    if is_model(cls):
        for attributes in (value.__dict__, value.__pydantic_extra__ or {}):
            for name, part in attributes.items():
                attributes[name] = _own(part, owner)
    elif hasattr(cls, "__dataclass_fields__"):
        _own_parts(value, cls.__dataclass_fields__, owner)
    return value


def _has_foreign(value: Any, owner: Owner) -> bool:
    """Whether a container of another session lies somewhere in a model."""
    if is_foreign(value, owner):
        return True
    if isinstance(value, dict):
        return any(_has_foreign(item, owner) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_foreign(item, owner) for item in value)
    return _has_foreign(_attributes(value), owner) if _attributes(value) is not None else False


def _is_converted(one: Any, other: Any) -> bool:
    """Whether `one` is what pydantic makes of `other`, which has not been validated yet: a default,
    or what was assigned to an attribute."""
    if isinstance(one, float) and isinstance(other, int):
        return one == other
    if other.__class__ not in ATOMS:
        return False
    with suppress(MismatchError):
        return alike(_plain(one), other)
    return False


def _alike(one: Any, other: Any) -> bool:
    """Whether pydantic has made the same again: models, containers and all else."""
    if isinstance(other, dict) and isinstance(one, dict):
        return alike(list(one), list(other)) and all(map(_alike, one.values(), other.values()))
    if isinstance(other, (list, tuple)) and isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(other, set) and isinstance(one, set):
        return one == other
    if one.__class__ is not other.__class__:
        return _is_converted(one, other)
    attributes = _attributes(other)
    if attributes is not None:
        return _alike(_attributes(one), attributes)
    return bool(one == other) or repr(one) == repr(other)  # nan is not equal to itself
