"""telebot's states in the session: `TeleBot(TOKEN, state_storage=SessionStates(sessions))`.

A state and its data are where the session of that user in that chat says that the user stands,
under names of their own. So they are locked, written and undone with the session, and any process
sees them. What the key of the session does not say (the topic; the chat, of `by_user`; the user, of
`by_chat`) is in the names.

This module knows telebot's protocol for states; it does not know how a bot is given its sessions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

from ..errors import SessionKeyError
from ..manager import SessionManager
from ..session.keys import OWN_KEY_FUNCTIONS, StorageKey, message_json, text_of
from ..session.standing import standing_of
from ..storages.base import plain
from .library import AsyncStateStorageBase, Message, StateStorageBase

P = ParamSpec("P")
T = TypeVar("T")


class _Place(NamedTuple):
    """Where a state is kept: the key of the session, and the names of the state and of its data."""

    key: str
    state: str
    data: str


class _Places:
    """Where the states of one manager are kept, and how those that are open here are reached."""

    def __init__(self, sessions: SessionManager[Any]) -> None:
        if not hasattr(sessions, "scopes"):
            raise TypeError(
                f"{type(self).__name__}() takes a SessionManager, not a {type(sessions).__name__}; "
                f"of a storage, SessionManager(storage=...) makes one"
            )
        self.sessions: Final = sessions
        self._scopes: Final = sessions.scopes
        get_storage_key = sessions.scopes.get_storage_key
        # Which of ours give the same key for the same message, so that it need not be made again.
        is_own = get_storage_key in OWN_KEY_FUNCTIONS
        self._place: Final = lru_cache(1024)(self._find) if is_own else self._find

    def refuse_other_storage(self, managers: Sequence[SessionManager[Any]]) -> None:
        """Raise ValueError if a handler's session and its states are in one store, and two storage
        objects are there for it: one would wait for the other."""
        own = self.sessions.storage
        store = getattr(own, "store", None)
        for manager in managers:
            other = manager.storage
            if store is not None and other is not own and getattr(other, "store", None) == store:
                raise ValueError(
                    f"the states of this bot and its sessions are both in {store}, by two storage "
                    f"objects, so a handler would wait for itself; make one, and give it to both "
                    f"managers, or the same manager to install() and {type(self).__name__}()"
                )

    def _find(
        self,
        chat_id: int,
        user_id: int,
        business_connection_id: str | None = None,
        message_thread_id: int | None = None,
        bot_id: int | None = None,
    ) -> _Place:
        chat_id, user_id = int(chat_id), int(user_id)  # of a button's data they are strings
        message = message_json(user_id, chat_id, message_thread_id, business_connection_id)
        key = text_of(self._scopes.get_storage_key(Message.de_json(message)))
        if key is None:
            raise SessionKeyError(
                f"user {user_id} in chat {chat_id} has no session, so there is no state: "
                f"get_storage_key returned None"
            )
        try:
            said = StorageKey.parse(key)
        except ValueError:  # a key of another form: then the names say it all
            said = StorageKey(key=key)
        rest = "".join(
            f":{name}:{given}"
            for name, given, has in (
                ("user", user_id, said.user),
                ("chat", chat_id, said.chat),
                ("thread", message_thread_id, said.thread),
                ("business", business_connection_id, said.business),
            )
            if given is not None and given != has
        )
        return _Place(key, f"states{rest}", f"states_data{rest}")


# -- what is done where a user stands


def _set_state(at: dict[str, Any], place: _Place, state: Any) -> bool:
    at[place.state] = getattr(state, "name", state)
    return True


def _get_state(at: dict[str, Any], place: _Place) -> Any:
    return at.get(place.state)


def _delete_state(at: dict[str, Any], place: _Place) -> bool:
    at.pop(place.data, None)
    return at.pop(place.state, None) is not None


def _set_data(at: dict[str, Any], place: _Place, name: str, value: Any) -> bool:
    if place.state not in at:
        raise RuntimeError(
            f"no state is set in the session {place.key!r}, so there is nothing that data could "
            f"belong to: call set_state() before"
        )
    at.setdefault(place.data, {})
    at[place.data][name] = value
    return True


def _get_data(at: dict[str, Any], place: _Place) -> dict[str, Any]:
    data: dict[str, Any] = plain(at.get(place.data, {}))
    return data


def _reset_data(at: dict[str, Any], place: _Place) -> bool:
    at.pop(place.data, None)
    return place.state in at


def _save(at: dict[str, Any], place: _Place, data: dict[str, Any]) -> bool:
    if place.state not in at:
        return False
    at[place.data] = data
    return True


def _live_data(at: dict[str, Any], place: _Place) -> dict[str, Any]:
    """The data itself; without a state, data that are kept if there is one in the end."""
    if place.state not in at:
        return {}
    at.setdefault(place.data, {})
    live: dict[str, Any] = at[place.data]
    return live


def _keep_data(at: dict[str, Any], place: _Place, data: dict[str, Any]) -> None:
    """At the end of a block, in which they may have been taken out: as telebot's, they are saved
    then, if there is a state."""
    if place.state in at and at.get(place.data) is not data:
        at[place.data] = data


_Act = Callable[Concatenate[dict[str, Any], _Place, P], T]


class SessionStates(_Places, StateStorageBase):  # type: ignore[misc] # telebot has no types
    """The states of a TeleBot, kept in its sessions.

    `set_state`, `get_state`, `delete_state`, `retrieve_data`, `add_data`, `reset_data`, states in
    handlers and `StateContext` are used as ever. A state and its data belong to the session of that
    user in that chat: inside of that user's handler they are part of it, and a handler that raises
    leaves them as they were; outside, the session is opened for them, and saved. `retrieve_data`
    hands out the data itself, one block after the other. To empty a session (`message.session =
    None`) leaves the state; `sessions.forget` deletes both.

    The number of the bot is not looked at: two bots on one store have managers with a `prefix`.

    Arguments:
        sessions: the manager that `install` is given, or another one; its key function says which
            session a user has in a chat.

    Raises TypeError if it is no SessionManager. Its methods, which telebot calls, raise what
    opening a session raises.

    >>> import telebot
    >>> from session_sync import SessionManager
    >>> from session_sync.telebot import SessionStates, install
    >>> sessions = SessionManager()
    >>> bot = telebot.TeleBot("1:token", threaded=False, state_storage=SessionStates(sessions))
    >>> bot = install(bot, sessions)
    >>> _ = bot.set_state(7, "Form:name", 7)
    >>> with bot.retrieve_data(7, 7) as data:
    ...     data["name"] = "Alex"
    >>> bot.get_state(7, 7), sessions.storage.get("user:7:chat:7")
    ('Form:name', {'$at': {'states': 'Form:name', 'states_data': {'name': 'Alex'}}})
    """

    def _do(self, act: _Act[P, T], place: _Place, *args: P.args, **kwargs: P.kwargs) -> T:
        session = self._scopes.open_here(place.key)
        if session is not None:
            return act(standing_of(session), place, *args, **kwargs)
        with self._scopes.of_standing(place.key) as session:
            return act(standing_of(session), place, *args, **kwargs)

    # `where` and `more`: the business connection, the topic and the bot, as telebot names them.

    def set_state(self, chat_id: int, user_id: int, state: Any, *where: Any, **more: Any) -> bool:
        """Set the state of a user in a chat; what data there is stays."""
        return self._do(_set_state, self._place(chat_id, user_id, *where, **more), state)

    def get_state(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> Any:
        """The state of a user in a chat; None if there is none."""
        return self._do(_get_state, self._place(chat_id, user_id, *where, **more))

    def delete_state(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> bool:
        """Delete the state and its data; False if there is none."""
        return self._do(_delete_state, self._place(chat_id, user_id, *where, **more))

    def set_data(
        self, chat_id: int, user_id: int, key: str, value: Any, *where: Any, **more: Any
    ) -> bool:
        """Set one thing in the data; raises RuntimeError if there is no state."""
        return self._do(_set_data, self._place(chat_id, user_id, *where, **more), key, value)

    def get_data(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> dict[str, Any]:
        """A copy of the data."""
        return self._do(_get_data, self._place(chat_id, user_id, *where, **more))

    def reset_data(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> bool:
        """Empty the data; False if there is no state."""
        return self._do(_reset_data, self._place(chat_id, user_id, *where, **more))

    @contextmanager
    def get_interactive_data(
        self, chat_id: int, user_id: int, *where: Any, **more: Any
    ) -> Iterator[dict[str, Any]]:
        """The data itself, in a `with` block."""
        place = self._place(chat_id, user_id, *where, **more)
        with self._scopes.of_standing(place.key) as session:
            at = standing_of(session)
            data = _live_data(at, place)
            yield data
            _keep_data(at, place, data)

    def save(
        self, chat_id: int, user_id: int, data: dict[str, Any], *where: Any, **more: Any
    ) -> bool:
        """Replace the data; False if there is no state."""
        return self._do(_save, self._place(chat_id, user_id, *where, **more), data)


class AsyncSessionStates(_Places, AsyncStateStorageBase):  # type: ignore[misc] # as above
    """The states of an AsyncTeleBot, kept in its sessions: see `SessionStates`.

    >>> from session_sync import SessionManager
    >>> from session_sync.telebot import AsyncSessionStates, install
    >>> sessions = SessionManager()
    >>> async def run():
    ...     from telebot.async_telebot import AsyncTeleBot
    ...     bot = AsyncTeleBot("1:token", state_storage=AsyncSessionStates(sessions))
    ...     install(bot, sessions)
    ...     await bot.set_state(7, "Form:name", 7)
    ...     async with bot.retrieve_data(7, 7) as data:
    ...         data["name"] = "Alex"
    ...     return await bot.get_state(7, 7)
    >>> import asyncio
    >>> asyncio.run(run())
    'Form:name'
    """

    async def _do(self, act: _Act[P, T], place: _Place, *args: P.args, **kwargs: P.kwargs) -> T:
        session = self._scopes.open_here(place.key)
        if session is not None:
            return act(standing_of(await session), place, *args, **kwargs)
        async with self._scopes.of_standing(place.key) as session:
            return act(standing_of(session), place, *args, **kwargs)

    async def set_state(
        self, chat_id: int, user_id: int, state: Any, *where: Any, **more: Any
    ) -> bool:
        """Set the state of a user in a chat; what data there is stays."""
        return await self._do(_set_state, self._place(chat_id, user_id, *where, **more), state)

    async def get_state(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> Any:
        """The state of a user in a chat; None if there is none."""
        return await self._do(_get_state, self._place(chat_id, user_id, *where, **more))

    async def delete_state(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> bool:
        """Delete the state and its data; False if there is none."""
        return await self._do(_delete_state, self._place(chat_id, user_id, *where, **more))

    async def set_data(
        self, chat_id: int, user_id: int, key: str, value: Any, *where: Any, **more: Any
    ) -> bool:
        """Set one thing in the data; raises RuntimeError if there is no state."""
        return await self._do(_set_data, self._place(chat_id, user_id, *where, **more), key, value)

    async def get_data(
        self, chat_id: int, user_id: int, *where: Any, **more: Any
    ) -> dict[str, Any]:
        """A copy of the data."""
        return await self._do(_get_data, self._place(chat_id, user_id, *where, **more))

    async def reset_data(self, chat_id: int, user_id: int, *where: Any, **more: Any) -> bool:
        """Empty the data; False if there is no state."""
        return await self._do(_reset_data, self._place(chat_id, user_id, *where, **more))

    @asynccontextmanager
    async def get_interactive_data(
        self, chat_id: int, user_id: int, *where: Any, **more: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """The data itself, in an `async with` block."""
        place = self._place(chat_id, user_id, *where, **more)
        async with self._scopes.of_standing(place.key) as session:
            at = standing_of(session)
            data = _live_data(at, place)
            yield data
            _keep_data(at, place, data)

    async def save(
        self, chat_id: int, user_id: int, data: dict[str, Any], *where: Any, **more: Any
    ) -> bool:
        """Replace the data; False if there is no state."""
        return await self._do(_save, self._place(chat_id, user_id, *where, **more), data)


def refuse_other_states(bot: Any, managers: Sequence[SessionManager[Any]], is_async: bool) -> None:
    """Raise TypeError if a bot has the states of the other kind of bots, and ValueError if it has
    states that would wait for its sessions."""
    states = bot.current_states
    right, wrong = SessionStates, AsyncSessionStates
    if is_async:
        right, wrong = wrong, right
    if isinstance(states, wrong):
        raise TypeError(
            f"this {type(bot).__name__} has state_storage={wrong.__name__}(...), with which no "
            f"state would ever fit: it needs {right.__name__}"
        )
    if isinstance(states, right):
        states.refuse_other_storage(managers)
