"""What the dispatch brain is told and what it answers: plain records that carry batches.

`now` is monotonic seconds everywhere. A *seq* is the number of an entry in one worker's queue, from 1, never used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gcref.brains.tasks import Task

# ---------------------------------------------------------------------------------------------------------- events


class Ready(NamedTuple):
    """All arguments of these tasks are here. They become READY (the resolver may have set that already) and are queued."""

    tasks: Sequence[Task]
    now: float


class WorkerUp(NamedTuple):
    """A worker process is up. `worker` is a number that was never used before; if it is down already, this is ignored."""

    worker: int
    now: float


class WorkerDown(NamedTuple):
    """A worker process is dead; also one that was retired, or that never came up.

    `started_seq` is its progress page, read after its death. What it had said before, and is handed in later, is ignored.
    """

    worker: int
    started_seq: int
    now: float


class Adopted(NamedTuple):
    """An earlier agent's workers that live: instead of the processes that the shell would start unasked. At most once.

    Before any other event of a worker, and before `Ready` has their tasks. Each is number, the task that it runs as far as
    its page and the graph know (None: nothing that matters), the task's seq there, and whether it has lent its slot.
    Those tasks become DISPATCHED. Nobody gets anything before `Rejoined`; `Spawn` asks for the processes that are missing.
    """

    workers: Sequence[tuple[int, Task | None, int, bool]]
    now: float


class Rejoined(NamedTuple):
    """An adopted worker has said ADOPTED, after all its results: what it held, and has not begun, is dropped there.

    `running` is the seq that it runs, 0 for none; `last` the highest that it ever began; `blocked`: its slot is lent.
    A task that it does not run after all is queued again, without the loss of an attempt.
    """

    worker: int
    running: int
    last: int
    blocked: bool
    now: float


class Finished(NamedTuple):
    """Results of a worker, whatever their outcome, as in the worker channel's DONE: seq first, seconds it ran at index 6.

    Rows whose seq the worker does not hold (any more) are ignored. The resolver may take the same rows before or after.
    """

    worker: int
    results: Sequence[Sequence[Any]]
    now: float


class GaveBack(NamedTuple):
    """The worker will not run these entries (it blocks, or an argument made there is not at hand). Unknown seqs are ignored."""

    worker: int
    seqs: Sequence[int]
    now: float


class Asked(NamedTuple):
    """The worker's lease is over and it wants to start `seq`. It stands still until the `Grant` that answers this."""

    worker: int
    seq: int
    now: float


class Blocked(NamedTuple):
    """The worker's task waits for a future: its slot is lent unless it holds resources; or `Deadlocked` answers."""

    worker: int
    task: Task
    now: float


class Resume(NamedTuple):
    """What a blocked task waited for is there. Answered by `Slot`, at once or later; not after `Deadlocked`."""

    worker: int
    task: Task
    now: float


class Withdraw(NamedTuple):
    """The resolver has ended these tasks: forget them. Allowed for any task in any state; what is not here is ignored.

    For tasks that cannot run any more (an argument failed), that could not be sent, or whose worker is being killed.
    One that may start within its lease still may; its result is ignored. To keep a task from running use `Cancel`.
    """

    tasks: Sequence[Task]
    now: float


class Cancel(NamedTuple):
    """These tasks shall not run. Each is answered once, by `Cancelled` or `NotCancelled`.

    The answer comes in the same list, except for a task held by a worker that may just be starting it: then when that
    worker's lease is over, within `LEASE_S` and a margin. Asking again while the answer is pending gives no second one.
    """

    tasks: Sequence[Task]
    now: float


class Tick(NamedTuple):
    """`deadline` has come. `progress`: worker → seq in its progress page, for every worker, read *after* `now` was."""

    progress: dict[int, int]
    now: float


# ---------------------------------------------------------------------------------------------------- instructions


class Assign(NamedTuple):
    """Send these to the worker, in this order; their `state`, `worker`, `seq` and `sent_at` are set.

    An argument that has not ended was assigned to that same worker earlier, maybe in the same list.
    """

    worker: int
    tasks: list[Task]
    lease_until: float


class Grant(NamedTuple):
    """Answer to `Asked`, one for each: the worker's new lease, and the seqs that it must drop (unknown ones: ignored)."""

    worker: int
    lease_until: float
    revoked: list[int]


class Spawn(NamedTuple):
    """Start so many workers: in place of dead ones, or for lent slots. The first `workers` the shell starts unasked."""

    workers: int


class Retire(NamedTuple):
    """Let this worker exit; it holds nothing. Its `WorkerDown` is expected, and answered by nothing."""

    worker: int


class Slot(NamedTuple):
    """Answer to `Resume`: the worker may go on (`ok` is always True; a refusal is `Deadlocked`)."""

    worker: int
    ok: bool


class Deadlocked(NamedTuple):
    """Answer to `Blocked`: nobody would be left to run anything. The task keeps its slot and gets the error."""

    worker: int
    task: Task


class Started(NamedTuple):
    """These have been running for about `STARTED_AFTER_S`; told once for each run. `since`: monotonic seconds of each."""

    tasks: list[Task]
    since: list[float]


class Lost(NamedTuple):
    """These were running in a worker that died: an attempt is used. They are WAITING until the resolver acts.

    It ends them or says `Ready` again: at once when nothing is missing; else (the argument came from the same worker,
    was not reported, and is lost too) when the argument is there.
    """

    tasks: list[Task]


class Overran(NamedTuple):
    """The task's walltime is over and it runs still. Told once for each run; ends with the worker's `WorkerDown`."""

    worker: int
    task: Task


class Cancelled(NamedTuple):
    """These will not run: nobody holds them, and they are WAITING until the resolver ends them."""

    tasks: list[Task]


class NotCancelled(NamedTuple):
    """These run (`task.worker` says where) or have ended (it is None)."""

    tasks: list[Task]


Event = (
    Ready
    | WorkerUp
    | WorkerDown
    | Adopted
    | Rejoined
    | Finished
    | GaveBack
    | Asked
    | Blocked
    | Resume
    | Withdraw
    | Cancel
    | Tick
)
Instruction = (
    Assign | Grant | Spawn | Retire | Slot | Deadlocked | Started | Lost | Overran | Cancelled | NotCancelled
)
