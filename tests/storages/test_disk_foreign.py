"""Rows that other programs have written into the folder, and which users may read its files."""

from __future__ import annotations

import os
import pickle
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import disk_tools
import diskcache
import pytest
from disk_tools import in_thread, row, sql

from session_sync.errors import SessionDecodeError
from session_sync.storages.base import patched
from session_sync.storages.disk import DiskStorage

folder = pytest.fixture(disk_tools.make_folder)
storage = pytest.fixture(disk_tools.make_storage)

PICKLE, RAW, BINARY, TEXT = 4, 1, 2, 3


def plant(
    folder: Path, key: Any, value: Any, *, raw: int = 1, mode: int = RAW, filename: Any = None
) -> None:
    sql(
        folder,
        "INSERT INTO Cache (key, raw, store_time, access_time, mode, filename, value) "
        "VALUES (?, ?, 0, 0, ?, ?, ?)",
        *(key, raw, mode, filename, value),
    )


class Bomb:
    """Leaves a mark when somebody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestForeignRows:
    def refused(self, storage: DiskStorage, folder: Path, key: str = "user:1") -> str:
        """What is said about the row, which stays as it was."""
        before = row(folder, key)
        messages = []
        for read in (storage.get, storage.load):
            with pytest.raises(SessionDecodeError, match=f"session '{key}'") as caught:
                read(key)
            messages.append(str(caught.value))
        assert row(folder, key) == before != []
        assert storage.has(key)
        return messages[0]

    def test_a_pickle_is_refused_unread(
        self, storage: DiskStorage, folder: Path, tmp_path: Path
    ) -> None:
        bomb = pickle.dumps(Bomb(tmp_path / "mark"))
        plant(folder, "user:1", bomb, mode=PICKLE)
        assert "is a pickle" in self.refused(storage, folder)
        (folder / "bomb.val").write_bytes(bomb)
        plant(folder, "user:2", None, mode=PICKLE, filename="bomb.val")
        assert "is a pickle" in self.refused(storage, folder, "user:2")
        plant(folder, "user:3", bomb)
        self.refused(storage, folder, "user:3")
        assert not (tmp_path / "mark").exists()
        pickle.loads(bomb)
        assert (tmp_path / "mark").exists()

    def test_a_pickled_key_is_passed_over_unread(
        self,
        storage: DiskStorage,
        folder: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        storage.set("user:1", {"a": 1})
        bomb = pickle.dumps(Bomb(tmp_path / "mark"))
        plant(folder, bomb, b"{}", raw=0)
        assert list(storage.keys()) == ["user:1"]
        assert "rows whose key is no text were passed over: 1" in caplog.text
        assert storage.get("user:1") == {"a": 1}
        assert not (tmp_path / "mark").exists()
        assert row(folder, bomb) != []

    def test_what_another_program_wrote_with_diskcache_is_refused(self, folder: Path) -> None:
        with diskcache.Cache(str(folder), disk_min_file_size=10) as cache:
            cache["user:1"] = {"a": 1}
            cache["user:2"] = "some text that goes to a file"
            cache["user:3"] = b"some bytes that go to a file"
            cache["user:4"] = 5
            cache["user:5"] = "short"
            cache["user:6"] = b'{"a"'
            cache["user:7"] = b"{}"
            cache[5] = b"{}"
            cache[("a", 1)] = b"{}"
        files = {path: path.read_bytes() for path in folder.rglob("*.val")}
        assert len(files) == 3
        with closing(DiskStorage(folder)) as storage:
            for n in range(1, 7):
                self.refused(storage, folder, f"user:{n}")
            assert storage.get("user:7") == {}
            assert list(storage.keys()) == [f"user:{n}" for n in range(1, 8)]
        assert {path: path.read_bytes() for path in folder.rglob("*.val")} == files

    @pytest.mark.parametrize("name", ["../secret", "{tmp}/secret", "inside.val"])
    @pytest.mark.parametrize("mode", [RAW, BINARY, TEXT, PICKLE])
    def test_a_file_named_in_a_row_is_neither_read_nor_removed(
        self, folder: Path, tmp_path: Path, name: str, mode: int
    ) -> None:
        with closing(DiskStorage(folder, ttl=10)) as storage:
            for path in (tmp_path / "secret", folder / "inside.val"):
                path.write_bytes(b'{"a":"secret"}')
            for n in range(3):
                plant(folder, f"user:{n}", None, mode=mode, filename=name.format(tmp=tmp_path))
            assert "secret" not in self.refused(storage, folder, "user:0")
            storage.set("user:0", {})
            storage.delete("user:1")
            sql(folder, "UPDATE Cache SET expire_time = 1 WHERE key = 'user:2'")
            storage.set("user:3", {})
            assert sorted(storage.keys()) == ["user:0", "user:3"]
        assert (tmp_path / "secret").read_bytes() == b'{"a":"secret"}'
        assert (folder / "inside.val").exists()

    @pytest.mark.parametrize(
        "value",
        [
            None,
            5,
            1.5,
            "",
            '{"a":1}',
            b"",
            b"\xff" * 40,
            b"{}x",
            b"[]",
            b'{"a":1',
            bytes(range(256)),
        ],
        ids=repr,
    )
    def test_values_of_any_other_kind_are_refused(
        self, storage: DiskStorage, folder: Path, value: Any
    ) -> None:
        plant(folder, "user:1", value)
        self.refused(storage, folder)

    def test_text_that_is_no_utf_8_is_refused_and_not_quoted(
        self, storage: DiskStorage, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        sql(folder, "INSERT INTO Cache (key, raw, mode) VALUES ('user:1', 1, 1)")
        sql(folder, "UPDATE Cache SET value = CAST(X'736563726574FF' AS TEXT)")
        with pytest.raises(SessionDecodeError, match="session 'user:1'") as caught:
            storage.get("user:1")
        assert "secret" not in str(caught.value)
        sql(folder, "INSERT INTO Cache (key, raw) VALUES (CAST(X'736563726574FF' AS TEXT), 1)")
        assert list(storage.keys()) == ["user:1"]
        assert "rows whose key is no text were passed over: 1" in caplog.text
        assert "secret" not in caplog.text

    @pytest.mark.parametrize("key", [5, 1.5, None, b"bytes", b"\xff"], ids=repr)
    def test_keys_of_any_other_kind_are_passed_over(
        self, storage: DiskStorage, folder: Path, key: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        plant(folder, key, b"{}")
        storage.set("user:1", {"a": 1})
        assert list(storage.keys()) == ["user:1"]
        assert "rows whose key is no text were passed over: 1" in caplog.text

    def test_a_field_of_a_newer_version_is_found_at_its_first_access(
        self, storage: DiskStorage, folder: Path
    ) -> None:
        plant(folder, "user:1", b'{"a":1,"b":{"$future":5}}')
        record = storage.load("user:1")
        assert record is not None
        assert record["a"] == 1
        with pytest.raises(SessionDecodeError, match=r"'user:1'.* 'b'"):
            record["b"]
        with pytest.raises(SessionDecodeError, match=r"'user:1'.* 'b'"):
            storage.get("user:1")
        storage.save("user:1", patched(record, {"a": 2}))
        assert row(folder, "user:1")[0][-1] == b'{"a":2,"b":{"$future":5}}'

    def test_planted_settings_do_no_harm(self, storage: DiskStorage, folder: Path) -> None:
        storage.set("user:1", {"a": 1})
        storage.close()
        for key in (
            *("disk_fetch", "disk_put", "disk_anything", "disk__directory", "_sql", "_disk", "get"),
            *("close", "sqlite_user_version", "sqlite_nonsense", "_local", "directory"),
        ):
            sql(folder, "INSERT INTO Settings VALUES (?, 7)", key)
        sql(folder, "UPDATE Settings SET value = X'80' WHERE key = 'count'")
        with closing(DiskStorage(folder)) as reopened:
            assert reopened.get("user:1") == {"a": 1}
            reopened.set("user:2", {"a": 2})
            assert list(reopened.keys()) == ["user:1", "user:2"]
        assert sql(folder, "PRAGMA user_version") == [(0,)]

    def test_a_file_that_is_no_database_is_left_alone(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "cache.db").write_bytes(b"not a database" * 100)
        with pytest.raises(sqlite3.DatabaseError):
            DiskStorage(folder)
        assert (folder / "cache.db").read_bytes() == b"not a database" * 100


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
class TestPrivacy:
    @pytest.fixture(params=[0, 0o022, 0o777])
    def _umask(self, request: pytest.FixtureRequest) -> Iterator[None]:
        before = os.umask(request.param)
        yield
        os.umask(before)

    def check(self, folder: Path) -> None:
        assert mode_of(folder) == 0o700
        names = {path.name: mode_of(path) for path in folder.iterdir()}
        assert names == dict.fromkeys(["cache.db", "cache.db-wal", "cache.db-shm"], 0o600)

    @pytest.mark.usefixtures("_umask")
    def test_does_not_depend_on_the_umask(self, folder: Path) -> None:
        with closing(DiskStorage(folder)) as storage:
            storage.set("user:1", {"a": "x" * 100_000})
            self.check(folder)
        with closing(DiskStorage(folder)) as storage:
            storage.set("user:1", {"a": 2})
            self.check(folder)

    def test_is_restored_in_a_folder_of_ours(self, folder: Path) -> None:
        storage = DiskStorage(folder)
        storage.set("user:1", {"a": 1})
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777 if path.is_dir() else 0o666)
        with closing(DiskStorage(folder)), closing(storage):
            self.check(folder)

    def test_covers_an_empty_folder(self, folder: Path) -> None:
        folder.mkdir(0o755)
        with closing(DiskStorage(folder)) as storage:
            storage.set("user:1", {})
            self.check(folder)

    def test_leaves_the_mode_of_a_folder_with_other_things_in_it(self, folder: Path) -> None:
        folder.mkdir()
        folder.chmod(0o1777)
        (folder / "else").touch()
        for _ in range(2):
            with closing(DiskStorage(folder)) as storage:
                storage.set("user:1", {})
                assert mode_of(folder) == 0o1777
                assert {mode_of(path) for path in folder.glob("cache.db*")} == {0o600}

    def test_covers_the_parents_that_are_missing(self, tmp_path: Path) -> None:
        with closing(DiskStorage(tmp_path / "a" / "b")):
            assert mode_of(tmp_path / "a" / "b") == 0o700

    def test_a_home_folder_is_expanded_as_diskcache_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("BOT", "shop")
        with closing(DiskStorage("~/$BOT")) as storage:
            storage.set("user:1", {})
            self.check(tmp_path / "shop")

    def test_a_relative_folder_stays_where_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        with closing(DiskStorage("sessions")) as storage:
            storage.set("user:1", {"a": 1})
            monkeypatch.chdir(tmp_path / "elsewhere")
            found = in_thread(lambda: storage.get("user:1"))
        assert found == {"a": 1}
        assert list((tmp_path / "elsewhere").iterdir()) == []
