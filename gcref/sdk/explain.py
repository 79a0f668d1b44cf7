"""What `ComputeFuture.explain` says: where a task is, what it waits for, which carrier, since when.

    what the client knows ─┐
    what its endpoint says ├─► text
    what the homes of its open arguments say, when they are elsewhere ─┘

The endpoints' parts are told by `story`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from gcref.brains import submitter_table as table
from gcref.sdk import story
from gcref.words import count, duration, size

if TYPE_CHECKING:
    from gcref.brains.peers import Peers
    from gcref.sdk.future import ComputeFuture
    from gcref.sdk.request import Request
    from gcref.sdk.whereabouts import Whereabouts

WAIT_S: Final = 1.2
"""How long `explain` waits for the I/O thread, which waits for the endpoint a little less."""

_HERE: Final = {
    table.UNSENT: "it has not been sent yet",
    table.SENT: "it has been sent",
    table.RUNNING: "it runs",
    table.ENDED: "it has ended",
}
_PEER: Final = {
    table.APART: "nobody tries to reach it now",
    table.CONNECTING: "it has not been reached yet",
    table.DOWN: "it is out of reach",
}


def facts_of(entry: table.Entry | None, peers: Peers) -> dict[str, Any]:
    """What the client knows of a task; on the I/O thread."""
    if entry is None:
        return {}
    peer = entry.peer
    return {
        "state": entry.state,
        "peer": peer.id,
        "peer_state": peer.state,
        "peer_since": peer.since,
        "trouble": peer.trouble,
        "link": peers.describe(peer.id),
    }


def explain(
    future: ComputeFuture[Any],
    ask: Callable[[bytes], Request],
    where: Whereabouts,
    patience_s: float = WAIT_S,
) -> str:
    """The text.

    Args:
        future: whose task it is.
        ask: asks for the facts of an object of that id, and its endpoint for what it says: a list with a map, or None.
        where: has names for endpoints.
        patience_s: for one round of questions.
    """
    request = ask(future._id)
    answer = request.wait(patience_s)
    root = answer[0] if answer else None
    elsewhere: dict[bytes, Mapping[str, Any]] = {}
    if root is not None and not future.done():
        until = time.monotonic() + patience_s
        asked = [ask(id) for found in story.open_elsewhere(root).values() for id in found]
        for one in asked:
            other = one.wait(max(0.0, until - time.monotonic()))
            if other and other[0].get("state") != "unknown":
                elsewhere[other[0]["id"]] = other[0]
    return text(future, request.facts, root, elsewhere, where)


def text(
    future: ComputeFuture[Any],
    facts: Mapping[str, Any],
    root: Mapping[str, Any] | None,
    elsewhere: Mapping[bytes, Mapping[str, Any]],
    where: Whereabouts,
) -> str:
    """Put it into words.

    Args:
        future: whose task it is.
        facts: what the client knows.
        root: what the endpoint says of it, or None.
        elsewhere: by id, what other endpoints say of the objects that it waits for.
        where: has names for endpoints.
    """
    now = time.monotonic()
    told = bool(root) and root is not None and root.get("state") not in ("unknown", "released")
    if told and root is not None and not future.done():
        lines = story.tell(root, elsewhere, where.name_of)
    else:
        name = f" ({root['function']})" if root is not None and root.get("function") else ""
        lines = [
            f"task {future.task_id}{name} at {where.name_of(future._lane.home)}: {_state(future, facts)}"
        ]
        if told and root is not None:
            lines += [f"  {line}" for line in story.tries(root)]
    if facts:
        lines.append(f"  from here {_link(facts, where, now)}")
        if root is None and not future.done() and facts["peer_state"] == table.UP:
            lines.append(f"  it did not say within {duration(WAIT_S)} how the task is")
    return "\n".join(lines)


def _state(future: ComputeFuture[Any], facts: Mapping[str, Any]) -> str:
    if future.cancelled():
        return "cancelled"
    if not future.done():
        return _HERE[facts["state"]] if facts else "pending"
    text = "done"
    raw = future._raw
    if future._exception is not None:
        text = f"failed: {type(future._exception).__name__}: {future._exception}"
    elif type(raw) is list and len(raw) > 1:
        text = f"failed: {raw[1]}" if raw[0] == "raised" else f"failed: {raw[0]}: {raw[1]}"
    elif future.size_bytes is not None:
        text = f"done, a value of {future.size_bytes:,} bytes"
    record = future.record
    if record is not None and record.started_s is not None and record.ended_s is not None:
        text += f"; it ran {duration(record.ended_s - record.started_s)} on worker {record.worker}"
        if record.attempts > 1:
            text += f", in attempt {record.attempts}"
        if record.pulled_bytes:
            moved = ", ".join(f"{size(moved)} by {way}" for way, moved in record.pulled_bytes.items())
            text += f"; its arguments came from elsewhere: {moved}"
    return text


def _link(facts: Mapping[str, Any], where: Whereabouts, now: float) -> str:
    name = where.name_of(facts["peer"])
    link = facts["link"]
    if facts["peer_state"] == table.UP:
        since = link.get("since")
        ago = "" if since is None else f" since {duration(now - since)}"
        waiting = link.get("pending") or 0
        left = f"; {count(waiting, 'message')} not acknowledged" if waiting else ""
        rtt = f", round trip {duration(link['rtt_s'])}" if link.get("rtt_s") is not None else ""
        return f"{name} is reached by {link.get('carrier')}{ago}{rtt}{left}{story.in_vain(link)}"
    said = f"{name}: {_PEER[facts['peer_state']]}, since {duration(now - facts['peer_since'])}"
    if facts["trouble"]:
        said += f" ({facts['trouble']})"
    return said + story.in_vain(link)
