"""Random graphs of tasks: a pure function of the seed; and what each node must give, found by evaluating in sequence.

A node is a task, or a value that is put. Its value is made from a key, the key from the node's number and the digests of
the values it is given. So a value that is wrong anywhere, in a single byte, makes everything below it wrong.

Workers import this module for each task that they run: it needs the standard library alone, and numpy for arrays.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from gcref.objects.ref import ObjectRef


class Kind(enum.StrEnum):
    """What a node does."""

    PUT = "put"
    PLAIN = "plain"
    FAIL = "fail"  # raises ValueError
    DIE = "die"  # ends its worker in its first runs
    OVERRUN = "overrun"  # runs for longer than its walltime
    TAIL = "tail"  # submits another task, and returns its future
    NEST = "nest"  # submits another task, and waits for it
    REFS = "refs"  # is passed references, and gets their values itself
    BOX = "box"  # returns a reference inside its value
    UNBOX = "unbox"  # gets what the reference in a box refers to
    INNER = "inner"  # submitted by a task, not by the client


class Shape(enum.StrEnum):
    """What its value looks like."""

    INT = "int"
    BYTES = "bytes"
    ARRAY = "array"
    NESTED = "nested"


class Layout(enum.StrEnum):
    """Where in the arguments the values are."""

    ARGS = "args"
    KEYWORDS = "keywords"
    LIST = "list"
    DEEP = "deep"


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One task or put.

    Attributes:
        number: its place in the graph.
        kind: what it does.
        site: index of the site that it is submitted to.
        shape: what its value looks like.
        size: bytes of its value, about.
        deps: numbers of the nodes whose values it is given.
        refs: numbers of the nodes that it is given references to, or that it reaches through a box.
        layout: how the values lie in the arguments.
        retries: as in `Executor.options`.
        walltime_s: the same.
        duration_s: how long it takes, at least.
        deaths: in how many first runs it ends its worker.
        inner: number of the node that it submits, or None.
        parent: of an inner node, the number of the one that submits it.
        mapped: it is submitted by `Executor.map`, so nobody sees its future.
    """

    number: int
    kind: Kind
    site: int
    shape: Shape = Shape.INT
    size: int = 0
    deps: tuple[int, ...] = ()
    refs: tuple[int, ...] = ()
    layout: Layout = Layout.ARGS
    retries: int = 0
    walltime_s: float | None = None
    duration_s: float = 0.0
    deaths: int = 0
    inner: int | None = None
    parent: int | None = None
    mapped: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Submit:
    """The client submits, or puts, a node."""

    node: int


@dataclasses.dataclass(frozen=True, slots=True)
class Map:
    """The client maps a function over some nodes."""

    nodes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Cancel:
    """The client asks for a task not to run."""

    node: int
    force: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """The client lets a future go."""

    node: int


Step = Submit | Map | Cancel | Drop


class Graph(NamedTuple):
    """What a client does.

    Attributes:
        nodes: each at the place of its number.
        steps: what the client does, in this order; nodes with a parent have no step.
    """

    nodes: tuple[Node, ...]
    steps: tuple[Step, ...]


class Good(NamedTuple):
    """A node gives a value.

    Attributes:
        digest: of the value.
    """

    digest: str


class Bad(NamedTuple):
    """A node fails of its own accord, or because what it needs does.

    Attributes:
        errors: the types that say so.
    """

    errors: frozenset[str]


Expected = Good | Bad

BLOCKERS_MAX: Final = 5
"""Tasks of one graph that wait inside a worker for another task: few enough for any endpoint's extra workers."""

OVERRUN_WALLTIME_S: Final = 0.4
OVERRUN_DURATION_S: Final = 60.0

_SIZES: Final = (1_000, 60_000, 120_000, 500_000, 2_000_000, 6_000_000)
_SIZE_WEIGHTS: Final = (4, 4, 4, 4, 3, 1)
_NEAR: Final = 12  # arguments come from the latest so many nodes, mostly
_MIX: Final = (
    (Kind.PUT, 8),
    (Kind.PLAIN, 60),
    (Kind.FAIL, 3),
    (Kind.DIE, 5),
    (Kind.OVERRUN, 1),
    (Kind.TAIL, 8),
    (Kind.NEST, 3),
    (Kind.REFS, 5),
    (Kind.BOX, 4),
    (Kind.UNBOX, 3),
)


