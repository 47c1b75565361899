"""What an application with sessions does instead of PTB's own methods.

This module knows how PTB hands updates and tasks to its event loop; it does not know how a unit of
work waits for its keys, and not how a task keeps its scopes open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import Context, copy_context
from typing import Any, Final

from ..lifecycle.bot import BotSessions
from ..lifecycle.current import entries, in_handler
from ..lifecycle.supergroups import Migration
from ..lifecycle.update import Delivery
from .attribute import Binding, step_outside_units
from .conversations import ConversationHandler
from .library import CREATE_TASK, PROCESS_FETCHED, RUN_TASK, Application, Update
from .rollback import RollsBack, roll_back
from .tasks import UnitTask
from .unit import UnitOfWork


class Integration:
    """What one application with sessions has besides."""

    def __init__(self, application: SessionApplication, sessions: BotSessions) -> None:
        self._application: Final = application
        self._sessions: Final = sessions
        #: The conversations by their names.
        self._conversations: Final[dict[str, object]] = {}
        #: What stop() has to wait for, and PTB does not know of.
        self.closing: Final[set[asyncio.Task[Any]]] = set()

    def bind(self, conversation: ConversationHandler[Any]) -> None:
        """Let a conversation be kept in one of the sessions."""
        conversation.bind(self._sessions.managers, self._conversations)

    def unbind(self, conversation: ConversationHandler[Any]) -> None:
        """It was removed."""
        conversation.unbind(self._conversations)

    def prepare(self, update: object) -> UnitOfWork:
        """What an update needs before it can be handled."""
        unit = UnitOfWork(update)
        unit.migration = self._sessions.migration_in(getattr(update, "message", None))
        try:
            unit.update_scope = self._sessions.scope_of(update, self._delivery_of(update))
        except Exception as error:
            unit.failures.append(error)
        return unit

    async def migrate(self, unit: UnitOfWork, migration: Migration) -> None:
        """Move the sessions of a chat, of which the update of `unit` says so."""
        try:
            await self._sessions.amigrate(migration)
        except Exception as error:
            unit.failures.append(error)

    async def report(self, update: object, failures: Sequence[BaseException]) -> None:
        """What fails when a session is saved goes where goes what fails in a handler."""
        for error in failures:
            if isinstance(error, Exception):
                await self._application.process_error(update=update, error=error)
        for error in failures:
            if not isinstance(error, Exception):
                raise error

    def wait_for(self, task: asyncio.Task[Any]) -> None:
        """Let stop() wait for `task`."""
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    def _delivery_of(self, update: object) -> Delivery | None:
        if self._sessions.dedupes and isinstance(update, Update):
            return Delivery(update.update_id)
        return None


class SessionApplication(Application[Any, Any, Any, Any, Any, Any]):
    """An application in which every update is a unit, and so are the tasks that are tied to it."""

    _session_sync: Integration

    async def _Application__process_update_wrapper(  # noqa: N802 (PTB calls this when it has fetched)
        self, update: object
    ) -> None:
        """Let an update wait for its keys before PTB gives it a slot."""
        process = getattr(super(), PROCESS_FETCHED)
        if self.concurrent_updates <= 1:  # one at a time, of all users
            await process(update)
            return
        unit = self._session_sync.prepare(update)
        try:
            if unit.migration is not None:
                await self._session_sync.migrate(unit, unit.migration)
            await unit.queue()
        except BaseException as error:
            unit.withdraw()
            if not isinstance(error, GeneratorExit):
                self.update_queue.task_done()  # which PTB does for those that have a slot
            raise
        UnitOfWork.current.set(unit)  # this is a task of its own
        in_handler.set(True)  # it has a slot soon, so it waits for none that does not have one
        try:
            await process(update)
        finally:
            unit.withdraw()

    async def process_update(self, update: object) -> None:
        """Handle one update inside the scopes of its sessions."""
        self._check_initialized()
        unit = UnitOfWork.take(update)
        if unit is None:
            unit = self._session_sync.prepare(update)
            if unit.migration is not None:
                await self._session_sync.migrate(unit, unit.migration)
        while unit.failures:
            await self.process_error(update=update, error=unit.failures.pop(0))
        update_scope = unit.update_scope
        if update_scope is None:
            return
        try:
            await unit.enter()
        except Exception as error:
            await self.process_error(update=update, error=error)
            return
        around = Binding.current.get()
        Binding.current.set(Binding(update, update_scope))
        try:
            if update_scope.is_new:
                await super().process_update(update)
        except BaseException as error:
            Binding.current.set(around)
            if isinstance(error, GeneratorExit):  # thrown away: error handlers cannot run
                await update_scope.__aexit__(type(error), error, error.__traceback__)
            else:
                await self._session_sync.report(update, await update_scope.aleave(error))
            raise
        Binding.current.set(around)
        await self._session_sync.report(update, await update_scope.aleave(None))

    async def process_error(self, update: object, error: Exception, *args: Any, **kw: Any) -> bool:
        """Let the error handlers see what was before the handler that has failed."""
        roll_back(update, error)
        return await super().process_error(update, error, *args, **kw)

    def add_handler(self, handler: Any, *args: Any, **kw: Any) -> None:
        """Find for a conversation the session that keeps it, before any update comes."""
        if isinstance(handler, ConversationHandler):
            self._session_sync.bind(handler)
        super().add_handler(handler, *args, **kw)

    def remove_handler(self, handler: Any, *args: Any, **kw: Any) -> None:
        """As PTB's; a conversation gives up its name."""
        super().remove_handler(handler, *args, **kw)
        if isinstance(handler, ConversationHandler):
            self._session_sync.unbind(handler)

    def add_error_handler(self, callback: Any, *args: Any, **kw: Any) -> None:
        """PTB swallows what an error handler raises, so that its unit would not see it."""
        super().add_error_handler(RollsBack(callback), *args, **kw)

    async def start(self) -> None:
        """Start outside of every scope, also if a handler of another application starts this one:
        what fetches the updates would otherwise take its session along."""
        if next(entries(), None) is None:
            await super().start()
            return
        context = copy_context()
        context.run(step_outside_units)
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
        create_task = getattr(super(), CREATE_TASK)
        return self._begun(context.run(create_task, coroutine, update, **named), member)

    def _Application__create_task(  # noqa: N802 (PTB calls this for non-blocking error handlers)
        self, coroutine: Any, update: object = None, *args: Any, **kw: Any
    ) -> asyncio.Task[Any]:
        context, member = self._context_of_task(update)
        create_task = getattr(super(), CREATE_TASK)
        return self._begun(context.run(create_task, coroutine, update, *args, **kw), member)

    def _context_of_task(self, update: object) -> tuple[Context, UnitTask | None]:
        asyncio.get_running_loop()  # without one there will be no task: none may have joined
        binding, context = Binding.of(update), copy_context()
        member = None
        if binding is None:
            context.run(step_outside_units)
        elif binding.update_scope is not None:
            member = UnitTask.of(self._session_sync, update, binding.update_scope)
        context.run(UnitTask.current.set, member)
        return context, member

    def _begun(self, task: asyncio.Task[Any], member: UnitTask | None) -> asyncio.Task[Any]:
        if member is not None:
            task.add_done_callback(member.ended)
            if not self.running:  # it is stopping, and PTB does not wait for this one
                self._session_sync.wait_for(task)
        return task

    async def _Application__create_task_callback(  # noqa: N802 (as above)
        self, *args: Any, **kw: Any
    ) -> Any:
        member = UnitTask.current.get()
        UnitTask.current.set(None)  # what this task begins is none, and keeps no scopes
        work = getattr(super(), RUN_TASK)(*args, **kw)
        return await (work if member is None else member.run(work))
