"""The dispatch brain: transcripts, any state × any event, a stateful twin, and simulated makespans."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gcref.brains import dispatch_events as ev
from gcref.brains.dispatch import (
    LEASE_MARGIN_S,
    LEASE_S,
    SPARE_S,
    STARTED_AFTER_S,
    TRANSITIONS,
    Dispatch,
    IllegalEventError,
)
from gcref.brains.dispatch_worker import FUNCTIONS_MAX
from gcref.brains.tasks import CANCELLED, DISPATCHED, DONE, FAILED, READY, WAITING, Options, Task
from tests.support.timing import cpu_seconds
from tests.unit.brains.dispatch_twin import FakeWorker, Simulation, complete, make_task, to_event

AFTER_LEASE_S = LEASE_S + LEASE_MARGIN_S
EXCLUSIVE = Options(walltime_s=5.0)
GPU = Options(resources={"gpus": 1})


class Bench:
    """A dispatch with a clock, whose answers read as text. Tasks have names."""

    def __init__(self, workers: int = 2, max_extra: int | None = None, up: bool = True) -> None:
        self.now = 0.0
        self.names: dict[Task, str] = {}
        self.page: dict[int, int] = {}
        self.dispatch = Dispatch(workers, max_extra=4 * workers if max_extra is None else max_extra, now=0.0)
        for number in range(workers, 0, -1) if up else ():
            self.up(number)

    def tasks(self, names: str, **kwargs: Any) -> list[Task]:
        """Named tasks. The seq, name and dependencies may be told as "a b<a c<a,b"."""
        made: list[Task] = []
        known = {name: task for task, name in self.names.items()}
        for word in names.split():
            name, _, deps = word.partition("<")
            task = make_task(deps=[known[d] for d in deps.split(",") if d], **kwargs)
            self.names[task] = name
            known[name] = task
            made.append(task)
        return made

    def do(self, event: ev.Event) -> str:
        said = self.dispatch.handle(event)
        self.dispatch.validate()
        return " ; ".join(self.text(instruction) for instruction in said)

    def text(self, said: ev.Instruction) -> str:
        def named(tasks: list[Task]) -> str:
            return " ".join(self.names[t] for t in tasks)

        match said:
            case ev.Assign(worker, tasks, lease):
                assert lease == self.now + LEASE_S
                for task in tasks:
                    assert (task.state, task.worker, task.sent_at) == (DISPATCHED, worker, self.now)
                return f"{worker}<-{named(tasks)}"
            case ev.Grant(worker, lease, revoked):
                assert lease == self.now + LEASE_S
                return f"grant {worker}{' without ' + ','.join(map(str, revoked)) if revoked else ''}"
            case ev.Spawn(count):
                return f"spawn {count}"
            case ev.Retire(worker):
                return f"retire {worker}"
            case ev.Slot(worker, True):
                return f"slot {worker}"
            case ev.Deadlocked(worker, task):
                return f"deadlocked {worker} {self.names[task]}"
            case ev.Started(tasks, since):
                assert len(since) == len(tasks)
                return f"started {named(tasks)}"
            case ev.Overran(worker, task):
                return f"overran {worker} {self.names[task]}"
            case ev.Lost(tasks) | ev.Cancelled(tasks) | ev.NotCancelled(tasks):
                return f"{type(said).__name__.lower()} {named(tasks)}"
        raise AssertionError(said)

    def up(self, number: int) -> str:
        self.page[number] = 0
        return self.do(ev.WorkerUp(number, self.now))

    def ready(self, tasks: list[Task]) -> str:
        return self.do(ev.Ready(tasks, self.now))

    def finish(self, worker: int, *tasks: Task, each_s: float = 1e-6, after_s: float = 0.0) -> str:
        """The worker ran these; the resolver is told after dispatch, and what became ready follows."""
        self.now += after_s
        rows = [(task.seq, task.id, 1, 0, b"", 0.0, each_s, None, None) for task in tasks]
        self.page[worker] = max(self.page.get(worker, 0), *(task.seq for task in tasks))
        said = [self.do(ev.Finished(worker, rows, self.now))]
        ready = [waiter for task in tasks for waiter in complete(task)]
        if ready:
            said.append(self.ready(ready))
        return " ; ".join(s for s in said if s)

    def start(self, worker: int, task: Task) -> None:
        self.page[worker] = task.seq

    def tick(self, after_s: float = 0.0) -> str:
        self.now += after_s
        return self.do(ev.Tick(dict(self.page), self.now))

    def measured(self, seconds: float = 1e-6) -> Bench:
        """Tasks of the usual function have been measured."""
        (task,) = self.tasks("warmup")
        said = self.ready([task])
        self.finish(int(said[0]), task, each_s=seconds)
        return self


# --------------------------------------------------------------------------------------------------------- spreading


def test_four_ready_tasks_are_two_for_each_of_two_workers() -> None:
    bench = Bench().measured()
    assert bench.ready(bench.tasks("a b c d")) == "1<-a b ; 2<-c d"


def test_an_unmeasured_function_is_never_sent_ahead() -> None:
    bench = Bench()
    a, b, c, d = bench.tasks("a b c d")
    assert bench.ready([a, b, c, d]) == "1<-a ; 2<-b"
    assert bench.finish(1, a) == "1<-c"  # measured now, but d may be for worker 2
    assert bench.finish(2, b) == "2<-d"


def test_nothing_is_sent_behind_an_unmeasured_task() -> None:
    bench = Bench(1).measured()
    (new,) = bench.tasks("new", fn=b"new")
    a, b = bench.tasks("a b")
    assert bench.ready([a, new, b]) == "1<-a"
    assert bench.finish(1, a) == "1<-new"
    assert bench.finish(1, new) == "1<-b"


@pytest.mark.parametrize("options", [EXCLUSIVE, GPU])
def test_tasks_with_walltime_or_resources_are_held_alone(options: Options) -> None:
    bench = Bench(1).measured()
    x, y = bench.tasks("x y", options=options)
    a, b, c = bench.tasks("a b c")
    assert bench.ready([a, x, y, b, c]) == "1<-a"
    assert bench.finish(1, a) == "1<-x"
    assert bench.finish(1, x) == "1<-y"
    assert bench.finish(1, y) == "1<-b c"


def test_the_look_ahead_is_bounded_by_measured_time_and_topped_up_at_half() -> None:
    bench = Bench(1).measured(0.001 - 20e-6)
    tasks = bench.tasks(" ".join(f"t{i}" for i in range(40)))
    bench.ready(tasks)
    assert [t.state for t in tasks].count(DISPATCHED) == 10
    for task in tasks[:4]:
        assert bench.finish(1, task, each_s=0.001 - 20e-6) == ""
    assert bench.finish(1, tasks[4], each_s=0.001 - 20e-6) == "1<-t10 t11 t12 t13 t14"


def test_the_queue_ends_in_shrinking_shares() -> None:
    bench = Bench(2).measured()
    tasks = bench.tasks(" ".join(f"t{i}" for i in range(1100)))
    bench.ready(tasks)
    held = {w: [t for t in tasks if t.worker == w] for w in (1, 2)}
    queued = sum(t.state == READY for t in tasks)
    assert len(held[1]) == len(held[2])
    assert 50 < queued < 200
    bench.finish(1, *held[1][:300])
    assert sum(t.state == READY for t in tasks) == queued // 2  # not all of it: worker 2 will be there soon


def test_idle_workers_get_work_before_busy_ones() -> None:
    bench = Bench().measured()
    a, b, c = bench.tasks("a b c")
    assert bench.ready([a]) == "1<-a"
    assert bench.ready([b]) == "2<-b"
    assert bench.ready([c]) == "1<-c"


def test_a_worker_that_is_deep_in_a_task_is_not_topped_up() -> None:
    bench = Bench().measured()
    a, b, c, d = bench.tasks("a b c d")
    bench.ready([a, b])
    bench.finish(2, b)
    bench.start(1, a)
    bench.now += LEASE_S + 0.001
    assert bench.ready([c, d]) == "2<-c d"


def test_the_measured_time_recovers_from_a_slow_first_call() -> None:
    bench = Bench(1)
    tasks = bench.tasks(" ".join(f"t{i}" for i in range(600)))
    bench.ready(tasks)
    bench.finish(1, tasks[0], each_s=0.5)
    runs = 1
    while sum(t.state == DISPATCHED for t in tasks) < 50:
        bench.finish(1, *[t for t in tasks if t.worker == 1])
        runs += 1
    assert runs < 45


def test_measured_functions_are_forgotten_in_the_end() -> None:
    bench = Bench(1)
    for i in range(FUNCTIONS_MAX + 10):
        (task,) = bench.tasks("t", fn=b"%d" % i)
        bench.dispatch.handle(ev.Ready([task], 0.0))
        bench.dispatch.handle(ev.Finished(1, [(task.seq, 0, 0, 0, 0, 0, 1e-6)], 0.0))
    bench.dispatch.validate()
    assert bench.dispatch.describe({}, 0.0)["functions_measured"] <= FUNCTIONS_MAX


# ------------------------------------------------------------------------------------------------------- chain-ahead


def test_a_chain_is_sent_ahead_to_one_worker() -> None:
    bench = Bench().measured()
    a, *_ = bench.tasks("a b<a c<b d<c")
    assert bench.ready([a]) == "1<-a b c d"


def test_an_unmeasured_chain_waits_for_its_first_link() -> None:
    bench = Bench()
    a, *_ = bench.tasks("a b<a c<b")
    assert bench.ready([a]) == "1<-a"
    assert bench.finish(1, a) == "1<-b c"


def test_a_join_follows_only_where_all_it_misses_is_held() -> None:
    bench = Bench(1).measured()
    a, b, *_ = bench.tasks("a b join<a,b")
    assert bench.ready([a, b]) == "1<-a b join"
    bench = Bench(2).measured()
    a, b, *_ = bench.tasks("a b join<a,b")
    assert bench.ready([a, b]) == "1<-a ; 2<-b"
    assert bench.finish(1, a) == ""
    assert bench.finish(2, b) == "2<-join"


def test_a_wide_fan_out_belongs_to_all_workers() -> None:
    bench = Bench().measured(0.001)
    root, *_ = bench.tasks("root a<root b<root c<root d<root")
    assert bench.ready([root]) == "1<-root a"  # one link ahead, so that worker 1 does not wait
    assert bench.finish(1, root, each_s=0.001) == "2<-b c ; 1<-d"  # level


def test_a_fan_out_shorter_than_a_round_trip_stays_together() -> None:
    bench = Bench().measured()
    root, *_ = bench.tasks("root a<root b<root")
    assert bench.ready([root]) == "1<-root a b"


def test_ready_tasks_go_before_chains() -> None:
    bench = Bench(1).measured(0.0049)
    a, _, x, y = bench.tasks("a b<a x y")
    assert bench.ready([a, x, y]) == "1<-a x y"
    assert bench.finish(1, a, each_s=0.0049) == ""
    assert bench.finish(1, x, each_s=0.0049) == "1<-b"


def test_a_link_that_is_submitted_later_still_follows() -> None:
    bench = Bench(1).measured()
    a, _ = bench.tasks("a b<a")
    assert bench.ready([a]) == "1<-a b"
    bench.tasks("c<b d<c")
    assert bench.finish(1, a) == "1<-c d"


def test_a_task_given_back_is_not_sent_ahead_again() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b<a")
    bench.ready([a])
    assert bench.do(ev.GaveBack(1, [b.seq], bench.now)) == ""  # a's result is stored, says the worker
    assert (b.state, b.worker) == (WAITING, None)
    assert bench.finish(1, a) == "1<-b"


def test_a_task_given_back_is_passed_over_when_room_comes_for_its_siblings() -> None:
    bench = Bench(1).measured(0.004)
    x, a, b, *_ = bench.tasks("x a b<a c<a")
    assert bench.ready([x, a]) == "1<-x a b"
    bench.do(ev.GaveBack(1, [b.seq], bench.now))
    assert bench.finish(1, x, each_s=0.004) == "1<-c"


def test_a_chain_longer_than_the_look_ahead_goes_on_as_it_runs() -> None:
    bench = Bench(1).measured()
    chain = bench.tasks("t0")
    for i in range(1, 2000):
        chain += bench.tasks(f"t{i}<t{i - 1}") if i < 3 else [make_task(deps=[chain[-1]])]
        bench.names[chain[-1]] = f"t{i}"
    bench.ready([chain[0]])
    sent = [t for t in chain if t.state == DISPATCHED]
    assert 300 < len(sent) < 600
    bench.finish(1, *sent[: len(sent) // 2 + 2])
    assert sum(t.state == DISPATCHED for t in chain) > len(sent) * 0.9


# ------------------------------------------------------------------------------------------------ leases and stealing


def held_behind_a_long_one(bench: Bench) -> list[Task]:
    """Worker 1 runs `long` and holds a b c d behind it; worker 2 is idle."""
    tasks = bench.tasks("long a b c d")
    other = bench.tasks("o1 o2 o3 o4 o5")
    assert bench.ready(tasks + other) == "1<-long a b c d ; 2<-o1 o2 o3 o4 o5"
    bench.start(1, tasks[0])
    bench.finish(2, *other)
    return tasks


def test_an_idle_worker_takes_half_of_what_a_busy_one_may_not_start() -> None:
    bench = Bench().measured()
    assert bench.dispatch.deadline is None
    long, a, b, c, d = held_behind_a_long_one(bench)
    assert bench.dispatch.deadline == pytest.approx(AFTER_LEASE_S)
    assert bench.tick(AFTER_LEASE_S) == "2<-c d"
    assert bench.finish(2, c, d) == "2<-b"
    assert bench.finish(2, b) == "2<-a"
    assert bench.dispatch.deadline == pytest.approx(STARTED_AFTER_S)  # nothing more to take
    # It asks, hears what it lost, and gets work again.
    assert bench.do(ev.Asked(1, 3, bench.now)) == "grant 1 without 5,6,4,3"
    assert bench.finish(2, a) == ""
    assert bench.finish(1, long) == ""


def test_what_was_started_is_not_taken() -> None:
    bench = Bench().measured()
    _, a, b, c, _ = held_behind_a_long_one(bench)
    bench.start(1, c)
    assert bench.tick(AFTER_LEASE_S) == "2<-d"
    assert (a.worker, b.worker, c.worker) == (1, 1, 1)


def test_a_lease_that_is_on_protects() -> None:
    bench = Bench().measured()
    held_behind_a_long_one(bench)
    assert bench.tick(LEASE_S) == ""


def test_stealing_takes_a_chain_whole_or_not_at_all() -> None:
    bench = Bench().measured()
    long, a, b, c, d = bench.tasks("long a b<a c<b after<long")
    (o,) = bench.tasks("o", fn=b"other")
    bench.ready([o])
    assert bench.ready([long, a]) == "2<-long a after b c"
    bench.start(2, long)
    bench.finish(1, o)
    assert bench.tick(AFTER_LEASE_S) == "1<-a b c"
    assert d.worker == 2
    assert bench.do(ev.Asked(2, d.seq, bench.now)) == "grant 2 without 2,4,5"
    assert (b.state, c.state) == (DISPATCHED, DISPATCHED)


def test_a_worker_hears_of_its_losses_before_it_gets_more() -> None:
    bench = Bench().measured()
    long, a, b, _, _ = held_behind_a_long_one(bench)
    bench.tick(AFTER_LEASE_S)
    bench.finish(1, long)
    assert bench.ready(bench.tasks("e f")) == "2<-e f"  # though worker 1 has little to do
    assert bench.do(ev.Asked(1, a.seq, bench.now)) == "grant 1 without 5,6"
    assert bench.finish(1, a, b) == ""
    assert bench.ready(bench.tasks("g")) == "1<-g"


def test_one_who_asks_shares_with_the_idle() -> None:
    bench = Bench().measured()
    long, a, b, c, d = held_behind_a_long_one(bench)
    bench.now += 0.5
    bench.finish(1, long)
    assert bench.do(ev.Asked(1, a.seq, bench.now)) == "grant 1 without 5,6 ; 2<-c d"
    assert (a.worker, b.worker, c.worker, d.worker) == (1, 1, 2, 2)


def test_a_frozen_worker_does_not_get_its_task_back() -> None:
    bench = Bench().measured()
    (a,) = bench.tasks("a")
    assert bench.ready([a]) == "1<-a"
    assert bench.tick(AFTER_LEASE_S) == "2<-a"  # it has not started it
    b = bench.tasks("b c")
    assert bench.ready(b) == "2<-b c"  # it has to say something first
    assert bench.do(ev.Asked(1, 2, bench.now)) == "grant 1 without 2"
    assert bench.ready(bench.tasks("d")) == "1<-d"


# --------------------------------------------------------------------------------------------------------- deadlines


def test_idle_costs_nothing() -> None:
    bench = Bench()
    assert bench.dispatch.deadline is None
    tasks = bench.tasks("a b")
    bench.ready(tasks)
    bench.finish(2, tasks[0])
    bench.finish(1, tasks[1])
    assert bench.dispatch.deadline is None


def test_a_long_task_is_told_once_and_then_needs_no_clock() -> None:
    bench = Bench()
    (a,) = bench.tasks("a")
    bench.ready([a])
    bench.start(1, a)
    while (due := bench.dispatch.deadline) is not None and due <= AFTER_LEASE_S:
        assert bench.tick(due - bench.now) == ""
    assert bench.dispatch.deadline == pytest.approx(STARTED_AFTER_S)
    assert bench.tick(STARTED_AFTER_S - bench.now) == "started a"
    assert bench.dispatch.deadline is None
    assert bench.dispatch.is_running(a) is True


def test_a_long_task_is_told_once_though_its_worker_speaks() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    bench.start(1, b)
    assert bench.tick(STARTED_AFTER_S) == "started b"
    assert bench.finish(1, a) == ""  # late
    bench.start(1, b)
    assert bench.tick(STARTED_AFTER_S) == ""
    assert bench.dispatch.deadline is None


def test_walltime_is_told_once() -> None:
    bench = Bench()
    (a,) = bench.tasks("a", options=EXCLUSIVE)
    bench.ready([a])
    bench.start(1, a)
    assert bench.tick(1.0) == "started a"
    assert bench.dispatch.deadline == pytest.approx(5.0)
    assert bench.tick(4.0) == "overran 1 a"
    assert bench.dispatch.deadline is None
    complete(a, FAILED)  # the resolver ends it, the shell kills the worker
    assert bench.do(ev.WorkerDown(1, a.seq, bench.now)) == "spawn 1"


# ----------------------------------------------------------------------------------------------------- workers that go


def test_a_dead_worker_loses_what_it_ran_and_the_rest_goes_to_the_front_in_order() -> None:
    bench = Bench(1).measured(0.001)
    first, after, a, *_ = bench.tasks("first after<first a b c d e f g h i j k")
    rest = [t for t in bench.names if t not in (first, after) and bench.names[t] != "warmup"]
    bench.ready([first, *rest])
    bench.start(1, a)
    first_done = bench.finish(1, first, each_s=0.001)
    assert first_done == ""
    assert after.state == READY
    assert bench.do(ev.WorkerDown(1, a.seq, bench.now)) == "lost a ; spawn 1"
    assert a.state == WAITING
    assert bench.up(2) == "2<-b c d e f g h i j k"


def test_dependents_of_a_lost_task_wait_again() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b<a")
    bench.ready([a])
    assert bench.do(ev.WorkerDown(1, a.seq, bench.now)) == "lost a ; spawn 1"
    assert (b.state, b.worker) == (WAITING, None)
    bench.up(2)
    a.attempt += 1
    assert bench.ready([a]) == "2<-a b"


def test_an_unstarted_task_of_a_dead_worker_uses_no_attempt() -> None:
    bench = Bench(2)
    (a,) = bench.tasks("a")
    assert bench.ready([a]) == "1<-a"
    assert bench.do(ev.WorkerDown(1, 0, bench.now)) == "spawn 1 ; 2<-a"


def test_a_worker_that_never_comes_up_is_started_again() -> None:
    bench = Bench(1, up=False)
    assert bench.do(ev.WorkerDown(1, 0, 0.0)) == "spawn 1"
    assert bench.up(1) == ""  # its first word, after its death
    assert not bench.dispatch.is_up(1)
    assert bench.up(2) == ""
    assert bench.dispatch.is_up(2)


def test_what_a_dead_worker_had_said_changes_nothing() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    bench.do(ev.WorkerDown(1, a.seq, bench.now))
    before = snapshot(bench.dispatch)
    late: list[ev.Event] = [
        ev.WorkerUp(1, bench.now), ev.Finished(1, [(3, b.id, 1, 0, b"", 0.0, 1.0)], bench.now), ev.GaveBack(1, [3], bench.now),
        ev.Asked(1, 3, bench.now), ev.Blocked(1, a, bench.now), ev.Resume(1, a, bench.now),
    ]  # fmt: skip
    for event in late:
        assert bench.dispatch.handle(event) == []
    after = snapshot(bench.dispatch)
    assert after[0] == before[0]
    assert after[2:] == before[2:]
    with pytest.raises(IllegalEventError, match="worker 1 is dead"):
        bench.do(ev.WorkerDown(1, 0, bench.now))


# --------------------------------------------------------------------------------------------------------- lent slots


def test_a_blocked_task_lends_its_slot_and_takes_one_again() -> None:
    bench = Bench(1)
    outer, inner, more = *bench.tasks("outer", fn=b"outer"), *bench.tasks("inner more")
    bench.ready([outer])
    assert bench.do(ev.Blocked(1, outer, bench.now)) == ""
    assert bench.ready([inner, more]) == "spawn 1"
    assert bench.up(2) == "2<-inner"
    assert bench.do(ev.Resume(1, outer, bench.now)) == ""  # the slot is taken
    assert bench.finish(2, inner) == "slot 1"  # it goes before what is queued
    assert bench.finish(1, outer) == "1<-more"
    assert bench.dispatch.deadline == pytest.approx(STARTED_AFTER_S)
    bench.finish(1, more)
    assert bench.dispatch.deadline == pytest.approx(SPARE_S)
    assert bench.tick(SPARE_S) == "retire 2"
    assert bench.do(ev.WorkerDown(2, 1, bench.now)) == ""
    assert bench.dispatch.deadline is None


def test_what_a_blocked_worker_holds_comes_back() -> None:
    bench = Bench(1).measured()
    a, b, c = bench.tasks("a b c")
    bench.ready([a, b, c])
    assert bench.do(ev.Blocked(1, a, bench.now)) == ""
    assert bench.do(ev.GaveBack(1, [b.seq, c.seq], bench.now)) == "spawn 1"
    assert bench.up(2) == "2<-b c"


def test_what_was_on_its_way_to_a_blocked_worker_comes_back_after_the_lease() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    bench.start(1, a)
    bench.do(ev.Blocked(1, a, bench.now))  # it had not seen b yet
    assert bench.dispatch.deadline == pytest.approx(AFTER_LEASE_S)
    assert bench.tick(AFTER_LEASE_S) == "spawn 1"
    assert b.state == READY


def test_a_worker_asks_while_more_are_starting_than_there_are_slots() -> None:
    """They were called for when slots were lent; the tasks that they were for are cancelled, and the lender is back."""
    bench = Bench()
    a, b, c, d, e = bench.tasks("a b c d e")
    assert bench.ready([a, b, c, d]) == "1<-a ; 2<-b"
    bench.start(1, a)
    bench.start(2, b)
    assert [bench.do(ev.Blocked(1, a, 0.0)), bench.do(ev.Blocked(2, b, 0.0))] == ["spawn 1"] * 2
    assert bench.do(ev.Cancel([c, d], 0.0)) == "cancelled c d"
    assert bench.do(ev.Resume(1, a, 0.0)) == "slot 1"
    assert bench.finish(1, a) == ""
    assert bench.ready([e]) == "1<-e"
    assert bench.do(ev.Asked(1, e.seq, 0.0)) == "grant 1"


def test_resumes_are_served_in_order() -> None:
    bench = Bench(1)
    a, b, c = bench.tasks("a b c")
    bench.ready([a])
    bench.do(ev.Blocked(1, a, 0.0))
    bench.ready([b])
    bench.up(2)
    bench.do(ev.Blocked(2, b, 0.0))
    bench.ready([c])
    bench.up(3)
    bench.do(ev.Resume(2, b, 0.0))
    bench.do(ev.Resume(1, a, 0.0))
    assert bench.finish(3, c) == "slot 2"
    assert bench.finish(2, b) == "slot 1"


def test_who_resumes_does_not_wait_for_the_queue() -> None:
    bench = Bench(1).measured(0.001)
    (outer,) = bench.tasks("outer", fn=b"outer")
    bench.ready([outer])
    bench.do(ev.Blocked(1, outer, 0.0))
    many = bench.tasks(" ".join(f"t{i}" for i in range(40)))
    bench.ready(many)
    bench.up(2)
    held = [t for t in many if t.worker == 2]
    bench.do(ev.Resume(1, outer, 0.0))
    assert bench.finish(2, *held[:-1], each_s=0.001) == ""  # not topped up
    assert bench.finish(2, held[-1], each_s=0.001) == "slot 1"


def test_an_idle_worker_takes_over_without_a_new_process() -> None:
    bench = Bench(2)
    a, b = bench.tasks("a b")
    bench.ready([a])
    bench.do(ev.Blocked(1, a, 0.0))
    assert bench.ready([b]) == "2<-b"


def test_too_many_blocked_tasks_are_a_deadlock() -> None:
    bench = Bench(1, max_extra=2)
    a, b, c = bench.tasks("a b c")
    bench.ready([a])
    for number, task, then in ((1, a, b), (2, b, c)):
        assert bench.do(ev.Blocked(number, task, 0.0)) == ""
        assert bench.ready([then]) == "spawn 1"
        bench.up(number + 1)
    assert bench.do(ev.Blocked(3, c, 0.0)) == "deadlocked 3 c"
    assert bench.do(ev.Resume(3, c, 0.0)) == ""  # it was on its way; the error is its answer
    assert bench.finish(3, c) == ""
    with pytest.raises(IllegalEventError):
        bench.do(ev.Resume(3, c, 0.0))


def test_a_slot_with_resources_is_not_lent() -> None:
    bench = Bench(2)
    a, b, c = *bench.tasks("a", options=GPU), *bench.tasks("b c")
    bench.ready([a])
    assert bench.do(ev.Blocked(1, a, 0.0)) == ""
    assert bench.ready([b, c]) == "2<-b"  # no third process
    assert bench.do(ev.Resume(1, a, 0.0)) == "slot 1"
    bench = Bench(1)
    (a,) = bench.tasks("a", options=GPU)
    bench.ready([a])
    assert bench.do(ev.Blocked(1, a, 0.0)) == "deadlocked 1 a"


def test_a_task_held_behind_a_long_one_gets_the_lent_slot() -> None:
    bench = Bench(2).measured()
    waits, long, x, y = bench.tasks("waits long x y")
    bench.ready([waits])
    bench.now += 0.5
    assert bench.ready([long, x, y]) == "2<-long x y"
    bench.start(2, long)
    bench.do(ev.Blocked(1, waits, bench.now))
    assert bench.tick() == "started waits"
    assert bench.dispatch.deadline == pytest.approx(bench.now + AFTER_LEASE_S)
    assert bench.tick(AFTER_LEASE_S) == "spawn 1"
    assert bench.up(3) == "3<-y"
    assert bench.finish(3, y) == "3<-x"


# ------------------------------------------------------------------------------------------------ cancel and withdraw


def test_cancel_of_tasks_that_wait_or_queue_is_certain_at_once() -> None:
    bench = Bench(1)
    run, queued, other, dep = bench.tasks("run queued other dep<run")
    bench.ready([run, queued, other])
    assert bench.do(ev.Cancel([queued, dep], 0.0)) == "cancelled queued dep"
    complete(queued, CANCELLED)
    complete(dep, CANCELLED)
    assert bench.finish(1, run) == "1<-other"


def test_cancel_of_a_held_task_is_decided_when_the_lease_is_over() -> None:
    bench = Bench(1).measured()
    a, b, c, d = bench.tasks("a b c d<b")
    assert bench.ready([a, b, c]) == "1<-a b c d"
    bench.start(1, a)
    assert bench.dispatch.is_running(b) is None
    assert bench.do(ev.Cancel([a, b], bench.now)) == ""
    assert bench.do(ev.Cancel([a, b], bench.now)) == ""
    assert bench.dispatch.deadline == pytest.approx(AFTER_LEASE_S)
    assert bench.tick(AFTER_LEASE_S) == "cancelled b ; notcancelled a"
    assert d.state == WAITING  # it had followed b
    assert bench.dispatch.is_running(a) is True
    assert bench.dispatch.is_running(c) is False
    assert bench.do(ev.Cancel([c], bench.now)) == "cancelled c"  # certain now
    assert bench.do(ev.Asked(1, 3, bench.now)) == "grant 1 without 3,5,4"


def test_the_lease_is_not_extended_while_a_cancel_is_pending() -> None:
    bench = Bench(1).measured()
    a, b, *_ = bench.tasks("a b")
    bench.ready([a, b])
    bench.do(ev.Cancel([b], bench.now))
    bench.finish(1, a)
    assert bench.ready(bench.tasks("c")) == ""
    assert bench.tick(AFTER_LEASE_S) == "cancelled b"
    assert bench.do(ev.Asked(1, 3, bench.now)) == "grant 1 without 3 ; 1<-c"


def test_an_ask_decides_cancels() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    bench.do(ev.Cancel([a, b], bench.now))
    assert bench.do(ev.Asked(1, b.seq, bench.now)) == "cancelled b ; notcancelled a ; grant 1 without 3"


def test_a_cancelled_task_that_finished_first_is_told_so() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    bench.do(ev.Cancel([a], bench.now))
    assert bench.finish(1, a) == "notcancelled a"
    assert bench.do(ev.Cancel([a], bench.now)) == "notcancelled a"


def test_a_cancelled_task_that_comes_back_will_not_run() -> None:
    bench = Bench(1).measured()
    a, b, c = bench.tasks("a b c<b")
    bench.ready([a, b])
    bench.do(ev.Blocked(1, a, bench.now))
    bench.do(ev.Cancel([b], bench.now))
    assert bench.do(ev.GaveBack(1, [b.seq, c.seq], bench.now)) == "cancelled b"
    assert (b.state, c.state) == (WAITING, WAITING)


def test_death_decides_cancels() -> None:
    bench = Bench(1).measured()
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    bench.do(ev.Cancel([a, b], bench.now))
    assert bench.do(ev.WorkerDown(1, a.seq, bench.now)) == "cancelled b ; notcancelled a ; lost a ; spawn 1"


def test_withdrawn_tasks_are_dropped_from_the_queue_and_revoked() -> None:
    bench = Bench(1).measured()
    a, b, c = bench.tasks("a b<a c<b")
    unmeasured = bench.tasks("u v w", fn=b"new")
    bench.ready([a])
    bench.ready(unmeasured)
    for task in (b, c, unmeasured[1]):
        complete(task, FAILED)
    assert bench.do(ev.Withdraw([b, c, unmeasured[1]], bench.now)) == ""
    assert bench.do(ev.Asked(1, 2, bench.now)) == "grant 1 without 3,4"
    assert bench.finish(1, a) == "1<-u"
    assert bench.do(ev.GaveBack(1, [3, 4], bench.now)) == ""
    assert bench.finish(1, unmeasured[0]) == "1<-w"


def test_a_worker_is_idle_whose_only_task_could_not_be_sent() -> None:
    bench = Bench(1)
    a, b = bench.tasks("a b")
    assert bench.ready([a]) == "1<-a"
    complete(a, FAILED)
    assert bench.do(ev.Withdraw([a], bench.now)) == ""  # it never saw it, and so will never say a word
    assert bench.ready([b]) == "1<-b"


def test_a_worker_is_busy_that_runs_what_was_withdrawn() -> None:
    bench = Bench(2)
    a, b, c = bench.tasks("a b c")
    assert bench.ready([a]) == "1<-a"
    bench.start(1, a)
    bench.tick()
    complete(a, FAILED)
    bench.do(ev.Withdraw([a], bench.now))
    assert bench.ready([b, c]) == "2<-b"
    assert bench.do(ev.Finished(1, [(a.seq, a.id, 1, 0, b"", 0.0, 1.0)], bench.now)) == "1<-c"


def test_a_withdrawn_task_can_be_made_ready_again() -> None:
    bench = Bench(1)
    a, b, c, d = bench.tasks("a b c d")
    bench.ready([a, b, c, d])
    bench.do(ev.Withdraw([b], 0.0))
    assert b.state == WAITING
    bench.ready([b])
    bench.do(ev.Withdraw([c], 0.0))
    order = [bench.finish(1, a), bench.finish(1, b) if b.worker else bench.finish(1, d)]
    assert all("c" not in said for said in order)


# --------------------------------------------------------------------------------------------------- adopted workers


def test_adopted_workers_count_and_the_missing_are_started() -> None:
    bench = Bench(3, up=False)
    (a,) = bench.tasks("a")
    assert bench.do(ev.Adopted([(7, a, 40, False), (8, None, 0, False)], bench.now)) == "spawn 1"
    assert (a.state, a.worker, a.seq) == (DISPATCHED, 7, 40)
    assert bench.dispatch.is_running(a)
    assert bench.dispatch.is_up(8)


def test_without_remains_all_processes_are_asked_for() -> None:
    assert Bench(3, up=False).do(ev.Adopted([], 0.0)) == "spawn 3"


def test_an_adopted_worker_gets_nothing_before_it_has_rejoined() -> None:
    bench = Bench(2, up=False)
    a, b, c, d = bench.tasks("a b c d")
    assert bench.do(ev.Adopted([(1, a, 5, False), (2, None, 0, False)], bench.now)) == ""
    assert bench.ready([b, c]) == ""
    assert bench.finish(1, a, each_s=1.0) == "", "it has ended its task, but may not know us yet"
    assert bench.do(ev.Rejoined(2, 0, 9, False, bench.now)) == "2<-b"
    assert b.seq == 10, "no number of before is used again"
    assert bench.do(ev.Rejoined(1, 0, 5, False, bench.now)) == "1<-c"
    assert bench.finish(1, c, each_s=1.0) == ""
    assert bench.ready([d]) == "1<-d"


def test_a_running_task_goes_on_and_its_worker_takes_more_afterwards() -> None:
    bench = Bench(1, up=False)
    a, b = bench.tasks("a b")
    bench.do(ev.Adopted([(1, a, 5, False)], bench.now))
    assert bench.ready([b]) == ""
    assert bench.do(ev.Rejoined(1, 5, 5, False, bench.now)) == ""
    assert bench.finish(1, a) == "1<-b"


def test_what_an_adopted_worker_does_not_run_after_all_is_queued_first() -> None:
    """It had been about to start it, and asked: no attempt is lost."""
    bench = Bench(1, up=False)
    a, b = bench.tasks("a b")
    bench.do(ev.Adopted([(1, a, 5, False)], bench.now))
    bench.ready([b])
    assert bench.do(ev.Rejoined(1, 0, 5, False, bench.now)) == "1<-a"
    assert a.seq == 6


def test_a_lent_slot_stays_lent() -> None:
    bench = Bench(1, up=False)
    a, b = bench.tasks("a b")
    assert bench.do(ev.Adopted([(1, a, 5, True)], bench.now)) == ""
    assert bench.ready([b]) == "spawn 1"
    assert bench.up(2) == "2<-b"
    assert bench.do(ev.Rejoined(1, 5, 5, True, bench.now)) == ""
    assert bench.do(ev.Resume(1, a, bench.now)) == ""
    assert bench.finish(2, b) == "slot 1"


@pytest.mark.parametrize("lent_before", [False, True])
def test_the_word_of_the_worker_counts_when_its_page_said_otherwise(lent_before: bool) -> None:
    bench = Bench(1, up=False)
    a, b = bench.tasks("a b")
    bench.do(ev.Adopted([(1, a, 5, lent_before)], bench.now))
    told = bench.do(ev.Rejoined(1, 5, 5, not lent_before, bench.now))
    assert told == ""
    assert bench.ready([b]) == ("" if lent_before else "spawn 1")


def test_an_adopted_worker_that_runs_what_nobody_wants_is_busy() -> None:
    """Its task was cancelled while it ran, or ended by its walltime; the kill has not come."""
    bench = Bench(1, up=False)
    (b,) = bench.tasks("b")
    bench.do(ev.Adopted([(1, None, 0, False)], bench.now))
    bench.ready([b])
    assert bench.do(ev.Rejoined(1, 5, 5, False, bench.now)) == ""
    rows = [(5, b"?" * 16, 1, 0, b"", 0.0, 1.0, None, None)]
    assert bench.do(ev.Finished(1, rows, bench.now)) == "1<-b"


def test_an_adopted_worker_that_dies_loses_its_task_and_is_replaced() -> None:
    bench = Bench(2, up=False)
    (a,) = bench.tasks("a")
    bench.do(ev.Adopted([(1, a, 5, False), (2, None, 0, False)], bench.now))
    assert bench.do(ev.WorkerDown(1, 5, bench.now)) == "lost a ; spawn 1"
    assert bench.do(ev.WorkerDown(2, 0, bench.now)) == "spawn 1"
    assert bench.do(ev.Rejoined(1, 5, 5, False, bench.now)) == "", "said before its end"


def test_the_walltime_of_an_adopted_task_begins_anew() -> None:
    bench = Bench(1, up=False)
    (a,) = bench.tasks("a", options=Options(walltime_s=2.0))
    bench.now = 100.0
    bench.do(ev.Adopted([(1, a, 5, False)], bench.now))
    bench.start(1, a)
    assert bench.tick(1.9) == "started a"
    assert bench.tick(0.2) == "overran 1 a"


def test_more_may_have_lived_than_there_are_slots_now() -> None:
    bench = Bench(1, max_extra=0, up=False)
    a, b, c = bench.tasks("a b c")
    assert bench.do(ev.Adopted([(1, a, 5, False), (2, b, 5, False)], bench.now)) == ""
    bench.do(ev.Rejoined(1, 5, 5, False, bench.now))
    bench.do(ev.Rejoined(2, 5, 5, False, bench.now))
    bench.ready([c])
    assert bench.finish(1, a) == ""
    assert bench.finish(2, b).endswith("<-c")
    assert bench.tick(5.0).startswith("retire") or bench.finish(2, c) == ""


@pytest.mark.parametrize("what", ["twice", "a worker before", "queued", "rejoined twice"])
def test_adoption_comes_once_and_first(what: str) -> None:
    bench = Bench(2, up=False)
    (a,) = bench.tasks("a")
    event: ev.Event = ev.Adopted([(1, a, 5, False)], 0.0)
    if what == "twice":
        event = ev.Adopted([(1, None, 0, False), (1, a, 5, False)], 0.0)
    elif what == "a worker before":
        bench.up(1)
    elif what == "queued":
        bench.ready([a])
    else:
        bench.do(event)
        event = ev.Rejoined(1, 5, 5, False, 0.0)
        bench.do(event)
    before = snapshot(bench.dispatch)
    with pytest.raises(IllegalEventError):
        bench.do(event)
    assert snapshot(bench.dispatch) == before


# ---------------------------------------------------------------------------------------------------------- legality


def test_an_illegal_event_tells_the_story_and_changes_nothing() -> None:
    bench = Bench(1)
    a, b = bench.tasks("a b")
    bench.ready([a, b])
    before = snapshot(bench.dispatch)
    with pytest.raises(IllegalEventError) as caught:
        bench.do(ev.Ready([b], 0.0))
    assert "Ready is illegal" in str(caught.value)
    assert b.id.hex() in str(caught.value)
    assert "0.000000 Ready" in str(caught.value)
    with pytest.raises(IllegalEventError, match="worker 7 is absent"):
        bench.do(ev.Finished(7, [], 0.0))
    with pytest.raises(IllegalEventError, match="worker 1 is up"):
        bench.do(ev.Resume(1, a, 0.0))
    with pytest.raises(IllegalEventError, match="twice"):
        bench.do(ev.Ready([*bench.tasks("x")] * 2, 0.0))
    with pytest.raises(IllegalEventError):
        bench.do(ev.Ready([make_task(deps=[a])], 0.0))
    assert snapshot(bench.dispatch) == before


def test_the_table_names_every_worker_event() -> None:
    task_events = {ev.Ready, ev.Withdraw, ev.Cancel, ev.Tick, ev.Adopted}
    assert set(TRANSITIONS) | task_events == set(get_args(ev.Event))


def snapshot(dispatch: Dispatch) -> Any:
    """All of a dispatch's state, comparable."""
    workers = {
        number: {name: copy_of(getattr(worker, name)) for name in type(worker).__slots__}
        for number, worker in dispatch._workers.items()
    }
    skip = {"_workers", "_idle", "_handlers", "_out", "_now", "_resuming"}
    rest = {name: copy_of(value) for name, value in vars(dispatch).items() if name not in skip}
    known = [*dispatch._queue, *(t for w in dispatch._workers.values() for t in w.held.values())]
    tasks = {t: (t.state, t.seq, t.worker) for t in known}
    return workers, rest, tasks, list(dispatch._idle), [w.number for w in dispatch._resuming]


