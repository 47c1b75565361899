"""Everything that session_sync raises: one small tree under `SessionError`.

Each error is also the builtin that a caller would expect, so that code which knows nothing of this
library (`except TimeoutError`) still does the right thing. A message names the session's key, the
cause and the remedy; it never contains a value out of a session.
"""


class SessionError(Exception):
    """The root of all errors of this library."""


class SessionKeyError(SessionError, LookupError):
    """The update belongs to no session: it has neither a user nor a chat (a poll, for example)."""


class SessionClosedError(SessionError, RuntimeError):
    """A session was changed after its scope had closed: the change could not have been saved."""


class SessionAwaitError(SessionError, RuntimeError):
    """Async code did without `await` what would have blocked the event loop."""


class SessionLockTimeoutError(SessionError, TimeoutError):
    """Another caller or process held the session for longer than `lock_timeout` seconds."""


class SessionDeadlockError(SessionError, RuntimeError):
    """This wait for a session could never have ended."""


class SessionConflictError(SessionError, RuntimeError):
    """Another caller or process may have had the session meanwhile; its changes were not written
    over."""


class SessionEncodeError(SessionError, TypeError):
    """A session holds a value that its storage cannot keep; nothing was written."""


class SessionTypeError(SessionError, TypeError):
    """A field has a value that is not of its declared type; nothing was changed or written."""


class SessionVersionError(SessionError, RuntimeError):
    """A stored session is of a newer version than this program knows; it is left as it is."""


class SessionMigrationError(SessionError, RuntimeError):
    """A migration failed; the stored session is left as it was."""


class SessionDecodeError(SessionError, ValueError):
    """A stored record is not one that this library wrote; it is left as it is."""


# PTB 20 and later, and PTB 13. By name, since the frameworks are not imported here.
_CONTROL_FLOW = ("ApplicationHandlerStop", "DispatcherHandlerStop")


def is_control_flow(error: BaseException) -> bool:
    """Whether a framework raises this to say what comes next, and not because anything failed."""
    return any(
        cls.__name__ in _CONTROL_FLOW and cls.__module__.startswith("telegram.")
        for cls in type(error).__mro__
    )
