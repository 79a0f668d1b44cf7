"""The bench itself: it notices wrong answers, its targets compare what they say, and a turn runs from end to end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.bench import proc, report, tasks, turns
from tests.bench.system import System, WrongAnswerError
from tests.bench.workloads import WORKLOADS, chain, mixed, round_trip, throughput, tree


class Here(System):
    """Runs each task at once, in this process; `change` may falsify a result."""

    name = "here"

    def __init__(self, change: Callable[[Any], Any] = lambda value: value) -> None:
        self._change = change

    def submit(self, function: Callable[..., Any], *args: Any, site: int = 0) -> Any:
        return self._change(function(*args))

    def result(self, future: Any) -> Any:
        return future

    def wait(self, future: Any) -> None:
        pass


MEASURES = [
    (round_trip, {"calls": 100}),
    (throughput, {"tasks": 100}),
    (chain, {"links": 10, "sites": 1}),
    (tree, {"leaves": 11}),
    (mixed, {"tasks": 200, "long_s": 0.001, "seed": 1, "workers": 2}),
]


@pytest.mark.parametrize(("measure", "params"), MEASURES)
def test_right_answers_pass_and_wrong_ones_do_not(measure: Any, params: dict[str, Any]) -> None:
    assert all(value > 0 for value in measure(Here(), params).values())
    with pytest.raises(WrongAnswerError):
        measure(Here(lambda value: value + 1 if isinstance(value, int) else value), params)


def test_an_array_that_changed_on_its_way_is_noticed() -> None:
    def damage(value: Any) -> Any:
        if hasattr(value, "nbytes"):
            value[-1] += 1
        return value

    assert Here().carry(1 << 16, 2, 0) > 0
    with pytest.raises(WrongAnswerError):
        Here(damage).carry(1 << 16, 2, 0)


def test_targets_name_figures_that_are_measured() -> None:
    figures = {workload.name: {row.figure for row in workload.rows} for workload in WORKLOADS}
    systems = {workload.name: workload.systems for workload in WORKLOADS}
    for target in report.TARGETS:
        workload, figure = target.ours
        assert figure in figures[workload]
        if target.base is not None:
            base, system, figure = target.base
            assert figure in figures[base]
            assert system in systems[base]


def test_targets_compare_medians() -> None:
    ours = {"per_s": [60.0, 50.0, 1.0], "per_task": [0.02]}
    results: report.Results = {
        "throughput-50k": {"ours": ours, "pool": {"per_s": [9.0, 11.0, 10.0], "per_task": [0.1]}},
        "arrays-direct": {"ours": {report.GB: [2.0]}, "tcp": {report.GB: [0.6]}},
    }
    measured = {
        entry["work"]: (entry["measured"], entry["holds"]) for entry in report.targets_record(results)
    }
    assert measured["no-op throughput, 50 k tasks"] == (5.0, True)
    assert measured["1 GB array, site to site, direct, warm"] == (pytest.approx(0.3), True)
    assert measured["no-op round trip p50"] == (None, None)
    table = report.targets_table(results)
    assert "pass" in table
    assert "MISSED" not in table
    assert "round trip" not in table  # its workload was not asked for
    shown = report.measured_table(results, ["ours", "pool"])
    assert "50.0 (1.00–60.0)" in shown
    assert "ours 5.00×" in shown


def test_a_turn_of_the_pool() -> None:
    workload = next(workload for workload in WORKLOADS if workload.name == "throughput-1k")
    samples, versions, failed = turns.take_turns(
        workload, [turns.Contender("pool")], quick=True, tell=lambda line: None
    )
    assert not failed
    assert versions["pool"]
    assert len(samples["pool"]["per_s"]) == workload.quick_turns


def test_with_quick_a_slow_and_steady_system_takes_fewer_turns() -> None:
    workload = dataclasses.replace(
        next(workload for workload in WORKLOADS if workload.name == "tree"),
        params={"leaves": 10},
        turns=2,
        quick_turns=2,
        quick_turns_of={"pool": 1},
    )
    told: list[str] = []
    for quick, count in ((True, 1), (False, 2)):
        samples, _, failed = turns.take_turns(
            workload, [turns.Contender("pool")], quick=quick, tell=told.append
        )
        assert not failed
        assert len(samples["pool"]["seconds"]) == count
    assert told == ["tree: pool 1/1", "tree: pool 1/2", "tree: pool 2/2"]


def test_with_quick_ours_is_measured_at_least_as_often_as_anybody() -> None:
    for workload in WORKLOADS:
        assert "ours" not in workload.quick_turns_of
        assert all(1 <= turns < workload.quick_turns for turns in workload.quick_turns_of.values())


def test_a_system_that_cannot_be_imported_is_a_failure_with_its_reason() -> None:
    samples, _, failed = turns.take_turns(
        WORKLOADS[0], [turns.Contender("nonesuch")], quick=True, tell=lambda line: None
    )
    assert samples == {"nonesuch": {}}
    assert "No module named 'tests.bench.systems.nonesuch'" in str(failed["nonesuch"])


def test_what_linux_tells() -> None:
    assert 1 << 20 < proc.pss_bytes(os.getpid()) <= proc.rss_bytes(os.getpid())
    assert os.getpid() in proc.descendants(os.getppid())
    before = proc.sleeps(os.getpid())
    tasks.nap(0.01, None)
    assert proc.sleeps(os.getpid()) > before
