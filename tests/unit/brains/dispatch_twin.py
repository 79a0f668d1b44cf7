"""Workers that obey the worker channel's rules in the plainest way, and a simulation that gives them time.

`FakeWorker` is a worker without a process: what it is told waits in `inbox`, what it says in `outbox`, and whoever drives
it decides when each moves on. `Simulation` drives them with a clock, latencies and durations, beside an agent of a few lines.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gcref.brains import dispatch_events as ev
from gcref.brains.dispatch import Dispatch
from gcref.brains.tasks import (
    CANCELLED,
    DEFAULT_OPTIONS,
    DISPATCHED,
    DONE,
    READY,
    WAITING,
    Group,
    Options,
    Task,
)

HOME = b"h" * 16
GROUP = Group(b"g" * 16, b"s" * 32, b"c" * 16, b"k" * 40)
_ids = itertools.count(1)


def make_task(fn: bytes | None = b"f", deps: Iterable[Task] = (), options: Options = DEFAULT_OPTIONS) -> Task:
    """A task as the resolver would have made it: linked to what it waits for."""
    task = Task(next(_ids).to_bytes(16, "big"), HOME, GROUP, fn, b"args", options, 0.0)
    task.deps = tuple(deps)
    for dep in task.deps:
        if dep.state < DONE:
            if dep.waiters is None:
                dep.waiters = [task]
            else:
                dep.waiters.append(task)
            task.missing += 1
    return task


def complete(task: Task, state: int = DONE) -> list[Task]:
    """End a task as the resolver does; returns the ones that may run now."""
    task.state = state
    ready = []
    waiters, task.waiters = task.waiters, None
    for waiter in waiters or ():
        waiter.missing -= 1
        if waiter.missing == 0 and waiter.state == WAITING:
            ready.append(waiter)
    return ready


class FakeWorker:
    """One worker, as the contract says it behaves."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.page = 0
        self.lease = 0.0
        self.inbox: deque[Any] = deque()
        self.outbox: deque[tuple[Any, ...]] = deque()
        self.queue: deque[tuple[int, Task, tuple[Task, ...]]] = deque()
        self.running: tuple[int, Task] | None = None
        self.asking = False
        self.blocked = False
        self.wants_slot = False
        self.exited = False
        self.made: set[Task] = set()
        self.unsent: list[tuple[Any, ...]] = []
        # What an agent that comes later finds, and what becomes of it.
        self.noted: list[tuple[Any, ...]] = []
        self.lent = False
        self.asked_to_block = False
        self.epoch = 0
        self.started: list[Task] = []
        self.refused: list[Task] = []

    def tell(self, instruction: Any) -> None:
        """The agent sends; what the tasks still miss is resolved now, as the agent resolves it."""
        if isinstance(instruction, ev.Assign):
            entries = [(t.seq, t, tuple(d for d in t.deps if d.state < DONE)) for t in instruction.tasks]
            self.inbox.append(("TASKS", instruction.lease_until, entries))
        else:
            self.inbox.append(instruction)

    def read(self) -> None:
        message = self.inbox.popleft()
        if isinstance(message, tuple) and message[0] == "TASKS":
            self.lease = message[1]
            self.queue.extend(message[2])
        elif isinstance(message, ev.Grant):
            assert self.asking, "a grant that answers no question could be taken for the answer to the next"
            self.lease = message.lease_until
            self.asking = False
            revoked = set(message.revoked)
            self.queue = deque(entry for entry in self.queue if entry[0] not in revoked)
        elif isinstance(message, ev.Slot):
            assert self.wants_slot
            self.blocked = self.wants_slot = self.lent = False
        elif isinstance(message, ev.Deadlocked):
            assert self.blocked
            self.refused.append(message.task)
            self.blocked = self.wants_slot = self.asked_to_block = False
        elif message == "LENT":
            self.lent, self.asked_to_block = True, False
        elif isinstance(message, tuple) and message[0] == "ADOPT":
            self.rejoin(message[1])
        elif isinstance(message, ev.Retire):
            assert not self.running
            self.exited = True

    def rejoin(self, epoch: int) -> None:
        """ADOPT: forget what is held, tell all again."""
        self.queue.clear()
        self.asking = False
        self.unsent.clear()
        running = self.running[0] if self.running is not None else 0
        self.outbox.append(("DONE", list(self.noted)))
        self.outbox.append(("ADOPTED", epoch, running, self.page, self.lent))
        if self.running is not None and self.asked_to_block:
            self.outbox.append(("BLOCKED", self.running[1]))
        if self.running is not None and self.wants_slot:
            self.outbox.append(("RESUME", self.running[1]))

    def read_all(self) -> bool:
        """Read until the worker has exited (True) or nothing is left."""
        while self.inbox and not self.exited:
            self.read()
        return self.exited

    @property
    def active(self) -> bool:
        return self.running is not None and not self.blocked

    def start(self, now: float) -> Task | None:
        """Try to start the next entry."""
        while self.queue and self.running is None and not self.asking and not self.exited:
            seq, task, missing = self.queue[0]
            self.page = seq
            if now >= self.lease:
                self.asking = True
                self.flush()
                self.outbox.append(("ASK", seq))
                return None
            self.queue.popleft()
            if not self.made.issuperset(missing):
                self.flush()
                self.outbox.append(("GIVE_BACK", [seq]))
                continue
            self.running = (seq, task)
            self.started.append(task)
            return task
        return None

    def finish(self, duration: float, inline: bool = True) -> Task:
        assert self.running is not None
        assert not self.blocked
        seq, task = self.running
        self.running = None
        if inline:
            self.made.add(task)
        self.unsent.append((seq, task.id, 1, 0, b"", 0.0, duration, None, None))
        self.noted.append(self.unsent[-1])
        return task

    def flush(self) -> None:
        if self.unsent:
            self.outbox.append(("DONE", self.unsent))
            self.unsent = []

    def block(self) -> None:
        assert self.running is not None
        self.blocked = self.asked_to_block = True
        self.flush()
        self.outbox.append(("BLOCKED", self.running[1]))
        if self.queue:
            self.outbox.append(("GIVE_BACK", [seq for seq, _, _ in self.queue]))
            self.queue.clear()

    def resume(self) -> None:
        assert self.running is not None
        self.wants_slot = True
        self.outbox.append(("RESUME", self.running[1]))


