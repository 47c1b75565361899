"""python-telegram-bot's room: `install` gives every handler its session, as `context.session`, and
if it is told to, its chat's as well, as `context.chat_session`.

All that PTB does with an update goes through `Application.process_update`, whoever calls it, so
that is where the scopes of its sessions are put around it; the tasks that PTB makes for an update
keep them open until the last of them has ended. Nothing else in session_sync knows PTB.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, overload

try:
    import telegram.ext
    from telegram import Update
    from telegram.ext import (
        Application,
        ApplicationBuilder,
        CallbackContext,
        ContextTypes,
        ExtBot,
        JobQueue,
    )
    from telegram.ext.filters import UpdateFilter
except ImportError as error:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError(
        "session_sync.ptb needs python-telegram-bot 20 or newer: pip install 'session-sync[ptb]'"
    ) from error

from ..errors import SessionAwaitError, SessionKeyError
from ..lifecycle.current import entries, in_handler, step_outside
from ..lifecycle.entry import SessionScope
from ..lifecycle.flow import run_flow
from ..lifecycle.scope import Scope
from ..lifecycle.supergroups import Migration, amigrate_chat, migrating, migration_in
from ..lifecycle.threads import errands
from ..lifecycle.transaction import aclose_all
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
from ..locks.callers import Caller, current_caller
from ..locks.tickets import Tickets
from ..manager import SessionManager, no_key
from ..session.session import BaseSession, Session, replace_fields

S = TypeVar("S", bound=BaseSession)
if TYPE_CHECKING:  # SessionContext[Bag] is a SessionContext[Bag, Session]
    from typing_extensions import TypeVar as TypeVarWithDefault

    C = TypeVarWithDefault("C", bound=BaseSession, default=Session)
else:
    C = TypeVar("C", bound=BaseSession)
BT = TypeVar("BT", bound=telegram.Bot)
UD = TypeVar("UD")
CD = TypeVar("CD")
BD = TypeVar("BD")
JQ = TypeVar("JQ", bound="JobQueue[Any] | None")
OwnContext = TypeVar("OwnContext", bound="SessionContext[Any, Any]")
_Data = dict[Any, Any]


class SessionContext(CallbackContext[ExtBot[None], _Data, _Data, _Data], Generic[S, C]):
    """The context of a bot with sessions: PTB's own, and `session` and `chat_session`.

    For annotations, `context: SessionContext[Bag]` or `SessionContext[Bag, ChatBag]`, and as the
    base of a context class of one's own. Under `install`, a context class that is not based on it
    gets it as one more base; it must have no `session` of its own then, and no `chat_session` if
    that is installed.

    >>> from session_sync import Session
    >>> from telegram import Update
    >>> async def count(update: Update, context: SessionContext[Session]) -> None:
    ...     context.session.counter = context.session.get("counter", 0) + 1
    """

    _unit: _Unit | None = None

    if not TYPE_CHECKING:  # the default of C, which Python knows from 3.13 on

        def __class_getitem__(cls, types: Any) -> Any:
            given = types if isinstance(types, tuple) else (types,)
            missing = len(getattr(cls, "__parameters__", ())) - len(given)
            return super().__class_getitem__(given + (Session,) * missing)

    @property
    def session(self) -> S:
        """The session of the update that is being handled; of a lazy manager, to be awaited.

        Assigning a mapping replaces all fields, None empties the session.

        Raises SessionKeyError where there is none: for an update without a key, in a job, and in
        what a conversation's time-out calls, since that gets the context of an update long gone.
        """
        return cast(S, self._session_at(0))

    @session.setter
    def session(self, fields: Mapping[str, Any] | None) -> None:
        self._replace(0, fields)

    @property
    def chat_session(self) -> C:
        """The session that the manager given to `install` as `chat_session` has for the update:
        as a rule its chat's. All else is as with `session`.

        Raises AttributeError if none was given.
        """
        return cast(C, self._session_at(1))

    @chat_session.setter
    def chat_session(self, fields: Mapping[str, Any] | None) -> None:
        self._replace(1, fields)

    def _session_at(self, place: int) -> BaseSession:
        if self._unit is None:
            raise SessionKeyError(_no_unit(self))
        return self._unit.session_at(place)

    def _replace(self, place: int, fields: Mapping[str, Any] | None) -> None:
        if self._unit is None and fields is not None and not isinstance(fields, Mapping):
            name = NAMES[place]
            raise AttributeError(
                f"context.{name} is a session of session_sync's; give your own attribute another "
                f"name"
            )
        replace_fields(self._session_at(place), fields)


class _NoChatSession:
    """`context.chat_session` of a bot that has none; an attribute of its own of that name wins."""

    def __get__(self, context: Any, owner: type) -> Any:
        if context is None:
            return self
        raise AttributeError(
            "this bot has a session and no chat_session: session_sync.ptb.install(builder, "
            "sessions, chat_session=...) gives it one"
        )


class _Hooks(CallbackContext[Any, Any, Any, Any]):
    """What every context class of an application with sessions begins with, so that it is asked
    whatever a bot's own class does."""

    __slots__ = ()

    _unit: _Unit | None

    @classmethod
    def from_update(cls, update: object, application: Any) -> Any:
        """PTB makes a context for an update, or for an error in it."""
        context = super().from_update(update, application)
        context._unit = _Unit.of(update)
        return context

    @classmethod
    def from_job(cls, job: Any, application: Any) -> Any:
        """PTB makes a context for a job, in the job's own task."""
        # It has copied its context variables from a handler, if one has made it.
        _step_outside()
        in_handler.set(False)
        return super().from_job(job, application)


