"""What `install` puts in the place of some methods of an AsyncTeleBot.

This module knows how telebot hands updates to its tasks; a unit of work is one of those tasks here,
which waits for its keys by itself.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final

from ..lifecycle.bot import BotSessions
from ..lifecycle.current import in_handler
from ..lifecycle.supergroups import Migration
from .attribute import bind
from .deliveries import delivered, deliveries, delivery_of
from .library import ASYNC_TASK
from .rollback import AsyncRollsBack, roll_back, rolling_back


class AsyncIntegration:
    """One AsyncTeleBot with sessions."""

    task: ClassVar = ASYNC_TASK
    replaces: ClassVar = ()  # it has no next steps

    def __init__(self, bot: Any, sessions: BotSessions) -> None:
        self._bot: Final = bot
        self._sessions: Final = sessions
        self._process_new_updates: Final = bot.process_new_updates
        self._run_middlewares_and_handlers: Final = bot._run_middlewares_and_handlers
        self._test_message_handler: Final = bot._test_message_handler
        bot.process_new_updates = self.process_new_updates
        bot._run_middlewares_and_handlers = (
            self.run_after_migration if sessions.migrates else self.run_middlewares_and_handlers
        )
        bot._test_message_handler = self.test_message_handler

    async def process_new_updates(self, updates: Iterable[Any]) -> None:
        """Each in a task of its own: telebot would handle all messages of a batch before the first
        button press. Tasks begin in the order in which they were made, so the updates of one user
        queue for their key as they came. A single update has its task as well: without it, it would
        overtake a batch that came before it."""
        process = self._deliver if self._sessions.dedupes else self._process_new_updates
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
        delivered.set(deliveries(updates))
        await self._process_new_updates(updates)

    def run_after_migration(self, update: Any, *args: Any) -> Coroutine[Any, Any, None]:
        """As `run_middlewares_and_handlers`; if the update says that a chat has migrated, move its
        sessions first."""
        migration = None
        if getattr(update, "text", "") is None:  # no message of a user's
            migration = self._sessions.migration_in(update)
        if migration is None:
            return self.run_middlewares_and_handlers(update, *args)
        return self._migrate(migration, update, *args)

    async def _migrate(self, migration: Migration, update: Any, *args: Any) -> None:
        try:
            await self._sessions.amigrate(migration)
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
            update_scope = self._sessions.scope_of(update, delivery_of(update))
            async with update_scope as sessions:
                if not update_scope.is_new:
                    return
                bind(update, update_scope.opened(), sessions)
                in_handler.set(True)
                await self._run_middlewares_and_handlers(
                    update, rolling_back(handlers, AsyncRollsBack), *args
                )
        except Exception as error:
            if not await self._handle_exception(error):
                raise

    async def test_message_handler(self, handler: Any, update: Any) -> bool:
        """A filter that raises has failed as a handler does."""
        try:
            return bool(await self._test_message_handler(handler, update))
        except Exception as error:
            roll_back(update, error)
            raise

    async def _handle_exception(self, error: Exception) -> bool:
        handler = self._bot.exception_handler
        handled = handler is not None and handler.handle(error)
        return bool(await handled if inspect.isawaitable(handled) else handled)
