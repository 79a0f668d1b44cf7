"""What user's threads ask: to cancel tasks, how a task stands, whether its home is there. The I/O thread mostly answers.

cancel, explain ──► Request ──► post ──► Submitter ──► CANCEL, EXPLAIN ──► endpoint ──► Answer ──► Request
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gcref import config
from gcref.brains import submitter_events as ev
from gcref.brains.submitter_table import CONNECTING, DOWN
from gcref.sdk.explain import WAIT_S as EXPLAIN_WAIT_S
from gcref.sdk.explain import explain, facts_of
from gcref.sdk.lending import has_running_loop
from gcref.sdk.request import Request

if TYPE_CHECKING:
    from gcref.brains.peers import Peers
    from gcref.brains.submitter import Submitter
    from gcref.brains.submitter_table import Lane
    from gcref.sdk.future import ComputeFuture
    from gcref.sdk.loop import Loop

IN_LOOP_WAIT_S: Final = 0.05
"""How long `cancel` waits on a thread that runs an event loop, which must not be held up."""


class Questions:
    """Asks in the name of user's threads. Everything but `ask_explain` may be called on any thread.

    Args:
        loop: the I/O thread.
        brain: its submitter.
    """

    def __init__(self, loop: Loop, brain: Submitter) -> None:
        self._loop = loop
        self._brain = brain
        self._next = 1

    def cancel(self, ids: list[bytes], force: bool) -> list[bool]:
        """Asks for these tasks not to run, and waits for the answer: a second at the most."""
        return self._ask_cancel(lambda: ids, force) or [False] * len(ids)

    def cancel_open(self, root: Lane) -> None:
        """Asks for what an executor and its views have open not to run, the latest first; waits as `cancel` does."""
        entries = self._loop.entries
        self._ask_cancel(
            lambda: [e.id for e in reversed(entries()) if e.lane is not None and e.lane.root is root], False
        )

    def _ask_cancel(self, which: Callable[[], list[bytes]], force: bool) -> list[bool] | None:
        loop, request = self._loop, Request()
        loop.post(lambda: loop.tell(ev.CancelAsked(request, which(), force, time.monotonic())))
        if loop.is_io_thread():
            return None
        wait_s = IN_LOOP_WAIT_S if has_running_loop() else config.CANCEL_WAIT_S + 0.1
        answer: list[bool] | None = request.wait(wait_s)
        return answer

    def explain(self, future: ComputeFuture[Any]) -> str:
        """Where a task is, what it waits for, over which carrier, since when."""
        loop = self._loop

        def ask(id: bytes) -> Request:
            request = Request()
            loop.post(lambda: self.ask_explain(id, request, loop.peers))
            return request

        return explain(future, ask, loop.where, 0.0 if loop.is_io_thread() else EXPLAIN_WAIT_S)

    def out_of_reach(self, home: bytes) -> tuple[float, str]:
        """For how long an endpoint has been out of reach, seconds, and why; 0 while it is not, or nobody needs it.

        The answer may be out of date at once.
        """
        loop = self._loop
        party = home if loop.context is None else loop.context.agent_id
        peer = self._brain.peers.get(party)
        if peer is None or peer.state not in (CONNECTING, DOWN):
            return 0.0, ""
        away_s = time.monotonic() - peer.since
        reason = f" ({peer.trouble})" if peer.trouble else ""
        return away_s, f"{loop.where.name_of(party)} has been out of reach for {away_s:.0f} s{reason}"

    def ask_explain(self, id: bytes, request: Request, peers: Peers) -> None:
        """Asks the home of an object how it stands; on the I/O thread."""
        request.facts = facts_of(self._brain.find(id), peers)
        number, self._next = self._next, self._next + 1
        self._loop.tell(ev.ExplainAsked(request, number, [id], time.monotonic()))
