"""What can be seen of the locks, where something has waited for too long."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from session_sync import SessionManager
from session_sync.lifecycle.current import current


class Collections:
    """The collection that is on its way, if one is. All other ones wait for it."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.thread = ""
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _info: object) -> None:
        self.begun = time.monotonic() if phase == "start" else 0.0
        self.thread = threading.current_thread().name

    def __str__(self) -> str:
        if not self.begun:
            return "no collection is on its way"
        return f"{self.thread} has collected for {time.monotonic() - self.begun:.3f} s"


collections = Collections()


def current_frames() -> dict[int, FrameType]:
    """Where all threads are. Without a collection in it, which would hold a lock of CPython's that
    every thread needs as it begins or ends: then all of them wait for ever (gh-106883)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if was_enabled:
            gc.enable()


def locks_and_stacks(manager: SessionManager[Any]) -> str:
    """Each key that is held, with its scope and what knows that; and where all threads are."""
    table = manager.scopes.options.backend.locks
    lines = [str(collections)]
    for key in list(table.held.keys() | table.queues.keys()):
        handle, queue = table.held.get(key), table.queues.get(key)
        lines.append(f"  {key}: {'nobody has it' if handle is None else _described(handle)}")
        waiting = [] if queue is None else list(queue)
        lines.append(f"      {len(waiting)} wait, the first of them:")
        lines += [f"      {list(map(str, each.callers))} {each.waiter}" for each in waiting[:20]]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in current_frames().items():
        stack = traceback.extract_stack(frame)
        places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack]
        if len(places) > 1 or not places[0].endswith("_work"):  # else it has nothing to do
            lines.append(f"  {names.get(ident)}: {' > '.join(places[-16:])}")
    return "\n".join(lines)


def open_blocks() -> list[str]:
    """The blocks that are still open around this code, with what keeps them alive."""
    found = []
    around = current.get()
    while around is not None:
        entry = around()
        if entry is not None and not entry.target.closed:
            known = [f"\n      {each}" for each in _known_to(entry)]
            found.append(f"open at {time.monotonic():.6f}: {entry.full_key}{''.join(known)}")
        around = around.outer
    return found


def _known_to(scope: Any) -> list[str]:
    lines = []
    for referrer in gc.get_referrers(scope):
        if not isinstance(referrer, FrameType) or referrer.f_code.co_filename != __file__:
            lines.append(f"known to {_short(referrer)}")
            lines += [f"   known to {_short(each)}" for each in gc.get_referrers(referrer)[:6]]
    return lines


def _described(handle: Any) -> str:
    owner = None if handle.owner is None else handle.owner()
    scope = owner if handle.inside() is None else handle.inside()
    lines = [
        f"callers {list(map(str, handle.callers))}, by_note {handle.by_note}, "
        f"orphaned {handle.is_orphaned}, owner {owner!r}, keeps {handle.keeps!r}"
    ]
    if hasattr(scope, "members"):
        names = ("closed", "is_loaded", "opened", "_is_to_end", "_ends_soon", "_is_failed")
        lines.append(", ".join(f"{name} {getattr(scope, name)!r}" for name in names))
        is_open = scope.tracker is not None and scope.tracker.open
        is_calling = scope.call is not None and scope.call.is_on_its_way
        lines.append(f"held {list(scope.held)}, fields open {is_open}, calling {is_calling}")
        lines += _known_to(scope)
    return "\n      ".join(lines)


def _short(one: object) -> str:
    if isinstance(one, dict):
        return f"dict of {list(one)[:12]!r:.200}"
    return f"{type(one).__name__} {one!r:.160}"
