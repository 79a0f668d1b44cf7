"""Bulk through mailboxes of a real RabbitMQ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gcref.brains.transfer_windows import RANGE_BYTES
from gcref.carriers.keys import KeyPair
from gcref.carriers.mail.amqp import AmqpMailbox
from gcref.carriers.mail.memory import Post
from gcref.carriers.mail.post import Mailbox, address_of
from gcref.wire.messages import ECHO_ID
from tests.contract.bulk_parties import MB, Party, X, blob, some_parties

if TYPE_CHECKING:
    from tests.support.rabbit import Rabbit


@pytest.fixture
def pair(tmp_path: Path, rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Party, Party]]:
    """(site, asker), each with a mailbox at the broker."""
    made: list[bytes] = []

    def mailbox_for(party: bytes, pair: KeyPair) -> Mailbox:
        made.append(party)
        mailbox = AmqpMailbox(party, pair)
        mailbox.use(rabbit.party(party))
        return mailbox

    with some_parties(tmp_path, Post()) as parties:
        asker = parties(b"a", mailbox_for=mailbox_for, range_timeout_s=1e6)
        site = parties(b"s", {asker.keys.public: "user"}, mailbox_for=mailbox_for, range_timeout_s=1e6)
        asker.connect(site, address_of(site.id), "broker", "user")
        yield site, asker
    for party in made:
        rabbit.remove(party)


def test_bytes_arrive_exactly_both_ways(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    site.place.objects[X, 1] = blob(20 * MB + 13)
    asker.place.objects[X, 2] = blob(9 * MB, 5)
    asker.bulk.pull(X, 1, 20 * MB + 13, site.id)
    asker.pulled()
    site.bulk.pull(X, 2, 9 * MB, asker.id, b"t" * 16)
    site.pulled()
    assert asker.place.received == {X: blob(20 * MB + 13)}
    assert site.place.received == {X: blob(9 * MB, 5)}


def test_a_long_pull_leaves_nothing_behind(pair: tuple[Party, Party]) -> None:
    site, asker = pair
    asker.bulk.pull(ECHO_ID, 0, 60 * RANGE_BYTES, site.id)
    assert asker.pulled().carriers == {"broker": 60 * RANGE_BYTES}
    assert site.mailbox.describe()["waiting_bytes"] == 0
    assert asker.mailbox.describe()["dropped"] == dict.fromkeys(asker.mailbox.describe()["dropped"], 0)  # type: ignore[call-overload]
