"""Asking endpoints a question from outside: for commands, which are a party only for the time of one answer.

    records ── candidates ──► Peers ◄──► carrier ◄── EXPLAIN, STATUS / EXPLAINED, STATUS_IS ──► agents

A client with the user's key, one session with each endpoint, one message in each. All endpoints are asked at once, so that
one which does not answer costs nobody but itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from gcref import config, ids
from gcref.brains import peers_events as pe
from gcref.brains.peers import Peers
from gcref.carriers import keys
from gcref.carriers.base import FdReady
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.directory.records import EndpointRecord
from gcref.errors import AuthError, ConfigError, EndpointLostError, GcrefError, VersionMismatchError
from gcref.wire import messages as m

ANSWER_S: Final = 5.0
"""How long an agent may take to answer; its loop never waits, so it is frozen or away when it does not."""

_ANSWERS: Final = frozenset((m.STATUS_IS, m.EXPLAINED))


def ask(record: EndpointRecord, question: list[Any], *, timeout_s: float = ANSWER_S) -> Any:
    """Ask one endpoint.

    Args:
        record: of the endpoint.
        question: `[STATUS, 1]` or `[EXPLAIN, 1, ids]`.
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
    questions: Mapping[EndpointRecord, list[Any]], *, timeout_s: float = ANSWER_S
) -> dict[bytes, Any]:
    """Ask several endpoints at once.

    Returns:
        For the id of each endpoint what its answer carries, or the error that `ask` would raise.
    """
    pair = keys.load_or_create(config.home() / "keys" / "user.key")
    carrier = ZeroMQCarrier(pair, {})
    try:
        return _Conversation(carrier, pair.public, questions).run(time.monotonic() + timeout_s)
    finally:
        carrier.close()


class _Conversation:
    """The questions that are under way, and what has come of them."""

    def __init__(
        self, carrier: ZeroMQCarrier, key: bytes, questions: Mapping[EndpointRecord, list[Any]]
    ) -> None:
        now = time.monotonic()
        # We listen nowhere: only the endpoints themselves, whose keys we expect, are ever judged here.
        me = pe.Identity(ids.new_id(), pe.CLIENT, key, time.time_ns() // 1000)
        self._carrier = carrier
        self._peers = Peers(me, lambda _key, _hello: pe.PEER, now)
        self._open: dict[bytes, EndpointRecord] = {}
        self._ways: dict[bytes, list[pe.Candidate]] = {}
        self._refusals: dict[bytes, list[str]] = {}  # each is about one way; another one may let us in
        self._answers: dict[bytes, Any] = {}
        self._todo: list[Any] = []
        allowed = config.carriers_allowed()
        for record, question in questions.items():
            ways = record.candidates(allowed)
            if not ways:
                self._answers[record.id] = ConfigError(
                    f"no allowed way leads to endpoint {record.name!r}; GCREF_CARRIERS or config.toml leaves out "
                    "what it offers",
                    key="carriers",
                    remedy="allow ipc or direct",
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
        return bool(refusals) and (at_last or len(refusals) >= len(self._ways[party]))

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