def to_event(number: int, message: tuple[Any, ...], now: float) -> ev.Event:
    """The event that the agent's shell makes of a worker's message."""
    match message:
        case ("ASK", seq):
            return ev.Asked(number, seq, now)
        case ("GIVE_BACK", seqs):
            return ev.GaveBack(number, seqs, now)
        case ("DONE", rows):
            return ev.Finished(number, rows, now)
        case ("BLOCKED", task):
            return ev.Blocked(number, task, now)
        case ("RESUME", task):
            return ev.Resume(number, task, now)
        case ("ADOPTED", _, running, last, lent):
            return ev.Rejoined(number, running, last, lent, now)
    raise AssertionError(message)


class Simulation:
    """A discrete-event simulation: an agent that costs nothing, workers `latency` away.

    Args:
        workers: slots.
        duration: seconds a task runs.
        one_way_s: seconds a message takes.
        overhead_s: seconds a task costs a worker besides.
        check_every: `validate` after so many events.
    """

    def __init__(
        self,
        workers: int,
        duration: Callable[[Task], float],
        *,
        one_way_s: float = 75e-6,
        overhead_s: float = 10e-6,
        check_every: int = 97,
        seed: int = 0,
    ) -> None:
        self.now = 100.0
        self.born = self.now
        self.slots = workers
        self.dispatch = Dispatch(workers, max_extra=4 * workers, now=self.now)
        self.duration = duration
        self.latency = one_way_s
        self.overhead = overhead_s
        self.check_every = check_every
        self.random = random.Random(seed)
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.workers: dict[int, FakeWorker] = {}
        self.numbers = itertools.count(1)
        self.last_sent: dict[int, float] = {}
        self.means: dict[bytes | None, float] = {}
        self.tasks: dict[bytes, Task] = {}
        self.blocks_on: dict[Task, Task] = {}
        self.waiting_for: dict[Task, list[FakeWorker]] = {}
        self.runs: dict[Task, int] = {}
        self.ended_at: dict[Task, float] = {}
        self.told_started: list[Task] = []
        self.lost: list[Task] = []
        self.asked: set[Task] = set()
        self.answers: dict[Task, bool] = {}
        self.overran: list[Task] = []
        self.deadlocked: list[Task] = []
        self.ticks = 0
        self.events = 0
        self.assigns = 0
        self.active = 0
        self.most_active = 0
        self.most_processes = 0
        self.tick_at: float | None = None
        self.spawn(workers)

    # the clock

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (when, next(self.order), what))

    def run(self, until: float | None = None) -> None:
        heap = self.heap
        while heap and (until is None or heap[0][0] <= until):
            self.now, _, what = heapq.heappop(heap)
            what()
        if until is not None:
            self.now = until

    # the agent

    def submit(self, tasks: list[Task]) -> None:
        for task in tasks:
            self.tasks[task.id] = task
        ready = [task for task in tasks if task.missing == 0 and task.state < DONE]
        if ready:
            self.handle(ev.Ready(ready, self.now))

    def handle(self, event: ev.Event) -> None:
        self.obey(self.dispatch.handle(event))
        self.events += 1
        if self.events % self.check_every == 0:
            self.dispatch.validate()
        due = self.dispatch.deadline
        if due is not None and (self.tick_at is None or due < self.tick_at):
            self.tick_at = max(due, self.now)
            self.at(self.tick_at, self.tick)

    def tick(self) -> None:
        self.tick_at = None
        due = self.dispatch.deadline
        if due is None:
            return
        if due <= self.now:
            self.ticks += 1
            self.handle(ev.Tick({n: w.page for n, w in self.workers.items()}, self.now))
        else:
            self.tick_at = due
            self.at(due, self.tick)

    def obey(self, instructions: list[ev.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ev.Spawn(count):
                    self.spawn(count)
                case ev.Started(tasks, _):
                    self.told_started += tasks
                case ev.Lost(tasks):
                    self.lost += tasks
                    self.at(self.now, partial(self.submit, tasks))
                case ev.Cancelled(tasks):
                    for task in tasks:
                        assert task not in self.answers
                        self.answers[task] = True
                        ready = self.complete(task, CANCELLED)  # here its dependents run all the same
                        if ready:
                            self.at(self.now, partial(self.submit, ready))
                case ev.NotCancelled(tasks):
                    for task in tasks:
                        assert task not in self.answers
                        self.answers[task] = False
                case ev.Overran(_, task):
                    self.overran.append(task)
                case ev.Assign() | ev.Grant() | ev.Slot() | ev.Deadlocked() | ev.Retire():
                    self.assigns += isinstance(instruction, ev.Assign)
                    if isinstance(instruction, ev.Deadlocked):
                        self.deadlocked.append(instruction.task)
                    worker = self.workers.get(instruction.worker)
                    if worker is not None:
                        worker.tell(instruction)
                        self.at(self.now + self.latency, partial(self.arrive, worker))

    def hear(self, worker: FakeWorker, message: tuple[Any, ...]) -> None:
        if self.workers.get(worker.number) is not worker:
            return
        self.handle(to_event(worker.number, message, self.now))
        if message[0] == "DONE":
            ready = []
            for row in message[1]:
                task = self.tasks[row[1]]
                if task.state == DISPATCHED:
                    ready += self.complete(task, DONE)
            if ready:
                self.handle(ev.Ready(ready, self.now))

    def complete(self, task: Task, state: int) -> list[Task]:
        for waiting in self.waiting_for.pop(task, ()):
            self.at(self.now + self.latency, partial(self.wake, waiting))
        return complete(task, state)

    # the workers

    def spawn(self, count: int) -> None:
        for _ in range(count):
            worker = FakeWorker(next(self.numbers))
            self.at(self.now + (0.005 if self.now > self.born else 0.0), partial(self.up, worker))

    def up(self, worker: FakeWorker) -> None:
        self.workers[worker.number] = worker
        self.last_sent[worker.number] = self.now
        self.most_processes = max(self.most_processes, len(self.workers))
        self.handle(ev.WorkerUp(worker.number, self.now))

    def kill(self, worker: FakeWorker) -> None:
        if self.workers.pop(worker.number, None) is None:
            return
        self.active -= worker.active
        worker.exited = True
        self.handle(ev.WorkerDown(worker.number, worker.page, self.now))

    def arrive(self, worker: FakeWorker) -> None:
        """A message has come; a busy worker reads it when it is done."""
        if worker.exited or worker.active:
            return
        was_blocked = worker.blocked
        if worker.read_all():
            self.at(
                self.now + self.latency,
                lambda: self.handle(ev.WorkerDown(worker.number, worker.page, self.now)),
            )
            self.workers.pop(worker.number, None)
        elif was_blocked and not worker.blocked:
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            self.end_at(worker, self.now + self.duration(worker.running[1]) / 2)  # type: ignore[index]
        else:
            self.next(worker)

    def next(self, worker: FakeWorker) -> None:
        worker.read_all()
        if worker.exited:
            return
        mean = self.means.get(worker.queue[0][1].fn) if worker.queue else None
        if (
            not worker.queue
            or mean is None
            or mean > 0.001
            or self.now - self.last_sent[worker.number] > 0.002
        ):
            worker.flush()
        task = worker.start(self.now)
        self.send(worker)
        if task is None:
            return
        self.runs[task] = self.runs.get(task, 0) + 1
        assert self.answers.get(task) is not True, "a cancelled task runs"
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        if task in self.blocks_on:
            self.at(self.now + self.duration(task) / 2, lambda: self.block(worker, task))
        else:
            self.end_at(worker, self.now + self.overhead + self.duration(task))

    def end_at(self, worker: FakeWorker, when: float) -> None:
        self.at(when, lambda: self.end(worker))

    def end(self, worker: FakeWorker) -> None:
        if worker.exited:
            return
        assert worker.running is not None
        duration = self.duration(worker.running[1])
        task = worker.finish(duration)
        self.active -= 1
        self.ended_at[task] = self.now
        self.means[task.fn] = self.means.get(task.fn, duration) * 0.9 + 0.1 * duration
        if len(worker.unsent) == 1:  # the flusher thread
            first = worker.unsent[0]
            self.at(self.now + 0.010, lambda: self.flush_old(worker, first))
        self.next(worker)

    def flush_old(self, worker: FakeWorker, first: tuple[Any, ...]) -> None:
        if not worker.exited and worker.unsent and worker.unsent[0] is first:
            worker.flush()
            self.send(worker)

    def send(self, worker: FakeWorker) -> None:
        while worker.outbox:
            message = worker.outbox.popleft()
            self.last_sent[worker.number] = self.now
            self.at(self.now + self.latency, partial(self.hear, worker, message))

    def block(self, worker: FakeWorker, task: Task) -> None:
        if worker.exited:
            return
        target = self.blocks_on[task]
        if target.state >= DONE:
            self.end_at(worker, self.now + self.duration(task) / 2)
            return
        worker.block()
        self.active -= 1
        self.send(worker)
        self.waiting_for.setdefault(target, []).append(worker)

    def wake(self, worker: FakeWorker) -> None:
        if not worker.exited and worker.blocked:
            worker.resume()
            self.send(worker)

    # what one asks afterwards

    def check_all_ran(self) -> None:
        self.dispatch.validate()
        for task in self.tasks.values():
            expected = 0 if self.answers.get(task) else 1
            lost = self.lost.count(task) if self.lost else 0
            assert expected <= self.runs.get(task, 0) <= expected + lost, (task.state, task.seq, task.worker)
            assert task.state == (CANCELLED if self.answers.get(task) else DONE)
        assert self.most_active <= self.slots
        assert self.dispatch.deadline is None
        assert not any(task.state == READY for task in self.tasks.values())

    def makespan(self) -> float:
        return max(self.ended_at.values()) - self.born
