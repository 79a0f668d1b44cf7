"""From samples to what a reader sees: medians, spreads, ratios, and the targets."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping

from tests.bench.turns import Samples
from tests.bench.workloads import WORKLOADS, Row

Results = Mapping[str, Mapping[str, Samples]]
"""Workload → system → figure → one value per turn."""

GB = str(1 << 30)
MB_100 = str(100 << 20)
"""The figure of the largest array; `MB_100` that of the one that goes through the broker."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A figure to reach: `ours / base` (or `ours` alone) is to be at most, or at least, a limit.

    Attributes:
        title: the work, as the reader sees it.
        ours: workload and figure of ours.
        limit: of the quotient.
        base: workload, system and figure that ours is divided by; `None` where the figure itself is limited.
        at_least: the quotient is to be no less than the limit. Else no more.
        inverse: the quotient is turned over (times are given, speeds are compared).
        unit: of the quotient.
        scale: what a figure without a base is multiplied by to have that unit.
    """

    title: str
    ours: tuple[str, str]
    limit: float
    base: tuple[str, str, str] | None = None
    at_least: bool = False
    inverse: bool = False
    unit: str = ""
    scale: float = 1.0

    def value(self, results: Results) -> float | None:
        """The measured quotient, or `None` where something it needs was not measured."""
        value = _median(results, self.ours[0], "ours", self.ours[1])
        if value is None:
            return None
        if self.base is not None:
            base = _median(results, *self.base)
            if base is None:
                return None
            value /= base
        return (1 / value if self.inverse else value) * self.scale

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def wanted(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"


TARGETS: tuple[Target, ...] = (
    Target(
        "no-op throughput, 50 k tasks",
        ("throughput-50k", "per_s"),
        5,
        ("throughput-50k", "pool", "per_s"),
        at_least=True,
        unit=" × pool",
    ),
    Target(
        "… time per task at 500 k",
        ("throughput-500k", "per_task"),
        1.2,
        ("throughput-10k", "ours", "per_task"),
        unit=" × at 10 k",
    ),
    Target(
        "… with a journal (named endpoint)",
        ("journal-50k", "per_s"),
        0.75,
        ("journal-50k", "journal", "per_s"),
        at_least=True,
        inverse=True,
        unit=" × without",
    ),
    Target("no-op round trip p50", ("round-trip", "p50"), 2, ("round-trip", "pool", "p50"), unit=" × pool"),
    Target(
        "chain of 1000 on one site, per link",
        ("chain", "per_link"),
        0.3,
        ("chain", "pool", "per_link"),
        unit=" × pool",
    ),
    Target(
        "chain alternating between two sites, per link",
        ("chain-two-sites", "per_link"),
        2,
        ("chain-two-sites", "pool", "per_link"),
        unit=" × pool",
    ),
    Target(
        "1 GB array, site to site, direct, warm",
        ("arrays-direct", GB),
        0.25,
        ("arrays-direct", "tcp", GB),
        at_least=True,
        inverse=True,
        unit=" × TCP",
    ),
    Target(
        "the same with ipc allowed",
        ("arrays-ipc", GB),
        3,
        ("arrays-ipc", "shm", GB),
        unit=" × map+touch",
    ),
    Target(
        "… to a task on the same site",
        ("arrays-same-site", GB),
        3,
        ("arrays-same-site", "shm", GB),
        unit=" × map+touch",
    ),
    Target("mixed load: makespan", ("mixed", "of_ideal"), 1.2, unit=" × ideal"),
    Target("client memory per 10 000 pending tasks", ("pending-memory", "bytes"), 25, unit=" MB", scale=1e-6),
    Target("agent + 2 workers, idle: PSS", ("idle", "pss"), 110, unit=" MB", scale=1e-6),
    Target("… wake-ups beyond heartbeats", ("idle", "wakeups_beyond"), 0, unit=" /s"),
    Target("import to first result, embedded default", ("first-result", "seconds"), 0.6, unit=" s"),
    Target(
        "round trip through the broker, p50",
        ("round-trip-broker", "p50"),
        3,
        ("round-trip-broker", "pika", "p50"),
        unit=" × two raw hops",
    ),
    Target(
        "1000 no-op tasks through the broker", ("throughput-broker", "per_s"), 3000, at_least=True, unit="/s"
    ),
    Target(
        "100 MB array, site to site, through the broker",
        ("arrays-broker", MB_100),
        0.5,
        ("arrays-broker", "pika", MB_100),
        at_least=True,
        inverse=True,
        unit=" × raw pika",
    ),
)


def measured_table(results: Results, systems: Iterable[str]) -> str:
    """All figures of all systems, in the order of the workloads; beside the others, ours divided by theirs."""
    taking_part = [name for name in systems if any(samples.get(name) for samples in results.values())]
    lines = [["", "unit", *taking_part]]
    for workload in WORKLOADS:
        for row in workload.rows:
            cells = [_cell(results, workload.name, name, row) for name in taking_part]
            if any(cells):
                lines.append([row.title, row.unit, *cells])
    return _columns(lines)


def targets_table(results: Results) -> str:
    """The figures to reach, in the order in which they were asked for."""
    lines = [["work", "reach", "measured", ""]]
    for target in TARGETS:
        if target.ours[0] not in results:
            continue  # not asked for
        value = target.value(results)
        if value is None:
            lines.append([target.title, target.wanted(), "not measured", "-"])
        else:
            verdict = "pass" if target.holds(value) else "MISSED"
            lines.append([target.title, target.wanted(), f"{_number(value)}{target.unit}", verdict])
    return _columns(lines)


def targets_record(results: Results) -> list[dict[str, object]]:
    """The same for the JSON file."""
    record: list[dict[str, object]] = []
    for target in TARGETS:
        value = target.value(results)
        verdict = None if value is None else target.holds(value)
        record.append({"work": target.title, "reach": target.wanted(), "measured": value, "holds": verdict})
    return record


def _cell(results: Results, workload: str, system: str, row: Row) -> str:
    samples = results.get(workload, {}).get(system, {}).get(row.figure)
    if not samples:
        return ""
    shown = [value * row.scale for value in samples]
    text = _number(statistics.median(shown))
    if len(shown) > 1:
        text += f" ({_number(min(shown))}–{_number(max(shown))})"
    ours = _median(results, workload, "ours", row.figure)
    if system != "ours" and ours is not None and statistics.median(samples):
        text += f" ours {_number(ours / statistics.median(samples))}×"
    return text


def _median(results: Results, workload: str, system: str, figure: str) -> float | None:
    samples = results.get(workload, {}).get(system, {}).get(figure)
    return statistics.median(samples) if samples else None


def _number(value: float) -> str:
    """Three digits that matter, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def _columns(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )
