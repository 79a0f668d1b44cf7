"""Which pulls may start: transcripts that can be read, and a world in which nothing starves or stands still."""

from __future__ import annotations

import time

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gcref.brains.admission import (
    Admission,
    Arrived,
    Ask,
    Drop,
    Event,
    GiveUp,
    Gone,
    Instruction,
    Paused,
    Refused,
    Released,
    Runnable,
    Start,
    Tick,
    Want,
)

LIMIT = 100
WAIT_S = 30.0


class Story:
    """A transcript: `say` an event, and read what the brain answers in few words."""

    def __init__(self) -> None:
        self.brain = Admission(LIMIT, WAIT_S)

    def say(self, event: Event) -> str:
        told = self.brain.handle(event)
        self.brain.validate()
        return " ".join(map(_words, told))

    def want(self, name: str, size: int, task: str | None = None, *, copy: bool = True) -> str:
        """An object for a task; tasks are ordered by their names."""
        order = float(ord(task[0])) if task else float(ord(name[0]))
        return self.say(Want(name.encode(), size, task.encode() if task else None, order, copy))

    def arrived(self, name: str) -> str:
        return self.say(Arrived(name.encode()))

    def runnable(self, task: str, *uses: str) -> str:
        return self.say(Runnable([(task.encode(), [use.encode() for use in uses])]))

    def released(self, *names: str) -> str:
        return self.say(Released([name.encode() for name in names]))


def _words(instruction: Instruction) -> str:
    match instruction:
        case Start(id):
            return f"+{id.decode()}"
        case Drop(ids):
            return f"drop({b','.join(ids).decode()})"
        case Ask(task):
            return f"{task.decode()}?"
        case GiveUp(id, why):
            return f"-{id.decode()}({why})"


def test_below_half_everything_is_pulled_at_once() -> None:
    story = Story()
    assert story.want("a", 20, "1") == "+a"
    assert story.want("b", 20, "2") == "+b"
    assert story.want("c", 10, "0") == "+c"
    assert story.brain.taken == 50


def test_tasks_of_60_percent_go_one_after_the_other_in_their_order() -> None:
    story = Story()
    assert story.want("a", 60, "1") == "+a"
    for name, task in (("d", "4"), ("b", "2"), ("c", "3")):
        assert story.want(name, 60, task) == ""
    for done, task, then in (("a", "1", "+b"), ("b", "2", "+c"), ("c", "3", "+d"), ("d", "4", "")):
        assert story.runnable(task, done) == ""
        assert story.arrived(done) == "", "its task runs, and will give it back"
        assert story.released(done) == then
    assert not story.brain.busy


def test_of_a_task_all_or_nothing() -> None:
    story = Story()
    story.want("a", 60, "1")
    assert story.want("b", 30, "2") == "+b", "it fits"
    assert story.want("c", 30, "2") == ""
    assert story.want("d", 25, "2") == ""
    assert story.want("e", 5, "3") == "+e", "it fits beside all that task 2 still wants"
    assert story.say(Gone(b"a")) == "+d +c" or story.brain.taken == 90


def test_when_nothing_goes_on_the_first_goes_and_what_was_gathered_in_vain_is_dropped() -> None:
    """Task 5 has one argument and waits for another that nobody has made yet; it gives way."""
    story = Story()
    assert story.want("x", 60, "5") == "+x"
    assert story.want("u", 30, "6", copy=False) == "+u"
    assert story.arrived("x") + story.arrived("u") == ""
    assert story.want("a", 80, "1") == "drop(x) +a", "u was uploaded: it cannot be had again"
    assert story.brain.taken == 110


def test_a_task_that_waits_for_its_own_argument_is_not_dropped_for_it() -> None:
    story = Story()
    story.want("x", 60, "1")
    story.arrived("x")
    assert story.want("y", 60, "1") == "+y"
    assert story.brain.taken == 120


def test_a_task_that_is_blocked_is_not_waited_for() -> None:
    """It waits for a task that it submitted, whose arguments have no room beside its own."""
    story = Story()
    for name, task in (("a", "1"), ("b", "2")):
        story.want(name, 40, task)
        story.runnable(task, name)
        story.arrived(name)
    assert story.want("c", 60, "3") == ""
    assert story.brain.deadline == 0.0, "the time is not known yet"
    assert story.say(Tick(5.0)) == ""
    assert story.brain.deadline == 6.0
    assert story.say(Tick(6.0)) == "1?", "nobody answers: it runs"
    assert story.say(Tick(7.0)) == "2?"
    assert story.say(Paused(b"2")) == "1?"
    assert story.say(Paused(b"1")) == "drop(b) +c"
    assert story.brain.deadline is None


def test_an_object_of_many_tasks_is_held_until_the_last_has_let_go() -> None:
    story = Story()
    story.want("a", 60, "1")
    story.say(Runnable([(b"1", [b"a"]), (b"2", [b"a"])]))
    story.arrived("a")
    assert story.want("b", 60, "3") == ""
    story.say(Tick(1.0))
    assert story.say(Tick(2.0)) == "1?"
    assert story.say(Paused(b"1")) == "2?", "it has ended, and nobody released what the other one uses"
    assert story.released("a") == "+b"


def test_small_ones_overtake_but_not_for_ever() -> None:
    story = Story()
    story.want("a", 60, "0")
    story.runnable("0", "a")
    story.arrived("a")
    assert story.want("b", 80, "1") == ""
    assert story.want("c", 15, "2") == "+c"
    assert story.want("d", 10, "3") == "", "then b would not fit when task 0 has ended"
    assert story.released("a") == "+b"
    story = Story()
    story.want("u", 10, "0")
    story.runnable("0", "u")
    story.arrived("u")
    assert story.want("b", 100, "1") == ""
    passed = 0
    for n in range(20):
        story.say(Want(bytes([n]), 10, bytes([n]), 100.0 + n, True))
        passed += story.brain.taken - 10
        story.released(bytes([n]).decode("latin-1"))
    assert passed == LIMIT, "below half they go at once, but no more than the store could hold"
    assert story.released("u") == "+b"


def test_what_the_store_refuses_is_tried_again_one_by_one_and_given_up_in_time() -> None:
    story = Story()
    assert story.want("a", 20, "1") == "+a"
    assert story.want("b", 20, "2") == "+b"
    assert story.say(Refused(b"b", "full", 10.0)) == ""
    assert story.say(Refused(b"a", "full", 10.0)) == ""
    assert story.want("c", 1, "0") == ""
    assert story.brain.deadline == 10.1
    assert story.say(Tick(10.1)) == "+c"
    assert story.arrived("c") == "+a +b", "there is room"
    assert story.say(Refused(b"a", "full", 39.0)) == ""
    assert story.say(Refused(b"b", "really full", 39.5)) == ""
    assert (story.brain.deadline or 99.0) < 40.0
    assert story.say(Tick(40.0)) == "-a(full) -b(really full)"
    assert story.released("c") == ""
    assert not story.brain.busy


def test_memory_that_comes_back_is_tried_at_once() -> None:
    story = Story()
    story.want("a", 30, "1")
    story.runnable("1", "a")
    story.arrived("a")
    story.want("b", 30, "2")
    assert story.say(Refused(b"b", "full", 10.0)) == ""
    assert story.released("a") == "+b"


def test_what_nobody_waits_for_is_not_held() -> None:
    """An object that a client puts here: it lies here then, and is spilled like any other."""
    story = Story()
    assert story.want("a", 90) == "+a"
    assert story.want("b", 90) == ""
    assert story.arrived("a") == "+b"
    assert story.arrived("b") == ""
    assert not story.brain.busy


def test_a_queue_of_any_length_costs_little() -> None:
    brain = Admission(LIMIT, WAIT_S)
    began = time.perf_counter()
    count = 20_000
    for n in range(count):
        brain.handle(Want(n.to_bytes(16, "big"), 60, n.to_bytes(16, "little"), float(n), True))
    for n in range(count):
        id = n.to_bytes(16, "big")
        brain.handle(Runnable([(n.to_bytes(16, "little"), [id])]))
        brain.handle(Arrived(id))
        brain.handle(Released([id]))
    assert not brain.busy
    assert time.perf_counter() - began < 20.0, "it is a matter of one second"


names = st.integers(0, 11).map(lambda n: bytes([n]) * 16)
tasks = st.integers(0, 4).map(lambda n: b"task" * 3 + n.to_bytes(4, "big"))


class World(RuleBasedStateMachine):
    """A store, a network and tasks, which do what they do in any order, and lie about nothing."""

    @initialize(capacity=st.sampled_from((LIMIT, 2 * LIMIT, LIMIT // 2)))
    def begin(self, capacity: int) -> None:
        self.brain = Admission(LIMIT, WAIT_S)
        self.now = 100.0
        self.wanted: dict[bytes, tuple[int, bytes | None]] = {}  # what is not here, and was not given up
        self.flying: set[bytes] = set()
        self.here: dict[bytes, tuple[int, bytes | None]] = {}
        self.running: set[bytes] = set()
        self.blocked: set[bytes] = set()
        self.capacity = capacity  # of memory and disk together, as the store will find

    def say(self, event: Event) -> None:
        events = [event]
        while events:
            for told in self.brain.handle(events.pop(0)):
                match told:
                    case Start(id):
                        assert id in self.wanted
                        assert id not in self.flying
                        self.flying.add(id)
                    case Drop(ids):
                        for id in ids:
                            del self.here[id]
                    case Ask(task):
                        if task not in self.running or task in self.blocked:
                            events.append(Paused(task))
                    case GiveUp(id):
                        assert id not in self.flying
                        del self.wanted[id]

    @rule(id=names, size=st.integers(1, 90), task=st.none() | tasks)
    def want(self, id: bytes, size: int, task: bytes | None) -> None:
        if id in self.wanted or id in self.here:
            return
        self.wanted[id] = (size, task)
        self.say(Want(id, size, task, float(task[-1]) if task else self.now, True))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), refused=st.booleans())
    def a_pull_ends(self, data: st.DataObject, refused: bool) -> None:
        self.end_pull(data.draw(st.sampled_from(sorted(self.flying))), refused)

    def end_pull(self, id: bytes, refused: bool) -> None:
        self.flying.remove(id)
        size, task = self.wanted[id]
        if refused and sum(size for size, _ in self.here.values()) + size > self.capacity:
            self.say(Refused(id, "full", self.now))
            return
        del self.wanted[id]
        if task is not None:
            self.here[id] = (size, task)
            self.start_if_complete(task, id)
        self.say(Arrived(id))

    def start_if_complete(self, task: bytes, last: bytes) -> None:
        if not any(owner == task for _, owner in self.wanted.values()):
            self.running.add(task)
            self.say(Runnable([(task, [id for id, (_, owner) in self.here.items() if owner == task])]))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_task_ends(self, data: st.DataObject) -> None:
        self.end_task(data.draw(st.sampled_from(sorted(self.running))))

    def end_task(self, task: bytes) -> None:
        self.running.remove(task)
        self.blocked.discard(task)
        gone = [id for id, (_, owner) in self.here.items() if owner == task]
        for id in gone:
            del self.here[id]
        self.say(Released(gone))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_task_blocks(self, data: st.DataObject) -> None:
        self.blocked.add(data.draw(st.sampled_from(sorted(self.running))))

    @rule(data=st.data())
    def a_pull_is_cancelled(self, data: st.DataObject) -> None:
        if self.wanted:
            id = data.draw(st.sampled_from(sorted(self.wanted)))
            del self.wanted[id]
            self.flying.discard(id)
            self.say(Gone(id))

    @rule(seconds=st.sampled_from((0.01, 1.0, 20.0)))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.brain.deadline) is not None and due <= until:
            self.now = max(self.now, due)
            self.say(Tick(self.now))
        self.now = until

    @invariant()
    def accounts_agree(self) -> None:
        self.brain.validate()

    @invariant()
    def nothing_stands_still(self) -> None:
        """Whatever waits: a pull is under way, a task runs, or the clock will bring it on."""
        if self.wanted and not self.flying:
            assert self.running or self.brain.deadline is not None

    def teardown(self) -> None:
        """From here on the world behaves: then everything that is wanted comes, or is given up in time."""
        self.blocked.clear()
        began = self.now
        while self.wanted:
            if self.flying:
                self.end_pull(min(self.flying), refused=True)
            elif self.running:
                self.end_task(min(self.running))
            else:
                assert self.brain.deadline is not None, "nothing will bring it on"
                self.time_passes(1.0)
                assert self.now < began + 40 * WAIT_S
        assert not self.flying


TestWorld = World.TestCase
