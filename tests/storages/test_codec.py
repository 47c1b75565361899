"""What the codec keeps, what it refuses, and how records of stored bytes behave."""

from __future__ import annotations

import collections
import enum
import math
import random
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from values import BERLIN, KEPT, Money, money_from, money_to, same

from session_sync.errors import SessionDecodeError, SessionEncodeError
from session_sync.storages.base import Record, record_of
from session_sync.storages.codec import Codec
from session_sync.storages.codec.kinds import MAX_DEPTH
from session_sync.storages.codec.record import EncodedRecord


class Color(str, enum.Enum):  # noqa: UP042 - as PTB has them
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Word(str):
    __slots__ = ()


class OddWord(str):
    """Equal to a str, but filed elsewhere: a dict can hold both."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 7


class Metres(float):
    pass


class Point(NamedTuple):
    x: int
    y: int


class StrangeZone(tzinfo):
    def __repr__(self) -> str:
        return "StrangeZone()"

    def utcoffset(self, _moment: datetime | None) -> timedelta:
        return timedelta(hours=1)

    def tzname(self, _moment: datetime | None) -> str:
        return "strange"

    def dst(self, _moment: datetime | None) -> None:
        return None


def round_trip(value: Any, codec: Codec | None = None) -> Any:
    codec = codec or Codec()
    data = codec.encode({"field": value})
    whole = codec.decode(data)["field"]
    lazy = codec.decode_record(data, "user:1")["field"]
    assert same(whole, lazy)
    return whole


@pytest.mark.parametrize("value", KEPT, ids=lambda value: type(value).__name__)
class TestKept:
    def test_type_and_value_come_back(self, value: Any) -> None:
        assert same(round_trip(value), value)

    def test_also_inside_of_each_container(self, value: Any) -> None:
        nested = {"list": [value, [value]], "tuple": (value,), "dict": {"a": value, 1: value}}
        assert same(round_trip(nested), nested)

    def test_also_next_to_a_string_that_looks_like_a_tag(self, value: Any) -> None:
        assert same(round_trip(["$5", value, "\ud800"]), ["$5", value, "\ud800"])


class TestFormat:
    @pytest.mark.parametrize(
        ("value", "written"),
        [
            ({"name": "alex", "age": 30}, '{"name":"alex","age":30}'),
            ((1, "a"), '{"$tuple":[1,"a"]}'),
            ({10, 9}, '{"$set":[9,10]}'),
            (frozenset({None, "b", 1}), '{"$frozenset":["b",1,null]}'),
            ({5: {"a": 1}}, '{"$dict":[[5,{"a":1}]]}'),
            (b"hello", '{"$bytes":"aGVsbG8="}'),
            (math.nan, '{"$float":"nan"}'),
            (-(2**64), '{"$int":"-10000000000000000"}'),
            (datetime(2024, 1, 2, 3, 4), '{"$datetime":"2024-01-02T03:04:00"}'),
            (
                datetime(2024, 1, 2, tzinfo=UTC),
                '{"$datetime":"2024-01-02T00:00:00+00:00"}',
            ),
            (
                datetime(2024, 10, 27, 2, tzinfo=BERLIN, fold=1),
                '{"$datetime":["2024-10-27T02:00:00","Europe/Berlin",1]}',
            ),
            (date(2024, 1, 2), '{"$date":"2024-01-02"}'),
            (time(3, 4), '{"$time":"03:04:00"}'),
            (timedelta(days=1, seconds=2), '{"$timedelta":[1,2,0]}'),
            (Decimal("1.10"), '{"$decimal":"1.10"}'),
            (UUID(int=1), '{"$uuid":"00000000-0000-0000-0000-000000000001"}'),
            ("a\\\ud800", '{"$str":"a\\\\\\\\\\\\ud800"}'),
            (Word("w"), '"w"'),
        ],
    )
    def test_is_stable(self, value: Any, written: str) -> None:
        assert Codec().encode({"f": value}).decode() == '{"f":' + written + "}"

    def test_does_not_depend_on_the_order_of_a_set(self) -> None:
        words = [f"word{i}" for i in range(50)] + [(i, "x") for i in range(50)]
        shuffled = random.Random(1).sample(words, len(words))
        assert Codec().encode({"f": set(words)}) == Codec().encode({"f": set(shuffled)})

    def test_does_not_depend_on_the_decimal_context(self) -> None:
        with localcontext() as context:
            context.capitals = 0
            context.prec = 2
            data = Codec().encode({"f": Decimal("1.2345E+30")})
            assert same(Codec().decode(data)["f"], Decimal("1.2345E+30"))
        assert data == b'{"f":{"$decimal":"1.2345E+30"}}'

    def test_spaces_and_escapes_of_an_editor_are_read(self) -> None:
        edited = b'{ "f" : { "\\u0024tuple" : [ 1 , { "$set" : [ ] } ] } }'
        assert Codec().decode(edited) == {"f": (1, set())}

    def test_names_that_the_library_adds_pass_through(self) -> None:
        fields = {"$ttl": {"code": [1.5, 300.0]}, "$version": 2, "code": (1,)}
        assert same(Codec().decode(Codec().encode(fields)), fields)

    @pytest.mark.parametrize("name", ["a b", "", "\ud800", "\\\ud800", "имя", "\x00"])
    def test_a_field_may_have_any_name(self, name: str) -> None:
        data = Codec().encode({name: (1,), "x": "\ud800"})
        assert Codec().decode(data) == {name: (1,), "x": "\ud800"}
        assert Codec().decode(Codec().encode({name: 1})) == {name: 1}
        assert Codec().decode_record(data, "k")[name] == (1,)


class TestSubclasses:
    @pytest.mark.parametrize(
        ("value", "base"),
        [(Color.RED, "red"), (Level.HIGH, 3), (Word("w"), "w"), (Metres(1.5), 1.5)],
    )
    def test_of_str_int_and_float_are_kept_as_their_base_value(self, value: Any, base: Any) -> None:
        assert same(round_trip(value), base)
        assert same(round_trip([value, {value}]), [base, {base}])
        assert same(round_trip({value: value}), {base: base})

    def test_of_float_are_kept_with_nan(self) -> None:
        assert same(round_trip(Metres("nan")), math.nan)

    def test_name_a_field_by_their_base_value(self) -> None:
        assert [*map(type, Codec().decode(Codec().encode({Color.RED: 1})))] == [str]

    @pytest.mark.parametrize("value", [{"a": 1, OddWord("a"): 2}, {"a", OddWord("a")}])
    def test_that_would_become_the_same_key_are_refused(self, value: Any) -> None:
        with pytest.raises(SessionEncodeError, match=r"field has .* equal once stored"):
            Codec().encode({"field": value})

    def test_that_would_become_the_same_field_are_refused(self) -> None:
        with pytest.raises(SessionEncodeError, match="same name"):
            Codec().encode({"a": 1, OddWord("a"): 2})


class _Pretends(type):
    """As freezegun's: the base is an instance as well."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__bases__[0])


