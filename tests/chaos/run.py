"""One run: sites are started, a graph is submitted while things break, everything is healed, read, released and judged."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Final, NamedTuple

import gcref
from gcref import Client, ComputeFuture, Executor
from gcref.errors import DependencyError, GcrefError, LostError
from tests.chaos import checker, graphs, nemesis, tasks
from tests.chaos.checker import Violation
from tests.chaos.graphs import Kind, Node
from tests.chaos.history import History
from tests.chaos.sites import CLIENT, World
from tests.chaos.strike import Striker
from tests.support.leaks import GRACE_S, Traces
from tests.support.waiting import patience, wait_until

STORIES_MAX: Final = 4
"""Nodes whose story is told when a run found something."""

READ_S: Final = 5.0
"""How long each future is waited for at least, however late it is."""

_CONFIG: Final = {
    "heartbeat_s": 0.5,
    "endpoint_lost_s": 120.0,
    "unknown_object_s": 20.0,
    "log_level": "debug",
}
_KEPT_VALUES: Final = 20
_SMALL_DISK_BYTES: Final = 48_000_000
_MAP_RETRIES: Final = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a run does; with the same ones it does the same, as far as that is in its hands.

    Attributes:
        seed: of the graph and of the plan.
        endpoints: how many sites: 2 or 3.
        tasks: nodes of the graph, about.
        duration_s: how long things break.
        agents_die: agents are killed and started again.
        disks_fill: the disks of the stores are small and fill up; needs root.
        patience_s: how long everything may take afterwards.
    """

    seed: int
    endpoints: int = 2
    tasks: int = 60
    duration_s: float = 4.0
    agents_die: bool = False
    disks_fill: bool = False
    patience_s: float = 60.0


class Verdict(NamedTuple):
    """What a run found.

    Attributes:
        violations: of the laws; empty: none.
        report: for a person.
        folder: the history, the sites' homes with their logs; gone if nothing was found.
    """

    violations: list[Violation]
    report: str
    folder: Path


