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
from .types.base import FREE, MismatchError, Shape

_NO_NAMES: Final[frozenset[str]] = frozenset()
_NOTHING: Final[dict[str, Any]] = {}  # nobody changes it


class Lifecycle(Protocol):
    """What a session asks of its scope."""

    @property
    def is_loaded(self) -> bool: ...
    @property
    def fields(self) -> Fields | None: ...  # from loading on
    def load(self) -> None: ...
    async def aload(self) -> None: ...
    def flush(self) -> None: ...
    async def aflush(self) -> None: ...
    def release(self) -> None: ...
    async def arelease(self) -> None: ...


class Held:
    """What stands in `Fields.live` for a field of which more is to be known than its value.

    `value` is what the handler has of it, and `frozen` what that would be stored as if it had not
    been touched, where the record has something else: a field of an old form, or a default, which
    is not stored at all until it is changed (`is_made`: or anything else is, since a factory made
    it). `deadline` is when the field disappears. `is_gone`: it was deleted, or its time is up; a
    default that was read since then is in `defaults`, of which the first one counts, whichever
    thread has brought it. `ready` is what a handler gets without a further look, if it is known.
    `is_loose`: there is an object in it whose changes nobody would notice, so that it is always
    saved, or (False) never for that reason; None: if one is found in it later.

    What changes of this changes once and for good, so that no thread can undo what another one has
    done: `is_gone` becomes true, `ready` the default, and `frozen` MISSING when the record has got
    the value.
    """

    __slots__ = (
        "deadline",
        "defaults",
        "frozen",
        "is_default",
        "is_gone",
        "is_loose",
        "is_made",
        "ready",
        "value",
    )

    def __init__(
        self,
        value: Any = MISSING,
        frozen: Any = MISSING,
        deadline: Deadline | None = None,
        is_loose: bool | None = None,
    ) -> None:
        self.value: Final = value
        self.ready = value if deadline is None else MISSING
        self.frozen = frozen
        self.deadline: Final = deadline
        self.is_gone = value is MISSING
        self.is_loose: Final = is_loose
        self.is_default = self.is_made = False
        self.defaults: list[Held] = []

    def give_default(self, default: Held) -> Any:
        """What a handler gets of a field that is gone: `default`, if it is the first one."""
        self.defaults.append(default)
        self.ready = self.defaults[0].value
        return self.ready

    def current(self) -> Held | None:
        """What the handler has of the field: this, or a default, or nothing."""
        if not self.is_gone:
            return self
        return self.defaults[0] if self.defaults else None


def _is_absent(current: Held | None) -> bool:
    """Whether a field of which the handler has this is not stored, nor will be as it is."""
    return current is None or (current.is_default and current.frozen is not MISSING)


