"""What the dispatch brain can tell people: what each worker does and since when, and where a task is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

from gcref.brains.dispatch_worker import REFUSED, UP, Worker
from gcref.brains.tasks import Task

SCAN_MAX: Final = 20_000
"""Queued tasks that are looked through: about a millisecond."""


def of_worker(worker: Worker, started: int, now: float) -> dict[str, Any]:
    """A worker: its state, and what it runs, since when.

    Args:
        worker: which.
        started: the seq in its progress page, or 0.
        now: monotonic seconds.
    """
    running = worker.blocked or worker.held.get(max(started, worker.started))
    told: dict[str, Any] = {
        "worker": worker.number,
        "state": ("busy" if worker.held else "idle") if worker.state in (UP, REFUSED) else worker.state,
        "held": len(worker.held),
        "running": None,
        "for_s": now - worker.idle_since if not worker.held else None,
        "heard_s": now - worker.heard_at,
    }
    if running is not None:
        told |= {
            "running": running.id,
            "function": running.fn,
            "attempt": running.attempt,
            "for_s": now - _since(worker, running),
        }
    return told


def _since(worker: Worker, running: Task) -> float:
    """When a task began, as far as can be known: after it was sent, and after the worker spoke last before it."""
    return running.sent_at if worker.blocked is running else max(running.sent_at, worker.heard_at)


def of_tasks(
    tasks: Iterable[Task],
    workers: Mapping[int, Worker],
    queue: Iterable[Task],
    progress: Mapping[int, int],
    now: float,
) -> dict[Task, dict[str, Any]]:
    """Where tasks are: in the queue (`ahead`: how many before it), or at a worker (`ahead`, or `running_s`).

    Of one that is queued behind `SCAN_MAX` others, or is in neither place, nothing is told.
    """
    places: dict[Task, dict[str, Any]] = {}
    wanted = set()
    for task in tasks:
        worker = workers.get(task.worker) if task.worker is not None else None
        if worker is not None:
            places[task] = _at_worker(task, worker, progress, now)
        else:
            wanted.add(task)
    for ahead, queued in enumerate(islice(queue, SCAN_MAX) if wanted else ()):
        if queued in wanted:
            places[queued] = {"ahead": ahead}
    return places


def _at_worker(task: Task, worker: Worker, progress: Mapping[int, int], now: float) -> dict[str, Any]:
    started = max(worker.started, progress.get(worker.number, 0))
    told: dict[str, Any] = {"worker": worker.number, "sent_s": now - task.sent_at}
    if worker.blocked is task or task.seq == started:
        told["running_s"] = now - _since(worker, task)
        told["blocked"] = worker.blocked is task
    elif task.seq > started:
        told["ahead"] = sum(started <= seq < task.seq for seq in worker.held)
    return told
