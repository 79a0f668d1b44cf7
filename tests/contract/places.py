"""The carriers that the contract is tested over, and a loop that polls several of them until something is so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gcref import ids
from gcref.brains.peers_events import Link, LinkDown, LinkUp, PacketIn, Refused
from gcref.carriers import keys
from gcref.carriers.base import Carrier, CarrierEvent
from gcref.carriers.combined import Carriers
from gcref.carriers.keys import KeyPair
from gcref.carriers.mail.amqp import AmqpMailbox
from gcref.carriers.mail.memory import MemoryMailbox, Post
from gcref.carriers.mail.post import address_of
from gcref.carriers.memory import MemoryCarrier, MemoryNetwork
from gcref.carriers.zeromq import ZeroMQCarrier
from tests.support.rabbit import Rabbit
from tests.support.waiting import patience

E = TypeVar("E")

KINDS = ("memory-ipc", "memory-tcp", "zeromq-ipc", "zeromq-tcp")
TCP_KINDS = ("memory-tcp", "zeromq-tcp")
MAIL_KINDS = ("mail-memory", "mail-rabbitmq")

SERVER = keys.generate()
CLIENT = keys.generate()
OTHER = keys.generate()


class Party:
    """A carrier, and the events that it has given."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.events: list[CarrierEvent] = []

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def frames(self) -> list[bytes]:
        return [packet.frame for packet in self.of(PacketIn)]

    def ups(self, link: Link) -> int:
        return sum(event.link == link for event in self.of(LinkUp))

    def downs(self, link: Link) -> int:
        return sum(event.link == link for event in self.of(LinkDown))

    def refusals(self) -> list[Refused]:
        return self.of(Refused)


class Place:
    """Where carriers of one kind meet."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.tcp = kind.endswith("tcp")
        self.carrier_name = "direct" if self.tcp else "ipc"
        self.answer_key: bytes | None = None  # what a dialled link says of the other side's key
        self.parties: list[Party] = []
        self._folder = folder
        self._network = MemoryNetwork()

    @property
    def any_address(self) -> str:
        return "tcp://127.0.0.1:*" if self.tcp else f"ipc://{self._folder}/socket"

    @property
    def server_key(self) -> bytes | None:
        return SERVER.public if self.tcp else None

    def party(self, pair: KeyPair | None = CLIENT, allowed: Mapping[bytes, str] | None = None) -> Party:
        if self.kind.startswith("memory"):
            carrier: Carrier = MemoryCarrier(self._network, pair, allowed)
        else:
            carrier = ZeroMQCarrier(pair, allowed)
        party = Party(carrier)
        self.parties.append(party)
        return party

    def server(self, allowed: Mapping[bytes, str] | None = None) -> tuple[Party, str]:
        """A party that listens, and where."""
        party = self.party(SERVER, {CLIENT.public: "user"} if allowed is None else allowed)
        return party, party.carrier.listen(self.any_address)

    def linked(self) -> tuple[Party, Party, str]:
        """A client whose link 1 to a server is up, and the server."""
        server, address = self.server()
        client = self.party()
        client.carrier.dial(1, address, self.server_key)
        self.until(lambda: client.ups(1) == 1, "the link")
        return client, server, address

    def until(
        self, condition: Callable[[], Any], what: str = "the condition", timeout_s: float = 10.0
    ) -> None:
        """Poll all carriers until it is so."""
        deadline = time.monotonic() + patience(timeout_s)
        while not condition():
            if time.monotonic() > deadline:
                seen = "\n  ".join(
                    repr(event)[:200] for party in self.parties for event in party.events[-10:]
                )
                raise AssertionError(f"waited in vain for {what}; seen:\n  {seen}")
            self.poll()

    def poll(self) -> bool:
        """Poll all carriers once, each of them briefly; whether there was anything."""
        found = False
        for party in self.parties:
            events = party.carrier.poll(0.001)
            party.events += events
            found = found or bool(events)
        return found

    def close(self) -> None:
        for party in self.parties:
            party.carrier.close()


class MailPlace(Place):
    """Where carriers meet that have mailboxes: at a broker in memory, or at a real one."""

    def __init__(self, kind: str, folder: Path, rabbit: Rabbit | None) -> None:
        super().__init__(kind, folder)
        self.tcp = True
        self.carrier_name = "broker"
        self.answer_key = SERVER.public
        self._post = Post()
        self._rabbit = rabbit
        self._ids: dict[Party, bytes] = {}

    def party(self, pair: KeyPair | None = CLIENT, allowed: Mapping[bytes, str] | None = None) -> Party:
        assert pair is not None
        id = ids.new_id()
        mailbox: MemoryMailbox | AmqpMailbox
        if self._rabbit is None:
            mailbox = MemoryMailbox(self._post, id, pair)
            access = self._post.access(id)
        else:
            mailbox = AmqpMailbox(id, pair)
            access = self._rabbit.party(id)
        party = Party(Carriers(ZeroMQCarrier(pair, allowed), mailbox))
        mailbox.use(access)
        self.parties.append(party)
        self._ids[party] = id
        return party

    def server(self, allowed: Mapping[bytes, str] | None = None) -> tuple[Party, str]:
        """A party that has a mailbox, and its address."""
        party = self.party(SERVER, {CLIENT.public: "user"} if allowed is None else allowed)
        return party, address_of(self._ids[party])
