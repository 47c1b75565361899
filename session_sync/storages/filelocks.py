"""Locks by key between the processes of one machine, all of them in one file.

The kernel keeps them, so they fall with their owner, however it dies. This module knows keys and
records; it does not know how they are stored.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

from session_sync.errors import SessionConflictError, SessionLockTimeoutError
from session_sync.storages import forks
from session_sync.storages.background import Slot, Slots, for_each, start_thread, threads_may_block
from session_sync.storages.lockfile import HAS_OFD, LockFile, range_of

_WAITERS: Final = 64  # threads of one process that wait, for all its stores; then it is polled
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.03  # seconds between two looks
_BUSY: Final = "another process has it"
_REPLACEMENTS: Final = 10  # of the file, in one wait for a key


class FileLocks:
    """What keeps a key open in one process at a time.

    Each key has two bytes in the file, at a place that its hash says (of 2**61, so two keys never
    meet): a gate and the key itself. A waiter locks the gate, then the key (both at once if both
    are free), and opens the gate again. So at most one waiter is between gate and key, and it gets
    the key as soon as it is free: neither a later waiter, nor the old owner that comes back at
    once, can be faster. At the gate they race, one for each time that the key is handed on. With
    the key's byte alone, eight processes that held it for 10 ms got it from 33 to 52 times in three
    seconds; with the gate, from 37 to 39 times.

    The locks are open file description locks: they belong to an open file, not to a thread, and not
    to a process, as POSIX's other ones do, which would fall when any code in it closes the same
    file. They cannot be waited for with a time-out, so a thread waits, and the caller waits for the
    thread. When the caller gives up, the thread stays where it is: it keeps the place for the next
    caller in this process that asks for the key, or lets the lock go when it gets it and no caller
    has asked again. There are at most 64 such threads. Where none is to be had, or threads are
    greenlets, the caller looks again and again, so that every time-out is kept.

    Why nothing stays locked, and no key has two owners, whatever comes between two lines: an
    exception, a signal handler or a finaliser that opens and closes other sessions here, a fork.
    There is no mutex: each step is one operation of a dict, a deque or the kernel, so a call that
    comes in between is as one of another thread, and none of them waits for another. A lock always
    belongs to a handle, which exists before it locks anything, and lets go when it is forgotten.
    In a file that is open here, locks do not exclude each other, so a handle claims its two bytes
    among those of this process first, and no other one touches them until the handle has let go;
    a key whose bytes are claimed (by a handle that an exception has cut loose, and whose traceback
    is still referred to) is locked in a file of its own, where the kernel does exclude it. A thread
    that waits is known by a weak reference, and owns its handle, until it gives that to a caller in
    one step: it is for the caller, or the caller has given up and the thread lets go.

    What was locked before a `close()` or in another process is worth nothing (`check`): a forked
    child closes the files that it has inherited, and otherwise would keep the parent's locks.

    If the file is removed or replaced (a clean-up, a deploy), others lock in another one. So a key
    is ours only while the file that it is locked in is the one that has the path, which is looked
    at when the key was locked, and before anything is written. A key that is asked for then is
    locked in the new file, unless `check_store` raises: what the keys belong to was replaced, too.

    Where Python offers no such locks (macOS, Windows), other processes are not kept out, and a
    RuntimeWarning says so.
    """

    def __init__(self, path: str, check_store: Callable[[], object] = lambda: None) -> None:
        self._path: Final = path
        self._check_store: Final = check_store
        self._generation = Generation(path)
        _all[id(self)] = self
        if not HAS_OFD:
            warnings.warn(
                f"{path}: on this system sessions are not locked between processes; let one "
                f"process alone use this store, or take RedisStorage",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def generation(self) -> Generation:
        """What this process has opened since the last `close()`."""
        forks.check()
        return self._generation

    def waiting(self) -> set[str]:
        """The keys for which a thread of this process waits, with a caller or without."""
        refs = self._generation.waiters.valuerefs()  # one step, unlike the others
        return {ref.key for ref in refs if ref() is not None}

    def acquire(self, key: str, timeout: float) -> FileLockHandle:
        """Take `key`, waiting at most `timeout` seconds (0: not at all).

        Within one object the same key must not be asked for twice at the same time. Raises
        SessionLockTimeoutError.
        """
        deadline = time.monotonic() + timeout
        for _ in range(_REPLACEMENTS):
            generation = self.generation
            if not HAS_OFD:
                return FileLockHandle(self, generation, key, None)
            file = generation.file()
            handle = FileLockHandle(self, generation, key, file)
            try:
                is_taken = handle.take_at_once()
                if not is_taken and not timeout:
                    raise SessionLockTimeoutError(_BUSY)
            except BaseException:
                handle.release()
                raise
            if not is_taken:
                handle = self._wait(generation, handle, deadline)
            try:
                if file.is_in_place() and self._generation is generation:
                    return handle
            except BaseException:
                handle.release()
                raise
            handle.release()
            self._replace(generation)
        raise OSError(
            f"{self._path} is replaced again and again, so no session can be locked in it. Find "
            f"out which program does that."
        )

    def _replace(self, generation: Generation) -> None:
        """Go on in the file that has the path now."""
        self._check_store()
        if self._generation is generation:  # two threads that find that at once get the same one
            self._generation = generation.successor()
            generation.leave()

    def _wait(
        self, generation: Generation, handle: FileLockHandle, deadline: float
    ) -> FileLockHandle:
        caller = _Caller()
        try:
            waiter = generation.waiter(handle, caller)
            if waiter is None:
                return self._poll(handle, deadline)
            # One that has ended gives nothing any more to a caller that it did not know.
            caller.wait(0 if waiter.has_ended else max(0.0, deadline - time.monotonic()))
        except BaseException:
            if isinstance(given := caller.give_up(), FileLockHandle):
                given.release()
            raise
        given = caller.give_up()
        if isinstance(given, OSError):
            raise given
        if given is not None:
            return given
        return self._poll(FileLockHandle(self, generation, handle.key, generation.file()), deadline)

    def _poll(self, handle: FileLockHandle, deadline: float) -> FileLockHandle:
        """Take the key without a thread, until `deadline`."""
        pause = _SHORTEST_PAUSE
        try:
            while (left := deadline - time.monotonic()) > 0:
                if not handle.claim():
                    handle = handle.in_another_file()
                if handle.take_step():
                    return handle
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
            raise SessionLockTimeoutError(_BUSY)
        except BaseException:
            handle.release()
            raise

    def close(self) -> None:
        """Let all go."""
        generation, self._generation = self._generation, Generation(self._path)
        if generation.pid == os.getpid():
            generation.unlock()
        generation.leave()

    def after_fork(self) -> None:
        """In a child: nothing of the parent's is ours, nor does any other thread live on."""
        generation, self._generation = self._generation, Generation(self._path)
        generation.close_files()  # which unlocks nothing: the parent has the same ones
        generation.leave()


