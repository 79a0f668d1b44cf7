from __future__ import annotations

import pytest

from gcref import ids
from gcref.directory.records import EndpointRecord
from gcref.errors import AuthError, NotFoundError, RejectedError
from gcref.hub import parties, sharing
from gcref.hub.database import Database
from gcref.hub.who import Who
from tests.unit.hub.people import allowed, key_of, let_pass, party, user


def test_an_endpoint_is_found_by_id_by_own_name_and_by_owner_and_name(
    database: Database, alice: Who, bob: Who
) -> None:
    id = party(database, alice, "endpoint", "site", 1)
    sharing.share(database, alice, "site", "bob")
    for said in (ids.text(id), id.hex(), "site", "alice/site"):
        assert EndpointRecord.from_json(sharing.find(database, alice, said)).id == id
    for said in (ids.text(id), "alice/site"):
        assert EndpointRecord.from_json(sharing.find(database, bob, said)).id == id
    with pytest.raises(NotFoundError):
        sharing.find(database, bob, "site")  # bob has no endpoint of that name


def test_what_is_not_shared_does_not_exist(database: Database, alice: Who, bob: Who) -> None:
    id = party(database, alice, "endpoint", "site", 1)
    laptop = party(database, alice, "client", "laptop", 2)
    for said in (ids.text(id), "alice/site", "site", ids.text(laptop)):
        with pytest.raises(NotFoundError, match="no endpoint"):
            sharing.find(database, bob, said)
        with pytest.raises(NotFoundError, match="no endpoint"):
            sharing.share(database, bob, said, "bob")
        with pytest.raises(NotFoundError, match="no endpoint"):
            sharing.shared_with(database, bob, said)
    assert sharing.endpoints(database, bob) == []
    with pytest.raises(NotFoundError):
        sharing.find(database, alice, ids.text(laptop))  # clients are not for others, nor for oneself


def test_only_the_owner_shares(database: Database, alice: Who, bob: Who) -> None:
    party(database, alice, "endpoint", "site", 1)
    sharing.share(database, alice, "site", "bob")
    sharing.share(database, alice, "site", "bob")
    assert sharing.shared_with(database, alice, "site") == ["bob"]
    user(database, "carol")
    with pytest.raises(AuthError, match="only its owner"):
        sharing.share(database, bob, "alice/site", "carol")
    with pytest.raises(AuthError, match="only its owner"):
        sharing.unshare(database, bob, "alice/site", "bob")
    with pytest.raises(NotFoundError, match="no user 'dave'"):
        sharing.share(database, alice, "site", "dave")
    sharing.unshare(database, alice, "site", "bob")
    sharing.unshare(database, alice, "site", "bob")
    assert sharing.endpoints(database, bob) == []


def test_what_only_the_owners_machine_can_use_stays_with_the_owner(
    database: Database, alice: Who, bob: Who
) -> None:
    party(database, alice, "endpoint", "site", 1)
    sharing.share(database, alice, "site", "bob")
    mine, theirs = sharing.find(database, alice, "site"), sharing.find(database, bob, "alice/site")
    assert (mine["host_nonce"], mine["control"]) == ("secret", ["tcp://10.0.0.1:1", "ipc:///x/y"])
    assert (theirs["host_nonce"], theirs["control"]) == ("", ["tcp://10.0.0.1:1"])


def test_whose_keys_an_endpoint_may_let_in(database: Database, alice: Who, bob: Who) -> None:
    """The owner's clients and endpoints as users; users it is shared with as users; their endpoints as peers."""
    carol = user(database, "carol")
    site = party(database, alice, "endpoint", "site", 1)
    keys = {
        "alice's laptop": party(database, alice, "client", "l", 2),
        "alice's other site": party(database, alice, "endpoint", "o", 3),
        "bob's laptop": party(database, bob, "client", "l", 4),
        "bob's site": party(database, bob, "endpoint", "o", 5),
        "carol's laptop": party(database, carol, "client", "l", 6),
        "carol's site": party(database, carol, "endpoint", "c", 7),
    }
    mine = {key_of(2): "user", key_of(3): "user"}
    assert allowed(database, alice, site) == mine
    sharing.share(database, alice, "site", "bob")
    with_bob = {**mine, key_of(4): "user", key_of(5): "peer"}
    assert allowed(database, alice, site) == with_bob
    # Now carol's endpoint and alice's have bob in common.
    sharing.share(database, carol, "c", "bob")
    assert allowed(database, alice, site) == {**with_bob, key_of(7): "peer"}
    sharing.unshare(database, alice, "site", "bob")
    assert allowed(database, alice, site) == mine
    parties.withdraw(database, alice, keys["alice's laptop"])
    let_pass(database, keys["alice's other site"], 1000)
    parties.expire(database, 100)
    assert allowed(database, alice, site) == {}


def test_a_key_that_is_both_has_the_rights_of_a_user(database: Database, alice: Who, bob: Who) -> None:
    site = party(database, alice, "endpoint", "site", 1)
    sharing.share(database, alice, "site", "bob")
    party(database, bob, "client", "l", 5)
    party(database, bob, "endpoint", "o", 5)
    assert allowed(database, alice, site) == {key_of(5): "user"}


def test_an_endpoint_that_does_not_trust_the_hub_is_told_no_keys(database: Database, alice: Who) -> None:
    site = party(database, alice, "endpoint", "site", 1, trust_hub=False)
    laptop = party(database, alice, "client", "laptop", 2, trust_hub=True)
    assert allowed(database, alice, site) == {}
    assert allowed(database, alice, laptop) == {}


def test_a_name_means_the_one_that_runs(database: Database, alice: Who) -> None:
    old = party(database, alice, "endpoint", "site", 1)
    let_pass(database, old, 1000)  # killed: it never said that it stopped
    new = party(database, alice, "endpoint", "site", 2)
    assert sharing.find(database, alice, "site")["id"] == ids.text(new)
    parties.heartbeat(database, alice, new, running=False)
    parties.heartbeat(database, alice, old, running=True)
    assert sharing.find(database, alice, "site")["id"] == ids.text(old)
    parties.heartbeat(database, alice, new, running=True)
    with pytest.raises(RejectedError, match="by its id"):
        sharing.find(database, alice, "site")
