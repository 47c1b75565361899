"""The integration with pyTelegramBotAPI: `install` gives every handler its session, as
`message.session`, and if it is told to, its chat's as well, as `message.chat_session`;
`SessionStates` keeps telebot's own states in the session.

All that a TeleBot does with an update (handlers, next-step and reply callbacks, in its pool or not)
goes through its `_exec_task`, and all that an AsyncTeleBot does with one goes through its
`_run_middlewares_and_handlers`, so that is where a session's scope is put around it. What telebot
looks up for a message before (next steps, replies) is looked up inside the scope. Nothing else in
session_sync knows telebot.
"""

from .installation import install
from .states import AsyncSessionStates, SessionStates

__all__ = ["AsyncSessionStates", "SessionStates", "install"]
