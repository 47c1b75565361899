"""pyTelegramBotAPI's room: `install` gives every handler its session, as `message.session`.

All that telebot does with an update (handlers, next-step and reply callbacks, in its pool or not)
goes through `TeleBot._exec_task`, so that is where a session's scope is put around it. Nothing else
in session_sync knows telebot.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

try:
    import telebot
    from telebot.types import JsonDeserializable
except ImportError as error:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError(
        "session_sync.telebot needs pyTelegramBotAPI: pip install 'session-sync[telebot]'"
    ) from error

from .errors import SessionKeyError
from .locks import Hold, Turn
from .manager import SessionManager, no_key
from .scope import SessionScope, entries, in_handler
from .session import Session


def install(bot: telebot.TeleBot, sessions: SessionManager[Any]) -> telebot.TeleBot:
    """Give every update of `bot` its session: `message.session`, `call.session`, ...

    It is there in handlers of every kind, in their filters, in class middlewares, and in next-step
    and reply callbacks. The updates of one user are handled one after the other in the order in
    which they came, those of different users side by side; an update that waits for its turn
    occupies no worker. A handler that raises leaves the session as it was (see `on_error`), and the
    bot's exception handler gets the exception as always. `message.session = {...}` replaces all
    fields, `= None` empties the session. An update without a key is handled too; asking for its
    session raises SessionKeyError.

    Returns the bot. Raises TypeError if `bot` is no TeleBot, RuntimeError if it has sessions
    already, or if this version of telebot lacks what is needed here.

    >>> import telebot
    >>> from session_sync import SessionManager
    >>> import session_sync.telebot
    >>> bot = telebot.TeleBot("1:token", threaded=False)
    >>> bot = session_sync.telebot.install(bot, SessionManager())
    >>> @bot.message_handler(func=lambda message: True)
    ... def count(message):
    ...     message.session.counter = message.session.get("counter", 0) + 1
    ...     print(message.session.counter)
    >>> alex = {"id": 1, "is_bot": False, "first_name": "Alex"}
    >>> chat = {"id": 1, "type": "private"}
    >>> message = {"message_id": 1, "date": 1, "from": alex, "chat": chat, "text": "hi"}
    >>> update = telebot.types.Update.de_json({"update_id": 1, "message": message})
    >>> bot.process_new_updates([update, update])
    1
    2
    """
    if not isinstance(bot, telebot.TeleBot):
        raise TypeError(f"install() takes a telebot.TeleBot, not {type(bot).__name__}")
    run = getattr(bot, "_run_middlewares_and_handler", None)
    if run is None or "update_type" not in inspect.signature(run).parameters:
        raise RuntimeError(
            "this version of pyTelegramBotAPI runs filters outside of its tasks, where a session "
            "cannot be open yet: pip install --upgrade 'session-sync[telebot]'"
        )
    if isinstance(getattr(bot._exec_task, "__self__", None), _Room):
        raise RuntimeError("this bot has sessions already: install() was called before")
    setattr(JsonDeserializable, "session", _SessionAttribute())  # noqa: B010 (for type checkers)
    _Room(bot, sessions)
    return bot


class _Room:
    """What `install` puts in the place of some methods of one bot."""

    def __init__(self, bot: Any, sessions: SessionManager[Any]) -> None:
        self._bot: Final = bot
        self._sessions: Final = sessions
        self._waiting: Final[set[_Job]] = set()
        self._stopped = False
        self._exec_task: Final = bot._exec_task
        self._process_new_updates: Final = bot.process_new_updates
        self._test_message_handler: Final = bot._test_message_handler
        bot._exec_task = self.exec_task
        bot._test_message_handler = self.test_message_handler
        bot.process_new_updates = self.process_new_updates
        if bot.threaded:
            self._close_pool: Final = bot.worker_pool.close
            bot.worker_pool.close = self.close_pool

    def process_new_updates(self, updates: Iterable[Any]) -> None:
        """One at a time: telebot sorts a batch by kind, so a button press could overtake the
        message that was sent before it."""
        for update in updates:
            self._process_new_updates([update])

    def exec_task(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run `task` inside the scope of its update, in the pool if the bot has one."""
        update = args[0] if args else None
        if not isinstance(update, JsonDeserializable):  # an update listener gets a list
            self._exec_task(_as_handler, functools.partial(task, *args, **kwargs))
            return
        try:
            key = self._sessions.key_of(update)
        except Exception as error:  # not here, in the polling thread: the batch would be lost
            self._exec_task(_raise, error)
            return
        scope = None
        if key is not None:
            scope = self._sessions.scope_of(key, update)
            scope.timeout = None  # a queue must not drop messages
            if self._bot.use_class_middlewares and kwargs.get("handlers"):
                kwargs["handlers"] = _rolling_back(kwargs["handlers"], scope)
        job = _Job(scope, update, functools.partial(task, *args, **kwargs))
        if scope is None or scope.options.lazy or self._stopped or not self._bot.threaded:
            self._exec_task(_as_handler, job.run)
        else:
            self._queue(job, scope)

    def _queue(self, job: _Job, scope: SessionScope[Any]) -> None:
        """Let `job` wait for its key without a worker. When the key is free it goes to the end of
        the pool's queue, so that keys take turns there, however many updates one of them has."""
        self._waiting.add(job)
        locks = scope.options.door.locks
        job.turn = locks.queue_turn(
            scope.name, lambda turn: self._exec_task(_as_handler, self._run_turn, job, turn)
        )
        if self._stopped:
            self._withdraw(job)

    def _run_turn(self, job: _Job, turn: Turn) -> None:
        hold = turn.claim()
        if hold is not None:  # else somebody passed, and this will be called again
            self._waiting.discard(job)
            job.run(hold)

    def test_message_handler(self, handler: Any, update: Any) -> bool:
        """A filter that raises has failed as a handler does; class middlewares swallow it too."""
        try:
            return bool(self._test_message_handler(handler, update))
        except Exception as error:
            for entry in entries():
                if entry.update is update:
                    entry.scope.discard(error)
            raise

    def close_pool(self) -> None:
        """Nobody will run what still waits: it must not stand in anybody's way."""
        self._stopped = True
        self._close_pool()
        for job in list(self._waiting):
            self._withdraw(job)

    def _withdraw(self, job: _Job) -> None:
        self._waiting.discard(job)
        if job.turn is not None:
            job.turn.withdraw()


