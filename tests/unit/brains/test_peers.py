"""Peers: handshakes, the choice of links, signs of life, rights, strangers; by transcripts, and with any frame at all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcref.brains import link as links
from gcref.brains import peers as pe
from gcref.brains.session import ACK_DELAY_S, Session
from gcref.config import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from gcref.errors import LocalProtocolError
from gcref.wire import codec
from gcref.wire import messages as m
from tests.unit.brains.pair import HEARTBEAT_S, KEY_A, KEY_B, A, B, Pair, anybody, kinds, met, note

OTHER_KEY = b"o" * 40


def carriers_in(links_: list[dict[str, Any]], state: str) -> list[str]:
    return [link["carrier"] for link in links_ if link["state"] == state]


# ---------------------------------------------------------------------------------------------------- meeting


def test_two_parties_meet_and_talk(pair: Pair) -> None:
    pair.a.send(1, 2)  # before there is any way
    pair.know("direct")
    (wire,) = pair.wires
    assert wire.dial == pe.Dial(B, 1, "direct", "direct://b", KEY_B)
    pair.flush()
    assert wire.out == []
    wire.connect(pair.now)
    assert wire.out == [], "nothing leaves before the flush, no handshake either"
    pair.flush()
    assert kinds(wire.out) == ["HELLO"]
    pair.deliver_all()
    assert pair.b.news() == [pe.PeerUp(A, "direct", True)]
    pair.flush()
    assert kinds(wire.back) == ["WELCOME"]
    pair.settle()
    assert pair.a.news() == [pe.PeerUp(B, "direct", True)]
    (delivered,) = pair.b.news()
    assert delivered._replace(raw_frame=b"") == pe.Deliver(
        A, pe.USER, pe.CLIENT, KEY_A, [note(1), note(2)], b"", "direct"
    )
    assert pe.replay(delivered.raw_frame).messages == [note(1), note(2)]
    assert pair.a.peers.is_up(B)
    assert pair.a.peers.carrier_of(B) == "direct"


def test_one_packet_for_each_peer_and_flush(pair: Pair) -> None:
    met(pair, "direct")
    for number in range(50):
        pair.a.send(number)
    (transmit,) = pair.a.peers.flush(pair.now)
    assert isinstance(transmit, pe.Transmit)
    assert len(codec.unpack_packet(transmit.frame).messages) == 50
    assert pair.a.peers.flush(pair.now) == []


def test_nothing_is_acknowledged_before_the_flush_that_follows_its_delivery(pair: Pair) -> None:
    """The shell journals between `handle` and `flush`: what it might forget is never acknowledged."""
    met(pair, "direct")
    pair.a.send(*range(200))
    pair.a.flush()
    (wire,) = pair.wires
    told = pair.b.peers.handle(pe.PacketIn(wire.accepted, wire.out[0], KEY_A, pair.now, "direct"))
    assert [type(each) for each in told] == [pe.Deliver]
    pair.b.send(7)
    (answer,) = pair.b.peers.flush(pair.now)
    assert isinstance(answer, pe.Transmit)
    assert codec.unpack_packet(answer.frame).ack == 200


def test_a_lonely_acknowledgement_comes_by_the_deadline(pair: Pair) -> None:
    met(pair, "direct")
    pair.a.send(1)
    pair.settle()
    assert pair.a.peers.pending(B) == 1
    assert pair.b.peers.deadline == pytest.approx(pair.now + ACK_DELAY_S)
    pair.now += ACK_DELAY_S
    pair.settle()
    assert pair.a.peers.pending() == pair.a.peers.pending(B) == pair.a.peers.backlog_bytes(B) == 0


def test_who_asks_hears_at_once_what_was_taken(pair: Pair) -> None:
    """The question goes behind the messages; the answer is the acknowledgement, and no other one follows."""
    met(pair, "direct")
    (wire,) = pair.wires
    before = pair.a.peers.sent(B)
    pair.a.send(1, 2)
    pair.a.peers.ask(B)
    pair.a.flush()
    assert kinds(wire.out) == ["DATA", "PING"]
    assert (pair.a.peers.sent(B), pair.a.peers.pending(B)) == (before + 2, 2)
    pair.deliver_all()
    pair.b.flush()
    assert kinds(wire.back) == ["PONG"]
    pair.deliver_all()
    assert pair.a.peers.pending(B) == 0
    pair.now += 1.0
    pair.flush()
    assert kinds(wire.back) + kinds(wire.out) == []


def test_a_question_waits_until_there_is_somebody_to_ask(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    wire.lose(pair.now)
    pair.a.send(1)
    pair.a.peers.ask(B)
    pair.a.peers.ask(b"N" * 16)  # never heard of
    pair.settle()
    assert pair.b.got == [1]
    assert pair.a.peers.pending(B) == 0


def test_both_dial_at_once_and_have_one_session(pair: Pair) -> None:
    pair.know("direct")
    pair.b.handle(pe.Know(A, [("direct", "direct://a", KEY_A)], pair.now))
    pair.connect()
    pair.flush()
    assert [kinds(wire.out) for wire in pair.wires] == [["HELLO"], ["HELLO"]]
    pair.settle()
    pair.a.send(1, 2)
    pair.b.send(3)
    pair.settle()
    assert (pair.b.got, pair.a.got) == ([1, 2], [3])
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "direct", True)]
    assert len(carriers_in(pair.a.peers.describe(B)["links"], "up")) == 2


def test_what_was_sent_before_the_break_is_sent_again_once_it_is_up(pair: Pair) -> None:
    met(pair, "direct")
    pair.a.send(1, 2)
    pair.a.flush()
    (wire,) = pair.wires
    wire.lose(pair.now)
    assert pair.a.news() == [pe.PeerDown(B, "the connection was lost")]
    pair.a.send(3)
    pair.settle()
    assert pair.b.got == [1, 2, 3]
    assert pair.a.news() == [pe.PeerUp(B, "direct", False)]


def test_a_lost_packet_is_found_by_asking(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    pair.a.send(1)
    pair.a.flush()
    wire.out.clear()
    pair.a.send(2)
    pair.settle()
    assert pair.b.got == []
    pair.now += 1.0
    pair.a.flush()
    assert kinds(wire.out) == ["PING"]
    pair.settle()
    assert pair.b.got == [1, 2]


def test_a_slow_link_is_asked_and_not_flooded(pair: Pair) -> None:
    """Nothing is lost, it only takes long: the questions are small, and nothing is sent twice."""
    met(pair, "direct")
    (wire,) = pair.wires
    pair.a.send(1, 2, 3)
    pair.a.flush()
    for _ in range(12):
        pair.now += 1.0
        pair.a.flush()
        wire.back.clear()
    assert kinds(wire.out)[0] == "DATA"
    assert set(kinds(wire.out)[1:]) == {"PING"}
    assert len(wire.out) < 8
    pair.settle()
    assert pair.b.got == [1, 2, 3]


# ------------------------------------------------------------------------------------------- choice of the link


def test_the_best_carrier_is_used_and_the_others_are_spared(pair: Pair) -> None:
    pair.know("direct", "ipc")
    direct, ipc = pair.wires
    direct.connect(pair.now)
    pair.flush()
    pair.deliver_all()
    pair.flush()
    pair.deliver_all()
    assert pair.a.peers.carrier_of(B) == "direct"
    pair.a.send(1)
    pair.a.flush()
    pair.settle()
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "direct", True), pe.PeerUp(B, "ipc", False)]
    assert direct.hung_up
    assert not ipc.hung_up
    assert pair.b.got == [1]
    assert carriers_in(pair.a.peers.describe(B)["links"], "spare") == ["direct"]
    assert pair.b.peers.carrier_of(A) == "ipc"


def test_when_the_best_one_breaks_the_spare_is_dialled(pair: Pair) -> None:
    met(pair, "direct", "ipc")
    ipc = next(wire for wire in pair.wires if wire.dial.carrier == "ipc")
    pair.a.send(1)
    pair.a.flush()
    ipc.lose(pair.now)
    ipc.hung_up = True  # and it never comes back
    pair.settle()
    assert pair.a.peers.carrier_of(B) == "direct"
    assert pair.b.got == [1]
    assert pair.a.news(pe.PeerUp, pe.PeerDown) == [
        pe.PeerDown(B, "the connection was lost"),
        pe.PeerUp(B, "direct", False),
    ]


def test_told_again_what_is_new_is_dialled_and_what_is_gone_is_hung_up(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    same = ("direct", "direct://b", KEY_B)
    assert pair.a.peers.handle(pe.Know(B, [same], pair.now)) == []
    (dial,) = pair.a.peers.handle(pe.Know(B, [same, ("direct", "direct://c", KEY_B)], pair.now))
    assert isinstance(dial, pe.Dial)
    assert dial.address == "direct://c"
    pair.a.handle(pe.Know(B, [("direct", "direct://c", KEY_B)], pair.now))
    pair.flush()
    assert wire.hung_up
    assert pair.a.news() == [pe.PeerDown(B, "its address is no longer valid")]


def test_forgotten_parties_begin_anew_on_both_sides(pair: Pair) -> None:
    met(pair, "direct")
    pair.a.send(1)
    pair.b.send(2)
    pair.pass_time(1.0)
    pair.b.handle(pe.Forget(A))
    pair.b.flush()
    assert pair.b.peers.parties() == []
    pair.a.told.clear()
    pair.b.send(3)  # B has something to say after all; A comes again by itself
    pair.pass_time(30.0)
    assert pair.a.news(pe.PeerReset) == [pe.PeerReset(B, [])]
    pair.a.send(4)
    pair.settle()
    assert (pair.b.got, pair.a.got) == ([1, 4], [2, 3])


def test_who_forgets_and_dials_again_is_seen_to_remember_nothing(pair: Pair) -> None:
    met(pair, "direct")
    pair.b.send(1)
    pair.pass_time(1.0)
    pair.a.handle(pe.Forget(B))
    pair.a.flush()
    pair.b.send(2)
    pair.know("direct")
    pair.settle()
    assert pair.a.got == [1, 2]
    assert pair.b.news(pe.PeerReset) == [pe.PeerReset(A, [note(2)])]


def test_good_byes_are_heard_at_once(pair: Pair) -> None:
    met(pair, "direct")
    for told in pair.b.peers.close(pair.now):
        assert isinstance(told, pe.Transmit)
        pair.wires[0].back.append(told.frame)
    pair.deliver_all()
    assert pair.a.news() == [pe.PeerDown(B, "it ends")]


# ---------------------------------------------------------------------------------------------- signs of life


def test_an_idle_link_is_asked_by_one_side_only_and_seldom(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    seen = 0
    for _ in range(600):
        pair.now += 0.1
        pair.flush()
        seen += len(wire.out) + len(wire.back)
        pair.deliver_all()
    assert seen <= 2 * (60 / HEARTBEAT_S) + 2, "a ping and a pong each period"
    assert pair.a.peers.describe(B)["rtt_s"] is not None


def test_a_frozen_link_is_down_after_three_heartbeats_and_dialled_anew(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    began = pair.now
    pair.a.send(1)
    while not pair.a.news(pe.PeerDown):
        pair.now += 0.25
        pair.a.flush()
        wire.out.clear()
        assert pair.now - began < 60, "frozen for ever"
    assert pair.now - began == pytest.approx(3 * HEARTBEAT_S, abs=0.3)
    pair.a.flush()
    assert wire.hung_up
    assert pair.wires[-1].dial.link != wire.dial.link
    assert "frozen" in pair.a.peers.describe(B)["links"][0]["error"]
    pair.settle()
    assert pair.b.got == [1]


def test_an_accepted_link_that_was_silent_is_used_again_when_it_is_heard(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    for _ in range(80):
        pair.now += 0.25
        pair.b.flush()
        wire.back.clear()
    (down,) = pair.b.news()
    assert isinstance(down, pe.PeerDown)
    assert "frozen" in down.reason
    pair.b.send(5)
    pair.settle()
    assert pair.b.news(pe.PeerUp) == [pe.PeerUp(A, "direct", False)]
    assert pair.a.got == [5]


def test_the_accepting_side_of_a_frozen_link_finds_out_as_soon(pair: Pair) -> None:
    """F4: within three heartbeats on both sides."""
    met(pair, "direct")
    (wire,) = pair.wires
    began = pair.now
    while not pair.b.news(pe.PeerDown):
        pair.now += 0.25
        pair.b.flush()
        wire.back.clear()
        assert pair.now - began <= 3 * HEARTBEAT_S, "not noticed"
    assert pair.now - began == pytest.approx(3 * HEARTBEAT_S, abs=0.3)


def test_who_was_stopped_oneself_does_not_judge_by_the_clock(pair: Pair) -> None:
    met(pair, "direct")
    pair.now += 1000.0
    pair.settle()
    assert not pair.a.news(pe.PeerDown)
    assert not pair.b.news(pe.PeerDown)


def test_without_anything_to_do_there_is_no_deadline(pair: Pair) -> None:
    assert pair.a.peers.deadline is None
    pair.know("direct")
    assert pair.a.peers.deadline is None, "the carrier dials, and tells"
    pair.a.send(1)
    assert pair.a.peers.deadline == pair.a.peers.deadline
    pair.a.flush()
    assert pair.a.peers.deadline is None, "what waits for a link needs no clock"


# ---------------------------------------------------------------------------------------------- new processes


def test_a_peer_that_lost_its_journal_says_so_and_gets_what_it_had_not_acknowledged(pair: Pair) -> None:
    met(pair, "direct")
    pair.a.send(1, 2)
    pair.b.send(9)
    pair.pass_time(1.0)
    pair.wires[0].lose(pair.now)
    pair.a.send(3, 4)
    pair.b.start(2_000_000)
    pair.b.got.clear()
    pair.a.told.clear()
    pair.settle()
    assert pair.a.news(pe.PeerReset, pe.PeerUp) == [
        pe.PeerReset(B, [note(3), note(4)]),
        pe.PeerUp(B, "direct", True),
    ]
    assert pair.b.got == [3, 4]
    pair.b.send(10)
    pair.settle()
    assert pair.a.got == [9, 10]


def test_a_peer_with_its_journal_goes_on_where_it_was(pair: Pair) -> None:
    met(pair, "direct")
    pair.a.send(1, 2)
    pair.pass_time(1.0)
    pair.wires[0].lose(pair.now)
    pair.a.send(3)
    snapshot = pair.b.peers.taken(A)
    pair.b.start(2_000_000)
    pair.b.peers.restore(A, pe.CLIENT, KEY_A, *snapshot)
    pair.a.told.clear()
    pair.settle()
    assert pair.a.news() == [pe.PeerUp(B, "direct", True)]
    assert pair.b.got == [1, 2, 3]


def test_acknowledgements_that_overtake_a_welcome_are_no_loss(pair: Pair) -> None:
    """A second link is greeted while the first one is busy: its WELCOME may know less than what came since."""
    met(pair, "direct")
    (first,) = pair.wires
    pair.a.send(1)
    pair.a.flush()
    pair.now += 0.5
    pair.a.handle(pe.Know(B, [("direct", "direct://b", KEY_B), ("ipc", "ipc://b", None)], pair.now))
    second = pair.wires[-1]
    second.connect(pair.now)
    pair.a.flush()
    second.deliver(second.out, 0, pair.now)
    pair.b.flush()
    assert kinds(second.back) == ["WELCOME"]
    first.deliver(first.out, 0, pair.now)
    pair.now += 0.5
    pair.a.flush()
    assert kinds(first.out) == ["PING"]
    first.deliver(first.out, 0, pair.now)
    pair.b.flush()
    assert kinds(first.back) == ["PONG"]
    first.deliver(first.back, 0, pair.now)
    assert pair.a.peers.pending() == 0
    pair.settle()
    assert pair.a.peers.carrier_of(B) == "ipc"
    assert not pair.a.news(pe.PeerReset)
    pair.a.send(2)
    pair.settle()
    assert pair.b.got == [1, 2]


def test_an_old_welcome_opens_no_link(pair: Pair) -> None:
    pair.know("direct")
    (wire,) = pair.wires
    wire.connect(pair.now)
    pair.flush()
    pair.deliver_all()
    pair.flush()
    (welcome,) = wire.back
    wire.lose(pair.now)
    wire.connect(pair.now)
    pair.flush()
    pair.a.handle(pe.PacketIn(wire.dial.link, welcome, None, pair.now, "direct"))
    assert not pair.a.peers.is_up(B)
    assert pair.a.peers.counts["stale"] == 1
    pair.settle()
    assert pair.a.peers.is_up(B)


def test_packets_of_an_earlier_process_are_stale(pair: Pair) -> None:
    """F10: from a mailbox, or a network that held them back."""
    met(pair, "direct")
    (wire,) = pair.wires
    pair.a.send(1)
    pair.settle()
    old = pe.Identity(A, pe.CLIENT, KEY_A, 500)
    for frame in (
        codec.pack_packet(codec.DATA, 500, 2, 0, 0, [codec.pack(note(666))]),
        links.hello_frame(codec.HELLO, old, Session(500), 1),
        codec.pack_packet(codec.DATA, 500, 2, 0, 0, [codec.pack(note(666))]),
        codec.pack_packet(codec.DATA, 500, 1, 0, 0, [codec.pack(note(666))]),
    ):
        pair.b.handle(pe.PacketIn(wire.accepted, frame, KEY_A, pair.now, "direct"))
    pair.b.handle(
        pe.PacketIn("late", links.hello_frame(codec.HELLO, old, Session(500), 1), KEY_A, pair.now, "direct")
    )
    assert pair.b.peers.counts["stale"] == 5
    pair.a.send(2)
    pair.settle()
    assert pair.b.got == [1, 2]
    assert not pair.b.news(pe.PeerReset, pe.PeerUp)


# ----------------------------------------------------------------------------------------------------- rights


def test_a_party_without_rights_is_refused_and_both_sides_know(pair: Pair) -> None:
    pair.b.authorize = lambda key, hello: None
    pair.know("direct")
    pair.settle()
    (refused,) = pair.b.news()
    assert isinstance(refused, pe.AuthRefused)
    assert refused.party == A
    (told,) = pair.a.news()
    assert told == pe.AuthRefused(B, "the key has no rights here")
    pair.a.send(1)
    pair.pass_time(links.RETRY_S + 1)
    assert pair.b.got == []
    assert not pair.a.news(), "it is told once"
    pair.b.authorize = anybody
    pair.pass_time(links.RETRY_MAX_S)
    assert pair.a.news(pe.PeerUp) == [pe.PeerUp(B, "direct", True)]
    assert pair.b.got == [1]


def test_the_carriers_refusal_is_told_once_and_tried_again_slowly(pair: Pair) -> None:
    pair.know("direct")
    dials: list[tuple[float, Any]] = []
    for _ in range(600):
        wire = pair.wires[-1]
        if not dials or dials[-1][1] is not wire:
            dials.append((pair.now, wire))
            pair.a.handle(pe.Refused(wire.dial.link, pair.now, "b does not accept our key"))
        pair.now += 0.25
        pair.a.flush()
    assert pair.a.news() == [pe.AuthRefused(B, "b does not accept our key")]
    waits = [round(later[0] - earlier[0]) for earlier, later in itertools.pairwise(dials)]
    assert waits == [1, 2, 4, 8, 16, 32, 60]


def test_who_has_shown_his_key_is_not_taken_for_another_because_a_tunnel_breaks_off(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    wire.lose(pair.now)
    pair.a.handle(
        pe.Refused(wire.dial.link, pair.now, "it has another key than the one expected", ours=False)
    )
    assert pair.a.news(pe.AuthRefused, pe.PeerDown) == [pe.PeerDown(B, "the connection was lost")]
    pair.a.flush()
    assert not wire.hung_up, "the carrier goes on trying"
    assert "another key" in pair.a.peers.describe(B)["links"][0]["error"]
    pair.a.send(1)
    pair.settle()
    assert pair.b.got == [1]


def test_a_stranger_that_the_carrier_refused_is_told_once_per_key(pair: Pair) -> None:
    for key in (OTHER_KEY, OTHER_KEY, KEY_A):
        pair.b.handle(pe.Refused(None, pair.now, f"the key {key.decode()} is not allowed", key))
    assert [each.message for each in pair.b.news()] == [
        f"the key {OTHER_KEY.decode()} is not allowed",
        f"the key {KEY_A.decode()} is not allowed",
    ]
    assert pair.b.peers.counts["refused"] == 3


def test_the_owner_key_must_be_the_key_of_the_connection(pair: Pair) -> None:
    pair.a.key = OTHER_KEY  # of the connection; its HELLO still says KEY_A
    pair.know("direct")
    pair.settle()
    (refused,) = pair.b.news()
    assert isinstance(refused, pe.AuthRefused)
    assert "not the key of the connection" in refused.message


def test_a_party_cannot_be_taken_over_by_another_key(pair: Pair) -> None:
    met(pair, "direct")
    thief = pe.Identity(A, pe.CLIENT, OTHER_KEY, 5_000_000)
    frame = links.hello_frame(codec.HELLO, thief, Session(5_000_000), 1)
    pair.b.handle(pe.PacketIn("thief", frame, OTHER_KEY, pair.now, "direct"))
    assert [type(each) for each in pair.b.news()] == [pe.AuthRefused]
    data = codec.pack_packet(codec.DATA, 1000, 1, 0, 0, [codec.pack(note(666))])
    pair.b.handle(pe.PacketIn("thief", data, OTHER_KEY, pair.now, "direct"))
    pair.a.send(1)
    pair.settle()
    assert pair.b.got == [1]


def test_a_connection_with_another_key_does_not_inherit_a_link(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    frame = codec.pack_packet(codec.DATA, 1000, 1, 0, 0, [codec.pack(note(666))])
    pair.b.handle(pe.PacketIn(wire.accepted, frame, OTHER_KEY, pair.now, "direct"))
    assert pair.b.got == []
    assert pair.b.news() == [pe.PeerDown(A, "another connection took its place")]


def test_a_revoked_key_has_no_rights_on_open_links(pair: Pair) -> None:
    met(pair, "direct")
    pair.b.authorize = lambda key, hello: None
    pair.b.handle(pe.Revoke([KEY_A], pair.now))
    assert pair.b.news() == [pe.PeerDown(A, "its key was revoked")]
    pair.a.send(1)
    pair.settle()
    assert pair.b.got == []
    assert pair.a.news(pe.AuthRefused) == [pe.AuthRefused(B, "the key was revoked")]
    pair.pass_time(20.0)
    assert pair.b.got == []


def test_an_address_where_another_party_answers_is_refused(pair: Pair) -> None:
    pair.a.handle(pe.Know(b"C" * 16, [("direct", "direct://b", KEY_B)], pair.now))
    pair.settle()
    assert pair.a.news() == [pe.AuthRefused(b"C" * 16, "another party answers there")]


def test_a_party_refuses_itself(pair: Pair) -> None:
    pair.b.party = A
    pair.b.start(5_000_000)
    pair.know("direct")
    pair.settle()
    assert not pair.b.peers.is_up(A)
    assert not pair.b.news(pe.PeerUp)


# ------------------------------------------------------------------------------------------------- versions


def other_version(frame: bytes, version: int) -> bytes:
    return bytes([version]) + frame[1:]


def test_another_version_is_named_on_both_sides(pair: Pair) -> None:
    pair.know("direct")
    (wire,) = pair.wires
    wire.connect(pair.now)
    pair.a.flush()
    wire.out[:] = [other_version(frame, 9) for frame in wire.out]
    pair.deliver_all()
    (mismatch,) = pair.b.news()
    assert isinstance(mismatch, pe.Mismatch)
    assert f"version {PROTOCOL_VERSION}" in mismatch.message
    assert "9" in mismatch.message
    pair.b.flush()
    wire.back[:] = [other_version(frame, 9) for frame in wire.back]
    pair.deliver_all()
    (mismatch,) = pair.a.news()
    assert isinstance(mismatch, pe.Mismatch)
    assert mismatch.party == B
    assert "9" in mismatch.message
    pair.flush()
    assert pair.wires[0].hung_up
    assert pair.b.peers.counts["version"] == 1


def test_versions_are_no_ping_pong(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    for _ in range(100):
        pair.b.handle(pe.PacketIn("x", b"\x09anything", OTHER_KEY, pair.now, "direct"))
    told = pair.b.peers.flush(pair.now)
    assert [type(each) for each in told] == [pe.Transmit, pe.Hangup]
    assert len(pair.b.news()) == 1
    assert wire.up


def test_a_hello_of_another_protocol_is_a_mismatch_too(pair: Pair) -> None:
    body = [2, "3.14", A, "client", KEY_A, 5, 0, 0, 1]
    frame = codec.pack_packet(codec.HELLO, 5, 0, 0, 0, [codec.pack(body)])
    (told,) = pair.b.peers.handle(pe.PacketIn("x", frame, KEY_A, pair.now, "direct"))
    assert isinstance(told, pe.Mismatch)
    assert told.party == A


def test_unknown_trailing_fields_of_a_hello_are_ignored(pair: Pair) -> None:
    body = [1, "3.14", A, "client", KEY_A, 5, 0, 0, 1, [], ["quic://somewhere", 5], "something", {"new": 1}]
    frame = codec.pack_packet(codec.HELLO, 5, 0, 0, 0, [codec.pack(body)])
    assert pair.b.peers.handle(pe.PacketIn("x", frame, KEY_A, pair.now, "direct")) == [
        pe.PeerUp(A, "direct", True)
    ]
    assert pair.b.peers.describe(A)["python"] == "3.14"


@pytest.mark.parametrize("length", [9, 10])
def test_a_hello_of_a_party_that_names_no_addresses_is_fine(pair: Pair, length: int) -> None:
    body = [1, "3.14", A, "client", KEY_A, 5, 0, 0, 1, ["tcp://a:1"], ["tcp://a:2"]][:length]
    frame = codec.pack_packet(codec.HELLO, 5, 0, 0, 0, [codec.pack(body)])
    pair.b.handle(pe.PacketIn("x", frame, KEY_A, pair.now, "direct"))
    assert pair.b.news() == [pe.PeerUp(A, "direct", True)]


@pytest.mark.parametrize("field", [7, "tcp://a:1", None, ["tcp://a:1"] * 33])
def test_addresses_that_are_none_make_no_hello(pair: Pair, field: Any) -> None:
    body = [1, "3.14", A, "client", KEY_A, 5, 0, 0, 1, [], field]
    frame = codec.pack_packet(codec.HELLO, 5, 0, 0, 0, [codec.pack(body)])
    pair.b.handle(pe.PacketIn("x", frame, KEY_A, pair.now, "direct"))
    (rejected,) = pair.b.news()
    assert isinstance(rejected, pe.Rejected)
    assert "addresses" in rejected.reason


# ------------------------------------------------------------------------------------- bad messages and frames


def test_a_bad_message_harms_only_itself(pair: Pair) -> None:
    met(pair, "direct")
    pair.a.send(1)
    pair.a.peers.send(B, [m.SUBMIT, b"short"])
    pair.a.peers.send(B, [4711])
    pair.a.send(2)
    pair.settle()
    assert pair.b.got == [1, 2]
    (rejected,) = pair.b.news(pe.Rejected)
    assert rejected.party == A
    assert "SUBMIT" in rejected.reason
    (delivered,) = pair.b.news(pe.Deliver)
    assert pe.replay(delivered.raw_frame).messages == [note(1), note(2)]
    pair.pass_time(1.0)
    assert pair.a.peers.pending() == 0


def test_what_cannot_be_sent_is_refused_at_once_and_harms_nothing(pair: Pair) -> None:
    met(pair, "direct")
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        pair.a.peers.send(B, [m.STATUS, object()])
    with pytest.raises(LocalProtocolError, match="FUNCTION of"):
        pair.a.peers.send(B, [m.FUNCTION, b"d" * 16, bytes(MAX_MESSAGE_BYTES)])
    pair.a.send(1)
    pair.settle()
    assert pair.b.got == [1]


def test_garbage_on_a_link_is_counted_and_told_once(pair: Pair) -> None:
    met(pair, "direct")
    (wire,) = pair.wires
    for junk in (
        b"",
        b"\x01",
        b"\x01\xc1",
        b"\x01\x96\x00",
        codec.pack_packet(0, 1, 1, 1, 1, [b"\xc0"])[:-1],
    ):
        pair.b.handle(pe.PacketIn(wire.accepted, junk, KEY_A, pair.now, "direct"))
    (rejected,) = pair.b.news()
    assert isinstance(rejected, pe.Rejected)
    assert pair.b.peers.counts["garbage"] == 5
    pair.a.send(1)
    pair.settle()
    assert pair.b.got == [1]


def test_a_stranger_is_told_to_say_hello_and_no_more_than_once_a_second(pair: Pair) -> None:
    frame = codec.pack_packet(codec.DATA, 5, 1, 0, 0, [codec.pack(note(1))])
    for _ in range(10):
        assert pair.b.peers.handle(pe.PacketIn("x", frame, KEY_A, pair.now, "direct")) == []
    transmit, hangup = pair.b.peers.flush(pair.now)
    assert isinstance(transmit, pe.Transmit)
    assert links.read_bye(codec.unpack_packet(transmit.frame).messages)[0] == links.SAY_HELLO
    assert hangup == pe.Hangup("x")
    assert pair.b.peers.counts["stranger"] == 10


def test_a_party_that_forgot_the_link_is_greeted_again(pair: Pair) -> None:
    """Its process is new, but the connection has not noticed (a mailbox, a proxy)."""
    met(pair, "direct")
    pair.b.start(2_000_000)
    pair.b.got.clear()
    pair.a.send(1)
    pair.settle()
    assert pair.b.got == [1]


def test_one_party_cannot_hold_links_without_end(pair: Pair) -> None:
    met(pair, "direct")
    for number in range(100):
        frame = links.hello_frame(codec.HELLO, pair.a.peers.me, Session(1000), number)
        pair.b.handle(pe.PacketIn(("again", number), frame, KEY_A, pair.now, "direct"))
    assert len(pair.b.peers.describe(A)["links"]) <= pe.MAX_LINKS + 1
    pair.settle()


FRAMES = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda tail: b"\x01" + tail),
    st.builds(
        codec.pack_packet,
        st.integers(0, 7),
        st.integers(0, 1 << 64) .map(lambda n: min(n, (1 << 64) - 1)),
        st.integers(0, 5) | st.integers(0, (1 << 64) - 1),
        st.sampled_from([0, 1000, 1_000_000]),
        st.integers(0, 5) | st.integers(0, (1 << 64) - 1),
        st.lists(
            st.recursive(
                st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.binary(max_size=16) | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                max_leaves=12,
            ).map(codec.pack),
            max_size=4,
        ),
    ),
    st.builds(
        lambda kind, epoch, taken_epoch, taken, nonce, party: codec.pack_packet(
            kind, epoch, 0, 0, 0,
            [codec.pack([1, "3.11", party, "client", KEY_A, epoch, taken_epoch, taken, nonce])],
        ),
        st.sampled_from([codec.HELLO, codec.WELCOME]),
        st.integers(0, 1 << 63),
        st.integers(0, 1 << 62),
        st.integers(0, 1 << 62),
        st.integers(0, 5),
        st.sampled_from([A, B, b"C" * 16, b"short"]),
    ),
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from(["link", "x", 1, 2, 99]), FRAMES, st.sampled_from([KEY_A, None])),
        max_size=12,
    )
)
def test_no_frame_whatever_raises_or_silences_the_others(
    frames: list[tuple[Any, bytes, bytes | None]],
) -> None:
    """F11. Frames of all kinds come in on a known link, from strangers, on our own dialled links."""
    pair = met(Pair(), "direct")
    (wire,) = pair.wires
    pair.b.handle(pe.Know(b"D" * 16, [("direct", "direct://d", OTHER_KEY)], pair.now))
    for link, frame, key in frames:
        pair.b.handle(pe.PacketIn(wire.accepted if link == "link" else link, frame, key, pair.now, "direct"))
        pair.b.peers.flush(pair.now)
        pair.now += 0.01
    # An honest third party is served all the same.
    third = pe.Peers(pe.Identity(b"E" * 16, pe.CLIENT, OTHER_KEY, 77), anybody, pair.now)
    third.handle(pe.Know(B, [("direct", "direct://b", KEY_B)], pair.now))
    third.handle(pe.LinkUp(1, pair.now))
    (hello,) = third.flush(pair.now)
    assert isinstance(hello, pe.Transmit)
    told = pair.b.peers.handle(pe.PacketIn("third", hello.frame, OTHER_KEY, pair.now, "direct"))
    assert told == [pe.PeerUp(b"E" * 16, "direct", True)]


def test_describe_tells_what_is_tried_and_why_it_fails(pair: Pair) -> None:
    assert pair.a.peers.describe(B) == {}
    pair.know("direct")
    for _ in range(3):
        pair.a.handle(pe.LinkDown(1, "nobody answers at direct://b", pair.now))
    told = pair.a.peers.describe(B)
    assert (told["up"], told["carrier"]) == (False, None)
    (way,) = told["links"]
    assert (way["state"], way["attempts"], way["error"]) == ("connecting", 3, "nobody answers at direct://b")
    pair.settle()
    told = pair.a.peers.describe(B)
    assert (told["up"], told["carrier"], told["kind"]) == (True, "direct", "endpoint")
    assert told["links"][0]["error"] is None
