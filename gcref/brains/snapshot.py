"""The graph written down: `dump` makes plain rows of it, `load` makes the same graph of them.

    ["graph", version, me, counts, turn]     always the first; `turn`: seconds until old releases are forgotten, or nil
    ["functions", 16*n] ["homes", 16*n]      digests that are known; endpoints that may know pins of ours
    ["groups", [group, …]]                   ┐ numbered in the order of their rows, and written before the first object
    ["options", [options, …]]                │ that names them
    ["heads", [head, …]]                     ┘ (of SUBMITs and OFFERs that other homes have not answered)
    ["objects", [object, …]]                 numbered too; those of the table first, in its order
    ["table", count]                         how many of the objects are in the table; the rest is known to others only
    ["unknown", [[id, seconds left], …]] ["graves", generation, 16*n] ["fn_waiters", [[digest, [number, …]], …]]
    ["reclaims", [[party, 16*n], …]]

Objects name each other by number, so that reading is two passes: make all, then tie them together. A row holds up to `BATCH`
objects. What dispatch has done with a task (worker, number in its queue) is not written: a DISPATCHED task is READY, or
WAITING when it was sent ahead of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar

from gcref.brains import resolver_events as ev
from gcref.brains.graph import UNCLAIMED, Graph
from gcref.brains.tasks import (
    DEFAULT_OPTIONS,
    DISPATCHED,
    DONE,
    NOBODY,
    READY,
    WAITING,
    Extra,
    Group,
    Obj,
    Options,
    Task,
)

VERSION: Final = 4
BATCH: Final = 256
"""Objects in one row."""
IDS_BATCH: Final = 65_536
"""Ids in one row of releases: a megabyte."""

_AnyObj = TypeVar("_AnyObj", bound=Obj)

_ID_BYTES: Final = 16
_FLAGS: Final = ("submitted", "subscribed", "confirmed", "at_home", "pulling", "put")
_DEFAULT: Final = [0, None, None]  # the row of DEFAULT_OPTIONS
_PLAIN: Final = ("token", "unconfirmed", "relay", "newer", "tries")


def dump(graph: Graph) -> Iterator[list[Any]]:
    """Write the graph down. Between two events, and to the end before the next one."""
    return _Dump(graph).rows()


def load(graph: Graph, rows: Iterable[list[Any]], now: float) -> None:
    """Make of an empty graph the one that the rows tell of.

    Args:
        graph: without objects.
        rows: of `dump`, in their order.
        now: monotonic seconds; what is left of waiting times counts from here.

    Raises:
        ValueError: these rows are not of this version, or of another endpoint.
    """
    _Load(graph, now).take(rows)


class _Dump:
    """One pass over a graph, in which groups, options and objects get their numbers."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._objects = list(graph.objects.values())
        self._numbers = {id(obj): number for number, obj in enumerate(self._objects)}
        self._groups: dict[int, int] = {}
        self._options: dict[int, int] = {}
        self._heads: dict[int, int] = {}
        self._new_heads: list[list[Any]] = []
        self._new_groups: list[list[Any]] = []
        self._new_options: list[list[Any]] = []

    def rows(self) -> Iterator[list[Any]]:
        """All rows."""
        graph = self._graph
        turn = graph.graves_turn_at
        left = None if turn is None else turn - graph.now
        yield ["graph", VERSION, graph.me, dict(graph.counts), left]
        yield ["functions", b"".join(sorted(graph.functions))]
        yield ["homes", b"".join(sorted(graph.homes))]
        in_table = len(self._objects)
        at = 0
        while at < len(self._objects):  # what the table does not have is added to the list as it is met
            batch = [self._object(obj) for obj in self._objects[at : at + BATCH]]
            at += len(batch)
            if self._new_groups:
                yield ["groups", self._new_groups]
                self._new_groups = []
            if self._new_options:
                yield ["options", self._new_options]
                self._new_options = []
            if self._new_heads:
                yield ["heads", self._new_heads]
                self._new_heads = []
            yield ["objects", batch]
        yield ["table", in_table]
        yield ["unknown", [[id, until - graph.now] for id, until in graph.unknown.items()]]
        for generation, graves in enumerate(graph.graves):
            ids = list(graves)
            for start in range(0, len(ids), IDS_BATCH):
                yield ["graves", generation, b"".join(ids[start : start + IDS_BATCH])]
        waiting = [[fn, self._all(_open(tasks))] for fn, tasks in graph.fn_waiters.items()]
        yield ["fn_waiters", waiting]
        yield ["reclaims", [[party, b"".join(sorted(ids))] for party, ids in graph.reclaims.items()]]

    def _number(self, obj: Obj) -> int:
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self._objects)
            self._objects.append(obj)
        return number

    def _all(self, objects: Iterable[Obj]) -> list[int]:
        return [self._number(obj) for obj in objects]

    def _group(self, group: Group) -> int:
        number = self._groups.get(id(group))
        if number is None:
            number = self._groups[id(group)] = len(self._groups)
            current = self._graph.groups.get(group.id) is group
            self._new_groups.append([group.id, group.secret, group.submitter, group.owner, current])
        return number

    def _option(self, options: Options) -> int:
        number = self._options.get(id(options))
        if number is None:
            number = self._options[id(options)] = len(self._options)
            self._new_options.append([options.retries, options.walltime_s, options.resources])
        return number

    def _head(self, head: list[Any]) -> int:
        number = self._heads.get(id(head))
        if number is None:
            number = self._heads[id(head)] = len(self._heads)
            self._new_heads.append(head)
        return number

    def _object(self, obj: Obj) -> list[Any]:
        group, pins, waiters = obj.group, obj.pins, obj.waiters
        told: Any
        if not pins:
            told = None
        elif group is not None and (pins is group.only_submitter or pins == group.only_submitter):
            told = True
        else:
            told = b"".join(sorted(pins))
        return [
            obj.id,
            None if obj.home == self._graph.me else obj.home,
            None if group is None else self._group(group),
            obj.state,
            obj.value,
            obj.size,
            obj.failure,
            obj.attempt,
            obj.record,
            obj.refs,
            obj.holds,
            told,
            self._all(_open(waiters)) if waiters else None,
            None if obj.extra is None else self._extra(obj.extra),
            self._task(obj) if isinstance(obj, Task) else None,
        ]

    def _task(self, task: Task) -> list[Any]:
        return [
            task.fn,
            task.payload,
            None if task.args is None else self._number(task.args),
            self._all(task.deps) if task.deps else None,
            self._all(task.passed) if task.passed else None,
            task.missing,
            task.broken,
            self._option(task.options),
            task.received_at,
        ]

    def _extra(self, extra: Extra) -> list[Any]:
        deferred = extra.deferred
        return [
            sum(1 << bit for bit, name in enumerate(_FLAGS) if getattr(extra, name)),
            [getattr(extra, name) for name in _PLAIN],
            None if extra.cachers is None else b"".join(sorted(extra.cachers)),
            None if extra.target is None else self._number(extra.target),
            None if extra.aliases is None else self._all(extra.aliases),
            None if extra.awaited_by is None else self._all(_open(extra.awaited_by)),
            [0, self._number(deferred)]
            if isinstance(deferred, Obj)
            else [1, *deferred]
            if deferred
            else None,
            None if extra.claims is None else [[list(who), token] for who, token in extra.claims],
            extra.moved,
            None if extra.unsaid is None else [self._head(extra.unsaid[0]), extra.unsaid[1]],
        ]


