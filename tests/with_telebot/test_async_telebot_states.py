"""telebot's states in the session: `AsyncSessionStates` for an AsyncTeleBot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import telebot_tools
from telebot_tools import KEY, OF_BOT, FailedError

telebot = pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("aiohttp", reason="needs aiohttp")
from conftest import message, run_client  # noqa: E402
from telebot import asyncio_filters, types  # noqa: E402
from telebot.async_telebot import AsyncTeleBot  # noqa: E402
from telebot.asyncio_handler_backends import State, StatesGroup  # noqa: E402
from telebot.asyncio_storage import StateMemoryStorage  # noqa: E402

from session_sync import SessionManager  # noqa: E402
from session_sync.telebot import AsyncSessionStates, SessionStates, install  # noqa: E402

store = pytest.fixture(params=telebot_tools.STORES)(telebot_tools.make_store)


class Form(StatesGroup):  # type: ignore[misc] # an old telebot has another class for a TeleBot
    name = State()
    age = State()


def make_form(sessions: SessionManager[Any]) -> Any:
    """A bot that asks for a name and an age."""
    bot = AsyncTeleBot("1:token", state_storage=AsyncSessionStates(sessions))
    install(bot, sessions)
    bot.add_custom_filter(asyncio_filters.StateFilter(bot))

    @bot.message_handler(commands=["start"])
    async def start(m: Any) -> None:
        await bot.set_state(m.from_user.id, Form.name, m.chat.id)

    @bot.message_handler(commands=["fail"])
    async def fail(m: Any) -> None:
        await bot.set_state(m.from_user.id, Form.age, m.chat.id)
        raise FailedError

    @bot.message_handler(state=Form.name)
    async def name(m: Any) -> None:
        async with bot.retrieve_data(m.from_user.id, m.chat.id) as data:
            data["name"] = m.text
        await bot.set_state(m.from_user.id, Form.age, m.chat.id)

    @bot.message_handler(state=Form.age)
    async def age(m: Any) -> None:
        await bot.add_data(m.from_user.id, m.chat.id, age=m.text)
        session = await m.session
        async with bot.retrieve_data(m.from_user.id, m.chat.id) as data:
            session.person = dict(data)
        await bot.delete_state(m.from_user.id, m.chat.id)

    return bot


def run(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_client(make())


async def feed(bot: Any, *updates: dict[str, Any]) -> None:
    await bot.process_new_updates([types.Update.de_json(update) for update in updates])


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_form_is_filled_in(store: Any, lazy: bool) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=store, lazy=lazy)

    async def main() -> None:
        bot = make_form(sessions)
        await feed(bot, message(text="/start"), message(text="Alex"), message(text="7"))

    run(main)
    assert store.get(KEY) == {"person": {"name": "Alex", "age": "7"}}


def test_a_handler_that_raises_leaves_the_state() -> None:
    sessions: SessionManager[Any] = SessionManager()

    async def main() -> None:
        bot = make_form(sessions)
        await feed(bot, message(text="/start"))
        await feed(bot, message(text="/fail"))
        assert await bot.get_state(1) == "Form:name"

    run(main)


def test_the_methods_do_what_telebots_own_do(store: Any) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=store)

    async def main() -> None:
        for states in (StateMemoryStorage(), AsyncSessionStates(sessions)):
            bot = AsyncTeleBot("1:token", state_storage=states)
            assert await bot.get_state(7) is None
            assert not await bot.delete_state(7)
            assert not await bot.reset_data(7)
            with pytest.raises(RuntimeError):
                await bot.add_data(7, a=1)
            await bot.set_state(7, Form.age)
            async with bot.retrieve_data(7) as data:
                assert data == {}
                data.update(a=[1])
            await bot.add_data(7, c=3)
            async with bot.retrieve_data(7) as data:
                data["a"].append(2)
            assert await states.get_data(7, 7, **OF_BOT) == {"a": [1, 2], "c": 3}
            await states.save(7, 7, {"d": 1}, **OF_BOT)
            assert await states.get_data(7, 7, **OF_BOT) == {"d": 1}
            assert await bot.get_state(7) == "Form:age"
            await bot.reset_data(7)
            assert await states.get_data(7, 7, **OF_BOT) == {}
            await bot.delete_state(7)
            assert await bot.get_state(7) is None

    run(main)
    assert not store.has("user:7:chat:7")


def test_outside_of_handlers_a_lazy_manager_is_as_any_other() -> None:
    states = AsyncSessionStates(SessionManager(lazy=True))

    async def main() -> None:
        await states.set_state(7, 7, "a")
        async with states.get_interactive_data(7, 7) as data:
            data["name"] = "Alex"
        assert await states.get_data(7, 7) == {"name": "Alex"}

    run(main)


def test_blocks_of_eight_tasks_lose_nothing(store: Any) -> None:
    sessions: SessionManager[Any] = SessionManager(storage=store)

    async def count(bot: Any) -> None:
        for _ in range(200):
            async with bot.retrieve_data(7) as data:
                before = data.get("counter", 0)
                await asyncio.sleep(0)
                data["counter"] = before + 1

    async def main() -> None:
        bot = AsyncTeleBot("1:token", state_storage=AsyncSessionStates(sessions))
        await bot.set_state(7, "counting")
        await asyncio.gather(*(count(bot) for _ in range(8)))
        async with bot.retrieve_data(7) as data:
            assert data == {"counter": 1600}

    run(main)


def test_the_states_of_the_other_kind_of_bot_are_refused() -> None:
    async def main() -> None:
        sessions: SessionManager[Any] = SessionManager()
        bot = AsyncTeleBot("1:token", state_storage=SessionStates(sessions))
        with pytest.raises(TypeError, match=r"SessionStates.*needs AsyncSessionStates"):
            install(bot, sessions)

    run(main)
