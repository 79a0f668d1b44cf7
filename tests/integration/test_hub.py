"""A hub and its broker: parties get mailboxes that open to nobody else, and lose them when they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest

from gcref import ids
from gcref.carriers.mail.post import MailboxAccess, queue_of
from gcref.config import LEASE_S
from gcref.directory.hub import HubClient, Registered, Registration
from gcref.directory.records import EndpointRecord
from gcref.errors import AuthError, HubUnavailableError, NotFoundError, RejectedError
from gcref.hub.database import Database
from tests.support.hub import Hub
from tests.support.proxy import Proxy
from tests.support.rabbit import Rabbit
from tests.support.waiting import wait_until
from tests.unit.hub.people import let_pass

SWEEP_S = 0.3


@pytest.fixture(scope="module")
def hub(_nothing_left: None, rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub"), rabbit, sweep_s=SWEEP_S) as found:
        yield found


@pytest.fixture(scope="module")
def far(_nothing_left: None, rabbit: Rabbit) -> Iterator[Proxy]:
    """What lies between a hub and its broker."""
    with Proxy(rabbit.management_url.replace("http", "tcp")) as found:
        yield found


@pytest.fixture(scope="module")
def far_hub(far: Proxy, rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that reaches its broker through `far`."""
    address = {"management_url": far.address.replace("tcp", "http")}
    with Hub(tmp_path_factory.mktemp("far"), rabbit, broker=address, sweep_s=SWEEP_S) as found:
        yield found


@pytest.fixture(scope="module")
def alice(hub: Hub) -> HubClient:
    return hub.client("alice")


@pytest.fixture(scope="module")
def bob(hub: Hub) -> HubClient:
    return hub.client("bob")


def key_of(id: bytes) -> str:
    return id.hex()[:32] + "********"


def client(name: str = "laptop") -> Registration:
    id = ids.new_id()
    return Registration(id, "client", name, key_of(id))


def endpoint(name: str) -> Registration:
    id = ids.new_id()
    record = EndpointRecord(id, name, key_of(id), ("tcp://10.1.2.3:4",), ("tcp://10.1.2.3:5",), running=True)
    return Registration(id, "endpoint", name, key_of(id), record.as_json(), trust_hub=True)


def mailbox(found: Registered) -> MailboxAccess:
    assert found.mailbox is not None, found.mailbox_reason
    return found.mailbox


def before_long(ask: Callable[[], Registered]) -> MailboxAccess:
    """The mailbox that the hub gives when asked often enough."""
    found: list[MailboxAccess] = []

    def has_come() -> bool:
        answer = ask().mailbox
        found.extend(() if answer is None else (answer,))
        return bool(found)

    wait_until(has_come, timeout_s=15, what="a mailbox")
    return found[0]


