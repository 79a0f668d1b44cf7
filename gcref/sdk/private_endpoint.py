"""The private endpoint of an executor: an agent that ends when its executor does, after its tasks.

end() ──► no task is open ──► live futures' values are fetched, large ones too ──► the agent stops ──► ended
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from gcref import config
from gcref.brains.submitter_table import Stored

if TYPE_CHECKING:
    from gcref.brains.submitter_table import Lane
    from gcref.sdk.agent_process import AgentProcess
    from gcref.sdk.loop import Loop

log: Final = logging.getLogger("gcref.sdk")

LOOK_EVERY_S: Final = 0.5
"""At the end of the interpreter: how often to look whether the agent still answers."""

START_WAIT_S: Final = 30.0
"""How long an agent that has not answered yet may hold up the end of the interpreter."""

GIVEN_UP_STOP_S: Final = 1.0
"""How long an agent that was given up may take to stop in order, before it is killed."""

LET_GO_S: Final = 10.0
"""How long the I/O thread may take to let go of an agent that is to be stopped."""


class PrivateEndpoint:
    """An agent for one executor.

    Args:
        process: the agent.

    Attributes:
        ended: set when the agent is gone.
    """

    def __init__(self, process: AgentProcess) -> None:
        self.process = process
        self.ended = threading.Event()
        self._once = threading.Lock()
        self._is_ending = False
        self._given_up = False

    def end(self, loop: Loop, lane: Lane) -> None:
        """Begins its end, and returns: its tasks end, live futures' values come here, then it stops."""
        with self._once:
            if self._is_ending:
                return
            self._is_ending = True
        self.process.resume()
        try:
            loop.when_quiet(lane, lambda: self._bring_values(loop, lane.home))
        except RuntimeError:  # the I/O thread has ended, and with it everything that waited
            self._stop()

    def wait_at_exit(self, loop: Loop) -> None:
        """Waits for its end; the interpreter ends, so an agent that does not answer is given up soon."""
        while not self.ended.wait(LOOK_EVERY_S):
            away_s, text = loop.questions.out_of_reach(self.process.id)
            patience_s = config.EXIT_FLUSH_S if loop.where.has_answered(self.process.id) else START_WAIT_S
            if away_s > patience_s and not self._given_up:
                self._given_up = True
                log.warning("%s: what it was given is not waited for", text)
                try:
                    loop.post(lambda: loop.reaching.process_ends(self.process))
                except RuntimeError:
                    self._stop()

    def _bring_values(self, loop: Loop, home: bytes) -> None:
        """On the I/O thread: fetches what live futures have not fetched; also what is large."""
        pulls = [loop.fetch(stored) for stored in _stored_at(loop, home)]
        left = len(pulls) + 1
        counting = threading.Lock()

        def one_less() -> None:
            nonlocal left
            with counting:
                left -= 1
                if left:
                    return
            # A thread for it: neither the I/O thread nor that of the callbacks, one of which may wait for this very end.
            threading.Thread(target=self._leave, args=(loop,), name="gcref-stop", daemon=True).start()

        for pull in pulls:
            pull.when_done(one_less)
        one_less()

    def _leave(self, loop: Loop) -> None:
        # The I/O thread must have let go of the agent's pipe before that is closed.
        let_go = threading.Event()

        def let_it_go() -> None:
            try:
                loop.reaching.process_ends(self.process)
            finally:
                let_go.set()

        try:
            loop.post(let_it_go)
            let_go.wait(LET_GO_S)
        except RuntimeError:
            pass  # it has ended
        self._stop()

    def _stop(self) -> None:
        if self._given_up:
            self.process.stop(GIVEN_UP_STOP_S)
        else:
            self.process.stop()
        self.ended.set()


def _stored_at(loop: Loop, home: bytes) -> list[Stored]:
    """The values of live futures that lie at that home still."""
    from gcref.sdk.loop import future_of

    futures = [future_of(entry) for entry in loop.entries()]
    raws = [future._raw for future in futures if future is not None]
    return [raw for raw in raws if type(raw) is Stored and raw.home == home]
