"""What a handler holds: a session that reads and writes like a plain object.

A session knows its fields and whether they changed; how it is locked, loaded and saved is its
scope's business, which it knows only as the few calls of `Lifecycle`.
"""

from __future__ import annotations

import inspect
from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol, Self
from weakref import ref

from ..errors import SessionClosedError, SessionTypeError
from ..storages.base import Check, Record, only, patched, record_of, reread
from ..storages.places import path, place_of, step
from .containers import ATOMS, MISSING, NOBODY, ZONED, Owner
from .declarations import NO_SCHEMA, Declared, Schema, checked_name, declared_by, is_field, read
from .dedupe import UPDATES, updates_in, without_fields
from .migrations import VERSION, Migration, Migrations
from .ttl import TIMERS, Deadline, Timers, Ttl, deadline_in, is_over
from .types.base import ANY, FieldType, MismatchError

_NO_NAMES: Final[frozenset[str]] = frozenset()
_NOTHING: Final[dict[str, Any]] = {}  # nobody changes it


class Lifecycle(Protocol):
    """What a session asks of its scope."""

    @property
    def is_loaded(self) -> bool: ...
    @property
    def tracker(self) -> ChangeTracker | None: ...  # from loading on
    def load(self) -> None: ...
    async def aload(self) -> None: ...
    def flush(self) -> None: ...
    async def aflush(self) -> None: ...
    def release(self) -> None: ...
    async def arelease(self) -> None: ...


class FieldState:
    """What stands in `ChangeTracker.loaded` for a field of which more is to be known than its
    value.

    `value` is what the handler has of it, and `dumped` what that would be stored as if it had not
    been touched, where the record has something else: a field of an old form, or a default, which
    is not stored at all until it is changed (`is_generated`: or anything else is, since a factory
    made it). `deadline` is when the field disappears. `is_deleted`: it was deleted, or its time is
    up; a default that was read since then is in `defaults`, of which the first one counts,
    whichever thread has brought it. `ready` is what a handler gets without a further look, if it is
    known. `is_opaque`: there is an object in it whose changes nobody would notice, so that it is
    always saved, or (False) never for that reason; None: if one is found in it later.

    What changes of this changes once and for good, so that no thread can undo what another one has
    done: `is_deleted` becomes true, `ready` the default, and `dumped` MISSING when the record has
    got the value."""

    __slots__ = (
        "deadline",
        "defaults",
        "dumped",
        "is_default",
        "is_deleted",
        "is_generated",
        "is_opaque",
        "ready",
        "value",
    )

    def __init__(
        self,
        value: Any = MISSING,
        dumped: Any = MISSING,
        deadline: Deadline | None = None,
        is_opaque: bool | None = None,
    ) -> None:
        self.value: Final = value
        self.ready = value if deadline is None else MISSING
        self.dumped = dumped
        self.deadline: Final = deadline
        self.is_deleted = value is MISSING
        self.is_opaque: Final = is_opaque
        self.is_default = self.is_generated = False
        self.defaults: list[FieldState] = []

    def give_default(self, default: FieldState) -> Any:
        """What a handler gets of a field that is gone: `default`, if it is the first one."""
        self.defaults.append(default)
        self.ready = self.defaults[0].value
        return self.ready

    def current(self) -> FieldState | None:
        """What the handler has of the field: this, or a default, or nothing."""
        if not self.is_deleted:
            return self
        return self.defaults[0] if self.defaults else None


def _is_absent(current: FieldState | None) -> bool:
    """Whether a field of which the handler has this is not stored, nor will be as it is."""
    return current is None or (current.is_default and current.dumped is not MISSING)


