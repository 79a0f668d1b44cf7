"""Reaching other parties: the hub's late answers, refusals that may be taken back, addresses that a party names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endpoint_worker.agent.functions import Functions
from endpoint_worker.agent.guests import Guests
from endpoint_worker.agent.memory import Memory
from endpoint_worker.agent.neighbours import Neighbours
from endpoint_worker.agent.outbox import Outbox
from endpoint_worker.agent.ports import StoreProvider, StoreSink
from endpoint_worker.agent.presence import SEEK_S, Presence
from endpoint_worker.agent.reaching import ASK_HUB_AGAIN_S, REFUSED_S, Reaching
from endpoint_worker.store import Store
from gcref.brains import peers_events as pe
from gcref.brains import resolver_events as ev
from gcref.brains.peers import Peers
from gcref.brains.resolver import Resolver
from gcref.carriers import keys
from gcref.carriers.bulk.link import BulkIdentity
from gcref.carriers.bulk.thread import BulkThread
from gcref.carriers.mail.post import address_of
from gcref.directory import pins
from gcref.directory.records import EndpointRecord
from gcref.errors import GcrefError, HubUnavailableError, NotFoundError
from gcref.wire import messages as m

ME, MIDWAY = b"p" * 16, b"m" * 16
PAIR, THEIRS = keys.generate(), keys.generate()
MESSAGE = [m.UNSUBSCRIBE, MIDWAY]
RECORD = EndpointRecord(
    id=MIDWAY, name="midway", public_key=THEIRS.public.decode(), control=("tcp://m:1",), mailbox=True, running=True
)  # fmt: skip
LOST_S = 600.0

Told = EndpointRecord | GcrefError


class Hub:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, Callable[[Told, float], None]]] = []
        self.refreshed = 0

    def find(self, endpoint: bytes, done: Callable[[Told, float], None], retry_for_s: float) -> None:
        assert retry_for_s == LOST_S
        self.asked.append((endpoint, done))

    def refresh(self) -> None:
        self.refreshed += 1

    def answer(self, told: Told, now: float) -> None:
        _, done = self.asked.pop(0)
        done(told, now)


class Agent:
    """The parts that reaching has to do with."""

    def __init__(self, home: Path, hub: Hub | None) -> None:
        self.taken: list[Any] = []
        self.obeyed: list[Any] = []
        self.peers = Peers(pe.Identity(ME, pe.ENDPOINT, PAIR.public, 1), lambda key, hello: pe.PEER)
        self.resolver = Resolver(ME, unknown_object_s=60.0, lease_s=60.0)
        functions = Functions()
        self.store = Store(home / "memory", home / "disk", 1 << 20)
        self.bulk = BulkThread(
            BulkIdentity(ME, pe.ENDPOINT, PAIR),
            StoreProvider(self.resolver, self.store, lambda party: False),
            StoreSink(self.store),
            wake=lambda: None,
        )
        self.presence = Presence(lease_s=60.0, endpoint_lost_s=LOST_S)
        self.reaching = Reaching(
            name="polaris",
            peers=self.peers,
            bulk=self.bulk,
            neighbours=Neighbours(home, frozenset(("direct", "broker"))),
            presence=self.presence,
            functions=functions,
            is_worker=lambda party: False,
            guests=Guests(),
            memory=Memory(None, self.resolver, self.peers, functions, "polaris"),
            out=Outbox(self.peers),
            hub=hub,
            endpoint_lost_s=LOST_S,
            take=lambda event, now: self.taken.append(event),
            obey=lambda instructions, now: self.obeyed.extend(instructions),
        )

    def close(self) -> None:
        self.bulk.close()
        self.store.close()

    def dialled(self) -> dict[str, int]:
        """The links that were dialled, by address."""
        return {each.address: each.link for each in self.obeyed if isinstance(each, pe.Dial)}

    def refuse(self, link: int, now: float) -> None:
        """A dialled link hears that it is not wanted."""
        for told in self.peers.handle(pe.Refused(link, now, "on purpose")):
            if isinstance(told, pe.AuthRefused):
                self.reaching.refused(told, now)

    def lost(self) -> list[list[Any]]:
        """What was said of homes that are lost."""
        return [event.failure for event in self.taken if isinstance(event, ev.HomeLost)]


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def agent(tmp_path: Path, hub: Hub) -> Iterator[Agent]:
    found = Agent(tmp_path, hub)
    yield found
    found.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Agent]:
    found = Agent(tmp_path, None)
    yield found
    found.close()


def test_without_a_hub_whom_nobody_knows_is_lost(alone: Agent) -> None:
    alone.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    assert [failure[0] for failure in alone.lost()] == ["NotFoundError"]
    assert alone.peers.pending() == 0
    assert alone.reaching.deadline is None


def test_a_message_waits_in_its_session_until_the_hub_has_answered(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    agent.reaching.to_home(MIDWAY, MESSAGE, 1.0)
    assert [endpoint for endpoint, _ in hub.asked] == [MIDWAY], "once"
    assert agent.obeyed == []
    hub.answer(RECORD, 2.0)
    assert set(agent.dialled()) == {"tcp://m:1", address_of(MIDWAY)}
    assert agent.peers.pending(MIDWAY) == 2
    assert agent.lost() == []


@pytest.mark.parametrize("error", [NotFoundError("no such endpoint"), HubUnavailableError("no answer")])
def test_whom_the_hub_does_not_find_is_lost_and_may_be_asked_for_anew(
    agent: Agent, hub: Hub, error: GcrefError
) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    hub.answer(error, 1.0)
    (failure,) = agent.lost()
    assert failure[0] == type(error).__name__
    assert str(error) in failure[1]
    assert agent.peers.pending(MIDWAY) == 0
    assert agent.reaching.deadline is None
    agent.reaching.to_home(MIDWAY, MESSAGE, 2.0)
    assert len(hub.asked) == 1


def test_an_answer_that_comes_after_it_was_given_up_is_nothing(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    agent.reaching.tick(LOST_S)
    assert "out of reach" in agent.lost()[0][1]
    hub.answer(RECORD, LOST_S + 1)
    assert agent.dialled() == {}
    assert len(agent.lost()) == 1


def test_one_that_is_away_is_looked_up_again_and_reached_where_it_is_now(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    hub.answer(RECORD, 0.0)
    for tick in range(1, round((ASK_HUB_AGAIN_S + SEEK_S) / SEEK_S)):
        agent.reaching.tick(tick * SEEK_S)
    assert len(hub.asked) == 1
    moved = EndpointRecord(id=MIDWAY, name="midway", public_key=RECORD.public_key, control=("tcp://m:9",))
    hub.answer(moved, 12.0)
    assert "tcp://m:9" in agent.dialled()
    agent.reaching.tick(12.0 + ASK_HUB_AGAIN_S + SEEK_S)
    hub.answer(HubUnavailableError("no answer"), 30.0)
    assert agent.lost() == [], "the hub is away, which says nothing about midway"


def test_a_refusal_counts_after_a_while_where_there_is_a_hub(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    hub.answer(RECORD, 0.0)
    agent.refuse(agent.dialled()["tcp://m:1"], 1.0)
    assert agent.lost() == []
    assert hub.refreshed == 1
    agent.reaching.tick(1.0 + REFUSED_S)
    assert [failure[0] for failure in agent.lost()] == ["AuthError"]


def test_a_refusal_is_taken_back_by_a_link_that_comes_up(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    hub.answer(RECORD, 0.0)
    agent.refuse(agent.dialled()["tcp://m:1"], 1.0)
    agent.reaching.peer_up(pe.PeerUp(MIDWAY, "broker", True), 2.0)
    agent.reaching.tick(1.0 + REFUSED_S)
    assert agent.lost() == []


def test_who_claims_to_be_a_home_and_is_refused_does_not_lose_it(agent: Agent, hub: Hub) -> None:
    """Anybody can send us mail in anybody's name."""
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    hub.answer(RECORD, 0.0)
    agent.reaching.refused(pe.AuthRefused(MIDWAY, "the key … was refused"), 1.0)
    agent.reaching.mismatch(pe.Mismatch(MIDWAY, "another version"), 1.0)
    agent.reaching.tick(1.0 + REFUSED_S)
    assert agent.lost() == []


