"""Peers over mailboxes: who is away, what waits, which way is taken, who may be dialled back, and mail that comes again."""

from __future__ import annotations

import itertools

import pytest

from gcref.brains import link as links
from gcref.brains import peers as pe
from gcref.brains.session import ACK_DELAY_S, Session
from gcref.wire import codec
from tests.unit.brains.pair import HEARTBEAT_S, KEY_A, KEY_B, A, B, Mail, Pair, Wire, kinds, met, note

FROM_A = ("mail", A, KEY_A)


def wire(pair: Pair, carrier: str) -> Wire:
    """The last one of this carrier that was dialled."""
    return [wire for wire in pair.wires if wire.dial.carrier == carrier][-1]


def to_b(pair: Pair) -> Mail:
    return pair.mail(A, B, "out")


def to_a(pair: Pair) -> Mail:
    return pair.mail(B, A, "back")


def step(pair: Pair, side: str, until_s: float) -> None:
    """Only this party's loop turns, until so much later."""
    until = pair.now + until_s
    while pair.now < until:
        pair.now = min(until, pair.now + 0.25)
        getattr(pair, side).flush()


def links_of(peers: pe.Peers, party: bytes, state: str) -> list[str]:
    return [link["carrier"] for link in peers.describe(party)["links"] if link["state"] == state]


# ---------------------------------------------------------------------------------------------------- meeting


def test_two_parties_meet_and_talk_by_mail_alone(pair: Pair) -> None:
    pair.a.send(1, 2)
    pair.know("broker")
    pair.settle()
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "broker", True)]
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", True)]
    pair.b.send(3)
    pair.settle()
    assert (pair.b.got, pair.a.got) == ([1, 2], [3])
    # The one that is dialled asks back, and its question comes before its answer.
    assert kinds(to_b(pair).posted[:3]) == ["HELLO", "WELCOME", "DATA"]
    assert kinds(to_a(pair).posted[:2]) == ["HELLO", "WELCOME"]


def test_both_dial_by_mail_at_once_and_have_one_session(pair: Pair) -> None:
    pair.know("broker")
    pair.b.handle(pe.Know(A, [("broker", "broker://a", KEY_A)], pair.now))
    pair.a.send(1)
    pair.b.send(2)
    pair.settle()
    assert (pair.b.got, pair.a.got) == ([1], [2])
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "broker", True)]
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", True)]
    pair.pass_time(60.0)
    assert not pair.a.news(pe.PeerDown)
    assert not pair.b.news(pe.PeerDown)


def test_mail_in_the_name_of_another_is_not_taken(pair: Pair) -> None:
    met(pair, "broker")
    data = codec.pack_packet(codec.DATA, 1_000_000, 1, 0, 0, [codec.pack(note(666))])
    pair.a.handle(pe.PacketIn(wire(pair, "broker").dial.link, data, b"o" * 40, pair.now, "broker"))
    pair.b.send(1)
    pair.settle()
    assert pair.a.got == [1]
    assert pair.a.peers.counts["stranger"] == 1
    assert not pair.a.news(pe.PeerDown)


# --------------------------------------------------------------------------------------- signs of life, and waiting


def test_an_agent_that_is_dead_behind_its_mailbox_is_noticed(pair: Pair) -> None:
    """F4 by mail: the mailbox takes everything, and nobody answers."""
    met(pair, "broker")
    began = pair.now
    while not pair.a.news(pe.PeerDown):
        step(pair, "a", 0.25)
        assert pair.now - began < 60, "it is believed to live for ever"
    assert pair.now - began == pytest.approx(3 * HEARTBEAT_S, abs=0.3)
    pair.a.send(1)
    pair.settle()  # it was only frozen: it reads its mail
    assert pair.b.got == [1]
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "broker", False)]


