"""telebot's next steps and replies under `install`: looked up in the turn of the user's message."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")

from conftest import callback_query, message  # noqa: E402
from telebot import types  # noqa: E402
from telebot.handler_backends import HandlerBackend  # noqa: E402
from telebot_tools import KEY, Bots, Exceptions, drain, feed  # noqa: E402
from waiting import SOON, until  # noqa: E402

from session_sync import SessionManager, StorageKey  # noqa: E402


@pytest.fixture
def bots() -> Iterator[Bots]:
    made = Bots()
    yield made
    made.stop()


@pytest.fixture(params=[False, True], ids=["inline", "threaded"])
def in_threads(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def key(user: int) -> str:
    return str(StorageKey(user=user, chat=user))


def save_answer(answer: Any, name: str = "name") -> None:
    answer.session[name] = answer.text


def made(update: dict[str, Any]) -> Any:
    return types.Update.de_json(update).message


def test_no_answer_of_a_batch_is_lost(bots: Bots, in_threads: bool) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=in_threads)

    @bot.message_handler(commands=["name"])
    def ask(m: Any) -> None:
        bot.register_next_step_handler(m, save_answer)

    @bot.message_handler(func=lambda m: True)
    def other(m: Any) -> None:
        m.session.other = m.text

    users = range(1, 5)
    feed(bot, *(message(user, "/name") for user in users))
    drain(sessions, *map(key, users))
    feed(bot, *(message(user, f"Alex {user}") for user in users))
    drain(sessions, *map(key, users))
    answers = [sessions.storage.get(key(user)) for user in users]
    assert answers == [{"name": f"Alex {user}"} for user in users]


def test_a_question_and_its_answer_may_be_in_one_batch(bots: Bots, in_threads: bool) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=in_threads)

    @bot.message_handler(commands=["name"])
    def ask(m: Any) -> None:
        bot.register_next_step_handler(m, ask_age)

    def ask_age(m: Any) -> None:
        save_answer(m)
        bot.register_next_step_handler(m, save_answer, name="age")

    @bot.message_handler(func=lambda m: True)
    def other(m: Any) -> None:
        m.session.setdefault("others", []).append(m.text)

    feed(bot, *(message(1, text) for text in ("/name", "Alex", "18", "hi", "there")))
    drain(sessions)
    assert sessions.storage.get(KEY) == {"name": "Alex", "age": "18", "others": ["hi", "there"]}


def test_an_answer_that_comes_before_its_step_is_registered_is_not_lost(bots: Bots) -> None:
    """And the other users are served meanwhile."""
    sessions = SessionManager()
    bot = bots(sessions, threaded=True)
    asked, go_on = threading.Event(), threading.Event()

    @bot.message_handler(commands=["name"])
    def ask(m: Any) -> None:
        asked.set()  # bot.send_message(...): the user answers at once
        assert go_on.wait(SOON)
        bot.register_next_step_handler(m, save_answer)

    @bot.message_handler(func=lambda m: True)
    def other(m: Any) -> None:
        m.session.other = m.text

    feed(bot, message(1, "/name"))
    assert asked.wait(SOON)
    feed(bot, message(1, "Alex"), message(2, "hi"))
    until(lambda: sessions.storage.get(key(2)))
    go_on.set()
    drain(sessions)
    assert sessions.storage.get(KEY) == {"name": "Alex"}
    assert sessions.storage.get(key(2)) == {"other": "hi"}


def test_a_step_is_found_by_a_bot_that_has_no_handler_of_messages(
    bots: Bots, in_threads: bool
) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=in_threads)

    @bot.callback_query_handler(func=lambda call: True)
    def ask(call: Any) -> None:
        bot.register_next_step_handler(call.message, save_answer)

    feed(bot, message(1, "too early"), callback_query(1), message(1, "Alex"), message(1, "hi"))
    drain(sessions)
    assert sessions.storage.get(KEY) == {"name": "Alex"}


def test_a_reply_is_looked_up_in_turn_and_handled_as_a_message_too(
    bots: Bots, in_threads: bool
) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=in_threads)
    question = message(1, "What is your name?")

    @bot.message_handler(commands=["name"])
    def ask(m: Any) -> None:
        bot.register_for_reply(made(question), save_answer)

    @bot.message_handler(func=lambda m: True)
    def other(m: Any) -> None:
        m.session.other = m.text

    reply = message(1, "Alex", reply_to_message=question["message"])
    feed(bot, message(1, "/name"), reply)
    drain(sessions)
    assert sessions.storage.get(KEY) == {"name": "Alex", "other": "Alex"}


@pytest.mark.parametrize("fails", [{"first"}, {"second"}, {"third"}, {"first", "third"}, set()])
def test_several_steps_of_one_message_are_a_unit_each(
    bots: Bots, in_threads: bool, fails: set[str]
) -> None:
    """What fails in one is undone, and neither keeps the others from running nor undoes theirs."""
    sessions = SessionManager()
    exceptions = Exceptions()
    bot = bots(sessions, threaded=in_threads, exception_handler=exceptions)

    def step(answer: Any, name: str) -> None:
        save_answer(answer, name)
        if name in fails:
            raise LookupError(name)

    names = ["first", "second", "third"]
    for name in names:
        bot.register_next_step_handler_by_chat_id(1, step, name)
    feed(bot, message(1, "x"))
    until(lambda: len(exceptions.got) == len(fails))
    drain(sessions)
    assert {str(error).strip("'") for error in exceptions.got} == fails
    kept = {name: "x" for name in names if name not in fails}
    assert (sessions.storage.get(KEY) or {}) == kept


def test_a_step_that_releases_the_session_leaves_a_new_one_to_the_next(
    bots: Bots, in_threads: bool
) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=in_threads)
    done = threading.Semaphore(0)

    def release(answer: Any) -> None:
        answer.session.first = True
        answer.session.release()

    def second(answer: Any) -> None:
        answer.session.second = True
        done.release()

    bot.register_next_step_handler_by_chat_id(1, release)
    bot.register_next_step_handler_by_chat_id(1, second)
    feed(bot, message(1, "x"))
    assert done.acquire(timeout=SOON)
    drain(sessions)
    assert sessions.storage.get(KEY) == {"first": True, "second": True}


class TwoSteps(HandlerBackend):
    """Takes off in two steps, as telebot's own one for Redis does."""

    def register_handler(self, number: Any, handler: Any) -> None:
        self.handlers.setdefault(number, []).append(handler)

    def clear_handlers(self, number: Any) -> None:
        self.handlers.pop(number, None)

    def get_handlers(self, number: Any) -> Any:
        found = self.handlers.get(number)
        time.sleep(0.01)  # the round trip
        self.clear_handlers(number)
        return found