class _Unit:
    """One update with the scopes of its sessions, which have been entered."""

    #: The one that this task belongs to.
    current: Final[ContextVar[_Unit | None]] = ContextVar("session_sync_ptb_unit", default=None)

    def __init__(self, update: object, update_scope: UpdateScope) -> None:
        self.update: Final = update
        # Weak: contexts outlive the update, in a task that was begun inside it, say. What keeps the
        # scopes is what handles the update, and the tasks that are tied to it.
        self._update_scope: Final = weakref.ref(update_scope)

    @classmethod
    def of(cls, update: object) -> _Unit | None:
        """The unit of `update`, if this task belongs to it."""
        unit = cls.current.get()
        return unit if unit is not None and unit.update is update else None

    @property
    def update_scope(self) -> UpdateScope | None:
        """Its scopes, as long as anything handles the update."""
        return self._update_scope()

    def discard(self, error: BaseException) -> None:
        """A handler failed with `error`."""
        update_scope = self.update_scope
        if update_scope is not None:
            update_scope.discard(error)

    def session_at(self, place: int) -> BaseSession:
        """The session, also after it was released."""
        update_scope, session = self.update_scope, None
        if update_scope is not None:
            scope = update_scope.scopes[place]
            if scope is None:
                raise SessionKeyError(no_key(self.update))
            if scope.target.has_members:
                session = update_scope.sessions[place]
        if session is None:
            raise SessionKeyError(
                "the update of this context has been handled and its session is closed (what a "
                "conversation's time-out calls is given the old context); open it again with "
                "`async with sessions.session_scope(update) as session:`"
            )
        return session


def _step_outside() -> None:
    """From here on this task belongs to no unit, and to no other scope."""
    _Unit.current.set(None)
    step_outside()


def _no_unit(context: CallbackContext[Any, Any, Any, Any]) -> str:
    if context.job is not None:
        return (
            "a job runs outside of every session; decorate its callback with "
            "@sessions.with_session (run_once(..., user_id=..., chat_id=...) says whose), or open "
            "one: `async with sessions.session_scope(StorageKey(user=..., chat=...)) as session:`"
        )
    return (
        "no session is open in this context: it was not made for an update that is being handled; "
        "`async with sessions.session_scope(update) as session:` opens one anywhere"
    )