def test_who_is_away_is_down_and_its_mail_waits_for_it(pair: Pair) -> None:
    """A client closes its laptop; an outcome is ready; the client comes back."""
    met(pair, "broker")
    pair.b.send(1)
    step(pair, "b", 3 * HEARTBEAT_S + 1)
    (down,) = pair.b.news()
    assert isinstance(down, pe.PeerDown)
    assert not pair.b.peers.is_up(A)
    assert pair.b.peers.carrier_of(A) is None
    assert (pair.b.peers.describe(A)["up"], pair.b.peers.describe(A)["mailbox"]) == (False, True)
    pair.b.send(2, 3)
    step(pair, "b", 3600.0)
    mail = to_a(pair).waiting
    assert [codec.unpack_packet(frame).messages for frame in mail if kinds([frame]) == ["DATA"]] == [
        [note(1)],
        [note(2), note(3)],
    ]
    assert kinds(mail).count("PING") <= 6, "nobody is asked who is not there"
    assert pair.b.peers.deadline is None
    pair.settle()
    assert pair.a.got == [1, 2, 3]
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", False)]
    pair.pass_time(1.0)
    assert pair.b.peers.pending() == 0
    assert not pair.a.news(pe.PeerReset)


def test_mail_that_was_lost_meanwhile_is_found_when_its_party_is_back(pair: Pair) -> None:
    met(pair, "broker")
    step(pair, "b", 3 * HEARTBEAT_S + 1)
    pair.b.send(1)
    pair.b.flush()
    to_a(pair).waiting.clear()
    pair.b.send(2)
    step(pair, "b", 60.0)
    pair.settle()
    assert pair.b.peers.is_up(A)
    pair.pass_time(3.0)
    assert pair.a.got == [1, 2]


def test_what_could_not_be_posted_is_posted_when_mail_flows_again(pair: Pair) -> None:
    """Our own way to the broker was broken, and the client is away."""
    met(pair, "broker")
    step(pair, "b", 3 * HEARTBEAT_S + 1)
    pair.b.send(1)
    pair.b.flush()
    to_a(pair).waiting.clear()
    pair.b.handle(pe.LinkUp(FROM_A, pair.now))
    pair.b.flush()
    assert kinds(to_a(pair).waiting) == ["DATA"]
    assert not pair.b.peers.is_up(A)


def test_a_mailbox_that_is_gone_keeps_nothing(pair: Pair) -> None:
    met(pair, "broker")
    pair.b.handle(pe.LinkDown(FROM_A, "it has no mailbox", pair.now))
    assert pair.b.news() == [pe.PeerDown(A, "it has no mailbox")]
    to_a(pair).posted.clear()
    pair.b.send(1)
    step(pair, "b", 60.0)
    assert to_a(pair).posted == []
    pair.pass_time(HEARTBEAT_S + 1)  # A asks, is told to say HELLO, and does
    assert pair.a.got == [1]


def test_an_idle_link_by_mail_is_asked_by_one_side_only_and_seldom(pair: Pair) -> None:
    met(pair, "broker")
    before = len(to_a(pair).posted) + len(to_b(pair).posted)
    pair.pass_time(60.0)
    assert len(to_a(pair).posted) + len(to_b(pair).posted) - before <= 2 * (60 / HEARTBEAT_S) + 2


# ------------------------------------------------------------------------------------------------ choice of the way


def test_a_direct_way_takes_over_and_the_spare_mailbox_costs_nothing(pair: Pair) -> None:
    pair.know("direct", "broker")
    wire(pair, "broker").connect(pair.now)
    for _ in range(6):
        pair.flush()
        pair.deliver_all()
    assert pair.a.peers.carrier_of(B) == pair.b.peers.carrier_of(A) == "broker"
    pair.a.send(1)
    pair.a.flush()
    pair.settle()
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "broker", True), pe.PeerUp(B, "direct", False)]
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", True), pe.PeerUp(A, "direct", False)]
    assert pair.b.got == [1]
    pair.pass_time(1.0)
    mail = len(to_a(pair).posted) + len(to_b(pair).posted)
    pair.pass_time(120.0)
    assert len(to_a(pair).posted) + len(to_b(pair).posted) == mail
    assert links_of(pair.a.peers, B, "spare") == ["broker"]
    assert links_of(pair.b.peers, A, "up") == ["direct"]