def copy_of(value: Any) -> Any:
    if isinstance(value, (list, dict, set)):
        return value.copy()
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, (bytes, str)) else value


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_event_in_any_state(data: st.DataObject) -> None:
    """Whatever comes, in whatever order: the rules hold after it, or it is refused and nothing has changed."""
    dispatch = Dispatch(2, max_extra=3, now=0.0)
    tasks: list[Task] = []
    for i in range(12):
        deps = data.draw(st.lists(st.sampled_from(tasks), unique=True, max_size=2)) if tasks else []
        options = data.draw(st.sampled_from([Options(), EXCLUSIVE, GPU] + [Options()] * 4))
        tasks.append(make_task(b"fgh"[i % 3 : i % 3 + 1], deps, options))
    now = 0.0
    numbers = st.integers(1, 5)
    some = st.lists(st.sampled_from(tasks), max_size=4)
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.0, 0.0001, 0.005, AFTER_LEASE_S, 0.06, 1.5, 6.0]))
        worker = data.draw(numbers)
        kind = data.draw(
            st.sampled_from([*TRANSITIONS, ev.Ready, ev.Ready, ev.Withdraw, ev.Cancel, ev.Tick, ev.Adopted])
        )
        event: Any
        known = dispatch._workers.get(worker)
        seqs = list(known.held) if known is not None else []
        chosen = data.draw(st.lists(st.sampled_from(seqs), unique=True)) if seqs else [99]
        chosen.sort()
        if kind in (ev.Ready, ev.Withdraw, ev.Cancel):
            event = kind(data.draw(some), now)
        elif kind is ev.WorkerUp:
            event = ev.WorkerUp(worker, now)
        elif kind is ev.Finished:
            duration = data.draw(st.sampled_from([0.0, 1e-6, 0.003, 0.2]))
            event = ev.Finished(worker, [(seq, b"", 1, 0, b"", 0.0, duration) for seq in chosen], now)
        elif kind is ev.GaveBack:
            event = ev.GaveBack(worker, chosen, now)
        elif kind is ev.Adopted:
            runnable = [task for task in tasks if not task.missing]
            left = data.draw(st.lists(st.tuples(numbers, st.sampled_from([None, *runnable]), st.booleans())))
            event = ev.Adopted([(n, task, 50 + n, task is not None and lent) for n, task, lent in left], now)
        elif kind is ev.Rejoined:
            running = data.draw(st.sampled_from([0, 7, *seqs]))
            event = ev.Rejoined(worker, running, max([9, *seqs]), data.draw(st.booleans()), now)
        elif kind in (ev.Blocked, ev.Resume):
            task = (
                data.draw(st.sampled_from(tasks))
                if known is None or not known.held
                else next(iter(known.held.values()))
            )
            event = kind(worker, task, now)
        elif kind is ev.Tick:
            event = ev.Tick(
                {n: data.draw(st.sampled_from([0, *w.held])) for n, w in dispatch._workers.items()}, now
            )
        else:
            event = kind(worker, data.draw(st.sampled_from([0, *seqs])), now)
        if (
            kind is ev.WorkerUp
            and len(dispatch._workers) + dispatch._starting >= 5
            and dispatch._starting <= len(dispatch._awaited)
        ):
            continue  # the shell starts no more processes than it was told to
        before = snapshot(dispatch)
        held = dict(known.held) if known is not None else {}
        try:
            said = dispatch.handle(event)
        except IllegalEventError:
            assert snapshot(dispatch) == before
            continue
        for instruction in said:
            if isinstance(instruction, (ev.Assign, ev.Grant)):
                assert instruction.lease_until >= now
        if kind is ev.Finished:
            for seq in chosen:
                if seq in held and held[seq].state == DISPATCHED and held[seq].worker is None:
                    complete(held[seq])
        dispatch.validate()
        due = dispatch.deadline
        assert due is None or dispatch._workers
        dispatch.describe({}, now)


