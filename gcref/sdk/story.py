"""What endpoints know of a task, in words: a tree of what it is, what it waits for, and how those stand.

    task 0198…-7f2a (simulate) at endpoint 'polaris': waiting for 2 arguments
      submitted 12 s ago, attempt 2 of 4
      attempt 1 failed 4.0 s ago: WorkerLostError: the worker process was killed by SIGKILL
      ├─ task 0198…-11ab (mesh) at endpoint 'polaris': running on worker polaris/2 for 11 s
      └─ task 0198…-93c0 (field) at endpoint 'midway': done there; its bytes are on their way: 340 MiB of 1.0 GiB (33 %)
           'midway' is reached by direct since 2 min, round trip 0.3 ms

The maps are the answers to EXPLAIN; see `gcref.brains.resolver_facts`. They come from other processes, perhaps of
another version, so nothing in them is taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from gcref import ids
from gcref.words import count, duration, size

Told = Mapping[str, Any]

ASK_MAX: Final = 20
"""Objects elsewhere that are asked about for one story."""

_BEST_FIRST: Final = ("ipc", "direct", "broker")
"""The carriers."""

_ENDED: Final = frozenset(("done", "failed", "cancelled", "lost", "released"))


def tell(root: Told, elsewhere: Mapping[bytes, Told], name_of: Callable[[bytes], str]) -> list[str]:
    """The lines of the story.

    Args:
        root: what its home says of the task.
        elsewhere: by id, what other homes say of their tasks.
        name_of: what to call an endpoint.
    """
    lines: list[str] = []
    links: dict[bytes, Told] = {}
    linked: set[bytes] = set()
    left = dict(elsewhere)  # each is told once: what endpoints say might go round in circles
    todo: list[tuple[Told, str, str]] = [(root, "", "")]
    while todo:
        node, first, rest = todo.pop()
        links |= node.get("links") or {}
        node, pull = _best(node, left)
        links |= node.get("links") or {}
        lines.append(f"{first}{_head(node, pull, name_of)}")
        children = _children(node)
        lines += [f"{rest}{'│ ' if children else '  '}{line}" for line in _more(node)]
        home = node.get("home")
        if (
            isinstance(home, bytes)
            and home in links
            and home not in linked
            and node.get("state") not in _ENDED
        ):
            linked.add(home)
            if text := link(links[home], name_of(home)):
                lines.append(f"{rest}{'│ ' if children else '  '}{text}")
        for at in reversed(range(len(children))):
            last = at == len(children) - 1
            todo.append(
                (children[at], f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
            )
        if (hidden := int(node.get("missing") or 0) - len(children)) > 0 and children:
            todo.insert(len(todo) - len(children), ({"state": "more", "count": hidden}, f"{rest}   ", rest))
    return lines


def open_elsewhere(told: Told) -> dict[bytes, list[bytes]]:
    """The objects of a story that only their own homes can tell more of: by home."""
    asked: dict[bytes, list[bytes]] = {}
    here = told.get("told_by")
    todo = [told]
    number = 0
    while todo and number < ASK_MAX:
        node = todo.pop()
        home, id = node.get("home"), node.get("id")
        pending = node.get("state") == "waiting" and not node.get("at_home") and not node.get("again")
        if pending and isinstance(home, bytes) and isinstance(id, bytes) and home != here:
            asked.setdefault(home, []).append(id)
            number += 1
        todo += _children(node)
    return asked


def _children(node: Told) -> list[Told]:
    return [*(node.get("becomes") or ()), *(node.get("waits_for") or ())]


def _best(node: Told, elsewhere: dict[bytes, Told]) -> tuple[Told, Told]:
    """The fullest map of an object (which is taken out of `elsewhere`), and the one that knows about its bytes here."""
    pending = node.get("state") == "waiting" and not node.get("at_home") and not node.get("again")
    if not pending or "told_by" in node:
        return node, node
    return elsewhere.pop(node.get("id", b""), node), node


# ---------------------------------------------------------------------------------------------------------- a line


def label(node: Told) -> str:
    """What to call an object: its kind, id, and function."""
    kind = "task" if node.get("task") or node.get("becomes") else "object"
    id = node.get("id")
    text = f"{kind} {ids.text(id)}" if isinstance(id, bytes) and len(id) == 16 else f"an {kind}"
    return f"{text} ({node['function']})" if node.get("function") else text


def _head(node: Told, pull: Told, name_of: Callable[[bytes], str]) -> str:
    if node.get("state") == "more":
        return f"… and {count(node['count'], 'more', 'more')}"
    home = node.get("home")
    at = f" at {name_of(home)}" if isinstance(home, bytes) else ""
    told = "see above" if node.get("again") else state(node if node.get("task") else pull)
    return f"{label(node)}{at}: {told}"


def state(node: Told) -> str:
    """How an object stands, in a few words."""
    name = node.get("state")
    if name == "unknown":
        return "not known there, or not yours to see"
    if name == "released":
        return "released: it had ended, and nobody needed it any more"
    if name == "expected":
        left = node.get("expires_s")
        return "nobody has submitted it yet" + (f"; given up in {duration(left)}" if left is not None else "")
    if name == "waiting":
        return _waiting(node)
    if name == "ready":
        ahead = node.get("ahead")
        if ahead is None:
            return "queued, far behind"
        return f"queued, behind {count(ahead, 'other task')}" if ahead else "queued, next in line"
    if name == "dispatched":
        return _dispatched(node)
    if name == "done":
        return _done(node)
    if name in ("failed", "lost"):
        return f"{name}: {node.get('failure') or 'for reasons unknown'}{_run(node)}"
    return str(name)


def _waiting(node: Told) -> str:
    if node.get("becomes"):
        return "it ran and returned another task's future, whose value it will have"
    if node.get("unconfirmed"):
        return f"it ran; {count(node['unconfirmed'], 'reference')} inside its result must be pinned at home first"
    if node.get("at_home"):
        if node.get("pulling"):
            return f"done there; its bytes are on their way: {_pull(node)}"
        return f"done there, a value of {size(node.get('size') or 0)}"
    if not node.get("task"):
        return f"its bytes are on their way: {_pull(node)}" if node.get("pulling") else "not done there yet"
    if (upload := node.get("upload")) is not None:
        return f"waiting for the bytes of its arguments from its submitter: {_pull(upload)}"
    missing = node.get("missing") or 0
    if node.get("function_missing"):
        return "waiting for the code of its function from its submitter"
    return f"waiting for {count(missing, 'argument')}" if missing else "waiting"


def _dispatched(node: Told) -> str:
    worker = f"worker {node.get('worker')}"
    if (running_s := node.get("running_s")) is not None:
        process = f" (process {node['pid']})" if node.get("pid") else ""
        text = f"running on {worker}{process} for {duration(running_s)}"
        if node.get("walltime_s") is not None:
            text += f" of at most {duration(node['walltime_s'])}"
        return f"{text}, waiting inside for another task" if node.get("blocked") else text
    if node.get("missing"):
        return f"sent ahead to {worker}, which makes its arguments"
    if (ahead := node.get("ahead")) is not None:
        return f"sent to {worker}, behind {count(ahead, 'other task')}" if ahead else f"sent to {worker}"
    return f"sent to {worker}"


def _done(node: Told) -> str:
    return f"done, a value of {size(node.get('size') or 0)}{_run(node)}"


def _run(node: Told) -> str:
    """How long a task that has ended ran, and where."""
    record = node.get("record")
    if not isinstance(record, (list, tuple)) or len(record) < 4 or record[1] is None or record[2] is None:
        return ""
    return f"; it ran {duration(record[2] - record[1])} on worker {record[3]}"


def _pull(node: Told) -> str:
    whole = node.get("size") or 0
    pull = node.get("pull")
    if not pull:
        return f"{size(whole)}"
    here, whole, carrier = pull
    part = f" ({100 * here // whole} %)" if whole else ""
    by = f" by {carrier}" if carrier else ", no way there at the moment"
    return f"{size(here)} of {size(whole)}{part}{by}"


def _more(node: Told) -> Iterator[str]:
    """The lines below the head of a task."""
    if node.get("age_s") is not None and node.get("state") not in _ENDED:
        text = f"submitted {duration(node['age_s'])} ago"
        if node.get("retries") or (node.get("attempt") or 1) > 1:
            text += f", attempt {node.get('attempt')} of {node.get('retries', 0) + 1}"
        yield text
    yield from tries(node)


def tries(node: Told) -> Iterator[str]:
    """The attempts of a task that have failed, and why."""
    for reason in node.get("tries") or ():
        first, *others = str(reason).splitlines() or [""]
        yield first.replace(": ", " failed: ", 1) if first.startswith("attempt ") else f"failed: {first}"
        yield from (f"  {line}" for line in others[-5:])


def link(told: Told, name: str) -> str:
    """How an endpoint is reached, from where the story was told; empty: nothing is known."""
    if not told:
        return ""
    if told.get("up"):
        text = f"{name} is reached by {told.get('carrier')}"
        if told.get("since_s") is not None:
            text += f" since {duration(told['since_s'])}"
        if told.get("rtt_s") is not None:
            text += f", round trip {duration(told['rtt_s'])}"
        if told.get("pending"):
            text += f", {count(told['pending'], 'message')} not acknowledged"
        return text + in_vain(told)
    text = f"{name} is out of reach"
    if told.get("given_up_in_s") is not None:
        text += f", and given up in {duration(told['given_up_in_s'])}"
    return text + in_vain(told)


def in_vain(told: Told) -> str:
    """The ways that were tried and do not work, and why: all that would be better than the one in use."""
    carrier = told.get("carrier") if told.get("up") else None
    better = _BEST_FIRST[: _BEST_FIRST.index(carrier)] if carrier in _BEST_FIRST else _BEST_FIRST
    text = ""
    for way in told.get("links") or ():
        if way.get("dialled") is not False and way.get("carrier") in better:
            text += f"; tried {way.get('carrier')} {way.get('address')}"
            if way.get("error"):
                text += f": {way['error']}"
    return text
