"""The mailboxes that the contract is tested over: the fake, and RabbitMQ."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gcref import ids
from gcref.carriers import keys
from gcref.carriers.keys import KeyPair
from gcref.carriers.mail.amqp import AmqpMailbox
from gcref.carriers.mail.memory import MemoryMailbox, Post
from gcref.carriers.mail.post import (
    BULK,
    CONTROL,
    Buffer,
    Mail,
    MailboxAccess,
    MailDown,
    MailEvent,
    MailUp,
    Returned,
)
from tests.support.rabbit import Rabbit
from tests.support.waiting import patience

E = TypeVar("E")


class Party:
    """A mailbox, and what it has given on each lane. Whoever looks for something takes what is there, and is done with it."""

    def __init__(self, place: MailPlace, pair: KeyPair | None = None, id: bytes | None = None) -> None:
        self.id = ids.new_id() if id is None else id
        self.pair = keys.generate() if pair is None else pair
        self.bell = threading.Event()
        self.mailbox: MemoryMailbox | AmqpMailbox = place.make(self)
        self.events: dict[int, list[MailEvent]] = {CONTROL: [], BULK: []}
        self.finishes = True

    def attach(self) -> None:
        for lane in (CONTROL, BULK):
            self.mailbox.attach(lane, self.bell.set)

    def look(self) -> None:
        for lane, events in self.events.items():
            events += self.mailbox.take(lane)
            if self.finishes:
                self.mailbox.done(lane)

    def of(self, kind: type[E], lane: int = CONTROL) -> list[E]:
        return [event for event in self.events[lane] if isinstance(event, kind)]

    def mail(self, lane: int = CONTROL) -> list[bytes]:
        return [bytes(mail.data) for mail in self.of(Mail, lane)]

    def send(self, to: Party, *frame: Buffer, lane: int = CONTROL, keep_s: float | None = None) -> bool:
        return self.mailbox.post(to.id, to.pair.public, lane, frame, keep_s)

    @property
    def is_up(self) -> bool:
        states = [event for event in self.events[CONTROL] if isinstance(event, (MailUp, MailDown))]
        return bool(states) and isinstance(states[-1], MailUp)

    def dropped(self, fault: str) -> int:
        counts = self.mailbox.describe()["dropped"]
        assert isinstance(counts, dict)
        return int(counts[fault])


class MailPlace:
    """Where mailboxes of one kind meet."""

    def __init__(self, rabbit: Rabbit | None) -> None:
        self.rabbit = rabbit
        self.post = Post()
        self.parties: list[Party] = []

    def make(self, party: Party) -> MemoryMailbox | AmqpMailbox:
        if self.rabbit is None:
            return MemoryMailbox(self.post, party.id, party.pair)
        return AmqpMailbox(party.id, party.pair)

    def access(self, id: bytes, **arguments: Any) -> MailboxAccess:
        return self.post.access(id) if self.rabbit is None else self.rabbit.party(id, **arguments)

    def party(self, pair: KeyPair | None = None, id: bytes | None = None, **arguments: Any) -> Party:
        """One whose mailbox is up."""
        party = Party(self, pair, id)
        self.parties.append(party)
        party.attach()
        party.mailbox.use(self.access(party.id, **arguments))
        self.until(lambda: party.is_up, "its mailbox")
        return party

    def again(self, party: Party) -> Party:
        """The process ends without a word of its own, and another one of the same party begins."""
        self.leave(party)
        return self.party(party.pair, party.id)

    def leave(self, party: Party) -> None:
        party.mailbox.close()
        self.parties.remove(party)

    def until(
        self,
        condition: Callable[[], Any],
        what: str | Callable[[], str] = "the condition",
        timeout_s: float = 10.0,
    ) -> None:
        """Look into all mailboxes until it is so."""
        deadline = time.monotonic() + patience(timeout_s)
        while not condition():
            for party in self.parties:
                party.bell.wait(0.005)
                party.bell.clear()
                party.look()
            if time.monotonic() > deadline and not condition():
                seen = "\n  ".join(repr(party.events)[-300:] for party in self.parties)
                raise AssertionError(f"waited in vain for {what}; seen:\n  {seen}")

    # ----------------------------------------------------------------------------------------------- faults

    def put(self, id: bytes, envelopes: Sequence[bytes], **properties: Any) -> None:
        """What any other user of the broker can do: write whatever into a mailbox."""
        if self.rabbit is None:
            for envelope in envelopes:
                self.post.forge(id, envelope)
            return
        import pika

        stranger = self.rabbit.party(ids.new_id())
        with pika.BlockingConnection(pika.URLParameters(stranger.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for envelope in envelopes:
                channel.basic_publish(
                    "", f"mailbox.{id.hex()}", envelope, pika.BasicProperties(**properties), mandatory=True
                )

    def depth(self, id: bytes) -> int:
        """What lies in a mailbox that nobody has open."""
        if self.rabbit is None:
            return self.post.depth(id)
        import pika

        with pika.BlockingConnection(pika.URLParameters(self.rabbit.url)) as connection:
            declared = connection.channel().queue_declare(f"mailbox.{id.hex()}", passive=True)
            return int(declared.method.message_count)

    def remove_mailbox(self, id: bytes) -> None:
        if self.rabbit is None:
            self.post.remove(id)
        else:
            self.rabbit.remove_mailbox(id)

    def reconnect(self, party: Party) -> None:
        """A party loses its connection, and makes another."""
        if self.rabbit is None:
            self.post.restart()
        else:
            party.mailbox.use(self.rabbit.party(party.id))

    def pause(self) -> None:
        (self.post if self.rabbit is None else self.rabbit).pause()

    def resume(self) -> None:
        (self.post if self.rabbit is None else self.rabbit).resume()

    def close(self) -> None:
        for party in self.parties:
            party.mailbox.close()
        if self.rabbit is not None:
            for party in self.parties:
                self.rabbit.remove_mailbox(party.id)


__all__ = ["MailPlace", "Party", "Returned"]
