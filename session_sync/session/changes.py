"""The fields of an open session, and how its changes are found when it is written.

This module knows fields and records; it knows no scope and no store. It is longer than others: one
argument, why nothing is lost without a lock, holds for all that reads or writes these fields.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Final, cast
from weakref import ref

from ..errors import SessionClosedError, SessionTypeError
from ..storages.base import SMALL, Check, Record, patched, record_of, reread
from ..storages.places import path, place_of, step
from .containers import ATOMS, MISSING, NO_OWNER, ZONED, Owner
from .declarations import NO_SCHEMA, Schema
from .field_state import FieldState, is_absent
from .flush import Flush
from .metadata import (
    AT,
    TIMERS,
    UPDATES,
    VERSION,
    Timers,
    checked_name,
    is_field,
    standing_in,
    updates_of,
    without,
)
from .ttl import Deadline, Ttl, deadline_in, is_over
from .types.base import ANY, FieldType, MismatchError

_NO_NAMES: Final[frozenset[str]] = frozenset()
_NOTHING: Final[dict[str, Any]] = {}  # never changed


class ChangeTracker:
    """The fields of one open session: what was stored, and over it what the handler has in hand.

    `committed` is what the store has, and `flushed` what it should have had since the last flush:
    the same one, unless that flush failed or the session was just migrated. Of its fields only
    those that a handler has read are loaded, into `loaded`; there is also what it has assigned,
    and for what it has deleted a FieldState that says so. So a session of a thousand fields costs
    what its handler touches, not a thousand.

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

    `opaque` are the values with an object in them whose changes would not be noticed, as far as
    that was found at a flush, so that they are always saved; `tainted` the names of fields with
    objects that a failed handler may have changed, which are saved only if they are assigned.
    `timers` are the deadlines that `record` has; None, as long as there was none.

    `check` is the store's check of a value that is assigned.

    `lost` names what kept the last changes from being stored, if anything did.

    `updates` are the IDs of updates that are to be stored at the end, if any, with whatever the
    handler has changed. `initial_record` is the record of a session that has only what `initial`
    gave it: as long as the fields are still those, nothing of it is stored. What the class declares
    is in `schema`; a default that a factory has made is stored together with whatever changes
    first."""

    __slots__ = (
        "__weakref__",
        "_owners",
        "_standing",
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
        self._standing: list[FieldState] = []  # once it was asked for; the first one counts
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
            Timers(record, key).to_store() if TIMERS in record else None
        )

    @property
    def owner(self) -> Owner:
        """The owner of the containers that these fields hand out."""
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
            return self._value_of(name, self.expire(name))
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
        if not self.is_deleted(name, value):
            return value.value
        return self._default(name, value) if value.ready is MISSING else value.ready

    def is_deleted(self, name: str, state: FieldState) -> bool:
        """Whether a field was deleted, or its time is up, which is noted: then it stays so."""
        if not state.is_deleted and is_over(state.deadline):
            self.assigned.pop(name, None)
            state.is_deleted = True
        return state.is_deleted

    def expire(self, name: str) -> Any:
        """Note that the time of a stored field is up, unless it is in `loaded`; what is there
        now."""
        return self.loaded.setdefault(name, FieldState())

    def _default(self, name: str, gone: FieldState | None) -> Any:
        """The default of a field that is not there (`gone`, if that is in `loaded`)."""
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
        state = FieldState(
            value, dumped if untouched is MISSING else untouched, is_opaque=is_opaque
        )
        state.is_default, state.is_generated = True, default.factory is not None
        if gone is not None:
            return gone.give_default(state)
        return self._value_of(name, self.loaded.setdefault(name, state))

    def _atom(self, name: str, default: Any, gone: FieldState | None) -> Any:
        """A default that cannot change, so that all sessions may have the same FieldState for
        it."""
        if gone is None:
            state = self.schema.in_hand.get(name)
            if state is None:
                state = FieldState(default, default)
                state.is_default = True
                self.schema.in_hand[name] = state
            self.loaded.setdefault(name, state)
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
        """A live value, and `dumped` and `is_opaque` of a FieldState with it."""
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
        state = self.loaded.get(name, MISSING)
        if state is MISSING:
            deadline = self.timers.get(name) if self.timers else None
            if not is_over(deadline):
                return deadline
            state = self.expire(name)
        if state.__class__ is not FieldState or self.is_deleted(name, state):
            return None
        return state.deadline

    def check_all(self, tracker: Mapping[str, Any]) -> None:
        """Raise what assigning one of them would raise."""
        for name, value in tracker.items():
            self._validated(checked_name(self.key, name), value)

    def _validated(self, name: str, value: Any) -> tuple[Any, float | None]:
        """A value that is to be assigned, and its lifetime, once it has been looked at."""
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
                self.check(field_type.dump(validated, NO_OWNER), self.key, path([step(name)]))
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
            if value.__class__ is FieldState and is_absent(value.current())
        }
        at_end = [name for name, gone in marks.items() if gone is not None and name in loaded]
        committed = (
            self.remaining_names({*absent, *at_end})
            if absent or at_end
            else self.remaining_names(())
        )
        new = (name for name in (*marks, *loaded) if name in loaded and name not in absent)
        return list(dict.fromkeys((*committed, *new)))

    def remaining_names(self, without: Container[str]) -> list[str]:
        return [name for name in self.flushed if name not in without and is_field(name)]

    def _note_expired(self) -> None:
        if self.timers is not None:
            for name, value in self.loaded.copy().items():
                if value.__class__ is FieldState:
                    self.is_deleted(name, value)
            for name, deadline in self.timers.items():
                if is_over(deadline):
                    self.expire(name)

    def __contains__(self, name: Any) -> bool:
        value = self.loaded.get(name, MISSING)
        if value is MISSING and self.timers and is_over(self.timers.get(name)):
            value = self.expire(name)
        is_deleted = value.__class__ is FieldState and self.is_deleted(name, value)
        if name in self.schema.defaults:
            return True
        if value is not MISSING:
            return not is_deleted
        if self.schema.other is None and name not in self.schema.field_types:
            return False
        return is_field(name) and name in self.flushed

    def is_default(self, name: str) -> bool:
        """Whether a field is there only because its class declares it."""
        state = self.loaded.get(name, MISSING)
        if state is MISSING:
            return name not in self.flushed
        if state.__class__ is not FieldState:
            return False
        default = state.current()
        if default is None:
            return True
        if not is_absent(default):
            return False
        field_type, unchanged = self.schema.field_types[name], default.dumped
        return self._dump(name, default.value, unchanged, field_type)[0] is unchanged

    # -- the scope's side

    def has_had(self, number: int) -> bool:
        """Whether the update with this ID was handled before."""
        return number in updates_of(self.flushed, self.key)

    def remember(self, number: int, limit: int) -> None:
        """Store the ID of an update at the end, unless its handler fails, and with it those that
        came before, at most `limit` in all."""
        had = updates_of(self.flushed, self.key) if self.updates is None else self.updates
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
        changes, states = self._changes(loaded, marks) if loaded else ({}, {})
        if states or self.timers is not None or self.schema.version > 1 or self.moved:
            record = Flush(self, loaded, marks.copy(), changes, states).record()
        elif changes:
            is_small = record.__class__ is dict and len(record) <= SMALL
            record = {**record, **changes} if is_small else patched(record, changes)
        if self._standing:
            record = self._with_standing(record, self._standing[0], is_last)
        if record is not self.flushed:
            self.flushed = record
            if self.timers is not None:
                self.timers = record.get(TIMERS, _NOTHING)
            for name in states.keys() & changes.keys() if states else ():
                if (current := states[name]) is not None:
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

    def standing(self) -> dict[str, Any]:
        """Where the user stands: a dict that is stored with the fields when it was changed, and is
        none of them.

        Raises SessionDecodeError if what is stored was not written here.
        """
        if not self._standing:
            stored = standing_in(self.flushed, self.key)
            value, untouched, is_opaque = self._loaded(AT, stored, ANY)
            self._standing.append(FieldState(value, untouched, is_opaque=is_opaque))
        return cast(dict[str, Any], self._standing[0].value)

    def stands_at(self, name: str) -> Any:
        """What is there under `name`, to be read only; None: nothing. To look costs less than to
        have the dict, and most users stand nowhere."""
        if self._standing:
            return self._standing[0].value.get(name)
        stored = self.flushed.get(AT)
        if stored is None:
            return None
        standing = stored if stored.__class__ is dict else standing_in(self.flushed, self.key)
        return standing.get(name)

    def _with_standing(self, record: Record, state: FieldState, is_last: bool) -> Record:
        """`record` with what the handler has of where the user stands. What a session begins with
        is not stored for that; before the end, the handler still reads it in the record."""
        stored = record.get(AT, MISSING)
        unchanged = stored if state.dumped is MISSING else state.dumped
        dumped = self._change(AT, state.value, unchanged, False, state.is_opaque, ANY)
        if dumped is MISSING:
            return record
        state.dumped = MISSING
        if not dumped:
            return record if stored is MISSING else without(record, AT)
        before = record_of({}) if is_last and record is self.initial_record else record
        return patched(before, self._with_version({AT: dumped}))

    def _with_version(self, hidden: dict[str, Any]) -> dict[str, Any]:
        version = self.schema.version
        return {**hidden, VERSION: version} if version > 1 else hidden

    def _with_updates(self, record: Record, updates: list[int]) -> Record:
        """What is to be stored at the end; the fields that the handler has had stay as they are."""
        hidden = self._with_version({UPDATES: updates})
        return patched(record_of({}) if record is self.initial_record else record, hidden)

    def _changes(
        self, loaded: Mapping[str, Any], marks: Container[str]
    ) -> tuple[dict[str, Any], dict[str, FieldState | None]]:
        """What fields would be stored as, of which the record has something else; and what the
        handler has of those for which a FieldState is in `loaded`."""
        changes: dict[str, Any] = {}
        states: dict[str, FieldState | None] = {}
        record, timers, schema = self.flushed, self.timers, self.schema
        field_types, other = schema.field_types, schema.other
        for name, value in loaded.items():
            if value.__class__ is FieldState:
                states[name] = value.current()
                dumped = self._change_of_state(name, states[name], name in marks)
            else:
                is_sure = name in marks or (timers is not None and name in timers)
                field_type: Any = field_types.get(name, other)
                if value.__class__ in field_type.atoms:
                    if is_sure or record.get(name, MISSING) is not value:
                        changes[name] = value
                    continue
                stored = record.get(name, MISSING)
                dumped = self._change(name, value, stored, is_sure, None, field_type)
            if dumped is not MISSING:
                changes[name] = dumped
        return changes, states

    def _change_of_state(self, name: str, current: FieldState | None, is_marked: bool) -> Any:
        if current is None:
            return MISSING
        timers = self.timers or _NOTHING
        is_sure = not current.is_default and (is_marked or timers.get(name) is not current.deadline)
        stored = current.dumped
        if stored is MISSING:
            stored = self.flushed.get(name, MISSING)
        field_type: Any = self.schema.field_types.get(name, self.schema.other)
        return self._change(name, current.value, stored, is_sure, current.is_opaque, field_type)

    def _change(
        self,
        name: str,
        value: Any,
        stored: Any,
        is_sure: bool,
        is_opaque: bool | None,
        field_type: FieldType,
    ) -> Any:
        """What a value would be stored as; MISSING, if it need not be."""
        dumped = value
        if value.__class__ not in field_type.atoms:
            dumped, met_object = self._dump(name, value, stored, field_type)
            if is_opaque is None:
                is_opaque = self.opaque.get(name, MISSING) is value
                if met_object and not is_opaque:
                    is_opaque = True
                    self.opaque = {**self.opaque, name: value}
        return dumped if is_sure or is_opaque or dumped is not stored else MISSING

    def _dump(self, name: str, value: Any, stored: Any, field_type: FieldType) -> tuple[Any, bool]:
        """What a value would be stored as, and whether an object was met in it whose changes would
        not be noticed."""
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
        opaque |= {AT for state in self._standing if state.is_opaque}
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


class _PlaceOf:
    """Where a container is that these fields have handed out: it knows them, and not they it."""

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
        if tracker is not None and tracker._standing:
            values[AT] = tracker._standing[0].value
        return place_of(container, values)
