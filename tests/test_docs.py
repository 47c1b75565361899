"""The pages do what they say: every Python snippet runs, and prints what stands beside it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import page_adapters
import pytest
from conftest import run_client, stop_telebot
from pages import DOCS, FENCE, PAGES, ROOT, Snippet, python_of, snippets, title

import session_sync
from session_sync import SessionConflictError, SessionLockTimeoutError
from session_sync.testing import OfflineBotAPI

# print(...)  # what it prints
PRINTS = re.compile(r"^ *print\(.*\)  # (.+)$", re.M)
POLLING = "bot.infinity_polling()\n"
PTB_POLLING = re.compile(
    r"application\.run_polling\(\)(  # the next /start is number (?P<number>\d+))?$", re.M
)
TOKEN = "123456:OFFLINE"


def execute(page: Path, snippet: Snippet, namespace: dict[str, Any]) -> str:
    """Run a snippet, with its own lines in tracebacks, and return what it printed."""
    code = snippet.code
    if POLLING in code:  # it would never end: a short chat in its place
        code = code.replace(POLLING, "_chat(bot)\n")
        namespace["_chat"] = chat
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        if polling := PTB_POLLING.search(code):  # likewise; it is told where Telegram is before
            api = stack.enter_context(OfflineBotAPI(TOKEN, longest_poll=0.05))
            code = code.replace(polling[0], "_chat(application)")
            code = code.replace("Application.builder()", "Application.builder().base_url(_url)")
            first = int(polling["number"] or 1)
            namespace["_chat"] = lambda application: run_client(ptb_chat(application, api, first))
            namespace["_url"] = api.base_url
        stack.enter_context(contextlib.redirect_stdout(printed))
        lines = "\n" * (snippet.line - 1) + code
        exec(compile(lines, str(page), "exec", dont_inherit=True), namespace)
    return printed.getvalue()


def chat(bot: Any) -> None:
    """Say /start twice to a polling bot."""
    from telebot import apihelper

    with OfflineBotAPI(TOKEN, longest_poll=0.05) as api:
        apihelper.API_URL = api.telebot_url
        polling = threading.Thread(target=bot.infinity_polling)
        polling.start()
        try:
            alex = api.user(1, first_name="Alex")
            for number in ("1", "2"):
                alex.send("/start")
                assert number in alex.reply().text
        finally:
            stop_telebot(bot)
            polling.join()


async def ptb_chat(application: Any, api: OfflineBotAPI, first: int) -> None:
    """The same with a bot of python-telegram-bot's, whose next number is `first`."""
    async with application:
        await application.start()
        await application.updater.start_polling()
        try:
            alex = api.user(1, first_name="Alex")
            for number in (first, first + 1):
                alex.send("/start")
                assert str(number) in (await alex.areply()).text
        finally:
            await application.updater.stop()
            await application.stop()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder; telebot's settings and the log are put back afterwards."""
    apihelper = pytest.importorskip("telebot.apihelper")
    pytest.importorskip("telegram.ext")
    pytest.importorskip("diskcache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN", TOKEN)
    monkeypatch.setattr(apihelper, "API_URL", None)
    yield
    logging.getLogger("session_sync").setLevel(logging.NOTSET)  # as a page may have set it


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=title)
def test_every_snippet_of_a_page_runs(page: Path) -> None:
    """Programs that go into files of their own are run by test_quickstarts.py."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for snippet in python_of(page):
        printed = execute(page, snippet, namespace)
        expected = PRINTS.findall(snippet.code)
        assert printed.splitlines() == expected, f"{title(page)}:{snippet.line}"
    for name, value in namespace.items():
        if name.startswith("test_"):
            value()


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_fence_is_closed_and_says_what_it_is(page: Path) -> None:
    fences = page.read_text(encoding="utf-8").count("```")
    assert fences == 2 * len(snippets(page))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_begins_with_a_command_to_run_and_one_to_test() -> None:
    """`.ci/run` takes these two out of the page and runs them in a fresh copy."""
    run, test = [s.code for s in snippets(ROOT / "README.md") if s.kind == "sh"]
    for command in (run, test):
        assert command.startswith("python3 -m venv .venv &&\n")
        for example in re.findall(r"examples/\w+\.py", command):
            assert (ROOT / example).exists()
    assert run.count("examples/counter_bot.py --offline") == 2
    assert test.endswith(".venv/bin/python -m pytest -n auto --dist loadfile\n")


def test_the_pages_name_every_option_and_every_storage() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    options = inspect.signature(session_sync.SessionManager.__init__).parameters
    for name in list(options)[1:]:
        assert f"| `{name}` |" in page
    page = (DOCS / "storages.md").read_text(encoding="utf-8")
    for name in session_sync.__all__:
        if name.endswith("Storage") and not getattr(
            getattr(session_sync, name), "_is_protocol", False
        ):
            assert f"| `{name}(" in page


@pytest.mark.parametrize("name", ["", ".testing", ".telebot", ".ptb"])
def test_the_reference_has_every_public_name(name: str) -> None:
    if name in (".telebot", ".ptb"):
        pytest.importorskip("telebot" if name == ".telebot" else "telegram.ext")
    module = importlib.import_module(f"session_sync{name}")
    page = DOCS / "api" / f"{module.__name__.rpartition('.')[2]}.md"
    text = page.read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", text, re.M)
    assert sorted(documented) == sorted(module.__all__)


def test_the_reference_has_every_method_of_the_manager() -> None:
    text = (DOCS / "api" / "session_sync.md").read_text(encoding="utf-8")
    found = re.search(r"SessionManager\n +:members: (.+)", text)
    assert found is not None
    methods = vars(session_sync.SessionManager)
    public = {n for n, m in methods.items() if inspect.isfunction(m) and not n.startswith("_")}
    assert set(found[1].split(", ")) == public


def test_every_page_is_in_the_table_of_contents() -> None:
    toctrees = [s.code for s in snippets(DOCS / "index.md") if s.kind == "{toctree}"]
    listed = re.findall(r"^[\w/]+$", "\n".join(toctrees), re.M)
    pages = {
        page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES if DOCS in page.parents
    }
    assert sorted(listed) == sorted(pages - {"index"})


# The suites of the page on adapters, on the storages of that page.
TestJsonFileStorage = page_adapters.TestJsonFileStorage
TestSharedJsonFileStorage = page_adapters.TestSharedJsonFileStorage


class TestSharedJsonFileStorageByTheFourMethods(TestJsonFileStorage):
    def make_storage(self) -> Any:
        return page_adapters.SharedJsonFileStorage(self.folder)

    def reopen(self, storage: Any) -> Any:
        return self.make_storage()


def test_the_pages_suite_catches_the_adapter_of_four_methods_between_processes(
    tmp_path: Path,
) -> None:
    """What the page says of it: each process uses it as if it were alone."""

    class Lossy(page_adapters.TestSharedJsonFileStorage):
        def make_factory(self) -> Any:
            return partial(page_adapters.JsonFileStorage, tmp_path)

    with pytest.raises(AssertionError, match=r"\d+ of 400 increments were lost"):
        Lossy().test_two_processes_lose_no_increment()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_writes_and_unlocks_nothing_of_the_shared_adapter(tmp_path: Path) -> None:
    storage = page_adapters.SharedJsonFileStorage(tmp_path)
    opened = storage.open_record("user:1", 0)
    opened.save({"counter": 1})
    child = os.fork()
    if not child:
        try:
            opened.close({"counter": 2})
        except SessionConflictError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(SessionLockTimeoutError, match="another process has it"):
        storage.open_record("user:1", 0)
    opened.close({"counter": 3})
    assert storage.get("user:1") == {"counter": 3}


def test_the_shared_adapter_keeps_private_files_and_none_of_an_empty_session(
    tmp_path: Path,
) -> None:
    storage = page_adapters.SharedJsonFileStorage(tmp_path)
    storage.open_record("user:1", 0).close({"counter": 1})
    assert [stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()] == [0o600, 0o600]
    storage.open_record("user:1", 0).close({})
    assert list(tmp_path.iterdir()) == []


def test_the_adapters_files_are_private(tmp_path: Path) -> None:
    storage = page_adapters.JsonFileStorage(tmp_path / "json")
    storage.set("user:1", {"counter": 1})
    (file,) = (tmp_path / "json").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_the_adapter_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    storage = page_adapters.JsonFileStorage(tmp_path)
    storage.set("user:1", {"counter": 1})
    (tmp_path / "in the way").mkdir()
    storage._path = lambda key: tmp_path / "in the way"
    with pytest.raises(IsADirectoryError):
        storage.set("user:1", {"counter": 2})
    del storage._path
    assert storage.get("user:1") == {"counter": 1}
    assert len(list(tmp_path.iterdir())) == 2
