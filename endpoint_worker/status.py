"""How an endpoint is: asks its agent (STATUS) and puts the answer into words.

    polaris: running, process 4711
      tasks now    2 running, 1 sent ahead, 12 queued, 40 waiting for arguments
      WORKER     PID   STATE  FOR    RUNS
      polaris/1  4712  busy   12 s   simulate  0198…
      LINK       IS        BY      SINCE  ROUND TRIP  BYTES IN        BYTES OUT
      midway     endpoint  direct  2 min  0.3 ms      1.0 GiB, 80 MiB/s  -

Moments come as ages, so that the clocks of two machines need not agree.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from gcref import ids
from gcref.directory import asking, records
from gcref.directory.records import EndpointRecord
from gcref.wire import messages as m
from gcref.words import count, duration, size

WORKERS_SHOWN: Final = 64
LINKS_SHOWN: Final = 20


def ask(record: EndpointRecord, *, timeout_s: float = asking.ANSWER_S) -> dict[str, Any]:
    """Ask an endpoint's agent how it is.

    Raises:
        ConfigError: no way to it is allowed here.
        AuthError: it does not know our key.
        VersionMismatchError: it speaks another protocol.
        EndpointLostError: it does not answer.
    """
    return dict(asking.ask(record, [m.STATUS, 1], timeout_s=timeout_s))


def as_json(record: EndpointRecord, facts: Mapping[str, Any] | None) -> str:
    """Everything that is known, as JSON; ids as text."""
    told = {"record": record.as_json(), "alive": record.alive(), "agent": facts}
    return json.dumps(told, indent=1, default=_plain)


def lines(record: EndpointRecord, state: str, facts: Mapping[str, Any] | None) -> Iterator[str]:
    """What a person wants to know, line by line.

    Args:
        record: the endpoint's record.
        state: how it is, in a few words.
        facts: the agent's answer; None: there was none.
    """
    yield f"{record.name}: {state}"
    yield _line("id", ids.text(record.id))
    if facts is None:
        return
    started = facts["started_unix_s"]
    day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    yield _line("since", f"{day} ({duration(time.time() - started)} ago)")
    ways = [*record.control, *(["its mailbox at the broker"] if record.mailbox else [])]
    for title, address in zip(("reached by", *("",) * len(ways)), ways, strict=False):
        yield _line(title, address)
    if facts.get("hub") is not None:
        yield from _hub(facts["hub"])
    yield from _tasks(facts)
    store = facts["store"]
    yield _line(
        "store",
        f"{size(store['used_bytes'])} of {size(store['limit_bytes'])} used by {count(store['objects'], 'object')}, "
        f"{size(store['pooled_bytes'])} kept for reuse, {size(store['disk_bytes'])} on disk",
    )
    yield _line("journal", size(facts["journal_bytes"]) if facts["journal_bytes"] else "none")
    for trouble in facts.get("journal_troubles") or ():
        yield _line("", str(trouble))
    dropped = {kind: number for kind, number in facts.get("dropped_packets", {}).items() if number}
    if facts["refused_messages"] or dropped:
        packets = ", ".join(f"{number} {kind}" for kind, number in dropped.items()) or "none"
        yield _line("refused", f"{count(facts['refused_messages'], 'message')}; packets dropped: {packets}")
    yield from _workers(facts["dispatch"])
    yield from _links(facts["links"])


def _hub(hub: Mapping[str, Any]) -> Iterator[str]:
    if hub["registered_unix_s"] is not None:
        since = duration(max(0.0, time.time() - hub["registered_unix_s"]))
        keys = "; lets in whom it names" if hub["trusted"] else ""
        yield _line("hub", f"{hub['url']}, registered by {hub['owner']} {since} ago{keys}")
    else:
        yield _line("hub", f"{hub['url']}, not registered")
    if hub["error"] is not None:
        yield _line("", str(hub["error"]))
    mailbox = hub["mailbox"]
    if mailbox is None:
        return
    told = "up" if mailbox.get("up") else f"down: {mailbox.get('error')}"
    if waiting := mailbox.get("waiting_bytes"):
        told += f", {size(waiting)} waiting to leave"
    if dropped := {kind: number for kind, number in (mailbox.get("dropped") or {}).items() if number}:
        told += f"; dropped: {', '.join(f'{number} {kind}' for kind, number in dropped.items())}"
    yield _line("mailbox", told)


def _tasks(facts: Mapping[str, Any]) -> Iterator[str]:
    dispatch, counts, rates = facts["dispatch"], facts["tasks"], facts["rates"]
    workers = dispatch["workers"]
    running = sum(worker["running"] is not None for worker in workers)
    ahead = sum(worker["held"] for worker in workers) - running
    ended = sum(counts[name] for name in ("done", "failed", "cancelled", "lost"))
    waiting = counts["submitted"] - ended - running - ahead - dispatch["queued"]
    now = [f"{running} running"]
    if dispatch["blocked"]:
        now[0] += f" ({dispatch['blocked']} of them waiting inside for other tasks)"
    now += [f"{ahead} sent ahead"] if ahead > 0 else []
    now += [f"{dispatch['queued']:,} queued", f"{max(0, waiting):,} waiting for arguments"]
    yield _line("tasks now", ", ".join(now))
    ever = ", ".join(f"{counts[name]:,} {name}" for name in ("done", "failed", "cancelled", "lost"))
    yield _line("tasks ever", f"{counts['submitted']:,} submitted, {ever}")
    ended_s = sum(rates[name] for name in ("done", "failed", "cancelled", "lost"))
    over = duration(rates["over_s"])
    yield _line(
        "rates", f"{_rate(rates['submitted'])} submitted, {_rate(ended_s)} ended (over the last {over})"
    )


def _workers(dispatch: Mapping[str, Any]) -> Iterator[str]:
    workers: Sequence[Mapping[str, Any]] = dispatch["workers"]
    yield ""
    rows = [("WORKER", "PID", "STATE", "FOR", "RUNS")]
    for worker in workers[:WORKERS_SHOWN]:
        told = "-"
        if worker["running"] is not None:
            told = f"{worker.get('function') or 'a task'}  {ids.text(worker['running'])}"
            if worker.get("attempt", 1) > 1:
                told += f"  attempt {worker['attempt']}"
            if worker["held"] > 1:
                told += f"  and {worker['held'] - 1} more to run next"
        elif worker["held"]:
            told = f"{count(worker['held'], 'short task')}"
        for_s = worker.get("for_s")
        rows.append(
            (
                worker["worker"],
                str(worker.get("pid") or "?"),
                worker["state"],
                "" if for_s is None else duration(for_s),
                told,
            )
        )
    yield from _table(rows)
    hidden = len(workers) - WORKERS_SHOWN
    if hidden > 0:
        yield f"  … and {hidden} more (--json shows all)"
    changing = [f"{dispatch[name]} {name}" for name in ("starting", "retiring") if dispatch[name]]
    if changing:
        yield f"  {', '.join(changing)}"


def _links(links: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    names = {ids.text(record.id): record.name for record in records.list_records()}
    shown = [(party, link) for party, link in links.items() if link["up"] or link["kind"] != "client"]
    away = [link for link in links.values() if not link["up"] and link["kind"] == "client"]
    rows: list[Sequence[str]] = [("LINK", "IS", "BY", "SINCE", "ROUND TRIP", "BYTES IN", "BYTES OUT", "")]
    for party, link in shown[:LINKS_SHOWN]:
        rows.append(_link(party, link, names))
    yield ""
    yield from _table(rows) if shown else ("  no links",)
    if len(shown) > LINKS_SHOWN:
        yield f"  … and {len(shown) - LINKS_SHOWN} more (--json shows all)"
    if away:
        left = max((link.get("given_up_in_s") or 0.0 for link in away), default=0.0)
        kept = f"; what they wait for is kept for {duration(left)} at most" if left > 0 else ""
        yield f"  {count(len(away), 'client')} away{kept}"


def _link(party: str, link: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, ...]:
    kind = "worker" if link.get("worker") else link["kind"] or "not met yet"
    name = link.get("worker") or names.get(party) or party
    troubles = [
        f"{way['carrier']} {way['address']}: {way['error']}" for way in link["links"] if way.get("error")
    ]
    told = []
    if link["pending"]:
        told.append(
            f"{count(link['pending'], 'message')} to go ({size(link['unacked_bytes'] + link['queued_bytes'])})"
        )
    if not link["up"] and link.get("given_up_in_s") is not None:
        told.append(f"given up in {duration(link['given_up_in_s'])}")
    into, out = _moved(link.get("moved") or {})
    return (
        name,
        kind,
        str(link["carrier"]) if link["up"] else "away",
        duration(link["since_s"]) if link.get("since_s") is not None else "-",
        duration(link["rtt_s"]) if link.get("rtt_s") is not None else "-",
        into,
        out,
        "; ".join([*told, *troubles]),
    )


def _moved(moved: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    """Bytes of objects that came and went over a link, and how fast at present."""
    sums = [sum(column) for column in zip(*moved.values(), strict=True)] or [0.0] * 4
    ways = []
    for total, rate in (sums[:2], sums[2:]):
        now = f", {size(rate)}/s" if rate >= 1 else ""
        ways.append(f"{size(total)}{now}" if total else "-")
    return ways[0], ways[1]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()


def _line(title: str, text: str) -> str:
    return f"  {title:<11} {text}"


def _rate(per_s: float) -> str:
    if per_s >= 10:
        return f"{per_s:,.0f}/s"
    if per_s >= 1 or per_s == 0:
        return f"{per_s:.1f}/s" if per_s else "0/s"
    return f"{60 * per_s:.2g}/min"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return ids.text(value) if len(value) == 16 else value.hex()
    return str(value)
