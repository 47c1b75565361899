"""Storages of which each breaks one promise to other processes: the suite for authors must catch
them. At the top of a module, since other processes import them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from session_sync import SessionConflictError, SessionLockTimeoutError, SQLiteStorage
from session_sync.storages.filelocks import FileLocks


class ExcludesNothing(SQLiteStorage):
    """Each process locks in a file of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._locks = FileLocks(f"{path}-locks-of-{os.getpid()}")  # type: ignore[misc]


class _Record:
    """An open record that is changed in one thing by a subclass."""

    def __init__(self, storage: SQLiteStorage, key: str, opened: Any) -> None:
        self.storage, self.key, self.opened = storage, key, opened
        self.record = opened.record

    def save(self, record: Any) -> None:
        self.opened.save(record)

    def close(self, record: Any) -> None:
        self.opened.close(record)

    def close_nowait(self, record: Any) -> bool:
        return bool(self.opened.close_nowait(record))

    def begin_to_write(self) -> None:
        self.opened.begin_to_write()

    def has_written(self, size: int | None) -> None:
        self.opened.has_written(size)


class _Wrapping(SQLiteStorage):
    Record: type[_Record] = _Record

    def open_record(self, key: str, timeout: float, /) -> Any:
        return self.Record(self, key, super().open_record(key, timeout))

    def open_nowait(self, key: str, /) -> Any:
        opened = super().open_nowait(key)
        return None if opened is None else self.Record(self, key, opened)


class HasNoFence(_Wrapping):
    """It writes, whether its lock was lost or not."""

    class Record(_Record):
        def save(self, record: Any) -> None:
            if record:
                self.storage.set(self.key, record)
            else:
                self.storage.delete(self.key)

        def close(self, record: Any) -> None:
            if record is not None:
                self.save(record)
            self.opened.close(None)

        def close_nowait(self, record: Any) -> bool:
            self.close(record)
            return True


class WaitsInOpenNowait(SQLiteStorage):
    def open_nowait(self, key: str, /) -> Any:
        with suppress(SessionLockTimeoutError):
            return self.open_record(key, 0.5)
        return None


class WaitsForEverInOpenNowait(SQLiteStorage):
    def open_nowait(self, key: str, /) -> Any:
        return self.open_record(key, 3600)


class GivesWhatIsLocked(_Wrapping):
    """open_nowait does not look at locks."""

    class Unlocked(_Record):
        def __init__(self, storage: SQLiteStorage, key: str) -> None:
            self.storage, self.key = storage, key
            self.record = storage.get(key)

        def save(self, record: Any) -> None:
            self.storage.set(self.key, record)

        def close(self, record: Any) -> None:
            if record is not None:
                self.save(record)

        def close_nowait(self, record: Any) -> bool:
            self.close(record)
            return True

    def open_nowait(self, key: str, /) -> Any:
        return self.Unlocked(self, key)


class NeverOpensNowait(SQLiteStorage):
    def open_nowait(self, key: str, /) -> Any:
        return None


class StoresNothingInCloseNowait(_Wrapping):
    class Record(_Record):
        def close_nowait(self, record: Any) -> bool:
            return bool(self.opened.close_nowait(None))


class SavesHalf(SQLiteStorage):
    """One record after the other."""

    def save_all(self, records: Mapping[str, Any], opened: Mapping[str, Any], /) -> bool:
        for key, record in records.items():
            opened[key].save(record)
            time.sleep(0.001)
        return True


class SavesAllWithoutFence(SQLiteStorage):
    def save_all(self, records: Mapping[str, Any], opened: Mapping[str, Any], /) -> bool:
        class Anyone:
            begin_to_write = has_written = lambda *_arguments: None

        return super().save_all(records, dict.fromkeys(opened, Anyone()))  # type: ignore[arg-type]


class SavesHalfAndReturnsFalse(SQLiteStorage):
    def save_all(self, records: Mapping[str, Any], opened: Mapping[str, Any], /) -> bool:
        for key, record in list(records.items())[:1]:
            opened[key].save(record)
        return False


class NeverFreed(_Wrapping):
    """A lock is a file that is there, until its owner removes it; in place of SQLite's."""

    class Record(_Record):
        def __init__(self, storage: NeverFreed, key: str, lock: Path) -> None:
            self.lock, self.storage, self.key = lock, storage, key
            self.record = storage.get(key)

        def save(self, record: Any) -> None:
            self.storage.set(self.key, record)

        def close(self, record: Any) -> None:
            try:
                if record is not None:
                    self.save(record)
            finally:
                self.lock.unlink()

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder = path.parent

    def open_record(self, key: str, timeout: float, /) -> Any:
        lock = self.folder / f"{key.encode().hex()}.lock"
        end = time.monotonic() + timeout
        while True:
            with suppress(FileExistsError):
                lock.touch(exist_ok=False)
                return self.Record(self, key, lock)
            if time.monotonic() > end:
                raise SessionLockTimeoutError("another process has it")
            time.sleep(0.01)

    def open_nowait(self, key: str, /) -> Any:
        return None


class StaysLockedWhenSavingFails(_Wrapping):
    class Record(_Record):
        kept: list[Any] = []

        def close(self, record: Any) -> None:
            if record is not None:
                self.kept.append(self.opened)
                self.save(record)
            self.opened.close(None)


class UnlocksBeforeItStores(_Wrapping):
    class Record(_Record):
        def close(self, record: Any) -> None:
            self.opened.close(None)
            if record:
                self.storage.set(self.key, record)
            elif record is not None:
                self.storage.delete(self.key)


class StoresTwice(_Wrapping):
    """Called again, close() does all of it again."""

    class Record(_Record):
        def close(self, record: Any) -> None:
            if record is not None:
                self.storage.set(self.key, record)
            self.opened.close(None)
            len(self.key)  # where an interrupt may come


class KeepsWhatWasDropped(_Wrapping):
    class Record(_Record):
        kept: list[Any] = []

        def __init__(self, storage: SQLiteStorage, key: str, opened: Any) -> None:
            super().__init__(storage, key, opened)
            self.kept.append(self)


class NeverGivesUp(SQLiteStorage):
    def open_record(self, key: str, timeout: float, /) -> Any:
        return super().open_record(key, 3600)


class GivesUpAtOnce(SQLiteStorage):
    def open_record(self, key: str, timeout: float, /) -> Any:
        return super().open_record(key, 0)


class NamesNoOwner(SQLiteStorage):
    def open_record(self, key: str, timeout: float, /) -> Any:
        try:
            return super().open_record(key, timeout)
        except SessionLockTimeoutError:
            raise SessionLockTimeoutError from None


class LocksAllKeysAtOnce(SQLiteStorage):
    def open_record(self, key: str, timeout: float, /) -> Any:
        return _Record(self, key, _Renamed(self, key, timeout))


class _Renamed:
    """A record under the lock of all."""

    def __init__(self, storage: SQLiteStorage, key: str, timeout: float) -> None:
        self.handle = storage._locks.acquire("all", timeout)
        self.storage, self.key, self.record = storage, key, storage.get(key)

    def save(self, record: Any) -> None:
        self.handle.check()
        self.storage.set(self.key, record)

    def close(self, record: Any) -> None:
        if record is not None:
            self.save(record)
        self.handle.release()


class StoresEmptyRecords(_Wrapping):
    class Record(_Record):
        def save(self, record: Any) -> None:
            if not self.opened._handle.is_valid():
                raise SessionConflictError
            self.storage.set(self.key, record)
