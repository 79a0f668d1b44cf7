"""What a task leaves behind when it ends: nothing of it may be lost with its worker, which can be killed at any time.

    the function returns ──► hand_over(named) ──► the agent has taken all that was submitted, and fetched large arguments ──┐
    ┌───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
    └──► the worker reports the result ──► the agent tells of it: the futures that it names are let go here

Without the first part, a task that has ended would lose what it submitted when the worker is killed for the sake of another
one: SUBMITs wait in the worker's memory until its agent says that it has them, which an agent that is starting again says a
second later. Without the second part, the worker might let go of an object before the agent hears that a result names it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from gcref.brains.submitter_table import APART
from gcref.objects.ref import ObjectRef
from gcref.sdk.client import NO_SECRET, FutureLane
from gcref.sdk.request import Request

if TYPE_CHECKING:
    from gcref.brains.submitter import Submitter
    from gcref.sdk.loop import Loop
    from gcref.task_context import TaskContext

UPLOADS_WAIT_S: Final = 5.0
"""How long a task waits for its agent to fetch large arguments: that may need room which the task itself takes up."""


class _Waiting:
    """A task that has returned, and waits.

    Attributes:
        request: answered when all is handed over.
        upto: how many messages the agent is to have taken; None: not all of them are sent yet.
        uploads: large values that it is to have fetched.
        patience_at: when those are waited for no longer, monotonic seconds; None: it has not all the messages yet.
    """

    __slots__ = ("patience_at", "request", "uploads", "upto")

    def __init__(self, request: Request, uploads: list[bytes]) -> None:
        self.request = request
        self.uploads = uploads
        self.upto: int | None = None
        self.patience_at: float | None = None


class Handover:
    """Hands over what a worker's tasks leave behind. `hand_over` is called by the worker; all else by the I/O thread.

    Args:
        loop: the I/O thread.
        brain: its submitter.
        context: the surroundings of the tasks.
    """

    def __init__(self, loop: Loop, brain: Submitter, context: TaskContext) -> None:
        self._loop = loop
        self._brain = brain
        self._context = context
        self._submits_end = 0
        self._waiting: _Waiting | None = None  # one at a time: a worker runs one task
        context.hand_over = self.hand_over

    def hand_over(self, named: Sequence[Any]) -> None:
        """Waits until the agent has all that was submitted up to now, or can never have it.

        Args:
            named: the futures and references in the running task's result. They live until its outcome is known.
        """
        request, task = Request(), self._context.task_id
        try:
            self._loop.post(lambda: self._begin(request, task, named))
        except RuntimeError:
            return
        request.wait(None)

    def sent_submit(self) -> None:
        """What was sent last to the agent is a SUBMIT, or an OFFER."""
        self._submits_end = self._loop.peers.sent(self._context.agent_id)

    @property
    def deadline(self) -> float | None:
        """When to `look` at the latest, monotonic seconds; None: when something was heard."""
        return None if self._waiting is None else self._waiting.patience_at

    def look(self) -> None:
        """Lets the worker go on if the agent has everything by now; before each flush."""
        if self._waiting is not None and self._is_over(self._waiting):
            self.end()

    def end(self) -> None:
        """Nothing more will be handed over: the worker goes on."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.request.set(None)

    def _begin(self, request: Request, task: bytes, named: Sequence[Any]) -> None:
        if self._loop.is_broken():
            request.set(None)
            return
        if any(not isinstance(one, ObjectRef) or one._pin is not None for one in named):
            agent = self._context.agent_id
            lane = FutureLane(self._loop, agent, bytes(16), NO_SECRET, {}, 1)
            own = self._loop.open(task, agent, None, lane)
            if not own.done():
                self._loop.hold(own, *named)
        self._waiting = _Waiting(request, self._loop.large.uploads())

    def _is_over(self, waiting: _Waiting) -> bool:
        agent, peers, large = self._context.agent_id, self._loop.peers, self._loop.large
        peer = self._brain.peers.get(agent)
        if peer is None or peer.state == APART:
            return True
        taken = peers.sent(agent) - peers.pending(agent)
        if waiting.upto is None:
            if peer.outbox:
                return False
            waiting.upto = self._submits_end
            if taken < waiting.upto:
                peers.ask(agent)
        if taken < waiting.upto:
            return False
        waiting.uploads = [id for id in waiting.uploads if large.is_uploading(id)]
        now = time.monotonic()
        if waiting.patience_at is None:
            waiting.patience_at = now + UPLOADS_WAIT_S
        return not waiting.uploads or now >= waiting.patience_at
