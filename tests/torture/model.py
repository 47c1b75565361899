"""What a torture run expects: records of operations, and what must come of them.

Each operation has a number of its own under its key, kept as one bit of an integer in the session.
It notes here what it is about to do and what it has done; at the end of a round that says which
bits must be stored, which must not, and which may be (it was interrupted in between).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import session_sync

Verdict = Literal["must", "may", "never"]
# By key and field, the bits of each verdict.
Bits: TypeAlias = "dict[str, dict[str, dict[str, int]]]"

# What CPython says where what closes a coroutine is interrupted, or comes in two ways at once: what
# cleans up then may want to await something.
_THROWN_AWAY = (
    "coroutine ignored GeneratorExit",
    "coroutine already executing",
    "no running event loop [after Alarm]",
    "no running event loop [after Interrupt]",
)
COINS = 100  # that each key begins with
FIELDS = {  # whose bits stand where
    "a": "changed by whoever has the key; with `box` and `n` it makes a whole",
    "c": "by those that have joined in other threads and tasks",
    "d": "by a handler while a flush of another thread is on its way",
    "s": "by the signal handler",
}


class Interrupt(BaseException):
    """Raised out of whatever runs, as Ctrl-C does."""


class Alarm(TimeoutError):  # noqa: N818 # named after the signal
    """The same, as a time-out: an Exception, which careless code swallows."""


class Boom(Exception):  # noqa: N818 # a handler's, whatever it is
    """A handler fails."""


class Op:
    """What a worker does at a time; it may open several sessions."""

    __slots__ = ("calm", "error", "interrupted", "thrown_away")

    def __init__(self, calm: bool = False, thrown_away: bool = False) -> None:
        self.calm = calm  # nobody may interrupt it
        self.thrown_away = thrown_away  # with its event loop, perhaps
        self.interrupted = thrown_away  # somebody has interrupted it
        self.error = ""  # that was raised out of a block of it


class Record:
    """One operation on one key. Whoever does it writes here, one attribute at a time, so an
    interrupt in between leaves nothing that could be misread."""

    __slots__ = (
        "began",
        "bit",
        "changed",
        "done",
        "entered",
        "error",
        "field",
        "flushed",
        "inside",
        "joined",
        "keeps",
        "key",
        "kind",
        "left",
        "loose",
        "may_circle",
        "may_time_out",
        "message",
        "op",
        "raised",
        "turn",
    )

    def __init__(self, op: Op, kind: str, key: str, bit: int, field: str) -> None:
        self.op, self.kind, self.key, self.bit, self.field = op, kind, key, bit, field
        self.joined: Record | None = None  # whose session it shares
        self.began = False  # it is changing the session ...
        self.changed = False  # ... has changed it ...
        self.raised = False  # ... has raised inside the block ...
        self.done = False  # ... and has left the block without an error
        self.flushed = False  # a flush after the change was confirmed
        self.loose = False  # a flush is on its way, and nobody knows how far
        self.keeps = False  # its manager saves in spite of errors
        self.may_circle = False  # it may hold what others want
        self.may_time_out = False
        self.inside = False  # nobody else may be
        self.turn: Record | None = None  # which of those that have joined it is inside
        self.entered = self.left = 0.0  # time.monotonic(), if it began and if it has failed
        # By name and text: an exception keeps frames alive, and with them scopes.
        self.error = self.message = ""

    def finish(self) -> None:
        """It has left the block without an error."""
        self.left = time.monotonic()
        self.done = True

    def failed(self, error: BaseException) -> None:
        """It has raised this."""
        self.message = f"{error}"[:300]
        if error.__context__ is not None:
            self.message += f" [after {type(error.__context__).__name__}]"
        self.error = self.op.error = type(error).__name__
        self.left = time.monotonic()

    def all_joined(self) -> Iterator[Record]:
        """This one and those whose session it shares."""
        record: Record | None = self
        while record is not None:
            yield record
            record = record.joined

    def __str__(self) -> str:
        what = [
            name for name in ("began", "changed", "raised", "done", "flushed") if self.is_(name)
        ]
        what += [name for name in ("loose", "keeps", "interrupted") if self.is_(name)]
        inside = f" inside {self.joined}" if self.joined is not None else ""
        error = f" {self.error}({self.message})" if self.error else ""
        return (
            f"<{self.kind} of {self.key}, {self.field}:{self.bit}: {' '.join(what)}{error}{inside}>"
        )

    @property
    def interrupted(self) -> bool:
        return self.op.interrupted

    def is_(self, name: str) -> bool:
        return bool(getattr(self, name))


def verdict(record: Record) -> Verdict:
    """What must have come of an operation."""
    if not record.began:
        return "never"
    if record.changed and (record.flushed or all(each.done for each in record.all_joined())):
        return "must"
    if record.joined is not None:
        return _of_joined(record, record.joined)
    if record.raised and not record.loose:
        if not record.keeps:
            return "never"
        if record.changed and record.error == "Boom" and not record.interrupted:
            return "must"
    return "may"


def _of_joined(record: Record, around: Record) -> Verdict:
    """It is undone with what is around it, where that did not go on meanwhile."""
    same_task = record.field == "a" and not record.loose
    return "never" if same_task and verdict(around) == "never" else "may"


class Failures:
    """What should not have happened."""

    KINDS = ("lost", "torn", "undone", "locked", "overlapped", "late", "unexpected")

    def __init__(self) -> None:
        self.number: Counter[str] = Counter()
        self.details: list[str] = []

    def add(self, kind: str, detail: str) -> None:
        self.number[kind] += 1
        if self.number[kind] <= 5:
            self.details.append(f"{kind}: {detail}")

    def __bool__(self) -> bool:
        return bool(self.number)


class Ledger:
    """All operations of a round in this process."""

    def __init__(self, keys: list[str], process: int) -> None:
        self.keys = keys
        self.records: list[Record] = []
        self.pairs: list[tuple[Record, Record]] = []  # both or neither
        self.suspects: list[tuple[Record, Record]] = []  # were inside at the same time
        self.torn: list[str] = []  # seen by an operation
        self.owners: dict[str, Record] = {}
        self.alarmed = False  # somebody has waited too long, so this round should end
        self.diagnose: Callable[[], str] = str  # what can be seen of the locks
        self._false_circles = 0
        self._numbers = {key: itertools.count(process, 2) for key in keys}

    def record(self, op: Op, kind: str, key: str, field: str = "a") -> Record:
        record = Record(op, kind, key, next(self._numbers[key]), field)
        self.records.append(record)
        return record

    def going_on(self) -> str:
        """Who is inside and who wants to be; those of one operation begin with the same number."""
        found = [
            r
            for r in self.records[-5000:]
            if not (r.done or r.error) and (r.inside or not r.op.thrown_away)
        ]
        return "".join(
            f"\n    in {id(r.op):x} {'inside' if r.inside else 'wants '} {r}" for r in found[:40]
        )

    def failed(self, record: Record, error: BaseException) -> None:
        """It has raised this. A time-out that should not be also says who is where just now."""
        record.failed(error)
        if isinstance(error, session_sync.SessionLockTimeoutError) and not record.may_time_out:
            if not self.alarmed:
                self.alarmed = True
                record.message += f" Meanwhile:{self.going_on()}\n{self.diagnose()}"
        elif type(error) is session_sync.SessionDeadlockError and not record.may_circle:
            self._false_circles += 1
            self.alarmed |= self._false_circles > 100

    # -- what operations do inside

    def come_in(self, record: Record) -> None:
        """It has the key alone now; who is found inside is judged at the end of the round."""
        before = self.owners.get(record.key)
        if before is not None and before.inside:
            self.suspects.append((before, record))
        self.owners[record.key] = record
        record.inside = True

    def take_turn(self, record: Record) -> None:
        """The same among those that have joined."""
        around = record.joined
        assert around is not None
        before = around.turn
        if before is not None and before.inside:
            self.suspects.append((before, record))
        around.turn = record
        record.inside = True

    def look(self, session: Any, record: Record) -> None:
        """Somebody has opened a session: is it whole?"""
        a, box, n = session["a"], session["box"]["m"], session["n"]
        if not (a == box and a.bit_count() == n):
            self.torn.append(f"{record} found a={a:x} box={box:x} n={n}")

    def change(self, session: Any, record: Record) -> Iterator[None]:
        """Change three things that belong together; where it yields, others get a chance."""
        bit = 1 << record.bit
        self.look(session, record)
        record.entered = time.monotonic()
        record.began = True
        value = session["a"]
        yield
        session["a"] = value | bit
        yield
        session["box"]["m"] |= bit
        session.n += 1
        record.changed = True

    def change_one(self, session: Any, record: Record) -> Iterator[None]:
        """Change a single field."""
        record.entered = time.monotonic()
        record.began = True
        value = session[record.field]
        yield
        session[record.field] = value | 1 << record.bit
        record.changed = True

    # -- what they have come to

    def bits(self) -> Bits:
        found: Bits = {key: {field: {} for field in FIELDS} for key in self.keys}
        for record in self.records:
            place, what = found[record.key][record.field], verdict(record)
            place[what] = place.get(what, 0) | 1 << record.bit
        return found

    def story(self) -> list[tuple[str, str, int, float, str]]:
        """What has begun: key, field, bit, when, and all about it."""
        return [
            (r.key, r.field, r.bit, r.entered, f"{r.left - r.entered if r.left else 0:.4f} {r}")
            for r in self.records
            if r.began
        ]

    def open_pairs(self) -> list[tuple[str, int, str, int]]:
        return [(x.key, x.bit, y.key, y.bit) for x, y in self.pairs]

    def kinds(self) -> Counter[str]:
        return Counter(record.kind for record in self.records)

    def judge_errors(self, failures: Failures, counts: Counter[str], shared: bool) -> None:
        """Which errors were to be expected."""
        for text in self.torn:
            failures.add("torn", text)
        for before, after in self.suspects:
            if not (before.interrupted or after.interrupted):
                failures.add("overlapped", f"{before} and {after}")
        for record in self.records:
            if record.interrupted:
                counts["interrupted"] += 1
            if record.error:
                counts[record.error] += 1
                self._judge_error(record, failures, shared)

    def _judge_error(self, record: Record, failures: Failures, shared: bool) -> None:
        error = record.error
        if error in ("Boom", "CancelledError", "GeneratorExit"):
            return
        if error in ("Interrupt", "Alarm") or (error == "TimeoutError" and record.interrupted):
            return
        if record.interrupted and record.message.startswith(_THROWN_AWAY):
            return
        if record.kind == "signal" and error != session_sync.SessionLockTimeoutError.__name__:
            return  # it may find this thread in the middle of anything; it must not harm it
        if error == "SessionClosedError" and record.joined is not None and record.joined.raised:
            return  # the handler that it had joined has failed, and was just being rolled back
        if error == "SessionDeadlockError":
            if not record.may_circle:
                failures.add("unexpected", f"a circle without a second key: {record}")
        elif error == session_sync.SessionLockTimeoutError.__name__:
            if not record.may_time_out:
                failures.add("late", str(record))
        else:
            failures.add("unexpected", str(record))


def compare(
    stored: dict[str, dict[str, int]],
    bits: list[Bits],
    failures: Failures,
    story: list[tuple[str, str, int, float, str]],
) -> None:
    """Whether what is stored is what must be."""
    for key, fields in stored.items():
        for field in FIELDS:
            must = never = known = 0
            for each in bits:
                found = each[key][field]
                must |= found.get("must", 0)
                never |= found.get("never", 0)
                known |= found.get("must", 0) | found.get("may", 0)
            value = fields[field]
            _tell(failures, "lost", key, field, must & ~value, stored, story)
            _tell(failures, "undone", key, field, value & never, stored, story)
            _tell(failures, "torn", key, field, value & ~known & ~never, stored, story)
        if not (fields["a"] == fields["m"] and fields["a"].bit_count() == fields["n"]):
            failures.add("torn", f"{key} is stored as {fields}")
    coins = sum(fields["coins"] for fields in stored.values())
    if coins != COINS * len(stored):
        failures.add("torn", f"{coins} coins of {COINS * len(stored)} are left")


def compare_pairs(
    stored: dict[str, dict[str, int]], pairs: list[tuple[str, int, str, int]], failures: Failures
) -> None:
    for one, bit, other, its in pairs:
        here, there = stored[one]["a"] >> bit & 1, stored[other]["a"] >> its & 1
        if here != there:
            failures.add("torn", f"a transfer: {one} a:{bit} is {here}, {other} a:{its} is {there}")


def _tell(
    failures: Failures,
    kind: str,
    key: str,
    field: str,
    bits: int,
    stored: dict[str, dict[str, int]],
    story: list[tuple[str, str, int, float, str]],
) -> None:
    while bits:
        bit = (bits & -bits).bit_length() - 1
        bits &= bits - 1
        told = sorted((each for each in story if each[0] == key), key=lambda each: each[3])
        at = next((n for n, each in enumerate(told) if each[1:3] == (field, bit)), None)
        about = "" if at is None else told[at][4]
        if at is not None and failures.number[kind] < 2:
            for _key, its_field, its_bit, entered, text in told[max(0, at - 8) : at + 12]:
                is_there = stored[key][its_field] >> its_bit & 1
                about += f"\n    {entered:.6f} {'is  ' if is_there else 'is not'} stored: {text}"
        failures.add(kind, f"{key} {field}:{bit}: {about}")


class Slot:
    """What somebody does, and since when: for the watchdog."""

    def __init__(self, name: str) -> None:
        self.name, self.since, self.what = name, time.monotonic(), "starts"
        self.active = True

    def beat(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()