class ChangeTracker:
    """The fields of one open session: what was stored, and over it what the handler has in hand.

    `committed` is what the store has, and `record` what it should have had since the last flush:
    the same one, unless that flush failed or the session was just migrated. Of its fields only
    those that a handler asked for are loaded, into `loaded`; there is also what it has assigned,
    and for what it has deleted a Held that says so. So a session of a thousand fields costs what
    its handler touches, not a thousand.

    Why nothing is lost when one thread flushes what another one is just changing, without a lock.
    Each change of a field is one store into `loaded`, from which no name is ever removed: a
    deletion is stored there too, and a timer together with its value. What is to be written is not
    noted but found, by comparing a copy of `loaded` with `record`; for values that cannot change,
    that means: is it the very same object? So a change is in the copy, and then in the record that
    is made of it, or it is not, and then it differs from that record, and the next flush finds it.
    No flush clears anything in which a change could be that came meanwhile. The marks in `assigned`
    decide only two things that a comparison cannot find: that the very value which is stored was
    assigned once more, and where the name is in the order (a mark has what stood for the deletion
    before, if there was one: the name is at the end now). A mark is made after its value is there,
    and a flush moves the marks to `marks`, where they stay until it has succeeded, before it copies
    the values. So a mark that it has moved has its value in the copy, and one that comes later
    costs a second write of the same value at worst. Where a read brings something in (a loaded
    field, a default, or that the time of a field is up), it does so by a step that leaves alone
    what another thread has brought in meanwhile: `setdefault`, `append`, or a flag that is never
    taken back.

    `opaque` are the values with an object in them whose changes nobody would notice, as far as that
    was found at a flush, so that they are always saved; `tainted` the names of fields with objects
    that a failed handler may have changed, which are saved only if they are assigned. `timers` are
    the deadlines that `record` has; None, as long as there was none.

    `check` is what the store says of a value that is assigned.

    `lost` says what kept the last changes from being stored, if anything did.

    `updates` are the numbers of updates that are to be stored at the end, if any, with whatever the
    handler has changed. `initial_record` is the record of a session that has only what `initial`
    gave it: as long as the fields are still those, nothing of it is stored. What the class declares
    stands in `schema`; a default that a factory has made is stored together with whatever changes
    first."""

    __slots__ = (
        "__weakref__",
        "_owners",
        "assigned",
        "check",
        "committed",
        "flushed",
        "initial_record",
        "key",
        "loaded",
        "lost",
        "marks",
        "moved",
        "opaque",
        "open",
        "schema",
        "tainted",
        "timers",
        "updates",
    )

    def __init__(
        self,
        key: str,
        record: Record,
        schema: Schema = NO_SCHEMA,
        check: Check | None = None,
    ) -> None:
        self.key = key
        self.schema = schema
        self.check = check
        self.open = True
        self.lost = ""
        self._owners: list[Owner] = []  # from the first container on; the first one counts
        self.tainted = _NO_NAMES
        self.opaque: Mapping[str, Any] = _NOTHING
        self.flushed = self.committed = record
        self.loaded: dict[str, Any] = {}
        self.updates: list[int] | None = None
        self.initial_record: Record | None = None
        self.assigned: dict[str, FieldState | None] = {}
        self.marks: dict[str, FieldState | None] = _NOTHING
        self.moved = False  # whether any mark has ever had something
        self.timers: Mapping[str, Deadline] | None = (
            Timers(record[TIMERS], key).to_store() if TIMERS in record else None
        )

    @property
    def owner(self) -> Owner:
        """Whom the containers belong to that these fields hand out."""
        owners = self._owners
        if not owners:
            owners.append(Owner(self.key, self.check, _PlaceOf(self)))
        if not self.open:  # closed before it could be found there
            owners[0].open = False
        return owners[0]

    def close(self) -> None:
        """Nothing may change any more, in no container either."""
        self.open = False
        if self._owners:
            self._owners[0].open = False

    # -- the handler's side

    def get(self, name: str) -> Any:
        """The value of a field; raises KeyError, and SessionTypeError if it is stored as something
        else than was declared."""
        loaded = self.loaded
        if name in loaded:
            value = loaded[name]
            if value.__class__ is not FieldState:
                return value
            ready = value.ready
            return ready if ready is not MISSING else self._value_of(name, value)
        timers = self.timers
        if timers and is_over(timers.get(name)):
            return self._value_of(name, self._expired(name))
        try:
            value = self.flushed[name]
        except KeyError:
            return self._default(name, None)
        schema = self.schema
        field_type = schema.field_types.get(name, schema.other)
        if field_type is None or (
            "$" in name and name.startswith("$")
        ):  # the first is a fifth of both
            raise KeyError(name)
        if value.__class__ in field_type.atoms:
            return value
        return self._load(name, value, field_type)

    def _value_of(self, name: str, value: Any) -> Any:
        """What a handler gets of what is in `loaded`."""
        if value.__class__ is not FieldState:
            return value
        if not self._is_deleted(name, value):
            return value.value
        return self._default(name, value) if value.ready is MISSING else value.ready

    def _is_deleted(self, name: str, held: FieldState) -> bool:
        """Whether a field was deleted, or its time is up, which is noted: then it stays so."""
        if not held.is_deleted and is_over(held.deadline):
            self.assigned.pop(name, None)
            held.is_deleted = True
        return held.is_deleted

    def _expired(self, name: str) -> Any:
        """Note that the time of a stored field is up, unless it is in `loaded`; what is there
        now."""
        return self.loaded.setdefault(name, FieldState())

    def _default(self, name: str, gone: FieldState | None) -> Any:
        """The default of a field that is not there (`gone`, if that stands in `loaded`)."""
        default = self.schema.defaults.get(name)
        if default is None:
            raise KeyError(name)
        field_type, dumped = self.schema.field_types[name], default.dumped
        if default.factory is not None:
            dumped = self._dump(name, self._generated(name, default.factory), MISSING, field_type)[
                0
            ]
        elif dumped.__class__ in field_type.atoms:
            return self._atom(name, dumped, gone)
        value, untouched, is_opaque = self._loaded(name, dumped, field_type)
        held = FieldState(value, dumped if untouched is MISSING else untouched, is_opaque=is_opaque)
        held.is_default, held.is_generated = True, default.factory is not None
        if gone is not None:
            return gone.give_default(held)
        return self._value_of(name, self.loaded.setdefault(name, held))

    def _atom(self, name: str, default: Any, gone: FieldState | None) -> Any:
        """A default that cannot change, so that all sessions may have the same Held for it."""
        if gone is None:
            held = self.schema.in_hand.get(name)
            if held is None:
                held = FieldState(default, default)
                held.is_default = True
                self.schema.in_hand[name] = held
            self.loaded.setdefault(name, held)
        return default

    def _generated(self, name: str, factory: Callable[[], Any]) -> Any:
        try:
            return factory()
        except (LookupError, AttributeError) as error:  # which would say that there is no field
            raise RuntimeError(
                f"session {self.key!r}: the default_factory of {name!r} raised "
                f"{type(error).__name__}"
            ) from error

    def _load(self, name: str, dumped: Any, field_type: FieldType) -> Any:
        """A stored field, in hand from now on."""
        value, untouched, is_opaque = self._loaded(name, dumped, field_type)
        deadline = self.timers.get(name) if self.timers else None
        if untouched is not MISSING or deadline is not None or is_opaque is not None:
            value = FieldState(value, untouched, deadline, is_opaque)
        return self._value_of(name, self.loaded.setdefault(name, value))

    def _loaded(
        self, name: str, dumped: Any, field_type: FieldType
    ) -> tuple[Any, Any, bool | None]:
        """A live value, and `dumped` and `is_opaque` of a Held with it."""
        owner, untouched = self.owner, MISSING
        begun = owner.begin()
        try:
            value = field_type.load(dumped, owner)
            if owner.met_old_form or not owner.is_still_at(begun):
                untouched = field_type.dump(value, owner, dumped)
            met_object = owner.met_object
            if not owner.is_still_at(begun):
                met_object = self._dump(name, value, MISSING, field_type)[1]
        except RecursionError:
            raise owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} is stored as {wrong.found}, where "
                f"{self.schema.name} declares {wrong.expected}. It is left as it is; a migration "
                f"({self.schema.name}.migrations) brings stored sessions into the new form."
            ) from wrong.__cause__
        if value.__class__ in field_type.atoms:  # only what is stored otherwise comes here
            untouched = value
        elif untouched is dumped:
            untouched = MISSING
        return value, untouched, name not in self.tainted if met_object else None

    def set(self, name: str, value: Any) -> None:
        """Assign a field; raises SessionTypeError, SessionEncodeError for what the store would
        refuse, and KeyError for a name that there must not be."""
        if name.__class__ is not str or "$" in name:
            name = checked_name(self.key, name)
        schema, seconds = self.schema, None
        field_type = schema.field_types.get(name, schema.other)
        cls = value.__class__
        if field_type is None or cls not in field_type.atoms or cls in ZONED or not self.open:
            value, seconds = self._validated(name, value)
        if self.timers is not None or seconds is not None:
            value = self._timed(name, value, seconds)
        loaded, assigned = self.loaded, self.assigned
        if name in assigned:
            loaded[name] = value
        else:
            old: Any = loaded.get(name)
            loaded[name] = value
            if old.__class__ is FieldState and old.is_deleted:
                self.moved = True
                assigned[name] = old
            else:
                assigned[name] = None
        if not self.open:  # closed meanwhile, perhaps too soon for this to be saved
            raise self.owner.refuse()

    def _timed(self, name: str, value: Any, seconds: float | None) -> Any:
        """A value that is assigned, with the deadline that it gets: after `seconds` (0: none), or
        (None) as many as before."""
        if self.timers is None:
            self.timers = {}
        before = self._deadline(name)
        if seconds is None and before is not None:
            seconds = before[1]
        return FieldState(value, deadline=deadline_in(seconds)) if seconds else value

    def _deadline(self, name: str) -> Deadline | None:
        """When a field disappears, if it is there and has a timer."""
        held = self.loaded.get(name, MISSING)
        if held is MISSING:
            deadline = self.timers.get(name) if self.timers else None
            if not is_over(deadline):
                return deadline
            held = self._expired(name)
        if held.__class__ is not FieldState or self._is_deleted(name, held):
            return None
        return held.deadline

    def check_all(self, tracker: Mapping[str, Any]) -> None:
        """Raise what assigning one of them would raise."""
        for name, value in tracker.items():
            self._validated(checked_name(self.key, name), value)

    def _validated(self, name: str, value: Any) -> tuple[Any, float | None]:
        """A value that is to be assigned, and its life time, once it has been looked at."""
        if not self.open:
            raise self.owner.refuse()
        field_type = self.schema.field_types.get(name, self.schema.other)
        if field_type is None:
            raise KeyError(
                f"session {self.key!r} has no field {name!r}: {self.schema.name} declares "
                f"{', '.join(self.schema.field_types) or 'none'}"
            )
        seconds = None
        if value.__class__ is Ttl:
            seconds, value = value.seconds, value.value
        try:
            validated = field_type.validate(value, self.owner)
            if self.check is not None and (
                value.__class__ in ZONED or value.__class__ not in ATOMS
            ):
                self.check(field_type.dump(validated, NOBODY), self.key, path([step(name)]))
            return validated, seconds
        except RecursionError:
            raise self.owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} has to be {wrong.expected}, not "
                f"{wrong.found}; nothing was changed"
            ) from wrong.__cause__

    def delete(self, name: str) -> None:
        """Remove a field; raises KeyError."""
        if name not in self:
            raise KeyError(name)
        if not self.open:
            raise self.owner.refuse()
        self._remove(name)

    def clear(self) -> None:
        """Remove all fields."""
        in_hand = [
            name
            for name, value in self.loaded.copy().items()
            if value.__class__ is not FieldState or value.current() is not None
        ]
        names = {*self._stored_names(), *in_hand}
        if names and not self.open:
            raise self.owner.refuse()
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.assigned.pop(name, None)
        self.loaded[name] = FieldState()
        if not self.open:
            raise self.owner.refuse()

    def names(self) -> list[str]:
        """The names of all fields: the declared ones, and then in the order that a dict has."""
        self._note_expired()
        stored, schema = self._stored_names(), self.schema
        if not schema.field_types and schema.other is not None:
            return stored
        present = schema.defaults.keys() | stored
        declared = [name for name in schema.field_types if name in present]
        others = [name for name in stored if name not in schema.field_types]
        return declared if schema.other is None else declared + others

    def _stored_names(self) -> list[str]:
        """The names of what is stored, or will be."""
        marks = {**self.marks, **self.assigned}
        loaded = self.loaded.copy()
        absent = {
            name
            for name, value in loaded.items()
            if value.__class__ is FieldState and _is_absent(value.current())
        }
        at_end = [name for name, gone in marks.items() if gone is not None and name in loaded]
        committed = (
            self._remaining_names({*absent, *at_end})
            if absent or at_end
            else self._remaining_names(())
        )
        new = (name for name in (*marks, *loaded) if name in loaded and name not in absent)
        return list(dict.fromkeys((*committed, *new)))

    def _remaining_names(self, without: Container[str]) -> list[str]:
        return [name for name in self.flushed if name not in without and is_field(name)]

    def _note_expired(self) -> None:
        if self.timers is not None:
            for name, value in self.loaded.copy().items():
                if value.__class__ is FieldState:
                    self._is_deleted(name, value)
            for name, deadline in self.timers.items():
                if is_over(deadline):
                    self._expired(name)

    def __contains__(self, name: Any) -> bool:
        value = self.loaded.get(name, MISSING)
        if value is MISSING and self.timers and is_over(self.timers.get(name)):
            value = self._expired(name)
        is_deleted = value.__class__ is FieldState and self._is_deleted(name, value)
        if name in self.schema.defaults:
            return True
        if value is not MISSING:
            return not is_deleted
        if self.schema.other is None and name not in self.schema.field_types:
            return False
        return is_field(name) and name in self.flushed

    def is_default(self, name: str) -> bool:
        """Whether a field is there only because its class declares it."""
        held = self.loaded.get(name, MISSING)
        if held is MISSING:
            return name not in self.flushed
        if held.__class__ is not FieldState:
            return False
        default = held.current()
        if default is None:
            return True
        if not _is_absent(default):
            return False
        field_type, unchanged = self.schema.field_types[name], default.dumped
        return self._dump(name, default.value, unchanged, field_type)[0] is unchanged

    # -- the scope's side

    def has_had(self, number: int) -> bool:
        """Whether the update of this number was handled before."""
        return number in updates_in(self.flushed, self.key)

    def remember(self, number: int, limit: int) -> None:
        """Store the number of an update at the end, unless its handler fails, and with it those
        that came before, at most `limit` in all."""
        had = updates_in(self.flushed, self.key) if self.updates is None else self.updates
        self.updates = [*(each for each in had if each != number), number][-limit:]

    def take_changes(self) -> Record:
        """The record that is to go into the store, which is taken to succeed: changes count from
        here. It is `committed` if there is nothing to store. One thread at a time may call it, and
        the next one not before what was taken is written.

        Raises SessionEncodeError if a value contains itself, and SessionTypeError if something
        inside one is not of its declared type any more.
        """
        is_last = not self.open  # no mark comes any more that is of use
        # The marks before the values.
        marks = self.assigned if is_last and not self.marks else self._take_marks()
        loaded, record = self.loaded.copy(), self.flushed
        changes, held = self._changes(loaded, marks) if loaded else ({}, {})
        if held or self.timers is not None or self.schema.version > 1 or self.moved:
            record = self._completed(_Found(loaded, marks.copy(), changes, held))
        elif changes:
            record = patched(record, changes)  # the way that copies least
        if record is not self.flushed:
            self.flushed = record
            if self.timers is not None:
                self.timers = record.get(TIMERS, _NOTHING)
            for name in held.keys() & changes.keys() if held else ():
                if (current := held[name]) is not None:
                    current.dumped = MISSING
        self.marks = _NOTHING
        if is_last:
            self.assigned = {}
        if self.updates is not None and is_last:  # not by a flush: the handler may yet fail
            record = self._with_updates(record, self.updates)
        self.committed = record
        return record

    def _take_marks(self) -> dict[str, FieldState | None]:
        """The marks of what was assigned since the last flush that succeeded."""
        assigned = self.assigned
        newest = assigned.copy()
        marks = self.marks = _marks_after(self.marks, newest) if self.marks else newest
        for name, mark in newest.items():
            if (
                assigned.get(name, MISSING) is mark
            ):  # else it has got another one: for the next time
                popped = assigned.pop(name, mark)
                if popped is not mark:
                    assigned.setdefault(name, popped)
        return marks

    def _with_updates(self, record: Record, updates: list[int]) -> Record:
        """What is to be stored at the end; the fields that the handler has had stay as they are."""
        hidden: dict[str, Any] = {UPDATES: updates}
        if self.schema.version > 1:
            hidden[VERSION] = self.schema.version
        return patched(record_of({}) if record is self.initial_record else record, hidden)

    def _changes(
        self, loaded: Mapping[str, Any], marks: Container[str]
    ) -> tuple[dict[str, Any], dict[str, FieldState | None]]:
        """What fields would be stored as, of which the record has something else; and what the
        handler has of those for which a Held stands in `loaded`."""
        changes: dict[str, Any] = {}
        held: dict[str, FieldState | None] = {}
        record, timers, schema = self.flushed, self.timers, self.schema
        field_types, other = schema.field_types, schema.other
        for name, value in loaded.items():
            if value.__class__ is FieldState:
                held[name] = value.current()
                dumped = self._change_of_state(name, held[name], name in marks)
            else:
                is_sure = name in marks or (timers is not None and name in timers)
                field_type: Any = field_types.get(name, other)
                if value.__class__ in field_type.atoms:
                    if is_sure or record.get(name, MISSING) is not value:
                        changes[name] = value
                    continue
                dumped = self._change(name, value, record.get(name, MISSING), is_sure, None)
            if dumped is not MISSING:
                changes[name] = dumped
        return changes, held

    def _change_of_state(self, name: str, current: FieldState | None, is_marked: bool) -> Any:
        if current is None:
            return MISSING
        timers = self.timers or _NOTHING
        is_sure = not current.is_default and (is_marked or timers.get(name) is not current.deadline)
        stored = current.dumped
        if stored is MISSING:
            stored = self.flushed.get(name, MISSING)
        return self._change(name, current.value, stored, is_sure, current.is_opaque)

    def _change(
        self, name: str, value: Any, stored: Any, is_sure: bool, is_opaque: bool | None
    ) -> Any:
        """What a value would be stored as; MISSING, if it need not be."""
        field_type: Any = self.schema.field_types.get(name, self.schema.other)
        dumped = value
        if value.__class__ not in field_type.atoms:
            dumped, met_object = self._dump(name, value, stored, field_type)
            if is_opaque is None:
                is_opaque = self.opaque.get(name, MISSING) is value
                if met_object and not is_opaque:
                    is_opaque = True
                    self.opaque = {**self.opaque, name: value}
        return dumped if is_sure or is_opaque or dumped is not stored else MISSING

    def _completed(self, found: _Found) -> Record:
        """The record with the changes, without what has gone, and with what goes with them:
        defaults that a factory has made, the version and the timers."""
        record, changes = self.flushed, found.changes
        absent = {name for name, current in found.held.items() if _is_absent(current)}
        has_gone = any(map(record.__contains__, absent))
        if changes or ((has_gone or self.is_unsaved) and self._remaining_names(absent)):
            found.add_generated(absent)
        if not changes and not has_gone and record is self.committed:
            return record
        if self.timers is not None:
            absent.update(self._take_timers(found, self.timers))
        if self.schema.version > 1 and VERSION not in record and (changes or record):
            changes[VERSION] = self.schema.version
        at_end = [n for n, gone in found.marks.items() if gone is not None and n in changes]
        changes = found.in_order() if at_end else changes
        last_timer_went = self.timers is not None and TIMERS in record and TIMERS not in changes
        if last_timer_went or any(map(record.__contains__, (*absent, *at_end))):
            return self._rearranged(changes, {*absent, *at_end})
        return patched(record, changes) if changes else record

    def _take_timers(self, found: _Found, timers: Mapping[str, Deadline]) -> Iterable[str]:
        """Add the timers to the changes; returns the names of the fields whose time is up, and
        takes them out of the changes."""
        loaded, held = found.loaded, found.held
        gone = {name for name, at in timers.items() if name not in loaded and is_over(at)}
        for name in gone:
            self._expired(name)
        deadlines = {n: at for n, at in timers.items() if n not in loaded or n in held}
        for name, current in held.items():
            deadline = None
            if current is not None and not current.is_default:
                deadline = current.deadline
                if self._is_deleted(name, current):
                    gone.add(name)
            if deadline is None:
                deadlines.pop(name, None)
            else:
                deadlines[name] = deadline
        for name in gone:
            found.changes.pop(name, None)
            deadlines.pop(name, None)
        if deadlines:
            found.changes[TIMERS] = deadlines
        return gone

    def _rearranged(self, changes: Mapping[str, Any], leaving: Container[str]) -> Record:
        """The record without the fields that are `leaving` their places, and with `changes`."""
        record = self.flushed
        tracker = dict.fromkeys((*self._remaining_names(leaving), *filter(is_field, changes)))
        if not tracker:  # then it is not stored at all, whatever else it has
            return without_fields(record)
        hidden = [name for name in (*record, *changes) if not is_field(name)]
        if TIMERS not in changes:
            hidden = [name for name in hidden if name != TIMERS]
        return only(record, dict.fromkeys((*tracker, *hidden)), changes)

    def _dump(self, name: str, value: Any, stored: Any, field_type: FieldType) -> tuple[Any, bool]:
        """What a value would be stored as, and whether an object was met in it whose changes nobody
        would notice."""
        owner = self.owner
        begun = owner.begin()
        try:
            dumped = field_type.dump(value, owner, stored)
            met_object = owner.met_object
            if not owner.is_still_at(begun):  # another thread's value may have been noted, too
                owner = Owner(self.key)
                dumped = field_type.dump(value, owner, stored)
                met_object = owner.met_object
        except RecursionError:
            raise owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} has become {wrong.found}, where "
                f"{self.schema.name} declares {wrong.expected}; nothing was written"
            ) from wrong.__cause__
        return dumped, met_object

    def not_saved(self, committed: Record) -> None:
        """The store did not take it after all, and still has what was `committed`. What was taken
        stays in `record`, so the next flush writes it, with what has changed since."""
        self.committed = committed

    def check_not_lost(self) -> None:
        """Raises SessionClosedError if the scope has ended without storing the last changes."""
        if self.lost:
            raise SessionClosedError(
                f"session {self.key!r} was closed before flush() could write it, and its last "
                f"changes were not saved ({self.lost}); do what has to be stored again "
                f"in a new scope"
            )

    @property
    def is_unsaved(self) -> bool:
        """Whether the store has something older, whatever the handler does."""
        return self.flushed is not self.committed

    def save_as_it_is(self) -> None:
        """The store has something older, which is to be replaced by the next flush; but not if the
        handler fails."""
        self.flushed = patched(self.flushed, {})

    def roll_back(self) -> None:
        """Back to what the store has; containers handed out so far cannot be changed any more."""
        self.close()
        opaque = {
            name for name, value in self.loaded.copy().items() if self._is_opaque(name, value)
        }
        tainted = self.tainted | opaque  # objects that the failed handler may have changed
        initial_record, lost = self.initial_record is self.committed, self.lost
        ChangeTracker.__init__(self, self.key, reread(self.committed), self.schema)
        self.tainted, self.lost = tainted, lost
        self.initial_record = self.committed if initial_record else None

    def _is_opaque(self, name: str, value: Any) -> bool:
        """Whether there is an object in a field, as far as that was found."""
        current = value.current() if value.__class__ is FieldState else FieldState(value)
        if current is None:
            return False
        return current.is_opaque or self.opaque.get(name, MISSING) is current.value