def test_a_spare_costs_nothing_where_only_the_other_side_can_dial_either(pair: Pair) -> None:
    """F6: A dials by mail, B dials back, A accepts."""
    met(pair, "broker")
    pair.b.handle(pe.Know(A, [("direct", "direct://a", KEY_A)], pair.now))
    pair.settle()
    assert pair.a.peers.carrier_of(B) == pair.b.peers.carrier_of(A) == "direct"
    mail = len(to_a(pair).posted) + len(to_b(pair).posted)
    pair.pass_time(120.0)
    assert len(to_a(pair).posted) + len(to_b(pair).posted) == mail
    assert links_of(pair.a.peers, B, "spare") == ["broker"]


@pytest.mark.parametrize("told", [True, False])
def test_the_mailbox_takes_over_within_three_heartbeats_and_gives_back(pair: Pair, told: bool) -> None:
    """The direct way is cut, with or without anybody being told of it, and mended later."""
    met(pair, "direct", "broker")
    direct = wire(pair, "direct")
    began = pair.now
    pair.a.send(1)
    pair.b.send(2)
    while not (pair.b.got and pair.a.got):
        if told:
            direct.lose(pair.now)
        for cut in [each for each in pair.wires if each.dial.carrier == "direct"]:
            cut.out.clear()
            cut.back.clear()
            cut.connections += cut is direct
            cut.hung_up = True
        pair.now += 0.25
        pair.connect()
        pair.flush()
        while any(mail.waiting for mail in pair.post.values()):
            pair.deliver_all()
            pair.flush()
        assert pair.now - began <= 3 * HEARTBEAT_S + 0.5, "nobody took over"
    assert pair.a.peers.carrier_of(B) == pair.b.peers.carrier_of(A) == "broker"
    assert (pair.b.got, pair.a.got) == ([1], [2])
    # Another direct way, for the old one is dead for good.
    pair.know("direct", "broker")
    pair.a.handle(pe.Know(B, [("direct", "direct://c", KEY_B), ("broker", "broker://b", KEY_B)], pair.now))
    pair.settle()
    pair.a.send(3)
    pair.settle()
    assert pair.a.peers.carrier_of(B) == pair.b.peers.carrier_of(A) == "direct"
    assert pair.b.got == [1, 3]


def test_a_mailbox_is_not_even_dialled_while_something_better_is_up(pair: Pair) -> None:
    met(pair, "direct")
    pair.know("direct", "broker")
    assert [each.dial.carrier for each in pair.wires] == ["direct"]
    pair.wires[0].lose(pair.now)
    pair.wires[0].hung_up = True
    pair.a.send(1)
    pair.settle()
    assert pair.a.peers.carrier_of(B) == "broker"
    assert pair.b.got == [1]


def test_who_hangs_up_before_it_was_answered_is_let_go(pair: Pair) -> None:
    """Direct was faster than mail."""
    pair.know("direct", "broker")
    direct, broker = pair.wires
    direct.connect(pair.now)
    broker.connect(pair.now)
    pair.flush()
    while not pair.a.peers.is_up(B):
        for frames in (direct.out, direct.back):
            while frames:
                direct.deliver(frames, 0, pair.now)
        pair.flush()
    pair.settle()
    pair.pass_time(20.0)
    assert links_of(pair.b.peers, A, "up") == ["direct"]
    assert len(pair.b.peers.describe(A)["links"]) == 1
    assert len(to_a(pair).posted) <= 4


# --------------------------------------------------------------------------------------------------- dial back


