"""The core under every schedule: a systematic tester, as loom is for tokio and CHESS for Windows.

A scene has two or three actors (scenes.py). One of them is the victim, to which something happens
at its k-th step inside the core, for k = 1, 2, ... until it has no more steps:

- stop: it stands still while all others go as far as they can; in the long run twice;
- raise, ctrl-c: an exception from outside, where CPython can raise one;
- collect: a garbage collection, while scopes lie around that were entered and never left;
- signal: a signal handler that uses the same session or another one, flushes or releases;
- no thread: a thread that cannot be started;
- cancel, loop closed, loop thrown away: at an `await`.

Then the model is asked (model.py): exclusion, order, nothing lost, nothing locked, memory back.

Here is a part of it: every n-th step, on one store. All of it takes an hour of two processors, and
all pairs of steps (SESSION_SYNC_EXPLORE_EVERY=1) days:

    SESSION_SYNC_EXPLORE=all python -m pytest tests/explorer --timeout 14400 -n 3

A failure says how that one run is repeated with `python tests/explorer/run.py`.
"""

from __future__ import annotations

import os

import pytest
from explore import Job, explore, explore_pairs
from run import jobs_of
from scenes import SCENES

ALL = os.environ.get("SESSION_SYNC_EXPLORE") == "all"
LIMIT = 40  # runs of one test
# Of the runs with two stops, every n-th second one, and every 7th first one if n is more than 1.
# Which ones depends on the job and on the first stop.
PAIRS = int(os.environ.get("SESSION_SYNC_EXPLORE_EVERY", "61"))
FIRST = 7 if PAIRS > 1 else 1

JOBS = [job for scene in SCENES.values() for job in jobs_of(scene, everything=ALL)]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_core_under_every_schedule(job: Job) -> None:
    report = explore(job) if ALL else explore(job, limit=LIMIT)
    print(report)
    assert not report.failures, str(report)


if ALL:  # an hour

    @pytest.mark.parametrize("job", [j for j in JOBS if j.mode == "stop"], ids=lambda job: job.name)
    def test_two_stops(job: Job) -> None:
        report = explore_pairs(job, PAIRS, FIRST)
        print(report)
        assert not report.failures, str(report)
