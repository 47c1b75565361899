"""The integration with python-telegram-bot: `install` gives every handler its session, as
`context.session`, and if it is told to, its chat's as well, as `context.chat_session`.

All that PTB does with an update goes through `Application.process_update`, whatever calls it, so
that is where the scopes of its sessions are put around it; the tasks that PTB makes for an update
keep them open until the last of them has ended. `ConversationHandler` is PTB's with its states in
the session. Nothing else in session_sync knows PTB.
"""

from .attribute import SessionContext
from .conversations import ConversationHandler
from .filters import session_filter
from .installation import install

__all__ = ["ConversationHandler", "SessionContext", "install", "session_filter"]
