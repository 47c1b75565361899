"""The benchmarks still run. What they measure is never asserted: a test machine is noisy."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pages import pages, rendered
from benchmarks.results import Results
from benchmarks.sections import targets
from benchmarks.tables import Table, table
from benchmarks.timing import Spread

ROOT = Path(__file__).parent.parent
HAS_AIOGRAM = importlib.util.find_spec("aiogram") is not None

pytest.importorskip("telebot", reason="needs the extra 'telebot'")
pytest.importorskip("telegram", reason="needs the extra 'ptb'")
pytest.importorskip("diskcache", reason="needs the extra 'disk'")
pytest.importorskip("redis", reason="needs the extra 'redis'")

DOCS = ROOT / "docs" / "benchmarks"


def benchmarks(*arguments: str) -> str:
    """What `python -m benchmarks` prints."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def everything() -> str:
    """What it prints for all sections, each measured as little as it can be."""
    return benchmarks("--quick")


@pytest.mark.parametrize(
    "row",
    [
        "| session_sync, async with ",
        "| telebot retrieve_data, StateMemoryStorage ",
        "| PTB user_data, PicklePersistence ",
        "| never touches it, lazy ",
        "| SQLite, 1,000 fields ",
        "| telebot retrieve_data, memory, one key, 64 ",
        "| with lock: dict ",
        "| disk, 200 ",
        "| PTB, answers, SQLite ",
        "| bare sqlite3, one key, 2 ",
        "| a price in 3 lines, dicts / dataclasses, SQLite ",
        "| list[index] ",
        "| one thread, traced ",
    ],
)
def test_each_section_prints_its_tables(everything: str, row: str) -> None:
    assert row in everything


@pytest.mark.skipif(not HAS_AIOGRAM, reason="aiogram is not installed")
def test_aiogram_is_measured_if_it_is_installed(everything: str) -> None:
    assert "| aiogram MemoryStorage, SimpleEventIsolation " in everything


def test_without_a_redis_its_rows_are_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SESSION_SYNC_REQUIRE_SERVICES", raising=False)
    nowhere = f"--redis-server={tmp_path / 'redis-server'}"
    benchmarks("partial", "--quick", nowhere, f"--out={tmp_path}")
    results = Results.load(tmp_path)
    assert "was not found" in results.skipped["Redis"]
    assert not any("Redis" in str(row[0]) for found in results.tables for row in found.rows)


def test_a_redis_that_is_required_has_to_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks import setting

    monkeypatch.setenv("SESSION_SYNC_REQUIRE_SERVICES", "1")
    with (
        pytest.raises(setting.MissingError, match="was not found"),
        setting.redis_server(str(tmp_path / "redis-server")),
    ):
        pass


# -- results, and what is made of them


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_figures_of_a_page_are_those_of_the_last_run_for_the_docs(page: Path) -> None:
    """`python -m benchmarks --render` puts them in step."""
    text = page.read_text(encoding="utf-8")
    assert text == rendered(text, Results.load(DOCS))


def test_every_table_is_on_the_page_of_the_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    elsewhere = {"threads_short", "typed_short"}
    less = {"update_disk_flat", "update_redis_flat"}  # telebot's copies are of no weight there
    for found in Results.load(DOCS).tables:
        if found.name not in elsewhere | less:
            assert f"<!-- benchmark: {found.name} -->" in page


def test_results_that_are_saved_are_read_back(tmp_path: Path) -> None:
    results = Results.load(DOCS)
    results.save(tmp_path)
    assert Results.load(tmp_path) == results


def test_plots_of_the_same_results_are_the_same_and_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import plots

    results = Results.load(DOCS)
    for name in ("one", "two"):
        plots.draw(results, tmp_path / name)
    drawn = sorted((tmp_path / "one").iterdir())
    assert [path.stem for path in drawn] == sorted(plots.PLOTS)
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.stat().st_size < 60_000
        assert (DOCS / path.name).exists()


def small(ratio: float) -> Table:
    """A table of which a target is the figure."""
    head = ("", "microseconds", "to its floor", "ours to it")
    row = ("telebot retrieve_data, StateMemoryStorage", 9.0, "", Spread(ratio, ratio, ratio))
    return table("update_memory_small", "", "", head, [row])


@pytest.mark.parametrize(("ratio", "met"), [(0.6, "yes"), (0.61, "no")])
def test_a_target_is_met_up_to_its_bound(ratio: float, met: str) -> None:
    (row,) = targets.of([small(ratio)]).rows
    assert row[-1] == met


def test_targets_of_what_was_not_measured_are_left_out() -> None:
    assert targets.of([]).rows == ()


def test_every_target_names_a_row_and_a_column_that_there_are() -> None:
    tables = {found.name: found for found in Results.load(DOCS).tables}
    for target in targets.TARGETS:
        assert tables[target.name].at(target.row, target.column) is not None, target.says
