"""Coming back: what a new agent does with what the one before it left.

    journal ─► the resolver as it was          (`Memory.recall`)
    workers ─► results of theirs that the journal does not have; which tasks they are running; which died running one
    store   ─► which bytes are still there
    `Recovered` ─► outcomes, subscriptions, pulls and tasks that may have been lost on the way, said once more

All of it happens before the agent's loop runs; what the loop is to begin with is a `TakenUp`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from typing import Any, Final, NamedTuple

from endpoint_worker.agent.losses import worker_lost
from endpoint_worker.agent.memory import Recalled
from endpoint_worker.store import Store
from endpoint_worker.worker.remains import Remains
from gcref import ids
from gcref.brains import resolver_events as ev
from gcref.brains.resolver import Resolver
from gcref.brains.tasks import DONE, Task
from gcref.wire import messages as m

log = logging.getLogger("gcref.agent")


class TakenUp(NamedTuple):
    """What is to be done once the new agent's loop runs.

    Attributes:
        remains: of all workers, dead and alive.
        adopted: of the living ones: number, the task that it is running or None, its seq, whether it has lent its slot.
        instructions: of the resolver; to be obeyed once dispatch knows the workers.
        cancels: (id, force, who asked): told to the dead agent, for tasks that have not ended.
        gone: parties that were the SDK inside workers that are dead.
    """

    remains: list[Remains]
    adopted: list[tuple[int, Task | None, int, bool]]
    instructions: list[Any]
    cancels: list[tuple[bytes, bool, ev.Who]]
    gone: Set[bytes]


NOTHING: Final = TakenUp([], [], [], [], frozenset())
"""Of an endpoint that does not come back."""


def take_up(
    recalled: Recalled,
    remains: Iterable[Remains],
    resolver: Resolver,
    store: Store,
    endpoint: str,
    now: float,
) -> TakenUp:
    """Bring the resolver from where the journal ends to where the world is.

    Args:
        recalled: what the journal told beside the resolver's own state.
        remains: of all workers, dead and alive.
        resolver: as `Memory.recall` left it.
        store: made with `recover=True`.
        endpoint: the endpoint's name.
        now: monotonic seconds.
    """
    remains = sorted(remains, key=lambda each: each.worker)
    adopted: list[tuple[int, Task | None, int, bool]] = []
    doomed = {id for id, force, who in recalled.cancels if force and _may_cancel(resolver, id, who)}
    for one in remains:
        resolver.replay(ev.Finished(f"{endpoint}/{one.worker}", one.results))
    for one in remains:
        task = _running(one, resolver)
        if one.exited is None:
            seq = one.started[0] if task is not None and one.started is not None else 0
            adopted.append((one.worker, task, seq, one.blocked and task is not None))
        elif task is not None and task.id in doomed:
            resolver.replay(ev.Cancelled([task]))  # that may be what its worker was killed for
        elif task is not None:
            failure = worker_lost(one.exited, "while the endpoint's agent was down")
            resolver.replay(ev.Ended([task], failure, True))
    wanted = resolver.wanted_bytes()
    for one in remains:
        _seal(one, wanted, store)
    stored = store.recover(wanted, {worker for worker, *_ in adopted})
    running = {task.id: worker for worker, task, *_ in adopted if task is not None}
    instructions = resolver.handle(ev.Recovered(running, stored, now))
    if resolver.objects:
        log.info(
            "recovered %d objects, %d of them in the store; %d workers live, %d of them at work",
            len(resolver.objects), len(stored), len(adopted), len(running),
        )  # fmt: skip
    gone = recalled.workers - {one.config.party for one in remains if one.exited is None}
    return TakenUp(remains, adopted, instructions, recalled.cancels, gone)


def _may_cancel(resolver: Resolver, id: bytes, who: ev.Who) -> bool:
    task = resolver.objects.get(id)
    return task is not None and resolver.may_read(task, who, None)


def _running(one: Remains, resolver: Resolver) -> Task | None:
    """The task that a worker was running when it was last seen, if its attempt is still the present one."""
    if one.started is None:
        return None
    _seq, id, attempt = one.started
    task = resolver.objects.get(id)
    if not isinstance(task, Task) or task.attempt != attempt or task.state >= DONE:
        return None
    return task


def _seal(one: Remains, wanted: dict[bytes, tuple[int, int]], store: Store) -> None:
    """Take up the large results that the journal does not know."""
    for result in one.results:
        id, attempt, status, value = result[1:5]
        if status == m.STORED and wanted.get(id) == (attempt, value[1]):
            try:
                store.seal(id, attempt, value[0], value[1])
            except (LookupError, OSError) as error:
                log.info("the bytes of %s are not where its worker wrote them: %s", ids.text(id), error)