def generate(seed: int, *, sites: int, tasks: int, busy_s: float) -> Graph:
    """A graph.

    Args:
        seed: the same one gives the same graph.
        sites: how many there are.
        tasks: how many nodes, about.
        busy_s: how long all the tasks take together.
    """
    return _Builder(random.Random(f"graph {seed}"), sites, busy_s / tasks).build(tasks)


class _Builder:
    def __init__(self, dice: random.Random, sites: int, mean_s: float) -> None:
        self._dice = dice
        self._sites = sites
        self._mean_s = mean_s
        self._nodes: list[Node] = []
        self._usable: list[int] = []  # nodes whose futures the client has
        self._steps: list[Step] = []
        self._blockers = 0
        self._doomed: set[int] = set()  # nodes that fail, or may

    def build(self, tasks: int) -> Graph:
        kinds, weights = zip(*_MIX, strict=True)
        while len(self._nodes) < tasks:
            if self._dice.random() < 0.02:
                self._map()
            else:
                self._submit(self._dice.choices(kinds, weights)[0])
            if self._dice.random() < 0.05:
                self._cancel()
            if self._dice.random() < 0.08:
                self._drop()
        return Graph(tuple(self._nodes), tuple(self._steps))

    def _submit(self, kind: Kind) -> None:
        if kind in (Kind.NEST, Kind.REFS, Kind.UNBOX):
            if self._blockers == BLOCKERS_MAX:
                kind = Kind.PLAIN
            else:
                self._blockers += 1
        boxes = [n for n in self._usable if self._nodes[n].kind is Kind.BOX] if kind is Kind.UNBOX else []
        if kind is Kind.UNBOX and not boxes:
            kind = Kind.PLAIN
        number = len(self._nodes)
        node = self._node(number, kind)
        changes: dict[str, Any] = {}
        if kind is Kind.UNBOX:
            box = self._dice.choice(boxes)
            changes = {"deps": (box,), "refs": self._nodes[box].refs, "layout": Layout.ARGS}
        elif kind in (Kind.REFS, Kind.BOX):
            count = 1 if kind is Kind.BOX else self._dice.randint(1, 2)
            changes = {"refs": self._earlier(count), "layout": Layout.ARGS}
            if not changes["refs"]:
                changes = {"kind": Kind.PLAIN}
        elif kind in (Kind.TAIL, Kind.NEST):
            changes = {"inner": number + 1}
        elif kind is Kind.DIE:
            changes = {"deaths": self._dice.randint(1, 2), "retries": self._dice.randint(0, 3)}
        elif kind is Kind.OVERRUN:
            changes = {"walltime_s": OVERRUN_WALLTIME_S, "duration_s": OVERRUN_DURATION_S}
        node = dataclasses.replace(node, **changes)
        self._nodes.append(node)
        if node.inner is not None:
            inner = self._node(node.inner, Kind.INNER)
            self._nodes.append(
                dataclasses.replace(inner, parent=number, deps=(), layout=Layout.ARGS, walltime_s=None)
            )
        if planned_error(node) is not None or not self._doomed.isdisjoint((*node.deps, *node.refs)):
            self._doomed.add(number)
        self._usable.append(number)
        self._steps.append(Submit(number))

    def _node(self, number: int, kind: Kind) -> Node:
        dice = self._dice
        shape = dice.choices(list(Shape), (5, 2, 3, 2))[0]
        size = 0 if shape is Shape.INT else dice.choices(_SIZES, _SIZE_WEIGHTS)[0]
        if kind is Kind.PUT:
            return Node(number, kind, dice.randrange(self._sites), shape, size)
        count = (
            0
            if kind in (Kind.REFS, Kind.BOX, Kind.UNBOX)
            else dice.choices((0, 1, 2, 3, 8), (4, 6, 5, 3, 1))[0]
        )
        return Node(
            number,
            kind,
            dice.randrange(self._sites),
            shape,
            size,
            deps=self._earlier(count),
            layout=dice.choice(list(Layout)),
            retries=dice.choices((0, 1, 3), (1, 2, 3))[0],
            walltime_s=60.0 if dice.random() < 0.1 else None,
            duration_s=round(dice.expovariate(1 / self._mean_s), 3) if self._mean_s else 0.0,
        )

    def _earlier(self, count: int) -> tuple[int, ...]:
        # Failures are kept rare among arguments: what they are given to fails too, and in the end everything would.
        near = self._usable[-_NEAR:] if self._dice.random() < 0.8 else self._usable
        chosen = near if self._dice.random() < 0.04 else [n for n in near if n not in self._doomed]
        return tuple(self._dice.choices(chosen, k=count)) if chosen else ()

    def _map(self) -> None:
        first = len(self._nodes)
        site = self._dice.randrange(self._sites)
        count = self._dice.randint(3, 6)
        for number in range(first, first + count):
            node = self._node(number, Kind.FAIL if self._dice.random() < 0.05 else Kind.PLAIN)
            # All items of a map have the options of the executor.
            self._nodes.append(
                dataclasses.replace(node, site=site, deps=(), retries=2, walltime_s=None, mapped=True)
            )
        self._steps.append(Map(tuple(range(first, first + count))))

    def _cancel(self) -> None:
        # The latest ones, mostly: what waits for a cancelled task fails.
        near = self._usable[-2:] if self._dice.random() < 0.8 else self._usable[-_NEAR:]
        tasks = [n for n in near if self._nodes[n].kind is not Kind.PUT]
        if tasks:
            number = self._dice.choice(tasks)
            self._doomed.add(number)
            self._steps.append(Cancel(number, self._dice.random() < 0.4))

    def _drop(self) -> None:
        if self._usable:
            number = self._dice.choice(self._usable)
            self._usable.remove(number)
            self._steps.append(Drop(number))