class TestSubclassesOfTimes:
    """Of freezegun, pendulum, ...: they come back as what they are based on."""

    @pytest.mark.parametrize(
        "base",
        [
            datetime(2024, 2, 29, 23, 59, 58, 7),
            datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
            datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=45), "here")),
            date(1, 1, 1),
            time(1, 2, 3, 4, tzinfo=UTC, fold=1),
            timedelta(-3, 5, 7),
        ],
        ids=repr,
    )
    def test_of_times_come_back_as_their_base(self, base: Any) -> None:
        kind = type(base)
        # What the subclass means by these names is its own affair.
        own = _Pretends("Own", (kind,), {"year": "a fiscal one", "days": 0})
        names = {
            timedelta: ("days", "seconds", "microseconds"),
            date: ("year", "month", "day"),
            time: ("hour", "minute", "second", "microsecond", "tzinfo", "fold"),
        }
        names[datetime] = names[date] + names[time]
        value = own(**{name: getattr(base, name) for name in names[kind]})
        for there in (value, [value], {value: 1}, {value}, (value,)):
            back = round_trip(there)
            inner = back if there is value else next(iter(back))
            assert type(inner) is kind
            assert same(inner, base)

    def test_of_zoneinfo_come_back_as_that(self) -> None:
        class Own(ZoneInfo):
            pass

        back = round_trip(datetime(2024, 1, 1, tzinfo=Own("Europe/Berlin")))
        assert type(back.tzinfo) is ZoneInfo
        assert back.tzinfo.key == "Europe/Berlin"

    def test_of_tzinfo_are_refused_by_name(self) -> None:
        message = r"datetime with a tzinfo of type \S*StrangeZone \(kept is zoneinfo's\)"
        with pytest.raises(SessionEncodeError, match=message):
            Codec().encode({"f": datetime(2024, 1, 1, tzinfo=StrangeZone())})


