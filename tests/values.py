"""Values of every kind that a session can keep, and what it means that two are the same."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

BERLIN = ZoneInfo("Europe/Berlin")


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return self.cents


def money_to(value: Any) -> Any:
    return ("money", value.cents) if isinstance(value, Money) else NotImplemented


def money_from(name: str, value: Any) -> object:
    return {"money": Money}[name](value)


def same(one: Any, other: Any) -> bool:
    """Equal in type and value at every level; nan is the same as nan, 0.0 is not -0.0."""
    if type(one) is not type(other):
        return False
    compare = _SAME.get(type(one))
    return compare(one, other) if compare else bool(one == other)


def same_float(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other and math.copysign(1, one) == math.copysign(1, other)


def same_sequence(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def same_set(one: Any, other: Any) -> bool:
    rest = list(other)
    for item in one:
        index = next((i for i, candidate in enumerate(rest) if same(item, candidate)), None)
        if index is None:
            return False
        del rest[index]
    return not rest


def same_dict(one: Any, other: Any) -> bool:
    return same_sequence(list(one.items()), list(other.items()))


def same_moment(one: Any, other: Any) -> bool:
    zones = one.tzinfo, other.tzinfo
    return (
        one.replace(tzinfo=None) == other.replace(tzinfo=None)
        and one.fold == other.fold
        and type(zones[0]) is type(zones[1])
        and (zones[0] is None or repr(zones[0]) == repr(zones[1]))
    )


def same_decimal(one: Decimal, other: Decimal) -> bool:
    return one.as_tuple() == other.as_tuple()


_SAME: dict[type, Any] = {
    float: same_float,
    list: same_sequence,
    tuple: same_sequence,
    set: same_set,
    frozenset: same_set,
    dict: same_dict,
    datetime: same_moment,
    time: same_moment,
    Decimal: same_decimal,
}

KEPT = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    2**64,
    10**5000,
    -(10**5000),
    0.0,
    -0.0,
    0.1,
    1e308,
    5e-324,
    1e16,
    math.nan,
    math.inf,
    -math.inf,
    "",
    'привет \U0001f600 \x00 \\ " $',
    "$tuple",
    "\ud800",
    "a\\ud800",
    "\\\ud800\\\\",
    "\ud83d\ude00",
    b"",
    bytes(range(256)),
    [],
    [1, "a", None, [2.5, [math.nan]]],
    (),
    (1, (2, [3])),
    {},
    {"a": {"b": {"c": ()}}},
    {123456789: "id", -5: {}},
    {1: "int"},
    {True: "bool"},
    {1.0: "float"},
    {None: 1, (1, "a"): 2, b"k": 3, frozenset({1, (2,)}): 4, "text": 5, math.inf: 6},
    {datetime(2024, 1, 2, tzinfo=UTC): date(2024, 1, 2), time(1, 2): Decimal(1)},
    {UUID(int=5): UUID(int=2**128 - 1), timedelta(1): timedelta(-1, 2, 3), Decimal("1.0"): 1},
    {"z": 1, "a": 2},
    {2: 1, 1: 2},
    {"$tuple": [1]},
    {"$": 1, "plain": 2},
    {"a$b": 1},
    {"\ud800": 1},
    {"": 1},
    set(),
    {1, 2, 10},
    {1, "a", None, (1, 2), b"b", 2.5},
    {math.nan, float("nan")},
    {frozenset({frozenset({1}), frozenset({"a"})})},
    frozenset(),
    frozenset({"b", "a"}),
    datetime(2024, 2, 29, 12, 30, 59, 123456),
    datetime(1, 1, 1),
    datetime.max,
    datetime(2024, 1, 1, fold=1),
    datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=45))),
    datetime(2024, 1, 1, tzinfo=timezone(-timedelta(hours=23, minutes=59, seconds=59))),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(microseconds=-1))),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(microseconds=1))),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=3), "MSK")),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "GMT")),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=3), "\ud800")),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),
    datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")),
    date(2024, 2, 29),
    date.min,
    time(0),
    time(23, 59, 59, 999999, fold=1),
    time(1, tzinfo=UTC),
    time(1, tzinfo=timezone(timedelta(hours=3), "MSK")),
    time(1, tzinfo=BERLIN, fold=1),
    timedelta(0),
    timedelta.min,
    timedelta.max,
    Decimal("0"),
    Decimal("-0"),
    Decimal("1.10"),
    Decimal("1E+30"),
    Decimal("1E-999999"),
    Decimal("NaN"),
    Decimal("-NaN123"),
    Decimal("sNaN"),
    Decimal("-Infinity"),
    UUID("12345678-1234-5678-1234-567812345678"),
]

# Every character, lone surrogates too.
texts = st.text(st.characters(exclude_categories=()), max_size=8)

offsets = st.builds(
    timezone,
    st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)),
) | st.builds(timezone, st.just(timedelta(hours=3)), texts)

zones = st.none() | st.just(UTC) | offsets | st.timezones()

folds = st.integers(0, 1)

hashable_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | texts
    | st.sampled_from(["$tuple", "$", "\\", "\ud800"])
    | st.binary(max_size=8)
    | st.builds(lambda at, fold: at.replace(fold=fold), st.datetimes(timezones=zones), folds)
    | st.builds(lambda at, fold: at.replace(fold=fold), st.times(timezones=zones), folds)
    | st.dates()
    | st.timedeltas()
    | st.decimals(allow_nan=True).filter(lambda value: not value.is_snan())
    | st.uuids()
)

hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)

values = st.recursive(
    hashables | st.just(Decimal("sNaN")),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(texts | st.sampled_from(["$tuple", "$x"]), inner, max_size=5)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
    ),
    max_leaves=12,
)

names = texts.filter(lambda name: not name.startswith("$str:"))

sessions = st.dictionaries(names, values, max_size=5)