# --------------------------------------------------------------------------------------------------------- values


def key_of(number: int, given: Iterable[str]) -> int:
    """The key that a node's value is made from.

    Args:
        number: of the node.
        given: digests of the values that it is given.
    """
    seed = f"{number}:{','.join(given)}".encode()
    return int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest(), "big")


def make(shape: Shape, size: int, key: int) -> Any:
    """A value of that shape and about that many bytes, from its key."""
    if shape is Shape.INT:
        return key
    if shape is Shape.BYTES:
        return _stream(key, size)
    if shape is Shape.ARRAY:
        import numpy

        return numpy.frombuffer(_stream(key, size), numpy.uint8)
    return {
        "key": key,
        "parts": [_stream(key + 1, size // 2), (key, None, "text")],
        "below": {"more": [_stream(key + 2, size // 2)]},
    }


def _stream(key: int, size: int) -> bytes:
    # Blocks of 64 KiB that differ from each other, so that no range can stand in for another one.
    block = hashlib.shake_128(key.to_bytes(8, "big")).digest(1 << 16)
    count = size // len(block) + 1
    return b"".join(number.to_bytes(4, "big") + block[4:] for number in range(count))[:size]


def digest(value: Any) -> str:
    """A text that two values share only if they are equal, of whatever kind their bytes are.

    A reference counts as a reference, whatever it refers to.
    """
    found = hashlib.blake2b(digest_size=8)
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            found.update(b"d%d " % len(item))
            todo.extend(part for key in sorted(item, reverse=True) for part in (item[key], key))
        elif isinstance(item, (list, tuple)):
            found.update(b"%s%d " % (b"l" if isinstance(item, list) else b"t", len(item)))
            todo.extend(reversed(item))
        elif isinstance(item, bytes):
            found.update(b"b%d " % len(item))
            found.update(item)
        elif isinstance(item, ObjectRef):
            found.update(b"r ")
        elif type(item).__module__ == "numpy":
            found.update(b"a%d " % item.nbytes)
            found.update(item.data)
        else:
            found.update(f"{type(item).__name__} {item!r} ".encode())
    return found.hexdigest()


def arrange(layout: Layout, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that hold the values.

    Returns:
        Positional ones and keywords, which `gather` takes apart again.
    """
    if layout is Layout.ARGS:
        return tuple(values), {}
    if layout is Layout.KEYWORDS:
        return (), {f"value_{place}": value for place, value in enumerate(values)}
    if layout is Layout.LIST:
        return (list(values),), {}
    return ({"even": [{"at": tuple(values[::2])}], "odd": list(values[1::2])},), {}


def gather(layout: Layout, args: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """The values in arguments that `arrange` made."""
    if layout is Layout.ARGS:
        return list(args)
    if layout is Layout.KEYWORDS:
        return list(keywords.values())
    if layout is Layout.LIST:
        return list(args[0])
    even, odd = args[0]["even"][0]["at"], args[0]["odd"]
    found: list[Any] = [None] * (len(even) + len(odd))
    found[::2], found[1::2] = even, odd
    return found


# ------------------------------------------------------------------------------------------------------ evaluation


def planned_error(node: Node) -> str | None:
    """The type of the error that the node ends in when all it needs is there and nothing is broken."""
    if node.kind is Kind.FAIL:
        return "ValueError"
    if node.kind is Kind.OVERRUN:
        return "WalltimeExceededError"
    if node.kind is Kind.DIE and node.deaths > node.retries:
        return "WorkerLostError"
    return None


def evaluate(graph: Graph) -> tuple[Expected, ...]:
    """What each node gives when nothing is broken and nothing cancelled, one after the other."""
    found: list[Expected] = []
    # A task is evaluated before the one inside it: what the inner one is given is known by then.
    for node in graph.nodes:
        found.append(_evaluate(node, graph, found))
    return tuple(found)


def _evaluate(node: Node, graph: Graph, found: list[Expected]) -> Expected:
    if node.parent is not None:
        return _inner_value(graph.nodes[node.parent], node, found)
    failed_refs = [found[n] for n in node.refs if isinstance(found[n], Bad)]
    if any(isinstance(found[n], Bad) for n in node.deps):
        return Bad(frozenset({"DependencyError"}))
    error = planned_error(node)
    if error is not None:
        return Bad(frozenset({error}))
    if failed_refs and node.kind is not Kind.BOX:
        return Bad(frozenset(error for bad in failed_refs if isinstance(bad, Bad) for error in bad.errors))
    if node.inner is not None:
        inner = graph.nodes[node.inner]
        value = _inner_value(node, inner, found)
        if node.kind is Kind.TAIL or isinstance(value, Bad):
            return value
        return Good(digest(value_of(node, [*_given(node, found), value.digest])))
    return Good(digest(value_of(node, _given(node, found))))


def _inner_value(parent: Node, inner: Node, found: list[Expected]) -> Expected:
    if any(isinstance(found[n], Bad) for n in parent.deps):
        return Bad(frozenset({"DependencyError"}))
    return Good(
        digest(value_of(inner, [digest(handed_on(inner, key_of(parent.number, _given(parent, found))))]))
    )


def handed_on(inner: Node, key: int) -> Any:
    """What a task makes for the one that it submits, and gives it as its argument: as large as that one's own value."""
    return make(inner.shape, inner.size, key)


def _given(node: Node, found: list[Expected]) -> list[str]:
    """Digests of the values that a task reads: those that it is given, then those that it gets by reference."""
    numbers = node.deps if node.kind is Kind.BOX else (*node.deps, *node.refs)
    return [expected.digest for n in numbers if isinstance(expected := found[n], Good)]


def value_of(node: Node, given: Sequence[str]) -> Any:
    """The value of a node that is given values of these digests.

    A box holds a reference beside it; here `None` stands for that, as `digest` takes all references for one.
    """
    key = key_of(node.number, given)
    if node.kind is Kind.BOX:
        return {"key": key, "ref": _ANY_REF}
    return make(node.shape, node.size, key)


_ANY_REF: Final = ObjectRef(bytes(16), bytes(16), bytes(16))
