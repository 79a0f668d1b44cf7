"""Two parties and the links between them, without sockets or clock: what tests of `Peers` play with.

    pair = Pair()
    pair.know("direct")             # A dials B
    pair.settle()                   # everything that is under way arrives
    pair.a.peers.send(B, message); pair.settle(); pair.b.got

Frames lie on `Wire`s until they are delivered, so a test can drop, repeat or reorder each of them. The wires of the carrier
`broker` are mail: what was posted lies in a mailbox, whatever becomes of the wire and of the processes at its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from gcref.brains import peers as pe
from gcref.wire import codec
from gcref.wire import messages as m

A, B = b"A" * 16, b"B" * 16
KEY_A, KEY_B = b"a" * 40, b"b" * 40
HEARTBEAT_S = 5.0


def note(number: int) -> list[Any]:
    """A small valid message that carries a number."""
    return [m.STATUS, number]


def anybody(key: bytes | None, hello: pe.Hello) -> str | None:
    return pe.USER


class Mail(NamedTuple):
    """What one party has posted to another: the part that is not delivered yet, and all of it."""

    waiting: list[bytes]
    posted: list[bytes]

    def post(self, frame: bytes) -> None:
        self.waiting.append(frame)
        self.posted.append(frame)


class Wire:
    """One dialled link: a connection when `up`, with the frames that are under way in both directions."""

    def __init__(self, dialler: Side, listener: Side, dial: pe.Dial) -> None:
        self.dialler = dialler
        self.listener = listener
        self.dial = dial
        self.up = False
        self.hung_up = False
        self.connections = 0
        self.by_mail = dial.carrier == "broker"
        self.out: list[bytes] = []  # dialler → listener
        self.back: list[bytes] = []
        if self.by_mail:
            self.out = dialler.pair.mail(dialler.party, listener.party, "out").waiting
            self.back = dialler.pair.mail(listener.party, dialler.party, "back").waiting

    @property
    def accepted(self) -> tuple[Any, ...]:
        """The listener's name for the present connection."""
        if self.by_mail:
            return ("mail", self.dialler.party, self.dialler.key)
        return (self.dialler.name, self.dial.link, self.connections)

    def connect(self, now: float) -> None:
        if not self.up and not self.hung_up:
            self.up = True
            self.connections += 1
            self.dialler.handle(pe.LinkUp(self.dial.link, now))

    def lose(self, now: float) -> None:
        """The connection breaks: the dialler is told, the listener is not. Mail lies where it was posted."""
        if self.up:
            self.up = False
            if not self.by_mail:
                self.out.clear()
                self.back.clear()
            self.dialler.handle(pe.LinkDown(self.dial.link, "the connection was lost", now))

    def deliver(self, frames: list[bytes], index: int, now: float, *, keep: bool = False) -> None:
        frame = frames[index]
        if not keep:
            del frames[index]
        if frames is self.out:
            key = self.dialler.key if self.dial.carrier != "ipc" else None
            self.listener.handle(pe.PacketIn(self.accepted, frame, key, now, self.dial.carrier))
        else:
            key = self.listener.key if self.by_mail else None
            self.dialler.handle(pe.PacketIn(self.dial.link, frame, key, now, self.dial.carrier))


class Side:
    """One party: its sessions, what was delivered to it, and what it was told."""

    def __init__(self, name: str, party: bytes, kind: str, key: bytes, pair: Pair, epoch: int) -> None:
        self.name = name
        self.party = party
        self.key = key
        self.kind = kind
        self.pair = pair
        self.authorize: Callable[[bytes | None, pe.Hello], str | None] = anybody
        self.got: list[int] = []
        self.journal: list[bytes] = []
        self.told: list[pe.Instruction] = []
        self.started = 0
        self.start(epoch)

    def start(self, epoch: int) -> None:
        """Begin a process: it knows nothing."""
        identity = pe.Identity(self.party, self.kind, self.key, epoch)
        self.peers = pe.Peers(
            identity, lambda key, hello: self.authorize(key, hello), self.pair.now, heartbeat_s=HEARTBEAT_S
        )

    def handle(self, event: pe.Event) -> None:
        self._obey(self.peers.handle(event))

    def flush(self) -> None:
        self._obey(self.peers.flush(self.pair.now))

    def send(self, *numbers: int) -> None:
        to = B if self.party == A else A
        for number in numbers:
            self.peers.send(to, note(number))

    def _obey(self, instructions: list[pe.Instruction]) -> None:
        for told in instructions:
            if isinstance(told, pe.Transmit):
                self._transmit(told)
            elif isinstance(told, pe.Deliver):
                self.got += [message[1] for message in told.messages]
                self.journal.append(told.raw_frame)
                self.told.append(told)
            elif isinstance(told, pe.Dial):
                other = self.pair.b if self is self.pair.a else self.pair.a
                self.pair.wires.append(Wire(self, other, told))
            elif isinstance(told, pe.Hangup):
                for wire in self.pair.wires:
                    if wire.dialler is self and wire.dial.link == told.link:
                        wire.hung_up = True
                        wire.up = wire.up and bool(wire.out)  # what was sent before still goes out
            else:
                self.told.append(told)

    def _transmit(self, told: pe.Transmit) -> None:
        if isinstance(told.link, tuple) and told.link[0] == "mail":
            self.pair.mail(self.party, told.link[1], "back").post(told.frame)
            return
        for wire in self.pair.wires:
            if wire.dialler is self and wire.dial.link == told.link:
                if wire.up and not wire.hung_up:
                    if wire.by_mail:
                        self.pair.mail(self.party, wire.listener.party, "out").post(told.frame)
                    else:
                        wire.out.append(told.frame)
                return
            if wire.listener is self and wire.accepted == told.link:
                if wire.up and not wire.hung_up:
                    wire.back.append(told.frame)
                else:
                    self.handle(pe.LinkDown(told.link, "the connection is gone", self.pair.now))
                return

    def news(self, *kinds: type) -> list[Any]:
        """What it was told of these kinds since the last call."""
        found = [told for told in self.told if isinstance(told, kinds)] if kinds else list(self.told)
        self.told = [told for told in self.told if told not in found]
        return found


