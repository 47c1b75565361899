"""What all scopes of one manager have in common.

This module knows what can be chosen; it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from ..locks.watch import Patience
from ..session.declarations import NO_SCHEMA, Schema
from ..session.migrations import Migrations
from ..session.session import BaseSession
from .backend import Backend

S = TypeVar("S", bound=BaseSession)

#: How many seconds a scope waits for its key, where nothing else is set.
LOCK_TIMEOUT: Final = 30.0


@dataclass(frozen=True, slots=True)
class Options(Generic[S]):
    """What all scopes of one manager have in common; by default, that sessions of any kind are left
    as they are stored."""

    session_type: type[S]
    backend: Backend
    schema: Schema = NO_SCHEMA
    migrations: Migrations | None = None  # None: sessions of any version are left as they are
    migrate_eagerly: bool = False
    initial: Callable[[Any], Mapping[str, Any] | None] | None = None
    lazy: bool = False
    lock_timeout: float | None = LOCK_TIMEOUT
    queue_timeout: float | None = LOCK_TIMEOUT  # the part of it behind others of this process
    patience: Patience | None = None  # what is told when that takes long
    save_on_error: bool = False
    dedupe: int = 0  # how many updates a session remembers
    #: Whether a session can be opened without a flow, unless another caller has it.
    opens_now: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "opens_now", not self.migrate_eagerly)
