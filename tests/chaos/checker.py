"""The laws, and who broke them: a pure function of the graph and the history.

A node's outcome is judged from the outcomes of what it was given, so one wrong outcome is one violation, not a hundred
below it. Values have no such freedom: whatever is broken, a value is that of the sequential evaluation.

A fault explains what it must bring about, and nothing else: a killed worker explains `WorkerLostError` of what it ran, once
its retries are used up. A cut, a delay or a freeze explains nothing at all: it costs time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from tests.chaos.graphs import Bad, Expected, Graph, Kind, Node, evaluate, planned_error
from tests.chaos.history import Entry

CANCEL_ANSWER_S: Final = 3.0
"""`cancel` answers within a second; the rest is a busy machine's."""

DEPENDENCY: Final = "DependencyError"
WORKER_LOST: Final = "WorkerLostError"
CANCELLED: Final = "CancelledError"
FULL: Final = "StoreFullError"


class Violation(NamedTuple):
    """A law that was broken.

    Attributes:
        law: its name.
        node: by which node, or None.
        text: how.
    """

    law: str
    node: int | None
    text: str


class Case:
    """A history, sorted for the laws.

    Args:
        graph: what the client did.
        entries: what happened.
    """

    def __init__(self, graph: Graph, entries: Iterable[Entry]) -> None:
        self.graph = graph
        self.expected: tuple[Expected, ...] = evaluate(graph)
        self.by_what: dict[str, list[Entry]] = defaultdict(list)
        self.by_node: dict[int, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        for entry in entries:
            self.by_what[entry["what"]].append(entry)
            if (number := entry.get("node")) is not None:
                self.by_node[number][entry["what"]].append(entry)
        self.killed: dict[int, Entry] = {
            pid: entry for entry in self.by_what["blow"] for pid in entry.get("killed", ())
        }

    def died_at(self, start: Entry) -> float | None:
        """When the process died in which that run of a task started, as far as the nemesis killed it."""
        if (blow := self.killed.get(start["pid"])) is not None:
            return float(blow["at"])
        site = self.graph.nodes[start["node"]].site
        return min((at for at in self.stops(site) if at > start["at"]), default=None)

    def stops(self, site: int) -> list[float]:
        """When a site had stopped in order, with all of its workers."""
        return [entry["at"] for entry in self.by_what["stopped"] if entry["site"] == site]

    def of(self, number: int, what: str) -> list[Entry]:
        """The entries of a node that tell of this."""
        return self.by_node[number][what] if number in self.by_node else []

    def end(self, number: int) -> Entry | None:
        """How a node ended, as far as it is known."""
        ends = self.of(number, "end")
        return ends[0] if ends else None

    def starts(self, number: int) -> list[Entry]:
        """The starts of its runs, in order."""
        rows = [entry for entry in self.of(number, "effect") if entry["effect"] == "started"]
        return sorted(rows, key=lambda entry: entry["at"])

    def completions(self, number: int) -> list[Entry]:
        """The completions of its runs."""
        return [entry for entry in self.of(number, "effect") if entry["effect"] == "ended"]

    def is_watched(self, node: Node) -> bool:
        """Whether the client must learn how it ends."""
        if node.parent is not None or not self.of(node.number, "submitted"):
            return False
        if node.mapped:
            # The results of a map come in order, and none behind the first error.
            return all(self._gave_value(n) for n in self._mapped_before(node))
        return not self.of(node.number, "dropped")

    def _mapped_before(self, node: Node) -> Iterator[int]:
        number = node.number - 1
        while number >= 0 and self.graph.nodes[number].mapped:
            if self.of(number, "submitted")[:1] and self._map_of(number) == self._map_of(node.number):
                yield number
            number -= 1

    def _map_of(self, number: int) -> Any:
        return self.of(number, "submitted")[0].get("map")

    def _gave_value(self, number: int) -> bool:
        end = self.end(number)
        return end is not None and end["outcome"] == "value"

    def window(self, node: Node) -> tuple[float, float]:
        """From when until when something could happen to its task."""
        top = node.number if node.parent is None else node.parent
        begins, end = self.of(top, "submitted"), self.end(top)
        return begins[0]["at"] if begins else 0.0, end["at"] if end is not None else float("inf")


Law = Callable[[Case], Iterator[Violation]]


def check(graph: Graph, entries: Iterable[Entry]) -> list[Violation]:
    """All violations of all laws, in the order of `LAWS`."""
    case = Case(graph, entries)
    return [violation for law in LAWS for violation in law(case)]


def story(entries: Iterable[Entry], number: int, graph: Graph) -> list[str]:
    """All that is known of a node and of what it needs, as lines for a person."""
    node = graph.nodes[number]
    near = {number, *node.deps, *node.refs, *(n for n in (node.inner, node.parent) if n is not None)}
    kept = sorted(
        (
            entry
            for entry in entries
            if entry.get("node") in near or entry["what"] in ("blow", "healed", "log")
        ),
        key=lambda entry: entry["at"],
    )
    begin = kept[0]["at"] if kept else 0.0
    lines = [str(graph.nodes[n]) for n in sorted(near)]
    for entry in kept:
        told = ", ".join(f"{key}={value!r}" for key, value in entry.items() if key not in ("at", "what"))
        lines.append(f"{entry['at'] - begin:9.3f}  {entry['what']:<10} {told}")
    return lines


# -------------------------------------------------------------------------------------------------------- outcomes


def ends_once(case: Case) -> Iterator[Violation]:
    """Each future ends, exactly once, and its callback is called once."""
    for node in case.graph.nodes:
        number = node.number
        ends = case.of(number, "end")
        for entry in case.of(number, "refused"):
            yield Violation("ends_once", number, f"submit raised {entry['type']}: {entry['text']}")
        if not case.is_watched(node):
            continue
        if not ends:
            yield Violation("ends_once", number, "nobody was told how it ended")
        elif ends[0]["outcome"] == "pending":
            yield Violation("ends_once", number, "it has not ended")
        elif any(_shape(entry) != _shape(ends[0]) for entry in ends):
            yield Violation(
                "ends_once", number, f"it ended in more than one way: {[_shape(e) for e in ends]}"
            )
        elif not node.mapped and len(case.of(number, "told")) != 1:
            yield Violation(
                "ends_once", number, f"its callback was called {len(case.of(number, 'told'))} times"
            )


def values_are_right(case: Case) -> Iterator[Violation]:
    """A value is that of the sequential evaluation, and stays it."""
    for node in case.graph.nodes:
        expected = case.expected[node.number]
        for end in case.of(node.number, "end"):
            if end["outcome"] != "value":
                continue
            if isinstance(expected, Bad):
                text = f"it gave a value and should have failed with {', '.join(sorted(expected.errors))}"
                yield Violation("values_are_right", node.number, text)
            elif end["digest"] != expected.digest:
                text = (
                    f"its value has the digest {end['digest']}, that of the evaluation is {expected.digest}"
                )
                yield Violation("values_are_right", node.number, text)
        for _ in case.of(node.number, "changed"):
            yield Violation("values_are_right", node.number, "its value changed while the client held it")


def errors_are_explained(case: Case) -> Iterator[Violation]:
    """What ends in an error was to end so, or needed what did, or a fault explains it."""
    for node in case.graph.nodes:
        end = case.end(node.number)
        if end is None or end["outcome"] in ("value", "pending"):
            continue
        kind = CANCELLED if end["outcome"] == "cancelled" else end["type"]
        if not _is_explained(case, node, kind):
            yield Violation(
                "errors_are_explained", node.number, f"nothing explains {kind}: {end.get('text', '')}"
            )


def _is_explained(case: Case, node: Node, kind: str) -> bool:
    if kind == planned_error(node):
        return True
    if kind == CANCELLED and any(case.of(node.number, "cancel")):
        return True
    if kind == DEPENDENCY:
        return any(_may_have_failed(case, n) for n in node.deps) or any(
            _may_have_ended_in(case, n, kind) for n in node.refs
        )
    if any(_may_have_ended_in(case, n, kind) for n in node.refs):
        return True
    if kind == WORKER_LOST and _lost_its_workers(case, node):
        return True
    if kind == FULL and _store_was_full(case, node):
        return True
    # What it submits fails, and it with it.
    return node.inner is not None and _is_explained(case, case.graph.nodes[node.inner], kind)


def _may_have_failed(case: Case, number: int) -> bool:
    end = case.end(number)
    return end["outcome"] in ("error", "cancelled") if end is not None else True


def _may_have_ended_in(case: Case, number: int, kind: str) -> bool:
    """Whether that node ended in such an error, or nobody knows how it ended."""
    end = case.end(number)
    if end is None:
        return True
    if end["outcome"] == "cancelled":
        return kind == CANCELLED
    return bool(end["outcome"] == "error" and end["type"] == kind)


def _lost_its_workers(case: Case, node: Node) -> bool:
    """Whether enough workers that could have run it died: one for each attempt that it had."""
    begins, ends = case.window(node)
    # A blow begins with looking for somebody to strike.
    deaths = [blow for blow in case.killed.values() if blow["site"] == node.site]
    deaths = [
        blow
        for blow in deaths
        if begins <= float(blow["done"] if "done" in blow else blow["at"]) and blow["at"] <= ends
    ]
    # Whoever waited for the task hears of its end before the stop is over.
    stops = [entry for entry in case.by_what["stopped"] if entry["site"] == node.site]
    stops = [
        entry for entry in stops if begins <= entry["at"] and float(entry.get("since") or entry["at"]) <= ends
    ]
    planned = min(node.deaths, len(case.starts(node.number))) if node.kind is Kind.DIE else 0
    return len(deaths) + len(stops) + planned > node.retries


def _store_was_full(case: Case, node: Node) -> bool:
    begins, ends = case.window(node)
    return any(entry["fault"] == "fill" and entry["at"] <= ends for entry in case.by_what["blow"]) and any(
        entry["fault"] == "fill" and entry["at"] >= begins for entry in case.by_what["healed"]
    )


def dependencies_fail(case: Case) -> Iterator[Violation]:
    """What needs a value that is not to be had never gives one; its error names all that failed."""
    for node in case.graph.nodes:
        end = case.end(node.number)
        if end is None:
            continue
        failed = {
            n for n in node.deps if (e := case.end(n)) is not None and e["outcome"] in ("error", "cancelled")
        }
        if end["outcome"] == "value" and failed:
            yield Violation(
                "dependencies_fail", node.number, f"it gave a value though {sorted(failed)} failed"
            )
        if end["outcome"] == "error" and end["type"] == DEPENDENCY and failed:
            tasks = {case.of(n, "submitted")[0]["task"] for n in failed}
            unknown = {case.of(n, "submitted")[0]["task"] for n in node.deps if case.end(n) is None}
            named = set(end.get("named", ()))
            if not tasks <= named or not named <= tasks | unknown:
                text = f"it names {sorted(named)}, and these failed: {sorted(tasks)}"
                yield Violation("dependencies_fail", node.number, text)


def cancelled_means_cancelled(case: Case) -> Iterator[Violation]:
    """A cancel answers in time; when it says yes the task is cancelled, and does not start any more."""
    for node in case.graph.nodes:
        for cancel in case.of(node.number, "cancel"):
            if cancel["took_s"] > CANCEL_ANSWER_S:
                yield Violation(
                    "cancelled_means_cancelled", node.number, f"the answer took {cancel['took_s']:.1f} s"
                )
            if not cancel["answer"]:
                continue
            end = case.end(node.number)
            if end is not None and end["outcome"] not in ("cancelled", "pending"):
                text = f"cancel said yes, and it ended in {_shape(end)}"
                yield Violation("cancelled_means_cancelled", node.number, text)
            late = [start for start in case.starts(node.number) if start["at"] > cancel["at"]]
            if late:
                yield Violation("cancelled_means_cancelled", node.number, f"it started after that: {late}")


# --------------------------------------------------------------------------------------------------------- effects


def runs_within_attempts(case: Case) -> Iterator[Violation]:
    """A task runs at most once for each attempt, and again only after the process of the run before is dead."""
    for node in case.graph.nodes:
        starts = case.starts(node.number)
        times = len(case.starts(node.parent)) if node.parent is not None else 1
        if len(starts) > (node.retries + 1) * max(1, times):
            text = f"it started {len(starts)} times and has {node.retries + 1} attempts"
            yield Violation("runs_within_attempts", node.number, text)
        end = case.end(node.number)
        attempts = end.get("attempts") if end is not None else None
        # The record of a tail call is that of the task that it stands for.
        if attempts and len(starts) > attempts and node.kind is not Kind.TAIL:
            text = f"it started {len(starts)} times, and its record counts {attempts} attempts"
            yield Violation("runs_within_attempts", node.number, text)
        if node.parent is None and node.kind is not Kind.DIE:
            yield from _repeats_after_death(case, node, starts)


def _repeats_after_death(case: Case, node: Node, starts: list[Entry]) -> Iterator[Violation]:
    for before, after in itertools.pairwise(starts):
        died_at = case.died_at(before)
        if died_at is None or died_at > after["at"]:
            text = f"it started again in {after['pid']}, and {before['pid']} was not dead"
            yield Violation("runs_within_attempts", node.number, text)


def values_were_made(case: Case) -> Iterator[Violation]:
    """What gave a value ran to its end; what waits for its arguments runs after theirs did, or never."""
    for node in case.graph.nodes:
        if node.kind is Kind.PUT:
            continue
        end = case.end(node.number)
        starts = case.starts(node.number)
        if end is not None and end["outcome"] == "value" and not case.completions(node.number):
            yield Violation("values_were_made", node.number, "it gave a value, and never ran to its end")
        if (
            end is not None
            and end["outcome"] == "error"
            and end["type"] == DEPENDENCY
            and starts
            and not node.refs
        ):
            yield Violation("values_were_made", node.number, "it ran though an argument failed")
        for number in node.deps:
            made = [entry["at"] for entry in case.completions(number)]
            is_put = case.graph.nodes[number].kind is Kind.PUT
            if starts and not is_put and (not made or min(made) > starts[0]["at"]):
                text = f"it started before {number} had made its value"
                yield Violation("values_were_made", node.number, text)


# ----------------------------------------------------------------------------------------------------- the machine


def nothing_is_left(case: Case) -> Iterator[Violation]:
    """Afterwards bytes, objects, processes, threads, open files and shared memory are as before."""
    for entry in case.by_what["left"]:
        yield Violation("nothing_is_left", None, entry["text"])


def agents_are_well(case: Case) -> Iterator[Violation]:
    """No agent dies that nobody killed, and none logs an error or a traceback."""
    for entry in case.by_what["agent"]:
        yield Violation("agents_are_well", None, f"{entry['site']}: {entry['text']}")
    for entry in case.by_what["log"]:
        yield Violation(
            "agents_are_well", None, f"{entry['site']} logged ({entry['level']}): {entry['text']}"
        )


def _shape(end: Entry) -> tuple[Any, ...]:
    return end["outcome"], end.get("digest"), end.get("type")


LAWS: Final[tuple[Law, ...]] = (
    ends_once,
    values_are_right,
    errors_are_explained,
    dependencies_fail,
    cancelled_means_cancelled,
    runs_within_attempts,
    values_were_made,
    nothing_is_left,
    agents_are_well,
)