# -- install


# A context class based on SessionContext stays what it is to a type checker; of any other, that
# its bot gets the session as well is known only at run time.
@overload
def install(
    builder: ApplicationBuilder[BT, OwnContext, UD, CD, BD, JQ],
    sessions: SessionManager[Any],
    *,
    chat_session: SessionManager[Any] | None = None,
    migrate_chats: bool | None = None,
) -> ApplicationBuilder[BT, OwnContext, UD, CD, BD, JQ]: ...
@overload
def install(
    builder: ApplicationBuilder[BT, Any, UD, CD, BD, Any],
    sessions: SessionManager[S],
    *,
    chat_session: None = None,
    migrate_chats: bool | None = None,
) -> ApplicationBuilder[BT, SessionContext[S], UD, CD, BD, JobQueue[SessionContext[S]]]: ...
@overload
def install(
    builder: ApplicationBuilder[BT, Any, UD, CD, BD, Any],
    sessions: SessionManager[S],
    *,
    chat_session: SessionManager[C],
    migrate_chats: bool | None = None,
) -> ApplicationBuilder[BT, SessionContext[S, C], UD, CD, BD, JobQueue[SessionContext[S, C]]]: ...
def install(
    builder: Any,
    sessions: SessionManager[Any],
    *,
    chat_session: SessionManager[Any] | None = None,
    migrate_chats: bool | None = None,
) -> Any:
    """Give every update of the application that `builder` builds its session: `context.session`.

    One update is one unit: its session is opened before its handlers and closed after the last of
    them, the non-blocking ones included, and the tasks of `application.create_task(..., update)`.
    The updates of one user are handled one after the other in the order in which they came, those
    of different users side by side as far as `concurrent_updates` lets them; one that waits for
    its session occupies no thread, and none of those slots. When a handler raises, what its unit
    changed since the last flush is discarded (see `on_error`), and then PTB's error handlers run;
    ApplicationHandlerStop is no error. An update without a key is handled too; asking for its
    session raises SessionKeyError.

    With `chat_session`, a unit has a second session, `context.chat_session`, under the same rules
    and of a manager of its own; what is saved of one does not depend on whether the other can be.

    Arguments:
        builder: a builder of PTB 20 or newer, before or after its other choices: a bot's own
            context class and application class are kept, and get the session as well.
        sessions: where the sessions come from.
        chat_session: where those of `context.chat_session` come from; most often a manager with
            `get_storage_key=by_chat`, on the same storage or another one.
        migrate_chats: when a group becomes a supergroup, move its sessions to its new number
            (`sessions.migrate_chat`), before the service message is handled that says so. What
            fails in that goes to the error handlers, and the message is handled all the same. It
            reads all keys of the store; by default it is done if the storage can list them.

    Returns the builder. Raises TypeError if `builder` is no ApplicationBuilder, or if a storage
    cannot list its keys and `migrate_chats` is True; ValueError if `chat_session` is `sessions`;
    RuntimeError if a manager was closed, if the builder has sessions already, or if this version of
    PTB lacks what is needed here.

    >>> import session_sync.ptb
    >>> from session_sync import SessionManager
    >>> from telegram.ext import Application
    >>> sessions = SessionManager()
    >>> builder = session_sync.ptb.install(Application.builder().token("1:token"), sessions)
    >>> application = builder.build()
    >>> issubclass(application.context_types.context, session_sync.ptb.SessionContext)
    True
    """
    if not isinstance(builder, ApplicationBuilder):
        raise TypeError(
            f"install() takes an ApplicationBuilder (Application.builder().token(...)), not "
            f"{type(builder).__name__}; call it before .build()"
        )
    if isinstance(builder, _SessionBuilder):
        raise RuntimeError("this builder has sessions already: install() was called before")
    if not all(hasattr(Application, name) for name in (_CREATE_TASK, _RUN_TASK, _PROCESS_FETCHED)):
        raise RuntimeError(
            "this version of python-telegram-bot starts its tasks in a way that is not known here: "
            "pip install --upgrade 'session-sync[ptb]'"
        )
    managers = managers_of(sessions, chat_session)
    room = {"managers": managers, "moving": migrating(managers, migrate_chats)}
    # Not by application_class() and context_types(), which may be called once more afterwards.
    kind = type(builder)
    builder.__class__ = _named_as(kind, (_SessionBuilder, kind), __slots__=(), **room)
    return builder


