"""`python -m tests.chaos`: one seed after another, until the time is up or something is found."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.chaos.run import Settings, run
from tests.support.leaks import mark_run, start_library_threads


def main() -> int:
    """Run; the exit code is 1 when something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)g)")
    parser.add_argument("--seed", type=int, help="the first seed (default: a random one)")
    parser.add_argument(
        "--endpoints", type=int, choices=(2, 3), help="sites (default: 2 or 3, as the seed says)"
    )
    parser.add_argument("--tasks", type=int, default=60, help="tasks of a run, about (default: %(default)d)")
    parser.add_argument(
        "--duration", type=float, default=4.0, help="seconds of faults (default: %(default)g)"
    )
    parser.add_argument("--agents-die", action=argparse.BooleanOptionalAction, default=AGENTS_DIE)
    parser.add_argument("--disks-fill", action="store_true", help="small disks that fill up; needs root")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first finding")
    said = parser.parse_args()
    mark_run()
    start_library_threads()
    seed = random.SystemRandom().randrange(1_000_000) if said.seed is None else said.seed
    end, found = time.monotonic() + said.seconds, 0
    while time.monotonic() < end:
        verdict = run(
            Settings(
                seed,
                endpoints=said.endpoints or 2 + (seed % 3 == 0),
                tasks=said.tasks,
                duration_s=said.duration,
                agents_die=said.agents_die,
                disks_fill=said.disks_fill,
            )
        )
        print(verdict.report, flush=True)
        found += bool(verdict.violations)
        if found and not said.keep_going:
            return 1
        seed += 1
    return 1 if found else 0


AGENTS_DIE = True

if __name__ == "__main__":
    sys.exit(main())
