from __future__ import annotations

import pytest
import sqlalchemy as sa

from gcref.errors import NotFoundError, RejectedError
from gcref.hub import parties, sharing, users
from gcref.hub.database import Database, Removal, Token
from gcref.hub.who import Who
from tests.unit.hub.people import allowed, party


def test_a_token_says_who_one_is_and_is_kept_as_a_hash_only(database: Database) -> None:
    made = users.add(database, "carol@site")
    who = users.authenticate(database, made.secret)
    assert who is not None
    assert who.name == "carol@site"
    assert users.authenticate(database, made.secret + "x") is None
    assert users.authenticate(database, "") is None
    with database.connect() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM tokens").all()
    secret = made.secret.encode()
    assert not any(
        secret in (cell if isinstance(cell, bytes) else str(cell).encode()) for row in rows for cell in row
    )
    assert made.secret not in repr(made)


def test_use_of_a_token_is_noted(database: Database) -> None:
    made = users.add(database, "carol")
    assert users.tokens_of(database, "carol")[0].last_used is None
    users.authenticate(database, made.secret)
    first = users.tokens_of(database, "carol")[0].last_used
    assert first is not None
    database.write(lambda session: session.execute(sa.update(Token).values(last_used=first - 3600)))
    users.authenticate(database, made.secret)
    again = users.tokens_of(database, "carol")[0].last_used
    assert again is not None
    assert again >= first


def test_a_revoked_token_is_worthless_and_the_others_are_not(database: Database) -> None:
    one = users.add(database, "carol")
    two = users.new_token(database, "carol")
    users.revoke(database, one.id)
    assert users.authenticate(database, one.secret) is None
    assert users.authenticate(database, two.secret) is not None
    with pytest.raises(NotFoundError, match="no token"):
        users.revoke(database, one.id)


def test_revoking_a_token_takes_its_parties_out(database: Database, alice: Who) -> None:
    other = users.authenticate(database, users.new_token(database, "alice").secret)
    assert other is not None
    stays = party(database, other, "endpoint", "stays", 1)
    site = party(database, alice, "endpoint", "site", 2)
    laptop = party(database, alice, "client", "laptop", 3)
    assert len(allowed(database, other, stays)) == 2
    assert set(users.revoke(database, alice.token_id)) == {site, laptop}
    assert allowed(database, other, stays) == {}
    assert set(database.read(lambda session: session.scalars(sa.select(Removal.party_id)).all())) == {
        site,
        laptop,
    }
    # Its name and its shares outlive the token.
    assert sharing.find(database, other, "site")["running"] is False
    with pytest.raises(NotFoundError, match="register"):
        parties.heartbeat(database, other, site, True)


def test_a_removed_user_leaves_nothing(database: Database, alice: Who, bob: Who) -> None:
    theirs = party(database, bob, "endpoint", "theirs", 1)
    site = party(database, alice, "endpoint", "site", 2)
    sharing.share(database, alice, "site", "bob")
    sharing.share(database, bob, "theirs", "alice")
    assert allowed(database, bob, theirs) != {}
    assert users.remove(database, "alice") == [site]
    assert allowed(database, bob, theirs) == {}
    assert sharing.shared_with(database, bob, "theirs") == []
    assert [record["name"] for record in sharing.endpoints(database, bob)] == ["theirs"]
    assert [row.name for row in users.listed(database)] == ["bob"]
    with pytest.raises(NotFoundError, match="no user 'alice'"):
        users.remove(database, "alice")


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "x" * 65, "ä"])
def test_names_that_would_mislead_are_refused(database: Database, name: str) -> None:
    with pytest.raises(RejectedError, match="cannot name a user"):
        users.add(database, name)


def test_a_name_is_given_once(database: Database, alice: Who) -> None:
    with pytest.raises(RejectedError, match="already"):
        users.add(database, "alice")
