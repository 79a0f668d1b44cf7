"""What the resolver can tell of one object, for EXPLAIN: its state, and what it waits for, with the states of those.

    facts(id) ──► the object ──► its open arguments ──► theirs ──► … (breadth first, `NODES_MAX` in all)

Each node is a plain map. Who may not read an object learns of it no more than whoever depends on it has to know: that it is
there, and whether it is done. Nothing here changes anything.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gcref.brains.tasks import DONE, STATE_NAMES, WAITING, Obj, is_task

if TYPE_CHECKING:
    from collections.abc import Container

    from gcref.brains import resolver_events as ev
    from gcref.brains.graph import Graph

NODES_MAX: Final = 40
"""Objects in one explanation: more than a screen full helps nobody."""
ARGUMENTS_MAX: Final = 10
"""Open arguments told of the task that was asked about; of those further away `NEXT_ARGUMENTS_MAX`."""
NEXT_ARGUMENTS_MAX: Final = 3
DEPTH_MAX: Final = 8
"""How far an explanation follows what waits for what."""
FAILURE_TEXT_MAX: Final = 300
TRIES_MAX: Final = 10
"""Failed attempts that are told of."""
SCAN_MAX: Final = 5_000
"""Objects that `overview` looks at: a millisecond or two."""
SAMPLE_MAX: Final = 50
PINS_MAX: Final = 4
"""Parties that are told of, for each of those."""


class Node(NamedTuple):
    """One object of an explanation.

    Attributes:
        obj: the object; None: there is none of that id.
        told: its map; whoever knows more of the object adds it.
        open: all may be told of it.
    """

    obj: Obj | None
    told: dict[str, Any]
    open: bool


def explain(graph: Graph, id: bytes, who: ev.Who, functions: Container[bytes], now: float) -> list[Node]:
    """The object that was asked about, then those that it waits for; their maps are nested already.

    Args:
        graph: the table.
        id: of the object.
        who: asks.
        functions: digests of those whose bytes are here.
        now: monotonic seconds.
    """
    obj = graph.objects.get(id)
    if obj is None:
        state = "released" if graph.is_grave(id) else "unknown"
        return [Node(None, {"id": id, "state": state}, False)]
    if id in graph.unknown:
        expected = {"id": id, "home": obj.home, "state": "expected", "expires_s": graph.unknown[id] - now}
        return [Node(obj, expected, False)]
    if not graph.may_read(obj, who, None):
        return [Node(None, {"id": id, "state": "unknown"}, False)]
    nodes: list[Node] = []
    seen = {id}
    todo: deque[tuple[Obj, dict[str, Any], int]] = deque([(obj, {}, 0)])
    while todo:
        obj, told, depth = todo.popleft()
        may_see = graph.may_read(obj, who, None)
        told |= {"id": obj.id, "home": obj.home, "state": STATE_NAMES[obj.state]}
        if obj.id in graph.unknown:
            told["state"] = "expected"
        if obj.home != graph.me and obj.extra is not None:
            told["at_home"] = obj.extra.at_home
            told["pulling"] = obj.extra.pulling
            told["size"] = obj.size
        nodes.append(Node(obj, told, may_see))
        if not may_see:
            continue
        _tell(obj, told, functions)
        if depth == DEPTH_MAX:
            continue
        for key, next_obj in _next(graph, obj, ARGUMENTS_MAX if depth == 0 else NEXT_ARGUMENTS_MAX):
            child: dict[str, Any] = {
                "id": next_obj.id,
                "home": next_obj.home,
                "state": STATE_NAMES[next_obj.state],
            }
            told.setdefault(key, []).append(child)
            if next_obj.id in seen:
                child["again"] = True
            elif len(seen) < NODES_MAX:
                seen.add(next_obj.id)
                todo.append((next_obj, child, depth + 1))
    return nodes


def _next(graph: Graph, obj: Obj, limit: int) -> list[tuple[str, Obj]]:
    """What an object waits for, by the name of that relation."""
    found: list[tuple[str, Obj]] = []
    if obj.state >= DONE:
        return found
    if obj.extra is not None and obj.extra.target is not None:
        found.append(("becomes", obj.extra.target))
    elif is_task(obj) and obj.missing:
        waiting = (dep for dep in obj.deps if graph.resolve(dep).state < DONE)
        found += [("waits_for", dep) for dep in islice(waiting, limit)]
    return found


def _tell(obj: Obj, told: dict[str, Any], functions: Container[bytes]) -> None:
    """Add all that is known of one object by itself."""
    told |= {"size": obj.size, "attempt": obj.attempt, "pins": len(obj.pins), "holds": obj.holds}
    if obj.failure is not None:
        told["failure"] = text_of(obj.failure)
    if obj.record is not None:
        told["record"] = obj.record[:6]
    extra = obj.extra
    if extra is not None and extra.tries:
        told["tries"] = [text[:FAILURE_TEXT_MAX] for text in extra.tries[-TRIES_MAX:]]
    if extra is not None and extra.unconfirmed and obj.state < DONE:
        told["unconfirmed"] = extra.unconfirmed
    if not is_task(obj):
        if extra is not None and extra.pulling:
            told["pulling"] = True
        return
    told |= {
        "task": True,
        "retries": obj.options.retries,
        "received_unix_s": obj.received_at,
        "missing": obj.missing,
    }
    if obj.options.walltime_s is not None:
        told["walltime_s"] = obj.options.walltime_s
    if obj.missing and obj.state == WAITING:
        if obj.fn is not None and obj.fn not in functions:
            told["function_missing"] = True
        if obj.args is not None and obj.args.state < DONE:
            told["upload"] = {"id": obj.args.id, "size": obj.args.size}


def text_of(failure: list[Any]) -> str:
    """A failure in a line, as people know it: `ValueError: no such mesh`."""
    kind, message = str(failure[0]), str(failure[1])
    text = message if kind == "raised" else f"{kind}: {message}"
    return text if len(text) <= FAILURE_TEXT_MAX else f"{text[:FAILURE_TEXT_MAX]}…"


def overview(graph: Graph) -> dict[str, Any]:
    """The table at a glance, for the log: counts, the oldest of what has not ended and of what is kept. Its cost is bounded."""
    states: dict[str, int] = {}
    unfinished: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for obj in islice(graph.objects.values(), SCAN_MAX):
        name = STATE_NAMES[obj.state]
        states[name] = states.get(name, 0) + 1
        samples = unfinished if obj.state < DONE else kept
        if len(samples) < SAMPLE_MAX:
            sample = {
                "id": obj.id,
                "home": obj.home,
                "state": name,
                "attempt": obj.attempt,
                "pins": list(islice(obj.pins, PINS_MAX)),
                "holds": obj.holds,
            }
            if is_task(obj):
                sample |= {"missing": obj.missing, "worker": obj.worker, "seq": obj.seq}
            if obj.extra is not None:
                sample |= {"at_home": obj.extra.at_home, "pulling": obj.extra.pulling}
            samples.append(sample)
    return {
        "counts": dict(graph.counts),
        "objects": len(graph.objects),
        "looked_at": min(len(graph.objects), SCAN_MAX),
        "states": states,
        "groups": len(graph.groups),
        "not_submitted_yet": len(graph.unknown),
        "oldest_unfinished": unfinished,
        "oldest_kept": kept,
    }