def _open(objects: Iterable[_AnyObj]) -> list[_AnyObj]:
    """Those that have not ended; the others are forgotten by whoever noted them."""
    return [obj for obj in objects if obj.state < DONE]


class _Load:
    """One reading of rows."""

    def __init__(self, graph: Graph, now: float) -> None:
        self._graph = graph
        self._now = now
        self._groups: list[Group] = []
        self._options: list[Options] = []
        self._heads: list[list[Any]] = []
        self._objects: list[Obj] = []
        self._ties: list[tuple[Obj, list[Any]]] = []  # those that name others
        self._parties: dict[bytes, frozenset[bytes]] = {}  # equal sets of pins are one

    def take(self, rows: Iterable[list[Any]]) -> None:
        """Read them all."""
        graph, now = self._graph, self._now
        if graph.objects:
            raise ValueError("a graph is loaded into an empty one")
        graph.now = now
        in_table = 0
        waiting: list[Any] = []
        rows = iter(rows)
        self._head(next(rows, []))
        for kind, *body in rows:
            if kind == "objects":
                for row in body[0]:
                    self._object(row)
            elif kind == "groups":
                self._groups += [self._group(*row) for row in body[0]]
            elif kind == "options":
                self._options += [DEFAULT_OPTIONS if row == _DEFAULT else Options(*row) for row in body[0]]
            elif kind == "heads":
                self._heads += body[0]
            elif kind == "functions":
                graph.functions.update(_split(body[0]))
            elif kind == "homes":
                graph.homes.update(_split(body[0]))
            elif kind == "table":
                in_table = body[0]
            elif kind == "unknown":
                graph.unknown.update({id: now + left for id, left in body[0]})
            elif kind == "graves":
                graph.graves[body[0]].update(dict.fromkeys(_split(body[1])))
            elif kind == "fn_waiters":
                waiting = body[0]
            elif kind == "reclaims":
                graph.reclaims.update({party: set(_split(ids)) for party, ids in body[0]})
        graph.objects.update({obj.id: obj for obj in self._objects[:in_table]})
        for obj, row in self._ties:
            self._tie(obj, row)
        graph.fn_waiters.update({fn: self._tasks(numbers) for fn, numbers in waiting})

    def _head(self, row: list[Any]) -> None:
        if row[:2] != ["graph", VERSION] or row[2] != self._graph.me:
            raise ValueError(f"these rows are not of version {VERSION} and of this endpoint: {row!r:.80}")
        self._graph.counts.update(row[3])
        self._graph.graves_turn_at = None if row[4] is None else self._now + row[4]

    def _group(self, id: bytes, secret: bytes, submitter: bytes, owner: bytes, current: bool) -> Group:
        group = Group(id, secret, submitter, owner)
        if current:
            self._graph.groups[id] = group
        return group

    def _object(self, row: list[Any]) -> None:
        (id, home, group_number, state, value, size, failure, attempt, record, refs, holds, pins) = row[:12]
        waiters, extra, task = row[12:15]
        group = None if group_number is None else self._groups[group_number]
        home = self._graph.me if home is None else home
        obj: Obj
        args = deps = passed = None
        if task is None:
            obj = Obj(id, home, group, NOBODY)
        else:
            fn, payload, args, deps, passed, missing, broken, options, received_at = task
            obj = made = Task(id, home, group or UNCLAIMED, fn, payload, self._options[options], received_at)
            made.group = group
            made.missing = missing
            made.broken = broken
            if state == DISPATCHED:
                state = WAITING if missing else READY
        obj.state = state
        obj.value = value
        obj.size = size
        obj.failure = failure
        obj.attempt = attempt
        obj.record = record
        obj.refs = refs
        obj.holds = holds
        if pins is None:
            obj.pins = NOBODY
        elif pins is True:
            assert group is not None
            obj.pins = group.only_submitter
        else:
            found = self._parties.get(pins)
            if found is None:
                found = self._parties[pins] = frozenset(_split(pins))
            obj.pins = found
        self._objects.append(obj)
        if waiters or extra or args is not None or deps or passed:
            self._ties.append((obj, row))

    def _tie(self, obj: Obj, row: list[Any]) -> None:
        """Set what names other objects."""
        waiters, extra, task = row[12:15]
        objects = self._objects
        if waiters:
            obj.waiters = self._tasks(waiters)
        if extra is not None:
            obj.extra = self._extra(extra)
        if isinstance(obj, Task):
            args, deps, passed = task[2:5]
            obj.args = None if args is None else objects[args]
            obj.deps = tuple([objects[number] for number in deps or ()])
            obj.passed = tuple([objects[number] for number in passed or ()])

    def _tasks(self, numbers: list[int]) -> list[Task]:
        return [task for number in numbers if isinstance(task := self._objects[number], Task)]

    def _extra(self, row: list[Any]) -> Extra:
        flags, plain, cachers, target, aliases, awaited_by, deferred, claims, moved, unsaid = row
        objects = self._objects
        extra = Extra()
        for bit, name in enumerate(_FLAGS):
            setattr(extra, name, bool(flags & 1 << bit))
        for name, value in zip(_PLAIN, plain, strict=True):
            setattr(extra, name, value)
        if cachers is not None:
            extra.cachers = set(_split(cachers))
        if target is not None:
            extra.target = objects[target]
        if aliases is not None:
            extra.aliases = [objects[number] for number in aliases]
        if awaited_by is not None:
            extra.awaited_by = [objects[number] for number in awaited_by] or None
        if deferred is not None:
            extra.deferred = tuple(deferred[1:]) if deferred[0] else objects[deferred[1]]
        if claims is not None:
            extra.claims = [(ev.Who(*who), token) for who, token in claims]
        if moved is not None:
            extra.moved = dict(moved)
        if unsaid is not None:
            extra.unsaid = (self._heads[unsaid[0]], unsaid[1])
        return extra


def _split(joined: bytes) -> list[bytes]:
    return [joined[at : at + _ID_BYTES] for at in range(0, len(joined), _ID_BYTES)]
