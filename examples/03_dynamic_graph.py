"""Tasks that submit tasks: graphs that nobody knows before they run.

A task may submit further tasks and *return a future*. Its result is then whatever that future's will be: a tail call.
No worker waits, so depth is not limited by the number of workers: each site here has one.

    1. Adaptive quadrature: an interval that is not smooth enough becomes two.
    2. A survey of a directory tree, two sites in turn: each directory is a task, found by the one above.

    python3 examples/03_dynamic_graph.py [DIRECTORY]
"""

import collections
import math
import os
import sys
import sysconfig
import tempfile
import time
from typing import Any

from gcref import ComputeFuture, Executor, LocalEndpoint

SITES = ("polaris", "midway")


# ------------------------------------------------------------------------------------ adaptive quadrature


def spike(x: float) -> float:
    """Flat almost everywhere: even steps would be wasted on it."""
    return 1 / (1e-4 + (x - 0.3) ** 2)


def simpson(left: float, right: float) -> float:
    return (right - left) / 6 * (spike(left) + 4 * spike((left + right) / 2) + spike(right))


def integrate(left: float, right: float, tolerance: float) -> Any:
    """The integral and the number of intervals it took, or a future of them."""
    middle = (left + right) / 2
    whole, halves = simpson(left, right), simpson(left, middle) + simpson(middle, right)
    if abs(whole - halves) < 15 * tolerance:
        return halves, 1
    here = Executor("polaris")
    first = here.submit(integrate, left, middle, tolerance / 2)
    second = here.submit(integrate, middle, right, tolerance / 2)
    return here.submit(add, first, second)  # a tail call: this task is over


def add(first: tuple[float, int], second: tuple[float, int]) -> tuple[float, int]:
    return first[0] + second[0], first[1] + second[1]


# ------------------------------------------------------------------------------------ a directory tree


def survey(path: str, depth: int) -> Any:
    """Bytes by kind of file in a directory and all below it, or a future of them."""
    found: collections.Counter[str] = collections.Counter({"directories": 1})
    below = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name == "site-packages":
                continue  # other people's
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                found[os.path.splitext(entry.name)[1] or "(none)"] += entry.stat().st_size
    if not below:
        return found
    here, there = Executor(SITES[depth % 2]), Executor(SITES[(depth + 1) % 2])
    parts = [there.submit(survey, directory, depth + 1) for directory in below]
    return here.submit(merge, found, parts)


def merge(found: collections.Counter[str], parts: list[collections.Counter[str]]) -> collections.Counter[str]:
    return sum(parts, found)


# ------------------------------------------------------------------------------------ here


def timed(future: ComputeFuture[Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return future.result(), time.perf_counter() - start


def main() -> None:
    directory = sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("stdlib")
    with tempfile.TemporaryDirectory(prefix="gcref-") as home:
        os.environ.setdefault("GCREF_HOME", home)
        with (
            LocalEndpoint("polaris", workers=1),
            LocalEndpoint("midway", workers=1),
            Executor("polaris") as polaris,
        ):
            (value, intervals), seconds = timed(polaris.submit(integrate, 0.0, 1.0, 1e-6))
            exact = 100 * (math.atan(70) + math.atan(30))
            print(f"integral: {value:.6f}, exact {exact:.6f}, off by {abs(value - exact):.1e}")
            print(f"  {intervals} intervals in {3 * intervals - 2} tasks on one worker, {seconds:.2f} s")
            assert abs(value - exact) < 1e-5

            found, seconds = timed(polaris.submit(survey, directory, 0))
            directories = found.pop("directories")
            print(f"survey of {directory}: {directories} directories at two sites, {seconds:.2f} s")
            for kind, size in found.most_common(5):
                print(f"  {kind:8}{size / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
