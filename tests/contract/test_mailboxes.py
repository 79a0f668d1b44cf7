"""What every mailbox promises: one suite over the fake and over a real RabbitMQ."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from gcref import ids
from gcref.carriers import keys
from gcref.carriers.mail import connection as amqp_connection
from gcref.carriers.mail import outbox as mail_outbox
from gcref.carriers.mail.post import (
    BULK,
    CONTROL,
    FULL,
    NO_MAILBOX,
    Mail,
    MailboxAccess,
    MailDown,
    MailUp,
    Returned,
    address_of,
    party_of,
)
from gcref.carriers.mail.seal import ENVELOPE_MAX_BYTES, PART_MAX_BYTES, Sealer
from gcref.wire.codec import MAX_FRAME_BYTES
from tests.contract.mail_places import MailPlace, Party

KINDS = ("memory", "rabbitmq", "rabbitmq-pika")
MB = 1024 * 1024

over_rabbit = pytest.mark.parametrize("place", ["rabbitmq"], indirect=True)
over_memory = pytest.mark.parametrize("place", ["memory"], indirect=True)
over_both = pytest.mark.parametrize("place", ["memory", "rabbitmq"], indirect=True)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MailPlace]:
    if request.param == "rabbitmq-pika":  # by its public methods alone
        monkeypatch.setattr(amqp_connection, "FAST", False)
    rabbit = None if request.param == "memory" else request.getfixturevalue("rabbit")
    found = MailPlace(rabbit)
    yield found
    found.close()


# ------------------------------------------------------------------------------------------------------- mail


def test_mail_goes_there_and_back(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    assert a.send(b, b"there")
    place.until(lambda: b.mail() == [b"there"])
    (mail,) = b.of(Mail)
    assert (mail.sender, mail.key) == (a.id, a.pair.public)
    assert b.send(a, b"ba", b"ck")
    place.until(lambda: a.mail() == [b"back"])


def test_mail_arrives_whole_and_in_order(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    sizes = [0, 1, 100, 65_535, 131_064, PART_MAX_BYTES, PART_MAX_BYTES + 1, 3_000_000, 10]
    frames = [bytes([number % 251]) * sizes[number % len(sizes)] for number in range(45)]
    for frame in frames:
        place.until(lambda frame=frame: a.send(b, frame), "room for it")  # type: ignore[misc]
    place.until(lambda: len(b.mail()) >= len(frames), "all mail", 30.0)
    assert b.mail() == frames


def test_the_lanes_are_apart(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    for number in range(20):
        assert a.send(b, b"%d" % number, lane=number % 2)
    place.until(lambda: len(b.mail(CONTROL)) == len(b.mail(BULK)) == 10)
    assert b.mail(CONTROL) == [b"%d" % number for number in range(0, 20, 2)]
    assert b.mail(BULK) == [b"%d" % number for number in range(1, 20, 2)]


def test_a_lane_that_stands_still_does_not_stop_the_other(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    taken: list[bytes] = []
    for number in range(200):
        if number < 40:
            a.send(b, b"control")
        a.send(b, b"%d" % number, lane=BULK)

    def took_all_bulk() -> bool:
        taken.extend(bytes(event.data) for event in b.mailbox.take(BULK) if isinstance(event, Mail))
        b.mailbox.done(BULK)
        return len(taken) >= 200

    place.parties.remove(b)
    try:
        place.until(took_all_bulk)
        assert taken == [b"%d" % number for number in range(200)]
    finally:
        place.parties.append(b)


def test_a_frame_of_the_largest_size(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    frame = bytes(MAX_FRAME_BYTES)
    assert a.send(b, b"\1", frame)
    place.until(lambda: b.mail(), "the frame", 60.0)
    assert b.mail() == [b"\1" + frame]


def test_many_threads_post_at_once(place: MailPlace) -> None:
    b = place.party()
    senders = [place.party() for _ in range(2)]
    threads = [
        threading.Thread(
            target=lambda a=a, lane=lane: [a.send(b, b"%d" % number, lane=lane) for number in range(300)]
        )
        for a in senders
        for lane in (CONTROL, BULK)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    place.until(lambda: len(b.mail(CONTROL)) == len(b.mail(BULK)) == 600)
    for a in senders:
        for lane in (CONTROL, BULK):
            got = [bytes(mail.data) for mail in b.of(Mail, lane) if mail.sender == a.id]
            assert got == [b"%d" % number for number in range(300)]


def test_mail_waits_for_a_party_that_is_away(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    place.leave(b)
    for number in range(5):
        assert a.send(b, b"%d" % number)
    place.until(lambda: place.depth(b.id) == 5)
    b = place.party(b.pair, b.id)
    place.until(lambda: len(b.mail()) == 5)
    assert b.mail() == [b"%d" % number for number in range(5)]


def test_mail_that_is_of_no_use_any_more_is_not_kept(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    place.leave(b)
    assert a.send(b, b"short", keep_s=0.05)
    assert a.send(b, b"long", keep_s=60)
    ended = time.monotonic() + 0.1
    place.until(lambda: time.monotonic() > ended)
    assert a.send(b, b"for ever")
    place.until(lambda: place.depth(b.id) >= 2)
    b = place.party(b.pair, b.id)
    place.until(lambda: len(b.mail()) >= 2)
    assert b.mail() == [b"long", b"for ever"]


# -------------------------------------------------------------------------------------------- acknowledgements


def test_what_is_done_does_not_come_again(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    a.send(b, b"1")
    place.until(lambda: b.mail())
    place.leave(b)
    place.until(lambda: place.depth(b.id) == 0)


def test_what_was_taken_and_is_not_done_comes_again_to_the_next_process(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    b.finishes = False
    for number in range(3):
        a.send(b, b"%d" % number)
    place.until(lambda: len(b.mail()) == 3)
    b = place.again(b)
    place.until(lambda: len(b.mail()) == 3)
    assert b.mail() == [b"0", b"1", b"2"]


def test_what_comes_again_to_the_same_process_counts_once(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    b.finishes = False
    a.send(b, b"1")
    place.until(lambda: b.mail())
    ups = len(b.of(MailUp))
    place.reconnect(b)
    place.until(lambda: len(b.of(MailUp)) > ups and b.is_up, "it to come back", 30.0)
    a.send(b, b"2")
    place.until(lambda: len(b.mail()) >= 2)
    assert b.mail() == [b"1", b"2"]
    assert b.dropped("replayed") == 0, "the broker said that it comes again"
    b.finishes = True
    b.mailbox.done(CONTROL)
    place.until(lambda: len(b.mail()) == 2)
    b.look()
    place.leave(b)
    place.until(lambda: place.depth(b.id) == 0)


# ------------------------------------------------------------------------------------------------------- state


def test_the_state_is_told_to_each_lane_that_attaches(place: MailPlace) -> None:
    a = Party(place)
    place.parties.append(a)
    a.attach()
    place.until(lambda: a.of(MailDown) and a.of(MailDown, BULK))
    assert not a.send(a, b"x"), "there is no mailbox yet"
    a.mailbox.unavailable("the hub has gone")
    place.until(lambda: "hub" in a.of(MailDown)[-1].reason)
    a.mailbox.use(place.access(a.id))
    place.until(lambda: a.is_up and a.of(MailUp, BULK))
    a.events[BULK].clear()
    a.mailbox.attach(BULK, a.bell.set)
    place.until(lambda: a.of(MailUp, BULK) == [MailUp()])
    assert a.mailbox.describe()["up"] is True
    a.mailbox.unavailable("it was revoked")
    place.until(lambda: not a.is_up)
    assert not a.send(a, b"x")
    assert a.mailbox.describe()["error"] == "it was revoked"
    a.mailbox.use(place.access(a.id))
    place.until(lambda: a.is_up)


def test_without_a_mailbox_there_is_no_thread() -> None:
    from gcref.carriers.mail.amqp import AmqpMailbox

    before = threading.active_count()
    mailbox = AmqpMailbox(ids.new_id(), keys.generate())
    mailbox.attach(CONTROL, lambda: None)
    assert mailbox.take(CONTROL) == [MailDown("we have no mailbox yet")]
    assert not mailbox.post(ids.new_id(), keys.generate().public, CONTROL, [b"x"])
    assert threading.active_count() == before
    mailbox.close()
    mailbox.close()


def test_a_party_without_a_mailbox_is_told(place: MailPlace) -> None:
    a = place.party()
    nobody = Party(place)
    assert a.send(nobody, b"anybody?")
    place.until(lambda: a.of(Returned))
    assert a.of(Returned)[0] == Returned(nobody.id, NO_MAILBOX)
    assert a.is_up
    nobody.mailbox.close()


def test_a_mailbox_that_is_deleted_is_told_and_tried_again(
    place: MailPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcref.carriers.mail.amqp.REFUSED_RETRY_S", 0.2)
    a, b = place.party(), place.party()
    place.remove_mailbox(b.id)
    place.until(lambda: not b.is_up, "the news")
    assert a.send(b, b"lost")
    place.until(lambda: a.of(Returned))
    if place.rabbit is None:
        place.post.access(b.id)
    else:
        place.rabbit.make_mailbox(b.id)
    place.until(lambda: b.is_up, "its return")
    assert a.send(b, b"found")
    place.until(lambda: b.mail() == [b"found"])


@over_both
def test_the_broker_dies_in_the_middle_and_comes_back(place: MailPlace) -> None:
    """F7: mail arrives in order and once; a broker may lose what it has not confirmed, but that is sent again."""
    a, b = place.party(), place.party()
    posted = 0
    for _ in range(3000):
        posted += a.send(b, b"%d" % posted)
    place.until(lambda: b.mail())
    if place.rabbit is None:
        place.post.stop()
    else:
        place.rabbit.kill()
    place.until(lambda: not a.is_up and not b.is_up, "the news")
    assert not a.send(b, b"lost")
    assert a.mailbox.describe()["error"]
    if place.rabbit is None:
        place.post.start()
    else:
        place.rabbit.restart()
    place.until(lambda: a.is_up and b.is_up, "both to come back", 40.0)
    assert a.send(b, b"after")
    place.until(lambda: b.mail()[-1:] == [b"after"], "the last one", 40.0)
    assert b.mail() == [*(b"%d" % number for number in range(posted)), b"after"]
    assert b.dropped("replayed") == 0


def test_a_broker_that_stands_still_loses_nothing(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    a.send(b, b"0")
    place.until(lambda: b.mail())
    place.pause()
    try:
        for number in range(1, 50):
            assert a.send(b, b"%d" % number), "nobody knows yet"
    finally:
        place.resume()
    place.until(lambda: len(b.mail()) == 50)
    assert b.mail() == [b"%d" % number for number in range(50)]


@over_rabbit
def test_a_broker_that_stands_still_for_long_is_given_up(
    place: MailPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: it takes a heartbeat and five seconds."""
    monkeypatch.setattr("gcref.carriers.mail.amqp.HEARTBEAT_S", 1)
    a = place.party()
    place.pause()
    try:
        place.until(lambda: not a.is_up, "the news", 20.0)
        assert "sign of life" in a.of(MailDown)[-1].reason
    finally:
        place.resume()
    place.until(lambda: a.is_up, "its return", 30.0)