# The private methods of PTB through which all tasks go: its public create_task is not asked for the
# non-blocking error handlers, and no public method runs in the task itself.
_CREATE_TASK: Final = "_Application__create_task"
_RUN_TASK: Final = "_Application__create_task_callback"
# And the one that takes a slot for an update that was fetched: by its own semaphore, or by the
# update processor, whose method that does so is final.
_PROCESS_FETCHED: Final = "_Application__process_update_wrapper"


class _SessionBuilder:
    """A builder that adds the sessions when it builds, to whatever was chosen until then."""

    __slots__ = ()

    managers: Managers
    moving: Managers
    _application_class: Any
    _context_types: Any

    def build(self) -> Any:
        chosen = self._application_class, self._context_types
        types = _chosen(self._context_types)
        self._application_class = _application_class(_chosen(self._application_class))
        self._context_types = ContextTypes(
            context=_context_class(types.context, NAMES[: len(self.managers)]),
            bot_data=types.bot_data,
            chat_data=types.chat_data,
            user_data=types.user_data,
        )
        try:
            # `super()` is the builder's own class, which is known only when it is mixed in.
            application: Any = super().build()  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._application_class, self._context_types = chosen
        has_hooks = issubclass(application.context_types.context, _Hooks)
        if not (isinstance(application, _SessionApplication) and has_hooks):
            raise RuntimeError(
                f"{type(self).__name__}.build() has chosen an application class or context types "
                f"by itself, without sessions; choose them before"
            )
        application._session_sync = _Room(self.managers, self.moving)
        return application


def _chosen(value: Any) -> Any:
    """What a builder holds under a default value of PTB's (which has no public class) or as is."""
    return value.value if type(value).__name__ == "DefaultValue" else value


def _application_class(chosen: type[Any]) -> type[Any]:
    """`chosen`, which may do what it likes with an update before it is handled, and then comes by
    here."""
    is_ours = issubclass(_SessionApplication, chosen)
    bases = (_SessionApplication,) if is_ours else (chosen, _SessionApplication)
    return _named_as(chosen, bases)


def _named_as(chosen: type[Any], bases: tuple[type[Any], ...], **inside: Any) -> type[Any]:
    """A class that is `chosen` to whoever prints it."""
    names = {"__module__": chosen.__module__, "__qualname__": chosen.__qualname__}
    return type(chosen.__name__, bases, {**names, **inside})


def _context_class(chosen: type[Any], names: tuple[str, ...]) -> type[Any]:
    """`chosen` with sessions of these names."""
    bases: tuple[type[Any], ...] = (_Hooks, chosen)
    inside: dict[str, Any] = {}
    if not issubclass(chosen, SessionContext):
        for name in names:
            if hasattr(chosen, name):
                raise TypeError(
                    f"{chosen.__name__} has a `{name}` of its own, which context.{name} would "
                    f"hide; give it another name"
                )
        bases = (_Hooks, SessionContext, chosen)
    if issubclass(SessionContext, chosen):
        bases = (_Hooks, SessionContext)
    for name in NAMES[len(names) :]:
        own = inspect.getattr_static(chosen, name, vars(SessionContext)[name])
        inside[name] = _NoChatSession() if own is vars(SessionContext)[name] else own
    return _named_as(chosen, bases, **inside)


