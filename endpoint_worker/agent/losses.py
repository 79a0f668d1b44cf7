"""What tasks are told when something of theirs was lost here: the failures of dead workers and of pulls."""

from __future__ import annotations

import signal
from typing import Any

from endpoint_worker.store import Store
from endpoint_worker.worker.zygote import Exited
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DISPATCHED, Obj, Task
from gcref.carriers.bulk.ports import PullFailed
from gcref.errors import LostReason, StoreFullError
from gcref.objects import failure as failures
from gcref.wire import messages as m


def worker_lost(exited: Exited, when: str = "while it ran this task") -> list[Any]:
    """What the task is told that a dead worker was running."""
    if exited.signal is not None:
        how = f"was killed by {_name_of(exited.signal)}"
    else:
        how = f"exited with code {exited.exit_code}"
    text = f"the worker process {how} {when}"
    if exited.stderr:
        text += f"; its last lines on stderr:\n{exited.stderr}"
    return failures.make(
        "WorkerLostError", text, signal=exited.signal, exit_code=exited.exit_code, stderr=exited.stderr
    )


def pull_failure(done: PullFailed) -> list[Any]:
    """What the tasks are told that needed these bytes."""
    if done.reason == "refused":
        return failures.make("AuthError", f"the bytes of an argument were refused: {done.message}")
    if done.reason == "store":
        full = done.cause if isinstance(done.cause, StoreFullError) else StoreFullError(done.message)
        return failures.make(
            "StoreFullError",
            f"the bytes do not fit into this endpoint's store: {full}",
            needed_bytes=full.needed_bytes,
            limit_bytes=full.limit_bytes,
        )
    reason = {
        "corrupt": LostReason.CORRUPT,
        "timeout": LostReason.TIMEOUT,
        "unreachable": LostReason.HOME_LOST,
    }.get(done.reason, LostReason.BYTES_LOST)
    return failures.make(
        "ObjectLostError", f"the bytes of an argument are lost: {done.message}", reason=reason.value
    )


def unread_arguments(results: list[Any], resolver: Resolver, store: Store) -> list[tuple[Task, Obj]]:
    """Tasks that did not run because the bytes of an argument turned out to be gone or changed, each with such an argument.

    Args:
        results: as a worker sent them.
        resolver: knows the tasks.
        store: looks at the bytes of arguments again, and tells of those that are lost.
    """
    found: list[tuple[Task, Obj]] = []
    for row in results:
        if row[3] != m.FAILED or row[4][0] != "ObjectLostError":
            continue
        task = resolver.objects.get(row[1])
        if not isinstance(task, Task) or task.state != DISPATCHED or task.attempt != row[2]:
            continue
        needs = [resolver.resolve(dep) for dep in task.deps] + ([task.args] if task.args is not None else [])
        lost = [obj for obj in needs if obj.value is None and not store.verify(obj.id)]
        if lost:  # else the task itself raised it
            found.append((task, lost[0]))
    return found


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals, which have no names
        return f"signal {number}"
