"""pyTelegramBotAPI's room: `install` gives every handler its session, as `message.session`, and if
it is told to, its chat's as well, as `message.chat_session`.

All that a TeleBot does with an update (handlers, next-step and reply callbacks, in its pool or not)
goes through its `_exec_task`, and all that an AsyncTeleBot does with one goes through its
`_run_middlewares_and_handlers`, so that is where a session's scope is put around it. What telebot
looks up for a message before (next steps, replies) is looked up inside the scope. Nothing else in
session_sync knows telebot.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVar

try:
    import telebot
    from telebot.types import JsonDeserializable
except ImportError as error:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError(
        "session_sync.telebot needs pyTelegramBotAPI: pip install 'session-sync[telebot]'"
    ) from error

from ..errors import SessionKeyError
from ..lifecycle.backend import Backend
from ..lifecycle.current import entries, in_handler
from ..lifecycle.entry import SessionScope
from ..lifecycle.scope import Scope
from ..lifecycle.supergroups import Migration, amigrate_chat, migrate_chat, migrating, migration_in
from ..lifecycle.threads import errands
from ..lifecycle.update import (
    NAMES,
    Delivery,
    Managers,
    UpdateScope,
    dedupes,
    managers_of,
    release_all,
    tickets_for,
)
from ..locks.tickets import Tickets
from ..manager import SessionManager, no_key
from ..session.session import BaseSession, replace_fields

if TYPE_CHECKING:  # it needs aiohttp, which who has no AsyncTeleBot may not have
    from telebot.async_telebot import AsyncTeleBot

Bot = TypeVar("Bot", bound="telebot.TeleBot | AsyncTeleBot")


def install(
    bot: Bot,
    sessions: SessionManager[Any],
    *,
    chat_session: SessionManager[Any] | None = None,
    migrate_chats: bool | None = None,
) -> Bot:
    """Give every update of `bot` its session: `message.session`, `call.session`, ...

    It is there in handlers of every kind, in their filters, in class middlewares, and in next-step
    and reply callbacks, which are looked up when their message is handled. The updates of one user
    are handled one after the other in the order in which they came, those of different users side
    by side; an update that waits for its turn occupies no worker. A handler that raises leaves the
    session as it was (see `on_error`), and the bot's exception handler gets the exception as
    always. `message.session = {...}` replaces all fields, `= None` empties the session. An update
    without a key is handled too; asking for its session raises SessionKeyError.

    All of this holds for an AsyncTeleBot as well; of a lazy manager, its handlers first say
    `session = await message.session`. An exception that comes from outside of its handlers (from a
    class middleware, `get_storage_key`, the storage) goes to the bot's exception handler too, and
    leaves `process_new_updates` if that one does not answer True.

    With `chat_session`, an update has a second session, `message.chat_session`, under the same
    rules and of a manager of its own. It is handled when both are free for it; what is saved of
    one does not depend on whether the other can be.

    Arguments:
        bot: a TeleBot or an AsyncTeleBot.
        sessions: where the sessions come from.
        chat_session: where those of `message.chat_session` come from; most often a manager with
            `get_storage_key=by_chat`, on the same storage or another one.
        migrate_chats: when a group becomes a supergroup, move its sessions to its new number
            (`sessions.migrate_chat`), before the service message is handled that says so. What
            fails in that goes where goes what a handler raises, and the message is handled all the
            same. It reads all keys of the store; by default it is done if the storage can list
            them.

    Returns the bot. Raises TypeError if `bot` is neither a TeleBot nor an AsyncTeleBot, or if a
    storage cannot list its keys and `migrate_chats` is True; ValueError if `chat_session` is
    `sessions`; RuntimeError if a manager was closed, if the bot has sessions already, or if this
    version of telebot lacks what is needed here.

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
    room = _room_for(bot)
    if isinstance(getattr(bot.process_new_updates, "__self__", None), room):
        raise RuntimeError("this bot has sessions already: install() was called before")
    if not _is_known(bot, room):
        raise RuntimeError(
            "this version of pyTelegramBotAPI has no one task for all of an update (middlewares, "
            "filters, handlers) that a session could be open for: "
            "pip install --upgrade 'session-sync[telebot]'"
        )
    managers = managers_of(sessions, chat_session)
    moving = migrating(managers, migrate_chats)
    for place, name in enumerate(NAMES):
        setattr(JsonDeserializable, name, _SessionAttribute(place))
    room(bot, managers, moving)
    return bot


