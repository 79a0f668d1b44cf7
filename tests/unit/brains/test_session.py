"""Sessions: the arithmetic by transcripts, then two parties over links that lose, repeat and reorder, beside a list."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gcref.brains import peers as pe
from gcref.brains import session as sessions
from gcref.brains.session import NEVER, Session
from gcref.wire.codec import DATA, pack, pack_packet, unpack_packet
from tests.unit.brains.pair import HEARTBEAT_S, Pair, Side, Wires, note

NOW = 50.0


def take(session: Session, frame: bytes, now: float = NOW) -> list[int]:
    """Hand a frame to a session; the numbers in the messages that came out."""
    packet = unpack_packet(frame)
    session.take_ack(packet.ack_epoch, packet.ack, now)
    return [message[1] for taken in session.receive(packet, frame, now) for message in taken.messages]


def two() -> tuple[Session, Session]:
    """A sender and a receiver that have met."""
    sender, receiver = Session(7), Session(9)
    sender.adopt(9)
    receiver.adopt(7)
    return sender, receiver


def cut(session: Session, *numbers: int) -> bytes:
    """One packet with these messages."""
    for number in numbers:
        session.append(pack(note(number)))
    (frame,) = session.cut(NOW)
    return frame


# -------------------------------------------------------------------------------------------------- transcripts


def test_a_flush_is_one_packet_and_its_numbers_go_on() -> None:
    sender, _ = two()
    first, second = unpack_packet(cut(sender, 1, 2, 3)), unpack_packet(cut(sender, 4))
    assert (first.kind, first.epoch, first.first_seq, first.messages) == (
        DATA,
        7,
        1,
        [note(1), note(2), note(3)],
    )
    assert (second.first_seq, second.messages) == (4, [note(4)])
    assert sender.cut(NOW) == []


def test_an_acknowledgement_rides_on_the_next_packet() -> None:
    sender, receiver = two()
    assert take(receiver, cut(sender, 1, 2)) == [1, 2]
    assert receiver.ack_at == NOW + sessions.ACK_DELAY_S
    answer = cut(receiver, 10)
    assert receiver.ack_at == NEVER
    assert sender.pending == 2
    assert take(sender, answer) == [10]
    assert (sender.pending, sender.unacked_bytes, sender.resend_at) == (0, 0, NEVER)


def test_without_a_packet_to_ride_on_it_comes_alone_after_many_packets_at_once() -> None:
    sender, receiver = two()
    for number in range(sessions.ACK_PACKETS - 1):
        take(receiver, cut(sender, number))
        assert receiver.ack_at == NOW + sessions.ACK_DELAY_S
    take(receiver, cut(sender, 1000))
    assert receiver.ack_at == -NEVER
    alone = receiver.ack_frame()
    assert unpack_packet(alone).messages == []
    assert take(sender, alone) == []
    assert sender.pending == 0
    assert receiver.ack_at == NEVER


def test_a_duplicate_is_dropped_and_acknowledged_at_once() -> None:
    sender, receiver = two()
    frame = cut(sender, 1)
    assert take(receiver, frame) == [1]
    receiver.ack_said()
    assert take(receiver, frame) == []
    assert receiver.ack_at == -NEVER
    assert receiver.duplicates == 1


def test_early_packets_wait_for_the_missing_one() -> None:
    sender, receiver = two()
    one, two_, three = cut(sender, 1), cut(sender, 2, 3), cut(sender, 4)
    assert take(receiver, three) == []
    assert receiver.ack_at == -NEVER, "a gap is told at once"
    assert take(receiver, two_) == []
    assert take(receiver, one) == [1, 2, 3, 4]
    assert receiver.taken == 4


def test_what_is_kept_early_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "EARLY_PACKETS", 3)
    sender, receiver = two()
    first = cut(sender, 0)
    rest = [cut(sender, number) for number in range(1, 6)]
    for frame in rest:
        assert take(receiver, frame) == []
    assert take(receiver, first) == [0, 1, 2, 3]
    assert take(receiver, rest[3]) == [4]


def test_a_new_stream_owes_nothing_to_the_old_one() -> None:
    sender, receiver = two()
    cut(sender, 1)
    assert take(receiver, cut(sender, 2)) == []
    receiver.adopt(8)
    anew = Session(8)
    assert take(receiver, cut(anew, 11)) == [11]
    assert take(receiver, cut(anew, 12)) == [12]


def test_packets_that_were_cut_otherwise_overlap_without_harm() -> None:
    sender, receiver = two()
    bodies = [pack(note(number)) for number in range(1, 6)]

    def packet(first: int, last: int) -> bytes:
        return pack_packet(DATA, 7, first, 0, 0, bodies[first - 1 : last])

    assert take(receiver, packet(1, 2)) == [1, 2]
    taken = receiver.receive(unpack_packet(packet(1, 4)), packet(1, 4), NOW)
    assert [message[1] for message in taken[0].messages] == [3, 4]
    replayed = pe.replay(taken[0].frame)
    assert (replayed.epoch, replayed.last_seq, replayed.messages) == (7, 4, [note(3), note(4)])
    assert take(receiver, packet(5, 5)) == [5]
    assert sender.epoch == 7


def test_the_credit_holds_back_what_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CREDIT_BYTES", 500)
    monkeypatch.setattr(sessions, "PACKET_BYTES", 200)
    sender, receiver = two()
    for _ in range(30):
        sender.append(pack([16, 1, b"x" * 80]))
    frames = sender.cut(NOW)
    assert sum(len(frame) for frame in frames) >= 500
    assert all(len(frame) <= 200 + 44 for frame in frames)
    assert sender.cut(NOW) == []
    held = sender.pending
    for frame in frames:
        take(receiver, frame)
    take(sender, receiver.ack_frame())
    assert sender.pending < held
    assert sender.cut(NOW), "credit came back"


def test_a_large_message_is_a_packet_of_its_own() -> None:
    sender, receiver = two()
    big = b"x" * (2 * sessions.PACKET_BYTES)
    for value in (b"a", big, b"b"):
        sender.append(pack([16, 1, value]))
    frames = sender.cut(NOW)
    assert [len(unpack_packet(frame).messages) for frame in frames] == [1, 1, 1]
    assert sum(len(take(receiver, frame)) for frame in frames) == 3
    assert sender.queued_bytes == 0


def test_stale_and_impossible_acknowledgements_change_nothing() -> None:
    sender, _ = two()
    cut(sender, 1, 2)
    assert not sender.take_ack(6, 2, NOW), "another epoch"
    assert not sender.take_ack(7, 3, NOW), "never sent"
    assert not sender.take_ack(7, 0, NOW)
    assert sender.pending == 2
    assert sender.take_ack(7, 2, NOW)
    assert not sender.take_ack(7, 2, NOW)


def test_questions_come_more_and_more_seldom_until_there_is_progress() -> None:
    sender, _ = two()
    cut(sender, 1)
    cut(sender, 2)
    waits = []
    now = NOW
    for _ in range(7):
        waits.append(sender.resend_at - now)
        now = sender.resend_at
        sender.back_off(now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    sender.take_ack(7, 1, now)
    assert sender.resend_at == now + sessions.RESEND_S


def test_a_restart_renumbers_what_is_not_acknowledged() -> None:
    sender, receiver = two()
    frames = [cut(sender, 1, 2), cut(sender, 3), cut(sender, 4, 5)]
    take(receiver, frames[0])
    take(sender, receiver.ack_frame())
    sender.append(pack(note(6)))
    assert sender.restart(8) == [note(3), note(4), note(5), note(6)]
    anew = Session(10)
    anew.adopt(8)
    for frame in sender.unacked_frames(sender.next_seq - 1) + sender.cut(NOW):
        assert unpack_packet(frame).ack_epoch in (0, 9)
        take(anew, frame)
    assert (anew.taken, sender.next_seq) == (4, 5)
    take(sender, anew.ack_frame())
    assert sender.pending == 0


# ------------------------------------------------------------------------------- any weather, beside an obvious twin


class Weather(Wires):
    """Two sessions over two links that lose, repeat, reorder and break. The twin is the list of what was sent.

    At each moment each side has got, in order and once, a beginning of what the other one sent. When the weather
    clears, it has got all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = {"a": [], "b": []}

    @initialize(
        carriers=st.sampled_from([("direct",), ("ipc", "direct"), ("direct", "broker"), ("broker",)]),
        back=st.sampled_from([None, "direct", "broker"]),
    )
    def begin(self, carriers: tuple[str, ...], back: str | None) -> None:
        self.pair.know(*carriers)
        if back is not None:  # both dial at once
            ways: list[pe.Candidate] = [(back, f"{back}://a", self.pair.a.key)]
            self.pair.b.handle(pe.Know(self.pair.a.party, ways, self.pair.now))

    def side(self, is_a: bool) -> Side:
        return self.pair.a if is_a else self.pair.b

    @rule(is_a=st.booleans(), count=st.integers(1, 4))
    def send(self, is_a: bool, count: int) -> None:
        side = self.side(is_a)
        sent = self.sent[side.name]
        numbers = range(len(sent) + 1, len(sent) + 1 + count)
        sent.extend(numbers)
        side.send(*numbers)

    @rule(is_a=st.booleans())
    def flush(self, is_a: bool) -> None:
        self.side(is_a).flush()

    @rule(choice=st.integers(0, 7))
    def deliver_many(self, choice: int) -> None:
        if found := self.frames(choice):
            wire, frames = found
            while frames and wire.up:
                wire.deliver(frames, 0, self.pair.now)

    @precondition(lambda self: self.pair.wires)
    @rule(choice=st.integers(0, 3))
    def lose(self, choice: int) -> None:
        self.pair.wires[choice % len(self.pair.wires)].lose(self.pair.now)

    @invariant()
    def in_order_and_once(self) -> None:
        a, b = self.pair.a, self.pair.b
        assert b.got == self.sent["a"][: len(b.got)]
        assert a.got == self.sent["b"][: len(a.got)]

    @invariant()
    def nothing_is_lost_on_the_way(self) -> None:
        for side, other in ((self.pair.a, self.pair.b), (self.pair.b, self.pair.a)):
            assert len(other.got) + side.peers.pending() >= len(self.sent[side.name])

    def teardown(self) -> None:
        """The weather clears: within a while all of it is there, acknowledged, and nobody has anything to do."""
        self.pair.pass_time(100.0, 1.0)
        a, b = self.pair.a, self.pair.b
        assert b.got == self.sent["a"]
        assert a.got == self.sent["b"]
        assert a.peers.pending() == b.peers.pending() == 0
        assert not a.news(pe.PeerReset)
        assert not b.news(pe.PeerReset)
        for side in (a, b):
            deadline = side.peers.deadline
            assert deadline is None or deadline > self.pair.now


