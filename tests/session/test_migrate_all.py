"""`migrate_all()`: every stored session in the newest version, while others use them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import migration_tools
import pytest
from conftest import Counting
from migration_tools import NEW, OLD, Person

from session_sync import (
    MemoryStorage,
    SessionLockTimeoutError,
    SessionManager,
    SessionMigrationError,
    SessionVersionError,
)

storage = pytest.fixture(migration_tools.make_storage)
people = pytest.fixture(migration_tools.make_people)


def test_migrate_all_brings_every_session_up_to_date(people: SessionManager[Person]) -> None:
    for number in range(2, 6):
        people.storage.set(f"user:{number}", OLD)
    seen: list[str] = []
    assert people.migrate_all(seen.append) == 5
    assert sorted(seen) == [f"user:{number}" for number in range(1, 6)]
    assert [people.storage.get(f"user:{number}") for number in range(1, 6)] == [NEW] * 5
    assert people.migrate_all() == 0


def test_migrate_all_can_be_interrupted_and_goes_on(people: SessionManager[Person]) -> None:
    for number in range(2, 6):
        people.storage.set(f"user:{number}", OLD)
    seen: list[str] = []

    def stop(key: str) -> None:
        seen.append(key)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        people.migrate_all(stop)
    assert [people.storage.get(key) for key in seen] == [NEW] * 2
    assert people.migrate_all() == 3


def test_migrate_all_reads_once_what_is_up_to_date() -> None:
    storage = Counting()
    for number in range(3):
        storage.set(f"user:{number}", NEW)
    storage.writes = 0
    assert SessionManager(Person, storage=storage).migrate_all() == 0
    assert (storage.reads, storage.writes) == (3, 0)


def test_migrate_all_leaves_what_fails_and_says_so(people: SessionManager[Person]) -> None:
    people.storage.set("user:2", {"first": "no name", "lines": [], "name": 5})
    people.storage.set("user:3", {"$version": 9, "x": 1})
    people.storage.set("user:4", OLD)
    seen: list[str] = []
    with pytest.raises(ExceptionGroup, match="2 sessions were not migrated, 2 were") as caught:
        people.migrate_all(seen.append)
    assert {type(error) for error in caught.value.exceptions} == {
        SessionMigrationError,
        SessionVersionError,
    }
    assert sorted(seen) == ["user:1", "user:4"]
    assert people.storage.get("user:2") == {"first": "no name", "lines": [], "name": 5}
    assert people.storage.get("user:4") == NEW


def test_migrate_all_makes_no_session_anew_that_is_gone_meanwhile(storage: Any) -> None:
    storage.set("user:2", OLD)
    people = SessionManager(
        Person, storage=storage, initial=lambda update: pytest.fail("nobody has asked for it")
    )
    seen: list[str] = []

    def forget(key: str) -> None:
        seen.append(key)
        for other in {"user:1", "user:2"} - set(seen):
            storage.delete(other)

    assert people.migrate_all(forget) == 1
    assert [key for key in ("user:1", "user:2") if storage.has(key)] == seen[:1]


def test_migrate_all_leaves_what_is_open_around_it(people: SessionManager[Person]) -> None:
    people.storage.set("user:2", OLD)
    with people.session_scope("user:1"):
        with pytest.raises(ExceptionGroup) as caught:
            people.migrate_all()
        assert "'user:1' is open around migrate_all()" in str(caught.value.exceptions[0])
    assert people.storage.get("user:2") == NEW


class Viewed(MemoryStorage):
    """Its keys are a view, which does not outlive a change."""

    def keys(self) -> Any:
        return self._records.keys()


def test_migrate_all_may_delete_while_it_lists() -> None:
    storage = Viewed()
    for number in range(5):
        storage.set(f"user:{number}", OLD)
    assert SessionManager(storage=storage, migrations={2: lambda fields: {}}).migrate_all() == 5
    assert list(storage.keys()) == []


def test_what_failed_before_an_interruption_is_not_forgotten(
    people: SessionManager[Person],
) -> None:
    people.storage.set("user:0", {"name": 5})
    people.storage.set("user:2", OLD)

    def stop(key: str) -> None:
        if key == "user:2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        people.migrate_all(stop)
    keys = list(people.storage.keys())
    if keys.index("user:0") < keys.index("user:2"):
        (note,) = caught.value.__notes__
        assert "SessionMigrationError: session 'user:0'" in note


def test_many_failures_do_not_keep_their_sessions_in_memory() -> None:
    storage = MemoryStorage()
    for number in range(20):
        storage.set(f"user:{number}", {"name": 5})
    with pytest.raises(ExceptionGroup) as caught:
        SessionManager(Person, storage=storage).migrate_all()
    kept = [error for error in caught.value.exceptions if error.__traceback__ is not None]
    assert len(caught.value.exceptions) == 20
    assert len(kept) == 5


def test_migrate_all_keeps_to_its_prefix() -> None:
    storage = MemoryStorage()
    for key in ("a:user:1", "b:user:1", "user:1"):
        storage.set(key, OLD)
    seen: list[str] = []
    assert SessionManager(Person, storage=storage, prefix="a:").migrate_all(seen.append) == 1
    assert seen == ["user:1"]
    assert storage.get("a:user:1") == NEW
    assert storage.get("b:user:1") == storage.get("user:1") == OLD


@pytest.mark.parametrize("option", ["lazy", "migrate_eagerly"])
def test_migrate_all_works_for_every_manager(storage: Any, option: str) -> None:
    options: dict[str, Any] = {option: True}
    assert SessionManager(Person, storage=storage, **options).migrate_all() == 1
    assert storage.get("user:1") == NEW


def test_migrate_all_needs_a_storage_that_lists_its_keys() -> None:
    class Four:
        def get(self, key: str) -> Any: ...
        def set(self, key: str, value: Any) -> None: ...
        def delete(self, key: str) -> None: ...
        def has(self, key: str) -> bool:
            return False

    with pytest.raises(TypeError, match="Four cannot list its keys"):
        SessionManager(Person, storage=Four()).migrate_all()


def test_migrate_all_waits_for_a_handler_and_loses_nothing_of_it(threads: Any) -> None:
    storage = MemoryStorage()
    storage.set("user:1", OLD)
    people = SessionManager(Person, storage=storage)
    opened, go_on = threading.Event(), threading.Event()

    def handler() -> None:
        with people.session_scope("user:1") as session:
            opened.set()
            go_on.wait(10)
            session.last = "Roe"

    threads.start(handler)
    assert opened.wait(10)
    migrated: list[int] = []
    waiting = threads.start(lambda: migrated.append(people.migrate_all()))
    assert waiting.is_alive()
    go_on.set()
    threads.join()
    assert migrated == [0]  # the handler had done it
    assert storage.get("user:1") == {**NEW, "last": "Roe"}


def test_migrate_all_goes_on_past_a_session_that_somebody_keeps(threads: Any) -> None:
    storage = MemoryStorage()
    for number in (1, 2):
        storage.set(f"user:{number}", OLD)
    people = SessionManager(Person, storage=storage, lock_timeout=0.05)
    opened, go_on = threading.Event(), threading.Event()

    def handler() -> None:
        with people.session_scope("user:1"):
            opened.set()
            go_on.wait(10)

    threads.start(handler)
    assert opened.wait(10)
    with pytest.raises(ExceptionGroup) as caught:
        people.migrate_all()
    go_on.set()
    assert isinstance(caught.value.exceptions[0], SessionLockTimeoutError)
    assert storage.get("user:2") == NEW


def test_bots_may_run_meanwhile_and_no_update_is_lost(storage: Any, threads: Any) -> None:
    people = SessionManager(Person, storage=storage)
    keys = [f"user:{number}" for number in range(20)]
    for key in keys:
        storage.set(key, OLD)

    def bot() -> None:
        for _ in range(5):
            for key in keys:
                with people.session_scope(key) as session:
                    session.count = session.get("count", 0) + 1

    migrated: list[int] = []
    for _ in range(3):
        threads.start(bot)
    threads.start(lambda: migrated.append(people.migrate_all()))
    threads.join()
    for key in keys:
        assert storage.get(key) == {**NEW, "count": 15}


PROGRAM = """
    import sys
    from session_sync import Session, SessionManager, storage_from_url
    def twice(fields):
        fields["count"] = fields["count"] * 2  # done twice, it would show
    class Counted(Session):
        migrations = {2: twice}
        count: int = 0
    sessions = SessionManager(Counted, storage=storage_from_url(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "all":
        sessions.migrate_all()
    else:
        for number in range(30):
            with sessions.session_scope(f"user:{number}") as session:
                session.count += 1
"""


@pytest.mark.parametrize("scheme", ["sqlite", "disk", "redis"])
def test_several_processes_migrate_each_session_once(
    scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from session_sync import storage_from_url

    url = f"{scheme}:///{tmp_path}/{scheme}"
    if scheme == "redis":
        url = request.getfixturevalue("redis_url") + "?prefix=migrated:"
    storage: Any = storage_from_url(url)
    for number in range(30):
        storage.set(f"user:{number}", {"count": 100})
    kinds = ["all", "all", "bot", "bot"]
    program = textwrap.dedent(PROGRAM)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, url, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in kinds
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.communicate("go\n", timeout=60)
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for number in range(30):
        assert storage.get(f"user:{number}") == {"count": 202, "$version": 2}
    storage.close()
