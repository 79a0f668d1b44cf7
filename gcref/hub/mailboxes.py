"""Mailboxes at the broker: made for parties, and taken away with them.

    register, heartbeat ─► provide(party) ─► queue, user, permissions      ready, or the reason why not
    withdraw, revoke    ─► clear(parties) ─► user, connections, queue      done, or left in `removals` for later
    sweep               ─► clear(removals), and look whether what should be there still is

A party's user at the broker may read its own queue, write into the default exchange (which is into any queue), and
configure nothing. Nobody keeps its password but the party.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import sqlalchemy as sa

from gcref.carriers.mail.post import MailboxAccess
from gcref.directory.hub import NO_BROKER
from gcref.errors import HubUnavailableError
from gcref.hub import parties
from gcref.hub.broker import Broker
from gcref.hub.database import Database, Party, Removal

log: Final = logging.getLogger(__name__)

USERS: Final = "party."
QUEUES: Final = "mailbox."
_STRIPES: Final = 64
# RabbitMQ's durations have 32 bits.
_MAX_MS: Final = 2**32 - 1
_LOCK_S: Final = 8.0


class Mailboxes:
    """All mailboxes. Any thread may call anything.

    Args:
        database: who has one, and which are to go.
        broker: where they are; None: there is none.
        lease_s: how long mail, and a mailbox that nobody reads, are kept.
    """

    def __init__(self, database: Database, broker: Broker | None, lease_s: float) -> None:
        self._database = database
        self._broker = broker
        self._lease_ms = min(round(lease_s * 1000), _MAX_MS)
        self._locks = [threading.Lock() for _ in range(_STRIPES)]

    @contextmanager
    def held(self, party: bytes) -> Iterator[None]:
        """While one makes or removes a party's mailbox, no other does.

        Raises:
            HubUnavailableError: somebody else takes too long.
        """
        lock = self._locks[hash(party) % _STRIPES]
        if not lock.acquire(timeout=_LOCK_S):
            raise HubUnavailableError("the broker takes too long to make a mailbox: try again")
        try:
            yield
        finally:
            lock.release()

    def state(self) -> str:
        """In a word how the broker is."""
        if self._broker is None:
            return "none"
        return "ok" if self._broker.problem() is None else "unavailable"

    def provide(self, party: bytes) -> tuple[MailboxAccess | None, str | None]:
        """Make a party's mailbox, or give it a new password. The caller holds the party.

        Returns:
            What opens it, or None and the reason. The reason is written down, and it is tried again with the next heartbeat.
        """
        access, reason = self._made(party)
        if not parties.note_mailbox(self._database, party, access is not None, reason):
            # It was taken away meanwhile, by another process: what we made must not stay.
            self._clear_one(party)
            return None, "the party is not registered any more"
        return access, reason

    def clear(self, gone: Iterable[bytes]) -> int:
        """Take away what parties had at the broker; those who are here again keep it.

        Returns:
            How many could not be cleared, and are left for later.
        """
        left = 0
        for party in gone:
            try:
                with self.held(party):
                    self._clear_one(party)
            except HubUnavailableError as error:
                left += 1
                log.warning("a mailbox is left at the broker for now: party=%s reason=%s", party.hex(), error)
                if self._broker is not None and self._broker.problem() is not None:
                    break  # the others would hear the same
        return left

    def sweep(self) -> None:
        """Do what could not be done when it was due; make parties ask anew whose mailbox the broker has lost."""
        gone = self._database.read(
            lambda session: list(session.scalars(sa.select(Removal.party_id).order_by(Removal.since)))
        )
        if self._broker is None or self.clear(gone):
            return
        try:
            self._find_lost(self._broker)
        except HubUnavailableError as error:
            log.warning("the broker's mailboxes cannot be looked at: %s", error)

    def _find_lost(self, broker: Broker) -> None:
        query = sa.select(Party.id).where(Party.mailbox_ready.is_(True))
        expected = self._database.read(lambda session: list(session.scalars(query)))
        if not expected:
            return
        users, queues = broker.names(USERS, QUEUES)
        for party in expected:
            if USERS + party.hex() in users and QUEUES + party.hex() in queues:
                continue
            with self.held(party):
                # The lists were not made in one moment.
                if broker.has_user(USERS + party.hex()) and broker.has_queue(QUEUES + party.hex()):
                    continue
                parties.note_mailbox(self._database, party, False, "the broker has lost it")
            log.warning("the broker has lost a mailbox; it is made again: party=%s", party.hex())

    def _made(self, party: bytes) -> tuple[MailboxAccess | None, str | None]:
        if self._broker is None:
            return None, NO_BROKER
        user, queue, secret = USERS + party.hex(), QUEUES + party.hex(), secrets.token_urlsafe(32)
        try:
            self._broker.put_queue(
                queue,
                {
                    "x-expires": self._lease_ms,
                    "x-message-ttl": self._lease_ms,
                    "x-max-length-bytes": self._broker.config.mailbox_bytes,
                    # The sender hears of it and tries later.
                    "x-overflow": "reject-publish",
                },
            )
            self._broker.put_user(user, secret)
            self._broker.permit(
                user, configure="^$", write=r"^amq\.default$", read=rf"^mailbox\.{party.hex()}$"
            )
            # An earlier process of this party may still be connected, and would take mail away from this one.
            self._broker.close_connections(user, "the party has registered anew")
        except HubUnavailableError as error:
            return None, f"no mailbox for now: {error}"
        return MailboxAccess(self._broker.config.url_for(user, secret), queue), None

    def _clear_one(self, party: bytes) -> None:
        due = self._database.read(lambda session: session.get(Removal, party) is not None)
        if not due:
            return
        if self._broker is not None:
            self._broker.delete_user(USERS + party.hex())
            self._broker.delete_queue(QUEUES + party.hex())
            log.info("mailbox removed: party=%s", party.hex())
        self._database.write(
            lambda session: session.execute(sa.delete(Removal).where(Removal.party_id == party))
        )