class Restarts(RuleBasedStateMachine):
    """B is an endpoint that ends and starts again, with its journal or without. Links break but do not lie.

    With the journal each message of A is taken once over all processes of B. Without it, the next process gets what
    was not acknowledged, and `PeerReset` says whether there was more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.pair.know("direct")
        self.epoch = 1_000_000
        self.sent_a = 0
        self.lost_before = 0  # of A's messages, those up to here are with a process of B that left no journal
        self.sent_b: list[int] = []

    @rule(count=st.integers(1, 3))
    def a_sends(self, count: int) -> None:
        self.pair.a.send(*range(self.sent_a + 1, self.sent_a + 1 + count))
        self.sent_a += count

    @rule(count=st.integers(1, 3))
    def b_sends(self, count: int) -> None:
        numbers = range(self.sent_b[-1] + 1 if self.sent_b else 1, 1000_000)[:count]
        self.sent_b.extend(numbers)
        self.pair.b.send(*numbers)

    @rule()
    def settle(self) -> None:
        self.pair.settle()

    @rule()
    def half(self) -> None:
        self.pair.connect()
        self.pair.flush()

    @rule()
    def some_arrive(self) -> None:
        for wire in self.pair.wires:
            for frames in (wire.out, wire.back):
                if frames and wire.up:
                    wire.deliver(frames, 0, self.pair.now)

    @rule()
    def lose(self) -> None:
        for wire in self.pair.wires:
            wire.lose(self.pair.now)

    @rule(seconds=st.sampled_from([0.02, 1.0, 3 * HEARTBEAT_S + 1]))
    def wait(self, seconds: float) -> None:
        self.pair.now += seconds

    @rule(journal=st.booleans(), clock_back=st.booleans())
    def b_restarts(self, journal: bool, clock_back: bool) -> None:
        a, b = self.pair.a, self.pair.b
        for wire in self.pair.wires:
            wire.lose(self.pair.now)
        self.epoch += -500 if clock_back else 1000
        b.start(self.epoch)
        if journal:
            for frame in b.journal:
                found = pe.replay(frame)
                b.peers.restore(a.party, a.kind, a.key, found.epoch, found.last_seq)
        else:
            b.got.clear()
            b.journal.clear()
            self.lost_before = self.sent_a - a.peers.pending()
        # What its old process had not sent, or A had not taken, is for its new brains to say again.
        self.sent_b = list(a.got)

    @invariant()
    def in_order_and_once(self) -> None:
        a, b = self.pair.a, self.pair.b
        assert a.got == self.sent_b[: len(a.got)]
        assert b.got == list(range(b.got[0], b.got[0] + len(b.got))) if b.got else True

    def teardown(self) -> None:
        self.pair.pass_time(100.0, 1.0)
        a, b = self.pair.a, self.pair.b
        assert b.got == list(range(self.lost_before + 1, self.sent_a + 1))
        assert a.got == self.sent_b
        assert a.peers.pending() == b.peers.pending() == 0


TestWeather = Weather.TestCase
TestWeather.settings = settings(stateful_step_count=60)
TestRestarts = Restarts.TestCase
TestRestarts.settings = settings(stateful_step_count=30)


def test_the_twin_would_notice_a_loss() -> None:
    """The checks of `Weather` can fail: a message that is taken behind the session's back is missed."""
    pair = Pair()
    pair.know("direct")
    pair.settle()
    pair.a.send(1, 2)
    pair.settle()
    pair.b.got.pop()
    machine: Any = Weather.__new__(Weather)
    machine.pair, machine.sent = pair, {"a": [1, 2], "b": []}
    with pytest.raises(AssertionError):
        machine.teardown()