class _Room:
    """What an application with sessions has besides."""

    def __init__(self, managers: Managers, moving: Managers) -> None:
        self.managers: Final = managers
        self.dedupes: Final = dedupes(managers)
        self.moving: Final = moving  # which of them move the sessions of a chat
        #: What stop() has to wait for, and PTB does not know of.
        self.closing: Final[set[asyncio.Task[Any]]] = set()

    def wait_for(self, task: asyncio.Task[Any]) -> None:
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    def prepare(self, update: object) -> _Arrival:
        """What an update needs before it can be handled."""
        arrival = _Arrival(update)
        if self.moving:
            arrival.migration = migration_in(getattr(update, "message", None))
        try:
            delivery = self._delivery_of(update)
            arrival.update_scope = UpdateScope(self.managers, update, delivery)
        except Exception as error:
            arrival.failures.append(error)
        return arrival

    async def migrate(self, arrival: _Arrival, migration: Migration) -> None:
        """Move the sessions of a chat, before the scopes of the update are opened that says so:
        they are among them."""
        try:
            await amigrate_chat(self.moving, migration)
        except Exception as error:
            arrival.failures.append(error)

    def _delivery_of(self, update: object) -> Delivery | None:
        if self.dedupes and isinstance(update, Update):
            return Delivery(update.update_id)
        return None


class _Arrival:
    """An update that has come and is not handled yet.

    One that PTB has fetched waits here for its keys, and then for one of PTB's slots
    (`concurrent_updates`), so that those who wait for their keys occupy no slot. Meanwhile running
    handlers, which have theirs, may pass it: see Tickets.
    """

    #: The one that PTB is about to handle in this task.
    current: Final[ContextVar[_Arrival | None]] = ContextVar(
        "session_sync_ptb_arrival", default=None
    )

    __slots__ = (
        "__weakref__",
        "_called",
        "_tickets",
        "failures",
        "migration",
        "update",
        "update_scope",
    )

    def __init__(self, update: object) -> None:
        self.update: Final = update
        self.migration: Migration | None = None  # that it tells of, and that has to be done first
        self.update_scope: UpdateScope | None = None  # it could not be made
        #: What the error handlers are to be told.
        self.failures: Final[list[Exception]] = []
        self._tickets: Tickets | None = None  # until the update begins
        self._called: asyncio.Event | None = None  # the keys may be free

    @classmethod
    def take(cls, update: object) -> _Arrival | None:
        """The one that this task has waited for, to be handled now. None if the application has
        made another update of it: that passes the tickets of this one."""
        arrival = cls.current.get()
        if arrival is None:
            return None
        cls.current.set(None)
        if arrival.update is not update:
            return None
        if next(entries(), None) is not None:  # the application has opened a scope, to be joined
            arrival.withdraw()
        return arrival

    async def wait_for_keys(self) -> None:
        """Until all of its keys are free for it."""
        eager = [] if self.update_scope is None else self.update_scope.eager()
        if eager:
            self._called = called = asyncio.Event()
            self._queue(eager)
            if not called.is_set():
                await called.wait()

    async def enter(self) -> None:
        """Open its sessions."""
        update_scope, called = self.update_scope, self._called
        assert update_scope is not None
        try:
            while self._tickets is not None and called is not None:
                called.clear()  # first: it may be called again at once
                if self._tickets.redeem():
                    self._tickets = None
                else:  # passed by a handler; at most one update of a key waits for that in a slot
                    await called.wait()
            await update_scope.__aenter__()
        except BaseException:
            release_all(update_scope.in_order)
            raise

    def withdraw(self) -> None:
        """Leave the queues of its keys, unless it has begun."""
        if self._tickets is not None and self.update_scope is not None:
            self._tickets = None
            release_all(self.update_scope.in_order)

    def _queue(self, eager: list[SessionScope[Any]]) -> None:
        self._tickets = tickets_for(eager)
        self._tickets.queue(_Call(self), eager[0].options.patience)

    def call(self) -> None:
        """Its keys are free; told in the thread of its event loop."""
        if self._called is not None:
            self._called.set()

    def call_from_outside(self, loop: asyncio.AbstractEventLoop) -> None:
        """The same in another thread, under the mutex of all locks."""
        tickets = self._tickets
        try:
            if loop.is_running():
                loop.call_soon_threadsafe(self.call)
                return
            # It may go on later. Until then others come first; then it waits again, and so do all
            # that are called meanwhile, in their old order.
            loop.call_soon_threadsafe(self._queue_again)
        except RuntimeError:  # it was closed: this update will never be handled
            pass
        if tickets is not None:
            tickets.withdraw()

    def _queue_again(self) -> None:
        if self._tickets is not None and self.update_scope is not None:
            self._queue(self.update_scope.eager())


