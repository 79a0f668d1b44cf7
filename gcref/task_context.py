"""What a task's process tells the SDK that is loaded in it.

The worker's runtime puts one `TaskContext` here before it runs the first task; the SDK looks at `current`
when an `Executor` is made and when a future is waited for. In every other process `current` is None. This
module knows neither side, which is what lets the two sides not know each other.

    worker runtime ──sets──▶ task_context.current ◀──reads── Executor, ComputeFuture.result()
                   ──calls─▶       .hand_over     ◀──sets─── the SDK's I/O thread, when it starts (`sdk.handover`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager


class TaskContext:
    """The surroundings of the running task.

    There is one for each worker process. Its runtime changes `task_id` and `group` from task to task.

    Attributes:
        agent_id: id of the endpoint that this worker belongs to.
        control_address: where its agent takes messages (`ipc://…`).
        bulk_address: where its agent serves bytes (`ipc://…`).
        party: the party id that this process must use as a client.
        blocking: makes the context manager that surrounds a wait for an unfinished future in the main thread of
            a task. Entering lends this worker's slot to another task, leaving waits for a slot. Entering may
            raise `DeadlockError`.
        task_id: id of the running task, `b""` between tasks.
        group: id of the running task's group, `b""` between tasks.
        submitted: the running task has submitted something; set by the SDK.
        hand_over: set by the SDK. The runtime calls it before it reports the result of a task that has submitted
            something, or whose result names futures or references (those are its argument). It returns when the agent
            has what was submitted, which then is not lost with this process any more; what the result names is kept
            until the agent has the result. None: the SDK is not in use.
    """

    __slots__ = (
        "agent_id", "blocking", "bulk_address", "control_address", "group", "hand_over", "party", "submitted", "task_id",
    )  # fmt: skip

    def __init__(
        self,
        agent_id: bytes,
        control_address: str,
        bulk_address: str,
        party: bytes,
        blocking: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.agent_id = agent_id
        self.control_address = control_address
        self.bulk_address = bulk_address
        self.party = party
        self.blocking = blocking
        self.task_id = b""
        self.group = b""
        self.submitted = False
        self.hand_over: Callable[[Sequence[Any]], None] | None = None


current: TaskContext | None = None
