"""How this process finds an endpoint: by its record, because it started it itself, or through its own agent.

    party ──► an agent that was started here    ipc, once it has answered
          ──► inside a task: the own agent      ipc, whatever the home
          ──► $GCREF_HOME/endpoints             what its record says, as far as we may use it

Everything here is called by the I/O thread, except `name_of` and `remember`, which any thread may call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gcref import ids
from gcref.brains.submitter_table import SEEN_GONE, SEEN_RUNNING, SEEN_STOPPED, SEEN_UNKNOWN
from gcref.errors import ConfigError, EndpointLostError, GcrefError, NotFoundError

if TYPE_CHECKING:
    from gcref.directory.launch import Ready
    from gcref.directory.records import Candidate, EndpointRecord
    from gcref.sdk.agent_process import AgentProcess
    from gcref.task_context import TaskContext


class Ways(NamedTuple):
    """Ways to an endpoint, best first.

    Attributes:
        control: to its control socket.
        bulk: to its bulk socket.
        process: tells the agent that listens there now from an earlier one at the same addresses.
    """

    control: list[Candidate]
    bulk: list[Candidate]
    process: tuple[float, int] = (0.0, 0)


class Seen(NamedTuple):
    """What a look at an endpoint found.

    Attributes:
        what: one of the SEEN constants.
        text: what is the matter, and what to do.
        ways: how to reach it; None: no news.
    """

    what: str
    text: str
    ways: Ways | None


class Whereabouts:
    """Finds endpoints.

    Args:
        carriers: the ways that may be used.
        context: inside a task: its surroundings.
    """

    def __init__(self, carriers: frozenset[str], context: TaskContext | None) -> None:
        self._carriers = carriers
        self._context = context
        self._names: dict[bytes, str] = {}
        self._processes: dict[bytes, AgentProcess] = {}
        self._ready: dict[bytes, Ready] = {}
        self._gone: dict[bytes, GcrefError] = {}
        self._ephemeral: set[bytes] = set()

    def remember(self, record: EndpointRecord) -> None:
        """Notes the name of an endpoint, so that its record is found at once."""
        self._names[record.id] = record.name

    def name_of(self, party: bytes) -> str:
        """What to call an endpoint in texts for people."""
        if party in self._processes:
            return "the private endpoint"
        name = self._names.get(party)
        return f"endpoint {ids.text(party)}" if name is None else f"endpoint {name!r}"

    def knows(self, party: bytes) -> bool:
        """Whether the endpoint was started here or met before."""
        return party in self._processes or party in self._names

    def add_process(self, process: AgentProcess) -> None:
        """An agent was started here, for this process alone."""
        self._processes[process.id] = process

    def set_ready(self, party: bytes, ready: Ready) -> None:
        """That agent has said where it listens."""
        self._ready[party] = ready

    def has_answered(self, party: bytes) -> bool:
        """Whether that agent has said where it listens."""
        return party in self._ready

    def set_gone(self, party: bytes, error: GcrefError) -> None:
        """That agent has ended, or could not start: whoever looks for it hears so."""
        self._gone[party] = error
        self._ready.pop(party, None)

    def processes(self) -> list[AgentProcess]:
        """The agents that were started here."""
        return list(self._processes.values())

    def is_own(self, party: bytes) -> bool:
        """Whether the endpoint was started here, and ends with this process."""
        return party in self._processes

    def find(self, party: bytes) -> Ways | None:
        """How to reach it; None: it was started here, and has not answered yet.

        Raises:
            NotFoundError: there is no record of it.
            ConfigError: none of its addresses can be used from here; or its record is damaged.
            GcrefError: it was started here, and has ended so.
        """
        context = self._context
        if context is not None:
            return Ways([("ipc", context.control_address, None)], [("ipc", context.bulk_address, None)])
        if party in self._gone:
            raise self._gone[party]
        if party in self._processes:
            ready = self._ready.get(party)
            return (
                None if ready is None else Ways([("ipc", ready.control, None)], [("ipc", ready.bulk, None)])
            )
        record = self._record(party)
        if record is None:
            return self._unknown(party)
        return self._ways(record)

    def look(self, party: bytes) -> Seen:
        """See whether it runs, and where."""
        if self._context is not None:
            return Seen(SEEN_UNKNOWN, "the agent of this task does not answer", None)
        process = self._processes.get(party)
        if process is not None:
            return (
                Seen(SEEN_GONE, process.obituary(), None) if process.ended() else Seen(SEEN_RUNNING, "", None)
            )
        record = self._record(party)
        if record is None:
            gone = SEEN_GONE if party in self._ephemeral else SEEN_STOPPED
            return Seen(gone, f"{self.name_of(party)} was stopped, and its record is gone", None)
        alive = record.alive_here()
        if alive is None:
            return Seen(SEEN_UNKNOWN, f"{self.name_of(party)} does not answer", self._try_ways(record))
        if alive:
            return Seen(
                SEEN_RUNNING, f"{self.name_of(party)} runs, but does not answer", self._try_ways(record)
            )
        text = f"{self.name_of(party)} is not running"
        if record.ephemeral:
            return Seen(SEEN_GONE, f"{text} any more; it was started for one program only", None)
        return Seen(SEEN_STOPPED, f"{text}; start it with 'endpoint-worker start {record.name}'", None)

    def _record(self, party: bytes) -> EndpointRecord | None:
        from gcref.directory import records  # here, so that a private endpoint starts without it

        name = self._names.get(party)
        record = records.read(name) if name is not None else None
        if record is None or record.id != party:
            record = records.find(party)
        if record is not None:
            self._names[party] = record.name
            if record.ephemeral:
                self._ephemeral.add(party)
        return record

    def _unknown(self, party: bytes) -> Ways:
        if party in self._names:
            raise EndpointLostError(
                f"{self.name_of(party)} was stopped, and its record is gone", endpoint_id=ids.text(party)
            )
        from gcref.directory import records

        records.resolve(party)  # says which ones there are
        raise NotFoundError(f"there is no endpoint {ids.text(party)}")

    def _ways(self, record: EndpointRecord) -> Ways:
        control = record.candidates(self._carriers)
        if control or not record.control:
            return Ways(control, record.bulk_candidates(self._carriers), (record.started, record.pid))
        offered = ", ".join(record.control)
        raise ConfigError(
            f"endpoint {record.name!r} cannot be reached from here: it listens on {offered}, and the carriers "
            f"allowed here are {', '.join(sorted(self._carriers))} (ipc works on its own machine only). "
            "Allow another carrier, here or there",
            key="carriers",
        )

    def _try_ways(self, record: EndpointRecord) -> Ways | None:
        try:
            return self._ways(record)
        except ConfigError:
            return None