@over_rabbit
def test_a_broker_that_cannot_be_reached_is_named_without_the_password(place: MailPlace) -> None:
    a = Party(place)
    place.parties.append(a)
    a.attach()
    for url in (
        "amqp://u:hush@127.0.0.1:1/%2F",
        "amqp://u:hush@no.such.host.invalid/",
        "nonsense",
        "amqp://:::",
    ):
        a.events[CONTROL].clear()
        a.mailbox.use(MailboxAccess(url, "mailbox.x"))
        place.until(lambda: a.of(MailDown), url)
        assert "hush" not in repr(a.of(MailDown)) + repr(a.mailbox.describe())
    a.mailbox.use(place.access(a.id))
    place.until(lambda: a.is_up)


# ---------------------------------------------------------------------------------------------------- security


def sealed(to: Party, frame: bytes, sender: bytes | None = None) -> list[bytes]:
    """Mail of a stranger who may write to the broker."""
    sealer = Sealer(ids.new_id() if sender is None else sender, keys.generate())
    return sealer.seal(to.id, to.pair.public, CONTROL, [frame])


def test_forged_and_foreign_mail_is_dropped_and_counted(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    (good,) = sealed(b, b"x")
    (foreign,) = Sealer(a.id, a.pair).seal(ids.new_id(), b.pair.public, CONTROL, [b"for another"])
    (for_another_key,) = Sealer(a.id, a.pair).seal(b.id, keys.generate().public, CONTROL, [b"x"])
    place.put(
        b.id,
        [
            b"",
            b"garbage",
            good[:-1] + bytes([good[-1] ^ 1]),
            good[:10] + b"?" + good[11:],
            good[:50],
            bytes(ENVELOPE_MAX_BYTES + 1),
            good + bytes(ENVELOPE_MAX_BYTES),
            foreign,
            for_another_key,
        ],
    )
    a.send(b, b"good")
    place.until(lambda: b.mail())
    assert b.mail() == [b"good"]
    counts = {fault: b.dropped(fault) for fault in ("garbage", "forged", "foreign", "oversize")}
    assert counts == {"garbage": 4, "forged": 3, "foreign": 1, "oversize": 1}
    place.leave(b)
    place.until(lambda: place.depth(b.id) == 0, "bad mail is not kept either")


def test_a_stranger_cannot_speak_with_the_key_of_another(place: MailPlace) -> None:
    """Whoever it says it is, the key is the one that it has."""
    a, b = place.party(), place.party()
    place.put(b.id, sealed(b, b"I am a", sender=a.id))
    place.until(lambda: b.of(Mail))
    (mail,) = b.of(Mail)
    assert mail.sender == a.id
    assert mail.key != a.pair.public


def test_mail_that_is_shown_again_is_dropped(place: MailPlace) -> None:
    """A broker, or somebody who has got hold of it, publishes once more what has passed."""
    a, b = place.party(), place.party()
    place.leave(b)
    a.send(b, b"pay 100")
    place.until(lambda: place.depth(b.id) == 1)
    captured = peek(place, b.id)
    b = place.party(b.pair, b.id)
    place.until(lambda: b.mail() == [b"pay 100"])
    place.put(b.id, [captured, captured])
    a.send(b, b"next")
    place.until(lambda: len(b.mail()) == 2)
    assert b.mail() == [b"pay 100", b"next"]
    assert b.dropped("replayed") == 2


def peek(place: MailPlace, id: bytes) -> bytes:
    """What lies in a mailbox, as an administrator of the broker can see it."""
    if place.rabbit is None:
        return place.post.captured[-1][1]
    import pika

    with pika.BlockingConnection(pika.URLParameters(place.rabbit.url)) as connection:
        channel = connection.channel()
        method, _, body = channel.basic_get(f"mailbox.{id.hex()}")
        channel.basic_nack(method.delivery_tag)
        return bytes(body)


def test_the_broker_sees_nothing_of_what_is_said(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    place.leave(b)
    a.send(b, b"a secret word")
    place.until(lambda: place.depth(b.id) == 1)
    assert b"secret" not in peek(place, b.id)


@over_rabbit
def test_credentials_open_the_own_mailbox_alone(place: MailPlace) -> None:
    """A party with the name of another's mailbox cannot read it, and makes no queue or exchange."""
    import pika
    from pika.exceptions import ChannelClosedByBroker

    assert place.rabbit is not None
    a, b = place.party(), place.party()
    thief = place.access(ids.new_id())
    name = f"mailbox.{b.id.hex()}"
    for attempt in (
        lambda channel: channel.basic_get(name),
        lambda channel: channel.basic_consume(name, lambda *_: None),
        lambda channel: channel.queue_purge(name),
        lambda channel: channel.queue_delete(name),
        lambda channel: channel.queue_declare("mailbox.mine", durable=True),
        lambda channel: channel.exchange_declare("mine"),
    ):
        with (
            pika.BlockingConnection(pika.URLParameters(thief.url)) as connection,
            pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"),
        ):
            attempt(connection.channel())  # type: ignore[no-untyped-call]
    stolen = Party(place)
    place.parties.append(stolen)
    stolen.attach()
    stolen.mailbox.use(MailboxAccess(thief.url, name))
    place.until(lambda: any("refuses" in down.reason for down in stolen.of(MailDown)), "the refusal")
    a.send(b, b"x")
    place.until(lambda: b.mail() == [b"x"])
    assert not stolen.of(Mail)


@over_rabbit
def test_revoked_credentials_end_the_connection(place: MailPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcref.carriers.mail.amqp.REFUSED_RETRY_S", 0.2)
    assert place.rabbit is not None
    a = place.party()
    place.rabbit.revoke(a.id)
    place.until(
        lambda: any("refuses our user" in down.reason for down in a.of(MailDown)), "the refusal", 20.0
    )
    assert not a.is_up
    a.mailbox.use(place.access(a.id))
    place.until(lambda: a.is_up, "a new password")
    assert "refuses" not in str(a.mailbox.describe()["error"])


# ------------------------------------------------------------------------------------------------ back-pressure


@over_both
def test_a_full_mailbox_is_told_once_and_its_mail_waits(
    place: MailPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail_outbox, "WAITING_MAX_BYTES", 4 * MB)
    a, other = place.party(), place.party()
    b = place.party(max_bytes=3 * MB) if place.rabbit is not None else place.party()
    place.leave(b)
    if place.rabbit is None:
        place.post.fill(b.id)
        monkeypatch.setattr("gcref.carriers.mail.memory.WAITING_MAX_BYTES", 4 * MB)
    posted = 0
    deadline = time.monotonic() + 60
    while a.send(b, b"%08d" % posted, bytes(MB // 4)) and time.monotonic() < deadline:
        posted += 1
        place.until(lambda: True)
        if posted % 8 == 0:
            place.until(lambda: a.send(other, b"x"))
    assert posted >= 15, "some of it fits in the mailbox, some waits"
    place.until(lambda: a.of(Returned))
    assert a.of(Returned) == [Returned(b.id, FULL)]
    seen = len(other.mail())
    assert a.send(other, b"nobody else has to wait")
    place.until(lambda: len(other.mail()) > seen)
    if place.rabbit is None:
        place.post.drain(b.id)
    b = place.party(b.pair, b.id, **({"max_bytes": 3 * MB} if place.rabbit is not None else {}))
    place.until(lambda: b.mail() and int(b.mail()[-1][:8]) == posted - 1, "the last one", 40.0)
    numbers = [int(frame[:8]) for frame in b.mail()]
    assert numbers == sorted(set(numbers)), "in order, and each at most once"
    assert len(a.of(Returned)) <= 3
    assert a.send(b, b"00009999")
    place.until(lambda: b.mail()[-1] == b"00009999")


# ------------------------------------------------------------------------------------------------------- costs


@over_rabbit
def test_an_idle_mailbox_makes_no_turns_but_for_heartbeats(place: MailPlace) -> None:
    """I: pika's own loop would wake every five seconds, whatever happens."""
    a, b = place.party(), place.party()
    a.send(b, b"x")
    place.until(lambda: b.mail())
    loop = a.mailbox._loop  # type: ignore[union-attr]
    assert loop is not None
    nobody = threading.Event()
    nobody.wait(0.3)  # acknowledgements and confirmations
    turns = loop.turns
    nobody.wait(3.0)
    assert loop.turns - turns <= 2, "one heartbeat each way"


@over_rabbit
def test_much_mail_takes_little_memory(place: MailPlace) -> None:
    """256 MB through two mailboxes: what is here at any time is bounded, and nothing is lost."""
    import psutil

    a, b = place.party(), place.party()
    body, total, posted, got = bytes(PART_MAX_BYTES - 8), 256, 0, 0
    before = psutil.Process().memory_info().rss
    most = before
    deadline = time.monotonic() + 100
    while got < total and time.monotonic() < deadline:
        if posted < total and a.send(b, b"%08d" % posted, body, lane=BULK):
            posted += 1
        elif not b.bell.wait(0.05):
            continue
        b.bell.clear()
        for event in b.mailbox.take(BULK):
            if isinstance(event, Mail):
                assert int(bytes(event.data[:8])) == got
                got += 1
        b.mailbox.done(BULK)
        if got % 16 == 0:
            most = max(most, psutil.Process().memory_info().rss)
    assert got == total
    assert most - before < 120 * MB


@over_memory
def test_lost_mail_leaves_a_gap_and_half_a_frame_is_no_frame(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    place.post.drop(1)
    for frame in (b"1", b"2"):
        a.send(b, frame)
    place.post.drop(1)
    a.send(b, bytes(3 * MB))
    a.send(b, b"3")
    place.until(lambda: b"3" in b.mail())
    assert b.mail() == [b"2", b"3"]
    assert b.dropped("broken") > 0


@over_memory
def test_duplicated_and_late_mail_is_dropped(place: MailPlace) -> None:
    a, b = place.party(), place.party()
    place.post.duplicate(1)
    a.send(b, b"1")
    place.post.delay(1)
    a.send(b, b"2")
    a.send(b, b"3")
    place.post.release()
    place.until(lambda: b"3" in b.mail())
    b.look()
    assert b.mail() == [b"1", b"3"]
    assert b.dropped("replayed") == 2


def test_addresses_name_parties() -> None:
    id = ids.new_id()
    assert party_of(address_of(id)) == id
    for bad in ("", "mailbox://", "mailbox://zz", "mailbox://00", "tcp://x:1"):
        with pytest.raises(ValueError, match=r"address|hexadecimal"):
            party_of(bad)