class TestRefused:
    @pytest.mark.parametrize(
        "value",
        [
            object(),
            Point(1, 2),
            collections.OrderedDict(a=1),
            collections.defaultdict(int),
            collections.Counter("a"),
            collections.deque([1]),
            bytearray(b"a"),
            memoryview(b"a"),
            range(3),
            1j,
            Money(1),
            int,
            len,
            msgspec.Raw(b"1"),
            datetime(2024, 1, 1, tzinfo=StrangeZone()),
            time(1, tzinfo=StrangeZone()),
            type("MyList", (list,), {})(),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_whatever_would_come_back_as_something_else(self, value: Any) -> None:
        with pytest.raises(SessionEncodeError, match=r"declare the type of the field .*encode"):
            Codec().encode({"field": value})
        with pytest.raises(SessionEncodeError, match=r"^session 'user:1' .*: a\.b\[1\]"):
            Codec().encode({"a": {"b": [0, value]}}, "user:1")

    @pytest.mark.parametrize(
        ("fields", "path"),
        [
            ({"x": Money(1)}, "x"),
            ({"cart": {"items": [1, 2, Money(1)]}}, "cart.items[2]"),
            ({"cart": {123: Money(1)}}, "cart[123]"),
            ({"cart": {"a b": Money(1)}}, "cart['a b']"),
            ({"cart": {None: (Money(1),)}}, "cart[None][0]"),
            ({"cart": {(1, 2): Money(1)}}, "cart[<tuple>]"),
            ({"cart": {"a": 1, Money(1): 1}}, "cart.keys()[1]"),
            ({"cart": {("x", Money(1)): 1}}, "cart.keys()[0][1]"),
            ({"tags": {Money(1)}}, "tags{...}"),
            ({"my tags": [Money(1)]}, "['my tags'][0]"),
            ({"f": {"n" * 100: Money(1)}}, "f['" + "n" * 39 + "…']"),
            ({"f": {10**5000: Money(1)}}, "f[<int>]"),
        ],
    )
    def test_with_the_path_to_it(self, fields: dict[str, Any], path: str) -> None:
        with pytest.raises(SessionEncodeError) as caught:
            Codec().encode(fields)
        assert f": {path} is of type Money. Kept are None, " in str(caught.value)

    def test_with_no_value_in_the_message(self) -> None:
        fields = {"f": ["secret", b"secret", ("secret", type("T", (), {"x": "secret"})())]}
        with pytest.raises(SessionEncodeError) as caught:
            Codec().encode(fields)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("name", [1, None, ("a",), b"a", "$str:x"])
    def test_a_field_without_a_proper_name(self, name: Any) -> None:
        with pytest.raises(SessionEncodeError, match="no name for a field"):
            Codec().encode({name: 1})

    @pytest.mark.parametrize("make", [list, dict])
    def test_what_contains_itself(self, make: Any) -> None:
        value = make()
        value.append([1, value]) if make is list else value.update(a=(value,))
        with pytest.raises(SessionEncodeError, match=r"contains itself, or lies more than 128"):
            Codec().encode({"f": value})

    @pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {5: v}, lambda v: ((v,))])
    def test_what_lies_too_deep_and_nothing_else(self, wrap: Any) -> None:
        value: Any = ()
        for _ in range(MAX_DEPTH - 2):
            value = wrap(value)
        assert same(round_trip(value), value)
        with pytest.raises(SessionEncodeError, match="levels deep"):
            Codec().encode({"f": wrap(wrap(wrap(value)))})

    def test_what_is_written_at_any_place_is_read_deep_in_a_program(self) -> None:
        value: Any = ()
        for _ in range(MAX_DEPTH - 2):
            value = {5: value}
        data = Codec().encode({"f": value})

        def deep(level: int) -> Any:
            return deep(level - 1) if level else Codec().decode(data)["f"]

        assert same(deep(300), value)

    def test_when_the_stack_is_nearly_full(self) -> None:
        value: Any = 1
        for _ in range(100):
            value = {5: value}
        data = Codec().encode({"f": value})
        errors = []

        def fill() -> None:
            for act in (lambda: Codec().encode({"f": value}), lambda: Codec().decode(data)):
                try:
                    act()
                except (SessionEncodeError, SessionDecodeError) as error:
                    errors.append(type(error))

        def deep(level: int) -> None:
            if level:
                deep(level - 1)
            else:
                fill()

        deep(sys.getrecursionlimit() - len(traceback_depth()) - 120)
        assert set(errors) == {SessionEncodeError, SessionDecodeError}


