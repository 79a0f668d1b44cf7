"""Arrays go from site to site without passing through here, and without being copied more than they must.

An array is made at "polaris" and used at "midway". Here there is only a future of it, whatever its size. The way that
the bytes take is chosen by the sites: mapped, if they share a machine (`ipc`), else pulled over an encrypted TCP
connection (`direct`). What a task receives is a read-only view of its site's memory, not a copy.

    python3 examples/02_numpy_by_reference.py [--max-mb N]
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np

from gcref import Executor, LocalEndpoint

SIZES_MB = (1, 10, 100, 1000)


def make_field(megabytes: int) -> np.ndarray:
    """A wave, sampled as often as it takes to fill so many megabytes."""
    return np.sin(np.linspace(0, 2 * np.pi, megabytes * 125_000))


def energy(field: np.ndarray) -> float:
    """Mean square; ½ for a sine wave. Reads every byte."""
    assert not field.flags.writeable  # a view of the site's memory: nobody can harm another's copy
    return float(np.dot(field, field) / field.size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--max-mb", type=int, default=largest_mb(), help="largest array (default: %(default)s)"
    )
    sizes = [size for size in SIZES_MB if size <= parser.parse_args().max_mb]
    ways = {"direct": ("direct",), "ipc": ("ipc", "direct")}
    with tempfile.TemporaryDirectory(prefix="gcref-") as home:
        os.environ.setdefault("GCREF_HOME", home)
        print(f"{'array':>8}  {'way':8}{'moved':>10}{'seconds':>10}{'GB/s':>8}")
        for way, carriers in ways.items():
            with (
                LocalEndpoint("polaris", workers=1, carriers=carriers),
                LocalEndpoint("midway", workers=1, carriers=carriers),
                Executor("polaris") as polaris,
                Executor("midway") as midway,
            ):
                for size in sizes:
                    show(way, size, polaris, midway)


def show(way: str, size: int, polaris: Executor, midway: Executor) -> None:
    move(size, polaris, midway)  # finds cold memory; the next one is timed
    seconds, pulled = move(size, polaris, midway)
    moved = ", ".join(f"{bytes_ / 1e6:.0f} MB" for bytes_ in pulled.values())
    print(f"{size:5} MB  {'/'.join(pulled) or way:8}{moved:>10}{seconds:10.4f}{size / 1e3 / seconds:8.2f}")


def move(size: int, polaris: Executor, midway: Executor) -> tuple[float, dict[str, int]]:
    """Seconds from an array that is ready at polaris to what midway says of it, and bytes pulled by carrier."""
    field = polaris.submit(make_field, size)
    wait([field])  # the array stays where it is
    start = time.perf_counter()
    used = midway.submit(energy, field)
    assert abs(used.result() - 0.5) < 1e-3
    seconds = time.perf_counter() - start
    assert used.record is not None
    return seconds, used.record.pulled_bytes


def largest_mb() -> int:
    """What fits: the array is at both sites, in the task that makes it, and, for a moment, its predecessor too."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    shared = os.statvfs("/dev/shm")
    return min(1000, free // 8_000_000, shared.f_bavail * shared.f_frsize // 6_000_000)


if __name__ == "__main__":
    main()