_TASK_PARAMETERS: Final = ["message", "handlers", "middlewares", "update_type"]


def _is_known(bot: Any, room: type[_Room | _AsyncRoom]) -> bool:
    """Whether this version of telebot has what the room puts something else in the place of."""
    if not all(hasattr(bot, name) for name in (room.task, *room.looks_up)):
        return False
    return list(inspect.signature(getattr(bot, room.task)).parameters)[:4] == _TASK_PARAMETERS


def _room_for(bot: Any) -> type[_Room | _AsyncRoom]:
    if isinstance(bot, telebot.TeleBot):
        return _Room
    module = sys.modules.get("telebot.async_telebot")  # who has such a bot has imported it
    if module is not None and isinstance(bot, module.AsyncTeleBot):
        return _AsyncRoom
    raise TypeError(f"install() takes a TeleBot or an AsyncTeleBot, not {type(bot).__name__}")


# -- TeleBot


class _Room:
    """What `install` puts in the place of some methods of one TeleBot."""

    task: ClassVar = "_run_middlewares_and_handler"
    #: What telebot does with a batch of messages in the thread that fetches them.
    looks_up: ClassVar = (
        "_notify_next_handlers",
        "_notify_reply_handlers",
        "_TeleBot__notify_update",
        "_notify_command_handlers",
    )

    def __init__(self, bot: Any, managers: Managers, moving: Managers) -> None:
        self._bot: Final = bot
        self._sessions: Final = managers[0]
        self._managers: Final = managers
        self._dedupes: Final = dedupes(managers)
        self._is_plain: Final = len(managers) == 1 and not self._dedupes
        self._moving: Final = moving  # which of them move the sessions of a chat
        self._waiting: Final[set[_Job | _UpdateJob]] = set()
        self._stopped = False
        self._exec_task: Final = bot._exec_task
        self._process_new_updates: Final = bot.process_new_updates
        self._test_message_handler: Final = bot._test_message_handler
        self._notify_command_handlers: Final = bot._notify_command_handlers
        self._run_middlewares_and_handler: Final = bot._run_middlewares_and_handler
        self._tell_listeners: Final = bot._TeleBot__notify_update
        #: Messages that the listeners are not told of, unless their step is gone in the end.
        self._untold: Final = weakref.WeakValueDictionary[int, Any]()
        self._look_up: Final = threading.Lock()  # a backend of telebot's is made for one thread
        bot._notify_next_handlers = bot._notify_reply_handlers = _in_turn
        bot._TeleBot__notify_update = self.notify_update
        bot._notify_command_handlers = self.notify_command_handlers
        bot._run_middlewares_and_handler = self.run_middlewares_and_handler
        bot._exec_task = self.exec_task_after_migration if moving else self.exec_task
        bot._test_message_handler = self.test_message_handler
        bot.process_new_updates = self.process_new_updates
        if bot.threaded:
            self._close_pool: Final = bot.worker_pool.close
            bot.worker_pool.close = self.close_pool

    def process_new_updates(self, updates: Iterable[Any]) -> None:
        """Only what is of one kind together: telebot sorts a batch by kind, so a button press
        could overtake the message that was sent before it. Without a pool one at a time, so that
        telebot fetches again what comes after one whose handler raises."""
        batches: Iterable[list[Any]] = (
            (list(alike) for _, alike in itertools.groupby(updates, _kind_of))
            if self._bot.threaded
            else ([update] for update in updates)
        )
        process = self._deliver if self._dedupes else self._process_new_updates
        for batch in batches:
            process(batch)

    def _deliver(self, updates: Iterable[Any]) -> None:
        """As telebot's, in a context that knows of the delivery."""
        token = _delivered.set(_deliveries(updates))
        try:
            self._process_new_updates(updates)
        finally:
            _delivered.reset(token)

    def notify_update(self, messages: Sequence[Any]) -> None:
        """As telebot's: the listeners are not told of an answer to a next step."""
        if self._bot.update_listener:
            steps = getattr(self._bot.next_step_backend, "handlers", ())
            answers = [message for message in messages if message.chat.id in steps]
            self._untold.update((id(message), message) for message in answers)
            others = [message for message in messages if id(message) not in self._untold]
            if others:
                self._tell_listeners(others)

    def notify_command_handlers(
        self, handlers: Sequence[Any], updates: Iterable[Any], update_type: str
    ) -> None:
        """As telebot's, but there is a task for every message: also for those that no handler is
        for, since there may be a next step when its task begins."""
        if update_type != "message" or handlers or self._bot.use_class_middlewares:
            self._notify_command_handlers(handlers, updates, update_type)
            return
        run = self._bot._run_middlewares_and_handler
        for message in updates:
            self._bot._exec_task(
                run, message, handlers=handlers, middlewares=None, update_type=update_type
            )

    def run_middlewares_and_handler(
        self, message: Any, handlers: Any, middlewares: Any, update_type: str
    ) -> None:
        """As telebot's, inside the scope of the update. Here, and not before, it is known what is
        registered for a message: the handlers of all earlier ones of its user have ended."""
        run = functools.partial(
            self._run_middlewares_and_handler, message, handlers, middlewares, update_type
        )
        if update_type != "message":
            run()
            return
        bot = self._bot
        steps = self._registered(bot.next_step_backend, message.chat.id, message)
        if steps:  # then telebot tells nobody else of it
            self._run_each(message, steps)
            return
        asked = getattr(message, "reply_to_message", None)
        replies = []
        if asked is not None:
            replies = self._registered(bot.reply_backend, asked.message_id, message)
        if self._untold.pop(id(message), None) is not None:
            self._tell_listeners([message])
        if replies:
            self._run_each(message, [*replies, run])
        else:
            run()

    def _registered(self, backend: Any, number: int, message: Any) -> list[Callable[[], None]]:
        """Take off what is registered for the number of a chat or message."""
        with self._look_up:
            found = backend.get_handlers(number) or ()
        return [
            functools.partial(each["callback"], message, *each["args"], **each["kwargs"])
            for each in found
        ]

    def _run_each(self, message: Any, tasks: Sequence[Callable[[], None]]) -> None:
        """Several tasks of one message in the turn of that, and each of them a unit of its own."""
        failures: list[Exception] = []
        for done, task in enumerate(tasks, 1):
            rest = tasks[done:]
            try:
                task()
                if _is_released(message):
                    for each in rest:  # with a scope of their own
                        self.exec_task(_call, message, each)
                    break
                if rest or failures:
                    _flush(message)
            except Exception as error:
                _roll_back(message, error)
                failures.append(error)
        try:
            for failure in failures[:-1]:
                self._exec_task(_raise, failure)
            if failures:
                raise failures[-1]
        finally:
            del failures  # which know this frame: no cycle stays

    def exec_task_after_migration(self, task: Callable[..., Any], *args: Any, **kw: Any) -> None:
        """As `exec_task`; if the update says that a chat has migrated, move its sessions first.
        Before the scope of the update is opened, since that is one of them."""
        migration = migration_in(args[0]) if args else None
        if migration is None:
            self.exec_task(task, *args, **kw)
        else:
            # It has to know of the delivery, which another thread does not.
            handle = functools.partial(copy_context().run, self.exec_task, task, *args, **kw)
            self._exec_task(_as_handler, self._migrate_chat, migration, handle)

    def _migrate_chat(self, migration: Migration, handle: Callable[[], None]) -> None:
        """In a worker, or in the polling thread where there is none."""
        try:
            migrate_chat(self._moving, migration)
        finally:
            handle()

    def exec_task(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run `task` inside the scope of its update, in the pool if the bot has one."""
        update = args[0] if args else None
        if not isinstance(update, JsonDeserializable):  # an update listener gets a list
            self._exec_task(_as_handler, functools.partial(task, *args, **kwargs))
            return
        job: _Job | _UpdateJob
        try:
            if self._is_plain:
                job = _Job(self._sessions.scopes.of_update(update), task, args, kwargs)
            else:
                update_scope = UpdateScope(self._managers, update, _delivery_of(update))
                job = _UpdateJob(update_scope, task, args, kwargs)
        except Exception as error:  # not here, in the polling thread: the batch would be lost
            self._exec_task(_raise, error)
            return
        if job.has_session and self._bot.use_class_middlewares and kwargs.get("handlers"):
            kwargs["handlers"] = _rolling_back(kwargs["handlers"], _RollsBack)
        if not job.waits or self._stopped or not self._bot.threaded:
            self._exec_task(job.run)
        else:
            self._queue(job)

    def _queue(self, job: _Job | _UpdateJob) -> None:
        """Let `job` wait for its keys without a worker. When they are free it goes to the end of
        the pool's queue, so that keys take turns there, however many updates one of them has."""
        self._waiting.add(job)
        try:
            job.queue(functools.partial(self._call, job))
        except BaseException:
            self._withdraw(job)
            raise
        if self._stopped:
            self._withdraw(job)

    def _call(self, job: _Job | _UpdateJob) -> None:
        self._exec_task(_PoolTask(self, job))

    def redeem(self, job: _Job | _UpdateJob) -> bool:
        """Whether `job` has its keys now, and begins; else a handler has passed it, and it will be
        called again."""
        assert job.tickets is not None
        try:
            redeemed = job.tickets.redeem()
            if redeemed:
                self._waiting.discard(job)
        except BaseException:  # from outside: the job is lost, and its keys must not be
            self._withdraw(job)
            job.release()
            raise
        return redeemed

    def call_again(self, job: _Job | _UpdateJob) -> None:
        """The pool has lost the task that was to begin `job`."""
        if job in self._waiting and job.tickets is not None and not self._stopped:
            errands.run_soon(job.tickets.call_again)

    def test_message_handler(self, handler: Any, update: Any) -> bool:
        """A filter that raises has failed as a handler does; class middlewares swallow it too."""
        try:
            return bool(self._test_message_handler(handler, update))
        except Exception as error:
            _roll_back(update, error)
            raise

    def close_pool(self) -> None:
        """Nobody will run what still waits: it must not stand in anybody's way."""
        self._stopped = True
        try:
            self._close_pool()  # which waits for the handlers: Ctrl-C may come once more
        finally:
            for job in list(self._waiting):
                self._withdraw(job)

    def _withdraw(self, job: _Job | _UpdateJob) -> None:
        self._waiting.discard(job)
        if job.tickets is not None:
            job.tickets.withdraw()


class _PoolTask:
    """What goes into the pool to begin a job. A worker that is interrupted before it comes to the
    job loses it; then another task is put into the pool."""

    __slots__ = ("_integration", "_is_over", "_job")

    def __init__(self, integration: _Room, job: _Job | _UpdateJob) -> None:
        self._integration: Final = integration
        self._job: Final = job
        self._is_over = False

    def __call__(self) -> None:
        redeemed = self._integration.redeem(self._job)
        self._is_over = True
        if redeemed:
            self._job.run()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):  # else an interrupt came before it was made
            self._integration.call_again(self._job)