class Pair:
    """Two sides, a clock, and the wires between them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.wires: list[Wire] = []
        self.post: dict[tuple[bytes, bytes, str], Mail] = {}
        self.a = Side("a", A, pe.CLIENT, KEY_A, self, 1000)
        self.b = Side("b", B, pe.ENDPOINT, KEY_B, self, 1_000_000)

    def mail(self, sender: bytes, receiver: bytes, side: str) -> Mail:
        """The mail from one party to another: `out` from who dialled, `back` to who did."""
        return self.post.setdefault((sender, receiver, side), Mail([], []))

    def know(self, *carriers: str) -> None:
        """A learns of ways to B, one for each carrier."""
        ways = [(c, f"{c}://b", None if c == "ipc" else KEY_B) for c in carriers]
        self.a.handle(pe.Know(B, ways, self.now))

    def connect(self) -> None:
        for wire in list(self.wires):
            wire.connect(self.now)

    def flush(self) -> None:
        self.a.flush()
        self.b.flush()

    def deliver_all(self) -> bool:
        """Deliver what is under way, in order; whether there was any."""
        moved = False
        for wire in list(self.wires):
            for frames in (wire.out, wire.back):
                while frames and wire.up:
                    wire.deliver(frames, 0, self.now)
                    moved = True
            if wire.hung_up:
                wire.up = False
        return moved

    def settle(self) -> None:
        """Connect everything, and let everything arrive, without a step of the clock."""
        for _ in range(200):
            self.connect()
            self.flush()
            if not self.deliver_all():
                return
        raise AssertionError("they never stop talking")

    def pass_time(self, seconds: float, step_s: float = 0.5) -> None:
        """Let the clock run, with everything arriving at once."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + step_s)
            self.settle()


def met(pair: Pair, *carriers: str) -> Pair:
    """A and B have met over these carriers, and that is old news."""
    pair.know(*carriers)
    pair.settle()
    pair.a.told.clear()
    pair.b.told.clear()
    return pair


def kinds(frames: list[bytes]) -> list[str]:
    """The kinds of these packets."""
    return [codec.PACKET_KINDS[codec.unpack_packet(frame).kind] for frame in frames]


class Wires(RuleBasedStateMachine):
    """What befalls the wires of a pair in any weather: frames come twice, out of order or never, and time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def after_delivery(self) -> None:
        """A frame was delivered."""

    def frames(self, choice: int) -> tuple[Wire, list[bytes]] | None:
        """One direction of a wire on which something is under way."""
        full = [(w, f) for w in self.pair.wires for f in (w.out, w.back) if f and w.up]
        return full[choice % len(full)] if full else None

    @rule(choice=st.integers(0, 7), place=st.integers(0, 5))
    def deliver(self, choice: int, place: int) -> None:
        """Mostly in order, sometimes not."""
        if found := self.frames(choice):
            wire, frames = found
            wire.deliver(frames, place if place < len(frames) and place > 3 else 0, self.pair.now)
            self.after_delivery()

    @rule(choice=st.integers(0, 7), place=st.integers(0, 3))
    def duplicate(self, choice: int, place: int) -> None:
        if found := self.frames(choice):
            wire, frames = found
            wire.deliver(frames, place % len(frames), self.pair.now, keep=True)

    @rule(choice=st.integers(0, 7), place=st.integers(0, 3))
    def drop(self, choice: int, place: int) -> None:
        if found := self.frames(choice):
            del found[1][place % len(found[1])]

    @rule()
    def connect(self) -> None:
        self.pair.connect()

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.3, 1.0, HEARTBEAT_S, 3 * HEARTBEAT_S + 1, 100.0]))
    def wait(self, seconds: float) -> None:
        self.pair.now += seconds