def run(settings: Settings, parent: Path | None = None) -> Verdict:
    """Do a run.

    Args:
        settings: what to do.
        parent: where its folder is made; None: the system's place for temporary files.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"gcref-chaos-{settings.seed}-", dir=parent))
    graph = graphs.generate(
        settings.seed,
        sites=settings.endpoints,
        tasks=settings.tasks,
        busy_s=settings.duration_s * settings.endpoints,
    )
    history = History(folder / "history.jsonl")
    try:
        history.note("run", **dataclasses.asdict(settings))
        with _client_home(folder / CLIENT), _complaints_noted(history):
            _Run(settings, graph, history, folder).go()
    except BaseException as error:
        error.add_note(f"seed {settings.seed} did not come to its end ({settings}); all of it is in {folder}")
        raise
    finally:
        history.close()
    violations = checker.check(graph, history.entries)
    if not violations:
        shutil.rmtree(folder, ignore_errors=True)
        return Verdict([], f"seed {settings.seed}: {_summary(history)}", folder)
    return Verdict(violations, _report(settings, graph, history, violations, folder), folder)


class _Run:
    def __init__(self, settings: Settings, graph: graphs.Graph, history: History, folder: Path) -> None:
        self._settings = settings
        self._graph = graph
        self._history = history
        self._dice = random.Random(f"run {settings.seed}")
        store = self._dice.choice(("12 MB", "40 MB", "400 MB"))
        self._world = World(
            folder,
            settings.endpoints,
            {**_CONFIG, "store_limit_bytes": store},
        )
        self._ways = self._dice.choice((("ipc",), ("direct",), ("direct",)))
        self._futures: dict[int, ComputeFuture[Any]] = {}
        self._maps: list[tuple[tuple[int, ...], Iterator[Any]]] = []
        self._values: list[tuple[int, Any, str]] = []

    def go(self) -> None:
        before = Traces.take()
        world = self._world
        try:
            world.open(small_disks=_SMALL_DISK_BYTES if self._settings.disks_fill else 0)
            try:
                self._break_and_mend()
            finally:
                world.heal()
                for text in world.close():
                    self._left(text)
            self._look_around(before)
        finally:
            world.sweep()
        self._note_effects()

    def _break_and_mend(self) -> None:
        world, settings = self._world, self._settings
        names = tuple(site.name for site in world.sites)
        usable = tuple(sorted(n for n in world.links if "direct" in self._ways or not n.startswith(CLIENT)))
        blows = nemesis.plan(
            settings.seed,
            sites=names,
            links=usable,
            duration_s=settings.duration_s,
            agents_die=settings.agents_die,
            disks_fill=settings.disks_fill,
        )
        with Client(carriers=self._ways) as client:
            self._history.note("client", party=client.id, ways=self._ways, sites=world.ids())
            executors = [Executor(id, client) for id in world.ids()]
            if settings.agents_die:
                # Who finds an endpoint stopped before they ever met it gives up soon, and may.
                for executor in executors:
                    executor.submit(abs, -1).result(patience(settings.patience_s))
            striker = Striker(world, nemesis.timeline(blows), self._history)
            striker.start()
            try:
                self._submit_all(executors)
                until = time.monotonic() + settings.duration_s + patience(settings.patience_s)
                self._collect(until)
                striker.join()
            finally:
                striker.stop()
                world.heal()
            if striker.error is not None:
                raise striker.error
            for site in world.sites:
                for problem in site.problems if site.is_alive() else (*site.problems, "its agent is dead"):
                    self._history.note("agent", site=site.name, text=problem)
            self._collect(time.monotonic() + patience(settings.patience_s))
            self._look_again()
            pending = [future for future in self._futures.values() if not future.done()]
            self._futures.clear()
            gc.collect()  # what a fetch that failed was raised through
            if not pending:
                self._await_release()
            for executor in executors:
                executor.shutdown(wait=not pending)

    # ------------------------------------------------------------------------------------------------- submitting

    def _submit_all(self, executors: list[Executor]) -> None:
        steps = self._graph.steps
        # Some clients submit everything at once, others while the sites are at it.
        over_s = self._dice.choice((0.0, 0.3, 0.8)) * self._settings.duration_s
        begin, pause = time.monotonic(), threading.Event()
        for place, step in enumerate(steps):
            pause.wait(max(0.0, begin + over_s * place / len(steps) - time.monotonic()))
            match step:
                case graphs.Submit():
                    self._submit(executors, self._graph.nodes[step.node])
                case graphs.Map():
                    self._map(executors, step.nodes)
                case graphs.Cancel():
                    self._cancel(step)
                case graphs.Drop():
                    if self._futures.pop(step.node, None) is not None:
                        self._history.note("dropped", node=step.node)

    def _submit(self, executors: list[Executor], node: Node) -> None:
        needed = {*node.deps, *(node.refs if node.kind is not Kind.UNBOX else ())}
        if not needed <= self._futures.keys():
            return  # what it needs was refused: that is told
        setting = tasks.Setting(str(self._world.effects), tuple(self._world.ids()))
        given = [self._futures[number] for number in node.deps]
        held = [self._futures[number] for number in node.refs] if node.kind is not Kind.UNBOX else []
        args, keywords = graphs.arrange(node.layout, given)
        executor = executors[node.site]
        if node.kind is Kind.PUT:
            value = graphs.value_of(node, ())
            make: Callable[[], ComputeFuture[Any]] = lambda: executor.put(value)  # noqa: E731
        else:
            view = executor.options(retries=node.retries, walltime_s=node.walltime_s)
            fn = _FUNCTIONS.get(node.kind, tasks.work)
            inner = () if node.inner is None else (self._graph.nodes[node.inner],)
            passed = [gcref.ref(future) for future in held]
            make = functools.partial(view.submit, fn, node, *inner, setting, *passed, *args, **keywords)
        # Noted before it is done: what happens next belongs to it.
        try:
            at = time.monotonic()
            future = make()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is judged
            self._history.note("refused", node=node.number, type=type(error).__name__, text=str(error))
            return
        self._history.note("submitted", at=at, node=node.number, task=future.task_id)
        self._futures[node.number] = future
        if graphs.Drop(node.number) not in self._graph.steps:  # callbacks would keep it alive
            history = self._history
            future.add_done_callback(lambda _, number=node.number: history.note("told", node=number))  # type: ignore[misc]

    def _map(self, executors: list[Executor], numbers: tuple[int, ...]) -> None:
        nodes = [self._graph.nodes[number] for number in numbers]
        setting = tasks.Setting(str(self._world.effects), tuple(self._world.ids()))
        for number in numbers:
            self._history.note("submitted", node=number, map=numbers[0])
        view = executors[nodes[0].site].options(retries=_MAP_RETRIES)
        settings, wait_s = (
            [setting] * len(nodes),
            self._settings.duration_s + patience(self._settings.patience_s),
        )
        self._maps.append((numbers, view.map(tasks.work, nodes, settings, timeout=wait_s)))

    def _cancel(self, step: graphs.Cancel) -> None:
        future = self._futures.get(step.node)
        if future is None:
            return
        # Asking counts from before the answer: a task may end in between.
        self._history.note("asked", node=step.node, force=step.force)
        begin = time.monotonic()
        answer = future.cancel(step.force)
        took_s = time.monotonic() - begin
        self._history.note("cancel", node=step.node, force=step.force, answer=answer, took_s=round(took_s, 3))

    # ------------------------------------------------------------------------------------------------- reading

    def _collect(self, until: float) -> None:
        for number, future in self._futures.items():
            outcome = self._observe(future, until)
            if outcome["outcome"] == "pending":
                with contextlib.suppress(GcrefError, RuntimeError, TimeoutError):
                    self._history.note("explained", node=number, text=future.explain())
            self._note_end(number, outcome)
        for numbers, results in self._maps:
            for number in numbers:
                outcome = self._outcome(functools.partial(next, results))
                self._note_end(number, outcome)
                if outcome["outcome"] != "value":
                    break
        self._maps.clear()

    def _note_end(self, number: int, outcome: dict[str, Any]) -> None:
        ends = [e for e in self._history.entries if e["what"] == "end" and e["node"] == number]
        if ends and ends[-1]["outcome"] == "pending":
            self._history.entries.remove(
                ends.pop()
            )  # it needed more time than it was given while things broke
        if not ends or any(ends[-1].get(key) != outcome.get(key) for key in ("outcome", "digest", "type")):
            self._history.note("end", node=number, **outcome)

    def _observe(self, future: ComputeFuture[Any], until: float) -> dict[str, Any]:
        """How a future ends; a value that cannot be fetched now is asked for again."""
        until = max(until, time.monotonic() + READ_S)

        def read() -> Any:
            error = future.exception(max(0.0, until - time.monotonic()))
            while error is None:
                try:
                    return future.result(max(0.0, until - time.monotonic()))
                except LostError as lost:
                    self._history.note("fetch failed", task=future.task_id, text=str(lost))
                    if time.monotonic() > until:
                        raise
            return error

        outcome = self._outcome(read)
        if (record := future.record) is not None:
            outcome["attempts"] = record.attempts
        return outcome

    def _outcome(self, read: Callable[[], Any]) -> dict[str, Any]:
        try:
            value = read()
        except CancelledError as error:
            # A task that itself met a cancelled one fails with this error; it was not cancelled.
            kind = "error" if error.args or error.__cause__ is not None else "cancelled"
            return {"outcome": kind, "type": type(error).__name__, "text": str(error)}
        except TimeoutError:
            return {"outcome": "pending"}  # no task here raises one
        except Exception as error:  # noqa: BLE001 - whatever it is, it is judged
            return _error_of(error)
        if isinstance(value, BaseException):
            return _error_of(value)  # no task here returns one
        return {"outcome": "value", "digest": self._kept(value)}

    def _kept(self, value: Any) -> str:
        found = graphs.digest(value)
        if type(value).__module__ == "numpy" and len(self._values) < _KEPT_VALUES:
            self._values.append((-1, value, found))
        return found

    def _look_again(self) -> None:
        """Arrays that the client kept, some of them mapped, are what they were."""
        for number, value, found in self._values:
            if graphs.digest(value) != found:
                self._history.note("changed", node=number)
        self._values.clear()

    # ------------------------------------------------------------------------------------------------- afterwards

    def _await_release(self) -> None:
        """Nobody holds anything any more: each site's store and graph become empty."""
        for site in self._world.sites:
            told: dict[str, Any] = {}

            def is_empty(site: Any = site, told: dict[str, Any] = told) -> bool:
                try:
                    told.update(self._world.ask(site))
                except GcrefError as error:
                    told.update(error=str(error))
                    return False
                store = told["store"]
                return not (store["used_bytes"] or store["disk_bytes"] or told["objects"])

            try:
                wait_until(is_empty, timeout_s=30)
            except AssertionError:
                kept = {key: told.get(key) for key in ("error", "objects", "workers", "store", "dispatch")}
                self._left(f"{site.name} does not become empty: {kept}")
                self._history.note("dumped", site=site.name, lines=site.dumped())

    def _look_around(self, before: Traces) -> None:
        mine = tuple(site.record.id.hex() for site in self._world.sites)
        found: list[str] = []

        def is_clean() -> bool:
            # Others use the machine too: of its shared memory only our own sites' folders count.
            found[:] = [
                line
                for line in Traces.take().beyond(before)
                if not line.startswith("folder in shared memory") or any(id in line for id in mine)
            ]
            return not found

        with contextlib.suppress(AssertionError):
            wait_until(is_clean, timeout_s=GRACE_S)
        for text in found:
            self._left(text)
        for site in self._world.sites:
            for level, text in site.complaints():
                self._history.note("log", site=site.name, level=level, text=text)

    def _left(self, text: str) -> None:
        self._history.note("left", text=text)

    def _note_effects(self) -> None:
        for number, rows in tasks.effects(str(self._world.effects)).items():
            for row in rows:
                self._history.note("effect", at=row.at_s, node=number, effect=row.what, pid=row.pid)


