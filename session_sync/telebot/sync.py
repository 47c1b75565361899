"""What `install` puts in the place of some methods of a TeleBot.

This module knows how telebot hands updates to its pool; it does not know how a unit of work waits
for its keys, and not what else telebot looks up for a message.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any, ClassVar, Final

from ..lifecycle.bot import BotSessions
from ..lifecycle.supergroups import Migration
from .deliveries import delivered, deliveries, delivery_of, kind_of
from .library import LOOK_UPS, TASK, JsonDeserializable
from .next_steps import NextSteps
from .rollback import RollsBack, roll_back, rolling_back
from .unit import LightUnit, UnitOfWork, WaitingUnits, raise_error, run_as_handler


class Integration:
    """One TeleBot with sessions."""

    task: ClassVar = TASK
    replaces: ClassVar = LOOK_UPS

    def __init__(self, bot: Any, sessions: BotSessions) -> None:
        self._bot: Final = bot
        self._sessions: Final = sessions
        self._is_plain: Final = len(sessions.managers) == 1 and not sessions.dedupes
        self._waiting: Final = WaitingUnits(bot)
        self._process_new_updates: Final = bot.process_new_updates
        self._exec_task: Final = bot._exec_task
        self._test_message_handler: Final = bot._test_message_handler
        NextSteps(bot, self.exec_task)  # which the bot keeps
        bot.process_new_updates = self.process_new_updates
        bot._exec_task = self.exec_task_after_migration if sessions.migrates else self.exec_task
        bot._test_message_handler = self.test_message_handler

    def process_new_updates(self, updates: Iterable[Any]) -> None:
        """Only what is of one kind together: telebot sorts a batch by kind, so a button press
        could overtake the message that was sent before it. Without a pool one at a time, so that
        telebot fetches again what comes after one whose handler raises."""
        process = self._deliver if self._sessions.dedupes else self._process_new_updates
        if self._bot.threaded:
            for _, alike in itertools.groupby(updates, kind_of):
                process(list(alike))
        else:
            for update in updates:
                process([update])

    def _deliver(self, updates: Iterable[Any]) -> None:
        """As telebot's, in a context that knows of the delivery."""
        token = delivered.set(deliveries(updates))
        try:
            self._process_new_updates(updates)
        finally:
            delivered.reset(token)

    def exec_task_after_migration(self, task: Callable[..., Any], *args: Any, **kw: Any) -> None:
        """As `exec_task`; if the update says that a chat has migrated, move its sessions first."""
        migration = None
        if args and getattr(args[0], "text", "") is None:  # no message of a user's
            migration = self._sessions.migration_in(args[0])
        if migration is None:
            self.exec_task(task, *args, **kw)
        else:
            # It has to know of the delivery, which another thread does not.
            handle = functools.partial(copy_context().run, self.exec_task, task, *args, **kw)
            self._exec_task(run_as_handler, self._migrate, migration, handle)

    def _migrate(self, migration: Migration, handle: Callable[[], None]) -> None:
        """In a worker, or in the polling thread where there is none."""
        try:
            self._sessions.migrate(migration)
        finally:
            handle()

    def exec_task(self, task: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run `task` inside the scopes of its update, in the pool if the bot has one."""
        update = args[0] if args else None
        if not isinstance(update, JsonDeserializable):  # an update listener gets a list
            self._exec_task(run_as_handler, functools.partial(task, *args, **kwargs))
            return
        unit: LightUnit | UnitOfWork
        try:
            if self._is_plain:
                unit = LightUnit(
                    self._sessions.managers[0].scopes.of_update(update), task, args, kwargs
                )
            else:
                update_scope = self._sessions.scope_of(update, delivery_of(update))
                unit = UnitOfWork(update_scope, task, args, kwargs)
        except Exception as error:  # not here, in the polling thread: the batch would be lost
            self._exec_task(raise_error, error)
            return
        if unit.has_session and self._bot.use_class_middlewares and kwargs.get("handlers"):
            kwargs["handlers"] = rolling_back(kwargs["handlers"], RollsBack)
        if not unit.waits or self._waiting.stopped or not self._bot.threaded:
            self._exec_task(unit.run)
        else:
            self._waiting.queue(unit)

    def test_message_handler(self, handler: Any, update: Any) -> bool:
        """A filter that raises has failed as a handler does; class middlewares swallow it too."""
        try:
            return bool(self._test_message_handler(handler, update))
        except Exception as error:
            roll_back(update, error)
            raise
