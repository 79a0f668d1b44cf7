"""Reaching other parties: finding their ways, losing them, giving them up.

    message for a home ─► known? ── no ─► its record in GCREF_HOME ── none ─► the hub (meanwhile the message is kept)
                            └─ yes ─► said                  └─ dialled            └─ dialled, or HomeLost
    PeerDown ─► away ── its record is looked at now and then ──► PeerUp
                  └── too long ─► HomeLost, PartyGone

Rules:
    - Where the hub has a part, a refusal is believed only after a while: keys of new users and endpoints reach
      the others a moment later than their addresses, and of several ways a wrong one may answer first.
    - Nothing is said to an endpoint before its owner key is known. Whoever has come in as that endpoint with another key, while
      nobody could tell, is put out then.
    - A refusal counts only against whom we dial ourselves. By mail anybody can claim to be anybody, and be refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

from endpoint_worker.agent.functions import Functions
from endpoint_worker.agent.guests import Guests
from endpoint_worker.agent.memory import Memory
from endpoint_worker.agent.neighbours import Neighbours
from endpoint_worker.agent.outbox import Outbox
from endpoint_worker.agent.presence import CLIENT, ENDPOINT, Presence
from gcref import ids
from gcref.brains import peers_events as pe
from gcref.brains import resolver_events as ev
from gcref.brains.link import STATE_NAMES, WAITING
from gcref.brains.peers import Peers
from gcref.carriers.bulk.thread import BulkThread
from gcref.directory.records import EndpointRecord
from gcref.errors import GcrefError, LostReason
from gcref.objects import failure as failures

log = logging.getLogger("gcref.agent")

REFUSED_S: Final = 10.0
"""How long a home that refuses us, or that we refuse, may take to think better of it where there is a hub, seconds."""

ASK_HUB_AGAIN_S: Final = 10.0
"""How often the hub is asked about an endpoint that is away, seconds."""


class Lookup(Protocol):
    """What is asked of the hub."""

    def find(
        self, endpoint: bytes, done: Callable[[EndpointRecord | GcrefError, float], None], retry_for_s: float
    ) -> None:
        """Look an endpoint up; `done` is called in the control loop, with the record or why there is none, and the time."""
        ...

    def refresh(self) -> None:
        """Ask for the present list of allowed keys, unless that was done a moment ago."""
        ...


class Reaching:
    """Knows how other parties are reached, and what follows when they are not.

    Args:
        name: our endpoint's.
        peers: the sessions.
        bulk: dials the same parties for bytes.
        neighbours: finds endpoints.
        presence: who is away.
        functions, guests, memory, out: parts of the agent that know parties.
        is_worker: whether a party is the SDK inside one of our workers.
        hub: where endpoints are looked up that this machine does not know; None: there is none.
        endpoint_lost_s: how long that may take, seconds.
        take: takes an event of the resolver (and writes it down).
        obey: does what the sessions answer.

    Attributes:
        owner_keys: whose bytes are taken only from a link that proved this key (z85).
        deadline: when `tick` is due, monotonic seconds; None: never.
    """

    def __init__(
        self,
        *,
        name: str,
        peers: Peers,
        bulk: BulkThread,
        neighbours: Neighbours,
        presence: Presence,
        functions: Functions,
        is_worker: Callable[[bytes], bool],
        guests: Guests,
        memory: Memory,
        out: Outbox,
        hub: Lookup | None,
        endpoint_lost_s: float,
        take: Callable[[Any, float], None],
        obey: Callable[[list[Any], float], None],
    ) -> None:
        self.owner_keys: dict[bytes, bytes] = {}
        self._name = name
        self._peers = peers
        self._bulk = bulk
        self._neighbours = neighbours
        self._presence = presence
        self._functions = functions
        self._is_worker = is_worker
        self._guests = guests
        self._memory = memory
        self._out = out
        self._hub = hub
        self._endpoint_lost_s = endpoint_lost_s
        self._take = take
        self._obey = obey
        self._asked: dict[bytes, float | None] = {}  # of the hub: when it answered; None: not yet
        self._held: dict[bytes, list[list[Any]]] = {}  # for endpoints whose key is not known yet
        self._refusals: dict[
            bytes, tuple[float, str]
        ] = {}  # until when they may be taken back; what was said

    # ------------------------------------------------------------------------------------------ to other endpoints

    def to_home(self, home: bytes, message: list[Any], now: float) -> None:
        """Send to another endpoint; find it first, when it is new to us."""
        if not self._neighbours.known(home) and home not in self._asked:
            if self._neighbours.find(home):
                self._reach(home, now)
            elif self._hub is not None:
                if not self._neighbours.is_proven(home):
                    self._held[home] = []
                self._ask(home)
            else:
                text = f"endpoint {ids.text(home)} is not known at {self._name}: its record is not in GCREF_HOME there"
                self._take(ev.HomeLost(home, failures.make("NotFoundError", text)), now)
                return
            if not self._peers.is_up(home):  # else it has found us before
                self._presence.is_away(home, ENDPOINT, now)
        held = self._held.get(home)
        if held is not None:
            held.append(message)
        else:
            self._out.say(home, message)

    def is_unproven(self, party: bytes) -> bool:
        """Whether it is an endpoint that we need, and whose owner key we do not know yet."""
        return party in self._held

    def dial_back(self, told: pe.DialBack, now: float) -> None:
        """Somebody whom we reach by mail says where else it could be reached."""
        if self._neighbours.has_told(told.party, told.owner_key, told.control, told.bulk):
            self._dial(told.party, now)

    def _reach(self, home: bytes, now: float) -> None:
        """Dial an endpoint that was found just now."""
        key = self._peers.owner_of(home)
        if key is not None and self._neighbours.is_somebody_else(home, key):
            log.warning("somebody with the key %s has come in as endpoint %s", key.decode(), ids.text(home))
            self._take(ev.PartyGone(home, now), now)
            self._forget(home, now)
            self._presence.is_away(home, ENDPOINT, now)
        self._dial(home, now)

    def _dial(self, home: bytes, now: float) -> None:
        ways = self._neighbours.ways(home)
        self._obey(self._peers.handle(pe.Know(home, ways.control, now)), now)
        # Endpoints of one GCREF_HOME trust each other as their owner.
        self._bulk.reach(home, ways.bulk, "user" if self._neighbours.is_here(home) else None)

    def _ask(self, home: bytes) -> None:
        assert self._hub is not None, "there is nobody to ask"
        self._asked[home] = None
        self._hub.find(
            home, lambda told, now: self._looked_up(home, told, now), retry_for_s=self._endpoint_lost_s
        )

    def _looked_up(self, home: bytes, told: EndpointRecord | GcrefError, now: float) -> None:
        if home not in self._asked:
            return  # it was given up meanwhile
        self._asked[home] = now
        held = self._held.pop(home, None)
        if isinstance(told, EndpointRecord):
            if self._neighbours.use(told):
                self._reach(home, now)
            for message in held or ():
                self._out.say(home, message)
        elif not self._neighbours.known(home) and (held is not None or not self._peers.is_up(home)):
            log.warning("endpoint %s cannot be looked up: %s", ids.text(home), told)
            text = f"endpoint {ids.text(home)} is not known at {self._name}, and the hub says: {told}"
            self._take(ev.HomeLost(home, failures.make(type(told).__name__, text)), now)
            self._presence.is_back(home)
            self._functions.forget_sent(home)
            del self._asked[home]
            self._obey(self._peers.handle(pe.Forget(home)), now)

    # ------------------------------------------------------------------------------------------ they come and go

    def peer_up(self, up: pe.PeerUp, now: float) -> None:
        """A party can be talked to."""
        self._presence.is_back(up.party)
        self._refusals.pop(up.party, None)
        if up.fresh and self._neighbours.known(up.party):
            self._take(ev.HomeRestarted(up.party), now)  # it may have told us to forget something, in vain

    def peer_down(self, down: pe.PeerDown, now: float) -> None:
        """A party cannot be talked to any more."""
        if self._guests.is_gone(down.party):
            self._obey(self._peers.handle(pe.Forget(down.party)), now)
        elif not self._is_worker(down.party):  # else the end of its process tells
            self.is_away(down.party, now)

    def is_away(self, party: bytes, now: float) -> None:
        """A party that something rests on has no link."""
        is_home = self._neighbours.known(party) or party in self._asked
        self._presence.is_away(party, ENDPOINT if is_home else CLIENT, now)

    def peer_reset(self, reset: pe.PeerReset, now: float) -> None:
        """A party has lost what it had acknowledged."""
        text = f"endpoint {ids.text(reset.party)} started anew and has lost what it knew"
        self._functions.forget_sent(reset.party)
        self._lose_home(reset.party, text, now)
        self._take(ev.PartyGone(reset.party, now), now)

    def refused(self, refused: pe.AuthRefused, now: float) -> None:
        """A key was refused, here or there."""
        log.warning("AuthError: %s", refused.message)
        party = refused.party
        if party is None or self._peers.is_up(party) or not self._is_refused(party):
            return
        if self._hub is None:
            self._give_up(party, "AuthError", refused.message, now)
        elif party not in self._refusals:
            self._refusals[party] = (now + REFUSED_S, refused.message)
            self._hub.refresh()

    def mismatch(self, mismatch: pe.Mismatch, now: float) -> None:
        """A party speaks another version."""
        log.warning("VersionMismatchError: %s", mismatch.message)
        party = mismatch.party
        if party is not None and not self._peers.is_up(party) and self._is_refused(party):
            self._give_up(party, "VersionMismatchError", mismatch.message, now)

    def _is_refused(self, party: bytes) -> bool:
        """Whether one of the ways that we dial was refused."""
        links = self._peers.describe(party).get("links", ())
        return any(link["dialled"] and link["state"] == STATE_NAMES[WAITING] for link in links)

    def _give_up(self, home: bytes, kind: str, text: str, now: float) -> None:
        self._take(ev.HomeLost(home, failures.make(kind, text)), now)

    def _lose_home(self, home: bytes, text: str, now: float) -> None:
        reason = LostReason.HOME_LOST.value
        self._take(ev.HomeLost(home, failures.make("EndpointLostError", text, reason=reason)), now)

    # ------------------------------------------------------------------------------------------------------ time

    @property
    def deadline(self) -> float | None:
        """When `tick` is due; see the class."""
        due = self._presence.deadline
        if self._refusals:
            until = next(iter(self._refusals.values()))[0]
            due = until if due is None else min(due, until)
        return due

    def tick(self, now: float) -> None:
        """See to who was away for too long, and to who may be found elsewhere."""
        for party, (until, text) in list(self._refusals.items()):
            if until > now:
                break
            del self._refusals[party]
            self._give_up(party, "AuthError", text, now)
        given_up, sought = self._presence.due(now)
        for party, kind in given_up:
            if kind == ENDPOINT:
                self._lose_home(party, f"endpoint {ids.text(party)} is out of reach", now)
            self.party_gone(party, now)
        for party in sought:
            if self._neighbours.known(party) and self._neighbours.find_again(party):
                self._dial(party, now)
            elif self._hub is not None and not self._neighbours.is_here(party):
                answered_at = self._asked.get(party, 0.0)
                if answered_at is not None and now - answered_at >= ASK_HUB_AGAIN_S:
                    self._ask(party)

    def party_gone(self, party: bytes, now: float) -> None:
        """It is not expected to come back: what it held falls."""
        self._take(ev.PartyGone(party, now), now)
        self._asked.pop(party, None)
        self._held.pop(party, None)
        self._refusals.pop(party, None)
        if self._neighbours.forget(party):  # whoever needs it again looks for it again
            self._bulk.disconnect(party)
        self._forget(party, now)

    def _forget(self, party: bytes, now: float) -> None:
        """Should we meet again, it hears that we forgot."""
        self._functions.forget_sent(party)
        self.owner_keys.pop(party, None)
        self._memory.forget(party)
        self._guests.forget(party)
        self._obey(self._peers.handle(pe.Forget(party)), now)
