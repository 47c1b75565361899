"""Next steps, replies and listeners of a TeleBot: what telebot looks up in the thread that fetches
messages is looked up inside the scope of each message.

This module knows what telebot registers for a message; it does not know how its scope is opened.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from ..lifecycle.current import entries
from .attribute import Binding
from .rollback import roll_back
from .unit import raise_error


class NextSteps:
    """What is put in the place of those methods of one TeleBot that look something up.

    `exec_in_scope` is called as telebot's `_exec_task`.
    """

    def __init__(self, bot: Any, exec_in_scope: Callable[..., None]) -> None:
        self._bot: Final = bot
        self._exec_in_scope: Final = exec_in_scope
        self._exec_task: Final = bot._exec_task
        self._notify_command_handlers: Final = bot._notify_command_handlers
        self._run_middlewares_and_handler: Final = bot._run_middlewares_and_handler
        self._tell_listeners: Final = bot._TeleBot__notify_update
        #: Messages that the listeners are not told of, unless their step is gone in the end.
        self._untold: Final = weakref.WeakValueDictionary[int, Any]()
        self._look_up: Final = threading.Lock()  # a backend of telebot's is made for one thread
        bot._notify_next_handlers = bot._notify_reply_handlers = _done_in_scope
        bot._TeleBot__notify_update = self.notify_update
        bot._notify_command_handlers = self.notify_command_handlers
        bot._run_middlewares_and_handler = self.run_middlewares_and_handler

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
        if steps:  # then telebot does nothing else with it
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
            found = backend.get_handlers(number)
        if not found:
            return []
        return [
            functools.partial(each["callback"], message, *each["args"], **each["kwargs"])
            for each in found
        ]

    def _run_each(self, message: Any, tasks: Sequence[Callable[[], None]]) -> None:
        """Several tasks inside the scope of one message; each is saved or rolled back alone."""
        failures: list[Exception] = []
        for done, task in enumerate(tasks, 1):
            rest = tasks[done:]
            try:
                task()
                if _is_released(message):
                    for each in rest:  # with a scope of their own
                        self._exec_in_scope(_call, message, each)
                    break
                if rest or failures:
                    _flush(message)
            except Exception as error:
                roll_back(message, error)
                failures.append(error)
        try:
            for failure in failures[:-1]:
                self._exec_task(raise_error, failure)
            if failures:
                raise failures[-1]
        finally:
            del failures  # which know this frame: no cycle stays


def _done_in_scope(*_args: Any) -> None:
    """What telebot would do here is done inside the scope of each message."""


def _call(_update: Any, work: Callable[[], None]) -> None:
    work()


def _flush(update: object) -> None:
    """Save what one of several tasks has changed, before the next one begins."""
    for entry in entries():
        if entry.update is update:
            entry.target.flush()


def _is_released(update: object) -> bool:
    """Whether a handler has released a session of `update`."""
    binding = Binding.of(update)
    places = () if binding is None else binding.places
    scopes = [place.scope() for place in places if place is not None]
    return any(scope is None or scope.closed for scope in scopes)
