"""The checks of this project, each in an environment of its own; `nox --list` names them.

`.ci/run` runs them all. Nothing is said here that is said elsewhere: which versions are supported
and which tools are needed stands in setup.cfg, and what a quick start installs on its page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "docs", "tests", "oldest", "ptb13", "dist"]

ROOT = Path(__file__).parent
OLDEST, NEWEST = "3.11", "3.13"
PYTHONS = [OLDEST, "3.12", NEWEST, "3.14"]  # the last one where it is installed

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]

# The tests that meet the libraries: those of the integrations and of the stores, and msgspec's.
MEET_LIBRARIES = [
    "tests/with_telebot",
    "tests/with_ptb",
    "tests/with_both/test_chats.py",
    "tests/storages/with_redis/test_redis.py",
    "tests/storages/with_redis/test_redis_cluster.py",
    "tests/storages/with_redis/test_redis_connections.py",
    "tests/storages/with_redis/test_redis_full.py",
    "tests/storages/with_redis/test_redis_in_place.py",
    "tests/storages/with_redis/test_redis_waiting.py",
    "tests/storages/test_disk.py",
    "tests/storages/test_disk_foreign.py",
    "tests/storages/test_storages.py",
    "tests/storages/test_codec.py",
    "tests/storages/test_codec_damaged.py",
    "tests/session/test_typed_model.py",
]

# An APScheduler of then imports pkg_resources, which a new setuptools does not have.
PKG_RESOURCES = "setuptools<67"

# The interpreters of pyenv are on the PATH only while they are switched on.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
PATH = [str(folder) for folder in PYENV.glob("versions/3.1?.*/bin")]
os.environ["PATH"] = os.pathsep.join((*PATH, os.environ["PATH"]))
os.environ.pop("PYTHONPATH", None)  # it could bring in another session_sync


def tool(name: str) -> str:
    """A tool, with the version that the extra 'dev' asks for."""
    (found,) = re.findall(rf"^{name}\b.*$", EXTRAS["dev"], re.M)
    return str(found)


def elsewhere(session: nox.Session) -> None:
    """Go where the tests are, and no session_sync but the one that is installed."""
    folder = Path(session.create_tmp())
    shutil.copytree(ROOT / "tests", folder / "tests", dirs_exist_ok=True)
    shutil.copy(ROOT / "setup.cfg", folder)
    session.chdir(folder)


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint."""
    session.install(tool("ruff"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Both type checkers."""
    session.install("-e", ".[dev]")
    session.run("mypy")
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def docs(session: nox.Session) -> None:
    """The pages; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-q", "-E", "-W", "--keep-going", "-n", "docs", "docs/_build")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """All tests, with the newest of each library."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=NEWEST)
def coverage(session: nox.Session) -> None:
    """As 'tests', and which lines and branches of the package they run."""
    session.install("-e", ".[test]", tool("coverage"))
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", "-q")
    for damaged in ROOT.glob(".coverage.*"):  # of processes that a test has killed
        damaged.unlink()
    session.run("coverage", "report")
    report = Path(session.create_tmp()) / "coverage.json"
    session.run("coverage", "json", "-q", "-o", str(report))
    totals = json.loads(report.read_text())["totals"]
    wanted = SETUP.getfloat("coverage:report", "fail_under")
    for what in ("statements", "branches"):
        covered = totals[f"percent_{what}_covered"]
        session.log(f"{covered:.2f} % of the {what} are run")
        if covered < wanted:
            session.error(f"less than {wanted:g} %")


@nox.session(python=OLDEST)
def oldest(session: nox.Session) -> None:
    """The oldest of each library that a user may have, with the oldest Python."""
    needed = f"{SETUP['options']['install_requires']}\n{EXTRAS['all']}"
    lowest = [each.replace(">=", "==") for each in needed.split()]
    session.install(".[test]", *lowest, PKG_RESOURCES)
    elsewhere(session)
    session.run("python", "-m", "pytest", *(session.posargs or MEET_LIBRARIES))


@nox.session(python=OLDEST)
def ptb13(session: nox.Session) -> None:
    """python-telegram-bot 13: the decorator and the block, by duck typing."""
    session.install(".", "python-telegram-bot<14", "pytest", "pytest-timeout", PKG_RESOURCES)
    elsewhere(session)
    session.run("python", "-m", "pytest", "tests/with_ptb/test_ptb13.py")


@nox.session
def dist(session: nox.Session) -> None:
    """Build the release into dist/, check it, and let the wheel alone run the quick starts."""
    session.install(tool("build"), tool("twine"))
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run(
        "python", "-m", "build", "--outdir", "dist", silent=True
    )  # the wheel from the sdist
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    check_files(session, wheel, sdist)
    for page in sorted((ROOT / "docs" / "quickstart").glob("*.md")):
        follow_with(session, wheel, page)


def check_files(session: nox.Session, wheel: Path, sdist: Path) -> None:
    """The wheel has the package and nothing else; the sdist has all that the checks need."""
    package = files("session_sync")
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    if found != package:
        session.error(f"in the wheel or in the tree alone: {sorted(found ^ package)}")
    with tarfile.open(sdist) as packed:
        found = {name.partition("/")[2] for name in packed.getnames()}
    folders = ("session_sync", "tests", "docs", "examples", "benchmarks")
    missing = set().union(*map(files, folders)) - found
    if missing:
        session.error(f"missing in the sdist: {sorted(missing)}")
    session.log(
        f"{len(package)} files in the wheel, all of the package; the sdist has all it needs"
    )


def files(folder: str) -> set[str]:
    """The files below a folder of this tree, but for what programs leave there."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "_build"} & {*path.parts}
    }


def follow_with(session: nox.Session, wheel: Path, page: Path) -> None:
    """Follow a quick start in a fresh environment with the wheel, and what the page installs."""
    told = re.findall(r"pip install '?([^\s'`]+)", page.read_text(encoding="utf-8"))
    packages = [re.sub(r"^\.", str(wheel), each) for each in told]
    fresh = Path(session.create_tmp()) / page.stem
    session.run("python", "-m", "venv", "--clear", str(fresh), silent=True)
    python = str(fresh / "bin" / "python")
    session.run(python, "-m", "pip", "install", "-q", *packages, external=True)
    session.run(python, "tests/pages.py", str(page), external=True)