class Fields:
    """The fields of one open session: what was stored, and over it what the handler has in hand.

    `kept` is what the store has, and `record` what it should have had since the last flush: the
    same one, unless that flush failed or the session was just migrated. Of its fields only those
    that a handler asked for are thawed, into `live`; there is also what it has assigned, and for
    what it has deleted a Held that says so. So a session of a thousand fields costs what its
    handler touches, not a thousand.

    Why nothing is lost when one thread flushes what another one is just changing, without a lock.
    Each change of a field is one store into `live`, from which no name is ever removed: a deletion
    is stored there too, and a timer together with its value. What is to be written is not noted but
    found, by comparing a copy of `live` with `record`; for values that cannot change, that means:
    is it the very same object? So a change is in the copy, and then in the record that is made of
    it, or it is not, and then it differs from that record, and the next flush finds it. No flush
    clears anything in which a change could be that came meanwhile. The marks in `written` decide
    only two things that a comparison cannot find: that the very value which is stored was assigned
    once more, and where the name is in the order (a mark has what stood for the deletion before, if
    there was one: the name is at the end now). A mark is made after its value is there, and a flush
    moves the marks to `marks`, where they stay until it has succeeded, before it copies the values.
    So a mark that it has moved has its value in the copy, and one that comes later costs a second
    write of the same value at worst. Where a read brings something in (a thawed field, a default,
    or that the time of a field is up), it does so by a step that leaves alone what another thread
    has brought in meanwhile: `setdefault`, `append`, or a flag that is never taken back.

    `loose` are the values with an object in them whose changes nobody would notice, as far as that
    was found at a flush, so that they are always saved; `spoilt` the names of fields with objects
    that a failed handler may have changed, which are saved only if they are assigned. `timers` are
    the deadlines that `record` has; None, as long as there was none.

    `check` is what the store says of a value that is assigned.

    `lost` says what kept the last changes from being stored, if anything did.

    `updates` are the numbers of updates that are to be stored at the end, if any, with whatever the
    handler has changed. `begun` is the record of a session that has only what `initial` gave it: as
    long as the fields are still those, nothing of it is stored. What the class declares stands in
    `schema`; a default that a factory has made is stored together with whatever changes first.
    """

    __slots__ = (
        "__weakref__",
        "_owners",
        "begun",
        "check",
        "kept",
        "key",
        "live",
        "loose",
        "lost",
        "marks",
        "moved",
        "open",
        "record",
        "schema",
        "spoilt",
        "timers",
        "updates",
        "written",
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
        self.spoilt = _NO_NAMES
        self.loose: Mapping[str, Any] = _NOTHING
        self.record = self.kept = record
        self.live: dict[str, Any] = {}
        self.updates: list[int] | None = None
        self.begun: Record | None = None
        self.written: dict[str, Held | None] = {}
        self.marks: dict[str, Held | None] = _NOTHING
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
        live = self.live
        if name in live:
            value = live[name]
            if value.__class__ is not Held:
                return value
            ready = value.ready
            return ready if ready is not MISSING else self._value_of(name, value)
        timers = self.timers
        if timers and is_over(timers.get(name)):
            return self._value_of(name, self._expired(name))
        try:
            value = self.record[name]
        except KeyError:
            return self._default(name, None)
        schema = self.schema
        shape = schema.shapes.get(name, schema.other)
        if shape is None or ("$" in name and name.startswith("$")):  # the first is a fifth of both
            raise KeyError(name)
        if value.__class__ in shape.atoms:
            return value
        return self._thaw(name, value, shape)

    def _value_of(self, name: str, value: Any) -> Any:
        """What a handler gets of what is in `live`."""
        if value.__class__ is not Held:
            return value
        if not self._is_gone(name, value):
            return value.value
        return self._default(name, value) if value.ready is MISSING else value.ready

    def _is_gone(self, name: str, held: Held) -> bool:
        """Whether a field was deleted, or its time is up, which is noted: then it stays so."""
        if not held.is_gone and is_over(held.deadline):
            self.written.pop(name, None)
            held.is_gone = True
        return held.is_gone

    def _expired(self, name: str) -> Any:
        """Note that the time of a stored field is up, unless it is in `live`; what is there now."""
        return self.live.setdefault(name, Held())

    def _default(self, name: str, gone: Held | None) -> Any:
        """The default of a field that is not there (`gone`, if that stands in `live`)."""
        default = self.schema.defaults.get(name)
        if default is None:
            raise KeyError(name)
        shape, frozen = self.schema.shapes[name], default.frozen
        if default.factory is not None:
            frozen = self._freeze(name, self._made(name, default.factory), MISSING, shape)[0]
        elif frozen.__class__ in shape.atoms:
            return self._atom(name, frozen, gone)
        value, untouched, is_loose = self._thawed(name, frozen, shape)
        held = Held(value, frozen if untouched is MISSING else untouched, is_loose=is_loose)
        held.is_default, held.is_made = True, default.factory is not None
        if gone is not None:
            return gone.give_default(held)
        return self._value_of(name, self.live.setdefault(name, held))

    def _atom(self, name: str, default: Any, gone: Held | None) -> Any:
        """A default that cannot change, so that all sessions may have the same Held for it."""
        if gone is None:
            held = self.schema.in_hand.get(name)
            if held is None:
                held = Held(default, default)
                held.is_default = True
                self.schema.in_hand[name] = held
            self.live.setdefault(name, held)
        return default

    def _made(self, name: str, factory: Callable[[], Any]) -> Any:
        try:
            return factory()
        except (LookupError, AttributeError) as error:  # which would say that there is no field
            raise RuntimeError(
                f"session {self.key!r}: the default_factory of {name!r} raised "
                f"{type(error).__name__}"
            ) from error

    def _thaw(self, name: str, frozen: Any, shape: Shape) -> Any:
        """A stored field, in hand from now on."""
        value, untouched, is_loose = self._thawed(name, frozen, shape)
        deadline = self.timers.get(name) if self.timers else None
        if untouched is not MISSING or deadline is not None or is_loose is not None:
            value = Held(value, untouched, deadline, is_loose)
        return self._value_of(name, self.live.setdefault(name, value))

    def _thawed(self, name: str, frozen: Any, shape: Shape) -> tuple[Any, Any, bool | None]:
        """A live value, and `frozen` and `is_loose` of a Held with it."""
        owner, untouched = self.owner, MISSING
        begun = owner.begin()
        try:
            value = shape.thaw(frozen, owner)
            if owner.met_old_form or not owner.is_still_at(begun):
                untouched = shape.freeze(value, owner, frozen)
            met_object = owner.met_object
            if not owner.is_still_at(begun):
                met_object = self._freeze(name, value, MISSING, shape)[1]
        except RecursionError:
            raise owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} is stored as {wrong.found}, where "
                f"{self.schema.name} declares {wrong.expected}. It is left as it is; a migration "
                f"({self.schema.name}.migrations) brings stored sessions into the new form."
            ) from wrong.__cause__
        if value.__class__ in shape.atoms:  # only what is stored otherwise comes here
            untouched = value
        elif untouched is frozen:
            untouched = MISSING
        return value, untouched, name not in self.spoilt if met_object else None

    def set(self, name: str, value: Any) -> None:
        """Assign a field; raises SessionTypeError, SessionEncodeError for what the store would
        refuse, and KeyError for a name that there must not be."""
        if name.__class__ is not str or "$" in name:
            name = checked_name(self.key, name)
        schema, seconds = self.schema, None
        shape = schema.shapes.get(name, schema.other)
        cls = value.__class__
        if shape is None or cls not in shape.atoms or cls in ZONED or not self.open:
            value, seconds = self._admitted(name, value)
        if self.timers is not None or seconds is not None:
            value = self._timed(name, value, seconds)
        live, written = self.live, self.written
        if name in written:
            live[name] = value
        else:
            old: Any = live.get(name)
            live[name] = value
            if old.__class__ is Held and old.is_gone:
                self.moved = True
                written[name] = old
            else:
                written[name] = None
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
        return Held(value, deadline=deadline_in(seconds)) if seconds else value

    def _deadline(self, name: str) -> Deadline | None:
        """When a field disappears, if it is there and has a timer."""
        held = self.live.get(name, MISSING)
        if held is MISSING:
            deadline = self.timers.get(name) if self.timers else None
            if not is_over(deadline):
                return deadline
            held = self._expired(name)
        if held.__class__ is not Held or self._is_gone(name, held):
            return None
        return held.deadline

    def check_all(self, fields: Mapping[str, Any]) -> None:
        """Raise what assigning one of them would raise."""
        for name, value in fields.items():
            self._admitted(checked_name(self.key, name), value)

    def _admitted(self, name: str, value: Any) -> tuple[Any, float | None]:
        """A value that is to be assigned, and its life time, once it has been looked at."""
        if not self.open:
            raise self.owner.refuse()
        shape = self.schema.shapes.get(name, self.schema.other)
        if shape is None:
            raise KeyError(
                f"session {self.key!r} has no field {name!r}: {self.schema.name} declares "
                f"{', '.join(self.schema.shapes) or 'none'}"
            )
        seconds = None
        if value.__class__ is Ttl:
            seconds, value = value.seconds, value.value
        try:
            admitted = shape.admit(value, self.owner)
            if self.check is not None and (
                value.__class__ in ZONED or value.__class__ not in ATOMS
            ):
                self.check(shape.freeze(admitted, NOBODY), self.key, path([step(name)]))
            return admitted, seconds
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
            for name, value in self.live.copy().items()
            if value.__class__ is not Held or value.current() is not None
        ]
        names = {*self._stored_names(), *in_hand}
        if names and not self.open:
            raise self.owner.refuse()
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.written.pop(name, None)
        self.live[name] = Held()
        if not self.open:
            raise self.owner.refuse()

    def names(self) -> list[str]:
        """The names of all fields: the declared ones, and then in the order that a dict has."""
        self._note_expired()
        stored, schema = self._stored_names(), self.schema
        if not schema.shapes and schema.other is not None:
            return stored
        present = schema.defaults.keys() | stored
        declared = [name for name in schema.shapes if name in present]
        others = [name for name in stored if name not in schema.shapes]
        return declared if schema.other is None else declared + others

    def _stored_names(self) -> list[str]:
        """The names of what is stored, or will be."""
        marks = {**self.marks, **self.written}
        live = self.live.copy()
        absent = {
            name
            for name, value in live.items()
            if value.__class__ is Held and _is_absent(value.current())
        }
        at_end = [name for name, gone in marks.items() if gone is not None and name in live]
        kept = self._kept_names({*absent, *at_end}) if absent or at_end else self._kept_names(())
        new = (name for name in (*marks, *live) if name in live and name not in absent)
        return list(dict.fromkeys((*kept, *new)))

    def _kept_names(self, without: Container[str]) -> list[str]:
        return [name for name in self.record if name not in without and is_field(name)]

    def _note_expired(self) -> None:
        if self.timers is not None:
            for name, value in self.live.copy().items():
                if value.__class__ is Held:
                    self._is_gone(name, value)
            for name, deadline in self.timers.items():
                if is_over(deadline):
                    self._expired(name)

    def __contains__(self, name: Any) -> bool:
        value = self.live.get(name, MISSING)
        if value is MISSING and self.timers and is_over(self.timers.get(name)):
            value = self._expired(name)
        is_gone = value.__class__ is Held and self._is_gone(name, value)
        if name in self.schema.defaults:
            return True
        if value is not MISSING:
            return not is_gone
        if self.schema.other is None and name not in self.schema.shapes:
            return False
        return is_field(name) and name in self.record

    def is_default(self, name: str) -> bool:
        """Whether a field is there only because its class declares it."""
        held = self.live.get(name, MISSING)
        if held is MISSING:
            return name not in self.record
        if held.__class__ is not Held:
            return False
        default = held.current()
        if default is None:
            return True
        if not _is_absent(default):
            return False
        shape, unchanged = self.schema.shapes[name], default.frozen
        return self._freeze(name, default.value, unchanged, shape)[0] is unchanged

    # -- the scope's side

    def has_had(self, number: int) -> bool:
        """Whether the update of this number was handled before."""
        return number in updates_in(self.record, self.key)

    def remember(self, number: int, limit: int) -> None:
        """Store the number of an update at the end, unless its handler fails, and with it those
        that came before, at most `limit` in all."""
        had = updates_in(self.record, self.key) if self.updates is None else self.updates
        self.updates = [*(each for each in had if each != number), number][-limit:]

    def take_changes(self) -> Record:
        """The record that is to go into the store, which is taken to succeed: changes count from
        here. It is `kept` if there is nothing to store. One thread at a time may call it, and the
        next one not before what was taken is written.

        Raises SessionEncodeError if a value contains itself, and SessionTypeError if something
        inside one is not of its declared type any more.
        """
        is_last = not self.open  # no mark comes any more that is of use
        # The marks before the values.
        marks = self.written if is_last and not self.marks else self._take_marks()
        live, record = self.live.copy(), self.record
        changes, held = self._changes(live, marks) if live else ({}, {})
        if held or self.timers is not None or self.schema.version > 1 or self.moved:
            record = self._completed(_Found(live, marks.copy(), changes, held))
        elif changes:
            record = patched(record, changes)  # the way that copies least
        if record is not self.record:
            self.record = record
            if self.timers is not None:
                self.timers = record.get(TIMERS, _NOTHING)
            for name in held.keys() & changes.keys() if held else ():
                if (current := held[name]) is not None:
                    current.frozen = MISSING
        self.marks = _NOTHING
        if is_last:
            self.written = {}
        if self.updates is not None and is_last:  # not by a flush: the handler may yet fail
            record = self._with_updates(record, self.updates)
        self.kept = record
        return record

    def _take_marks(self) -> dict[str, Held | None]:
        """The marks of what was assigned since the last flush that succeeded."""
        written = self.written
        newest = written.copy()
        marks = self.marks = _marks_after(self.marks, newest) if self.marks else newest
        for name, mark in newest.items():
            if written.get(name, MISSING) is mark:  # else it has got another one: for the next time
                popped = written.pop(name, mark)
                if popped is not mark:
                    written.setdefault(name, popped)
        return marks

    def _with_updates(self, record: Record, updates: list[int]) -> Record:
        """What is to be stored at the end; the fields that the handler has had stay as they are."""
        hidden: dict[str, Any] = {UPDATES: updates}
        if self.schema.version > 1:
            hidden[VERSION] = self.schema.version
        return patched(record_of({}) if record is self.begun else record, hidden)

    def _changes(
        self, live: Mapping[str, Any], marks: Container[str]
    ) -> tuple[dict[str, Any], dict[str, Held | None]]:
        """What fields would be stored as, of which the record has something else; and what the
        handler has of those for which a Held stands in `live`."""
        changes: dict[str, Any] = {}
        held: dict[str, Held | None] = {}
        record, timers, schema = self.record, self.timers, self.schema
        shapes, other = schema.shapes, schema.other
        for name, value in live.items():
            if value.__class__ is Held:
                held[name] = value.current()
                frozen = self._change_of_held(name, held[name], name in marks)
            else:
                is_sure = name in marks or (timers is not None and name in timers)
                shape: Any = shapes.get(name, other)
                if value.__class__ in shape.atoms:
                    if is_sure or record.get(name, MISSING) is not value:
                        changes[name] = value
                    continue
                frozen = self._change(name, value, record.get(name, MISSING), is_sure, None)
            if frozen is not MISSING:
                changes[name] = frozen
        return changes, held

    def _change_of_held(self, name: str, current: Held | None, is_marked: bool) -> Any:
        if current is None:
            return MISSING
        timers = self.timers or _NOTHING
        is_sure = not current.is_default and (is_marked or timers.get(name) is not current.deadline)
        stored = current.frozen
        if stored is MISSING:
            stored = self.record.get(name, MISSING)
        return self._change(name, current.value, stored, is_sure, current.is_loose)

    def _change(
        self, name: str, value: Any, stored: Any, is_sure: bool, is_loose: bool | None
    ) -> Any:
        """What a value would be stored as; MISSING, if it need not be."""
        shape: Any = self.schema.shapes.get(name, self.schema.other)
        frozen = value
        if value.__class__ not in shape.atoms:
            frozen, met_object = self._freeze(name, value, stored, shape)
            if is_loose is None:
                is_loose = self.loose.get(name, MISSING) is value
                if met_object and not is_loose:
                    is_loose = True
                    self.loose = {**self.loose, name: value}
        return frozen if is_sure or is_loose or frozen is not stored else MISSING

    def _completed(self, found: _Found) -> Record:
        """The record with the changes, without what has gone, and with what goes with them:
        defaults that a factory has made, the version and the timers."""
        record, changes = self.record, found.changes
        absent = {name for name, current in found.held.items() if _is_absent(current)}
        has_gone = any(map(record.__contains__, absent))
        if changes or ((has_gone or self.is_unsaved) and self._kept_names(absent)):
            found.add_made(absent)
        if not changes and not has_gone and record is self.kept:
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
        live, held = found.live, found.held
        gone = {name for name, at in timers.items() if name not in live and is_over(at)}
        for name in gone:
            self._expired(name)
        deadlines = {n: at for n, at in timers.items() if n not in live or n in held}
        for name, current in held.items():
            deadline = None
            if current is not None and not current.is_default:
                deadline = current.deadline
                if self._is_gone(name, current):
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
        record = self.record
        fields = dict.fromkeys((*self._kept_names(leaving), *filter(is_field, changes)))
        if not fields:  # then it is not stored at all, whatever else it has
            return without_fields(record)
        hidden = [name for name in (*record, *changes) if not is_field(name)]
        if TIMERS not in changes:
            hidden = [name for name in hidden if name != TIMERS]
        return only(record, dict.fromkeys((*fields, *hidden)), changes)

    def _freeze(self, name: str, value: Any, stored: Any, shape: Shape) -> tuple[Any, bool]:
        """What a value would be stored as, and whether an object was met in it whose changes nobody
        would notice."""
        owner = self.owner
        begun = owner.begin()
        try:
            frozen = shape.freeze(value, owner, stored)
            met_object = owner.met_object
            if not owner.is_still_at(begun):  # another thread's value may have been noted, too
                owner = Owner(self.key)
                frozen = shape.freeze(value, owner, stored)
                met_object = owner.met_object
        except RecursionError:
            raise owner.too_deep(f"the value of {name!r}") from None
        except MismatchError as wrong:
            raise SessionTypeError(
                f"session {self.key!r}: {wrong.place(name)} has become {wrong.found}, where "
                f"{self.schema.name} declares {wrong.expected}; nothing was written"
            ) from wrong.__cause__
        return frozen, met_object

    def not_saved(self, kept: Record) -> None:
        """The store did not take it after all, and still has what was `kept`. What was taken stays
        in `record`, so the next flush writes it, with what has changed since."""
        self.kept = kept

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
        return self.record is not self.kept

    def save_as_it_is(self) -> None:
        """The store has something older, which is to be replaced by the next flush; but not if the
        handler fails."""
        self.record = patched(self.record, {})

    def roll_back(self) -> None:
        """Back to what the store has; containers handed out so far cannot be changed any more."""
        self.close()
        loose = {name for name, value in self.live.copy().items() if self._is_loose(name, value)}
        spoilt = self.spoilt | loose  # objects that the failed handler may have changed
        begun, lost = self.begun is self.kept, self.lost
        Fields.__init__(self, self.key, reread(self.kept), self.schema)
        self.spoilt, self.lost = spoilt, lost
        self.begun = self.kept if begun else None

    def _is_loose(self, name: str, value: Any) -> bool:
        """Whether there is an object in a field, as far as that was found."""
        current = value.current() if value.__class__ is Held else Held(value)
        if current is None:
            return False
        return current.is_loose or self.loose.get(name, MISSING) is current.value


