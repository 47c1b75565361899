"""The record that a flush writes, where that takes more than to put the changes over the old one.

This module knows fields, metadata and records; it knows no store.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..storages.base import Record, only, patched
from .field_state import FieldState, is_absent
from .metadata import TIMERS, VERSION, is_field, without_fields
from .ttl import Deadline, is_over

if TYPE_CHECKING:
    from .changes import ChangeTracker


class Flush(NamedTuple):
    """What a flush of `tracker` has found: copies of `loaded` and of the marks, the changes, and
    what the handler has of the fields for which a FieldState is in `loaded`."""

    tracker: ChangeTracker
    loaded: Mapping[str, Any]
    marks: Mapping[str, FieldState | None]
    changes: dict[str, Any]
    states: Mapping[str, FieldState | None]

    def record(self) -> Record:
        """The record with the changes, without what has gone, and with what goes with them:
        defaults that a factory has made, the version and the timers."""
        tracker, changes = self.tracker, self.changes
        record, version = tracker.flushed, tracker.schema.version
        absent = {name for name, current in self.states.items() if is_absent(current)}
        has_gone = any(map(record.__contains__, absent))
        if changes or ((has_gone or tracker.is_unsaved) and tracker.remaining_names(absent)):
            self._add_generated(absent)
        if not changes and not has_gone and record is tracker.committed:
            return record
        if tracker.timers is not None:
            absent.update(self._take_timers(tracker.timers))
        if version > 1 and VERSION not in record and (changes or record):
            changes[VERSION] = version
        at_end = [n for n, gone in self.marks.items() if gone is not None and n in changes]
        last_timer_went = tracker.timers is not None and TIMERS in record and TIMERS not in changes
        if at_end:
            changes = self._in_order()
        if last_timer_went or any(map(record.__contains__, (*absent, *at_end))):
            return self._rearranged(changes, {*absent, *at_end})
        return patched(record, changes) if changes else record

    def _add_generated(self, absent: Iterable[str]) -> None:
        """Add those defaults that a factory has made."""
        for name in absent:
            current = self.states[name]
            if current is not None and current.is_generated:
                self.changes.setdefault(name, current.dumped)

    def _take_timers(self, timers: Mapping[str, Deadline]) -> Iterable[str]:
        """Add the timers to the changes; returns the names of the fields that have expired, and
        takes them out of the changes."""
        loaded, states = self.loaded, self.states
        gone = {name for name, at in timers.items() if name not in loaded and is_over(at)}
        for name in gone:
            self.tracker.expire(name)
        deadlines = {n: at for n, at in timers.items() if n not in loaded or n in states}
        for name, current in states.items():
            deadline = None
            if current is not None and not current.is_default:
                deadline = current.deadline
                if self.tracker.is_deleted(name, current):
                    gone.add(name)
            if deadline is None:
                deadlines.pop(name, None)
            else:
                deadlines[name] = deadline
        for name in gone:
            self.changes.pop(name, None)
            deadlines.pop(name, None)
        if deadlines:
            self.changes[TIMERS] = deadlines
        return gone

    def _in_order(self) -> dict[str, Any]:
        """The changes in the order in which the fields were assigned."""
        assigned = filter(self.changes.__contains__, self.marks)
        return {name: self.changes[name] for name in dict.fromkeys((*assigned, *self.changes))}

    def _rearranged(self, changes: Mapping[str, Any], leaving: Container[str]) -> Record:
        """The record without the fields that are `leaving` their places, and with `changes`."""
        record, remaining = self.tracker.flushed, self.tracker.remaining_names(leaving)
        fields = dict.fromkeys((*remaining, *filter(is_field, changes)))
        if not fields:  # then it is not stored at all, but for what outlives its fields
            return without_fields(record)
        hidden = [name for name in (*record, *changes) if not is_field(name)]
        if TIMERS not in changes:
            hidden = [name for name in hidden if name != TIMERS]
        return only(record, dict.fromkeys((*fields, *hidden)), changes)
