"""How an endpoint is: asks its agent (STATUS) and puts the answer into words.

The command is a party like any other, for the time of one question: a client with the user's key, one session, one message.

    record ── candidates ──► Peers ◄──► carrier ◄── STATUS / STATUS_IS ──► agent
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from gcref import config, ids
from gcref.brains import peers_events as pe
from gcref.brains.peers import Peers
from gcref.carriers import keys
from gcref.carriers.base import FdReady
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.directory.records import EndpointRecord
from gcref.errors import AuthError, ConfigError, EndpointLostError, VersionMismatchError
from gcref.wire import messages as m

ANSWER_S: Final = 5.0
"""How long an agent may take to answer; its loop never waits, so it is frozen or away when it does not."""

_LINKS_SHOWN: Final = 20


def ask(record: EndpointRecord, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Ask an endpoint's agent how it is.

    Raises:
        ConfigError: no way to it is allowed here.
        AuthError: it does not know our key.
        VersionMismatchError: it speaks another protocol.
        EndpointLostError: it does not answer.
    """
    candidates = record.candidates(config.carriers_allowed())
    if not candidates:
        raise ConfigError(
            f"no allowed way leads to endpoint {record.name!r}; GCREF_CARRIERS or config.toml leaves out what it offers",
            key="carriers",
            remedy="allow ipc or direct",
        )
    pair = keys.load_or_create(config.home() / "keys" / "user.key")
    carrier = ZeroMQCarrier(pair, {})
    try:
        return _converse(carrier, pair.public, record, candidates, time.monotonic() + timeout_s)
    finally:
        carrier.close()


def _converse(
    carrier: ZeroMQCarrier,
    key: bytes,
    record: EndpointRecord,
    candidates: list[pe.Candidate],
    deadline: float,
) -> dict[str, Any]:
    now = time.monotonic()
    # We listen nowhere: only the endpoint itself, whose key we expect, is ever judged here.
    me = pe.Identity(ids.new_id(), pe.CLIENT, key, time.time_ns() // 1000)
    peers = Peers(me, lambda _key, _hello: pe.PEER, now)
    todo = peers.handle(pe.Know(record.id, candidates, now))
    peers.send(record.id, [m.STATUS, 1])
    refusals: list[str] = []  # each is about one way; another one may let us in
    while True:
        for instruction in [*todo, *peers.flush(now)]:
            match instruction:
                case pe.Dial():
                    carrier.dial(instruction.link, instruction.address, instruction.server_key)
                case pe.Transmit():
                    carrier.send(instruction.link, instruction.frame)
                case pe.Hangup():
                    carrier.hangup(instruction.link)
                case pe.Deliver():
                    for message in instruction.messages:
                        if message[0] == m.STATUS_IS:
                            for last in peers.handle(pe.Forget(record.id)):
                                if isinstance(last, pe.Transmit):
                                    carrier.send(last.link, last.frame)
                            return dict(message[2])
                case pe.AuthRefused():
                    refusals.append(instruction.message)
                case pe.Mismatch():
                    raise VersionMismatchError(f"endpoint {record.name!r}: {instruction.message}")
                case _:
                    pass
        if len(refusals) >= len(candidates) or (refusals and now >= deadline):
            raise AuthError(f"endpoint {record.name!r}: {refusals[0]}")
        if now >= deadline:
            ways = ", ".join(address for _carrier, address, _key in candidates)
            raise EndpointLostError(
                f"endpoint {record.name!r} does not answer (tried {ways})", endpoint_id=ids.text(record.id)
            )
        until = min(deadline, peers.deadline if peers.deadline is not None else deadline)
        todo = []
        for event in carrier.poll(max(0.0, until - time.monotonic())):
            if not isinstance(event, FdReady):
                todo += peers.handle(event)
        now = time.monotonic()
        todo += peers.handle(pe.Tick(now))


def as_json(record: EndpointRecord, facts: Mapping[str, Any] | None) -> str:
    """Everything that is known, as JSON; ids as text."""
    alive = record.alive()
    return json.dumps({"record": record.as_json(), "alive": alive, "agent": facts}, indent=1, default=_plain)


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
    yield _line("since", _since(facts["started_unix_s"]))
    for title, address in zip(("reached by", *("",) * len(record.control)), record.control, strict=False):
        yield _line(title, address)
    dispatch, counts, store = facts["dispatch"], facts["tasks"], facts["store"]
    states = Counter(worker["state"] for worker in dispatch["workers"])
    yield _line(
        "workers", ", ".join(f"{count} {name}" for name, count in sorted(states.items())) or "none yet"
    )
    running = sum(worker["running"] is not None for worker in dispatch["workers"])
    yield _line(
        "tasks now",
        f"{dispatch['queued']} queued, {running} running, {dispatch['blocked']} waiting for others",
    )
    ended = ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "cancelled", "lost"))
    yield _line("tasks ever", f"{counts['submitted']} submitted, {ended}")
    yield _line(
        "store",
        f"{_size(store['used_bytes'])} of {_size(store['limit_bytes'])} in {store['objects']} objects, "
        f"{_size(store['pooled_bytes'])} kept for reuse, {_size(store['disk_bytes'])} on disk",
    )
    yield _line("journal", _size(facts["journal_bytes"]))
    dropped = ", ".join(
        f"{count} {kind}" for kind, count in facts.get("dropped_packets", {}).items() if count
    )
    yield _line("refused", f"{facts['refused_messages']} messages; packets dropped: {dropped or 'none'}")
    yield from _links(facts["links"])


def _links(links: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield _line("links", str(len(links)))
    for party, link in list(links.items())[:_LINKS_SHOWN]:
        told = [str(link["kind"] or "unknown"), f"by {link['carrier']}" if link["up"] else "away"]
        if link["rtt_s"] is not None:
            told.append(f"round trip {1000 * link['rtt_s']:.1f} ms")
        if link["pending"]:
            told.append(
                f"{link['pending']} messages to go, {_size(link['unacked_bytes'] + link['queued_bytes'])}"
            )
        told += [
            f"{way['carrier']} {way['address']}: {way['error']}" for way in link["links"] if way.get("error")
        ]
        yield f"    {party}  {', '.join(told)}"
    if len(links) > _LINKS_SHOWN:
        yield f"    … and {len(links) - _LINKS_SHOWN} more (--json shows all)"


def _line(title: str, text: str) -> str:
    return f"  {title:<11} {text}"


def _since(unix_s: float) -> str:
    minutes, seconds = divmod(max(0, int(time.time() - unix_s)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    ago = [f"{count} {unit}" for count, unit in parts if count] or ["0 s"]
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(unix_s))} ({' '.join(ago[:2])})"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return ids.text(value) if len(value) == 16 else value.hex()
    return str(value)
