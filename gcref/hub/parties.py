"""Parties: registered, heard of, gone.

    register ─► here ── heartbeat ──► here ── withdraw, user removed ─────────────────► gone
                 ▲                     └─ silent for a lease, token revoked ─► client: gone
                 └──────────── register ◄── expired ◄──────────────────────── endpoint

An endpoint that is silent loses its mailbox and its key is let in nowhere, but its name and whom it is shared with stay: a
machine room that is dark for a week changes nothing for its users. Whoever has lost its mailbox is noted in `removals` in
the same transaction, so that the broker forgets it too, now or later.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gcref import ids
from gcref.errors import NotFoundError, RejectedError
from gcref.hub import sharing
from gcref.hub.database import Database, Party, Removal
from gcref.hub.who import Who

# More than any user runs; it keeps one user from filling the hub and the broker.
PARTIES_PER_USER: Final = 1_000
# An endpoint that has been away for longer than this is not coming back.
FORGET_S: Final = 180 * 86_400.0
# Reasons come from outside and are shown to people.
_REASON_MAX: Final = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Described:
    """What a party says of itself, checked. The attributes are those of `gcref.directory.hub.Registration`."""

    id: bytes
    kind: str
    name: str
    public_key: str
    record: dict[str, Any] | None
    trust_hub: bool
    wants_mailbox: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """How a party stands with the hub.

    Attributes:
        wants_mailbox: it is to have one.
        mailbox_ready: it has one.
        mailbox_reason: why it has none.
        owner: its user's name.
        allowed: keys that it may let in, with their roles.
    """

    wants_mailbox: bool
    mailbox_ready: bool
    mailbox_reason: str | None
    owner: str
    allowed: dict[str, str]


def register(database: Database, who: Who, said: Described) -> None:
    """Write down what a party says; whatever mailbox it has must be made again after this.

    Raises:
        RejectedError: the id is somebody else's, or of another kind, or the user has too many parties.
    """
    now = time.time()

    def work(session: Session) -> None:
        party = session.get(Party, said.id)
        if party is None:
            count = session.scalar(sa.select(sa.func.count()).where(Party.user_id == who.user_id)) or 0
            if count >= PARTIES_PER_USER:
                raise RejectedError(
                    f"user {who.name} has {count} parties already, and no more are taken; clients that ended without "
                    f"saying so go after the lease"
                )
            party = Party(id=said.id, kind=said.kind, user_id=who.user_id)
            session.add(party)
        elif party.user_id != who.user_id or party.kind != said.kind:
            raise RejectedError(f"the id {ids.text(said.id)} is taken: a party's id is its own")
        elif party.wants_mailbox and not said.wants_mailbox:
            session.merge(Removal(party_id=said.id, since=now))
        party.token_id = who.token_id
        party.name, party.public_key, party.record = said.name, said.public_key, said.record
        party.trust_hub, party.wants_mailbox = said.trust_hub, said.wants_mailbox
        party.mailbox_ready, party.mailbox_reason = False, None
        party.running = said.record is None or bool(said.record.get("running", True))
        party.expired, party.registered, party.seen = False, now, now
        if said.wants_mailbox:
            # It is made anew instead. Whoever removes looks here first, under the party's lock.
            session.execute(sa.delete(Removal).where(Removal.party_id == said.id))

    database.write(work)


def heartbeat(database: Database, who: Who, id: bytes, running: bool) -> Standing:
    """Note that a party lives.

    Raises:
        NotFoundError: it is not registered (any more), or is somebody else's.
    """

    def work(session: Session) -> Standing:
        party = _own(session, who, id)
        party.seen, party.running = time.time(), running
        return _standing(session, who, party)

    return database.write(work)


def standing(database: Database, who: Who, id: bytes) -> Standing:
    """How a party stands. Raises as `heartbeat` does."""
    return database.read(lambda session: _standing(session, who, _own(session, who, id)))


def withdraw(database: Database, who: Who, id: bytes) -> list[bytes]:
    """Forget a party of this user; nothing happens if there is none.

    Returns:
        The ids of the parties whose mailboxes are to go now.
    """
    mine = sa.and_(Party.id == id, Party.user_id == who.user_id)
    return database.write(lambda session: dismiss(session, mine, for_good=True))


def dismiss(session: Session, which: sa.ColumnElement[bool], *, for_good: bool) -> list[bytes]:
    """Take parties out, inside somebody's transaction, and note what the broker is to forget.

    Args:
        which: a condition on `Party`.
        for_good: endpoints go too; else they stay as expired.

    Returns:
        The ids of the parties whose mailboxes are to go.
    """
    now = time.time()
    found = session.scalars(sa.select(Party).where(which)).all()
    # Also those that have none: it may have been made halfway.
    mailboxes = [party.id for party in found if party.wants_mailbox]
    for id in mailboxes:
        session.merge(Removal(party_id=id, since=now))
    for party in found:
        if for_good or party.kind != "endpoint":
            session.delete(party)
        else:
            party.expired, party.running = True, False
            party.mailbox_ready, party.wants_mailbox = False, False
    session.flush()
    return mailboxes


def expire(database: Database, lease_s: float) -> list[bytes]:
    """Let go of those that have been silent for a lease.

    Returns:
        The ids of the parties whose mailboxes are to go now.
    """
    now = time.time()
    silent = sa.and_(Party.seen < now - lease_s, Party.expired.is_(False))
    forgotten = Party.seen < now - max(FORGET_S, lease_s)
    found = database.read(
        lambda session: session.scalar(sa.select(sa.func.count()).where(silent | forgotten))
    )
    if not found:
        return []

    def work(session: Session) -> list[bytes]:
        gone = dismiss(session, silent, for_good=False)
        return gone + dismiss(session, forgotten, for_good=True)

    return database.write(work)


def note_mailbox(database: Database, id: bytes, ready: bool, reason: str | None) -> bool:
    """Write down whether a party's mailbox is there.

    Returns:
        False: the party does not want one (any more); one that has just been made is noted for removal.
    """

    def work(session: Session) -> bool:
        party = session.get(Party, id)
        if party is None or not party.wants_mailbox:
            if ready:
                session.merge(Removal(party_id=id, since=time.time()))
            return False
        party.mailbox_ready = ready
        party.mailbox_reason = None if reason is None else reason[:_REASON_MAX]
        return True

    return database.write(work)


def _own(session: Session, who: Who, id: bytes) -> Party:
    party = session.get(Party, id)
    if party is None or party.expired or party.user_id != who.user_id:
        raise NotFoundError(f"no party {ids.text(id)} of yours is registered: register it (again)")
    return party


def _standing(session: Session, who: Who, party: Party) -> Standing:
    return Standing(
        party.wants_mailbox,
        party.mailbox_ready,
        party.mailbox_reason,
        who.name,
        sharing.allowed(session, party) if party.trust_hub and party.kind == "endpoint" else {},
    )
