"""Who may use which endpoint, and whose keys it may therefore let in.

An endpoint's *people* are its owner and the users it is shared with. Its keys:

    clients of its people                                 ─► user
    endpoints of its owner                                ─► user   (an owner's endpoints are the owner)
    endpoints that have one of its people among theirs    ─► peer   (they may fetch, with the token in a reference)

What a user may not use does not exist for them: not found, never forbidden.
"""

from __future__ import annotations

import time
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gcref import ids
from gcref.errors import AuthError, NotFoundError, RejectedError
from gcref.hub.config import HEARTBEAT_S
from gcref.hub.database import Database, Party, Share, User
from gcref.hub.who import Who

# Of two endpoints with one name, the one that was not heard for so long is taken for dead.
FRESH_S: Final = 3 * HEARTBEAT_S


def find(database: Database, who: Who, endpoint: str) -> dict[str, Any]:
    """The record of an endpoint that a user may use.

    Args:
        endpoint: the text of its id, the name of one of theirs, or `owner/name`.

    Raises:
        NotFoundError: there is none, or not for this user.
        RejectedError: the name fits several that run.
    """
    return database.read(lambda session: _record(who, *_find(session, who, endpoint)))


def endpoints(database: Database, who: Who) -> list[dict[str, Any]]:
    """The records of all endpoints that a user may use, theirs first."""

    def work(session: Session) -> list[dict[str, Any]]:
        rows = session.execute(
            _usable(who).order_by(Party.user_id != who.user_id, User.name, Party.name, Party.id)
        )
        return [_record(who, party, owner) for party, owner in rows]

    return database.read(work)


def share(database: Database, who: Who, endpoint: str, user: str) -> None:
    """Let a user use an endpoint; the owner needs no share.

    Raises:
        NotFoundError: no such endpoint, or no such user.
        AuthError: the endpoint is not theirs.
    """

    def work(session: Session) -> None:
        party, other = _owned(session, who, endpoint), _user_id(session, user)
        if other != who.user_id and session.get(Share, (party.id, other)) is None:
            session.add(Share(party_id=party.id, user_id=other, since=time.time()))

    database.write(work)


def unshare(database: Database, who: Who, endpoint: str, user: str) -> None:
    """Take a share back. Raises as `share` does."""

    def work(session: Session) -> None:
        party, other = _owned(session, who, endpoint), _user_id(session, user)
        session.execute(sa.delete(Share).where(Share.party_id == party.id, Share.user_id == other))

    database.write(work)


def shared_with(database: Database, who: Who, endpoint: str) -> list[str]:
    """The names of the users an endpoint is shared with. Raises as `share` does."""

    def work(session: Session) -> list[str]:
        party = _owned(session, who, endpoint)
        return list(
            session.scalars(
                sa.select(User.name).join(Share).where(Share.party_id == party.id).order_by(User.name)
            )
        )

    return database.read(work)


def may_use(who: Who) -> sa.ColumnElement[bool]:
    """The condition on `Party` that a user may use it."""
    shared = sa.select(Share.party_id).where(Share.user_id == who.user_id)
    return sa.and_(Party.kind == "endpoint", sa.or_(Party.user_id == who.user_id, Party.id.in_(shared)))


def allowed(session: Session, endpoint: Party) -> dict[str, str]:
    """Keys that an endpoint may let in (Z85), with their roles."""
    people = [
        endpoint.user_id,
        *session.scalars(sa.select(Share.user_id).where(Share.party_id == endpoint.id)),
    ]
    here = sa.and_(Party.expired.is_(False), Party.id != endpoint.id)
    shared = sa.select(Share.party_id).where(Share.user_id.in_(people))
    peers = sa.select(Party.public_key).where(
        here, Party.kind == "endpoint", sa.or_(Party.user_id.in_(people), Party.id.in_(shared))
    )
    users = sa.select(Party.public_key).where(
        here,
        sa.or_(sa.and_(Party.kind == "client", Party.user_id.in_(people)), Party.user_id == endpoint.user_id),
    )
    # A key that is both has the rights of a user.
    return dict.fromkeys(session.scalars(peers), "peer") | dict.fromkeys(session.scalars(users), "user")


def _usable(who: Who) -> Any:
    # A `Select` of a party and its owner's name; how that is written differs between SQLAlchemy 2.0 and 2.1.
    return sa.select(Party, User.name).join(User, User.id == Party.user_id).where(may_use(who))


def _find(session: Session, who: Who, endpoint: str) -> tuple[Party, str]:
    query = _usable(who)
    try:
        query = query.where(Party.id == ids.parse(endpoint))
    except ValueError:
        owner, slash, name = endpoint.rpartition("/")
        query = query.where(Party.name == name, User.name == (owner if slash else who.name))
    found = [(party, name) for party, name in session.execute(query)]
    # A name may have been given anew: who is there comes before who is not, and who came last before the others.
    running = [pair for pair in found if pair[0].running and not pair[0].expired]
    if len(running) > 1:
        # One that was killed has not said so.
        running = [pair for pair in running if pair[0].seen > time.time() - FRESH_S]
    if len(running) > 1:
        which = ", ".join(ids.text(party.id) for party, _name in running)
        raise RejectedError(
            f"several endpoints called {endpoint!r} are running: {which}; say which by its id"
        )
    if not found:
        raise NotFoundError(
            f"there is no endpoint {endpoint!r} that you may use; it must be registered with this hub, and its owner must "
            f"have shared it with you"
        )
    return (running or sorted(found, key=lambda pair: -pair[0].registered))[0]


def _owned(session: Session, who: Who, endpoint: str) -> Party:
    party, owner = _find(session, who, endpoint)
    if party.user_id != who.user_id:
        raise AuthError(f"endpoint {endpoint!r} is {owner}'s: only its owner says who may use it")
    return party


def _user_id(session: Session, name: str) -> int:
    found = session.scalar(sa.select(User.id).where(User.name == name))
    if found is None:
        raise NotFoundError(f"the hub knows no user {name!r}")
    return found


def _record(who: Who, party: Party, owner: str) -> dict[str, Any]:
    record = {
        **(party.record or {}),
        "running": party.running and not party.expired,
        "mailbox": party.mailbox_ready,
    }
    if party.user_id != who.user_id:
        # Another user is never "the same machine and user": what only the owner's own processes can use stays with them.
        record["host_nonce"] = ""
        for key in ("control", "bulk"):
            record[key] = [address for address in record.get(key, ()) if not address.startswith("ipc://")]
    return record
