"""Asking endpoints a question from outside: for commands, which are a party only for the time of one answer.

    records ── candidates ──► Peers ◄──► carrier ◄── EXPLAIN, STATUS, TRY and their answers ──► agents

A client with the user's key, one session with each endpoint, one message in each. All endpoints are asked at once, so that
one which does not answer costs nobody but itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from gcref import config, ids
from gcref.brains import peers_events as pe
from gcref.brains.peers import Peers
from gcref.carriers import keys
from gcref.carriers.base import Carrier, FdReady
from gcref.carriers.combined import Carriers
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.directory.records import EndpointRecord
from gcref.directory.visit import Visit, hub_of_user
from gcref.errors import AuthError, ConfigError, EndpointLostError, GcrefError, VersionMismatchError
from gcref.wire import messages as m

log: Final = logging.getLogger("gcref.directory")

ANSWER_S: Final = 5.0
"""How long an agent may take to answer; its loop never waits, so it is frozen or away when it does not."""

_ANSWERS: Final = frozenset((m.STATUS_IS, m.EXPLAINED, m.TRIED))


def ask(record: EndpointRecord, question: list[Any], *, timeout_s: float = ANSWER_S) -> Any:
    """Ask one endpoint. Over the broker too, where the settings name a hub.

    Args:
        record: of the endpoint.
        question: `[STATUS, 1]`, `[EXPLAIN, 1, ids]` or `[TRY, 1, target, record]`.
        timeout_s: for the answer, seconds.

    Returns:
        What the answer carries.

    Raises:
        ConfigError: no way to it is allowed here.
        AuthError: it does not know our key.
        VersionMismatchError: it speaks another protocol.
        EndpointLostError: it does not answer.
    """
    (answer,) = ask_all({record: question}, timeout_s=timeout_s).values()
    if isinstance(answer, GcrefError):
        raise answer
    return answer


def ask_all(
    questions: Mapping[EndpointRecord, list[Any]],
    *,
    timeout_s: float = ANSWER_S,
    visit: Visit | None = None,
) -> dict[bytes, Any]:
    """Ask several endpoints at once.

    Args:
        questions: what to ask of whom.
        timeout_s: for the answers, seconds.
        visit: of whom asks; None: the user's own, for this once.

    Returns:
        For the id of each endpoint what its answer carries, or the error that `ask` would raise.
    """
    allowed = config.client_config().carriers
    ways = {record.id: _ways_to(record, allowed) for record in questions}
    with ExitStack() as closing:
        if visit is None:
            by_broker = any(way[0] == "broker" for some in ways.values() for way in some)
            pair = keys.load_or_create(config.home() / "keys" / "user.key")
            visit = closing.enter_context(Visit(pair, hub_of_user() if by_broker else None, "gcref"))
        me, carrier = _carrier_for(visit, ways)
        closing.callback(carrier.close)
        return converse(
            carrier,
            me,
            visit.pair.public,
            questions,
            ways,
            timeout_s=timeout_s,
            patient=visit.hub is not None,
        )


def _ways_to(record: EndpointRecord, allowed: frozenset[str]) -> list[pe.Candidate]:
    """How to reach an endpoint. One that is reached by mail alone may live on this machine: then we need no mail to ask it."""
    ways = record.candidates(allowed)
    local = record.local_socket() if all(way[0] == "broker" for way in ways) else None
    return ways if local is None else [local]


def _carrier_for(visit: Visit, ways: dict[bytes, list[pe.Candidate]]) -> tuple[bytes, Carrier]:
    """What moves the messages, and who we are; where there is no mailbox, the ways over the broker are taken out."""
    zeromq = ZeroMQCarrier(visit.pair, {})
    if visit.hub is not None and any(way[0] == "broker" for some in ways.values() for way in some):
        try:
            party, mailbox = visit.open_mail()
        except GcrefError as error:
            log.info("no mailbox: %s", error)
        else:
            return party, Carriers(zeromq, mailbox)
    for party, some in ways.items():
        ways[party] = [way for way in some if way[0] != "broker"]
    return ids.new_id(), zeromq


def converse(
    carrier: Carrier,
    me: bytes,
    key: bytes,
    questions: Mapping[EndpointRecord, list[Any]],
    ways: Mapping[bytes, list[pe.Candidate]],
    *,
    timeout_s: float = ANSWER_S,
    patient: bool = False,
) -> dict[bytes, Any]:
    """Ask over the ways that are given, and no others.

    Args:
        carrier: moves the messages; it stays open.
        me: the id of the party that asks.
        key: its owner key, z85.
        questions: what to ask of whom.
        ways: by the ids of those, how to reach them.
        timeout_s: for all answers, seconds.
        patient: whoever refuses our key may hear of it from the hub a moment later, and is asked again until the time is up.

    Returns:
        As `ask_all`.
    """
    return _Conversation(carrier, me, key, questions, ways, patient).run(time.monotonic() + timeout_s)


class _Conversation:
    """The questions that are under way, and what has come of them."""

    def __init__(
        self,
        carrier: Carrier,
        me: bytes,
        key: bytes,
        questions: Mapping[EndpointRecord, list[Any]],
        known: Mapping[bytes, list[pe.Candidate]],
        patient: bool,
    ) -> None:
        now = time.monotonic()
        # We listen nowhere: only the endpoints themselves, whose keys we expect, are ever judged here.
        identity = pe.Identity(me, pe.CLIENT, key, time.time_ns() // 1000)
        self._carrier = carrier
        self._patient = patient
        self._peers = Peers(identity, lambda _key, _hello: pe.PEER, now)
        self._open: dict[bytes, EndpointRecord] = {}
        self._ways: dict[bytes, list[pe.Candidate]] = {}
        self._refusals: dict[bytes, list[str]] = {}  # each is about one way; another one may let us in
        self._answers: dict[bytes, Any] = {}
        self._todo: list[Any] = []
        for record, question in questions.items():
            ways = known[record.id]
            if not ways:
                self._answers[record.id] = ConfigError(
                    f"no allowed way leads to endpoint {record.name!r}; GCREF_CARRIERS or config.toml leaves out "
                    "what it offers, or it has only a mailbox, and the hub gives us none",
                    key="carriers",
                    remedy="allow ipc or direct, or name a hub",
                )
                continue
            self._open[record.id] = record
            self._ways[record.id] = ways
            self._todo += self._peers.handle(pe.Know(record.id, ways, now))
            self._peers.send(record.id, question)

    def run(self, deadline: float) -> dict[bytes, Any]:
        """Wait for the answers, and say good-bye, so that nobody waits for us."""
        try:
            return self._wait(deadline)
        finally:
            for instruction in self._peers.close(time.monotonic()):
                self._obey(instruction)

    def _wait(self, deadline: float) -> dict[bytes, Any]:
        now = time.monotonic()
        while True:
            todo, self._todo = self._todo, []
            for instruction in [*todo, *self._peers.flush(now)]:
                self._obey(instruction)
            for party in [party for party in self._open if self._is_refused(party, now >= deadline)]:
                record = self._open.pop(party)
                self._answers[party] = AuthError(f"endpoint {record.name!r}: {self._refusals[party][0]}")
            if not self._open:
                return self._answers
            if now >= deadline:
                return self._answers | {party: self._lost(record) for party, record in self._open.items()}
            due = self._peers.deadline
            until = deadline if due is None else min(deadline, due)
            for event in self._carrier.poll(max(0.0, until - time.monotonic())):
                if not isinstance(event, FdReady):
                    self._todo += self._peers.handle(event)
            now = time.monotonic()
            self._todo += self._peers.handle(pe.Tick(now))

    def _is_refused(self, party: bytes, at_last: bool) -> bool:
        refusals = self._refusals.get(party, ())
        all_refuse = len(refusals) >= len(self._ways[party]) and not self._patient
        return bool(refusals) and (at_last or all_refuse)

    def _lost(self, record: EndpointRecord) -> EndpointLostError:
        ways = ", ".join(address for _carrier, address, _key in self._ways[record.id])
        text = f"endpoint {record.name!r} does not answer (tried {ways})"
        return EndpointLostError(text, endpoint_id=ids.text(record.id))

    def _obey(self, instruction: Any) -> None:
        match instruction:
            case pe.Dial():
                self._carrier.dial(instruction.link, instruction.address, instruction.server_key)
            case pe.Transmit():
                self._carrier.send(instruction.link, instruction.frame)
            case pe.Hangup():
                self._carrier.hangup(instruction.link)
            case pe.Deliver():
                for message in instruction.messages:
                    if message[0] in _ANSWERS:
                        self._end(instruction.party, message[2])
            case pe.AuthRefused() if instruction.party is not None:
                self._refusals.setdefault(instruction.party, []).append(instruction.message)
            case pe.Mismatch() if instruction.party in self._open:
                name = self._open[instruction.party].name
                self._end(
                    instruction.party, VersionMismatchError(f"endpoint {name!r}: {instruction.message}")
                )
            case _:
                pass

    def _end(self, party: bytes, answer: Any) -> None:
        if self._open.pop(party, None) is not None:
            self._answers[party] = answer
