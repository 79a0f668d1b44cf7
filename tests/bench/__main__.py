"""`python -m tests.bench [--quick] [--json FILE] [--against pool,ray,dask,parsl] [--only NAME…]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.bench import peers, report, turns
from tests.bench.broker import broker
from tests.bench.turns import Contender
from tests.bench.workloads import WORKLOADS

BASELINES = ("tcp", "shm", "journal", "fsync", "pika")
"""Not systems but bare operations; always in, where a workload asks for them."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether all answers were right (0) or something failed (1).

    A target that is missed is shown, and is no failure: machines differ.
    """
    options = _parse(arguments)
    start = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    contenders = {name: Contender(name) for name in ("ours", *BASELINES)}
    for name in options.against:
        try:
            contenders[name] = (
                Contender(name)
                if name == "pool"
                else Contender(name, peers.python_of(name, tell), quiet=False, is_peer=True)
            )
        except peers.PeerError as error:
            print(error, file=sys.stderr)
            return 1
    results: dict[str, dict[str, turns.Samples]] = {}
    versions: dict[str, str] = {}
    failures: list[str] = []
    with ExitStack() as closing:
        mail: dict[str, str] = {}
        for workload in WORKLOADS:
            wanted = (
                workload.name in options.only if options.only else not options.quick or workload.quick_turns
            )
            if not wanted:
                continue
            if workload.by_broker and not mail:
                tell("starting a hub and a broker")
                try:
                    mail = closing.enter_context(broker())
                except RuntimeError as error:
                    failures.append(f"FAILED: {workload.name}: {error}")
                    break
            systems = (options.quick and workload.quick_systems) or workload.systems
            taking_part = [contenders[name] for name in systems if name in contenders]
            results[workload.name], seen, failed = turns.take_turns(
                workload,
                taking_part,
                quick=options.quick,
                tell=tell,
                environment=mail if workload.by_broker else {},
            )
            versions |= seen
            for failure in failed.values():
                kind = "WRONG ANSWER" if failure.wrong else "FAILED"
                failures.append(f"{kind}: {workload.name}: {failure}")
                tell(failures[-1])
    print(f"\n{_machine()}, load {os.getloadavg()[0]:.1f}, median of the turns (smallest–largest)\n")
    print(report.measured_table(results, contenders))
    print(f"\n{report.targets_table(results)}\n")
    print(f"{time.monotonic() - start:.0f} s in all")
    for line in failures:
        print(line.splitlines()[0])
    if options.json:
        record = {
            "machine": _machine(),
            "quick": options.quick,
            "versions": versions,
            "results": results,
            "targets": report.targets_record(results),
            "failures": failures,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failures else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns: under four minutes in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument(
        "--against",
        type=_systems,
        default=["pool"],
        metavar="NAMES",
        help="comma-separated: pool, ray, dask, parsl (default: pool). Peers are installed on first use",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[workload.name for workload in WORKLOADS],
        metavar="NAME",
        help="workloads: " + ", ".join(workload.name for workload in WORKLOADS),
    )
    return parser.parse_args(arguments)


def _systems(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name != "pool" and name not in peers.PACKAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of pool, {', '.join(peers.PACKAGES)}")
    return names


def _machine() -> str:
    python = platform.python_version()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {python}"


if __name__ == "__main__":
    sys.exit(main())