def _kind_of(update: Any) -> str | None:
    """The name of the one field that an update has besides its number."""
    if update.message is not None:  # the one that most have
        return "message"
    named = (name for name, value in vars(update).items() if value is not None)
    return next((name for name in named if name != "update_id"), None)


class _Job:
    """One task of telebot with the scope that goes around it (None: the update has no key)."""

    __slots__ = ("_args", "_kwargs", "_scope", "_task", "has_session", "tickets", "waits")

    def __init__(
        self,
        scope: SessionScope[Any] | None,
        task: Callable[..., Any],
        args: tuple[Any, ...],  # the update first
        kwargs: dict[str, Any],
    ) -> None:
        self._scope: Final = scope
        self._task: Final = task
        self._args: Final = args
        self._kwargs: Final = kwargs
        self.has_session: Final = scope is not None
        #: Whether it has to have its key before it begins.
        self.waits: Final = scope is not None and not scope.options.lazy
        self.tickets: Tickets | None = None

    def release(self) -> None:
        """Give up the key: this is not going to run."""
        if self._scope is not None:
            release_all([self._scope])

    def queue(self, call: Callable[[], None]) -> None:
        """Wait for the key; `call` is called when it is unlocked."""
        scope = self._scope
        assert scope is not None
        self.tickets = tickets_for([scope])
        self.tickets.queue(call, scope.options.patience)

    def run(self) -> None:
        """Do it, in a worker or in the polling thread."""
        scope = self._scope
        token = in_handler.set(True)
        try:
            if scope is None:
                _bind(self._args[0], _NO_SCOPE, _NO_SESSION)
                self._task(*self._args, **self._kwargs)
                return
            with scope as session:
                _bind(self._args[0], (scope.target,), (session,))
                self._task(*self._args, **self._kwargs)
        finally:
            in_handler.reset(token)


