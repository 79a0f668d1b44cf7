"""One worker as the dispatch brain sees it, and what is known of the time that functions take."""

from __future__ import annotations

from collections import deque
from itertools import islice
from math import inf
from typing import Final

from gcref.brains.tasks import DISPATCHED, Task

LOOKAHEAD_S: Final = 0.010
"""Seconds of work that a worker holds: many round trips of 0.15 ms, and little to wait behind."""
OVERHEAD_S: Final = 20e-6
"""What a task costs a worker besides its own run; it bounds the look-ahead to LOOKAHEAD_S / OVERHEAD_S tasks."""
FORGETTING: Final = 7 / 8
"""Weight of the past in a function's moving mean, for each task: after 100 ms among microseconds it is back in ~30 tasks."""
FUNCTIONS_MAX: Final = 4096
"""Functions whose measured time is remembered."""

# Marks in `Task.seq` while no worker holds the task; a worker's seqs are positive.
QUEUED: Final = -1
STAYS: Final = -2  # not to be sent ahead: given back by a worker that lacks an argument, or about to be ended

# States of a worker.
UP: Final = "up"
BLOCKED: Final = "blocked"  # its task waits, its slot is lent
RESUMING: Final = "resuming"  # its task could go on, and waits for a slot
REFUSED: Final = "refused"  # up; its last attempt to block was answered by Deadlocked
RETIRING: Final = "retiring"  # told to exit
ABSENT: Final = "absent"  # not up yet
AWAITED: Final = "awaited"  # adopted, without a task, and not heard of yet
DEAD: Final = "dead"

ALONE: Final = object()
"""The "function" of tasks that are held alone, whatever they were measured at."""


def function_of(task: Task) -> object:
    """What the task's time is measured under."""
    options = task.options
    if options.walltime_s is not None or options.resources:
        return ALONE
    return task.fn if task.fn is not None else task.group


class Costs(dict[object, float]):
    """What a task of each function costs a worker: a moving mean, in seconds. A function without one is unmeasured."""

    def measure(self, function: object, count: int, total: float) -> None:
        """`count` tasks of the function took `total` seconds."""
        if function is ALONE:
            return
        mean = max(0.0, total / count) + OVERHEAD_S
        known = self.get(function)
        if known is not None:
            self[function] = known + (mean - known) * (1.0 - FORGETTING**count)
            return
        if len(self) >= FUNCTIONS_MAX:
            for old in list(islice(self, FUNCTIONS_MAX // 2)):
                del self[old]
        self[function] = mean


class Worker:
    """A worker process, as far as dispatch is concerned.

    Attributes:
        held: what it was sent and has not ended, by seq, in order.
        tally: how many of `held` there are of each function.
        last_seq: the last seq given out.
        started: the highest seq that it is known to have begun to start.
        settled: its lease is over and its progress was read since: `started` is final.
        barren: settled, and nothing of what it holds can be taken.
        heard_at: when it last sent something, or began to have something to do.
        notice_at: when to look for a task that has run for long; None is never.
        noticed: the seq that `Started` was told of.
        revoked: seqs taken back that it must be told of before it gets a longer lease.
        dropped: seqs withdrawn, which it may or need not be told of.
        haunted: it runs a task that was withdrawn.
        cancelling: tasks to be cancelled if the end of the lease finds them unstarted.
        frontier: tasks sent here whose waiters may follow them.
        tail: the last task sent; waiters may come to it later, as links of a chain are submitted.
        overrun_at: when the walltime of its task is over.
        away: adopted, and not heard of yet: it gets nothing.
        uninvited: its blocked task ended without asking for a slot, and so what it holds runs beyond the slots.
    """

    __slots__ = (
        "away", "barren", "blocked", "cancelling", "dropped", "frontier", "haunted", "heard_at", "held", "idle_since",
        "last_seq", "lease_until", "notice_at", "noticed", "number", "overrun_at", "revoked", "settled", "started",
        "state", "tail", "tally", "uninvited",
    )  # fmt: skip

    def __init__(self, number: int, now: float) -> None:
        self.number = number
        self.away = False
        self.state = UP
        self.held: dict[int, Task] = {}
        self.tally: dict[object, int] = {}
        self.last_seq = 0
        self.started = 0
        self.settled = False
        self.barren = False
        self.lease_until = now
        self.heard_at = now
        self.notice_at: float | None = None
        self.noticed = 0
        self.revoked: list[int] = []
        self.dropped: list[int] = []
        self.haunted = False
        self.cancelling: dict[Task, None] = {}
        self.frontier: deque[Task] = deque()
        self.tail: Task | None = None
        self.blocked: Task | None = None
        self.overrun_at: float | None = None
        self.idle_since = now
        self.uninvited = False

    def lends(self) -> bool:
        """Whether it is blocked in a task that gives its slot away meanwhile."""
        return self.blocked is not None and not self.blocked.options.resources

    def load(self, costs: Costs) -> float:
        """Seconds of work that it holds; infinite when nothing may be held behind it."""
        load = 0.0
        for function, count in self.tally.items():
            load += costs.get(function, inf) * count
        return load

    def count_out(self, function: object, count: int) -> None:
        """`count` tasks of a function are not held any more."""
        left = self.tally[function] - count
        if left:
            self.tally[function] = left
        else:
            del self.tally[function]

    def release(self, tasks: list[Task]) -> None:
        """Strike tasks off: they are not held any more."""
        for task in tasks:
            del self.held[task.seq]
            self.count_out(function_of(task), 1)
            task.worker = None
            task.seq = 0

    def with_dependents(self, tasks: list[Task]) -> list[Task]:
        """These held tasks and those held for their results, in the order of their seqs."""
        taken = set(tasks)
        first = min(task.seq for task in tasks)
        for seq, task in self.held.items():
            if seq > first and task.missing and task not in taken and not taken.isdisjoint(task.deps):
                taken.add(task)
        return sorted(taken, key=lambda task: task.seq)

    def stealable(self, started: int) -> list[Task]:
        """What lies above `started` and could run anywhere."""
        return [task for seq, task in self.held.items() if seq > started and not task.missing]

    def validate(self, idle: bool) -> None:
        """Check what must hold of one worker; `idle`: it is among those that get work first."""
        held = self.held
        assert (self.state in (BLOCKED, RESUMING)) == (self.blocked is not None)
        assert idle <= (not held and self.blocked is None and not self.revoked and not self.away)
        assert list(held) == sorted(held)
        tally: dict[object, int] = {}
        for seq, task in held.items():
            assert task.worker == self.number
            assert task.seq == seq <= self.last_seq
            tally[function_of(task)] = tally.get(function_of(task), 0) + 1
            for dep in task.deps if task.missing else ():
                if isinstance(dep, Task) and dep.state == DISPATCHED and dep.worker is not None:
                    assert dep.worker == self.number, "an argument is held by another worker"
                    assert dep.seq < seq, "an argument comes earlier"
        assert tally == self.tally
        assert ALONE not in tally or len(held) == 1, "held alone"
        assert all(task.worker == self.number for task in self.cancelling)
        if not held and not idle and self.blocked is None:
            assert self.revoked or self.haunted or self.away, (
                "a worker that holds nothing is idle, or has to ask first"
            )
