"""What is measured: the list of workloads, and the functions that measure them inside a system's own process.

A measuring function takes the started system and the workload's parameters, and returns its figures by name.
It verifies what the system gave back. It is called once per turn; what it needs to be warm, it warms itself,
untimed.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bench import proc, tasks
from tests.bench.system import Setting, System, WrongAnswerError

Figures = dict[str, float]

MIB = 1 << 20
HEARTBEAT_S = 5.0
"""gcref's: what an idle system is allowed to do, each party once in this time."""
WARM_S = 7.0
"""So long a store keeps what is free for the next object; gcref's trims it within 10 s."""
SETTLE_S = 0.7
"""What was dropped is free at home and in caches by then."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One figure of a workload, as the report shows it.

    Attributes:
        figure: its name in what the measuring function returns.
        title: what the reader sees.
        unit: of the figure as it is shown.
        scale: what the figure is multiplied by to have that unit.
        more_is_better: for the ratio column.
    """

    figure: str
    title: str
    unit: str
    scale: float = 1.0
    more_is_better: bool = False


_ONE_SITE = Setting()


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """One thing that is measured, for all systems that can do it.

    Attributes:
        name: for `--only` and the JSON file.
        measure: runs in the system's process.
        rows: the figures it yields.
        setting: how the system is set up; `None` where the measuring function starts it.
        params: of `measure`.
        quick: what is different with `--quick`.
        peers: what is different for systems that are neither ours nor the pool.
        systems: who takes part, first to last.
        turns: how often each system is measured.
        quick_turns: the same with `--quick`; 0 leaves it out.
        quick_turns_of: with `--quick`, systems that take fewer turns: those whose turns are long and all alike.
        quick_systems: who takes part with `--quick`, if not all.
        by_broker: it needs a hub and a broker; such workloads come last.
    """

    name: str
    measure: Callable[[System, Mapping[str, Any]], Figures]
    rows: tuple[Row, ...]
    setting: Setting | None = _ONE_SITE
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    systems: tuple[str, ...] = ("ours", "pool", "ray", "dask", "parsl")
    turns: int = 5
    quick_turns: int = 3
    quick_turns_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
    quick_systems: tuple[str, ...] | None = None
    by_broker: bool = False

    def turns_of(self, system: str, *, quick: bool) -> int:
        """How often that system is measured."""
        if not quick:
            return self.turns
        return self.quick_turns_of.get(system, self.quick_turns or 1)