class _UpdateJob:
    """The same with all that a bot may have: a `chat_session`, and updates that come again."""

    __slots__ = (
        "_args",
        "_eager",
        "_kwargs",
        "_task",
        "_update_scope",
        "has_session",
        "tickets",
        "waits",
    )

    def __init__(
        self,
        update_scope: UpdateScope,
        task: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._update_scope: Final = update_scope
        self._task: Final = task
        self._args: Final = args
        self._kwargs: Final = kwargs
        self._eager: Final = update_scope.eager()
        self.has_session: Final = bool(update_scope.in_order)
        self.waits: Final = bool(self._eager)
        self.tickets: Tickets | None = None

    def release(self) -> None:
        """Give up the keys: this is not going to run."""
        release_all(self._eager)

    def queue(self, call: Callable[[], None]) -> None:
        """Wait for the keys; `call` is called when all are unlocked."""
        self.tickets = tickets_for(self._eager)
        self.tickets.queue(call, self._eager[0].options.patience)

    def run(self) -> None:
        """Do it, in a worker or in the polling thread."""
        token = in_handler.set(True)
        try:
            with self._update_scope as sessions:
                if self._update_scope.is_new:
                    _bind(self._args[0], self._update_scope.opened(), sessions)
                    self._task(*self._args, **self._kwargs)
        finally:
            in_handler.reset(token)


def _in_turn(*_args: Any) -> None:
    """What telebot would do here is done in the turn of each message."""


def _call(_update: Any, work: Callable[[], None]) -> None:
    work()


def _as_handler(work: Callable[..., None], *args: Any) -> None:
    token = in_handler.set(True)
    try:
        work(*args)
    finally:
        in_handler.reset(token)


def _raise(error: Exception) -> None:
    raise error


# -- AsyncTeleBot


class _AsyncRoom:
    """What `install` puts in the place of some methods of one AsyncTeleBot."""

    task: ClassVar = "_run_middlewares_and_handlers"
    looks_up: ClassVar = ()  # it has no next steps

    def __init__(self, bot: Any, managers: Managers, moving: Managers) -> None:
        self._bot: Final = bot
        self._managers: Final = managers
        self._dedupes: Final = dedupes(managers)
        self._moving: Final = moving  # which of them move the sessions of a chat
        self._process_new_updates: Final = bot.process_new_updates
        self._run_middlewares_and_handlers: Final = bot._run_middlewares_and_handlers
        self._test_message_handler: Final = bot._test_message_handler
        bot.process_new_updates = self.process_new_updates
        bot._run_middlewares_and_handlers = (
            self.run_after_migration if moving else self.run_middlewares_and_handlers
        )
        bot._test_message_handler = self.test_message_handler

    async def process_new_updates(self, updates: Iterable[Any]) -> None:
        """Each in a task of its own: telebot would handle all messages of a batch before the first
        button press. Tasks begin in the order in which they were made, so the updates of one user
        queue for their key as they came. A single update has its task as well: without it, it would
        overtake a batch that came before it."""
        process = self._deliver if self._dedupes else self._process_new_updates
        results = await asyncio.gather(
            *(process([update]) for update in updates), return_exceptions=True
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) > 1:
            raise BaseExceptionGroup(f"{len(errors)} updates were not handled", errors)
        if errors:
            raise errors[0]

    async def _deliver(self, updates: Sequence[Any]) -> None:
        """As telebot's, in a context that knows of the delivery: each task has its own."""
        _delivered.set(_deliveries(updates))
        await self._process_new_updates(updates)

    def run_after_migration(self, update: Any, *args: Any) -> Coroutine[Any, Any, None]:
        """As `run_middlewares_and_handlers`; if the update says that a chat has migrated, move its
        sessions first. Before the scope of the update is opened, since that is one of them."""
        migration = migration_in(update)
        if migration is None:
            return self.run_middlewares_and_handlers(update, *args)
        return self._migrate_chat(migration, update, *args)

    async def _migrate_chat(self, migration: Migration, update: Any, *args: Any) -> None:
        try:
            await amigrate_chat(self._moving, migration)
        except Exception as error:
            handled = await self._handle_exception(error)
            await self.run_middlewares_and_handlers(update, *args)
            if not handled:
                raise
        else:
            await self.run_middlewares_and_handlers(update, *args)

    async def run_middlewares_and_handlers(
        self, update: Any, handlers: Iterable[Mapping[str, Any]], *args: Any
    ) -> None:
        """Run all of it inside the scopes of the update; called in a task that is its own."""
        try:
            update_scope = UpdateScope(self._managers, update, _delivery_of(update))
            async with update_scope as sessions:
                if not update_scope.is_new:
                    return
                _bind(update, update_scope.opened(), sessions)
                in_handler.set(True)
                await self._run_middlewares_and_handlers(
                    update, _rolling_back(handlers, _AsyncRollsBack), *args
                )
        except Exception as error:
            if not await self._handle_exception(error):
                raise

    async def test_message_handler(self, handler: Any, update: Any) -> bool:
        """A filter that raises has failed as a handler does."""
        try:
            return bool(await self._test_message_handler(handler, update))
        except Exception as error:
            _roll_back(update, error)
            raise

    async def _handle_exception(self, error: Exception) -> bool:
        handler = self._bot.exception_handler
        handled = handler is not None and handler.handle(error)
        return bool(await handled if inspect.isawaitable(handled) else handled)


# -- updates that come again: their numbers stand on what telebot makes no task of

# The deliveries of the updates that are just being processed, by the id of what is in them.
_delivered: ContextVar[Mapping[int, Delivery]] = ContextVar("session_sync_delivered")


def _deliveries(updates: Iterable[Any]) -> dict[int, Delivery]:
    inside = ((update, getattr(update, _kind_of(update) or "", None)) for update in updates)
    return {id(payload): Delivery(update.update_id) for update, payload in inside}


def _delivery_of(update: Any) -> Delivery | None:
    """The delivery of what is in an Update, if somebody has to know of it."""
    return _delivered.get(_NO_DELIVERIES).get(id(update))


_NO_DELIVERIES: Final[Mapping[int, Delivery]] = {}


# -- telebot swallows what a handler raises (a TeleBot with class middlewares, an AsyncTeleBot
#    always), so its scope would not see it


def _roll_back(update: Any, error: Exception) -> None:
    """Roll the session of `update` back before anybody sees what its handler raised."""
    for entry in entries():
        if entry.update is update:
            entry.target.discard(error)


def _flush(update: Any) -> None:
    """Save what one of several tasks has changed, before the next one begins."""
    for entry in entries():
        if entry.update is update:
            entry.target.flush()


def _is_released(update: Any) -> bool:
    """Whether a handler has released a session of `update`."""
    binding = _bound.get(id(update))
    places = () if binding is None else binding.places
    scopes = [place.scope() for place in places if place is not None]
    return any(scope is None or scope.closed for scope in scopes)


def _rolling_back(
    handlers: Iterable[Mapping[str, Any]], wrap: type[_RollsBack]
) -> Iterator[dict[str, Any]]:
    for handler in handlers:
        yield {**handler, "function": wrap(handler["function"])}


class _RollsBack:
    """A handler's function; telebot looks at its signature, which `__wrapped__` leads to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__: Final = function

    def __call__(self, update: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(update, *args, **kwargs)
        except Exception as error:
            _roll_back(update, error)
            raise


class _AsyncRollsBack(_RollsBack):
    async def __call__(self, update: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await self.__wrapped__(update, *args, **kwargs)
        except Exception as error:
            _roll_back(update, error)
            raise


# -- message.session, message.chat_session

# The sessions of each update object that is alive, or None where it has no key. Not attributes of
# the object, because telebot prints those in str(), and pickle and copy take them along.
_bound: dict[int, _Binding] = {}

_NO_SCOPE: Final = (None,)
_NO_SESSION: Final = (None,)


class _Place(NamedTuple):
    """What is known of one of an update's scopes. The scope itself weakly: it knows the update, and
    with that it would keep itself."""

    scope: Callable[[], Scope[Any] | None]
    full_key: str
    backend: Backend

    def is_of(self, entry: SessionScope[Any]) -> bool:
        """Whether `entry` is for the same session."""
        return self.full_key == entry.full_key and self.backend is entry.options.backend


class _Binding(weakref.ref[Any]):
    """An update object, and the scopes and sessions that it has, as long as the object is alive."""

    __slots__ = ("at", "places", "sessions")

    at: int
    places: Sequence[_Place | None]
    sessions: Sequence[BaseSession | None]


def _bind(
    update: Any,
    scopes: Sequence[Scope[Any] | None],
    sessions: Sequence[BaseSession | None],
) -> None:
    binding = _Binding(update, _unbind)
    binding.at, binding.sessions = id(update), sessions
    binding.places = [
        None if scope is None else _Place(scope.reference, scope.full_key, scope.options.backend)
        for scope in scopes
    ]
    _bound[binding.at] = binding


def _unbind(binding: _Binding) -> None:
    _bound.pop(binding.at, None)


def _session_of(update: Any, place: int) -> BaseSession:
    """The session that was opened for `update`; after its end, the one that was opened anew for it
    around this code, or else the closed one."""
    binding = _bound.get(id(update))
    if binding is None or binding() is not update:
        raise AttributeError(
            f"this {type(update).__name__} is not the update that is being handled, so no session "
            f"is open for it; the update itself has one (call.session, not call.message.session), "
            f"and sessions.session_scope(...) opens one anywhere"
        )
    if place >= len(binding.sessions):
        raise AttributeError(
            f"this {type(update).__name__} has a session and no chat_session: "
            f"session_sync.telebot.install(bot, sessions, chat_session=...) gives it one"
        )
    its, session = binding.places[place], binding.sessions[place]
    if its is None or session is None:
        raise SessionKeyError(no_key(update))
    scope = its.scope()
    if scope is None or scope.closed:
        for entry in entries():
            if entry.update is update and its.is_of(entry) and not entry.target.closed:
                session = entry.target.session()
                break
    return session


class _SessionAttribute:
    """`session` or `chat_session`, on everything that telebot makes of JSON."""

    def __init__(self, place: int) -> None:
        self._place: Final = place

    def __get__(self, update: Any, owner: type) -> Any:
        return self if update is None else _session_of(update, self._place)

    def __set__(self, update: Any, fields: Mapping[str, Any] | None) -> None:
        replace_fields(_session_of(update, self._place), fields)
