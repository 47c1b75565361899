"""What a bot's author sees of an application with sessions: tasks, warnings and names as PTB's."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import pytest
from ptb_tools import OwnApplication, builder, ext, running, telegram

from session_sync import SessionManager
from session_sync.ptb import install
from session_sync.testing import OfflineBotAPI


@pytest.fixture(autouse=True)
def _no_deprecation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # else RetryAfter and its kin warn


async def work() -> str:
    return "done"


class PassingOn(ext.Application):
    """Has a create_task of its own, which PTB's warnings then name."""

    def create_task(self, *args: Any, **kw: Any) -> Any:
        return super().create_task(*args, **kw)


@pytest.mark.parametrize("chosen", [ext.Application, PassingOn])
def test_the_warning_of_a_task_names_the_line_that_it_names_without_install(
    api: OfflineBotAPI, chosen: Any
) -> None:
    async def warned(app: Any) -> list[tuple[str, int]]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")  # which tells each line once
            first = app.create_task(work())
            second = app.create_task(work(), update=None)
        assert [await first, await second] == ["done", "done"]
        assert {warning.category for warning in seen} == {telegram.warnings.PTBUserWarning}
        return [(warning.filename, warning.lineno) for warning in seen]

    async def main() -> None:
        plain = builder(api).application_class(chosen).build()
        installed = install(builder(api).application_class(chosen), SessionManager()).build()
        lines = await warned(installed)
        assert lines == await warned(plain)
        assert {name for name, _ in lines} == {__file__}
        assert len(lines) == (2 if chosen is ext.Application else 1)

    asyncio.run(main())


def test_a_task_has_the_name_that_it_is_given(api: OfflineBotAPI) -> None:
    if "name" not in inspect.signature(ext.Application.create_task).parameters:
        pytest.skip("tasks have names since PTB 20.4")

    async def main() -> None:
        async with running(api, SessionManager()) as app:
            task = app.create_task(work(), name="mine")
            assert task.get_name() == "mine"
            assert await task == "done"

    asyncio.run(main())


@pytest.mark.parametrize("chosen", [ext.Application, PassingOn, OwnApplication])
def test_it_is_printed_as_without_install(api: OfflineBotAPI, chosen: Any) -> None:
    kwargs = {"seen": []} if chosen is OwnApplication else {}
    plain = builder(api).application_class(chosen, kwargs)
    installed = install(builder(api).application_class(chosen, kwargs), SessionManager())
    assert printed(installed) == printed(plain)
    assert printed(installed.build()) == printed(plain.build())


def printed(thing: Any) -> tuple[str, str]:
    """Without the addresses in memory."""
    return repr(thing).partition(" at 0x")[0], str(type(thing))