def test_who_is_reached_by_mail_says_where_it_can_be_dialled(pair: Pair) -> None:
    for side, letter in ((pair.a, "a"), (pair.b, "b")):
        side.peers.me = side.peers.me._replace(
            control=(f"tcp://{letter}:1", f"tcp://{letter}:2"), bulk=(f"tcp://{letter}:3",)
        )
    pair.know("broker")
    pair.settle()
    assert pair.b.news(pe.DialBack) == [pe.DialBack(A, KEY_A, ("tcp://a:1", "tcp://a:2"), ("tcp://a:3",))]
    assert pair.a.news(pe.DialBack) == [pe.DialBack(B, KEY_B, ("tcp://b:1", "tcp://b:2"), ("tcp://b:3",))]
    wire(pair, "broker").lose(pair.now)
    pair.settle()
    assert not pair.b.news(pe.DialBack), "it is told once"
    pair.a.peers.me = pair.a.peers.me._replace(control=("tcp://a:9",))
    wire(pair, "broker").lose(pair.now)
    pair.settle()
    assert pair.b.news(pe.DialBack) == [pe.DialBack(A, KEY_A, ("tcp://a:9",), ("tcp://a:3",))]


def test_who_is_reached_directly_or_listens_nowhere_is_not_dialled_back(pair: Pair) -> None:
    met(pair, "broker")
    assert not pair.b.news(pe.DialBack)
    other = Pair()
    other.a.peers.me = other.a.peers.me._replace(control=("tcp://a:1",))
    other.know("direct")
    other.settle()
    assert not other.b.news(pe.DialBack)


# ------------------------------------------------------------------------------------- mail that is delivered again


def replay(pair: Pair, frames: list[bytes]) -> None:
    """The broker delivers to B what A posted long ago."""
    for frame in frames:
        pair.b.handle(pe.PacketIn(FROM_A, frame, KEY_A, pair.now, "broker"))
        pair.b.flush()


def history(pair: Pair) -> list[bytes]:
    """Everything that A has posted in a life with several sessions, a good-bye at its end."""
    met(pair, "broker")
    pair.a.send(1, 2)
    pair.pass_time(1.0)
    wire(pair, "broker").lose(pair.now)
    pair.a.send(3)
    pair.pass_time(30.0)
    for told in pair.a.peers.close(pair.now):
        assert isinstance(told, pe.Transmit)
        to_b(pair).post(told.frame)
    to_b(pair).waiting.clear()
    to_a(pair).waiting.clear()
    pair.a.told.clear()
    pair.b.told.clear()
    return list(to_b(pair).posted)


def test_old_mail_to_a_new_process_that_remembers_nothing_has_no_effect(pair: Pair) -> None:
    """The worst case: B has lost its journal, so the numbers of A's stream say nothing to it."""
    frames = history(pair)
    assert {"HELLO", "WELCOME", "DATA", "PING", "BYE"} <= set(kinds(frames))
    pair.b.got.clear()
    pair.b.start(2_000_000)
    replay(pair, frames)
    assert pair.b.got == []
    assert not pair.b.news(pe.Deliver, pe.PeerUp, pe.DialBack)
    assert not pair.b.peers.is_up(A)
    step(pair, "b", 30.0)
    assert pair.b.peers.describe(A)["links"] == [], "nobody answers: it is let go"
    assert len(to_a(pair).waiting) < 30


def test_old_mail_after_a_party_was_forgotten_has_no_effect(pair: Pair) -> None:
    frames = history(pair)
    pair.b.got.clear()
    pair.b.handle(pe.Forget(A))
    replay(pair, frames)
    assert pair.b.got == []
    assert not pair.b.news(pe.Deliver, pe.PeerUp)


def test_old_mail_to_a_new_process_with_its_journal_has_no_effect_on_a_living_peer(pair: Pair) -> None:
    met(pair, "broker")
    pair.a.send(1, 2)
    pair.pass_time(30.0)
    frames = [
        *to_b(pair).posted,
        links.bye_frame(links.CLOSING, "it ends", 1_000_000),
        links.bye_frame(links.REFUSED, "no", 1_000_000),
    ]
    journal = list(pair.b.journal)
    pair.b.start(2_000_000)
    for frame in journal:
        found = pe.replay(frame)
        pair.b.peers.restore(A, pe.CLIENT, KEY_A, found.epoch, found.last_seq)
    pair.pass_time(HEARTBEAT_S + 1)
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", True)]
    pair.a.told.clear()
    replay(pair, frames)
    pair.settle()
    pair.a.send(3)
    pair.b.send(9)
    pair.settle()
    assert (pair.b.got, pair.a.got) == ([1, 2, 3], [9])
    for side in (pair.a, pair.b):
        assert not side.news(pe.PeerDown, pe.PeerUp, pe.PeerReset, pe.AuthRefused)


