"""Control messages over mailboxes: what `Carriers` promises beside what it hands on to ZeroMQ, and two parties that meet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcref import ids
from gcref.brains import peers as pe
from gcref.brains.peers_events import LinkDown, PacketIn
from gcref.carriers import combined
from gcref.carriers.combined import Carriers
from gcref.carriers.keys import KeyPair
from gcref.carriers.mail.amqp import AmqpMailbox
from gcref.carriers.mail.memory import MemoryMailbox, Post
from gcref.carriers.mail.post import NO_MAILBOX, address_of
from gcref.carriers.zeromq import ZeroMQCarrier
from gcref.wire.codec import DATA, HELLO, pack_packet
from tests.contract.places import CLIENT, OTHER, SERVER, Party, Place
from tests.contract.test_parties import Node, until
from tests.support.rabbit import Rabbit

KINDS = ("memory", "rabbitmq")


class MailMeeting(Place):
    """Where carriers with mailboxes meet."""

    def __init__(self, folder: Path, rabbit: Rabbit | None) -> None:
        super().__init__("zeromq-tcp", folder)
        self.carrier_name = "broker"
        self.post = Post()
        self.rabbit = rabbit
        self.ids = {pair: ids.new_id() for pair in (CLIENT, SERVER, OTHER)}
        self.mailboxes: dict[Party, MemoryMailbox | AmqpMailbox] = {}

    def access(self, id: bytes) -> Any:
        return self.post.access(id) if self.rabbit is None else self.rabbit.party(id)

    def party(self, pair: KeyPair | None = CLIENT, allowed: Any = None) -> Party:
        assert pair is not None
        id = self.ids[pair]
        mailbox = MemoryMailbox(self.post, id, pair) if self.rabbit is None else AmqpMailbox(id, pair)
        party = Party(Carriers(ZeroMQCarrier(pair, allowed), mailbox))
        mailbox.use(self.access(id))
        self.parties.append(party)
        self.mailboxes[party] = mailbox
        return party

    @property
    def address(self) -> str:
        return address_of(self.ids[SERVER])

    def meet(self) -> tuple[Party, Party]:
        server, client = self.party(SERVER), self.party(CLIENT)
        client.carrier.dial(1, self.address, SERVER.public)
        self.until(lambda: client.ups(1), "the link")
        return client, server


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MailMeeting]:
    monkeypatch.setattr(pe, "RETRY_S", 0.2)
    found = MailMeeting(tmp_path, None if request.param == "memory" else request.getfixturevalue("rabbit"))
    yield found
    found.close()


over_memory = pytest.mark.parametrize("place", ["memory"], indirect=True)


def packet(kind: int, body: bytes = b"\xc0") -> bytes:
    return pack_packet(kind, 1, 1, 0, 0, [body])


def test_frames_go_there_and_back(place: MailMeeting) -> None:
    client, server = place.meet()
    assert client.carrier.send(1, packet(HELLO))
    place.until(lambda: server.frames == [packet(HELLO)])
    (came,) = server.of(PacketIn)
    assert came.link == ("mail", place.ids[CLIENT], CLIENT.public)
    assert (came.key, came.carrier) == (CLIENT.public, "broker")
    assert server.carrier.send(came.link, packet(DATA))
    place.until(lambda: client.frames == [packet(DATA)])
    (answer,) = client.of(PacketIn)
    assert (answer.link, answer.key, answer.carrier) == (1, SERVER.public, "broker")


def test_both_may_dial(place: MailMeeting) -> None:
    client, server = place.meet()
    server.carrier.dial(7, address_of(place.ids[CLIENT]), CLIENT.public)
    place.until(lambda: server.ups(7))
    client.carrier.send(1, b"from the client")
    server.carrier.send(7, b"from the server")
    place.until(lambda: server.frames and client.frames)
    assert server.of(PacketIn)[0].link == ("mail", place.ids[CLIENT], CLIENT.public)
    assert client.of(PacketIn)[0].link == ("mail", place.ids[SERVER], SERVER.public)


def test_mail_and_zeromq_side_by_side(place: MailMeeting) -> None:
    client, server = place.meet()
    server.carrier.set_allowed({CLIENT.public: "user"})
    address = server.carrier.listen("tcp://127.0.0.1:*")
    client.carrier.dial(2, address, SERVER.public)
    place.until(lambda: client.ups(2))
    for number in range(20):
        assert client.carrier.send(1 + number % 2, b"%d" % number)
    place.until(lambda: len(server.frames) == 20)
    for name in ("direct", "broker"):
        frames = [int(came.frame) for came in server.of(PacketIn) if came.carrier == name]
        assert len(frames) == 10
        assert frames == sorted(frames)


def test_hanging_up_is_silent_and_a_new_link_works(place: MailMeeting) -> None:
    client, server = place.meet()
    client.carrier.send(1, b"1")
    place.until(lambda: server.frames)
    client.carrier.hangup(1)
    assert not client.carrier.send(1, b"x")
    link = server.of(PacketIn)[0].link
    assert server.carrier.send(link, b"lost")
    client.carrier.dial(2, place.address, SERVER.public)
    place.until(lambda: client.ups(2))
    client.carrier.send(2, b"2")
    place.until(lambda: len(server.frames) == 2)
    server.carrier.send(link, b"back")
    place.until(lambda: b"back" in client.frames)
    assert client.of(PacketIn)[-1].link == 2
    for unknown in (1, 99, ("mail", ids.new_id(), OTHER.public)):
        client.carrier.hangup(unknown)


@pytest.mark.parametrize("address", ["mailbox://", "mailbox://zz", "mailbox://" + "0" * 30])
def test_addresses_that_are_none_stay_down(place: MailMeeting, address: str) -> None:
    client = place.party(CLIENT)
    client.carrier.dial(5, address, SERVER.public)
    client.carrier.dial(6, place.address, None)
    place.until(lambda: client.downs(5) and client.downs(6))
    assert not client.carrier.send(5, b"x")
    assert not client.ups(5) + client.ups(6)


def test_mail_of_another_key_is_another_link(place: MailMeeting) -> None:
    client, server = place.meet()
    place.ids[OTHER] = place.ids[SERVER]  # it says that it is the server
    if place.rabbit is not None:
        return  # nobody else can open its mailbox there
    thief = MemoryMailbox(place.post, place.ids[OTHER], OTHER)
    place.post._open[place.ids[SERVER]] = thief
    assert thief.post(place.ids[CLIENT], CLIENT.public, 0, [b"\1", b"I am the server"])
    place.post._open[place.ids[SERVER]] = place.mailboxes[server]  # type: ignore[assignment]
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames)
    assert not client.frames


@over_memory
def test_links_follow_the_mailbox(place: MailMeeting) -> None:
    client, server = place.meet()
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames)
    accepted = server.of(PacketIn)[0].link
    place.post.stop()
    place.until(lambda: client.downs(1))
    assert not client.carrier.send(1, b"y")
    assert not server.downs(accepted), "a link that mail came by stays, for whoever is away"
    place.post.start()
    place.until(
        lambda: client.ups(1) == 2 and server.ups(accepted) == 1, "both sides to know that mail goes again"
    )
    assert client.carrier.send(1, b"z")
    place.until(lambda: server.frames == [b"x", b"z"])


@over_memory
def test_mail_that_comes_back_takes_the_link_down_for_a_while(
    place: MailMeeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combined, "RETRY_S", 0.05)
    client, server = place.meet()
    client.carrier.send(1, b"x")
    place.until(lambda: server.frames)
    link = server.of(PacketIn)[0].link
    place.post.remove(place.ids[SERVER])
    client.carrier.send(1, b"lost")
    place.until(lambda: NO_MAILBOX in [down.reason for down in client.of(LinkDown)])
    place.until(lambda: client.ups(1) == 2, "the next try")
    place.post.access(place.ids[SERVER])
    client.carrier.send(1, b"found")
    place.until(lambda: b"found" in server.frames)
    place.post.fill(place.ids[CLIENT])
    server.carrier.send(link, b"waits")
    place.poll()
    assert not server.downs(link), "it is only full"
    place.post.drain(place.ids[CLIENT])
    place.until(lambda: b"waits" in client.frames)
    place.post.remove(place.ids[CLIENT])
    server.carrier.send(link, b"lost")
    place.until(lambda: server.downs(link))


@over_memory
def test_frames_are_kept_by_the_broker_until_they_are_dealt_with(place: MailMeeting) -> None:
    client, server = place.meet()
    client.carrier.send(1, packet(DATA))
    place.parties.remove(server)
    events: list[Any] = []
    while not any(isinstance(event, PacketIn) for event in events):
        events += server.carrier.poll(1.0)
    assert place.post.depth(place.ids[SERVER]) == 1, "it may not be journalled yet"
    server.carrier.poll(0)
    assert place.post.depth(place.ids[SERVER]) == 0
    place.parties.append(server)


@over_memory
def test_what_is_of_no_use_later_is_not_kept(place: MailMeeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combined, "KEEP_S", 0.0)
    client, server = place.meet()
    place.post.pause()
    client.carrier.send(1, packet(HELLO))
    client.carrier.send(1, packet(DATA))
    ended = time.monotonic() + 0.01
    place.until(lambda: time.monotonic() > ended)
    place.post.resume()
    place.until(lambda: server.frames)
    assert server.frames == [packet(DATA)]


# ----------------------------------------------------------------------------------------------------- parties


def two(place: MailMeeting) -> tuple[Node, Node]:
    a_id, b_id = place.ids[CLIENT], place.ids[SERVER]
    b = Node(place, b_id, SERVER, {CLIENT.public: "user"})
    a = Node(place, a_id, CLIENT, {})
    way = ("broker", place.address, SERVER.public)
    a.obey(a.peers.handle(pe.Know(b_id, [way], time.monotonic())))
    return a, b


def test_two_parties_meet_and_talk(place: MailMeeting) -> None:
    a, b = two(place)
    a.send(b.peers.me.party, *range(100))
    until([a, b], lambda: b.got == list(range(100)), timeout_s=20.0)
    b.send(a.peers.me.party, *range(50))
    until([a, b], lambda: a.got == list(range(50)), timeout_s=20.0)
    assert a.of(pe.PeerUp)[0].carrier == "broker"
    until([a, b], lambda: a.peers.pending() == b.peers.pending() == 0)


def test_a_stranger_is_refused(place: MailMeeting) -> None:
    a, b = two(place)
    b.allowed.clear()
    a.send(b.peers.me.party, 1)
    until([a, b], lambda: a.of(pe.AuthRefused) and b.of(pe.AuthRefused), timeout_s=20.0)
    assert not b.got


@over_memory
def test_two_parties_come_through_all_faults(place: MailMeeting) -> None:
    """F10: over the mailbox too, lost, repeated and late packets have no effect beyond the first."""
    a, b = two(place)
    sent = 0

    def talk() -> None:
        nonlocal sent
        for _ in range(5):
            a.send(b.peers.me.party, sent)
            b.send(a.peers.me.party, sent)
            sent += 1
            a.turn()
            b.turn()

    talk()
    until([a, b], lambda: a.of(pe.PeerUp) and b.of(pe.PeerUp))
    for fault in (place.post.drop, place.post.duplicate, place.post.delay):
        fault(3)
        talk()
    place.post.stop()
    talk()
    place.post.start()
    place.post.release()
    until([a, b], lambda: len(a.got) == len(b.got) == sent, "all messages", 20.0)
    assert a.got == b.got == list(range(sent))