def test_of_two_users_in_a_chat_one_takes_the_step(bots: Bots) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=True, num_threads=4, next_step_backend=TwoSteps())
    taken: list[int] = []

    def step(answer: Any) -> None:
        taken.append(answer.from_user.id)

    for _ in range(5):
        bot.register_next_step_handler_by_chat_id(-5, step)
        feed(bot, *(message(user, "x", chat=-5) for user in range(1, 5)))
        drain(sessions, *(f"user:{user}:chat:-5" for user in range(1, 5)))
    assert len(taken) == 5


def test_listeners_are_told_of_messages_and_not_of_answers(bots: Bots, in_threads: bool) -> None:
    sessions = SessionManager()
    bot = bots(sessions, threaded=in_threads)
    told: list[str] = []
    bot.set_update_listener(lambda messages: told.extend(m.text for m in messages))
    asked, go_on = threading.Event(), threading.Event()

    @bot.message_handler(commands=["wait"])
    def wait(m: Any) -> None:
        asked.set()
        assert go_on.wait(SOON if in_threads else 0) or not in_threads

    bot.register_next_step_handler_by_chat_id(2, save_answer)
    feed(bot, message(1, "/wait"), message(2, "Alex"), message(2, "hi"))
    drain(sessions, key(2))
    bot.register_next_step_handler_by_chat_id(1, save_answer)
    feed(bot, message(1, "Bo"), message(1, "not an answer"))
    go_on.set()
    drain(sessions)
    until(lambda: len(told) == 3)
    assert sorted(told) == ["/wait", "hi", "not an answer"]
    assert sessions.storage.get(key(1)) == {"name": "Bo"}
    assert sessions.storage.get(key(2)) == {"name": "Alex"}
