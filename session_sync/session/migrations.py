"""Sessions of older versions of a program: brought up to date when they are loaded.

A session's version is stored with it, under `$version`; one without is of version 1, so that a bot
can begin without any. This module knows records; it knows no session, no scope and no storage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from ..errors import (
    SessionMigrationError,
    SessionTypeError,
    SessionVersionError,
)
from ..storages.base import Record, record_of
from .containers import Owner, dump
from .declarations import Schema
from .metadata import (
    VERSION,
    Timers,
    checked_name,
    is_field,
    metadata_of,
    version_of,
    with_timers,
    without_fields,
)
from .types.base import MismatchError

#: Is given the fields as they are stored, in a dict that it may change; returns None, or others.
Migration: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Any] | None]


class Migrations:
    """The way from each version of a session to the one that this program knows.

    Raises TypeError and ValueError for steps that cannot be, which were given `where`.
    """

    def __init__(self, steps: Mapping[int, Migration], where: str) -> None:
        if not isinstance(steps, Mapping):
            raise TypeError(
                f"{where} must be a mapping, {{2: function}}, not {type(steps).__name__}"
            )
        for number, migrate in steps.items():
            _check_step(number, migrate, where)
        missing = sorted(set(range(2, max(steps, default=1))) - set(steps))
        if missing:
            raise ValueError(
                f"{where} has number {max(steps)} and no number {missing[0]}: there has to be one "
                f"for each version from 2 on. One that changes nothing is "
                f"{{{missing[0]}: lambda fields: None}}"
            )
        self._steps: Final = sorted(steps.items())
        self.version: Final = max(steps, default=1)

    def are_done(self, record: Record) -> bool:
        """Whether a record is of the version of this program."""
        if VERSION not in record:
            return self.version == 1
        version = record[VERSION]
        return version.__class__ is int and self.version == version

    def newest(self, key: str, record: Record, schema: Schema) -> Record:
        """An older `record` in the version of this program.

        Raises SessionVersionError for a newer one, SessionMigrationError if a step fails, and
        SessionTypeError if a declared field has not its type after the last step.
        """
        version = version_of(record, key)
        if version > self.version:
            raise SessionVersionError(
                f"session {key!r} was stored by a newer program: it is of version {version}, and "
                f"the newest that is known here is {self.version}. It is left as it is; run the "
                f"newer program, or give this one the migrations up to {version}."
            )
        timers = Timers(record, key)
        expired = timers.all_expired()
        for name in expired:  # a step may set a field of the same name
            timers.drop(name)
        fields: Mapping[str, Any] = {
            name: dump(value)
            for name, value in record.items()
            if is_field(name) and name not in expired
        }
        if not fields:  # as good as not stored, which a step need not expect
            return without_fields(record)
        for number, migrate in self._steps:
            if number > version:
                fields = _migrated(key, number, migrate, dict(fields))
        _check_types(key, fields, schema, self.version)
        if not fields:
            return without_fields(record)
        timers.keep(fields)
        hidden = with_timers(metadata_of(record), timers.to_store())
        return record_of({**fields, **hidden, VERSION: self.version})


def _check_step(number: object, migrate: object, where: str) -> None:
    if type(number) is not int:
        raise TypeError(f"{where}: a version is an int, not {type(number).__name__}")
    if number < 2:
        raise ValueError(
            f"{where} has the number {number}: a session without a version counts as version 1, "
            f"so the first migration is number 2"
        )
    if not callable(migrate) or inspect.iscoroutinefunction(migrate):
        raise TypeError(
            f"{where}[{number}] must be a plain function that gets the stored fields as a dict"
        )


def _migrated(
    key: str, number: int, migrate: Migration, fields: dict[str, Any]
) -> Mapping[str, Any]:
    """What one step makes of `fields`, in plain containers, none of which the migration has."""
    name = getattr(migrate, "__qualname__", type(migrate).__name__)
    subject = f"session {key!r}: the migration to version {number} ({name})"
    try:
        given = migrate(fields)
        result = fields if given is None else given
        if not isinstance(result, Mapping):
            raise TypeError(f"it returned {type(given).__name__}, not a mapping of fields or None")
        return {checked_name(key, name): dump(value) for name, value in result.items()}
    except OSError as error:  # no word on the session: a signal handler's TimeoutError, say
        error.add_note(f"{subject} was interrupted. The stored session is left as it was.")
        raise
    except Exception as error:
        raise SessionMigrationError(
            f"{subject} failed ({type(error).__name__}). The stored session is left as it was."
        ) from error


def _check_types(key: str, fields: Mapping[str, Any], schema: Schema, version: int) -> None:
    for name, value in fields.items():
        if name in schema.field_types:
            try:
                schema.field_types[name].load(value, Owner(key))
            except MismatchError as wrong:
                raise SessionTypeError(
                    f"session {key!r}: after the migration to version {version}, "
                    f"{wrong.place(name)} is {wrong.found}, where {schema.name} declares "
                    f"{wrong.expected}. The stored session is left as it was; migrations give the "
                    f"form in which a value is stored."
                ) from wrong.__cause__
