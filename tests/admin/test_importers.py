"""What other libraries have stored becomes sessions."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importer_tools import EVERY_PROTOCOL, Reducible, taken

from session_sync import Codec, SessionDecodeError, StorageKey, default_storage_key
from session_sync.admin.importers import IMPORTERS

FOLDER = Path(__file__).parents[1] / "data" / "importers"


# -- telebot, in a pickle


@pytest.fixture
def bot(tmp_path: Path) -> Any:
    telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    from telebot.storage import StatePickleStorage

    storage = StatePickleStorage(str(tmp_path / "state" / "states.pkl"))
    return telebot.TeleBot("123456:token", state_storage=storage)


@pytest.fixture
def states(bot: Any) -> str:
    return str(bot.current_states.file_path)


class TestStatesInAPickle:
    def test_become_the_session_of_the_same_user_in_the_same_chat(
        self, bot: Any, states: str
    ) -> None:
        from telebot.types import Message

        bot.set_state(7, "age", -100)
        bot.add_data(7, -100, name="Alex", cart={5: [1]})
        message = Message.de_json(
            {
                "message_id": 1,
                "date": 1,
                "chat": {"id": -100, "type": "supergroup", "title": "x"},
                "from": {"id": 7, "is_bot": False, "first_name": "Alex"},
            }
        )
        key = str(default_storage_key(message))
        assert taken("telebot-pickle", states) == {
            key: {"name": "Alex", "cart": {5: [1]}, "step": "age"}
        }

    @pytest.mark.parametrize("version", ["4.7.1", "4.23.0"])
    def test_of_older_versions_too(self, version: str) -> None:
        assert taken("telebot-pickle", FOLDER / f"telebot-{version}.pkl") == {
            "user:1:chat:1": {"name": "Alex", "step": "Form:age"},
            "user:2:chat:-100": {"cart": {7: [1]}, "step": "name"},
            "user:3:chat:-100": {"step": 5},
        }

    def test_keep_their_business_connection_and_not_their_topic(
        self, bot: Any, states: str
    ) -> None:
        bot.set_state(1, "a", 2, business_connection_id="x%y")
        bot.set_state(3, "b", -4, message_thread_id=5)
        bot.set_state(6, "c", 7, business_connection_id="z", message_thread_id=8)
        bot.current_states.set_state(10, 10, "e", business_connection_id="z", message_thread_id=5)
        assert taken("telebot-pickle", states) == {
            str(StorageKey(user=1, chat=2, business="x%y")): {"step": "a"},
            "user:3:chat:-4": {"step": "b"},
            "user:6:chat:7:business:z": {"step": "c"},
            "user:10:chat:10:business:z": {"step": "e"},
        }

    def test_of_one_user_in_several_topics_are_an_error(self, bot: Any, states: str) -> None:
        bot.set_state(3, "a", -4, message_thread_id=5)
        bot.set_state(3, "b", -4)
        bot.set_state(4, "c", -4)
        found = taken("telebot-pickle", states)
        assert "'telebot:123456:5:-4:3'" in found["user:3:chat:-4"]
        assert found["user:4:chat:-4"] == {"step": "c"}

    def test_of_several_bots_are_taken_one_bot_at_a_time(self, bot: Any, states: str) -> None:
        bot.set_state(1, "a")
        bot.set_state(1, "b", bot_id=5)
        with pytest.raises(ValueError, match=r"of 2 bots: 5, 123456.*\?bot=5 "):
            taken("telebot-pickle", states)
        assert taken("telebot-pickle", f"{states}?bot=5") == {"user:1:chat:1": {"step": "b"}}

    @pytest.mark.parametrize("separator", [":", "/", "-", "::"])
    def test_have_the_prefix_and_separator_that_the_bot_gave(
        self, tmp_path: Path, separator: str
    ) -> None:
        pytest.importorskip("telebot", reason="needs the extra 'telebot'")
        from telebot.storage import StatePickleStorage

        file = tmp_path / "odd?name" / "states.pkl"
        storage = StatePickleStorage(str(file), prefix="my:bot", separator=separator)
        storage.set_state(-100, 1, "a", bot_id=9, business_connection_id="b", message_thread_id=4)
        source = f"{file}?prefix=my:bot&separator={separator}"
        assert taken("telebot-pickle", source) == {
            "user:1:chat:-100:business:b": {"step": "a"},
        }
        (message,) = taken("telebot-pickle", file).values()
        assert "?prefix=telebot&separator=:" in message

    def test_that_an_updated_bot_left_behind_give_way(self, states: str) -> None:
        record = {"state": "old", "data": {}}
        both = {
            1: {1: record},
            2: {2: record},
            "telebot:9:1:1": {"state": "new", "data": {}},
        }
        Path(states).write_bytes(pickle.dumps(both))
        assert taken("telebot-pickle", states) == {
            "user:1:chat:1": {"step": "new"},
            "user:2:chat:2": {"step": "old"},
        }

    def test_and_data_that_are_empty_are_left_out(self, bot: Any, states: str) -> None:
        bot.set_state(1, None)
        bot.set_state(2, 0)
        assert taken("telebot-pickle", states) == {"user:2:chat:2": {"step": 0}}

    def test_beside_data_of_their_name_are_an_error(self, bot: Any, states: str) -> None:
        bot.set_state(1, "a")
        bot.add_data(1, step="secret")
        bot.set_state(2, None)
        bot.add_data(2, step="mine")
        found = taken("telebot-pickle", states)
        assert "'step'" in found["user:1:chat:1"]
        assert "secret" not in found["user:1:chat:1"]
        assert found["user:2:chat:2"] == {"step": "mine"}

    def test_that_are_no_records_are_errors_of_their_own(self, states: str) -> None:
        Path(states).write_bytes(
            pickle.dumps(
                {
                    "telebot:9:1:1": {"state": "a", "data": {}},
                    "telebot:9:None:2": {"state": "a", "data": {}},
                    "telebot:9:3:3": {"cart": "secret"},
                    "telebot:9:4:4": {"state": "a", "data": "secret"},
                    "telebot:9:5:5": "secret",
                    "telebot:9:6:6": {"state": object(), "data": {}},
                    8: {True: {"state": "a", "data": {}}},
                    (9,): {9: {"state": "a", "data": {}}},
                    10: "secret",
                }
            )
        )
        found = taken("telebot-pickle", states)
        assert found.pop("user:1:chat:1") == {"step": "a"}
        assert list(found) == [
            "'telebot:9:None:2'",
            "user:3:chat:3",
            "user:4:chat:4",
            "user:5:chat:5",
            "user:6:chat:6",
            "8[True]",
            "<tuple>[9]",
            "10",
        ]
        assert not any("secret" in message for message in found.values())
        assert "state is of class object" in found["user:6:chat:6"]

    @pytest.mark.parametrize(
        ("options", "wrong"),
        [("lease=3", "lease"), ("bot=me", "bot"), ("prefix=", "prefix"), ("separator=", "empty")],
    )
    def test_with_options_that_are_none(self, states: str, options: str, wrong: str) -> None:
        with pytest.raises(ValueError, match=wrong):
            taken("telebot-pickle", f"{states}?{options}")


# -- telebot, in Redis


@pytest.fixture
def server(redis_url: str) -> Iterator[str]:
    """A database of Redis with nothing in it."""
    import redis

    url = f"{redis_url}/7"
    with closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
def client(server: str) -> Iterator[Any]:
    import redis

    with closing(redis.Redis.from_url(server)) as client:
        yield client


@pytest.fixture
def redis_states(server: str) -> Iterator[Callable[..., Any]]:
    """Makes bots whose states are in Redis."""
    telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
    from telebot.storage import StateRedisStorage

    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(StateRedisStorage(redis_url=server, **options))
        return telebot.TeleBot("123456:token", state_storage=made[-1])

    yield make
    for storage in made:
        storage.redis.close()


class TestStatesInRedis:
    def test_become_sessions(self, redis_states: Callable[..., Any], server: str) -> None:
        bot = redis_states()
        bot.set_state(1, "age")
        bot.add_data(1, name="Alex", share=1.5)
        bot.set_state(2, "b", -3, business_connection_id="x", message_thread_id=4)
        for user in range(1000, 1600):  # more than in one round trip
            bot.set_state(user, "c")
        found = taken("telebot-redis", server)
        assert found["user:1:chat:1"] == {"name": "Alex", "share": 1.5, "step": "age"}
        assert found["user:2:chat:-3:business:x"] == {"step": "b"}
        assert len(found) == 602

    @pytest.mark.parametrize("prefix", [None, "shop["])
    def test_of_versions_until_4_22_too(
        self, redis_states: Callable[..., Any], server: str, client: Any, prefix: str | None
    ) -> None:
        old = {"state": "old", "data": {"n": 1}}
        start = prefix or "telebot_"
        client.set(f"{start}-100", json.dumps({"1": old, "2": old, "x": old}))
        client.set(f"{start}7", json.dumps({"7": {"state": None, "data": {"n": 2}}}))
        client.set(f"{start}8", json.dumps({"8": "secret", "9": {"state": "a", "data": [1]}}))
        client.set(f"{start}9", "secret")
        client.set(f"{start}10", "[1]")
        client.set(f"{start}cache", "somebody else's")
        redis_states(**({"prefix": prefix} if prefix else {})).set_state(1, "new", -100)
        found = taken("telebot-redis", f"{server}?prefix={prefix}" if prefix else server)
        assert found.pop("user:1:chat:-100") == {"step": "new"}
        assert found.pop("user:2:chat:-100") == {"n": 1, "step": "old"}
        assert found.pop("user:7:chat:7") == {"n": 2}
        assert set(found) == {
            f"'{start}-100'['x']",
            "user:8:chat:8",
            "user:9:chat:8",
            f"'{start}9'",
            f"'{start}10'",
        }
        assert not any("secret" in str(error) for error in found.values())

    def test_that_are_no_records_are_errors_of_their_own(
        self, redis_states: Callable[..., Any], server: str, client: Any
    ) -> None:
        redis_states().set_state(1, "a")
        client.set("telebot:9:2:2", "secret")
        client.hset("telebot:9:3:3", mapping={"state": "a", "data": "[secret"})
        client.hset("telebot:9:4:4", mapping={"state": b"\xff", "data": "{}"})
        client.hset("telebot:9:5:5", mapping={"state": "a", "data": '{"$ttl": 1}'})
        client.hset("telebot:9:6:6", mapping={"state": "a", "data": "[" * 100_000})
        client.hset("telebot:9:x:7", mapping={"state": "a", "data": "{}"})
        client.hset(b"telebot:\xff", mapping={"state": "a", "data": "{}"})
        client.hset("telebot:9:8:8", mapping={"other": "secret"})
        found = taken("telebot-redis", f"{server}?bot=9")
        assert {key for key in found if key.startswith("user")} == {
            f"user:{number}:chat:{number}" for number in (2, 3, 4, 5, 6)
        }
        assert len(found) == 7
        assert not any("secret" in str(error) for error in found.values())
        assert "'$ttl'" in found["user:5:chat:5"]

    def test_are_only_read_and_found_step_by_step(
        self, redis_states: Callable[..., Any], server: str, client: Any
    ) -> None:
        redis_states().set_state(1, "a")
        client.set("telebot_2", "{}")
        before = {name: client.dump(name) for name in client.keys()}
        client.config_resetstat()
        taken("telebot-redis", server)
        commands = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
        settled = {"client|setinfo", "config|resetstat", "hello", "select", "info"}
        assert commands - settled == {"scan", "hmget", "get"}
        assert {name: client.dump(name) for name in client.keys()} == before

    def test_of_a_server_that_is_not_there(self) -> None:
        pytest.importorskip("redis", reason="needs the extra 'redis'")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be asked") as error:
            taken("telebot-redis", f"redis://:secret@127.0.0.1:{port}/1?prefix=x")
        assert "secret" not in str(error.value)

    @pytest.mark.parametrize(
        "rest", ["#secret@h", "/secret@h", "?secret@h", "@1/secret@h", ":secret"]
    )
    def test_of_a_url_in_which_a_password_ends_too_early(self, rest: str) -> None:
        pytest.importorskip("redis", reason="needs the extra 'redis'")
        with pytest.raises(ValueError, match=r"quote\(password, safe=\"\"\)") as error:
            taken("telebot-redis", f"redis://:6399{rest}")
        assert "6399" not in str(error.value)
        assert "secret" not in str(error.value)


# -- python-telegram-bot


def persistence(path: Path, **options: Any) -> Any:
    pytest.importorskip("telegram.ext", reason="needs the extra 'ptb'")
    from telegram.ext import ExtBot, PicklePersistence

    made = PicklePersistence(path, **options)
    made.set_bot(ExtBot("123456:token"))
    return made


def written(path: Path, user_data: dict[int, Any], **options: Any) -> Path:
    """The file that a PicklePersistence writes."""

    async def write() -> None:
        some = persistence(path, **options)
        for user, data in user_data.items():
            await some.update_user_data(user, data)
        await some.update_chat_data(-100, {"votes": {1, 2}})
        await some.update_bot_data({"runs": 3})
        await some.update_callback_data(([("id", 1.0, {"b": 1})], {"q": "id"}))
        await some.update_conversation("order", (1, 1), 2)
        await some.flush()

    asyncio.run(write())
    return path


class TestPicklePersistence:
    @pytest.mark.parametrize("single_file", [True, False])
    def test_in_one_file_or_several(self, tmp_path: Path, single_file: bool) -> None:
        data = {1: {"starts": 2}, 2: {}}
        path = written(tmp_path / "bot.pickle", data, single_file=single_file)
        assert path.exists() is single_file
        assert taken("ptb-pickle", path) == {
            "user:1": {"starts": 2},
            "chat:-100": {"votes": {1, 2}},
            "key:bot": {"runs": 3},
        }

    def test_of_version_20(self) -> None:
        found = taken("ptb-pickle", FOLDER / "ptb-20.0.pickle")
        assert found["user:1"]["kind"] == "private"
        assert found["user:1"]["since"].isoformat() == "2023-01-02T03:04:05+00:00"
        assert "who is of class telegram._user.User" in found["user:2"]
        assert found["chat:-100"] == {"votes": {1, 2}}
        assert found["key:bot"] == {"runs": 3}

    def test_of_version_13_which_has_defaultdicts(self, tmp_path: Path) -> None:
        users = defaultdict(dict, {1: {"n": 1}})
        data = {"user_data": users, "chat_data": defaultdict(dict), "conversations": {}}
        (tmp_path / "bot").write_bytes(pickle.dumps(data))
        assert taken("ptb-pickle", tmp_path / "bot") == {"user:1": {"n": 1}}

    def test_whose_bot_stores_no_data_of_chats(self, tmp_path: Path) -> None:
        data = {"user_data": {1: {"n": 1}}, "chat_data": None, "bot_data": None}
        (tmp_path / "bot").write_bytes(pickle.dumps(data))
        assert taken("ptb-pickle", tmp_path / "bot") == {"user:1": {"n": 1}}

    def test_with_what_only_ptb_knows(self, tmp_path: Path) -> None:
        path = tmp_path / "bot"
        some = persistence(path)
        from telegram import User
        from telegram.constants import ChatType, PollLimit

        async def write() -> None:
            await some.update_user_data(1, {ChatType.GROUP: [PollLimit.MIN_OPTION_LENGTH]})
            await some.update_user_data(2, {"cart": {"who": (1, User(1, "Alex", False))}})
            await some.update_user_data(3, {"bot": some.bot})
            await some.update_user_data(4, {7: "secret"})
            await some.update_user_data(5, {"$ttl": "secret"})
            await some.update_user_data(6, {"picture": bytearray(b"secret")})
            await some.update_user_data(7, {"class": User})

        asyncio.run(write())
        found = taken("ptb-pickle", path)
        assert found["user:1"] == {"group": [PollLimit.MIN_OPTION_LENGTH]}
        assert "cart.who[1] is of class telegram._user.User" in found["user:2"]
        assert "bot is of class telegram.Bot" in found["user:3"]
        assert "a field name is a str, not int" in found["user:4"]
        assert "'$ttl' begins with '$'" in found["user:5"]
        assert "picture is of class bytearray" in found["user:6"]
        assert "class is the class or function telegram._user.User" in found["user:7"]
        assert not any("secret" in str(got) or "Alex" in str(got) for got in found.values())

    def test_with_ids_that_are_none(self, tmp_path: Path) -> None:
        data = {"user_data": {"1": {"n": 1}, 2**63: {"n": 1}, 3: "x"}, "chat_data": [1]}
        (tmp_path / "bot").write_bytes(pickle.dumps(data))
        found = taken("ptb-pickle", tmp_path / "bot")
        assert list(found) == ["user_data['1']", "user_data[<int>]", "user:3", "chat_data"]
        assert all(isinstance(got, str) for got in found.values())


# -- sources that cannot be read


@pytest.mark.parametrize("name", ["telebot-pickle", "ptb-pickle"])
class TestFiles:
    def test_that_are_not_there(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="it should be"):
            taken(name, tmp_path / "none")

    def test_that_are_folders(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError):
            taken(name, tmp_path)

    @pytest.mark.parametrize("data", [b"", b"nonsense", b"\x80\x04.", pickle.dumps([1]), b"(."])
    def test_that_are_something_else(self, name: str, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(SessionDecodeError, match="it should be"):
            taken(name, tmp_path / "file")

    def test_that_are_cut_off(self, name: str, tmp_path: Path) -> None:
        real = {"telebot-pickle": "telebot-4.23.0.pkl", "ptb-pickle": "ptb-20.0.pickle"}[name]
        data = (FOLDER / real).read_bytes()
        for length in range(0, len(data), 7):
            (tmp_path / "file").write_bytes(data[:length])
            with pytest.raises(SessionDecodeError, match="cannot be read at byte"):
                taken(name, tmp_path / "file")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["telebot-4.23.0.pkl", "ptb-20.0.pickle"]))
def test_a_damaged_file_raises_nothing_else(tmp_path: Path, data: st.DataObject, name: str) -> None:
    whole = bytearray((FOLDER / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "file").write_bytes(whole)
    with suppress(SessionDecodeError, ValueError):
        list(IMPORTERS[f"{name.partition('-')[0]}-pickle"](str(tmp_path / "file")))


# -- what plain data is written as


def in_user_data(tmp_path: Path, value: object, protocol: int) -> Any:
    """A value that was a field in a PicklePersistence's file; of an error its message."""
    data = {"user_data": {1: {"value": value}}, "chat_data": {}}
    (tmp_path / "bot").write_bytes(pickle.dumps(data, protocol))
    ((_, got),) = IMPORTERS["ptb-pickle"](str(tmp_path / "bot"))
    return got["value"] if isinstance(got, dict) else str(got)