def test_addresses_that_a_party_names_are_dialled_beside_the_others(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    hub.answer(RECORD, 0.0)
    before = agent.dialled()
    agent.reaching.dial_back(pe.DialBack(MIDWAY, THEIRS.public, ("tcp://inside:1",), ()), 1.0)
    assert set(agent.dialled()) == {*before, "tcp://inside:1"}
    assert not [each for each in agent.obeyed if isinstance(each, pe.Hangup)]


# ----------------------------------------------------------------------------- somebody comes in as another endpoint

EVE = keys.generate()


def comes_in(agent: Agent, pair: keys.KeyPair, now: float, link: int = 900) -> list[Any]:
    """Whoever has that key says over a connection of its own that it is Midway."""
    said = Peers(pe.Identity(MIDWAY, pe.ENDPOINT, pair.public, 7), lambda key, hello: pe.PEER)
    for each in said.handle(pe.Know(ME, [("direct", "tcp://p:1", PAIR.public)], now)):
        assert isinstance(each, pe.Dial)
        said.handle(pe.LinkUp(each.link, now))
    (hello,) = [each for each in said.flush(now) if isinstance(each, pe.Transmit)]
    out = agent.peers.handle(pe.PacketIn(link, hello.frame, pair.public, now, "direct"))
    for each in out:
        if isinstance(each, pe.PeerUp):
            agent.reaching.peer_up(each, now)
    return [*out, *agent.peers.flush(now)]


def test_nothing_is_said_to_an_endpoint_before_its_key_is_known(agent: Agent, hub: Hub) -> None:
    comes_in(agent, EVE, 0.0)
    assert agent.peers.is_up(MIDWAY)
    agent.reaching.to_home(MIDWAY, MESSAGE, 1.0)
    assert agent.peers.pending(MIDWAY) == 0
    assert agent.reaching.is_unproven(MIDWAY)
    hub.answer(RECORD, 2.0)
    assert not agent.reaching.is_unproven(MIDWAY)
    assert not agent.peers.is_up(MIDWAY), "Eve is out"
    assert [event for event in agent.taken if isinstance(event, ev.PartyGone)] == [ev.PartyGone(MIDWAY, 2.0)]
    assert agent.peers.pending(MIDWAY) == 1, "it waits for the real one"
    assert agent.lost() == []
    comes_in(agent, THEIRS, 3.0, link=901)
    assert agent.peers.owner_of(MIDWAY) == THEIRS.public


def test_the_real_one_is_talked_to_as_soon_as_the_hub_has_confirmed_it(agent: Agent, hub: Hub) -> None:
    comes_in(agent, THEIRS, 0.0)
    agent.reaching.to_home(MIDWAY, MESSAGE, 1.0)
    assert agent.peers.pending(MIDWAY) == 0
    hub.answer(RECORD, 2.0)
    assert agent.peers.is_up(MIDWAY)
    assert agent.peers.pending(MIDWAY) == 1
    assert agent.taken == []


def test_who_was_met_before_is_talked_to_without_the_hub(agent: Agent, hub: Hub, tmp_path: Path) -> None:
    pins.check(MIDWAY, THEIRS.public, "midway", tmp_path)
    comes_in(agent, THEIRS, 0.0)
    agent.reaching.to_home(MIDWAY, MESSAGE, 1.0)
    assert agent.peers.pending(MIDWAY) == 1
    hub.answer(HubUnavailableError("no answer"), 2.0)
    assert agent.lost() == []


def test_whoever_has_come_in_as_an_endpoint_that_the_hub_does_not_know_hears_nothing(
    agent: Agent, hub: Hub
) -> None:
    comes_in(agent, EVE, 0.0)
    agent.reaching.to_home(MIDWAY, MESSAGE, 1.0)
    hub.answer(NotFoundError("no such endpoint"), 2.0)
    assert [failure[0] for failure in agent.lost()] == ["NotFoundError"]
    assert not agent.peers.is_up(MIDWAY)


def test_what_was_kept_goes_when_the_endpoint_is_given_up(agent: Agent, hub: Hub) -> None:
    agent.reaching.to_home(MIDWAY, MESSAGE, 0.0)
    agent.reaching.tick(LOST_S)
    agent.reaching.to_home(MIDWAY, MESSAGE, LOST_S + 1)
    hub.answer(RECORD, LOST_S + 2)  # of the first question
    hub.answer(RECORD, LOST_S + 2)
    assert agent.peers.pending(MIDWAY) == 1