def _marks_after(
    before: Mapping[str, FieldState | None], marks: Mapping[str, FieldState | None]
) -> dict[str, FieldState | None]:
    """The marks of a flush that failed, and those that came later."""
    first = {name: mark for name, mark in before.items() if marks.get(name) is None}
    return first | {name: mark or first.get(name) for name, mark in marks.items()}


class _Found(NamedTuple):
    """What a flush has found: copies of `loaded` and of the marks, the changes, and what the
    handler has of the fields for which a Held stands in `loaded`."""

    loaded: Mapping[str, Any]
    marks: Mapping[str, FieldState | None]
    changes: dict[str, Any]
    held: Mapping[str, FieldState | None]

    def add_generated(self, absent: Iterable[str]) -> None:
        """Add those defaults that a factory has made."""
        for name in absent:
            current = self.held[name]
            if current is not None and current.is_generated:
                self.changes.setdefault(name, current.dumped)

    def in_order(self) -> dict[str, Any]:
        """The changes in the order in which the fields were assigned."""
        assigned = filter(self.changes.__contains__, self.marks)
        return {name: self.changes[name] for name in dict.fromkeys((*assigned, *self.changes))}


class _PlaceOf:
    """Where a container lies that these fields have handed out: it knows them, and not they it."""

    __slots__ = ("_tracker",)

    def __init__(self, tracker: ChangeTracker) -> None:
        self._tracker: Final = ref(tracker)

    def __call__(self, container: object) -> str:
        tracker = self._tracker()
        loaded = {} if tracker is None else tracker.loaded.copy()
        values = {
            name: value.value if value.__class__ is FieldState else value
            for name, value in loaded.items()
        }
        return place_of(container, values)