def traceback_depth() -> list[Any]:
    frames = []
    frame: Any = sys._getframe()
    while frame:
        frames.append(frame.f_code)
        frame = frame.f_back
    return frames


class TestHooks:
    codec = Codec(money_to, money_from)

    @pytest.mark.parametrize(
        "value", [Money(5), [Money(5)], {Money(5): Money(6)}, {Money(5)}, (1, {"a": Money(7)})]
    )
    def test_bring_in_other_types(self, value: Any) -> None:
        assert same(round_trip(value, self.codec), value)

    def test_are_asked_about_containers_and_times_that_are_not_kept(self) -> None:
        def encode(value: Any) -> Any:
            if isinstance(value, Point):
                return "point", tuple(value)
            if isinstance(value, datetime):
                return "strange", value.replace(tzinfo=None)
            raise NotImplementedError

        def decode(name: str, value: Any) -> Any:
            return Point(*value) if name == "point" else value.replace(tzinfo=StrangeZone())

        codec = Codec(encode, decode)
        assert same(round_trip([Point(1, 2)], codec), [Point(1, 2)])
        moment = datetime(2024, 1, 1, tzinfo=StrangeZone())
        assert round_trip(moment, codec) == moment
        assert round_trip(Color.RED, codec) == "red"
        with pytest.raises(SessionEncodeError, match="f is of type Money"):
            codec.encode({"f": Money(1)})

    def test_may_keep_a_subclass_of_str(self) -> None:
        codec = Codec(
            lambda value: ("color", value.name) if isinstance(value, Color) else NotImplemented,
            lambda _name, value: Color[value],
        )
        assert round_trip(Color.RED, codec) is Color.RED

    def test_that_raise_are_named_and_chained(self) -> None:
        def broken(*_: Any) -> Any:
            raise KeyError("secret")

        with pytest.raises(
            SessionEncodeError, match=r"a\[0\] is of type Money.*KeyError"
        ) as caught:
            Codec(broken).encode({"a": [Money(1)]})
        assert isinstance(caught.value.__cause__, KeyError)
        data = self.codec.encode({"a": [Money(1)]})
        with pytest.raises(SessionDecodeError, match=r"'k' .* 'a' made `decode`.*Key") as failed:
            Codec(None, broken).decode(data, "k")
        assert isinstance(failed.value.__cause__, KeyError)
        assert "secret" not in str(caught.value) + str(failed.value)

    @pytest.mark.parametrize("answer", [None, 5, ("name",), (5, 5), ["name", 5]])
    def test_that_answer_nonsense_are_told(self, answer: Any) -> None:
        with pytest.raises(SessionEncodeError, match="`encode` has to return"):
            Codec(lambda _: answer).encode({"a": Money(1)})

    def test_whose_value_cannot_be_kept_are_told_where(self) -> None:
        codec = Codec(
            lambda value: ("m", [object()]) if isinstance(value, Money) else NotImplemented
        )
        with pytest.raises(SessionEncodeError, match=r"a<Money>\[0\] is of type object"):
            codec.encode({"a": Money(1)})

    def test_that_never_end_are_stopped(self) -> None:
        with pytest.raises(SessionEncodeError, match="levels deep"):
            Codec(lambda value: ("again", value)).encode({"a": Money(1)})

    def test_are_needed_to_read_what_they_wrote(self) -> None:
        with pytest.raises(SessionDecodeError, match="decode"):
            Codec().decode(self.codec.encode({"a": Money(1)}))