def test_old_answers_open_no_link_of_a_new_process(pair: Pair) -> None:
    """A is an endpoint that starts again; the broker delivers what B said to the process before."""
    met(pair, "broker")
    pair.b.send(1)
    pair.pass_time(30.0)
    frames = [
        *to_a(pair).posted,
        links.bye_frame(links.REFUSED, "the key has no rights here", 1000),
        links.bye_frame(links.CLOSING, "it ends", 1000),
    ]
    pair.a.start(5000)
    pair.a.got.clear()
    pair.know("broker")
    mail = wire(pair, "broker")
    mail.connect(pair.now)
    pair.a.flush()
    pair.a.told.clear()
    for frame in frames:
        pair.a.handle(pe.PacketIn(mail.dial.link, frame, KEY_B, pair.now, "broker"))
    assert not pair.a.told
    assert pair.a.got == []
    assert not pair.a.peers.is_up(B)


def test_a_refusal_by_mail_that_is_meant_for_us_counts(pair: Pair) -> None:
    pair.b.authorize = lambda key, hello: None
    pair.know("broker")
    pair.settle()
    assert pair.a.news() == [pe.AuthRefused(B, "the key has no rights here")]
    pair.b.authorize = lambda key, hello: pe.USER
    pair.pass_time(links.RETRY_S + 0.5)
    assert pair.a.news() == [pe.PeerUp(B, "broker", True)], "the hub told of the key a moment later"


def test_a_new_process_of_a_party_is_believed_when_it_has_answered(pair: Pair) -> None:
    met(pair, "broker")
    pair.a.send(1)
    pair.pass_time(1.0)
    new = pe.Identity(A, pe.CLIENT, KEY_A, 7000)
    hello = links.hello_frame(codec.HELLO, new, Session(7000), 7000)
    replay(pair, [hello])
    assert not pair.b.news(pe.PeerUp)
    asked, answer = (codec.unpack_packet(frame) for frame in to_a(pair).waiting[-2:])
    assert (asked.kind, answer.kind) == (codec.HELLO, codec.WELCOME)
    question = links.read_hello(asked.messages)
    session = Session(7000)
    replay(pair, [links.hello_frame(codec.WELCOME, new, session, question.nonce)])
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", True)]
    replay(pair, [codec.pack_packet(codec.DATA, 7000, 1, question.epoch, 0, [codec.pack(note(5))])])
    assert pair.b.got == [1, 5]


def test_a_new_process_of_a_party_that_was_away_is_believed_at_once_too(pair: Pair) -> None:
    met(pair, "broker")
    step(pair, "b", 3 * HEARTBEAT_S + 1)
    pair.a.start(7000)
    pair.wires.clear()
    pair.know("broker")
    pair.a.send(5)
    pair.settle()
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "broker", True)]
    assert pair.b.got == [5]


def test_a_lost_question_is_asked_again(pair: Pair) -> None:
    """B's HELLO, or its answer, may be lost; the one second of the greeting is all it costs."""
    for lost in itertools.product((0, 1), repeat=2):
        each = Pair()
        each.a.send(1)
        each.know("broker")
        each.connect()
        each.a.flush()
        for _ in range(4):
            if each.deliver_all() and lost[0]:
                each.b.flush()
                to_a(each).waiting[:] = [f for f in to_a(each).waiting if kinds([f]) != ["HELLO"]]
            each.flush()
            if lost[1]:
                to_b(each).waiting[:] = [f for f in to_b(each).waiting if kinds([f]) != ["WELCOME"]]
        each.pass_time(4.0)
        assert each.b.got == [1], lost
        assert each.a.peers.pending() == 0
        each.now += ACK_DELAY_S
