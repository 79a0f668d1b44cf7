from __future__ import annotations

import pytest
import sqlalchemy as sa

from gcref import ids
from gcref.errors import NotFoundError, RejectedError
from gcref.hub import parties, sharing
from gcref.hub.database import Database, Removal
from gcref.hub.who import Who
from tests.unit.hub.people import described, key_of, let_pass, party

LEASE_S = 1000.0


def removals(database: Database) -> list[bytes]:
    return database.read(lambda session: list(session.scalars(sa.select(Removal.party_id))))


def test_registering_again_changes_what_is_said_and_nothing_else(database: Database, alice: Who) -> None:
    id = party(database, alice, "endpoint", "site", 1)
    sharing.share(database, alice, "site", "alice")
    parties.note_mailbox(database, id, True, None)
    parties.register(database, alice, described("endpoint", "site2", key_of(2), id=id))
    found = sharing.endpoints(database, alice)
    assert [(record["name"], record["public_key"]) for record in found] == [("site2", key_of(2))]
    # The old password is not known any more: the mailbox is to be made anew.
    assert not parties.standing(database, alice, id).mailbox_ready


def test_an_id_belongs_to_whoever_registered_it(database: Database, alice: Who, bob: Who) -> None:
    id = party(database, alice, "endpoint", "site", 1)
    with pytest.raises(RejectedError, match="taken"):
        parties.register(database, bob, described("endpoint", "site", key_of(2), id=id))
    with pytest.raises(RejectedError, match="taken"):
        parties.register(database, alice, described("client", "site", key_of(2), id=id))
    with pytest.raises(NotFoundError):
        parties.heartbeat(database, bob, id, True)
    assert parties.withdraw(database, bob, id) == []
    assert sharing.find(database, alice, "site")["public_key"] == key_of(1)


def test_a_withdrawn_party_is_gone_and_its_mailbox_is_to_go(database: Database, alice: Who) -> None:
    id = party(database, alice, "endpoint", "site", 1)
    assert parties.withdraw(database, alice, id) == [id]
    assert removals(database) == [id]
    assert sharing.endpoints(database, alice) == []
    assert parties.withdraw(database, alice, id) == []
    with pytest.raises(NotFoundError, match="register"):
        parties.heartbeat(database, alice, id, True)


def test_who_comes_back_keeps_the_mailbox_that_was_to_go(database: Database, alice: Who) -> None:
    id = party(database, alice, "client", "laptop", 1)
    parties.withdraw(database, alice, id)
    parties.register(database, alice, described("client", "laptop", key_of(1), id=id))
    assert removals(database) == []


def test_who_does_not_want_a_mailbox_any_more_loses_it(database: Database, alice: Who) -> None:
    id = party(database, alice, "client", "laptop", 1)
    parties.register(database, alice, described("client", "laptop", key_of(1), id=id, wants_mailbox=False))
    assert removals(database) == [id]


def test_a_silent_client_goes_and_a_silent_endpoint_keeps_its_name_and_shares(
    database: Database, alice: Who, bob: Who
) -> None:
    site = party(database, alice, "endpoint", "site", 1)
    laptop = party(database, alice, "client", "laptop", 2)
    lively = party(database, alice, "client", "lively", 3)
    sharing.share(database, alice, "site", "bob")
    for id in (site, laptop):
        let_pass(database, id, LEASE_S + 1)
    assert set(parties.expire(database, LEASE_S)) == {site, laptop}
    assert parties.expire(database, LEASE_S) == []
    assert set(removals(database)) == {site, laptop}
    record = sharing.find(database, bob, "alice/site")
    assert (record["running"], record["mailbox"]) == (False, False)
    assert parties.heartbeat(database, alice, lively, True).owner == "alice"
    for id in (site, laptop):
        with pytest.raises(NotFoundError, match="register"):
            parties.heartbeat(database, alice, id, True)
    parties.register(database, alice, described("endpoint", "site", key_of(1), id=site))
    assert sharing.find(database, bob, "alice/site")["running"] is True


def test_an_endpoint_that_never_comes_back_is_forgotten(database: Database, alice: Who) -> None:
    site = party(database, alice, "endpoint", "site", 1)
    let_pass(database, site, LEASE_S + 1)
    parties.expire(database, LEASE_S)
    let_pass(database, site, parties.FORGET_S)
    parties.expire(database, LEASE_S)
    assert sharing.endpoints(database, alice) == []


def test_one_user_cannot_fill_the_hub(
    database: Database, alice: Who, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parties, "PARTIES_PER_USER", 2)
    first = party(database, alice, "client", "a", 1)
    party(database, alice, "client", "b", 2)
    with pytest.raises(RejectedError, match="no more"):
        party(database, alice, "client", "c", 3)
    parties.register(database, alice, described("client", "a", key_of(1), id=first))


def test_a_mailbox_that_was_made_for_nobody_is_to_go(database: Database, alice: Who) -> None:
    stranger = ids.new_id()
    assert not parties.note_mailbox(database, stranger, True, None)
    assert removals(database) == [stranger]


def test_an_orderly_stop_is_seen_by_others(database: Database, alice: Who) -> None:
    site = party(database, alice, "endpoint", "site", 1)
    parties.heartbeat(database, alice, site, running=False)
    assert sharing.find(database, alice, "site")["running"] is False
    parties.heartbeat(database, alice, site, running=True)
    assert sharing.find(database, alice, "site")["running"] is True