class TestRecord:
    def fields(self) -> dict[str, Any]:
        return {"a": [1, (2,)], "b": "text", "c": {5: b"x"}}

    def record(self) -> Record:
        return Codec().decode_record(Codec().encode(self.fields()), "user:1")

    def test_reads_like_the_fields(self) -> None:
        record = self.record()
        assert isinstance(record, Mapping)
        assert same(dict(record), self.fields())
        assert len(record) == 3
        assert "a" in record
        assert "x" not in record
        with pytest.raises(KeyError, match="x"):
            record["x"]

    def test_decodes_a_field_once_and_only_when_asked(self) -> None:
        calls = []

        def decode(_name: str, value: Any) -> Any:
            calls.append(value)
            return Money(value)

        codec = Codec(money_to, decode)
        data = codec.encode({str(i): Money(i) for i in range(1000)})
        record = codec.decode_record(data, "user:1")
        assert record["7"] is record["7"]
        changed = record.patched({"8": 1})
        assert changed["7"] is record["7"]
        assert len(codec.decode(codec.encode(changed).replace(b'"money"', b'"other"'))) == 1000
        assert calls[0] == 7
        assert len(calls) == 1 + 999

    def test_writes_untouched_fields_as_they_were_found(self) -> None:
        codec = Codec()
        data = b'{"odd":{ "$set": [3, 1] },"broken":{"$no":1},"n":1}'
        record = codec.decode_record(data, "user:1")
        assert record["odd"] == {1, 3}
        assert codec.encode(record) == data
        changed = record.patched({"n": (2,), "new": 3})
        assert codec.encode(changed) == data.replace(b'"n":1', b'"n":{"$tuple":[2]},"new":3')
        assert codec.encode(record) == data
        less = changed.only(["new", "odd"], {"new": 4})
        assert codec.encode(less) == b'{"new":4,"odd":{ "$set": [3, 1] }}'
        assert less["odd"] is record["odd"]

    def test_stays_right_through_any_number_of_changes(self) -> None:
        codec = Codec()
        model = {f"f{i}": (i,) for i in range(100)}
        record: Record = codec.decode_record(codec.encode(model), "user:1")
        chance = random.Random(2)
        for step in range(300):
            name = f"f{chance.randrange(150)}"
            model[name] = (step, name)
            record = record.patched({name: (step, name)})
            if step % 50 == 0:
                assert same(dict(record), model)
                assert codec.encode(record) == codec.encode(model)
        assert isinstance(record, EncodedRecord)

    def test_names_a_field_that_does_not_decode_at_its_first_access(self) -> None:
        record = Codec().decode_record(b'{"good":1,"bad":{"$no":"secret"}}', "user:1")
        assert record["good"] == 1
        for _ in range(2):
            with pytest.raises(SessionDecodeError, match=r"'user:1'.*'bad'") as caught:
                record["bad"]
            assert "secret" not in str(caught.value)

    def test_of_another_codec_is_encoded_anew(self) -> None:
        record = Codec(money_to, money_from).decode_record(
            Codec(money_to).encode({"m": Money(5)}), "user:1"
        )
        other = Codec(lambda value: ("euro", value.cents / 100))
        assert other.encode(record) == b'{"m":{"$type":["euro",0.05]}}'

    def test_takes_no_raw_text_from_outside(self) -> None:
        for change in (
            lambda: self.record().patched({"a": msgspec.Raw(b"nonsense")}),
            lambda: self.record().only(["a"], {"a": msgspec.Raw(b"nonsense")}),
            lambda: Codec().encode(record_of({"a": msgspec.Raw(b"nonsense")})),
        ):
            with pytest.raises(SessionEncodeError, match=r"'user:1'|the session.*a is of type Raw"):
                change()

    def test_gives_all_threads_the_same_object(self) -> None:
        for _ in range(20):
            record = self.record()
            start = threading.Barrier(4)
            seen: list[Any] = []

            def read(record: Record = record, start: threading.Barrier = start) -> None:
                start.wait()
                seen.append(record["a"])  # noqa: B023

            threads = [threading.Thread(target=read) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(map(id, seen))) == 1
