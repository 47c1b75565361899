"""Explores one scene from the command line:

python tests/explorer/run.py SCENE [MODE [VICTIM]] [--place K] [--then J] [--store NAME] [--all]

Without a mode or a victim all of the scene's are taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[up]) for up in range(3)]

from explore import KINDS, Job, explore, explore_pairs, repeat  # noqa: E402 # found by this path
from scenes import SCENES, Scene  # noqa: E402


def main() -> int:
    """Explore; the exit code is 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scene", choices=sorted(SCENES))
    parser.add_argument("mode", nargs="?", default="")
    parser.add_argument("victim", nargs="?", default="")
    parser.add_argument("--place", type=int)
    parser.add_argument("--then", type=int, default=0)
    parser.add_argument("--store", default="", help="by default the scene's first one")
    parser.add_argument("--limit", type=int, default=sys.maxsize)
    parser.add_argument("--pairs", type=int, default=0, help="two stops; every n-th second one")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    parser.add_argument("--everything", action="store_true", help="as the long run does")
    given = parser.parse_args()
    failed = 0
    scene, mode = SCENES[given.scene], given.mode.replace("-", " ").replace("ctrl c", "ctrl-c")
    for job in jobs_of(scene, mode, given.victim, given.store, given.everything):
        begin = time.monotonic()
        if given.place is not None:
            report = repeat(job, given.place, given.then)
        elif given.pairs:
            report = explore_pairs(job, given.pairs, keep_going=given.all)
        else:
            report = explore(job, given.limit, keep_going=given.all)
        failed += bool(report.failures)
        print(f"{time.monotonic() - begin:6.1f} s  {report}", flush=True)
    return min(failed, 1)


def jobs_of(
    scene: Scene,
    mode: str = "",
    victim: str = "",
    store: str = "",
    everything: bool = False,
) -> list[Job]:
    """What is to be explored of a scene: the bounded part, or everything."""
    modes = scene.modes
    if everything and {"stop", "raise"} <= set(modes):
        modes = tuple(dict.fromkeys((*modes, "collect", "signal")))
    kinds = [mode] if mode else [kind for each in modes for kind in KINDS.get(each, (each,))]
    stores = [store] if store else scene.stores if everything else scene.stores[:1]
    found = []
    for kind in kinds:
        victims = (*scene.victims, *scene.others) if everything else scene.victims
        victims = scene.tasks if kind in KINDS["cancel"] else victims
        found += [
            Job(scene.name, kind, name, each)
            for each in stores
            for name in ([victim] if victim else victims)
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
