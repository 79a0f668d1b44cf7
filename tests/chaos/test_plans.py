"""Graphs and plans are functions of their seed, and what is evaluated here is what the tasks do there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import graphs, nemesis, tasks
from tests.chaos.graphs import Good, Kind, Layout, Shape
from tests.chaos.nemesis import AGENTS_DIE, Fault

SITES = ("a", "b")
LINKS = ("client>a", "client>b", "a>b", "b>a")


def test_a_seed_gives_one_graph() -> None:
    once, again, other = (graphs.generate(seed, sites=2, tasks=80, busy_s=4.0) for seed in (1, 1, 2))
    assert once == again != other


@pytest.mark.parametrize("seed", range(50))
def test_a_graph_can_be_submitted(seed: int) -> None:
    """Whoever submits a node has the futures that it needs; what was dropped is not used any more."""
    graph = graphs.generate(seed, sites=3, tasks=80, busy_s=4.0)
    have: set[int] = set()
    for step in graph.steps:
        match step:
            case graphs.Submit():
                node = graph.nodes[step.node]
                assert have.issuperset(node.deps)
                assert node.kind is Kind.UNBOX or have.issuperset(node.refs)
                have.add(step.node)
            case graphs.Drop():
                have.remove(step.node)
            case graphs.Cancel():
                assert step.node in have or any(graphs.Drop(step.node) == s for s in graph.steps)
    assert [node.number for node in graph.nodes] == list(range(len(graph.nodes)))
    blockers = [node for node in graph.nodes if node.kind in (Kind.NEST, Kind.REFS, Kind.UNBOX)]
    assert len(blockers) <= graphs.BLOCKERS_MAX


def test_most_of_a_graph_succeeds() -> None:
    found = [one for seed in range(20) for one in graphs.evaluate(_small(seed))]
    assert sum(isinstance(one, Good) for one in found) > 0.8 * len(found)


def test_all_kinds_occur() -> None:
    kinds = {
        node.kind for seed in range(20) for node in graphs.generate(seed, sites=2, tasks=80, busy_s=0).nodes
    }
    assert kinds == set(Kind)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_arguments_come_back_in_their_order(layout: Layout, count: int) -> None:
    values = list(range(count))
    args, keywords = graphs.arrange(layout, values)
    assert graphs.gather(layout, args, keywords) == values


@pytest.mark.parametrize("shape", Shape)
def test_a_digest_sees_each_byte(shape: Shape) -> None:
    value = graphs.make(shape, 200_000, 5)
    assert graphs.digest(value) == graphs.digest(graphs.make(shape, 200_000, 5))
    assert graphs.digest(value) != graphs.digest(graphs.make(shape, 200_000, 6))
    if shape in (Shape.BYTES, Shape.ARRAY):
        damaged = bytearray(bytes(value))
        damaged[150_000] ^= 1
        assert graphs.digest(bytes(value)) != graphs.digest(bytes(damaged))


@pytest.mark.parametrize("seed", range(5))
def test_tasks_do_what_the_evaluation_says(seed: int, tmp_path: Path) -> None:
    """The same functions, called here one after the other, give the values that the checker expects."""
    graph = _small(seed)
    setting = tasks.Setting(str(tmp_path), ())
    values: dict[int, Any] = {}
    seen = 0
    for node, expected in zip(graph.nodes, graphs.evaluate(graph), strict=True):
        if not isinstance(expected, Good):
            continue
        if node.kind is Kind.PUT:
            values[node.number] = graphs.value_of(node, ())
        elif node.kind in (Kind.PLAIN, Kind.DIE) and values.keys() >= set(node.deps):
            args, keywords = graphs.arrange(node.layout, [values[n] for n in node.deps])
            values[node.number] = tasks.work(dataclasses.replace(node, deaths=0), setting, *args, **keywords)
        else:
            continue
        seen += 1
        assert graphs.digest(values[node.number]) == expected.digest
    assert seen > 5
    left = tasks.effects(str(tmp_path))
    assert {row.what for rows in left.values() for row in rows} == {tasks.STARTED, tasks.ENDED}


def _small(seed: int) -> graphs.Graph:
    graph = graphs.generate(seed, sites=2, tasks=40, busy_s=0.0)
    return graph._replace(
        nodes=tuple(dataclasses.replace(node, size=min(node.size, 1000)) for node in graph.nodes)
    )


def _plan(seed: int, **settings: Any) -> tuple[nemesis.Blow, ...]:
    return nemesis.plan(seed, sites=SITES, links=LINKS, duration_s=10.0, **settings)


def test_a_seed_gives_one_plan() -> None:
    assert _plan(1) == _plan(1) != _plan(2)


def test_agents_die_only_if_they_may() -> None:
    without = {blow.fault for seed in range(100) for blow in _plan(seed)}
    assert without == set(Fault) - AGENTS_DIE - {Fault.FILL}
    every = {blow.fault for seed in range(100) for blow in _plan(seed, agents_die=True, disks_fill=True)}
    assert every == set(Fault)


def test_a_client_without_links_still_sees_faults() -> None:
    blows = nemesis.plan(3, sites=SITES, links=(), duration_s=20.0)
    assert blows
    assert not {blow.fault for blow in blows} & nemesis.OF_LINKS


@pytest.mark.parametrize("seed", range(50))
def test_blows_end_in_time_and_never_overlap_at_one_target(seed: int) -> None:
    blows = _plan(seed, agents_die=True, disks_fill=True)
    for number, blow in enumerate(blows):
        assert blow.at_s + blow.for_s <= 10.0
        for other in blows[number + 1 :]:
            if nemesis.struck(other) == nemesis.struck(blow):
                assert other.at_s > blow.at_s + blow.for_s
    acts = nemesis.timeline(blows)
    assert [act.at_s for act in acts] == sorted(act.at_s for act in acts)
    assert sum(act.begins for act in acts) == len(blows)
