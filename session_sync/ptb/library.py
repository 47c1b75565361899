"""What is needed of python-telegram-bot, its private methods included, and whether it is there.

The only module here that imports the library. It knows no session.
"""

from __future__ import annotations

from typing import Final

try:
    from telegram import Bot as Bot
    from telegram import Update as Update
    from telegram._utils.defaultvalue import DEFAULT_TRUE as DEFAULT_TRUE
    from telegram.ext import Application as Application
    from telegram.ext import ApplicationBuilder as ApplicationBuilder
    from telegram.ext import ApplicationHandlerStop as ApplicationHandlerStop
    from telegram.ext import BaseHandler as BaseHandler
    from telegram.ext import CallbackContext as CallbackContext
    from telegram.ext import ContextTypes as ContextTypes
    from telegram.ext import ConversationHandler as ConversationHandler
    from telegram.ext import ExtBot as ExtBot
    from telegram.ext import JobQueue as JobQueue
    from telegram.ext.filters import UpdateFilter as UpdateFilter
except ImportError as error:  # pragma: no cover - shown by a test in a process of its own
    raise ImportError(
        "session_sync.ptb needs python-telegram-bot 20 or newer: pip install 'session-sync[ptb]'"
    ) from error

# The private methods of PTB through which all tasks go: its public create_task is not called for
# the non-blocking error handlers, and no public method runs in the task itself.
CREATE_TASK: Final = "_Application__create_task"
RUN_TASK: Final = "_Application__create_task_callback"
# And the one that takes a slot for an update that was fetched: by its own semaphore, or by the
# update processor, whose method that does so is final.
PROCESS_FETCHED: Final = "_Application__process_update_wrapper"


def is_known() -> bool:
    """Whether this version of PTB has what something else is put in the place of."""
    return all(hasattr(Application, name) for name in (CREATE_TASK, RUN_TASK, PROCESS_FETCHED))
