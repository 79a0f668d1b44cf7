"""Chain-ahead: waiting tasks follow their arguments into a worker's queue, so that a chain needs no trip from link to link."""

from __future__ import annotations

from itertools import islice
from math import inf
from typing import Final

from gcref.brains.dispatch_worker import LOOKAHEAD_S, STAYS, Costs, Worker, function_of
from gcref.brains.tasks import DISPATCHED, WAITING, Task

ROUND_TRIP_S: Final = 200e-6
"""Dependents of one task that together take less than this are not worth another worker."""
SCAN_WAITERS: Final = 16
"""Dependents of one task that chain-ahead looks at; more would make long lists quadratic."""
SCAN_DEPS: Final = 16
"""A task with more arguments is not sent ahead, for the same reason."""


def follow(worker: Worker, batch: list[Task], costs: Costs, spread: bool, now: float) -> None:
    """Append to `batch`, and to what the worker holds, waiting tasks whose missing arguments are all held by it.

    Breadth first, without recursion, within the look-ahead; where the room ends the next call goes on. Constant time for
    each task that the worker was sent, however long its list of dependents is.

    Args:
        worker: whom `batch` is for.
        batch: what is about to be sent to it.
        costs: the measured functions.
        spread: there are other workers, who are to have their part of a wide fan-out.
        now: monotonic seconds.
    """
    number, frontier, tail = worker.number, worker.frontier, worker.tail
    if not frontier and tail is not None and tail.worker == number and tail.waiters is not None:
        frontier.append(tail)
    load = worker.load(costs)
    while frontier and load < LOOKAHEAD_S:
        task = frontier[0]
        if task.worker == number and task.waiters is not None:
            load, more = _followers(worker, task, load, batch, costs, spread, now)
            if more:
                return
        frontier.popleft()


def _followers(
    worker: Worker, task: Task, load: float, batch: list[Task], costs: Costs, spread: bool, now: float
) -> tuple[float, bool]:
    """Append the dependents of one held task. Returns the load, and whether some were left for want of room."""
    number = worker.number
    spent = 0.0
    for waiter in islice(task.waiters or (), SCAN_WAITERS):
        function = function_of(waiter)
        cost = costs.get(function, inf)
        if waiter.state == DISPATCHED:
            if waiter.worker == number:
                spent += cost
            continue
        if cost >= LOOKAHEAD_S or not _may_follow(waiter, number):
            continue
        if spent and spent + cost > ROUND_TRIP_S and spread:
            break
        if load >= LOOKAHEAD_S:
            return load, True
        spent += cost
        load += cost
        worker.last_seq += 1
        waiter.seq = worker.last_seq
        waiter.worker = number
        waiter.state = DISPATCHED
        waiter.sent_at = now
        worker.held[waiter.seq] = waiter
        worker.tally[function] = worker.tally.get(function, 0) + 1
        worker.tail = waiter
        batch.append(waiter)
        if waiter.waiters is not None:
            worker.frontier.append(waiter)
    return load, False


def _may_follow(task: Task, number: int) -> bool:
    """Whether all that a waiting task misses is held by the worker."""
    missing = task.missing
    if task.state != WAITING or not missing or task.seq == STAYS or task.broken or len(task.deps) > SCAN_DEPS:
        return False
    for dep in reversed(task.deps):  # the last one is the last to be held: mostly the answer is found there
        if dep.state == DISPATCHED:
            if not isinstance(dep, Task) or dep.worker != number:
                return False
            missing -= 1
    return missing == 0
