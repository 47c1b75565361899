"""telebot's states in the session: `SessionStates` for a TeleBot."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import telebot_tools
from telebot_tools import KEY, OF_BOT, Bots, Exceptions, FailedError, Form, drain, feed, stored

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
from conftest import message  # noqa: E402
from telebot import custom_filters  # noqa: E402
from telebot.storage import StateMemoryStorage  # noqa: E402

from session_sync import (  # noqa: E402
    MemoryStorage,
    SessionKeyError,
    SessionManager,
    SQLiteStorage,
    by_chat,
    by_topic,
    by_user,
)
from session_sync.telebot import AsyncSessionStates, SessionStates, install  # noqa: E402

make_bot = pytest.fixture(telebot_tools.bot_maker)
threaded = pytest.fixture(params=[False, True], ids=["inline", "threaded"])(
    telebot_tools.make_threaded
)
GROUP = -100
store = pytest.fixture(params=telebot_tools.STORES)(telebot_tools.make_store)


def make_form(make_bot: Bots, sessions: SessionManager[Any], **options: Any) -> Any:
    """A bot that asks for a name and an age."""
    bot = make_bot(sessions, state_storage=SessionStates(sessions), **options)
    bot.add_custom_filter(custom_filters.StateFilter(bot))

    @bot.message_handler(commands=["start"])
    def start(m: Any) -> None:
        bot.set_state(m.from_user.id, Form.name, m.chat.id)

    @bot.message_handler(state=Form.name)
    def name(m: Any) -> None:
        with bot.retrieve_data(m.from_user.id, m.chat.id) as data:
            data["name"] = m.text
        bot.set_state(m.from_user.id, Form.age, m.chat.id)

    @bot.message_handler(state=Form.age)
    def age(m: Any) -> None:
        bot.add_data(m.from_user.id, m.chat.id, age=m.text)
        with bot.retrieve_data(m.from_user.id, m.chat.id) as data:
            m.session.person = dict(data)
        bot.delete_state(m.from_user.id, m.chat.id)

    return bot


# -- a conversation


def test_a_form_is_filled_in(make_bot: Bots, store: Any, threaded: bool) -> None:
    sessions = SessionManager(storage=store)
    bot = make_form(make_bot, sessions, threaded=threaded)
    feed(bot, message(text="/start"), message(text="Alex"), message(text="7"))
    drain(sessions)
    assert stored(sessions) == {"person": {"name": "Alex", "age": "7"}}


def test_another_bot_on_the_same_store_goes_on(make_bot: Bots, tmp_path: Path) -> None:
    for text in ("/start", "Alex", "7"):  # as after a restart, or in another process
        with closing(SQLiteStorage(tmp_path / "s.db")) as storage:
            feed(make_form(make_bot, SessionManager(storage=storage)), message(text=text))
    with closing(SQLiteStorage(tmp_path / "s.db")) as storage:
        assert storage.get(KEY) == {"person": {"name": "Alex", "age": "7"}}


def test_each_user_has_a_state_of_their_own_in_each_chat(make_bot: Bots) -> None:
    bot = make_form(make_bot, SessionManager())
    feed(bot, message(1, "/start"), message(2, "/start"), message(2, "Kim"))
    feed(bot, message(1, "/start", GROUP))
    states = [bot.get_state(1), bot.get_state(2), bot.get_state(1, GROUP), bot.get_state(2, GROUP)]
    assert states == ["Form:name", "Form:age", "Form:name", None]


def test_a_handler_that_raises_leaves_state_and_data(make_bot: Bots) -> None:
    sessions: SessionManager[Any] = SessionManager()
    exceptions = Exceptions()
    bot = make_form(make_bot, sessions, exception_handler=exceptions)

    @bot.message_handler(commands=["fail"], state="*")
    def fail(m: Any) -> None:
        bot.set_state(m.from_user.id, Form.age, m.chat.id)
        bot.add_data(m.from_user.id, m.chat.id, name="nobody")
        raise FailedError

    bot.message_handlers.insert(0, bot.message_handlers.pop())
    feed(bot, message(text="/start"), message(text="/fail"))
    assert [type(error) for error in exceptions.got] == [FailedError]
    assert bot.get_state(1) == "Form:name"
    assert stored(sessions) == {"$at": {"states": "Form:name"}}


def test_a_session_that_is_emptied_keeps_the_state(make_bot: Bots) -> None:
    sessions: SessionManager[Any] = SessionManager()
    bot = make_form(make_bot, sessions)

    @bot.message_handler(commands=["reset"])
    def reset(m: Any) -> None:
        m.session.a = 1
        m.session = None

    bot.message_handlers.insert(0, bot.message_handlers.pop())
    feed(bot, message(text="/start"), message(text="/reset"))
    assert bot.get_state(1) == "Form:name"
    assert sessions.forget(user=1) == 1
    assert bot.get_state(1) is None


def test_states_of_a_lazy_manager(make_bot: Bots) -> None:
    sessions: SessionManager[Any] = SessionManager(lazy=True)
    bot = make_form(make_bot, sessions)
    feed(bot, message(text="/start"), message(text="Alex"), message(text="7"))
    assert stored(sessions) == {"person": {"name": "Alex", "age": "7"}}


def test_after_a_release_a_state_is_set_in_a_scope_of_its_own(make_bot: Bots) -> None:
    sessions: SessionManager[Any] = SessionManager()
    bot = make_form(make_bot, sessions)

    @bot.message_handler(commands=["long"])
    def long(m: Any) -> None:
        m.session.a = 1
        m.session.release()
        bot.set_state(m.from_user.id, Form.age, m.chat.id)
        assert stored(sessions) == {"a": 1, "$at": {"states": "Form:age"}}

    feed(bot, message(text="/long"))
    assert bot.get_state(1) == "Form:age"


# -- what the methods do


def test_the_methods_do_what_telebots_own_do(store: Any) -> None:
    own = telebot.TeleBot("1:token", threaded=False, state_storage=StateMemoryStorage())
    sessions = SessionManager(storage=store)
    ours = telebot.TeleBot("1:token", threaded=False, state_storage=SessionStates(sessions))
    for bot in (own, ours):
        assert bot.get_state(7, GROUP) is None
        assert not bot.delete_state(7, GROUP)
        assert not bot.reset_data(7, GROUP)
        with pytest.raises(RuntimeError):
            bot.add_data(7, GROUP, a=1)
        bot.set_state(7, 5, GROUP)
        with bot.retrieve_data(7, GROUP) as data:
            assert data == {}
            data.update(a=1, b=[2])
        bot.add_data(7, GROUP, c=3)
        bot.set_state(7, Form.age, GROUP)
        with bot.retrieve_data(7, GROUP) as data:
            data["b"].append(4)
        with bot.retrieve_data(7, GROUP) as data:
            assert data == {"a": 1, "b": [2, 4], "c": 3}
        storage = bot.current_states
        assert storage.get_data(GROUP, 7, **OF_BOT) == {"a": 1, "b": [2, 4], "c": 3}
        storage.save(GROUP, 7, {"d": 1}, **OF_BOT)
        assert storage.get_data(GROUP, 7, **OF_BOT) == {"d": 1}
        assert bot.get_state(7, GROUP) == "Form:age"
        bot.reset_data(7, GROUP)
        assert storage.get_data(GROUP, 7, **OF_BOT) == {}
        bot.delete_state(7, GROUP)
        assert bot.get_state(7, GROUP) is None
    assert not store.has("user:7:chat:-100")


def test_without_a_state_there_is_no_data() -> None:
    sessions: SessionManager[Any] = SessionManager()
    states = SessionStates(sessions)
    with states.get_interactive_data(7, 7) as data:
        data["a"] = 1
    assert states.save(7, 7, {"a": 1}) is False
    assert states.get_data(7, 7) == {}
    assert not sessions.storage.has("user:7:chat:7")


def test_a_block_that_raises_undoes_its_data() -> None:
    bot = telebot.TeleBot("1:token", state_storage=SessionStates(SessionManager()))
    bot.set_state(7, "a")

    def fail() -> None:
        with bot.retrieve_data(7) as data:
            data["a"] = 1
            raise FailedError

    with pytest.raises(FailedError):
        fail()
    with bot.retrieve_data(7) as data:
        assert data == {}


def filled(change: Callable[[Any], None]) -> dict[str, Any]:
    """The data when a name is put in after `change`, in the same block."""
    bot = telebot.TeleBot("1:token", state_storage=SessionStates(SessionManager()))
    bot.set_state(7, "a")
    with bot.retrieve_data(7) as data:
        change(bot)
        data["name"] = "Alex"
    found: dict[str, Any] = bot.current_states.get_data(7, 7)
    return found


def look(bot: Any) -> None:
    with bot.retrieve_data(7) as data:
        assert data == {}


def begin_anew(bot: Any) -> None:
    bot.delete_state(7)
    bot.set_state(7, "b")


@pytest.mark.parametrize(
    "change", [look, begin_anew, lambda bot: bot.reset_data(7)], ids=["look", "anew", "reset"]
)
def test_what_is_done_in_a_block_does_not_lose_its_data(change: Any) -> None:
    assert filled(change) == {"name": "Alex"}


def test_a_state_that_is_set_in_a_block_keeps_its_data() -> None:
    states = SessionStates(SessionManager())
    with states.get_interactive_data(7, 7) as data:
        states.set_state(7, 7, "a")
        data["name"] = "Alex"
    assert states.get_data(7, 7) == {"name": "Alex"}


def test_a_session_can_be_released_in_a_block() -> None:
    sessions: SessionManager[Any] = SessionManager()
    states = SessionStates(sessions)
    states.set_state(7, 7, "a")
    with sessions.session_scope("user:7:chat:7") as session:
        with states.get_interactive_data(7, 7) as data:
            assert data == {}
            session.release()
    assert states.get_state(7, 7) == "a"


def test_ids_may_be_strings_and_a_copy_of_the_data_is_ones_own() -> None:
    states = SessionStates(SessionManager())
    states.set_state("7", "7", "a")  # type: ignore[arg-type] # as out of a button's data
    states.set_data(7, 7, "seen", [1])
    states.get_data(7, 7)["seen"].append(2)
    assert states.get_data(7, 7) == {"seen": [1]}


def test_blocks_of_eight_threads_lose_nothing(store: Any) -> None:
    sessions = SessionManager(storage=store)
    bot = telebot.TeleBot("1:token", threaded=False, state_storage=SessionStates(sessions))
    bot.set_state(7, "counting")

    def count() -> None:
        for _ in range(200):
            with bot.retrieve_data(7) as data:
                data["counter"] = data.get("counter", 0) + 1

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with bot.retrieve_data(7) as data:
        assert data == {"counter": 1600}


def test_the_bots_number_is_not_looked_at() -> None:
    bot = telebot.TeleBot("1:token", state_storage=SessionStates(SessionManager()))
    bot.set_state(7, "a")
    assert telebot.TeleBot("2:token", state_storage=bot.current_states).get_state(7) == "a"


@pytest.mark.parametrize(
    ("get_storage_key", "names"),
    [
        (by_user, {"states:chat:-100", "states:chat:7", "states:chat:-100:thread:4"}),
        (by_chat, {"states:user:7", "states:user:8", "states:user:7:thread:4"}),
        (by_topic, {"states:user:7", "states:user:8"}),
        (lambda m: f"of {m.from_user.id}", {"states:user:7:chat:-100", "states:user:7:chat:7"}),
    ],
    ids=["by_user", "by_chat", "by_topic", "own"],
)
def test_what_the_key_does_not_say_the_name_does(get_storage_key: Any, names: set[str]) -> None:
    sessions: SessionManager[Any] = SessionManager(get_storage_key=get_storage_key)
    states = SessionStates(sessions)
    standing = [(GROUP, 7, None), (GROUP, 8, None), (7, 7, None), (GROUP, 7, 4)]
    for number, (chat, user, thread) in enumerate(standing):
        states.set_state(chat, user, f"state {number}", message_thread_id=thread)
    for number, (chat, user, thread) in enumerate(standing):
        assert states.get_state(chat, user, message_thread_id=thread) == f"state {number}"
    found = [sessions.storage.get(key)["$at"] for key in sessions.find()]
    assert names <= set().union(*found)


def test_an_update_without_a_key_has_no_state() -> None:
    states = SessionStates(SessionManager(get_storage_key=lambda _update: None))
    with pytest.raises(SessionKeyError, match="user 7 in chat -100 has no session"):
        states.get_state(GROUP, 7)


def test_what_a_session_begins_with_is_not_asked_for_by_a_state() -> None:
    def initial(update: Any) -> dict[str, Any]:
        return {"name": update.from_user.first_name}  # a key has none

    sessions: SessionManager[Any] = SessionManager(initial=initial)
    bot = telebot.TeleBot("1:token", threaded=False, state_storage=SessionStates(sessions))
    install(bot, sessions)
    bot.set_state(1, "a")
    seen = []

    @bot.message_handler(func=lambda m: True)
    def look(m: Any) -> None:
        seen.append((dict(m.session), bot.get_state(m.from_user.id, m.chat.id)))

    feed(bot, message(1))
    assert seen == [({"name": "Alex"}, "a")]


# -- refused


def test_the_states_of_the_other_kind_of_bot_are_refused() -> None:
    sessions: SessionManager[Any] = SessionManager()
    bot = telebot.TeleBot("1:token", state_storage=AsyncSessionStates(sessions))
    with pytest.raises(TypeError, match=r"AsyncSessionStates.*needs SessionStates"):
        install(bot, sessions)


def test_a_second_storage_object_of_the_same_store_is_refused(tmp_path: Path) -> None:
    with (
        closing(SQLiteStorage(tmp_path / "s.db")) as one,
        closing(SQLiteStorage(tmp_path / "s.db")) as other,
    ):
        states = SessionStates(SessionManager(storage=one))
        bot = telebot.TeleBot("1:token", state_storage=states)
        with pytest.raises(ValueError, match=r"sqlite:.*two storage objects.*make one"):
            install(bot, SessionManager(storage=other))
        install(bot, SessionManager(storage=one, prefix="a:"))


def test_a_storage_is_no_manager() -> None:
    with pytest.raises(TypeError, match="takes a SessionManager, not a MemoryStorage"):
        SessionStates(MemoryStorage())  # type: ignore[arg-type]