class At:
    """A connection to the broker, as a party makes it."""

    def __init__(self, access: MailboxAccess) -> None:
        self.connection = pika.BlockingConnection(pika.URLParameters(access.url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()

    def __enter__(self) -> At:
        return self

    def __exit__(self, *_: object) -> None:
        if self.connection.is_open:
            self.connection.close()

    def was_closed(self) -> bool:
        try:
            self.connection.process_data_events(0)
        except pika.exceptions.AMQPError:
            return True
        return not self.connection.is_open


def may(access: MailboxAccess, work: Any) -> bool:
    """Whether the broker lets the holder of this do something."""
    refusals = (pika.exceptions.ChannelClosedByBroker, pika.exceptions.ConnectionClosedByBroker)
    with At(access) as at:
        try:
            work(at.channel)
        except refusals as error:
            if error.reply_code != 403:
                raise
            return False
        return True


def opens(access: MailboxAccess) -> bool:
    """Whether the broker lets the holder of this in."""
    try:
        with At(access):
            return True
    except (pika.exceptions.ProbableAuthenticationError, pika.exceptions.ConnectionClosedByBroker):
        return False


def has_queue(rabbit: Rabbit, id: bytes) -> bool:
    return queue_of(id) in {queue["name"] for queue in rabbit.manage("GET", "queues/%2F?columns=name")}


def test_a_party_writes_to_everybody_and_reads_its_own(alice: HubClient, bob: HubClient) -> None:
    mine, theirs = mailbox(alice.register(client())), mailbox(bob.register(client()))
    with At(mine) as here, At(theirs) as there:
        here.channel.basic_publish("", theirs.queue, b"sealed", mandatory=True)
        _method, _properties, body = there.channel.basic_get(theirs.queue, auto_ack=True)
        assert body == b"sealed"


def test_a_party_may_do_nothing_else_at_the_broker(alice: HubClient, bob: HubClient) -> None:
    """A broker user that reads somebody else's mailbox, or rearranges the broker, is refused."""
    thief, owner = mailbox(alice.register(client())), mailbox(bob.register(client()))
    assert may(thief, lambda channel: channel.basic_get(thief.queue))
    for attempt in (
        lambda channel: channel.basic_get(owner.queue),
        lambda channel: channel.basic_consume(owner.queue, print),
        lambda channel: channel.queue_purge(owner.queue),
        lambda channel: channel.queue_delete(owner.queue),
        lambda channel: channel.queue_delete(thief.queue),
        lambda channel: channel.queue_declare("mine", durable=True),
        lambda channel: channel.queue_bind(thief.queue, "amq.topic", "#"),
        lambda channel: channel.exchange_declare("mine"),
        lambda channel: channel.basic_publish("amq.topic", "x", b"x"),
    ):
        assert not may(thief, attempt)


def test_registering_again_keeps_the_mail_and_changes_the_password(alice: HubClient, bob: HubClient) -> None:
    me = client()
    old = mailbox(alice.register(me))
    with At(old) as before, At(mailbox(bob.register(client()))) as there:
        there.channel.basic_publish("", old.queue, b"kept", mandatory=True)
        new = mailbox(alice.register(me))
        # A process of this party that died without a word would take mail away from the next one.
        wait_until(before.was_closed, what="the old connection to be closed")
    assert not opens(old)
    with At(new) as now:
        assert now.channel.basic_get(new.queue, auto_ack=True)[2] == b"kept"


def test_a_party_that_goes_takes_everything_along(alice: HubClient, rabbit: Rabbit) -> None:
    me = client()
    access = mailbox(alice.register(me))
    with At(access) as at:
        alice.withdraw(me.id)
        wait_until(at.was_closed, what="the connection to be closed")
    assert not opens(access)
    assert not has_queue(rabbit, me.id)
    alice.withdraw(me.id)
    with pytest.raises(NotFoundError, match="register"):
        alice.heartbeat(me.id)


def test_nobody_acts_for_anothers_party(hub: Hub, alice: HubClient, bob: HubClient) -> None:
    """A token of another user, a party with a stolen name, a token that is none."""
    site = endpoint("guarded")
    access = mailbox(alice.register(site))
    with pytest.raises(RejectedError, match="taken"):
        bob.register(site)
    with pytest.raises(NotFoundError):
        bob.heartbeat(site.id)
    with pytest.raises(NotFoundError):
        bob.report(site.id, [(ids.new_id(), "done", 1.0)])
    with pytest.raises(NotFoundError):
        bob.find(site.id)
    bob.withdraw(site.id)
    assert opens(access)
    stranger = HubClient(hub.url, "gcref_guessed")
    with pytest.raises(AuthError, match="revoked"):
        stranger.register(site)
    stranger.close()
    assert alice.find("guarded").mailbox


def test_sharing_lets_a_user_in_and_out(
    hub: Hub, alice: HubClient, bob: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gcref share` and `gcref unshare`, with the owner's settings."""
    monkeypatch.setenv("GCREF_HUB_URL", hub.url)
    monkeypatch.setenv("GCREF_TOKEN", hub.token("alice"))
    site, laptop = endpoint("shared"), client()
    alice.register(site)
    bob.register(laptop)
    bob_key = laptop.public_key.encode()
    assert bob_key not in alice.heartbeat(site.id).allowed
    assert "bob may use shared" in hub.command("share", "shared", "bob")
    assert alice.shared_with(site.id) == ["bob"]
    assert alice.heartbeat(site.id).allowed[bob_key] == "user"
    assert bob.find("alice/shared").id == site.id
    assert site.id in {record.id for record in bob.endpoints()}
    task = ids.new_id()
    alice.report(site.id, [(task, "done", 12.5)])
    assert [(event.endpoint, event.endpoint_name, event.state, event.at) for event in bob.where_is(task)] == [
        (site.id, "alice/shared", "done", 12.5)
    ]
    hub.command("unshare", ids.text(site.id), "bob")
    assert bob_key not in alice.heartbeat(site.id).allowed
    assert bob.where_is(task) == []
    with pytest.raises(NotFoundError):
        bob.find(site.id)


def test_a_revoked_token_takes_its_parties_along(hub: Hub, rabbit: Rabbit) -> None:
    dora, site, laptop = hub.client("dora"), endpoint("doras"), client()
    other = HubClient(hub.url, hub.command("hub", "token", "new", "dora").strip())
    assert other.whoami() == "dora"
    other.register(site)
    access = mailbox(dora.register(laptop))
    assert laptop.public_key.encode() in other.heartbeat(site.id).allowed
    first = hub.command("hub", "token", "list", "dora").splitlines()[1].split()[0]
    with At(access) as at:
        hub.command("hub", "token", "revoke", first)
        wait_until(at.was_closed, what="the connection to be closed")
    assert not opens(access)
    assert not has_queue(rabbit, laptop.id)
    assert laptop.public_key.encode() not in other.heartbeat(site.id).allowed
    with pytest.raises(AuthError, match="revoked"):
        dora.heartbeat(laptop.id)
    hub.command("hub", "user", "remove", "dora")
    with pytest.raises(AuthError):
        other.heartbeat(site.id)
    assert not has_queue(rabbit, site.id)
    assert "dora" not in hub.command("hub", "user", "list")
    other.close()


def test_a_mailbox_that_the_broker_lost_is_made_again(alice: HubClient, rabbit: Rabbit) -> None:
    me = client()
    alice.register(me)
    assert alice.heartbeat(me.id).mailbox is None  # as it was
    rabbit.manage("DELETE", f"queues/%2F/{queue_of(me.id)}")
    again = before_long(lambda: alice.heartbeat(me.id))
    with At(again) as at:
        at.channel.basic_publish("", again.queue, b"x", mandatory=True)


def test_a_silent_party_expires(hub: Hub, alice: HubClient, rabbit: Rabbit) -> None:
    site, laptop = endpoint("silent"), client()
    alice.register(site)
    access = mailbox(alice.register(laptop))
    # As after a night and a day; the hub clears away while it runs.
    database = Database(hub.database_url)
    for party in (site, laptop):
        let_pass(database, party.id, LEASE_S + 1)
    database.close()
    wait_until(lambda: not opens(access), what="the mailbox to go")
    wait_until(lambda: not has_queue(rabbit, laptop.id), what="the queue to go")
    for party in (site, laptop):
        with pytest.raises(NotFoundError):
            alice.heartbeat(party.id)
    assert alice.find("silent").running is False
    assert mailbox(alice.register(site))


def test_without_the_broker_parties_register_and_get_their_mailbox_later(
    far_hub: Hub, far: Proxy, rabbit: Rabbit
) -> None:
    me, gone, alice = client(), client(), far_hub.client("alice")
    access = mailbox(alice.register(gone))
    far.cut()
    found = alice.register(me)
    assert found.mailbox is None
    assert "does not answer" in str(found.mailbox_reason)
    assert alice.heartbeat(me.id).mailbox_reason
    alice.withdraw(gone.id)
    assert opens(access)  # for now
    far.restore()
    healed = before_long(lambda: alice.heartbeat(me.id))
    assert opens(healed)
    answer = alice.heartbeat(me.id)
    assert (answer.mailbox, answer.mailbox_reason) == (None, None)
    wait_until(lambda: not opens(access), timeout_s=15, what="the withdrawn party's user to go")
    wait_until(lambda: not has_queue(rabbit, gone.id), what="its queue to go")


def test_a_frozen_broker_holds_nobody_up(far_hub: Hub, far: Proxy) -> None:
    alice = far_hub.client("alice")
    far.freeze()
    try:
        assert alice.register(client()).mailbox is None
        # While one waits for it, the others hear so at once.
        with ThreadPoolExecutor(20) as pool:
            for one in pool.map(alice.register, [client() for _ in range(20)]):
                assert one.mailbox_reason
    finally:
        far.thaw()


def test_a_hub_that_was_killed_has_lost_nothing(far_hub: Hub) -> None:
    hub, site, laptop, code = far_hub, endpoint("site"), client(), b"code"
    alice, bob = hub.client("alice"), hub.client("bob")
    alice.register(site)
    # The broker may have been away just before.
    access = before_long(lambda: bob.register(laptop))
    alice.share("site", "bob")
    alice.put_function(_digest(code), code)
    hub.kill()
    with pytest.raises(HubUnavailableError, match="does not answer"):
        alice.heartbeat(site.id)
    assert opens(access)  # who has a mailbox needs no hub
    hub.start()
    assert alice.heartbeat(site.id).allowed[laptop.public_key.encode()] == "user"
    assert bob.find("alice/site").public_key == site.public_key
    assert alice.get_function(_digest(code)) == code
    assert opens(access)


def _digest(code: bytes) -> bytes:
    return blake2b(code, digest_size=16).digest()


def test_secrets_are_in_no_log(hub: Hub, rabbit: Rabbit, alice: HubClient) -> None:
    access = mailbox(alice.register(client()))
    password = urlsplit(access.url).password
    text = hub.log.read_text()
    for secret in (rabbit.password, hub.token("alice"), password):
        assert secret
        assert secret not in text
    assert hub.token("alice") not in repr(alice)