_KEYS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**63, 2**70),
    st.floats(),
    st.text(),
    st.text(st.characters(categories=["Cs"]), max_size=2),
    st.binary(),
    st.datetimes(timezones=st.none() | st.timezones()),
    st.times(timezones=st.none() | st.timezones()),
    st.dates(),
    st.timedeltas(),
    st.decimals().filter(lambda number: not number.is_snan()),  # which has no hash
    st.uuids(),
)

_HASHABLE = st.one_of(
    _KEYS,
    st.tuples(_KEYS, st.tuples(_KEYS)),
    st.frozensets(_KEYS, max_size=3),
)

_VALUES = st.recursive(
    _KEYS,
    lambda each: (
        st.lists(each, max_size=4)
        | st.lists(each, max_size=4).map(tuple)
        | st.dictionaries(st.text(), each, max_size=4)
        | st.dictionaries(_HASHABLE, each, max_size=4)
        | st.sets(_HASHABLE, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("protocol", EVERY_PROTOCOL)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_VALUES)
def test_plain_data_comes_back_equal(tmp_path: Path, protocol: int, value: object) -> None:
    expected = pickle.loads(pickle.dumps(value, protocol))  # protocols 0 to 3 lose a fold
    got = in_user_data(tmp_path, value, protocol)
    assert Codec().encode({"value": got}) == Codec().encode({"value": expected})


@pytest.mark.parametrize("protocol", EVERY_PROTOCOL)
def test_special_dicts_become_dicts(tmp_path: Path, protocol: int) -> None:
    value = [OrderedDict(b=1, a=OrderedDict()), defaultdict(list, {1: [2]}), defaultdict(Reducible)]
    got = in_user_data(tmp_path, value, protocol)
    assert got == [{"b": 1, "a": {}}, {1: [2]}, {}]
    assert [type(each) for each in got] == [dict, dict, dict]
    assert list(got[0]) == ["b", "a"]


def test_what_is_in_two_places_comes_in_both(tmp_path: Path) -> None:
    shared = [1]
    assert in_user_data(tmp_path, {"a": shared, "b": (shared,)}, 5) == {"a": [1], "b": ([1],)}