class _Call:
    """Tells an arrival that its keys are free. The queues have it, and keep neither the arrival nor
    its event loop alive: what is thrown away has to be collected, so that it is withdrawn."""

    __slots__ = ("_arrival", "_loop")

    def __init__(self, arrival: _Arrival) -> None:
        self._arrival: Final = weakref.ref(arrival)
        self._loop: Final = weakref.ref(asyncio.get_running_loop())

    def __call__(self) -> None:
        arrival, loop = self._arrival(), self._loop()
        if arrival is None or loop is None:
            return
        if asyncio._get_running_loop() is loop:
            arrival.call()
        else:
            arrival.call_from_outside(loop)


class _SessionApplication(Application[Any, Any, Any, Any, Any, Any]):
    """An application in which every update is a unit, and so are the tasks that are tied to it."""

    _session_sync: _Room

    async def _Application__process_update_wrapper(  # noqa: N802 (PTB calls this when it has fetched)
        self, update: object
    ) -> None:
        """Let an update wait for its keys before PTB gives it a slot."""
        process = getattr(super(), _PROCESS_FETCHED)
        if self.concurrent_updates <= 1:  # one at a time, whoever sends it
            await process(update)
            return
        arrival = self._session_sync.prepare(update)
        try:
            if arrival.migration is not None:
                await self._session_sync.migrate(arrival, arrival.migration)
            await arrival.wait_for_keys()
        except BaseException as error:
            arrival.withdraw()
            if not isinstance(error, GeneratorExit):
                self.update_queue.task_done()  # which PTB does for those that have a slot
            raise
        _Arrival.current.set(arrival)  # this is a task of its own
        in_handler.set(True)  # it has a slot soon, so it waits for nobody who does not have one
        try:
            await process(update)
        finally:
            arrival.withdraw()

    async def process_update(self, update: object) -> None:
        """Handle one update inside the scopes of its sessions."""
        self._check_initialized()
        arrival = _Arrival.take(update)
        if arrival is None:
            arrival = self._session_sync.prepare(update)
            if arrival.migration is not None:
                await self._session_sync.migrate(arrival, arrival.migration)
        while arrival.failures:
            await self.process_error(update=update, error=arrival.failures.pop(0))
        update_scope = arrival.update_scope
        if update_scope is None:
            return
        try:
            await arrival.enter()
        except Exception as error:
            await self.process_error(update=update, error=error)
            return
        around = _Unit.current.get()
        _Unit.current.set(_Unit(update, update_scope))
        try:
            if update_scope.is_new:
                await super().process_update(update)
        except BaseException as error:
            _Unit.current.set(around)
            if isinstance(error, GeneratorExit):  # thrown away: error handlers cannot run
                await update_scope.__aexit__(type(error), error, error.__traceback__)
            else:
                await self._report(update, await update_scope.aleave(error))
            raise
        _Unit.current.set(around)
        await self._report(update, await update_scope.aleave(None))

    async def process_error(self, update: object, error: Exception, *args: Any, **kw: Any) -> bool:
        """Let the error handlers see what was before the handler that has failed."""
        unit = _Unit.of(update)
        if unit is not None:
            unit.discard(error)
        return await super().process_error(update, error, *args, **kw)

    async def _report(self, update: object, failures: Sequence[BaseException]) -> None:
        """What fails when a session is saved goes where goes what fails in a handler."""
        for error in failures:
            if isinstance(error, Exception):
                await self.process_error(update=update, error=error)
        for error in failures:
            if not isinstance(error, Exception):
                raise error

    def add_error_handler(self, callback: Any, *args: Any, **kw: Any) -> None:
        """PTB swallows what an error handler raises, so that its unit would not see it."""
        super().add_error_handler(_ErrorHandler(callback), *args, **kw)

    async def start(self) -> None:
        """Start outside of every scope, also if a handler of another application starts this one:
        what fetches the updates would otherwise take its session along."""
        if next(entries(), None) is None:
            await super().start()
            return
        context = copy_context()
        context.run(_step_outside)
        await asyncio.create_task(super().start(), context=context)

    async def stop(self) -> None:
        """Stop when the last unit has ended and is saved."""
        await super().stop()
        while self._session_sync.closing:
            await asyncio.gather(*self._session_sync.closing, return_exceptions=True)
            await asyncio.sleep(0)  # until they have been taken out

    # -- tasks: those of a unit keep its scope open, all others run outside of it

    def create_task(self, coroutine: Any, update: object = None, **named: Any) -> asyncio.Task[Any]:
        """As PTB's, and in its place: PTB warns of the line two calls above its own private method,
        which has to be the line that calls this one."""
        context, member = self._context_of_task(update)
        create_task = getattr(super(), _CREATE_TASK)
        return self._begun(context.run(create_task, coroutine, update, **named), member)

    def _Application__create_task(  # noqa: N802 (PTB calls this for non-blocking error handlers)
        self, coroutine: Any, update: object = None, *args: Any, **kw: Any
    ) -> asyncio.Task[Any]:
        context, member = self._context_of_task(update)
        create_task = getattr(super(), _CREATE_TASK)
        return self._begun(context.run(create_task, coroutine, update, *args, **kw), member)

    def _context_of_task(self, update: object) -> tuple[Context, _Member | None]:
        asyncio.get_running_loop()  # without one there will be no task: nobody may have joined
        unit, context = _Unit.of(update), copy_context()
        member = None
        if unit is None:
            context.run(_step_outside)
        elif unit.update_scope is not None:
            member = _Member.of(self, update, unit.update_scope)
        context.run(_Member.current.set, member)
        return context, member

    def _begun(self, task: asyncio.Task[Any], member: _Member | None) -> asyncio.Task[Any]:
        if member is not None:
            task.add_done_callback(member.ended)
            if not self.running:  # it is stopping, and PTB does not wait for this one
                self._session_sync.wait_for(task)
        return task

    async def _Application__create_task_callback(  # noqa: N802 (as above)
        self, *args: Any, **kw: Any
    ) -> Any:
        member = _Member.current.get()
        _Member.current.set(None)  # what this task begins is none, and keeps no scopes
        work = getattr(super(), _RUN_TASK)(*args, **kw)
        return await (work if member is None else member.run(work))