# ------------------------------------------------------------------------------------------------------ the twin


def may_read(worker: FakeWorker) -> bool:
    """Whether it looks at its messages: not in a task, unless that has asked something."""
    return (
        bool(worker.inbox)
        and not worker.active
        and not worker.exited
        and (not worker.lent or worker.wants_slot)
    )


class Twin(RuleBasedStateMachine):
    """Dispatch beside workers that obey the rules in the plainest way, messages delayed at will."""

    SLOTS = 2

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0
        self.dispatch = Dispatch(self.SLOTS, max_extra=4, now=self.now)
        self.workers: dict[int, FakeWorker] = {}
        self.to_spawn = self.SLOTS
        self.next_number = 1
        self.tasks: list[Task] = []
        self.by_id: dict[bytes, Task] = {}
        self.runs: dict[Task, int] = {}
        self.lost: dict[Task, int] = {}
        self.answers: dict[Task, bool] = {}
        self.asked: set[Task] = set()
        self.withdrawn: set[Task] = set()
        self.epoch = 0

    def handle(self, event: ev.Event) -> None:
        again: list[Task] = []
        for said in self.dispatch.handle(event):
            match said:
                case ev.Spawn(count):
                    self.to_spawn += count
                case ev.Lost(tasks):
                    for task in tasks:
                        self.lost[task] = self.lost.get(task, 0) + 1
                    again += tasks
                case ev.Cancelled(tasks) | ev.NotCancelled(tasks):
                    for task in tasks:
                        assert task in self.asked
                        assert task not in self.answers
                        self.answers[task] = isinstance(said, ev.Cancelled)
                        if self.answers[task] and task.state < DONE:
                            assert task.state == WAITING
                            self.end(task, CANCELLED)
                case ev.Assign() | ev.Grant() | ev.Slot() | ev.Deadlocked() | ev.Retire():
                    self.workers[said.worker].tell(said)
                case ev.Overran():
                    pass
        again = [t for t in again if t.state < DONE and not t.missing]
        if again:
            self.handle(ev.Ready(again, self.now))

    def end(self, task: Task, state: int) -> None:
        """End a task and, when it failed, all that depends on it."""
        if state == DONE:
            ready = complete(task)
            if ready:
                self.handle(ev.Ready(ready, self.now))
            return
        stack = [task]
        gone: list[Task] = []
        while stack:
            bad = stack.pop()
            if bad.state >= DONE and bad is not task:
                continue
            if bad.state in (READY, DISPATCHED):
                gone.append(bad)
            bad.state = state
            self.withdrawn.add(bad)
            waiters, bad.waiters = bad.waiters, None
            stack += waiters or ()
        if gone:
            self.handle(ev.Withdraw(gone, self.now))

    def pick(self, n: int) -> FakeWorker | None:
        alive = [self.workers[k] for k in sorted(self.workers)]
        return alive[n % len(alive)] if alive else None

    @rule(count=st.integers(1, 6), fn=st.sampled_from([b"f", b"f", b"g"]), chain=st.booleans(), pick=st.integers(0, 50),
          options=st.sampled_from([Options(), Options(), Options(), Options(walltime_s=60.0)]))  # fmt: skip
    def submit(self, count: int, fn: bytes, chain: bool, pick: int, options: Options) -> None:
        ready = []
        for i in range(count):
            live = [t for t in self.tasks if t.state < DONE]
            deps = []
            if live and (chain or pick % 3 == 0):
                deps = [live[-1 if chain else (pick + i) % len(live)]]
                other = live[(pick * 7 + i) % len(live)]
                if pick % 5 == 0 and other is not deps[0]:
                    deps.append(other)
            task = make_task(fn, deps, options)
            self.tasks.append(task)
            self.by_id[task.id] = task
            if not task.missing:
                ready.append(task)
        if ready:
            self.handle(ev.Ready(ready, self.now))

    @precondition(lambda self: self.to_spawn > 0)
    @rule()
    def worker_up(self) -> None:
        self.to_spawn -= 1
        self.workers[self.next_number] = worker = FakeWorker(self.next_number)
        worker.epoch = self.epoch
        self.next_number += 1
        self.handle(ev.WorkerUp(self.next_number - 1, self.now))

    @rule(n=st.integers(0, 9))
    def read(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None and may_read(worker):
            worker.read()

    @rule(n=st.integers(0, 9))
    def start(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None:
            self.start_on(worker)

    def start_on(self, worker: FakeWorker) -> None:
        task = worker.start(self.now)
        if task is not None:
            self.runs[task] = self.runs.get(task, 0) + 1
            assert self.answers.get(task) is not True, "runs, and yet was said to be cancelled"
            for dep in task.deps:
                assert dep.state >= DONE or dep in worker.made, "starts before its argument is made"

    @rule(
        n=st.integers(0, 9),
        duration=st.sampled_from([1e-6, 1e-6, 0.002, 0.3]),
        inline=st.sampled_from([True] * 5 + [False]),
    )
    def finish(self, n: int, duration: float, inline: bool) -> None:
        worker = self.pick(n)
        if worker is not None and worker.active:
            worker.finish(duration, inline)

    @rule(n=st.integers(0, 9))
    def flush(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None:
            worker.flush()

    @rule(n=st.integers(0, 9))
    def hear(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None and worker.outbox:
            self.hear_from(worker)

    def hear_from(self, worker: FakeWorker) -> None:
        message = worker.outbox.popleft()
        if worker.epoch != self.epoch:
            # What it said to the dead, but for results, it says again.
            if message[0] == "ADOPTED" and message[1] == self.epoch:
                worker.epoch = self.epoch
            elif message[0] != "DONE":
                return
        if message[0] in ("BLOCKED", "RESUME") and message[1].worker != worker.number:
            # Nobody's task any more: it may do as it likes until its process ends.
            worker.tell("LENT" if message[0] == "BLOCKED" else ev.Slot(worker.number, True))
            return
        self.handle(to_event(worker.number, message, self.now))
        if message[0] == "BLOCKED" and self.dispatch._workers[worker.number].blocked is not None:
            worker.tell("LENT")
        if message[0] == "DONE":
            for row in message[1]:
                task = self.by_id[row[1]]
                if task.state < DONE:
                    assert task.state == DISPATCHED
                    self.end(task, DONE)

    @rule()
    def agent_dies(self) -> None:
        """Another agent begins with what the workers' pages say; messages on their way stay on their way."""
        self.now += AFTER_LEASE_S  # leases have ended before it looks
        self.epoch += 1
        self.dispatch = Dispatch(self.SLOTS, max_extra=4, now=self.now)
        self.to_spawn = 0
        self.asked = set(self.answers)  # who asked for the others asks again
        for worker in list(self.workers.values()):
            if worker.exited:
                del self.workers[worker.number]
                continue
            for row in worker.noted:
                if self.by_id[row[1]].state < DONE:
                    complete(self.by_id[row[1]])
            worker.tell(("ADOPT", self.epoch))
        for task in self.tasks:  # the next agent's know nothing of workers, those that have ended neither
            task.worker, task.seq = None, 0
            if task.state < DONE:
                task.state = WAITING
        left: list[tuple[int, Task | None, int, bool]] = []
        for worker in self.workers.values():
            if worker.running is not None and worker.running[1].state < DONE:
                left.append((worker.number, worker.running[1], worker.running[0], worker.lent))
            else:
                left.append((worker.number, None, 0, False))
        self.handle(ev.Adopted(left, self.now))
        adopted = {task for _, task, _, _ in left}
        ready = [t for t in self.tasks if t.state == WAITING and not t.missing and t not in adopted]
        if ready:
            self.handle(ev.Ready(ready, self.now))

    @rule(seconds=st.sampled_from([0.0001, 0.001, 0.005, AFTER_LEASE_S, 0.06, 1.2]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.handle(ev.Tick({n: w.page for n, w in self.workers.items()}, self.now))

    @rule(n=st.integers(0, 9))
    def kill(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None:
            self.bury(worker)

    def bury(self, worker: FakeWorker) -> None:
        del self.workers[worker.number]
        self.handle(ev.WorkerDown(worker.number, worker.page, self.now))

    @rule(n=st.integers(0, 9))
    def block(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None and worker.active:
            worker.block()

    @rule(n=st.integers(0, 9))
    def resume(self, n: int) -> None:
        worker = self.pick(n)
        if worker is not None and worker.lent and not worker.wants_slot:
            worker.resume()

    @rule(pick=st.lists(st.integers(0, 200), min_size=1, max_size=4))
    def cancel(self, pick: list[int]) -> None:
        if self.tasks:
            tasks = [t for t in {self.tasks[p % len(self.tasks)]: None for p in pick} if t not in self.asked]
            self.asked.update(tasks)
            if tasks:
                self.handle(ev.Cancel(tasks, self.now))

    @rule(pick=st.integers(0, 200))
    def fail_waiting(self, pick: int) -> None:
        """An argument from elsewhere failed: only what has not been started may be withdrawn."""
        waiting = [t for t in self.tasks if t.state in (WAITING, READY)]
        if waiting:
            self.end(waiting[pick % len(waiting)], FAILED)

    @invariant()
    def rules_hold(self) -> None:
        self.dispatch.validate()
        active = sum(w.active for w in self.workers.values())
        beyond = sum(w.uninvited or w.away for w in self.dispatch._workers.values())
        assert active <= self.SLOTS + (beyond if self.epoch else 0), "more tasks run than there are slots"
        for task, runs in self.runs.items():
            assert runs <= 1 + self.lost.get(task, 0), "a task ran twice"
            assert task not in self.withdrawn or runs <= 1 + self.lost.get(task, 0)
        if not any(w.held for w in self.dispatch._workers.values()) and not self.dispatch._idle:
            assert self.dispatch.deadline is None

    def teardown(self) -> None:
        """Let everything come to its end: nothing may hang."""
        for _ in range(3000):
            while self.to_spawn:
                self.worker_up()
            quiet = True
            for worker in list(self.workers.values()):
                while may_read(worker):
                    worker.read()
                    quiet = False
                if worker.exited:
                    self.bury(worker)
                    quiet = False
                    continue
                if worker.lent and not worker.wants_slot:
                    worker.resume()
                    quiet = False
                if worker.active:
                    worker.finish(1e-6)
                    quiet = False
                self.start_on(worker)
                worker.flush()
                while worker.outbox and worker.number in self.workers:
                    self.hear_from(worker)
                    quiet = False
            self.dispatch.validate()
            self.now += 0.0001
            due = self.dispatch.deadline
            if quiet and due is None:
                break
            if due is not None and (quiet or due <= self.now):
                self.now = max(self.now, due)
                self.tick()
        else:
            raise AssertionError("it never ends")
        for task in self.tasks:
            assert task.state >= DONE, (task.state, task.worker, task.seq, task.missing)
            assert task.state != DONE or self.runs[task] >= 1
        assert set(self.answers) == self.asked


TestTwin = Twin.TestCase
TestTwin.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# ------------------------------------------------------------------------------------------------- simulated makespans

OVERHEAD = 10e-6


def simulate(tasks: list[Task], duration: Any, workers: int = 2, **kwargs: Any) -> Simulation:
    simulation = Simulation(workers, duration, overhead_s=OVERHEAD, **kwargs)
    simulation.run(simulation.now)
    for at in range(0, len(tasks), 128):
        simulation.submit(tasks[at : at + 128])
    simulation.run()
    simulation.check_all_ran()
    return simulation


@pytest.mark.parametrize("one_function", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_makespan_of_short_tasks_with_long_ones_among_them(seed: int, one_function: bool) -> None:
    shuffle = random.Random(seed)
    tasks = [make_task() for _ in range(10_000)]
    seconds = {t: (0.1 if i < 100 else 10e-6) for i, t in enumerate(shuffle.sample(tasks, len(tasks)))}
    if not one_function:
        for task, s in seconds.items():
            task.fn = b"slow" if s > 0.01 else b"fast"
    ideal = sum(s + OVERHEAD for s in seconds.values()) / 2
    assert simulate(tasks, seconds.__getitem__).makespan() <= 1.05 * ideal


@pytest.mark.parametrize(
    ("count", "seconds", "limit"), [(1000, 0.005, 1.01), (2000, 0.001, 1.02), (50_000, 1e-6, 1.02)]
)
def test_makespan_of_uniform_tasks(count: int, seconds: float, limit: float) -> None:
    simulation = simulate([make_task() for _ in range(count)], lambda _: seconds)
    assert simulation.makespan() <= limit * count * (seconds + OVERHEAD) / 2


@pytest.mark.parametrize("short", [1e-6, 5e-4])
def test_makespan_with_one_very_long_task(short: float) -> None:
    tasks = [make_task() for _ in range(10_000)]
    long = tasks[300]
    simulation = simulate(tasks, lambda task: 10.0 if task is long else short)
    others = max(at for task, at in simulation.ended_at.items() if task is not long) - simulation.born
    assert simulation.makespan() <= 10.01 + 150 * (short + OVERHEAD)  # it is the 301st
    assert others <= 10_000 * (short + OVERHEAD) * 1.02 + 0.030  # one worker's work, and a lease to wait for
    assert simulation.told_started == [long]
    assert simulation.ticks <= 4


def test_makespan_of_chains_fans_and_trees() -> None:
    chain = [make_task()]
    for _ in range(9_999):
        chain.append(make_task(deps=[chain[-1]]))
    assert simulate(chain, lambda _: 1e-6).makespan() <= 1.02 * 10_000 * (1e-6 + OVERHEAD)

    root = make_task()
    fan = [make_task(deps=[root]) for _ in range(10_000)]
    assert simulate([root, *fan], lambda _: 1e-6).makespan() <= 1.05 * 10_000 * (1e-6 + OVERHEAD) / 2

    maps = [make_task() for _ in range(10_000)]
    join = make_task(b"join", deps=maps)
    assert simulate([*maps, join], lambda _: 1e-6).makespan() <= 1.05 * 10_000 * (1e-6 + OVERHEAD) / 2

    level = [make_task(b"map") for _ in range(1000)]
    tree = list(level)
    while len(level) > 1:
        level = [make_task(b"reduce", deps=level[i : i + 2]) for i in range(0, len(level), 2)]
        tree += level
    assert simulate(tree, lambda _: 1e-3).makespan() <= 1.05 * len(tree) * (1e-3 + OVERHEAD) / 2


def test_no_shape_of_graph_costs_more_than_its_edges() -> None:
    """Time per task of the brain alone, for 2 000 and for 20 000 tasks: linear within the noise of a machine."""

    def chain(n: int) -> list[Task]:
        tasks = [make_task()]
        for _ in range(n - 1):
            tasks.append(make_task(deps=[tasks[-1]]))
        return tasks

    def fan_out(n: int) -> list[Task]:
        root = make_task()
        return [root, *(make_task(deps=[root]) for _ in range(n - 1))]

    def fan_in(n: int) -> list[Task]:
        maps = [make_task() for _ in range(n - 1)]
        return [*maps, make_task(deps=maps)]

    def wide_joins(n: int) -> list[Task]:
        maps = [make_task() for _ in range(100)]
        return [*maps, *(make_task(deps=maps) for _ in range(n // 100))]

    for shape in (chain, fan_out, fan_in, wide_joins):
        per_task = []
        for n in (2_000, 20_000):
            tasks = shape(n)
            with cpu_seconds() as elapsed:
                simulate(tasks, lambda _: 1e-6, check_every=10**9)
                per_task.append(elapsed() / n)
        assert per_task[1] < 4 * per_task[0] + 50e-6, shape.__name__  # quadratic: ten times


@pytest.mark.parametrize("seed", range(20))
def test_everything_at_once(seed: int) -> None:
    """Random graphs, durations, blocked tasks, kills and cancels: all ends, within the slots, nothing twice."""
    chance = random.Random(seed)
    tasks: list[Task] = []
    seconds: dict[Task, float] = {}
    simulation = Simulation(3, seconds.__getitem__, check_every=5)
    simulation.run(simulation.now)
    for _ in range(12):
        new = []
        for _ in range(50):
            deps = chance.sample(tasks[-20:], min(len(tasks), chance.choice([0, 0, 0, 1, 1, 2])))
            options = chance.choice([Options()] * 30 + [EXCLUSIVE, GPU])
            task = make_task(chance.choice([b"f", b"g", None]), deps, options)
            if tasks and chance.random() < 0.03:
                simulation.blocks_on[task] = chance.choice(tasks)
            seconds[task] = chance.choice([1e-6] * 20 + [0.003, 0.03])
            tasks.append(task)
            new.append(task)
        simulation.submit(new)
        for _ in range(2):
            chosen = chance.sample(tasks, 5)
            simulation.at(simulation.now + chance.random() * 0.05, partial(cancel, simulation, chosen))
        if chance.random() < 0.4:
            simulation.at(simulation.now + chance.random() * 0.05, partial(kill_one, simulation, chance))
        simulation.run(simulation.now + chance.choice([0.0001, 0.004, 0.03]))
    simulation.run()
    simulation.check_all_ran()


def cancel(simulation: Simulation, tasks: list[Task]) -> None:
    asked = simulation.now
    fresh = [task for task in tasks if task not in simulation.answers]
    fresh = [task for task in fresh if task not in simulation.asked]
    simulation.asked.update(fresh)
    simulation.handle(ev.Cancel(fresh, simulation.now))

    def answered() -> None:
        assert all(task in simulation.answers for task in fresh), f"no answer since {asked}"

    simulation.at(asked + 0.1, answered)


def kill_one(simulation: Simulation, chance: random.Random) -> None:
    if simulation.workers:
        simulation.kill(chance.choice(list(simulation.workers.values())))
