"""The faults of the fake carrier do what they say; two parties come through all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gcref.brains.peers_events import PacketIn
from gcref.carriers.memory import MemoryNetwork
from tests.contract.places import CLIENT, Place
from tests.contract.test_parties import Node, two, until


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place("memory-tcp", tmp_path)
    yield found
    found.close()


def network(place: Place) -> MemoryNetwork:
    return place._network


def test_dropped_frames_are_gone(place: Place) -> None:
    client, server, _ = place.linked()
    network(place).drop(2)
    for frame in (b"1", b"2", b"3"):
        assert client.carrier.send(1, frame)
    place.until(lambda: server.frames)
    assert server.frames == [b"3"]


def test_duplicated_frames_come_twice(place: Place) -> None:
    client, server, _ = place.linked()
    network(place).duplicate()
    client.carrier.send(1, b"1")
    client.carrier.send(1, b"2")
    place.until(lambda: len(server.frames) == 3)
    assert server.frames == [b"1", b"1", b"2"]


def test_delayed_frames_are_overtaken(place: Place) -> None:
    client, server, _ = place.linked()
    network(place).delay()
    client.carrier.send(1, b"1")
    client.carrier.send(1, b"2")
    place.until(lambda: server.frames)
    network(place).release()
    place.until(lambda: len(server.frames) == 2)
    assert server.frames == [b"2", b"1"]


def test_a_cut_link_is_down_until_it_heals(place: Place) -> None:
    client, server, address = place.linked()
    network(place).cut(address)
    place.until(lambda: client.downs(1))
    assert not client.carrier.send(1, b"x")
    network(place).heal(address)
    place.until(lambda: client.ups(1) == 2)
    client.carrier.send(1, b"y")
    place.until(lambda: server.frames == [b"y"])


def test_a_frozen_party_tells_nobody_and_gets_it_all_later(place: Place) -> None:
    client, server, address = place.linked()
    network(place).freeze(server.carrier)  # type: ignore[arg-type]
    assert client.carrier.send(1, b"x")
    late = place.party(CLIENT)
    late.carrier.dial(1, address, place.server_key)
    place.poll()
    assert not server.of(PacketIn)
    assert not late.ups(1)
    network(place).thaw(server.carrier)  # type: ignore[arg-type]
    place.until(lambda: server.frames == [b"x"] and late.ups(1))


def test_a_crash_closes_the_connections(place: Place) -> None:
    client, server, _ = place.linked()
    network(place).crash(server.carrier)  # type: ignore[arg-type]
    place.parties.remove(server)
    place.until(lambda: client.downs(1))


def test_two_parties_come_through_all_of_them(place: Place) -> None:
    """F10: lost, repeated and late packets have no effect beyond the first."""
    a, b, address = two(place)
    faults = network(place)
    sent = 0

    def talk(a: Node, b: Node) -> None:
        nonlocal sent
        for _ in range(5):
            a.send(b.peers.me.party, sent)
            b.send(a.peers.me.party, sent)
            sent += 1
            a.turn()
            b.turn()

    talk(a, b)
    for fault in (faults.drop, faults.duplicate, faults.delay):
        fault(3)
        talk(a, b)
    faults.cut(address)
    talk(a, b)
    faults.heal(address)
    faults.release()
    until([a, b], lambda: len(a.got) == len(b.got) == sent, "all messages", 20.0)
    assert a.got == b.got == list(range(sent))
    until([a, b], lambda: a.peers.pending() == b.peers.pending() == 0)