_FUNCTIONS: Final[dict[Kind, Callable[..., Any]]] = {
    Kind.TAIL: tasks.tail,
    Kind.NEST: tasks.nest,
    Kind.REFS: tasks.refs,
    Kind.BOX: tasks.box,
    Kind.UNBOX: tasks.unbox,
}


def _error_of(error: BaseException) -> dict[str, Any]:
    roots: list[str] = []
    cause = error.__cause__
    while cause is not None and len(roots) < 10:
        roots.append(type(cause).__name__)
        cause = cause.__cause__
    named = list(error.task_ids) if isinstance(error, DependencyError) else []
    return {
        "outcome": "error",
        "type": type(error).__name__,
        "text": str(error)[:500],
        "roots": roots,
        "named": named,
    }


@contextlib.contextmanager
def _client_home(path: Path) -> Iterator[None]:
    before = os.environ.get("GCREF_HOME")
    os.environ["GCREF_HOME"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["GCREF_HOME"]
        else:
            os.environ["GCREF_HOME"] = before


@contextlib.contextmanager
def _complaints_noted(history: History) -> Iterator[None]:
    """Errors that the client logs, and those that end one of its threads, are noted."""

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = (
                f"{record.getMessage()}\n{record.exc_info[1]!r}" if record.exc_info else record.getMessage()
            )
            history.note("log", site=CLIENT, level=record.levelname, text=text)

    def died(args: threading.ExceptHookArgs) -> None:
        history.note("log", site=CLIENT, level="thread", text=f"{args.thread}: {args.exc_value!r}")

    handler = Noting(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("gcref", "concurrent.futures")]
    hook = threading.excepthook
    threading.excepthook = died
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        threading.excepthook = hook
        for logger in loggers:
            logger.removeHandler(handler)


def _summary(history: History) -> str:
    ends: dict[str, int] = {}
    for entry in history.entries:
        if entry["what"] == "end":
            name = entry.get("type") or entry["outcome"]
            ends[name] = ends.get(name, 0) + 1
    blows: dict[str, int] = {}
    for entry in history.entries:
        if entry["what"] == "blow":
            blows[entry["fault"]] = blows.get(entry["fault"], 0) + 1
    took_s = history.entries[-1]["at"] - history.entries[0]["at"] if history.entries else 0.0
    last = max(entry["at"] for entry in history.entries) - history.entries[0]["at"]
    return f"{ends} under {blows}, {max(took_s, last):.1f} s"


def _report(
    settings: Settings,
    graph: graphs.Graph,
    history: History,
    violations: list[Violation],
    folder: Path,
) -> str:
    lines = [f"seed {settings.seed} broke {len(violations)} laws ({settings}); all of it is in {folder}"]
    lines += [f"  {law}{'' if node is None else f', node {node}'}: {text}" for law, node, text in violations]
    told = list(dict.fromkeys(v.node for v in violations if v.node is not None and v.node >= 0))
    for number in told[:STORIES_MAX]:
        lines.append(f"the story of node {number}:")
        lines += [f"    {line}" for line in checker.story(history.entries, number, graph)]
    lines.append(_summary(history))
    return "\n".join(lines)
