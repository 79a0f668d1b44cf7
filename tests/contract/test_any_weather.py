"""F10: two endpoints over the fake carrier, with every fault that it has, in any order; beside a list of what was sent.

Frames are lost, come twice, late and out of order; links are cut, processes freeze, die at any moment and start again with
their journals. Each message has its effect once, in order, or is known to be unsaid.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gcref.brains import peers as pe
from gcref.carriers.memory import MemoryCarrier, MemoryNetwork
from gcref.wire import messages as m
from tests.contract.places import CLIENT, SERVER

A, B = b"A" * 16, b"B" * 16
ADDRESSES = {A: "tcp://a:1", B: "tcp://b:1"}
KEYS = {A: CLIENT, B: SERVER}
HEARTBEAT_S = 5.0
LIVES = 1_000_000


class Endpoint:
    """One process. Its journal and its list of effects belong to all processes of its party."""

    def __init__(self, weather: Weather, party: bytes, life: int) -> None:
        self.weather = weather
        self.party, self.other = party, B if party == A else A
        self.life = life
        self.sent = 0
        self.journal = weather.journals[party]
        self.effects = weather.effects[party]
        self.carrier = MemoryCarrier(weather.network, KEYS[party], {KEYS[self.other].public: "user"})
        self.carrier.listen(ADDRESSES[party])
        identity = pe.Identity(party, pe.ENDPOINT, KEYS[party].public, life * LIVES)
        self.peers = pe.Peers(identity, lambda key, hello: pe.USER, weather.now, heartbeat_s=HEARTBEAT_S)
        for frame in self.journal:
            found = pe.replay(frame)
            key = KEYS[self.other].public
            self.peers.restore(self.other, pe.ENDPOINT, key, found.epoch, found.last_seq)
        ways: list[pe.Candidate] = [("direct", ADDRESSES[self.other], KEYS[self.other].public)]
        self.obey(self.peers.handle(pe.Know(self.other, ways, weather.now)))

    def say(self, count: int) -> None:
        for _ in range(count):
            self.sent += 1
            self.peers.send(self.other, [m.STATUS, self.life * LIVES + self.sent])

    def turn(self) -> None:
        """As the control loops do it, with the clock of the weather."""
        for event in self.carrier.poll(0):
            self.obey(self.peers.handle(event._replace(now=self.weather.now)))  # type: ignore[arg-type, call-arg]
        self.obey(self.peers.flush(self.weather.now))

    def obey(self, instructions: list[pe.Instruction]) -> None:
        for told in instructions:
            if isinstance(told, pe.Transmit):
                self.carrier.send(told.link, told.frame)
            elif isinstance(told, pe.Deliver):
                self.journal.append(told.raw_frame)
                self.effects += [divmod(message[1], LIVES) for message in told.messages]
            elif isinstance(told, pe.Dial):
                self.carrier.dial(told.link, told.address, told.server_key)
            elif isinstance(told, pe.Hangup):
                self.carrier.hangup(told.link)
            else:
                assert not isinstance(told, pe.PeerReset), "nobody has forgotten anything"


class Weather(RuleBasedStateMachine):
    """The faults, and the laws."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.network = MemoryNetwork()
        self.journals: dict[bytes, list[bytes]] = {A: [], B: []}
        self.effects: dict[bytes, list[tuple[int, int]]] = {A: [], B: []}
        self.known: dict[tuple[bytes, int], int] = {}  # what a process knew to be taken when it died
        self.frozen: set[bytes] = set()
        self.ends = {party: Endpoint(self, party, 1) for party in (A, B)}

    parties = st.sampled_from([A, B])

    @rule(party=parties, count=st.integers(1, 3))
    def say(self, party: bytes, count: int) -> None:
        self.ends[party].say(count)

    @rule(party=parties)
    def turn(self, party: bytes) -> None:
        if party not in self.frozen:
            self.ends[party].turn()

    @rule(rounds=st.integers(1, 6))
    def turns(self, rounds: int) -> None:
        for _ in range(rounds):
            for party in (A, B):
                self.turn(party)

    @rule(seconds=st.sampled_from([0.02, 0.5, 1.0, HEARTBEAT_S, 3 * HEARTBEAT_S + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(frames=st.integers(1, 4))
    def drop(self, frames: int) -> None:
        self.network.drop(frames)

    @rule(frames=st.integers(1, 4))
    def duplicate(self, frames: int) -> None:
        self.network.duplicate(frames)

    @rule(frames=st.integers(1, 4))
    def delay(self, frames: int) -> None:
        self.network.delay(frames)

    @rule()
    def release(self) -> None:
        self.network.release()

    @rule(party=parties)
    def cut(self, party: bytes) -> None:
        self.network.cut(ADDRESSES[party])

    @rule(party=parties)
    def heal(self, party: bytes) -> None:
        self.network.heal(ADDRESSES[party])

    @rule(party=parties)
    def freeze(self, party: bytes) -> None:
        self.frozen.add(party)
        self.network.freeze(self.ends[party].carrier)

    @rule(party=parties)
    def thaw(self, party: bytes) -> None:
        self.frozen.discard(party)
        self.network.thaw(self.ends[party].carrier)

    @rule(party=parties)
    def dies(self, party: bytes) -> None:
        end = self.ends[party]
        self.known[party, end.life] = end.sent - end.peers.pending(end.other)
        self.frozen.discard(party)
        self.network.crash(end.carrier)
        self.ends[party] = Endpoint(self, party, end.life + 1)

    @invariant()
    def each_once_and_in_order(self) -> None:
        for effects in self.effects.values():
            assert effects == sorted(set(effects))
            for life in {life for life, _ in effects}:
                numbers = [number for one, number in effects if one == life]
                assert numbers == list(range(1, len(numbers) + 1))

    @invariant()
    def what_is_acknowledged_has_had_its_effect(self) -> None:
        present = {(p, e.life): e.sent - e.peers.pending(e.other) for p, e in self.ends.items()}
        for (party, life), count in (self.known | present).items():
            taken = self.effects[B if party == A else A]
            assert sum(1 for one, _ in taken if one == life) >= count

    def teardown(self) -> None:
        """The weather clears: all that the living have said arrives."""
        network: Any = self.network
        network._drop = network._duplicate = network._delay = 0
        for party in (A, B):
            self.heal(party)
            self.thaw(party)
        self.release()
        calm = 0  # how long all has been said; what is due at once after that must change nothing
        for _ in range(400):
            self.now += 0.25
            self.turns(3)
            calm = calm + 1 if self.all_is_said() else 0
            if calm > 4 * 3 * HEARTBEAT_S:
                break
        try:
            self.check_the_end()
        finally:
            for end in self.ends.values():
                end.carrier.close()

    def all_is_said(self) -> bool:
        return all(end.peers.pending() == 0 and end.peers.is_up(end.other) for end in self.ends.values())

    def check_the_end(self) -> None:
        for party, end in self.ends.items():
            taken = [number for life, number in self.effects[end.other] if life == end.life]
            assert taken == list(range(1, end.sent + 1))
            assert end.peers.pending() == 0
            assert end.peers.is_up(end.other), party
        self.each_once_and_in_order()


TestAnyWeather = Weather.TestCase
TestAnyWeather.settings = settings(stateful_step_count=40, max_examples=40)
