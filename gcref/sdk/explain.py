"""What `ComputeFuture.explain` says: where a task is, what it waits for, which carrier, since when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gcref import ids
from gcref.brains import submitter_table as table

if TYPE_CHECKING:
    from gcref.brains.peers import Peers
    from gcref.sdk.future import ComputeFuture
    from gcref.sdk.whereabouts import Whereabouts

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
    facts: Mapping[str, Any],
    told: list[Mapping[str, Any]] | None,
    where: Whereabouts,
    now: float,
) -> str:
    """The text.

    Args:
        future: whose task it is.
        facts: what the client knows.
        told: what the endpoint says of it, or None.
        where: has names for endpoints.
        now: the clock of the facts, seconds.
    """
    home = where.name_of(future._lane.home)
    lines = [f"task {future.task_id} at {home}: {_state(future, facts)}"]
    if facts:
        lines.append(_link(facts, where, now))
    if told:
        lines += _endpoint(told[0], where)
    return "\n".join(f"  {line}" if number else line for number, line in enumerate(lines))


def _state(future: ComputeFuture[Any], facts: Mapping[str, Any]) -> str:
    if future.cancelled():
        return "cancelled"
    if future.done():
        size = future.size_bytes
        return "done" if size is None else f"done, a value of {size} bytes"
    return _HERE[facts["state"]] if facts else "pending"


def _link(facts: Mapping[str, Any], where: Whereabouts, now: float) -> str:
    name = where.name_of(facts["peer"])
    link = facts["link"]
    if facts["peer_state"] == table.UP:
        since = link.get("since")
        ago = "" if since is None else f" since {now - since:.1f} s"
        waiting = link.get("pending") or 0
        return f"{name} is reached by {link.get('carrier')}{ago}; {waiting} messages are not acknowledged"
    text = f"{name}: {_PEER[facts['peer_state']]}, since {now - facts['peer_since']:.1f} s"
    if facts["trouble"]:
        text += f" ({facts['trouble']})"
    for way in link.get("links", ()):
        text += f"; tried {way.get('carrier')} {way.get('address')}"
        if way.get("error"):
            text += f": {way['error']}"
    return text


def _endpoint(told: Mapping[str, Any], where: Whereabouts) -> list[str]:
    lines = [f"the endpoint says: {told.get('state', 'nothing')}"]
    if told.get("worker") is not None:
        lines[0] += f", with worker {told['worker']}"
    if told.get("attempt", 0) > 1:
        lines[0] += f", attempt {told['attempt']}"
    waits = told.get("waits_for") or ()
    if waits:
        named = ", ".join(ids.text(id) for id in waits[:5])
        more = f" and {len(waits) - 5} more" if len(waits) > 5 else ""
        lines.append(f"it waits for {named}{more}")
    if told.get("alias_of") is not None:
        lines.append(f"it is whatever {ids.text(told['alias_of'])} will be")
    if told.get("pulling"):
        lines.append("its bytes are being pulled")
    return lines
