"""Endpoints that die at any moment and start again with their journals: what `Peers.restore` promises.

Both parties of a `Life` are endpoints that may be killed in the middle of a turn: after some of the instructions of one
`handle` or `flush` were obeyed, and the rest was not. What a process had journalled is what the next one is told. The
twin is the list of what each process sent.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from gcref.brains import peers as pe
from gcref.wire import codec
from gcref.wire import messages as m
from tests.unit.brains.pair import KEY_A, KEY_B, A, B, Pair, Side, Wire, Wires

STEP = 1_000_000
"""How much later a process starts than the one before, microseconds."""


class Journal:
    """What an endpoint writes down: what it had taken when it last took a snapshot, and the frames since."""

    def __init__(self) -> None:
        self.snapshot: tuple[int, int] = (0, 0)
        self.frames: list[bytes] = []
        self.taken: list[
            tuple[int, int]
        ] = []  # everything that was ever delivered: (process that sent it, number)


class Mortal(Side):
    """One process of an endpoint. It obeys `left` more instructions, then it is dead: None means for ever."""

    def __init__(self, pair: Pair, party: bytes, generation: int, epoch: int, journal: Journal) -> None:
        self.generation = generation
        self.left: int | None = None
        self.dead = False
        self.diary = journal
        self.sent = 0
        self.met: list[int] = []  # the epochs of the other side at each `PeerUp` that was fresh
        self.resets = 0
        name, key = ("a", KEY_A) if party == A else ("b", KEY_B)
        super().__init__(f"{name}{generation}", party, pe.ENDPOINT, key, pair, epoch)

    @property
    def other(self) -> Mortal:
        found = self.pair.b if self.party == A else self.pair.a
        assert isinstance(found, Mortal)
        return found

    def recall(self, kind: str, owner_key: bytes | None) -> None:
        """What recovery does: the snapshot first, then each frame of the log."""
        if self.diary.snapshot != (0, 0):
            self.peers.restore(self.other.party, kind, owner_key, *self.diary.snapshot)
        for frame in self.diary.frames:
            found = pe.replay(frame)
            self.peers.restore(self.other.party, kind, owner_key, found.epoch, found.last_seq)

    def say(self, count: int) -> None:
        for _ in range(count):
            self.sent += 1
            self.peers.send(self.other.party, [m.STATUS, self.generation * STEP + self.sent])

    def handle(self, event: pe.Event) -> None:
        if not self.dead:
            super().handle(event)

    def flush(self) -> None:
        if not self.dead:
            super().flush()

    def _obey(self, instructions: list[pe.Instruction]) -> None:
        for told in instructions:
            if self.left is not None:
                if self.left <= 0:
                    self.dead = True
                    return
                self.left -= 1
            if isinstance(told, pe.Deliver):
                self._journal(told)
            elif isinstance(told, pe.Transmit):
                self._check_need(told.frame)
                super()._obey([told])
            else:
                if isinstance(told, pe.PeerUp) and told.fresh:
                    self.met.append(self.peers.taken(self.other.party)[0])
                self.resets += isinstance(told, pe.PeerReset)
                super()._obey([told])

    def _journal(self, told: pe.Deliver) -> None:
        assert pe.replay(told.raw_frame).messages == told.messages
        self.diary.frames.append(told.raw_frame)
        self.diary.taken += [divmod(message[1], STEP) for message in told.messages]

    def _check_need(self, frame: bytes) -> None:
        """Nothing is sent again that was acknowledged."""
        packet = codec.unpack_packet(frame)
        if packet.kind == codec.DATA and packet.messages:
            session = self.peers._peers[self.other.party].session
            assert packet.first_seq + len(packet.messages) - 1 > session.acked
            assert packet.epoch == session.epoch


def lives(pair: Pair) -> tuple[Mortal, Mortal]:
    """Two endpoints that have not met; A can dial B."""
    a = pair.a = Mortal(pair, A, 1, STEP, Journal())
    b = pair.b = Mortal(pair, B, 1, 5 * STEP, Journal())
    pair.know("direct")
    return a, b


def again(side: Mortal, epoch: int) -> Mortal:
    """The next process of an endpoint that was killed; its connections are closed."""
    pair, side.dead = side.pair, True
    new = Mortal(pair, side.party, side.generation + 1, epoch, side.diary)
    if side.party == A:
        pair.a = new
        pair.wires.clear()
    else:
        pair.b = new
        for wire in pair.wires:
            wire.lose(pair.now)
            wire.listener = new
    new.recall(pe.ENDPOINT, side.other.key)
    if side.party == A:
        pair.know("direct")
    return new


def test_an_endpoint_that_died_between_journal_and_acknowledgement_goes_on_where_it_was() -> None:
    pair = Pair()
    a, b = lives(pair)
    pair.settle()
    a.say(3)
    a.flush()
    b.left = 1  # the packet is journalled, and that was all
    pair.deliver_all()
    b.flush()
    assert b.dead or b.left == 0
    b = again(b, 9 * STEP)
    a.say(1)
    a.told.clear()
    pair.settle()
    assert b.diary.taken == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert a.news(pe.PeerUp, pe.PeerDown, pe.PeerReset) == [pe.PeerUp(B, "direct", True)]
    assert b.news(pe.PeerUp, pe.PeerReset) == [pe.PeerUp(A, "direct", True)]
    pair.pass_time(1.0)
    assert a.peers.pending() == 0


def test_what_a_dead_process_had_not_got_across_is_not_said_by_the_sessions() -> None:
    """It is for the brains of the next one to say it again."""
    pair = Pair()
    a, b = lives(pair)
    pair.settle()
    b.say(1)
    pair.settle()
    b.say(1)
    b.flush()
    for wire in pair.wires:
        wire.back.clear()
    b = again(b, 9 * STEP)
    b.say(2)
    pair.settle()
    assert a.diary.taken == [(1, 1), (2, 1), (2, 2)]


def test_two_clocks_that_went_back_are_no_deadlock() -> None:
    pair = Pair()
    a, b = lives(pair)
    pair.settle()
    a.say(1)
    b.say(1)
    pair.pass_time(1.0)
    b = again(b, 4 * STEP)
    a = again(a, STEP // 2)
    a.say(1)
    b.say(1)
    pair.settle()
    assert b.diary.taken == [(1, 1), (2, 1)]
    assert a.diary.taken == [(1, 1), (2, 1)]
    assert a.resets == b.resets == 0


def test_any_key_may_show_up_when_none_was_written_down() -> None:
    pair = Pair()
    _, b = lives(pair)
    b.peers.restore(A, pe.ENDPOINT, None, 7, 0)
    pair.settle()
    assert b.peers.is_up(A)
    other = Pair()
    _, b = lives(other)
    b.peers.restore(A, pe.ENDPOINT, b"x" * 40, 7, 0)
    other.settle()
    assert not b.peers.is_up(A)


class Life(Wires):
    """Two endpoints, links in any weather, and death at any instruction."""

    def __init__(self) -> None:
        super().__init__()
        self.journals = {A: Journal(), B: Journal()}
        self.epochs = {A: STEP, B: 5 * STEP}
        # What a process had sent, and what it knew to be taken, when it died; by party and process.
        self.ends: dict[tuple[bytes, int], tuple[int, int]] = {}
        self.pair.a = Mortal(self.pair, A, 1, self.epochs[A], self.journals[A])
        self.pair.b = Mortal(self.pair, B, 1, self.epochs[B], self.journals[B])
        self.ways: dict[bytes, tuple[str, ...]] = {A: (), B: ()}
        self.old_mail: dict[tuple[bytes, str], list[bytes]] = {}

    @initialize(
        ways=st.sampled_from([("direct",), ("ipc", "direct"), ("direct", "broker"), ("broker",)]),
        back=st.sampled_from([(), ("direct",), ("broker",)]),
    )
    def begin(self, ways: tuple[str, ...], back: tuple[str, ...]) -> None:
        self.ways = {A: ways, B: back}
        for party in (A, B):
            self.know(self.side(party))

    def side(self, party: bytes) -> Mortal:
        found = self.pair.a if party == A else self.pair.b
        assert isinstance(found, Mortal)
        return found

    def know(self, side: Mortal) -> None:
        other, key = side.other, side.other.key
        ways = [(c, f"{c}://{other.name[0]}", None if c == "ipc" else key) for c in self.ways[side.party]]
        if ways:
            side.handle(pe.Know(other.party, ways, self.pair.now))

    # ------------------------------------------------------------------------------------------------- daily life

    @rule(party=st.sampled_from([A, B]), count=st.integers(1, 3))
    def send(self, party: bytes, count: int) -> None:
        self.side(party).say(count)

    @rule(party=st.sampled_from([A, B]))
    def flush(self, party: bytes) -> None:
        self.side(party).flush()
        self.bury()

    def after_delivery(self) -> None:
        self.bury()

    @rule()
    def settle(self) -> None:
        self.pair.settle()

    @rule(choice=st.integers(0, 7))
    def lose(self, choice: int) -> None:
        if self.pair.wires:
            self.lose_one(self.pair.wires[choice % len(self.pair.wires)])

    def lose_one(self, wire: Wire) -> None:
        wire.lose(self.pair.now)
        assert isinstance(wire.listener, Mortal)
        if wire.listener.dead:
            wire.listener = self.side(wire.listener.party)  # who listens there now

    @rule(party=st.sampled_from([A, B]))
    def snapshot(self, party: bytes) -> None:
        side = self.side(party)
        side.diary.snapshot = side.peers.taken(side.other.party)
        side.diary.frames.clear()

    # ------------------------------------------------------------------------------------------------------ death

    @rule(
        party=st.sampled_from([A, B]),
        left=st.integers(0, 4),
        flushes=st.booleans(),
        choice=st.integers(0, 7),
        told=st.booleans(),
        clock_back=st.booleans(),
    )
    def dies(self, party: bytes, left: int, flushes: bool, choice: int, told: bool, clock_back: bool) -> None:
        """A process dies in the middle of a turn, after some instructions; the next one starts.

        Args:
            told: the system closes its connections; else a machine has lost its power, and nobody hears of it.
            clock_back: the next process believes that it is earlier.
        """
        side = self.side(party)
        side.left = left
        if flushes:
            side.flush()
        elif found := self.frames(choice):
            found[0].deliver(found[1], 0, self.pair.now)
        self.kill(side, told, clock_back)

    def bury(self) -> None:
        for party in (A, B):
            if self.side(party).dead:
                self.kill(self.side(party), True, False)

    def kill(self, side: Mortal, told: bool, clock_back: bool = False) -> None:
        side.dead = True
        party, pair = side.party, self.pair
        acked = side.sent - side.peers.pending(side.other.party)
        self.ends[party, side.generation] = side.sent, acked
        self.epochs[party] += -STEP // 2 if clock_back else STEP
        if self.epochs[party] <= 0:
            self.epochs[party] = 1
        new = Mortal(pair, party, side.generation + 1, self.epochs[party], side.diary)
        if party == A:
            pair.a = new
        else:
            pair.b = new
        for wire in list(pair.wires):
            if wire.dialler is side:
                if told or wire.by_mail:
                    pair.wires.remove(wire)
                # Else what it had sent may still arrive, late.
            elif wire.listener is side and wire.by_mail:
                wire.listener = new  # it opens the same mailbox
            elif wire.listener is side and told:
                self.lose_one(wire)
        # The broker may deliver to the next process all that it ever delivered to this one.
        for (_, receiver, way), mail in pair.post.items():
            if receiver == party:
                self.old_mail[party, way] = list(mail.posted)
        new.recall(pe.ENDPOINT, KEY_A if party == B else KEY_B)
        self.know(new)

    @rule(
        party=st.sampled_from([A, B]),
        way=st.sampled_from(["out", "back"]),
        start=st.integers(0, 400),
        count=st.integers(1, 30),
    )
    def old_mail_comes_again(self, party: bytes, way: str, start: int, count: int) -> None:
        """A stretch of the mail to earlier processes of this party, as it was posted."""
        side, frames = self.side(party), self.old_mail.get((party, way), [])
        if not frames:
            return
        start %= len(frames)
        for frame in frames[start : start + count]:
            link: pe.Link = ("mail", side.other.party, side.other.key)
            if way == "back":
                dialled = [w for w in self.pair.wires if w.dialler is side and w.by_mail and not w.hung_up]
                if not dialled:
                    return
                link = dialled[-1].dial.link
            side.handle(pe.PacketIn(link, frame, side.other.key, self.pair.now, "broker"))
            self.bury()

    # ------------------------------------------------------------------------------------------------------- laws

    @invariant()
    def once_and_in_order(self) -> None:
        for party in (A, B):
            taken = self.journals[party].taken
            assert taken == sorted(set(taken))
            counts: dict[int, int] = {}
            for generation, number in taken:
                assert number == counts.get(generation, 0) + 1, "a gap"
                counts[generation] = number

    @invariant()
    def nobody_is_taken_for_forgetful(self) -> None:
        assert self.side(A).resets == self.side(B).resets == 0

    @invariant()
    def what_was_acknowledged_is_journalled(self) -> None:
        for party in (A, B):
            side = self.side(party)
            self.check_acked(side, side.generation, side.sent - side.peers.pending(side.other.party))
            for (sender, generation), (_sent, acked) in self.ends.items():
                if sender == party:
                    self.check_acked(side, generation, acked)

    def check_acked(self, side: Mortal, generation: int, acked: int) -> None:
        taken = self.journals[side.other.party].taken
        assert sum(1 for sender, _ in taken if sender == generation) >= acked

    @invariant()
    def a_process_is_fresh_once(self) -> None:
        for party in (A, B):
            assert len(self.side(party).met) == len(set(self.side(party).met))

    def teardown(self) -> None:
        """The weather clears: all that the present processes say arrives, and nobody has anything left to do."""
        self.pair.pass_time(150.0, 1.0)
        for party in (A, B):
            side = self.side(party)
            assert side.peers.pending() == 0
            taken = self.journals[side.other.party].taken
            mine = [number for generation, number in taken if generation == side.generation]
            assert mine == list(range(1, side.sent + 1))
            assert side.met
            assert side.peers.is_up(side.other.party)
            deadline = side.peers.deadline
            assert deadline is None or deadline > self.pair.now
        self.once_and_in_order()
        self.nobody_is_taken_for_forgetful()


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=50)