class _Job:
    """One task of telebot with the scope that goes around it (None: the update has no key)."""

    def __init__(
        self, scope: SessionScope[Any] | None, update: Any, work: Callable[[], None]
    ) -> None:
        self._scope: Final = scope
        self._update: Final = update
        self._work: Final = work
        self.turn: Turn | None = None

    def run(self, hold: Hold | None = None) -> None:
        """Do it, in a worker or in the polling thread; `hold` if the key was taken before."""
        scope = self._scope
        if scope is None:
            _bind(self._update, None)
            self._work()
            return
        scope.hold = hold
        with scope as session:
            _bind(self._update, session)
            self._work()


def _as_handler(work: Callable[..., None], *args: Any) -> None:
    token = in_handler.set(True)
    try:
        work(*args)
    finally:
        in_handler.reset(token)


def _raise(error: Exception) -> None:
    raise error


# -- class middlewares: telebot swallows what a handler raises, so its scope would not see it


def _rolling_back(
    handlers: Iterable[Mapping[str, Any]], scope: SessionScope[Any]
) -> Iterator[dict[str, Any]]:
    """The handlers, each made to roll its session back before anybody sees what it raised."""
    for handler in handlers:
        yield {**handler, "function": _RollsBack(handler["function"], scope)}


class _RollsBack:
    """A handler's function; telebot looks at its signature, which `__wrapped__` leads to."""

    def __init__(self, function: Callable[..., Any], scope: SessionScope[Any]) -> None:
        self.__wrapped__: Final = function
        self._scope: Final = scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(*args, **kwargs)
        except Exception as error:
            self._scope.scope.discard(error)
            raise


# -- message.session

# The session of each update object that is alive, or None where it has no key. Not an attribute of
# the object, because telebot prints those in str(), and pickle and copy take them along.
_bound: dict[int, tuple[Callable[[], Any], Session | None]] = {}
_UNBOUND: Final[tuple[Callable[[], Any], None]] = (lambda: None, None)


def _bind(update: Any, session: Session | None) -> None:
    at = id(update)
    _bound[at] = (weakref.ref(update, lambda _: _bound.pop(at, None)), session)


def _session_of(update: Any) -> Any:
    for entry in entries():
        if entry.update is update and entry.scope.session is not None:
            return entry.scope.session
    reference, session = _bound.get(id(update), _UNBOUND)
    if reference() is not update:
        raise AttributeError(
            f"this {type(update).__name__} is not the update that is being handled, so no session "
            f"is open for it; the update itself has one (call.session, not call.message.session), "
            f"and sessions.session_scope(...) opens one anywhere"
        )
    if session is None:
        raise SessionKeyError(no_key(update))
    return session


class _SessionAttribute:
    """`session`, on everything that telebot makes of JSON."""

    def __get__(self, update: Any, owner: type) -> Any:
        return self if update is None else _session_of(update)

    def __set__(self, update: Any, fields: Mapping[str, Any] | None) -> None:
        session = _session_of(update)
        if fields is session:  # message.session |= {...}
            return
        if fields is not None and not isinstance(fields, Mapping):
            raise TypeError(
                f"session {session.key!r} can be replaced by a mapping of fields or emptied by "
                f"None, not set to {type(fields).__name__}"
            )
        fields = dict(fields or {})
        session.clear()
        session.update(fields)