def _marks_after(
    before: Mapping[str, Held | None], marks: Mapping[str, Held | None]
) -> dict[str, Held | None]:
    """The marks of a flush that failed, and those that came later."""
    first = {name: mark for name, mark in before.items() if marks.get(name) is None}
    return first | {name: mark or first.get(name) for name, mark in marks.items()}


class _Found(NamedTuple):
    """What a flush has found: copies of `live` and of the marks, the changes, and what the handler
    has of the fields for which a Held stands in `live`."""

    live: Mapping[str, Any]
    marks: Mapping[str, Held | None]
    changes: dict[str, Any]
    held: Mapping[str, Held | None]

    def add_made(self, absent: Iterable[str]) -> None:
        """Add those defaults that a factory has made."""
        for name in absent:
            current = self.held[name]
            if current is not None and current.is_made:
                self.changes.setdefault(name, current.frozen)

    def in_order(self) -> dict[str, Any]:
        """The changes in the order in which the fields were assigned."""
        assigned = filter(self.changes.__contains__, self.marks)
        return {name: self.changes[name] for name in dict.fromkeys((*assigned, *self.changes))}


class _PlaceOf:
    """Where a container lies that these fields have handed out: it knows them, and not they it."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Fields) -> None:
        self._fields: Final = ref(fields)

    def __call__(self, container: object) -> str:
        fields = self._fields()
        live = {} if fields is None else fields.live.copy()
        values = {
            name: value.value if value.__class__ is Held else value for name, value in live.items()
        }
        return place_of(container, values)


class BaseSession(MutableMapping[str, Any]):
    """What `Session` and `StrictSession` have in common: see there."""

    __slots__ = ("__weakref__", "_fields", "_key", "_lifecycle")

    #: How stored sessions of an older version become those of this class: see `SessionManager`.
    migrations: ClassVar[Mapping[int, Migration]] = {}
    #: Whether a migrated session is stored at once, and not with whatever is written next.
    migrate_eagerly: ClassVar[bool] = False

    # Weak: the block alone keeps its scope. The function around it may keep the session, and if an
    # interrupt comes just before the block is left, its scope has to be collected all the same.
    _lifecycle: Callable[[], Lifecycle | None]
    _key: str
    _fields: Fields | None  # from loading on
    _reserved: ClassVar[frozenset[str]]  # what the class itself has: no field by attribute
    _declares: ClassVar[Mapping[str, Declared]] = {}  # the class itself ...
    _declared: ClassVar[Mapping[str, Declared]] = {}  # ... and with its bases
    _schema: ClassVar[Schema | None] = None  # None: not all of its types are defined yet
    _other: ClassVar[Shape | None] = None  # the shape of names that are not declared, if any

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
        self, lifecycle: Callable[[], Lifecycle | None], key: str, fields: Fields | None
    ) -> None:
        _set_lifecycle(self, lifecycle)
        _set_key(self, key)
        _set_fields(self, fields)

    def _opened(self) -> Fields:
        """The fields, loaded first if this is a lazy session."""
        fields = self._fields
        if fields is None:
            lifecycle = self._to_load()
            if not lifecycle.is_loaded:
                lifecycle.load()
            fields = self._loaded(lifecycle)
        return fields

    def _to_load(self) -> Lifecycle:
        lifecycle = self._lifecycle()
        if lifecycle is None:
            raise SessionClosedError(
                f"the session {self._key!r} was closed before it was ever loaded"
            )
        return lifecycle

    def _loaded(self, lifecycle: Lifecycle) -> Fields:
        fields = lifecycle.fields
        assert fields is not None
        _set_fields(self, fields)
        return fields

    # -- as a mapping

    def __getitem__(self, name: str) -> Any:
        fields = self._fields
        if fields is None:
            fields = self._opened()
        return fields.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        fields = self._fields
        if fields is None:
            fields = self._opened()
        fields.set(name, value)

    def __delitem__(self, name: str) -> None:
        self._opened().delete(name)

    def __contains__(self, name: object) -> bool:
        return name in self._opened()

    def __iter__(self) -> Iterator[str]:
        fields = self._opened()
        return (name for name in fields.names() if name in fields)  # the time of one may run out

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
        fields = self._opened()
        for name in reversed(self):
            if not fields.is_default(name):
                value = self.pop(name, MISSING)
                if value is not MISSING:
                    return name, value
        raise KeyError(f"session {self.key!r} is empty")

    # One signature for what MutableMapping has in several overloads.
    def update(  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride]
        self, other: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any
    ) -> None:
        """Assign several fields, or none if one of them is refused."""
        fields = dict(other, **more)
        self._opened().check_all(fields)
        for name, value in fields.items():
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
        fields = self._fields if lifecycle is None else lifecycle.fields
        inside = "not loaded" if fields is None else ", ".join(fields.names())
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
        elif self._fields is not None:
            self._fields.check_not_lost()

    async def aflush(self) -> None:
        """As `flush`, for async code: the event loop goes on meanwhile."""
        lifecycle = self._lifecycle()
        if lifecycle is not None:
            await lifecycle.aflush()
        elif self._fields is not None:
            self._fields.check_not_lost()

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
        if self._fields is None:
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
            fields = session._fields
            if fields is None:
                fields = session._opened()
            try:
                return fields.get(name)
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

    _other = FREE

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


def replace_fields(session: BaseSession, fields: Mapping[str, Any] | None) -> None:
    """What `message.session = ...` and `context.session = ...` mean: other fields, or none.

    Raises TypeError if `fields` is neither a mapping nor None.
    """
    if fields is session:  # context.session |= {...}
        return
    if fields is not None and not isinstance(fields, Mapping):
        raise TypeError(
            f"session {session.key!r} can be replaced by a mapping of fields or emptied by None, "
            f"not set to {type(fields).__name__}"
        )
    fields = dict(fields or {})
    session._opened().check_all(fields)
    session.clear()
    session.update(fields)


# Past __setattr__.
_set_lifecycle: Final = BaseSession.__dict__["_lifecycle"].__set__
_set_key: Final = BaseSession.__dict__["_key"].__set__
_set_fields: Final = BaseSession.__dict__["_fields"].__set__