class BaseSession(MutableMapping[str, Any]):
    """What `Session` and `StrictSession` have in common: see there."""

    __slots__ = ("__weakref__", "_key", "_lifecycle", "_tracker")

    #: How stored sessions of an older version become those of this class: see `SessionManager`.
    migrations: ClassVar[Mapping[int, Migration]] = {}
    #: Whether a migrated session is stored at once, and not with whatever is written next.
    migrate_eagerly: ClassVar[bool] = False

    # Weak: the block alone keeps its scope. The function around it may keep the session, and if an
    # interrupt comes just before the block is left, its scope has to be collected all the same.
    _lifecycle: Callable[[], Lifecycle | None]
    _key: str
    _tracker: ChangeTracker | None  # from loading on
    _reserved: ClassVar[frozenset[str]]  # what the class itself has: no field by attribute
    _declares: ClassVar[Mapping[str, Declared]] = {}  # the class itself ...
    _declared: ClassVar[Mapping[str, Declared]] = {}  # ... and with its bases
    _schema: ClassVar[Schema | None] = None  # None: not all of its types are defined yet
    _other: ClassVar[FieldType | None] = (
        None  # the field type of names that are not declared, if any
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited: dict[str, Declared] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= base.__dict__.get("_declares", {})
        cls._declares = declared_by(cls, inherited)
        for name in cls._declares:
            setattr(cls, name, _Attribute(name))
        cls._declared = inherited | cls._declares
        for name in cls._declared:
            if not isinstance(inspect.getattr_static(cls, name), _Attribute):
                raise TypeError(
                    f"{cls.__name__}.{name}: one of its bases has a field {name!r}, and another "
                    f"one something else of that name"
                )
        cls._reserved = frozenset(dir(cls)) - cls._declared.keys()
        cls._schema = None
        with suppress(NameError, AttributeError):
            cls._schema = read(cls, cls._declared, cls._other)
        Migrations(cls.migrations, f"{cls.__name__}.migrations")  # a look at them

    def __init__(
        self, lifecycle: Callable[[], Lifecycle | None], key: str, tracker: ChangeTracker | None
    ) -> None:
        _set_lifecycle(self, lifecycle)
        _set_key(self, key)
        _set_fields(self, tracker)

    def _opened(self) -> ChangeTracker:
        """The fields, loaded first if this is a lazy session."""
        tracker = self._tracker
        if tracker is None:
            lifecycle = self._to_load()
            if not lifecycle.is_loaded:
                lifecycle.load()
            tracker = self._loaded(lifecycle)
        return tracker

    def _to_load(self) -> Lifecycle:
        lifecycle = self._lifecycle()
        if lifecycle is None:
            raise SessionClosedError(
                f"the session {self._key!r} was closed before it was ever loaded"
            )
        return lifecycle

    def _loaded(self, lifecycle: Lifecycle) -> ChangeTracker:
        tracker = lifecycle.tracker
        assert tracker is not None
        _set_fields(self, tracker)
        return tracker

    # -- as a mapping

    def __getitem__(self, name: str) -> Any:
        tracker = self._tracker
        if tracker is None:
            tracker = self._opened()
        return tracker.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        tracker = self._tracker
        if tracker is None:
            tracker = self._opened()
        tracker.set(name, value)

    def __delitem__(self, name: str) -> None:
        self._opened().delete(name)

    def __contains__(self, name: object) -> bool:
        return name in self._opened()

    def __iter__(self) -> Iterator[str]:
        tracker = self._opened()
        return (name for name in tracker.names() if name in tracker)  # the time of one may run out

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._opened().names())

    def __len__(self) -> int:
        return len(self._opened().names())

    def setdefault(self, name: str, default: Any = None) -> Any:
        """The value of `name`, which is `default` from now on if there was none."""
        with suppress(KeyError):
            return self[name]
        self[name] = default
        return self.get(name, default)  # another thread may have removed it

    def pop(self, name: str, default: Any = MISSING) -> Any:
        """Remove a field and return its value, or `default` if there is none; raises KeyError if
        that is not given either."""
        try:
            value = self[name]
            del self[name]
        except KeyError:  # or another thread has removed it, or its time is up
            if default is MISSING:
                raise
            return default
        return value

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the field that came last; raises KeyError if there is none."""
        tracker = self._opened()
        for name in reversed(self):
            if not tracker.is_default(name):
                value = self.pop(name, MISSING)
                if value is not MISSING:
                    return name, value
        raise KeyError(f"session {self.key!r} is empty")

    # One signature for what MutableMapping has in several overloads.
    def update(  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        self, other: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any
    ) -> None:
        """Assign several fields, or none if one of them is refused."""
        tracker = dict(other, **more)
        self._opened().check_all(tracker)
        for name, value in tracker.items():
            self[name] = value

    def clear(self) -> None:
        """Remove all fields; a session that has none but defaults when its scope ends is deleted
        from the store."""
        self._opened().clear()

    def copy(self) -> dict[str, Any]:
        """The fields as a plain dict; containers in it are still the session's own."""
        return dict(self)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self) | dict(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return dict(other) | dict(self) if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        self.update(other)
        return self

    def __repr__(self) -> str:
        """The key and the names of the fields; never a value, since a repr ends in logs."""
        lifecycle = self._lifecycle()
        tracker = self._tracker if lifecycle is None else lifecycle.tracker
        inside = "not loaded" if tracker is None else ", ".join(tracker.names())
        return f"<{type(self).__name__} {self.key!r}: {inside}>"

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles are plain dicts
        return dict, (), None, None, iter(self.items())

    # -- the life of the session

    @property
    def key(self) -> str:
        """The key of this session."""
        return self._key

    def flush(self) -> None:
        """Write now what has changed. What comes after is a unit of its own: an error discards
        only that. Calling it again without a change does nothing.

        Raises what the storage raises; then nothing is lost: the changes are still pending.
        In async code, use `await session.aflush()`.
        """
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            lifecycle.flush()
        elif self._tracker is not None:
            self._tracker.check_not_lost()

    async def aflush(self) -> None:
        """As `flush`, for async code: the event loop goes on meanwhile."""
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            await lifecycle.aflush()
        elif self._tracker is not None:
            self._tracker.check_not_lost()

    def release(self) -> None:
        """Write what has changed and end the scope now, so that this user's next update may come
        in: for a handler that goes on for long. The session can be read afterwards, not changed;
        a new scope may be opened. In async code, use `await session.arelease()`.
        """
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            lifecycle.release()

    async def arelease(self) -> None:
        """As `release`, for async code."""
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            await lifecycle.arelease()

    def __await__(self) -> Generator[Any, None, Self]:
        """Lock and load a lazy session in async code: `session = await session`."""
        if self._tracker is None:
            lifecycle = self._to_load()
            if not lifecycle.is_loaded:
                yield from lifecycle.aload().__await__()
            self._loaded(lifecycle)
        return self

    # -- as an object

    if not TYPE_CHECKING:  # else a type checker would let any name through

        def __setattr__(self, name: str, value: Any) -> None:
            self._check_attribute(name)
            if name not in self._declared:
                raise AttributeError(
                    f"session {self.key!r} has no field {name!r}: {type(self).__name__} declares "
                    f"{', '.join(self._declared) or 'none'}",
                    name=name,
                    obj=self,
                )
            self[name] = value

    def __delattr__(self, name: str) -> None:
        self._check_attribute(name)
        try:
            del self[name]
        except KeyError:
            raise _no_attribute(self, name) from None

    def _check_attribute(self, name: str) -> None:
        if name.startswith("_") or name in self._reserved:
            raise AttributeError(
                f"{name!r} is a name of {type(self).__name__} itself; as a field it is reached "
                f"with brackets: session[{name!r}]",
                name=name,
                obj=self,
            )


class _Attribute(property):
    """A declared field as an attribute. It is set and deleted as all others are."""

    def __init__(self, name: str) -> None:
        def get(session: BaseSession) -> Any:
            tracker = session._tracker
            if tracker is None:
                tracker = session._opened()
            try:
                return tracker.get(name)
            except KeyError:
                raise _no_attribute(session, name) from None

        super().__init__(get)


def _no_attribute(session: BaseSession, name: str) -> AttributeError:
    return AttributeError(
        f"session {session.key!r} has no field {name!r}; session.get({name!r}) answers None",
        name=name,
        obj=session,
    )


class StrictSession(BaseSession):
    """A session that has the fields which its class declares, and no others.

    A typo in a name is an error of the type checker, and where none looks, AttributeError (KeyError
    with brackets). What is stored under other names stays there, and is not seen. All else is as
    in a `Session`.

    >>> from session_sync import SessionManager, StrictSession
    >>> class Cart(StrictSession):
    ...     total: int = 0
    >>> with SessionManager(Cart).session_scope("user:1") as session:  # doctest: +ELLIPSIS
    ...     session.totl = 5
    Traceback (most recent call last):
    AttributeError: session 'user:1' has no field 'totl': Cart declares total...
    """

    __slots__ = ()


class Session(BaseSession):
    """The state of one user (or chat, or whatever the key says), for the time of one update.

    It reads and writes like a dict, and like an object: `session["counter"]` and `session.counter`
    are the same field. What is changed is saved when the scope ends; nobody else has the session
    meanwhile. Dicts, lists and sets in it are followed to any depth.

    A name that a method has (`items`, `flush`, ...) or that begins with an underscore is reached
    with brackets. Names that begin with `$` are the library's own.

    >>> from session_sync import SessionManager
    >>> sessions = SessionManager()
    >>> with sessions.session_scope("user:1") as session:
    ...     session.counter = session.get("counter", 0) + 1
    ...     session["cart"] = {"items": []}
    ...     session["cart"]["items"].append("tea")
    >>> with sessions.session_scope("user:1") as session:
    ...     session == {"counter": 1, "cart": {"items": ["tea"]}}
    True

    A subclass may declare fields, with types and defaults. They are there in every session, and
    what is assigned or loaded is checked: SessionTypeError. Other names stay free. A default is not
    stored, and no two sessions share it; to delete a field is to go back to its default.

    >>> from dataclasses import dataclass
    >>> from session_sync import field
    >>> @dataclass
    ... class Line:
    ...     name: str
    ...     price: int
    >>> class Cart(Session):
    ...     lines: list[Line] = field(default_factory=list)
    ...     paid: bool = False
    >>> sessions = SessionManager(Cart)
    >>> with sessions.session_scope("user:1") as session:
    ...     session.lines.append(Line("tea", 4))
    >>> with sessions.session_scope("user:1") as session:
    ...     session.lines[0].price += 1  # saved, as a change in a dict is
    >>> sessions.storage.get("user:1")
    {'lines': [{'name': 'tea', 'price': 5}]}
    """

    __slots__ = ()

    _other = ANY

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return self._opened().get(name)
        except KeyError:
            raise _no_attribute(self, name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_attribute(name)
        self[name] = value


def schema_of(session_type: type[BaseSession]) -> Schema:
    """The fields that a class declares.

    Raises TypeError if a name in an annotation is still not defined, or if a decorator has made it
    a class of another kind.
    """
    for mark, decorator in (("__dataclass_fields__", "dataclass"), ("__attrs_attrs__", "attrs")):
        if hasattr(session_type, mark):
            raise TypeError(
                f"{session_type.__name__} has the fields that it declares without a decorator: "
                f"leave @{decorator} away"
            )
    if session_type._schema is None:
        try:
            session_type._schema = read(session_type, session_type._declared, session_type._other)
        except (NameError, AttributeError) as error:
            raise TypeError(
                f"the types of {session_type.__name__} cannot be read: {error}. Define or import "
                f"it, in the module itself and not under TYPE_CHECKING, before the SessionManager "
                f"is made"
            ) from error
    return session_type._schema


def replace_fields(session: BaseSession, tracker: Mapping[str, Any] | None) -> None:
    """What `message.session = ...` and `context.session = ...` mean: other fields, or none.

    Raises TypeError if `tracker` is neither a mapping nor None.
    """
    if tracker is session:  # context.session |= {...}
        return
    if tracker is not None and not isinstance(tracker, Mapping):
        raise TypeError(
            f"session {session.key!r} can be replaced by a mapping of fields or emptied by None, "
            f"not set to {type(tracker).__name__}"
        )
    tracker = dict(tracker or {})
    session._opened().check_all(tracker)
    session.clear()
    session.update(tracker)


# Past __setattr__.
_set_lifecycle: Final = BaseSession.__dict__["_lifecycle"].__set__
_set_key: Final = BaseSession.__dict__["_key"].__set__
_set_fields: Final = BaseSession.__dict__["_tracker"].__set__
