"""The workers of an endpoint, as the control loop sees them: numbers, processes, channels, known functions.

Who runs what is decided by the dispatch brain; here its decisions become messages and processes. A worker's number is
never used again, so a late message of a dead worker can only be about itself.

Workers of an earlier agent (`adopt`) are told so as soon as they can be reached: `tick` at `deadline` tries. What they say
before ADOPTED was said to the dead: only their results are passed on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from endpoint_worker.agent.stopping import stop
from endpoint_worker.worker import channel
from endpoint_worker.worker.channel import AgentChannel
from endpoint_worker.worker.remains import Exited, Remains, WorkerConfig
from endpoint_worker.worker.zygote import Zygote
from gcref import ids

_ADOPT_RETRY_S: Final = 0.005
"""Workers find a new agent within some hundredths of a second; one that is stopped may take for ever."""
_ADOPT_RETRY_MAX_S: Final = 1.0


class Message(NamedTuple):
    """A message of a worker: its array, and the frame that it came in."""

    worker: int
    body: list[Any]
    raw: bytes


class Pool:
    """Starts and ends workers, and speaks with them.

    Args:
        zygote: makes the processes.
        channel: the agent's end of the worker channel.
        endpoint: the endpoint's name, for the workers' names and error notes.
        agent_id: the endpoint's id.
        control_address, bulk_address: where the SDK inside tasks finds the agent.
        environment: the environment variables of a worker, by its number, beside the agent's own.
        memory_bytes: what the tasks of a worker may take of memory; None: no limit.

    Attributes:
        deadline: when `tick` is due, monotonic seconds; None: it is not.
    """

    def __init__(
        self,
        zygote: Zygote,
        channel_: AgentChannel,
        *,
        endpoint: str,
        agent_id: bytes,
        control_address: str,
        bulk_address: str,
        environment: Callable[[int], Mapping[str, str]],
        memory_bytes: int | None = None,
    ) -> None:
        self.zygote = zygote
        self.channel = channel_
        self._endpoint = endpoint
        self._agent_id = agent_id
        self._control_address = control_address
        self._bulk_address = bulk_address
        self._environment = environment
        self._memory_bytes = memory_bytes
        self._next = 1
        self._pids: dict[int, int] = {}
        self._parties: dict[int, bytes] = {}
        self._workers_of: dict[bytes, int] = {}
        self._functions: dict[int, set[bytes]] = {}
        self._epoch = time.monotonic_ns()  # another one than any agent's before on this machine
        self._adopting: dict[int, bool] = {}  # who has not said ADOPTED: whether they have been told
        self._retry_s = _ADOPT_RETRY_S
        self.deadline: float | None = None

    # ---------------------------------------------------------------------------------------------- processes

    def spawn(self, count: int) -> None:
        """Start so many new workers; each says READY when it is up."""
        for _ in range(count):
            worker, self._next = self._next, self._next + 1
            party = ids.new_id()
            self._parties[worker] = party
            self._workers_of[party] = worker
            self._functions[worker] = set()
            config = WorkerConfig(
                channel=self.channel.address,
                agent_id=self._agent_id,
                endpoint=self._endpoint,
                control_address=self._control_address,
                bulk_address=self._bulk_address,
                party=party,
                memory_bytes=self._memory_bytes,
            )
            self.zygote.spawn(worker, config, self._environment(worker))

    def adopt(self, remains: Sequence[Remains]) -> None:
        """Take over what an earlier agent has left, before anything is spawned: of the dead, their numbers alone."""
        for one in remains:
            worker = one.worker
            self._next = max(self._next, worker + 1)
            if one.exited is not None:
                continue
            self._pids[worker] = one.pid
            self._parties[worker] = one.config.party
            self._workers_of[one.config.party] = worker
            self._functions[worker] = set()
            self._adopting[worker] = False
        if self._adopting:
            self.deadline = 0.0

    def tick(self, now: float) -> None:
        """Tell adopted workers that can be reached by now that there is a new agent. Due at `deadline`."""
        for worker, told in self._adopting.items():
            if not told:
                self._adopting[worker] = self._send(worker, channel.adopt(self._epoch))
        self.deadline = None
        if not all(self._adopting.values()):
            self.deadline = now + self._retry_s
            self._retry_s = min(self._retry_s * 1.5, _ADOPT_RETRY_MAX_S)

    def started(self, worker: int, pid: int) -> None:
        """The worker's process is `pid`."""
        self._pids[worker] = pid

    def gone(self, exited: Exited) -> bytes:
        """Forget a dead worker; gives the party id of the SDK inside its tasks."""
        worker = exited.worker
        self._pids.pop(worker, None)
        self._functions.pop(worker, None)
        self._adopting.pop(worker, None)
        party = self._parties.pop(worker, b"")
        self._workers_of.pop(party, None)
        return party

    def kill(self, worker: int) -> None:
        """SIGKILL; its exit is reported as any other."""
        self.zygote.kill(worker)

    def kill_at(self, worker: int, seq: int) -> bool:
        """Kill it for an entry, unless it has ended that: the next one, which it may have begun just now, is not to blame.

        Returns:
            Whether it was killed. Else the result of the entry is on its way, or will be when we have what that submitted.
        """
        pid = self._pids.get(worker)
        was_stopped = pid is not None and stop(pid, self.zygote.pid)
        if not self.zygote.has_ended(worker, seq):
            self.zygote.kill(worker)
            return True
        if was_stopped and pid is not None:
            os.kill(pid, signal.SIGCONT)
        return False

    def retire(self, worker: int) -> None:
        """Let it end when it has sent what it holds."""
        self._send(worker, channel.exit())

    def worker_of_party(self, party: bytes) -> int | None:
        """The worker whose tasks' SDK is that party, or None."""
        return self._workers_of.get(party)

    def name_of(self, worker: int) -> str:
        """A worker's name in records: endpoint and number."""
        return f"{self._endpoint}/{worker}"

    def pid_of(self, worker: int) -> int | None:
        """Its process, once that is known."""
        return self._pids.get(worker)

    def progress(self) -> dict[int, int]:
        """For each worker the seq of the entry that it started last."""
        return {worker: self.zygote.progress(worker) for worker in self._pids}

    def describe(self) -> list[dict[str, Any]]:
        """For STATUS."""
        return [{"worker": self.name_of(worker), "pid": pid} for worker, pid in self._pids.items()]

    # ----------------------------------------------------------------------------------------------- messages

    def _send(self, worker: int, frame: bytes) -> bool:
        return self.channel.send(worker, frame)

    def receive(self) -> list[Message]:
        """What the workers have said; never blocks."""
        said = [Message(*found) for found in self.channel.receive()]
        if self._adopting:
            said = [
                message for message in said if message.worker not in self._adopting or self._counts(message)
            ]
        return said

    def _counts(self, message: Message) -> bool:
        """Whether what a worker says that is being adopted is for us."""
        worker, body, _ = message
        if body[0] == channel.DONE:
            body[2] = []  # grants that another store has given
            return bool(body[1])
        if body[0] != channel.ADOPTED or body[3] != self._epoch:
            return False
        del self._adopting[worker]
        self._functions[worker] = set(body[7])
        return True

    def has_function(self, worker: int, digest: bytes) -> bool:
        """Whether the worker has been sent this function."""
        return digest in self._functions.get(worker, ())

    def send_function(self, worker: int, digest: bytes, code: bytes) -> None:
        """Send a function, ahead of the entries that use it."""
        self._functions[worker].add(digest)
        self._send(worker, channel.function(digest, code))

    def send_tasks(self, worker: int, lease_until: float, entries: list[Any]) -> bool:
        """Append entries to a worker's queue; False when it is not connected any more."""
        return self._send(worker, channel.tasks(lease_until, entries))

    def grant(self, worker: int, lease_until: float, revoked: list[int]) -> None:
        """Answer ASK, or take entries back."""
        self._send(worker, channel.grant(lease_until, revoked))

    def segment(self, worker: int, path: str, capacity: int, warm: bool) -> None:
        """Answer ALLOC."""
        self._send(worker, channel.segment(path, capacity, warm))

    def no_segment(self, worker: int, failure: list[Any]) -> None:
        """Answer ALLOC: there is no room."""
        self._send(worker, channel.no_segment(failure))

    def slot(self, worker: int, failure: list[Any] | None) -> None:
        """Answer BLOCKED or RESUME; with a failure, the task raises it."""
        self._send(worker, channel.slot(failure is None, failure))

    def unmap(self) -> None:
        """Ask every worker to look again for mappings that it can close."""
        for worker in self._pids:
            self._send(worker, channel.unmap())