def round_trip(system: System, params: Mapping[str, Any]) -> Figures:
    """Submit one no-op, wait for its value, and again."""
    calls = params["calls"]
    _warm(system)
    times = []
    for number in range(calls):
        start = time.perf_counter()
        value = system.result(system.submit(tasks.same, number))
        times.append(time.perf_counter() - start)
        _expect(value, number)
    times.sort()
    return {"p50": times[calls // 2], "p99": times[math.ceil(calls * 0.99) - 1]}


def throughput(system: System, params: Mapping[str, Any]) -> Figures:
    """Many no-ops at once, from the first `submit` to the last value."""
    count = params["tasks"]
    _warm(system)
    start = time.perf_counter()
    futures = [system.submit(tasks.same, number) for number in range(count)]
    values = system.results(futures)
    seconds = time.perf_counter() - start
    _expect(values, list(range(count)))
    return {"per_s": count / seconds, "per_task": seconds / count}


def chain(system: System, params: Mapping[str, Any]) -> Figures:
    """Each task takes the result of the one before; over two sites, they alternate."""
    links, sites = params["links"], params["sites"]
    _warm(system, sites)
    start = time.perf_counter()
    last: Any = 0
    for link in range(links):
        last = system.submit(tasks.increment, last, site=link % sites)
        if not system.passes_futures:
            last = system.result(last)
    value = system.result(last) if system.passes_futures else last
    seconds = time.perf_counter() - start
    _expect(value, links)
    return {"per_link": seconds / links}


def tree(system: System, params: Mapping[str, Any]) -> Figures:
    """Maps, and a binary tree of reduces over them."""
    leaves = params["leaves"]
    _warm(system)
    start = time.perf_counter()
    layer = [system.submit(tasks.increment, number) for number in range(leaves)]
    while len(layer) > 1:
        pairs = layer if system.passes_futures else system.results(layer)
        above = [system.submit(tasks.add, *pair) for pair in zip(pairs[::2], pairs[1::2], strict=False)]
        layer = above + layer[len(above) * 2 :]
    value = system.result(layer[0])
    seconds = time.perf_counter() - start
    _expect(value, leaves * (leaves + 1) // 2)
    return {"seconds": seconds}


_warm_until: dict[int, float] = {}
"""Size of an array → when the memory that the last one used may have cooled down, in this process."""


def arrays(system: System, params: Mapping[str, Any]) -> Figures:
    """An array from the task that made it to the one that uses it; before, another of the same size warms."""
    figures: Figures = {}
    for size_bytes in params["sizes"]:
        is_warm = time.monotonic() < _warm_until.get(size_bytes, 0.0) or not system.is_cold_once
        for seed in (2,) if is_warm else (1, 2):  # the second overwrites the figure of the first
            figures[str(size_bytes)] = system.carry(size_bytes, seed, params["to_site"])
            gc.collect()
            _warm_until[size_bytes] = time.monotonic() + WARM_S
            time.sleep(SETTLE_S if size_bytes > 10 * MIB else SETTLE_S / 4)
    return figures


def argument_and_result(system: System, params: Mapping[str, Any]) -> Figures:
    """An array as argument up to a task, and one as its result down here, where every page is touched."""
    import numpy

    figures: Figures = {}
    for size_bytes in params["sizes"]:
        for seed in (1, 2):  # the second overwrites the figures of the first, which warms
            array = tasks.make_array(size_bytes, seed)
            start = time.perf_counter()
            seen = system.result(system.submit(tasks.touch_array, array))
            figures[f"up {size_bytes}"] = time.perf_counter() - start
            _expect((seen[0], seen[2]), (size_bytes, tasks.touched(size_bytes, seed)))
            start = time.perf_counter()
            back = system.result(system.submit(tasks.make_array, size_bytes, seed))
            seen = tasks.touch_array(back)
            figures[f"down {size_bytes}"] = time.perf_counter() - start
            _expect((seen[0], seen[2]), (size_bytes, tasks.touched(size_bytes, seed)))
            _expect(bool(numpy.array_equal(array, back)), True)
            del array, back
            gc.collect()
            time.sleep(SETTLE_S)
    return figures


def pending_memory(system: System, params: Mapping[str, Any]) -> Figures:
    """How much this process grows by tasks that wait behind a closed gate, their futures included."""
    count = params["tasks"]
    _warm(system)
    with tempfile.TemporaryDirectory(prefix="gcref-bench-") as folder:
        opened = Path(folder, "open")
        if system.passes_futures:
            gates = [system.submit(tasks.wait_for_file, str(opened))]
        else:  # nothing can wait for a future: all workers are kept busy
            gates = [system.submit(tasks.wait_for_file, str(opened)) for _ in range(params["workers"])]
        # From here on buffers exist.
        futures = [system.submit(tasks.second, None, number) for number in range(100)]
        before = _settled_rss()
        first = gates[0] if system.passes_futures else None
        futures += [system.submit(tasks.second, first, number) for number in range(count)]
        grown = _settled_rss() - before
        opened.touch()
        _expect(system.results(gates), [True] * len(gates))
        _expect(system.results(futures), [*range(100), *range(count)])
    return {"bytes": grown / count * 10_000}


def idle(system: System, params: Mapping[str, Any]) -> Figures:
    """With nothing to do: what the system's processes hold, all below this one, and how often they wake."""
    bin_s, bins = 0.5, round(params["seconds"] / 0.5)
    _warm(system)
    time.sleep(2.0)  # the end of what the warming began
    pids = proc.descendants(os.getpid())
    memory = [proc.pss_bytes(pid) for pid in pids]
    for pid, held in zip(pids, memory, strict=True):
        print(f"idle: {held / 1e6:6.1f} MB PSS, process {pid}: {proc.command(pid)[:120]}", file=sys.stderr)
    counts: list[int] = []
    here = proc.sleeps(os.getpid(), but_main=True)
    there = before = {pid: proc.sleeps(pid) for pid in pids}
    for _ in range(bins):
        time.sleep(bin_s)
        now = {pid: proc.sleeps(pid) for pid in pids}
        counts.append(sum(now.values()) - sum(before.values()))
        before = now
    for pid in pids:
        woken = before[pid] - there[pid]
        print(f"idle: {woken} wake-ups in {params['seconds']} s, process {pid}", file=sys.stderr)
    seconds = bins * bin_s
    # Heartbeats come from both ends of a session, once in HEARTBEAT_S: so many of the busiest moments.
    beats = 2 * math.ceil(seconds / HEARTBEAT_S)
    return {
        "pss": sum(memory),
        "processes": len(pids),
        "wakeups": sum(counts) / seconds,
        "wakeups_beyond": sum(sorted(counts)[:-beats]) / seconds,
        "client_wakeups": (proc.sleeps(os.getpid(), but_main=True) - here) / seconds,
    }


def first_result(system: System, _params: Mapping[str, Any]) -> Figures:
    """A fresh interpreter, from before the import to the first value; the script brings its own system up."""
    with tempfile.TemporaryDirectory(prefix="gcref-bench-") as folder:
        script = Path(folder, "first_result.py")
        script.write_text(system.first_result)
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"the script failed: {done.stderr[-2000:]}")
    return {"seconds": float(done.stdout.split()[-1])}


def mixed(system: System, params: Mapping[str, Any]) -> Figures:
    """No-ops with a few long tasks shuffled in. Ideal: these share the workers evenly, the rest is free."""
    count, long_s, workers = params["tasks"], params["long_s"], params["workers"]
    long_ones = set(random.Random(params["seed"]).sample(range(count), count // 100))
    _warm(system)
    start = time.perf_counter()
    futures = [
        system.submit(tasks.nap, long_s, number) if number in long_ones else system.submit(tasks.same, number)
        for number in range(count)
    ]
    values = system.results(futures)
    seconds = time.perf_counter() - start
    _expect(values, list(range(count)))
    return {"seconds": seconds, "of_ideal": seconds / (len(long_ones) * long_s / workers)}


def _warm(system: System, sites: int = 1) -> None:
    """Every worker has imported what the tasks need, and the system has met the functions."""
    for site in range(sites):
        futures = [system.submit(tasks.nap, 0.02, number, site=site) for number in range(4)]
        futures += [system.submit(tasks.same, number, site=site) for number in range(100)]
        futures += [system.submit(tasks.increment, number, site=site) for number in range(20)]
        futures += [system.submit(tasks.add, number, 0, site=site) for number in range(4)]
        system.results(futures)


def _settled_rss() -> int:
    time.sleep(1.0)  # what is on its way has left
    gc.collect()
    return proc.rss_bytes(os.getpid())


def _expect(value: Any, expected: Any) -> None:
    if value != expected:
        raise WrongAnswerError(f"expected {repr(expected)[:200]}, got {repr(value)[:200]}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes // MIB} MB" if size_bytes < 1024 * MIB else f"{size_bytes // (1024 * MIB)} GB"


ALL_SIZES = (MIB, 10 * MIB, 100 * MIB, 1024 * MIB)
PEER_SIZES = ALL_SIZES[:3]


def _array_rows(way: str) -> tuple[Row, ...]:
    return tuple(Row(str(size), f"array {_size(size)} {way}", "ms", 1e3) for size in ALL_SIZES)


def _throughput(name: str, count: int, **changes: Any) -> Workload:
    rows = (
        Row("per_s", f"no-op throughput, {name} tasks", "/s", more_is_better=True),
        Row("per_task", f"… per task at {name}", "µs", 1e6),
    )
    return Workload(f"throughput-{name}", throughput, rows, params={"tasks": count}, **changes)


_PER_LINK = "µs"

WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "round-trip",
        round_trip,
        (Row("p50", "no-op round trip, p50", "µs", 1e6), Row("p99", "no-op round trip, p99", "µs", 1e6)),
        params={"calls": 2000},
        quick={"calls": 1000},
        peers={"calls": 300},
        quick_turns=3,
    ),
    _throughput("1k", 1000, quick_turns=3),
    _throughput("10k", 10_000, systems=("ours", "pool", "ray", "dask", "parsl")),
    # A turn of the pool takes 13 s here, and its turns differ by a few per cent.
    _throughput("50k", 50_000, systems=("ours", "pool"), turns=3, quick_turns_of={"pool": 1}),
    _throughput("500k", 500_000, systems=("ours",), turns=3, quick_turns=1),
    Workload(
        "journal-50k",
        throughput,
        (Row("per_s", "no-op throughput, 50k tasks, with a journal", "/s", more_is_better=True),),
        params={"tasks": 50_000},
        systems=("ours", "journal", "fsync"),
    ),
    Workload(
        "chain",
        chain,
        (Row("per_link", "chain of 1000 on one site, per link", _PER_LINK, 1e6),),
        params={"links": 1000, "sites": 1},
        quick_turns=3,
    ),
    Workload(
        "chain-two-sites",
        chain,
        (Row("per_link", "chain of 500 alternating between two sites (direct), per link", _PER_LINK, 1e6),),
        Setting(sites=2, workers=1, carriers=("direct",)),
        params={"links": 500, "sites": 2},
        quick_turns=3,
    ),
    Workload(
        "chain-two-sites-ipc",
        chain,
        (Row("per_link", "chain of 500 alternating between two sites (ipc), per link", _PER_LINK, 1e6),),
        Setting(sites=2, workers=1),
        params={"links": 500, "sites": 2},
        systems=("ours", "pool"),
        quick_turns=0,
    ),
    Workload(
        "tree",
        tree,
        (Row("seconds", "1000 maps and a binary tree of reduces", "ms", 1e3),),
        params={"leaves": 1000},
        quick_turns=3,
    ),
    Workload(
        "arrays-direct",
        arrays,
        _array_rows("site to site, direct"),
        Setting(sites=2, workers=1, carriers=("direct",)),
        params={"sizes": ALL_SIZES, "to_site": 1},
        quick={"sizes": ALL_SIZES[3:]},
        peers={"sizes": PEER_SIZES},
        # The copy's first turn makes its buffers, which takes longer than ours stay warm: it comes first.
        systems=("tcp", "ours", "ray", "dask"),
        turns=3,
    ),
    Workload(
        "arrays-ipc",
        arrays,
        _array_rows("site to site, ipc"),
        Setting(sites=2, workers=1),
        params={"sizes": ALL_SIZES, "to_site": 1},
        quick={"sizes": ALL_SIZES[3:]},
        systems=("ours", "shm"),
        turns=3,
    ),
    Workload(
        "arrays-same-site",
        arrays,
        _array_rows("on the same site"),
        params={"sizes": ALL_SIZES, "to_site": 0},
        quick={"sizes": ALL_SIZES[3:]},
        peers={"sizes": PEER_SIZES},
        systems=("ours", "shm", "ray", "dask"),
        turns=3,
    ),
    Workload(
        "argument-and-result",
        argument_and_result,
        tuple(
            Row(f"{way} {size}", f"{_size(size)} {what}", "ms", 1e3)
            for size in (10 * MIB, 100 * MIB)
            for way, what in (("up", "argument up"), ("down", "result down"))
        ),
        params={"sizes": (10 * MIB, 100 * MIB)},
        turns=3,
        quick_turns=0,
    ),
    Workload(
        "mixed",
        mixed,
        (
            Row("seconds", "10 000 no-ops with 1 % of 100 ms, makespan", "s"),
            Row("of_ideal", "… of ideal", "×"),
        ),
        params={"tasks": 10_000, "long_s": 0.1, "seed": 7, "workers": 2},
        systems=("ours", "pool"),
        turns=3,
        quick_turns=1,
        quick_systems=("ours",),
    ),
    Workload(
        "pending-memory",
        pending_memory,
        (Row("bytes", "client memory per 10 000 pending tasks", "MB", 1e-6),),
        params={"tasks": 10_000, "workers": 2},
        turns=3,
        quick_turns=1,
        quick_systems=("ours",),
    ),
    Workload(
        "idle",
        idle,
        (
            Row("pss", "idle, memory of all its processes (PSS)", "MB", 1e-6),
            Row("wakeups", "idle, wake-ups of its processes", "/s"),
            Row("wakeups_beyond", "idle, wake-ups beyond heartbeats", "/s"),
            Row("client_wakeups", "idle, wake-ups in the client", "/s"),
        ),
        params={"seconds": 15},
        quick={"seconds": 8},
        turns=3,
        quick_turns=1,
        quick_systems=("ours",),
    ),
    Workload(
        "first-result",
        first_result,
        (Row("seconds", "import to first result, embedded default", "s"),),
        setting=None,
        quick_systems=("ours",),
        quick_turns=3,
    ),
    Workload(
        "round-trip-broker",
        round_trip,
        (Row("p50", "no-op round trip through the broker, p50", "µs", 1e6),),
        Setting(workers=1, carriers=("broker",)),
        params={"calls": 500},
        quick={"calls": 200},
        systems=("ours", "pika"),
        quick_turns=2,
        by_broker=True,
    ),
    Workload(
        "throughput-broker",
        throughput,
        (Row("per_s", "1000 no-op tasks through the broker", "/s", more_is_better=True),),
        Setting(carriers=("broker",)),
        params={"tasks": 1000},
        systems=("ours", "pika"),
        quick_turns=3,
        by_broker=True,
    ),
    Workload(
        "arrays-broker",
        arrays,
        (Row(str(100 * MIB), "array 100 MB site to site through the broker", "ms", 1e3),),
        Setting(sites=2, workers=1, carriers=("broker",)),
        params={"sizes": (100 * MIB,), "to_site": 1},
        systems=("ours", "pika"),
        turns=3,
        quick_turns=1,
        by_broker=True,
    ),
)
