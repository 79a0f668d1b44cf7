"""Peers over each carrier: two real parties meet, talk, lose each other, are refused, and speak other versions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcref.brains import peers as pe
from gcref.carriers.base import Carrier
from gcref.carriers.keys import KeyPair
from gcref.config import PROTOCOL_VERSION
from gcref.wire import messages as m
from tests.contract.places import CLIENT, KINDS, OTHER, SERVER, TCP_KINDS, Place
from tests.support.waiting import patience

A, B = b"A" * 16, b"B" * 16
tcp_kinds = pytest.mark.parametrize("place", TCP_KINDS, indirect=True)


class Node:
    """A party: Peers and a carrier, driven as the control loops drive them."""

    def __init__(
        self, place: Place, party: bytes, pair: KeyPair, allowed: dict[bytes, str], epoch: int = 1000
    ) -> None:
        self.place = place
        self.allowed = allowed
        self.carrier: Carrier = place.party(pair, allowed).carrier
        kind = pe.ENDPOINT if pair is SERVER else pe.CLIENT
        identity = pe.Identity(party, kind, pair.public, epoch)
        self.peers = pe.Peers(identity, self.authorize, time.monotonic(), heartbeat_s=0.2)
        self.got: list[int] = []
        self.told: list[Any] = []
        self.version = PROTOCOL_VERSION

    def authorize(self, key: bytes | None, hello: pe.Hello) -> str | None:
        if key is None or hello.kind == pe.ENDPOINT:
            return pe.USER
        return self.allowed.get(key)

    def know(self, party: bytes, address: str) -> None:
        key = self.place.server_key
        self.obey(
            self.peers.handle(pe.Know(party, [(self.place.carrier_name, address, key)], time.monotonic()))
        )

    def turn(self) -> None:
        deadline = self.peers.deadline
        now = time.monotonic()
        wait_s = 0.005 if deadline is None else max(0.0, min(0.005, deadline - now))
        for event in self.carrier.poll(wait_s):
            self.obey(self.peers.handle(event))  # type: ignore[arg-type]
        self.obey(self.peers.flush(time.monotonic()))

    def obey(self, instructions: list[pe.Instruction]) -> None:
        for told in instructions:
            if isinstance(told, pe.Transmit):
                self.carrier.send(told.link, bytes([self.version]) + told.frame[1:])
            elif isinstance(told, pe.Deliver):
                self.got += [message[1] for message in told.messages]
            elif isinstance(told, pe.Dial):
                self.carrier.dial(told.link, told.address, told.server_key)
            elif isinstance(told, pe.Hangup):
                self.carrier.hangup(told.link)
            else:
                self.told.append(told)

    def send(self, party: bytes, *numbers: int) -> None:
        for number in numbers:
            self.peers.send(party, [m.STATUS, number])

    def of(self, kind: type) -> list[Any]:
        return [told for told in self.told if isinstance(told, kind)]

    def close(self) -> None:
        self.obey(self.peers.close(time.monotonic()))
        self.carrier.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    # In life who was refused comes again after five seconds.
    monkeypatch.setattr(pe, "RETRY_S", 0.2)
    found = Place(request.param, tmp_path)
    yield found
    found.close()


def until(nodes: list[Node], condition: Any, what: str = "the condition", timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience(timeout_s)
    while not condition():
        told = [node.told[-5:] for node in nodes]
        assert time.monotonic() < deadline, f"waited in vain for {what}; they were told {told}"
        for node in nodes:
            node.turn()


def two(place: Place) -> tuple[Node, Node, str]:
    b = Node(place, B, SERVER, {CLIENT.public: "user"})
    address = b.carrier.listen(place.any_address)
    a = Node(place, A, CLIENT, {})
    a.know(B, address)
    return a, b, address


def test_they_meet_and_talk(place: Place) -> None:
    a, b, _ = two(place)
    a.send(B, *range(100))
    until([a, b], lambda: len(b.got) == 100)
    b.send(A, *range(50))
    until([a, b], lambda: len(a.got) == 50 and a.peers.pending() == b.peers.pending() == 0)
    assert b.got == list(range(100))
    assert a.of(pe.PeerUp) == [pe.PeerUp(B, place.carrier_name, True)]
    assert b.of(pe.PeerUp) == [pe.PeerUp(A, place.carrier_name, True)]
    assert a.peers.describe(B)["rtt_s"] > 0


def test_a_restarted_endpoint_with_its_journal_goes_on(place: Place) -> None:
    a, b, address = two(place)
    a.send(B, 1, 2)
    until([a, b], lambda: b.got == [1, 2] and not a.peers.pending())
    taken = b.peers.taken(A)
    b.close()
    until([a], lambda: a.of(pe.PeerDown))
    a.send(B, 3)
    again = Node(place, B, SERVER, {CLIENT.public: "user"}, epoch=2000)
    again.peers.restore(A, pe.CLIENT, CLIENT.public, *taken)
    again.carrier.listen(address)
    again.send(A, 7)
    until([a, again], lambda: again.got == [3] and a.got == [7])
    assert not a.of(pe.PeerReset)
    assert a.of(pe.PeerUp)[-1] == pe.PeerUp(B, place.carrier_name, True)


def test_one_without_its_journal_says_so(place: Place) -> None:
    a, b, address = two(place)
    a.send(B, 1, 2)
    until([a, b], lambda: b.got == [1, 2] and not a.peers.pending())
    b.close()
    a.send(B, 3)
    again = Node(place, B, SERVER, {CLIENT.public: "user"}, epoch=2000)
    again.carrier.listen(address)
    until([a, again], lambda: again.got == [3])
    assert a.of(pe.PeerReset) == [pe.PeerReset(B, [[m.STATUS, 3]])]


def test_a_party_that_does_not_answer_is_noticed(place: Place) -> None:
    """F4: B stands still (it polls no more); its connection stays. When it goes on, all is well again."""
    a, b, _ = two(place)
    until([a, b], lambda: a.of(pe.PeerUp))
    a.send(B, 1)
    until([a], lambda: a.of(pe.PeerDown), "the heartbeat")
    assert "frozen" in a.of(pe.PeerDown)[0].reason
    a.send(B, 2)
    until([a, b], lambda: b.got == [1, 2])


@tcp_kinds
def test_an_unlisted_key_is_an_auth_error_on_both_sides_until_it_is_listed(place: Place) -> None:
    b = Node(place, B, SERVER, {})
    a = Node(place, A, CLIENT, {})
    a.know(B, b.carrier.listen(place.any_address))
    a.send(B, 1)
    until([a, b], lambda: a.of(pe.AuthRefused) and b.of(pe.AuthRefused))
    assert a.of(pe.AuthRefused)[0].party == B
    assert CLIENT.public.decode() in b.of(pe.AuthRefused)[0].message
    b.allowed[CLIENT.public] = "user"
    until([a, b], lambda: b.got == [1], "the next try")


@tcp_kinds
def test_a_wrong_server_key_is_an_auth_error_on_both_sides(place: Place) -> None:
    b = Node(place, B, SERVER, {CLIENT.public: "user"})
    address = b.carrier.listen(place.any_address)
    a = Node(place, A, CLIENT, {})
    a.obey(a.peers.handle(pe.Know(B, [("direct", address, OTHER.public)], time.monotonic())))
    until([a, b], lambda: a.of(pe.AuthRefused) and b.of(pe.AuthRefused))
    assert a.of(pe.AuthRefused)[0].party == B
    assert not b.of(pe.PeerUp)


@tcp_kinds
def test_a_revoked_key_is_out_at_once_on_open_connections(place: Place) -> None:
    a, b, _ = two(place)
    a.send(B, 1)
    until([a, b], lambda: b.got == [1])
    del b.allowed[CLIENT.public]
    b.obey(b.peers.handle(pe.Revoke([CLIENT.public], time.monotonic())))
    assert b.of(pe.PeerDown)
    a.send(B, 2)
    until([a, b], lambda: a.of(pe.AuthRefused) and a.of(pe.PeerDown))
    assert b.got == [1]
    b.allowed[CLIENT.public] = "user"
    until([a, b], lambda: b.got == [1, 2], "the next try")


@tcp_kinds
def test_a_key_cannot_speak_for_a_party_of_another_key(place: Place) -> None:
    a, b, address = two(place)
    b.allowed[OTHER.public] = "user"
    a.send(B, 1)
    until([a, b], lambda: b.got == [1])
    thief = Node(place, A, OTHER, {}, epoch=9000)
    thief.know(B, address)
    thief.send(B, 666)
    until([a, b, thief], lambda: thief.of(pe.AuthRefused))
    a.send(B, 2)
    until([a, b, thief], lambda: b.got == [1, 2])
    assert "another owner key" in b.of(pe.AuthRefused)[0].message


def test_another_version_is_named_on_both_sides(place: Place) -> None:
    a, b, _ = two(place)
    a.version = 9
    until([a, b], lambda: b.of(pe.Mismatch))
    assert "version 1" in b.of(pe.Mismatch)[0].message
    assert "9" in b.of(pe.Mismatch)[0].message
    a.version = 1
    b.version = 9
    until([a, b], lambda: a.of(pe.Mismatch), "the version of the answer")
    assert a.of(pe.Mismatch)[0].party == B
    assert not a.got + b.got