class _Member:
    """A task that PTB has made for a unit: its scopes stay open until it has ended."""

    #: The one that the task is which is just being made.
    current: Final[ContextVar[_Member | None]] = ContextVar("session_sync_ptb", default=None)

    def __init__(
        self,
        application: _SessionApplication,
        update: object,
        update_scope: UpdateScope,
        scopes: list[Scope[Any]],
        token: object,
    ) -> None:
        self._application: Final = application
        self._update: Final = update
        self._update_scope: Final = update_scope  # for the contexts of the task: see _Unit
        self._scopes: Final = scopes
        self._token: Final = token
        self._begun = False

    @classmethod
    def of(
        cls, application: _SessionApplication, update: object, update_scope: UpdateScope
    ) -> _Member | None:
        """A member of the scopes that are open; None if none is."""
        token = object()
        scopes: list[Scope[Any]] = []
        for entry in update_scope.in_order:
            scope = entry.target
            if scope.join(token, entry.token):
                scopes.append(scope)
            elif scope.leave(token):  # a thread that has left just now has left it to this one
                errands.run_soon(functools.partial(run_flow, scope.closing(may_block=True)))
        return cls(application, update, update_scope, scopes, token) if scopes else None

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do what the task is for, which includes its error handlers, and leave."""
        self._begun = True
        caller = current_caller()
        for scope in self._scopes:
            scope.arrive(caller)
        try:
            return await work
        except Exception:
            raise  # process_error has seen it
        except BaseException as error:
            for scope in self._scopes:
                scope.discard(error)
            raise
        finally:
            try:
                last = self._leave(caller)
                if isinstance(sys.exc_info()[1], GeneratorExit):  # thrown away: may not await
                    for scope in last:
                        scope.abandon()
                else:
                    await self._close(last)
            except BaseException:
                for scope in self._scopes:  # once more, as the end of a block: it may have left one
                    if scope.leave(self._token, caller) or scope.closed or not scope.has_members:
                        scope.close_soon()
                raise

    def ended(self, task: asyncio.Task[Any]) -> None:
        """A task that was cancelled before its first step has done nothing of `run`."""
        if not self._begun and (last := self._leave()):
            self._application._session_sync.wait_for(asyncio.create_task(self._close(last)))

    def _leave(self, caller: Caller | None = None) -> list[Scope[Any]]:
        """The scopes that have to be closed now."""
        return [scope for scope in reversed(self._scopes) if scope.leave(self._token, caller)]

    async def _close(self, scopes: list[Scope[Any]]) -> None:
        await self._application._report(self._update, await aclose_all(scopes))


class _ErrorHandler:
    """An error handler that discards what it has done when it raises; to PTB it is the same one."""

    def __init__(self, callback: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.callback: Final = callback
        functools.update_wrapper(self, callback, updated=())

    async def __call__(self, update: object, context: Any) -> Any:
        try:
            return await self.callback(update, context)
        except Exception as error:
            unit = _Unit.of(update)
            if unit is not None:
                unit.discard(error)
            raise

    def __eq__(self, other: object) -> bool:
        callback = other.callback if isinstance(other, _ErrorHandler) else other
        return bool(self.callback == callback)

    def __hash__(self) -> int:
        return hash(self.callback)


# -- filters


def session_filter(check: Callable[[Any], object], name: str | None = None) -> UpdateFilter:
    """A filter that asks the session of the update; it combines with PTB's own (`&`, `|`, `~`).

    Arguments:
        check: called with the session, answers whether the filter lets the update through.
        name: what the filter is called where PTB prints it.

    It needs `install`, and a manager that is not lazy, since a filter cannot await. Raises
    SessionKeyError for an update that has no session; that, and what `check` raises, goes to the
    error handlers.

    >>> from telegram.ext import filters
    >>> asks_name = filters.TEXT & session_filter(lambda session: session.get("step") == "name")
    """
    return _SessionFilter(check, name)


class _SessionFilter(UpdateFilter):
    def __init__(self, check: Callable[[Any], object], name: str | None) -> None:
        super().__init__(name=name or f"session_filter({check!r})")
        self._check: Final = check

    def filter(self, update: Update) -> bool:
        unit = _Unit.of(update)
        if unit is None:
            raise SessionKeyError(
                "session_filter was asked where no session is open: without "
                "session_sync.ptb.install(), or in the TIMEOUT state of a conversation"
            )
        scope = None if unit.update_scope is None else unit.update_scope.scopes[0]
        if scope is not None and scope.options.lazy:
            raise SessionAwaitError(
                "session_filter was given a lazy session, which a filter cannot await; make the "
                "manager without lazy=True"
            )
        return bool(self._check(unit.session_at(0)))
