"""What `with_session` must know of a handler: where its update is, and if it takes a session.

This module knows signatures; it knows no manager and no scope.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..session.keys import StorageKey
from ..session.session import BaseSession


class HandlerSignature:
    """What a decorator must know of a handler: where its update is, and if it takes a session."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        signature = inspect.signature(handler)
        parameters = list(signature.parameters.values())
        session = signature.parameters.get("session")
        if session is not None and session.kind is session.POSITIONAL_ONLY:
            raise TypeError(f"{handler!r}: `session` is passed by name, it cannot stand before a /")
        self.wants_session: Final = session is not None
        self._handler: Final = handler
        if session is None:
            _refuse_other_annotation(handler)
        parameters = [p for p in parameters if p.name != "session"]
        self._signature: Final = signature.replace(parameters=parameters)
        is_method = bool(parameters) and parameters[0].name in ("self", "cls")
        self._position: Final = int(is_method)
        given = [p for p in parameters[self._position :] if p.kind is not p.KEYWORD_ONLY]
        if not given or given[0].kind is inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"{handler!r} takes no update, so it can have no session")
        self._name: Final = given[0].name

    def update(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The update among the arguments of a call."""
        if len(args) > self._position:
            update = args[self._position]
        elif self._name in kwargs:
            update = kwargs[self._name]
        else:
            raise TypeError("a handler decorated with with_session was called without an update")
        if isinstance(update, (str, StorageKey)):
            raise TypeError(
                f"a handler decorated with with_session was called with a {type(update).__name__} "
                f"in place of an update, as functools.partial(handler, ...) does: decorate what "
                f"the bot calls, with_session(functools.partial(...)), with the update as its "
                f"first argument. A key is for session_scope()."
            )
        return update

    def refuse_other_name(
        self, error: TypeError, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Raise TypeError with the rule, if `error` is Python's own for a call that lacks an
        argument: that may be the session under another name."""
        is_inside = error.__traceback__ is None or error.__traceback__.tb_next is not None
        if self.wants_session or is_inside:
            return
        try:
            given = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # that is not all that is wrong
            return
        missing = [
            parameter.name
            for parameter in self._signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in _ANY_NUMBER
            and parameter.name not in given
        ]
        if missing:
            raise TypeError(
                f"{self._handler!r} was called without {', '.join(missing)}; {_RULE}"
            ) from error

    def dress(self, wrapper: Callable[..., Any]) -> Any:
        """Give the wrapper the handler's signature, less the session."""
        wrapper.__signature__ = self._signature  # type: ignore[attr-defined] # what inspect reads
        return wrapper


def _refuse_other_annotation(handler: Callable[..., Any]) -> None:
    """Raise TypeError if an argument that is to have a session, as its annotation says, has another
    name. One with a value of its own (of a functools.partial, say) needs none."""
    try:
        signature = inspect.signature(handler, eval_str=True)
    except Exception:  # what type checkers alone import, say: a call will tell
        return
    for parameter in signature.parameters.values():
        annotation = parameter.annotation
        is_session = isinstance(annotation, type) and issubclass(annotation, BaseSession)
        is_given = isinstance(parameter.default, BaseSession)
        if is_session and not is_given and parameter.kind not in _ANY_NUMBER:
            raise TypeError(
                f"{handler!r}: `{parameter.name}` is annotated as {annotation.__name__}; {_RULE}"
            )


_ANY_NUMBER: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_RULE: Final = (
    "the session arrives as the argument named `session`, and this handler has none of that name: "
    "rename the one that is to have it"
)


def is_async(handler: Callable[..., Any]) -> bool:
    while isinstance(handler, functools.partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
        getattr(handler, "__call__", None)  # noqa: B004 (an object with an async __call__)
    )