class Generation:
    """What one process has of the locks until it closes them: the open file, which handle has
    claimed what in it, and the threads that wait."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self.pid: Final = os.getpid()
        self.waiters: Final[WeakValueDictionary[str, _Waiter]] = WeakValueDictionary()  # by key
        self._main: Final[dict[str, LockFile]] = {}
        self._next: Final[dict[str, Generation]] = {}
        self._files: Final[WeakValueDictionary[int, LockFile]] = WeakValueDictionary()

    def file(self) -> LockFile:
        """The file for all keys, opened when it is first needed."""
        # Two threads that open it at once get the one that is noted first; the other one is closed.
        return self._main.get("file") or self._main.setdefault("file", self.new_file())

    def new_file(self) -> LockFile:
        """The same file, opened once more, so that its locks exclude ours."""
        file = LockFile(self.path)
        self._files[id(file)] = file
        return file

    def successor(self) -> Generation:
        """What follows this one when its file is not the right one any more."""
        return self._next.get("next") or self._next.setdefault("next", Generation(self.path))

    def waiter(self, handle: FileLockHandle, caller: _Caller) -> _Waiter | None:
        """A thread that waits for the key of `handle`, for `caller` now; None if there is none, nor
        can be. If it is a new one, the handle belongs to it from here on."""
        waiter = self.waiters.get(handle.key)
        if waiter is not None:
            waiter.callers.append(caller)
        elif threads_may_block() and handle.claim() and (slot := _slots.take()) is not None:
            waiter = _Waiter(self, handle, slot, caller)
            if not start_thread(waiter.run):
                return None
            self.waiters[handle.key] = waiter
        return waiter

    def unlock(self) -> None:
        """Let all locks go, but those under which something is being written: they go with their
        handles."""
        for file in self._open_files():
            for gate in list(file.claims):
                if gate not in file.writing:
                    file.unlock(gate)

    def close_files(self) -> None:
        """Close all files, and keep the locks of another process that has them open."""
        for file in self._open_files():
            file.close()

    def leave(self) -> None:
        """Keep nothing open that is not used any more."""
        self._main.clear()
        self.waiters.clear()

    def _open_files(self) -> list[LockFile]:
        return [file for ref in self._files.valuerefs() if (file := ref()) is not None]


class FileLockHandle:
    """A key that this process has, or wants. The key is let go when this object is forgotten."""

    __slots__ = ("_claim", "_file", "_generation", "_leaving", "_locks", "_range", "key")

    def __init__(
        self, locks: FileLocks, generation: Generation, key: str, file: LockFile | None
    ) -> None:
        self.key: Final = key
        self._file: Final = file  # None: where no other process is kept out
        self._locks: Final = locks
        self._generation: Final = generation
        self._leaving: Final[dict[str, object]] = {}
        self._claim: Final = object()
        if file is not None:
            self._range: Final = range_of(key)

    def __del__(self) -> None:
        try:
            if "by" not in self._leaving:  # else it was released
                self.release()
        except BaseException:
            if hasattr(self, "_range"):  # else an exception came into __init__: it has nothing
                self.release()  # one from outside came in: nothing else would do it
                raise

    def in_another_file(self) -> FileLockHandle:
        """A handle of the same key, which the handles in the main file exclude."""
        file = self._generation.new_file()
        other = FileLockHandle(self._locks, self._generation, self.key, file)
        other.claim()
        return other

    def claim(self) -> bool:
        """Whether the key's bytes in this file are for this handle alone, until it is released."""
        assert self._file is not None
        return self._file.claims.setdefault(self._range.gate, self._claim) is self._claim

    def take_at_once(self) -> bool:
        """Take the key, if that is possible at once."""
        file, at = self._file, self._range
        assert file is not None
        if file.claims.setdefault(at.gate, self._claim) is not self._claim:  # as claim(), sooner
            return False
        if not file.try_to(at.take):  # both bytes or none
            return False
        file.set(at.open)
        return True

    def take_step(self) -> bool:
        """Go as far as one comes without waiting: to the gate, and to the key. True: it is ours."""
        assert self._file is not None
        # To have locked the gate is to be next, also by an earlier step.
        if not self._file.try_to(self._range.take_gate) or not self._file.try_to(self._range.take):
            return False
        self._file.set(self._range.open)
        return True

    def take(self) -> None:
        """Take the key, however long that takes."""
        assert self._file is not None
        self._file.wait_for(self._range.gate)
        self._file.wait_for(self._range.gate + 1)
        self._file.set(self._range.open)

    def is_valid(self) -> bool:
        """Whether the key is ours, and others are kept out: all processes lock in the same file."""
        file = self._file
        if self._locks.generation is not self._generation:
            return False
        if file is None:
            return True
        if "begun" in self._leaving:  # it was interrupted, and others may be in by now
            return False
        # The collector may have closed the file, and with that let the key go.
        is_ours = file.claims.get(self._range.gate) is self._claim and not file.closed
        return is_ours and file.is_in_place()

    def check(self) -> None:
        """Raises SessionConflictError if the key is not ours any more."""
        if not self.is_valid():
            raise self._conflict()

    def begin_to_write(self) -> None:
        """As `check`; and from here on a `close()` of the storage does not let others in, until
        `has_written`."""
        if self._file is not None:  # first: see Generation.unlock
            self._file.writing.setdefault(self._range.gate, self._claim)
        if not self.is_valid():
            self.has_written()
            raise self._conflict()

    def _conflict(self) -> SessionConflictError:
        return SessionConflictError(
            f"session {self.key!r} was closed, or opened before its storage was closed, before "
            f"this process was forked, or before the file of its lock was removed: another "
            f"process may have it now, so nothing was written. Open it again."
        )

    def has_written(self) -> None:
        """What began with `begin_to_write` is over."""
        file = self._file
        if file is not None and file.writing.get(self._range.gate) is self._claim:
            file.writing.pop(self._range.gate, None)

    def release(self) -> None:
        """Let the key go. To do so again, also in between, does nothing."""
        file = self._file
        if file is None:
            return
        # The owner may do so in one thread while the collector does it in another one, which found
        # both to be garbage. The second one must not touch what may be a new owner's by then.
        attempt = object()
        try:
            if self._leaving.setdefault("by", attempt) is not attempt:
                return
            gate = self._range.gate
            if file.claims.get(gate) is self._claim and self._generation.pid == os.getpid():
                self.has_written()
                self._leaving["begun"] = attempt  # and never undone: see is_valid()
                if not file.closed:  # by the collector, which unlocks it
                    file.set(self._range.leave)
                file.claims.pop(gate, None)
        except BaseException:
            if self._leaving.get("by") is attempt:
                self._leaving.pop("by", None)  # to be done again
            raise


