"""The judge must be able to condemn: a clean history passes all laws, and each kind of lie is found by its law."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.chaos import graphs
from tests.chaos.checker import LAWS, check, story
from tests.chaos.graphs import Bad, Good, Graph, Kind, Layout, Node, Shape
from tests.chaos.history import Entry

A, B, C, FAILS, NEEDS, DROPPED, DIES, MAPPED, MAPPED_NEXT, TAIL, INNER, REFS = range(12)

GRAPH: Final = Graph(
    nodes=(
        Node(A, Kind.PLAIN, 0),
        Node(B, Kind.PLAIN, 1, Shape.BYTES, 100, deps=(A,), retries=1),
        Node(C, Kind.PLAIN, 0, deps=(A, B), layout=Layout.DEEP),
        Node(FAILS, Kind.FAIL, 0),
        Node(NEEDS, Kind.PLAIN, 1, deps=(A, FAILS)),
        Node(DROPPED, Kind.PLAIN, 1),
        Node(DIES, Kind.DIE, 0, deaths=2, retries=1),
        Node(MAPPED, Kind.PLAIN, 0, retries=2, mapped=True),
        Node(MAPPED_NEXT, Kind.PLAIN, 0, retries=2, mapped=True),
        Node(TAIL, Kind.TAIL, 0, retries=1, inner=INNER),
        Node(INNER, Kind.INNER, 1, parent=TAIL),
        Node(REFS, Kind.REFS, 1, refs=(FAILS,)),
    ),
    steps=(
        *(graphs.Submit(n) for n in (A, B, C, FAILS, NEEDS, DROPPED, DIES)),
        graphs.Cancel(C, force=False),
        graphs.Drop(DROPPED),
        graphs.Map((MAPPED, MAPPED_NEXT)),
        *(graphs.Submit(n) for n in (TAIL, REFS)),
    ),
)
PID: Final = 1000


def faultless(graph: Graph) -> list[Entry]:
    """What a run leaves in which nothing is broken: the tasks run one after the other."""
    clock = itertools.count(1.0)
    dropped = {step.node for step in graph.steps if isinstance(step, graphs.Drop)}
    cancels = {step.node for step in graph.steps if isinstance(step, graphs.Cancel)}
    maps = {n: step.nodes[0] for step in graph.steps if isinstance(step, graphs.Map) for n in step.nodes}
    evaluated = graphs.evaluate(graph)
    ended_maps: set[int] = set()
    told: list[Entry] = []

    def note(what: str, node: int, **fields: Any) -> None:
        told.append({"at": next(clock), "what": what, "node": node, **fields})

    for node in graph.nodes:
        if node.parent is None:
            where = {"map": maps[node.number]} if node.mapped else {"task": _task(node.number)}
            note("submitted", node.number, **where)
    for number in cancels:
        note("cancel", number, force=False, answer=False, took_s=0.01)
    for number in dropped:
        note("dropped", number)
    for node, expected in zip(graph.nodes, evaluated, strict=True):
        is_kept = isinstance(expected, Bad) and "DependencyError" in expected.errors
        runs = 0 if is_kept or node.kind is Kind.PUT else 1 + min(node.deaths, node.retries)
        for run in range(runs):
            note("effect", node.number, effect="started", pid=PID + run)
        if isinstance(expected, Good) and runs:
            note("effect", node.number, effect="ended", pid=PID)
        if node.parent is not None or node.number in dropped or maps.get(node.number) in ended_maps:
            continue
        if not node.mapped:
            note("told", node.number)
        if isinstance(expected, Good):
            note("end", node.number, outcome="value", digest=expected.digest, attempts=max(1, runs))
        else:
            named = [_task(n) for n in node.deps if isinstance(evaluated[n], Bad)]
            if node.mapped:
                ended_maps.add(maps[node.number])  # its iterator gives no more
            note("end", node.number, outcome="error", type=min(expected.errors), text="", named=named)
    return told


def _task(number: int) -> str:
    return f"task-{number}"


def entry(entries: list[Entry], number: int, what: str, **fields: Any) -> Entry:
    """The first entry of a node that tells of this."""
    return next(
        e
        for e in entries
        if e.get("node") == number and e["what"] == what and all(e.get(k) == v for k, v in fields.items())
    )


def later(entries: list[Entry], what: str, **fields: Any) -> None:
    """Something happened after all that."""
    entries.append({"at": max(e["at"] for e in entries) + 1, "what": what, **fields})


def killed_worker(at: float, site: int, pid: int = PID) -> Entry:
    """A blow that killed a worker of a site."""
    return {
        "at": at,
        "what": "blow",
        "fault": "kill worker",
        "target": "ab"[site],
        "site": site,
        "killed": [pid],
    }


def ends_in(entries: list[Entry], number: int, type: str, **fields: Any) -> None:
    """It ended in this error instead."""
    entry(entries, number, "end").update(outcome="error", type=type, text="gone", **fields)


def test_a_faultless_history_breaks_no_law() -> None:
    assert check(GRAPH, faultless(GRAPH)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_faultless_history_of_a_random_graph_breaks_no_law(seed: int) -> None:
    graph = graphs.generate(seed, sites=2, tasks=40, busy_s=0.0)
    small = graph._replace(
        nodes=tuple(dataclasses.replace(node, size=min(node.size, 1000)) for node in graph.nodes)
    )
    assert check(small, faultless(small)) == []


Lie = Callable[[list[Entry]], None]

LIES: dict[str, tuple[str, int | None, Lie]] = {}


def lie(law: str, node: int | None) -> Callable[[Lie], Lie]:
    """Registers a way to doctor the history, and who must find it."""

    def register(doctor: Lie) -> Lie:
        LIES[doctor.__name__] = (law, node, doctor)
        return doctor

    return register


@lie("ends_once", A)
def it_never_ends(entries: list[Entry]) -> None:
    entry(entries, A, "end").update(outcome="pending", digest=None)


@lie("ends_once", A)
def nobody_is_told(entries: list[Entry]) -> None:
    entries.remove(entry(entries, A, "end"))


@lie("ends_once", A)
def its_callback_is_called_twice(entries: list[Entry]) -> None:
    later(entries, "told", node=A)


@lie("ends_once", A)
def its_callback_is_not_called(entries: list[Entry]) -> None:
    entries.remove(entry(entries, A, "told"))


@lie("ends_once", FAILS)
def it_ends_in_two_ways(entries: list[Entry]) -> None:
    later(entries, "end", node=FAILS, outcome="error", type="WorkerLostError", text="")


@lie("ends_once", B)
def submit_raises(entries: list[Entry]) -> None:
    later(entries, "refused", node=B, type="RuntimeError", text="it is broken")


@lie("ends_once", MAPPED_NEXT)
def a_map_stops_early(entries: list[Entry]) -> None:
    entries.remove(entry(entries, MAPPED_NEXT, "end"))


@lie("values_are_right", B)
def a_value_is_wrong(entries: list[Entry]) -> None:
    entry(entries, B, "end")["digest"] = "0123456789abcdef"


@lie("values_are_right", FAILS)
def a_failure_is_lost(entries: list[Entry]) -> None:
    entry(entries, FAILS, "end").update(outcome="value", digest="0123456789abcdef")


@lie("values_are_right", B)
def a_kept_array_changes(entries: list[Entry]) -> None:
    later(entries, "changed", node=B)


@lie("errors_are_explained", A)
def a_task_fails_for_no_reason(entries: list[Entry]) -> None:
    ends_in(entries, A, "EndpointLostError")


@lie("errors_are_explained", B)
def a_cut_is_taken_for_a_reason(entries: list[Entry]) -> None:
    at = entry(entries, B, "effect")["at"]
    entries.append({"at": at, "what": "blow", "fault": "cut", "target": "a>b", "site": 1, "killed": []})
    ends_in(entries, B, "WorkerLostError")


@lie("errors_are_explained", B)
def one_death_is_not_enough_for_two_attempts(entries: list[Entry]) -> None:
    entries.append(killed_worker(entry(entries, B, "effect")["at"], 1))
    ends_in(entries, B, "WorkerLostError")


@lie("errors_are_explained", A)
def a_death_at_another_site_explains_nothing(entries: list[Entry]) -> None:
    entries.append(killed_worker(entry(entries, A, "effect")["at"], 1))
    ends_in(entries, A, "WorkerLostError")


@lie("errors_are_explained", A)
def it_is_cancelled_though_nobody_asked(entries: list[Entry]) -> None:
    entry(entries, A, "end").update(outcome="cancelled", type="CancelledError")


@lie("errors_are_explained", C)
def a_dependency_is_blamed_that_did_not_fail(entries: list[Entry]) -> None:
    entry(entries, C, "end").update(outcome="error", type="DependencyError", text="", named=[])


@lie("errors_are_explained", REFS)
def a_reference_is_blamed_for_another_error(entries: list[Entry]) -> None:
    entry(entries, REFS, "end").update(type="ObjectLostError")


@lie("dependencies_fail", NEEDS)
def a_value_comes_from_nothing(entries: list[Entry]) -> None:
    entry(entries, NEEDS, "end").update(outcome="value", digest="0123456789abcdef")


@lie("dependencies_fail", NEEDS)
def it_does_not_name_what_failed(entries: list[Entry]) -> None:
    entry(entries, NEEDS, "end")["named"] = []


@lie("dependencies_fail", NEEDS)
def it_names_what_did_not_fail(entries: list[Entry]) -> None:
    entry(entries, NEEDS, "end")["named"] = [_task(A), _task(FAILS)]


@lie("cancelled_means_cancelled", C)
def cancel_takes_long(entries: list[Entry]) -> None:
    entry(entries, C, "cancel")["took_s"] = 20.0


@lie("cancelled_means_cancelled", C)
def it_gives_a_value_though_it_was_cancelled(entries: list[Entry]) -> None:
    entry(entries, C, "cancel")["answer"] = True


@lie("cancelled_means_cancelled", C)
def it_starts_after_it_was_cancelled(entries: list[Entry]) -> None:
    entry(entries, C, "cancel")["answer"] = True
    entry(entries, C, "end").update(outcome="cancelled", type="CancelledError")


@lie("runs_within_attempts", A)
def it_runs_more_often_than_it_may(entries: list[Entry]) -> None:
    later(entries, "effect", node=A, effect="started", pid=PID + 1)


@lie("runs_within_attempts", B)
def it_runs_again_while_it_still_runs(entries: list[Entry]) -> None:
    later(entries, "effect", node=B, effect="started", pid=PID + 1)


@lie("runs_within_attempts", B)
def its_process_dies_only_after_it_runs_again(entries: list[Entry]) -> None:
    later(entries, "effect", node=B, effect="started", pid=PID + 1)
    later(entries, "blow", fault="kill worker", target="b", site=1, killed=[PID])


@lie("runs_within_attempts", B)
def an_attempt_is_not_counted(entries: list[Entry]) -> None:
    entries.append(killed_worker(entry(entries, B, "effect")["at"], 1))
    later(entries, "effect", node=B, effect="started", pid=PID + 1)


@lie("runs_within_attempts", INNER)
def an_inner_task_runs_too_often(entries: list[Entry]) -> None:
    later(entries, "effect", node=INNER, effect="started", pid=PID + 1)


@lie("values_were_made", B)
def a_value_comes_from_nowhere(entries: list[Entry]) -> None:
    entries.remove(entry(entries, B, "effect", effect="ended"))


@lie("values_were_made", NEEDS)
def it_runs_without_its_argument(entries: list[Entry]) -> None:
    later(entries, "effect", node=NEEDS, effect="started", pid=PID)


@lie("values_were_made", B)
def it_starts_too_soon(entries: list[Entry]) -> None:
    entry(entries, B, "effect", effect="started")["at"] = 0.5


@lie("nothing_is_left", None)
def a_process_is_left(entries: list[Entry]) -> None:
    later(entries, "left", text="process: 4711")


@lie("agents_are_well", None)
def an_agent_is_dead(entries: list[Entry]) -> None:
    later(entries, "agent", site="a", text="its agent is dead")


@lie("agents_are_well", None)
def an_agent_logs_a_traceback(entries: list[Entry]) -> None:
    later(entries, "log", site="a", level="error", text="a message was not understood")


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_found(name: str) -> None:
    law, node, doctor = LIES[name]
    entries = copy.deepcopy(faultless(GRAPH))
    doctor(entries)
    assert (law, node) in {(found.law, found.node) for found in check(GRAPH, entries)}


def test_each_law_has_a_lie() -> None:
    assert {law for law, _, _ in LIES.values()} == {law.__name__ for law in LAWS}


def test_what_a_fault_explains_is_no_violation() -> None:
    entries = faultless(GRAPH)
    entries.append(killed_worker(entry(entries, A, "effect")["at"], 0))
    entries.remove(entry(entries, A, "effect", effect="ended"))
    ends_in(entries, A, "WorkerLostError")
    for number in (B, C, NEEDS):
        for told in [e for e in entries if e.get("node") == number and e["what"] == "effect"]:
            entries.remove(told)
        failed = [_task(n) for n in GRAPH.nodes[number].deps if n in (A, B, FAILS)]
        entry(entries, number, "end").update(outcome="error", type="DependencyError", text="", named=failed)
    assert check(GRAPH, entries) == []


def test_a_worker_that_dies_after_a_task_ended_explains_nothing() -> None:
    entries = faultless(GRAPH)
    later(entries, "blow", fault="kill worker", target="a", site=0, killed=[PID])
    ends_in(entries, A, "WorkerLostError")
    assert ("errors_are_explained", A) in {(found.law, found.node) for found in check(GRAPH, entries)}


def test_a_worker_that_is_struck_after_the_submit_explains_what_it_ran() -> None:
    entries = faultless(GRAPH)
    ends_in(entries, A, "WorkerLostError")
    submitted_at = entry(entries, A, "submitted")["at"]
    blow = killed_worker(submitted_at - 0.01, 0)
    entries.append(blow)
    assert ("errors_are_explained", A) in {(found.law, found.node) for found in check(GRAPH, entries)}
    blow["done"] = submitted_at + 0.01
    assert ("errors_are_explained", A) not in {(found.law, found.node) for found in check(GRAPH, entries)}


def test_a_stop_explains_what_is_told_before_it_is_over() -> None:
    entries = faultless(GRAPH)
    ends_in(entries, A, "WorkerLostError")
    told_at = entry(entries, A, "end")["at"]
    later(entries, "stopped", site=0, since=told_at - 0.1)
    assert ("errors_are_explained", A) not in {(found.law, found.node) for found in check(GRAPH, entries)}
    entries[-1]["since"] = told_at + 0.1
    assert ("errors_are_explained", A) in {(found.law, found.node) for found in check(GRAPH, entries)}


def test_who_runs_again_after_a_stop_may() -> None:
    entries = faultless(GRAPH)
    later(entries, "stopped", site=1)
    later(entries, "effect", node=B, effect="started", pid=PID + 1)
    entry(entries, B, "end")["attempts"] = 2
    assert check(GRAPH, entries) == []
    entry(entries, B, "effect")["at"] = (
        entries[-2]["at"] + 0.5
    )  # then its process was not among those that ended
    assert ("runs_within_attempts", B) in {(found.law, found.node) for found in check(GRAPH, entries)}


def test_a_tail_call_is_lost_like_any_other_task() -> None:
    """It ends when its agent has what it submitted; a death after that takes nothing along, one before uses an attempt."""
    entries = faultless(GRAPH)
    entry(entries, TAIL, "end").update(outcome="error", type="WorkerLostError", text="its process died")
    without = [e for e in entries if e.get("node") != INNER]
    ended = entry(entries, TAIL, "end")["at"]
    deaths = [killed_worker(ended - 0.1 * i, 0, PID + 5 + i) for i in (1, 2)]
    for count in range(2):
        told = {(v.law, v.node) for v in check(GRAPH, [*without, *deaths[:count]])}
        assert ("errors_are_explained", TAIL) in told
    assert check(GRAPH, [*without, *deaths]) == []


def test_the_story_tells_of_a_node_and_of_what_it_needs() -> None:
    told = "\n".join(story(faultless(GRAPH), B, GRAPH))
    assert "task-0" in told
    assert "task-1" in told
    assert "task-3" not in told