class _Waiter:
    """A thread that waits for one key, for the callers in this process that want it."""

    __slots__ = ("__weakref__", "_generation", "_handle", "_slot", "callers", "has_ended")

    def __init__(
        self, generation: Generation, handle: FileLockHandle, slot: Slot, caller: _Caller
    ) -> None:
        self._generation: Final = generation
        self._handle: Final = handle
        self._slot: Final = slot
        self.callers: Final = deque([caller])
        self.has_ended = False  # a caller that is added after that may be missed

    def run(self) -> None:
        """Wait, in a thread of its own."""
        outcome: _Outcome = None
        try:
            self._handle.take()
            outcome = self._handle
        except OSError as error:
            outcome = error
        finally:
            self._end(outcome)

    def _end(self, outcome: _Outcome) -> None:
        """Give `outcome` to one caller, and nothing to the others; or let the key go."""
        self._generation.waiters.pop(self._handle.key, None)
        self.has_ended = True
        given = False
        while self.callers:
            given = self.callers.popleft().give(None if given else outcome) or given
        if not given or outcome is not self._handle:
            self._handle.release()


_Outcome: TypeAlias = FileLockHandle | OSError | None


class _Caller:
    """A caller that waits for what a thread will give."""

    __slots__ = ("_box", "_signal")

    def __init__(self) -> None:
        self._box: Final[dict[str, tuple[_Outcome]]] = {}  # what is written into it first, counts
        self._signal: Final = threading.Lock()  # released when something was given
        self._signal.acquire()

    def wait(self, timeout: float) -> None:
        """Until something was given, or for `timeout` seconds."""
        self._signal.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))

    def give(self, outcome: _Outcome) -> bool:
        """In the thread: False if the caller has given up."""
        mine = (outcome,)
        given = self._box.setdefault("given", mine) is mine
        self._signal.release()
        return given

    def give_up(self) -> _Outcome:
        """What was given; if nothing was, nothing will be."""
        return self._box.setdefault("given", _NOTHING)[0]


_NOTHING: Final[tuple[_Outcome]] = (None,)


_slots: Final = Slots(_WAITERS)
_all: Final[WeakValueDictionary[int, FileLocks]] = WeakValueDictionary()


forks.register(_slots.clear)
forks.register(lambda: for_each(_all, FileLocks.after_fork))
